"""Ending on time: how many steps a run still makes, decided again and again from the speed it has."""

from __future__ import annotations

KEEP = 0.005  # a plan that is right within this share of its steps is kept
RECENT = 0.3  # how much the latest speed counts against the ones before


class Deadline:
    """Plans the number of steps so that training, what follows it included, ends `seconds` after `before` began.

    seconds: for everything: starting, compiling, updates, evaluations, the end.
    before: what had passed when the trainer's own clock began.
    pause: the expected length of one evaluation with its checkpoint and preview, until one has been measured.
    ending: what comes after the last step: the last evaluation, samples, the report.
    """

    def __init__(self, seconds: float, *, before: float, pause: float, ending: float) -> None:
        self.seconds, self.before, self.pause, self.ending = seconds, before, pause, ending
        self.expected_pause = pause
        self.seconds_per_step: float | None = None
        self.first_seconds_per_step = 0.0
        self.last: tuple[int, float] | None = None

    def paused(self, seconds: float) -> None:
        """An evaluation took that long."""
        self.pause = seconds

    def plan(self, step: int, steps: int, update_seconds: float, elapsed: float, eval_every: int) -> int:
        """The new total of steps, at least `step` + 1.

        steps: as planned so far. update_seconds: spent in updates, in all. elapsed: by the trainer's clock.
        eval_every: steps between evaluations.
        """
        if self.last is not None and step > self.last[0]:
            recent = (update_seconds - self.last[1]) / (step - self.last[0])
            known = self.seconds_per_step or recent
            self.first_seconds_per_step = self.first_seconds_per_step or recent
            self.seconds_per_step = known + RECENT * (recent - known)
        self.last = (step, update_seconds)
        if self.seconds_per_step is None:  # the first steps warm up: they say little
            return steps
        slower = max(1.0, self.seconds_per_step / self.first_seconds_per_step)
        if self.expected_pause:
            slower = max(slower, self.pause / self.expected_pause)  # then the end will take longer as well
        left = self.seconds - self.before - elapsed - slower * self.ending
        about = max(0, int(left / (self.seconds_per_step + self.pause / eval_every)))
        pauses = (step + about - 1) // eval_every - step // eval_every  # evaluations before the last
        planned = max(step + 1, step + round((left - pauses * self.pause) / self.seconds_per_step))
        return steps if abs(planned - steps) <= KEEP * (steps - step) else planned

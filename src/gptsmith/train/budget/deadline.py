"""Ending on time: the number of steps of a run, re-planned from the speed it has."""

from __future__ import annotations

KEEP = 0.005  # a plan that is right within this share of its steps is kept
RECENT = 0.3  # weight of the latest speed in the average


class Deadline:
    """Plan the number of steps so that training and what follows it end within `seconds`.

    seconds: for everything: starting, compiling, updates, evaluations, the report.
    before: seconds that had passed when the trainer's own clock started.
    eval_seconds: expected duration of one evaluation with its checkpoint and preview, until one has been measured.
    teardown_seconds: time after the last step: the last evaluation, samples, the report.
    """

    def __init__(self, seconds: float, *, before: float, eval_seconds: float, teardown_seconds: float) -> None:
        self.seconds, self.before = seconds, before
        self.eval_seconds, self.teardown_seconds = eval_seconds, teardown_seconds
        self.expected_eval_seconds = eval_seconds
        self.seconds_per_step: float | None = None
        self.first_seconds_per_step = 0.0
        self.last: tuple[int, float] | None = None

    def record_evaluation(self, seconds: float) -> None:
        """Take the measured duration of an evaluation."""
        self.eval_seconds = seconds

    def plan(self, step: int, steps: int, update_seconds: float, elapsed: float, eval_every: int) -> int:
        """Return the new total of steps, at least `step` + 1.

        steps: planned so far. update_seconds: spent in updates, in total. elapsed: by the trainer's clock.
        eval_every: steps between evaluations.
        """
        if self.last is not None and step > self.last[0]:
            recent = (update_seconds - self.last[1]) / (step - self.last[0])
            known = self.seconds_per_step or recent
            self.first_seconds_per_step = self.first_seconds_per_step or recent
            self.seconds_per_step = known + RECENT * (recent - known)
        self.last = (step, update_seconds)
        if self.seconds_per_step is None:  # the first steps warm up and say little
            return steps
        slowdown = max(1.0, self.seconds_per_step / self.first_seconds_per_step)
        if self.expected_eval_seconds:  # the teardown will take longer as well
            slowdown = max(slowdown, self.eval_seconds / self.expected_eval_seconds)
        left = self.seconds - self.before - elapsed - slowdown * self.teardown_seconds
        about = max(0, int(left / (self.seconds_per_step + self.eval_seconds / eval_every)))
        evaluations = (step + about - 1) // eval_every - step // eval_every  # before the last
        planned = max(step + 1, step + round((left - evaluations * self.eval_seconds) / self.seconds_per_step))
        return steps if abs(planned - steps) <= KEEP * (steps - step) else planned

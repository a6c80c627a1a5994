from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gptsmith.train.budget.deadline import Deadline
from gptsmith.train.config import run_config
from gptsmith.train.trainer import Trainer


def train(deadline: Deadline, steps: int, speed: Callable[[float], float], *, eval_every: int, pause: float) -> float:
    """A trainer by an invented clock: `speed(t)` is the seconds of an update at time t. Returns when all has ended.

    What comes after the last step takes as much longer as updates do by then, or evaluations.
    """
    expected = deadline.eval_seconds
    clock, update_seconds, step = 0.0, 0.0, 0
    while step < steps:
        seconds = speed(clock)
        clock, update_seconds, step = clock + seconds, update_seconds + seconds, step + 1
        if step % 5 == 0 and step < steps:
            steps = deadline.plan(step, steps, update_seconds, clock, eval_every)
        if step % eval_every == 0 and step < steps:
            clock += pause
            deadline.record_evaluation(pause)
    return deadline.before + clock + deadline.teardown_seconds * max(1.0, speed(clock) / speed(0.0), pause / expected)


@pytest.mark.parametrize("planned", [200, 1000, 5000])
@pytest.mark.parametrize(
    "speed",
    [
        lambda t: 0.1,
        lambda t: 0.1 if t < 30 else 0.3,  # three times slower from a third on
        lambda t: 0.3 if t < 50 else 0.1,
        lambda t: 0.1 + 0.05 * ((t * 7) % 1.0),  # uneven
    ],
)
def test_ends_on_time_whatever_was_planned_and_however_fast_the_machine_turns_out(
    planned: int, speed: Callable[[float], float]
) -> None:
    deadline = Deadline(100.0, before=4.0, eval_seconds=1.0, teardown_seconds=3.0)
    assert train(deadline, planned, speed, eval_every=max(1, planned // 6), pause=1.0) == pytest.approx(100, rel=0.05)


def test_an_end_that_will_take_longer_than_foreseen_is_seen_in_the_evaluations_before() -> None:
    deadline = Deadline(100.0, before=4.0, eval_seconds=1.0, teardown_seconds=6.0)
    assert train(deadline, 800, lambda t: 0.1, eval_every=150, pause=3.0) == pytest.approx(100, abs=1)


def test_a_plan_that_is_nearly_right_is_kept() -> None:
    deadline = Deadline(100.0, before=0.0, eval_seconds=0.0, teardown_seconds=0.0)
    assert deadline.plan(10, 1000, 1.0, 1.0, 200) == 1000  # nothing known yet
    assert deadline.plan(20, 1000, 2.0, 2.0, 200) == 1000
    assert deadline.plan(30, 990, 3.0, 3.0, 200) == 1000


def test_after_the_deadline_one_last_step_is_made() -> None:
    deadline = Deadline(10.0, before=0.0, eval_seconds=0.0, teardown_seconds=0.0)
    deadline.plan(10, 1000, 1.0, 1.0, 200)
    assert deadline.plan(20, 1000, 2.0, 50.0, 200) == 21


def test_a_machine_that_was_taken_for_a_hundred_times_slower_than_it_is() -> None:
    deadline = Deadline(100.0, before=4.0, eval_seconds=3.0, teardown_seconds=6.0)
    assert train(deadline, 31, lambda t: 3.0 if t < 40 else 0.1, eval_every=20, pause=1.0) == pytest.approx(
        100, rel=0.05
    )


def test_a_plan_of_many_more_steps_spreads_its_evaluations() -> None:
    config = run_config(steps=31, eval_every=6)
    run = SimpleNamespace(
        config=config, deadline=Deadline(9.0, before=0.0, eval_seconds=0.0, teardown_seconds=0.0), steps=31
    )
    every: Any = vars(Trainer)["eval_every"].fget
    assert every(run) == 6
    run.steps = 1000
    assert 5 <= 1000 / every(run) <= 2 * 31 / 6
    run.deadline = None
    assert every(run) == 6

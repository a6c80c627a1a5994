"""Addition problems: the smallest task whose answers can be checked exactly."""

from __future__ import annotations

import random
import re

from gptsmith.errors import UsageError
from gptsmith.tasks.base import Conversation

_INTEGER = re.compile(r"-?\d[\d,]*")


class Arithmetic:
    """Sums of two random numbers: `17 + 25 =`. An answer is right if the last integer in it is the sum.

    digits: the most digits of a summand. seed: other seeds give other problems.
    """

    def __init__(self, *, num_examples: int = 1000, digits: int = 2, seed: int = 0) -> None:
        if num_examples < 1 or digits < 1:
            raise UsageError(
                f"the task arithmetic needs at least one example and one digit, not num_examples={num_examples} and "
                f"digits={digits}."
            )
        self.num_examples, self.digits, self.seed = num_examples, digits, seed

    def __len__(self) -> int:
        return self.num_examples

    def summands(self, i: int) -> tuple[int, int]:
        """Return the two numbers of example `i`, uniform over [0, 10^digits)."""
        if not 0 <= i < self.num_examples:
            raise IndexError(f"there is no example {i} of {self.num_examples}")
        rng = random.Random(f"{self.seed} {i}")
        return rng.randrange(10**self.digits), rng.randrange(10**self.digits)

    def example(self, i: int) -> Conversation:
        a, b = self.summands(i)
        return [{"role": "user", "content": f"{a} + {b} ="}]

    def answer(self, i: int) -> str:
        return str(sum(self.summands(i)))

    def score(self, i: int, answer: str) -> float:
        integers = _INTEGER.findall(answer)
        return float(bool(integers) and int(integers[-1].replace(",", "")) == sum(self.summands(i)))

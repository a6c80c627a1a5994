"""Training budgets as text: `5m`, `2h`, `1e15flop`, `200Mtok`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gptsmith.errors import UsageError

Kind = Literal["seconds", "flops", "tokens"]

_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_NUMBER = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)"
EXAMPLES = "5m, 2h, 90s, 1h30m (time), 1e15flop (arithmetic), 200Mtok (tokens)"


@dataclass(frozen=True)
class Budget:
    """What a run can use: seconds of wall-clock time, floating-point operations, or training tokens."""

    kind: Kind
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse a budget. UsageError, with examples, for anything else."""
        plain = text.strip().lower().replace(" ", "").replace("_", "")
        if match := re.fullmatch(_NUMBER + r"([kmgbtpe]?)(flops?|toks?|tokens?)", plain):
            amount = float(match[1]) * _SCALES[match[2]]
            return cls._checked("flops" if match[3].startswith("flop") else "tokens", amount, text)
        units = "|".join(_SECONDS)
        if re.fullmatch(rf"(?:{_NUMBER}(?:{units}))+", plain):
            parts = re.findall(rf"{_NUMBER}({'|'.join(sorted(_SECONDS, key=len, reverse=True))})", plain)
            return cls._checked("seconds", sum(float(number) * _SECONDS[unit] for number, unit in parts), text)
        hint = " Add a unit." if re.fullmatch(_NUMBER, plain) else ""
        raise UsageError(f"--budget {text!r} is not a budget.{hint} Examples: {EXAMPLES}.")

    @classmethod
    def _checked(cls, kind: Kind, amount: float, text: str) -> Budget:
        if not 0 < amount < float("inf"):
            raise UsageError(f"--budget {text!r} must be above 0. Examples: {EXAMPLES}.")
        return cls(kind, amount)

    def __str__(self) -> str:
        from gptsmith.log import duration

        if self.kind == "seconds":
            return duration(self.amount)
        return f"{self.amount:.3g} {'FLOP' if self.kind == 'flops' else 'tokens'}"

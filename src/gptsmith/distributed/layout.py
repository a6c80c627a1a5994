"""How the processes of a run share its model and its batches: `--parallel fsdp=8,tp=2`. No torch here.

dp      each process has a copy of the model and rows of its own
fsdp    as dp, but parameters, gradients and optimizer state are divided among the processes
ep      as dp, but the experts of a mixture are divided among the processes
tp      processes share rows, and each computes a part of every layer

The axes multiply. Ranks are numbered with tp innermost, then ep, fsdp, dp: tensor parallelism talks most, so its
processes are neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gptsmith.errors import UsageError
from gptsmith.model.config import ModelConfig

AXES = ("dp", "fsdp", "ep", "tp")
DATA_AXES = ("dp", "fsdp", "ep")  # along which ranks have different rows
AUTO = "auto"
FORMS = "--parallel takes auto, or axes with their sizes, as in fsdp=8,tp=2: dp, fsdp, hsdp=REPLICASxSHARDS, tp, ep"


@dataclass(frozen=True)
class Layout:
    """The size of each axis; their product is the number of processes."""

    dp: int = 1
    fsdp: int = 1
    ep: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str, processes: int | None = None) -> Layout:
        """Return the layout that `text` describes for a number of processes.

        One axis can stand without a size, and takes what is left ("fsdp,tp=2"); otherwise dp does. hsdp=2x4 is
        dp=2,fsdp=4. processes: None: as many as the axes make. Raises UsageError where the text is not of this form, or
        where the processes do not divide.
        """
        sizes: dict[str, int] = {}
        open_axis: str | None = None
        for part in text.split(","):
            name, given, value = (piece.strip() for piece in part.partition("="))
            if name == "hsdp":
                replicas, _, shards = value.partition("x")
                axes = [("dp", replicas), ("fsdp", shards)]
            elif name in AXES and not given:
                if open_axis is not None:
                    raise UsageError(f"--parallel {text}: {open_axis} and {name} have no size; only one axis can.")
                axes, open_axis = [(name, "")], name
            else:
                axes = [(name, value)]
            for axis, number in axes:
                if axis not in AXES or (axis != open_axis and not (number.isdecimal() and int(number))):
                    raise UsageError(f"--parallel {text}: {part.strip()!r} is not an axis with a size. {FORMS}.")
                if axis in sizes:
                    raise UsageError(f"--parallel {text}: {axis} is given twice.")
                sizes[axis] = int(number or 1)
        taken = math.prod(sizes.values())
        if processes is not None:
            rest = open_axis or ("dp" if "dp" not in sizes else None)
            if processes % taken or (rest is None and processes != taken):
                raise UsageError(
                    f"--parallel {text} needs {'a multiple of ' if rest else ''}{taken} "
                    f"process{'es' if taken > 1 else ''}, not {processes}: change the sizes of its axes, or the number "
                    "of processes."
                )
            if rest is not None:
                sizes[rest] = processes // taken
        return cls(**sizes)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.dp * self.fsdp * self.ep * self.tp

    @property
    def data_size(self) -> int:
        """Among how many processes a batch is divided."""
        return self.dp * self.fsdp * self.ep

    @property
    def sizes(self) -> dict[str, int]:
        """The axes with more than one process, from the outermost; at least one axis."""
        found = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) > 1}
        return found or {"dp": 1}

    @property
    def divides_model(self) -> bool:
        """Whether no process has the whole model. Then every forward pass is one of several processes together."""
        return self.fsdp > 1 or self.ep > 1 or self.tp > 1

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return where process `rank` is along each axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {axis: found[axis] for axis in AXES}

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items())

    def check(self, config: ModelConfig) -> None:
        """Raise UsageError for a model that cannot be divided so."""
        for problem in self.problems(config):
            raise UsageError(f"--parallel {self}: {problem}")

    def problems(self, config: ModelConfig) -> Iterable[str]:
        """Yield why a model cannot be divided so."""
        if self.ep > 1:
            if not config.num_experts:
                yield "ep divides the experts of a mixture, and this model has none. Use fsdp or tp."
            elif config.num_experts % self.ep:
                yield f"{config.num_experts} experts cannot be divided by ep={self.ep}."
        if self.tp == 1:
            return
        if config.qk_norm and config.qk_norm_scope == "all" and config.norm == "layernorm":
            yield "tp does not divide a LayerNorm over the queries of all heads. Use fsdp."
        what = {
            "attention heads": config.num_attention_heads,
            "key/value heads": config.num_key_value_heads,
            "entries of the vocabulary": config.vocab_size,
        }
        if config.num_experts:
            what["units of the shared expert"] = config.shared_expert_intermediate_size
            what["units of the dense layers"] = config.dense_intermediate_size or 0
            if self.ep == 1:
                what["units of an expert"] = config.intermediate_size
        else:
            what["units of the feed-forward layer"] = config.intermediate_size
        for name, number in what.items():
            if number % self.tp:
                yield f"{number:,} {name} cannot be divided by tp={self.tp}. Choose a tp that divides, or use fsdp."

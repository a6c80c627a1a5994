"""`gptsmith dry-run`: run an update of many simulated processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptsmith.cli.run_options import RunOptions, parse_run
from gptsmith.errors import UsageError

if TYPE_CHECKING:
    from gptsmith.train.forecast.dry_run import DryRun as Found


@dataclass(frozen=True)
class DryRun(RunOptions):
    """Run an update of many simulated processes: the real code on tensors without storage, one process at a time.

    Prints the memory of a process, every kind of collective with its bytes, and whether all processes issue the same
    sequence. Takes the options of train, without data.
    """

    ranks: int = 8
    """Number of processes."""
    json: bool = False
    """Print the result as JSON."""


def main(arguments: list[str]) -> int:
    chosen, _ = parse_run(DryRun, "dry-run", arguments)
    config = chosen.run
    if chosen.ranks < 2:
        raise UsageError(f"--ranks must be at least 2, not {chosen.ranks}.")
    if config.parallel.processes > 1:
        raise UsageError("dry-run starts no processes: give their number as --ranks, and leave out --processes.")
    if config.auto.budget is not None or config.auto.depth is not None or config.init.init is not None:
        raise UsageError("dry-run needs a model of a given size: leave out --budget, --depth and --init.")
    if config.adapter.lora == "on":
        raise UsageError("dry-run trains all weights: leave out --lora.")
    layout = config.parallel.layout(chosen.ranks)
    if layout is None:
        raise UsageError("--parallel auto: dry-run needs a layout, such as fsdp=8,tp=2.")
    from gptsmith.cli.plan import vocabulary
    from gptsmith.train.forecast.dry_run import dry_run

    model = config.model.build(vocabulary(config), config.loop.context)
    found = dry_run(config, model, layout)
    print(json.dumps(found.to_dict(), indent=2) if chosen.json else describe(found))
    return 0 if found.same else 1


def describe(found: Found) -> str:
    """Return the result as text."""
    from gptsmith.cli.plan import length
    from gptsmith.train.forecast.memory import gigabytes

    rows = [
        ("layout", f"{found.layout}: {found.ranks:,} processes"),
        ("update", f"{found.micro_batches} × {found.micro_batch_size} sequences in each"),
        ("memory", f"{gigabytes(sum(found.memory.values()))} in each at most, in a {found.peak}"),
    ]
    names = {"others": "activations, logits, gathered weights and messages"}
    rows += [("", f"{gigabytes(size):>10}  {names.get(part, part)}") for part, size in found.memory.items()]
    last = ""
    for each in found.traffic:
        title = "" if each.moment == last else "in each micro-batch" if each.moment == "micro-batch" else "in an update"
        last = each.moment
        if title:
            rows.append(("collectives", title))
        rows.append(
            (
                "",
                f"{each.count:>6,} {each.kind} of {gigabytes(each.bytes)} in all along {each.axes} "
                f"({each.processes:,} processes): {gigabytes(each.sent)} sent",
            )
        )
    what = "all issue the same sequence" if found.same else f"they differ: {found.difference}"
    ran = ", ".join(f"{rank:,}" for rank in found.simulated)
    rows.append(("sequence", f"{what} ({found.classes} kinds of processes; ran {ran})"))
    rows.append(("took", length(found.seconds)))
    return "\n".join(f"{name:12}{value}" for name, value in rows)

"""`gptsmith find-lr`: a learning-rate range test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptsmith.cli.run_options import RunOptions, parse_run, refuse_processes
from gptsmith.errors import UsageError
from gptsmith.log import note, progress
from gptsmith.train.config import RunConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gptsmith.train.range_test import RangeTest


@dataclass(frozen=True)
class FindLr(RunOptions):
    """Find a learning rate: raise it during a short run until the loss explodes. Takes the options of train.

    All learning rates rise together, from 1/100,000 of --optim.lr (with muon, also of --optim.embedding-lr) to 100
    times that.
    """

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DATA ...")] = ()
    """Files of text or rows (.jsonl, .json, .csv, .parquet, .arrow; also .gz, .zst), folders, or named corpora
    (`gptsmith data list`)."""
    out: Path | None = None
    """Picture to write (default: runs/find-lr-NAME.png, numbered if taken)."""
    updates: int = 100
    """Number of learning rates to try, one per update."""
    lowest: float = 1e-5
    """First learning rate, relative to the configured one."""
    highest: float = 100.0
    """Last learning rate, relative to the configured one."""


def main(arguments: list[str]) -> int:
    chosen, overrides = parse_run(FindLr, "find-lr", arguments)
    refuse_processes(chosen.run, "find-lr")
    if not any(chosen.data):
        raise UsageError("No data given. Pass a text file, a folder or a named corpus: gptsmith find-lr input.txt")
    config = chosen.run
    if config.auto.budget is not None or config.auto.depth is not None:
        raise UsageError("--budget and --depth choose the learning rate themselves; set the size of the model instead.")

    from gptsmith.data.sources import open_source

    out = _place(chosen.out, open_source(chosen.data, field=config.data.field).name)

    from gptsmith.report.curves import learning_rate_figure
    from gptsmith.report.figures import save_png
    from gptsmith.runtime import choose_device, keep_freed_memory
    from gptsmith.storage import explain_os_errors
    from gptsmith.train.init import adapted_to_init, load_init
    from gptsmith.train.objectives.registry import METHODS
    from gptsmith.train.range_test import range_test
    from gptsmith.train.text import Text, read_text

    device = choose_device(config.loop.device)
    init = None
    if config.init.init is None:
        tokenizer, dataset = read_text(chosen.data, config)
    else:
        init = load_init(config.init.init)
        config = adapted_to_init(config, overrides, init)
        METHODS["pretrain"].check_pictures("pretraining", config, init)
        tokenizer, dataset = init.tokenizer, Text.open(chosen.data, config).prepare(config, init.tokenizer)
    keep_freed_memory()
    with progress(chosen.updates, "trying learning rates") as bar:
        found = range_test(
            config,
            tokenizer,
            dataset,
            device,
            init=init,
            updates=chosen.updates,
            lowest=chosen.lowest,
            highest=chosen.highest,
            on_update=lambda loss: bar.advance(1),
        )
    optim = config.optim
    rates = found.factors * optim.lr
    marks = {"steepest": found.steepest * optim.lr, "lowest / 10": found.tenth_of_lowest * optim.lr}
    with explain_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    save_png(learning_rate_figure(rates, found.losses, found.smoothed, marks), out)
    print(terminal_plot(rates, found.smoothed))
    print(_advice(found, config))
    print(f"picture     {out}")
    return 0


def _place(out: Path | None, name: str) -> Path:
    """Return the path of the picture, which must not exist yet."""
    if out is not None:
        if out.exists():
            raise UsageError(f"--out {out} already exists. Choose another name.")
        return out if out.suffix == ".png" else out.with_name(out.name + ".png")
    number = 1
    while (path := Path("runs") / f"find-lr-{name}{'' if number == 1 else f'-{number}'}.png").exists():
        number += 1
    return path


def _advice(found: RangeTest, config: RunConfig) -> str:
    if not found.is_conclusive:
        note("warning: the loss hardly fell before it exploded; the rates below are uncertain. Try more --updates.")
    lines = []
    rules = (("steepest", found.steepest), ("lowest / 10", found.tenth_of_lowest))
    for rule, factor in rules:
        options = f"--optim.lr {factor * config.optim.lr:.2g}"
        if config.optim.name == "muon":
            options += f" --optim.embedding-lr {factor * config.optim.embedding_lr:.2g}"
        lines.append(f"{rule:12}{options}")
    if len(found.losses) and found.lowest == len(found.losses) - 1:
        note("note: the loss was still falling at the highest learning rate. Try a larger --highest.")
    return "\n".join(lines)


def terminal_plot(rates: NDArray[np.float64], losses: NDArray[np.float64], *, width: int = 68, height: int = 12) -> str:
    """Return a text plot of the loss over the logarithm of the learning rate."""
    import math

    low, high = float(losses.min()), float(losses.max())
    first, last = math.log10(rates[0]), math.log10(rates[-1])
    cells = [[" "] * width for _ in range(height)]
    for rate, loss in zip(rates, losses, strict=True):
        column = round((math.log10(rate) - first) / max(1e-9, last - first) * (width - 1))
        row = round((high - loss) / max(1e-9, high - low) * (height - 1))
        cells[row][column] = "•"
    lines = []
    for row, line in enumerate(cells):
        label = f"{high - (high - low) * row / (height - 1):7.2f}" if row in (0, height - 1) else " " * 7
        lines.append(f"{label} │{''.join(line).rstrip()}")
    lines.append(" " * 8 + "└" + "─" * width)
    left, right = f"{rates[0]:.1g}", f"{rates[-1]:.1g}"
    lines.append(" " * 9 + left + " learning rate ".center(width - len(left) - len(right)) + right)
    return "\n".join(lines)

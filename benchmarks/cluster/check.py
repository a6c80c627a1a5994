"""Forecasts of `gptsmith plan --cluster` against published runs: python benchmarks/cluster/check.py [--write]

Prints every run with its errors. --write: puts the tables into docs/cluster-forecasts.md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from published import Run, runs, sources, within

from gptsmith.train.forecast.cluster import GIB, hardware_names, load_hardware

PAGE = Path(__file__).parents[2] / "docs" / "cluster-forecasts.md"
BEGIN, END = "<!-- tables: benchmarks/cluster/check.py --write -->", "<!-- end of tables -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    text = tables(runs())
    print(text)
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def tables(all_runs: list[Run]) -> str:
    """Return a summary, the constants of the accelerators, and every run, in Markdown."""
    return "\n".join([summary(all_runs), constants(), *(table(source, all_runs) for source in sources())])


def summary(all_runs: list[Run]) -> str:
    lines = ["| runs | number | time within 10% | median error | memory within 10% |", "|---|---|---|---|---|"]
    for name, chosen in (
        ("that constants were fitted on", [run for run in all_runs if run.use == "fit"]),
        ("others", [run for run in all_runs if run.use == "check"]),
    ):
        times = [run.errors()[0] for run in chosen]
        memories = [error for run in chosen if (error := run.errors()[1]) is not None]
        median = statistics.median(map(abs, times))
        lines.append(
            f"| {name} | {len(chosen)} | {within(times)} | {median:.1%} | {within(memories)} of {len(memories)} |"
        )
    return "\n".join(lines) + "\n"


def constants() -> str:
    lines = [
        "| accelerator | matmul | attention | traffic | links | overlap | fitted on |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in hardware_names():
        hw = load_hardware(name)
        numbers = " | ".join(
            f"{getattr(hw, key):.2f}" for key in ("matmul", "attention", "traffic", "links", "overlap")
        )
        lines.append(f"| `{name}` | {numbers} | {hw.rests_on} |")
    return "\n".join(lines) + "\n"


def table(source: str, all_runs: list[Run]) -> str:
    about = sources()[source]
    chosen = [run for run in all_runs if run.source == source]
    has_memory = any(run.memory is not None for run in chosen)
    lines = [f"### {about['title']}", "", f"{about['about']} Read in {about['read']}.", ""]
    head = "| model | hardware | layout | context | batch | recompute, options | published | forecast | error |"
    if has_memory:
        head += " memory, GiB | forecast | error |"
    lines += [head + " |", "|---" * (head.count("|")) + "|"]
    for run in chosen:
        found = run.forecast()
        time, memory = run.errors()
        if run.seconds is not None:
            numbers = f"{run.seconds:.2f} s | {found.step:.2f} s"
        else:
            numbers = f"{run.tokens_per_second:,.0f} | {found.tokens_per_second / run.devices:,.0f}"
        mark = "" if run.use == "check" else " (fit)"
        options = f"{run.recompute} {run.options}".strip()
        line = (
            f"| {run.model}{mark} | {run.devices} {run.hardware} | {run.spread} | {run.context:,} "
            f"| {run.micro_batch} × {run.micro_batches} | {options} | {numbers} | {_percent(time)} |"
        )
        if has_memory:
            both = (
                "– | – | –"
                if run.memory is None or memory is None
                else (f"{run.memory:.1f} | {found.bytes / GIB:.1f} | {_percent(memory)}")
            )
            line += f" {both} |"
        lines.append(f"{line} {run.note} |")
    return "\n".join(lines) + "\n"


def _percent(error: float) -> str:
    text = f"{100 * error:+.1f}%"
    return text if abs(error) <= 0.1 else f"**{text}**"


if __name__ == "__main__":
    main()

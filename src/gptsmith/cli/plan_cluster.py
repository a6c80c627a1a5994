"""`gptsmith plan --cluster`: the printed forecast of a run on many accelerators."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptsmith.train.config import RunConfig
    from gptsmith.train.forecast.cluster_plan import ClusterPlan


def describe(plan: ClusterPlan, config: RunConfig) -> str:
    """Return the plan as text."""
    from gptsmith.cli.plan import length, rate, short
    from gptsmith.model.flops import count_parameters
    from gptsmith.train.forecast.cluster_plan import parallel_option
    from gptsmith.train.forecast.memory import gigabytes

    found, hw, saving = plan.found, plan.cluster.hardware, plan.saving
    work, s = found.work, found.spread
    rows: list[tuple[str, str]] = []
    size = count_parameters(work.model)
    used = f", {short(size.multiplied)} used per token" if work.model.num_experts else ""
    rows.append(("model", f"{config.init.init or config.model.family}: {short(size.total)} parameters{used}"))
    rows.append(("cluster", f"{plan.cluster.count:,} × {hw.title}"))
    options = f"--parallel {parallel_option(s)} --batch-size {work.batch(s)}"
    options += f" --micro-batch-size {work.micro_batch}"
    options += f" --activation-checkpointing {'on' if found.program.recompute == 'full' else 'off'}"
    rows.append(("options", options))
    rows += [("why" if i == 0 else "", reason) for i, reason in enumerate(plan.reasons)]
    verdict = "" if plan.fits else ": does not fit"
    rows.append(("memory", f"{gigabytes(found.bytes)} of {gigabytes(hw.memory)} on each{verdict}"))
    rows += [("", f"{gigabytes(value):>10}  {part}") for part, value in found.memory.items() if value >= 5e5]
    rows.append(("update", f"{length(plan.update)}, of {found.tokens:,} tokens"))
    for part, value in plan.times.items():
        if value > 5e-4 * plan.update:
            what = "communication that computation does not hide" if part == "communication" else part
            rows.append(("", f"{length(value):>10}  {what}"))
    rows += [("", f"{gigabytes(value):>10}  sent by each along {axis}") for axis, value in found.traffic.items()]
    each = found.tokens_per_second / plan.cluster.count
    rows.append(
        (
            "speed",
            f"{rate(found.tokens_per_second)} tokens/s, {rate(each)} each: {found.utilization:.0%} of the peak (MFU)",
        )
    )
    rows.append(
        (
            "goodput",
            f"{saving.goodput:.1%}: a failure every {length(saving.failure)}, a checkpoint of "
            f"{gigabytes(saving.bytes)} every {length(saving.interval)}",
        )
    )
    rows.append(("time", f"{length(plan.seconds)} for {plan.steps:,} steps"))
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.0f} at {plan.price_per_hour:,.2f} per accelerator and hour"))
    rests = f"the data sheet, and fractions of it that were fitted on {hw.rests_on}"
    rows.append(("rests on", f"{rests}; forecasts of 200 other published runs are within 10% in nine of ten"))
    return "\n".join(f"{name:12}{value}" for name, value in rows)

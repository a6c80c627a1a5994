"""The samples of a run, and the section that shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptsmith.report.figures import evenly_spaced
from gptsmith.report.html import escape, format_count, missing_note
from gptsmith.run_directory import Run, number

MAX_SAMPLE_CHARACTERS = 6_000
MAX_PREVIEW_CHARACTERS = 800
MAX_PREVIEWS = 30


def samples_section(run: Run) -> str:
    latest = latest_samples(run)
    if not latest:
        return missing_note("No sample had been written yet.")
    final = bool(latest[0].get("final"))
    when = (
        "Written by the trained model"
        if final
        else f"Written during training, at step {format_count(number(latest[0]['step']))}"
    )
    cards = []
    for temperature in sorted({temperature_of(sample) for sample in latest}):
        texts = "\n".join(
            sample_html(sample, MAX_SAMPLE_CHARACTERS) for sample in latest if temperature_of(sample) == temperature
        )
        known = math.isfinite(temperature)
        heading = f"Temperature {temperature:g}" if known else "Temperature not recorded"
        cards.append(
            f"<div><h3>{heading}</h3>\n<p>{_describe_temperature(temperature) if known else ''}</p>\n{texts}</div>"
        )
    prompt = "; its prompt is in bold" if any(prompt_and_text(sample)[0] for sample in latest) else ""
    return f"""<p class="lead">{when}{prompt}. A low temperature favors the most likely next token,
a high one gives more variety.</p>
<div class="samples">
{"".join(cards)}
</div>
{_previews(run, latest)}"""


def latest_samples(run: Run) -> list[dict[str, Any]]:
    """Return the final samples, or those of the last step that has any."""
    final = [sample for sample in run.samples if sample.get("final") is True]
    if final:
        return [sample for sample in final if sample["step"] == final[-1]["step"]]
    return [sample for sample in run.samples if sample["step"] == run.samples[-1]["step"]]


def _previews(run: Run, latest: Sequence[Mapping[str, Any]]) -> str:
    earlier = [sample for sample in run.samples if not any(sample is one for one in latest)]
    if not earlier:
        return ""
    picked = [earlier[i] for i in evenly_spaced(len(earlier), MAX_PREVIEWS)]
    cut = f", {len(picked)} of {len(earlier)}" if len(picked) < len(earlier) else ""
    items = "\n".join(
        f"<li><h3>Step {format_count(number(sample['step']))}{_at_temperature(sample)}</h3>"
        f"{sample_html(sample, MAX_PREVIEW_CHARACTERS)}</li>"
        for sample in picked
    )
    return f"""<details><summary>Samples during training{cut}</summary>
<ol class="timeline">
{items}
</ol></details>"""


def _at_temperature(sample: Mapping[str, Any]) -> str:
    temperature = temperature_of(sample)
    return f", temperature {temperature:g}" if math.isfinite(temperature) else ""


def sample_html(sample: Mapping[str, Any], limit: int) -> str:
    """Return a sample as HTML, cut after `limit` characters, with its prompt in bold."""
    prompt, text = prompt_and_text(sample)
    more = len(text) - limit
    tail = f"\n… ({more:,} more characters)" if more > 0 else ""
    bold = f"<b>{escape(prompt[:limit])}</b>" if prompt else ""
    # HTML drops a newline right after <pre>. This extra one keeps a sample's own.
    return f'<pre tabindex="0">\n{bold}{escape(text[:limit])}{tail}</pre>'


def prompt_and_text(sample: Mapping[str, Any]) -> tuple[str, str]:
    """Return the prompt (empty if it is blank) and the model's continuation."""
    prompt, text = sample.get("prompt"), str(sample["text"])
    prompt = prompt if isinstance(prompt, str) else ""
    return prompt if prompt.strip() else "", text


def temperature_of(sample: Mapping[str, Any]) -> float:
    """Return a sample's temperature; infinity, which sorts last, if it is not recorded."""
    value = number(sample.get("temperature"))
    return value if math.isfinite(value) else math.inf


def _describe_temperature(temperature: float) -> str:
    if temperature <= 0.0:
        return "always the most likely token"
    if temperature < 0.5:
        return "predictable, repetitive"
    if temperature <= 1.0:
        return "balanced"
    return "varied, invents words"


def sample_opening(run: Run) -> str:
    """Return the start of the latest sample whose temperature is nearest to 0.8, prompt included."""
    samples = latest_samples(run)
    if not samples:
        return ""
    sample = min(samples, key=lambda sample: abs(temperature_of(sample) - 0.8))
    return "".join(prompt_and_text(sample)).lstrip()[:200]

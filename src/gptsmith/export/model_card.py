"""The model card: README.md of a model directory, with what is known about data, recipe and results.

Its front matter is read by model hubs (license, library, kind of model). Names, settings and samples are escaped, so
that any characters in them are shown as text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptsmith import __version__
from gptsmith.errors import GptsmithError
from gptsmith.log import duration
from gptsmith.model.config import ModelConfig
from gptsmith.report.tasks import task_scores
from gptsmith.run_directory import Run, last_number, number, read_run

_MAX_SAMPLE = 1500  # characters
_TAGS = ["gptsmith"]


@dataclass(frozen=True)
class About:
    """What the card states besides the model's and the run's properties. license: an identifier such as `mit`."""

    title: str
    license: str
    dtype: str
    origin: str | None = None
    """The origin of a model that was not trained here."""
    changes: str = ""
    """Changes since training, in sentences."""


def model_card(about: About, config: ModelConfig, parameters: int, run: Run | None = None) -> str:
    """Return the text of README.md. run: the run that trained the model, if known."""
    loader, loaded = ("AutoModelForCausalLM", "AutoTokenizer")
    if config.vision is not None:
        loader, loaded = ("AutoModelForImageTextToText", "AutoProcessor")
    front = {
        "license": about.license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if config.vision is None else "image-text-to-text",
        "tags": [*_TAGS, config.model_type if config.vision is None else config.vision.model_type],
    }
    matter = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())  # JSON is YAML
    sections = [
        f"# {escape(about.title)}",
        _introduction(about, config, parameters, run),
        _table(_properties(config, about)),
    ]
    if run is not None:
        sections += _training(run)
    sections += [
        "## Use",
        "```python\n"
        f"from transformers import {loader}, {loaded}\n\n"
        f'model = {loader}.from_pretrained("DIR")\n'
        f'{loaded.removeprefix("Auto").lower()} = {loaded}.from_pretrained("DIR")\n'
        "```",
        'or `gptsmith generate DIR --prompt "..."`, where DIR is this directory.',
        "## Limits",
        "A language model imitates the text it was trained on. What it writes can be wrong, biased, or copied from "
        "that text; check it before you use it.",
    ]
    return f"---\n{matter}---\n\n" + "\n\n".join(sections) + "\n"


def run_of(directory: Path) -> Run | None:
    """Return the run that a directory is, or whose checkpoint it is; None if it is neither."""
    directory = Path(directory)
    resolved = directory.resolve()
    candidates = [directory, *([resolved.parent.parent] if resolved.parent.name == "checkpoints" else [])]
    for candidate in candidates:
        if (candidate / "run.json").is_file():
            try:
                return read_run(candidate)
            except GptsmithError:
                return None
    return None


def license_of(readme: str) -> str | None:
    """Return the license in a card's front matter, None if there is none."""
    matter = re.match(r"---\r?\n(.*?)\r?\n---\s", readme, re.DOTALL)
    line = (
        re.search(r"^license:[ \t]*[\"']?([\w.\-+]{1,64})[\"']?[ \t]*\r?$", matter[1], re.MULTILINE) if matter else None
    )
    return line[1] if line else None


def escape(text: str) -> str:
    """Return Markdown that shows exactly `text`, on one line."""
    line = " ".join(_printable(word) for word in str(text).split())
    return re.sub(r"[\\`*\[\]<>|~&$#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def fence(text: str) -> str:
    """Return `text` in a code block with a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}text\n{_printable(text, keep=chr(10) + chr(9))}\n{marks}"


def _printable(text: str, *, keep: str = "") -> str:
    """Replace control characters, lone surrogates and other unprintable characters."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def _introduction(about: About, config: ModelConfig, parameters: int, run: Run | None) -> str:
    trained = f", trained with gptsmith {escape(str(run.info.get('version', __version__)))}" if run else ""
    text = f"A language model of {parameters:,} parameters ({escape(config.model_type)}){trained}."
    if about.origin is not None:
        text += f" Origin: {escape(about.origin)}."
    return f"{text} {escape(about.changes)}" if about.changes else text


def _properties(config: ModelConfig, about: About) -> list[tuple[str, str]]:
    return [
        ("layers", f"{config.num_hidden_layers:,}"),
        ("width", f"{config.hidden_size:,}"),
        ("attention heads", f"{config.num_attention_heads:,} ({config.num_key_value_heads:,} for keys and values)"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("weights stored in", about.dtype),
    ]


def _training(run: Run) -> list[str]:
    sections = []
    data = [  # only file names: paths on the trainer's disk are private
        (name, value)
        for name, value in _flat({**run.part("data"), **_file_names(run.part("data"))})
        if name != "fingerprint"
    ]
    if data:
        sections += ["## Data", _table(data)]
    recipe = [(name, value) for name, value in _flat(run.options) if name not in ("val", "field", "device")]
    if recipe:
        sections += ["## Recipe", _table(recipe)]
    results = _results(run)
    if results:
        sections += ["## Results", _table(results)]
    samples = [sample for sample in run.samples if str(sample.get("text", "")).strip()]
    if samples:
        last = samples[-1]
        text = f"{last.get('prompt') or ''}{last['text']}"[:_MAX_SAMPLE]
        sections += ["## A sample", f"Not selected; temperature {number(last.get('temperature')):g}:", fence(text)]
    return sections


def _results(run: Run) -> list[tuple[str, str]]:
    rows = []
    best = run.best
    if best is not None:
        metric = run.selection.metric
        value = number(best[metric])
        if metric == "val_loss":
            rows.append(
                ("best validation loss", f"{value:.4f} nats/token (perplexity {math.exp(min(value, 700)):,.2f})")
            )
        else:
            rows.append((f"best {metric}", f"{value:.4f}"))
        rows.append(("at step", f"{number(best['step']):,.0f}"))
    for label, measured in task_scores(run).items():
        _, last = measured[-1]
        chance = number(last.get("chance"))
        about = f"; chance {chance:.3f}" if math.isfinite(chance) else ""
        interval = f"{number(last.get('low')):.3f} to {number(last.get('high')):.3f}"
        about = f"95% interval {interval}, {number(last.get('examples')):,.0f} examples{about}"
        rows.append((label, f"{number(last['score']):.3f} ({about})"))
    for name, key, form in (("tokens seen", "tokens", "{:,.0f}"), ("training loss at the end", "loss", "{:.4f}")):
        value = last_number(run.metrics, key)
        if math.isfinite(value):
            rows.append((name, form.format(value)))
    seconds = last_number(run.metrics, "time")
    if math.isfinite(seconds):
        machine = run.part("machine")
        where = " ".join(str(machine[key]) for key in ("gpu", "processor") if machine.get(key))
        rows.append(("training time", duration(seconds) + (f" on {where}" if where else "")))
    return rows


def _file_names(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the files of the texts, without their folders."""
    names = {}
    for key in ("spec", "val"):
        paths = data.get(key) or []
        names[key] = ", ".join(Path(path).name for path in (paths if isinstance(paths, list) else [paths]))
    return {key: value for key, value in names.items() if value}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as rows of (dotted name, value)."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, name + ".")
        elif value is not None:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| {escape(name)} | {escape(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])

"""The report: one HTML file that holds everything it shows, and asks nothing of the network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptsmith.errors import GptsmithError, TokenizerError
from gptsmith.report import plots
from gptsmith.run_directory import Run, best_validation, last_number, number, read_run
from gptsmith.storage import write_text

if TYPE_CHECKING:
    from gptsmith.tokenizer import Tokenizer

ATTENTION_TOKENS = 20  # more cannot be labelled legibly
MASK_CHARACTERS = 12
SAMPLE_CHARACTERS = 6_000
PREVIEW_CHARACTERS = 800
PREVIEWS = 30
TABLE_ROWS = 40
FALLBACK_TEXT = "the king and the crown"

STATUS = {
    "running": ("in progress", "warn"),
    "finished": ("finished", "good"),
    "interrupted": ("interrupted", "warn"),
    "diverged": ("diverged", "bad"),
    "failed": ("failed", "bad"),
}


@dataclass(frozen=True)
class Attention:
    """What the trained model looked at: L arrays of weights, (H, T, T), over T tokens."""

    weights: list[Any]
    tokens: list[str]


@dataclass(frozen=True)
class Trained:
    """The run's model as far as it could be had; `missing` says what could not, and why."""

    attention: Attention | None = None
    parameters: int | None = None
    tokenizer_kind: str = ""
    missing: str = ""


def write_report(run_directory: Path, *, attention_text: str | None = None) -> Path:
    """Write `run_directory`/report.html and return its path.

    Works at any moment of a run's life: what is not there yet is said to be missing.
    attention_text: the text whose attention is drawn; by default the start of a sample.
    Raises GptsmithError where the directory is no run or cannot be written, and TokenizerError for an
    attention_text that the run's tokenizer cannot encode.
    """
    run = read_run(Path(run_directory))
    trained = _look_inside(run, attention_text)
    text = attention_text or (trained.attention and "".join(trained.attention.tokens)) or _sample_opening(run)
    page = _page(run, trained, (text or FALLBACK_TEXT)[:MASK_CHARACTERS])
    path = run.directory / "report.html"
    write_text(path, page.encode("utf-8", "replace").decode())  # a lone surrogate must not cost the report
    return path


# The model ----------------------------------------------------------------------------------------------------------


def _look_inside(run: Run, text: str | None) -> Trained:
    """Load the best checkpoint and collect its attention over `text`."""
    if not any((run.directory / "checkpoints").glob("step-*")):
        return Trained(missing="No checkpoint had been saved yet, so there is no trained model to look into.")
    from gptsmith.loading import load_model  # brings torch
    from gptsmith.model.inspect import inspect

    try:
        model, tokenizer = load_model(run.directory)
    except (GptsmithError, OSError, RuntimeError, ValueError) as error:
        return Trained(missing=f"The trained model could not be loaded: {error}")
    about = Trained(parameters=model.num_parameters(), tokenizer_kind=tokenizer.kind)
    if text is not None:
        ids = tokenizer.encode(text)
        if len(ids) < 2:
            raise TokenizerError(f"attention needs a text of at least two tokens, and {text!r} has {len(ids)}.")
    else:
        ids = _default_ids(run, tokenizer)
    ids = ids[: min(ATTENTION_TOKENS, model.config.max_position_embeddings)]
    if len(ids) < 2:
        return Trained(
            None, about.parameters, about.tokenizer_kind, "There is no text yet whose attention could be drawn."
        )
    try:
        weights = inspect(model, ids, attention=True).attention
    except (RuntimeError, ValueError, IndexError) as error:  # out of memory, above all
        return Trained(None, about.parameters, about.tokenizer_kind, f"Attention could not be computed: {error}")
    attention = Attention(weights, [tokenizer.token_text(id) for id in ids])
    return Trained(attention, about.parameters, about.tokenizer_kind)


def _default_ids(run: Run, tokenizer: Tokenizer) -> list[int]:
    """Tokens to look at: the opening of a sample; without one, as much of a plain phrase as the alphabet allows."""

    def encode(text: str) -> list[int]:
        try:
            return tokenizer.encode(text)
        except TokenizerError:
            return []

    ids = encode(_sample_opening(run))
    return ids if len(ids) > 1 else encode(FALLBACK_TEXT) or encode("".join(filter(encode, FALLBACK_TEXT)))


def _sample_opening(run: Run) -> str:
    """The first words of the latest sample nearest to a temperature of 0.8, prompt and all."""
    samples = _latest_samples(run)
    if not samples:
        return ""
    sample = min(samples, key=lambda sample: abs(_temperature(sample) - 0.8))
    return "".join(_prompt_and_text(sample)).lstrip()[:200]


# The page -----------------------------------------------------------------------------------------------------------


def _page(run: Run, trained: Trained, mask_text: str) -> str:
    sections = [
        ("results", "Results", _results(run, trained)),
        ("loss", "Loss", _losses(run)),
        ("samples", "Samples", _samples(run)),
        ("mask", "The causal mask", _mask(mask_text)),
        ("attention", "Attention", _attention(trained)),
        ("configuration", "Configuration", _configuration(run)),
    ]
    links = "".join(f'<li><a href="#{id}">{title}</a></li>' for id, title, _ in sections)
    body = "\n".join(
        f'<section id="{id}" aria-labelledby="{id}-title">\n<h2 id="{id}-title">{title}</h2>\n{content}\n</section>'
        for id, title, content in sections
    )
    word, tone = _status(run)
    name = _text(run.name)
    css = files("gptsmith.report").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="gptsmith {_text(run.info.get("version", ""))}">
<title>{name} · gptsmith training report</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<header>
<p class="eyebrow">gptsmith training report</p>
<h1>{name} <span class="badge {tone}">{word}</span></h1>
<p class="summary">{_summary(run, trained)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer>
<p>{_dates(run)}</p>
</footer>
</body>
</html>
"""


def _status(run: Run) -> tuple[str, str]:
    status = run.info.get("status")
    if not isinstance(status, str):
        status = "finished" if run.info.get("ended") else "running"
    return STATUS.get(status, (_text(status), "warn"))


def _dates(run: Run) -> str:
    parts = [
        f"{word} {_moment(run.info[key])}"
        for key, word in (("started", "Started"), ("ended", "ended"))
        if run.info.get(key)
    ]
    parts.append(f"report written {_moment(datetime.now().astimezone().isoformat())}")
    if version := run.info.get("version"):
        parts.append(f"gptsmith {_text(version)}")
    return " · ".join(parts)


def _moment(value: Any) -> str:
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return _text(value)


# Results ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """The numbers of a run; NaN for what is not known. Losses in nats per token, time in seconds."""

    best: float
    best_step: float
    final: float
    train: float
    step: float
    tokens: float
    seconds: float
    tokens_per_second: float
    parameters: float


def _facts(run: Run, trained: Trained) -> Facts:
    best = best_validation(run.metrics)
    tokens, seconds = last_number(run.metrics, "tokens"), last_number(run.metrics, "time")
    rates = sorted(rate for row in run.metrics if math.isfinite(rate := number(row.get("tokens_per_second"))))
    rate = rates[len(rates) // 2] if rates else tokens / seconds if seconds > 0 else math.nan
    parameters = number(run.info.get("parameters"))
    if math.isnan(parameters) and trained.parameters is not None:
        parameters = trained.parameters
    return Facts(
        best=number(best["val_loss"]) if best else math.nan,
        best_step=number(best["step"]) if best else math.nan,
        final=last_number(run.metrics, "val_loss"),
        train=last_number(run.metrics, "loss"),
        step=last_number(run.metrics, "step"),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=rate,
        parameters=parameters,
    )


def _per_byte(run: Run) -> float:
    """Validation tokens per UTF-8 byte, from run.json's `data`; NaN where it does not say."""
    data = run.part("data")
    tokens, size = number(data.get("val_tokens")), number(data.get("val_bytes"))
    return tokens / size if size > 0 else math.nan


def _is_char(run: Run, trained: Trained) -> bool:
    """Whether a token is a character: as the saved tokenizer says, or before there is one, the configuration."""
    return (trained.tokenizer_kind or run.part("config").get("tokenizer")) == "char"


def _loss_in_words(loss: float, run: Run, trained: Trained) -> str:
    """The same loss in other units: per character, bits per byte, perplexity."""
    parts = []
    if _is_char(run, trained):
        parts.append("a token is a character")
    if math.isfinite(per_byte := _per_byte(run)):
        parts.append(f"{loss * per_byte / math.log(2):.3f} bits per byte")
    if loss < 50:
        parts.append(f"perplexity {math.exp(loss):,.2f}")
    return ", ".join(parts)


def _summary(run: Run, trained: Trained) -> str:
    facts = _facts(run, trained)
    unit = "nats per character" if _is_char(run, trained) else "nats per token"
    size = f"A GPT of {_short(facts.parameters)} parameters" if math.isfinite(facts.parameters) else "A GPT"
    if not math.isfinite(facts.step):
        return f"{size}. No step had been logged when this was written."
    text = f"{size}, trained for {_count(facts.step)} steps"
    if math.isfinite(facts.tokens):
        text += f" on {_short(facts.tokens)} tokens"
    if math.isfinite(facts.seconds):
        text += f" in {_duration(facts.seconds)}"
    if math.isfinite(facts.best):
        text += f": validation loss <strong>{facts.best:.4f}</strong> {unit}"
        if facts.final != facts.best:
            text += f" at best, {facts.final:.4f} at the end"
    elif math.isfinite(facts.train):
        text += f": training loss {facts.train:.4f} {unit}, not validated yet"
    if math.isfinite(facts.tokens_per_second):
        text += f", at {_count(facts.tokens_per_second)} tokens per second"
    if machine := _machine(run):
        text += f" on {_text(machine)}"
    return text + "."


def _results(run: Run, trained: Trained) -> str:
    facts = _facts(run, trained)
    unit = "nats per token"
    tiles = [
        ("Best validation loss", f"{facts.best:.4f}", facts.best, f"{unit}, at step {_count(facts.best_step)}"),
        ("Final validation loss", f"{facts.final:.4f}", facts.final, _loss_in_words(facts.final, run, trained) or unit),
        ("Final training loss", f"{facts.train:.4f}", facts.train, f"{unit}, as last logged"),
        ("Steps", _count(facts.step), facts.step, f"{_count(facts.tokens)} tokens"),
        ("Training time", _duration(facts.seconds), facts.seconds, ""),
        ("Speed", _count(facts.tokens_per_second), facts.tokens_per_second, "tokens per second, median"),
        ("Parameters", _short(facts.parameters), facts.parameters, f"{_count(facts.parameters)} trainable"),
    ]
    items = "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{about}</small></dd></div>\n"
        if math.isfinite(known)
        else f"<div><dt>{label}</dt><dd>–<small>not known yet</small></dd></div>\n"
        for label, value, known, about in tiles
    )
    text = f'<dl class="tiles">\n{items}</dl>'
    if machine := _machine(run):
        text += f'\n<p class="note" style="margin: 1.2rem 0 0">Machine: {_text(machine)}.</p>'
    word, _ = _status(run)
    if word in ("diverged", "failed"):
        text += _missing("This run was stopped by an error, such as a diverging loss. Its last checkpoint is intact.")
    elif word != "finished":
        text += _missing(f"This run is {word}: the numbers are those up to its last logged step.")
    if run.unreadable_lines:
        text += _missing(f"Left out: {run.unreadable_lines} unreadable line(s) of metrics.jsonl and samples.jsonl.")
    return text


def _machine(run: Run) -> str:
    machine = run.part("machine")
    cores = machine.get("cores")
    parts = [
        machine.get("gpu"),
        machine.get("processor"),
        f"{cores} core{'s' if cores != 1 else ''}" if cores else None,
    ]
    return ", ".join(str(part) for part in parts if part)


# Loss ---------------------------------------------------------------------------------------------------------------

CURVES = [
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_second", "Throughput", "tokens per second"),
]


def _losses(run: Run) -> str:
    metrics = run.metrics
    if not any("loss" in row or "val_loss" in row for row in metrics):
        return _missing("No loss had been logged when this was written.")
    alt = _describe_losses(run)
    vocabulary = number(run.part("model").get("vocab_size"))
    guess = (
        f" A model that only guesses would score ln {_count(vocabulary)} = {math.log(vocabulary):.2f}."
        if vocabulary >= 1
        else ""
    )
    wide = plots.to_svg(plots.loss_figure(metrics), alt=alt, prefix="loss")
    narrow = plots.to_svg(plots.loss_figure(metrics, width=4.6, height=3.8), alt=alt, prefix="loss-narrow")
    small = [
        (
            "Loss against time",
            "nats per token",
            plots.loss_figure(metrics, x="time", width=4.4, height=2.5, labels=False),
            "The same losses against time.",
        )
    ]
    for key, title, about in CURVES:
        if any(math.isfinite(number(row.get(key))) for row in metrics):
            values = [value for row in metrics if math.isfinite(value := number(row.get(key)))]
            words = f"{title} by step, from {values[0]:.4g} to {values[-1]:.4g}, at most {max(values):.4g}."
            small.append((title, about, plots.metric_figure(metrics, key), words))
    figures = "\n".join(
        f"<figure><figcaption>{title}{f' <small>{about}</small>' if about else ''}</figcaption>\n"
        f"{plots.to_svg(figure, alt=words, prefix=f'curve{i}')}</figure>"
        for i, (title, about, figure, words) in enumerate(small)
    )
    return f"""<p class="lead">How surprised the model is by the next token: lower is better, and the validation text
was never trained on.{guess}</p>
<figure>
<div class="wide">{wide}</div>
<div class="narrow">{narrow}</div>
</figure>
<div class="multiples">
{figures}
</div>
{_loss_table(run)}"""


def _describe_losses(run: Run) -> str:
    train = [value for row in run.metrics if math.isfinite(value := number(row.get("loss")))]
    best = best_validation(run.metrics)
    text = "Loss in nats per token by step."
    if train:
        text += f" Training loss goes from {train[0]:.3f} to {train[-1]:.3f}."
    if best:
        text += f" The best validation loss is {number(best['val_loss']):.4f}, at step {_count(number(best['step']))}."
    return text


def _loss_table(run: Run) -> str:
    rows = [row for row in run.metrics if "val_loss" in row]
    if not rows:
        return ""
    picked = [rows[i] for i in plots.shown(len(rows), TABLE_ROWS)]
    cut = f", {len(picked)} of {len(rows)}" if len(picked) < len(rows) else ""
    lines = "\n".join(
        f'<tr><th scope="row">{_count(number(row["step"]))}</th><td>{_duration(number(row.get("time")))}</td>'
        f"<td>{_value(number(row['val_loss']))}</td></tr>"
        for row in picked
    )
    return f"""<details><summary>Validation losses as a table{cut}</summary>
<table class="numbers">
<thead><tr><th scope="col">step</th><th scope="col">time</th><th scope="col">nats per token</th></tr></thead>
<tbody>
{lines}
</tbody></table></details>"""


# Samples ------------------------------------------------------------------------------------------------------------


def _samples(run: Run) -> str:
    latest = _latest_samples(run)
    if not latest:
        return _missing("No sample had been written yet.")
    final = bool(latest[0].get("final"))
    when = (
        "Written by the trained model"
        if final
        else f"Written during training, at step {_count(number(latest[0]['step']))}"
    )
    cards = []
    for temperature in sorted({_temperature(sample) for sample in latest}):
        texts = "\n".join(
            _sample(sample, SAMPLE_CHARACTERS) for sample in latest if _temperature(sample) == temperature
        )
        known = math.isfinite(temperature)
        heading = f"Temperature {temperature:g}" if known else "Temperature not recorded"
        cards.append(f"<div><h3>{heading}</h3>\n<p>{_mood(temperature) if known else ''}</p>\n{texts}</div>")
    prompt = "; its prompt is in bold" if any(_prompt_and_text(sample)[0] for sample in latest) else ""
    return f"""<p class="lead">{when}{prompt}. A low temperature keeps to the likeliest next token,
a high one takes more chances.</p>
<div class="samples">
{"".join(cards)}
</div>
{_previews(run, latest)}"""


def _latest_samples(run: Run) -> list[dict[str, Any]]:
    """The final samples, or those of the last step that has any."""
    final = [sample for sample in run.samples if sample.get("final") is True]
    if final:
        return [sample for sample in final if sample["step"] == final[-1]["step"]]
    return [sample for sample in run.samples if sample["step"] == run.samples[-1]["step"]]


def _previews(run: Run, latest: Sequence[Mapping[str, Any]]) -> str:
    earlier = [sample for sample in run.samples if not any(sample is one for one in latest)]
    if not earlier:
        return ""
    picked = [earlier[i] for i in plots.shown(len(earlier), PREVIEWS)]
    cut = f", {len(picked)} of {len(earlier)}" if len(picked) < len(earlier) else ""
    items = "\n".join(
        f"<li><h3>Step {_count(number(sample['step']))}{_at_temperature(sample)}</h3>"
        f"{_sample(sample, PREVIEW_CHARACTERS)}</li>"
        for sample in picked
    )
    return f"""<details><summary>How the samples grew during training{cut}</summary>
<ol class="timeline">
{items}
</ol></details>"""


def _at_temperature(sample: Mapping[str, Any]) -> str:
    temperature = _temperature(sample)
    return f", temperature {temperature:g}" if math.isfinite(temperature) else ""


def _sample(sample: Mapping[str, Any], limit: int) -> str:
    prompt, text = _prompt_and_text(sample)
    more = len(text) - limit
    tail = f"\n… ({more:,} more characters)" if more > 0 else ""
    bold = f"<b>{_text(prompt[:limit])}</b>" if prompt else ""
    # A newline right after <pre> is dropped by HTML: give it one, so that the sample keeps its own.
    return f'<pre tabindex="0">\n{bold}{_text(text[:limit])}{tail}</pre>'


def _prompt_and_text(sample: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt, unless it is blank, and the model's continuation."""
    prompt, text = sample.get("prompt"), str(sample["text"])
    prompt = prompt if isinstance(prompt, str) else ""
    return prompt if prompt.strip() else "", text


def _temperature(sample: Mapping[str, Any]) -> float:
    value = number(sample.get("temperature"))
    return value if math.isfinite(value) else math.inf


def _mood(temperature: float) -> str:
    if temperature <= 0.0:
        return "always the likeliest token"
    if temperature < 0.5:
        return "cautious, repeats itself"
    if temperature <= 1.0:
        return "balanced"
    return "daring, makes words up"


# Mask and attention -------------------------------------------------------------------------------------------------


def _mask(text: str) -> str:
    labels = " ".join(map(plots.visible, text))
    alt = (
        f"A triangle over the characters {labels}: row by row, each character may attend to itself "
        "and to those before it; everything to the right, the future, is masked."
    )
    return f"""<p class="lead">A GPT predicts the next token, so no token may look ahead. Each row below is one
token and spells out all that it may see: the past and itself. From that it predicts the token after the arrow.</p>
<figure class="middle">{plots.to_svg(plots.causal_mask_figure(list(text)), alt=alt, prefix="mask")}</figure>"""


def _attention(trained: Trained) -> str:
    attention = trained.attention
    if attention is None:
        return _missing(trained.missing)
    weights, tokens = attention.weights, attention.tokens
    L, H = len(weights), weights[0].shape[0]
    layer, head = plots.sharpest_head(weights)
    layers, heads = plots.shown(L, plots.MAX_LAYERS), plots.shown(H, plots.MAX_HEADS)
    text = "".join(map(plots.visible, tokens))
    cut = ""
    if len(layers) < L or len(heads) < H:
        cut = f" Of its {L} layers and {H} heads, {len(layers)} layers and {len(heads)} heads are drawn, evenly spread."
    about = (
        f"Attention weights of {len(layers)} layers and {len(heads)} heads over the text {text}. "
        "Each picture is a lower triangle: a row for each token, a column for each token that it may attend to."
    )
    look = _strongest_look(weights[layer][head], tokens)
    one = f"Layer {layer + 1}, head {head + 1}, larger. {look}"
    grid = plots.to_svg(plots.attention_figure(weights, tokens), alt=about, prefix="attention")
    large = plots.to_svg(plots.head_figure(weights, tokens, layer, head), alt=one, prefix="head")
    return f"""<p class="lead">What each head of the trained model looks at while it reads <code>{_text(text)}</code>.
Row: the token that looks. Column: the token it looks at. Each row sums to 1, and the future is blank: the mask above,
at work.{cut}</p>
<figure><div class="scroll" role="region" aria-label="Attention of every head" tabindex="0">{grid}</div></figure>
<h3>Layer {layer + 1}, head {head + 1}</h3>
<figure class="middle">{large}
<figcaption>Of all heads, the one that most singles out one earlier token (not the first, nor its own neighbour).
{_text(look)}</figcaption></figure>"""


def _strongest_look(weights: Any, tokens: Sequence[str]) -> str:
    """A sentence about the largest weight that looks two or more tokens back; weights: (T, T)."""
    looks = [(float(weights[i][j]), i, j) for i in range(len(tokens)) for j in range(1, i - 1)]
    if not looks:
        return ""
    weight, i, j = max(looks)
    names = plots.visible(tokens[i]), plots.visible(tokens[j])
    return f"Its strongest look back: “{names[0]}” (token {i + 1}) gives {weight:.0%} to “{names[1]}” (token {j + 1})."


# Configuration ------------------------------------------------------------------------------------------------------


def _configuration(run: Run) -> str:
    parts = [
        ("training", run.part("config")),
        ("model, as built", run.part("model")),
        ("data", run.part("data")),
        ("machine", run.part("machine")),
        ("outcome", {key: value for key, value in run.info.items() if not isinstance(value, dict)}),
    ]
    groups = [group for name, values in parts for group in _groups(name, values)]
    tables = "\n".join(_table(name, rows) for name, rows in groups if rows)
    everything = _text(json.dumps(run.info, indent=2, ensure_ascii=False))
    if not tables:
        tables = _missing("run.json says nothing of the configuration.")
    return f"""<div class="groups">
{tables}
</div>
<details><summary>Everything in run.json</summary>
<pre tabindex="0">
{everything}</pre></details>"""


def _groups(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A table of the plain values, then one for each nested mapping, whose deeper keys are joined with dots."""
    yield name, [(key, value) for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{name}: {key}", list(_flat(value))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(name: str, rows: Sequence[tuple[str, Any]]) -> str:
    lines = "\n".join(
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(_value(value))}</td></tr>' for key, value in rows
    )
    return f"<table>\n<caption>{_text(name.replace('_', ' '))}</caption>\n<tbody>\n{lines}\n</tbody></table>"


# Words and numbers --------------------------------------------------------------------------------------------------


def _missing(text: str) -> str:
    return f'\n<p class="missing">{_text(text)}</p>'


def _text(value: Any) -> str:
    """`value` as HTML text: escaped, with a sign for each control character that HTML has no place for."""
    text = str(value)
    if not text.isprintable():
        text = text.translate({code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421})
    return html.escape(text)


def _value(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "not a finite number"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "–"
    text = str(value)
    return text if text.strip() and text.isprintable() else plots.visible(text, 200)


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def _short(value: float) -> str:
    """1234567 -> 1.23 M."""
    if not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"

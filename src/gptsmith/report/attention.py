"""The sections about attention: the causal mask, and what the heads of the trained model attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptsmith.report.attention_maps import (
    MAX_HEADS,
    MAX_LAYERS,
    attention_figure,
    causal_mask_figure,
    head_figure,
    printable_label,
    sharpest_head,
)
from gptsmith.report.figures import evenly_spaced, to_svg
from gptsmith.report.html import escape, missing_note
from gptsmith.report.trained_model import TrainedModel


def mask_section(text: str) -> str:
    labels = " ".join(map(printable_label, text))
    alt = (
        f"A triangle over the characters {labels}: in each row, one character attends to itself "
        "and those before it; everything to the right, the future, is masked."
    )
    return f"""<p class="lead">A GPT predicts the next token, so no token can attend to later ones. Each row below is
one token with all that it can attend to: the past and itself. From these it predicts the token after the arrow.</p>
<figure class="middle">{to_svg(causal_mask_figure(list(text)), alt=alt, prefix="mask")}</figure>"""


def attention_section(trained: TrainedModel) -> str:
    attention = trained.attention
    if attention is None:
        return missing_note(trained.attention_missing)
    weights, tokens = attention.weights, attention.tokens
    L, H = len(weights), weights[0].shape[0]
    layer, head = sharpest_head(weights)
    layers, heads = evenly_spaced(L, MAX_LAYERS), evenly_spaced(H, MAX_HEADS)
    text = "".join(map(printable_label, tokens))
    cut = ""
    if len(layers) < L or len(heads) < H:
        cut = f" Of its {L} layers and {H} heads, {len(layers)} layers and {len(heads)} heads are shown, evenly spaced."
    about = (
        f"Attention weights of {len(layers)} layers and {len(heads)} heads over the text {text}. "
        "Each picture is a lower triangle: a row for each token, a column for each token that it can attend to."
    )
    largest = _describe_largest_weight(weights[layer][head], tokens)
    one = f"Layer {layer + 1}, head {head + 1}, larger. {largest}"
    grid = to_svg(attention_figure(weights, tokens), alt=about, prefix="attention")
    large = to_svg(head_figure(weights, tokens, layer, head), alt=one, prefix="head")
    return f"""<p class="lead">What each head of the trained model attends to in <code>{escape(text)}</code>. Row: the
token that attends. Column: the token it attends to. Each row sums to 1. The future is blank because of the causal
mask.{cut}</p>
<figure><div class="scroll" role="region" aria-label="Attention of every head" tabindex="0">{grid}</div></figure>
<h3>Layer {layer + 1}, head {head + 1}</h3>
<figure class="middle">{large}
<figcaption>The head that attends most to a single earlier token, other than the first and the preceding one.
{escape(largest)}</figcaption></figure>"""


def _describe_largest_weight(weights: Any, tokens: Sequence[str]) -> str:
    """Return a sentence about the largest weight on a token two or more back, but not the first. weights: (T, T)."""
    candidates = [(float(weights[i][j]), i, j) for i in range(len(tokens)) for j in range(1, i - 1)]
    if not candidates:
        return ""
    weight, i, j = max(candidates)
    names = printable_label(tokens[i]), printable_label(tokens[j])
    return f"Its largest weight: “{names[0]}” (token {i + 1}) gives {weight:.0%} to “{names[1]}” (token {j + 1})."

"""Figures: curves, the causal mask, attention, and their output as PNG and SVG."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from gptsmith.errors import GptsmithError
from gptsmith.report import attention_maps, curves, figures


def random_attention(layers: int, heads: int, tokens: int, seed: int = 0) -> list[Any]:
    """Return causal weights whose rows sum to 1, (1, H, T, T) per layer."""
    scores = np.random.default_rng(seed).random((layers, 1, heads, tokens, tokens)) * np.tril(np.ones((tokens, tokens)))
    return list(scores / scores.sum(-1, keepdims=True))


def heat_maps(figure: Figure) -> list[Any]:
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def texts(figure: Figure) -> list[str]:
    from matplotlib.text import Text

    return [item.get_text() for item in figure.findobj(Text)]


METRICS = [{"step": s, "time": s / 2, "loss": 4 / math.sqrt(s)} for s in range(1, 101)] + [
    {"step": 50, "time": 25.0, "val_loss": 0.7},
    {"step": 100, "time": 50.0, "val_loss": 0.8},
]


def test_loss_figure_shows_every_loss_and_marks_the_best() -> None:
    figure = curves.loss_figure(METRICS)
    lines: dict[Any, Any] = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["training, as logged"].get_ydata(), [4 / math.sqrt(s) for s in range(1, 101)])
    assert list(lines["validation"].get_xdata()) == [50, 100]
    assert "best 0.7000 at step 50" in texts(figure)


def test_loss_figure_against_time_uses_suitable_units() -> None:
    assert curves.loss_figure(METRICS, x="time").axes[0].get_xlabel() == "seconds of training"
    hours = [{**row, "time": 36000 * row["step"]} for row in METRICS]
    figure = curves.loss_figure(hours, x="time")
    assert figure.axes[0].get_xlabel() == "hours of training"
    validation: Any = next(line for line in figure.axes[0].lines if line.get_label() == "validation")
    assert list(validation.get_xdata()) == [500, 1000]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ([], "no losses were logged"),
        ([{"step": 1, "loss": math.nan, "val_loss": None}], "no loss is a finite number"),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.inf}], "loss is not a finite number"),
        ([{"step": 1, "loss": 2.0}], "training"),
    ],
)
def test_loss_figure_of_few_or_broken_metrics(metrics: list[dict[str, Any]], expected: str, tmp_path: Path) -> None:
    figure = curves.loss_figure(metrics)
    figures.save_png(figure, tmp_path / "loss.png")
    assert expected in texts(figure)


def test_metric_figure_is_not_flattened_by_an_outlier() -> None:
    rows = [{"step": s, "grad_norm": 1e9 if s == 500 else 1.0} for s in range(1000)]
    assert curves.metric_figure(rows, "grad_norm").axes[0].get_ylim()[1] == pytest.approx(1.12)
    assert "not logged" in texts(curves.metric_figure(rows, "lr"))


@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)), max_size=400))
def test_smoothing_stays_within_the_data_and_keeps_its_gaps(values: list[float]) -> None:
    raw = np.array(values, dtype=np.float64)
    smooth = curves._smooth(raw)
    assert (np.isnan(smooth) == np.isnan(raw)).all()
    if np.isfinite(raw).any():
        assert np.nanmin(smooth) >= np.nanmin(raw) - 1e-6
        assert np.nanmax(smooth) <= np.nanmax(raw) + 1e-6


def test_smoothing_is_the_mean_of_a_centered_window() -> None:
    raw = np.random.default_rng(0).random(300)
    assert curves._smooth(raw)[150] == pytest.approx(raw[140:161].mean())
    assert curves._smooth(raw)[0] == raw[0]


@given(st.integers(0, 5000), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_downsampling_keeps_order_and_extremes(count: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=count)
    x, thin = curves._downsample(np.arange(count, dtype=np.float64), y)
    assert len(x) == len(thin) <= curves.MAX_POINTS
    assert (np.diff(x) > 0).all()
    if count:
        assert (thin.min(), thin.max()) == (y.min(), y.max())


@given(st.integers(1, 200), st.integers(2, 20))
def test_evenly_spaced_indices_include_first_and_last(count: int, limit: int) -> None:
    chosen = figures.evenly_spaced(count, limit)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, limit)
    assert (chosen[0], chosen[-1]) == (0, count - 1)


def test_labels_show_whitespace_and_control_characters() -> None:
    assert attention_maps.printable_label(" a\n\t\r") == "␣a↵⇥␍"
    assert attention_maps.printable_label("\x00") == "\\x00"
    assert attention_maps.printable_label("abcdefghijkl") == "abcdefghi…"
    assert attention_maps.printable_label(attention_maps.printable_label(" a\n")) == attention_maps.printable_label(
        " a\n"
    )


def test_causal_mask_hides_exactly_the_future() -> None:
    figure = attention_maps.causal_mask_figure(list("To be"))
    mesh = figure.axes[0].collections[0].get_array()
    assert isinstance(mesh, np.ma.MaskedArray)
    np.testing.assert_array_equal(np.ma.getmaskarray(mesh), np.triu(np.ones((5, 5), dtype=bool), 1))
    np.testing.assert_array_equal(np.diag(mesh), [2] * 5)
    cells = [t.get_text() for t in figure.axes[0].texts]
    assert cells == [*"T", *"To", *"To␣", *"To␣b", *"To␣be", "→ o", "→ ␣", "→ b", "→ e"]


def test_attention_figure_shows_the_weights_without_the_future() -> None:
    weights = random_attention(2, 3, 6)
    maps = heat_maps(attention_maps.attention_figure(weights, list("abc de")))
    assert len(maps) == 6
    for i, picture in enumerate(maps):
        expected = weights[i // 3][0, i % 3]
        np.testing.assert_allclose(np.tril(picture.filled(0)), expected)
        np.testing.assert_array_equal(np.ma.getmaskarray(picture), np.triu(np.ones((6, 6), dtype=bool), 1))


def test_attention_figure_accepts_tensors_and_limits_layers_and_heads() -> None:
    torch = pytest.importorskip("torch")
    weights = [torch.tensor(layer, dtype=torch.bfloat16) for layer in random_attention(9, 20, 4)]
    figure = attention_maps.attention_figure(weights, ["a", "b", "c", "d"])
    assert len(heat_maps(figure)) == attention_maps.MAX_LAYERS * attention_maps.MAX_HEADS
    assert {"layer 1", "layer 9", "head 1", "head 20"} <= set(texts(figure))


def test_head_figure_shows_that_head() -> None:
    weights = random_attention(2, 3, 5)
    (picture,) = heat_maps(attention_maps.head_figure(weights, list("hello"), 1, 2))[:1]
    np.testing.assert_allclose(picture.filled(0), weights[1][0, 2])


def test_sharpest_head_attends_to_one_earlier_token() -> None:
    weights = [np.tril(np.ones((1, 2, 6, 6))) / np.arange(1, 7)[:, None] for _ in range(2)]
    weights[0][0, 0] = np.eye(6)  # itself
    weights[0][0, 1] = np.eye(6, k=-1)  # its neighbor
    weights[1][0, 1] = np.eye(6, k=-3)
    assert attention_maps.sharpest_head(weights) == (1, 1)


def test_labels_can_be_in_any_script_and_contain_markup(tmp_path: Path) -> None:
    tokens = ["中", "$x$", "<b>", "&", '"', "\x00", "🙂", " "]
    figure = attention_maps.attention_figure(random_attention(1, 1, 8), tokens)
    figures.save_png(figure, tmp_path / "a.png")  # warnings are errors: a missing glyph must not warn
    svg = figures.to_svg(figure, alt='weights of "<b>"', prefix="a")
    root = ET.fromstring(svg)
    labels = {element.text for element in root.iter("text")}
    assert {"中", "$x$", "<b>", "&", '"', "\\x00", "🙂", "␣"} <= labels
    assert root.get("aria-label") == 'weights of "<b>"'


def test_svg_is_self_contained() -> None:
    drawn = [curves.loss_figure(METRICS), attention_maps.attention_figure(random_attention(1, 2, 4), list("abcd"))]
    ids: list[str] = []
    for i, figure in enumerate(drawn):
        svg = figures.to_svg(figure, alt="picture", prefix=f"p{i}")
        ET.fromstring(svg)
        found = re.findall(r'\bid="([^"]*)"', svg)
        used = re.findall(r'href="#([^"]*)"', svg) + re.findall(r"url\(#([^)]*)\)", svg)
        assert set(used) <= set(found)
        ids += found
        assert "http" not in svg
        assert "<style" not in svg
        assert "var(--ink)" in svg
        assert not any(color in svg for color in figures.THEME)
    assert len(ids) == len(set(ids))


def test_svg_is_deterministic() -> None:
    first, second = (figures.to_svg(curves.loss_figure(METRICS), alt="", prefix="p") for _ in range(2))
    assert first == second


def test_matplotlib_settings_are_unchanged(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.to_svg(curves.loss_figure(METRICS), alt="", prefix="p")
    figures.save_png(attention_maps.causal_mask_figure("ab"), tmp_path / "mask.png")
    assert dict(matplotlib.rcParams) == before


def test_png_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "mask.png"
    figures.save_png(attention_maps.causal_mask_figure(list("hello")), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in path.parent.iterdir()] == ["mask.png"]
    with pytest.raises(GptsmithError, match="part of that path is a file"):
        figures.save_png(attention_maps.causal_mask_figure(list("hello")), path / "mask.png")

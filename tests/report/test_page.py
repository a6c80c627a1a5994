"""The report page of complete, young, interrupted and damaged runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gptsmith.checkpoint import save_checkpoint
from gptsmith.config import to_dict
from gptsmith.errors import GptsmithError, TokenizerError
from gptsmith.model.transformer import Transformer
from gptsmith.report import write_report
from gptsmith.tokenizer import train_bpe, train_char
from tests.factories import tiny_config

SECTIONS = ["results", "loss", "samples", "mask", "attention", "configuration"]
VOID = {"meta", "link", "br", "img", "hr", "input"}
EVIL = "<script>alert('&amp;')</script>"


class Page(HTMLParser):
    """A parsed page. Raises if its elements do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.section = ""
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.section, []).append(data)

    def text(self, section: str) -> str:
        return re.sub(r"\s+", " ", "".join(self.words.get(section, [])))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


TEXT = f"ROMEO:\nWhat light {EVIL} breaks? the king and the crown"


def make_run(
    directory: Path,
    *,
    metrics: list[dict[str, Any]] | None = None,
    samples: list[dict[str, Any]] | None = None,
    checkpoint: bool = True,
    family: str = "qwen3",
    kind: str = "char",
    layers: int = 2,
    heads: int = 2,
    **info: Any,
) -> Path:
    """Make a run directory with a tiny random model, as training leaves it."""
    directory.mkdir(parents=True)
    tokenizer = train_char([TEXT]) if kind == "char" else train_bpe([TEXT * 3], 270)
    config = tiny_config(
        family,
        vocab_size=tokenizer.vocab_size,
        hidden_size=8 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=32,
    )
    if checkpoint:
        save_checkpoint(directory / "checkpoints" / "step-00000100", Transformer(config), tokenizer)
    described = {
        "version": "0.1.0",
        "status": "finished",
        "started": "2026-01-02T03:04:05+00:00",
        "ended": "2026-01-02T03:05:05+00:00",
        "config": {
            "steps": 100,
            "tokenizer": kind,
            "compile": None,
            "sample_prompt": "\n",
            "optim": {"lr": 0.02, "name": "muon"},
        },
        "model": to_dict(config),
        "data": {"val_tokens": 500, "val_bytes": 1000},
        "machine": {"processor": "A processor", "cores": 2, "gpu": ""},
    }
    (directory / "run.json").write_text(json.dumps({**described, **info}), encoding="utf-8")
    if metrics is None:
        metrics = [
            {"step": s, "time": s / 10, "loss": 4 - s / 50, "lr": 0.02, "grad_norm": 1.0, "tokens": s * 64}
            | {"tokens_per_second": 640.0}
            for s in range(1, 101)
        ] + [{"step": 100, "time": 10.0, "val_loss": 2.0, "tokens": 6400}]
    if samples is None:
        samples = [
            {"step": 50, "temperature": 0.8, "prompt": "\n", "text": f"a preview {EVIL}", "final": False},
            *(
                {"step": 100, "temperature": t, "prompt": "ROMEO:", "text": f"\nWhat {EVIL} {t}", "final": True}
                for t in (1.2, 0.2, 0.8)
            ),
        ]
    for name, rows in (("metrics", metrics), ("samples", samples)):
        if rows:
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = make_run(tmp_path_factory.mktemp("runs") / f"bard {EVIL.replace('/', '')}")
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob(".tmp-*"))
    return Page(path)


def test_every_section_exists_and_is_linked(finished: Page) -> None:
    assert [section["id"] for section in finished.all("section")] == SECTIONS
    links = [link["href"] for link in finished.all("a")]
    assert links == [f"#{id}" for id in SECTIONS]
    headings = {heading["id"] for heading in finished.all("h2")}
    assert all(section["aria-labelledby"] in headings for section in finished.all("section"))


def test_the_page_loads_nothing_from_the_network(finished: Page) -> None:
    assert not finished.all("script")
    for _, attributes in finished.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:"))
    assert re.search(r"https?://|@import|url\((?!#)", finished.source) is None


def test_text_from_the_run_is_escaped(finished: Page) -> None:
    assert "<script" not in finished.source
    assert f"What {EVIL} 0.8" in finished.text("samples")
    assert f"a preview {EVIL}" in finished.text("samples")
    assert "alert(" in "".join(finished.words[""])  # the run's name


def test_ids_are_unique_and_pictures_have_text_alternatives(finished: Page) -> None:
    ids = [attributes["id"] for _, attributes in finished.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = finished.all("svg")
    assert len(pictures) >= 8
    assert all(picture["role"] == "img" and len(picture["aria-label"] or "") > 20 for picture in pictures)
    assert all(cell["scope"] in ("row", "col") for cell in finished.all("th"))
    assert finished.all("html")[0]["lang"] == "en"


def test_summary_and_results(finished: Page) -> None:
    summary = re.sub(r"\s+", " ", "".join(finished.words[""]))
    assert "trained for 100 steps on 6.4 k tokens in 10 s" in summary
    assert "validation loss 2.0000 nats per character, at 640 tokens per second on A processor, 2 cores." in summary
    results = finished.text("results")
    bits = 2.0 * 0.5 / math.log(2)
    assert f"{bits:.3f} bits per byte, perplexity 7.39" in results
    assert "2.0000nats per token, at step 100" in results


def test_samples_are_in_order_of_temperature(finished: Page) -> None:
    text = finished.text("samples")
    places = [text.index(f"Temperature {t}") for t in ("0.2", "0.8", "1.2")]
    assert places == sorted(places)
    assert text.index("Samples during training") > places[-1]
    assert "Step 50, temperature 0.8" in text
    assert finished.source.count("<b>ROMEO:</b>") == 3


def test_configuration_is_grouped_and_complete(finished: Page) -> None:
    text = finished.text("configuration")
    for row in (
        "lr 0.02",
        "name muon",
        "compile –",
        "sample_prompt ↵",
        "hidden_size 16",
        "qk_norm yes",
        "processor A processor",
        "status finished",
    ):
        name, value = row.split(" ", 1)
        assert f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' in finished.source
    assert '"num_hidden_layers": 2' in text
    captions = re.findall("<caption>(.*?)</caption>", finished.source)
    assert captions == ["training", "training: optim", "model, as built", "data", "machine", "outcome"]


def test_attention_belongs_to_the_text_and_is_causal(tmp_path: Path) -> None:
    from gptsmith.report.trained_model import inspect_trained_model
    from gptsmith.run_directory import read_run

    for family in ("gpt2", "qwen3"):
        run = make_run(tmp_path / family, family=family)
        attention = inspect_trained_model(read_run(run), "the king").attention
        assert attention is not None
        assert "".join(attention.tokens) == "the king"
        assert len(attention.weights) == 2
        for layer in attention.weights:
            assert tuple(layer.shape) == (2, 8, 8)
            assert layer.triu(1).abs().max() == 0
            assert (layer.sum(-1) - 1).abs().max() < 1e-5


def test_attention_text_can_be_chosen(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", kind="bpe"), attention_text="the crown\n"))
    assert "the␣crown↵" in page.text("attention")
    assert "→ h" in page.text("mask")
    assert "nats per character" not in page.source


def test_a_text_that_cannot_be_encoded_is_rejected_and_the_old_report_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    for text in ("Ж!", "a", ""):
        with pytest.raises(TokenizerError):
            write_report(run, attention_text=text)
    assert (run / "report.html").read_text() == "old"


def test_of_many_layers_and_heads_a_stated_selection_is_shown(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", layers=9, heads=10)))
    assert "Of its 9 layers and 10 heads, 6 layers and 8 heads are shown" in page.text("attention")
    assert len(page.source) < 3_000_000


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics=[], samples=[], checkpoint=False, status="running", ended=None)
    page = Page(write_report(run))
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert "No step had been logged" in page.text("")
    assert "in progress" in page.text("")
    assert "not known yet" in page.text("results")
    assert "No loss had been logged" in page.text("loss")
    assert "No sample had been written" in page.text("samples")
    assert "No checkpoint had been saved" in page.text("attention")
    assert len(page.all("svg")) == 1  # the causal mask needs no model


def test_a_run_with_an_empty_run_json(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    page = Page(write_report(tmp_path))
    assert "run.json does not contain a configuration" in page.text("configuration")


def test_an_interrupted_run_shows_its_last_preview(tmp_path: Path) -> None:
    samples = [{"step": s, "temperature": 0.8, "prompt": "", "text": f"preview {s}", "final": False} for s in (10, 20)]
    page = Page(write_report(make_run(tmp_path / "run", samples=samples, status="interrupted")))
    assert "This run is interrupted" in page.text("results")
    assert "at step 20" in page.text("samples")
    assert page.text("samples").index("preview 20") < page.text("samples").index("preview 10")


def test_a_diverged_run_with_values_that_are_not_finite(tmp_path: Path) -> None:
    metrics = [{"step": s, "time": float(s), "loss": 3.0 if s < 30 else math.nan, "lr": None} for s in range(1, 41)]
    metrics += [{"step": 40, "time": None, "val_loss": math.inf, "grad_norm": math.nan}]
    run = make_run(tmp_path / "run", metrics=metrics, status="diverged", data={"val_tokens": "?", "val_bytes": 0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    page = Page(write_report(run))
    assert "diverged" in page.text("")
    assert "training loss 3.0000 nats per character, not validated yet" in page.text("")
    assert "loss is not a finite number" in page.text("loss")
    assert "Skipped 1 unreadable line" in page.text("results")
    assert "nan" not in page.text("results").lower()


def test_a_damaged_checkpoint_is_reported_and_the_rest_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    weights = run / "checkpoints" / "step-00000100" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    page = Page(write_report(run))
    assert "could not be loaded" in page.text("attention")
    assert "model.safetensors" in page.text("attention")
    assert "2.0000" in page.text("results")


def test_characters_that_html_does_not_allow(tmp_path: Path) -> None:
    sample = {
        "step": 1,
        "temperature": 1.0,
        "prompt": "",
        "text": "\n\nnul \x00 bell \x07 half \ud800 中文",
        "final": True,
    }
    page = Page(write_report(make_run(tmp_path / "run", samples=[sample])))
    assert "nul ␀ bell ␇ half ? 中文" in page.text("samples")
    assert '<pre tabindex="0">\n\n\nnul' in page.source  # HTML drops the first of these newlines only


def test_long_samples_and_many_previews_are_shortened_with_a_note(tmp_path: Path) -> None:
    samples = [{"step": s, "temperature": 0.8, "prompt": "", "text": "a" * 9000, "final": s == 99} for s in range(100)]
    page = Page(write_report(make_run(tmp_path / "run", samples=samples)))
    assert "(3,000 more characters)" in page.text("samples")
    assert "30 of 99" in page.text("samples")


def test_a_directory_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(GptsmithError, match="is not a run directory"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", checkpoint=False)
    (run / "report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(GptsmithError, match="no space left"):
        write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".tmp-*"))


def test_importing_the_report_imports_nothing_heavy() -> None:
    code = "import sys, gptsmith.report; print([m for m in ('torch', 'matplotlib', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

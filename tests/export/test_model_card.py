"""The model card states what is known, and escapes what it quotes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.export.model_card import About, escape, fence, license_of, model_card, run_of
from gptsmith.model import families
from gptsmith.run_directory import read_run

CONFIG = families.gpt2(vocab_size=64, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
ABOUT = About("bard", "mit", "fp32")


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "bard"
    (directory / "checkpoints" / "step-00000002").mkdir(parents=True)
    info = {
        "version": "9.9.9",
        "config": {"steps": 7, "optim": {"lr": 0.02}, "val": "/home/me/secret/val.txt", "device": "auto"},
        "data": {"spec": "/home/me/secret/plays.txt", "fingerprint": "f" * 64, "train_tokens": 54000},
        "machine": {"processor": "A Processor", "gpu": ""},
    }
    (directory / "run.json").write_text(json.dumps(info))
    rows = [
        {"step": 1, "time": 2.0, "loss": 3.0, "tokens": 100},
        {"step": 2, "time": 61.0, "val_loss": 2.0, "tokens": 200},
        {"step": 3, "time": 61.0, "val_loss": None, "tokens": 200},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": 2, "temperature": 0.8, "prompt": "\n", "text": "To be\n```\n<script>alert(1)</script>\n---"}
    (directory / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return directory


def front_matter(card: str) -> dict[str, Any]:
    """Parse the front matter. Its values are JSON, which is valid YAML."""
    assert card.startswith("---\n")
    matter = card[4 : card.index("\n---\n", 4)]
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in matter.splitlines())}


def test_a_card_states_data_recipe_and_results(run_directory: Path) -> None:
    card = model_card(ABOUT, CONFIG, 1234567, read_run(run_directory))
    assert front_matter(card) == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptsmith", "gpt2"],
    }
    for part in (
        "# bard",
        "1,234,567 parameters",
        "gptsmith 9.9.9",
        "| spec | plays.txt |",
        "| train_tokens | 54000 |",
        "| steps | 7 |",
        "| optim.lr | 0.02 |",
        "2.0000 nats/token (perplexity 7.39)",
        "| at step | 2 |",
        "1 min 01 s on A Processor",
        "````text\n\nTo be\n```\n<script>",
    ):
        assert part in card
    assert "secret" not in card  # where the text lay is nobody's business
    assert "ffff" not in card


def test_a_card_without_a_run_states_the_origin() -> None:
    card = model_card(About("x", "apache-2.0", "bf16", "org/some_name"), CONFIG, 5)
    assert "Origin: org/some_name." in card
    for heading in ("## Data", "## Recipe", "## Results"):
        assert heading not in card


def test_the_run_of_a_checkpoint_is_found(run_directory: Path, tmp_path: Path) -> None:
    (run_directory / "best").symlink_to(run_directory / "checkpoints" / "step-00000002")
    for place in (run_directory, run_directory / "checkpoints" / "step-00000002", run_directory / "best"):
        run = run_of(place)
        assert run is not None
        assert run.directory.resolve() == run_directory.resolve()
    assert run_of(tmp_path) is None
    (run_directory / "run.json").write_text("{")
    assert run_of(run_directory) is None


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\r\nlanguage: en\r\nlicense: 'apache-2.0'\r\n---\r\n", "apache-2.0"),
        ('---\nlicense: "cc-by-4.0"\n---\n', "cc-by-4.0"),
        ("license: mit\n", None),
        ("---\nlicense:\n- mit\n---\n", None),
        ("---\nlicense: <script>\n---\n", None),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_license_of_a_card_is_read(readme: str, expected: str | None) -> None:
    assert license_of(readme) == expected


def test_a_card_reads_its_own_license() -> None:
    assert license_of(model_card(ABOUT, CONFIG, 5)) == "mit"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain_name-1.5 (x)", "plain_name-1.5 (x)"),
        ("a | b", r"a \| b"),
        ("<img src=x>", r"\<img src=x\>"),
        ("[a](http://b)", r"\[a\](http://b)"),
        ("*_`~$&#\\", r"\*\_\`\~\$\&\#" + "\\\\"),
        ("two\nlines\r\n\tof", "two lines of"),
        ("\x1b[31m\u202e\ud800", "\ufffd\\[31m\ufffd\ufffd"),
    ],
)
def test_markdown_is_escaped(text: str, shown: str) -> None:
    assert escape(text) == shown


@given(text=st.text(st.characters(categories=None), max_size=60))
def test_text_cannot_escape_its_cell_or_code_block(text: str) -> None:
    """A cell stays one cell, only its own fence closes a code block, and the result is valid UTF-8."""
    cell = escape(text)
    assert "\n" not in cell
    unescaped = cell.replace("\\\\", "").replace("\\|", "").replace("\\<", "")
    assert "|" not in unescaped
    assert "<" not in unescaped
    lines = fence(text).split("\n")
    assert lines[0].removesuffix("text") == lines[-1]
    assert set(lines[-1]) == {"`"}
    assert all(lines[-1] not in line for line in lines[1:-1])
    (cell + fence(text)).encode("utf-8")


@given(title=st.text(st.characters(categories=None), max_size=40), license=st.text(max_size=20))
def test_the_front_matter_round_trips(title: str, license: str) -> None:
    card = model_card(About(title, license, "fp32", title), CONFIG, 5)
    assert front_matter(card)["license"] == license
    card.encode("utf-8")

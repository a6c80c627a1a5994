"""A sample that cannot be made never ends a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptsmith.log import JsonLines
from gptsmith.run_directory import read_run
from gptsmith.train import samples
from tests.foreign import wordpiece


def test_a_tokenizer_whose_line_break_encodes_to_nothing(run_cli: Any, text_file: Path, tmp_path: Path) -> None:
    place, run = tmp_path / "tokenizer.json", tmp_path / "run"
    place.write_text(wordpiece(text_file.read_text()).to_str())
    code, _, err = run_cli(*command(text_file, run), "--tokenizer", place)
    assert code == 0, err
    assert read_run(run).status == "finished"
    assert err.count("no sample: the prompt is empty") == 1
    assert "has no end-of-text token" in err


def test_any_failure(run_cli: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(samples, "stream", fail)
    code, _, err = run_cli(*command(text_file, tmp_path / "run"))
    assert code == 0, err
    assert err.count("no sample: out of memory\n") == 1
    assert read_run(tmp_path / "run").status == "finished"
    assert not JsonLines(tmp_path / "run" / "samples.jsonl").read()


def test_a_directory_without_an_end_token_in_its_configuration(run_cli: Any, text_file: Path, tmp_path: Path) -> None:
    place, run = tmp_path / "tokenizer", tmp_path / "run"
    place.mkdir()
    description = {**json.loads(wordpiece(text_file.read_text()).to_str()), "added_tokens": []}
    (place / "tokenizer.json").write_text(json.dumps(description))
    (place / "special_tokens_map.json").write_text(json.dumps({"eos_token": "[SEP]", "unk_token": "[UNK]"}))
    code, _, err = run_cli(*command(text_file, run), "--tokenizer", place)
    assert code == 0, err
    assert json.loads((run / "last" / "config.json").read_text())["eos_token_id"] == 3
    assert JsonLines(run / "samples.jsonl").read()


def test_answers_in_previews_end_where_training_ends_them(run_cli: Any, text_file: Path, tmp_path: Path) -> None:
    """A base model has no end token in its answers: --stop is what ends them."""
    code, _, err = run_cli(*command(text_file, tmp_path / "base"))
    assert code == 0, err
    (tmp_path / "prompts.txt").write_text("\n".join(text_file.read_text().split()[:12]))
    (tmp_path / "rewards.py").write_text(
        "def r(prompts, completions, **c):\n    return [len(t) for t in completions]\n"
    )

    def answers(name: str, *stop: str) -> list[str]:
        code, _, err = run_cli(
            *("grpo", tmp_path / "base", tmp_path / "prompts.txt", "--reward", f"{tmp_path / 'rewards.py'}:r"),
            *("--out", tmp_path / name, "--answer-tokens", 4, "--group-size", 2, "--batch-size", 4, "--steps", 1),
            *("--sample-tokens", 8, "--optim.lr", 1e-9, "--device", "cpu", "--compile", "off", *stop),
        )
        assert code == 0, err
        return [row["text"] for row in JsonLines(tmp_path / name / "samples.jsonl").read() if row["final"]]

    plain = answers("plain")
    stop = plain[0][2]
    assert answers("stopped", "--stop", stop) == [text.split(stop)[0] for text in plain]


def command(text: Path, run: Path) -> list[Any]:
    model = ["--model.num-hidden-layers", 1, "--model.hidden-size", 16, "--model.num-attention-heads", 2]
    loop = [
        "--context",
        16,
        "--batch-size",
        4,
        "--steps",
        4,
        "--eval-every",
        2,
        "--sample-tokens",
        5,
        "--device",
        "cpu",
    ]
    return ["train", text, "--out", run, "--compile", "off", *model, *loop]

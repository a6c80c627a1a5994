"""Runs the examples of docs/engine.md, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gptsmith.checkpoint import save_checkpoint
from gptsmith.tokenizer import train_char

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"


def test_the_examples_run(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("llguidance")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    tokenizer = train_char(['ROMEO: JULIET: age yes no 0123456789-+ {"age": 1}\n'])
    save_checkpoint(tmp_path / "runs" / "bard", make_model("qwen3", tokenizer.vocab_size, context=128), tokenizer)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "documentation"}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, example {i + 1}", "exec"), names)
    assert names["engine"].stats.blocks_used == 0
    out = capsys.readouterr().out
    assert "the prompt is empty" in out
    assert re.search(r"^\d+ of \d+ draft tokens were accepted", out, re.MULTILINE)
    assert re.search(r"^(yes|no) stop$", out, re.MULTILINE)

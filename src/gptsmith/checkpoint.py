"""Checkpoints: model directories with a `train/` folder, written atomically, verified by checksum, rotated.

    checkpoints/step-00002000/
        config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
        train/state.json           step, data cursor, counters
        train/state.safetensors    optimizer state, random-number state
        manifest.json              size and sha256 of every file above

Of a model that is spread over processes, the tensors are in several files, with an index; see
`gptsmith.distributed.checkpoint`, which writes them.

A checkpoint is complete or absent: it is written to a temporary directory, fsynced and renamed. One that is truncated
or changed later no longer matches its manifest; it is reported, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptsmith.errors import CheckpointError, GptsmithError
from gptsmith.formats.hf import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_json,
    save_configs,
    save_generation_config,
    save_model,
)
from gptsmith.formats.hf_heads import save_classifier
from gptsmith.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, save_adapter
from gptsmith.formats.safetensors import INDEX_FILE, SafetensorsFiles
from gptsmith.formats.safetensors_writer import write_tensors
from gptsmith.log import note
from gptsmith.model.heads import SequenceClassifier
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import DEFAULT_SELECTION, best_evaluation, read_info, read_metrics, selection_of
from gptsmith.storage import atomic_directory, atomic_file, remove_temporaries, sha256_file, write_text
from gptsmith.tokenizer import Tokenizer

MANIFEST = "manifest.json"
STATE_FILE = "state.safetensors"
STATE_INDEX = STATE_FILE + ".index.json"


@dataclass(frozen=True)
class TrainState:
    """The state of training besides the model: plain values as JSON, tensors by name."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(
    directory: Path,
    model: Transformer | SequenceClassifier,
    tokenizer: Tokenizer | None,
    state: TrainState | None = None,
    *,
    base: str | None = None,
    after_reading: Callable[[], None] = lambda: None,
) -> None:
    """Write a model directory with its manifest, atomically. `directory` must not exist yet.

    state: written to `train/`. base: the model whose weights `model` has; its adapter alone is written then, as PEFT
    does. after_reading: called when the tensors of model and state have been read, long before all is on the disk.
    Raises GptsmithError if the disk is full.
    """
    with atomic_directory(directory) as temporary:
        bos, ends = (None, ()) if tokenizer is None else (tokenizer.bos_id, tokenizer.end_ids)
        if isinstance(model, SequenceClassifier):
            save_classifier(
                model,
                temporary,
                pad_token_id=_padding(tokenizer) if model.pad_id is None else model.pad_id,
                bos_token_id=bos,
                end_ids=ends,
                scale=model.scale,
            )
        elif base is None:
            save_model(model, temporary, bos_token_id=bos, end_ids=ends)
        else:
            save_adapter(model, temporary, base)
            save_generation_config(model, temporary, bos_token_id=bos, end_ids=ends)
        if state is not None:
            (temporary / "train").mkdir()
            with atomic_file(temporary / "train" / STATE_FILE) as file:
                write_tensors(file, state.tensors)
        after_reading()
        if state is not None:
            write_state_values(temporary, state.values)
        if tokenizer is not None:
            tokenizer.save(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {
            p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files
        }
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def write_companions(directory: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write the configurations of `model` and its tokenizer into an existing directory."""
    save_configs(model, directory, bos_token_id=tokenizer.bos_id, end_ids=tokenizer.end_ids)
    tokenizer.save(directory)


def write_state_values(directory: Path, values: Mapping[str, Any]) -> None:
    """Write the values of a `TrainState` into the train/ folder of a directory."""
    write_text(directory / "train" / "state.json", json.dumps(values, indent=1) + "\n")


def _padding(tokenizer: Tokenizer | None) -> int | None:
    """Return the id by which transformers finds the end of padded texts: one that ends no answer, if there is one."""
    if tokenizer is None:
        return None
    special = set(tokenizer.special_tokens())
    unused = sorted(special - set(tokenizer.end_ids))
    return unused[0] if unused else tokenizer.eos_id


@contextlib.contextmanager
def explain_full_disk(directory: Path) -> Iterator[None]:
    """Turn the safetensors library's error for a full disk into a GptsmithError that says where."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if "os error 28" in str(error) or "No space" in str(error):  # there is no error code
            raise GptsmithError(
                f"no space left on the disk that holds {directory}. Free some space and try again."
            ) from error
        raise


def verify(directory: Path) -> None:
    """Raise CheckpointError for the first file that is missing, truncated or changed, by the directory's manifest.

    A directory without a manifest passes.
    """
    path = Path(directory) / MANIFEST
    if not path.exists():
        return
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    weights = INDEX_FILE if INDEX_FILE in expected else WEIGHTS_FILE
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if ADAPTER_CONFIG in expected else (CONFIG_FILE, weights):
        if name not in expected:
            raise CheckpointError(f"{path} is damaged: it does not list {name}.")
    for name, (size, digest) in expected.items():
        file = Path(directory) / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is damaged: it has {file.stat().st_size:,} bytes, expected {size:,}.")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{file} is damaged: its contents were changed (sha256 differs).")


class CheckpointStore:
    """The checkpoints of one run. `run_directory.best_evaluation` defines which is the best.

    base: of a run that trains an adapter, the model that it belongs to.
    """

    def __init__(self, run_directory: Path, *, base: str | None = None) -> None:
        self.run_directory, self.base = Path(run_directory), base
        self.directory = self.run_directory / "checkpoints"

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        found = []
        if self.directory.is_dir():
            for entry in self.directory.iterdir():
                number = entry.name.removeprefix("step-")
                if entry.is_dir() and entry.name.startswith("step-") and number.isdigit():
                    found.append(int(number))
        return sorted(found)

    def best_step(self) -> int | None:
        """Return the step of the best evaluation among those with a checkpoint; None where there is none."""
        present = set(self.steps())
        try:
            selection = selection_of(read_info(self.run_directory))
        except CheckpointError:  # run.json is missing or damaged: the checkpoints can be used all the same
            selection = DEFAULT_SELECTION
        rows = [row for row in read_metrics(self.run_directory) if row["step"] in present]
        best = best_evaluation(rows, selection)
        return None if best is None else int(best["step"])

    def save(
        self, step: int, model: Transformer | SequenceClassifier, tokenizer: Tokenizer, state: TrainState, *, keep: int
    ) -> Path:
        """Write the checkpoint of `step`, then delete all but the last `keep` and the best."""
        path = self.write(step, model, tokenizer, state)
        self.rotate(keep)
        return path

    def write(
        self,
        step: int,
        model: Transformer | SequenceClassifier,
        tokenizer: Tokenizer,
        state: TrainState,
        after_reading: Callable[[], None] = lambda: None,
    ) -> Path:
        """Write the checkpoint of `step`, as `save_checkpoint` does, and return its directory."""
        path = self.path(step)
        if path.exists():  # left from before a resume from an earlier step
            shutil.rmtree(path)
        save_checkpoint(path, model, tokenizer, state, base=self.base, after_reading=after_reading)
        return path

    def rotate(self, keep: int) -> None:
        """Delete all checkpoints but the last `keep` and the best, and update the links."""
        best = self.best_step()
        for old in self.steps()[: -max(1, keep)]:
            if old != best:
                shutil.rmtree(self.path(old), ignore_errors=True)
        self.update_links()

    def update_links(self) -> None:
        """Update the links `best` and `last`. They are for the user; this package does not read them."""
        steps, best = self.steps(), self.best_step()
        for name, step in (("last", steps[-1] if steps else None), ("best", best)):
            if step is not None:
                with contextlib.suppress(OSError):  # the file system may not support links
                    temporary = self.run_directory / f".tmp-{name}"
                    temporary.unlink(missing_ok=True)
                    temporary.symlink_to(Path("checkpoints") / self.path(step).name, target_is_directory=True)
                    os.replace(temporary, self.run_directory / name)

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of steps after `step`, and temporaries of killed writers."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later), ignore_errors=True)
        if self.directory.is_dir():
            remove_temporaries(self.directory)

    def newest_intact(self, candidates: Iterable[int] | None = None) -> Path:
        """Return the first intact checkpoint of `candidates` (default: all steps, newest first).

        Damaged ones are reported and skipped. Raises CheckpointError if none is intact.
        """
        damaged = []
        for step in candidates if candidates is not None else reversed(self.steps()):
            try:
                verify(self.path(step))
                if not (self.path(step) / MANIFEST).exists():
                    raise CheckpointError(f"{self.path(step) / MANIFEST} is missing.")
            except CheckpointError as error:
                damaged.append(str(error))
                note(f"warning: {error} Trying the previous checkpoint.")
                continue
            return self.path(step)
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.directory} is intact: {' '.join(damaged)}")
        raise CheckpointError(f"{self.run_directory} has no checkpoint yet.")


def load_train_state(directory: Path) -> TrainState:
    """Read the `train/` folder of a checkpoint: one file of tensors, or several of a model that processes share.

    Raises CheckpointError if it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(directory) / "train"
    try:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if (folder / STATE_INDEX).exists():
            files = sorted(set(read_json(folder / STATE_INDEX)["weight_map"].values()))
            return TrainState(values, dict(SafetensorsFiles([folder / str(name) for name in files], quantized=True)))
        return TrainState(values, load_file(folder / STATE_FILE))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} cannot be resumed: {error.filename} is missing.") from None
    except (SafetensorError, ValueError, OSError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}.") from None

"""Checkpoints: model directories with a `train/` folder, written atomically, verified by checksum, rotated.

    checkpoints/step-00002000/
        config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
        train/state.json           step, data cursor, counters
        train/state.safetensors    optimizer state, random-number state
        manifest.json              size and sha256 of every file above

A checkpoint is complete or absent: it is written to a temporary directory, fsynced and renamed. One that is truncated
or changed later no longer matches its manifest; it is reported, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch  # imported before training, so that a run short of memory can still save
from torch import Tensor

from gptsmith.errors import CheckpointError, GptsmithError
from gptsmith.formats.hf import CONFIG_FILE, WEIGHTS_FILE, save_generation_config, save_model
from gptsmith.formats.hf_heads import save_classifier
from gptsmith.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, save_adapter
from gptsmith.log import note
from gptsmith.model.heads import SequenceClassifier
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import DEFAULT_SELECTION, best_evaluation, read_info, read_metrics, selection_of
from gptsmith.storage import atomic_directory, remove_temporaries, sha256_file, write_text
from gptsmith.tokenizer import Tokenizer

MANIFEST = "manifest.json"


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
) -> None:
    """Write a model directory with its manifest, atomically. `directory` must not exist yet.

    state: written to `train/`. base: the model whose weights `model` has; its adapter alone is written then, as PEFT
    does. Raises GptsmithError if the disk is full.
    """
    with atomic_directory(directory) as temporary:
        with explain_full_disk(directory):
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
            if tokenizer is not None:
                tokenizer.save(temporary)
            if state is not None:
                (temporary / "train").mkdir()
                write_text(temporary / "train" / "state.json", json.dumps(state.values, indent=1) + "\n")
                safetensors.torch.save_file(state.tensors, temporary / "train" / "state.safetensors")
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {
            p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files
        }
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")


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
    adapter = ADAPTER_CONFIG in expected
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if adapter else (CONFIG_FILE, WEIGHTS_FILE):
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
        path = self.path(step)
        if path.exists():  # left from before a resume from an earlier step
            shutil.rmtree(path)
        save_checkpoint(path, model, tokenizer, state, base=self.base)
        best = self.best_step()
        for old in self.steps()[: -max(1, keep)]:
            if old != best:
                shutil.rmtree(self.path(old), ignore_errors=True)
        self.update_links()
        return path

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
    """Read a checkpoint's `train/` directory. Raise CheckpointError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(directory) / "train"
    try:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return TrainState(values, load_file(folder / "state.safetensors"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} cannot be resumed: {error.filename} is missing.") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}.") from None

"""Export a model as a Hugging Face directory in a chosen precision, or as a GGUF file. Both are written atomically.

    export_directory("runs/bard", Path("bard"), dtype="bf16")
    export_gguf("runs/bard", Path("bard.gguf"), dtype="q8_0")

Unlike loading for use, exporting checks that every weight is a finite number.
"""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptsmith.checkpoint import explain_full_disk
from gptsmith.errors import CheckpointError, UsageError, first_few
from gptsmith.export.model_card import About, license_of, model_card, run_of
from gptsmith.export.transforms import ModelTransform
from gptsmith.formats.hf import (
    CONFIG_FILE,
    DEFAULT_GENERATION,
    GENERATION_FILE,
    WEIGHTS_FILE,
    config_to_hf,
    save_preprocessor,
    token_ids,
    weights_to_hf,
)
from gptsmith.formats.named import NAMED_MODELS
from gptsmith.formats.safetensors import INDEX_FILE
from gptsmith.formats.source import ModelSource
from gptsmith.loading import source_of
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import vision_parameters
from gptsmith.model.transformer import Transformer
from gptsmith.quantize.calibration import TOKENS, calibration_ids, mean_squared_inputs
from gptsmith.storage import atomic_directory, write_text
from gptsmith.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptsmith.formats.gguf import GgufType

NO_TRANSFORM = ModelTransform()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CARD_FILE = "README.md"
WEIGHTED_TYPES: tuple[GgufType, ...] = ("q5_k_m", "q4_k_m", "q4_0", "mxfp4")
"""GGUF types that are coarse enough for a calibration to matter."""
SHARD_BYTES = 5_000_000_000  # larger models are split into files of at most this size

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAX_COPIED_BYTES = 1 << 20  # of a model card or license file


def export_directory(
    spec: str | Path,
    out: Path,
    *,
    dtype: str = "auto",
    license: str | None = None,
    transform: ModelTransform = NO_TRANSFORM,
) -> tuple[Transformer, str]:
    """Write the model that `spec` refers to (see `resolve_model`) as a Hugging Face directory with a model card.

    dtype: fp32, bf16, fp16, or auto for the type in which the model is stored. license: for the card; overrides the
    model's own. transform: applied to the model before it is written.
    Returns the model and the name of the type it was written in. Raises as `read_verified` and `write_directory` do.
    """
    reject_existing(out)
    if license is not None and not re.fullmatch(r"[\w.\-+]{1,64}", license):
        raise UsageError(f"--license {license!r} is not a license identifier, such as mit or apache-2.0.")
    source = source_of(spec)
    stored = source.stored_dtype() if dtype == "auto" else DTYPES[dtype]
    model, tokenizer = read_verified(source)
    model = transform.apply(model)
    card = _card(spec, source, model, dtype_name(stored), license, transform.describe(model.config))
    write_directory(out, model, tokenizer, dtype=stored, source=source, card=card)
    return model, dtype_name(stored)


def export_gguf(
    spec: str | Path,
    out: Path,
    *,
    dtype: GgufType = "f16",
    transform: ModelTransform = NO_TRANSFORM,
    calibration: Path | None = None,
    calibration_tokens: int = TOKENS,
    part_bytes: int | None = None,
) -> tuple[Transformer, list[Path]]:
    """Write the model that `spec` refers to as a GGUF file for llama.cpp and compatible programs.

    The vision tower and projector of a model become a second file beside it; see `mmproj_path`.
    dtype: see `write_gguf`. transform: applied to the model before it is written. calibration: a text that tells which
    inputs of a layer are large, so that their weights are rounded more carefully (None: a built-in mixture), for
    WEIGHTED_TYPES; calibration_tokens: how much of it, 0: none. part_bytes: split the file, as `write_gguf` does.
    Returns the model and the files of its text model. Raises UsageError for a family or setting that llama.cpp does not
    support, and as `read_verified` and `calibration_ids` do.
    """
    from gptsmith.formats.gguf import check_exportable, write_gguf
    from gptsmith.formats.gguf_tokenizer import tokenizer_to_gguf
    from gptsmith.formats.gguf_vision import check_mmproj, text_part, write_mmproj

    reject_existing(out)
    if part_bytes is not None and (parts := sorted(out.parent.glob(f"{glob.escape(out.stem)}-*-of-*.gguf"))):
        raise UsageError(f"{parts[0]} exists already. Choose another --out.")
    model, tokenizer = read_verified(source_of(spec))
    model = transform.apply(model)
    if model.config.vision is not None:
        reject_existing(mmproj_path(out))
        check_mmproj(model.config.vision)
    text = text_part(model)
    check_exportable(text)  # before the calibration, which takes a while
    importance = None
    if dtype in WEIGHTED_TYPES and calibration_tokens:
        ids = calibration_ids(text, tokenizer, calibration, tokens=calibration_tokens)
        importance = mean_squared_inputs(text, ids)
    vocabulary = tokenizer_to_gguf(tokenizer, model.config.vocab_size)
    paths = write_gguf(text, vocabulary, out, dtype, importance=importance, part_bytes=part_bytes)
    if model.config.vision is not None:
        write_mmproj(model, mmproj_path(out), "f32" if dtype == "f32" else "f16")
    return model, paths


def mmproj_path(out: Path) -> Path:
    """Return the file of the vision tower and projector of a model whose text model is the GGUF file `out`."""
    return out.with_name(f"{out.stem}-mmproj.gguf")


def reject_existing(out: Path) -> None:
    """Raise UsageError if `out` exists, unless it is an empty directory."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out} exists already. Choose another --out.")


def dtype_name(dtype: torch.dtype) -> str:
    """Return `fp32`, `bf16` or `fp16`."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def describe(out: Path, model: Transformer, dtype: str, paths: Sequence[Path] = ()) -> str:
    """Describe an exported model in one line: parameters, family, context, vocabulary, precision, size.

    paths: its files (default: those in the directory `out`), which are GGUF: without a vision tower.
    """
    c = model.config
    size = sum(p.stat().st_size for p in paths or out.iterdir())
    parameters = model.num_parameters(trainable_only=False)
    if paths and c.vision is not None:
        parameters -= vision_parameters(c.vision, c.hidden_size)
    name = out if len(paths) < 2 else f"{paths[0]} and {len(paths) - 1} more"
    return (
        f"{name}: {parameters:,} parameters, {c.model_type}, "
        f"context {c.max_position_embeddings:,}, "
        f"{c.vocab_size:,} tokens; {dtype}, {size / 1e6:,.1f} MB"
    )


def read_verified(source: ModelSource) -> tuple[Transformer, Tokenizer]:
    """Read the model in fp32 and its tokenizer, and check that every weight is a finite number.

    Raises CheckpointError that lists tensors with NaN or infinite weights, and TokenizerError if the tokenizer does not
    fit the model.
    """
    tokenizer = source.checked_tokenizer()
    model = source.model()
    _check_finite(weights_to_hf(model), f"{source.path} has weights that are NaN or infinite")
    return model, tokenizer


def write_directory(
    out: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype = torch.float32,
    source: ModelSource | None = None,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face model directory that transformers can load: configuration, weights, tokenizer, model card.

    source: the model's origin, whose special token ids, generation settings and license file are copied.
    Raises UsageError if `out` exists, CheckpointError if weights exceed the range of `dtype`, and GptsmithError if the
    disk is full.
    """
    reject_existing(out)
    weights = {name: tensor.to(dtype) for name, tensor in weights_to_hf(model).items()}
    if dtype != torch.float32:
        _check_finite(weights, f"weights beyond the range of {dtype_name(dtype)} (use bf16 or fp32)")
    with atomic_directory(out) as directory, explain_full_disk(out):
        _write_json(directory / CONFIG_FILE, _configuration(model.config, tokenizer, dtype, source))
        _write_json(directory / GENERATION_FILE, _generation(tokenizer, source))
        save_preprocessor(model.config, directory)
        _write_weights(directory, weights, shard_bytes)
        tokenizer.save(directory)
        if source is not None:
            for path in _license_files(source.origin):
                shutil.copyfile(path, directory / path.name)
        if card is not None:
            write_text(directory / CARD_FILE, card)


def _check_finite(weights: Mapping[str, Tensor], problem: str) -> None:
    not_finite = []
    for name, tensor in weights.items():
        if tensor.numel():
            low, high = torch.aminmax(tensor.detach())  # both are NaN if any number is; needs no copy
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                not_finite.append(name)
    if not_finite:
        raise CheckpointError(f"{problem}: {first_few(not_finite)}.")


def _card(
    spec: str | Path, source: ModelSource, model: Transformer, dtype: str, license: str | None, changes: str
) -> str:
    """Return the model card: the model's own where it is still accurate, else a new one.

    A run's card is always new, and so is that of a model that was transformed or gets another license.
    """
    run = run_of(source.path)
    own = _own_card(source.path / CARD_FILE)
    if own is not None and run is None and not changes and license in (None, license_of(own)):
        return own
    named = NAMED_MODELS.get(str(spec))
    license = license or (own and license_of(own)) or (named and named.license) or "unknown"
    title = run.name if run is not None else Path(spec).name
    origin: str | None = None
    if run is None:
        origin = named.description if named is not None else Path(spec).name if Path(spec).exists() else str(spec)
    about = About(title, license, dtype, origin, changes)
    return model_card(about, model.config, model.num_parameters(trainable_only=False), run)


def _own_card(path: Path) -> str | None:
    if not path.is_file() or path.stat().st_size > _MAX_COPIED_BYTES:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _configuration(
    config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype, source: ModelSource | None
) -> dict[str, Any]:
    values = config_to_hf(config, bos_token_id=tokenizer.bos_id, end_ids=tokenizer.end_ids)
    if source is not None:
        values |= {key: source.hf_config[key] for key in _TOKEN_IDS if key in source.hf_config}
    return values | {"dtype": str(dtype).removeprefix("torch.")}


def _generation(tokenizer: Tokenizer, source: ModelSource | None) -> dict[str, Any]:
    values = {} if source is None else dict(source.generation_config)
    if "eos_token_id" in values:
        return values
    ids = token_ids(tokenizer.bos_id, tokenizer.end_ids)
    if source is not None:
        others = ("bos_token_id", "pad_token_id")
        ids |= {key: source.hf_config[key] for key in others if source.hf_config.get(key) is not None}
    return {**ids, **(values or DEFAULT_GENERATION)}


def _write_weights(directory: Path, weights: Mapping[str, Tensor], shard_bytes: int) -> None:
    from safetensors.torch import save_file

    def save(shard: dict[str, Tensor], name: str) -> None:
        save_file(shard, directory / name, metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG_FILE, directory / name)  # safetensors makes the file private

    shards = list(_split(weights, shard_bytes))
    if len(shards) == 1:
        save(shards[0], WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save(shard, name)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in weights.values())
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(weights: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in order, in groups of at most `shard_bytes`. A larger tensor gets a group of its own."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _license_files(path: Path) -> list[Path]:
    """Return the license and notice files in a model's directory, which must accompany copies of the model."""
    if not path.is_dir():
        return []
    names = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
    files = [path / name for name in names]
    return [file for file in files if file.is_file() and file.stat().st_size <= _MAX_COPIED_BYTES]


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

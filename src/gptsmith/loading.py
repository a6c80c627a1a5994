"""Load a model by its spec: a run, a model directory, a GGUF file, a named model, or a model on the Hugging Face hub.

    model, tokenizer = load_model("runs/bard")

This is `gptsmith.load`, and what every command that takes a MODEL calls.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from gptsmith.checkpoint import CheckpointStore, verify
from gptsmith.errors import CheckpointError, nearest
from gptsmith.formats.hf import CONFIG_FILE
from gptsmith.formats.hf_heads import SCORE
from gptsmith.formats.hub import hub_model_path, is_hub_id
from gptsmith.formats.named import NAMED_MODELS, named_model_path
from gptsmith.formats.peft import ADAPTER_CONFIG, adapted_rows, base_of
from gptsmith.formats.source import ModelSource, adapted, open_model
from gptsmith.log import note
from gptsmith.model.quantized import Bits, bits_of, quantize_on_gpu
from gptsmith.model.quantized import quantize as quantize_model
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer

Quantization = Literal["auto", "none", "int8", "int4"]


def load_model(
    spec: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: Quantization = "auto",
    adapter: Path | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Load a model, in eval mode, and its tokenizer from anything that `resolve_model` understands.

    adapter: the directory of an adapter to fold in, whose tokenizer comes first if it has one.
    dtype: of the weights in memory, whatever they are stored in.
    quantize: int8 or int4 quantizes the weight matrices. auto keeps matrices quantized that are stored so (by
    `gptsmith quantize`, or in a GGUF file); none dequantizes them to `dtype`. In a quantized model the other weights
    are float32, on a GPU bfloat16.

    Tokens that were added to the tokenizer without an embedding in the model are errors in texts. Without a tokenizer,
    texts are token ids.
    Raises CheckpointError if the model is missing, damaged or of an unknown kind, TokenizerError if its tokenizer is
    damaged or that of another model, and UsageError for quantized weights on a GPU without torchao.
    """
    source = source_of(spec) if adapter is None else adapted(source_of(spec), adapter)
    requested: Bits | None = {"int8": 8, "int4": 4}.get(quantize)  # type: ignore[assignment]
    if torch.device(device).type == "cuda":
        bits = requested or (source.bits if quantize == "auto" else None)
        model = source.model(dtype=dtype if bits is None else torch.bfloat16).to(device)
        if bits is not None:
            quantize_on_gpu(model, bits)
    else:
        model = source.model(dtype=dtype, packed=quantize != "none")
        if requested is not None and bits_of(model) != requested:
            model = quantize_model(source.model(), requested)
    tokenizer, rows = source.checked_tokenizer(), model.config.vocab_size
    if tokenizer.vocab_size > rows:
        note(
            f"note: {source.path}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model {rows:,}. "
            f"The tokens from {rows} on ({tokenizer.token_text(rows)!r}) cannot be used."
        )
        tokenizer = tokenizer.limited_to(rows)
    return model.to(device), tokenizer


def source_of(spec: str | os.PathLike[str]) -> ModelSource:
    """Open the model that `spec` refers to; an adapter together with the model that it belongs to.

    Raises CheckpointError as `resolve_model` and `open_model` do.
    """
    path = resolve_model(spec)
    if (path / CONFIG_FILE).exists() or not (path / ADAPTER_CONFIG).exists():
        source = open_model(path)
        if SCORE in source.tensors:
            raise CheckpointError(
                f"{spec} is a model with a task head, not a language model: it gives texts scores and writes none. "
                "Use it with gptsmith classify MODEL --predict FILE, or as a --reward."
            )
        return source
    base = base_of(path)
    try:
        return adapted(source_of(base), path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is an adapter for {base}: {error}") from None


def resolve_adapter(spec: str | os.PathLike[str]) -> Path:
    """Return the directory of the adapter that `spec` refers to: one in PEFT's layout, or a run that trained one.

    Raises CheckpointError if there is none, if its files are damaged, or if it is a whole model.
    """
    path = resolve_model(spec)
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{spec} is a whole model, not an adapter: use it in place of the model.")
    adapted_rows(path)  # are the weights there?
    return path


def resolve_model(spec: str | os.PathLike[str]) -> Path:
    """Return the model directory or .gguf file that `spec` refers to.

    An existing path comes first: a model directory, that of an adapter (adapter_config.json), a .gguf file, or a run
    (its best checkpoint, else its last). Then
    the named models (`smollm2-135m`), then the hub (`org/name`, `org/name@revision`, `hf:name`); these are downloaded
    if they are not in the cache.

    Raises CheckpointError if there is no such model, with a suggestion where a name is similar.
    """
    path = Path(spec)
    if (path / CONFIG_FILE).exists() or (path / ADAPTER_CONFIG).exists():
        verify(path)
        return path
    store = CheckpointStore(path)
    if store.directory.is_dir():
        best, steps = store.best_step(), store.steps()[::-1]
        return store.newest_intact([best, *(s for s in steps if s != best)] if best is not None else steps)
    if path.is_dir():
        raise CheckpointError(f"{path} is neither a model directory (no config.json) nor a run (no checkpoints/).")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is not a model. A model is a .gguf file, or a directory with config.json and model.safetensors."
        )
    name = str(spec)
    if name in NAMED_MODELS:
        return named_model_path(name)
    if is_hub_id(name):
        return hub_model_path(name)
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise CheckpointError(f"there is no model at {path}.{nearest(path.name, siblings) or nearest(name, NAMED_MODELS)}")

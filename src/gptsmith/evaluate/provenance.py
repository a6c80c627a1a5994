"""What a result was measured with: enough to repeat it."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch

import gptsmith
from gptsmith.model.flops import count_parameters
from gptsmith.model.quantized import bits_of
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer


def environment(model: Transformer, tokenizer: Tokenizer, name: str = "") -> dict[str, Any]:
    """Return versions, and what identifies a model and its tokenizer. name: of the model, as the user knows it."""
    parameter = next(model.parameters())
    return {
        "gptsmith": gptsmith.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "model": name,
        "model_sha256": weights_sha256(model),
        "parameters": count_parameters(model.config).total,
        "context": model.config.max_position_embeddings,
        "tokenizer_sha256": tokenizer.fingerprint,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "bits": bits_of(model),
        "device": parameter.device.type,
    }


def weights_sha256(model: Transformer) -> str:
    """Return the sha256 (hex) of a model's weights: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

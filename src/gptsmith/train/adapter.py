"""The adapter of a run: which weights are trained when not all of them are."""

from __future__ import annotations

from gptsmith.formats.peft import adapter_layout
from gptsmith.model.lora import add_lora
from gptsmith.model.quantized import Bits, quantize
from gptsmith.model.transformer import Transformer
from gptsmith.train.config import AdapterConfig

_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}


def is_on(adapter: AdapterConfig) -> bool:
    """Return whether a run trains an adapter; "auto" has been decided when a run starts."""
    return adapter.lora == "on"


def adapt(model: Transformer, adapter: AdapterConfig, *, train_fully: tuple[str, ...] = ()) -> Transformer:
    """Put a new adapter on `model`, in place, if the run trains one; its other weights are frozen, and quantized as
    configured.

    train_fully: modules that are trained and saved whole (embeddings with new tokens).
    """
    if not is_on(adapter):
        return model
    if adapter.quantize != "none":
        quantize(model, _BITS[adapter.quantize], keep=train_fully)
    add_lora(model, adapter, adapter_layout(model), train_fully=train_fully)
    return model

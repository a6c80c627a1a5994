"""The adapter of a run: which weights are trained when not all of them are."""

from __future__ import annotations

from torch import nn

from gptsmith.formats.peft import adapter_layout
from gptsmith.model.lora import add_lora
from gptsmith.model.quantized import Bits, quantize
from gptsmith.model.transformer import Transformer
from gptsmith.train.config import AdapterConfig, PictureConfig

PROJECTOR_LR = 10.0  # learning rates of a projector, relative to those of the text model
_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}


def is_on(adapter: AdapterConfig) -> bool:
    """Return whether a run trains an adapter; "auto" has been decided when a run starts."""
    return adapter.lora == "on"


def adapt(
    model: Transformer, adapter: AdapterConfig, pictures: PictureConfig, *, train_fully: tuple[str, ...] = ()
) -> Transformer:
    """Put a new adapter on `model`, in place, if the run trains one; its other weights are frozen, and quantized as
    configured. Freeze the parts of a model that reads pictures as `pictures` says.

    train_fully: modules that are trained and saved whole (embeddings with new tokens). The projector is one of them.
    """
    sees = model.config.vision is not None
    if sees and is_on(adapter):
        train_fully = (*train_fully, "projector")
    if is_on(adapter):
        if adapter.quantize != "none":
            quantize(model, _BITS[adapter.quantize], keep=train_fully)
        add_lora(model, adapter, adapter_layout(model), train_fully=train_fully)
    if sees:
        for name, p in model.named_parameters():
            part = {"vision": "tower", "projector": "projector"}.get(name.partition(".")[0], "text")
            if part in pictures.freeze:
                p.requires_grad_(False)
    return model


def rate_factors(model: Transformer, adapter: AdapterConfig, pictures: PictureConfig) -> dict[nn.Module, float]:
    """Return the modules whose learning rates differ from the run's, and the factors."""
    if model.config.vision is None:
        return {}
    projector = pictures.projector_lr
    if projector is None:
        projector = 1.0 if is_on(adapter) else PROJECTOR_LR
    factors = {model.vision: pictures.tower_lr, model.projector: projector}
    return {module: factor for module, factor in factors.items() if factor != 1.0}

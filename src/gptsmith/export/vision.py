"""Add an untrained vision tower and projector to a text model, to be trained on captioned pictures.

add_vision("runs/chat", "models/seer", image_size=72, patch_size=12)
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from gptsmith.errors import UsageError
from gptsmith.export.export import dtype_name, read_verified, reject_existing, write_directory
from gptsmith.export.model_card import About, model_card
from gptsmith.export.vision_options import VisionOptions
from gptsmith.loading import source_of
from gptsmith.log import note
from gptsmith.model.config import ModelConfig, VisionConfig
from gptsmith.model.flops import vision_parameters
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chatml import IMAGE_TOKEN, with_image_token
from gptsmith.train.init import Init, with_tokens

_WORDS = 16  # a context must have room for a picture and so many tokens


def add_vision(model: str | Path | Run, out: str | Path, **options: int | None) -> Path:
    """Write a text model with an untrained vision tower and projector as a model directory, and return its path.

    model: what `resolve_model` understands. options: fields of `VisionOptions`. The model gets a token for pictures,
    and a chat template where it has none; its other weights stay the same.
    Raises UsageError for a model that reads pictures already, and sizes that do not fit.
    """
    out = Path(out)
    reject_existing(out)
    chosen = VisionOptions(**options)  # type: ignore[arg-type]
    vision = chosen.build()
    source = source_of(os.fspath(model))
    if source.config.vision is not None:
        raise UsageError(f"{model} reads pictures already.")
    if vision.tokens + _WORDS > source.config.max_position_embeddings:
        raise UsageError(
            f"a picture becomes {vision.tokens} tokens, and the context of {model} has only "
            f"{source.config.max_position_embeddings}: use a larger --patch-size or a smaller --image-size."
        )
    text, tokenizer = read_verified(source)
    seeing, tokenizer = with_vision(text, tokenizer, vision, seed=chosen.seed)
    dtype = source.stored_dtype()
    title = Path(model).name or "model"
    changes = (
        f"an untrained vision tower and projector ({vision_parameters(vision, text.config.hidden_size):,} weights)"
    )
    about = About(title, "unknown", dtype_name(dtype), title, changes)
    card = model_card(about, seeing.config, seeing.num_parameters(trainable_only=False), None)
    write_directory(out, seeing, tokenizer, dtype=dtype, source=replace(source, hf_config={}), card=card)
    return out


def with_vision(
    text: Transformer, tokenizer: Tokenizer, vision: VisionConfig, *, seed: int = VisionOptions.seed
) -> tuple[Transformer, Tokenizer]:
    """Return a model with the weights of `text` and a new vision tower and projector, and its tokenizer."""
    before = tokenizer
    tokenizer, _ = with_image_token(before)
    if not before.config().get("chat_template"):
        note("chat template: the model has none and gets ChatML")
    text = with_tokens(Init("", text, before), tokenizer).model
    image_token_id = tokenizer.added_tokens()[IMAGE_TOKEN]
    config = replace(text.config, vision=vision, image_token_id=image_token_id)
    if config.position == "learned" and config.tie_word_embeddings:
        note("embeddings and output matrix are no longer tied: the llava layout has no tied ones of GPT-1, 2 and 3")
        config = replace(config, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _filled(config, text)
        _match_scale(model)
    return model, tokenizer


@torch.no_grad()
def _filled(config: ModelConfig, text: Transformer) -> Transformer:
    """Return a model with the weights of `text`, and new ones in tower and projector."""
    model = Transformer(config)
    state = {name: tensor.clone() for name, tensor in text.state_dict().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("vision.", "projector.")) for name in missing)
    model.generation_config = dict(text.generation_config)
    return model.eval()


@torch.no_grad()
def _match_scale(model: Transformer) -> None:
    """Scale the projector so that its outputs are about as large as the embeddings of tokens."""
    assert model.config.vision is not None
    size = model.config.vision.image_size
    features = model.image_features(torch.rand(8, 3, size, size) * 2 - 1)
    last = model.projector.linear_2 or model.projector.linear_1
    last.weight.mul_(model.embed_tokens.weight.square().mean().sqrt() / features.square().mean().sqrt())

"""Models of one's own: what can be trained must also be saved, so a model that no layout can hold is refused early."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.formats.hf import config_from_hf, config_to_hf, weights_to_hf
from gptsmith.formats.hf_vision import preprocessor_to_hf
from gptsmith.model.config import ModelConfig
from gptsmith.model.transformer import Transformer

ModelFactory = Callable[[ModelConfig, float], Transformer]
"""Makes the model of a configuration and a dropout probability."""

# What a model directory does not say, since it has no part in computing logits.
_NOT_SAVED = frozenset({"residual_init", "initializer_range", "router_aux_loss_coef", "router_z_loss_coef"})


def check_saveable(model: Transformer) -> None:
    """Raise UsageError where the model, saved in its layout and loaded again, would be another model.

    A variation may change how training behaves (stochastic depth, noise, its own initialization). In eval mode it must
    compute what `Transformer` computes with the same configuration and weights.
    """
    config = model.config
    try:
        preprocessor = None if config.vision is None else preprocessor_to_hf(config.vision)
        read_back = config_from_hf(config_to_hf(config), "the model's configuration", preprocessor=preprocessor)
        weights_to_hf(Transformer(config, initialize=False) if type(model) is not Transformer else model)
    except (GptsmithError, KeyError) as error:
        raise UsageError(f"this model cannot be saved: {error} Choose a model_type that has what it uses.") from None
    for option in dataclasses.fields(ModelConfig):
        value, read = getattr(config, option.name), getattr(read_back, option.name)
        if value != read and option.name not in _NOT_SAVED:
            raise UsageError(
                f"this model cannot be saved: the {config.model_type} layout has no place for {option.name} = "
                f"{value!r} (it would be read as {read!r}). Choose another model_type, or leave the option as it is."
            )
    if type(model) is Transformer:
        return
    name = type(model).__name__
    plain = Transformer(config, initialize=False)
    mine, known = model.state_dict(), plain.state_dict()
    extra = sorted(set(mine) ^ set(known)) or sorted(key for key in known if mine[key].shape != known[key].shape)
    if extra:
        raise UsageError(
            f"{name} cannot be saved: the {config.model_type} layout has no place for {', '.join(extra[:5])}. Remove "
            "such parameters from the model, or fold them into its own before training ends."
        )
    plain.load_state_dict(mine)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        ids = torch.randint(config.vocab_size, (1, min(16, config.max_position_embeddings)))
        was_training = model.training
        logits, expected = model.eval()(ids.to(device)).cpu(), plain.eval()(ids)
        model.train(was_training)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4):
        raise UsageError(
            f"{name} cannot be saved: in eval mode its logits differ from those of a Transformer with the same "
            "weights, which is how the saved directory would be loaded. A variation can only change training."
        )

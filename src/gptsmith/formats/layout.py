"""What describes a Hugging Face layout: how one `model_type` stores configuration and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptsmith.formats.hf_weights import HEAD, WeightMapping
from gptsmith.model.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """How one Hugging Face `model_type` stores a model."""

    weight_mappings: Callable[[ModelConfig], list[WeightMapping]]
    """All weights but an untied output matrix."""
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    ignored_tensors: str
    """Regular expression for tensors that are not read: causal masks of old files, layers of other tasks. LAYERS stands
    for the number of layers."""
    prefix: str
    """What all names but that of the output matrix begin with; files of a model without one may lack it."""
    fields: Mapping[str, Any]
    """The fields of transformers' configuration class that decide the logits, and the values of missing ones."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of fields. Where a file has both, the alias counts, as in transformers."""
    stacked_experts: bool = False
    """Whether all experts of a layer are one tensor."""
    head: str = HEAD
    """The name of the output matrix in files."""

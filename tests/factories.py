"""Small models and configurations that tests share. Tests write `from tests.factories import tiny_model`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gptsmith.model.config import ModelConfig
from gptsmith.model.families import FAMILIES
from gptsmith.model.transformer import Transformer
from gptsmith.train.config import ModelOptions, RunConfig, run_config

WITHOUT_GROUPS = ("gpt1", "gpt2", "gpt3", "gpt_neox", "opt", "deepseek_v3")
"""Families whose queries have a key and value head each."""
WITH_WINDOWS = ("gpt3", "mistral", "phi3", "gemma3", "gpt_oss")
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3")


def tiny_config(family: str = "qwen3", **options: Any) -> ModelConfig:
    """Return a model configuration of `family` with two layers of width 16; `options` override any field.

    As in the published models, GPT has as many key/value heads as query heads, and the others share them; sliding
    windows are shorter than the context. Weights are large, so that logits differ clearly.
    """
    heads = options.get("num_attention_heads", 2)
    defaults: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": None if family in WITHOUT_GROUPS else max(1, heads // 2),
        "head_dim": None,
        "intermediate_size": 24,
        "max_position_embeddings": 24,
        "initializer_range": 0.4,
    }
    if family in WITH_WINDOWS:
        defaults["sliding_window"] = 7
    if family == "gemma3":
        defaults["window_pattern"] = (True, False)
    if family == "smollm3":
        defaults["rope_pattern"] = (True, False)
    if family in WITH_EXPERTS:
        defaults |= {"num_experts": 4, "num_experts_per_tok": 2}
    if family == "deepseek_v3":
        defaults |= {"n_group": 2, "topk_group": 1}
    return FAMILIES[family](**defaults | options)


def tiny_model(family: str = "qwen3", *, seed: int = 0, **options: Any) -> Transformer:
    """Return a model of `tiny_config` with random weights that depend on `seed`, in eval mode."""
    torch.manual_seed(seed)
    return Transformer(tiny_config(family, **options)).eval()


def tiny_run_config(**options: Any) -> RunConfig:
    """Return the configuration of a run that takes about a second; `options` override any field."""
    defaults: dict[str, Any] = {
        "model": ModelOptions(num_hidden_layers=2, hidden_size=32, num_attention_heads=2),
        "context": 32,
        "batch_size": 8,
        "log_every": 1,
        "sample_tokens": 0,
        "compile": "off",
        "device": "cpu",
    }
    return run_config(**defaults | options)


def examples(number: int) -> int:
    """Return how many examples a property test that takes seconds draws: all with `make test-all`, else a third."""
    return number if os.environ.get("GPTSMITH_TESTS") == "all" else number // 3


class Reports:
    """Whether runs in this process end with their report, whose figures take ten times as long as a small run."""

    drawn = False

    @classmethod
    @contextmanager
    def drawn_if(cls, wanted: bool) -> Iterator[None]:
        before, cls.drawn = cls.drawn, wanted
        try:
            yield
        finally:
            cls.drawn = before

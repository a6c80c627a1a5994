"""Initial weights are those of one process, whatever part of the model a process makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gptsmith.distributed.context import join_processes
from gptsmith.distributed.initial import initialize_shards
from gptsmith.distributed.layout import Layout
from gptsmith.distributed.parallel import named_parameters, parallelize
from gptsmith.distributed.sharding import local, sharding_of
from gptsmith.model.families import FAMILIES
from gptsmith.model.initial import draw_seed
from gptsmith.model.transformer import Transformer
from gptsmith.train.forecast.memory import resident_memory
from tests.distributed.processes import results, run_processes
from tests.factories import tiny_config

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.mark.parametrize("family", sorted(FAMILIES.builtin))
def test_drawn_later_they_are_the_same(family: str) -> None:
    """And the random numbers that follow."""
    for tied in (True, False):
        config = tiny_config(family, tie_word_embeddings=tied)
        torch.manual_seed(3)
        expected, state = Transformer(config), torch.get_rng_state()
        torch.manual_seed(3)
        model = Transformer(config, initialize=False)
        for p in model.parameters():
            if p.ndim > 1 and not torch.equal(p, torch.zeros_like(p)):
                p.data.fill_(torch.nan)
        initialize_shards(model, {}, draw_seed())
        assert torch.equal(torch.get_rng_state(), state)
        for (name, p), (_, q) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(p, q), name


def wrong_parts(text: str, family: str) -> list[str]:
    """Return the names of parameters whose part in this process is not that of the whole model."""
    with join_processes(20) as ranks:
        layout = Layout.parse(text, ranks.world_size)
        ranks.arrange(layout, torch.device("cpu"))
        config = tiny_config(family, num_attention_heads=4)
        torch.manual_seed(5)
        model = parallelize(Transformer(config, initialize=False), ranks.mesh, layout)
        initialize_shards(model, layout.coordinates(ranks.rank), draw_seed())
        torch.manual_seed(5)
        whole = dict(Transformer(config).named_parameters())
        return [
            name
            for name, p in named_parameters(model)
            if not torch.equal(local(p), sharding_of(p).block(whole[name].detach(), layout.coordinates(ranks.rank)))
        ]


@pytest.mark.parametrize(
    ("layout", "family", "processes"),
    [
        ("fsdp", "gpt2", 2),
        ("tp=2", "qwen3", 2),
        ("ep=2", "mixtral", 2),
        pytest.param("fsdp=2,tp=2", "deepseek_v3", 4, marks=pytest.mark.slow),
    ],
)
def test_each_process_draws_its_part(layout: str, family: str, processes: int, tmp_path: Path) -> None:
    assert results(run_processes(processes, tmp_path, wrong_parts, layout, family)) == [[]] * processes


@pytest.mark.skipif(resident_memory() is None, reason="the memory of a process is not known here")
def test_undrawn_weights_take_no_memory() -> None:
    config = tiny_config("qwen3", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    before = resident_memory() or 0
    model = Transformer(config, initialize=False)
    size = sum(4 * p.numel() for p in model.parameters())
    assert size > 80 << 20
    assert (resident_memory() or 0) - before < size / 3

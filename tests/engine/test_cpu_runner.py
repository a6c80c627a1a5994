"""The compiled program computes what `Transformer.forward` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptsmith.engine import cpu_runner
from gptsmith.engine.cpu_runner import CpuRunner, is_supported
from gptsmith.engine.engine import Engine
from gptsmith.engine.runner import Runner, StepInputs
from gptsmith.engine.sampling import SamplingParams
from gptsmith.formats.peft import adapter_layout
from gptsmith.kernels.threads import kernels_available
from gptsmith.model import families
from gptsmith.model.lora import Adapter, Update, columns_and_rows
from gptsmith.model.quantized import quantize
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_model

pytestmark = pytest.mark.skipif(not kernels_available(), reason="needs numba and a processor with AVX-512 VNNI")


@pytest.fixture(autouse=True)
def compile_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_runner, "MIN_PARAMETERS", 0)


SUPPORTED = [family for family in families.FAMILIES if family != "deepseek_v3"]


def make_model(family: str, **overrides: Any) -> Transformer:
    sizes = {"vocab_size": 101, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    if family == "gpt1":
        sizes["intermediate_size"] = 256
    model = tiny_model(family, **sizes | {"max_position_embeddings": 64, "initializer_range": 0.2} | overrides)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("family", SUPPORTED)
def test_equals_the_transformer(family: str, bits: int, threads: int) -> None:
    """Compare each step, with chunked prompts and several sequences."""
    model = make_model(family)
    if bits != 32:
        quantize(model, bits)  # type: ignore[arg-type]
    engine = Engine(model, block_size=4, max_batch=6, max_batch_tokens=8 if bits == 32 else 30)
    runner = engine.executor.runner
    assert isinstance(runner, CpuRunner)
    steps = 0
    program = runner._logits

    def both(inputs: StepInputs) -> torch.Tensor:
        nonlocal steps
        steps += 1
        actual, expected = program(inputs), Runner._logits(runner, inputs)
        # Quantized weights round their inputs to 8 bits, too: a value halfway between two can be rounded either way.
        assert (actual - expected).norm() <= (1e-5 if bits == 32 else 0.03) * expected.norm()
        return actual

    runner._logits = both  # type: ignore[method-assign]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prompts = [[1, 2, 3], [4], list(range(20)), [9, 9]]
        engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0, prompt_logprobs=0))
    finally:
        torch.set_num_threads(before)
    assert steps > 10


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
@pytest.mark.parametrize("bits", [32, 4])
def test_greedy_equals_the_naive_loop(family: str, bits: int, naive: Any) -> None:
    model = make_model(family)
    if bits != 32:
        quantize(model, 4)
    prompts = [[1, 2, 3], [4, 5], [6]]
    results = Engine(model, prefix_caching=False).generate(prompts, SamplingParams(max_tokens=8, temperature=0))
    if bits == 32:
        assert [r.ids for r in results] == [naive(model, p, 8) for p in prompts]
    assert all(len(r.ids) == 8 for r in results)


def test_unsupported_models_use_the_plain_runner() -> None:
    for family in families.FAMILIES:
        assert is_supported(make_model(family)) is (family in SUPPORTED), family
    assert not is_supported(make_model("gpt2", hidden_size=40))
    assert not is_supported(make_model("gpt2").to(torch.bfloat16))
    engine = Engine(make_model("gpt2").to(torch.bfloat16))
    assert len(engine.generate([[1]], SamplingParams(max_tokens=3))[0].ids) == 3


@pytest.mark.parametrize(
    ("family", "reason"),
    [("deepseek_v3", "latent attention")],
)
def test_what_is_not_compiled_is_said_in_a_line(family: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    Engine(make_model(family))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"compiled program for CPUs has no {reason}" in lines[0]


def test_all_families_share_one_compiled_program() -> None:
    """Compiling takes half a minute: no kind of model or batch may need it again."""
    from gptsmith.kernels import cpu_decode

    for family in SUPPORTED:
        engine = Engine(make_model(family, num_hidden_layers=1), max_batch=4, max_batch_tokens=8)
        engine.generate([[1, 2, 3], [4], list(range(12))], SamplingParams(max_tokens=2))
    assert len(cpu_decode.forward.signatures) == 1


def test_uses_weights_that_were_replaced_or_changed(naive: Any) -> None:
    model, greedy = make_model("qwen3"), SamplingParams(max_tokens=8, temperature=0)
    engine = Engine(model, prefix_caching=False)
    engine.generate([[1]], greedy)
    other = make_model("qwen3", initializer_range=0.3)
    with torch.no_grad():
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    assert engine.generate([[1]], greedy)[0].ids == naive(other, [1], 8)
    third = make_model("qwen3", initializer_range=0.4)
    model.load_state_dict(third.state_dict(), assign=True)
    assert engine.generate([[1]], greedy)[0].ids == naive(third, [1], 8)


def test_engines_in_several_threads() -> None:
    """The compiled program is called by one thread at a time."""
    from concurrent.futures import ThreadPoolExecutor

    greedy = SamplingParams(max_tokens=20, temperature=0)
    models = [quantize(make_model("llama", initializer_range=0.1 * (i + 1)), 4) for i in range(3)]
    alone = [Engine(m).generate([[1]], greedy)[0].ids for m in models]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda m: Engine(m).generate([[1]], greedy)[0].ids, models))
    assert together == alone


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("opt", {"norm_position": "post", "embedding_size": 32}),
        ("stablelm", {"parallel_residual": True, "shared_norm": True, "qk_norm": True}),
        ("gpt_neox", {"parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("qwen2_moe", {"norm_topk_prob": True, "shared_expert_intermediate_size": 128}),
    ],
)
@pytest.mark.parametrize("bits", [32, 4])
def test_variants_equal_the_transformer(family: str, options: dict[str, Any], bits: int) -> None:
    model = make_model(family, **options)
    if bits != 32:
        quantize(model, 4)
    compare(model, 0.03 if bits == 4 else 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss"])
@pytest.mark.parametrize("bits", [32, 4])
def test_adapters_are_applied(family: str, bits: int) -> None:
    """Each to the tokens of its requests, with DoRA's gains."""
    model = make_model(family)
    if bits != 32:
        quantize(model, 4)
    generator = torch.Generator().manual_seed(0)

    def adapter() -> Adapter:
        updates = {}
        for name, columns_rows in linear_layers(model).items():
            columns, rows = columns_rows
            parts = []
            for first in (0, rows // 2):
                A, B = (torch.randn(*shape, generator=generator) for shape in ((3, columns), (rows // 2, 3)))
                gain = torch.rand(rows // 2, generator=generator) + 0.5 if first else None
                bias = torch.randn(rows // 2, generator=generator) if first and "o_proj" in name else None
                parts.append(Update(first, A * 0.1, B * 0.1, gain, bias))
            updates[name] = tuple(parts)
        return Adapter(3, updates)

    compare(model, 0.03 if bits == 4 else 1e-5, {"a": adapter(), "b": adapter()})


def linear_layers(model: Transformer) -> dict[str, tuple[int, int]]:
    """Return columns and rows of the layers that can have an adapter."""
    return {name: columns_and_rows(model.get_submodule(name)) for name in adapter_layout(model)}


def compare(model: Transformer, tolerance: float, adapters: dict[str, Adapter] | None = None) -> None:
    """Generate with the compiled program, and compare each of its steps with the general one."""
    engine = Engine(model, block_size=4, max_batch=6, max_batch_tokens=8)
    for name, adapter in (adapters or {}).items():
        engine.add_adapter(name, adapter)
    runner = engine.executor.runner
    assert isinstance(runner, CpuRunner)
    steps, program = 0, runner._logits

    def both(inputs: StepInputs) -> torch.Tensor:
        nonlocal steps
        steps += 1
        actual, expected = program(inputs), Runner._logits(runner, inputs)
        assert (actual - expected).norm() <= tolerance * expected.norm()
        return actual

    runner._logits = both  # type: ignore[method-assign]
    names = [None, *(adapters or {})]
    prompts = [[1, 2, 3], [4], list(range(20)), [9, 9]]
    params = [SamplingParams(max_tokens=12, temperature=0, adapter=names[i % len(names)]) for i in range(4)]
    engine.generate(prompts, params)
    assert steps > 10

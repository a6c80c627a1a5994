"""Pictures in prompts: the engine generates what the model does that gets all pixels at once, in any company.

The reference is the naive loop over `Transformer.forward(ids, pixels=...)`, without cache, chunks or company.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gptsmith.data.image_processor import ImageProcessor
from gptsmith.data.images import DecodedImage
from gptsmith.engine.engine import Engine
from gptsmith.engine.prompt import Prompt, after_image, around_images, prompt_image, with_images
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import UsageError
from gptsmith.kernels.threads import kernels_available
from gptsmith.model.config import VisionConfig
from gptsmith.model.lora import Adapter, Update
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import train_bpe
from gptsmith.tokenizer.chatml import with_special_tokens
from tests.factories import tiny_config, tiny_model

VISION = VisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=12, patch_size=4
)
VOCABULARY, IMAGE, CONTEXT = 40, 39, 96
FAMILIES = ["llama", "gpt2", "mistral", "qwen3", "mixtral"]


def seeing_model(family: str = "llama", *, seed: int = 2, vision: VisionConfig = VISION, **options: Any) -> Transformer:
    """Return a model whose answers depend on pictures."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "initializer_range": 0.3}
    config = tiny_config(family, **sizes | options)
    torch.manual_seed(seed)
    return Transformer(dataclasses.replace(config, vision=vision, image_token_id=IMAGE)).eval()


def picture(seed: int, height: int = 12, width: int = 12) -> DecodedImage:
    return DecodedImage(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt_of(model: Transformer, ids: Sequence[int], *seeds: int) -> Prompt:
    """Return a prompt with a random picture for each seed in the places of IMAGE."""
    assert model.config.vision is not None
    processor = ImageProcessor.of(model.config.vision)
    return with_images(ids, [prompt_image(picture(seed), processor) for seed in seeds], IMAGE)


@torch.no_grad()
def naive(model: Transformer, prompt: Prompt, count: int) -> list[int]:
    pixels = torch.stack([image.pixels for image in prompt.images]) if prompt.images else None
    tokens = list(prompt.ids)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), pixels=pixels)[0, -1, :IMAGE].argmax()))  # never a placeholder
    return tokens[len(prompt) :]


GREEDY = SamplingParams(max_tokens=8, temperature=0.0, logit_bias={IMAGE: float("-inf")})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [3, 256])
def test_the_engine_generates_what_the_model_does(family: str, chunk: int) -> None:
    model = seeing_model(family)
    prompts = [
        prompt_of(model, [1, IMAGE, 2, 3], 0),
        prompt_of(model, [IMAGE, IMAGE, 5], 1, 2),
        prompt_of(model, [4, 5, 6]),
        prompt_of(model, [7, 8, IMAGE], 0),
        prompt_of(model, [1, IMAGE, 2, 3], 2),
    ]
    expected = [naive(model, prompt, 8) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) == len(expected)  # pictures count
    engine = Engine(model, max_batch=3, max_batch_tokens=chunk, block_size=4)
    assert [result.ids for result in engine.generate(prompts, GREEDY)] == expected
    assert [result.ids for result in engine.generate(prompts, GREEDY)] == expected  # from the prefix cache
    assert engine.stats.blocks_used == 0


@pytest.mark.skipif(not kernels_available(), reason="needs numba")
def test_the_compiled_kernels_take_pictures() -> None:
    for family in ("llama", "gpt2"):
        model = seeing_model(family, hidden_size=32, num_attention_heads=2, intermediate_size=64)
        prompts = [prompt_of(model, [1, IMAGE, 2, 3], 0), prompt_of(model, [4, 5]), prompt_of(model, [IMAGE, 9], 1)]
        engine = Engine(model, kernels="always", max_batch_tokens=32)
        assert type(engine.executor.runner).__name__ == "CpuRunner"
        assert [r.ids for r in engine.generate(prompts, GREEDY)] == [naive(model, prompt, 8) for prompt in prompts]


def test_results_do_not_depend_on_company() -> None:
    model = seeing_model()
    generator = random.Random(5)
    prompts, params = [], []
    for i in range(14):
        ids = [IMAGE if generator.random() < 0.3 else generator.randrange(38) for _ in range(generator.randrange(2, 7))]
        ids = [id for at, id in enumerate(ids) if id != IMAGE or IMAGE not in ids[:at]] + [7]
        prompts.append(prompt_of(model, ids, *[generator.randrange(3) for id in ids if id == IMAGE]))
        params.append(SamplingParams(max_tokens=24, temperature=1.0, seed=i, logprobs=2, logit_bias=GREEDY.logit_bias))
    together = Engine(model, max_batch=6, max_batch_tokens=11, block_size=4, cache_tokens=64)
    results = together.generate(prompts, params)
    assert together.stats.preemptions
    for prompt, each, result in zip(prompts, params, results, strict=True):
        (alone,) = Engine(model, prefix_caching=False).generate([prompt], each)
        assert result.ids == alone.ids
        ours, theirs = (r.completions[0].logprobs or [] for r in (result, alone))
        assert [x.logprob for x in ours if x] == pytest.approx([x.logprob for x in theirs if x], abs=1e-5)


def test_samples_beams_and_prompt_logprobs_see_the_picture() -> None:
    model = seeing_model()
    prompt, other = prompt_of(model, [1, IMAGE, 2], 0), prompt_of(model, [1, IMAGE, 2], 1)
    for params in (
        SamplingParams(n=3, seed=1, max_tokens=5),
        SamplingParams(beams=3, temperature=0.0, max_tokens=5, logprobs=0),
        SamplingParams(prompt_logprobs=0, max_tokens=3, seed=2),
    ):
        outputs = []
        for chunk in (4, 256):
            engine = Engine(model, max_batch=4, max_batch_tokens=chunk, block_size=4)
            engine.generate([other], params)
            (result,) = engine.generate([prompt], params)
            assert result.error is None
            outputs.append(([c.ids for c in result.completions], result.prompt_logprobs))
        assert outputs[0][0] == outputs[1][0]
        for ours, theirs in zip(outputs[0][1] or (), outputs[1][1] or (), strict=True):
            assert (ours and ours.logprob) == pytest.approx(theirs and theirs.logprob, abs=1e-5)


def test_tokens_around_pictures() -> None:
    """Idefics3 and SmolVLM have tokens before and after a picture's."""
    base = train_bpe(["the cat " * 9], 260)
    names = ("<image>", "<fake_token_around_image>", "<global-img>")
    tokenizer, (image, fake, whole) = with_special_tokens(base, names)
    vision = dataclasses.replace(
        VISION, model_type="smolvlm", image_size=16, pixel_shuffle=2, projector="linear", projector_bias=False
    )
    config = dataclasses.replace(tiny_config(vocab_size=tokenizer.vocab_size), vision=vision, image_token_id=image)
    pictures = [prompt_image(picture(seed), ImageProcessor.of(vision)) for seed in (0, 1)]
    prompt = with_images([1, image, 2, image], pictures, image, around_images(config, tokenizer))
    part = [fake, whole, *[image] * 4, fake]
    assert prompt.ids == [1, *part, 2, *part]
    assert [each.start for each in prompt.images] == [3, 11]
    with pytest.raises(UsageError, match="no <fake_token_around_image>"):
        around_images(config, base)


# the prefix cache


def test_only_the_same_picture_is_found_in_the_prefix_cache() -> None:
    model = seeing_model()
    engine = Engine(model, block_size=4)
    ids = [1, 2, 3, 4, 5, IMAGE, 6, 7, 8, 9]  # the picture has tokens 5 to 13; block 1 begins before it

    def cached(*seeds: int, of: Sequence[int] = ids) -> int:
        prompt = prompt_of(model, of, *seeds)
        (result,) = engine.generate([prompt], GREEDY)
        assert result.ids == naive(model, prompt, 8)
        return result.cached_tokens

    assert cached(0) == 0
    assert cached(0) == 16
    assert cached(1) == 4  # what comes before the picture
    assert cached(1) == 16
    assert cached(2, of=[1, 2, 3, 4, IMAGE, *ids[6:]]) == 4
    assert cached(0, 1, of=[*ids, IMAGE]) == 16
    assert cached(0, 2, of=[*ids, IMAGE]) == 16
    assert cached(0, 2, of=[*ids, IMAGE, 3]) == 24
    assert engine.executor.runner.features.computed == 3  # once for each picture


def test_neighboring_pictures_are_told_apart_by_their_places() -> None:
    model = seeing_model()
    engine = Engine(model, block_size=6)
    for seeds in ((0, 1), (1, 0), (0, 0), (1, 1), (0, 1)):
        prompt = prompt_of(model, [IMAGE, IMAGE, 3], *seeds)
        assert engine.generate([prompt], GREEDY)[0].ids == naive(model, prompt, 8)


def test_keys_depend_on_pixels_size_and_processor() -> None:
    processor = ImageProcessor(size=12, patch=4)
    flat = picture(0, 4, 12)
    images = [flat, DecodedImage(flat.pixels.reshape(12, 4, 3)), DecodedImage(flat.pixels.reshape(6, 8, 3)), picture(1)]
    keys = {prompt_image(image, processor).key for image in images}
    others = (
        dataclasses.replace(processor, mean=(0.1, 0.5, 0.5)),
        dataclasses.replace(processor, resample="bilinear"),
        dataclasses.replace(processor, crop=True),
    )
    keys |= {prompt_image(flat, other).key for other in others}
    assert len(keys) == 7
    assert prompt_image(DecodedImage(flat.pixels.copy()), processor).key in keys


def test_new_weights_forget_the_features() -> None:
    model = seeing_model()
    engine, prompt = Engine(model), prompt_of(model, [1, IMAGE, 2], 0)
    before = engine.generate([prompt], GREEDY)[0].ids
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.mul_(-2.0)
    engine.on_weights_updated()
    after = engine.generate([prompt], GREEDY)[0].ids
    assert after == naive(model, prompt, 8) != before


def test_features_that_are_kept_are_bounded() -> None:
    model = seeing_model()
    engine = Engine(model, prefix_caching=False)
    features = engine.executor.runner.features
    features._max_bytes = 2 * VISION.tokens * model.config.hidden_size * 4
    for seeds in ((0,), (1,), (2,), (2,), (1,), (0,)):
        engine.generate([prompt_of(model, [1, IMAGE, 2], *seeds)], GREEDY)
    assert features.computed == 4
    assert features._bytes == features._max_bytes


def test_adapters_of_the_tower_apply_to_their_own_requests() -> None:
    model, merged = seeing_model(), seeing_model()
    torch.manual_seed(2)
    updates: dict[str, tuple[Update, ...]] = {}
    for name in ("vision.layers.0.fc1", "projector.linear_2", "layers.0.attention.o_proj"):
        weight: Any = merged.get_submodule(name).weight
        rows, columns = weight.shape
        update = Update(0, torch.randn(2, columns), torch.randn(rows, 2))
        updates[name] = (update,)
        with torch.no_grad():
            weight += update.B @ update.A
    engine, prompt = Engine(model, block_size=4), prompt_of(model, [1, IMAGE, 2, 3, 4], 0)
    engine.add_adapter("sees", Adapter(2, updates))
    params = [GREEDY, dataclasses.replace(GREEDY, adapter="sees")]
    plain, adapted = (result.ids for result in engine.generate([prompt, prompt], params))
    assert plain == naive(model, prompt, 8)
    assert adapted == naive(merged, prompt, 8) != plain


# a full context


@pytest.mark.parametrize("overflow", ["truncate", "shift"])
def test_a_full_context_never_cuts_a_picture_in_two(overflow: Any) -> None:
    model = seeing_model(max_position_embeddings=32)
    prompt = prompt_of(model, [1, 2, IMAGE, 3, 4, IMAGE, 5], 0, 1)  # tokens 2 to 10, and 13 to 21; 23 in all
    engine = Engine(model, block_size=4)
    params = dataclasses.replace(GREEDY, overflow=overflow, max_tokens=16)
    (result,) = engine.generate([prompt], params)
    assert result.error is None
    if overflow == "truncate":  # 7 tokens have to go, which is in the first picture
        assert result.prompt_ids == [*prompt.ids[11:]]
        assert result.ids == naive(model, prompt.without_beginning(7), 16)
    else:  # the 33rd token does not fit: of the last 24, those of the first picture are left out
        kept = naive(model, prompt, 10)
        rest = Prompt([*prompt.without_beginning(9).ids, *kept], prompt.without_beginning(9).images)
        assert result.ids == kept + naive(model, rest, 6)


def test_after_image() -> None:
    model = seeing_model()
    images = prompt_of(model, [1, IMAGE, IMAGE, 2], 0, 1).images
    assert [after_image(images, at) for at in (0, 1, 2, 9, 10, 11, 18, 19, 20)] == [0, 1, 10, 10, 10, 19, 19, 19, 20]


def test_a_picture_at_the_end_that_does_not_fit_is_refused() -> None:
    model = seeing_model(max_position_embeddings=11)
    prompt = prompt_of(model, [1, 2, 3, 4, IMAGE], 0)  # 13 tokens: the last 8, or 7, begin inside the picture
    for overflow in ("truncate", "shift", "error"):
        (result,) = Engine(model).generate([prompt], dataclasses.replace(GREEDY, overflow=overflow, max_tokens=4))
        assert isinstance(result.error, UsageError)
        assert "picture" in str(result.error) or "context" in str(result.error)


# bad input


def test_pictures_and_placeholders_belong_together() -> None:
    model = seeing_model()
    for seeds in ((), (0,), (0, 1, 2)):
        with pytest.raises(UsageError, match="2 placeholders for"):
            prompt_of(model, [1, IMAGE, IMAGE], *seeds)
    engine, good = Engine(model), prompt_of(model, [1, IMAGE, 2], 0)
    image = good.images[0]
    bad = [
        Prompt([1, IMAGE, 2]),
        Prompt(good.ids),
        Prompt([*good.ids, IMAGE], good.images),
        Prompt([1, 2, 3], good.images),
        Prompt(good.ids[:-2], good.images),
        Prompt(good.ids, (dataclasses.replace(image, start=0),)),
        Prompt(good.ids, (image, image)),
    ]
    for result in engine.generate(bad, GREEDY):
        assert isinstance(result.error, UsageError)
    fewer = dataclasses.replace(image, tokens=VISION.tokens - 1)
    (wrong, right) = engine.generate([Prompt([*good.ids[:-2], 2], (fewer,)), good], GREEDY)
    assert "9 features of a picture with 8 tokens" in str(wrong.error)
    assert right.ids == naive(model, good, 8)
    assert engine.stats.blocks_used == 0


def test_a_text_model_refuses_pictures() -> None:
    prompt = prompt_of(seeing_model(), [1, IMAGE, 2], 0)
    model = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    (result,) = Engine(model).generate([prompt], GREEDY)
    assert "reads text only" in str(result.error)
    assert Engine(model).generate([[1, IMAGE, 2]], GREEDY)[0].error is None  # there, it is a token like any other

"""Vision towers and projectors as GGUF: what the file holds, and the logits that llama.cpp computes with it."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptsmith.cli import main
from gptsmith.data.image_processor import ImageProcessor
from gptsmith.data.images import DecodedImage
from gptsmith.errors import UsageError
from gptsmith.formats.gguf import read_gguf, write_gguf
from gptsmith.formats.gguf_file import open_gguf
from gptsmith.formats.gguf_tokenizer import tokenizer_to_gguf
from gptsmith.formats.gguf_vision import text_part, write_mmproj
from gptsmith.formats.hf import load_weights, save_model
from gptsmith.model import families
from gptsmith.model.config import VisionConfig
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer, train_bpe
from gptsmith.tokenizer.chatml import with_special_tokens

TEXT = "It was the best of times, it was the worst of times.\n" * 3
SIGLIP = VisionConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=48, patch_size=12
)
OTHER = dataclasses.replace(
    SIGLIP, activation="quick_gelu", image_mean=(0.4, 0.5, 0.6), image_std=(0.3, 0.2, 0.25), projector_bias=False
)
SQUARE = dataclasses.replace(SIGLIP, intermediate_size=64)
TEXTS = {
    "llama": lambda **o: families.llama(**o, num_key_value_heads=2, intermediate_size=96),
    "qwen3": lambda **o: families.qwen3(**o, num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=True),
    "gpt2": lambda **o: families.gpt2(**o, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_special_tokens(train_bpe([TEXT], 280), ("<image>",), {})[0]


def make_model(tokenizer: Tokenizer, text: str = "llama", vision: VisionConfig = SIGLIP) -> Transformer:
    config = TEXTS[text](
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    config = dataclasses.replace(config, vision=vision, image_token_id=tokenizer.added_tokens()["<image>"])
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("vision.", "projector.")) and name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model.eval()


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_file_holds_tower_and_projector(tokenizer: Tokenizer, tmp_path: Path, dtype: Any) -> None:
    model = make_model(tokenizer)
    write_mmproj(model, tmp_path / "mmproj.gguf", dtype)
    file = open_gguf(tmp_path / "mmproj.gguf")
    assert file.metadata["general.architecture"] == "clip"
    assert file.metadata["clip.projector_type"] == "mlp"
    assert list(file.metadata["clip.vision.feature_layer"]) == [3]
    assert "v.post_ln.weight" not in file.tensors
    elements = sum(int(np.prod(info.shape)) for info in file.tensors.values())
    parts = [*model.vision.parameters(), *model.projector.parameters()]
    assert elements == sum(parameter.numel() for parameter in parts)
    matrices = {info.type.name for name, info in file.tensors.items() if name.endswith("ffn_up.weight")}
    assert matrices == {dtype.upper()}
    assert file.tensors["v.patch_embd.weight"].shape == (64, 3, 12, 12)


def test_the_text_part_is_a_model_of_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_model(tokenizer)
    vocabulary = tokenizer_to_gguf(tokenizer, model.config.vocab_size)
    write_gguf(text_part(model), vocabulary, tmp_path / "text.gguf", "f32")
    read = read_gguf(tmp_path / "text.gguf")
    text = Transformer(text_part(model).config).eval()
    load_weights(text, read.tensors, "text.gguf")
    ids = torch.tensor([tokenizer.encode(TEXT)[:20]])
    with torch.no_grad():
        torch.testing.assert_close(text(ids), model(ids))
    assert model.config.vision is not None  # the model itself is unchanged


def test_export_writes_both_files(tokenizer: Tokenizer, tmp_path: Path, capsys: Any) -> None:
    model = make_model(tokenizer)
    save_model(model, tmp_path / "seer")
    tokenizer.save(tmp_path / "seer")
    arguments = ["export", str(tmp_path / "seer"), "--to", "gguf", "--dtype", "f32", "--out"]
    assert main([*arguments, str(tmp_path / "seer.gguf")]) == 0
    out = capsys.readouterr().out
    text = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("vision.", "projector.")))
    assert f"seer.gguf: {text:,} parameters" in out
    assert "seer-mmproj.gguf: vision tower and projector" in out
    assert open_gguf(tmp_path / "seer-mmproj.gguf").metadata["general.type"] == "mmproj"
    (tmp_path / "other-mmproj.gguf").write_bytes(b"")
    assert main([*arguments, str(tmp_path / "other.gguf")]) == 2
    assert "other-mmproj.gguf exists already" in capsys.readouterr().err
    assert not (tmp_path / "other.gguf").exists()
    assert main(["export", str(tmp_path / "seer"), "--out", str(tmp_path / "directory")]) == 0
    assert (tmp_path / "directory" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_token": True, "drop_first": True}, "class token"),
        ({"drop_first": True}, "leaves out the first patch"),
        ({"post_norm": True, "model_type": "smolvlm"}, "layout smolvlm"),
        ({"pixel_shuffle": 2, "projector": "linear", "model_type": "idefics3"}, "layout idefics3"),
        ({"activation": "relu"}, "activation relu in a vision tower"),
        ({"projector_activation": "silu"}, "activation silu in a projector"),
    ],
)
def test_eyes_that_llama_cpp_cannot_read(
    tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = make_model(tokenizer, vision=dataclasses.replace(SIGLIP, **changes))
    with pytest.raises(UsageError, match=message):
        write_mmproj(model, tmp_path / "mmproj.gguf")
    assert not (tmp_path / "mmproj.gguf").exists()


# llama.cpp


class Llama:
    """A text model and a vision tower in llama.cpp, through its multimodal library."""

    def __init__(self, text: Path, mmproj: Path) -> None:
        llama_cpp = pytest.importorskip("llama_cpp", reason="the optional package llama-cpp-python is not installed")
        self.mtmd = pytest.importorskip("llama_cpp.mtmd_cpp", reason="llama-cpp-python was built without mtmd")
        self.api = llama_cpp
        self.llama = llama_cpp.Llama(
            str(text), n_ctx=128, n_threads=1, n_gpu_layers=0, verbose=False, type_k=0, type_v=0, logits_all=True
        )
        params = self.mtmd.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.n_threads, params.warmup = False, False, 1, False
        self.context = self.mtmd.mtmd_init_from_file(str(mmproj).encode(), self.llama.model, params)
        assert self.context, "llama.cpp does not read the file"

    def logits(self, text: str, images: list[DecodedImage]) -> tuple[list[int | None], np.ndarray]:
        """Return the prompt as llama.cpp tokenizes it, None for each token of a picture, and the last logits.

        text: with <__media__> in the place of each picture.
        """
        mtmd = self.mtmd
        bitmaps = [
            mtmd.mtmd_bitmap_init(
                image.width,
                image.height,
                (ctypes.c_uint8 * image.pixels.nbytes).from_buffer_copy(image.pixels.tobytes()),
            )
            for image in images
        ]
        chunks = mtmd.mtmd_input_chunks_init()
        written = text.encode()
        given = mtmd.mtmd_input_text(written, len(written), False, True)
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        assert mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(given), array, len(bitmaps)) == 0
        ids: list[int | None] = []
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            count = ctypes.c_size_t()
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            if mtmd.mtmd_input_chunk_get_type(chunk) == 0:
                ids += [tokens[j] for j in range(count.value)]
            else:
                ids += [None] * mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        past = self.api.llama_pos(0)
        failed = mtmd.mtmd_helper_eval_chunks(self.context, self.llama.ctx, chunks, 0, 0, 128, True, ctypes.byref(past))
        assert not failed
        row = self.api.llama_get_logits_ith(self.llama.ctx, -1)
        logits = np.array(row[: self.llama.n_vocab()], dtype=np.float32)
        mtmd.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        return ids, logits

    def close(self) -> None:
        self.mtmd.mtmd_free(self.context)
        self.llama.close()


@pytest.mark.parametrize(
    ("text", "vision"),
    [("llama", SIGLIP), ("qwen3", SIGLIP), ("gpt2", SIGLIP), ("llama", OTHER), ("llama", SQUARE)],
    ids=["llama", "qwen3", "gpt2", "other", "square"],
)
def test_llama_cpp_gives_the_same_logits(tokenizer: Tokenizer, tmp_path: Path, text: str, vision: VisionConfig) -> None:
    model = make_model(tokenizer, text, vision)
    text_file, mmproj = tmp_path / "seer.gguf", tmp_path / "seer-mmproj.gguf"
    write_gguf(text_part(model), tokenizer_to_gguf(tokenizer, model.config.vocab_size), text_file, "f32")
    write_mmproj(model, mmproj, "f32")
    noise = np.random.default_rng(1).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    images = [DecodedImage(pixels) for pixels in noise]
    engine = Llama(text_file, mmproj)
    ids, actual = engine.logits("It was <__media__> the best <__media__>of times", images)
    engine.close()
    assert ids.count(None) == 2 * vision.tokens
    placeholder = model.config.image_token_id
    written = torch.tensor([[placeholder if id is None else id for id in ids]])
    processor = ImageProcessor.of(vision)
    pixels = torch.stack([processor(image) for image in images])
    with torch.no_grad():
        expected = model(written, pixels=pixels)[0, -1]
        blind = model(written, pixels=pixels.flip(0))[0, -1]
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-2, rtol=1e-2)
    assert (blind - expected).abs().max() > 0.1  # so that the comparison can fail

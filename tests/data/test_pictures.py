"""Rows with pictures: every form, what is refused, tokens and features, packing, augmentation."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptsmith.data.conversations import Counts, Renderer, RowError, as_conversation, read_conversations
from gptsmith.data.packing import Examples, PackedLoader, packed_batch
from gptsmith.data.pictures import PictureReader
from gptsmith.data.preferences import PreferenceRenderer, as_preferences
from gptsmith.data.prompts import as_prompt
from gptsmith.data.show import show
from gptsmith.errors import DataError
from gptsmith.loading import load_model
from gptsmith.model.loss import token_loss_sum
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from tests.pictures import captions, drawn, seer, write_pictures

RED, BLUE = drawn("red", "square"), drawn("blue", "disk")
URL = "data:image/png;base64," + base64.b64encode(RED).decode()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Tokenizer]:
    return load_model(seer(tmp_path_factory.mktemp("models") / "seer"))


@pytest.fixture(scope="module")
def picture_reader(seeing: tuple[Transformer, Tokenizer]) -> PictureReader:
    found = PictureReader.of(seeing[0].config, seeing[1])
    assert found is not None
    return found


IMAGE_PART = {"type": "image_url", "image_url": {"url": URL}}
ANSWER = {"role": "assistant", "content": "a red square"}
FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "caption": ({"image": "red-square.png", "caption": "a red square"}, 1),
    "caption as text": ({"images": ["red-square.png", "blue-disk.png"], "text": "a red square, a blue disk"}, 2),
    "parquet": ({"image": {"bytes": RED, "path": None}, "caption": "a red square"}, 1),
    "question": ({"image": URL, "question": "what is this?", "answer": "a red square"}, 1),
    "question with places": (
        {"images": ["red-square.png", "blue-disk.png"], "question": "<image> and <image> what?", "answer": "red"},
        2,
    ),
    "alpaca": ({"image": "red-square.png", "instruction": "what?", "input": "this", "output": "a red square"}, 1),
    "prompt": ({"image": "red-square.png", "prompt": "what is this?", "completion": "a red square"}, 1),
    "parts": ({"messages": [{"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "what?"}]}, ANSWER]}, 1),
    "parts with a column": (
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, ANSWER],
            "images": [RED, BLUE],
        },
        2,
    ),
    "placeholders": ({"messages": [{"role": "user", "content": "<image>\nwhat?"}, ANSWER], "images": [RED]}, 1),
    "no places": ({"messages": [{"role": "user", "content": "what?"}, ANSWER], "images": [RED, BLUE]}, 2),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is this?"},
                {"from": "gpt", "value": "a red square"},
                {"from": "human", "value": "<image> and that?"},
                {"from": "gpt", "value": "a blue disk"},
            ],
            "images": ["red-square.png", "blue-disk.png"],
        },
        2,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader, tmp_path: Path) -> None:
    write_pictures(tmp_path)
    row, count = FORMS[form]
    example = Renderer(seeing[1], picture_reader=picture_reader).render(as_conversation(row), tmp_path)
    assert example.ids.count(picture_reader.token_id) == count * 4
    assert len(example.ids) == len(example.trained)
    assert len(example.images) == count
    trained = [id for id, counts in zip(example.ids, example.trained, strict=True) if counts]
    assert picture_reader.token_id not in trained
    assert "red" in seeing[1].decode(trained)
    batch = packed_batch(Examples([example]), [[0]], len(example.ids), picture_reader)
    assert batch.images is not None
    expected = [RED, BLUE][:count]
    for found, source in zip(batch.images.pixels, expected, strict=True):
        assert torch.equal(found, picture_reader.pixels([picture_reader.read(source, None)])[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "<image><image>"}, ANSWER], "images": [RED]}, "2 places .* 1 pict"),
        ({"messages": [{"role": "user", "content": "<image>"}, ANSWER], "images": [RED, BLUE]}, "1 places .* 2 pict"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "has no picture"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, ANSWER]}, "type 'audio'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [IMAGE_PART]}]}, "assistant"),
        ({"image": "missing.png", "caption": "x"}, "no picture at"),
        ({"image": "https://example.org/cat.png", "caption": "x"}, "address on a network"),
        ({"image": RED[:60], "caption": "x"}, "incomplete"),
        ({"image": {"bytes": b"hello", "path": "a.png"}, "caption": "x"}, "supported format"),
        ({"image": RED}, "neither messages, a question"),
        ({"image": RED, "instruction": "x", "output": "y", "history": [["a", "b"]]}, "history"),
    ],
)
def test_refused(
    row: dict[str, Any],
    message: str,
    seeing: tuple[Transformer, Tokenizer],
    picture_reader: PictureReader,
    tmp_path: Path,
) -> None:
    with pytest.raises(RowError, match=message):
        Renderer(seeing[1], picture_reader=picture_reader).render(as_conversation(row), tmp_path)


def test_a_model_without_eyes_refuses_pictures(seeing: tuple[Transformer, Tokenizer]) -> None:
    with pytest.raises(RowError, match="gptsmith vision init"):
        Renderer(seeing[1]).render(as_conversation({"image": RED, "caption": "a red square"}))


def test_a_placeholder_in_a_text_is_text(seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader) -> None:
    row = {"messages": [{"role": "user", "content": "what is <image>?"}, ANSWER]}
    example = Renderer(seeing[1], picture_reader=picture_reader).render(as_conversation(row))
    assert picture_reader.token_id not in example.ids
    assert not example.images


def test_files_are_found_beside_the_rows_and_bad_rows_are_counted(
    seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader, tmp_path: Path
) -> None:
    path = captions(tmp_path / "deep" / "folder", repeat=1)
    rows = list(read_conversations(path))
    renderer = Renderer(seeing[1], picture_reader=picture_reader)
    assert all(renderer.render(conversation, row.folder).images for row, conversation in rows)
    shown = show(path, seeing[1], index=1, picture_reader=picture_reader)
    assert "<image>×4" in shown.text
    assert "[a red disk<|im_end|>" in shown.text
    assert any("8 pictures of 4 tokens each" in line for line in shown.summary)
    (tmp_path / "deep" / "folder" / "pictures" / "red-disk.png").write_bytes(RED[:50])
    again = show(path, seeing[1], picture_reader=picture_reader)
    assert any("1 rows" in line and "incomplete" in line for line in again.summary)
    without = Counts()
    assert len(list(read_conversations(path, counts=without))) == 8


def test_rows_of_parquet(seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [{"bytes": RED, "path": "a.png"}], "question": ["what is this?"], "answer": ["red"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    ((row, conversation),) = read_conversations(tmp_path / "rows.parquet")
    example = Renderer(seeing[1], picture_reader=picture_reader).render(conversation, row.folder)
    assert example.images[0].key == picture_reader.read(RED, None).key


def test_preferences_have_pictures(
    seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader, tmp_path: Path
) -> None:
    write_pictures(tmp_path)
    renderer = PreferenceRenderer(seeing[1], picture_reader=picture_reader)
    for row in (
        {"prompt": "what?", "chosen": "a red square", "rejected": "a blue disk", "image": "red-square.png"},
        {"prompt": [{"role": "user", "content": "<image>what?"}], "chosen": "red", "rejected": "blue", "images": [RED]},
        {
            "chosen": [{"role": "user", "content": [IMAGE_PART]}, ANSWER],
            "rejected": [{"role": "user", "content": [IMAGE_PART]}, {"role": "assistant", "content": "blue"}],
        },
    ):
        (preference,) = as_preferences(row)
        pair = renderer.pair(preference, tmp_path)  # type: ignore[arg-type]
        assert [example.images[0].key for example in pair] == [picture_reader.read(RED, None).key] * 2
    with pytest.raises(RowError, match="texts alone"):
        as_prompt({"prompt": "what?", "image": RED})


def examples(seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader, number: int = 9) -> Examples:
    """Conversations of zero to three pictures."""
    renderer, names = (
        Renderer(seeing[1], picture_reader=picture_reader),
        itertools.product(("red", "green", "blue"), ("square", "disk")),
    )
    files = [drawn(*name) for name in names]
    made = []
    for i in range(number):
        content: list[Any] = [{"type": "image", "image": files[(i + k) % 6]} for k in range(i % 4)]
        content.append({"type": "text", "text": "what is this? " * (i % 3 + 1)})
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "a red square " * (i % 2 + 1)},
        ]
        made.append(renderer.render(as_conversation({"messages": messages})))
    return Examples(made)


def test_packed_equals_unpacked(seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader) -> None:
    """The loss of every conversation, and so of all, does not depend on what shares its row."""
    model, found = seeing[0], examples(seeing, picture_reader)
    packed = PackedLoader(found, batch_size=2, seq_len=96, seed=0, picture_reader=picture_reader)
    assert len(packed.rows) < len(found)
    with torch.no_grad():
        together = [token_loss_sum(model, *packed.batch_of([row])) for row in range(len(packed.rows))]
        for row, indices in enumerate(packed.rows):
            alone = [packed_batch(found, [[i]], int(found.lengths[i]), picture_reader) for i in indices]
            separate = sum(token_loss_sum(model, *batch) for batch in alone)
            assert torch.allclose(together[row], torch.as_tensor(separate), rtol=1e-5)
        whole = packed.batch_of(range(len(packed.rows)))
        assert torch.allclose(token_loss_sum(model, *whole), torch.stack(together).sum(), rtol=1e-5)
        # Pictures matter, and each batch is cut with its own.
        pieces = [whole.slice(i, i + 1) for i in range(whole.num_rows)]
        assert torch.allclose(torch.stack([token_loss_sum(model, *each) for each in pieces]), torch.stack(together))
        assert whole.images is not None
        other = whole._replace(images=whole.images._replace(pixels=whole.images.pixels.flip(0)))
        assert not torch.allclose(token_loss_sum(model, *other), token_loss_sum(model, *whole), rtol=1e-6)


def test_tokens_that_do_not_fit_the_pictures_are_refused(
    seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader
) -> None:
    found = examples(seeing, picture_reader)
    example = found[1]
    for wrong in (example._replace(images=()), example._replace(images=example.images * 2)):
        with pytest.raises(DataError, match=r"4 image tokens for \d pictures"):
            packed_batch(Examples([wrong]), [[0]], len(example.ids), picture_reader)
    with pytest.raises(DataError, match="this model reads none"):
        packed_batch(found, [[1]], len(example.ids))


def test_a_picture_that_changes_is_noticed(
    seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader, tmp_path: Path
) -> None:
    write_pictures(tmp_path)
    picture = picture_reader.read("red-square.png", tmp_path)
    assert isinstance(picture.source, Path)
    picture_reader.pixels([picture])
    (tmp_path / "red-square.png").write_bytes(BLUE)
    with pytest.raises(DataError, match="has changed"):
        picture_reader.pixels([picture])
    one, other = (
        Examples([examples(seeing, picture_reader, 2)[1]._replace(images=(each,))]) for each in (picture, picture)
    )
    assert one.fingerprint() == other.fingerprint()
    changed = Examples([examples(seeing, picture_reader, 2)[1]._replace(images=(picture_reader.read(BLUE, None),))])
    assert changed.fingerprint() != one.fingerprint()


def test_augmentation_is_a_function_of_seed_and_position(
    seeing: tuple[Transformer, Tokenizer], picture_reader: PictureReader
) -> None:
    found = examples(seeing, picture_reader)

    def pixels(seed: int, position: int) -> torch.Tensor:
        loader = PackedLoader(
            found, batch_size=9, seq_len=96, seed=seed, packing=False, picture_reader=picture_reader, augment=True
        )
        images = loader.batch_at(position).images
        assert images is not None
        return images.pixels

    assert torch.equal(pixels(0, 0), pixels(0, 0))
    assert not torch.equal(pixels(0, 0), pixels(1, 0))
    loader = PackedLoader(
        found, batch_size=9, seq_len=96, seed=0, packing=False, picture_reader=picture_reader, augment=True
    )
    plain = loader.batch_of(loader.order_at(0)).images  # as in evaluation
    assert plain is not None
    assert not torch.equal(plain.pixels, pixels(0, 0))
    # Only the ground of a transparent picture changes its color: red stays red.
    moved = picture_reader.pixels([picture_reader.read(RED, None)] * 20, variation=(0, 0))
    middle = moved[:, :, 7:9, 7:9]
    assert torch.allclose(middle[:, 0], torch.ones(()), atol=0.1)
    assert torch.allclose(middle[:, 1:], -torch.ones(()), atol=0.1)
    corners = moved[:, :, 0, 0]
    assert len({tuple(np.round(corner.numpy(), 1)) for corner in corners}) > 4

"""Pictures in requests: chat completions, responses and counting of tokens; bad and hostile pictures."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import random
import struct
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from gptsmith.data.image_processor import ImageProcessor
from gptsmith.data.images import ImageLimits, decode_image
from gptsmith.engine.prompt import Prompt, prompt_image, with_images
from gptsmith.engine.sampling import SamplingParams
from gptsmith.server.inspect import inspect_text
from gptsmith.server.service import Settings
from gptsmith.tokenizer.chat import ChatTemplate
from tests.server.conftest import VISION, Live, make_seer, make_tokenizer

TEXT = "the cat"


def encoded(seed: int = 0, format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (30, 20), **o: Any) -> bytes:
    """Return a file with a random picture."""
    count = size[0] * size[1] * {"RGB": 3, "RGBA": 4, "CMYK": 4, "I;16": 2}.get(mode, 1)
    file = io.BytesIO()
    Image.frombytes(mode, size, np.random.default_rng(seed).bytes(count)).save(file, format, **o)
    return file.getvalue()


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def question(*parts: bytes | str) -> list[dict[str, Any]]:
    """Return a conversation of texts and pictures."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url_of(part)}}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


SEER = {"seer": (make_tokenizer(image_token=True), make_seer)}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    server = Live(more=SEER).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.client() as client:
        yield client


def post(live: Live, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of the answer to a POST request."""
    request = urllib.request.Request(
        f"{live.url}/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def reference(live: Live, *parts: bytes | str, **params: Any) -> tuple[Prompt, str]:
    """Return the prompt of a question, and the engine's answer to it without a server."""
    tokenizer = live.tokenizers["seer"]
    content: Any = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    if all(isinstance(part, str) for part in parts):
        content = "".join(map(str, parts))
    ids = ChatTemplate(tokenizer).encode([{"role": "user", "content": content}])
    processor = ImageProcessor.of(VISION)
    images = [prompt_image(decode_image(part), processor) for part in parts if isinstance(part, bytes)]
    prompt = with_images(ids, images, tokenizer.added_tokens()["<image>"])
    chosen = SamplingParams(temperature=1.0, stop_ids=tokenizer.end_ids, **params)
    (result,) = live.reference["seer"].generate([prompt], chosen)
    return prompt, tokenizer.decode(result.ids)


def answer(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="seer", messages=messages, max_tokens=10, **options)


# answers


@pytest.mark.parametrize(
    "parts", [(encoded(0), TEXT), (TEXT, encoded(1)), (encoded(0), "a", encoded(1), "b"), (encoded(2),), (TEXT,)]
)
def test_an_answer_is_what_the_engine_generates(live: Live, client: openai.OpenAI, parts: tuple[Any, ...]) -> None:
    messages = question(*parts)
    prompt, expected = reference(live, *parts, seed=4, max_tokens=10)
    found = answer(client, messages, seed=4)
    assert found.choices[0].message.content == expected
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.prompt_tokens > 16 * sum(isinstance(part, bytes) for part in parts)
    chunks = list(answer(client, messages, seed=4, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.prompt_tokens == len(prompt)
    input_parts: Any = [
        {"type": "input_text", "text": part["text"]}
        if part["type"] == "text"
        else {"type": "input_image", "image_url": part["image_url"]["url"], "detail": "auto"}
        for part in messages[0]["content"]
    ]
    asked: Any = [{"role": "user", "content": input_parts}]
    response = client.responses.create(model="seer", input=asked, max_output_tokens=10, extra_body={"seed": 4})
    assert response.output_text == expected
    assert response.usage is not None
    assert response.usage.input_tokens == len(prompt)
    status, counted = post(live, "tokenize", {"model": "seer", "messages": messages})
    assert (status, counted["tokens"]) == (200, list(prompt.ids))


def test_answers_depend_on_the_picture_and_the_cache_knows_it(live: Live, client: openai.OpenAI) -> None:
    texts, cached = [], []
    for seed in (10, 11, 10):
        found = answer(client, question(encoded(seed, size=(24, 24)), TEXT), temperature=0)
        texts.append(found.choices[0].message.content)
        cached.append(found.usage.prompt_tokens_details.cached_tokens)
    assert texts[0] == texts[2] != texts[1]
    assert cached[1] < cached[2]
    other = Image.open(io.BytesIO(encoded(10, size=(24, 24))))
    again = io.BytesIO()
    other.save(again, "WebP", lossless=True)  # the same pixels in another file
    found = answer(client, question(again.getvalue(), TEXT), temperature=0)
    assert found.choices[0].message.content == texts[0]
    assert found.usage.prompt_tokens_details.cached_tokens == cached[2]


def test_conversations_and_company(live: Live, client: openai.OpenAI) -> None:
    messages = [
        *question(encoded(0), "a"),
        {"role": "assistant", "content": "b"},
        *question("c", encoded(1), encoded(0)),
    ]
    first = answer(client, messages, n=3, seed=1)
    assert [c.message.content for c in answer(client, messages, n=3, seed=1).choices] == [
        c.message.content for c in first.choices
    ]
    assert len({c.message.content for c in first.choices}) > 1


def test_a_placeholder_in_a_text_is_text(live: Live, client: openai.OpenAI) -> None:
    tokenizer = live.tokenizers["seer"]
    image_id = tokenizer.added_tokens()["<image>"]
    status, counted = post(live, "tokenize", {"model": "seer", "messages": question("<image> and <image>")})
    assert status == 200
    assert image_id not in counted["tokens"]
    assert "<image> and <image>" in tokenizer.decode(counted["tokens"])
    assert answer(client, question("<image>")).usage.prompt_tokens < 20
    with_picture = post(live, "tokenize", {"model": "seer", "messages": question("<image>", encoded(0))})[1]
    assert with_picture["tokens"].count(image_id) == 16
    assert answer(client, question("<image>", encoded(0))).usage.prompt_tokens == with_picture["count"]
    system = [{"role": "system", "content": "<image>"}, *question(TEXT)]
    assert image_id not in post(live, "tokenize", {"model": "seer", "messages": system})[1]["tokens"]
    assert post(live, "v1/completions", {"model": "seer", "prompt": "<image>"})[0] == 200
    for path, field in (("v1/completions", "prompt"), ("v1/embeddings", "input")):
        status, found = post(live, path, {"model": "seer", field: [1, image_id, 2]})
        assert (status, found["error"]["param"]) == (400, field)
        assert "stands for a picture" in found["error"]["message"]


# bad requests


def refused(live: Live, messages: Any, model: str = "seer", **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": messages, "max_tokens": 3, **fields}
    status, found = post(live, "v1/chat/completions", body)
    assert status == 400, found
    error: dict[str, Any] = found["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("model", ["tiny", "plain"])
def test_a_text_model_names_the_part(live: Live, model: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *question("c", encoded(0))]
    error = refused(live, messages, model)
    assert error["param"] == "messages[2].content[1]"
    assert "reads text only" in error["message"]
    item = {"role": "user", "content": [{"type": "input_image", "image_url": url_of(encoded(0))}]}
    body = {"model": model, "instructions": "x", "input": [{"role": "user", "content": "a"}, item]}
    status, found = post(live, "v1/responses", body)
    assert (status, found["error"]["param"]) == (400, "input[1].content[0]")
    assert found["error"]["message"].startswith("input[1].content[0] is a picture")
    assert post(live, "tokenize", {"model": model, "messages": messages})[1]["error"]["param"] == error["param"]
    status, found = post(live, "api/inside", {"model": model, "text": "a", "image": url_of(encoded(0))})
    assert (status, found["error"]["param"]) == (400, "image")


def test_fields_of_picture_parts(live: Live) -> None:
    url = url_of(encoded(0))
    assert (
        "extra"
        in refused(live, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, "extra": 1}}]}])[
            "message"
        ]
    )
    for content in ([{"type": "image_url"}], [{"type": "image_url", "image_url": url}], [{"type": "image"}]):
        assert refused(live, [{"role": "user", "content": content}])["param"].startswith("messages.0.content.0")
    for role in ("system", "assistant"):
        messages = [{"role": role, "content": question(encoded(0))[0]["content"]}, *question("a")]
        assert "content" in refused(live, messages)["param"]
    for detail in ("auto", "low", "high", None):
        part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
        body = {"model": "seer", "messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        assert post(live, "v1/chat/completions", body)[0] == 200
    error = refused(
        live, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, "detail": "x"}}]}]
    )
    assert "detail" in error["param"]


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "x",
            "data:",
            "data:image/png;base64,",
            "data:image/png;base64,!!!!",
            "data:image/png,abc",
            "data:text/html,x",
        ),
        *("/etc/passwd", "file:///etc/passwd", "http://localhost/x.png", "https://example.org/x.png", "javascript:x"),
    ],
)
def test_addresses_that_are_no_pictures(live: Live, url: str) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}]}
    ]
    error = refused(live, messages)
    assert error["param"] == "messages[0].content[1]"
    assert error["message"].startswith("messages[0].content[1]: ")
    assert "root:" not in error["message"]


def test_too_many_pictures(live: Live) -> None:
    error = refused(live, question(*[encoded(0, size=(2, 2))] * 17))
    assert error["param"] == "messages[0].content[16]"
    assert "17 pictures; the limit is 16" in error["message"]


def test_a_prompt_beyond_the_context(live: Live) -> None:
    error = refused(live, question(*[encoded(0, size=(2, 2))] * 16, "x" * 400))
    assert error["code"] == "context_length_exceeded"
    body = {"model": "seer", "messages": question(*[encoded(0, size=(2, 2))] * 16, "x" * 400), "max_tokens": 2}
    status, found = post(live, "v1/chat/completions", {**body, "overflow": "truncate"})
    assert status == 200
    assert found["usage"]["prompt_tokens"] <= 512


# hostile pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    """Return a small file of a PNG with this many pixels, all black."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    rows = min(height, 2000)
    data = b"".join(compressor.compress(row) for _ in range(rows)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def peak_memory() -> int:
    """Return the most memory that this process has had, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decompression_bombs_take_no_memory(live: Live, client: openai.OpenAI) -> None:
    answer(client, question(encoded(0), TEXT))
    before = peak_memory()
    for width, height in ((20_000, 20_000), (100_000, 1), (1, 100_000), (2**31 - 1, 2**31 - 1), (0, 0)):
        error = refused(
            live, question(huge_png(min(width, 20_000), height) if width <= 20_000 else _header(width, height))
        )
        assert "pixels" in error["message"]
    assert peak_memory() - before < 100 << 20
    answer(client, question(encoded(0), TEXT))


def _header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


ODD = {
    "1x1": encoded(0, size=(1, 1)),
    "long": encoded(0, size=(2000, 1)),
    "gray": encoded(0, mode="L"),
    "16 bits": encoded(0, mode="I;16"),
    "transparent": encoded(0, mode="RGBA"),
    "palette": encoded(0, mode="P"),
    "CMYK": encoded(0, "JPEG", "CMYK"),
    "progressive": encoded(0, "JPEG", progressive=True),
    "WebP": encoded(0, "WEBP"),
    "GIF": encoded(0, "GIF", "P"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_read(live: Live, client: openai.OpenAI, name: str) -> None:
    _, expected = reference(live, ODD[name], TEXT, seed=2, max_tokens=10)
    assert answer(client, question(ODD[name], TEXT), seed=2).choices[0].message.content == expected


def test_the_first_frame_of_an_animation_and_exif_rotation(client: openai.OpenAI) -> None:
    frames = [Image.open(io.BytesIO(encoded(seed, size=(24, 24)))) for seed in (0, 1)]
    moving, still, turned = io.BytesIO(), io.BytesIO(), io.BytesIO()
    frames[0].save(moving, "PNG", save_all=True, append_images=frames[1:])
    frames[0].save(still, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames[0].transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    texts = {
        answer(client, question(file.getvalue(), TEXT), temperature=0).choices[0].message.content
        for file in (moving, still, turned)
    }
    assert len(texts) == 1


def test_damaged_pictures_get_clear_errors_and_the_server_goes_on(live: Live, client: openai.OpenAI) -> None:
    generator, statuses = random.Random(1), []
    good = [
        encoded(0, size=(40, 40)),
        encoded(0, "JPEG", size=(40, 40)),
        encoded(0, "WEBP", size=(40, 40)),
        encoded(0, "GIF", "P"),
    ]
    expected = answer(client, question(good[0], TEXT), temperature=0).choices[0].message.content
    for i in range(60):
        damaged = bytearray(good[i % len(good)])
        if i % 3 == 0:
            damaged = damaged[: generator.randrange(len(damaged))]
        for _ in range(generator.randrange(1, 9) if i % 3 else 0):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        body = {"model": "seer", "messages": question(bytes(damaged)), "max_tokens": 1}
        status, found = post(live, "v1/chat/completions", body)
        statuses.append(status)
        if status == 400:
            assert found["error"]["param"] == "messages[0].content[0]"
            assert found["error"]["code"] == "invalid_image"
    assert set(statuses) == {200, 400}
    assert answer(client, question(good[0], TEXT), temperature=0).choices[0].message.content == expected


def test_limits_of_the_operator(start: Any) -> None:
    limits = ImageLimits(max_bytes=2000, max_pixels=500)
    server = start(Settings(image_limits=limits, max_images=2), more=SEER)
    assert "the limit is 500 pixels" in refused(server, question(encoded(0, size=(30, 20))))["message"]
    assert (
        "2,000"
        in refused(server, question(encoded(0, mode="RGBA", size=(25, 20), pnginfo=None, compress_level=0) * 2))[
            "message"
        ]
    )
    assert "the limit is 2" in refused(server, question(*[encoded(0, size=(2, 2))] * 3))["message"]
    body = {"model": "seer", "messages": question(encoded(0, size=(20, 20), format="JPEG")), "max_tokens": 1}
    assert post(server, "v1/chat/completions", body)[0] == 200


# the view of the inside


def test_inside_shows_the_patches_that_tokens_attend_to(live: Live) -> None:
    picture = encoded(3, size=(48, 30))
    body = {"model": "seer", "text": TEXT, "image": url_of(picture), "layer": 1}
    status, found = post(live, "api/inside", body)
    assert status == 200
    prompt, _ = reference(live, picture, TEXT, max_tokens=1)
    image = prompt.images[0]
    shown = [id for i, id in enumerate(prompt.ids) if not image.start <= i < image.stop - 1]
    assert found["ids"] == shown
    assert found["image"]["index"] == image.start
    assert found["image"]["grid"] == 4
    weights, patches = np.array(found["attention"]["weights"]), np.array(found["image"]["weights"])
    assert weights.shape == (found["heads"], len(shown), len(shown))
    assert patches.shape == (found["heads"], len(shown), 16)
    assert weights.sum(axis=-1) == pytest.approx(1, abs=1e-3)
    assert patches.sum(axis=-1) == pytest.approx(weights[..., image.start], abs=1e-3)
    assert not patches[:, : image.start].any()
    seen = decode_image(base64.b64decode(found["image"]["url"].partition(",")[2]))
    assert np.array_equal(seen.pixels, ImageProcessor.of(VISION).resize(decode_image(picture)).pixels)
    for part in ("lens", "next"):
        assert len(found[part]["tokens"][0] if part == "lens" else found[part]) == len(shown)
    whole = live.reference["seer"].generate([prompt], SamplingParams(temperature=0.0, max_tokens=1))[0].ids
    assert found["next"][-1][0]["id"] == whole[0]


def test_inside_has_room_for_the_patches(live: Live) -> None:
    body = {"model": "seer", "text": "z" * 300, "image": url_of(encoded(0))}
    status, found = post(live, "api/inside", body)
    assert status == 400
    assert "1 to 96 tokens" in found["error"]["message"]
    assert post(live, "api/inside", {"model": "seer", "text": ""})[1]["error"]["param"] == "text"
    assert post(live, "api/inside", {"model": "seer", "text": "", "image": url_of(encoded(0))})[0] == 200
    assert (
        post(live, "api/inside", {"model": "seer", "text": "a", "image": url_of(b"x")})[1]["error"]["param"] == "image"
    )
    with urllib.request.urlopen(f"{live.url}/api/models/seer") as answer:
        assert json.load(answer)["image_tokens"] == 16
    with urllib.request.urlopen(f"{live.url}/api/models/tiny") as answer:
        assert json.load(answer)["image_tokens"] is None


def test_inside_with_a_class_token(live: Live) -> None:
    """CLIP's tower puts a token before the patches; attention to it is no attention to a patch."""
    import torch

    from gptsmith.model.transformer import Transformer

    model, tokenizer = live.reference["seer"].model, live.tokenizers["seer"]
    for vision in (dataclasses.replace(VISION, class_token=True), dataclasses.replace(VISION, drop_first=True)):
        torch.manual_seed(0)
        other = Transformer(dataclasses.replace(model.config, vision=vision)).eval()
        found = inspect_text(other, tokenizer, TEXT, image=decode_image(encoded(0)))
        patches, weights = np.array(found["image"]["weights"]), np.array(found["attention"]["weights"])
        assert patches.shape[-1] == 16
        whole = weights[..., found["image"]["index"]]
        last = patches[:, -1].sum(axis=-1)
        if vision.class_token:
            assert (last < whole[:, -1]).all()
        else:
            assert last == pytest.approx(whole[:, -1], abs=1e-3)

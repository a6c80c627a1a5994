"""The decoder of pictures: every format and mode, against Pillow's own reading; damaged and hostile files."""

from __future__ import annotations

import base64
import io
import random
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from gptsmith.data import images
from gptsmith.data.images import DecodedImage, ImageError, ImageLimits, decode_image, image_bytes, read_image_part
from gptsmith.errors import GptsmithError

RED = (255, 0, 0)


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> Image.Image:
    """A gradient without symmetry."""
    y, x = np.mgrid[: size[1], : size[0]]
    rgb = np.stack([x * 12, y * 20, (x + y) * 7], axis=-1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def stored(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes = b"", *extra: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
@pytest.mark.parametrize("format", ["PNG", "GIF", "JPEG", "WEBP"])
def test_formats_and_modes_are_read_as_pillow_reads_them(format: str, mode: str) -> None:
    image = picture(mode)
    if (format == "JPEG" and mode in ("P", "1")) or (format == "WEBP" and mode == "1"):
        image = image.convert("RGB")
    source = stored(image, format)
    assert np.array_equal(decode_image(source).pixels, np.asarray(Image.open(io.BytesIO(source)).convert("RGB")))


def test_cmyk_is_converted() -> None:
    source = stored(picture("CMYK"), "JPEG", quality=98)
    expected = np.asarray(Image.open(io.BytesIO(source)).convert("RGB"))
    assert np.array_equal(decode_image(source).pixels, expected)
    assert np.abs(expected.astype(int) - np.asarray(picture())).mean() < 20  # and the colors are not inverted


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    found = decode_image(stored(Image.fromarray(values), "PNG")).pixels
    assert found[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert (found == found[..., :1]).all()


def test_transparent_pixels_get_the_background() -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    source = stored(image, "PNG")
    assert decode_image(source).pixels[0].tolist() == [[255, 255, 255], [10, 20, 30], [127, 127, 127]]
    assert decode_image(source, background=RED).pixels[0, 0].tolist() == list(RED)
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([9, 9, 9, 1, 2, 3])
    palette.putpixel((0, 0), 0)
    for format in ("PNG", "GIF"):
        found = decode_image(stored(palette, format, transparency=0), background=RED).pixels[0]
        assert found.tolist() == [list(RED), [1, 2, 3]], format


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_rotation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif} | ({"lossless": True} if format == "WEBP" else {})
    source = stored(picture(), format, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(source)))
    assert np.array_equal(decode_image(source).pixels, np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_read(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255), (0, 255, 0))]
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    source = stored(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert (decode_image(source).pixels == RED).all()


def test_equal_pictures_have_equal_keys_whatever_their_format() -> None:
    keys = {decode_image(stored(picture(), format)).key for format in ("PNG", "BMP")[:1]}
    keys |= {decode_image(stored(picture(), "WEBP", lossless=True)).key, DecodedImage(np.asarray(picture())).key}
    assert len(keys) == 1
    tall = np.zeros((4, 1, 3), np.uint8)
    assert DecodedImage(tall).key != DecodedImage(tall.transpose(1, 0, 2)).key  # the same bytes in another size


def test_limits_hold_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unused:
        def open(self, *args: object, **options: object) -> None:
            raise AssertionError("a decoder was reached")

    monkeypatch.setattr(images, "_pillow", Unused)
    bomb = png(20_000, 20_000, zlib.compress(bytes(1000)))
    with pytest.raises(ImageError, match=r"20,000×20,000 pixels; the limit is 32,000,000"):
        decode_image(bomb)
    with pytest.raises(ImageError, match="16,384 per side"):
        decode_image(png(1, 16_385))
    with pytest.raises(ImageError, match="0×5 pixels"):
        decode_image(png(0, 5))
    with pytest.raises(ImageError, match="bytes; the limit is 10"):
        decode_image(bomb, limits=ImageLimits(max_bytes=10))
    for source in (
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
        + b"\2\0;",
        b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xff" * 6,
        b"\xff\xd8\xff\xc0" + struct.pack(">HBHH", 8, 8, 65500, 65500) + b"\3\xff\xda\0\2",
    ):
        with pytest.raises(ImageError, match="the limit is"):
            decode_image(source)


def test_a_decompression_bomb_takes_little_memory() -> None:
    text = zlib.compress(bytes(200 << 20), 9)  # 200 MB in 200 kB, as a comment, a profile and pixel data
    source = png(4, 4, zlib.compress(bytes(20)), (b"zTXt", b"a\0\0" + text), (b"iCCP", b"a\0\0" + text))
    tracemalloc.start()
    assert decode_image(source).pixels.shape == (4, 4, 3)
    with pytest.raises(ImageError, match="200,000×1 "):
        decode_image(png(200_000, 1, text))
    assert decode_image(png(4, 4, text)).pixels.max() == 0  # what is beyond the picture is left alone
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    source = stored(picture(), "JPEG", progressive=True)
    scan = source[source.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="scans"):
        decode_image(source[:-2] + scan * 300 + source[-2:])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_files_give_an_error_or_a_picture(format: str) -> None:
    source = stored(picture(size=(40, 30)), format)
    for length in range(0, len(source) - 1, max(1, len(source) // 60)):
        if format == "JPEG" and length > len(source) - 3:
            continue
        with pytest.raises(ImageError):
            decode_image(source[:length])
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(source)
        for _ in range(rng.choice((1, 3, 20))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            found = decode_image(bytes(damaged), limits=ImageLimits(max_pixels=1 << 20))
        except ImageError as error:
            assert str(error)  # noqa: PT017
        else:
            assert found.pixels.shape[2] == 3


def test_other_formats_are_refused() -> None:
    for source in (b"", b"hello", stored(picture(), "BMP"), stored(picture(), "TIFF"), b"<svg/>", b"%PDF-1.4"):
        with pytest.raises(ImageError, match="supported format"):
            decode_image(source)


def test_one_pixel_is_a_picture() -> None:
    assert decode_image(stored(Image.new("RGB", (1, 1), RED), "PNG")).pixels.tolist() == [[list(RED)]]


def test_parts_of_messages(tmp_path: Path) -> None:
    source = stored(picture(), "PNG")
    (tmp_path / "a.png").write_bytes(source)
    url = "data:image/png;base64," + base64.b64encode(source).decode()
    for part in (
        source,
        url,
        url.replace("+", "%2B").replace("=", ""),
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "input_image", "image_url": url},
        {"type": "image", "image": source},
        {"type": "image", "path": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"bytes": source, "path": "b.png"},
        {"bytes": None, "path": "a.png"},
        "a.png",
        str(tmp_path / "a.png"),
    ):
        assert image_bytes(part, base=tmp_path) == source, part
        assert np.array_equal(read_image_part(part, base=tmp_path).pixels, np.asarray(picture()))


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for part, message in (
        ("https://example.org/a.png", "address on a network"),
        (Path("https://example.org/a.png"), "address on a network"),
        ("file.png", "as a data: URL"),
        ("data:text/html;base64,AAAA", "begins with"),
        ("data:image/png,AAAA", "begins with"),
        ("data:image/png;base64,!!!!", "base64"),
        ({"type": "text", "text": "a"}, "type 'text'"),
        ({"type": "image_url"}, "no picture"),
        (7, "is a path"),
        ("", "is a path"),
    ):
        with pytest.raises(ImageError, match=message):
            image_bytes(part)
    for name in ("missing.png", "folder.png"):
        with pytest.raises(ImageError, match="no picture at"):
            image_bytes(name, base=tmp_path)
    with pytest.raises(ImageError, match="the limit"):
        image_bytes("data:image/png;base64," + "A" * 1000, limits=ImageLimits(max_bytes=100))
    with pytest.raises(ImageError):
        image_bytes("a\0b.png", base=tmp_path)


def test_missing_pillow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(GptsmithError, match=r"gptsmith\[images\]"):
        decode_image(b"")

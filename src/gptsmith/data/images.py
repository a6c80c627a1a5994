"""Decode pictures that may be damaged or hostile: PNG, JPEG, WebP and the first frame of a GIF become RGB arrays.

    image = decode_image(path.read_bytes())             # DecodedImage; image.pixels is (H, W, 3) uint8
    image = read_image_part({"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}})

The size in bytes, then width and height as the header gives them, are compared with `ImageLimits` before anything is
decompressed. The decoder (Pillow) gets the pixel data alone: comments, color profiles, thumbnails, EXIF data and
further frames are removed before, so their parsers cannot be reached. The rotation in EXIF data is read here.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt

from gptsmith.errors import DataError, GptsmithError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WebP", "GIF")
WHITE = (255, 255, 255)
_MAX_SCANS = 256  # of a JPEG: a usual one has about ten, and each costs time for every pixel


class ImageError(DataError):
    """A picture that cannot be decoded, is too large, or is in none of the supported formats."""


@dataclass(frozen=True)
class ImageLimits:
    """What is refused before decoding: files above `max_bytes`, pictures above `max_pixels` or `max_side`."""

    max_bytes: int = 20 << 20
    max_pixels: int = 32_000_000
    max_side: int = 16_384


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A picture of 8-bit RGB. pixels: (H, W, 3) uint8, rows from the top."""

    pixels: npt.NDArray[np.uint8]

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @functools.cached_property
    def key(self) -> str:
        """A sha256 of mode, size and pixels: equal for equal pictures, whatever they were stored as."""
        digest = hashlib.sha256(f"RGB {self.width}x{self.height} ".encode())
        digest.update(self.pixels.tobytes())
        return digest.hexdigest()


def decode_image(
    source: bytes, *, limits: ImageLimits = DEFAULT_LIMITS, background: tuple[int, int, int] = WHITE
) -> DecodedImage:
    """Decode a PNG, JPEG or WebP, or the first frame of a GIF.

    The rotation in EXIF data is applied. CMYK, gray, palettes and 16 bits per channel become 8-bit RGB; transparent
    pixels are blended with `background`.
    Raises ImageError for anything else, for a damaged or truncated picture, and for one above the limits.
    """
    pillow = _pillow()
    if len(source) > limits.max_bytes:
        raise ImageError(f"the picture has {len(source):,} bytes; the limit is {limits.max_bytes:,}.")
    header = _header(source)
    width, height = header.width, header.height
    if not (width and height):
        raise ImageError(f"the picture is {width}×{height} pixels: it is empty.")
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageError(
            f"the picture is {width:,}×{height:,} pixels; the limit is {limits.max_pixels:,} pixels, and "
            f"{limits.max_side:,} per side. Make it smaller."
        )
    try:
        with pillow.open(io.BytesIO(header.data), formats=[header.format.upper()]) as image:
            if image.size != (width, height):
                raise ImageError(f"the {header.format} picture is damaged: it gives two different sizes.")
            image.load()
            pixels = _rgb(image, background)
    except ImageError:
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise ImageError(f"the {header.format} picture is damaged or incomplete: {reason}.") from None
    return DecodedImage(np.ascontiguousarray(_rotated(pixels, header.orientation)))


def media_type(source: bytes) -> str:
    """Return the media type of a picture file, such as image/png. Raise ImageError as `decode_image` does."""
    return f"image/{_header(source).format.lower()}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise GptsmithError(
            'reading pictures needs Pillow, which is not installed. Install it: pip install "gptsmith[images]"'
        ) from None
    return Image


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Return (H, W, 3) uint8."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # 16-bit gray; the upper byte, as Pillow takes of 16-bit RGB
        gray = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(gray.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image)
        image = canvas
    return np.asarray(image.convert("RGB"))


def _rotated(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Undo the rotation and reflection that EXIF numbers 1 to 8 stand for."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


# Headers -------------------------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """What a file says of its picture before any of it is decoded. data: the file without what is not pixels."""

    format: str
    width: int
    height: int
    data: bytes
    orientation: int = 1


def _header(source: bytes) -> _Header:
    readers: dict[bytes, tuple[str, Callable[[bytes], _Header]]] = {
        b"\x89PNG\r\n\x1a\n": ("PNG", _png),
        b"\xff\xd8": ("JPEG", _jpeg),
        b"GIF87a": ("GIF", _gif),
        b"GIF89a": ("GIF", _gif),
    }
    webp: tuple[str, Callable[[bytes], _Header]] = ("WebP", _webp)
    found = next((entry for magic, entry in readers.items() if source.startswith(magic)), None)
    if source[:4] == b"RIFF" and source[8:12] == b"WEBP":
        found = webp
    if found is None:
        raise ImageError(f"this is not a picture in a supported format ({', '.join(FORMATS)}).")
    name, reader = found
    try:
        return reader(source)
    except (struct.error, IndexError):
        raise ImageError(f"the {name} picture is damaged or incomplete: its header ends too early.") from None


def _png(source: bytes) -> _Header:
    """Keep the header, palette, transparency and data of the default picture; drop text, profiles and frames."""
    if source[12:16] != b"IHDR":
        raise ImageError("the PNG picture is damaged: it does not begin with its header.")
    width, height = struct.unpack(">II", source[16:24])
    kept, orientation, position = [source[:8]], 1, 8
    while position < len(source):
        (size,) = struct.unpack_from(">I", source, position)
        kind, end = source[position + 4 : position + 8], position + 12 + size
        if end > len(source):
            raise ImageError("the PNG picture is incomplete: it ends too early.")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(source[position:end])
        elif kind == b"eXIf":
            orientation = _orientation(source[position + 8 : position + 8 + size])
        position = end
        if kind == b"IEND":
            break
    else:
        raise ImageError("the PNG picture is incomplete: its end is missing.")
    return _Header("PNG", width, height, b"".join(kept), orientation)


_JPEG_SIZES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # start of frame


def _jpeg(source: bytes) -> _Header:
    """Keep everything but comments and application data; JFIF's and Adobe's say how colors are meant."""
    if source.count(b"\xff\xda") > _MAX_SCANS:
        raise ImageError(f"the JPEG picture has more than {_MAX_SCANS} scans, which is implausible.")
    kept, orientation, size, position = [source[:2]], 1, None, 2
    while True:
        if source[position] != 0xFF:
            raise ImageError("the JPEG picture is damaged: a segment does not begin where it should.")
        while source[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker = source[position + 1]
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # without a length
            position += 2
            continue
        (length,) = struct.unpack_from(">H", source, position + 2)
        end = position + 2 + length
        segment = source[position:end]
        if marker in _JPEG_SIZES:
            if size is not None:
                raise ImageError("the JPEG picture is damaged: it gives two different sizes.")
            size = struct.unpack_from(">HH", source, position + 5)
        if marker == 0xDA or marker == 0xD9:  # pixels follow, or the end
            break
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            orientation = _orientation(segment[10:])
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        position = end
    if size is None:
        raise ImageError("the JPEG picture is damaged: it gives no size before its pixels.")
    return _Header("JPEG", size[1], size[0], b"".join([*kept, source[position:]]), orientation)


def _gif(source: bytes) -> _Header:
    """Cut the file behind the first frame."""
    width, height, flags = struct.unpack_from("<HHB", source, 6)
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    while source[position] == 0x21:  # an extension
        position = _after_blocks(source, position + 2)
    if source[position] != 0x2C:
        raise ImageError("the GIF picture has no frame.")
    left, top, frame_width, frame_height, frame_flags = struct.unpack_from("<HHHHB", source, position + 1)
    if left + frame_width > width or top + frame_height > height:
        raise ImageError("the GIF picture is damaged: its first frame is larger than the whole.")
    position += 10 + (3 << ((frame_flags & 7) + 1) if frame_flags & 0x80 else 0)
    end = _after_blocks(source, position + 1)
    return _Header("GIF", width, height, source[:end] + b";")


def _after_blocks(source: bytes, position: int) -> int:
    """Return the position behind a GIF's list of data blocks."""
    while source[position]:
        position += 1 + source[position]
    return position + 1


def _webp(source: bytes) -> _Header:
    (size,) = struct.unpack_from("<I", source, 4)
    if size + 8 > len(source):
        raise ImageError("the WebP picture is incomplete: it is shorter than it says.")
    kind, orientation = source[12:16], 1
    if kind == b"VP8X":
        width = 1 + int.from_bytes(source[24:27], "little")
        height = 1 + int.from_bytes(source[27:30], "little")
        position = 12
        while position + 8 <= min(len(source), size + 8):
            (length,) = struct.unpack_from("<I", source, position + 4)
            if source[position : position + 4] == b"EXIF":
                data = source[position + 8 : position + 8 + length]
                orientation = _orientation(data.removeprefix(b"Exif\0\0"))
            position += 8 + length + length % 2
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", source, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", source, 26))
    else:
        raise ImageError("the WebP picture is damaged: it has no picture data.")
    return _Header("WebP", width, height, source[: size + 8], orientation)


def _orientation(exif: bytes) -> int:
    """Return tag 0x0112 of EXIF data (a TIFF header and its first directory); 1 where it is missing or damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for i in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, start + 2 + 12 * i)
            if tag == 0x0112 and kind == 3:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


# Where pictures come from --------------------------------------------------------------------------------------------

_ADDRESSES = ("http:/", "https:/")  # as a path has them, with a single slash


def read_image_part(
    part: Any,
    *,
    base: Path | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    background: tuple[int, int, int] = WHITE,
) -> DecodedImage:
    """Decode the picture that a part of a message, or a cell of a data set, refers to. See `image_bytes`."""
    return decode_image(image_bytes(part, base=base, limits=limits), limits=limits, background=background)


def image_bytes(part: Any, *, base: Path | None = None, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Return the file of the picture that a part of a message, or a cell of a data set, refers to.

    part: bytes; a `data:` URL or a path, as a text; {"bytes": …, "path": …} (a column of pictures in Parquet files); or
        a part {"type": "image_url", "image_url": {"url": …}}, {"type": "input_image", "image_url": …},
        {"type": "image", "image": …}.
    base: the folder that paths are relative to; None: paths are refused, as a server must.
    Raises ImageError for what is missing, too large, or an address on a network.
    """
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind in ("image_url", "input_image", "image"):
            found = next(
                (part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None), None
            )
            if isinstance(found, Mapping) and isinstance(found.get("url"), str):
                found = found["url"]
            if found is None:
                raise ImageError(f"a part of type {kind!r} has no picture.")
            return image_bytes(found, base=base, limits=limits)
        found = part.get("bytes") if part.get("bytes") is not None else part.get("path")
        if kind is not None or found is None:
            raise ImageError(f"a part of type {kind!r} is not a picture.")
        return image_bytes(found, base=base, limits=limits)
    if isinstance(part, bytes | bytearray | memoryview):
        if len(part) > limits.max_bytes:
            raise ImageError(f"the picture has {len(part):,} bytes; the limit is {limits.max_bytes:,}.")
        return bytes(part)
    if isinstance(part, Path):
        part = str(part)
    if not isinstance(part, str) or not part:
        raise ImageError("a picture is a path, a data: URL, or the bytes of a file.")
    if part[:5].lower() == "data:":
        return _from_data_url(part, limits)
    scheme, separator, _ = part.partition("://")
    if (separator and scheme.lower() != "file") or part.lower().startswith(_ADDRESSES):
        raise ImageError(f"{part[:80]!r} is an address on a network, which is not fetched. Use a file or a data: URL.")
    if base is None:
        raise ImageError("a picture is given as a data: URL here: data:image/png;base64,…")
    return _from_file(base / part.removeprefix("file://"), limits)


def _from_data_url(url: str, limits: ImageLimits) -> bytes:
    head, comma, payload = url.partition(",")
    kind, *options = head[5:].lower().split(";")
    if not comma or "base64" not in options or (kind and not kind.startswith("image/")):
        raise ImageError("a data: URL of a picture begins with data:image/png;base64, or another type of picture.")
    if len(payload) > limits.max_bytes * 4:  # three bytes are four characters, each of which may be escaped (%2B)
        raise ImageError(f"the picture in the data: URL has more than {limits.max_bytes:,} bytes, the limit.")
    encoded = unquote_to_bytes(payload) if "%" in payload else payload.encode()
    encoded = b"".join(encoded.split())
    if len(encoded) // 4 * 3 > limits.max_bytes + 3:
        raise ImageError(f"the picture in the data: URL has more than {limits.max_bytes:,} bytes, the limit.")
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("the data: URL of a picture is not valid base64.") from None


def _from_file(path: Path, limits: ImageLimits) -> bytes:
    try:
        if not path.is_file():
            raise ImageError(f"there is no picture at {path}.")
        size = path.stat().st_size
        if size > limits.max_bytes:
            raise ImageError(f"{path} has {size:,} bytes; the limit for a picture is {limits.max_bytes:,}.")
        with open(path, "rb") as file:
            return file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ImageError(f"cannot read the picture {path}: {getattr(error, 'strerror', None) or error}.") from None

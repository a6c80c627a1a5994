"""Tiny models that read pictures, and files of pictures with words, for tests."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from gptsmith.export.export import write_directory
from gptsmith.export.vision import with_vision
from gptsmith.export.vision_options import VisionOptions
from gptsmith.model.families import FAMILIES
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer.bpe import train_bpe

COLORS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
SHAPES = ("square", "disk")
TEXT = (
    "user\nassistant\nsystem\nwhat is this? and that? a red square. a green disk. a blue disk. black square <image> "
    'one two which is better? good bad # Tools <tool_call>\n{"name": "x", "arguments": {}}\n</tool_response>\n'
)


def drawn(color: str, shape: str, size: int = 16) -> bytes:
    """A PNG with a shape on a transparent ground."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    box = (size // 4, size // 4, 3 * size // 4, 3 * size // 4)
    (draw.rectangle if shape == "square" else draw.ellipse)(box, fill=(*COLORS[color], 255))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path) -> dict[str, str]:
    """Write all shapes in all colors; return their names by their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for color in COLORS:
        for shape in SHAPES:
            name = f"{color}-{shape}.png"
            (folder / name).write_bytes(drawn(color, shape))
            names[f"a {color} {shape}"] = name
    return names


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def captions(folder: Path, repeat: int = 4) -> Path:
    """A file of captions, with its pictures beside it."""
    names = write_pictures(folder / "pictures")
    rows = [{"image": f"pictures/{name}", "caption": caption} for caption, name in names.items()]
    return write_rows(folder / "captions.jsonl", rows * repeat)


def seer(
    directory: Path, family: str = "llama", context: int = 128, *, image_size: int = 16, tower_layers: int = 1
) -> Path:
    """Write a tiny model that reads pictures, by default of 16×16 pixels, as 4 tokens each."""
    tokenizer = train_bpe([TEXT * 20], vocab_size=290)
    torch.manual_seed(0)
    config = FAMILIES[family](
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    tower = VisionOptions(
        image_size=image_size,
        patch_size=image_size // 2,
        hidden_size=32,
        num_hidden_layers=tower_layers,
        num_attention_heads=2,
    )
    model, tokenizer = with_vision(Transformer(config), tokenizer, tower.build())
    write_directory(directory, model, tokenizer)
    return directory

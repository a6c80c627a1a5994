"""Contamination: whether the examples of a task occur in the text that a model was trained on.

As in appendix C of the GPT-3 paper (Brown et al. 2020), an example is dirty if 13 consecutive words of it occur in the
training text, without regard to case, punctuation and white space; the others are clean, and both are scored apart. Of
an example with 8 to 12 words, all must occur, in this order. Shorter ones cannot be checked. What most examples have in
common is the template's and does not count.

    corpora = corpora_of("runs/bard")
    found = find_overlaps({"capitals": {0: ["What is the capital of Italy? Rome …"]}}, corpora)

The n-grams of the task are hashed, and the training text is streamed past them, so memory does not grow with it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptsmith.data.corpora import CORPORA, corpus_path
from gptsmith.data.prepare import prepared_directory
from gptsmith.data.rows import is_table, read_rows, row_files
from gptsmith.data.shards import TokenSplit, open_dataset
from gptsmith.data.sources import DEFAULT_FIELD, Source, open_source
from gptsmith.errors import DataError, UsageError
from gptsmith.evaluate.harness import Results, TaskSpec, resolve_task, task_name
from gptsmith.evaluate.scores import mean_with_interval
from gptsmith.log import note, progress
from gptsmith.run_directory import Run, read_run
from gptsmith.storage import sha256_file
from gptsmith.tasks.base import AnsweredTask, Task
from gptsmith.tasks.definition import Definition, Item
from gptsmith.tasks.specs import is_task
from gptsmith.tokenizer import Tokenizer

Hashes = NDArray[np.uint64]

MOST_WORDS, FEWEST_WORDS = 13, 8
MANY_EXAMPLES = 10  # from which on an n-gram that more than half of them have is taken for one of the template
BLOCK_TOKENS = 1 << 16  # of a shard, decoded at a time
OVERLAP_TOKENS = 1 << 10  # by which blocks overlap, so that no n-gram is cut
OVERLAP_CHARACTERS = 1 << 11
_MOST_KNOWN_WORDS = 1 << 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd
_NOT_A_WORD = re.compile(r"[^\w\s]|_")

Advance = Callable[[int], None]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _NOT_A_WORD.sub("", text.lower()).split()


# Training text --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Text that a model was trained on. name: for people. fingerprint: of its content. size: in units of `advance`.

    texts: yields pieces of the text; no n-gram goes across two pieces, and pieces of one document overlap.
    """

    name: str
    fingerprint: str
    size: int
    texts: Callable[[Advance], Iterator[str]]


def corpora_of(model: str | Path) -> list[Corpus]:
    """Return the training text of a run, and of the runs that it began with.

    model: a run, or a directory in it. The prepared token shards are read, without the part held out for validation;
    where they are no longer in the cache, the files that the run names.
    Raises UsageError for a model that is not a run, DataError where its text is gone.
    """
    directory = _run_directory(Path(model))
    if directory is None:
        raise UsageError(
            f"{model} is not a run, so its training text is not known. Name the text with --training-data FILE."
        )
    found: list[Corpus] = []
    seen: set[Path] = set()
    while directory is not None and directory.resolve() not in seen:
        seen.add(directory.resolve())
        run = read_run(directory)
        found += _corpora_of_run(run)
        init = run.options.get("init")
        directory = _run_directory(Path(init)) if isinstance(init, str) else None
        if isinstance(init, str) and directory is None:
            note(f"note: the training text of {init}, with which {run.name} began, is not known and not checked.")
    return found


def _run_directory(path: Path) -> Path | None:
    """Return the run that a path is in."""
    if not path.exists():  # a name of a model, not a path
        return None
    path = path.resolve()
    return next((place for place in (path, *list(path.parents)[:2]) if (place / "run.json").is_file()), None)


def _corpora_of_run(run: Run) -> list[Corpus]:
    data = run.part("data")
    spec, fingerprint = data.get("spec"), data.get("fingerprint")
    if spec is None:
        raise DataError(
            f"the run {run.directory} does not record its training text. Name the text with --training-data FILE."
        )
    tokens = run.directory / "tokenizer"
    if isinstance(fingerprint, str) and tokens.is_dir():
        directory = prepared_directory(fingerprint)
        tokenizer = Tokenizer.load(tokens)
        if directory.exists():
            dataset = open_dataset(directory)
            if dataset.tokenizer_fingerprint == tokenizer.fingerprint:
                return [corpus_of_split(dataset.train, tokenizer, f"{run.name} (training split)")]
    column = str(run.options.get("field") or DEFAULT_FIELD)
    specs = spec if isinstance(spec, list) else [spec]
    if is_task(str(specs[0])):
        note(f"note: {run.name} was trained on prompts that {specs[0]} makes, which are not checked.")
        return []
    try:
        if run.info.get("objective", "pretrain") == "pretrain":
            return [corpus_of_text(open_source(specs if len(specs) > 1 else specs[0], field=column))]
        return [corpus_of_rows(specs, run.name, str(fingerprint))]
    except (UsageError, DataError) as error:
        raise DataError(
            f"the training text of {run.directory} is gone: {error} Name where it is now with --training-data FILE."
        ) from None


def corpus_of_split(split: TokenSplit, tokenizer: Tokenizer, name: str) -> Corpus:
    """Return the text of token shards, decoded block by block."""
    separator = None if tokenizer.eos_id is None else tokenizer.special_tokens().get(tokenizer.eos_id)

    def texts(advance: Advance) -> Iterator[str]:
        for start in range(0, len(split), BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, len(split))
            ids = split.tokens(max(0, start - OVERLAP_TOKENS), stop).tolist()
            text = tokenizer.decode(ids, skip_special_tokens=False)
            yield from text.split(separator) if separator else [text]
            advance(stop - start)

    return Corpus(name, split.fingerprint, len(split), texts)


def corpus_of_text(source: Source) -> Corpus:
    """Return the text of files, folders, rows or a named corpus."""

    def texts(advance: Advance) -> Iterator[str]:
        before = ""
        for chunk in source.chunks(advance):
            yield before + chunk.text
            before = "" if chunk.ends_document else (before + chunk.text)[-OVERLAP_CHARACTERS:]

    return Corpus(source.spec, source.fingerprint(), source.size_bytes, texts)


def corpus_of_data(spec: str) -> Corpus:
    """Return the text of a file, a folder or a named corpus; of rows, all their strings."""
    path = Path(spec).expanduser()
    if spec not in CORPORA and path.is_file() and is_table(path):
        return corpus_of_rows([spec], spec, sha256_file(path))
    return corpus_of_text(open_source(spec))


def corpus_of_rows(specs: Sequence[str], name: str, fingerprint: str) -> Corpus:
    """Return all strings of rows, of whatever form: conversations, preferences, prompts, labeled texts."""
    files: list[Path] = []
    for spec in specs:
        path = corpus_path(spec) if spec in CORPORA else Path(spec).expanduser()
        if not path.exists():
            raise DataError(f"no such file: {spec}.")
        files += row_files(path)

    def texts(advance: Advance) -> Iterator[str]:
        for file in files:
            for row in read_rows(file, advance):
                yield from strings(row.values)

    return Corpus(name, fingerprint, sum(file.stat().st_size for file in files), texts)


def strings(value: Any) -> Iterator[str]:
    """Yield all strings in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings(each)


# Examples -------------------------------------------------------------------------------------------------------------


def texts_of_item(item: Item) -> list[str]:
    """Return what to look for of an example: its prompt with the right answer, and, since a prompt has words of its
    template, the texts of the record that are in it, alone and with the right answer."""
    prompt = " ".join(words(item.prompt))
    inside = [text for text in strings(item.record) if (found := " ".join(words(text))) and found in prompt]
    return [f"{text} {item.answer_text}" for text in (item.prompt, *inside)] + inside


def texts_of_conversation(task: Task, index: int) -> list[str]:
    """Return what to look for of an example that is a conversation: its messages, with the answer if it is known."""
    text = " ".join(strings([message.get("content") for message in task.example(index)]))
    answer = task.answer(index) if isinstance(task, AnsweredTask) else None
    return [text if answer is None else f"{text} {answer}"]


@dataclass(frozen=True)
class Overlap:
    """Where an example occurs. words: the first n-gram that was found. corpus: in which text."""

    words: str
    corpus: str


@dataclass
class Overlaps:
    """What was found of the examples of a task.

    dirty: those that occur, by their index. unchecked: those that are too short. fingerprints: of the corpora, by name.
    """

    dirty: dict[int, Overlap] = field(default_factory=dict)
    unchecked: set[int] = field(default_factory=set)
    fingerprints: dict[str, str] = field(default_factory=dict)


class _WordHashes(dict[str, int]):
    """64 bits for each word, from its text alone."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_KNOWN_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value

    def of(self, text: Sequence[str]) -> Hashes:
        return np.fromiter(map(self.__getitem__, text), np.uint64, len(text))


def ngram_hashes(hashes: Hashes, n: int) -> Hashes:
    """Return a hash of each n consecutive words: (N - n + 1,)."""
    count = max(0, len(hashes) - n + 1)
    found = np.zeros(count, np.uint64)
    for i in range(n):
        found = found * _FACTOR + hashes[i : i + count]
    return found


Key = tuple[str, int]
"""A task and the index of an example."""


def find_overlaps(tasks: Mapping[str, Mapping[int, Sequence[str]]], corpora: Sequence[Corpus]) -> dict[str, Overlaps]:
    """Return which examples of each task occur in the corpora, in one pass over them.

    tasks: the texts of each example, by the task and the index of the example.
    """
    hashing = _WordHashes()
    names = {corpus.name: corpus.fingerprint for corpus in corpora}
    result = {task: Overlaps(fingerprints=names) for task in tasks}
    keys: list[Key] = []
    parts: dict[int, list[tuple[Hashes, NDArray[np.int64]]]] = defaultdict(list)
    for task, examples in tasks.items():
        for n, (hashes, owners) in _task_ngrams(examples, hashing, result[task].unchecked).items():
            parts[n].append((hashes, owners + len(keys)))
        keys += [(task, index) for index in examples]
    tables = {}
    for n, several in parts.items():
        hashes, owners = (np.concatenate(each) for each in zip(*several, strict=True))
        order = np.argsort(hashes, kind="stable")
        tables[n] = (hashes[order], owners[order])
    with progress(sum(corpus.size for corpus in corpora), "Looking for examples in the training text") as bar:
        for corpus in corpora if tables else ():
            for text in corpus.texts(bar.advance):
                for owner, ngram in _matches(words(text), hashing, tables):
                    task, index = keys[owner]
                    result[task].dirty.setdefault(index, Overlap(ngram, corpus.name))
    return result


def _task_ngrams(
    examples: Mapping[int, Sequence[str]], hashing: _WordHashes, unchecked: set[int]
) -> dict[int, tuple[Hashes, NDArray[np.int64]]]:
    """Return, by their length, the hashes of n-grams and the examples that they belong to, by their place.

    unchecked: gets the examples that are too short.
    """
    parts: dict[int, list[tuple[Hashes, NDArray[np.int64]]]] = defaultdict(list)
    for number, (index, texts) in enumerate(examples.items()):
        own: dict[int, list[Hashes]] = defaultdict(list)
        for text in dict.fromkeys(texts):
            split = words(text)
            if (n := min(MOST_WORDS, len(split))) >= FEWEST_WORDS:
                own[n].append(ngram_hashes(hashing.of(split), n))
        for n, several in own.items():
            hashes = np.unique(np.concatenate(several))
            parts[n].append((hashes, np.full(len(hashes), number)))
        if not own:
            unchecked.add(index)
    found = {}
    for n, pairs in parts.items():
        hashes, owners = (np.concatenate(each) for each in zip(*pairs, strict=True))
        if len(examples) >= MANY_EXAMPLES:
            _, place, counts = np.unique(hashes, return_inverse=True, return_counts=True)
            own_words = counts[place] <= len(examples) / 2  # the others are the template's
            hashes, owners = hashes[own_words], owners[own_words]
        if len(hashes):
            found[n] = (hashes, owners)
    return found


def _matches(
    text: list[str], hashing: _WordHashes, tables: Mapping[int, tuple[Hashes, NDArray[np.int64]]]
) -> Iterator[tuple[int, str]]:
    """Yield the owners of the n-grams that occur in a text, and the n-gram."""
    hashes = hashing.of(text)
    for n, (table, owners) in tables.items():
        grams = ngram_hashes(hashes, n)
        at = np.minimum(np.searchsorted(table, grams), len(table) - 1)
        for place in np.flatnonzero(table[at] == grams).tolist():
            last = int(np.searchsorted(table, grams[place], side="right"))
            for owner in owners[at[place] : last].tolist():
                yield owner, " ".join(text[place : place + n])


# Scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CleanAndDirty:
    """The scores of a task on its clean and its dirty examples.

    clean, dirty: the mean score with its interval, {} without examples. unchecked: how many of the clean ones are too
    short to be checked. overlaps: of the dirty examples, by index.
    """

    examples: int
    clean: dict[str, float]
    dirty: dict[str, float]
    unchecked: int
    overlaps: dict[int, Overlap]
    fingerprints: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "words": [FEWEST_WORDS, MOST_WORDS],
            "corpora": self.fingerprints,
            "clean": self.clean,
            "dirty": self.dirty,
            "unchecked": self.unchecked,
            "overlaps": {str(i): {"words": one.words, "corpus": one.corpus} for i, one in self.overlaps.items()},
        }

    def describe(self) -> str:
        """Return the result in words."""
        if not self.overlaps:
            said = f"none of {self.examples:,} examples occurs in the training text"
        else:
            said = f"{len(self.overlaps):,} of {self.examples:,} examples occur in the training text: score "
            said += ", ".join(
                f"{values['score']:.3f} ({values['score_low']:.3f} to {values['score_high']:.3f}) on the {name} ones"
                for name, values in (("clean", self.clean), ("dirty", self.dirty))
                if values
            )
        if self.unchecked:
            said += f"; {self.unchecked:,} are too short to be checked"
        return said


def clean_and_dirty(scores: Mapping[int, float], overlaps: Overlaps) -> CleanAndDirty:
    """Return the scores of examples apart. scores: by the index of the example."""
    dirty = [score for index, score in scores.items() if index in overlaps.dirty]
    clean = [score for index, score in scores.items() if index not in overlaps.dirty]

    def mean(values: list[float]) -> dict[str, float]:
        return mean_with_interval("score", np.array(values)) | {"examples": len(values)} if values else {}

    return CleanAndDirty(
        examples=len(scores),
        clean=mean(clean),
        dirty=mean(dirty),
        unchecked=sum(index in overlaps.unchecked for index in scores),
        overlaps={index: overlaps.dirty[index] for index in scores if index in overlaps.dirty},
        fingerprints=overlaps.fingerprints,
    )


def check_results(
    results: Results, tasks: Iterable[TaskSpec], corpora: Sequence[Corpus]
) -> dict[tuple[str, int], CleanAndDirty]:
    """Return the scores on clean and dirty examples, by task and number of shots; of several draws, their mean.

    tasks: what the results are of. All tasks are looked for in one pass over the corpora.
    """
    examples: dict[str, dict[int, list[str]]] = {}
    for spec in tasks:
        task = resolve_task(spec)
        name = task_name(spec, task)
        graded = {outcome.index for result in results.tasks if result.task == name for outcome in result.outcomes}
        if isinstance(task, Definition):
            examples[name] = {item.index: texts_of_item(item) for item in task.items() if item.index in graded}
        else:
            examples[name] = {index: texts_of_conversation(task, index) for index in sorted(graded)}
    found = find_overlaps(examples, corpora)
    scores: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results.tasks:
        for outcome in result.outcomes:
            scores[result.task, result.shots][outcome.index].append(outcome.score)
    return {
        (name, shots): clean_and_dirty(
            {index: math.fsum(values) / len(values) for index, values in by_index.items()}, found[name]
        )
        for (name, shots), by_index in scores.items()
    }

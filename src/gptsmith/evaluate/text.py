"""Loss, perplexity and bits per byte of a model on texts of any size, in bounded memory.

A text is cut into windows of the model's context. The next window begins `stride` tokens further on, and only those of
its tokens are scored that no window before it has scored: each token but those of the first window has at least
context - stride tokens before it. This is the recipe in transformers' documentation ("Perplexity of fixed-length
models"). Documents (rows of a table, files of a folder) are scored apart, each as a text of its own.

Axes: B batch, T time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gptsmith.data.sources import DEFAULT_FIELD, DocumentChunk, Source, TextSource, open_source, refuse_useless_field
from gptsmith.errors import DataError, GptsmithError, TokenizerError, UsageError
from gptsmith.evaluate.scores import mean_with_interval, ratio_with_interval
from gptsmith.log import note, progress
from gptsmith.model.config import IGNORED
from gptsmith.model.loss import token_logprobs
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import out_of_memory
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.ids import IdTokenizer

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Prefix = Literal["first", "every"]

TOKENS_AT_ONCE = 4096  # in one forward pass
WINDOWS_AT_ONCE = 64  # read ahead, so that windows of similar lengths share a forward pass
MAX_PARTS = 512  # into which a text is divided for intervals and paired comparisons
PART_BYTES = 256  # the smallest part of a text
ENOUGH_DOCUMENTS = 20  # so many are resampled as documents; of fewer, parts of their text
ENOUGH_PARTS = 8  # of fewer, no interval is given
EARLY, LATE = 50, 500  # the tokens of a context whose losses the in-context score compares
_LN2 = math.log(2)


class Window(NamedTuple):
    """Token ids for one forward pass. scored: (T,) whether the token counts; the first never does.

    offsets: (T,) where each token begins in the text, in bytes. documents: (T,) the document that it belongs to.
    overlap: how many of the first tokens the windows before it have scored.
    """

    ids: Ints
    scored: NDArray[np.bool_]
    offsets: Ints
    documents: Ints
    overlap: int = 0


class _Tokens(NamedTuple):
    """Tokens in the order of the text, as in `Window`. counts: whether a token is part of the text."""

    ids: Ints
    counts: NDArray[np.bool_]
    offsets: Ints
    documents: Ints

    @classmethod
    def of(cls, ids: Sequence[int], counts: bool = True, offset: int = 0, document: int = 0) -> _Tokens:
        size = len(ids)
        array = np.asarray(ids, dtype=np.int64)
        return cls(array, np.full(size, counts), np.full(size, offset), np.full(size, document))

    def part(self, start: int, stop: int | None = None) -> _Tokens:
        chosen = slice(start, stop)
        return _Tokens(self.ids[chosen], self.counts[chosen], self.offsets[chosen], self.documents[chosen])

    def then(self, other: _Tokens) -> _Tokens:
        return _Tokens(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.counts, other.counts]),
            np.concatenate([self.offsets, other.offsets]),
            np.concatenate([self.documents, other.documents]),
        )


def windows(
    pieces: Iterable[_Tokens], *, context: int, stride: int, prefix: Sequence[int] = (), repeat: bool = False
) -> Iterator[Window]:
    """Yield the windows of one text.

    pieces: the tokens of the text. prefix: tokens to put before the text, which are not scored; with `repeat`, before
    each window. A token with nothing before it is not scored either.
    """
    lead = _Tokens.of(prefix, counts=False)
    width = context - len(prefix) if repeat else context
    waiting = _Tokens.of(()) if repeat else lead
    fresh = 0  # the first token that no window has scored

    def window(part: _Tokens, fresh: int) -> Window:
        counts = part.counts.copy()
        counts[:fresh] = False
        whole = lead.then(part._replace(counts=counts)) if repeat else part._replace(counts=counts)
        whole.counts[:1] = False
        return Window(whole.ids, whole.counts, whole.offsets, whole.documents, fresh)

    for piece in pieces:
        waiting = waiting.then(piece)
        while len(waiting.ids) > width:
            yield window(waiting.part(0, width), fresh)
            waiting, fresh = waiting.part(stride), width - stride
    if len(waiting.ids) > fresh:
        yield window(waiting, fresh)


def window_losses(
    model: Transformer, sequence: Iterable[Window], *, tokens_at_once: int = TOKENS_AT_ONCE
) -> Iterator[tuple[Window, Floats]]:
    """Yield each window with the loss of each of its tokens but the first, in nats: (T - 1,), in any order.

    Windows share forward passes of at most `tokens_at_once` tokens, or of fewer where memory runs out. The model is in
    eval mode meanwhile. Raises GptsmithError where a loss is not a number.
    """
    was_training = model.training
    model.eval()
    try:
        waiting: list[Window] = []
        for window in sequence:
            waiting.append(window)
            if len(waiting) == WINDOWS_AT_ONCE:
                yield from _in_batches(model, waiting, tokens_at_once)
                waiting = []
        yield from _in_batches(model, waiting, tokens_at_once)
    finally:
        model.train(was_training)


def _in_batches(model: Transformer, group: list[Window], tokens_at_once: int) -> Iterator[tuple[Window, Floats]]:
    group = sorted((window for window in group if len(window.ids) > 1), key=lambda window: len(window.ids))
    while group:
        rows = len(group)
        while rows > 1 and rows * len(group[rows - 1].ids) > tokens_at_once:
            rows -= 1
        for window, losses in zip(group[:rows], _batch_losses(model, group[:rows]), strict=True):
            if not np.isfinite(losses[window.scored[1:]]).all():
                raise GptsmithError("the model's loss is not a number (NaN or infinite): its weights are damaged.")
            yield window, losses
        group = group[rows:]


@torch.no_grad()
def _batch_losses(model: Transformer, group: list[Window]) -> list[Floats]:
    longest = max(len(window.ids) for window in group)
    ids = torch.zeros(len(group), longest, dtype=torch.int64)
    targets = torch.full((len(group), longest - 1), IGNORED)
    for row, window in enumerate(group):
        ids[row, : len(window.ids)] = torch.from_numpy(window.ids)
        targets[row, : len(window.ids) - 1] = ids[row, 1 : len(window.ids)]
    device = next(model.parameters()).device
    try:
        found = -token_logprobs(model, ids[:, :-1].to(device), targets.to(device))
        losses = found.double().cpu().numpy() if device.type != "mps" else found.cpu().double().numpy()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(group) == 1:
            raise
        half = len(group) // 2
        return _batch_losses(model, group[:half]) + _batch_losses(model, group[half:])
    return [losses[row, : len(window.ids) - 1] for row, window in enumerate(group)]


def text_windows(model: Transformer, ids: Sequence[int], *, window: int, prefix: Sequence[int] = ()) -> list[Window]:
    """Return windows of a text that do not overlap. Arguments as in `mean_loss`; it raises the same."""
    width = max(len(prefix) + 1, min(window, model.config.max_position_embeddings))
    pieces = [_Tokens.of(ids)]
    parts = list(windows(pieces, context=width, stride=width - len(prefix), prefix=prefix, repeat=True))
    if len(ids) < 2 or not any(part.scored.any() for part in parts):
        raise UsageError("the text is too short to measure perplexity: it has fewer than two tokens.")
    return parts


def mean_loss(
    model: Transformer, ids: Sequence[int], *, window: int = 512, prefix: Sequence[int] = ()
) -> tuple[float, int]:
    """Return the mean loss over the tokens of a text, in nats, and their number, in windows that do not overlap.

    window: tokens, at most the model's context. prefix: tokens to put before each window, such as a tokenizer's
    `prefix_ids`; they are not scored. Without any, the first token of each window is not scored. The model's training
    mode is restored. Raises UsageError for a text of fewer than two tokens.
    """
    parts = text_windows(model, ids, window=window, prefix=prefix)
    count = sum(int(part.scored.sum()) for part in parts)
    total = 0.0
    with progress(len(parts), "Measuring perplexity") as bar:
        for part, losses in window_losses(model, parts):
            total += float(losses[part.scored[1:]].sum())
            bar.advance(1)
    return total / count, count


def perplexity(model: Transformer, ids: Sequence[int], *, window: int = 512, prefix: Sequence[int] = ()) -> float:
    """Return exp of `mean_loss`: the effective number of tokens that a model chooses between."""
    return math.exp(mean_loss(model, ids, window=window, prefix=prefix)[0])


# Whole files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextOptions:
    """How a text is cut into windows."""

    context: int | None = None
    """Tokens of a window (default: the model's context)."""
    stride: int | None = None
    """How many tokens further on the next window begins; at most the context (default: half of it)."""
    prefix: Prefix = "first"
    """Where a tokenizer's beginning-of-sequence token stands. first: before the text. every: before each window."""
    join: bool = False
    """Score documents as one text, with the separator token between them, as in training; otherwise apart."""

    def sizes(self, model: Transformer, prefix: int) -> tuple[int, int]:
        """Return the context and the stride. Raise UsageError for impossible ones.

        prefix: the number of tokens that stand before each window.
        """
        limit = model.config.max_position_embeddings
        context = limit if self.context is None else self.context
        if not 2 <= context <= limit:
            raise UsageError(f"--context must be between 2 and the model's context of {limit:,} tokens, not {context}.")
        width = context - prefix
        stride = max(1, width // 2) if self.stride is None else self.stride
        if width < 1:
            raise UsageError(f"--context {context} leaves no room for text after the {prefix} tokens before it.")
        if not 1 <= stride <= width:
            room = f"the context of {context:,} tokens" + (
                f" without the {prefix} before each window" if prefix else ""
            )
            raise UsageError(f"--stride must be between 1 and {room}, so that no token is left out; not {stride}.")
        return context, stride


@dataclass(frozen=True)
class DocumentScore:
    """where: the file and the line or row. loss: in nats per token; None if no token could be scored."""

    where: str
    bytes: int
    tokens: int
    loss: float | None

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.loss is None else self.loss * self.tokens / self.bytes / _LN2


@dataclass
class _Sums:
    """Sums over consecutive parts of a text. Where there would be more than MAX_PARTS, neighbors are added up.

    So the parts follow from the text alone, and two models can be compared part by part. size: how many of the smallest
    parts one has. values: (3, MAX_PARTS): nats, scored tokens, bytes.
    """

    size: int = 1
    values: Floats = field(default_factory=lambda: np.zeros((3, MAX_PARTS)))

    def add(self, row: int, parts: Ints, amounts: Floats | float) -> None:
        if not len(parts):
            return
        while int(parts.max()) // self.size >= MAX_PARTS:
            pairs = self.values.reshape(3, -1, 2).sum(axis=2)
            self.values = np.concatenate([pairs, np.zeros_like(pairs)], axis=1)
            self.size *= 2
        np.add.at(self.values[row], parts // self.size, amounts)

    def used(self) -> Floats:
        """Return (3, N) without the unused parts at the end."""
        present = np.flatnonzero(self.values.any(axis=0))
        return self.values[:, : int(present[-1]) + 1 if len(present) else 0]


@dataclass(frozen=True)
class Parts:
    """What intervals and paired comparisons are computed from: sums over consecutive parts of a text.

    A part is `size` documents or bytes (`unit`). nats: (N,) summed losses. tokens: (N,) scored tokens. bytes: (N,).
    """

    unit: str
    size: int
    nats: Floats
    tokens: Floats
    bytes: Floats


@dataclass(frozen=True)
class TextResult:
    """A model's loss on one text.

    values: loss (nats per scored token), perplexity, bits_per_byte, each with `_low` and `_high` (95%, bootstrap)
    where there is enough text. tokens: of the text. scored_tokens: those with a loss. unknown: how many tokens or
    characters of the text the tokenizer does not know. positions: loss by the place of a token in its window, counted
    from 1: rows (first, last, loss, tokens). in_context: the loss at token 500 minus that at token 50.
    """

    name: str
    sha256: str
    bytes: int
    tokens: int
    scored_tokens: int
    documents: int
    unknown: int
    context: int
    stride: int
    start: tuple[str, ...]
    values: dict[str, float]
    positions: tuple[tuple[int, int, float, int], ...]
    in_context: dict[str, float]
    parts: Parts
    script_perplexity: float | None = None
    per_document: tuple[DocumentScore, ...] = ()

    @property
    def loss(self) -> float:
        return self.values["loss"]

    @property
    def perplexity(self) -> float:
        return self.values["perplexity"]

    @property
    def bits_per_byte(self) -> float:
        return self.values["bits_per_byte"]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data, from which `gptsmith compare` works too."""
        values: dict[str, Any] = {
            "name": self.name,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "scored_tokens": self.scored_tokens,
            "documents": self.documents,
            "unknown": self.unknown,
            "context": self.context,
            "stride": self.stride,
            "start": list(self.start),
            **self.values,
            "script_perplexity": self.script_perplexity,
            "positions": [
                {"first": first, "last": last, "loss": loss, "tokens": tokens}
                for first, last, loss, tokens in self.positions
            ],
            "in_context": self.in_context or None,
            "parts": {
                "unit": self.parts.unit,
                "size": self.parts.size,
                "nats": self.parts.nats.tolist(),
                "tokens": self.parts.tokens.astype(int).tolist(),
                "bytes": self.parts.bytes.astype(int).tolist(),
            },
        }
        if self.per_document:
            values["per_document"] = [
                {
                    "where": each.where,
                    "bytes": each.bytes,
                    "tokens": each.tokens,
                    "loss": each.loss,
                    "bits_per_byte": each.bits_per_byte,
                }
                for each in self.per_document
            ]
        return values


def evaluate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str | Path | Source,
    *,
    field: str = DEFAULT_FIELD,
    options: TextOptions | None = None,
    per_document: bool = False,
) -> TextResult:
    """Return a model's loss on a file, a folder or a named corpus, read in bounded memory.

    Before a text stand the tokens that the tokenizer puts there (beginning of sequence); before a document, where there
    are none, stands the separator token, as in training. They are not scored. `bits_per_byte` is loss × tokens of the
    text / bytes of the text: comparable between tokenizers.

    field: the field of rows with the text. per_document: also return each document's loss.
    Raises UsageError for a text of fewer than two tokens and impossible options, DataError for what is not text,
    TokenizerError for characters that the tokenizer lacks, naming them and the place.
    """
    return evaluate_texts(model, tokenizer, [text], field=field, options=options, per_document=per_document)[0]


def evaluate_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str | Path | Source],
    *,
    field: str = DEFAULT_FIELD,
    options: TextOptions | None = None,
    per_document: bool = False,
) -> list[TextResult]:
    """Return the result of `evaluate_text` for each text. Options are checked for all before any is measured."""
    sources = [text if isinstance(text, Source) else open_source(text, field=field) for text in texts]
    if sources:
        refuse_useless_field(field, *sources)
    if isinstance(tokenizer, IdTokenizer):
        note("note: the model has no tokenizer: bits per byte are those of numbers, and comparable with nothing.")
    measurements = [
        _Measurement(model, tokenizer, source, options or TextOptions(), per_document) for source in sources
    ]
    return [each.run() for each in measurements]


class _Measurement:
    """The evaluation of one text."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, source: Source, options: TextOptions, per_document: bool
    ) -> None:
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self.apart = not (isinstance(source, TextSource) and not source.is_document) and not options.join
        end = tokenizer.eos_id  # which the model may lack
        self.separator = () if end is None or end >= tokenizer.vocab_size else (end,)
        self.prefix = tuple(tokenizer.prefix_ids) or (self.separator if self.apart else ())
        self.repeat = options.prefix == "every"
        self.context, self.stride = options.sizes(model, len(self.prefix) if self.repeat else 0)
        self.keep_documents = per_document
        self.documents = self.bytes = self.tokens = self.unknown = self.unknown_total = 0
        self.by_bytes, self.by_document = _Sums(), _Sums()
        self.by_position = np.zeros((2, self.context))  # nats, tokens
        self.differences: list[float] = []
        self.script = np.zeros(2)  # nats and tokens as the script in transformers' documentation weighs them
        self.scores: dict[int, list[Any]] = {}  # document -> where, bytes, tokens, nats, scored tokens
        self._lengths: dict[int, int] = {}

    def run(self) -> TextResult:
        with progress(self.source.size_bytes, f"Evaluating {self.source.name}", "B") as bar:
            read, shown = 0, 0.0

            def count(amount: int) -> None:
                nonlocal read
                read += amount

            done = 0
            sequence = (window for pieces in self._texts(count) for window in self._windows(pieces))
            for window, losses in window_losses(self.model, sequence):
                self._add(window, losses)
                done += int(window.scored.sum())
                # A file is read ahead of what is scored; a compressed one has fewer bytes than its text.
                now = min(read, self.bytes) * min(1.0, done / max(1, self.tokens))
                bar.advance(max(0.0, now - shown))
                shown = max(shown, now)
        return self._result()

    # Tokens -----------------------------------------------------------------------------------------------------------

    def _texts(self, advance: Callable[[int], None]) -> Iterator[Iterator[_Tokens]]:
        """Yield the pieces of each text that is scored by itself."""
        chunks = self.source.chunks(advance)
        if not self.apart:
            yield (self._tokens(chunk, continues) for chunk, continues in _with_place(chunks))
            return
        first: DocumentChunk | None
        while (first := next(chunks, None)) is not None:

            def document(chunk: DocumentChunk) -> Iterator[_Tokens]:
                continues = False
                while True:
                    yield self._tokens(chunk, continues)
                    if chunk.ends_document:
                        return
                    following = next(chunks, None)
                    if following is None:
                        return
                    chunk, continues = following, True

            yield document(first)

    def _windows(self, pieces: Iterator[_Tokens]) -> Iterator[Window]:
        return windows(pieces, context=self.context, stride=self.stride, prefix=self.prefix, repeat=self.repeat)

    def _tokens(self, chunk: DocumentChunk, continues: bool) -> _Tokens:
        """Return the tokens of a chunk, and count it. continues: whether text of the same document precedes it."""
        try:
            ids = _encode(self.tokenizer, chunk.text, continues)
        except TokenizerError as error:
            raise TokenizerError(f"{chunk.where}: {error}") from None
        size = len(chunk.text.encode("utf-8"))
        self._count_unknown(chunk.text, ids)
        lengths = np.array([self._length(id) for id in ids], np.int64)
        ends = np.cumsum(lengths)
        scale = size / max(1, int(ends[-1])) if len(ids) else 1.0  # not 1 where the tokenizer changes the text
        offsets = self.bytes + ((ends - lengths) * scale).astype(np.int64)
        tokens = _Tokens(
            np.array(ids, np.int64), np.ones(len(ids), np.bool_), offsets, np.full(len(ids), self.documents)
        )
        self.by_document.add(2, np.array([self.documents]), size)
        edges = np.arange(self.bytes // PART_BYTES, (self.bytes + size - 1) // PART_BYTES + 1)
        within = np.minimum((edges + 1) * PART_BYTES, self.bytes + size) - np.maximum(edges * PART_BYTES, self.bytes)
        self.by_bytes.add(2, edges, within.astype(float))
        self.bytes += size
        self.tokens += len(ids)
        if self.keep_documents:
            score = self.scores.setdefault(self.documents, [chunk.where, 0, 0, 0.0, 0])
            score[1] += size
            score[2] += len(ids)
        if chunk.ends_document:
            self.documents += 1
            if not self.apart:
                tokens = tokens.then(_Tokens.of(self.separator, False, self.bytes, self.documents - 1))
        return tokens

    def _length(self, id: int) -> int:
        length = self._lengths.get(id)
        if length is None:
            length = self._lengths[id] = len(self.tokenizer.token_bytes(id, self.tokenizer.inner_token))
        return length

    def _count_unknown(self, text: str, ids: Sequence[int]) -> None:
        if self.tokenizer.covers_all_text:
            return
        if self.tokenizer.replaces_unknown:
            self.unknown += sum(id == self.tokenizer.unk_id for id in ids)
            self.unknown_total += len(ids)
        elif self.tokenizer.kind != "char":  # which raises
            self.unknown += sum(len(part) * count for part, count in self.tokenizer.count_unknown(text).items())
            self.unknown_total += len(text)

    # Losses -----------------------------------------------------------------------------------------------------------

    def _add(self, window: Window, losses: Floats) -> None:
        scored = window.scored[1:]
        found, offsets, documents = losses[scored], window.offsets[1:][scored], window.documents[1:][scored]
        for sums, parts in ((self.by_bytes, offsets // PART_BYTES), (self.by_document, documents)):
            sums.add(0, parts, found)
            sums.add(1, parts, 1.0)
        if len(found):
            tokens = len(found) - (window.overlap > 0)
            self.script += (found.mean() * tokens, tokens)
        if self.keep_documents:
            for document in np.unique(documents).tolist():
                chosen = documents == document
                self.scores[document][3] += float(found[chosen].sum())
                self.scores[document][4] += int(chosen.sum())
        places = np.arange(1, len(window.ids))
        self.by_position[0, places] += losses
        self.by_position[1, places] += 1
        if len(window.ids) >= LATE:
            self.differences.append(float(losses[LATE - 2] - losses[EARLY - 2]))

    def _result(self) -> TextResult:
        if self.source.skipped_rows.count:
            note(f"{self.source.spec}: {self.source.skipped_rows.describe()}")
        scored = int(self.by_bytes.values[1].sum())
        if not self.bytes:
            raise DataError(f"{self.source.spec} holds no text.")
        if not scored:
            raise UsageError(f"{self.source.spec} is too short to measure: it has fewer than two tokens.")
        if self.unknown:
            kind = "tokens" if self.tokenizer.replaces_unknown else "characters"
            what = "count as the unknown token" if self.tokenizer.replaces_unknown else "are left out"
            note(
                f"note: {self.source.spec}: {self.unknown:,} of {self.unknown_total:,} {kind} are unknown to the "
                f"tokenizer and {what}: the loss is too low, and bits per byte are not comparable."
            )
        by_document = self.documents >= ENOUGH_DOCUMENTS
        sums = self.by_document if by_document else self.by_bytes
        nats, tokens, sizes = sums.used()
        unit, size = ("documents", 1) if by_document else ("bytes", PART_BYTES)
        parts = Parts(unit, size * sums.size, nats, tokens, sizes)
        loss = float(nats.sum()) / scored
        rate = self.tokens / self.bytes / _LN2
        enough = len(nats) >= ENOUGH_PARTS
        values = ratio_with_interval("loss", nats, tokens) if enough else {"loss": loss}
        for name, value in list(values.items()):
            values[name.replace("loss", "perplexity")] = math.exp(min(value, 700.0))
        per_byte = (
            ratio_with_interval("bits_per_byte", nats * self.tokens / scored / _LN2, sizes)
            if enough
            else {"bits_per_byte": loss * rate}
        )
        special = self.tokenizer.special_tokens()
        return TextResult(
            name=self.source.spec,
            sha256=self.source.fingerprint(),
            bytes=self.bytes,
            tokens=self.tokens,
            scored_tokens=scored,
            documents=max(1, self.documents),
            unknown=self.unknown,
            context=self.context,
            stride=self.stride,
            start=tuple(special.get(id, str(id)) for id in self.prefix),
            values=values | per_byte,
            positions=_position_rows(self.by_position),
            in_context=_in_context_score(self.differences),
            parts=parts,
            script_perplexity=self._script_perplexity(),
            per_document=tuple(
                DocumentScore(where, size, tokens, nats / count if count else None)
                for where, size, tokens, nats, count in self.scores.values()
            ),
        )

    def _script_perplexity(self) -> float | None:
        nats, tokens = self.script.tolist()
        if self.apart or self.repeat or not tokens:
            return None
        return math.exp(min(nats / tokens, 700.0))


def _with_place(chunks: Iterable[DocumentChunk]) -> Iterator[tuple[DocumentChunk, bool]]:
    """Yield each chunk, and whether it continues the document of the one before."""
    continues = False
    for chunk in chunks:
        yield chunk, continues
        continues = not chunk.ends_document


def _encode(tokenizer: Tokenizer, text: str, continues: bool) -> list[int]:
    """Return the ids of a part of a text. continues: whether other text precedes it.

    Some tokenizers put a space before a text. In the middle of one, where it does not belong, a word takes its place
    and is cut off again.
    """
    if continues and tokenizer.kind == "other":
        with contextlib.suppress(TokenizerError):
            word, both = tokenizer.encode("a"), tokenizer.encode(f"a{text}")
            if both[: len(word)] == word:
                return both[len(word) :]
    return tokenizer.encode(text)


def _position_rows(sums: Floats) -> tuple[tuple[int, int, float, int], ...]:
    """Return the loss by the place in the window, in groups that grow with the distance: four in each doubling."""
    rows = []
    first = 2
    while first <= sums.shape[1]:
        last = min(max(first, int(first * 2**0.25) - 1), sums.shape[1])
        total, count = sums[:, first - 1 : last].sum(axis=1).tolist()
        if count:
            rows.append((first, last, total / count, int(count)))
        first = last + 1
    return tuple(rows)


def _in_context_score(differences: Sequence[float]) -> dict[str, float]:
    """Return the mean loss at token 500 minus that at token 50 (Olsson et al. 2022), {} without such windows."""
    if not differences:
        return {}
    values = np.array(differences)
    found = mean_with_interval("score", values) if len(values) >= ENOUGH_PARTS else {"score": float(values.mean())}
    return found | {"windows": float(len(values))}


# Induction ------------------------------------------------------------------------------------------------------------


def induction(
    model: Transformer, tokenizer: Tokenizer, *, length: int | None = None, sequences: int = 64, seed: int = 0
) -> dict[str, float]:
    """Return how well a model copies random tokens: it reads `length` of them twice.

    accuracy: how often the most probable token is right in the second reading, with its interval over sequences.
    first_loss, second_loss: nats per token in the two readings. The tokens are drawn evenly from the tokenizer's own,
    without special ones; the tokenizer's prefix comes before them. The first token of a reading does not count.

    length: at most half the context; default: 64, or as many as fit. Raises UsageError for a length that does not fit.
    """
    room = (model.config.max_position_embeddings - len(tokenizer.prefix_ids)) // 2
    length = min(64, room) if length is None else length
    if not 2 <= length <= room:
        raise UsageError(f"the random tokens must be 2 to {room} (twice must fit the context), not {length}.")
    usable = np.array([id for id in range(tokenizer.vocab_size) if id not in tokenizer.added_ids])
    drawn = np.random.default_rng(seed).choice(usable, (sequences, length))
    start = len(tokenizer.prefix_ids)
    right, losses = [], []
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with progress(sequences, "Measuring induction") as bar, torch.no_grad():
            for row in drawn.tolist():
                ids = torch.tensor([[*tokenizer.prefix_ids, *row, *row]], device=device)
                logprobs = model(ids[:, :-1])[0].float().log_softmax(dim=-1)
                targets = ids[0, 1:]
                losses.append(-logprobs.gather(1, targets[:, None])[:, 0].double().cpu().numpy())
                right.append((logprobs.argmax(dim=-1) == targets).cpu().numpy())
                bar.advance(1)
    finally:
        model.train(was_training)
    first, second = slice(start, start + length - 1), slice(start + length, start + 2 * length - 1)
    accuracy = np.array([each[second].mean() for each in right])
    return {
        **mean_with_interval("accuracy", accuracy),
        "first_loss": float(np.mean([each[first] for each in losses])),
        "second_loss": float(np.mean([each[second] for each in losses])),
        "length": length,
        "sequences": sequences,
        "seed": seed,
    }

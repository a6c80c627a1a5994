"""The tokenizer: a `tokenizer.json` (Hugging Face `tokenizers`), with exact and incremental decoding.

A tokenizer is saved exactly as it was loaded, and the same file loads in `transformers.PreTrainedTokenizerFast` with
the same ids. There are three kinds:

- `char`: one id per Unicode code point (made by `train_char`). Encoding uses a lookup table, without `tokenizers`.
- `bpe`: byte-level byte-pair encoding (Radford et al. 2019). Every text has ids, and they decode to exactly that text.
- `other`: any other `tokenizer.json`, used as it is.

Text never becomes a special token: "<|endoftext|>" in a text is thirteen ordinary characters. Some tokenizers put
special tokens around a text, mostly a beginning-of-sequence token before it; `encode_prompt` does so, and `encode` does
not.
"""

from __future__ import annotations

import codecs
import copy
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gptsmith.errors import TokenizerError
from gptsmith.storage import write_text

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"  # the document separator: GPT-2's name for it
UNKNOWN = "<|unk|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE, MODEL_FILE = "generation_config.json", "config.json"  # which name further end tokens

END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_NO_ID = np.uint32(0xFFFFFFFF)

UNKNOWN_ADVICE = (
    "Remove or replace it, train the tokenizer with --unknown, or use --tokenizer bpe, which covers all text."
)

# Each character is a token: no normalization, split after every code point, look each up, join without spaces.
CHAR_PIPELINE: dict[str, Any] = {
    "normalizer": None,
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False},
    "decoder": {"type": "Fuse"},
}


class UnknownTextError(TokenizerError):
    """Text for which a tokenizer has neither tokens nor an unknown token. problem: the message without the advice."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem} {UNKNOWN_ADVICE}")
        self.problem = problem


class Tokenizer:
    """A tokenizer that is described by a tokenizer.json. Immutable and picklable.

    kind: "char", "bpe" or "other". vocab_size: ids are 0 ... vocab_size - 1. eos_id: the document separator (None if
    there is none). end_ids: the tokens at which generated text ends; the first is eos_id. bos_id: the token that stands
    for the beginning of a text (None if there is none). prefix_ids, suffix_ids: what `encode_prompt` puts around a
    text. added_ids: tokens that are not the model's own (special ones, and others that are found in a text as a whole).
    unk_id: the unknown token (None if there is none). replaces_unknown: whether text without tokens becomes the
    unknown token. covers_all_text: whether there is no such text. spaces_words: whether decoding puts spaces between
    words, punctuation included. fingerprint: sha256 (hex) of the canonical
    tokenizer.json.
    """

    kind: Literal["char", "bpe", "other"]
    vocab_size: int
    eos_id: int | None
    end_ids: tuple[int, ...]
    bos_id: int | None
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    added_ids: frozenset[int]
    unk_id: int | None
    replaces_unknown: bool
    covers_all_text: bool
    spaces_words: bool
    fingerprint: str

    def __init__(self, text: str, config: Mapping[str, Any] | None = None, end_ids: Iterable[int] = ()) -> None:
        """Create it from the text of a tokenizer.json and the values of its tokenizer_config.json.

        end_ids: tokens at which the model ends a text, besides the configuration's eos_token; without an eos_token the
        first of them is the document separator.
        Raises TokenizerError if the text is not a tokenizer.json.
        """
        from tokenizers import Tokenizer as Pipeline

        try:
            description = json.loads(text)
            self._pipeline: tokenizers.Tokenizer = Pipeline.from_str(text)
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise TokenizerError(f"not a tokenizer.json: {error}.") from None
        self._pipeline.encode_special_tokens = True  # text never becomes a special token
        self._pipeline.no_padding()
        self._pipeline.no_truncation()
        self._text = text
        self._config = dict(config or {})
        self.kind = _kind(description)
        canonical = json.dumps(description, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

        vocabulary = self._pipeline.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._pipeline.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self._special = {id: token.content for id, token in added.items() if token.special}
        self._is_limited = False
        self._further_end_ids = tuple(id for id in end_ids if 0 <= id < self.vocab_size)
        self.eos_id = _token_id(vocabulary, self._config.get("eos_token"))
        if self.eos_id is None:
            contents = set(self._special.values())
            ends = (*self._further_end_ids, *(vocabulary[token] for token in END_TOKENS if token in contents))
            self.eos_id = next(iter(ends), None)
        self.end_ids = tuple(dict.fromkeys(() if self.eos_id is None else (self.eos_id, *self._further_end_ids)))
        self.prefix_ids, self.suffix_ids = _added_ids(description.get("post_processor") or {})
        self.bos_id = _token_id(vocabulary, self._config.get("bos_token"))
        if self.bos_id is None and len(self.prefix_ids) == 1:
            (self.bos_id,) = self.prefix_ids
        unknown = description["model"].get("unk_token")
        self.unk_id = _token_id(vocabulary, unknown if isinstance(unknown, str) else self._config.get("unk_token"))
        if description["model"].get("type") == "Unigram":
            unknown = description["model"].get("unk_id")
            self.unk_id = unknown if isinstance(unknown, int) else None
        self.replaces_unknown = unknown is not None and self.unk_id is not None
        if self.kind == "char":
            self._code_points = _code_point_table(description["model"]["vocab"], self._special)
        elif self.kind == "bpe":
            self._token_bytes: dict[int, bytes] = {}  # filled as needed
        decoder = json.dumps(description.get("decoder"))
        self._byte_fallback = '"ByteFallback"' in decoder
        self._word_end = _word_end(description.get("decoder") or {})
        self.spaces_words = bool(self._word_end) or '"WordPiece"' in decoder
        needed = _BYTE_OF_CHARACTER.keys() if self.kind == "bpe" else {f"<0x{byte:02X}>" for byte in range(256)}
        has_bytes = self.kind == "bpe" or bool(description["model"].get("byte_fallback"))
        self.covers_all_text = has_bytes and vocabulary.keys() >= needed
        self._encoder: tokenizers.Tokenizer = self._pipeline
        self._encoder_ids: dict[int, int] = {}  # where they differ from the tokenizer's own; see `hidden_tokens`
        if description["model"].get("type") in ("Unigram", "WordLevel") and self.kind == "other":
            self._encoder = hidden_tokens(description, set(self._special.values()))
            self._encoder_ids = own_ids(self._encoder, self.added_tokens())
        self._model: dict[str, Any] = {key: value for key, value in description["model"].items() if key != "merges"}
        self._decoded: dict[int | None, str] = {}  # texts of single tokens; see `token_bytes`
        self._has_token: dict[str, bool] = {}  # of parts of texts; see `count_unknown`

    # text to ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, without adding any.

        Raises TokenizerError for text that has no ids, naming the character and where it is.
        """
        if self.kind == "char":
            ids: list[int] = self.encode_array(text).tolist()
            return ids
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text for a model to continue: as `tokenizer(text)` of transformers, with the tokens that
        the tokenizer puts around a text.

        Where the text begins with the spelling of these tokens ("<s>Once"), they are not added a second time.
        Raises TokenizerError as `encode` does.
        """
        for id in self.prefix_ids:
            text = text.removeprefix(self._special.get(id, ""))
        return [*self.prefix_ids, *self.encode(text), *self.suffix_ids]

    def limited_to(self, rows: int) -> Tokenizer:
        """Return this tokenizer for a model that has only ids below `rows`: other tokens are errors in texts."""
        other = copy.copy(self)
        other.vocab_size, other._is_limited = min(rows, self.vocab_size), rows < self.vocab_size
        other.end_ids = tuple(id for id in self.end_ids if id < rows)
        return other

    def without_added_tokens(self) -> Tokenizer:
        """Return this tokenizer with an `encode_prompt` that adds nothing to a text."""
        if not self.prefix_ids and not self.suffix_ids:
            return self
        config = {key: value for key, value in self._config.items() if key not in ("add_bos_token", "add_eos_token")}
        return Tokenizer(with_added_tokens(self._text, {}, {}), config, self._further_end_ids)

    def encode_array(self, text: str) -> np.ndarray:
        """Return the same ids as a (number of tokens,) uint32 array."""
        if self.kind != "char":
            return np.array(self.encode(text), dtype=np.uint32)
        try:
            codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        except UnicodeEncodeError as error:
            raise _surrogate(text, error.start) from None
        table = self._code_points  # its last entry stands for all higher code points
        ids: np.ndarray = table[np.minimum(codes, len(table) - 1)]
        unknown = ids == _NO_ID
        if unknown.any():
            if self.unk_id is None:
                raise _unknown_character(text, int(unknown.argmax()), len(self._special), self.vocab_size)
            ids[unknown] = self.unk_id
        if self._is_limited:
            self._refuse_ids_beyond(ids.tolist())
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts, in parallel where the kind allows it."""
        if self.kind == "char":
            return [self.encode(text) for text in texts]
        try:
            encoded: list[list[int]] = [
                each.ids for each in self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        except Exception as error:  # `tokenizers` raises bare Exceptions
            for text in texts:
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as surrogate:
                    raise _surrogate(text, surrogate.start) from None
            if not self.replaces_unknown:
                raise UnknownTextError(f"the tokenizer cannot encode this text: {error}.") from None
            raise TokenizerError(f"the tokenizer cannot encode this text: {error}.") from None
        if self._encoder_ids:
            encoded = [[self._encoder_ids.get(id, id) for id in ids] for ids in encoded]
        if self._is_limited:
            for ids in encoded:
                self._refuse_ids_beyond(ids)
        return encoded

    def _refuse_ids_beyond(self, ids: list[int]) -> None:
        """Raise TokenizerError for an id that the model does not have; see `limited_to`."""
        largest = max(ids, default=0)
        if largest >= self.vocab_size:
            raise TokenizerError(
                f"the text has the token {self._pipeline.id_to_token(largest)!r} ({largest}), which the model does not "
                f"have: its ids go from 0 to {self.vocab_size - 1}."
            )

    def count_unknown(self, text: str) -> Counter[str]:
        """Return the parts of the text that have no token of their own, and how often each occurs.

        They become the unknown token; without one they cannot be encoded, or the tokenizer leaves them out. The parts
        are characters, or whatever the tokenizer replaces as a whole (a word, a run of characters). For kinds "bpe"
        and "other" without an unknown token, they are found by looking up each character or word on its own.
        """
        if self.covers_all_text:
            return Counter()
        if self.kind == "char":
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
            table = self._code_points
            found, counts = np.unique(codes[table[np.minimum(codes, len(table) - 1)] == _NO_ID], return_counts=True)
            return Counter(dict(zip(map(chr, found.tolist()), counts.tolist(), strict=True)))
        if self.replaces_unknown:
            encoding = self._encoder.encode(text, add_special_tokens=False)
            places = np.flatnonzero(np.array(encoding.ids) == self.unk_id).tolist()
            return Counter(text[slice(*encoding.offsets[place])] for place in places) if places else Counter()
        if self._model["type"] in ("WordLevel", "WordPiece"):
            return Counter(word for word in self._split_words(text) if not self._is_known(word))
        return Counter(
            {character: text.count(character) for character in sorted(set(text)) if not self._is_known(character)}
        )

    def _is_known(self, part: str) -> bool:
        """Return whether a character, or a word of a model of whole words, is in the vocabulary."""
        known = self._has_token.get(part)
        if known is None:
            if self._model["type"] in ("WordLevel", "WordPiece"):
                known = self._pipeline.token_to_id(part) is not None
            else:
                before = ("", self._model.get("continuing_subword_prefix") or "")
                after = ("", self._model.get("end_of_word_suffix") or "")
                known = all(
                    any(self._pipeline.token_to_id(a + character + b) is not None for a in before for b in after)
                    for character in "".join(self._split_words(part)).replace("\u2581", "")
                )
            self._has_token[part] = known
        return known

    def _split_words(self, text: str) -> list[str]:
        """Return the words that the model of the tokenizer sees, after normalization and pre-tokenization."""
        normalizer, splitter = self._pipeline.normalizer, self._pipeline.pre_tokenizer
        normalized: str = text if normalizer is None else normalizer.normalize_str(text)
        return [normalized] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(normalized)]

    # ids to text

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of the ids. Bytes that are not UTF-8 become U+FFFD.

        Raises TokenizerError for an id out of range.
        """
        checked = [self._check(id) for id in ids]
        text: str = self._pipeline.decode(checked, skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, *, skip_special_tokens: bool = True, previous: int | None = None) -> StreamDecoder:
        """Return a decoder that takes one id at a time. previous: the token that the text continues, if any."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens, previous=previous)

    def vocabulary(self) -> dict[str, int]:
        """Return all tokens, added ones included, as {token: id}."""
        return self._pipeline.get_vocab(with_added_tokens=True)

    def special_tokens(self) -> dict[int, str]:
        """Return the tokens that no text becomes, as {id: content}."""
        return dict(self._special)

    def added_tokens(self) -> dict[str, int]:
        """Return the tokens that are not the model's own, special ones included, as {content: id}."""
        return {token.content: id for id, token in self._pipeline.get_added_tokens_decoder().items()}

    def added_token(self, id: int) -> tokenizers.AddedToken:
        """Return one of these tokens with its flags."""
        return self._pipeline.get_added_tokens_decoder()[id]

    def token_bytes(self, id: int, previous: int | None = None) -> bytes:
        """Return the bytes that a token adds to a text after the token `previous` (None: at its beginning).

        The bytes of all tokens of a text, joined, are the text, but for bytes that are not UTF-8. Only for kind "other"
        do they depend on `previous`: "▁who" adds "who" at the beginning of a text and " who" later.
        """
        id = self._check(id)
        if self.kind == "bpe":
            return self._bytes(id)
        token: str = self._pipeline.id_to_token(id) or ""
        if self.kind == "char" or id in self._special:
            return token.encode("utf-8")
        byte = self._byte_of(id)
        if byte is not None and (byte >= 0x80 or previous is not None):  # a decoder may drop a space at the beginning
            return bytes([byte])
        before: list[int] = [] if previous is None else [previous]
        start = self._decoded.get(previous)
        if start is None:
            start = self._decoded[previous] = self._pipeline.decode(before, skip_special_tokens=False)
        text: str = self._pipeline.decode([*before, id], skip_special_tokens=False)
        return text[len(start) :].encode("utf-8")

    def follows_word(self, previous: int | None) -> bool:
        """Return whether a token after `previous` (None: at the beginning of a text) is written as in the middle of a
        text, where `token_bytes` may put a space before a word. It depends on nothing else."""
        if self._word_end:
            return previous is not None and (self._pipeline.id_to_token(previous) or "").endswith(self._word_end)
        return previous is not None

    @functools.cached_property
    def inner_token(self) -> int | None:
        """A token for `token_bytes` to take as `previous` in the middle of a text; None where there is no need."""
        if self.kind != "other":
            return None
        ids = (id for id in range(self.vocab_size) if id not in self._special and self.follows_word(id))
        return next((id for id in ids if self.token_bytes(id)), None)

    def token_text(self, id: int) -> str:
        """Return a token's text for display, as it is in the middle of a text; see `readable`."""
        return readable(self.token_bytes(id, None if self._word_end else self.inner_token))

    # files

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into `directory`, in the form that transformers reads.

        End tokens that these files cannot name are written into a generation_config.json, if there is none.
        """
        write_text(Path(directory) / TOKENIZER_FILE, self._text)
        write_text(Path(directory) / CONFIG_FILE, json.dumps(self.config(), indent=2, ensure_ascii=False) + "\n")
        if self._further_end_ids and not (Path(directory) / GENERATION_FILE).exists():
            values = {"eos_token_id": list(self.end_ids)}
            write_text(Path(directory) / GENERATION_FILE, json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Load the tokenizer saved in `directory`, with the end tokens of a model that is saved there.

        Raises TokenizerError naming a file that is missing or damaged.
        """
        path = Path(directory) / TOKENIZER_FILE
        config_path = Path(directory) / CONFIG_FILE
        if not path.is_file():
            raise TokenizerError(f"no tokenizer in {directory}: {path} does not exist.")
        text = read_file(path)
        try:
            return cls(text, read_object(config_path), model_end_ids(directory))
        except TokenizerError as error:
            raise TokenizerError(f"{path} is {error} The file is damaged, or does not describe a tokenizer.") from None

    def to_json(self) -> str:
        """Return the text of tokenizer.json."""
        return self._text

    @classmethod
    def from_json(cls, text: str, config: Mapping[str, Any] | None = None, end_ids: Iterable[int] = ()) -> Tokenizer:
        """Create a tokenizer as the constructor does."""
        return cls(text, config, end_ids)

    def config(self) -> dict[str, Any]:
        """Return the values of tokenizer_config.json: the loaded ones, or some that suit transformers."""
        if self._config:
            return dict(self._config)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.eos_id is not None:
            config["bos_token"] = config["eos_token"] = self._pipeline.id_to_token(self.eos_id)
        if self.unk_id is not None:
            config["unk_token"] = self._pipeline.id_to_token(self.unk_id)
        return config

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, dict[str, Any], tuple[int, ...]]]:
        return type(self), (self._text, self._config, self._further_end_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"<Tokenizer {self.kind}, {self.vocab_size:,} tokens>"

    # one token

    def _check(self, id: int) -> int:
        value = int(id)
        if not 0 <= value < self.vocab_size:
            raise TokenizerError(f"{value} is not a token id: ids go from 0 to {self.vocab_size - 1}.")
        return value

    def _byte_of(self, id: int) -> int | None:
        """Return the byte that a token such as "<0x57>" stands for; None for other tokens."""
        token = (self._pipeline.id_to_token(id) or "") if self._byte_fallback else ""
        return int(token[3:5], 16) if _BYTE_TOKEN.fullmatch(token) else None

    def _bytes(self, id: int) -> bytes:
        """Return the bytes that a token of a byte-level tokenizer stands for."""
        value = self._token_bytes.get(id)
        if value is None:
            token = self._pipeline.id_to_token(id) or ""
            try:
                value = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token, which is written as plain text
                value = token.encode("utf-8")
            self._token_bytes[id] = value
        return value


class StreamDecoder:
    """Decode one id at a time. The returned texts, joined, equal `decode` of all the ids.

    Text is returned as soon as it is certain: bytes of an incomplete character are held back until it is complete.
    previous: the token before the text, which it continues (None: it is a text of its own); for kind "other", whose
    first token may be written differently. positions: after each call, where the tokens begin whose place has become
    certain with it, in order, counted from the beginning of the returned text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, previous: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer._special) if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip_special_tokens = skip_special_tokens
        before: list[int] = []
        if previous is not None and tokenizer.kind == "other" and previous not in self._skipped:
            # A byte token would form a run with bytes at the beginning of the text.
            other = previous if tokenizer._byte_of(previous) is None else tokenizer.inner_token
            before = [] if other is None else [other]
        self._ids: list[int] = before  # kind "other": the tokens that were returned last, and those after them
        self._num_returned = len(before)  # how many of `_ids` were returned
        self._run: list[int | None] = []  # the bytes of a run at the end of `_ids`; None for a token that is left out
        self.positions: list[int] = []

    def push(self, id: int) -> str:
        """Return the text that this id completes, which may be empty. Raises TokenizerError for an id out of range."""
        tokenizer = self._tokenizer
        id = tokenizer._check(id)
        self.positions = [] if self._run else [0]
        if id in self._skipped:
            if self._run:
                self._run.append(None)
            return ""
        if tokenizer.kind == "bpe":
            return self._utf8.decode(tokenizer._bytes(id))
        if tokenizer.kind == "char":
            return tokenizer.token_text(id)
        if (byte := tokenizer._byte_of(id)) is not None:
            self._ids.append(id)  # such a decoder decodes a run of bytes as a whole: wait for the end of the run
            self._run.append(byte)
            self.positions = []
            return ""
        run = self._end_run()
        self._ids.append(id)
        self.positions.append(len(run))
        return run + self._new_text(final=False)

    def copy(self) -> StreamDecoder:
        """Return an independent decoder in the same state."""
        other = copy.copy(self)
        other._utf8, other._ids, other._run = copy.copy(self._utf8), list(self._ids), list(self._run)
        return other

    def finish(self) -> str:
        """Return the text that is still held back (U+FFFD for an incomplete character), and start over."""
        text = self._utf8.decode(b"", final=True) + self._end_run()
        if self._num_returned < len(self._ids):
            text += self._new_text(final=True)
        self._utf8.reset()
        self._ids, self._num_returned = [], 0
        return text

    def _end_run(self) -> str:
        """Return the text of a run of byte tokens, which has ended, and set the positions of its tokens."""
        self.positions = []
        if not self._run:
            return ""
        text, run = self._new_text(final=True), bytes(byte for byte in self._run if byte is not None)
        try:
            starts = [index for index, character in enumerate(run.decode("utf-8")) for _ in character.encode("utf-8")]
        except UnicodeDecodeError:
            starts = list(range(len(run)))  # the decoder writes one U+FFFD for each byte
        place = 0
        for byte in self._run:
            self.positions.append(min([*starts, len(text)][place], len(text)))
            place += byte is not None
        self._run = []
        return text

    def _new_text(self, final: bool) -> str:
        """Return how the text grew, for kind "other".

        A decoder may treat the first token of a text specially (drop a space), so the tokens that were returned last
        are decoded again together with the new ones.
        """
        before = self._decode(self._ids[: self._num_returned])
        after = self._decode(self._ids)
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._ids, self._num_returned = self._ids[self._num_returned :], len(self._ids) - self._num_returned
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def model_end_ids(directory: Path) -> tuple[int, ...]:
    """Return the end tokens that generation_config.json and config.json name, as a number or a list.

    Raises TokenizerError for a file that is damaged.
    """
    ids: list[Any] = []
    for name in (GENERATION_FILE, MODEL_FILE):
        value = read_object(Path(directory) / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(id for id in ids if type(id) is int))


def read_file(path: Path) -> str:
    """Read a UTF-8 file, without a byte-order mark. Raises TokenizerError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot read {path}: {error}.") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Return an empty one if there is no such file. Raises TokenizerError."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"cannot read {path}: {error}.") from None
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} is not a JSON object.")
    return values


def _kind(description: Mapping[str, Any]) -> Literal["char", "bpe", "other"]:
    model = description["model"]
    if model.get("type") == "WordLevel" and all(description.get(key) == part for key, part in CHAR_PIPELINE.items()):
        special = {token["content"] for token in description.get("added_tokens") or []}
        if all(len(token) == 1 or token in special for token in model["vocab"]):
            return "char"
    if (
        model.get("type") == "BPE"
        and (description.get("decoder") or {}).get("type") == "ByteLevel"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
    ):
        return "bpe"
    return "other"


def readable(text: bytes) -> str:
    """Return a token's bytes as text, with those of an incomplete character written as \\xNN."""
    return text.decode("utf-8", "backslashreplace")


def _word_end(decoder: Mapping[str, Any]) -> str:
    """Return what marks the last token of a word, for a decoder that puts a space after it; "" for others."""
    if decoder.get("type") == "Sequence":
        return next((end for part in decoder.get("decoders") or [] if (end := _word_end(part))), "")
    return str(decoder.get("suffix") or "") if decoder.get("type") == "BPEDecoder" else ""


def hidden_tokens(description: Mapping[str, Any], hidden: Collection[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer for encoding that does not find some of its added tokens in texts.

    Models that look up words as a whole would find "</s>" in a text all the same, so they know it by another spelling.
    The ids of other added tokens can differ; see `own_ids`.
    """
    from tokenizers import Tokenizer as Pipeline

    model = dict(description["model"])
    unknown = model.get("unk_token")

    def spelled(token: str, id: int) -> str:
        return f"\ufffe{id}\ufffe" if token in hidden and token != unknown else token  # which no text has

    if model.get("type") == "WordLevel":
        model["vocab"] = {spelled(token, id): id for token, id in model["vocab"].items()}
    elif model.get("type") == "Unigram":
        model["vocab"] = [[spelled(token, id), score] for id, (token, score) in enumerate(model["vocab"])]
    kept = [token for token in description.get("added_tokens") or [] if token["content"] not in hidden]
    without = {**description, "model": model, "added_tokens": kept, "post_processor": None}
    pipeline = Pipeline.from_str(json.dumps(without, ensure_ascii=False))
    pipeline.encode_special_tokens = True
    pipeline.no_padding()
    pipeline.no_truncation()
    return pipeline


def own_ids(pipeline: tokenizers.Tokenizer, ids: Mapping[str, int]) -> dict[int, int]:
    """Return the right id for each id of an added token that differs in a changed copy of a tokenizer. ids: the right
    ones."""
    found = {id: ids[token.content] for id, token in pipeline.get_added_tokens_decoder().items()}
    return {id: own for id, own in found.items() if id != own}


def _token_id(vocabulary: Mapping[str, int], token: object) -> int | None:
    """Return the id of a token that a tokenizer_config.json names."""
    content = token_content(token)
    return vocabulary.get(content) if content else None


def token_content(token: object) -> str:
    """Return a token that a tokenizer_config.json names as a string or as {"content": ...}; "" if it does not."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _added_ids(processor: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor of a tokenizer.json puts before and after a text."""
    kind = processor.get("type")
    if kind == "Sequence":  # `tokenizers` lets only the first of several add tokens
        added = (_added_ids(part) for part in processor["processors"])
        return next((each for each in added if any(each)), ((), ()))
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (processor["cls"][1],), (processor["sep"][1],)
    if kind != "TemplateProcessing":
        return (), ()
    sides: tuple[list[int], list[int]] = ([], [])
    at = 0
    for piece in processor["single"]:
        if "Sequence" in piece:
            at = 1
        else:
            sides[at].extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return tuple(sides[0]), tuple(sides[1])


def with_added_tokens(text: str, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Return the tokenizer.json `text` with another post-processor: one that puts these tokens around a text."""

    def pieces(tokens: Iterable[str]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]

    def single(name: str) -> list[dict[str, Any]]:
        return [*pieces(before), {"Sequence": {"id": name, "type_id": 0}}, *pieces(after)]

    processor = {
        "type": "TemplateProcessing",
        "single": single("A"),
        "pair": single("A") + single("B"),
        "special_tokens": {
            token: {"id": token, "ids": [id], "tokens": [token]} for token, id in {**before, **after}.items()
        },
    }
    description = {**json.loads(text), "post_processor": processor if before or after else None}
    return json.dumps(description, ensure_ascii=False, indent=1)


def _code_point_table(vocabulary: Mapping[str, int], special: Mapping[int, str]) -> np.ndarray:
    """Return table[code point] = id, uint32: one entry more than the alphabet needs, _NO_ID where there is no token."""
    codes = {ord(token): id for token, id in vocabulary.items() if len(token) == 1 and id not in special}
    table = np.full(max(codes, default=-1) + 2, _NO_ID, dtype=np.uint32)
    table[list(codes)] = list(codes.values())
    return table


def _byte_characters() -> dict[str, int]:
    """Return GPT-2's printable character for each byte (Radford et al. 2019, encoder.py) as {character: byte}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"at character {position:,} (line {line:,}, column {column:,})"


def _unknown_character(text: str, position: int, num_special: int, vocab_size: int) -> UnknownTextError:
    character = text[position]
    return UnknownTextError(
        f"the character {character!r} (U+{ord(character):04X}) {_place(text, position)} is not among the "
        f"{vocab_size - num_special:,} characters of this tokenizer."
    )


def _surrogate(text: str, position: int) -> TokenizerError:
    return TokenizerError(
        f"the text has half of a surrogate pair (U+{ord(text[position]):04X}) {_place(text, position)}, which is not "
        "a character. It was read with the wrong encoding: read it again as UTF-8, or remove it."
    )

"""Structured output: JSON of a schema, a regular expression, one of several texts, or a grammar in Lark or GBNF.

    params = SamplingParams(constraint=json_schema(tokenizer, {"type": "object", ...}))

At each step, tokens after which the text could no longer be completed are masked out. `llguidance` computes the masks
(Earley's algorithm over a lexer of regular-expression derivatives); it is an optional dependency.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance


class Grammar:
    """A language over a tokenizer's tokens, for `SamplingParams.constraint`.

    source: a grammar as `llguidance` takes it. end_ids: tokens that are allowed wherever the end-of-text token is,
    because they end an answer (in a chat template).
    """

    def __init__(self, tokenizer: Tokenizer, source: str, end_ids: Sequence[int] = ()) -> None:
        self.tokenizer, self.source, self.end_ids = tokenizer, source, tuple(end_ids)

    def start(self) -> GrammarState:
        """Return the state of an empty text. Raise UsageError for a language that is invalid, too complex or empty."""
        ll, tokens = _llguidance(), _tokens(self.tokenizer, self.tokenizer.eos_id)
        matcher = ll.LLMatcher(tokens.ll, self.source if tokens.canonical else _unforced(self.source), log_level=0)
        end_ids = (*self.tokenizer.end_ids, *self.end_ids)
        state = GrammarState(matcher, self.tokenizer, tokens, end_ids)
        if matcher.is_error():
            raise UsageError(f"the grammar cannot be used: {_reason(matcher)}.")
        try:
            possible = state.finished or bool(state.allowed().any())
        except GptsmithError:
            possible = False
        if not possible:
            raise UsageError("the grammar cannot be used: no text of this tokenizer's tokens satisfies it.")
        return state


class GrammarState:
    """The state of one text in a language: a `ConstraintState`. previous: the last token of the text."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        tokenizer: Tokenizer,
        tokens: _Tokens,
        end_ids: Sequence[int] = (),
        previous: int | None = None,
    ) -> None:
        self.matcher, self.tokenizer, self.tokens, self.end_ids = matcher, tokenizer, tokens, end_ids
        self.previous = previous
        self._allowed: Tensor | None = None

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        if self.matcher.is_stopped():
            return not self.matcher.is_error()
        # A tokenizer without an end-of-text token: the text ends where only that token could follow.
        beyond = self.tokens.eos_id >= self.tokenizer.vocab_size
        return beyond and self.matcher.is_accepting() and not bool(self.allowed().any())

    def allowed(self) -> Tensor:
        """Return the tokens that can come next: (V,) bool. Raise GptsmithError if the grammar is too complex."""
        if self._allowed is None:
            mask = self.matcher.compute_bitmask()
            if self.matcher.is_error():
                raise GptsmithError(f"the grammar cannot be followed here: {_reason(self.matcher)}.")
            vocab_size, eos_id = self.tokenizer.vocab_size, self.tokens.eos_id
            bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little").astype(bool)
            allowed = bits[:vocab_size]
            if not self.tokenizer.follows_word(self.previous):
                allowed[self.tokens.initial] = bits[self.tokens.first : self.tokens.first + len(self.tokens.initial)]
            self._allowed = torch.from_numpy(allowed)
            if self.end_ids and eos_id < vocab_size and bool(self._allowed[eos_id]):
                self._allowed[list(self.end_ids)] = True
        return self._allowed

    def push(self, token: int) -> None:
        """Advance by a token. Raise GptsmithError if the grammar does not allow it."""
        # A token that ends an answer can also be a part of the language.
        eos_id = self.tokens.eos_id
        ends = token in self.end_ids and eos_id < self.tokenizer.vocab_size and bool(self.allowed()[eos_id])
        self._allowed = None
        consumed = eos_id if ends else token
        if not self.tokenizer.follows_word(self.previous):
            consumed = self.tokens.initial_id.get(consumed, consumed)
        self.matcher.consume_token(consumed)
        self.previous = token
        if self.matcher.is_error():
            raise GptsmithError(f"the grammar cannot be followed here: {_reason(self.matcher)}.")

    def copy(self) -> GrammarState:
        """Return an independent copy."""
        return GrammarState(self.matcher.deep_copy(), self.tokenizer, self.tokens, self.end_ids, self.previous)


def json_schema(tokenizer: Tokenizer, schema: Mapping[str, Any] | str) -> Grammar:
    """Return the language of JSON that matches the schema ({}: any), with one space after commas and colons.

    A tokenizer that puts spaces between words puts them anywhere between the parts of the JSON. Raise UsageError for
    what is not a schema, and for names or strings that the tokenizer can only write with spaces in them.
    """
    try:
        values = json.loads(schema) if isinstance(schema, str) else dict(schema)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        source = _llguidance().LLMatcher.grammar_from_json_schema(
            without_unknown_formats(values), overrides=json_style(tokenizer)
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"not a JSON schema: {error}.") from None
    if tokenizer.spaces_words and any(f'"{word}"' in source for word in ("properties", "enum", "const")):
        following = (tokenizer.token_bytes(id, tokenizer.inner_token) for id in range(tokenizer.vocab_size))
        if not any(text.startswith(b'"') for text in following):
            raise UsageError(
                "this model's tokenizer puts a space before and after every quotation mark, so it cannot write the "
                "names and texts of the schema. Use choice or regex, or another model."
            )
    return Grammar(tokenizer, source)


_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NOT_SCHEMAS = ("const", "enum", "default", "examples", "example", "required", "x-guidance")


def without_unknown_formats(schema: Any) -> Any:
    """Return a JSON schema without `format`s that have no grammar, as validators treat them: any string is allowed.

    Formats of numbers, such as int32, are left out, too.
    """
    if isinstance(schema, list):
        return [without_unknown_formats(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    known: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            known[key] = {name: without_unknown_formats(each) for name, each in value.items()}
        elif key in _NOT_SCHEMAS:
            known[key] = value
        elif key != "format" or not isinstance(value, str) or _has_grammar(value):
            known[key] = without_unknown_formats(value)
    return known


@functools.lru_cache(maxsize=256)
def _has_grammar(string_format: str) -> bool:
    """Return whether there is a grammar of a `format` of strings."""
    schema = {"type": "string", "format": string_format}
    matcher = _llguidance().LLMatcher
    return not matcher.validate_grammar(matcher.grammar_from_json_schema(schema))


def json_style(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the white space of JSON in `llguidance`'s terms: as `json.dumps` writes it, or free."""
    if tokenizer.spaces_words:
        return {"whitespace_flexible": True}
    return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def regex(tokenizer: Tokenizer, pattern: str) -> Grammar:
    """Return the language of texts that a regular expression matches from beginning to end."""
    return Grammar(tokenizer, _llguidance().LLMatcher.grammar_from_regex(pattern))


def choices(tokenizer: Tokenizer, texts: Sequence[str]) -> Grammar:
    """Return the language of these texts."""
    if not texts or not all(texts):
        raise UsageError("choices must be one or more non-empty texts.")
    return Grammar(tokenizer, "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


def grammar(tokenizer: Tokenizer, text: str) -> Grammar:
    """Return the language of a context-free grammar, in llguidance's variant of Lark or in llama.cpp's GBNF."""
    _llguidance()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return Grammar(tokenizer, any_to_lark(text))
    except Exception as error:  # a ValueError, or whatever the converter raises
        raise UsageError(f"not a grammar: {error}.") from None


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError("structured output needs llguidance: pip install 'gptsmith[structured]'.") from None
    return llguidance


class _Tokens:
    """A tokenizer as `llguidance` needs it, which takes up to a second for a large one.

    eos_id: the end-of-text token; for a tokenizer without one, an id beyond the last one stands for it. initial: the
    tokens that are written differently where no word comes before them, as at the beginning of a text: there, they are
    the ids from `first` on (`initial_id`). canonical: whether `llguidance` knows how the tokenizer splits a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        ll = _llguidance()
        self.eos_id = tokenizer.vocab_size if tokenizer.eos_id is None else tokenizer.eos_id
        self.first, self.initial = max(tokenizer.vocab_size, self.eos_id + 1), np.zeros(0, np.int64)
        self.initial_id: dict[int, int] = {}
        self.canonical = True
        if tokenizer.kind == "bpe" and tokenizer.eos_id is not None:
            try:
                self.ll: llguidance.LLTokenizer = ll.LLTokenizer(
                    tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=self.eos_id
                )
                return
            except Exception:  # a kind of tokenizer that it does not know: pass the bytes of each token
                pass
        self.canonical = False
        special, inner = tokenizer.special_tokens(), tokenizer.inner_token
        written = [
            special.get(id, "<end>").encode()
            if id in special or id >= tokenizer.vocab_size
            else tokenizer.token_bytes(id, inner)
            for id in range(self.first)
        ]
        if inner is not None:
            initially = {id: tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size) if id not in special}
            differ = [id for id, spelled in initially.items() if spelled != written[id]]
            written += [initially[id] for id in differ]
            self.initial = np.array(differ, np.int64)
            self.initial_id = {id: self.first + place for place, id in enumerate(differ)}
        unwritable = [id for id, spelled in enumerate(written) if not spelled]
        hidden = sorted({*(id for id in special if id < self.first), self.eos_id, *unwritable})
        self.ll = ll.LLTokenizer(ll.TokenizerWrapper(_Bytes(written, hidden, self.eos_id)), n_vocab=len(written))


@functools.lru_cache(maxsize=8)
def _tokens(tokenizer: Tokenizer, eos_id: int | None) -> _Tokens:
    """Return the tokens of a tokenizer. eos_id: its own, by which two that are otherwise equal can differ."""
    return _Tokens(tokenizer)


class _Bytes:
    """A tokenizer as a list of byte strings, in the form that `llguidance` expects."""

    def __init__(self, tokens: list[bytes], special: list[int], eos_id: int) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self.bos_token_id = eos_id, None

    def __call__(self, text: bytes | str) -> list[int]:
        """Return no ids: without forcing, texts are not tokenized."""
        return []


def _unforced(source: str) -> str:
    """Return a grammar that allows every way of tokenizing its texts.

    By default, `llguidance` tokenizes a part that is the same in all texts, and allows these tokens only.
    """
    try:
        described = json.loads(source)
    except ValueError:  # a grammar in Lark
        described = {"grammars": [{"lark_grammar": source}]}
    language, *others = described["grammars"]
    start = {"lark_grammar": '%llguidance {"no_forcing": true}\nstart: @language'}
    return json.dumps({**described, "grammars": [start, {**language, "name": "language"}, *others]})


def _reason(matcher: llguidance.LLMatcher) -> str:
    return (matcher.get_error().strip() or "no reason given").splitlines()[0].rstrip(".")

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
        matcher = ll.LLMatcher(tokens, self.source, log_level=0)
        end_ids = (*self.tokenizer.end_ids, *self.end_ids)
        state = GrammarState(matcher, self.tokenizer.vocab_size, tokens.eos_token, end_ids)
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
    """The state of one text in a language: a `ConstraintState`."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocab_size: int, eos_id: int, end_ids: Sequence[int] = ()
    ) -> None:
        self.matcher, self.vocab_size, self.eos_id, self.end_ids = matcher, vocab_size, eos_id, end_ids
        self._allowed: Tensor | None = None

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        if self.matcher.is_stopped():
            return not self.matcher.is_error()
        # A tokenizer without an end-of-text token: the text ends where only that token could follow.
        return self.eos_id >= self.vocab_size and self.matcher.is_accepting() and not bool(self.allowed().any())

    def allowed(self) -> Tensor:
        """Return the tokens that can come next: (V,) bool. Raise GptsmithError if the grammar is too complex."""
        if self._allowed is None:
            mask = self.matcher.compute_bitmask()
            if self.matcher.is_error():
                raise GptsmithError(f"the grammar cannot be followed here: {_reason(self.matcher)}.")
            bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
            self._allowed = torch.from_numpy(bits[: self.vocab_size].astype(bool))
            if self.end_ids and self.eos_id < self.vocab_size and bool(self._allowed[self.eos_id]):
                self._allowed[list(self.end_ids)] = True
        return self._allowed

    def push(self, token: int) -> None:
        """Advance by a token. Raise GptsmithError if the grammar does not allow it."""
        self._allowed = None
        self.matcher.consume_token(self.eos_id if token in self.end_ids else token)
        if self.matcher.is_error():
            raise GptsmithError(f"the grammar cannot be followed here: {_reason(self.matcher)}.")

    def copy(self) -> GrammarState:
        """Return an independent copy."""
        return GrammarState(self.matcher.deep_copy(), self.vocab_size, self.eos_id, self.end_ids)


def json_schema(tokenizer: Tokenizer, schema: Mapping[str, Any] | str) -> Grammar:
    """Return the language of JSON that matches the schema ({}: any), with one space after commas and colons."""
    try:
        values = json.loads(schema) if isinstance(schema, str) else dict(schema)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        return Grammar(tokenizer, _llguidance().LLMatcher.grammar_from_json_schema(values, overrides=style))
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"not a JSON schema: {error}.") from None


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


@functools.lru_cache(maxsize=8)
def _tokens(tokenizer: Tokenizer, eos_id: int | None) -> llguidance.LLTokenizer:
    """Return the tokenizer as `llguidance` needs it, which takes up to a second for a large one.

    eos_id: the tokenizer's, by which two tokenizers that are otherwise equal can differ. For a tokenizer without an
    end-of-text token, an id beyond the last one stands for it.
    """
    ll = _llguidance()
    eos = tokenizer.vocab_size if eos_id is None else eos_id
    if tokenizer.kind != "char" and eos_id is not None:
        try:
            exact: llguidance.LLTokenizer = ll.LLTokenizer(
                tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=eos
            )
            return exact
        except Exception:  # a kind of tokenizer that it does not know: pass the bytes of each token
            pass
    wrapped = ll.TokenizerWrapper(_Bytes(tokenizer, eos))
    by_bytes: llguidance.LLTokenizer = ll.LLTokenizer(wrapped, n_vocab=max(tokenizer.vocab_size, eos + 1))
    return by_bytes


class _Bytes:
    """A tokenizer as a list of byte strings, in the form that `llguidance` expects."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_id, None
        special = tokenizer.special_tokens()
        count = max(tokenizer.vocab_size, eos_id + 1)
        self.special_token_ids = sorted({*(id for id in special if id < count), eos_id})
        self.tokens = [
            special.get(id, "<end>").encode()
            if id in special or id >= tokenizer.vocab_size
            else tokenizer.token_bytes(id)
            for id in range(count)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "ignore") if isinstance(text, bytes) else text
        try:
            return self._tokenizer.encode(text)
        except GptsmithError:  # it lacks some of the characters
            return []


def _reason(matcher: llguidance.LLMatcher) -> str:
    return (matcher.get_error().strip() or "no reason given").splitlines()[0].rstrip(".")

"""Structured output is always in the language, unless it ended with finish_reason length."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from gptsmith.engine.engine import Engine
from gptsmith.engine.grammar import Grammar, choices, grammar, json_schema, regex
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.text import Detokenizer, encode_prompt
from gptsmith.errors import UsageError
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char
from tests.foreign import sentencepiece, unigram, word_ends, wordpiece

pytest.importorskip("llguidance")

TEXT = [
    '{"name": "Ada", "age": 36, "tags": ["a", "b"]} yes no maybe 0123456789 true false null -.eE+\\/ naïve 日本 '
] * 3
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["bpe", "char"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_bpe(TEXT, 320) if request.param == "bpe" else train_char(TEXT)


@pytest.fixture(scope="module")
def engine(make_model: Any, tokenizer: Tokenizer) -> Engine:
    model = make_model("qwen3", tokenizer.vocab_size, context=400)
    return Engine(model, vocab_size=tokenizer.vocab_size, max_batch=8, cache_tokens=1600)


def texts(engine: Engine, tokenizer: Tokenizer, constraint: Grammar, count: int = 12, **options: Any) -> list[Any]:
    """Return this many samples, as (text, finish reason)."""
    merged: dict[str, Any] = {"max_tokens": 120, "temperature": 1.5} | options
    params = SamplingParams(constraint=constraint, n=count, seed=0, **merged)
    detokenizer = Detokenizer(tokenizer, "", params)
    (result,) = engine.generate([encode_prompt(tokenizer, "")], detokenizer.engine_params)
    if result.error is not None:
        raise result.error
    return [(tokenizer.decode(c.ids), c.finish_reason) for c in result.completions]


def test_json_of_a_schema(engine: Engine, tokenizer: Tokenizer) -> None:
    import jsonschema

    ended = 0
    for text, reason in texts(engine, tokenizer, json_schema(tokenizer, SCHEMA)):
        if reason == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)
            ended += 1
        else:
            assert reason == "length"
    assert ended >= 8


def test_any_json(engine: Engine, tokenizer: Tokenizer) -> None:
    for text, reason in texts(engine, tokenizer, json_schema(tokenizer, '{"type": ["integer", "boolean"]}')):
        assert reason == "length" or json.loads(text) is not None


def test_regular_expressions(engine: Engine, tokenizer: Tokenizer) -> None:
    pattern = r"(yes|no), [0-9]{2,4}( maybe)?"
    for text, reason in texts(engine, tokenizer, regex(tokenizer, pattern)):
        assert (re.fullmatch(pattern, text) is not None, reason) == (True, "stop")


def test_choices(engine: Engine, tokenizer: Tokenizer) -> None:
    options = ["yes", "yes, maybe", "no", 'a "b"', "日本"]
    made = [text for text, _ in texts(engine, tokenizer, choices(tokenizer, options), 30)]
    assert set(made) <= set(options)
    assert len(set(made)) > 2


def test_grammars_in_lark_and_gbnf(engine: Engine, tokenizer: Tokenizer) -> None:
    lark = 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'
    gbnf = 'root ::= "(" root ")" | num\nnum ::= [0-9] [0-9]? [0-9]?'
    if tokenizer.kind == "char":
        lark, gbnf = lark.replace('("', '["').replace('"("', '"["').replace('")"', '"]"'), gbnf.replace('"("', '"["')
        gbnf = gbnf.replace('")"', '"]"')
    for source in (lark, gbnf):
        for text, reason in texts(engine, tokenizer, grammar(tokenizer, source)):
            inner = text.strip("()[]")
            assert reason == "length" or re.fullmatch(r"[0-9]{1,3}", inner)
            assert reason == "length" or text.count("(") + text.count("[") == text.count(")") + text.count("]")


def test_constrained_and_free_requests_in_one_batch(engine: Engine, tokenizer: Tokenizer) -> None:
    """Neither kind affects the other."""
    free = SamplingParams(max_tokens=10, temperature=1.0, seed=3)
    bound = SamplingParams(max_tokens=20, temperature=0, constraint=choices(tokenizer, ["yes", "no"]))
    start = encode_prompt(tokenizer, "")
    (alone,) = engine.generate([start], free)
    one, two, three = engine.generate([start] * 3, [bound, free, bound])
    assert two.ids == alone.ids
    assert one.ids == three.ids
    assert tokenizer.decode(one.ids) in ("yes", "no")


def test_an_invalid_grammar_fails_only_its_request(engine: Engine, tokenizer: Tokenizer) -> None:
    start = encode_prompt(tokenizer, "")
    good = SamplingParams(max_tokens=5, constraint=choices(tokenizer, ["yes"]))
    for wrong in (
        json_schema(tokenizer, {"type": "nonsense"}),
        json_schema(tokenizer, {"type": "integer", "minimum": 3, "maximum": 1}),
        regex(tokenizer, "(unclosed"),
        Grammar(tokenizer, "start: nowhere"),
        regex(tokenizer, "[^\\x00-\\U0010FFFF]"),
    ):
        bad, fine = engine.generate([start, start], [SamplingParams(constraint=wrong), good])
        assert isinstance(bad.error, UsageError)
        assert "cannot be used" in str(bad.error)
        assert tokenizer.decode(fine.ids) == "yes"
    with pytest.raises(UsageError, match="not a JSON schema"):
        json_schema(tokenizer, "[1")
    with pytest.raises(UsageError, match="one or more"):
        choices(tokenizer, [])


def test_a_tokenizer_without_an_end_of_text_token(make_model: Any) -> None:
    full = train_char(["yesno"])
    description = json.loads(full.to_json())
    end = {token["id"]: token["content"] for token in description["added_tokens"]}
    description["added_tokens"] = []
    for content in end.values():
        del description["model"]["vocab"][content]
    ordered = sorted(description["model"]["vocab"], key=description["model"]["vocab"].get)
    description["model"]["vocab"] = {token: i for i, token in enumerate(ordered)}
    tokenizer = Tokenizer(json.dumps(description))
    assert tokenizer.eos_id is None
    engine = Engine(make_model("gpt2", tokenizer.vocab_size))
    params = SamplingParams(max_tokens=9, constraint=choices(tokenizer, ["yes", "no"]), seed=1)
    (result,) = engine.generate([[0]], params)
    assert tokenizer.decode(result.ids) in ("yes", "no")
    assert result.completions[0].finish_reason == "stop"


# tokenizers that write a token differently at the beginning of a text ------------------------------------------------

FOREIGN = {
    "unigram": Tokenizer(unigram(TEXT[0] * 8, 150).to_str(), {"eos_token": "</s>"}),
    "sentencepiece": Tokenizer(sentencepiece().to_str(), {"eos_token": "</s>"}),
    "wordpiece": Tokenizer(wordpiece(TEXT[0] * 8, 150).to_str(), {"eos_token": "[SEP]"}),
    "word ends": Tokenizer(word_ends(TEXT[0] * 8, 150).to_str()),
}


def walk(constraint: Grammar, seed: int) -> tuple[str, bool]:
    """Return a random text of the language, and whether it is complete."""
    rng, state, ids = random.Random(seed), constraint.start(), list[int]()
    tokenizer = constraint.tokenizer
    while not state.finished and len(ids) < 80:
        allowed = state.allowed().nonzero()[:, 0].tolist()
        ends = [id for id in allowed if id in tokenizer.end_ids]
        if not allowed:  # the tokenizer cannot write what has to follow
            return tokenizer.decode(ids), False
        if ends and (len(ids) > 6 or len(ends) == len(allowed)):
            return tokenizer.decode(ids), True
        id = rng.choice([id for id in allowed if id not in ends])
        assert id not in tokenizer.special_tokens()
        state.push(id)
        ids.append(id)
    return tokenizer.decode(ids), state.finished


@pytest.mark.parametrize("name", list(FOREIGN))
def test_tokenizers_of_words(name: str) -> None:
    import jsonschema

    tokenizer, ended = FOREIGN[name], 0
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}
    for seed in range(8):
        text, complete = walk(choices(tokenizer, ["yes", "no", "maybe", "yes no"]), seed)
        assert complete
        assert text in ("yes", "no", "maybe", "yes no")
        text, complete = walk(json_schema(tokenizer, numbers), seed)
        if complete:
            ended += 1
            jsonschema.validate(json.loads(text), numbers)
    assert ended > 2


@pytest.mark.parametrize("name", ["unigram", "sentencepiece"])
def test_objects_of_tokenizers_of_words(name: str) -> None:
    import jsonschema

    made = [walk(json_schema(FOREIGN[name], SCHEMA), seed) for seed in range(12)]
    complete = [text for text, is_complete in made if is_complete]
    assert complete
    for text in complete:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_names_that_can_only_be_written_with_spaces_are_refused() -> None:
    with pytest.raises(UsageError, match="a space before and after every quotation mark"):
        json_schema(FOREIGN["wordpiece"], SCHEMA)

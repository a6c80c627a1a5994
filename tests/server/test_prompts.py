"""Scoring of prompts, and how chat requests ask for their prompt to be written."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from gptsmith.engine.sampling import SamplingParams
from gptsmith.tokenizer.chat import ChatTemplate
from tests.server.conftest import TEMPLATE, Live

PREFILL: list[Any] = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on <|im_end|> a "},
]


def test_no_tokens_with_echo_score_the_prompt(live: Live, client: openai.OpenAI) -> None:
    tokenizer = live.tokenizers["tiny"]
    ids = tokenizer.encode_prompt("the cat sat")
    (result,) = live.reference["tiny"].generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=2, logprobs=2))
    assert result.prompt_logprobs is not None
    expected = [each.logprob for each in result.prompt_logprobs[1:] if each is not None]
    made = client.completions.create(model="tiny", prompt=["the cat sat", "Rome"], max_tokens=0, echo=True, logprobs=2)
    first, second = made.choices
    assert (first.text, second.text) == ("the cat sat", "Rome")
    assert (first.finish_reason, second.finish_reason) == ("length", "length")
    assert first.logprobs is not None
    logprobs: list[Any] = first.logprobs.token_logprobs or []
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(expected, abs=1e-5)
    assert made.usage is not None
    assert made.usage.completion_tokens == 0
    assert made.usage.prompt_tokens == len(ids) + len(tokenizer.encode_prompt("Rome"))


@pytest.mark.parametrize(
    ("more", "stream"),
    [
        *(({}, False), ({"n": 3}, False), ({"best_of": 2}, False), ({}, True), ({"n": 3}, True)),
        ({"temperature": 0, "extra_body": {"beams": 2}}, False),
    ],
)
def test_no_tokens(live: Live, client: openai.OpenAI, more: dict[str, Any], stream: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 0, **more}
    for echo in (False, True):
        made: Any = client.completions.create(**options, echo=echo, stream=stream)
        choices = [choice for chunk in made for choice in chunk.choices] if stream else made.choices
        assert [choice.text for choice in choices] == ["the cat" if echo else ""] * more.get("n", 1)
        assert {choice.finish_reason for choice in choices} == {"length"}
    with pytest.raises(openai.BadRequestError, match="min_tokens"):
        client.completions.create(model="tiny", prompt="a", max_tokens=0, extra_body={"min_tokens": 1})


def test_a_prompt_as_long_as_the_context_is_scored(live: Live, client: openai.OpenAI) -> None:
    for max_tokens in (0, 1):
        made = client.completions.create(model="tiny", prompt=[7] * 512, max_tokens=max_tokens, echo=True, logprobs=0)
        assert made.choices[0].logprobs is not None
        assert len(made.choices[0].logprobs.tokens or []) == 512 + max_tokens


def rendered(live: Live, **body: Any) -> str:
    answer = httpx.post(f"{live.url}/tokenize", json={"model": "tiny", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return live.tokenizers["tiny"].decode(answer.json()["tokens"], skip_special_tokens=False)


def continued(client: openai.OpenAI, ids: list[int]) -> str:
    return client.completions.create(model="tiny", prompt=ids, seed=3, max_tokens=12).choices[0].text


def test_the_last_message_is_continued(live: Live, client: openai.OpenAI) -> None:
    open_ended = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat on <|im_end|> a "
    assert rendered(live, messages=PREFILL, continue_final_message=True) == open_ended
    ids = ChatTemplate(live.tokenizers["tiny"]).encode(PREFILL, continue_final_message=True)
    assert ids.count(live.tokenizers["tiny"].end_ids[0]) == 1  # the one in the message is text
    body: Any = {"continue_final_message": True, "add_generation_prompt": False}
    made = client.chat.completions.create(model="tiny", messages=PREFILL, seed=3, max_tokens=12, extra_body=body)
    expected = continued(client, ids)
    assert made.choices[0].message.content == expected
    chunks = client.chat.completions.create(
        model="tiny", messages=PREFILL, seed=3, max_tokens=12, stream=True, extra_body=body
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected


def test_templates_that_trim_texts_are_continued_as_in_transformers(live: Live) -> None:
    from transformers import PreTrainedTokenizerFast

    config = {
        **live.tokenizers["tiny"].config(),
        "chat_template": TEMPLATE.replace("message.content }}", "message.content | trim }}"),
    }
    for trimmed in (False, True):
        source = config["chat_template"] if trimmed else TEMPLATE
        tokenizer = type(live.tokenizers["tiny"])(
            live.tokenizers["tiny"].to_json(), {**config, "chat_template": source}
        )
        other = PreTrainedTokenizerFast(tokenizer_object=_pipeline(tokenizer))
        for text in ("sat on a ", "sat on a", " sat\n", ""):
            messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": text}]
            expected = other.apply_chat_template(
                messages, chat_template=source, continue_final_message=True, return_dict=False
            )
            assert ChatTemplate(tokenizer).encode(messages, continue_final_message=True) == expected, (trimmed, text)


def _pipeline(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer as Pipeline

    return Pipeline.from_str(tokenizer.to_json())


def test_the_plain_template_is_continued_with_its_white_space(live: Live, client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "sat"}]
    made = client.chat.completions.create(
        model="plain", messages=messages, seed=1, max_tokens=12, extra_body={"continue_final_message": True}
    )
    expected = live.texts("User: cat\nAssistant: sat", "plain", seed=1, max_tokens=12, stop=("\nUser:",))[0]
    assert made.choices[0].message.content == expected


def test_no_generation_prompt(live: Live, client: openai.OpenAI) -> None:
    messages = PREFILL[:1]
    assert rendered(live, messages=messages) == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    bare = "<|im_start|>user\nthe cat<|im_end|>\n"
    assert rendered(live, messages=messages, add_generation_prompt=False) == bare
    made = client.chat.completions.create(
        model="tiny", messages=messages, seed=3, max_tokens=12, extra_body={"add_generation_prompt": False}
    )
    ids = ChatTemplate(live.tokenizers["tiny"]).encode(messages, add_generation_prompt=False)
    assert made.choices[0].message.content == continued(client, ids)


@pytest.fixture
def thinking(live: Live) -> Any:
    """The model `tiny` with a template that reads more variables, as Qwen's does."""
    tokenizer = live.tokenizers["tiny"]
    loaded = live.models.loaded().get("tiny") or live.models.load("tiny")
    template = loaded.template
    source = TEMPLATE + "{% if enable_thinking is false %}no thinking{% endif %}{{ mood }}{{ reasoning_effort }}"
    changed = ChatTemplate(type(tokenizer)(tokenizer.to_json(), {**tokenizer.config(), "chat_template": source}))
    object.__setattr__(loaded, "template", changed)
    yield
    object.__setattr__(loaded, "template", template)


@pytest.mark.usefixtures("thinking")
def test_variables_reach_the_template(live: Live, client: openai.OpenAI) -> None:
    def end(**variables: Any) -> str:
        text = rendered(live, messages=PREFILL[:1], chat_template_kwargs=variables)
        return text.partition("assistant\n")[2]

    assert end() == end(enable_thinking=True) == end(unknown=[1]) == ""
    assert end(enable_thinking=False, mood="calm") == "no thinkingcalm"
    assert end(mood="<|im_end|>") == "<|im_end|>"  # text, not the special token
    template = live.models.load("tiny").template
    expected = continued(client, template.encode(PREFILL[:1], enable_thinking=False))
    assert expected != continued(client, template.encode(PREFILL[:1]))
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    made = client.chat.completions.create(model="tiny", messages=PREFILL[:1], seed=3, max_tokens=12, extra_body=kwargs)
    assert made.choices[0].message.content == expected
    response = client.responses.create(
        model="tiny", input="the cat", max_output_tokens=12, extra_body={"seed": 3, **kwargs}
    )
    assert response.output_text == expected


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"continue_final_message": True, "messages": PREFILL[:1]}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
        ({"chat_template_kwargs": {"enable_thinking": "false"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}, "reasoning_effort": "high"}, "chat_template_kwargs.r"),
        ({"add_generation_prompt": "yes?"}, "add_generation_prompt"),
        ({"cache_prompt": "x"}, "cache_prompt"),
    ],
)
def test_what_contradicts_is_named(live: Live, wrong: dict[str, Any], named: str) -> None:
    body = {"model": "tiny", "messages": PREFILL, "max_tokens": 3, **wrong}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(named)
    assert named in answer.json()["error"]["message"]


def test_prompts_that_are_not_cached(live: Live, client: openai.OpenAI) -> None:
    prompt = "a mat. the cat sat on a mat. " * 4

    def cached(**body: Any) -> tuple[int, str]:
        made = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, seed=1, extra_body=body)
        assert made.usage is not None
        assert made.usage.prompt_tokens_details is not None
        return made.usage.prompt_tokens_details.cached_tokens or 0, made.choices[0].text

    first, text = cached(cache_prompt=False)
    assert (first, cached(cache_prompt=False)) == (0, (0, text))
    assert cached() == (0, text)  # nothing was left by those before
    again, same = cached(cache_prompt=True)
    assert again > 0
    assert same == text


def test_unknown_formats_are_texts(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {
            "format": {"type": "string", "format": "phone", "maxLength": 3},
            "day": {"type": "string", "format": "date"},
            "size": {"anyOf": [{"type": "integer", "format": "int32", "maximum": 9}]},
        },
        "required": ["format", "day", "size"],
        "additionalProperties": False,
    }
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": parameters}}
    tool: Any = {"type": "function", "function": {"name": "call", "parameters": parameters}}
    hello: Any = [{"role": "user", "content": "a"}]
    options: Any = {"model": "tiny", "messages": hello, "seed": 2, "max_tokens": 120}
    text = client.chat.completions.create(**options, response_format=schema).choices[0].message.content
    called = client.chat.completions.create(**options, tools=[tool], tool_choice="required").choices[0].message
    for written in (text, called.tool_calls[0].function.arguments):
        values = json.loads(written)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", values["day"])  # a format that is known is held
        assert len(values["format"]) <= 3
        assert values["size"] <= 9

"""The official OpenAI client against a live server. What it receives is compared with the engine used directly."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, Literal

import openai
import pydantic
import pytest
import torch

from gptsmith.engine.sampling import SamplingParams
from gptsmith.tokenizer.chat import ChatTemplate

HELLO: list[Any] = [{"role": "user", "content": "the cat sat"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}

OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # options of the client, and of the engine
    ({"temperature": 0}, {"temperature": 0}),
    ({"seed": 7}, {"seed": 7}),
    ({"seed": 7, "n": 3}, {"seed": 7, "n": 3}),
    ({"seed": 7, "top_p": 0.5}, {"seed": 7, "top_p": 0.5}),
    ({"seed": 7, "stop": "e"}, {"seed": 7, "stop": ("e",)}),
    ({"seed": 7, "stop": ["a", " t"]}, {"seed": 7, "stop": ("a", " t")}),
    (
        {"seed": 7, "presence_penalty": 2, "frequency_penalty": 1},
        {"seed": 7, "presence_penalty": 2, "frequency_penalty": 1},
    ),
    ({"seed": 7, "logit_bias": {"70": 100}}, {"seed": 7, "logit_bias": {70: 100.0}}),
    ({"temperature": 0, "logit_bias": {"70": -100}}, {"temperature": 0, "logit_bias": {70: -math.inf}}),
    ({"extra_body": {"top_k": 3, "seed": 7}}, {"top_k": 3, "seed": 7}),
    ({"extra_body": {"min_p": 0.5, "seed": 7}}, {"min_p": 0.5, "seed": 7}),
    ({"extra_body": {"typical_p": 0.3, "seed": 7}}, {"typical_p": 0.3, "seed": 7}),
    ({"temperature": 0, "extra_body": {"repetition_penalty": 2.5}}, {"temperature": 0, "repetition_penalty": 2.5}),
    ({"seed": 7, "extra_body": {"min_tokens": 20}}, {"seed": 7, "min_tokens": 20}),
    ({"extra_body": {"beams": 3}}, {"temperature": 0, "beams": 3}),
]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "plain", "tuned", "gpt-4"]
    assert client.models.retrieve("gpt-4").id == "gpt-4"
    with pytest.raises(openai.NotFoundError, match="model 'tinny' does not exist"):
        client.models.retrieve("tinny")
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'") as refused:
        client.completions.create(model="tinny", prompt="a")
    assert refused.value.code == "model_not_found"
    assert refused.value.request_id


# completions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "meant"), OPTIONS, ids=lambda x: ",".join(x))
def test_completions_match_the_engine(live: Any, client: openai.OpenAI, asked: Any, meant: Any) -> None:
    expected = live.texts("the cat", max_tokens=24, **meant)
    made = client.completions.create(model="tiny", prompt="the cat", max_tokens=24, **asked)
    assert [choice.text for choice in made.choices] == expected
    assert [choice.index for choice in made.choices] == list(range(len(expected)))
    if "beams" in meant:
        with pytest.raises(openai.BadRequestError, match="beams"):
            client.completions.create(model="tiny", prompt="the cat", stream=True, **asked)
        return
    texts = [""] * len(expected)
    for chunk in client.completions.create(model="tiny", prompt="the cat", max_tokens=24, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def test_multiple_prompts_and_token_ids(live: Any, client: openai.OpenAI) -> None:
    tokenizer = live.tokenizers["tiny"]
    prompts = ["the cat", "a mat", "Rome"]
    made = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=8, seed=3)
    expected = [text for prompt in prompts for text in live.texts(prompt, n=2, max_tokens=8, seed=3)]
    assert [choice.text for choice in made.choices] == expected
    by_ids = client.completions.create(
        model="tiny", prompt=[tokenizer.encode(p) for p in prompts], n=2, max_tokens=8, seed=3
    )
    assert [choice.text for choice in by_ids.choices] == expected
    one = client.completions.create(model="tiny", prompt=tokenizer.encode("Rome"), max_tokens=8, seed=3)
    assert one.choices[0].text == live.texts("Rome", max_tokens=8, seed=3)[0]
    assert one.usage is not None
    assert one.usage.prompt_tokens == len(tokenizer.encode("Rome"))
    assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens


def test_best_of(live: Any, client: openai.OpenAI) -> None:
    expected = live.texts("the cat", max_tokens=8, seed=3, n=2, best_of=5)
    made = client.completions.create(model="tiny", prompt="the cat", max_tokens=8, seed=3, n=2, best_of=5)
    assert [choice.text for choice in made.choices] == expected
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="a", best_of=2, stream=True)


def test_default_max_tokens_is_16(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="the", extra_body={"ignore_eos": True})
    assert made.usage is not None
    assert (made.usage.completion_tokens, made.choices[0].finish_reason) == (16, "length")


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_of_completions(live: Any, client: openai.OpenAI, echo: bool) -> None:
    tokenizer = live.tokenizers["tiny"]
    ids = tokenizer.encode("the cat")
    params = SamplingParams(max_tokens=12, seed=5, temperature=1.0, logprobs=3, prompt_logprobs=3, echo=echo)
    (result,) = live.reference["tiny"].generate([ids], params)
    known = result.completions[0].logprobs
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": "the cat",
        "max_tokens": 12,
        "seed": 5,
        "logprobs": 3,
        "echo": echo,
    }
    made = client.completions.create(**options, extra_body={"ignore_eos": True})
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [tokenizer.token_text(id) for id in result.ids]
    assert logprobs.token_logprobs == [None if k is None else pytest.approx(k.logprob, abs=1e-4) for k in known]
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    for k, top, token, offset in zip(known, logprobs.top_logprobs, result.ids, logprobs.text_offset, strict=True):
        if k is None:
            assert top is None
            continue
        assert top == {tokenizer.token_text(id): pytest.approx(value, abs=1e-4) for id, value in k.top}
        text = tokenizer.token_text(token)
        if text.isascii() and "\\x" not in text:  # the token may start within a character
            assert text in made.choices[0].text[offset : offset + len(text) + 3]
    if echo:
        assert made.choices[0].text.startswith("the cat")
    chunks = list(client.completions.create(**options, extra_body={"ignore_eos": True}, stream=True))
    streamed = [lp for chunk in chunks for lp in (chunk.choices[0].logprobs.tokens or [])]
    assert streamed == logprobs.tokens
    assert "".join(chunk.choices[0].text for chunk in chunks) == made.choices[0].text


def test_logprobs_end_at_a_stop_string(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 40, "seed": 7, "logprobs": 1}
    whole = client.completions.create(**options).choices[0]
    stop = whole.text[5:7]
    cut = client.completions.create(**options, stop=stop).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.logprobs is not None
    assert cut.logprobs.text_offset is not None
    assert all(offset < len(cut.text) for offset in cut.logprobs.text_offset)


def test_echo_without_logprobs(live: Any, client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="the cat", echo=True, max_tokens=5, seed=1)
    assert made.choices[0].text == "the cat" + live.texts("the cat", max_tokens=5, seed=1)[0]


@pytest.mark.parametrize("stream", ["completions", "chat"])
def test_usage_in_the_last_chunk(client: openai.OpenAI, stream: str) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "seed": 1, "stream": True, "n": 2}
    options["stream_options"] = {"include_usage": True}
    chunks: list[Any]
    if stream == "chat":
        chunks = list(client.chat.completions.create(messages=HELLO, **options))
    else:
        chunks = list(client.completions.create(prompt="the", **options))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert 2 <= chunks[-1].usage.completion_tokens <= 12
    assert len({chunk.id for chunk in chunks}) == 1
    whole = client.completions.create(prompt="the", **{**options, "stream": False, "stream_options": None})
    if stream == "completions":
        assert whole.usage is not None
        assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens


# chat -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "meant"), OPTIONS, ids=lambda x: ",".join(x))
def test_chats_match_the_engine(live: Any, client: openai.OpenAI, asked: Any, meant: Any) -> None:
    if "stop" in meant:
        meant = {name: value for name, value in meant.items() if name != "stop"}
        whole = live.answers(HELLO, max_tokens=24, **meant)[0]
        stops = [asked["stop"]] if isinstance(asked["stop"], str) else asked["stop"]
        expected = [min((whole[: whole.find(s)] for s in stops if s in whole), key=len, default=whole)]
    else:
        expected = live.answers(HELLO, max_tokens=24, **meant)
    made = client.chat.completions.create(model="gpt-4", messages=HELLO, max_tokens=24, **asked)
    assert [choice.message.content for choice in made.choices] == expected
    assert made.model == "gpt-4"
    if "beams" in meant:
        return
    texts = [""] * len(expected)
    roles: list[Any] = []
    for chunk in client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=24, stream=True, **asked
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.append(choice.delta.role)
    assert texts == expected
    assert roles.count("assistant") == len(expected)


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "seed": 2,
        "max_tokens": 9,
        "logprobs": True,
        "top_logprobs": 4,
    }
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode("utf-8", "replace") == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 4
        assert entry.logprob <= entry.top_logprobs[0].logprob + 1e-6
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-5
    streamed = []
    for chunk in client.chat.completions.create(**options, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += [entry.token for entry in chunk.choices[0].logprobs.content or []]
    assert streamed == [entry.token for entry in entries]


def test_content_parts_and_roles(live: Any, client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "system"}]},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "on"},
    ]
    plain: list[Any] = [
        {"role": "system", "content": "system"},
        {"role": "user", "content": "the cat"},
        *parts[2:],
    ]
    made = client.chat.completions.create(model="tiny", messages=parts, seed=4, max_tokens=9)
    assert made.choices[0].message.content == live.answers(plain, seed=4, max_tokens=9)[0]
    picture: list[Any] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.content\[0\] is a picture"):
        client.chat.completions.create(model="tiny", messages=picture)


def test_model_without_a_chat_template(live: Any, client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="plain", messages=[{"role": "user", "content": "hello"}], seed=1, max_tokens=12
    )
    template = ChatTemplate(live.tokenizers["plain"])
    prompt = template.render([{"role": "user", "content": "hello"}])
    expected = live.texts(prompt, "plain", seed=1, max_tokens=12, stop=("\nUser:",))[0]
    assert made.choices[0].message.content == expected.lstrip()


def test_adapter_as_a_model(live: Any, client: openai.OpenAI) -> None:
    for name in ("tuned", None):
        model = name or "tiny"
        made = client.completions.create(model=model, prompt="the cat", max_tokens=20, temperature=0)
        assert made.choices[0].text == live.texts("the cat", max_tokens=20, temperature=0, adapter=name)[0]
    texts = {
        client.completions.create(model=m, prompt="the cat", max_tokens=20, temperature=0).choices[0].text
        for m in ("tiny", "tuned")
    }
    assert len(texts) == 2


# structured output ----------------------------------------------------------------------------------------------------


class Trip(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]
    sunny: bool


def test_json_schema(client: openai.OpenAI) -> None:
    for seed in range(4):
        parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Trip, seed=seed)
        assert isinstance(parsed.choices[0].message.parsed, Trip)
    json_object: Any = {"type": "json_object"}
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=json_object, seed=1, max_tokens=200
    )
    text = made.choices[0].message.content
    assert text is not None
    assert text.startswith("{")
    if made.choices[0].finish_reason == "stop":
        json.loads(text)


@pytest.mark.parametrize(
    ("extra", "allowed"),
    [
        ({"regex": "[0-9]{3}-[ab]+x"}, r"[0-9]{3}-[ab]+x"),
        ({"choice": ["Rome", "Oslo"]}, "Rome|Oslo"),
        ({"grammar": 'start: "a" ("b" | "c") "d"'}, "a[bc]d"),
        ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
    ],
    ids=["regex", "choice", "lark", "gbnf"],
)
def test_grammars(client: openai.OpenAI, extra: dict[str, Any], allowed: str) -> None:
    import re

    for seed in range(3):
        made = client.completions.create(model="tiny", prompt="the", seed=seed, max_tokens=100, extra_body=extra)
        if made.choices[0].finish_reason == "stop":
            assert re.fullmatch(allowed, made.choices[0].text)
        answer = client.chat.completions.create(model="tiny", messages=HELLO, seed=seed, extra_body=extra)
        if answer.choices[0].finish_reason == "stop":
            assert re.fullmatch(allowed, answer.choices[0].message.content or "")


# tools ----------------------------------------------------------------------------------------------------------------


def checked(call: Any) -> tuple[str, dict[str, Any]]:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Rome", "Oslo")
        assert arguments["days"] in range(10)
    else:
        assert (call.function.name, arguments) == ("clock", {})
    assert call.id.startswith("call_")
    return call.function.name, arguments


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_required_tool_calls_follow_the_schema(client: openai.OpenAI, choice: Any) -> None:
    names = set()
    for seed in range(4):
        options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER, CLOCK], "tool_choice": choice}
        options |= {"seed": seed, "parallel_tool_calls": False}
        made = client.chat.completions.create(**options).choices[0]
        assert made.finish_reason == "tool_calls"
        assert made.message.content is None
        (call,) = made.message.tool_calls or []
        names.add(checked(call)[0])
        with client.chat.completions.stream(**options) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert [c.function.model_dump(exclude={"parsed_arguments"}) for c in streamed.message.tool_calls or []] == [
            call.function.model_dump()
        ]
        assert streamed.finish_reason == "tool_calls"
    assert names <= {"weather", "clock"}
    if isinstance(choice, dict):
        assert names == {"weather"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_cuts_a_call(client: openai.OpenAI, stream: bool) -> None:
    """A call whose arguments are cut is not complete: the reason is not "tool_calls"."""
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "tool_choice": "required"}
    options |= {"seed": 1, "parallel_tool_calls": False}

    def ended(**more: Any) -> tuple[str | None, str]:
        if stream:
            with client.chat.completions.stream(**options, **more) as events:
                choice: Any = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**options, **more).choices[0]
        return choice.finish_reason, "".join(call.function.arguments for call in choice.message.tool_calls or ())

    reason, whole = ended()
    assert (reason, json.loads(whole).keys()) == ("tool_calls", {"city", "days"})
    assert ended(stop='"days"') == ("stop", whole.partition('"days"')[0])
    assert ended(stop=["{"]) == ("stop", "")
    assert ended(stop=["never"]) == ("tool_calls", whole)


def test_tool_choice_auto_and_none(live: Any, client: openai.OpenAI) -> None:
    mark = str(live.tokenizers["tiny"].encode("<tool_call>")[0])
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER, CLOCK], "seed": 3}
    text = client.chat.completions.create(**options, logit_bias={mark: -100}, max_tokens=20).choices[0]
    assert text.message.tool_calls is None
    assert text.message.content
    calls = client.chat.completions.create(**options, logit_bias={mark: 100}, max_tokens=150).choices[0]
    assert calls.message.tool_calls
    for call in calls.message.tool_calls[:-1]:
        checked(call)
    none = client.chat.completions.create(**options, tool_choice="none", max_tokens=20).choices[0]
    assert none.message.content == live.answers(HELLO, seed=3, max_tokens=20)[0]


def test_tool_results_in_the_conversation(live: Any, client: openai.OpenAI) -> None:
    call = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, seed=1
    ).choices[0]
    again: list[Any] = [*HELLO, call.message, {"role": "tool", "tool_call_id": "x", "content": "sunny"}]
    made = client.chat.completions.create(model="tiny", messages=again, seed=1, max_tokens=9)
    assert call.message.tool_calls
    function = call.message.tool_calls[0].function  # type: ignore[union-attr]
    written = {"name": function.name, "arguments": json.loads(function.arguments)}
    messages = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [{"function": written}]},
        {"role": "tool", "content": "sunny"},
    ]
    assert made.choices[0].message.content == live.answers(messages, seed=1, max_tokens=9)[0]


def test_calls_of_a_stream_in_the_conversation(client: openai.OpenAI) -> None:
    """Clients that add up the pieces of a stream keep their `index`."""
    call: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    results: Any = [{"role": "tool", "tool_call_id": "call_1", "content": "noon"}]

    def message(extra: dict[str, int]) -> Any:
        return {"role": "assistant", "tool_calls": [{**call, **extra}]}

    made = [
        client.chat.completions.create(
            model="tiny",
            messages=[*HELLO, message(extra), *results],
            tools=[CLOCK],
            seed=1,
            max_tokens=9,
        ).choices[0]
        for extra in ({}, {"index": 0})
    ]
    assert made[0] == made[1]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client's own objects
def test_answers_that_the_client_has_read_are_sent_back(client: openai.OpenAI) -> None:
    """`parse` and `stream` add the content and the arguments as objects; programs append the message as it is."""

    class Letter(pydantic.BaseModel):
        letter: Literal["a", "b"]

    def again(answer: Any) -> None:
        messages = [
            *HELLO,
            answer,
            *([{"role": "tool", "tool_call_id": "x", "content": "y"}] if answer.tool_calls else HELLO),
        ]
        assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, seed=1).choices

    tools: Any = [openai.pydantic_function_tool(Letter)]
    options: Any = {"model": "tiny", "messages": HELLO, "seed": 1}
    forced: Any = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    again(client.chat.completions.parse(**options, response_format=Letter).choices[0].message)
    again(client.chat.completions.parse(**options, **forced).choices[0].message)
    with client.chat.completions.stream(**options, **forced) as stream:
        again(stream.get_final_completion().choices[0].message)
    with client.chat.completions.stream(**options, response_format=Letter) as stream:
        again(stream.get_final_completion().choices[0].message)
    response = client.responses.parse(model="tiny", input="a", text_format=Letter, extra_body={"seed": 1})
    more: Any = [*response.output, {"role": "user", "content": "b"}]
    assert client.responses.create(model="tiny", input=more, max_output_tokens=2).output


def test_a_tokenizer_that_cannot_write_calls(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="its tokenizer lacks characters of the form in which calls are"):
        client.chat.completions.create(model="plain", messages=HELLO, tools=[WEATHER])


def test_parameters_that_are_not_an_object(client: openai.OpenAI) -> None:
    wrong: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
    with pytest.raises(openai.BadRequestError, match="the parameters of f are of type") as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER, wrong])
    assert refused.value.param == "tools"


# responses ------------------------------------------------------------------------------------------------------------


def test_responses(live: Any, client: openai.OpenAI) -> None:
    expected = live.answers(
        [{"role": "system", "content": "a mat"}, {"role": "user", "content": "the cat"}], seed=2, max_tokens=12
    )[0]
    options: dict[str, Any] = {"model": "tiny", "input": "the cat", "instructions": "a mat", "max_output_tokens": 12}
    options |= {"extra_body": {"seed": 2}, "metadata": {"trip": "1"}}
    made = client.responses.create(**options)
    assert made.output_text == expected
    assert made.metadata == {"trip": "1"}
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert made.status in ("completed", "incomplete")
    if made.status == "incomplete":
        assert made.incomplete_details is not None
        assert made.incomplete_details.reason == "max_output_tokens"
    kinds = [event.type for event in client.responses.create(**options, stream=True)]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-1] == f"response.{made.status}"


def test_streamed_response(live: Any, client: openai.OpenAI) -> None:
    for choice in (["Rome"], ["Oslo is far away."]):
        with client.responses.stream(model="tiny", input="the cat", extra_body={"choice": choice}) as stream:
            numbers = [event.sequence_number for event in stream]
            final = stream.get_final_response()
        assert final.output_text == choice[0]
        assert numbers == list(range(len(numbers)))


def test_responses_with_schema_and_tools(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="tiny", input="the cat", text_format=Trip, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, Trip)
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    options: dict[str, Any] = {
        "model": "tiny",
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    made = client.responses.create(**options, input="the cat", extra_body={"seed": 1})
    (call,) = made.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)["city"] in ("Rome", "Oslo")) == ("weather", True)
    with client.responses.stream(**options, input="the cat", extra_body={"seed": 1}) as stream:
        kinds = [event.type for event in stream]
        (same,) = stream.get_final_response().output
    assert same.type == "function_call"
    assert same.arguments == call.arguments
    assert "response.function_call_arguments.delta" in kinds
    assert "response.function_call_arguments.done" in kinds
    again: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "the cat"}]},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    answer = client.responses.create(model="tiny", input=again, max_output_tokens=5)
    assert answer.usage is not None
    # The answer may be shorter than 5 tokens: the prompt contains the call's id, which is random.
    assert answer.usage.output_tokens > 0
    spoken = client.responses.create(
        model="tiny",
        input="the cat",
        max_output_tokens=5,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        extra_body={"seed": 1},
    )
    assert spoken.output[0].content[0].logprobs  # type: ignore[union-attr, index]


# embeddings -----------------------------------------------------------------------------------------------------------


def test_embeddings(live: Any, client: openai.OpenAI) -> None:
    tokenizer, model = live.tokenizers["tiny"], live.reference["tiny"].model
    texts = ["the cat", "a mat", "Rome"]
    made = client.embeddings.create(model="tiny", input=texts)  # the client requests base64 by default
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    by_ids = client.embeddings.create(model="tiny", input=[tokenizer.encode(text) for text in texts])
    for i, text in enumerate(texts):
        with torch.no_grad():
            mean = model.hidden_states(torch.tensor([tokenizer.encode(text)]))[0].mean(dim=0)
        expected = (mean / mean.norm()).tolist()
        assert made.data[i].embedding == pytest.approx(expected, abs=1e-5)
        assert plain.data[i].embedding == pytest.approx(expected, abs=1e-5)
        assert by_ids.data[i].embedding == pytest.approx(expected, abs=1e-5)
    assert made.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in texts)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="a", dimensions=3)


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        *("audio", "function_call", "functions", "prediction"),
        *("web_search_options", "prompt_cache_options", "moderation", "no_such_field"),
    ],
)
def test_unsupported_fields_are_named(client: openai.OpenAI, field: str) -> None:
    with pytest.raises(openai.BadRequestError, match=field) as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={field: "x"})
    assert refused.value.param == field
    assert refused.value.code in ("unsupported_parameter", "unknown_parameter")
    client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, extra_body={"audio": None})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": [WEATHER], "extra_body": {"beams": 2}}, "tools"),
        ({"extra_body": {"beams": 2, "regex": "a"}}, "regex"),
        ({"extra_body": {"regex": "("}}, "regex"),
        ({"extra_body": {"regex": "a", "choice": ["b"]}}, "choice"),
        ({"extra_body": {"grammar": "nonsense ("}}, "grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}}},
            "response",
        ),
        ({"extra_body": {"beams": 2}, "temperature": 1}, "temperature"),
        ({"extra_body": {"min_tokens": 9}, "max_tokens": 3}, "min_tokens"),
        ({"extra_body": {"stop_token_ids": [99999]}}, "stop_ids"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_invalid_values_are_named(client: openai.OpenAI, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError, match=named) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **wrong})
    assert refused.value.type == "invalid_request_error"


def test_prompt_longer_than_the_context(live: Any, client: openai.OpenAI) -> None:
    long = "the cat sat on a mat. " * 100
    with pytest.raises(openai.BadRequestError, match="context") as refused:
        client.completions.create(model="tiny", prompt=long)
    assert refused.value.code == "context_length_exceeded"
    made = client.completions.create(
        model="tiny", prompt=long, max_tokens=10, seed=1, extra_body={"overflow": "truncate"}
    )
    assert made.choices[0].text == live.texts(long, max_tokens=10, seed=1, overflow="truncate")[0]


# asyncio --------------------------------------------------------------------------------------------------------------


def test_concurrent_requests(live: Any) -> None:
    async def stream(client: openai.AsyncOpenAI, seed: int) -> str:
        chunks = await client.chat.completions.create(
            model="tiny", messages=HELLO, seed=seed, max_tokens=15, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in chunks])

    async def whole(client: openai.AsyncOpenAI, seed: int) -> str:
        made = await client.chat.completions.create(model="tiny", messages=HELLO, seed=seed, max_tokens=15)
        return made.choices[0].message.content or ""

    async def response(client: openai.AsyncOpenAI, seed: int) -> str:
        made = await client.responses.create(
            model="tiny", input="the cat sat", max_output_tokens=15, extra_body={"seed": seed}
        )
        return made.output_text

    async def all_of_them() -> list[str]:
        async with live.async_client() as client:
            kinds = [stream, whole, response]
            made = list(await asyncio.gather(*(kinds[seed % 3](client, seed) for seed in range(24))))
            assert "tiny" in [model.id async for model in client.models.list()]
            assert (await client.embeddings.create(model="tiny", input="a")).data[0].embedding
            completion = await client.completions.create(model="tiny", prompt="the", max_tokens=2, seed=1)
            return [*made, completion.choices[0].text]

    *made, completion = asyncio.run(all_of_them())
    assert made == [live.answers(HELLO, seed=seed, max_tokens=15)[0] for seed in range(24)]
    assert completion == live.texts("the", seed=1, max_tokens=2)[0]

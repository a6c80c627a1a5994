"""Parts of the server on their own: concurrency, keys, model names, and tool calls."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers
from tokenizers import AddedToken
from tokenizers import Tokenizer as Pipeline

from gptsmith.engine.grammar import Grammar
from gptsmith.errors import UsageError
from gptsmith.server.auth import Keys, RateLimiter, parse_rate, read_keys
from gptsmith.server.concurrency import ConcurrencyLimiter
from gptsmith.server.errors import ApiError
from gptsmith.server.models import ModelRegistry, default_name
from gptsmith.server.tools import ToolCallFormat, ToolCallParser, detect_format
from gptsmith.tokenizer import Tokenizer, train_bpe
from gptsmith.tokenizer.chat import ChatTemplate

# concurrency ----------------------------------------------------------------------------------------------------------


def test_slots_are_first_in_first_out() -> None:
    async def scenario() -> None:
        limiter = ConcurrencyLimiter(2, 10)
        slots = [await limiter.acquire(), await limiter.acquire()]
        order: list[int] = []

        async def request(number: int) -> None:
            slot = await limiter.acquire()
            order.append(number)
            await asyncio.sleep(0)
            slot.release()

        requests = [asyncio.create_task(request(i)) for i in range(6)]
        await asyncio.sleep(0)
        assert limiter.waiting == 6
        requests[2].cancel()
        slots[0].release()
        slots[0].release()  # releasing twice has no effect
        await asyncio.gather(*requests, return_exceptions=True)
        assert order == [0, 1, 3, 4, 5]
        slots[1].release()
        assert limiter.in_use == limiter.waiting == 0

    asyncio.run(scenario())


def test_slot_granted_to_a_canceled_request_is_released() -> None:
    async def scenario() -> None:
        limiter = ConcurrencyLimiter(1, 10)
        slot = await limiter.acquire()
        late = asyncio.create_task(limiter.acquire())
        await asyncio.sleep(0)
        slot.release()
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        assert limiter.in_use == 0
        slot = await limiter.acquire()
        with pytest.raises(ApiError) as refused:
            await limiter.acquire(asyncio.get_running_loop().time() + 0.01)
        assert refused.value.status == 504
        slot.release()
        assert (limiter.in_use, limiter.waiting) == (0, 0)

    asyncio.run(scenario())


# keys -----------------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    keys = Keys(["abc", "abd", "abc"])
    assert keys.check(Headers({"authorization": "bearer abd"})) == "key 2"
    for header in ("Bearer ab", "Bearer abcd", "Basic abc", "abc", "Bearer", ""):
        with pytest.raises(ApiError):
            keys.check(Headers({"authorization": header}))
    assert not Keys()
    assert "abc" not in str(vars(keys))


def test_read_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# a comment\n\n one \ntwo\n")
    assert read_keys(path) == ["one", "two"]
    path.write_text("# none\n")
    for bad in (path, tmp_path / "missing"):
        with pytest.raises(UsageError):
            read_keys(bad)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.integers(1, 5))
def test_rate_limit(times: list[float], count: int) -> None:
    limiter, taken, waits = RateLimiter(count, 10.0), [], []
    for now in sorted(times):
        try:
            limiter.take("x", now)
            taken.append(now)
        except ApiError as error:
            waits.append(error.retry_after or 0)
            limiter.take(f"another, {len(waits)}", now)
    assert all(0 < wait <= 10.0 / count + 1e-6 for wait in waits)
    for i, begin in enumerate(taken):  # a full bucket, and the tokens added in that time
        assert len([t for t in taken[i:] if t < begin + 10.0]) <= 2 * count


def test_parse_rate() -> None:
    assert (parse_rate("60/min").count, parse_rate("60/min").seconds) == (60, 60)
    assert parse_rate("5/s").seconds == 1
    for bad in ("5", "x/min", "0/s", "5/fortnight", "-1/s"):
        with pytest.raises(UsageError):
            parse_rate(bad)


# names ----------------------------------------------------------------------------------------------------------------


def test_model_names(tmp_path: Path) -> None:
    (tmp_path / "bard").mkdir()
    (tmp_path / "small.Q4.gguf").write_bytes(b"")
    assert default_name(str(tmp_path / "bard")) == "bard"
    assert default_name(str(tmp_path / "small.Q4.gguf")) == "small.Q4"
    assert default_name("org/name") == "org/name"

    def load(spec: str) -> Any:
        raise AssertionError

    models = ModelRegistry(["a", "b"], load, aliases={"c": "b"}, adapters={"d": ("a", tmp_path)})
    assert models.names == ["a", "b", "d", "c"]
    wrongs: tuple[dict[str, Any], ...] = (
        {"specs": ["a", "a"]},
        {"specs": []},
        {"specs": ["a"], "aliases": {"x": "b"}},
        {"specs": ["a"], "aliases": {"a": "a"}},
        {"specs": ["a"], "adapters": {"x": ("b", tmp_path)}},
    )
    for wrong in wrongs:
        with pytest.raises(UsageError):
            ModelRegistry(load=load, **wrong)


# tools ----------------------------------------------------------------------------------------------------------------

QWEN = """\
{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant' }}
{%- if message.content %}{{ '\\n' + message.content }}{% endif %}
{%- for call in message.tool_calls %}{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA = """\
{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{% if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}{{ '<|im_start|>assistant\\n\\n{"name": "' + call.name + '", ' }}
{{- '"parameters": ' }}{{ call.arguments | tojson }}{{ '}<|im_end|>' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n\\n' + message.content + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"""
LIST = """\
{% if tools %}{{ '[TOOLS]' + (tools | tojson) }}{% endif %}{% for message in messages %}{% if message.tool_calls %}
{{- '[CALLS][' }}{% for call in message.tool_calls %}{{ '{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}' }}{% if not loop.last %}, {% endif %}{% endfor %}{{ ']<|im_end|>' }}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{% endfor %}"""
TOOLS: list[dict[str, Any]] = [
    {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "s": {"type": "string"}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
    {"name": "g_2"},
]


def template(source: str, special: bool) -> ChatTemplate:
    pipeline = Pipeline.from_str(train_bpe(["hello tool_call name arguments {} " * 20], 260).to_json())
    pipeline.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    pipeline.add_tokens([AddedToken(text, special=special) for text in ("<tool_call>", "</tool_call>", "[CALLS]")])
    return ChatTemplate(Tokenizer(pipeline.to_str(), {"eos_token": "<|im_end|>", "chat_template": source}))


def written(call_format: ToolCallFormat, calls: list[tuple[str, str]]) -> str:
    each = [call_format.before + name + call_format.middle + arguments + call_format.close for name, arguments in calls]
    return call_format.prefix + call_format.between.join(each) + call_format.suffix


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("source", "trigger"), [(QWEN, "<tool_call>"), (LLAMA, '{"name": "'), (LIST, "[CALLS]")])
def test_format_is_what_the_template_writes(source: str, trigger: str, special: bool) -> None:
    chat = template(source, special)
    call_format = detect_format(chat)
    assert call_format is not None
    assert (call_format.trigger, call_format.several) == (trigger, source is not LLAMA)
    calls = [("f", '{"x": 12, "s": "a}\\"{"}'), ("g_2", "{}")][: 2 if call_format.several else 1]
    asked: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
    messages = [
        *asked,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": n, "arguments": json.loads(a)}} for n, a in calls],
        },
    ]
    assert written(call_format, calls) in chat.render(messages, add_generation_prompt=False)
    tokenizer = chat.tokenizer
    assert tokenizer.eos_id is not None

    def accepts(text: str, mode: str) -> bool:
        state = Grammar(tokenizer, call_format.grammar(TOOLS, mode)).start()
        for id in chat._encode_whole(text) if text else []:
            if not state.allowed()[id]:
                return False
            state.push(id)
        return state.finished or bool(state.allowed()[tokenizer.eos_id])

    good, wrong = written(call_format, calls), written(call_format, [("f", '{"x": "a"}')])
    for mode in ("auto", "required"):
        assert accepts(good, mode)
        assert not accepts(wrong, mode)
        assert not accepts(written(call_format, [("h", "{}")]), mode)
        assert accepts("hello", mode) == accepts("hello " + good, mode) == (mode == "auto")
        assert not accepts(good + "hello", mode)
    assert not accepts("hello " + call_format.trigger + "!", "auto")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parser_with_any_chunking(data: st.DataObject) -> None:
    call_format = detect_format(template(data.draw(st.sampled_from([QWEN, LIST])), False))
    assert call_format is not None
    text = data.draw(st.text("hi<t{[C\n", max_size=12))
    names = st.sampled_from(["f", "g_2"])
    values = st.dictionaries(st.text('a"}{\\', max_size=3), st.text('"\\{}é', max_size=4), max_size=2)
    calls = [(n, json.dumps(v)) for n, v in data.draw(st.lists(st.tuples(names, values), max_size=3))]
    if call_format.trigger in text + (call_format.trigger[:-1] if calls else ""):
        return
    rest = text + (written(call_format, calls) if calls else "")
    parser, outside, read = ToolCallParser(call_format), "", []
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        more, pieces = parser.push(rest[:size])
        outside, rest = outside + more, rest[size:]
        for piece in pieces:
            if piece.name is not None:
                read.append([piece.name, ""])
            read[piece.index][1] += piece.arguments
    assert outside + parser.finish() == text
    assert [tuple(call) for call in read] == calls


def test_templates_without_a_format() -> None:
    for source in ("{{ messages[0].content }}", "{{ tools }}", "{% if tools %}x{% endif %}{{ messages[0].content }}"):
        assert detect_format(template(source, False)) is None
    assert detect_format(ChatTemplate(train_bpe(["abc"], 260))) is None

"""Answers in channels: read as they arrive, allowed by the grammar, and rendered back by the template."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from gptsmith.engine.grammar import Grammar
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate, _Marks
from gptsmith.tokenizer.harmony import MARKS, HarmonyParser
from tests.foreign import byte_level

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tool_templates" / "harmony.jinja"
QUESTION: dict[str, Any] = {"role": "user", "content": "a question"}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": "does f", "parameters": PARAMETERS}}
]


def make_template(source: str) -> ChatTemplate:
    pipeline = byte_level()
    pipeline.add_special_tokens([AddedToken(text, special=True) for text in MARKS])
    config = {"eos_token": "<|return|>", "bos_token": "<|endoftext|>", "chat_template": source}
    return ChatTemplate(Tokenizer(pipeline.to_str(), config))


def published() -> str:
    """The template that gpt-oss is published with, as TRL has it."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("needs TRL, which has the template of gpt-oss")
    return (Path(found.origin).parent / "chat_templates" / "gptoss.jinja").read_text()


@pytest.fixture(params=["fixture", "published"])
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return make_template(FIXTURE.read_text() if request.param == "fixture" else published())


Read = tuple[str, str, list[tuple[str, str]]]  # reasoning, text, name and arguments of each call


def read(pieces: list[str], **options: Any) -> Read:
    parser = HarmonyParser(**options)
    reasoning, text, calls = "", "", list[list[str]]()
    for piece in (*pieces, None):
        new, deltas = parser.finish() if piece is None else parser.push(piece)
        reasoning, text = reasoning + parser.reasoning, text + new
        for delta in deltas:
            if delta.name is not None:
                assert delta.id
                assert delta.index == len(calls)
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
    return reasoning, text, [(name, arguments) for name, arguments in calls]


THINKS = "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (f"{THINKS}<|channel|>final<|message|>Four.", ("Two and two.", "Four.", [])),
        (f"{THINKS}<|channel|>final<|message|>Four.<|return|>", ("Two and two.", "Four.", [])),
        ("<|channel|>final<|message|>Four < 5 <|x", ("", "Four < 5 <|x", [])),
        (
            f'{THINKS}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"x": 1}}<|call|>',
            ("Two and two.", "", [("f", '{"x": 1}')]),
        ),
        (' to=functions.f<|channel|>commentary json<|message|>{"x": "}<"}', ("", "", [("f", '{"x": "}<"}')])),
        ('<|channel|>analysis to=functions.f<|message|>{"x": 1}', ("", "", [("f", '{"x": 1}')])),
        (
            f"<|channel|>commentary<|message|>I look.<|end|>{THINKS}<|channel|>final<|message|>Four.",
            ("Two and two.", "I look.\n\nFour.", []),
        ),
        (f"{THINKS}{THINKS}", ("Two and two.\n\nTwo and two.", "", [])),
        ("<|channel|>commentary to=browser.search<|message|>query", ("query", "", [])),
        ("<|channel|>analysis<|message|>cut o", ("cut o", "", [])),
        ("<|channel|>fin", ("", "", [])),
        ("to=functio", ("", "to=functio", [])),
        ("plain text, to=x", ("", "plain text, to=x", [])),
        (" \n", ("", "", [])),
        ("<|start|>assistant<|channel|>final<|message|>Four.", ("", "Four.", [])),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", ("a", "b", [])),
    ],
)
def test_channels_are_told_apart(written: str, expected: Read) -> None:
    assert read([written]) == expected
    assert read(list(written)) == expected


def test_an_answer_that_continues_a_text() -> None:
    assert read(["the rest", "<|return|>"], in_text=True) == ("", "the rest", [])


PIECES = st.lists(
    st.sampled_from([*MARKS, "analysis", "final", "commentary", " to=functions.f", "to=", "assistant", '{"x": ', "1}"])
    | st.text('<|> a\n{}"', max_size=4)
)


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES, data=st.data())
def test_any_cut_into_pieces_gives_the_same(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    cut = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    whole = read([text])
    assert read(cut) == whole
    assert read(list(text)) == whole
    assert not any(mark in part for mark in MARKS for part in whole[:2])


def test_the_format_is_found(template: ChatTemplate) -> None:
    assert template.harmony is not None
    special = template.tokenizer.special_tokens()
    assert [special[id] for id in template.end_ids()] == ["<|call|>", "<|return|>"]
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    assert make_template(chatml).harmony is None


def test_earlier_turns_are_rendered_back(template: ChatTemplate) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 31}}}
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "reasoning_content": "I need f.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "twelve"},
    ]
    text = template.render([QUESTION, *turns], tools=TOOLS, generic_tools=True)
    assert " to=functions.f<|channel|>commentary json<|message|>" in text
    assert text.index("31") < text.index("twelve")
    if "thinking" in template.source:
        assert "<|start|>assistant<|channel|>analysis<|message|>I need f.<|end|><|start|>assistant to=" in text
    answered = {"role": "assistant", "content": "So it is.", "reasoning_content": "Twelve."}
    later = template.render([QUESTION, *turns, answered, QUESTION], tools=TOOLS, generic_tools=True)
    assert "<|start|>assistant<|channel|>final<|message|>So it is.<|" in later
    both = {**turns[0], "content": "I look.", "reasoning_content": "I need f."}  # which the published one refuses
    assert "functions.f" in template.render([QUESTION, both, turns[1]], tools=TOOLS, generic_tools=True)


@pytest.mark.parametrize(
    ("written", "auto", "required"),
    [
        (f"{THINKS}<|channel|>final<|message|>Four.", True, False),
        (f'{THINKS}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"x": 1}}', True, True),
        ('<|channel|>commentary to=functions.f<|message|>{"x": 1}', True, True),
        (' to=functions.f<|channel|>commentary json<|message|>{"x": 1}', True, True),
        ('<|channel|>commentary to=functions.f<|message|>{"x": "a"}', False, False),
        ('<|channel|>commentary to=functions.g<|message|>{"x": 1}', False, False),
        ("<|channel|>analysis<|message|>only thoughts<|end|>", False, False),
    ],
)
def test_the_grammar_enforces_the_format(template: ChatTemplate, written: str, auto: bool, required: bool) -> None:
    assert template.harmony is not None
    tokenizer = template.tokenizer
    ids = template._encode_parts(written, _Marks("\ue000", "\ue001", "\ue002"))
    for mode, expected in (("auto", auto), ("required", required)):
        state = Grammar(tokenizer, template.harmony.grammar([tool["function"] for tool in TOOLS], mode)).start()
        allowed = True
        for id in ids:
            allowed = allowed and bool(state.allowed()[id])
            if not allowed:
                break
            state.push(id)
        assert tokenizer.eos_id is not None
        assert (allowed and (state.finished or bool(state.allowed()[tokenizer.eos_id]))) == expected

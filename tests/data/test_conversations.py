"""Conversations: the forms that people have, the ids that a served model sees, and the mask of what is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.data.conversations import Counts, Renderer, RowError, as_conversation, read_conversations
from gptsmith.errors import DataError
from gptsmith.tokenizer import Tokenizer, train_bpe
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.chatml import with_chat_template

CALL = {"name": "weather", "arguments": {"place": "Rome"}}
TOOL = {"name": "weather", "description": "the weather", "parameters": {"type": "object", "properties": {}}}
TEXT = 'What is the weather in Rome? It is sunny. system user assistant tool_call 0123456789 {}:,"\n' * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chat_template(train_bpe([TEXT], 300))[0]


def turns(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in as_conversation(values).messages]


ASKED = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("messages", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}),
        (
            "messages",
            {"messages": '[{"role": "user", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]'},
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}),
        ("alpaca", {"instruction": "Hi", "output": "Hello", "text": "ignored"}),
        ("prompt-completion", {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello"}),
        ("prompt-completion", {"prompt": "Hi", "completion": [{"role": "assistant", "content": "Hello"}]}),
        ("question-answer", {"question": "Hi", "answer": "Hello", "source": None}),
    ],
)
def test_forms(form: str, values: dict[str, Any]) -> None:
    assert as_conversation(values).form == form
    assert turns(values) == ASKED


def test_further_parts_of_forms() -> None:
    assert turns({"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Be brief."}) == [
        ("system", "Be brief."),
        ("user", "Add\n1 and 2"),
        ("assistant", "3"),
    ]
    assert turns({"instruction": "c", "output": "d", "history": [["a", "b"]]}) == [
        *(("user", "a"), ("assistant", "b")),
        *(("user", "c"), ("assistant", "d")),
    ]
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert turns({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Hello"}]}) == ASKED
    text = as_conversation({"prompt": "2 + 2 =", "completion": " 4"})
    assert text.is_text
    assert (text.prompt, text.completion) == ("2 + 2 =", " 4")


def test_tool_calls() -> None:
    """OpenAI's form with arguments as text, and that of Glaive in ShareGPT, are the same conversation."""
    openai = {
        "tools": json.dumps([{"type": "function", "function": TOOL}]),
        "messages": [
            {"role": "user", "content": "Rome?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}],
            },
            {"role": "tool", "content": {"sky": "clear"}},
            {"role": "assistant", "content": "It is sunny."},
        ],
    }
    glaive = {
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "Rome?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": '{"sky": "clear"}'},
            {"from": "gpt", "value": "It is sunny."},
        ],
    }
    first, second = as_conversation(openai), as_conversation(glaive)
    assert (first.messages, first.tools) == (second.messages, second.tools)
    assert first.messages[1]["tool_calls"][0]["function"] == CALL


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "once"}, r"continued pretraining: gptsmith train DATA --init MODEL"),
        ({"mesages": []}, r"Did you mean 'messages'"),
        ({}, "the fields \\(none\\) are not those of a conversation"),
        ({"messages": []}, "the fields|is empty"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "usr", "content": "Hi"}]}, "message 1 has the unknown role 'usr'. Did you mean 'user'"),
        ({"messages": ["Hi"]}, "message 1 is not an object"),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "gpt", "content": " "}]},
            "answer .* is empty",
        ),
        ({"instruction": "Hi", "output": ""}, "answer of the assistant is empty"),
        ({"instruction": "Hi", "output": None}, "answer of the assistant is empty"),
        ({"prompt": "Hi", "completion": ""}, "the completion is empty"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preference training"),
        ({"prompt": "Hi", "completion": "a", "label": False}, "whether its answer is good"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "a"}]},
            "message 1 has a part of type 'audio'",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "weight is not supported",
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "function_call", "content": "{"}]}, "not valid JSON"),
    ],
)
def test_rows_that_cannot_be_used(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        as_conversation(values)


def test_bad_rows_are_named_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    good = {"question": "a", "answer": "b"}
    path.write_text("\n".join(map(json.dumps, [good, {"question": "a", "answer": ""}, good, {"x": 1}])))
    with pytest.raises(DataError, match=r"chats.jsonl, line 2: an answer of the assistant is empty. .*--bad-rows skip"):
        list(read_conversations(path))
    counts = Counts()
    assert len(list(read_conversations(path, on_bad="skip", counts=counts))) == 2
    assert counts.forms == {"question-answer": 2}
    assert sum(counts.skipped.values()) == 2
    assert "1: an answer of the assistant is empty (first: " in counts.describe_skipped()


text_strategy = st.text(alphabet=st.sampled_from("Whatis Rome?\n.<|im_end|>"), min_size=1, max_size=20)


@given(st.lists(st.tuples(text_strategy, text_strategy), min_size=1, max_size=3), st.sampled_from(["all", "last"]))
@settings(deadline=None)
def test_ids_are_those_of_serving(tokenizer: Tokenizer, pairs: list[tuple[str, str]], train_on: Any) -> None:
    """Before every answer the ids are the prompt that a served model gets; what is trained on is what it generates."""
    if any(not answer.strip() or not question.strip() for question, answer in pairs):
        return
    messages: list[dict[str, Any]] = []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, trained, _ = Renderer(tokenizer, train_on=train_on).render(as_conversation({"messages": messages}))
    template = ChatTemplate(tokenizer)
    expected = [False] * len(ids)
    for i in range(1, len(messages), 2):
        prompt = template.encode(messages[:i])
        assert ids[: len(prompt)] == prompt
        said = tokenizer.encode(messages[i]["content"])
        end = len(prompt) + len(said)
        assert ids[len(prompt) : end] == said
        assert ids[end] == tokenizer.eos_id
        if train_on == "all" or i == len(messages) - 1:
            expected[len(prompt) : end + 1] = [True] * (len(said) + 1)
    assert trained == expected


def test_prompt_and_completion_are_encoded_apart(tokenizer: Tokenizer) -> None:
    conversation = as_conversation({"prompt": "the weath", "completion": "er in Rome"})
    ids, trained, _ = Renderer(tokenizer).render(conversation)
    prompt: list[int] = tokenizer.encode_prompt("the weath")
    assert ids == [*prompt, *tokenizer.encode("er in Rome"), tokenizer.eos_id]
    assert trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert Renderer(tokenizer).prompt(conversation) == prompt


@pytest.mark.parametrize("name", ["hermes", "granite", "mistral_nemo", "qwen3_coder", "gemma3", "plain"])
def test_calls_are_written_as_they_are_served(name: str) -> None:
    """The ids of a training row equal those of the prompt that the server makes, and of the call that it expects."""
    from tests.tokenizer.test_tools import QUESTION, TEMPLATE, TOOLS, answer, parse

    template = TEMPLATE[name]
    call = answer([("f", {"x": 1})])
    example = Renderer(template.tokenizer).render(as_conversation({"messages": [QUESTION, call], "tools": TOOLS}))
    prompt = template.encode([QUESTION], tools=TOOLS, generic_tools=True)
    assert example.ids[: len(prompt)] == prompt
    trained = [id for id, used in zip(example.ids, example.trained, strict=True) if used]
    _, calls = parse(template.tool_format, [template.tokenizer.decode(trained, skip_special_tokens=False)])
    assert [(called, json.loads(arguments)) for _, called, arguments in calls] == [("f", {"x": 1})]


def test_tools_are_written_and_calls_trained_on(tokenizer: Tokenizer) -> None:
    values = {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "Rome?"},
            {"role": "assistant", "tool_calls": [{"function": CALL}]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ],
    }
    ids, trained, _ = Renderer(tokenizer).render(as_conversation(values))
    learned = tokenizer.decode([id for id, t in zip(ids, trained, strict=True) if t], skip_special_tokens=False)
    assert json.dumps(CALL) in learned
    assert learned.count("<|im_end|>") == 2
    assert "sunny</tool_response>" not in learned.replace("\n", "")
    assert "the weather" in tokenizer.decode(ids)

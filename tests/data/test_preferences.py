"""Preferences: the forms that people have, their token ids, and rows that hold none."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from gptsmith.data.conversations import Conversation, Counts, RowError
from gptsmith.data.preferences import (
    Preference,
    PreferenceRenderer,
    Rated,
    UndecidedError,
    as_preferences,
    is_preference,
    read_preferences,
)
from gptsmith.data.prompts import PromptRenderer, as_prompt
from gptsmith.errors import DataError
from gptsmith.tokenizer import Tokenizer, train_bpe
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.chatml import with_chat_template

ASKED = [{"role": "user", "content": "Hi"}]
GOOD, BAD = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "No"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
TEXT = 'What is the weather in Rome? It is sunny. system user assistant tool_call 0123456789 {}:,"\n' * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chat_template(train_bpe([TEXT], 300))[0]


def only(values: dict[str, Any], **options: Any) -> Preference:
    (found,) = as_preferences(values, **options)
    assert isinstance(found, Preference)
    return found


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("prompt", {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]}),
        ("prompt", {"prompt": ASKED, "chosen": "Hello", "rejected": "No"}),
        ("prompt", {"prompt": ASKED, "chosen": GOOD, "rejected": "No"}),
        ("prompt", {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}),
        # the binarized UltraFeedback: the prompt is in all of them
        ("prompt", {"prompt": "Hi", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD], "messages": [*ASKED, GOOD]}),
        ("prompt", {"prompt": ASKED, "chosen": [*ASKED, GOOD], "rejected": [BAD]}),
        ("conversations", {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}),
        ("hh", {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "No"},
            },
        ),
        ("messages", {"messages": ASKED, "chosen": GOOD, "rejected": BAD}),
        ("question", {"question": "Hi", "chosen": "Hello", "rejected": "No"}),
        ("alpaca", {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "No"}),
        ("comparison", {"prompt": ASKED, "chosen": "Hello", "rejected": "No", "choice": "left"}),
        ("prompt", {"input": {"messages": ASKED}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}),
        ("prompt", {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD], "id": 3, "label": None}),
    ],
)
def test_forms_of_pairs(form: str, values: dict[str, Any]) -> None:
    pair = only(values)
    assert said(pair.chosen) == [("user", "Hi"), ("assistant", "Hello")]
    assert said(pair.rejected) == [("user", "Hi"), ("assistant", "No")]
    assert pair.start == 1
    assert pair.form == form or (form, pair.form) == ("prompt", "messages")
    assert is_preference(values)


def test_texts_stay_texts() -> None:
    pair = only({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "system": ""})
    assert pair.start == 0
    assert (pair.chosen.prompt, pair.chosen.completion, pair.rejected.completion) == ("2 + 2 =", " 4", " 5")
    assert only({"prompt": "", "chosen": "A fine film.", "rejected": "A bad film."}).chosen.prompt == ""


def test_system_messages_are_kept() -> None:
    for values in (
        {"system": "Be brief.", "question": "Hi", "chosen": "Hello", "rejected": "No"},
        {"system": "Be brief.", "prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"system": "Be brief.", "prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
        {
            "prompt": "Hi",
            **{
                name: [{"role": "system", "content": "Be brief."}, *ASKED, answer]
                for name, answer in (("chosen", GOOD), ("rejected", BAD))
            },
        },
    ):
        pair = only(values)
        assert said(pair.chosen) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
        assert pair.start == 2


def test_answers_of_several_messages() -> None:
    tool = {"role": "tool", "content": "21 degrees"}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    pair = only({"prompt": ASKED, "chosen": [call, tool, GOOD], "rejected": [BAD]})
    assert pair.start == 1
    assert [message["role"] for message in pair.chosen.messages] == ["user", "assistant", "tool", "assistant"]
    assert only({"chosen": [*ASKED, call, tool, GOOD], "rejected": [*ASKED, call, tool, BAD]}).start == 3


def test_the_prompt_is_all_that_both_conversations_share() -> None:
    talk = "\n\nHuman: a\n\nAssistant: b: c\n\nHuman: d"
    pair = only({"chosen": f"{talk}\n\nAssistant: good", "rejected": f"{talk}\n\nAssistant: bad\n\nline"})
    turns = [("user", "a"), ("assistant", "b: c"), ("user", "d")]
    assert said(pair.chosen) == [*turns, ("assistant", "good")]
    assert said(pair.rejected) == [*turns, ("assistant", "bad\n\nline")]
    assert pair.start == 3
    with pytest.raises(RowError, match="the rejected answer is empty"):
        only({"chosen": f"{talk}\n\nAssistant: good", "rejected": f"{talk}\n\nAssistant: "})


def test_margins() -> None:
    texts = {"prompt": "a", "chosen": "b", "rejected": "c"}
    scores = {"score_chosen": 8, "score_rejected": "5.5"}
    assert only(texts).margin is None
    assert only({**texts, "margin": 2}).margin == 2
    assert only({**texts, **scores}).margin is None
    assert only({**texts, **scores}, score_margins=True).margin == 2.5
    assert only({**texts, **scores, "margin": 1}, score_margins=True).margin == 1
    with pytest.raises(RowError, match="score_chosen is below score_rejected"):
        only({**texts, "score_chosen": 1, "score_rejected": 2}, score_margins=True)
    for bad in (True, "much", float("nan"), float("inf"), [1]):
        with pytest.raises(RowError, match="margin is not a finite number"):
            only({**texts, "margin": bad})


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [2, 1, 3]},
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 0.9, -1]},
        {
            "prompt": "q",
            "completions": [{"response": t, "overall_score": s} for t, s in (("a", 2), ("b", 3), ("c", 1))],
        },
        {"prompt": "q", "completions": [{"text": t, "rank": r} for t, r in (("a", 2), ("b", 1), ("c", 3))]},
    ],
)
def test_rankings(values: dict[str, Any]) -> None:
    pairs = as_preferences(values)
    found = {(pair.chosen.completion, pair.rejected.completion) for pair in pairs if isinstance(pair, Preference)}
    assert found == {("b", "a"), ("b", "c"), ("a", "c")}


def test_lists_of_answers_alone_are_no_preference() -> None:
    assert not is_preference({"question": "q", "answers": ["a", "b"]})
    assert not is_preference({"question": "q", "answers": [{"text": "a"}]})


def test_margins_of_rankings() -> None:
    values = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 4, 1]}
    pairs = [pair for pair in as_preferences(values, score_margins=True) if isinstance(pair, Preference)]
    assert [(pair.chosen.completion, pair.rejected.completion, pair.margin) for pair in pairs] == [
        ("b", "a", 3),
        ("b", "c", 3),
    ]


@pytest.mark.parametrize("label", [True, "True", "true", 1, "1"])
def test_rated_answers(label: Any) -> None:
    for values in (
        {"prompt": "q", "completion": "a", "label": label},
        {"messages": [*ASKED, GOOD], "label": label},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "kto_tag": label},
        {"instruction": "Hi", "output": "Hello", "kto_tag": label},
    ):
        (rated,) = as_preferences(values)
        assert isinstance(rated, Rated)
        assert rated.desirable
        assert is_preference(values)
    (rated,) = as_preferences({"prompt": "q", "completion": "a", "label": not label if label is True else "0"})
    assert isinstance(rated, Rated)
    assert not rated.desirable


@pytest.mark.parametrize(
    ("message", "values"),
    [
        ("the chosen answer equals the rejected one", {"prompt": "q", "chosen": "a", "rejected": "a "}),
        ("the chosen answer equals the rejected one", {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, GOOD]}),
        ("the chosen answer is empty", {"prompt": "q", "chosen": " ", "rejected": "a"}),
        ("the rejected answer is empty", {"prompt": ASKED, "chosen": [GOOD], "rejected": []}),
        ("the rejected answer is empty", {"prompt": ASKED, "chosen": GOOD, "rejected": {**BAD, "content": ""}}),
        (
            "the row has no rejected answer. Did you mean 'rejected' by 'reject'",
            {"prompt": "q", "chosen": "a", "reject": "b"},
        ),
        ("the row has no chosen answer", {"prompt": "q", "rejected": "b"}),
        ("the row has no prompt", {"chosen": "a", "rejected": "b"}),
        ("the row has no prompt", {"chosen": [GOOD], "rejected": [BAD]}),
        (
            "the prompts of chosen and rejected differ in message 1",
            {"chosen": [*ASKED, GOOD], "rejected": [{"role": "user", "content": "Ho"}, BAD]},
        ),
        (
            "the prompts of chosen and rejected differ in message 3",
            {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, GOOD, *ASKED, BAD]},
        ),
        (
            "the prompts of chosen and rejected differ",
            {"chosen": [*ASKED, GOOD, *ASKED, GOOD], "rejected": [*ASKED, BAD, *ASKED, GOOD]},
        ),
        (
            "the chosen conversation does not begin with the prompt of the row",
            {"prompt": "Ho", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        ),
        ("does not end with a message of the assistant", {"prompt": ASKED, "chosen": ASKED, "rejected": "b"}),
        ("the prompt ends with a message of the assistant", {"prompt": [*ASKED, GOOD], "chosen": "a", "rejected": "b"}),
        ("chosen: not valid JSON|the messages are not a list", {"prompt": "q", "chosen": 3, "rejected": "b"}),
        ("unknown role 'asistant'", {"prompt": "q", "chosen": {"role": "asistant", "content": "a"}, "rejected": "b"}),
        ("ranks has 1 entries, but completions has 2", {"prompt": "q", "completions": ["a", "b"], "ranks": [1]}),
        ("completions are not ranked", {"prompt": "q", "completions": ["a", "b"]}),
        ("completions has 1 answers", {"prompt": "q", "completions": ["a"], "ranks": [1]}),
        ("the completions\\[0\\] answer equals", {"prompt": "q", "completions": ["a", "a"], "ranks": [1, 2]}),
        ("completions\\[1\\] answer is empty", {"prompt": "q", "completions": ["a", ""], "ranks": [1, 2]}),
        ("scores\\[1\\] is not a finite number", {"prompt": "q", "completions": ["a", "b"], "scores": [1, None]}),
        ("but no prompt", {"completions": ["a", "b"], "scores": [1, 2]}),
        ("label is 'good'", {"prompt": "q", "completion": "a", "label": "good"}),
        ("kto_tag is 2", {"prompt": "q", "completion": "a", "kto_tag": 2}),
        ("the completion is empty", {"prompt": "q", "completion": "", "label": True}),
        ("does not end with an answer", {"messages": [*ASKED, GOOD, *ASKED], "label": True}),
        ("Did you mean 'chosen'", {"prompt": "q", "choosen": "a", "rejcted": "b"}),
        ("are not those of a preference", {"text": "a film", "label": 1}),
        ("are not those of a preference", {"messages": [*ASKED, GOOD]}),
    ],
)
def test_rows_that_are_no_preference(message: str, values: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=message):
        as_preferences(values)


@pytest.mark.parametrize("choice", ["tie", "both_bad"])
def test_undecided_rows(choice: str) -> None:
    with pytest.raises(UndecidedError):
        as_preferences({"prompt": ASKED, "chosen": None, "rejected": None, "choice": choice})
    with pytest.raises(UndecidedError):
        as_preferences({"prompt": "q", "completions": ["a", "b"], "choice": choice, "seeds": [1, 2]})
    with pytest.raises(UndecidedError):
        as_preferences({"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]})


FIELDS = [
    "prompt",
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "question",
    "instruction",
    "input",
    "history",
    "system",
    "tools",
    "choice",
    "margin",
    "score_chosen",
    "score_rejected",
    "completions",
    "responses",
    "ranks",
    "scores",
    "label",
    "kto_tag",
    "completion",
    "text",
    "preferred_output",
]
LEAVES: tuple[Any, ...] = (
    *("a", "b", "", "c \n", "tie", "true", "[1]", "{}", '[{"role": "user", "content": "x"}]', "\ud800"),
    *("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "\n\nAssistant: c", "\n\nHuman:"),
    *(None, True, False, 0, 1, 2.5, -1, float("nan"), 10**400),
)


def anything(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return rng.choice(LEAVES)
    if kind < 0.7:
        content = rng.choice(("a", "b", "c", "", None, 3, [{"type": "text", "text": "x"}], [3], {"a": 1}))
        roles = ("user", "assistant", "assistant", "system", "tool", 3, None, "function_call")
        return [{"role": rng.choice(roles), "content": content} for _ in range(rng.randrange(4))]
    if kind < 0.85:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice([*FIELDS, "role", "content"]): anything(rng, depth - 1) for _ in range(rng.randrange(4))}


@pytest.mark.parametrize("seed", range(10))
def test_any_row_is_used_or_refused(seed: int, tokenizer: Tokenizer) -> None:
    """Whatever JSON holds, a row is a preference or prompt with valid ids, or raises RowError."""
    rng, renderer, prompts = random.Random(seed), PreferenceRenderer(tokenizer), PromptRenderer(tokenizer)
    for _ in range(200):
        row = {name: anything(rng) for name in rng.sample(FIELDS, rng.randint(1, 5))}
        if rng.random() < 0.6:
            row |= {name: anything(rng) for name in ("chosen", "rejected")}
        with contextlib.suppress(RowError):
            prompts.render(as_prompt(row))
        with contextlib.suppress(RowError):
            for preference in as_preferences(row):
                if isinstance(preference, Rated):
                    examples = [renderer.render(preference.conversation, preference.start)]
                else:
                    examples = [*renderer.pair(preference)]
                assert all(any(example.trained) for example in examples)
                assert is_preference(row)


# Files ---------------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        PAIR,
        {**PAIR, "choice": "tie"},
        {**PAIR, "rejected": "a"},
        {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]},
        {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD], "choice": "right"},
    )
    with pytest.raises(DataError, match=r"p.jsonl, line 3: the chosen answer equals .* --bad-rows skip"):
        list(read_preferences(path))
    counts = Counts()
    rows = list(read_preferences(path, on_bad="skip", counts=counts))
    assert [row.where.rpartition(" ")[2] for row, _ in rows] == ["1", "4", "4", "4", "5"]
    assert counts.forms == {"prompt": 1, "ranking of completions": 3, "comparison": 1}
    assert sum(counts.skipped.values()) == 2
    assert "1: a tie (first:" in counts.describe_skipped()


def test_pairs_and_ratings_do_not_mix(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", PAIR, {"prompt": "q", "completion": "a", "label": True}, PAIR)
    with pytest.raises(DataError, match=r"line 2: rated answers are mixed with pairs of answers \(first: .*line 1\)"):
        list(read_preferences(path))
    assert len(list(read_preferences(path, on_bad="skip"))) == 2


# Token ids -----------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_serving(tokenizer: Tokenizer) -> None:
    """The prompt is the generation prompt, and the mask marks the answer with the token that ends it."""
    pair = only({"prompt": [{"role": "system", "content": "system"}, *ASKED], "chosen": [GOOD], "rejected": [BAD]})
    template = ChatTemplate(tokenizer)
    prompt = template.encode(list(pair.chosen.messages[:2]))
    for example, text in zip(PreferenceRenderer(tokenizer).pair(pair), ("Hello", "No"), strict=True):
        assert example.ids[: len(prompt)] == prompt
        answer = [id for id, trained in zip(example.ids, example.trained, strict=True) if trained]
        assert answer == [*tokenizer.encode(text), *template.end_ids()]
        assert example.trained[: len(prompt)] == [False] * len(prompt)


def test_the_whole_answer_of_an_agent_is_marked(tokenizer: Tokenizer) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    tool = {"role": "tool", "content": "It is sunny."}
    pair = only({"prompt": [*ASKED, GOOD, *ASKED], "chosen": [call, tool, GOOD], "rejected": [BAD]})
    chosen, _ = PreferenceRenderer(tokenizer).pair(pair)
    text = tokenizer.decode(
        [id for id, trained in zip(chosen.ids, chosen.trained, strict=True) if trained], skip_special_tokens=False
    )
    assert text.count("<|im_end|>") == 2
    assert "weather" in text
    assert "sunny" not in text
    assert text.count("Hello") == 1  # not that of the prompt


def test_plain_texts_are_continued(tokenizer: Tokenizer) -> None:
    pair = only({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"})
    chosen, rejected = PreferenceRenderer(tokenizer).pair(pair)
    prompt = tokenizer.encode_prompt("2 + 2 =")
    assert chosen.ids == [*prompt, *tokenizer.encode(" 4"), tokenizer.eos_id]
    assert chosen.trained.index(True) == rejected.trained.index(True) == len(prompt)


def test_forms_of_prompts(tokenizer: Tokenizer) -> None:
    text, chat = (
        only({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}),
        only({"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]}),
    )
    assert PreferenceRenderer(tokenizer, form="chat").pair(text) == PreferenceRenderer(tokenizer).pair(chat)
    assert PreferenceRenderer(tokenizer, form="text").pair(chat) == PreferenceRenderer(tokenizer).pair(text)
    longer = only({"prompt": [*ASKED, GOOD, *ASKED], "chosen": [GOOD], "rejected": [BAD]})
    with pytest.raises(RowError, match="only a prompt of one message"):
        PreferenceRenderer(tokenizer, form="text").pair(longer)


def test_answers_with_equal_tokens(tokenizer: Tokenizer) -> None:
    """A template may remove the only difference."""
    source = "{% for m in messages %}{{ m.role }}: {{ m.content | trim | lower }}<|im_end|>\n{% endfor %}"
    config = {**tokenizer.config(), "chat_template": source + "{% if add_generation_prompt %}assistant: {% endif %}"}
    trimming = Tokenizer(tokenizer.to_json(), config)
    pair = only({"prompt": ASKED, "chosen": "No", "rejected": "NO"})
    with pytest.raises(RowError, match="same tokens"):
        PreferenceRenderer(trimming).pair(pair)

"""Evaluation on tasks: the answers are those that the engine gives to each prompt alone."""

from __future__ import annotations

import pytest

import gptsmith
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import TokenizerError, UsageError
from gptsmith.evaluate import harness
from gptsmith.evaluate.tasks import evaluate_task
from gptsmith.tasks import Conversation
from gptsmith.tasks.arithmetic import Arithmetic
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char
from gptsmith.tokenizer.chat import ChatTemplate
from tests.factories import tiny_model

CHARACTERS = train_char(["0123456789+=- abc\n"])
TEMPLATE = """\
{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|endoftext|>{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""


class LengthOfAnswer:
    """Scores are lengths of answers. Its example 1 is a longer conversation."""

    def __len__(self) -> int:
        return 5

    def example(self, i: int) -> Conversation:
        question = {"role": "user", "content": "a" * (i + 1)}
        earlier = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
        return [*(earlier if i == 1 else ()), question]

    def score(self, i: int, answer: str) -> float:
        return len(answer) / (i + 1)


def test_without_a_chat_template_prompts_are_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ITEMS_AT_ONCE", 2)
    model = tiny_model(vocab_size=CHARACTERS.vocab_size, max_position_embeddings=64)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    result = evaluate_task(model, CHARACTERS, LengthOfAnswer(), params=params)
    prompts = ["a", "b\nc\naa", "aaa", "aaaa", "aaaaa"]
    answers = [
        gptsmith.generate(model, CHARACTERS, prompt, temperature=0.0, max_tokens=20, stop="\n") for prompt in prompts
    ]
    assert [outcome.answer for outcome in result.outcomes] == answers
    assert [outcome.index for outcome in result.outcomes] == [0, 1, 2, 3, 4]
    assert result.score == pytest.approx(sum(len(answer) / (i + 1) for i, answer in enumerate(answers)) / 5)
    first = evaluate_task(model, CHARACTERS, LengthOfAnswer(), params=params, limit=2)
    assert first.outcomes == result.outcomes[:2]


def test_chat_templates_are_used() -> None:
    plain = train_bpe(["[user] [assistant] aaa b c\n" * 5], 270)
    tokenizer = Tokenizer(plain.to_json(), {**plain.config(), "chat_template": TEMPLATE})
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    result = evaluate_task(model, tokenizer, LengthOfAnswer(), params=params)
    assert tokenizer.eos_id is not None
    for i, outcome in enumerate(result.outcomes):
        prompt = ChatTemplate(tokenizer).encode(LengthOfAnswer().example(i))
        assert tokenizer.decode(prompt, skip_special_tokens=False).endswith("<|endoftext|>[assistant]")
        (alone,) = Engine(model).generate(
            [prompt], SamplingParams(temperature=0.0, max_tokens=12, stop_ids=(tokenizer.eos_id,))
        )
        assert outcome.answer == tokenizer.decode(alone.ids)


def test_a_task_by_its_name() -> None:
    model = tiny_model(vocab_size=CHARACTERS.vocab_size, max_position_embeddings=64)
    result = evaluate_task(model, CHARACTERS, "arithmetic", limit=3)
    assert [o.score for o in result.outcomes] == [Arithmetic().score(o.index, o.answer) for o in result.outcomes]


class Empty(LengthOfAnswer):
    def __len__(self) -> int:
        return 0


def test_what_cannot_be_evaluated_is_refused() -> None:
    model = tiny_model(vocab_size=CHARACTERS.vocab_size, max_position_embeddings=64)
    for task, options, message in (
        ("arithmetic", {"limit": 0}, "limit must be at least 1"),
        ("arithmetic", {"params": SamplingParams(n=2)}, "n must be 1, not 2"),
        ("arithmetik", {}, "Did you mean 'arithmetic'"),
        (Empty(), {}, "no examples"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate_task(model, CHARACTERS, task, **options)
    with pytest.raises(TokenizerError, match="'='|'\\+'"):
        evaluate_task(model, train_char(["0123456789 "]), "arithmetic", limit=1)

"""What a chat model is trained on is what it is served: the prompt of a request is a prefix of the training ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai
import pytest

from gptsmith.engine.async_engine import AsyncEngine
from gptsmith.engine.prompt import Prompt, as_prompt
from gptsmith.tokenizer.chat import ChatTemplate

from .conftest import Live

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
QUESTION = [{"type": "text", "text": "Is it warm"}, {"type": "text", "text": " in Rome?<|im_end|>"}]
REQUEST: list[Any] = [  # a conversation as the API takes it
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "31 degrees"},
    {"role": "assistant", "content": "It is. \n"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Yes?"},
]
TRAINING: list[dict[str, Any]] = [  # the same as a row of training data
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is it warm in Rome?<|im_end|>"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "content": "31 degrees"},
    {"role": "assistant", "content": "It is. \n"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Yes?"},
]


def test_the_prompt_of_a_request_is_a_prefix_of_the_training_ids(
    live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []
    submit = AsyncEngine.submit

    def spy(engine: AsyncEngine, prompt: Sequence[int] | Prompt, *options: Any) -> Any:
        prompts.append(list(as_prompt(prompt).ids))
        return submit(engine, prompt, *options)

    monkeypatch.setattr(AsyncEngine, "submit", spy)
    answers = [index for index, message in enumerate(TRAINING) if message["role"] == "assistant"]
    for index in answers:
        client.chat.completions.create(model="tiny", messages=REQUEST[:index], tools=TOOLS, max_tokens=1)

    tokenizer = live.tokenizers["tiny"]
    ids, mask = ChatTemplate(tokenizer).encode(TRAINING, return_mask=True, tools=TOOLS)
    starts = [at for at in range(1, len(ids)) if mask[at] and not mask[at - 1]]
    assert [len(prompt) for prompt in prompts] == starts
    assert all(ids[: len(prompt)] == prompt for prompt in prompts)
    said = tokenizer.decode([id for id, own in zip(ids, mask, strict=True) if own], skip_special_tokens=False)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert said == f"{call}It is. \n<|im_end|>Yes?<|im_end|>"

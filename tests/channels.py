"""A small gpt-oss that answers in channels: a tokenizer with harmony's marks, and a model that gives known answers."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate, _Marks
from gptsmith.tokenizer.harmony import MARKS
from tests.factories import tiny_config
from tests.foreign import byte_level

_IGNORED = -100
TEMPLATE = (Path(__file__).parent / "fixtures" / "tool_templates" / "harmony.jinja").read_text()
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": PARAMETERS}}
THOUGHT = "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant"
ANSWERS = {
    "hi": f"{THOUGHT}<|channel|>final<|message|>Hello you<|return|>",
    "go": f'{THOUGHT}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"x": 7}}<|call|>',
}


@functools.cache
def channel_tokenizer() -> Tokenizer:
    pipeline = byte_level()
    pipeline.add_special_tokens([AddedToken(text, special=True) for text in MARKS])
    return Tokenizer(pipeline.to_str(), {"eos_token": "<|return|>", "chat_template": TEMPLATE})


@functools.cache
def channel_model() -> Transformer:
    """Return a model that gives the answers above, with and without tools. It is not to be changed."""
    torch.manual_seed(0)
    tokenizer = channel_tokenizer()
    template = ChatTemplate(tokenizer)
    config = tiny_config(
        "gpt_oss",
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=256,
        hidden_size=32,
        num_hidden_layers=4,
        sliding_window=48,
        initializer_range=0.1,
    )
    model, rows = Transformer(config), list[tuple[Tensor, Tensor]]()
    for question, answer in ANSWERS.items():
        for tools in (None, [TOOL]):
            prompt = template.encode([{"role": "user", "content": question}], tools=tools)
            ids = prompt + template._encode_parts(answer, _Marks("\ue000", "\ue001", "\ue002"))
            rows.append((torch.tensor(ids[:-1]), torch.tensor([_IGNORED] * (len(prompt) - 1) + ids[len(prompt) :])))
    inputs = pad_sequence([ids for ids, _ in rows], batch_first=True)
    targets = pad_sequence([wanted for _, wanted in rows], batch_first=True, padding_value=_IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        losses = cross_entropy(model(inputs).transpose(1, 2), targets, ignore_index=_IGNORED, reduction="none")
        if float(losses.detach().max()) < 0.1:  # also of the tokens in which the answers differ
            break
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert float(losses.detach().max()) < 0.1
    return model.eval()

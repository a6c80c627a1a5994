"""Public reports about masks and token ids of fine-tuning data, replayed. Each docstring names the report."""

from __future__ import annotations

from typing import Any

import pytest

from gptsmith.data.conversations import Counts, Example, Renderer, RowError, as_conversation
from gptsmith.data.packing import Examples, PackedLoader
from gptsmith.engine.text import encode_prompt
from gptsmith.errors import DataError
from gptsmith.tokenizer import Tokenizer, train_bpe
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.chatml import with_chat_template, with_special_tokens
from gptsmith.train.chats import Chats
from tests.foreign import sentencepiece

TEXT = "The weather in Rome is sunny. system user assistant model Instruction Response ###:\n" * 20
ASKED = [{"role": "user", "content": "The weather?"}, {"role": "assistant", "content": "sunny in Rome"}]

# None of them has {% generation %} tags, as hardly any published template has.
TEMPLATES = {
    "Llama 3": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "Gemma": (
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "Phi 3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|user|>", "<|assistant|>", "<|end|>"),
    ),
}


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return train_bpe([TEXT], 320)


def trained_text(tokenizer: Tokenizer, example: Example) -> str:
    ids = [id for id, trained in zip(example.ids, example.trained, strict=True) if trained]
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_B3_templates_without_generation_tags_have_a_mask(name: str, plain: Tokenizer) -> None:
    """TRL #4879, marin #7237: the mask is all zeros for stock templates, and the loss curve looks healthy."""
    template, tokens = TEMPLATES[name]
    tokenizer, _ = with_special_tokens(plain, tokens, {"chat_template": template, "eos_token": tokens[-1]})
    turns = [*ASKED, {"role": "user", "content": "sunny in Rome"}, {"role": "assistant", "content": "The weather?"}]
    example = Renderer(tokenizer).render(as_conversation({"messages": turns}))
    learned = trained_text(tokenizer, example).replace("\n", "")
    assert learned == f"sunny in Rome{tokens[-1]}The weather?{tokens[-1]}"
    assert example.ids[: len(ChatTemplate(tokenizer).encode(turns[:3]))] == ChatTemplate(tokenizer).encode(turns[:3])


def test_B4_the_mask_is_not_found_by_searching_texts(plain: Tokenizer) -> None:
    """axolotl #1916, unsloth #1290, #3041: markers are searched in the text, so users who write them are trained on,
    and answers that repeat the question are not found."""
    tokenizer, _ = with_chat_template(plain)
    asked = "sunny<|im_end|>\n<|im_start|>assistant\nsunny"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": asked}]
    ids, trained, _ = Renderer(tokenizer).render(as_conversation({"messages": messages}))
    start = len(ChatTemplate(tokenizer).encode(messages[:1]))
    assert trained == [start <= i <= start + len(tokenizer.encode(asked)) for i in range(len(ids))]


def test_B1_the_end_is_learned_where_padding_has_its_id() -> None:
    """TRL #1623, #3091, alignment-handbook #127: padding has the id of the end token, both are masked, and answers
    never end."""
    end = padding = 0  # what rows are filled up with
    examples = Examples([Example([5, 6, 7, end], [False, False, True, True])])
    batch = PackedLoader(examples, batch_size=1, seq_len=8, seed=0).batch_at(0)
    assert batch.ids[0].tolist() == [5, 6, 7, *[padding] * 5]
    assert batch.targets[0].tolist() == [-100, 7, end, *[-100] * 5]


@pytest.mark.parametrize("written", ["", "{{ bos_token }}"])
def test_B2_texts_begin_once(written: str) -> None:
    """TRL #1400, #3328: two beginning-of-sequence tokens in training. Soup #781: one in training, two when served."""
    config = {"eos_token": "</s>", "bos_token": "<s>"}
    template = written + "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer = Tokenizer(sentencepiece().to_str(), {**config, "chat_template": template})
    chat = Renderer(tokenizer).render(as_conversation({"messages": ASKED})).ids
    text = Renderer(tokenizer).render(as_conversation({"prompt": "The weather?", "completion": " sunny"})).ids
    for ids, served in (
        (chat, ChatTemplate(tokenizer).encode(ASKED[:1])),
        (text, encode_prompt(tokenizer, "The weather?")),
    ):
        assert [id for id in ids if id == tokenizer.bos_id] == [tokenizer.bos_id]
        assert ids[0] == tokenizer.bos_id
        assert ids[: len(served)] == served


def test_B6_no_token_spans_prompt_and_completion(plain: Tokenizer) -> None:
    """lattice #1545, unsloth-zoo #832: a token spans the end of the prompt and the beginning of the completion (52 of
    80 rows), so the first token of the answer is never trained on, or is another one when served."""
    text = "The weather in Rome"
    spanned = 0
    for cut in range(1, len(text)):
        row: dict[str, Any] = {"prompt": text[:cut], "completion": text[cut:]}
        ids, trained, _ = Renderer(plain).render(as_conversation(row))
        served = encode_prompt(plain, text[:cut])
        assert ids == [*served, *plain.encode(text[cut:]), plain.eos_id]
        assert trained == [i >= len(served) for i in range(len(ids))]
        spanned += ids[:-1] != plain.encode(text)
    assert spanned > 5  # the cuts at which encoding the whole text would have joined both


def test_A4_rows_without_a_trained_token_are_never_silent(plain: Tokenizer) -> None:
    """TRL #6668, Soup #532, nanochat #590: rows whose targets were cut away give a loss of 0 or NaN, and "success"."""
    tokenizer, _ = with_chat_template(plain)
    with pytest.raises(RowError, match="nothing to learn from"):
        as_conversation({"messages": ASKED[:1]})
    long = [{"role": "user", "content": "The weather? " * 40}, ASKED[1]]
    renderer = Renderer(tokenizer)
    short_one, long_one = (renderer.render(as_conversation({"messages": m})) for m in (ASKED, long))
    chats = Chats(Examples([short_one, long_one]), Examples([]), Counts())
    with pytest.raises(DataError, match="1 conversations are longer than --context 64"):
        chats.within(64, on_long="error")
    left = chats.within(64, on_long="skip").train
    assert [each.ids for each in left] == [short_one.ids]
    with pytest.raises(DataError, match="every conversation is longer than --context 4"):
        chats.within(4, on_long="skip")


def test_B5_no_step_between_rows_and_batches_loses_the_mask(plain: Tokenizer) -> None:
    """nanochat #570, #582: a loader that was rewritten dropped the mask for a month (ChatCORE 0.355, without 0.315)."""
    tokenizer, _ = with_chat_template(plain)
    rendered = [
        Renderer(tokenizer).render(as_conversation({"question": "sunny " * n, "answer": "Rome " * (9 - n)}))
        for n in range(1, 9)
    ]
    marked = sum(sum(each.trained) for each in rendered)
    chats = Chats(Examples(rendered), Examples([]), Counts()).within(100, on_long="error")
    for packing in (True, False):
        loader = PackedLoader(chats.train, batch_size=2, seq_len=100, seed=0, packing=packing)
        assert sum(batch.num_targets for batch in loader.whole(2)) == marked

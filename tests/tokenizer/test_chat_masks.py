"""Training masks of conversations: exactly the assistant's tokens, in the ids that a served model sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Pipeline

from gptsmith.errors import TokenizerError, UsageError
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char
from gptsmith.tokenizer.chat import ChatTemplate

Messages = list[dict[str, Any]]

TEXT = "The cat sat on the mat.\nWie heißt du? [/INST] <<SYS>> user assistant model system: {'city': 1}  日本"
SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
)


class Shape(NamedTuple):
    """A template as models have it, and the assistant's tokens that it writes for a text."""

    source: str
    answer: Callable[[str], str]
    alternates: bool = False  # refuses conversations whose roles do not alternate
    system: bool = True


CHATML = Shape(
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    lambda text: text + "<|im_end|>",
)
LLAMA_2 = Shape(
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    lambda text: f" {text.strip()} </s>",
    alternates=True,
)
LLAMA_3 = Shape(
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    lambda text: text.strip() + "<|eot_id|>",
)
ZEPHYR = Shape(
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}",
    lambda text: text + "</s>",
)
GEMMA = Shape(
    "{{ '<bos>' }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    lambda text: text.strip() + "<end_of_turn>",
    alternates=True,
    system=False,
)
MISTRAL = Shape(
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}",
    lambda text: f" {text.strip()}</s>",
    alternates=True,
    system=False,
)
TAGGED = Shape(
    "{%- for message in messages %}\n{%- if message.role == 'assistant' %}\n"
    "{{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else %}\n{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\n{%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    CHATML.answer,
)
SHAPES = {
    "chatml": CHATML,
    "llama-2": LLAMA_2,
    "llama-3": LLAMA_3,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "tagged": TAGGED,
}


@functools.cache
def base(kind: str) -> str:
    """A tokenizer.json of this kind, with the special tokens of all templates."""
    if kind == "metaspace":
        pipeline = Pipeline(models.BPE(unk_token="<unk>"))
        pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        pipeline.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<unk>"], initial_alphabet=sorted(set(TEXT)), show_progress=False
        )
        pipeline.train_from_iterator(TEXT.split() * 3, trainer)
    else:
        source = train_bpe([TEXT] * 3, 300) if kind == "bpe" else train_char([TEXT])
        pipeline = Pipeline.from_str(source.to_json())
    pipeline.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return pipeline.to_str()


@functools.cache
def template_of(source: str, kind: str = "bpe") -> ChatTemplate:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(Tokenizer(base(kind), {**config, "chat_template": source}))


def marked(template: ChatTemplate, ids: list[int], mask: list[bool]) -> str:
    chosen = [id for id, of_assistant in zip(ids, mask, strict=True) if of_assistant]
    return template.tokenizer.decode(chosen, skip_special_tokens=False)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def conversations(shape: Shape, texts: st.SearchStrategy[str]) -> st.SearchStrategy[Messages]:
    """Random conversations that the template accepts. An answer may be empty, but does not begin with white space."""
    answers = st.builds(assistant, texts.map(str.lstrip))
    system = st.lists(st.builds(lambda text: {"role": "system", "content": text}, texts), max_size=int(shape.system))
    if shape.alternates:
        rounds = st.lists(st.tuples(st.builds(user, texts), answers).map(list), min_size=1, max_size=4)
        turns = rounds.map(lambda pairs: [message for pair in pairs for message in pair])
    else:
        turns = st.builds(
            lambda first, rest: [first, *rest],
            st.builds(user, texts),
            st.lists(st.one_of(st.builds(user, texts), answers), max_size=6),
        )
    return st.builds(lambda head, tail: head + tail, system, turns)


any_text = st.text(st.characters(codec="utf-8"), max_size=12)
tricky_text = st.lists(st.one_of(any_text, st.sampled_from([*SPECIAL, "\n", "  ", "[/INST]", "user"])), max_size=4)


@pytest.mark.parametrize("name", SHAPES)
@given(data=st.data())
@settings(deadline=None)
def test_the_mask_is_what_the_assistant_says_and_the_end_of_its_turn(name: str, data: st.DataObject) -> None:
    shape = SHAPES[name]
    template = template_of(shape.source)
    messages = data.draw(conversations(shape, tricky_text.map("".join)))
    ids, mask = template.encode(messages, return_mask=True)
    answers = [shape.answer(message["content"]) for message in messages if message["role"] == "assistant"]
    assert marked(template, ids, mask) == "".join(answers)
    assert ids == template.encode(messages, add_generation_prompt=False)

    last_ids, last_mask = template.encode(messages, return_mask=True, train_on="last")
    assert last_ids == ids
    assert marked(template, ids, last_mask) == "".join(answers[-1:])

    # Before each answer there are exactly the ids that a server gives to the model as the prompt.
    beginnings = [at for at in range(len(ids)) if mask[at] and not (at and mask[at - 1])]
    prompts = [template.encode(messages[:i]) for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert [len(prompt) for prompt in prompts] == beginnings
    assert all(ids[: len(prompt)] == prompt for prompt in prompts)


@pytest.mark.parametrize("kind", ["char", "metaspace"])
@pytest.mark.parametrize("name", SHAPES)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_masks_with_other_tokenizers(name: str, kind: str, data: st.DataObject) -> None:
    shape = SHAPES[name]
    template = template_of(shape.source, kind)
    letters = sorted(set(TEXT) - ({"\n", " "} if kind == "metaspace" else set()))
    messages = data.draw(conversations(shape, st.text(st.sampled_from(letters), max_size=12)))
    ids, mask = template.encode(messages, return_mask=True)
    answers = [shape.answer(message["content"]) for message in messages if message["role"] == "assistant"]
    found = marked(template, ids, mask)
    assert found.replace(" ", "") == "".join(answers).replace(" ", "")  # Metaspace drops a space at the beginning
    assert ids == template.encode(messages, add_generation_prompt=False)


@pytest.mark.parametrize("name", ["mistral", "tagged"])
def test_masks_equal_those_of_transformers_where_the_template_has_generation_tags(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    template = template_of(SHAPES[name].source)
    template.tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    conversation = [user("Wie heißt du?\n"), assistant("I sat, 日本."), user(""), assistant(""), user("cat")]
    for messages in (conversation[:1], conversation[:2], conversation, [*conversation, assistant("the  mat\n")]):
        encoded = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = template.encode(messages, return_mask=True)
        assert ids == encoded["input_ids"]
        assert [int(marked) for marked in mask] == encoded["assistant_masks"]


TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}{{ '[CALL]' + (call.function | tojson) + '[/CALL]' }}{% endfor %}"
    "{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tool_calls_are_trained_on_and_the_answers_of_tools_are_not() -> None:
    template = template_of(TOOLS)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        user("Is it warm?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "31 degrees"},
        assistant("It is."),
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    ids, mask = template.encode(messages, return_mask=True, tools=tools)
    called = '[CALL]{"name": "weather", "arguments": {"city": "Rome"}}[/CALL]<|im_end|>'
    assert marked(template, ids, mask) == called + "It is.<|im_end|>"
    assert ids[: mask.index(True)] == template.encode(messages[:2], tools=tools)
    _, mask = template.encode(messages, return_mask=True, train_on="last", tools=tools)
    assert marked(template, ids, mask) == "It is.<|im_end|>"


def test_a_conversation_without_an_answer_has_nothing_to_train_on() -> None:
    ids, mask = template_of(CHATML.source).encode([user("hello")], return_mask=True)
    assert ids
    assert mask == [False] * len(ids)


def test_a_generation_prompt_after_the_conversation_is_not_trained_on() -> None:
    template = template_of(CHATML.source)
    ids, mask = template.encode([user("a"), assistant("b")], return_mask=True, add_generation_prompt=True)
    assert ids == template.encode([user("a"), assistant("b")])
    assert marked(template, ids, mask) == "b<|im_end|>"
    assert not any(mask[-3:])


def test_the_plain_template_has_a_mask_too() -> None:
    template = ChatTemplate(train_bpe([f"{word} \n\n" for word in TEXT.split()] * 3, 300))
    assert template.plain
    messages = [{"role": "system", "content": "Be kind."}, user("a"), assistant("b \n"), user("c"), assistant("d")]
    ids, mask = template.encode(messages, return_mask=True)
    assert marked(template, ids, mask) == " b \n\n d\n"
    assert marked(template, *template.encode(messages[:3], return_mask=True)) == " b \n\n"
    first_round = template.encode(messages[:3], add_generation_prompt=False)
    assert ids[: len(first_round)] != first_round  # the white space after "b" has other tokens when a message follows


# Templates without stable prefixes

THINKING = (  # removes the thinking of all turns but the last
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_IS_OPEN = (  # ends only the turns that another one follows
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
)
ENDED_BY_THE_NEXT = (  # the end of an answer is written with the question that follows it
    "{% for message in messages %}{% if message.role == 'user' %}{% if not loop.first %}{{ eos_token }}{% endif %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content }}{% endif %}{% endfor %}"
)
EMPTY_THOUGHT = (  # the generation prompt is not what the conversation has
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
TWO_ROUNDS = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("<think>so</think>d")]


@pytest.mark.parametrize(
    ("source", "message"),
    [(THINKING, 2), (LAST_IS_OPEN, 2), (ENDED_BY_THE_NEXT, 2), (EMPTY_THOUGHT, 2)],
    ids=["thinking", "last-is-open", "ended-by-the-next", "empty-thought"],
)
def test_templates_without_stable_prefixes_are_refused(source: str, message: int) -> None:
    template = ChatTemplate(template_of(source).tokenizer, name="toy-chat")
    with pytest.raises(TokenizerError) as caught:
        template.encode(TWO_ROUNDS, return_mask=True)
    assert f"the chat template of toy-chat cannot be used to train on message {message}:" in str(caught.value)
    assert template.encode(TWO_ROUNDS, add_generation_prompt=False)  # it can still be used without a mask


def test_the_last_turn_can_be_trained_on_where_earlier_ones_change() -> None:
    template = template_of(THINKING)
    ids, mask = template.encode(TWO_ROUNDS, return_mask=True, train_on="last")
    assert marked(template, ids, mask) == "<think>so</think>d<|im_end|>"
    assert ids[: mask.index(True)] == template.encode(TWO_ROUNDS[:3])
    one_round = template.encode(TWO_ROUNDS[:2], return_mask=True)
    assert marked(template, *one_round) == "<think>hm</think>b<|im_end|>"


def test_an_end_of_turn_that_the_last_answer_lacks_is_refused_in_short_conversations_as_well() -> None:
    for source in (LAST_IS_OPEN, ENDED_BY_THE_NEXT):
        for train_on in ("all", "last"):
            with pytest.raises(TokenizerError, match="cannot be used to train on message 2"):
                template_of(source).encode(TWO_ROUNDS[:2], return_mask=True, train_on=train_on)


def test_an_answer_that_is_joined_with_the_prompt_is_refused() -> None:
    lines = "\n\n\n\n".join(TEXT.split())
    pipeline = Pipeline.from_str(train_bpe([lines] * 3, 300).to_json())  # it has tokens of several line breaks
    pipeline.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    refusal = "message 2 cannot be trained on: the tokenizer joins its beginning with the end of the prompt"
    chatml = ChatTemplate(Tokenizer(pipeline.to_str(), {**config, "chat_template": CHATML.source}))
    assert chatml.encode([user("a"), assistant("b")], return_mask=True)
    with pytest.raises(TokenizerError, match=refusal):
        chatml.encode([user("a"), assistant("\n\n\nb")], return_mask=True)
    # With GPT-2's split, two line breaks are one token at the end of a prompt and two tokens before a letter.
    llama_3 = ChatTemplate(Tokenizer(pipeline.to_str(), {**config, "chat_template": LLAMA_3.source}))
    with pytest.raises(TokenizerError, match=refusal):
        llama_3.encode([user("a"), assistant("b")], return_mask=True)


def test_an_answer_to_nothing_is_refused() -> None:
    template = template_of(CHATML.source)
    messages = [assistant("Hello!"), user("a"), assistant("b")]
    with pytest.raises(TokenizerError, match="message 1 is from the assistant"):
        template.encode(messages, return_mask=True)
    ids, mask = template.encode(messages, return_mask=True, train_on="last")
    assert marked(template, ids, mask) == "b<|im_end|>"


def test_unknown_choice_of_turns() -> None:
    with pytest.raises(UsageError, match="train_on must be 'all' or 'last', not 'first'"):
        template_of(CHATML.source).encode([user("a")], return_mask=True, train_on="first")  # type: ignore[call-overload]

"""A chat template for models that have none: ChatML, with special tokens for the turns.

    tokenizer, new = with_chat_template(tokenizer)     # new: ids that the model has no trained embedding for

The template can write tools and calls, in the form of Hermes and Qwen. Models of characters whose alphabet lacks the
letters of role names get one special token per role instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gptsmith.errors import TokenizerError
from gptsmith.tokenizer.tokenizer import Tokenizer

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = """\
{%- if tools %}\
{{- '<|im_start|>system\\n' }}\
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}\
{{- '# Tools\\n\\nYou may call functions to help with the request. Their signatures are within ' }}\
{{- '<tools></tools>:\\n<tools>' }}\
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}\
{{- '\\n</tools>\\n\\nFor each call, return a JSON object with its name and arguments within ' }}\
{{- '<tool_call></tool_call>:\\n' }}\
{{- '<tool_call>\\n{"name": <name>, "arguments": <arguments>}\\n</tool_call><|im_end|>\\n' }}\
{%- endif %}\
{%- for message in messages %}\
{%- if not (tools and loop.first and message['role'] == 'system') %}\
{{- '<|im_start|>' + ('user' if message['role'] == 'tool' else message['role']) + '\\n' }}\
{%- if message['role'] == 'tool' %}{{- '<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}\
{%- else %}{{- message['content'] or '' }}{%- endif %}\
{%- for call in message['tool_calls'] or [] %}\
{%- if message['content'] or not loop.first %}{{- '\\n' }}{%- endif %}\
{{- '<tool_call>\\n{"name": ' + (call['function']['name'] | tojson) + ', "arguments": ' }}\
{{- (call['function']['arguments'] | tojson) + '}\\n</tool_call>' }}\
{%- endfor %}\
{{- '<|im_end|>\\n' }}\
{%- endif %}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ROLES = """\
{%- for message in messages %}\
{%- if message['role'] not in ('system', 'user', 'assistant') %}\
{{- raise_exception("this model's alphabet is too small for tools") }}{%- endif %}\
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


IMAGE_TOKEN = "<image>"
WITH_PICTURES = """\
{%- set pictures = namespace(messages=[]) %}\
{%- for message in messages %}\
{%- if message['content'] is string or not message['content'] %}\
{%- set pictures.messages = pictures.messages + [message] %}\
{%- else %}\
{%- set parts = namespace(text='') %}\
{%- for part in message['content'] %}\
{%- if part['type'] in ('image', 'image_url') %}{%- set parts.text = parts.text + '<image>' %}\
{%- else %}{%- set parts.text = parts.text + part['text'] %}{%- endif %}\
{%- endfor %}\
{%- set pictures.messages = pictures.messages + [dict(message, content=parts.text)] %}\
{%- endif %}\
{%- endfor %}\
{%- set messages = pictures.messages %}"""
"""What goes before a template that knows texts alone: contents in parts become texts with a token for each picture."""


def with_image_token(tokenizer: Tokenizer) -> tuple[Tokenizer, tuple[int, ...]]:
    """Return the tokenizer with the token that stands for a picture and a chat template that writes it, and the ids of
    tokens that are new. A tokenizer without a template gets `with_chat_template`'s.
    """
    template = tokenizer.config().get("chat_template")
    new: tuple[int, ...] = ()
    if not isinstance(template, str) or not template.strip():
        tokenizer, new = with_chat_template(tokenizer)
        template = tokenizer.config()["chat_template"]
    config = {"chat_template": WITH_PICTURES + template, "processor_class": "LlavaProcessor"}
    tokenizer, more = with_special_tokens(tokenizer, (IMAGE_TOKEN,), config)
    return tokenizer, new + more


def with_chat_template(tokenizer: Tokenizer) -> tuple[Tokenizer, tuple[int, ...]]:
    """Return the tokenizer with a chat template and its special tokens, and the ids of tokens that are new.

    The token that ends a turn becomes the end-of-text token; the earlier one ends a text, too.
    Raises TokenizerError for a tokenizer whose ids have gaps.
    """
    template, tokens = (CHATML, CHATML_TOKENS) if _has_letters(tokenizer) else (ROLES, ROLE_TOKENS)
    if tokenizer.bos_id is not None and tokenizer.prefix_ids == (tokenizer.bos_id,):
        template = "{{- bos_token }}" + template  # which llama.cpp and this package would add, but transformers not
    return with_special_tokens(tokenizer, tokens, {"chat_template": template, "eos_token": tokens[-1]})


def with_special_tokens(
    tokenizer: Tokenizer, tokens: Sequence[str], config: Mapping[str, Any] | None = None
) -> tuple[Tokenizer, tuple[int, ...]]:
    """Return the tokenizer with `tokens` as special tokens, and the ids of those that are new.

    config: values of tokenizer_config.json to change. The tokens at which texts end stay ends.
    Raises TokenizerError for a tokenizer whose ids have gaps.
    """
    missing = [token for token in tokens if token not in tokenizer.added_tokens()]
    new = tuple(range(tokenizer.vocab_size, tokenizer.vocab_size + len(missing)))
    text = _with_special_tokens(tokenizer.to_json(), tokens, dict(zip(missing, new, strict=True)))
    result = Tokenizer(text, {**tokenizer.config(), **(config or {})}, tokenizer.end_ids)
    if any(result.special_tokens().get(id) != token for token, id in zip(missing, new, strict=True)):
        raise TokenizerError(f"the ids of this tokenizer have gaps, so it cannot get the tokens {', '.join(tokens)}.")
    return result, new


def _has_letters(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer can write the template's own words."""
    try:
        words = 'system\nuser\nassistant\n# Tools\n\n<tool_call>\n{"name": "x", "arguments": {}}\n</tool_response>\n'
        return not tokenizer.count_unknown(words)
    except TokenizerError:
        return False


def _with_special_tokens(text: str, tokens: Sequence[str], new: Mapping[str, int]) -> str:
    """Return a tokenizer.json in which the tokens are special. new: the ids of those that it lacks."""
    description: dict[str, Any] = json.loads(text)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    present = [
        {**entry, **flags} if entry["content"] in tokens else entry for entry in description.get("added_tokens") or []
    ]
    description["added_tokens"] = present + [{"id": id, "content": token, **flags} for token, id in new.items()]
    if description["model"].get("type") == "WordLevel":  # of characters; the ids of others follow from their number
        description["model"]["vocab"] |= new
    return json.dumps(description, ensure_ascii=False)

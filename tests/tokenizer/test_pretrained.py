"""The tokenizer of a directory: what tokenizer_config.json and special_tokens_map.json add, as in transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.errors import TokenizerError
from gptsmith.tokenizer import Tokenizer, load_tokenizer
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.pretrained import read_tokenizer
from tests.foreign import byte_level, sentencepiece, unigram


def bare(pipeline: Any) -> str:
    """The tokenizer.json without its added tokens, which stay in the vocabulary."""
    return json.dumps({**json.loads(pipeline.to_str()), "added_tokens": []})


BARE = {"bytes": bare(byte_level()), "sentencepiece": bare(sentencepiece()), "unigram": bare(unigram())}
ENDS = {"bytes": "<|endoftext|>", "sentencepiece": "</s>", "unigram": "</s>"}


def write(directory: Path, text: str, **files: Mapping[str, Any]) -> Path:
    (directory / "tokenizer.json").write_text(text)
    for name, values in files.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return directory


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


def assert_as_in_transformers(directory: Path) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    ours, theirs = read_tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_id == theirs.eos_token_id
    assert set(ours.special_tokens()) == {id for id, added in theirs.added_tokens_decoder.items() if added.special}
    assert ours.added_ids == set(theirs.added_tokens_decoder)
    for text in ("The quick brown <|new|> fox", "a house"):
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        if not ours.added_ids & set(ids):
            assert ours.encode(text) == ids
    every = list(range(ours.vocab_size))
    assert ours.decode(every) == theirs.decode(every, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return ours


@pytest.mark.parametrize("kind", list(BARE))
@pytest.mark.parametrize("where", ["tokenizer_config", "special_tokens_map", "added_tokens_decoder"])
def test_roles_make_tokens_special(kind: str, where: str, tmp_path: Path) -> None:
    end = ENDS[kind]
    id = json.loads(BARE[kind])["model"]["vocab"]
    number = id[end] if isinstance(id, dict) else [piece for piece, _ in id].index(end)
    files: dict[str, Any] = {"tokenizer_config": {"eos_token": end}}
    if where == "special_tokens_map":
        files = {"special_tokens_map": {"eos_token": token(end), "pad_token": "<|pad|>"}}
    elif where == "added_tokens_decoder":
        entries = {str(number): token(end), str(len(id)): token("<|new|>", special=False, lstrip=True)}
        files = {"tokenizer_config": {"eos_token": end, "added_tokens_decoder": entries}}
    tokenizer = assert_as_in_transformers(write(tmp_path, BARE[kind], **files))
    assert tokenizer.special_tokens()[number] == end
    assert tokenizer.eos_id == number
    assert number not in tokenizer.encode(f"a {end} house")
    tokenizer.save(tmp_path)  # and saved, it is the same tokenizer
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    assert load_tokenizer(tmp_path) == tokenizer
    assert load_tokenizer(tmp_path).end_ids == tokenizer.end_ids


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_roles_and_entries(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("tokenizer")
    names = st.sampled_from(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|new|>", "<|other|>"])
    roles = st.sampled_from(["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"])
    config: dict[str, Any] = data.draw(st.dictionaries(roles, names, max_size=3))
    config |= data.draw(st.sampled_from([{}, {"additional_special_tokens": ["<|more|>", "<|im_end|>"]}]))
    named = data.draw(st.dictionaries(roles, names | names.map(token), max_size=3))
    entries = {str(id): token(f"<|{id}|>", special=data.draw(st.booleans())) for id in range(360, 362)}
    if data.draw(st.booleans()):
        config["added_tokens_decoder"] = entries
        named = {}
    text = data.draw(st.sampled_from([BARE["bytes"], byte_level().to_str()]))
    if "eos_token" not in {**config, **named}:
        config["eos_token"] = "<|endoftext|>"
    assert_as_in_transformers(write(directory, text, tokenizer_config=config, special_tokens_map=named))


def test_entries_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    write(tmp_path, BARE["bytes"], tokenizer_config={"added_tokens_decoder": {"900": token("<|new|>")}})
    with pytest.raises(TokenizerError, match="has '<|new|>' as 900, but tokenizer.json makes it 360"):
        read_tokenizer(tmp_path)
    write(tmp_path, BARE["bytes"], tokenizer_config={"added_tokens_decoder": {"x": token("<|new|>")}})
    with pytest.raises(TokenizerError, match="added_tokens_decoder must map ids to tokens"):
        read_tokenizer(tmp_path)


def test_templates_in_files_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, byte_level().to_str(), tokenizer_config={"chat_template": "configured"})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with {{ tools | length }} tools")
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("never")
    question, tools = [{"role": "user", "content": "a"}], [{"type": "function", "function": {"name": "f"}}]
    template = ChatTemplate(read_tokenizer(tmp_path))
    assert template.render(question) == "configured"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    template = ChatTemplate(read_tokenizer(tmp_path))
    assert template.render(question) == "from a file"
    read_tokenizer(tmp_path).save(tmp_path / "saved")
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert theirs.apply_chat_template(question, tokenize=False) == "from a file"
    assert theirs.apply_chat_template(question, tools=tools, tokenize=False) == "with 1 tools"

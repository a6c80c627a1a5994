"""Tool calls: the templates of public model families and the generic form, rendered and read back."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Pipeline

from gptsmith.engine.grammar import Grammar
from gptsmith.errors import TokenizerError, UsageError
from gptsmith.tokenizer import Tokenizer, train_bpe
from gptsmith.tokenizer.chat import ChatTemplate, _Marks
from gptsmith.tokenizer.pretrained import read_tokenizer
from gptsmith.tokenizer.tools import ToolCallFormat, ToolCallParser
from tests.factories import examples

TEMPLATES = Path(__file__).parent.parent / "fixtures" / "tool_templates"
# The tokens of each family: the end of a turn first, then special ones, then others.
FAMILIES: dict[str, tuple[list[str], list[str]]] = {
    "hermes": (["<|im_end|>", "<|im_start|>"], ["<tool_call>", "</tool_call>"]),
    "qwen3_thinking": (["<|im_end|>", "<|im_start|>"], ["<tool_call>", "</tool_call>", "<think>", "</think>"]),
    "llama3": (["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"], []),
    "mistral_nemo": (["</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], []),
    "mistral_small": (["</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"], []),
    "deepseek_v3": (
        ["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        [
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
            "<think>",
        ],
    ),
    "command_r": (["<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"], []),
    "functionary": (["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"], []),
    "granite": (["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"], []),
    "phi4_mini": (["<|end|>", "<|assistant|>", "<|user|>", "<|tool|>", "<|tool_call|>", "<|/tool_call|>"], []),
    "firefunction": (["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"], []),
    "nemotron": (["<SPECIAL_12>", "<SPECIAL_11>", "<SPECIAL_10>"], ["<TOOLCALL>", "</TOOLCALL>"]),
    "harmony": (["<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"], []),
    "qwen3_coder": (["<|im_end|>", "<|im_start|>"], ["<tool_call>", "</tool_call>"]),  # arguments in XML
    "gemma3": (["<end_of_turn>", "<start_of_turn>", "<bos>"], []),  # without tools
}
SINGLE = ("llama3", "harmony")
GENERIC = ("qwen3_coder", "gemma3", "plain")
PARAMETERS: tuple[Any, ...] = (
    None,
    {},
    {"description": "x"},
    {"properties": {"x": {"type": "integer"}}, "required": ["x"]},
    {"type": ["object", "null"]},
    {"anyOf": [{"type": "object"}, {"type": "array"}]},
    {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"x": {"type": "integer"}}}}},
)
QUESTION: dict[str, Any] = {"role": "user", "content": "a question"}
WORDS = '{"name": "f", "arguments": {"x": 12}} tool_call functions question answer "parameters" assistant user ' * 9


def make(name: str) -> ChatTemplate:
    special, others = FAMILIES.get(name, ([], []))
    pipeline = Pipeline.from_str(train_bpe([WORDS], 300).to_json())
    pipeline.add_special_tokens([AddedToken(text, special=True) for text in special])
    pipeline.add_tokens([AddedToken(text, special=False) for text in others])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>"}
    if special:
        config |= {"eos_token": special[0], "chat_template": (TEMPLATES / f"{name}.jinja").read_text()}
        config["bos_token"] = next(
            (text for text in special if "bos" in text.lower() or "begin" in text), "<|endoftext|>"
        )
    tokenizer = Tokenizer(pipeline.to_str(), config)
    further = [tokenizer.added_tokens()["<|call|>"]] if name == "harmony" else []
    return ChatTemplate(Tokenizer(pipeline.to_str(), config, further))


TEMPLATE = {name: make(name) for name in (*FAMILIES, "plain")}


def function(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "additionalProperties": False}
    described = {"name": name, "description": f"does {name}", "parameters": parameters}
    return {"type": "function", "function": described}


TOOLS = [function("f", x={"type": "integer"}, s={"type": "string"}), function("get_it-2", y={"type": "boolean"})]


def answer(calls: list[tuple[str, dict[str, Any]]], content: str = "") -> dict[str, Any]:
    made = [
        {"id": f"call{i:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def written(template: ChatTemplate, message: dict[str, Any]) -> str:
    """What the model would have to write for a message."""
    options: dict[str, Any] = {"tools": TOOLS, "generic_tools": True}
    prompt = template.render([QUESTION], **options).rpartition("a question")[2]
    text = template.render([QUESTION, message], add_generation_prompt=False, **options).rpartition("a question")[2]
    while not text.startswith(prompt):  # DeepSeek's prompt opens a thought
        prompt = prompt[: prompt.rindex("<")]
    text = text[len(prompt) :]
    special = template.tokenizer.special_tokens()
    for id in (*template.end_ids(), *template.tokenizer.end_ids):
        text = text.partition(special[id])[0]
    return text.rstrip("\n") if template.end_ids() else text.removesuffix("\n").removeprefix(" ")


def accepts(template: ChatTemplate, text: str, mode: str, **options: Any) -> bool:
    tokenizer, call_format = template.tokenizer, template.tool_format
    state = Grammar(tokenizer, call_format.grammar([tool["function"] for tool in TOOLS], mode, **options)).start()
    for id in template._encode_parts(text, _Marks("\ue000", "\ue001", "\ue002")):
        if not state.allowed()[id]:
            return False
        state.push(id)
    assert tokenizer.eos_id is not None
    return state.finished or bool(state.allowed()[tokenizer.eos_id])


def parse(call_format: ToolCallFormat, pieces: list[str]) -> tuple[str, list[list[str]]]:
    """Return the text, and id, name and arguments of each call."""
    parser, outside, calls = ToolCallParser(call_format), "", list[list[str]]()
    for text, deltas in (*map(parser.push, pieces), parser.finish()):
        outside += text
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append([delta.id, delta.name, ""])
            calls[delta.index][2] += delta.arguments
    return outside, calls


def cut(data: st.DataObject, text: str) -> list[str]:
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


CALLS = st.lists(
    st.tuples(st.just("f"), st.fixed_dictionaries({"x": st.integers(-99, 99), "s": st.text('a"}{\\é<\n]', max_size=6)}))
    | st.tuples(st.just("get_it-2"), st.fixed_dictionaries({}, optional={"y": st.booleans()})),
    min_size=1,
    max_size=3,
)


@settings(max_examples=examples(150), deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(TEMPLATE)), calls=CALLS)
def test_calls_are_read_back(data: st.DataObject, name: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    template = TEMPLATE[name]
    calls = [(called, dict(sorted(arguments.items(), reverse=True))) for called, arguments in calls]  # x, then s
    calls = calls[:1] if name in SINGLE else calls
    text = written(template, answer(calls))
    outside, read = parse(template.tool_format, cut(data, text))
    assert not outside.strip() or name == "qwen3_thinking"
    assert [(called, json.loads(arguments)) for _, called, arguments in read] == calls
    if "id" in template.tool_format.slots:
        assert [id for id, _, _ in read] == [f"call{i:05d}" for i in range(len(calls))]
    assert accepts(template, text, "auto")
    assert accepts(template, text, "required") or name == "qwen3_thinking"  # which begins with a thought
    assert accepts(template, text, "required", several=False) == (len(calls) == 1) or name == "qwen3_thinking"


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_formats(name: str) -> None:
    template = TEMPLATE[name]
    call_format = template.tool_format
    assert call_format.generic == (name in GENERIC)
    assert call_format.several == (name not in SINGLE)
    assert call_format.arguments_as_text == (name == "deepseek_v3")
    assert call_format.short_ids == name.startswith("mistral")
    good, wrong = written(template, answer([("f", {"x": 1})])), written(template, answer([("f", {"x": "a"})]))
    for mode in ("auto", "required"):
        assert not accepts(template, wrong, mode)
        assert not accepts(template, written(template, answer([("h", {})])), mode)
        assert accepts(template, "hello", mode) == (mode == "auto")
        assert not accepts(template, good + "hello", mode)
    assert accepts(template, "hello " + good.lstrip(), "auto")
    assert parse(call_format, ["an answer < [ { with", " marks"]) == ("an answer < [ { with marks", [])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_rendered_as_in_transformers(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    template = TEMPLATE[name]
    template.tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    call = answer([("f", {"x": 1})])
    result = {"role": "tool", "name": "f", "tool_call_id": "call00000", "content": "12"}
    conversations = [[QUESTION]] if name == "gemma3" else [[QUESTION], [QUESTION, call, result]]
    for messages in conversations:
        tools = None if name == "gemma3" else TOOLS
        their_messages = json.loads(json.dumps(messages))
        if name == "deepseek_v3" and len(messages) > 1:
            their_messages[1]["tool_calls"][0]["function"]["arguments"] = '{"x": 1}'
        expected = theirs.apply_chat_template(their_messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert template.render(messages, tools=tools) == expected
        ids = theirs.apply_chat_template(
            their_messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert template.encode(messages, tools=tools) == ids


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_a_conversation_with_results(name: str) -> None:
    """Every template writes calls and their results, with ids as this package makes them, and with none."""
    template = TEMPLATE[name]
    call = answer([("f", {"x": 31})])
    call["tool_calls"][0]["id"] = "call_0123456789abcdef01234567"
    result = {"role": "tool", "tool_call_id": "call_0123456789abcdef01234567", "content": "twelve"}
    text = template.render([QUESTION, call, result], tools=TOOLS, generic_tools=True)
    assert text.index("does f") < text.index("31") < text.index("twelve")
    as_text = json.loads(json.dumps(call))
    as_text["tool_calls"][0]["function"]["arguments"] = '{"x": 31}'
    assert template.render([QUESTION, as_text, result], tools=TOOLS, generic_tools=True) == text
    later = [{"role": "assistant", "content": "so"}, {"role": "user", "content": "and then?"}]
    again = template.render([QUESTION, call, result, *later], tools=None, generic_tools=True)
    assert again.index("31") < again.index("twelve") < again.index("and then?")


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_functions_without_parameters(name: str) -> None:
    template = TEMPLATE[name]
    bare = [{"type": "function", "function": {"name": "f", "description": "what it does"}}]
    assert "what it does" in template.render([QUESTION], tools=bare, generic_tools=True)


@pytest.mark.parametrize("name", sorted(TEMPLATE))
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_arguments_are_objects(name: str, parameters: Any) -> None:
    template = TEMPLATE[name]
    source = template.tool_format.grammar([{"name": "f", "parameters": parameters}], "required")

    def allowed(arguments: str) -> bool:
        text = written(template, answer([("f", {"x": 1})]))
        text = text.replace('{"x": 1}', arguments)
        state = Grammar(template.tokenizer, source).start()
        for id in template._encode_parts(text, _Marks("\ue000", "\ue001", "\ue002")):
            if not state.allowed()[id]:
                return False
            state.push(id)
        return True

    if name != "qwen3_thinking":
        assert allowed('{"x": 1}')
        assert not any(map(allowed, ("[1]", "null", '"x"', "1")))


def test_parameters_of_another_type_are_refused() -> None:
    with pytest.raises(UsageError, match='the parameters of f are of type "string"'):
        TEMPLATE["hermes"].tool_format.grammar([{"name": "f", "parameters": {"type": "string"}}], "auto")


def public_templates() -> list[Path]:
    """The templates of published models that TRL contains."""
    found = importlib.util.find_spec("trl")
    return (
        []
        if found is None or found.origin is None
        else sorted(Path(found.origin).parent.glob("chat_templates/*.jinja"))
    )


@pytest.mark.parametrize("path", public_templates(), ids=lambda path: path.stem)
def test_templates_of_published_models(path: Path) -> None:
    source = path.read_text()
    tokens = re.findall(
        r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|</?(?:think|tool_call|start_of_turn|end_of_turn)>|<turn\|>|</s>", source
    )
    pipeline = Pipeline.from_str(train_bpe([WORDS], 300).to_json())
    for token in sorted({*tokens, "<end_of_utterance>"}):
        pipeline.add_tokens([AddedToken(token, special="think" not in token and "tool_call>" not in token)])
    ends = (
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|return|>",
        "<｜end▁of▁sentence｜>",
        "<turn|>",
        "</s>",
    )
    end = next((token for token in ends if token in tokens), "<end_of_utterance>")
    config = {"bos_token": "<|endoftext|>", "eos_token": end, "chat_template": source}
    template = ChatTemplate(Tokenizer(pipeline.to_str(), config))
    if not template.tool_format.generic:
        assert template._describes_tools
    calls: list[tuple[str, dict[str, Any]]] = [("f", {"x": 12, "s": 'a"}{'}), ("get_it-2", {"y": True})]
    calls = calls if template.tool_format.several else calls[:1]
    text = written(template, answer(calls))
    _, read = parse(template.tool_format, [text[:9], text[9:]])
    assert [(called, json.loads(arguments)) for _, called, arguments in read] == calls
    if not path.stem.startswith("muse_glimmer"):  # whose answers begin with a header of special tokens
        assert accepts(template, text, "auto")


def test_a_call_that_is_cut_off() -> None:
    nemo = TEMPLATE["mistral_nemo"].tool_format
    text, calls = parse(nemo, ['[TOOL_CALLS][{"name": "f", "arguments": {"x": 1'])
    assert (text, calls[0][1:]) == ("", ["f", '{"x": 1'])
    assert calls[0][0].startswith("call_")
    assert parse(nemo, ['[TOOL_CALLS][{"na']) == ('[TOOL_CALLS][{"na', [])


# special tokens in what is not the template's own text --------------------------------------------------------------


@settings(max_examples=examples(150), deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(TEMPLATE)))
def test_tools_and_documents_are_inert(data: st.DataObject, name: str) -> None:
    template = TEMPLATE[name]
    added = template.tokenizer.added_tokens()
    evil = data.draw(st.lists(st.sampled_from([*added, "<|im_", "end|>", " ", "\ue000", "x"]), max_size=4).map("".join))

    def count(text: str, content: str) -> list[int]:
        tool = function("f", **{text or "x": {"type": "string", "description": text, "enum": [text]}})
        tool["function"]["description"] = text
        messages = [{"role": "user", "content": content}]
        if name not in ("gemma3", "plain", "qwen3_coder"):
            messages += [answer([("f", {text: text})]), {"role": "tool", "tool_call_id": "call00000", "content": text}]
        ids = template.encode(messages, tools=[tool], documents=[{"title": text, "text": text}])
        return [ids.count(id) for id in added.values()]

    assert count(evil, evil) == count("x", "x")


def test_text_of_users_survives() -> None:
    for name, template in TEMPLATE.items():
        for token in template.tokenizer.added_tokens():
            text = f"say {token} twice: {token}"
            ids = template.encode([{"role": "user", "content": text}])
            assert text in template.tokenizer.decode(ids, skip_special_tokens=False), name


def test_thoughts_of_the_assistant_stay_tokens() -> None:
    template = TEMPLATE["qwen3_thinking"]
    added = template.tokenizer.added_tokens()
    ids = template.encode([QUESTION, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nyes"}])
    assert added["<think>"] in ids
    assert added["</think>"] in ids


def test_escaped_json() -> None:
    base = TEMPLATE["hermes"].tokenizer
    source = "{{ tools | tojson(ensure_ascii=True, indent=1, sort_keys=True) }}{{ messages[0].content }}<|im_end|>"
    template = ChatTemplate(Tokenizer(base.to_json(), {**base.config(), "chat_template": source}))
    ids = template.encode([QUESTION], tools=[function("f", **{"<|im_end|>é<tool_call>": {}})])
    assert ids.count(base.added_tokens()["<|im_end|>"]) == 1
    assert base.added_tokens()["<tool_call>"] not in ids
    assert '"<|im_end|>\\u00e9<tool_call>": {}' in base.decode(ids, skip_special_tokens=False)


# named templates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "mapping", "folder"])
def test_templates_for_tools_have_a_name(form: str, tmp_path: Path) -> None:
    base = TEMPLATE["hermes"].tokenizer
    with_tools, without = (TEMPLATES / "hermes.jinja").read_text(), "{{ messages[0].content }}<|im_end|>"
    named: Any = {"default": without, "tool_use": with_tools}
    if form == "list":
        named = [{"name": name, "template": text} for name, text in named.items()]
    config = {**base.config(), "chat_template": without if form == "folder" else named}
    Tokenizer(base.to_json(), config).save(tmp_path)
    if form == "folder":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(with_tools)
    template = ChatTemplate(read_tokenizer(tmp_path))
    assert template.render([QUESTION]) == "a question<|im_end|>"
    assert template.render([QUESTION], tools=TOOLS) == TEMPLATE["hermes"].render([QUESTION], tools=TOOLS)
    assert template.tool_format == TEMPLATE["hermes"].tool_format


# the generic form -----------------------------------------------------------------------------------------------------


def test_the_generic_form() -> None:
    call, result = answer([("f", {"x": 1}), ("f", {"x": 2})], "Let me see."), {"role": "tool", "content": "12"}
    later = {"role": "user", "content": "and then?"}
    text = TEMPLATE["gemma3"].render([QUESTION, call, result, result, later], tools=TOOLS)
    assert text.count("<start_of_turn>user") == text.count("<start_of_turn>model") == 2
    for part in (
        '{"name": "f", "description": "does f"',
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>',
        "<tool_response>\n12\n</tool_response>\n<tool_response>\n12\n</tool_response>\nand then?",
    ):
        assert part in text
    plain = TEMPLATE["plain"].render([{"role": "system", "content": "be kind"}, QUESTION], tools=TOOLS)
    assert plain.startswith("be kind\n\nYou can call functions.")


def test_templates_that_fail_say_so() -> None:
    with pytest.raises(TokenizerError, match="roles must alternate"):
        TEMPLATE["gemma3"].render([QUESTION, QUESTION], tools=TOOLS)

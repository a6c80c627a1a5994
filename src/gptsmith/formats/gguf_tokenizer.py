"""The tokenizer inside a GGUF file: from its metadata to a `Tokenizer`, and back.

`tokenizer.ggml.model` names the algorithm. "gpt2" is byte-level BPE; `tokenizer.ggml.pre` names the pattern that
splits text into words (llama.cpp's src/llama-vocab.cpp has the patterns). "llama" is SentencePiece's BPE, which merges
the pair with the best score first and falls back to bytes for unknown characters. Neither normalizes text, while a
tokenizer.json can (Qwen2's applies NFC).

A file that we write also contains the tokenizer.json itself, under the specification's key
`tokenizer.huggingface.json`. llama.cpp ignores it, and reading it back gives exactly the same tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptsmith.errors import CheckpointError, TokenizerError
from gptsmith.log import note
from gptsmith.tokenizer.tokenizer import _BYTE_OF_CHARACTER, Tokenizer, token_content, with_added_tokens

if TYPE_CHECKING:
    import tokenizers

HUGGINGFACE_KEY = "tokenizer.huggingface.json"
_PRE_TOKENIZER_KEY = "tokenizer.ggml.pre"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN, QWEN2_PATTERN = _MODERN % "{1,3}", _MODERN % ""
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT_PATTERNS = (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTES, "use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


# By `tokenizer.ggml.pre`: the tokenizer.json pre-tokenizer that splits text in the same places.
_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, _GPT2)
_LLAMA3 = _sequence(_split(LLAMA3_PATTERN), _BYTES)
_QWEN2 = _sequence(_split(QWEN2_PATTERN), _BYTES)
_TEKKEN = _sequence(_split(TEKKEN_PATTERN), _BYTES)
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "default": _sequence(*map(_split, _DEFAULT_PATTERNS), _BYTES),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "exaone4", "trillion", "mellum"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
}
# With these, a word that is in the vocabulary becomes that token, whatever the merges are (`ignore_merges`).
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"}
_WRITABLE = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "default")

# llama.cpp ends a text at tokens with these names, besides those whose ids are stored.
_END_TOKENS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    "<end_of_utterance>",
}

_SPACE = "▁"  # SentencePiece's character for a space
_MAX_PIECE = 256  # characters; longer tokens are not derived from pairs


# Reading --------------------------------------------------------------------------------------------------------------


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Return the tokenizer that a GGUF file's metadata describe. where: the file, for messages.

    Raises CheckpointError if the file has no tokenizer, or one that is damaged or of an unknown kind.
    """
    reader = _Reader(metadata, where)
    stored = metadata.get(HUGGINGFACE_KEY)
    try:
        if isinstance(stored, str):
            tokenizer = reader.tokenizer(stored)
            if tokenizer.vocab_size > len(reader.tokens):
                raise reader.fail(f"its tokenizer.json has more tokens than its list of {len(reader.tokens):,}")
            return tokenizer
        return reader.tokenizer(reader.pipeline().to_str(pretty=True))
    except CheckpointError:
        raise
    except BaseException as error:  # `tokenizers` raises bare Exceptions and Rust panics, which are BaseExceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise reader.fail(f"no tokenizer can be built from it: {str(error).rstrip('.')}") from None


class _Reader:
    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.model = metadata.get("tokenizer.ggml.model")
        if self.model not in ("gpt2", "llama"):
            raise self.fail(
                f"its tokenizer is of kind {self.model!r:.80}. Supported: gpt2 (byte-level BPE), llama (SentencePiece)"
                if self.model
                else "it has no tokenizer"
            )
        self.tokens: list[str] = self.array("tokens", str, None)
        if not self.tokens or len(set(self.tokens)) != len(self.tokens):
            raise self.fail("its list of tokens is empty or has duplicates")
        self.types: list[int] = self.array("token_type", int, [NORMAL] * len(self.tokens))
        self.scores: list[float] = self.array("scores", float, [0.0] * len(self.tokens))
        for name in ("types", "scores"):
            if len(getattr(self, name)) != len(self.tokens):
                raise self.fail(f"it has {len(self.tokens):,} tokens, but {len(getattr(self, name)):,} {name}")

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}.")

    def array(self, name: str, kind: type, default: list[Any] | None) -> list[Any]:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        values = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(values, list) or (values and not isinstance(values[0], kind)):
            raise self.fail(f"its tokenizer.ggml.{name} is missing or not a list of {kind.__name__}")
        return values

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        return value if isinstance(value, bool) else default

    def special(self, name: str) -> str | None:
        """Return the token whose id is stored under `name`, such as "bos"."""
        id = self.special_id(name)
        return None if id is None else self.tokens[id]

    def special_id(self, name: str) -> int | None:
        defaults = {"bos": 1, "eos": 2, "unknown": 0} if self.model == "llama" else {}  # llama.cpp's
        id = self.metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        return id if type(id) is int and 0 <= id < len(self.tokens) else None

    def config(self) -> dict[str, Any]:
        """Return the contents of the equivalent tokenizer_config.json."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            if (token := self.special(name)) is not None:
                config[f"{role}_token"] = token
        config["add_bos_token"] = self.adds_bos()
        config["add_eos_token"] = self.flag("add_eos_token", False)
        if (template := chat_templates(self.metadata)) is not None:
            config["chat_template"] = template
        return config

    def tokenizer(self, text: str) -> Tokenizer:
        """Return the tokenizer of a tokenizer.json, which adds to a text the tokens that the metadata name."""
        tokenizer = Tokenizer(text, self.config(), self.end_ids())
        around: list[dict[str, int]] = []
        for name, adds in (("bos", self.adds_bos()), ("eos", self.flag("add_eos_token", False))):
            id = self.special_id(name) if adds else None
            around.append({} if id is None else {self.tokens[id]: id})
        before, after = around
        if (tokenizer.prefix_ids, tokenizer.suffix_ids) == (tuple(before.values()), tuple(after.values())):
            return tokenizer
        return Tokenizer(with_added_tokens(text, before, after), self.config(), self.end_ids())

    def end_ids(self) -> list[int]:
        """Return the tokens at which llama.cpp ends a text."""
        stored = (self.special_id(name) for name in ("eos", "eot", "eom"))
        named = (
            id
            for id, (token, type) in enumerate(zip(self.tokens, self.types, strict=True))
            if token in _END_TOKENS and type != NORMAL
        )
        return list(dict.fromkeys([*(id for id in stored if id is not None), *named]))

    def adds_bos(self) -> bool:
        """Return whether encoding prepends the BOS token. Without the flag, decide as llama.cpp does."""
        return self.flag(
            "add_bos_token", self.model == "llama" or self.metadata.get(_PRE_TOKENIZER_KEY) in _WHOLE_WORDS
        )

    def pipeline(self) -> tokenizers.Tokenizer:
        from tokenizers import AddedToken

        pipeline = self.byte_level() if self.model == "gpt2" else self.sentencepiece()
        for type in (CONTROL, USER_DEFINED):
            kind = (CONTROL, UNKNOWN) if type == CONTROL else (USER_DEFINED,)
            added = [
                AddedToken(token, special=type == CONTROL, normalized=False)
                for token, its_type in zip(self.tokens, self.types, strict=True)
                if its_type in kind and token
            ]
            (pipeline.add_special_tokens if type == CONTROL else pipeline.add_tokens)(added)
        return pipeline

    def byte_level(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Pipeline
        from tokenizers import decoders, models

        name = self.metadata.get(_PRE_TOKENIZER_KEY, "default")
        if name not in PRE_TOKENIZERS:
            raise self.fail(f"its pre-tokenizer {name!r:.80} is unknown. Supported: {', '.join(PRE_TOKENIZERS)}")
        merges = []
        for merge in self.array("merges", str, None):
            at = merge.find(" ", 1)
            if at < 0:
                raise self.fail(f"its merge {merge!r:.80} does not have two parts")
            merges.append((merge[:at], merge[at + 1 :]))
        vocabulary = {token: id for id, token in enumerate(self.tokens)}
        pipeline = Pipeline(models.BPE(vocabulary, merges, ignore_merges=name in _WHOLE_WORDS))
        pipeline.decoder = decoders.ByteLevel()
        return _with(pipeline, "pre_tokenizer", PRE_TOKENIZERS[name])

    def sentencepiece(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Pipeline
        from tokenizers import decoders, models, normalizers

        vocabulary = {token: id for id, token in enumerate(self.tokens)}
        mergeable = {
            token: score
            for token, score, type in zip(self.tokens, self.scores, self.types, strict=True)
            if type in (NORMAL, USER_DEFINED, UNUSED)
        }
        unknown = next((token for token, type in zip(self.tokens, self.types, strict=True) if type == UNKNOWN), None)
        pipeline = Pipeline(
            models.BPE(
                vocabulary,
                merges_of_scores(mergeable, vocabulary),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback="<0x00>" in vocabulary,
            )
        )
        prefix = self.flag("add_space_prefix", True)
        replace = normalizers.Replace(" ", _SPACE)
        pipeline.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
        strip = [decoders.Strip(content=" ", left=1)] if prefix else []
        pipeline.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return pipeline


def _with(pipeline: tokenizers.Tokenizer, part: str, description: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the pipeline with one part of its tokenizer.json replaced."""
    from tokenizers import Tokenizer as Pipeline

    return Pipeline.from_str(json.dumps({**json.loads(pipeline.to_str()), part: description}))


def merges_of_scores(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that concatenate to a token, those of the best-scored token first."""
    found = []
    for token, score in scores.items():
        if 1 < len(token) <= _MAX_PIECE:
            for at in range(1, len(token)):
                left, right = token[:at], token[at:]
                if left in scores and right in scores:
                    found.append((-score, ids[token], ids[left], ids[right], left, right))
    return [each[4:] for each in sorted(found)]


# Writing --------------------------------------------------------------------------------------------------------------


def tokenizer_to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the metadata with which llama.cpp encodes text to the same ids, for a model of `vocab_size` rows.

    A character tokenizer is written as byte-level BPE whose merges only join the bytes of each character. llama.cpp
    drops characters that are not in the vocabulary, while this package reports them.
    Raises TokenizerError for a tokenizer that llama.cpp cannot represent.
    """
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only {vocab_size:,}.")
    description = json.loads(tokenizer.to_json())
    added = {token["id"]: token for token in description.get("added_tokens") or []}
    if tokenizer.kind == "char":
        specific = _char_metadata(description, added)
    elif tokenizer.kind == "bpe":
        specific = _byte_level_metadata(description)
    else:
        specific = _sentencepiece_metadata(description, added)

    vocabulary: dict[str, int] = specific.pop("vocabulary")
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, id in vocabulary.items():
        tokens[id], types[id] = token, NORMAL
        if specific["model"] == "llama" and _is_byte(token):
            types[id] = BYTE
    for id, token in added.items():
        tokens[id], types[id] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if specific["model"] == "llama" and tokenizer.unk_id is not None:
        types[tokenizer.unk_id] = UNKNOWN
    if len(set(tokens)) != len(tokens):
        raise TokenizerError("the tokenizer has two tokens of the same name, which GGUF does not allow.")
    if scores := specific.pop("scores", None):
        specific["scores"] = [float(scores.get(token, 0.0)) for token in tokens]

    config = tokenizer.config()
    ids = {token: id for id, token in enumerate(tokens)}
    metadata: dict[str, Any] = {f"tokenizer.ggml.{key}": value for key, value in specific.items()}
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        named = token_content(config.get(f"{role}_token"))
        if named in ids:
            metadata[f"tokenizer.ggml.{name}_token_id"] = ids[named]
    metadata |= _added_tokens(tokenizer)
    unnamed = [id for id in tokenizer.end_ids[1:] if tokens[id] not in _END_TOKENS or types[id] == NORMAL]
    metadata |= {f"tokenizer.ggml.{name}_token_id": id for name, id in zip(("eot", "eom"), unnamed, strict=False)}
    if len(unnamed) > 2:
        lost = ", ".join(tokens[id] for id in unnamed[2:])
        note(f"warning: GGUF has no place for more than three end tokens; llama.cpp will not stop at {lost}.")
    metadata |= _template_metadata(config.get("chat_template"))
    metadata[HUGGINGFACE_KEY] = json.dumps(description, ensure_ascii=False, separators=(",", ":"))
    return metadata


def chat_templates(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """Return the chat template, or several with their names, as a tokenizer_config.json has them; None for none."""
    key = "tokenizer.chat_template"
    named = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    if isinstance(metadata.get(key), str):
        named = {"default": metadata[key], **named}
    if set(named) <= {"default"}:
        return named.get("default")
    return [{"name": name, "template": template} for name, template in named.items()]


def _template_metadata(configured: Any) -> dict[str, Any]:
    key = "tokenizer.chat_template"
    if isinstance(configured, str):
        return {key: configured}
    if isinstance(configured, Mapping):
        configured = [{"name": name, "template": template} for name, template in configured.items()]
    named = {str(entry["name"]): entry["template"] for entry in configured or [] if isinstance(entry, Mapping)}
    further = [name for name in named if name != "default"]
    metadata: dict[str, Any] = {key if name == "default" else f"{key}.{name}": text for name, text in named.items()}
    return {**metadata, "tokenizer.chat_templates": further} if further else metadata


def _byte_level_metadata(description: Mapping[str, Any]) -> dict[str, Any]:
    model = description["model"]
    whole_words = bool(model.get("ignore_merges"))
    normalizer = (description.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp omits NFC for Qwen's files, too
        raise TokenizerError(f"llama.cpp does not normalize text, but this tokenizer does ({normalizer}).")
    name = next(
        (
            name
            for name in _WRITABLE
            if _split_steps(description.get("pre_tokenizer")) == _split_steps(PRE_TOKENIZERS[name])
            and (name in _WHOLE_WORDS) == whole_words
        ),
        None,
    )
    if name is None:
        raise TokenizerError("llama.cpp has no pre-tokenizer that splits text into words as this tokenizer does.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "model": "gpt2",
        "pre": name,
        "add_space_prefix": False,
        "merges": merges,
        "vocabulary": model["vocab"],
    }


def _split_steps(part: Mapping[str, Any] | None) -> list[Any]:
    """Return a pre-tokenizer's steps in a form that is equal for equivalent descriptions."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part["pretokenizers"] for step in _split_steps(each)]
    if part["type"] == "ByteLevel":
        bytes = ("bytes", part.get("add_prefix_space", True))
        return [("split", _WORDS), bytes] if part.get("use_regex", True) else [bytes]
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
        return [("split", part["pattern"].get("Regex"))]
    return [json.dumps(part, sort_keys=True)]


def _char_metadata(description: Mapping[str, Any], added: Mapping[int, Any]) -> dict[str, Any]:
    """Describe a character tokenizer as byte-level BPE that merges the bytes of each character from left to right.

    In UTF-8 the first byte of a character differs from the following ones, so no merge spans two characters.
    """
    character_of = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}
    vocabulary: dict[str, int] = {}
    merges: dict[str, None] = {}  # in order, each once
    for token, id in description["model"]["vocab"].items():
        if id in added:
            continue
        spelled = "".join(character_of[byte] for byte in token.encode("utf-8"))
        vocabulary[spelled] = id
        for at in range(1, len(spelled)):
            merges[f"{spelled[:at]} {spelled[at]}"] = None
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "add_space_prefix": False,
        "merges": list(merges),
        "vocabulary": vocabulary,
    }


def _sentencepiece_metadata(description: Mapping[str, Any], added: Mapping[int, Any]) -> dict[str, Any]:
    """Describe a BPE with byte fallback over text whose spaces are "▁", by scores that give the same merge order."""
    model = description["model"]
    prefix = _space_prefix(description)
    if model.get("type") != "BPE" or not model.get("byte_fallback") or prefix is None:
        raise TokenizerError(
            "llama.cpp cannot represent this tokenizer. Supported: characters, byte-level BPE, and SentencePiece's BPE "
            "with byte fallback."
        )
    vocabulary: dict[str, int] = model["vocab"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(pairs):
        scores.setdefault(left + right, -float(rank))
    pieces = {
        token: scores.get(token, -float(len(pairs)))
        for token, id in vocabulary.items()
        if id not in added and not _is_byte(token)
    }
    if set(merges_of_scores(pieces, vocabulary)) != set(pairs):
        raise TokenizerError(
            "this tokenizer lacks merges for some pairs that concatenate to a token; llama.cpp would merge them."
        )
    return {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": prefix,
        "scores": pieces,
        "vocabulary": vocabulary,
    }


def _space_prefix(description: Mapping[str, Any]) -> bool | None:
    """Return whether a space is prepended to the text; None if spaces are not SentencePiece's "▁"."""
    normalizer, pre = description.get("normalizer"), description.get("pre_tokenizer")
    if pre is not None and normalizer is None and pre.get("type") == "Metaspace" and not pre.get("split", True):
        return str(pre.get("prepend_scheme", "always")) != "never"
    parts: Sequence[Mapping[str, Any]] = (normalizer or {}).get("normalizers") or [normalizer or {}]
    kinds = [part.get("type") for part in parts]
    replaces = parts[-1].get("pattern") == {"String": " "} and parts[-1].get("content") == _SPACE
    if pre is not None or not replaces or kinds not in (["Replace"], ["Prepend", "Replace"]):
        return None
    return bool(kinds[0] == "Prepend")


def _added_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the metadata about the tokens that are put around a text."""
    if len(tokenizer.prefix_ids) > 1 or len(tokenizer.suffix_ids) > 1:
        raise TokenizerError("the tokenizer puts several tokens before or after a text; llama.cpp puts one at most.")
    bos_id = next(iter(tokenizer.prefix_ids), tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id)
    eos_id = next(iter(tokenizer.suffix_ids), tokenizer.eos_id)
    ids = {"bos": bos_id, "eos": eos_id}
    return {
        **{f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None},
        "tokenizer.ggml.add_bos_token": bool(tokenizer.prefix_ids),
        "tokenizer.ggml.add_eos_token": bool(tokenizer.suffix_ids),
    }


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

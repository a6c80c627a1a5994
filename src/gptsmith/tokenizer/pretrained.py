"""The tokenizer of a Hugging Face model directory.

It is read from tokenizer.json, or from the older vocab.json and merges.txt (byte-level as in GPT-2, or of whole words
as in GPT-1). Tokens that only tokenizer_config.json or special_tokens_map.json name are added, as transformers does.
The chat templates become part of the tokenizer's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptsmith.errors import TokenizerError
from gptsmith.tokenizer.bpe import _byte_level, _special_token
from gptsmith.tokenizer.tokenizer import (
    CONFIG_FILE,
    END_OF_TEXT,
    TOKENIZER_FILE,
    Tokenizer,
    model_end_ids,
    read_file,
    read_object,
    token_content,
    with_added_tokens,
)

if TYPE_CHECKING:
    import tokenizers

VOCABULARY_FILES = (TOKENIZER_FILE, "vocab.json", "merges.txt")
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FURTHER_ROLES = ("additional_special_tokens", "extra_special_tokens")  # the older and the newer name of one list
_TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_END_OF_WORD = "</w>"


def has_tokenizer(directory: Path) -> bool:
    """Return whether a model directory has files of a tokenizer, complete or not."""
    names = (TOKENIZER_FILE, CONFIG_FILE, "vocab.json", "merges.txt", "vocab.txt", "tekken.json")
    return any((directory / name).is_file() for name in names) or any(directory.glob("*.model"))


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a model directory. Raises TokenizerError naming a file that is missing or damaged."""
    directory = Path(directory)
    if (directory / TOKENIZER_FILE).is_file():
        tokenizer = Tokenizer.load(directory)
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        tokenizer = _from_vocabulary(directory)
    elif any(directory.glob("*.model")):
        name = next(iter(sorted(directory.glob("*.model")))).name
        raise TokenizerError(
            f"{directory} has only a SentencePiece tokenizer ({name}), which is not supported. Convert it to "
            f"{TOKENIZER_FILE} with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )
    else:
        return Tokenizer.load(directory)  # raises an error that names the missing file
    config = read_object(directory / CONFIG_FILE)
    named = read_object(directory / SPECIAL_TOKENS_FILE)
    listed = "added_tokens_decoder" in config  # in which case the older file is only a fallback, as in transformers
    for role, token in named.items():
        if role in (*_SPECIAL_ROLES, *_FURTHER_ROLES) and token and not (listed and config.get(role)):
            config[role] = token
    if templates := _chat_templates(directory, config.get("chat_template")):
        config["chat_template"] = templates
    text = _with_added_tokens(tokenizer.to_json(), config, directory / CONFIG_FILE)
    return Tokenizer.from_json(text, config, model_end_ids(directory))


def _chat_templates(directory: Path, configured: object) -> str | list[dict[str, str]]:
    """Return the templates in files of their own: one, or several by name; "" if there are none. They replace those in
    tokenizer_config.json (`configured`), but for a default that has no file."""
    templates = {}
    if (directory / CHAT_TEMPLATE_FILE).is_file():
        templates["default"] = read_file(directory / CHAT_TEMPLATE_FILE)
    elif isinstance(old := read_object(directory / "chat_template.json").get("chat_template"), str):
        templates["default"] = old
    for path in sorted((directory / CHAT_TEMPLATE_FOLDER).glob("*.jinja")):
        templates[path.stem] = read_file(path)
    if set(templates) <= {"default"}:
        return templates.get("default", "")
    if isinstance(configured, str):
        templates.setdefault("default", configured)
    return [{"name": name, "template": template} for name, template in templates.items()]


def _with_added_tokens(text: str, config: Mapping[str, Any], where: Path) -> str:
    """Return the tokenizer.json `text` with the tokens that a tokenizer_config.json adds to it.

    These are the entries of `added_tokens_decoder` and the tokens that have a role, which are special. A token that the
    vocabulary lacks gets the next id. Raises TokenizerError for an entry with another id than the one it would get.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Pipeline

    pipeline = Pipeline.from_str(text)
    present = {token.content: token for token in pipeline.get_added_tokens_decoder().values()}
    tokens: dict[str, dict[str, bool]] = {}
    entries = config.get("added_tokens_decoder") or {}
    try:
        numbered = sorted((int(id), token_content(entry), entry) for id, entry in entries.items())
    except (AttributeError, TypeError, ValueError):
        raise TokenizerError(f"{where}: added_tokens_decoder must map ids to tokens.") from None
    for _, content, entry in numbered:
        flags = {flag: bool(entry[flag]) for flag in _TOKEN_FLAGS if flag in entry} if isinstance(entry, dict) else {}
        if content and any(flags.get(flag) != getattr(present.get(content), flag, None) for flag in flags):
            tokens[content] = flags
    further = [token for role in _FURTHER_ROLES if isinstance(config.get(role), list) for token in config[role]]
    for token in [*(config.get(role) for role in _SPECIAL_ROLES), *further]:
        content = token_content(token)
        if content and content not in tokens and not (content in present and present[content].special):
            tokens[content] = {"normalized": False}
        if content in tokens:
            tokens[content]["special"] = True
    if not tokens:
        return text
    pipeline.add_tokens([AddedToken(content, **flags) for content, flags in tokens.items()])
    for id, content, _ in numbered:
        if content in tokens and (actual := pipeline.token_to_id(content)) != id:
            raise TokenizerError(
                f"{where}: added_tokens_decoder has {content!r} as {id}, but {TOKENIZER_FILE} makes it {actual}."
            )
    result: str = pipeline.to_str(pretty=True)
    return result


def _from_vocabulary(directory: Path) -> Tokenizer:
    """Read a tokenizer from vocab.json (token: id) and merges.txt (one pair per line, in order)."""
    where = directory / "vocab.json"
    vocabulary = read_object(where)
    if not vocabulary or not all(isinstance(id, int) and 0 <= id < 1 << 24 for id in vocabulary.values()):
        raise TokenizerError(f"{where} is not a vocabulary: it must map each token to its id.")
    lines = read_file(directory / "merges.txt").split("\n")
    rules = [line for line in lines if line.strip() and not line.startswith("#version")]
    merges = [(left, right) for left, _, right in (rule.partition(" ") for rule in rules)]
    config = read_object(directory / CONFIG_FILE)
    try:
        if any(token.endswith(_END_OF_WORD) for token in vocabulary):
            pipeline = _whole_words(vocabulary, merges)
        else:
            pipeline = _byte_level(vocabulary, merges)
            pipeline.add_special_tokens([_special_token(END_OF_TEXT)] if END_OF_TEXT in vocabulary else [])
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise TokenizerError(f"{where} and merges.txt do not match: {error}.") from None
    added = {id: token for token, id in read_object(directory / "added_tokens.json").items() if token not in vocabulary}
    first = pipeline.get_vocab_size()
    if set(added) != set(range(first, first + len(added))):
        raise TokenizerError(f"{directory / 'added_tokens.json'}: the ids of added tokens must continue from {first}.")
    pipeline.add_special_tokens([_special_token(added[id]) for id in sorted(added)])
    text = pipeline.to_str(pretty=True)
    around: list[dict[str, int]] = []
    for role in ("bos", "eos"):
        token = token_content(config.get(f"{role}_token")) or END_OF_TEXT
        id = pipeline.token_to_id(token)
        around.append({token: id} if config.get(f"add_{role}_token") is True and id is not None else {})
    return Tokenizer(with_added_tokens(text, *around) if any(around) else text, config)


def _whole_words(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Return a tokenizer like that of GPT-1.

    It lower-cases the text, splits words and punctuation, merges within words, and marks the last token of a word with
    `</w>`.
    """
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    unknown = "<unk>" if "<unk>" in vocabulary else None
    model = models.BPE(dict(vocabulary), merges, unk_token=unknown, end_of_word_suffix=_END_OF_WORD, fuse_unk=False)
    pipeline = Pipeline(model)
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=True)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.BPEDecoder(suffix=_END_OF_WORD)
    if unknown is not None:
        pipeline.add_special_tokens([_special_token(unknown)])
    return pipeline

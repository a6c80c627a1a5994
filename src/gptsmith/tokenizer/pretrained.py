"""The tokenizer of a Hugging Face model directory.

It is read from tokenizer.json, or from the older vocab.json and merges.txt (byte-level as in GPT-2, or of whole words
as in GPT-1). The chat template becomes part of the tokenizer's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

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

CHAT_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
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
    for role, token in read_object(directory / "special_tokens_map.json").items():
        if role in _SPECIAL_ROLES and config.get(role) is None:
            config[role] = token
    template = directory / CHAT_TEMPLATE_FILE
    if template.is_file():
        config["chat_template"] = read_file(template)
    return Tokenizer.from_json(tokenizer.to_json(), config, model_end_ids(directory))


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

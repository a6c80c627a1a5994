"""The text of a run, tokenized as the run would: its tokenizer and its dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Dataset
from gptsmith.data.sources import Source, Spec, open_source, refuse_useless_field
from gptsmith.errors import TokenizerError, UsageError, nearest
from gptsmith.formats.hub import hub_model_path, is_hub_id
from gptsmith.formats.named import NAMED_MODELS
from gptsmith.formats.source import open_model
from gptsmith.loading import resolve_model
from gptsmith.log import note, progress
from gptsmith.runtime import choose_device
from gptsmith.tokenizer import Tokenizer, gpt2_tokenizer, train_bpe, train_char
from gptsmith.tokenizer.ids import IdTokenizer
from gptsmith.tokenizer.pretrained import VOCABULARY_FILES, has_tokenizer, read_tokenizer
from gptsmith.tokenizer.tokenizer import CONFIG_FILE, read_file
from gptsmith.train.budget.machine import default_flops
from gptsmith.train.budget.parse import Budget
from gptsmith.train.budget.recipe import LONG_TEXT, MOST_CHARACTERS, tokenizer_for
from gptsmith.train.config import RunConfig

RUN_FOLDER = "tokenizer"  # where a run keeps its tokenizer


@dataclass(frozen=True)
class Text:
    """The text of a run, opened: the data of pretraining.

    val: a text of its own for validation. val_given: whether the user chose it; otherwise it belongs to the data.
    """

    source: Source
    val: Source | None = None
    val_given: bool = False

    @classmethod
    def open(cls, spec: Spec, config: RunConfig) -> Text:
        """Open files, folders or named corpora, and the validation text. Raise UsageError where there are none.

        The validation text is the one given, or else the validation split of the data, if it has one.
        """
        column = config.data.field
        source = open_source(spec, field=column)
        val = source.validation()
        if config.data.val is not None:
            given = open_source(config.data.val, field=column)
            val = given.validation() or given
        elif val is not None:
            note(f"{source.spec}: holding out its own split for validation, no part of the training split")
        refuse_useless_field(column, source, val)
        return cls(source, val, config.data.val is not None)

    @property
    def name(self) -> str:
        return self.source.name

    def make_tokenizer(self, config: RunConfig, overrides: Collection[str]) -> tuple[RunConfig, Tokenizer]:
        config = choose_tokenizer(config, overrides, self.source)
        return config, make_tokenizer(config, self.source, self.val)

    def prepare(self, config: RunConfig, tokenizer: Tokenizer, *, allow_unknown: bool | None = None) -> Dataset:
        """Return the text tokenized. allow_unknown: accept a text unknown to the tokenizer; None: as configured."""
        return prepare(
            self.source,
            tokenizer,
            val=self.val,
            val_fraction=config.data.val_fraction,
            allow_unknown=config.init.unknown if allow_unknown is None else allow_unknown,
        )

    def places(self) -> dict[str, Any]:
        """Return where the text is, a path in full or a list of them, and the validation text that was given."""
        spec = self.source.places
        val = self.val.places[0] if self.val is not None and self.val_given else None
        return {"spec": spec[0] if len(spec) == 1 else spec, "val": val}


def read_text(data: Spec, config: RunConfig, overrides: Collection[str] = ()) -> tuple[Tokenizer, Dataset]:
    """Return the tokenizer and the dataset of a run with new weights. overrides: as for `gptsmith.train.run.start`."""
    text = Text.open(data, config)
    config, tokenizer = text.make_tokenizer(config, overrides)
    return tokenizer, text.prepare(config, tokenizer)


def make_tokenizer(config: RunConfig, train: Source, val: Source | None) -> Tokenizer:
    """Make the tokenizer of a run. A char alphabet comes from all the text, byte pairs from the training text only."""
    init = config.init
    if init.tokenizer == "char":
        sources = [train] if val is None else [train, val]
        return train_char((text for source in sources for text in read_texts(source)), unknown=init.unknown)
    if init.tokenizer == "bpe":
        fraction = 0.0 if val is not None else config.data.val_fraction
        return train_bpe(_training_part(train, fraction), init.vocab_size)
    tokenizer = ready_tokenizer(init.tokenizer).without_added_tokens()  # which the training text does not have
    if tokenizer.eos_id is None:
        note(
            f"note: the tokenizer {init.tokenizer} has no end-of-text token (eos_token in {CONFIG_FILE}): nothing "
            "separates documents, and the model will not end its texts."
        )
    return tokenizer


def ready_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer that is not made from the text: gpt2, or that of a directory, a file, a run or a model."""
    if name == "gpt2":
        return gpt2_tokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        saved = path / RUN_FOLDER  # of a run
        return read_tokenizer(saved if saved.is_dir() and not has_tokenizer(path) else path)
    if path.is_file() and path.name in VOCABULARY_FILES:
        return read_tokenizer(path.parent)
    if path.is_file() and path.suffix == ".json":
        return _from_file(path)
    if path.suffix.lower() == ".gguf" or name in NAMED_MODELS:
        tokenizer = open_model(resolve_model(name)).tokenizer()
        if isinstance(tokenizer, IdTokenizer):
            raise UsageError(f"--tokenizer {name}: this model has no tokenizer.")
        return tokenizer
    if is_hub_id(name) and not path.exists():
        return read_tokenizer(hub_model_path(name, weights=False))
    near = nearest(name, ("char", "bpe", "gpt2", *NAMED_MODELS))
    raise UsageError(
        f"--tokenizer {name}: use char, bpe, gpt2, a run, a model, or a directory or file with a tokenizer.{near}"
    )


def _from_file(path: Path) -> Tokenizer:
    """Read a tokenizer.json under another name, without files beside it."""
    try:
        return Tokenizer(read_file(path))
    except TokenizerError as error:
        raise TokenizerError(f"{path} is {error}") from None


def choose_tokenizer(config: RunConfig, overrides: Collection[str], source: Source) -> RunConfig:
    """Return `config` with the tokenizer for its budget, the length of the text and its alphabet."""
    if config.auto.budget is None or config.init.tokenizer != "char" or "tokenizer" in overrides:
        return config
    alphabet: set[str] = set()
    length = 0
    for chunk in source.chunks():
        alphabet.update(chunk.text)
        length += len(chunk.text)
        if length >= LONG_TEXT:
            break
    rate = default_flops(choose_device(config.loop.device))
    kind, size = tokenizer_for(length, len(alphabet), Budget.parse(config.auto.budget), rate)
    if kind == "char":
        return config
    size = config.init.vocab_size if "vocab_size" in overrides else size
    why = f"more than {MOST_CHARACTERS} different characters" if len(alphabet) > MOST_CHARACTERS else "a long text"
    note(f"{why}: using {size:,} byte pairs trained on it instead of characters (--tokenizer char keeps characters)")
    return config.replace(tokenizer="bpe", vocab_size=size)


def _training_part(source: Source, val_fraction: float) -> Iterator[str]:
    """Yield the text of a source without the last `val_fraction` of its characters, which validation is cut from."""
    if not val_fraction:
        yield from read_texts(source)
        return
    left = round(sum(map(len, read_texts(source))) * (1 - val_fraction))
    for text in read_texts(source):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def read_texts(source: Source) -> Iterator[str]:
    """Yield the text of a source in chunks, showing progress."""
    with progress(source.size_bytes, f"reading {source.name}", "B") as bar:
        for chunk in source.chunks(bar.advance):
            yield chunk.text

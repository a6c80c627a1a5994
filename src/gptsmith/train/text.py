"""The text of a run, tokenized as the run would: its tokenizer and its dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Dataset
from gptsmith.data.sources import Source, open_source
from gptsmith.errors import UsageError, nearest
from gptsmith.log import note
from gptsmith.runtime import choose_device
from gptsmith.tokenizer import Tokenizer, gpt2_tokenizer, train_bpe, train_char
from gptsmith.train.budget.machine import default_flops
from gptsmith.train.budget.parse import Budget
from gptsmith.train.budget.recipe import LONG_TEXT, MOST_CHARACTERS, tokenizer_for
from gptsmith.train.config import RunConfig


def open_sources(data: str, config: RunConfig) -> tuple[Source, Source | None]:
    """Open the text of a run, and its own validation text if it has one."""
    source = open_source(data, field=config.data.field)
    return source, open_source(config.data.val, field=config.data.field) if config.data.val else None


def read_text(data: str, config: RunConfig, overrides: Collection[str] = ()) -> tuple[Tokenizer, Dataset]:
    """Return the tokenizer and the dataset of a run with new weights. overrides: as for `gptsmith.train.run.start`."""
    source, val = open_sources(data, config)
    config = choose_tokenizer(config, overrides, source)
    tokenizer = make_tokenizer(config, source, val)
    return tokenizer, prepare_text(data, config, tokenizer)


def prepare_text(data: str, config: RunConfig, tokenizer: Tokenizer) -> Dataset:
    """Return the dataset of a run, tokenized by an existing tokenizer."""
    source, val = open_sources(data, config)
    return prepare(source, tokenizer, val=val, val_fraction=config.data.val_fraction, allow_unknown=config.init.unknown)


def make_tokenizer(config: RunConfig, train: Source, val: Source | None) -> Tokenizer:
    """Make the tokenizer of a run. A char alphabet comes from all the text, byte pairs from the training text only."""
    init = config.init
    if init.tokenizer == "char":
        sources = [train] if val is None else [train, val]
        return train_char((chunk.text for s in sources for chunk in s.chunks()), unknown=init.unknown)
    if init.tokenizer == "bpe":
        fraction = 0.0 if val is not None else config.data.val_fraction
        return train_bpe(_training_part(train, fraction), init.vocab_size)
    return ready_tokenizer(init.tokenizer).without_added_tokens()  # which the training text does not have


def ready_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer that is not made from the text: gpt2, or that of a directory."""
    if name == "gpt2":
        return gpt2_tokenizer()
    if not Path(name).exists():
        near = nearest(name, ("char", "bpe", "gpt2"))
        raise UsageError(f"--tokenizer {name}: use char, bpe, gpt2, or a directory with tokenizer.json.{near}")
    return Tokenizer.load(Path(name))


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
    left = round(sum(len(chunk.text) for chunk in source.chunks()) * (1 - val_fraction))
    for chunk in source.chunks():
        yield chunk.text[:left]
        left -= len(chunk.text)
        if left <= 0:
            return

"""`gptsmith data`: named corpora and data sets, and how a model sees conversations."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptsmith.cli.parser import parse_subcommand
from gptsmith.errors import UsageError
from gptsmith.storage import atomic_file


@dataclass(frozen=True)
class List:
    """List the named corpora and data sets: size, state, kind, description, number of rows and license."""


@dataclass(frozen=True)
class Get:
    """Fetch a named corpus or data set, if it is not cached yet, and print its path."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """A name from `gptsmith data list`."""
    out: Path | None = None
    """Also copy the text to this file, which must not exist."""


@dataclass(frozen=True)
class Show:
    """Show a conversation, preference or prompt as a model sees it, with what is trained on marked, and count all
    rows."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A .jsonl, .json, .parquet or .csv file, a folder of them, or a named data set. Prompts are also a .txt file with
    one on each line, task:NAME or reasoning-gym:NAME."""
    model: str
    """The model whose tokenizer and chat template are used."""
    index: int = 0
    """Which row to show, from 0."""
    kind: Literal["auto", "conversations", "preferences", "prompts"] = "auto"
    """What the rows are (auto: by the fields of the first one)."""
    train_on: Literal["all", "last"] = "all"
    """Which turns of the assistant are trained on, in conversations."""
    prompt_form: Literal["auto", "chat", "text"] = "auto"
    """For preferences and prompts. auto: messages are written by the chat template, texts as they are. chat: a text is
    a message of the user. text: a prompt of one message is plain text."""


def _show(chosen: Show) -> int:
    import sys

    from gptsmith.data.conversations import Counts
    from gptsmith.data.pictures import PictureReader
    from gptsmith.data.show import kind_of, show, show_preferences, show_prompts
    from gptsmith.loading import source_of
    from gptsmith.tasks.specs import is_task
    from gptsmith.tokenizer.chat import ChatTemplate
    from gptsmith.tokenizer.chatml import with_chat_template
    from gptsmith.train.chats import ChatFiles
    from gptsmith.train.config import RunConfig
    from gptsmith.train.preferences import PreferenceFiles
    from gptsmith.train.prompts import PromptSource
    from gptsmith.train.row_files import existing_path

    if chosen.index < 0:
        raise UsageError("--index counts from 0.")
    kind = chosen.kind
    if kind == "auto":
        kind = "prompts" if is_task(chosen.data) else kind_of(existing_path(chosen.data))
    if chosen.train_on != "all" and kind != "conversations":
        raise UsageError("--train-on is for conversations; of preferences, the answer is trained on.")
    if chosen.prompt_form != "auto" and kind == "conversations":
        raise UsageError("--prompt-form is for preferences and prompts.")
    model = source_of(chosen.model)
    tokenizer = model.checked_tokenizer()
    color = sys.stdout.isatty()
    if kind == "prompts":
        source, counts = PromptSource.open(chosen.data), Counts()
        rows = source.rows("skip", counts)
        shown = show_prompts(rows, counts, tokenizer, name=chosen.data, index=chosen.index, form=chosen.prompt_form)
    else:
        files = (PreferenceFiles if kind == "preferences" else ChatFiles).open(chosen.data, RunConfig())
        needs_template = chosen.prompt_form == "chat" or (chosen.prompt_form == "auto" and files.needs_template())
        if ChatTemplate(tokenizer).plain and needs_template:  # as training does
            tokenizer, _ = with_chat_template(tokenizer)
        how: dict[str, Any] = {
            "index": chosen.index,
            "color": color,
            "picture_reader": PictureReader.of(model.config, tokenizer),
        }
        if kind == "preferences":
            shown = show_preferences(files.path, tokenizer, form=chosen.prompt_form, **how)
        else:
            shown = show(files.path, tokenizer, train_on=chosen.train_on, **how)
    print(f"{shown.where}:")
    print(shown.text)
    print()
    print("\n".join(shown.summary))
    return 0


def main(arguments: list[str]) -> int:
    chosen: List | Get | Show = parse_subcommand(
        {"list": List, "get": Get, "show": Show},
        "gptsmith data",
        arguments,
        "List and fetch named corpora, which are fetched on first use, verified and cached; show what models see.",
    )
    if isinstance(chosen, Show):
        return _show(chosen)
    from gptsmith.data.corpora import CORPORA, corpus_path

    if isinstance(chosen, List):
        for corpus in CORPORA.values():
            state = "cached" if corpus.cached else "not prepared"
            size = f"{corpus.size / 1e6:,.1f} MB"
            rows = f" {corpus.rows:,} rows." if corpus.rows else ""
            about = f"{corpus.description}.{rows} License: {corpus.license}."
            print(f"{corpus.name:16} {size:>9}  {state:13} {corpus.kind:14} {about}")
        return 0
    if chosen.out is not None and chosen.out.exists():
        raise UsageError(f"{chosen.out} already exists. Choose another --out.")
    path = corpus_path(chosen.name)
    if chosen.out is not None:
        with open(path, "rb") as source, atomic_file(chosen.out) as copy:
            shutil.copyfileobj(source, copy)
        path = chosen.out
    print(path)
    return 0

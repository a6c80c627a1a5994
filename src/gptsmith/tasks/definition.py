"""Tasks as data: a YAML file that says where the examples are and how prompts, choices and answers are written.

    definition = load_definition("arc_challenge")            # or the path of a file: load_definition("mine.yaml")
    for item in definition.items(limit=10): ...              # item.prompt, item.choices, item.answer

docs/evaluation.md describes the keys. No torch is needed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptsmith.config import from_dict
from gptsmith.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    import jinja2

Kind = Literal["choices", "cloze", "generation"]
Normalization = Literal["raw", "characters", "bytes", "tokens", "pmi"]
_SOURCES = ("package", "path", "dataset", "rows", "python")
_SOURCE_KEYS = {
    "package": {"package", "file"},
    "path": {"path"},
    "dataset": {"dataset", "config", "split", "revision"},
    "rows": {"rows"},
    "python": {"python", "options"},
}
METRICS = ("accuracy", "exact_match", "regex", "number", "rouge", "chrf", "python", "code")
_WITH_VALUE = ("regex", "python", "code")


@dataclass(frozen=True)
class Item:
    """An example, rendered.

    choices: the possible answers of kind `choices`; `()` of other kinds. answer: the index of the right choice, or the
    accepted texts. record: the example as it was read. group: what it belongs to, such as its subject; shots come from
    the same group. continuation: a text that is scored after each choice, in place of the choice itself.
    """

    index: int
    prompt: str
    choices: tuple[str, ...]
    answer: int | tuple[str, ...]
    record: dict[str, Any]
    group: str = ""
    continuation: str = ""

    @property
    def answer_text(self) -> str:
        """The right answer as a text; the first of several."""
        if isinstance(self.answer, int):
            return self.choices[self.answer]
        return self.answer[0] if self.answer else ""

    @property
    def content_hash(self) -> str:
        """A sha256 (hex) of the question, without regard to case, spaces and the order of the choices."""
        parts = [self.prompt, *sorted(map(_plain, self.choices)), self.continuation]
        return hashlib.sha256("\0".join(map(_plain, parts)).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Shots:
    """Solved examples before the question.

    count: how many by default. separator: between them. header: a template, before the first. source: where they are,
    if not among the task's own examples. fixed: the records of these examples. draw: whether they are drawn at random;
    otherwise they are the first ones, in their order, as always with `fixed`.
    """

    count: int = 0
    separator: str = "\n\n"
    header: str = ""
    source: dict[str, Any] | None = None
    fixed: tuple[dict[str, Any], ...] = ()
    draw: bool = True

    @property
    def is_drawn(self) -> bool:
        return self.draw and not self.fixed


@dataclass(frozen=True)
class Definition:
    """A task. The fields are the keys of the YAML file, except `directory`, where its relative paths begin."""

    name: str
    source: dict[str, Any]
    prompt: str
    kind: Kind = "choices"
    choices: str | tuple[str, ...] = ()
    continuation: str = ""
    answer: str | int | None = None
    group: str = ""
    separator: str = " "
    normalization: Normalization = "characters"
    unconditional: str = "Answer:"
    shots: Shots = field(default_factory=Shots)
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 128
    metric: str | dict[str, str] | None = None
    chat: bool = False
    description: str = ""
    license: str = ""
    size: int | None = None
    directory: Path = Path()

    @property
    def sha256(self) -> str:
        """The sha256 (hex) of what the file says, in any order and layout."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "directory"}
        values["shots"] = dataclasses.asdict(self.shots)
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()

    def items(self, limit: int | None = None) -> list[Item]:
        """Return the examples; with a limit the first ones, the same number of each group.

        Raises DataError for a record that a template fails on, an answer that is not among the choices, and a source
        that cannot be read; UsageError for a template that is not Jinja.
        """
        return list(self._all_items) if limit is None else spread(self._all_items, limit)

    def shot_items(self) -> list[Item] | None:
        """Return the examples that shots are taken from; None for the task's own."""
        return None if self._all_shots is None else list(self._all_shots)

    @functools.cached_property  # examples are used for each number of shots, and in training again and again
    def _all_items(self) -> list[Item]:
        items = self._render_all(self._records(self.source))
        if not items:
            raise DataError(f"the task {self.name} has no examples.")
        return items

    @functools.cached_property
    def _all_shots(self) -> list[Item] | None:
        if self.shots.fixed:
            return self._render_all((f"shots.fixed, {i}", record) for i, record in enumerate(self.shots.fixed))
        return None if self.shots.source is None else self._render_all(self._records(self.shots.source))

    def header(self, item: Item) -> str:
        """Return the text before the first shot of an item."""
        return self._render("shots.header", self.shots.header, item.record, f"example {item.index}")

    # Records ----------------------------------------------------------------------------------------------------------

    def _records(self, source: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield where each record is, and the record."""
        kind = next(kind for kind in _SOURCES if kind in source)
        rows: Iterable[Any]
        if kind == "path":
            from gptsmith.data.rows import read_rows

            yield from ((row.where, row.values) for row in read_rows(self.directory / source["path"]))
            return
        if kind == "package":
            from gptsmith.tasks.packages import read_package_file

            place, rows = source["file"], _json_rows(read_package_file(source["package"], source["file"]))
        elif kind == "dataset":
            place, rows = source["dataset"], _hub_rows(source)
        elif kind == "python":
            place, rows = source["python"], self._python_rows(source)
        else:
            place, rows = "rows", source["rows"]
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(f"{self.name}: {place}, record {i} is not an object: {row!r}.")
            yield f"{place}, record {i}", dict(row)

    def _python_rows(self, source: Mapping[str, Any]) -> Iterable[Any]:
        function = load_function(source["python"], self.directory)
        try:
            rows: Iterable[Any] = list(function(**source.get("options", {})))
        except Exception as error:  # whatever the user's function raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"{self.name}: the source {source['python']} fails: {reason}.") from error
        return rows

    # Templates --------------------------------------------------------------------------------------------------------

    def _render_all(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Item]:
        return [self._item(i, where, dict(record)) for i, (where, record) in enumerate(records)]

    def _item(self, index: int, where: str, record: dict[str, Any]) -> Item:
        choices: tuple[str, ...] = ()
        if self.kind == "choices":
            if isinstance(self.choices, str):
                value = self._value("choices", self.choices, record, where)
                if isinstance(value, str):
                    with contextlib.suppress(ValueError):
                        value = json.loads(value)
                if not isinstance(value, list | tuple) or not all(
                    isinstance(each, str | int | float) for each in value
                ):
                    raise DataError(f"{self.name}: {where}: choices must be a list of texts, not {value!r}.")
                choices = tuple(map(str, value))
            else:
                choices = tuple(self._render("choices", each, record, where) for each in self.choices)
            if len(choices) < 2:
                raise DataError(f"{self.name}: {where}: an example needs at least two choices, not {list(choices)}.")
            if "" in choices:
                raise DataError(f"{self.name}: {where}: choice {choices.index('')} is empty.")
        return Item(
            index,
            self._render("prompt", self.prompt, record, where),
            choices,
            self._answer(choices, record, where),
            record,
            self._render("group", self.group, record, where),
            self._render("continuation", self.continuation, record, where),
        )

    def _answer(self, choices: tuple[str, ...], record: dict[str, Any], where: str) -> int | tuple[str, ...]:
        if self.answer is None:  # only of generations that a function scores
            return ()
        value = self.answer if isinstance(self.answer, int) else self._value("answer", self.answer, record, where)
        if self.kind != "choices":
            texts = tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
            if self.kind == "cloze" and not all(texts):
                raise DataError(f"{self.name}: {where}: the answer is empty.")
            return texts
        index = _choice_index(value, choices)
        if index is None:
            raise DataError(
                f"{self.name}: {where}: the answer {value!r} is not among the {len(choices)} choices: "
                f"{', '.join(map(repr, choices))}. Give the index of the right one (from 0), its letter, or its text."
            )
        return index

    def _render(self, key: str, template: str, record: Mapping[str, Any], where: str) -> str:
        if "{" not in template:
            return template
        return str(self._evaluate(key, where, record, compile_template, template))

    def _value(self, key: str, template: str, record: Mapping[str, Any], where: str) -> Any:
        """Return the value of an expression, or of a template that is one, or the text of another template."""
        single = re.fullmatch(r"\s*\{\{((?:(?!\{\{|\}\}).)*)\}\}\s*", template, re.DOTALL)
        if single is not None or "{" not in template:
            return self._evaluate(key, where, record, _expression, template if single is None else single[1])
        return self._render(key, template, record, where)

    def _evaluate(self, key: str, where: str, record: Mapping[str, Any], compile: Callable[..., Any], text: str) -> Any:
        import jinja2

        try:
            function = compile(text)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"{self.name}: the template of {key} is not Jinja: {error.message}: {text!r}.") from None
        try:
            return function(**record)
        except Exception as error:  # filters and methods raise whatever they like
            raise DataError(
                f"{self.name}: {where}: the template of {key} fails: {' '.join(str(error).split())}. "
                f"The record has {', '.join(record) or 'nothing'}."
            ) from None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """Return the first `limit` items, or with groups the first ones of each, in the order of the whole."""
    if limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}.")
    rank: dict[str, int] = defaultdict(int)
    ranked = []
    for item in items:
        ranked.append((rank[item.group], item.index, item))
        rank[item.group] += 1
    return sorted((item for *_, item in sorted(ranked, key=lambda each: each[:2])[:limit]), key=lambda i: i.index)


def _choice_index(value: Any, choices: tuple[str, ...]) -> int | None:
    """Return the index of the right choice, which may be an index, a text or a letter; None if there is none."""
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, str):
        if value in choices:
            return choices.index(value)
        if re.fullmatch(r"[A-Z]", value.strip()):
            value = ord(value.strip()) - ord("A")
        elif re.fullmatch(r"\d{1,3}", value.strip()):
            value = int(value)
    return value if isinstance(value, int) and 0 <= value < len(choices) else None


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


@functools.cache
def compile_template(text: str) -> Callable[..., str]:
    """Return a function that renders a template. It raises what Jinja raises."""
    return _environment().from_string(text).render


@functools.cache
def _expression(text: str) -> Callable[..., Any]:
    import jinja2

    compiled = _environment().compile_expression(text.strip(), undefined_to_none=False)

    def evaluate(**record: Any) -> Any:
        value = compiled(**record)
        if isinstance(value, jinja2.Undefined):
            str(value)  # raises UndefinedError, which names what is missing
        return value

    return evaluate


def _json_rows(content: bytes) -> Iterator[Any]:
    """Yield the records of JSON lines, or of a JSON list."""
    text = content.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for line in text.split("\n"):
        if line.strip():
            yield json.loads(line)


def _hub_rows(source: Mapping[str, Any]) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"the data set {source['dataset']} needs the package datasets, which is not installed. Install it: "
            'pip install "gptsmith[datasets]"'
        ) from None
    try:
        rows: Iterable[Any] = datasets.load_dataset(
            source["dataset"],
            source.get("config"),
            split=source.get("split", "test"),
            revision=source.get("revision"),
        )
    except Exception as error:  # the library, its network client and its file formats raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"the data set {source['dataset']} is not available: {reason}.") from error
    return rows


def load_function(spec: str, directory: Path = Path()) -> Callable[..., Any]:
    """Return the function that `module:function` or `file.py:function` names; a file is relative to `directory`.

    Raises UsageError where there is none.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UsageError(f"{spec!r} does not name a function. Write module:function or file.py:function.")
    try:
        if place.endswith(".py"):
            path = directory / place
            loaded = importlib.util.spec_from_file_location(f"gptsmith_task_{path.stem}", path)
            assert loaded is not None, "a .py file has a loader"
            assert loaded.loader is not None, "a .py file has a loader"
            module = importlib.util.module_from_spec(loaded)
            loaded.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # whatever the module does when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{spec}: {place} cannot be imported: {reason}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{spec}: {place} has no function {name}.{nearest(name, vars(module))}")
    found: Callable[..., Any] = function
    return found


# Files ----------------------------------------------------------------------------------------------------------------


def definition_names() -> list[str]:
    """Return the names of the tasks that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files("gptsmith.tasks").joinpath("definitions").iterdir()
        if entry.name.endswith(".yaml")
    )


def is_definition_file(spec: str) -> bool:
    """Return whether a specification is the path of a task file, and not a name."""
    return spec.endswith((".yaml", ".yml"))


def load_definition(spec: str | Path) -> Definition:
    """Return the task of that name, or the one that a YAML file describes.

    Raises UsageError for an unknown name (with the nearest), an unknown key, a value of the wrong kind, or a file that
    cannot be read.
    """
    spec = str(spec)
    if is_definition_file(spec):
        path = Path(spec)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the task file {path} cannot be read: {error}.") from None
        return parse_definition(text, spec, path.parent)
    if spec not in definition_names():
        raise UsageError(
            f"there is no task {spec!r}.{nearest(spec, definition_names())} `gptsmith tasks` lists the tasks; a task "
            "of your own is a .yaml file."
        )
    return _builtin(spec)


@functools.cache
def _builtin(name: str) -> Definition:
    text = files("gptsmith.tasks").joinpath("definitions", f"{name}.yaml").read_text(encoding="utf-8")
    return parse_definition(text, name, Path())


def parse_definition(text: str, where: str, directory: Path) -> Definition:
    """Return the task that the text of a YAML file describes. Raises UsageError as `load_definition` does."""
    values = _read_yaml(text, where)
    if not isinstance(values, dict):
        raise UsageError(f"{where}: a task is a mapping with keys such as source, prompt and answer.")
    values.setdefault("name", Path(where).stem)
    values.pop("directory", None)
    known = [each.name for each in dataclasses.fields(Definition) if each.name != "directory"]
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}.{nearest(str(key), known)} Keys: {', '.join(known)}.")
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    for key in ("source", "prompt"):
        if key not in values:
            raise UsageError(f"{where}: the key {key} is missing.")
    _refuse_quoted_escapes(values, where)
    for key in ("choices", "stop"):
        for i, each in enumerate(values[key] if isinstance(values.get(key), list) else ()):
            if not isinstance(each, str):
                raise UsageError(f"{where}: {key}[{i}] is {each!r}, not a text: put it in quotes.")
    try:
        definition = dataclasses.replace(from_dict(Definition, values), directory=directory)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    _check(definition, where)
    return definition


def _read_yaml(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that is given twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise UsageError(f"{where}: the key {key!r} is given twice.")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {' '.join(str(error).split())}.") from None


def _refuse_quoted_escapes(values: Mapping[str, Any], where: str) -> None:
    r"""Raise UsageError for the two characters \n: in YAML only double quotes make them the end of a line."""

    def texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, list | tuple):
            for each in value:
                yield from texts(key, each)
        elif isinstance(value, dict) and key == "shots":
            for name in ("separator", "header"):
                yield from texts(f"shots.{name}", value.get(name))

    for key in ("prompt", "choices", "continuation", "separator", "unconditional", "stop", "shots"):
        for name, text in texts(key, values.get(key)):
            found = re.search(r"\\[nt]", re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", text, flags=re.DOTALL))
            if found is not None:
                raise UsageError(
                    f"{where}: {name} contains the two characters {found[0]}, not the character that they stand for. "
                    'YAML reads escapes in double quotes only: "…".'
                )


def _check(task: Definition, where: str) -> None:
    """Raise UsageError for keys that do not go together."""
    for name, source in (("source", task.source), ("shots.source", task.shots.source)):
        if source is not None:
            _check_source(source, f"{where}: {name}")
    if task.shots.count < 0:
        raise UsageError(f"{where}: shots.count must be at least 0, not {task.shots.count}.")
    if not task.shots.draw and not task.shots.fixed and task.shots.source is None:
        raise UsageError(f"{where}: shots.draw: false needs shots.source or shots.fixed.")
    if task.shots.fixed and task.shots.source is not None:
        raise UsageError(f"{where}: shots.fixed and shots.source exclude each other.")
    if task.kind == "choices":
        if not task.choices:
            raise UsageError(f"{where}: a task of kind choices needs the key choices.")
        if task.metric not in (None, "accuracy"):
            raise UsageError(f"{where}: the metric of kind choices is accuracy, not {task.metric!r}.")
        if task.continuation and task.normalization == "pmi":
            raise UsageError(f"{where}: normalization pmi compares choices, and a continuation is scored after each.")
    elif task.choices or task.continuation:
        raise UsageError(f"{where}: {'choices' if task.choices else 'continuation'} needs kind: choices.")
    if task.kind == "cloze" and task.metric not in (None, "accuracy"):
        raise UsageError(f"{where}: the metric of kind cloze is accuracy, not {task.metric!r}.")
    if task.kind == "generation":
        _check_metric(task.metric, where)
        if task.max_tokens < 1:
            raise UsageError(f"{where}: max_tokens must be at least 1, not {task.max_tokens}.")
    metric = task.metric if isinstance(task.metric, str) else next(iter(task.metric or {}), None)
    if task.answer is None and not (task.kind == "generation" and metric in ("python", "code")):
        raise UsageError(f"{where}: the key answer is missing.")


def _check_source(source: Mapping[str, Any], where: str) -> None:
    kinds = [kind for kind in _SOURCES if kind in source]
    if len(kinds) != 1:
        raise UsageError(f"{where} needs exactly one of {', '.join(_SOURCES)}, not {', '.join(source) or 'nothing'}.")
    known = _SOURCE_KEYS[kinds[0]]
    for key in source:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}.{nearest(key, known)} Keys: {', '.join(sorted(known))}.")
    if kinds[0] == "package" and "file" not in source:
        raise UsageError(f"{where}: the key file is missing: which file of the package.")


def _check_metric(metric: str | Mapping[str, str] | None, where: str) -> None:
    name = metric if isinstance(metric, str) or metric is None else ", ".join(metric)
    if name is None:
        raise UsageError(f"{where}: a task of kind generation needs the key metric: {', '.join(METRICS[1:])}.")
    if name not in METRICS or name == "accuracy":
        raise UsageError(
            f"{where}: unknown metric {name!r}.{nearest(name, METRICS)} Metrics: {', '.join(METRICS[1:])}."
        )
    if (name in _WITH_VALUE) != isinstance(metric, Mapping):
        form = f"{{{name}: …}}" if name in _WITH_VALUE else name
        raise UsageError(f"{where}: write the metric {name} as {form}.")

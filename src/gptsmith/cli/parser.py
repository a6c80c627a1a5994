"""Parsing of command lines: dataclasses whose fields are the options, parsed by tyro, with help texts of our own.

The docstring of a field is the help text of the option; on a nested dataclass, it is the title of a section.
tyro's own help calls a value by its type (`--out {None}|PATH`, `STR` for a positional), adds `(default: None)` to texts
that already state the default, and breaks in narrow terminals.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from gptsmith.cli.help import NO_BREAK, Section, format_help

T = TypeVar("T")

_CONFIG = (tyro.conf.UseAppendAction,)  # an option with several values is given several times
_POSITIONAL: Any = tyro.conf.Positional
_NO_PREFIX: Any = tyro.conf.OmitArgPrefixes
_HELP_ROW = ("-h, --help", "Show this help and exit.")


def parse(
    command: type[T],
    prog: str,
    arguments: Sequence[str],
    *,
    default: T | None = None,
    sections: Sequence[Section] = (),
) -> T:
    """Return an instance of `command`, a dataclass, with the values of the arguments.

    Print the help and raise SystemExit if the arguments ask for it. The description is the docstring of the dataclass;
    `sections` follow the options. Raise SystemExit(2) after a message about wrong arguments.

    default: an instance with the values of options that are not given.
    """
    _answer_help(arguments, lambda _: command_help(command, prog, default, sections))
    given: dict[str, Any] = {} if default is None else {"default": default}
    parsed: T = tyro.cli(command, prog=prog, args=list(arguments), config=_CONFIG, registry=REGISTRY, **given)
    return parsed


def parse_subcommand(commands: Mapping[str, type], prog: str, arguments: Sequence[str], description: str) -> Any:
    """Return an instance of the dataclass of one of the commands: the first argument names it. See `parse`."""

    def help_text(name: str) -> str:
        if name in commands:
            return command_help(commands[name], f"{prog} {name}")
        rows = [(name, _summary(command)) for name, command in commands.items()]
        sections = [Section("commands", rows), Section("options", [_HELP_ROW])]
        return format_help(f"{prog} COMMAND ...", description, sections)

    _answer_help(arguments, help_text)
    return tyro.extras.subcommand_cli_from_dict(
        dict(commands), prog=prog, args=list(arguments), description=description, config=_CONFIG, registry=REGISTRY
    )


def _answer_help(arguments: Sequence[str], help_text: Callable[[str], str]) -> None:
    """Print the help and exit if the arguments ask for it. `help_text` takes the first of them."""
    if "-h" in arguments or "--help" in arguments:
        print(help_text(arguments[0]))
        raise SystemExit(0)


# The options of a dataclass ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A field of a dataclass as an option, a positional argument, or a group of options (a nested dataclass)."""

    owner: type
    """The dataclass."""
    field: dataclasses.Field[Any]
    type: Any
    """Without Annotated."""
    metadata: tuple[Any, ...]
    """Of Annotated: tyro's markers."""
    default: Any
    """dataclasses.MISSING if the option is required."""

    @property
    def is_group(self) -> bool:
        return dataclasses.is_dataclass(self.type)

    @property
    def is_positional(self) -> bool:
        return _POSITIONAL in self.metadata

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def prefix(self) -> str:
        """What comes before the names of the options of a group (`model.`)."""
        names = [each.name for each in self.metadata if getattr(each, "name", None) is not None]
        name = "" if _NO_PREFIX in self.metadata else names[0] if names else self.field.name
        return f"{name}." if name else ""

    def invocation(self, prefix: str) -> str:
        """Return how to write the option on the command line: `--model.hidden-size INT`."""
        name = self.field.name.replace("_", "-")
        if self.metavar is None:
            return f"--{prefix}{name}, --{prefix}no-{name}"
        return f"--{prefix}{name} {self.metavar}"

    @property
    def metavar(self) -> str | None:
        """The placeholder of the value in the help; None for a flag."""
        given = [each.metavar for each in self.metadata if getattr(each, "metavar", None)]
        return given[0] if given else _metavar(self.type)

    def help(self) -> str:
        """Return the docstring of the field."""
        text = self.field.metadata.get("help") or field_docstrings(self.owner).get(self.field.name, "")
        return " ".join(text.split())

    @property
    def description(self) -> str:
        """The help and the note."""
        note = self.note().replace(" ", NO_BREAK)
        return f"{self.help()} {note}".strip()

    def note(self, _: str = "") -> str:
        """Return what follows the help: the default, unless the help states it."""
        if self.is_required:
            return "" if self.is_positional else "(required)"
        if self.default == ():
            return "" if self.is_positional else "(repeatable)"
        if self.default is None or "(default: " in self.help():
            return ""
        shown = str(self.default)
        return f"(default: {shown if shown.strip() else repr(shown)})"


def options_of(command: type, default: Any = None) -> Iterator[Option]:
    """Yield the options of a dataclass. default: an instance whose values are the defaults."""
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        kind, metadata = _unwrap(hints[field.name])
        value = field.default
        if isinstance(default, command):
            value = getattr(default, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        yield Option(command, field, kind, metadata, value)


def field_docstrings(command: type) -> dict[str, str]:
    """Return the docstrings of the fields of a class, inherited ones included: the strings after the fields."""
    docstrings: dict[str, str] = {}
    for cls in reversed(command.__mro__[:-1]):  # without object
        docstrings |= _docstrings_in(cls.__module__).get(cls.__name__, {})
    return docstrings


@functools.cache
def _docstrings_in(module: str) -> dict[str, dict[str, str]]:
    """Return for each class of a module the docstrings of its fields."""
    found: dict[str, dict[str, str]] = {}
    try:
        source = inspect.getsource(sys.modules[module])
    except OSError:  # installed without sources
        return found
    for cls in ast.parse(source).body:
        if isinstance(cls, ast.ClassDef):
            found[cls.name] = {
                statement.target.id: following.value.value
                for statement, following in zip(cls.body, cls.body[1:], strict=False)
                if isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            }
    return found


def _metavar(kind: Any) -> str | None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (typing.Union, types.UnionType, tuple):  # `str | None`, `tuple[str, ...]`
        return _metavar(next(each for each in arguments if each is not type(None)))
    return None if kind is bool else str(kind.__name__).upper()


def _unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type and the metadata of Annotated."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    kind, *metadata = typing.get_args(hint)
    return kind, tuple(metadata)


# Help ----------------------------------------------------------------------------------------------------------------


def command_help(command: type, prog: str, default: Any = None, sections: Sequence[Section] = ()) -> str:
    """Return the help text of a command."""
    options = list(options_of(command, default))
    positionals = [(str(option.metavar), option.description) for option in options if option.is_positional]
    required = [option.invocation("") for option in options if option.is_required and not option.is_positional]
    own, *groups = _option_sections("options", command, default)
    return format_help(
        " ".join([prog, "[OPTIONS]", *required, *(name for name, _ in positionals)]),
        inspect.getdoc(command) or "",
        [
            Section("arguments", [(name.strip("[].").strip(), text) for name, text in positionals]),
            own._replace(rows=[*own.rows, _HELP_ROW]),
            *groups,
            *sections,
        ],
    )


def _option_sections(title: str, command: type, default: Any, prefix: str = "") -> Iterator[Section]:
    """Yield the options of a dataclass, then those of its groups."""
    options = [option for option in options_of(command, default) if not option.is_positional]
    yield Section(title, [(each.invocation(prefix), each.description) for each in options if not each.is_group])
    for each in options:
        if each.is_group:
            yield from _option_sections(each.help(), each.type, each.default, prefix + each.prefix)


def _summary(command: type) -> str:
    return (inspect.getdoc(command) or "").partition("\n\n")[0]


# Rules for tyro ------------------------------------------------------------------------------------------------------

REGISTRY = ConstructorRegistry()


@REGISTRY.struct_rule
def _struct_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Describe the options of a dataclass as the help does: tyro shows them in messages about wrong arguments."""
    if not dataclasses.is_dataclass(info.type) or hasattr(info.type, "__parameters__"):  # tyro's own are generic
        return None
    specs = []
    for option in options_of(info.type, info.default):
        kind: Any = option.type
        if not option.is_group:
            kind = Annotated[kind, tyro.conf.arg(metavar=option.metavar, help_behavior_hint=option.note)]
        for each in option.metadata:
            kind = Annotated[kind, each]
        default = tyro.MISSING if option.is_required else option.default
        specs.append(StructFieldSpec(option.field.name, kind, default, helptext=option.help))
    return StructConstructorSpec(instantiate=info.type, fields=tuple(specs))


@REGISTRY.primitive_rule
def _optional_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Parse `X | None` like X, except for the word None. Messages about wrong values speak of X alone."""
    kinds = [kind for kind in typing.get_args(info.type) if kind is not type(None)]
    if info.type_origin not in (typing.Union, types.UnionType) or len(kinds) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )

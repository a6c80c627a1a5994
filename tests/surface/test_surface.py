"""The public surface as recorded in the JSON files beside this one: nothing that users rely on changes unnoticed.

Recorded are the commands with their options, exit codes, the HTTP API, the files that are written, and the Python API.
Texts (help, descriptions, messages) are not. After a change that is meant:

    GPTSMITH_SURFACE=write pytest tests/surface

and review the difference of the JSON files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import io
import json
import os
import re
import shutil
import socket
import sys
import tomllib
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tyro
import uvicorn
from fastapi.testclient import TestClient
from safetensors import safe_open

import gptsmith
from gptsmith.cli import COMMANDS, main
from tests.factories import Reports

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Where the public names are. When one moves, change its place here; the recorded surface stays.
PUBLIC = {
    "AsyncEngine": "gptsmith.engine.async_engine",
    "Engine": "gptsmith.engine.engine",
    "EngineStats": "gptsmith.engine.engine",
    "ModelConfig": "gptsmith.model.config",
    "ModelOptions": "gptsmith.train.config",
    "OptimConfig": "gptsmith.train.config",
    "SamplingParams": "gptsmith.engine.sampling",
    "Settings": "gptsmith.server.service",
    "Tokenizer": "gptsmith.tokenizer",
    "RunConfig": "gptsmith.train.config",
    "Transformer": "gptsmith.model.transformer",
    "choices": "gptsmith.engine.grammar",
    "create_app": "gptsmith.server.app",
    "evaluate_task": "gptsmith.evaluate.tasks",
    "generate_texts": "gptsmith.engine.text",
    "grammar": "gptsmith.engine.grammar",
    "json_schema": "gptsmith.engine.grammar",
    "make_task": "gptsmith.tasks",
    "regex": "gptsmith.engine.grammar",
    "register_command": "gptsmith.cli",
    "register_corpus": "gptsmith.data.corpora",
    "register_family": "gptsmith.model.families",
    "register_objective": "gptsmith.train.objectives.registry",
    "register_router": "gptsmith.server.app",
    "register_task": "gptsmith.tasks",
    "stream": "gptsmith.engine.text",
}
PRESETS = ("gptsmith.presets", "PRESETS")
FAMILIES = ("gptsmith.model.families", "FAMILIES")

TINY = [
    *("--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2"),
    *("--context", "16", "--batch-size", "4", "--micro-batch-size", "2", "--steps", "4", "--eval-every", "2"),
    *("--log-every", "1", "--sample-tokens", "4", "--compile", "off", "--device", "cpu"),
]


# -- comparing with what is recorded -----------------------------------------------------------------------------------


def check(section: str, actual: Any) -> None:
    """Compare with the recorded section, or record it. AssertionError lists what was added, removed and changed."""
    path = HERE / f"{section}.json"
    actual = json.loads(json.dumps(actual))
    if os.environ.get("GPTSMITH_SURFACE") == "write":
        path.write_text(json.dumps(actual, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    before, now = flat(recorded), flat(actual)
    lines = [f"  added    {key}: {now[key]}" for key in now if key not in before]
    lines += [f"  removed  {key}: {before[key]}" for key in before if key not in now]
    lines += [
        f"  changed  {key}: {before[key]} -> {now[key]}" for key in now if key in before and now[key] != before[key]
    ]
    if lines:
        pytest.fail(
            f"the public surface ({path.name}) has changed:\n" + "\n".join(lines) + "\n"
            "If this is meant, record it: GPTSMITH_SURFACE=write pytest tests/surface",
            pytrace=False,
        )


def flat(value: Any, where: str = "") -> dict[str, str]:
    """Nested values by their path, one line each."""
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in flat(value[key], f"{where} › {key}" if where else key).items()}
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{where}[{i}]").items()}
    return {where: json.dumps(value, ensure_ascii=False)}


def shape(value: Any) -> Any:
    """The keys and types of plain data. Items of a list are described together."""
    if isinstance(value, Mapping):
        return {key: shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [rows_shape(value) if value and isinstance(value[0], dict) else union(map(shape, value))]
    return "null" if value is None else type(value).__name__


def rows_shape(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys and types of several objects together; keys that some lack end in a question mark."""
    rows = list(rows)
    found: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.items():
            found.setdefault(key, []).append(shape(value))
    return {key if len(found[key]) == len(rows) else f"{key}?": union(found[key]) for key in sorted(found)}


def union(shapes: Iterable[Any]) -> Any:
    different = list({json.dumps(each): each for each in shapes}.values()) or ["nothing"]
    if len(different) == 1:
        return different[0]
    if all(isinstance(each, str) for each in different):
        return " | ".join(sorted(different))
    return sorted(different, key=json.dumps)


def call(*arguments: object) -> tuple[int, str]:
    """Run the command line in this process: exit code and standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return code, out.getvalue()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("the cat sat on the mat and the dog ran to the hill.\n" * 40)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A finished run, not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with Reports.drawn_if(True):
        assert call("train", text, "--out", out, *TINY)[0] == 0
    return out


# -- commands ----------------------------------------------------------------------------------------------------------


class _Captured(Exception):
    """Carries the parser of a command out of it."""


def parser_of(command: str) -> Any:
    """The argparse parser that a command would use, whatever its internal classes are called."""

    def capture(what: Any, **options: Any) -> None:
        options.pop("args")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            raise _Captured(tyro.extras.get_parser(what, **options))

    extras = importlib.import_module("tyro.extras._subcommand_cli_from_dict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", capture)
        patch.setattr(extras, "cli", capture)
        try:
            main([command])
        except _Captured as captured:
            return captured.args[0]
    raise AssertionError(f"{command} has asked for no parser")


def describe_parser(parser: Any) -> dict[str, Any]:
    positionals: dict[str, Any] = {}
    options: dict[str, Any] = {}
    subcommands: dict[str, Any] = {}
    for action in parser._actions:
        if getattr(action, "_name_parser_map", None):  # subcommands
            subcommands |= {name: describe_parser(sub) for name, sub in sorted(action.choices.items())}
            continue
        if "--help" in action.option_strings:
            continue
        if action.option_strings:
            options[", ".join(action.option_strings)] = describe_action(action)
        else:
            positionals[action.dest.rpartition(".")[2]] = describe_action(action)
    described = {"positionals": positionals, "options": options, "subcommands": subcommands}
    return {kind: values for kind, values in described.items() if values}


def describe_action(action: Any) -> str:
    """Its type or choices, how many values it takes, and what the help notes at the end: its default, or that it is
    required or can be repeated."""
    help_text = spaced(action.help)
    parts = ["flag" if action.nargs == 0 else spaced(action.metavar)]
    if action.nargs in ("?", "*", "+"):
        parts.append(f"nargs {action.nargs}")
    noted = re.search(r"\((required|repeatable|default: [^()]*)\)\s*$", help_text)
    parts += [noted[1]] if noted else []
    return ", ".join(parts)


def spaced(text: Any) -> str:
    return re.sub(r"[ \t]+", " ", str(text if text is not None else ""))


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = call("data", "list")[1].splitlines()
    check(
        "commands",
        {
            "scripts": sorted(project["scripts"]),
            "extras": sorted(project["optional-dependencies"]),
            "environment variables": environment_variables(),
            "corpora": sorted(line.split()[0] for line in listed),
            "presets": sorted(getattr(importlib.import_module(PRESETS[0]), PRESETS[1])),
            "commands": {command: describe_parser(parser_of(command)) for command in sorted(COMMANDS)},
        },
    )


def environment_variables() -> list[str]:
    sources = (path.read_text(encoding="utf-8") for path in Path(gptsmith.__file__).parent.rglob("*.py"))
    return sorted({name for source in sources for name in re.findall(r"GPTSMITH_[A-Z_]*[A-Z]", source)})


# -- exit codes --------------------------------------------------------------------------------------------------------

CALLS = """

--help
--version
help
help train
version
nonsense
finetune
eval
train
train {text} {tiny} --out new
train {text} {tiny} --out {run}
train {text} --steps 0
train {text} --steps many
train {text} --model.hidden-size 33
train {text} --preset nonsense
train {text} --config absent.json
train {text} --micro-batch-size 3
train {text} --resume {run}
train absent.txt
train empty.txt
train --resume {run}
train --resume absent
plan --budget nonsense
plan --preset nonsense
find-lr
find-lr {text} --depth 2
scale {text} --budgets 1m
generate {run} --max-tokens 2
generate {run} --max-tokens 2 --temperature 0 --beams 2
generate {run} --max-tokens 0
generate {run} --num-samples 0
generate {run} --prompt ☃
generate {run} --regex a --choice b
generate {run} --adapter absent
generate absent
chat {run} --max-tokens 2
chat absent
serve
serve {run} --port 99999
serve {run} --timeout 0
serve {run} --rate-limit nonsense
serve {run} --alias nonsense
serve {run} --runs absent
serve {run} --collect notes.txt
serve {run} --reward-model {run}
serve {run} --collect p.jsonl --reward-model {run}
serve {run} --collect p.jsonl --reward-model absent
serve absent
watch absent
watch {run} --port -1
report {run}
report absent
data list
data get nonsense
data
tokenizer train {text} --out tokenizer
tokenizer train {text} --out {run}
tokenizer train absent.txt --out other
tokenizer
import {run}/best --out imported
import {run}/best --out {run}
import absent --out other
quantize {run} --out quantized --tokens 0
quantize {run} --out {run}
quantize {run} --out other --bits 3
quantize absent --out other
export {run} --out exported
export {run} --out exported.gguf --to gguf
export {run} --out wrong.txt --to gguf
export {run} --out {run}
export absent --out other
"""


def test_exit_codes(text: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "empty.txt").write_text("")
    run = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    codes = {}
    for line in CALLS.removeprefix("\n").splitlines():
        filled = [word.replace("{text}", str(text)).replace("{run}", str(run)) for word in line.split()]
        codes[line] = call(*(word for item in filled for word in (TINY if item == "{tiny}" else [item])))[0]
    for command in sorted(COMMANDS):
        for option in ("--help", "--no-such-option"):
            codes[f"{command} {option}"] = call(command, option)[0]
    check("exit_codes", codes)


# -- HTTP --------------------------------------------------------------------------------------------------------------


def served(arguments: Iterable[object], use: Callable[[TestClient], Any]) -> Any:
    """What `use` says of the application that the command line would serve."""
    results = []

    def take_over(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        application: Any = server.config.app
        with TestClient(application, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
            results.append(use(client))
        for listening in sockets or ():
            listening.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", take_over)
        assert call(*arguments, "--port", "0")[0] == 0
    return results[0]


def routes_outside_schema(application: Any) -> list[str]:
    """Routes of the application, and of the routers in it, that its schema leaves out."""
    found: set[str] = set()
    for route in application.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            found.update(routes_outside_schema(inner))
        elif not getattr(route, "include_in_schema", True):
            found.update(f"{method} {route.path}" for method in route.methods or ())
    return sorted(found)


def reduce_schema(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    """A JSON schema without names and texts: fields with their types, bounds and defaults."""
    if "$ref" in schema:
        return reduce_schema(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    default = f" = {json.dumps(schema['default'])}" if "default" in schema else ""
    for key in ("anyOf", "oneOf"):
        if key in schema:
            either = union(reduce_schema(option, definitions) for option in schema[key])
            return f"{either}{default}" if isinstance(either, str) else either
    if "properties" in schema:
        required = schema.get("required", ())
        fields = {
            name if name in required else f"{name}?": reduce_schema(field, definitions)
            for name, field in sorted(schema["properties"].items())
        }
        return fields | ({"unknown fields": "refused"} if schema.get("additionalProperties") is False else {})
    if "items" in schema and isinstance(items := reduce_schema(schema["items"], definitions), dict | list):
        return {"[]": items}
    kind = schema.get("type", "anything")
    if "items" in schema:
        kind = f"[{items}]"
    elif isinstance(extra := schema.get("additionalProperties"), dict):
        kind = f"{{string: {reduce_schema(extra, definitions)}}}"
    if "const" in schema or "enum" in schema:
        kind = " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    bounds = {
        key: schema[key]
        for key in (
            *("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minLength", "maxLength"),
            *("minItems", "maxItems", "pattern", "format"),
        )
        if key in schema
    }
    return kind + "".join(f" {key} {value}" for key, value in bounds.items()) + default


def reduce_openapi(openapi: Mapping[str, Any]) -> dict[str, Any]:
    definitions = openapi.get("components", {}).get("schemas", {})

    def content(part: Mapping[str, Any]) -> Any:
        bodies = {
            kind: reduce_schema(body.get("schema", {}), definitions) for kind, body in part.get("content", {}).items()
        }
        return bodies or "no described body"

    described: dict[str, Any] = {}
    for path, methods in sorted(openapi["paths"].items()):
        for method, operation in sorted(methods.items()):
            codes: dict[str, list[str]] = {}
            for code, response in operation["responses"].items():
                body = content(response)
                if code.startswith(("4", "5")):  # the same everywhere: described once
                    described.setdefault("body of errors", body)
                    body = "error" if body == described["body of errors"] else body
                codes.setdefault(json.dumps(body), []).append(code)
            described[f"{method.upper()} {path}"] = {
                "parameters": {
                    f"{p['name']} in {p['in']}" + ("" if p.get("required") else "?"): reduce_schema(
                        p["schema"], definitions
                    )
                    for p in operation.get("parameters", ())
                },
                "request": content(operation["requestBody"]) if "requestBody" in operation else None,
                "responses": {" ".join(codes[body]): json.loads(body) for body in codes},
            }
    return described


REQUESTS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/", None),
    ("GET", "/favicon.ico", None),
    ("GET", "/static/any/absent.js", None),
    ("GET", "/docs", None),
    ("GET", "/openapi.json", None),
    ("GET", "/absent", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/v1/models/absent", None),
    ("GET", "/api/models/tiny", None),
    ("GET", "/api/runs", None),
    ("GET", "/api/runs/tiny", None),
    ("GET", "/api/runs/absent", None),
    ("GET", "/v1/completions", None),
    ("POST", "/v1/completions", {}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "the"}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "the", "stream": True}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "the", "unheard_of": 1}),
    ("POST", "/v1/completions", {"model": "absent", "prompt": "the"}),
    ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "the"}]}),
    ("POST", "/v1/chat/completions", {"model": "chat", "messages": [{"role": "user", "content": "the"}]}),
    (
        "POST",
        "/v1/chat/completions",
        {"model": "chat", "messages": [{"role": "user", "content": "the"}], "stream": True},
    ),
    ("POST", "/v1/responses", {"model": "chat", "input": "the"}),
    ("POST", "/v1/responses", {"model": "chat", "input": "the", "stream": True}),
    ("POST", "/v1/embeddings", {"model": "tiny", "input": "the"}),
    ("POST", "/tokenize", {"model": "tiny", "prompt": "the"}),
    ("POST", "/detokenize", {"model": "tiny", "tokens": [1, 2]}),
    ("POST", "/api/inside", {"model": "tiny", "text": "the"}),
    ("POST", "/api/markdown", {"text": "*the*"}),
]
# Added to requests for text, so that it is the same every time.
GENERATION = {
    "/v1/completions": {"max_tokens": 4, "temperature": 0, "ignore_eos": True},
    "/v1/chat/completions": {"max_tokens": 4, "temperature": 0, "ignore_eos": True},
    "/v1/responses": {"max_output_tokens": 4, "temperature": 0},
}


def answers(client: TestClient) -> dict[str, Any]:
    """For each request the status, the headers of our own, and the shape of the answer or of its events."""
    described: dict[str, Any] = {}
    for method, path, body in REQUESTS:
        asked = body and {**body, **GENERATION.get(path, {})}
        response = client.request(method, path, json=asked)
        kind = response.headers.get("content-type", "").partition(";")[0]
        answer: dict[str, Any] = {"status": response.status_code, "content type": kind}
        answer["headers"] = sorted(set(response.headers) - {"content-length", "content-type", "date"})
        if path == "/openapi.json":
            pass  # described on its own
        elif kind == "application/json":
            answer["body"] = shape(response.json())
            answer["body"].pop("record", None)  # run.json, which is described among the files
        elif kind == "text/event-stream":
            answer["events"] = event_shapes(response.text)
        described[f"{method} {path}" + ("" if body is None else f" {json.dumps(body)}")] = answer
    return described


def event_shapes(text: str) -> dict[str, Any]:
    """What the data of server-sent events is like, by the kind of event."""
    events: dict[str, list[Any]] = {}
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines()]
        data = "\n".join(value for name, _, value in lines if name == "data")
        kind = next((value for name, _, value in lines if name == "event"), "message")
        if data.startswith("{"):
            events.setdefault(kind, []).append(json.loads(data))
        elif data:
            events.setdefault(data, [])
    return {kind: merged_shape(rows) for kind, rows in events.items()}


def merged_shape(values: list[Any]) -> Any:
    """All that values have together: how many tokens come with one event is a matter of time."""
    values = [value for value in values if value is not None] or [None]
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: merged_shape([value[key] for value in values if key in value]) for key in sorted(keys)}
    if isinstance(values[0], list):
        return [merged_shape([item for value in values for item in value])]
    return union(sorted({shape(value) for value in values}))


def describe_application(client: TestClient) -> dict[str, Any]:
    application: Any = client.app
    return {"described": reduce_openapi(application.openapi()), "outside": routes_outside_schema(application)}


def test_http(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    talking = Path(shutil.copytree(run / "best", tmp_path / "chat"))
    (talking / "manifest.json").unlink()
    config = json.loads((talking / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for message in messages %}{{ message.content }}. {% endfor %}"
    (talking / "tokenizer_config.json").write_text(json.dumps(config))

    def use(client: TestClient) -> dict[str, Any]:
        described = {**describe_application(client), "answers": answers(client)}
        names = re.findall(r"^# TYPE (\S+) (\S+)", client.get("/metrics").text, re.M)
        ours = {name: kind for name, kind in names if name.startswith("gptsmith") and not name.endswith("_created")}
        return {**described, "metrics": dict(sorted(ours.items()))}

    with quiet_logs():
        shown = ["--runs", run.parent, "--collect", "preferences.jsonl"]
        serving = served(["serve", run, talking, *shown, "--device", "cpu", "--log-level", "error"], use)
        watching = served(["watch", run.parent], describe_application)
        refused = served(
            ["serve", run, "--api-key", "secret", "--device", "cpu", "--preload", "none", "--log-level", "error"],
            lambda client: {path: client.get(path).status_code for path in ("/", "/health", "/v1/models", "/api/runs")},
        )
    check("http", {"serve": serving, "watch": watching, "serve with keys, asked without": refused})


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Put loggers back as they were; `serve` points them to standard error."""
    import logging

    loggers = [logging.getLogger(name) for name in ("gptsmith.server", "uvicorn", "uvicorn.error")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


# -- files -------------------------------------------------------------------------------------------------------------


def names_in(directory: Path) -> list[str]:
    found = []
    for root, folders, files in os.walk(directory):
        place = Path(root).relative_to(directory)
        links = [name for name in folders if Path(root, name).is_symlink()]
        found += [(place / name).as_posix() for name in files]
        found += [f"{(place / name).as_posix()} -> {os.readlink(Path(root, name))}" for name in links]
    return sorted(found)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tensors_in(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_slice(name) for name in sorted(file.keys())}
        return {name: f"{slice.get_dtype()} {slice.get_shape()}" for name, slice in found.items()}


def test_files(text: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    last = run / "checkpoints" / "step-00000004"
    assert call("tokenizer", "train", text, "--out", "tokenizer", "--vocab-size", "260")[0] == 0
    assert call("import", run / "best", "--out", "imported")[0] == 0
    assert call("quantize", run, "--out", "quantized", "--tokens", "0")[0] == 0
    assert call("export", run, "--out", "exported")[0] == 0
    code, forecast = call("plan", text, *TINY, "--json")
    assert code == 0
    check(
        "files",
        {
            "run directory": names_in(run),
            "run.json": shape(json.loads((run / "run.json").read_text())),
            "metrics.jsonl": rows_shape(read_rows(run / "metrics.jsonl")),
            "samples.jsonl": rows_shape(read_rows(run / "samples.jsonl")),
            "checkpoint": {
                "manifest.json": shape(json.loads((last / "manifest.json").read_text())),
                "config.json": shape(json.loads((last / "config.json").read_text())),
                "generation_config.json": shape(json.loads((last / "generation_config.json").read_text())),
                "tokenizer_config.json": shape(json.loads((last / "tokenizer_config.json").read_text())),
                "model.safetensors": tensors_in(last / "model.safetensors"),
                "train/state.json": shape(json.loads((last / "train" / "state.json").read_text())),
                "train/state.safetensors": tensors_in(last / "train" / "state.safetensors"),
            },
            "tokenizer": names_in(tmp_path / "tokenizer"),
            "imported model": names_in(tmp_path / "imported"),
            "quantized model": names_in(tmp_path / "quantized"),
            "quantized config.json": shape(json.loads((tmp_path / "quantized" / "config.json").read_text())),
            "exported model": names_in(tmp_path / "exported"),
            "plan --json": shape(json.loads(forecast)),
        },
    )


# -- Python ------------------------------------------------------------------------------------------------------------


def signature(function: Any) -> str:
    """Names, kinds and defaults of the parameters, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain))


def type_name(hint: Any) -> str:
    """A type as text; classes of this package count as `object`, whatever they are called."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin is not None:
        inner = ", ".join("..." if argument is ... else type_name(argument) for argument in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    if hint is type(None):
        return "None"
    return "object" if getattr(hint, "__module__", "").startswith("gptsmith") else getattr(hint, "__name__", str(hint))


def describe_field(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return f"{type_name(hint)} = {field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return f"{type_name(hint)} = {'a new one' if dataclasses.is_dataclass(made) else repr(made)}"
    return type_name(hint)


def describe_public(value: Any) -> Any:
    if not inspect.isclass(value):
        return signature(value)
    described: dict[str, Any] = {}
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(value)
        described["fields"] = {
            field.name: describe_field(field, hints[field.name]) for field in dataclasses.fields(value)
        }
    else:
        described["constructor"] = signature(value)
    members = {}
    for name, member in vars(value).items():
        if name.startswith("_") or name in described.get("fields", ()):
            continue
        if isinstance(member, property | functools.cached_property):
            members[name] = "property"
        elif isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
            members[name] = signature(getattr(value, name))
    return {**described, "members": dict(sorted(members.items()))}


def test_python() -> None:
    families = getattr(importlib.import_module(FAMILIES[0]), FAMILIES[1])
    check(
        "python",
        {
            "gptsmith.__all__": sorted(gptsmith.__all__),
            **{f"gptsmith.{name}": signature(getattr(gptsmith, name)) for name in ("generate", "load")},
            "families": sorted(families),
            **{
                name: describe_public(getattr(importlib.import_module(module), name))
                for name, module in sorted(PUBLIC.items())
            },
        },
    )

"""The command line. A command's module is imported only when the command runs, so that help is instant."""

from __future__ import annotations

import importlib
import io
import keyword
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from gptsmith.cli.help import Section, format_help
from gptsmith.errors import GptsmithError, ProcessError, UsageError, nearest
from gptsmith.plugins import load_plugins
from gptsmith.registry import Registry

_BUILTIN = {
    "train": "train a GPT on a text file, a folder, JSONL, parquet or a named corpus; or resume a run",
    "sft": "fine-tune a model on conversations, or on prompts with completions",
    "distill": "train a student to write as a teacher does",
    "reward": "train a reward model on preferences",
    "ppo": "align a model by a reward, with a value model and a KL penalty, as in InstructGPT",
    "grpo": "align a model by a reward, comparing several answers to each prompt",
    "dpo": "make preferred answers likelier: DPO, IPO, SimPO, ORPO, KTO",
    "bestofn": "keep the best of n answers by a reward: best-of-n and rejection sampling",
    "align": "make an aligned model from raw text: the whole pipeline of InstructGPT",
    "classify": "train a model to label texts, as in GPT-1; or label texts with it",
    "plan": "forecast the memory, time and cost of a run",
    "launch": "write the file that starts a run on several machines: torchrun, Slurm, SkyPilot, Kubernetes",
    "dry-run": "run an update of many simulated processes: memory and collectives",
    "find-lr": "find a learning rate by a range test",
    "scale": "train a series of budgets and fit a scaling law: loss against compute",
    "eval": "measure a model: on tasks, zero-shot and few-shot, and on texts",
    "compare": "compare models on the same tasks and texts, with intervals and tests",
    "tasks": "list the tasks that `eval` knows",
    "generate": "continue a prompt",
    "chat": "talk to a model in the terminal",
    "serve": "serve models through an OpenAI-compatible API and a web page",
    "watch": "show live training curves in the browser",
    "report": "rewrite report.html of a run",
    "data": "list and fetch named corpora",
    "tokenizer": "train a tokenizer",
    "vision": "add a vision tower to a text model, so that it can learn to read pictures",
    "import": "import a model from elsewhere: a Hugging Face directory, a hub id or a GGUF file",
    "merge": "fold adapters into a model, or average models",
    "quantize": "quantize a model to 4 to 8 bits",
    "export": "export a model for other programs, as a Hugging Face directory or a GGUF file",
}
COMMANDS: Registry[str] = Registry("command", _BUILTIN)
_modules: dict[str, str] = {}  # of registered commands


def register_command(name: str, help: str, module: str) -> None:
    """Make a command known as `name`. help: one line for the list of commands.

    module: name of the module with `main(arguments: list[str]) -> int | None`, which returns the exit code (None: 0).
        It is imported when the command runs, so it can import what it likes.
    """
    COMMANDS.register(name, help)
    _modules[name] = module


_FINE_TUNING = (
    "To fine-tune a model on conversations, use: gptsmith sft MODEL DATA. To continue pretraining it on your text: "
    "gptsmith train DATA --init MODEL"
)
_EVALUATION = (
    "To measure a model on tasks, use: gptsmith eval MODEL --tasks NAME,… To measure its perplexity on a text: "
    "gptsmith eval MODEL --data FILE"
)
OTHER_WORDS = {  # what people try first, and what there is instead
    "finetune": _FINE_TUNING,
    "fine-tune": _FINE_TUNING,
    "evaluate": _EVALUATION,
    "benchmark": _EVALUATION,
    "perplexity": _EVALUATION,
    "lm-eval": "Use: lm_eval --model gptsmith --model_args pretrained=MODEL --tasks …",
    "resume": "To continue a run from its last checkpoint, use: gptsmith train --resume RUN",
    "convert": "Use `gptsmith import` for models from elsewhere, and `gptsmith export` for other programs.",
}

EXAMPLES = [
    ("gptsmith train input.txt", "train on your text, into runs/input"),
    ('gptsmith generate runs/input --prompt "Once"', "generate text"),
    ("gptsmith train --resume runs/input", "continue an interrupted run"),
]
OPTIONS = [
    ("--version", "show the version"),
    ("--help", "show this help; `gptsmith COMMAND --help` shows the help of a command"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Return its exit code: 0; 1 for a failure; 2 for wrong usage; 128 + N if stopped by signal N."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdin", "stdout", "stderr"):  # None where it was closed: gptsmith ... >&-
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # do not fail on characters that the terminal cannot show
    try:
        return _dispatch(arguments)
    except ProcessError as error:  # that process prints its message
        return _failed(error.exit_code)
    except GptsmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return _failed(error.exit_code)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has exited: `gptsmith generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print("error: out of memory. Close other programs, or use a smaller model or batch.", file=sys.stderr)
        return 1
    except OSError as error:  # a problem of the system that no command explains better
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}.", file=sys.stderr)
        return 1


def _failed(code: int) -> int:
    """Return the exit code. TorchElastic sends SIGTERM to the others when one process of a run has ended: it must not
    replace the code of a process that has already said what went wrong."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(main_help(), file=sys.stderr)
        return 2
    name, *rest = arguments
    if name == "help":
        load_plugins()  # to list their commands; `--help` does without, to be instant
    if name == "help" and rest and rest[0] in COMMANDS:
        name, rest = rest[0], ["--help"]
    if name in ("--help", "-h", "help"):
        print(main_help())
        return 0
    if name in ("--version", "-V", "version"):
        from gptsmith import __version__

        print(f"gptsmith {__version__}")
        return 0
    load_plugins()
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        hint = f"{nearest(name, COMMANDS)} `gptsmith --help` lists the commands."
        if (word := name.lower().replace("_", "-")) in OTHER_WORDS:
            hint = f" {OTHER_WORDS[word]}"
        raise UsageError(f"unknown {kind} {name!r}.{hint}")
    return int(_module_of(name).main(rest) or 0)


def _module_of(command: str) -> ModuleType:
    if command in COMMANDS.builtin:
        module = f"{command}_" if keyword.iskeyword(command) else command.replace("-", "_")  # none is called `import`
        return importlib.import_module(f"gptsmith.cli.{module}")
    try:
        return importlib.import_module(_modules[command])
    except ImportError as error:
        reason = f"{type(error).__name__}: {error}"
        raise GptsmithError(f"the command {command!r} of a plugin cannot be imported: {reason}.") from error


def main_help() -> str:
    sections = [
        Section("examples", EXAMPLES, name_width=46),
        Section("commands", list(COMMANDS.items())),
        Section("options", OPTIONS),
    ]
    return format_help("gptsmith COMMAND ...", "Make a GPT from your own text and use it.", sections)

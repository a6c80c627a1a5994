"""The command line. Each command is a module that is imported only when it is asked for, so that help is instant."""

from __future__ import annotations

import importlib
import io
import keyword
import os
import sys
from collections.abc import Sequence

from gptsmith.errors import GptsmithError, UsageError, nearest

COMMANDS = {
    "train": "make a GPT from a text file, a folder, JSONL, parquet or a named corpus; or resume a run",
    "plan": "say what a run would take - memory, time, money - before it runs",
    "find-lr": "try rising learning rates and draw what the loss does",
    "scale": "train a ladder of budgets and see how loss falls with compute",
    "generate": "continue a prompt with a trained model",
    "chat": "talk to a model",
    "serve": "serve models: OpenAI's API, and a web page",
    "watch": "see training runs in the browser, while they train and after",
    "report": "write a run's report.html again",
    "data": "list and fetch named corpora",
    "tokenizer": "train a tokenizer",
    "import": "read a model of others: Hugging Face directory, hub id, GGUF file",
    "quantize": "write a model with weights of 8 or 4 bits",
    "export": "write a model for others: Hugging Face directory, GGUF file",
}

USAGE = """usage: gptsmith COMMAND ...

Make a GPT from your own text and use it.

  gptsmith train input.txt                         train on your text, into runs/input
  gptsmith generate runs/input --prompt "Once"     let it write
  gptsmith train --resume runs/input               go on where it stopped

commands:
{commands}

options:
  --version    the version, and leave
  --help       this text; `gptsmith COMMAND --help` for a command's own"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for a failure, 2 for bad usage, 128 + N when stopped by signal N."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is no reason to stop
    try:
        return _dispatch(arguments)
    except GptsmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left: `gptsmith generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print("error: memory ran out. Close other programs, or ask for less.", file=sys.stderr)
        return 1
    except OSError as error:  # one that nobody expected is still the system's, not ours
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}.", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        commands = "\n".join(f"  {name:13}{text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=commands), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        from gptsmith import __version__

        print(f"gptsmith {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}.{nearest(name, COMMANDS)} `gptsmith --help` lists them.")
    module = f"{name}_" if keyword.iskeyword(name) else name.replace("-", "_")  # `import` is no name for a module
    command = importlib.import_module(f"gptsmith.cli.{module}")
    return int(command.main(rest) or 0)

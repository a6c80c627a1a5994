"""The notebook runs from top to bottom, says what its prose says, and is committed with clean outputs.

Run this file as a script (`python tests/test_notebook.py`) to execute the notebook and write its outputs back into it.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

import gptsmith

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "gpt_from_scratch.ipynb"
PICTURES = {
    "bigram-picture",
    "mask-picture",
    "scale",
    "feed-forward",
    "loss-picture",
    "whole-val",
    "temperature-picture",
    "attention-picture",
}
STEPS, FEW_STEPS = 1000, 200  # of training: in the notebook, and where the length does not matter
SECONDS, YARDSTICK = 120.0, 0.035  # what the notebook may take on a core that makes a yardstick in so many seconds
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(notebook: Any) -> dict[str, Any]:
    return {cell["id"]: cell for cell in notebook.cells}


def printed(notebook: Any, cell: str, stream: str = "stdout") -> str:
    outputs = cells(notebook)[cell]["outputs"]
    return "".join(out["text"] for out in outputs if out["output_type"] == "stream" and out["name"] == stream)


def pictures(notebook: Any) -> set[str]:
    return {
        cell["id"]
        for cell in notebook.cells
        if any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))
    }


def nats(notebook: Any, model: str) -> float:
    """The whole-split validation loss the notebook prints for `model`."""
    found = re.search(rf"^{re.escape(model)}\s+([\d.]+) nats", printed(notebook, "whole-val"), re.MULTILINE)
    assert found, f"no line for {model}"
    return float(found[1])


@dataclass(frozen=True)
class Execution:
    notebook: Any
    wall_seconds: float
    cpu_seconds: float
    slowness: float  # of the machine, while the notebook ran; at least 1


def yardstick() -> float:
    """Seconds of what a training step of the notebook is made of: narrow products, softmaxes and bends, both ways."""
    x = torch.full((1024, 96), 0.5, requires_grad=True)
    up = torch.full((96, 384), 0.01, requires_grad=True)
    began = time.perf_counter()
    for _ in range(3):
        h = torch.nn.functional.gelu(x @ up, approximate="tanh") @ up.T
        scores = torch.stack([h.view(64, 64, 24)] * 4)
        (scores @ scores.mT).softmax(dim=-1).sum().backward()
    return time.perf_counter() - began


@contextmanager
def slowness() -> Iterator[list[float]]:
    """How many times slower than it should be this machine was meanwhile: other work on it slows a core manyfold."""
    values = [1.0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(3.0):
            values.append(yardstick() / YARDSTICK)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield values
    finally:
        ended.set()
        watching.join()
        torch.set_num_threads(threads)
        values[:] = [max(1.0, statistics.fmean(values))]


def execute(folder: Path, steps: int = STEPS) -> Execution:
    """The notebook run in an empty folder, by this interpreter, with no settings of the user's. steps: of training."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    train = cells(notebook)["train"]
    assert train.source.startswith(f"steps, warm_up, peak_rate = {STEPS}, ")
    train.source = train.source.replace(str(STEPS), str(steps), 1)
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(variable, str(folder / variable.lower()))
        package = str(Path(gptsmith.__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))))
        # No folder of kernels is searched, so "python3" is the interpreter that runs this test.
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        assert manager.kernel_spec is not None
        assert Path(manager.kernel_spec.argv[0]) == Path(sys.executable)
        workdir = folder / "empty"
        workdir.mkdir()
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=500,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(workdir)}},
        )
        before, began = os.times(), time.monotonic()
        with slowness() as slow:
            client.execute(cleanup_kc=True)
        wall = time.monotonic() - began
    after = os.times()  # the kernel has ended and been waited for, so its seconds count as a child's
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    assert not list(workdir.iterdir()), "the notebook left files behind"
    notebook.metadata = nbformat.from_dict(METADATA)  # without the version of this Python
    return Execution(notebook, wall, cpu, slow[0])


@pytest.fixture(scope="module")
def execution(tmp_path_factory: pytest.TempPathFactory) -> Execution:
    return execute(tmp_path_factory.mktemp("notebook"), FEW_STEPS)


def check_contents(notebook: Any) -> None:
    assert pictures(notebook) == PICTURES
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            assert out["output_type"] != "error", f"{cell['id']}: {out}"
            if cell["id"] != "read-text":  # which may tell of a download
                assert out.get("name") != "stderr", f"{cell['id']}: {out}"


def check_learning(notebook: Any, steps: int) -> None:
    uniform, unigram, bigram, gpt = (
        nats(notebook, name) for name in ("uniform guess, ln V", "unigram", "bigram", "our GPT")
    )
    assert uniform > unigram > bigram > gpt
    assert gpt < 1.9 or steps < STEPS
    lines = re.findall(r"step +(\d+) +train ([\d.]+) +val ([\d.]+)", printed(notebook, "train"))
    assert [int(step) for step, _, _ in lines] == list(range(0, steps + 1, 100))
    assert abs(float(lines[0][2]) - uniform) < 0.3  # it starts near ln V


@pytest.mark.network
def test_runs_top_to_bottom(execution: Execution) -> None:
    code = [cell for cell in execution.notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_contents(execution.notebook)
    check_learning(execution.notebook, FEW_STEPS)


@pytest.mark.slow
@pytest.mark.network
def test_takes_under_two_minutes_and_learns(tmp_path: Path) -> None:
    execution = execute(tmp_path)
    check_contents(execution.notebook)
    check_learning(execution.notebook, STEPS)
    # The notebook computes on one thread: CPU seconds are what the wall clock shows on a machine that is not busy.
    assert min(execution.wall_seconds, execution.cpu_seconds) < SECONDS * execution.slowness
    assert execution.cpu_seconds > 1.0, "the kernel's time was not counted"


@pytest.mark.network
def test_the_package_gives_the_same_logits(execution: Execution) -> None:
    text = printed(execution.notebook, "same-logits")
    differences = dict(re.findall(r"torch\.(float\d+): max abs difference of logits ([\d.e+-]+),", text))
    assert float(differences["float64"]) < 1e-10
    assert float(differences["float32"]) < 1e-4
    assert "the same logits: yes" in text


@pytest.mark.network
def test_writes_at_three_temperatures(execution: Execution) -> None:
    text = printed(execution.notebook, "generate")
    samples = re.split(r"───── temperature ([\d.]+) ─────\n", text)[1:]
    assert samples[::2] == ["0.2", "0.8", "1.2"]
    assert all(sample.startswith("ROMEO:") and len(sample) > 240 for sample in samples[1::2])
    kinds = [len(set(sample.split())) for sample in samples[1::2]]
    assert kinds[0] < kinds[2], "a cold model repeats itself more than a hot one"


@pytest.mark.network
def test_committed_outputs_are_those_of_the_committed_code(execution: Execution) -> None:
    committed = nbformat.read(NOTEBOOK, as_version=4)
    for cell in ("read-text", "ids", "split", "bigram", "average", "modern"):  # the same on every machine
        assert printed(committed, cell) == printed(execution.notebook, cell), cell


def test_committed_notebook_is_clean() -> None:
    assert NOTEBOOK.stat().st_size < 1_500_000
    raw = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"(/home/|/root/|/tmp/|/Users/|/work/|/var/|site-packages|[A-Z]:\\\\Users)", raw)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check_contents(notebook)
    check_learning(notebook, STEPS)
    assert notebook.metadata == METADATA
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "commit it executed, in order"
    assert all(not cell.metadata for cell in notebook.cells)
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z][a-z-]+", cell["id"]), "ids are names, so that diffs stay small"


def test_needs_few_packages() -> None:
    imported = set()
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            tree = ast.parse(re.sub(r"^%.*$", "", cell.source, flags=re.MULTILINE))
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    imported |= {name.name.split(".")[0] for name in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "matplotlib", "gptsmith"}


def test_names_things_that_exist() -> None:
    """The commands, presets, files and functions that the prose sends the reader to."""
    from gptsmith.presets import PRESETS

    prose = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    package = Path(gptsmith.__file__).parent
    for path in set(re.findall(r"gptsmith/[\w/]+\.py", prose)):
        assert (package.parent / path).is_file(), path
    for name in set(re.findall(r"--preset ([\w-]+)", prose)):
        assert name in PRESETS
    transformer = (package / "model" / "transformer.py").read_text(encoding="utf-8")
    for name in set(re.findall(r"See `(\w+)`", prose)):
        assert re.search(rf"^(class|def) {name}\b", transformer, re.MULTILINE), name
    from gptsmith.tokenizer import train_bpe

    assert callable(train_bpe)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        executed = execute(Path(scratch))
    NOTEBOOK.write_text(nbformat.writes(executed.notebook) + "\n", encoding="utf-8")
    print(f"{NOTEBOOK.name}: {executed.wall_seconds:.0f} s, {executed.cpu_seconds:.0f} s of CPU")

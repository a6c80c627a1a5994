"""`gptsmith launch` through the real command line: the files are executed with stand-ins for srun and torchrun."""

from __future__ import annotations

import importlib
import json
import os
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Cli = Callable[..., tuple[int, str, str]]

TRAIN = ["--", "train", "my notes/", "--batch-size", "64", "--model.hidden-size", "64"]
TUNE = ["--", "dpo", "smollm2-135m", "pairs.jsonl", "--batch-size", "64", "--out", "runs/tuned"]
KINDS = {
    "torchrun": ["--head", "host-1"],
    "slurm": ["--partition", "gpu"],
    "sky": [],
    "k8s": ["--image", "registry/gptsmith:1"],
}
SBATCH = {  # options of sbatch, from its manual
    *("job-name", "nodes", "ntasks-per-node", "output", "open-mode", "gpus-per-node", "cpus-per-task", "mem", "time"),
    *("signal", "requeue", "partition", "account", "qos", "constraint"),
}


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def script_of(kind: str, text: str) -> str:
    """The shell script in a file."""
    if kind == "sky":
        return str(yaml.safe_load(text)["run"])
    if kind == "k8s":
        job = list(yaml.safe_load_all(text))[-1]
        return str(job["spec"]["template"]["spec"]["containers"][0]["args"][0])
    return text


def execute(script: str, where: Path) -> list[str]:
    """Run a script with stand-ins for the programs of a cluster; return the arguments of torchrun."""
    programs = where / "programs"
    programs.mkdir(exist_ok=True)
    for name, body in {
        "torchrun": 'printf "%s\\n" "$@" > "$SEEN"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "timeout": 'while [ "${1#--}" != "$1" ]; do shift; done; shift; exec "$@"',
        "scontrol": "printf 'host-1\\nhost-2\\n'",
    }.items():
        path = programs / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SEEN": str(where / "seen"),
        "SLURM_JOB_NODELIST": "host-[1-2]",
        "SLURM_JOB_ID": "12345",
        "SKYPILOT_NODE_IPS": "host-1\nhost-2",
        "SKYPILOT_TASK_ID": "task-7",
    }
    subprocess.run(["bash", "-c", script], cwd=where, env=environment, check=True, timeout=60)
    return (where / "seen").read_text().splitlines()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", [TRAIN, TUNE], ids=["train", "dpo"])
def test_the_file_starts_the_run_and_continues_it(run_cli: Cli, tmp_path: Path, kind: str, command: list[str]) -> None:
    code, out, _ = run_cli("launch", kind, *KINDS[kind], "--nodes", "2", "--processes", "4", "--time", "2d", *command)
    assert code == 0
    script = script_of(kind, out)
    given = execute(script, tmp_path)
    split = given.index("gptsmith")
    options = dict(option.split("=", 1) for option in given[: split - 1] if "=" in option)
    assert options["--nnodes"] == "2"
    assert options["--nproc-per-node"] == "4"
    host, _, port = options["--rdzv-endpoint"].partition(":")
    assert host == ("my-notes-0.my-notes" if kind == "k8s" and command is TRAIN else "tuned-0.tuned") or (
        host == "host-1" and kind != "k8s"
    )
    assert 1024 < int(port) < 65536
    assert given[split - 1] == "-m"
    started, where = given[split + 1 :], "runs/my-notes" if command is TRAIN else "runs/tuned"
    assert started == [*command[1:], "--out", where] if command is TRAIN else started == command[1:]
    (tmp_path / where).mkdir(parents=True)
    (tmp_path / where / "run.json").write_text("{}")
    assert execute(script, tmp_path)[split + 1 :] == [command[1], "--resume", where]


@pytest.mark.parametrize("kind", KINDS)
def test_one_machine_needs_no_meeting_point(run_cli: Cli, tmp_path: Path, kind: str) -> None:
    code, out, _ = run_cli("launch", kind, *KINDS[kind], *TRAIN)
    assert code == 0
    given = execute(script_of(kind, out), tmp_path)
    assert "--standalone" in given
    assert "--nproc-per-node=8" in given
    assert not [option for option in given if option.startswith("--rdzv")]
    if kind == "k8s":
        assert [document["kind"] for document in yaml.safe_load_all(out)] == ["Job"]


def test_slurm_directives(run_cli: Cli) -> None:
    _, out, _ = run_cli(
        *("launch", "slurm", "--nodes", "8", "--time", "36h", "--account", "a", "--qos", "q", "--constraint", "h100"),
        *("--cpus", "96", "--memory", "512G", "--image", "/images/gptsmith.sqsh", *TRAIN),
    )
    lines = out.splitlines()
    assert lines[0].startswith("#!")
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(directives)] == directives  # sbatch stops reading at the first command
    options = {
        found[1]: found[2] for line in directives if (found := re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line))
    }
    assert len(options) == len(directives)
    assert set(options) <= SBATCH
    assert options["time"] == "=1-12:00:00"
    assert options["gpus-per-node"] == "=8"
    assert options["signal"] == "=TERM@300"
    assert "--container-image=/images/gptsmith.sqsh" in out
    assert "--time" not in run_cli("launch", "slurm", *TRAIN)[1]
    assert "gpus" not in run_cli("launch", "slurm", "--no-gpus", *TRAIN)[1]


def test_a_file_is_written_once(run_cli: Cli, tmp_path: Path) -> None:
    code, out, _ = run_cli("launch", "slurm", "--out", "jobs/a.sbatch", *TRAIN)
    assert code == 0
    assert "sbatch jobs/a.sbatch" in out
    assert subprocess.run(["bash", "-n", tmp_path / "jobs/a.sbatch"], check=False).returncode == 0
    code, _, err = run_cli("launch", "slurm", "--out", "jobs/a.sbatch", *TRAIN)
    assert code == 2
    assert "exists" in err


SKY = ["--nodes", "2", "--accelerator", "A100-80GB", "--processes", "8", "--spot", "--bucket", "s3://mine"]
SKY += ["--infra", "gcp/us-central1", "--cpus", "32+", "--memory", "256+", "--disk", "500", "--image", "docker:x/y:1"]
K8S = ["--nodes", "4", "--image", "x/y:1", "--claim", "data", "--memory", "512Gi", "--cpus", "64", "--time", "1d"]
K8S += ["--namespace", "lab", "--shared-memory", "64Gi", "--node-selector", "gpu=h100", "--node-selector", "zone=b"]


def test_the_task_of_skypilot(run_cli: Cli) -> None:
    _, out, _ = run_cli("launch", "sky", *SKY, *TRAIN)
    task = yaml.safe_load(out)
    assert task["resources"]["accelerators"] == "A100-80GB:8"
    assert task["resources"]["use_spot"] is True
    assert task["num_nodes"] == 2
    assert task["file_mounts"]["~/sky_workdir/runs"]["source"] == "s3://mine"


@pytest.mark.parametrize("options", [SKY, []], ids=["all", "none"])
def test_skypilot_accepts_the_task(run_cli: Cli, options: list[str]) -> None:
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not installed", exc_type=ImportError)
    jsonschema: Any = importlib.import_module("jsonschema")
    _, out, _ = run_cli("launch", "sky", *options, *TRAIN)
    task = yaml.safe_load(out)
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())


def test_the_manifests_of_kubernetes(run_cli: Cli) -> None:
    _, out, _ = run_cli("launch", "k8s", *K8S, *TRAIN)
    service, job = yaml.safe_load_all(out)
    pod = job["spec"]["template"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert job["spec"]["activeDeadlineSeconds"] == 86400
    # The names by which the pods find each other: the pod's is JOB-INDEX, below the Service.
    assert pod["spec"]["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"] == "my-notes"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    [container] = pod["spec"]["containers"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes == {"shm", "data"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "cpu": "64", "memory": "512Gi"}
    assert pod["spec"]["nodeSelector"] == {"gpu": "h100", "zone": "b"}


@pytest.mark.parametrize("options", [K8S, ["--image", "x"], ["--image", "x", "--no-gpus"]], ids=["all", "one", "cpu"])
def test_kubernetes_accepts_the_manifests(run_cli: Cli, options: list[str]) -> None:
    kubernetes_validate: Any = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    _, out, _ = run_cli("launch", "k8s", *options, *TRAIN)
    for document in yaml.safe_load_all(out):
        kubernetes_validate.validate(document, desired_version="1.31", strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm"], "after `--`"),
        (["slurm", "--", "serve", "runs/x"], "launch starts a training command, not 'serve'"),
        (["slurm", "--", "trian", "notes"], "Did you mean 'train'?"),
        (["slurm", "--"], "after `--`"),
        (["slurm", "--", "train"], "No data given"),
        (["slurm", "--", "train", "notes", "--steps", "many"], "--steps"),
        (["slurm", "--", "train", "notes", "--model.hidden-sizes", "3"], "hidden-size"),
        (["slurm", "--", "ppo", "model", "prompts"], "No reward given"),
        (["slurm", "--nodes", "3", "--", "train", "notes", "--batch-size", "16"], "24 processes cannot share"),
        (["slurm", "--nodes", "2", *TRAIN, "--parallel", "fsdp=3"], "needs a multiple of 3 processes, not 16"),
        (["slurm", "--nodes", "2", *TRAIN, "--parallel", "dp=2,tp=4"], "needs 8 processes, not 16"),
        (["slurm", *TRAIN, "--parallel", "ep=2"], "this model has none"),
        (["slurm", *TRAIN, "--parallel", "tp=8", "--model.num-attention-heads", "4"], "4 attention heads cannot be"),
        (["slurm", "--", "grpo", "model", "prompts", "--reward", "length", "--parallel", "fsdp"], "samples answers"),
        (["slurm", "--", "sft", "model", "chats", "--lora", "on", "--parallel", "tp=2"], "adapters cannot be divided"),
        (["slurm", "--", "train", "notes", "--batch-size", "16", "--processes", "8"], "leave out --processes"),
        (["slurm", "--", "train", "notes", "--batch-size", "16", "--processes=8"], "leave out --processes"),
        (["slurm", "--", "classify", "runs/x", "--predict", "rows.jsonl"], "does not train"),
        (["slurm", "--time", "tomorrow", *TRAIN], "--time tomorrow"),
        (["slurm", "--time", "2m", *TRAIN], "--time must be longer"),
        (["slurm", "--nodes", "0", *TRAIN], "--nodes must be at least 1"),
        (["slurm", "--restarts", "-1", *TRAIN], "--restarts must be at least 0"),
        (["slurm", "--name", "My Run", *TRAIN], "--name My Run"),
        (["slurm", "--partition", "a b", *TRAIN], "without spaces"),
        (["torchrun", "--nodes", "2", *TRAIN], "--head"),
        (["k8s", *TRAIN], "--image"),
        (["k8s", "--image", "x", "--node-selector", "gpu", *TRAIN], "KEY=VALUE"),
        (["sky", "--bucket", "mine", *TRAIN], "--bucket mine"),
        (["sky", "--bucket", "s3://mine", *TRAIN, "--out", "/runs/x"], "a relative path"),
        (["nomad", *TRAIN], "nomad"),
    ],
)
def test_wrong_options(run_cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = run_cli("launch", *arguments)
    assert code == 2
    assert message in err
    assert "#SBATCH" not in out
    assert not list(tmp_path.glob("runs"))


def test_nothing_runs(run_cli: Cli, finished: Path) -> None:
    """A run that is resumed is read, and not touched."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    record = json.loads((finished / "run.json").read_text())
    size = record["config"]["loop"]["batch_size"]
    code, out, _ = run_cli("launch", "slurm", "--processes", size, "--", "train", "--resume", finished)
    assert code == 0
    assert f"run=(train --resume {finished})" in out
    assert ".json" not in out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before

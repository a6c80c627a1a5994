"""Files that start a run on several machines: for torchrun by hand, Slurm, SkyPilot and Kubernetes. No torch here.

Each starts one torchrun on every machine, which starts one process for each accelerator there. Nothing is submitted.

A job that is started again (preempted, requeued, out of time, a lost machine) continues its run: where the run
directory exists, the file runs the command with --resume. All machines decide that before torchrun has brought them
together, and only then can the run directory be made, so they decide alike.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptsmith.errors import UsageError

SAVE_SECONDS = 300  # between the signal to stop and the end of the job: time to save a checkpoint
JOIN_SECONDS = 900  # within which the machines of a job must find each other
PORT = 29400
FIRST_OF_HOSTS = "head=${hosts%%$'\\n'*}"  # the first of several lines
NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")  # what all of them accept as the name of a job


@dataclass(frozen=True)
class Job:
    """What is the same wherever a job runs."""

    name: str
    command: tuple[str, ...]
    """The arguments of gptsmith."""
    run_directory: str
    """Where the run is written: a job that is started again looks there."""
    nodes: int = 1
    processes: int = 8
    """On each machine; one for each accelerator."""
    restarts: int = 3
    """How often torchrun starts the processes again after one has failed."""
    seconds: int | None = None
    """Longest time of the job."""
    setup: tuple[str, ...] = ()
    """Shell commands to run on each machine before: to activate an environment, say."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"--name {self.name}: use lower-case letters, digits and hyphens, starting with a letter, at most 52 "
                "characters."
            )
        if self.seconds is not None and self.seconds <= SAVE_SECONDS:
            raise UsageError(f"--time must be longer than the {SAVE_SECONDS // 60} minutes that saving may take.")

    @property
    def resume(self) -> tuple[str, ...]:
        """The arguments that continue the run."""
        return (self.command[0], "--resume", self.run_directory)

    def choose_command(self) -> list[str]:
        """Return shell lines that set `run` to the arguments of gptsmith."""
        if any(word.partition("=")[0] == "--resume" for word in self.command):
            return [f"run=({shlex.join(self.command)})"]
        return [
            f"run=({shlex.join(self.command)})",
            f"if [ -e {shlex.quote(self.run_directory + '/run.json')} ]; then",
            f"  run=({shlex.join(self.resume)})",
            "fi",
        ]

    def torchrun(self, head: str, *, port: str = str(PORT), run_id: str | None = None) -> list[str]:
        """Return the words, quoted where needed, of the torchrun that each machine executes.

        head: the machine where they meet, as the shell writes it.
        """
        limit = []
        if self.seconds is not None:  # a signal to torchrun goes to its processes, which save
            limit = ["timeout", "--signal=TERM", f"--kill-after={SAVE_SECONDS}", str(self.seconds - SAVE_SECONDS)]
        meeting = ["--standalone"]
        if self.nodes > 1:
            meeting = [
                f"--nnodes={self.nodes}",
                "--rdzv-backend=c10d",
                f'--rdzv-endpoint="{head}:{port}"',
                f'--rdzv-id="{run_id or self.name}"',
                f"--rdzv-conf=join_timeout={JOIN_SECONDS}",
            ]
        return [
            *limit,
            "torchrun",
            *meeting,
            f"--nproc-per-node={self.processes}",
            f"--max-restarts={self.restarts}",
            "-m",
            "gptsmith",
            '"${run[@]}"',
        ]


def folded(words: Sequence[str], indent: str = "") -> str:
    """Return a command of already quoted words over several lines."""
    lines, line = [], ""
    for word in words:
        if line and len(indent) + len(line) + len(word) > 96:
            lines.append(line)
            line = "  "
        line += word if not line.strip() else f" {word}"
    return " \\\n".join(f"{indent}{line}" for line in [*lines, line])


# Hosts that are there ------------------------------------------------------------------------------------------------


def torchrun_file(job: Job, *, head: str | None = None, port: int = PORT) -> str:
    """Return a shell script to execute on every machine. head: name or address of one of them, which all can reach."""
    if job.nodes > 1 and not head:
        raise UsageError("--head is missing: the name or address of the first machine, to which the others connect.")
    about = f"Execute this on each of the {job.nodes} machines" if job.nodes > 1 else "Execute this"
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {job.name}: {about}.",
            "set -euo pipefail",
            *job.setup,
            *job.choose_command(),
            folded(["exec", *job.torchrun(head or "", port=str(port))]),
            "",
        ]
    )


# Slurm ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlurmResources:
    """What Slurm is asked for besides machines and time. None: as the cluster has it."""

    gpus: bool = True
    cpus: int | None = None
    """Per machine."""
    memory: str | None = None
    """Per machine: 512G."""
    directives: dict[str, str] = field(default_factory=dict)
    """More of sbatch's options, by name without hyphens: partition, account, qos, constraint."""
    image: str | None = None
    """Container image (the pyxis plugin)."""
    requeue: bool = True


def slurm_file(job: Job, resources: SlurmResources) -> str:
    """Return a script for sbatch."""
    r = resources
    options: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",  # a torchrun, which starts the processes
        "output": "%x-%j.log",
        "open-mode": "append",
    }
    if r.gpus:
        options["gpus-per-node"] = str(job.processes)
    if r.cpus is not None:
        options["cpus-per-task"] = str(r.cpus)
    if r.memory is not None:
        options["mem"] = r.memory
    if job.seconds is not None:
        options["time"] = slurm_time(job.seconds)
        options["signal"] = f"TERM@{SAVE_SECONDS}"  # to the processes, which save
    if r.requeue:
        options["requeue"] = None
    for name, value in r.directives.items():
        if any(letter.isspace() for letter in value):
            raise UsageError(f"--{name} {value!r}: sbatch takes a value without spaces.")
        options[name] = value
    directives = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()]
    job_of_torchrun = Job(job.name, job.command, job.run_directory, job.nodes, job.processes, job.restarts)
    srun = ["srun", "--kill-on-bad-exit=1"]
    if r.image is not None:
        srun += [f"--container-image={shlex.quote(r.image)}", '--container-mounts="$PWD:$PWD"']
        srun += ['--container-workdir="$PWD"']
    head = []
    if job.nodes > 1:
        head = ['hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")', FIRST_OF_HOSTS]
        # Jobs may share a machine: each has a port of its own.
        head += ["port=$((20000 + SLURM_JOB_ID % 20000))"]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *directives,
            "set -euo pipefail",
            *job.setup,
            *job.choose_command(),
            *head,
            folded(
                [
                    *srun,
                    *job_of_torchrun.torchrun("$head", port="$port", run_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"),
                ]
            ),
            "",
        ]
    )


def slurm_time(seconds: int) -> str:
    """Return a duration as Slurm writes it: days-hours:minutes:seconds."""
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    return (f"{days}-" if days else "") + f"{hours:02d}:{minutes:02d}:{rest:02d}"


# SkyPilot ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SkyResources:
    """What SkyPilot is asked for. None: it chooses."""

    accelerator: str | None = "H100"
    cpus: str | None = None
    memory: str | None = None
    infra: str | None = None
    """A cloud, with region and zone if need be: aws, gcp/us-central1, k8s."""
    spot: bool = False
    image: str | None = None
    disk_gigabytes: int | None = None
    workdir: str = "."
    """The folder here that is copied to the machines."""
    bucket: str | None = None
    """Where the runs are kept, which outlive the machines: s3://…, gs://…."""


def sky_file(job: Job, resources: SkyResources) -> str:
    """Return a task in SkyPilot's YAML, for `sky launch` or `sky jobs launch`."""
    r = resources
    asked: dict[str, Any] = {}
    if r.accelerator is not None:
        asked["accelerators"] = f"{r.accelerator}:{job.processes}"
    asked |= _given(cpus=r.cpus, memory=r.memory, infra=r.infra, image_id=r.image, disk_size=r.disk_gigabytes)
    if r.spot:
        asked["use_spot"] = True
    task: dict[str, Any] = {"name": job.name, "num_nodes": job.nodes, "workdir": r.workdir, "resources": asked}
    if r.bucket is not None:
        if not re.fullmatch(r"(s3|gs|r2|nebius|cos|oci|https)://\S+", r.bucket):
            raise UsageError(f"--bucket {r.bucket}: give an address such as s3://NAME or gs://NAME.")
        folder = job.run_directory.split("/")[0]
        if job.run_directory.startswith("/") or folder in ("", ".", "..") or "/" not in job.run_directory:
            raise UsageError(
                f"--bucket is mounted as the folder that holds the run directory: use a relative path such as "
                f"--out runs/NAME, not {job.run_directory}."
            )
        task["file_mounts"] = {f"~/sky_workdir/{folder}": {"source": r.bucket, "mode": "MOUNT_CACHED"}}
    task["setup"] = _Literal("\n".join(job.setup or ("pip install gptsmith",)) + "\n")
    run = [
        "set -euo pipefail",
        *job.choose_command(),
        *(['hosts="$SKYPILOT_NODE_IPS"', FIRST_OF_HOSTS] if job.nodes > 1 else []),
        folded(job.torchrun("$head", run_id="$SKYPILOT_TASK_ID")),
    ]
    task["run"] = _Literal("\n".join(run) + "\n")
    how = "sky jobs launch" if r.spot else "sky launch"
    return f"# {how} THIS_FILE\n" + _yaml(task)


# Kubernetes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KubernetesResources:
    """What the pods get."""

    image: str
    gpus: bool = True
    gpu_resource: str = "nvidia.com/gpu"
    cpus: str | None = None
    memory: str | None = None
    shared_memory: str | None = None
    """Of /dev/shm, in which processes of a pod exchange tensors; None: as much as the pod has."""
    namespace: str | None = None
    claim: str | None = None
    """Persistent volume claim with the data and the runs, mounted at `mount`; ReadWriteMany for several pods."""
    mount: str = "/data"
    node_selector: dict[str, str] = field(default_factory=dict)


def kubernetes_file(job: Job, resources: KubernetesResources) -> str:
    """Return manifests for `kubectl apply`: an indexed Job with one pod a machine and, for several, a headless Service.

    Through the name of the Service the pods find the first one.
    """
    r, labels = resources, {"app.kubernetes.io/name": "gptsmith", "app.kubernetes.io/instance": job.name}
    limits: dict[str, Any] = {}
    if r.gpus:
        limits[r.gpu_resource] = job.processes
    limits |= _given(cpu=r.cpus, memory=r.memory)
    shm = {"medium": "Memory"} | _given(sizeLimit=r.shared_memory)
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": shm}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if r.claim is not None:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": r.claim}})
        mounts.append({"name": "data", "mountPath": r.mount})
    script = ["set -euo pipefail", *job.setup, *job.choose_command()]
    script.append(folded(["exec", *job.torchrun(f"{job.name}-0.{job.name}")]))
    container: dict[str, Any] = {
        "name": "train",
        "image": r.image,
        "command": ["/bin/bash", "-c"],
        "args": [_Literal("\n".join(script) + "\n")],
        "volumeMounts": mounts,
    }
    if limits:
        container["resources"] = {"limits": limits, "requests": limits}
    if r.claim is not None:
        container["workingDir"] = r.mount
    if job.nodes > 1:
        container["ports"] = [{"containerPort": PORT, "name": "rendezvous"}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SAVE_SECONDS,  # to save in, after SIGTERM
        "containers": [container],
        "volumes": volumes,
    }
    if job.nodes > 1:
        pod["subdomain"] = job.name
    if r.node_selector:
        pod["nodeSelector"] = r.node_selector
    meta = {"name": job.name} | _given(namespace=r.namespace)
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        # Where one pod is lost, the others fail too, and all are started again.
        "backoffLimit": job.nodes * (job.restarts + 1),
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    if job.seconds is not None:
        spec["activeDeadlineSeconds"] = job.seconds
    documents: list[dict[str, Any]] = [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {**meta, "labels": labels}, "spec": spec}
    ]
    if job.nodes > 1:
        service = {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [{"name": "rendezvous", "port": PORT}],
        }
        documents.insert(0, {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service})
    return "# kubectl apply -f THIS_FILE\n" + _yaml(*documents)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class _Literal(str):
    """A text that YAML shows line by line."""


def _yaml(*documents: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def literal(dumper: Any, text: _Literal) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")

    Dumper.add_representer(_Literal, literal)
    return str(yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120))


def seconds_of(text: str) -> int:
    """Return a duration such as 30m, 12h, 2d or 1.5h in seconds. UsageError if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if not found:
        raise UsageError(f"--time {text}: write a duration such as 30m, 12h or 2d.")
    return math.ceil(float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]])

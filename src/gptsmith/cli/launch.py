"""`gptsmith launch`: write the file that starts a run on several machines."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from gptsmith.cli import COMMANDS
from gptsmith.cli.parser import parse_subcommand
from gptsmith.cli.run_options import option_value
from gptsmith.errors import UsageError, nearest
from gptsmith.log import note

if TYPE_CHECKING:
    from gptsmith.train.config import RunConfig

TRAINING = ("train", "sft", "distill", "reward", "dpo", "ppo", "grpo", "classify")  # the commands of several processes
EXAMPLE = "gptsmith launch slurm --nodes 4 -- train notes/ --preset gpt2-124m"


@dataclass(frozen=True)
class Options:
    """Base of the kinds of files."""

    nodes: int = 1
    """Number of machines."""
    processes: int = 8
    """Processes on each machine: one for each accelerator."""
    name: str | None = None
    """Name of the job (default: from the run directory)."""
    time: str | None = None
    """Longest time of the job: 30m, 12h, 2d. The run is told to save 5 minutes before."""
    restarts: int = 3
    """How often the processes are started again after one has failed."""
    setup: tuple[str, ...] = ()
    """Shell command to run on each machine first, such as `source .venv/bin/activate`."""
    out: Path | None = None
    """File to write, which must not exist (default: print it)."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("processes", 1), ("restarts", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} must be at least {least}, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Torchrun(Options):
    """Write a shell script to execute on each machine: it starts torchrun, and the machines find each other."""

    head: str | None = None
    """Name or address of the machine that all others connect to; required for several machines."""
    port: int = 29400
    """Port of that machine."""


@dataclass(frozen=True)
class Slurm(Options):
    """Write a script for sbatch."""

    partition: str | None = None
    """Partition to submit to."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the machines must have: h100."""
    gpus: bool = True
    """Ask for a GPU for each process."""
    cpus: int | None = None
    """CPU cores of each machine."""
    memory: str | None = None
    """Memory of each machine: 512G."""
    image: str | None = None
    """Container image to run in (needs Slurm's pyxis plugin)."""
    requeue: bool = True
    """Start the job again if it is preempted or a machine fails; it continues the run."""


@dataclass(frozen=True)
class Sky(Options):
    """Write a task for SkyPilot: `sky launch`, or `sky jobs launch` for machines that can be preempted."""

    accelerator: str = "H100"
    """Kind of accelerator; none: CPUs."""
    cpus: str | None = None
    """CPU cores of each machine: 32 or 32+."""
    memory: str | None = None
    """Memory of each machine in GB: 256 or 256+."""
    infra: str | None = None
    """Cloud, optionally with region and zone: aws, gcp/us-central1, k8s (default: the cheapest)."""
    spot: bool = False
    """Use spot instances, which can be preempted; the job continues on others."""
    image: str | None = None
    """Machine or container image: docker:NAME."""
    disk: int | None = None
    """Disk of each machine in GB."""
    workdir: str = "."
    """Folder to copy to the machines: the data, say."""
    bucket: str | None = None
    """Bucket that keeps the runs: s3://NAME. Needed to continue on other machines."""


@dataclass(frozen=True)
class Kubernetes(Options):
    """Write manifests for kubectl: an indexed Job with one pod per machine, and a Service that connects them."""

    image: str | None = None
    """Container image with gptsmith (required)."""
    namespace: str | None = None
    """Namespace (default: the current one)."""
    gpus: bool = True
    """Give each process a GPU."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource name of the cluster's accelerators."""
    cpus: str | None = None
    """CPU cores of each pod."""
    memory: str | None = None
    """Memory of each pod: 512Gi."""
    shared_memory: str | None = None
    """Size of /dev/shm (default: as much as the pod has)."""
    claim: str | None = None
    """Persistent volume claim with the data and the runs; the run needs it to be continued."""
    mount: str = "/data"
    """Where the claim is mounted; the command is run there."""
    node_selector: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Label that the machines must have."""


KINDS: dict[str, type] = {"torchrun": Torchrun, "slurm": Slurm, "sky": Sky, "k8s": Kubernetes}


class Checked(NamedTuple):
    """A training command that the parser has accepted."""

    command: tuple[str, ...]
    """With its run directory."""
    run_directory: str
    note: str | None = None


def main(arguments: list[str]) -> int:
    options, command = _split(arguments)
    chosen: Options = parse_subcommand(
        KINDS,
        "gptsmith launch",
        options,
        f"Write the file that starts a run on several machines. Nothing is submitted. {EXAMPLE}",
    )
    from gptsmith.distributed.launch_files import Job, seconds_of

    if not command:
        raise UsageError(f"No command given. Write a training command after `--`: {EXAMPLE}")
    if chosen.out is not None and chosen.out.exists():
        raise UsageError(f"{chosen.out} exists. Choose another --out.")
    checked = check(command, chosen.nodes * chosen.processes, chosen.name)
    job = Job(
        name=chosen.name or job_name(checked.run_directory),
        command=checked.command,
        run_directory=checked.run_directory,
        nodes=chosen.nodes,
        processes=chosen.processes,
        restarts=chosen.restarts,
        seconds=None if chosen.time is None else seconds_of(chosen.time),
        setup=chosen.setup,
    )
    text = contents(chosen, job)
    if checked.note is not None:
        note(checked.note)
    if chosen.out is None:
        sys.stdout.write(text)
    else:
        from gptsmith.storage import write_text

        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(chosen.out, text)
        print(f"{chosen.out}: {_how_to_start(chosen, chosen.out)}")
    return 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after the first `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def check(command: Sequence[str], processes: int, name: str | None = None) -> Checked:
    """Check a training command with the parser of that command. UsageError for one that would be refused.

    processes: how many will share the run. name: of its run directory, where the command gives none.
    """
    if command[0] == "gptsmith":
        command = command[1:]
    if not command or command[0] not in TRAINING:
        first = command[0] if command else ""
        hint = nearest(first, TRAINING) if first not in COMMANDS else ""
        raise UsageError(
            f"launch starts a training command, not {first!r}.{hint} Training commands: {', '.join(TRAINING)}."
        )
    kind, *rest = command
    if option_value(rest, "--processes") is not None:
        raise UsageError(
            "leave out --processes after `--`: the launch file starts the processes. Set their number before it, with "
            "--nodes and --processes."
        )
    if kind == "classify" and option_value(rest, "--predict") is not None:
        raise UsageError("classify --predict does not train; launch starts runs.")
    from gptsmith.cli.train import parsed_only

    parsed = parsed_only(kind, rest, processes)
    _check_layout(parsed.run, processes)
    if parsed.resume is not None:
        return Checked(tuple(command), str(parsed.resume))
    if parsed.out is not None:
        return Checked(tuple(command), str(parsed.out))
    where = f"runs/{name or job_name(_data_name(parsed.data) or kind)}"
    return Checked(
        (*command, "--out", where), where, f"the run is written to {where}; a job that is started again looks there"
    )


def _check_layout(config: RunConfig, processes: int) -> None:
    """Raise UsageError where the layout cannot divide the model, as far as that is known without its tokenizer."""
    layout = config.parallel.layout(processes)
    if layout is None or (config.init.init, config.auto.depth, config.auto.budget) != (None, None, None):
        return
    unknown = layout.tp * 1000  # a vocabulary that can be divided
    layout.check(config.model.build(unknown, config.loop.context))


def _data_name(data: object) -> str:
    first = data[0] if isinstance(data, tuple) and data else data
    return Path(str(first)).stem if isinstance(first, str) else ""


def job_name(text: str) -> str:
    """Return a name for a job from that of a run directory or of data."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(text).name.lower()).strip("-")[:52].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".strip("-")


def contents(chosen: Options, job: object) -> str:
    """Return the file of the chosen kind."""
    from gptsmith.distributed import launch_files as files

    assert isinstance(job, files.Job)
    if isinstance(chosen, Torchrun):
        return files.torchrun_file(job, head=chosen.head, port=chosen.port)
    if isinstance(chosen, Slurm):
        named = {name: getattr(chosen, name) for name in ("partition", "account", "qos", "constraint")}
        resources = files.SlurmResources(
            gpus=chosen.gpus,
            cpus=chosen.cpus,
            memory=chosen.memory,
            directives={name: value for name, value in named.items() if value is not None},
            image=chosen.image,
            requeue=chosen.requeue,
        )
        return files.slurm_file(job, resources)
    if isinstance(chosen, Sky):
        return files.sky_file(
            job,
            files.SkyResources(
                accelerator=None if chosen.accelerator.lower() == "none" else chosen.accelerator,
                cpus=chosen.cpus,
                memory=chosen.memory,
                infra=chosen.infra,
                spot=chosen.spot,
                image=chosen.image,
                disk_gigabytes=chosen.disk,
                workdir=chosen.workdir,
                bucket=chosen.bucket,
            ),
        )
    assert isinstance(chosen, Kubernetes)
    if chosen.image is None:
        raise UsageError("--image is missing: a container image with gptsmith.")
    selector = {}
    for each in chosen.node_selector:
        key, equals, value = each.partition("=")
        if not (key and equals):
            raise UsageError(f"--node-selector {each}: write KEY=VALUE.")
        selector[key] = value
    return files.kubernetes_file(
        job,
        files.KubernetesResources(
            image=chosen.image,
            gpus=chosen.gpus,
            gpu_resource=chosen.gpu_resource,
            cpus=chosen.cpus,
            memory=chosen.memory,
            shared_memory=chosen.shared_memory,
            namespace=chosen.namespace,
            claim=chosen.claim,
            mount=chosen.mount,
            node_selector=selector,
        ),
    )


def _how_to_start(chosen: Options, path: Path) -> str:
    if isinstance(chosen, Slurm):
        return f"start it with: sbatch {path}"
    if isinstance(chosen, Sky):
        return f"start it with: sky {'jobs ' if chosen.spot else ''}launch {path}"
    if isinstance(chosen, Kubernetes):
        return f"start it with: kubectl apply -f {path}"
    return f"start it on each machine with: bash {path}"

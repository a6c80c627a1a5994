"""What the processes of one run agree on: sums, flags, values; and who is there.

with join_processes() as ranks:          # made from torchrun's environment; without it, one process
    ranks.sum(gradient)                  # in place, over all processes
    if ranks.any(stop_requested): ...

Every method is a collective: all processes call it, in the same order. With one process none does anything, no process
group is made and `torch.distributed` is not imported.

Gradients go through gloo on a CPU and NCCL on CUDA GPUs; agreements always go through gloo. Beside the process group
there is a key-value store (TorchElastic's), over which processes show that they are alive, wait for long work without a
timeout, and say why they failed.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gptsmith.distributed.layout import DATA_AXES, Layout
from gptsmith.errors import GptsmithError, LostProcessError, ProcessError, UsageError
from gptsmith.log import quiet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

BUCKET_BYTES = 32 << 20  # tensors that are summed in one message; copies of so many bytes are made
BEAT_SECONDS = 0.5  # between signs of life
SILENT_SECONDS = 4.0  # without a sign of life, once a connection has failed: the process at fault
LONGEST_POLL = 0.05  # seconds between two looks at the store


class DistributedContext:
    """One of the processes of a run. This class is the only process; see `join_processes` for several."""

    rank = 0
    """The number of this process, from 0."""
    world_size = 1
    """How many processes there are."""
    local_world_size = 1
    """How many of them are on this machine."""
    layout = Layout()
    """How they share the model and the batches; see `arrange`."""
    mesh: Any = None
    """The processes as a `DeviceMesh`, where the layout divides the model."""
    exact = False
    """Whether sums are the same to the bit for 1, 2, 4, … processes: terms are added in a fixed order."""

    @property
    def data_rank(self) -> int:
        """Which share of a batch this process has."""
        return self.rank // self.layout.tp

    @property
    def data_size(self) -> int:
        """In how many shares a batch is divided."""
        return self.layout.data_size

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def share(self, rows: int) -> tuple[int, int]:
        """Return which rows of a batch of `rows` are this process's: [start, stop), contiguous, in order of rank."""
        return rows * self.data_rank // self.data_size, rows * (self.data_rank + 1) // self.data_size

    def arrange(self, layout: Layout, device: torch.device, *, exact: bool = False) -> None:
        """Let the processes share the model and the batches as `layout` says. Called once, before any sum."""
        self.exact = exact

    def sum(self, *tensors: Tensor, over: Sequence[str] = DATA_AXES) -> None:
        """Add up each tensor, in place, over the processes along some axes of the layout: by default over all that have
        rows of their own. Shapes and dtypes are the same on all."""

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any process."""
        return flag

    def broadcast(self, value: T) -> T:
        """Return the main process's value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order of rank."""
        return [value]

    def barrier(self) -> None:
        """Wait for all processes, however long they take, as long as they are alive."""

    def on_main(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which the main process does while the others wait, however long it takes.

        Raises ProcessError on the others if it fails.
        """
        return work()

    def main_first(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which all processes do, the main one first: to fill a cache, say."""
        return work()

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this process. UsageError if there are not enough."""
        return device

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Raise UsageError unless all processes have the same facts. facts: what it is -> its value or fingerprint."""

    def explained(self) -> contextlib.AbstractContextManager[None]:
        """Within, errors of a connection to another process become a LostProcessError that names it."""
        return contextlib.nullcontext()

    def lost_connection(self, error: BaseException) -> GptsmithError | None:
        """Return why the connection to another process failed, if that is what `error` is of."""
        return None

    def fail(self, error: BaseException) -> bool:
        """Tell the other processes that this one fails. Return whether it is the first, which tells the user."""
        return True


ALONE = DistributedContext()


def started_by_torchrun() -> bool:
    """Return whether the environment says which of several processes this is."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def restarts() -> int:
    """Return how often TorchElastic has started this process again, after one of the run had ended: mostly 0."""
    return _number("TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in os.environ else 0


def launch_name() -> str | None:
    """Return a name of the torchrun that has started this process, which stays over restarts; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    return f"{name} {os.getppid()}" if name in ("", "none") else name  # which is torchrun's default


def environment_world_size() -> int | None:
    """Return how many processes torchrun has started; None without it."""
    return _number("WORLD_SIZE") if started_by_torchrun() else None


@contextlib.contextmanager
def join_processes(timeout: float = 120.0) -> Iterator[DistributedContext]:
    """Join the processes that torchrun has started, and yield this one's context; one of a single process without it.

    timeout: seconds within which the others must be there, and within which each must answer from then on.
    Raises GptsmithError with the numbers of the processes that are missing. An error in the block stops all processes:
    the first that fails raises its error, the others ProcessError. All but the main one are quiet meanwhile.
    """
    if environment_world_size() in (None, 1):
        left = threading.Event()
        if started_by_torchrun():
            threading.Thread(target=_end_with, args=(os.getppid(), left), daemon=True).start()
        try:
            yield DistributedContext()
        finally:
            left.set()
        return
    ranks = ProcessGroup(_number("RANK"), _number("WORLD_SIZE"), timeout)
    with contextlib.ExitStack() as stack:
        if not ranks.is_main:
            stack.enter_context(quiet())
        try:
            ranks.connect()
            yield ranks
            ranks.barrier()
        except BaseException as error:
            if not ranks.fail(error) and not isinstance(error, ProcessError):
                raise ranks.failure() from error
            raise
        finally:
            ranks.close()


class ProcessGroup(DistributedContext):
    """One of several processes."""

    joined = 0  # groups that this process has been in: each has its own keys in the store

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
        self.local_world_size = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else world_size
        self.layout = Layout(dp=world_size)
        self.store: Any = None
        self.hosts_store, self.backend = False, "gloo"
        self.turn = 0
        self.first_to_fail: bool | None = None
        self.closed = threading.Event()
        ProcessGroup.joined += 1

    # -- joining and leaving -------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Find the other processes and make the process group. GptsmithError if one does not come."""
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            raise UsageError(
                "torch.distributed is in use already. Leave init_process_group to gptsmith, or end yours before with "
                "torch.distributed.destroy_process_group()."
            )
        host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.hosts_store = self.rank == 0 and not of_agent
        timeout = datetime.timedelta(seconds=self.timeout)
        began = time.monotonic()
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, None, self.hosts_store, timeout=timeout, wait_for_workers=False, multi_tenant=True
            )
        except (RuntimeError, ValueError) as error:
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                what = "another program uses this port. Choose another: torchrun --master-port"
            else:
                what = f"no answer within {self.timeout:.0f} s. Check that process 0 has started, and MASTER_ADDR"
            raise GptsmithError(f"process {self.rank} cannot connect to {host}:{port}: {what}.") from error
        prefix = f"gptsmith/{restarts()}/{self.joined}"
        self.store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        self.store.set(f"here/{self.rank}", f"{os.getpid()} {_machine()}")
        missing = list(range(self.world_size))
        while missing := [rank for rank in missing if not self.store.check([f"here/{rank}"])]:
            self._raise_failure()
            if time.monotonic() - began > self.timeout:
                raise GptsmithError(
                    f"{_processes(missing)} of {self.world_size} did not start within {self.timeout:.0f} s. "
                    "Look at what they printed, or set a longer --process-timeout."
                )
            time.sleep(LONGEST_POLL)
        threading.Thread(target=self._beat, args=(os.getppid(),), daemon=True).start()
        if torch.cuda.is_available():
            self.backend = "cpu:gloo,cuda:nccl"  # flags and objects are on the CPU, and go through gloo
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        with self.explained():
            dist.init_process_group(
                self.backend,
                store=dist.PrefixStore(prefix + "/group", store),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
            )

    def close(self) -> None:
        """Leave the group. A process that fails and keeps the store lets the others read why first."""
        import torch.distributed as dist

        if self.first_to_fail is not None and self.store is not None and self.hosts_store:
            time.sleep(1.0)
        elif self.first_to_fail is None and self.store is not None:
            self._leave_together()
        self.closed.set()
        if dist.is_initialized() and (self.first_to_fail is None or self.backend == "gloo"):  # NCCL may hang then
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def _leave_together(self) -> None:
        """Keep the store until the others have left as well: they may still be reading that all have come so far."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", b"1")
            everyone, end = [f"left/{rank}" for rank in range(self.world_size)], time.monotonic() + SILENT_SECONDS
            while self.hosts_store and time.monotonic() < end and not self.store.check(everyone):
                time.sleep(LONGEST_POLL)

    def _beat(self, parent: int) -> None:
        """Show the others that this process is alive. End it if the program that started it has ended."""
        count = 0
        while not self.closed.wait(BEAT_SECONDS):
            count += 1
            _end_without(parent)
            with contextlib.suppress(Exception):
                self.store.set(f"beat/{self.rank}", str(count))

    # -- collectives ---------------------------------------------------------------------------------------------------

    def arrange(self, layout: Layout, device: torch.device, *, exact: bool = False) -> None:
        from torch.distributed.distributed_c10d import _set_pg_timeout

        self.layout, self.exact = layout, exact
        if not layout.divides_model:
            return
        from gptsmith.distributed.parallel import group_of, make_mesh

        with self.explained():
            self.mesh = make_mesh(layout, device.type)
            axes = tuple(layout.sizes)
            subsets = [each for size in range(1, len(axes) + 1) for each in itertools.combinations(axes, size)]
            for subset in subsets:  # all now, in the same order everywhere: making one is a collective
                _set_pg_timeout(datetime.timedelta(seconds=self.timeout), group_of(self.mesh, subset))

    def _group(self, over: Sequence[str]) -> Any:
        """Return the process group along some axes; None: all processes; False: there is no other process."""
        axes = [axis for axis, size in self.layout.sizes.items() if size > 1]
        among = tuple(axis for axis in axes if axis in over)
        if not among or len(among) == len(axes):
            return None if among else False
        from gptsmith.distributed.parallel import group_of

        return group_of(self.mesh, among)

    def sum(self, *tensors: Tensor, over: Sequence[str] = DATA_AXES) -> None:
        import torch

        group = self._group(over)
        if group is False or not tensors:
            return
        with self.explained(), torch.no_grad():
            for bucket in _buckets(tensors):
                if len(bucket) == 1 and bucket[0].is_contiguous():
                    self._add_up(bucket[0], group)
                    continue
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                self._add_up(flat, group)
                parts = torch.split(flat, [tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def _add_up(self, tensor: Tensor, group: Any) -> None:
        import torch
        import torch.distributed as dist

        if not self.exact:
            dist.all_reduce(tensor, group=group)
            return
        terms = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(terms, tensor, group=group)
        while len(terms) > 1:  # the upper levels of the tree that `TrainingStep` adds up its micro-batches by
            terms = [torch.add(*pair) for pair in zip(terms[::2], terms[1::2], strict=True)]
        tensor.copy_(terms[0])

    def any(self, flag: bool) -> bool:
        import torch
        import torch.distributed as dist

        number = torch.tensor([int(flag)])
        with self.explained():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return bool(number)

    def broadcast(self, value: T) -> T:
        import torch
        import torch.distributed as dist

        values = [value]
        with self.explained():  # as bytes: a value may be of any kind
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        with self.explained():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.turn += 1
        key = f"turn/{self.turn}"
        self.store.set(f"{key}/{self.rank}", b"1")
        for rank in range(self.world_size):
            self._wait(f"{key}/{rank}", rank)

    def on_main(self, work: Callable[[], T]) -> T:
        self.turn += 1
        key = f"turn/{self.turn}/0"
        done: list[T] = []
        if self.is_main:
            done.append(work())
            self.store.set(key, b"1")
        else:
            self._wait(key, 0)
        return self.broadcast(done)[0]

    def main_first(self, work: Callable[[], T]) -> T:
        if self.is_main:
            result = work()
        self.on_main(lambda: None)
        if not self.is_main:
            result = work()
        self.barrier()
        return result

    def device(self, device: torch.device) -> torch.device:
        import torch

        if device.type == "cpu":
            return device
        if str(device) != "cuda":  # one of a number, or of another kind
            raise UsageError(
                f"--device {device}: several processes need --device cpu, or --device cuda with a GPU each."
            )
        if self.local_world_size > torch.cuda.device_count():
            raise UsageError(
                f"{self.local_world_size} processes need a GPU each, and this machine has {torch.cuda.device_count()}. "
                "Start fewer, or use --device cpu."
            )
        return torch.device("cuda", self.local_rank)

    def check_same(self, facts: Mapping[str, str]) -> None:
        everyone = self.gather(dict(facts))
        for name in everyone[0]:
            other = [rank for rank, theirs in enumerate(everyone) if theirs.get(name) != everyone[0][name]]
            if other:
                raise UsageError(
                    f"{_processes(other)} of {self.world_size} and process 0 do not have the same {name}. Start all "
                    "with the same command, the same files and the same version of gptsmith."
                )

    # -- failures ------------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> bool:
        if isinstance(error, ProcessError):
            self.first_to_fail = False
        if self.first_to_fail is None:
            self.first_to_fail = True
            code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
            failure = {
                "rank": self.rank,
                "code": code,
                "message": str(error) or type(error).__name__,
                "lost": isinstance(error, LostProcessError),
            }
            if self.store is not None:
                with contextlib.suppress(Exception):
                    first = self.store.compare_set("failure", "", json.dumps(failure))
                    self.first_to_fail = json.loads(first)["rank"] == self.rank
        return self.first_to_fail

    def failure(self) -> ProcessError:
        """Return the error of the process that failed first."""
        first = json.loads(self.store.get("failure"))
        return ProcessError(first["rank"], first["message"], first["code"], first["lost"])

    def _raise_failure(self) -> None:
        if self.store.check(["failure"]):
            raise self.failure()

    def _wait(self, key: str, rank: int) -> None:
        """Wait until process `rank` has set `key`, however long that takes while it is alive."""
        poll, silent, beat, last = 0.001, 0.0, b"", time.monotonic()
        with self.explained():
            while not self.store.check([key]):
                self._raise_failure()
                time.sleep(poll)
                poll = min(LONGEST_POLL, 1.5 * poll)
                if self._has_ended(rank) and not self.store.check([key]):
                    self._raise_failure()
                    raise LostProcessError(self._missing([rank], "ended without a message"))
                now = time.monotonic()
                silent, last = silent + min(now - last, 1.0), now  # at most a second: all may have been suspended
                if (seen := self._beat_of(rank)) != beat:
                    silent, beat = 0.0, seen
                elif silent > self.timeout:
                    raise LostProcessError(self._missing([rank], f"gives no sign of life for {self.timeout:.0f} s"))

    def _beat_of(self, rank: int) -> bytes:
        key = f"beat/{rank}"
        return bytes(self.store.get(key)) if self.store.check([key]) else b""

    def _has_ended(self, rank: int) -> bool:
        """Return whether a process of this machine has ended; False for those of others."""
        pid, _, machine = bytes(self.store.get(f"here/{rank}")).decode().partition(" ")
        return machine == _machine() and not _is_running(int(pid))

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the errors of a broken or timed-out connection into one that names the process at fault."""
        import torch.distributed as dist

        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "out of memory" in reason.lower() or "can't allocate" in reason.lower():
                raise
            raise self._explanation(reason) from error

    def lost_connection(self, error: BaseException) -> GptsmithError | None:
        import torch.distributed as dist

        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        of_backend = any(name in reason.lower() for name in ("gloo", "nccl", "connection closed by peer"))
        return self._explanation(reason) if isinstance(error, dist.DistError) or of_backend else None

    def _explanation(self, reason: str) -> GptsmithError:
        """Return why a collective failed: another process's error, or which process has ended or does not answer."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            self.store.set(f"failed/{self.turn}/{self.rank}", b"1")
            before = {rank: self._beat_of(rank) for rank in others}
            end = time.monotonic() + SILENT_SECONDS
            while time.monotonic() < end:
                ended = [rank for rank in others if self._has_ended(rank)]
                if self.store.check(["failure"]):  # what a process says before it ends
                    return self.failure()
                if ended:
                    return LostProcessError(self._missing(ended, "ended without a message"))
                time.sleep(LONGEST_POLL)
            silent = [rank for rank in others if self._beat_of(rank) == before[rank]]
            absent = [rank for rank in others if not self.store.check([f"failed/{self.turn}/{rank}"])]
        except RuntimeError:  # also the store is gone
            return LostProcessError("process 0, or the program that started it, has ended.")
        if silent:
            return LostProcessError(self._missing(silent, "gives no sign of life"))
        if absent and "timed out" in reason.lower():
            return LostProcessError(self._missing(absent, f"did not answer within {self.timeout:.0f} s"))
        return LostProcessError(f"the connection between the processes failed: {reason}")

    def _missing(self, ranks: Sequence[int], what: str) -> str:
        return (
            f"{_processes(ranks)} of {self.world_size} {what}. It may have been killed, by hand or because memory ran "
            "out; all processes stop."
        )


def seed_of_rank(seed: int, rank: int) -> int:
    """Return the seed of the random numbers that process `rank` has for itself, from one that all have."""
    mixed = (seed * 0x9E3779B97F4A7C15 + rank * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 31)) * 0x94D049BB133111EB) & (2**64 - 1)
    return mixed >> 1


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups of one dtype and device, each of about `BUCKET_BYTES`."""
    open_buckets: dict[Any, list[Tensor]] = {}
    sizes: dict[Any, int] = {}
    for tensor in tensors:
        kind, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        if sizes.get(kind, 0) + size > BUCKET_BYTES and open_buckets.get(kind):
            yield open_buckets.pop(kind)
            sizes[kind] = 0
        open_buckets.setdefault(kind, []).append(tensor)
        sizes[kind] = sizes.get(kind, 0) + size
    yield from (bucket for bucket in open_buckets.values() if bucket)


def _end_without(parent: int) -> None:
    """End this process if the program that started it has ended."""
    if os.name != "nt" and os.getppid() != parent:
        os._exit(1)  # saving is atomic: no checkpoint is lost


def _end_with(parent: int, left: threading.Event) -> None:
    while not left.wait(BEAT_SECONDS):
        _end_without(parent)


@functools.cache
def _machine() -> str:
    """Return a name for where process ids mean the same: the machine, and on Linux the namespace."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 would end it
        return True
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # not ours, or no Linux
        return True
    return state not in ("Z", "X")  # ended, and nobody has asked how


def _processes(ranks: Sequence[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _number(name: str) -> int:
    try:
        value = int(os.environ[name])
    except ValueError:
        value = -1
    if value < 0:
        raise UsageError(f"the environment variable {name} is {os.environ[name]!r}, not a number as torchrun sets it.")
    return value

"""Run a program that nobody has read, such as one that a model wrote, so that it can do no harm. Linux only.

sandbox = find_sandbox()
sandbox.run("assert 1 + 1 == 2").passed                 # True
sandbox.run("import os; os.fork()").error               # "PermissionError: [Errno 1] Operation not permitted"

Each program runs in a Python process of its own, with the standard library and nothing else. Two walls stand around it:

- It sees no file but the Python library and an empty directory, no network and no other process: it is in namespaces of
  its own (user, mount, network, process, IPC). Where these are not permitted, Landlock closes the files.
- It can make only the system calls of a list (seccomp). Not among them: new processes and threads, sockets, signals to
  others, shared memory, other programs.

Memory, processor time, file size and open files are limited, and after the time limit the process is killed together
with all that came from it. `find_sandbox` tries the protections on a program that attempts what is forbidden.

A program cannot pass by accident: it has to reach its end. One that is written to cheat can find out how that is told.
With Landlock, it can also see which files there are, but not what is in them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from gptsmith.errors import DataError, UsageError

Protection: TypeAlias = Literal["namespaces", "landlock", "seccomp"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MAX_REPORT = 4096  # bytes
_LOOK_EVERY = 0.05  # seconds
_MAX_FILES = 1000
# What is tried, the safest first. The last ones leave something open.
_COMPLETE: tuple[tuple[Protection, ...], ...] = (("namespaces", "seccomp"), ("landlock", "seccomp"))
_PARTIAL: tuple[tuple[Protection, ...], ...] = (("seccomp",), ("namespaces",), ("landlock",), ())


@dataclass(frozen=True)
class Limits:
    """What a program may use. seconds: on the clock. memory, file_size (of one file), files (all together): bytes."""

    seconds: float = 10.0
    memory: int = 1 << 30
    file_size: int = 16 << 20
    files: int = 64 << 20


@dataclass(frozen=True)
class Execution:
    """How a program ended. passed: it reached its end. error: why not, "" if it passed. seconds: how long it took."""

    passed: bool
    error: str
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs. protections: those that are in use. open: what is not contained."""

    protections: tuple[Protection, ...]
    limits: Limits = field(default_factory=Limits)
    open: str = ""

    def run(self, program: str, limits: Limits | None = None) -> Execution:
        """Run a program to its end, or until it exceeds a limit.

        Raises DataError if the sandbox itself cannot be set up.
        """
        limits = self.limits if limits is None else limits
        secret = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="gptsmith-", ignore_cleanup_errors=True) as directory:
            job = {
                "program": program,
                "secret": secret,
                "protections": self.protections,
                "directory": directory,
                "parent": os.getpid(),
                "seconds": limits.seconds,
                "memory": limits.memory,
                "file_size": limits.file_size,
                "files": limits.files,
            }
            report, code, seconds = _run(job, directory, limits, watch="namespaces" not in self.protections)
        kind, _, text = report.partition(" ")
        if kind == "setup":
            raise DataError(f"the sandbox for programs cannot be set up: {text.strip()}.")
        if kind == "passed" and secrets.compare_digest(text.strip().encode(), secret.encode()):
            return Execution(True, "", seconds)
        if kind == "failed":
            return Execution(False, text.strip().rstrip(":"), seconds)
        if kind == "killed":
            return Execution(False, text, seconds)
        return Execution(False, _ending(code), seconds)


def _run(job: dict[str, object], directory: str, limits: Limits, *, watch: bool) -> tuple[str, int, float]:
    """Run a job. Return its report ("killed …" if it was stopped), its exit status, and the seconds it took."""
    with tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(job).encode("ascii"))
        stdin.seek(0)
        read, write = os.pipe()
        try:
            begin = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-S", "-B", str(_CHILD), str(write)],
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env={"PYTHONHASHSEED": "0"},  # the same order of sets each time; the child forgets it
                pass_fds=(write,),
                start_new_session=True,
            )
            os.close(write)
            write = -1
            try:
                report = _report(read, directory, limits, begin, watch)
                if not report.startswith("killed"):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=max(0.1, begin + limits.seconds - time.monotonic()))
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.wait()
            return report, process.returncode, time.monotonic() - begin
        finally:
            os.close(read)
            if write >= 0:
                os.close(write)


def _report(read: int, directory: str, limits: Limits, begin: float, watch: bool) -> str:
    """Return what the child writes until it closes its end, or "killed …" when it exceeds a limit."""
    content = b""
    poll = select.poll()
    poll.register(read, select.POLLIN)
    while len(content) < _MAX_REPORT:
        left = begin + limits.seconds - time.monotonic()
        if left <= 0:
            return f"killed timed out after {limits.seconds:g} seconds"
        if watch and _too_much(directory, limits.files):
            return f"killed wrote more than {limits.files >> 20} MiB or {_MAX_FILES} files"
        if poll.poll(1000 * min(left, _LOOK_EVERY if watch else left) + 1):
            chunk = os.read(read, _MAX_REPORT)
            if not chunk:
                break
            content += chunk
    return content.decode("utf-8", "replace")


def _too_much(directory: str, size: int) -> bool:
    """Return whether a directory has too many files or bytes. Without namespaces there is no limit on their sum."""
    total = count = 0
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            count += 1
            total += entry.stat(follow_symlinks=False).st_blocks * 512
            if count > _MAX_FILES or total > size:
                return True
    return False


def _ending(code: int) -> str:
    """Return what an exit status tells about a program that did not report."""
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        if number > 0:
            return f"it was ended by {signal.Signals(number).name}"
    return f"it left before its end, with exit status {code}"


# Choice of protections ------------------------------------------------------------------------------------------------

# Each attempt must fail. Those after `harm` are made by the test of what an incomplete sandbox leaves open.
_ATTEMPTS = """
import os, socket
def fails(name, attempt):
    try:
        attempt()
    except (OSError, MemoryError, EOFError):
        return
    raise SystemExit(name)
def connect():
    socket.create_connection(("127.0.0.1", {port}), timeout=1).close()
def write_beside():
    open({beside!r}, "w").close()
fails("the network", connect)
fails("files of the user", lambda: open({canary!r}).close())
fails("files outside", write_beside)
fails("files outside", lambda: os.unlink({canary!r}))
fails("signals to other processes", lambda: os.kill({parent}, 0))
fails("the memory", lambda: bytearray({memory}))
fails("the environment", lambda: os.environ or open("/proc/self/environ").read(1) or open("/missing"))
def fork():
    if os.fork() == 0:
        os._exit(0)
fails("new processes", fork)
open("file", "w").write("a program may write here")
"""


@functools.cache
def find_sandbox(*, insist: bool = False) -> Sandbox:
    """Return the safest sandbox that works on this machine. Each is tried first.

    insist: accept one that leaves something open; its `open` says what.
    Raises UsageError where none works, or none that contains everything unless `insist`.
    """
    if sys.platform != "linux":
        raise UsageError(
            f"code that a model wrote can be run only on Linux, not on {sys.platform}: the sandbox needs "
            "its namespaces and seccomp. Run the evaluation in a Linux virtual machine or container."
        )
    problems = []
    for protections in _COMPLETE:
        problem = _problem(protections)
        if problem is None:
            return Sandbox(protections)
        problems.append(f"with {' and '.join(protections)}: {problem}")
    if insist:
        for protections in _PARTIAL:
            problem = _problem(protections)
            if problem is None or problem.startswith("it leaves open: "):
                return Sandbox(protections, open=(problem or "").removeprefix("it leaves open: "))
    raise UsageError(
        f"code that a model wrote cannot be contained on this machine ({'; '.join(problems)}). Run the evaluation on "
        "Linux 6.2 or newer, outside of containers that forbid Landlock and namespaces; or, where nothing can be "
        "harmed, insist with --allow-unprotected."
    )


def _problem(protections: tuple[Protection, ...]) -> str | None:
    """Return what is wrong with a set of protections on this machine, None if nothing is."""
    import socket

    with tempfile.TemporaryDirectory(prefix="gptsmith-") as directory, socket.socket() as server:
        canary = Path(directory, "canary")
        canary.write_text("a file of the user", encoding="utf-8")
        server.bind(("127.0.0.1", 0))
        server.listen()
        limits = Limits(seconds=20.0)
        program = _ATTEMPTS.format(
            port=server.getsockname()[1],
            canary=str(canary),
            beside=str(Path(directory, "beside")),
            parent=os.getpid(),
            memory=2 * limits.memory,
        )
        try:
            result = Sandbox(protections).run(program, limits)
        except DataError as error:
            return str(error).removeprefix("the sandbox for programs cannot be set up: ").rstrip(".")
    if result.passed:
        return None
    if result.error.startswith("SystemExit: "):
        return f"it leaves open: {result.error.removeprefix('SystemExit: ')}"
    return result.error

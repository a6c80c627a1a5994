"""Programs that try to do harm: each is contained, with either set of protections, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gptsmith.errors import UsageError
from gptsmith.tasks import sandbox
from gptsmith.tasks.sandbox import Execution, Limits, Protection, Sandbox, find_sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of Linux's protections")

SHORT = Limits(seconds=2.0, memory=512 << 20, file_size=1 << 20, files=4 << 20)


@pytest.fixture(params=["namespaces", "landlock"])
def box(request: pytest.FixtureRequest) -> Sandbox:
    protections: tuple[Protection, ...] = (request.param, "seccomp")
    problem = sandbox._problem(protections)
    if problem is not None:
        pytest.skip(f"{request.param} is not available on this machine: {problem}")
    return Sandbox(protections, SHORT)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user, which must not change."""
    path = tmp_path / "victim.txt"
    path.write_text("precious")
    os.chmod(path, 0o666)
    os.chmod(tmp_path, 0o777)
    return path


def _allowed(box: Sandbox, attempts: list[str]) -> list[str]:
    """Return the attempts, tried in one program, that do not fail with an OSError."""
    program = f"""
allowed = []
for attempt in {attempts!r}:
    try:
        exec(attempt, {{}})
    except OSError:
        continue
    except BaseException as error:
        attempt = f"{{attempt}}: {{error!r}}"
    allowed.append(attempt)
assert not allowed, repr(allowed)
"""
    result = box.run(program)
    return [] if result.passed else [result.error]


def _denied(result: Execution) -> bool:
    return not result.passed and result.error.startswith(
        ("PermissionError", "FileNotFoundError", "OSError", "BlockingIOError", "RuntimeError: can't start new thread")
    )


def test_programs_that_end_and_that_fail(box: Sandbox) -> None:
    assert box.run("assert 1 + 1 == 2").passed
    assert box.run("import math, re, collections, datetime, json, heapq, random\nassert math.sqrt(4) == 2").passed
    assert box.run("assert 1 + 1 == 3, 'wrong sum'").error == "AssertionError: wrong sum"
    assert box.run("def f(:").error.startswith("SyntaxError")
    assert box.run("f\0").error.startswith(("SyntaxError", "ValueError"))
    assert box.run("x = '\udc80'").error.startswith("UnicodeEncodeError")
    assert box.run("if __name__ == '__main__': raise KeyError('seen')").error == "KeyError: 'seen'"
    assert box.run("input()").error.startswith("EOFError")
    assert box.run(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\n"
        "import typing; assert typing.get_type_hints(A) == {'x': int}"
    ).passed


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os\nfor fd in range(256):\n    try: os.write(fd, b'passed \\n')\n    except OSError: pass\nos._exit(0)",
        "import os\nfor fd in range(256):\n    try: os.write(fd, b'passed 0' * 4096)\n    except OSError: pass",
        "import os; os.closerange(0, 256)",
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    ],
)
def test_a_program_cannot_pass_without_reaching_its_end(box: Sandbox, program: str) -> None:
    result = box.run(program)
    assert not result.passed
    assert result.error


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ntime.sleep(60)",
        "while True: print('x' * 1000)",
        "10 ** 10 ** 10",
    ],
)
def test_time(box: Sandbox, program: str) -> None:
    begin = time.monotonic()
    result = box.run(program, Limits(seconds=0.7))
    assert not result.passed
    assert result.error == "timed out after 0.7 seconds"
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "program",
    [
        "bytearray(1 << 40)",
        "x = bytearray(1 << 30)",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "x = 'a'\nwhile True: x += x",
        "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(100)]",
        "x = [0] * (1 << 36)",
    ],
)
def test_memory(box: Sandbox, program: str) -> None:
    result = box.run(program, Limits(seconds=30.0, memory=512 << 20))
    assert result.error.startswith(("MemoryError", "OSError: [Errno 12]"))


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import os; os.forkpty()",
        "import subprocess; subprocess.run(['/bin/sh', '-c', ':(){ :|:& };:'])",
        "import os; os.execv('/bin/sh', ['sh', '-c', 'exit 0'])",
        "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'exit 0'], {})",
        "import threading\nwhile True: threading.Thread(target=print).start()",
        "import os; assert os.system('true') == 0, 'no shell'\nraise OSError",
        "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print); p.start()",
    ],
)
def test_processes(box: Sandbox, program: str) -> None:
    result = box.run(program)
    assert _denied(result) or result.error == "AssertionError: no shell", result


def test_files_outside(box: Sandbox, victim: Path, tmp_path: Path) -> None:
    attempts = [
        f"open({str(victim)!r}).read()",
        f"open({str(victim)!r}, 'w')",
        f"open({str(victim)!r}, 'a')",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"import os; os.open({str(victim)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, 'mine')",
        f"import os; os.chmod({str(victim)!r}, 0)",
        f"import os; os.chown({str(victim)!r}, 0, 0)",
        f"import os; os.utime({str(victim)!r}, (0, 0))",
        f"import os; os.setxattr({str(victim)!r}, 'user.x', b'x')",
        f"import os; os.link({str(victim)!r}, 'mine'); open('mine', 'w')",
        f"import os; os.symlink({str(victim)!r}, 'mine'); open('mine', 'w')",
        f"open('{tmp_path}/new', 'w')",
        f"import os; os.mkdir('{tmp_path}/new')",
        f"import os; os.mkfifo('{tmp_path}/new')",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import os; os.listdir({os.path.expanduser('~')!r}); open({os.path.expanduser('~/.gptsmith-new')!r}, 'w')",
        "open('../gptsmith-new', 'w')",
        "open('/dev/shm/new', 'w')",
        "open('/var/tmp/new', 'w')",
        "open('/etc/passwd').read()",
        "open('/proc/1/environ').read()",
        f"open('/proc/{os.getpid()}/environ').read()",
        "open('/proc/self/mem', 'wb')",
        "import os; os.chroot('/')",
        "import ctypes; n = ctypes.CDLL(None, use_errno=True).mount(b'none', b'/tmp', b'tmpfs', 0, None)\n"
        "if n: raise PermissionError",
        "import sys, os; open(os.path.join(os.path.dirname(os.__file__), 'new.py'), 'w')",
    ]
    assert not _allowed(box, attempts)
    assert victim.read_text() == "precious"
    assert os.stat(victim).st_mode & 0o777 == 0o666
    assert [path.name for path in tmp_path.iterdir()] == ["victim.txt"]


def test_files_inside(box: Sandbox) -> None:
    assert box.run("open('a', 'w').write('text'); assert open('a').read() == 'text'").passed
    assert box.run("import tempfile; tempfile.NamedTemporaryFile().write(b'text')").passed
    assert not box.run("open('a').read()").passed  # nothing is left of the program before
    too_large = box.run("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 16))")
    assert too_large.error.startswith(("OSError: [Errno 27]", "it was ended by SIGXFSZ"))
    many = "import time\nfor i in range(40):\n    open(f'{i}', 'wb').write(bytes(1 << 19))\ntime.sleep(1)"
    assert box.run(many).error.startswith(("OSError: [Errno 28]", "wrote more than 4 MiB"))
    small = "import time\nfor i in range(5000): open(f'{i}', 'wb').close()\ntime.sleep(1)"
    assert box.run(small).error.startswith(("OSError: [Errno 28]", "wrote more than 4 MiB or 1000 files"))
    assert box.run("x = [open('a', 'w') for _ in range(1000)]").error.startswith("OSError: [Errno 24]")


def test_network(box: Sandbox) -> None:
    with socket.socket() as server, socket.socket(type=socket.SOCK_DGRAM) as receiver:
        server.bind(("127.0.0.1", 0))
        server.listen()
        receiver.bind(("127.0.0.1", 0))
        attempts = [
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))",
            f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {receiver.getsockname()[1]}))",
            "socket.socket(socket.AF_UNIX).connect('/dev/log')",
            "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
            "socket.socket().bind(('127.0.0.1', 0))",
            "socket.getaddrinfo('example.org', 80)",
        ]
        assert not _allowed(box, [f"import socket; {attempt}" for attempt in attempts])
        server.setblocking(False)
        receiver.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        with pytest.raises(BlockingIOError):
            receiver.recv(1)


def test_environment(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTSMITH_SECRET", "hunter2")
    assert box.run("import os; assert not os.environ and os.getenv('GPTSMITH_SECRET') is None").passed
    read = "import ctypes; e = ctypes.CDLL(None).getenv; e.restype = ctypes.c_char_p; assert not e(b'GPTSMITH_SECRET')"
    assert box.run(read).passed
    assert box.run(
        "import sys; assert 'site-packages' not in ' '.join(sys.path); assert not sys.modules.get('gptsmith')"
    ).passed
    assert _denied(box.run("open('/proc/self/environ').read(1) or open('/missing')"))


def test_signals(box: Sandbox) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for target in (os.getpid(), other.pid):
            assert box.run(
                "import os\nfor n in (0, 9, 15):\n"
                f"    try: os.kill({target}, n)\n    except OSError: continue\n    raise SystemExit(n)"
            ).passed
        attempts = [
            "os.kill(os.getppid(), 9)",
            "os.kill(0, 9)",
            "os.kill(-1, 9)",
            "os.killpg(os.getpgid(0), 9)",
            f"os.pidfd_open({other.pid})",
            f"os.setpriority(os.PRIO_PROCESS, {other.pid}, 19)",
            f"os.sched_setaffinity({other.pid}, {{0}})",
            f"import resource; resource.prlimit({other.pid}, resource.RLIMIT_CPU, (1, 1))",
            f"import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {other.pid})",
            f"import ctypes; libc = ctypes.CDLL(None)\nif libc.ptrace(16, {other.pid}, 0, 0): raise PermissionError",
            "import ctypes; libc = ctypes.CDLL(None)\nif libc.shmget(0, 4096, 0o1600) < 0: raise PermissionError",
            "import ctypes; libc = ctypes.CDLL(None)\n"  # io_uring_setup
            "if libc.syscall(425, 1, ctypes.create_string_buffer(200)) < 0: raise PermissionError",
            "os.setsid()",
        ]
        assert not _allowed(box, [f"import os; {attempt}" for attempt in attempts])
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def _processes() -> set[int]:
    """Return the processes of sandboxes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sandbox_child.py" in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            pass
    return found


def test_nothing_is_left_running(box: Sandbox) -> None:
    before = _processes()
    box.run("import time; time.sleep(60)", Limits(seconds=0.3))
    box.run("1 / 0")
    assert not _processes() - before


def test_the_program_dies_with_the_evaluation(box: Sandbox, tmp_path: Path) -> None:
    before = _processes()
    script = (
        "from gptsmith.tasks.sandbox import Limits, Sandbox\n"
        f"Sandbox({box.protections!r}, Limits(seconds=60)).run('import time; time.sleep(60)')"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 20
    while not (started := _processes() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert started
    while _processes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _processes() - before


def test_the_same_each_time(box: Sandbox) -> None:
    errors = {box.run("raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f'}))").error for _ in range(4)}
    assert len(errors) == 1


def test_side_by_side(box: Sandbox) -> None:
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(box.run, [f"assert {i} % 2 == 0" for i in range(6)]))
    assert [result.passed for result in results] == [True, False] * 3


def test_a_sandbox_is_found_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find_sandbox.cache_clear()
    found = find_sandbox()
    assert "seccomp" in found.protections
    assert not found.open
    find_sandbox.cache_clear()
    monkeypatch.setattr(sandbox, "_COMPLETE", (("namespaces", "seccomp"),))
    monkeypatch.setattr(sandbox, "_problem", lambda protections: "it leaves open: files of the user")
    with pytest.raises(UsageError, match="cannot be contained on this machine .*files of the user"):
        find_sandbox()
    insisted = find_sandbox(insist=True)
    assert insisted.open == "files of the user"
    find_sandbox.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    for insist in (False, True):
        with pytest.raises(UsageError, match="only on Linux, not on darwin"):
            find_sandbox(insist=insist)


def test_what_an_incomplete_sandbox_leaves_open_is_noticed() -> None:
    problem = sandbox._problem(())
    assert problem is not None
    assert problem.startswith("it leaves open: ")

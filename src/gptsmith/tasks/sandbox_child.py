"""What runs inside the sandbox: a script of its own, started as `python -P -S sandbox_child.py FD < job.json`.

It gives up all that a program must not have, runs the program, and writes one line to the file descriptor FD:
`setup …` if a protection could not be had, `passed` and a secret word if the program reached its end, or `failed` and
its error. It imports nothing of gptsmith, so that it starts fast. See `gptsmith.tasks.sandbox`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_NOBODY = 65534

_CLONE_NEWNS, _CLONE_NEWCGROUP, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_NAMESPACES = _CLONE_NEWNS | _CLONE_NEWCGROUP | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_MOUNT_SETATTR = 442  # system calls from 424 on have one number on all architectures
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_FIRST_COMMON_SYSCALL = 424

# The system calls that a program may make: name, number on x86_64, number on aarch64. All others fail. There is no way
# to make a process or a thread, a socket, or shared memory, and none to change another process or the mounts.
_SYSCALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
open 2 -, openat 257 56, close 3 57, close_range 436 436, creat 85 -, stat 4 -, fstat 5 80, lstat 6 -,
newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, lseek 8 62, access 21 -, faccessat 269 48,
faccessat2 439 439, mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigsuspend 130 133, rt_sigpending 127 136,
rt_sigtimedwait 128 137, sigaltstack 131 132, pause 34 -, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2
293 59, getcwd 79 17, chdir 80 49, fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat
263 35, rename 82 -, renameat 264 38, renameat2 316 276, truncate 76 45, ftruncate 77 46, fsync 74 82, fdatasync
75 83, getdents64 217 61, readlink 89 -, readlinkat 267 78, umask 95 166, getpid 39 172, getppid 110 173, gettid
186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148,
getresgid 120 150, getpgrp 111 -, getpgid 121 155, getsid 124 156, uname 63 160, sysinfo 99 179, times 100 153,
getrusage 98 165, getrlimit 97 163, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, nanosleep 35 101, time 201 -, setitimer 38 103, getitimer 36 102, alarm 37 -, futex 202
98, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96, rseq 334 293, arch_prctl 158 -,
sched_yield 24 124, sched_getaffinity 204 123, getrandom 318 278, membarrier 324 283, restart_syscall 219 128,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, eventfd2 290 19, exit 60 93, exit_group 231 94, ioctl 16
29, fcntl 72 25, kill 62 129, tkill 200 130, tgkill 234 131, prlimit64 302 261
"""
# These may be made only with one of some values of one argument: name: (index of the argument, values).
_LIMITED: dict[str, tuple[int, tuple[int, ...]]] = {
    "ioctl": (1, (0x5401, 0x5413, 0x5421, 0x5451)),  # TCGETS, TIOCGWINSZ, FIONBIO, FIOCLEX: isatty and the like
    "fcntl": (1, (0, 1, 2, 3, 4, 1030)),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
    "prlimit64": (0, (0,)),  # of this process
    "kill": (0, (-1,)),  # -1 stands for this process
    "tkill": (0, (-1,)),
    "tgkill": (0, (-1,)),
}
_AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


class SetupError(Exception):
    """A protection that could not be had."""


_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(number: int, *arguments: Any) -> int:
    """Make a system call. Integers are passed as long, so that 64-bit values are kept."""
    converted = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return int(_libc.syscall(ctypes.c_long(number), *converted))


# Namespaces -----------------------------------------------------------------------------------------------------------


def enter_namespaces(directory: str, files: int) -> bool:
    """Enter namespaces of its own, with a file system that has the Python library and an empty /tmp of `files` bytes.

    In them there is no network, no process but its own, and no file of the user. Return whether this process is still
    the real root, and so has to become nobody. Its children are the first to be in the new process namespace.
    """
    user, group = os.geteuid(), os.getegid()
    real_root = user == 0 and _libc.unshare(_NAMESPACES) == 0
    if not real_root:
        _check(_libc.unshare(_NAMESPACES | _CLONE_NEWUSER), "unshare")
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{_NOBODY} {user} 1"),
            ("gid_map", f"{_NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    os.umask(0o022)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", directory, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in _readable():
        target = directory + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "w"):
                pass
        _mount(path, target, None, _MS_BIND | _MS_REC)
    os.makedirs(f"{directory}/tmp", exist_ok=True)
    _make_readonly(directory)
    options = f"size={files},nr_inodes=1024,mode=1777"
    _mount("tmpfs", f"{directory}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    os.chdir(directory)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/tmp")
    return real_root


def _readable() -> list[str]:
    """Return what a program may read: the Python library, the system's, and a few devices. None is inside another."""
    wanted = [*sys.path, *_LIBRARIES, f"{sys.base_prefix}/lib", *_DEVICES]
    found: list[str] = []
    for path in sorted({os.path.abspath(path) for path in wanted if os.path.exists(path)}, key=len):
        if not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    _check(result, f"mount {target}")


def _make_readonly(path: str) -> None:
    """Make a mount and all below it read-only."""
    attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)  # MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID
    at_fdcwd, at_recursive = -100, 0x8000
    _check(
        _syscall(_MOUNT_SETATTR, at_fdcwd, path.encode(), at_recursive, attributes, len(attributes)), "mount_setattr"
    )


def run_as_first_process(work: Callable[[], None]) -> int:
    """Run `work` in a child of the first process of the new namespace, and return its exit status.

    When the first process ends, the kernel kills all that are left in the namespace.
    """
    first = os.fork()
    if first:
        return _status(first)
    die_with_parent()
    worker = os.fork()
    if not worker:
        work()
        os._exit(0)
    os._exit(_status(worker))


def _status(process: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code if code >= 0 else 128 - code


def die_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


# Privileges, limits, files, system calls ------------------------------------------------------------------------------


def drop_privileges(real_root: bool) -> None:
    """Give up all capabilities, and the user's name if it is root."""
    if real_root:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, none), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def limit_resources(seconds: float, memory: int, file_size: int) -> None:
    cpu = int(seconds) + 2  # a second line of defence: the parent kills the process after `seconds`
    limits = {
        "AS": memory,
        "CPU": cpu,
        "FSIZE": file_size,
        "NOFILE": 64,
        "NPROC": 0,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def restrict_files(directory: str) -> None:
    """Allow to read the Python library and to use files in `directory`, and nothing else (Landlock)."""
    version = _syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 3:  # earlier ones let anyone empty a file
        raise SetupError("Landlock: not in this kernel, or not new enough (Linux 6.2)")
    write_file, read_file, read_dir, remove_file, make_reg, truncate = (1 << i for i in (1, 2, 3, 5, 8, 14))
    handled = struct.pack("Q", (1 << 15) - 1)
    ruleset = _check(_syscall(_LANDLOCK_CREATE_RULESET, handled, len(handled), 0), "Landlock")
    allowed = {path: read_file | (read_dir if os.path.isdir(path) else 0) for path in _readable()}
    allowed["/dev/null"] = read_file | write_file
    allowed[directory] = read_file | write_file | read_dir | remove_file | make_reg | truncate
    for path, access in allowed.items():
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access, fd)
        _check(_syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), "Landlock")
        os.close(fd)
    _check(_syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def restrict_syscalls() -> None:
    """Allow the system calls of the table, for good (seccomp)."""
    machine = os.uname().machine
    if machine not in _AUDIT_ARCHITECTURES or sys.maxsize < 1 << 32:
        raise SetupError(f"seccomp: the system calls of {machine} are not known here")
    column = 1 if machine == "x86_64" else 2
    load, jump_equal, jump_at_least, give = 0x20, 0x15, 0x35, 0x06  # BPF: ld [k], jeq k, jge k, ret k
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    eperm, enosys = 1, 38
    code = [
        (load, 0, 0, 4),  # the architecture
        (jump_equal, 1, 0, _AUDIT_ARCHITECTURES[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the system call
    ]
    if machine == "x86_64":
        code += [(jump_at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 calls
    for entry in _SYSCALLS.replace("\n", " ").split(","):
        fields = entry.split()
        if fields[column] == "-":
            continue
        number = int(fields[column])
        if fields[0] not in _LIMITED:
            code += [(jump_equal, 0, 1, number), (give, 0, 0, allow)]
            continue
        index, values = _LIMITED[fields[0]]
        code += [(jump_equal, 0, 2 * len(values) + 2, number), (load, 0, 0, 16 + 8 * index)]
        for value in values:
            code += [(jump_equal, 0, 1, os.getpid() if value == -1 else value), (give, 0, 0, allow)]
        code.append((give, 0, 0, error | eperm))
    # Libraries that meet an unknown system call take another way. Of an old one they expect that it is there.
    code += [(jump_at_least, 0, 1, _FIRST_COMMON_SYSCALL), (give, 0, 0, error | enosys), (give, 0, 0, error | eperm)]

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    program = Program(len(code), b"".join(struct.pack("HBBI", *each) for each in code))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


# The program ----------------------------------------------------------------------------------------------------------


def run_program(program: str, secret: str, output: int) -> None:
    """Run a program as `__main__`, and write to the file descriptor `output` how it ended."""
    write, exit = os.write, os._exit
    passed = f"passed {secret}\n".encode()
    os.environ.clear()
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [""]
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
        result = passed
    except BaseException as error:
        name = type(error).__name__
        try:
            text = " ".join(str(error).split())[:500]
        except BaseException:
            text = ""
        result = f"failed {name}: {text}\n".encode("utf-8", "replace")
    with contextlib.suppress(OSError):
        write(output, result)
    exit(0)


def main() -> None:
    output = int(sys.argv[1])
    job = json.load(sys.stdin)
    die_with_parent()
    if os.getppid() != job["parent"]:  # it ended before it could be told to take this process with it
        os._exit(1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    protections, directory = job["protections"], job["directory"]

    def protect(real_root: bool) -> None:
        die_with_parent()
        limit_resources(job["seconds"], job["memory"], job["file_size"])
        drop_privileges(real_root)
        if "landlock" in protections:
            restrict_files(directory)
        if "seccomp" in protections:
            restrict_syscalls()

    def work(real_root: bool) -> None:
        try:
            protect(real_root)
        except (SetupError, OSError, ValueError) as error:
            os.write(output, f"setup {error}\n".encode())
            os._exit(1)
        run_program(job["program"], job["secret"], output)

    try:
        if "namespaces" in protections:
            real_root = enter_namespaces(directory, job["files"])
            die_with_parent()  # new credentials cancelled the first call
            os._exit(run_as_first_process(lambda: work(real_root)))
        os.chdir(directory)
        work(False)
    except (SetupError, OSError) as error:
        os.write(output, f"setup {error}\n".encode())
        os._exit(1)


if __name__ == "__main__":
    main()

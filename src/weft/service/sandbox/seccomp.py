"""Seccomp: the kernel refuses calls of a process by their numbers, with "not permitted".

    install()                               # for all threads; raises OSError
    filtered(pid)                           # the filter as bytes, to look at

The list names what a worker has no reason to do: new sockets, new programs, new processes, looking
into other processes or ending them, and everything that runs a machine. It is a list of refusals,
not of permissions: PyTorch, drivers and SQLite may use whatever else they like, and a kernel's new
call is open until it is listed. Sockets and files that are open stay usable.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from .kernel import call, give_up_new_rights, machine, numbers

REFUSED: dict[str, tuple[str, ...]] = {
    "new sockets": ("socket", "connect", "bind", "listen", "accept", "accept4"),
    "new programs": ("execve", "execveat", "uselib"),
    "new processes": ("fork", "vfork"),
    "other processes": (
        *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp"),
        *("process_mrelease", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "tkill"),
        *("rt_sigqueueinfo", "rt_tgsigqueueinfo"),
    ),
    "other rights": (
        *("setuid", "setgid", "setreuid", "setregid", "setgroups", "setresuid", "setresgid"),
        *("setfsuid", "setfsgid", "capset", "unshare", "setns"),
    ),
    "file systems": (
        *("mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen"),
        *("fsconfig", "fsmount", "fspick", "mount_setattr", "quotactl", "quotactl_fd"),
        *("name_to_handle_at", "open_by_handle_at", "fanotify_init", "lookup_dcookie"),
    ),
    "keys": ("add_key", "request_key", "keyctl"),
    "the kernel's own machines": (
        *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter"),
        *("io_uring_register", "personality", "modify_ldt"),
    ),
    "the computer": (
        *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"),
        *("reboot", "swapon", "swapoff", "acct", "syslog", "vhangup", "iopl", "ioperm"),
        *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex"),
        *("sethostname", "setdomainname"),
    ),
}
"""Calls that are always refused, by what they are for. `fork` by way of `clone` is, too."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _ARGS = 0, 4, 16
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_CLONE_THREAD = 0x10000
_X32 = 0x40000000
_TYPE, _CONSOLE = 0x5412, 0x541C
"""`ioctl`s that type for whoever sits at the terminal, or paste there."""
_SET_FILTER, _ALL_THREADS = 1, 1

Step = tuple[int, int, int, int]  # code, steps over if so, steps over if not, number


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def available() -> bool:
    """Whether this kernel takes filters, and its numbers are known."""
    if machine() is None:
        return False
    try:
        # No filter is at address 0: a kernel that knows the call says so.
        call("seccomp", _SET_FILTER, _ALL_THREADS, None)
    except OSError as error:
        return error.errno == errno.EFAULT
    return False


def install() -> None:
    """Filters the calls of all threads of this process, for good. Raises OSError."""
    give_up_new_rights()
    steps = filtered(os.getpid())
    program = _Program(len(steps) // 8, steps)
    stuck = call("seccomp", _SET_FILTER, _ALL_THREADS, program)
    if stuck:
        raise OSError(errno.EBUSY, f"thread {stuck} has filters of its own")


def filtered(pid: int) -> bytes:
    """The filter for a process with this number, as the kernel takes it."""
    found, number_of = machine(), numbers()
    assert found is not None
    refused = _ERROR | errno.EPERM
    steps: list[Step] = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, found),  # calls of another machine have other numbers
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),  # so do those of the other x86-64
        (_RETURN, 0, 0, refused),
    ]
    for name in (name for names in REFUSED.values() for name in names if name in number_of):
        steps += [(_EQUAL, 0, 1, number_of[name]), (_RETURN, 0, 0, refused)]
    # glibc asks for threads in the old way where the new one is not there, whose arguments lie in
    # memory, where no filter sees them.
    steps += [(_EQUAL, 0, 1, number_of["clone3"]), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    steps += _unless(number_of["clone"], 0, [(_ANY_BIT, _CLONE_THREAD)], refused)
    for name in ("kill", "tgkill"):
        steps += _unless(number_of[name], 0, [(_EQUAL, pid)], refused)
    steps += _unless(number_of["prlimit64"], 0, [(_EQUAL, 0), (_EQUAL, pid)], refused)
    steps += _if(number_of["ioctl"], 1, [(_EQUAL, _TYPE), (_EQUAL, _CONSOLE)], refused)
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join([struct.pack("=HBBI", *step) for step in steps])


def _unless(call: int, arg: int, tests: list[tuple[int, int]], refused: int) -> list[Step]:
    """Refuses a call unless one of these holds for the lower half of an argument."""
    last = [(_RETURN, 0, 0, refused), (_RETURN, 0, 0, _ALLOW)]
    left = range(len(tests), 0, -1)
    body: list[Step] = [
        (_LOAD, 0, 0, _ARGS + 8 * arg),
        *[(code, n, 0, value) for n, (code, value) in zip(left, tests, strict=True)],
        *last,
    ]
    return [(_EQUAL, 0, len(body), call), *body]


def _if(call: int, arg: int, tests: list[tuple[int, int]], refused: int) -> list[Step]:
    """Refuses a call if one of these holds for the lower half of an argument."""
    last = [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, refused)]
    left = range(len(tests), 0, -1)
    body: list[Step] = [
        (_LOAD, 0, 0, _ARGS + 8 * arg),
        *[(code, n, 0, value) for n, (code, value) in zip(left, tests, strict=True)],
        *last,
    ]
    return [(_EQUAL, 0, len(body), call), *body]

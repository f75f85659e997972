"""The kernel, called by number: what Python's library has no function for. Linux only.

    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)     # raises OSError

Numbers are those of x86-64 and of the table that newer machines share (aarch64, riscv64); any other
machine has no entry here and is said to have neither Landlock nor seccomp.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from pathlib import Path

PR_SET_NO_NEW_PRIVS = 38

_X86 = """
    socket=41 connect=42 accept=43 bind=49 listen=50 clone=56 fork=57 vfork=58 execve=59 kill=62
    ioctl=16 ptrace=101 syslog=103 setuid=105 setgid=106 setreuid=113 setregid=114 setgroups=116
    setresuid=117 setresgid=119 setfsuid=122 setfsgid=123 capset=126 rt_sigqueueinfo=129
    uselib=134 personality=135 vhangup=153 modify_ldt=154 pivot_root=155 prctl=157 adjtimex=159
    chroot=161 acct=163 settimeofday=164 mount=165 umount2=166 swapon=167 swapoff=168 reboot=169
    sethostname=170 setdomainname=171 iopl=172 ioperm=173 init_module=175 delete_module=176
    quotactl=179 tkill=200 lookup_dcookie=212 clock_settime=227 tgkill=234 kexec_load=246
    add_key=248 request_key=249 keyctl=250 unshare=272 accept4=288 rt_tgsigqueueinfo=297
    perf_event_open=298 fanotify_init=300 prlimit64=302 name_to_handle_at=303
    open_by_handle_at=304 clock_adjtime=305 setns=308 process_vm_readv=310 process_vm_writev=311
    kcmp=312 finit_module=313 seccomp=317 kexec_file_load=320 bpf=321 execveat=322
    userfaultfd=323
"""
_SHARED = """
    socket=198 connect=203 accept=202 bind=200 listen=201 clone=220 execve=221 kill=129 ioctl=29
    ptrace=117 syslog=116 setuid=146 setgid=144 setreuid=145 setregid=143 setgroups=159
    setresuid=147 setresgid=149 setfsuid=151 setfsgid=152 capset=91 rt_sigqueueinfo=138
    personality=92 vhangup=58 pivot_root=41 prctl=167 adjtimex=171 chroot=51 acct=89
    settimeofday=170 mount=40 umount2=39 swapon=224 swapoff=225 reboot=142 sethostname=161
    setdomainname=162 init_module=105 delete_module=106 quotactl=60 tkill=130 lookup_dcookie=18
    clock_settime=112 tgkill=131 kexec_load=104 add_key=217 request_key=218 keyctl=219
    unshare=97 accept4=242 rt_tgsigqueueinfo=240 perf_event_open=241 fanotify_init=262
    prlimit64=261 name_to_handle_at=264 open_by_handle_at=265 clock_adjtime=266 setns=268
    process_vm_readv=270 process_vm_writev=271 kcmp=272 finit_module=273 seccomp=277
    kexec_file_load=294 bpf=280 execveat=281 userfaultfd=282
"""
_EVERYWHERE = """
    pidfd_send_signal=424 io_uring_setup=425 io_uring_enter=426 io_uring_register=427
    open_tree=428 move_mount=429 fsopen=430 fsconfig=431 fsmount=432 fspick=433 pidfd_open=434
    clone3=435 pidfd_getfd=438 process_madvise=440 mount_setattr=442 quotactl_fd=443
    landlock_create_ruleset=444 landlock_add_rule=445 landlock_restrict_self=446
    process_mrelease=448
"""
"""Calls that came after all machines agreed on one table."""

_MACHINES = {"x86_64": (0xC000003E, _X86), "aarch64": (0xC00000B7, _SHARED)}
"""What the kernel calls a machine in a filter's data, and its table."""


def machine() -> int | None:
    """The kernel's word for this machine (`AUDIT_ARCH_...`). None where no number is known."""
    found = _MACHINES.get(platform.machine()) if sys.platform == "linux" else None
    if found is None or sys.maxsize < 2**32:
        return None
    return found[0]


def numbers() -> dict[str, int]:
    """The numbers of this machine's calls, by name; empty where none is known."""
    if machine() is None:
        return {}
    pairs = [word.split("=") for word in (_MACHINES[platform.machine()][1] + _EVERYWHERE).split()]
    return {name: int(number) for name, number in pairs}


def call(name: str, *args: int | ctypes.Array | ctypes.Structure | bytes | None) -> int:
    """Makes a system call. Raises OSError, also where this machine has no number for it."""
    number = numbers().get(name)
    if number is None:
        raise OSError(38, f"no number is known for {name} on this machine")
    # Each goes as a whole register: what is passed as a C int leaves its upper half undefined.
    sent = [_register(arg) for arg in args]
    result = _library().syscall(ctypes.c_long(number), *sent)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def _register(arg: int | ctypes.Array | ctypes.Structure | bytes | None) -> object:
    if isinstance(arg, int):
        return ctypes.c_long(arg)
    if arg is None or isinstance(arg, bytes):
        return ctypes.c_char_p(arg)
    return ctypes.byref(arg)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def give_up_new_rights() -> None:
    """No program that is started from here gains rights by its file; both others ask for this."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def give_up_capabilities() -> None:
    """Of what makes root more than others this thread keeps what files need, whoever owns them.

    Somebody else's memory and environment are then out of reach for root, too.
    """
    kept = sum(1 << one for one in _FILE_CAPABILITIES)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    held = _held()
    low = struct.pack("=III", held & kept, held & kept, 0)
    call("capset", header, low + bytes(12))


_FILE_CAPABILITIES = (1, 2, 3)  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
_CAPABILITY_VERSION = 0x20080522


def _held() -> int:
    """The capabilities that this thread may use, as bits."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def threads() -> int:
    """How many threads this process has. 1 where nobody says."""
    try:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208
    except OSError:
        return 1

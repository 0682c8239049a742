"""What namespaces leave open, closed by the system call: kernel keys, memory past its limit, new namespaces.

Keys belong to a user and a session, not to a namespace. Memory of System V and of memfd is in no process's address
space, so that no limit counts it. AF_VSOCK reaches a virtual machine's host, AF_ALG works with keys; neither heeds a
network namespace. See the manual pages seccomp(2), session-keyring(7) and syscalls(2), linux/filter.h and
linux/seccomp.h; the numbers are those of asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable
from typing import NamedTuple

# name: its number on x86_64, on aarch64
FORBIDDEN = {
    **{"keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218)},
    **{"shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190)},
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447)},
    **{"unshare": (272, 97), "setns": (308, 268), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"mount": (165, 40), "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429)},
    **{"fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433)},
    **{"mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425)},
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"pidfd_getfd": (438, 438), "kcmp": (312, 272), "syslog": (103, 116)},
    **{"kexec_load": (246, 104), "kexec_file_load": (320, 294)},
    **{"init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106)},
}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16)  # 16: AF_NETLINK, for getaddrinfo
_NEW_NAMESPACES = 0x7E020000  # all CLONE_NEW* of clone(2); one more, CLONE_NEWTIME, is for clone3 and unshare alone
_X32 = 0x40000000  # the bit of x86_64's second table of numbers

# linux/bpf_common.h, linux/filter.h
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# linux/seccomp.h, linux/prctl.h, linux/keyctl.h
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER_AT, _MACHINE_AT, _ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data; both machines are little-endian
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS, _JOIN_SESSION_KEYRING = 22, 2, 38, 1

Step = tuple[int, int, int, int]
"""One instruction: code, steps to skip where a test holds, where it does not, value."""

libc = ctypes.CDLL(None, use_errno=True)


class Machine(NamedTuple):
    """A machine whose system calls are known."""

    column: int
    """Its place in the table of numbers."""
    audit: int
    """Its AUDIT_ARCH_* of linux/audit.h, which the kernel gives with each call."""


MACHINES = {"x86_64": Machine(0, 0xC000003E), "aarch64": Machine(1, 0xC00000B7)}


def lock_system_calls() -> None:
    """From here on no host's key is at hand, and the calls above are refused with EPERM, in all children too.

    Raises:
        OSError: this machine's system calls are not known, or the kernel refused the filter or the keyring.
    """
    machine = this_machine()
    join_fresh_keyring(machine)
    code = filter_of(machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)):
        if libc.prctl(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "prctl, for a seccomp filter")


def this_machine() -> Machine:
    """The machine that this process runs on.

    Raises:
        OSError: it is not one of those whose system calls are known.
    """
    name = os.uname().machine
    if name not in MACHINES or sys.maxsize < 2**32:  # a Python of 32 bits uses other numbers
        bits = sys.maxsize.bit_length() + 1
        known = " and ".join(MACHINES)
        raise OSError(errno.ENOSYS, f"no list of system calls for {name}, {bits} bits; there is one for {known}")
    return MACHINES[name]


def join_fresh_keyring(machine: Machine) -> None:
    """Leaves the session's keyring for an empty one.

    Raises:
        OSError: the kernel refused, though it has keys.
    """
    if libc.syscall(FORBIDDEN["keyctl"][machine.column], _JOIN_SESSION_KEYRING, None) >= 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.ENOSYS, errno.EPERM):  # no keys, or a container's own filter: none for the program either
        raise OSError(number, os.strerror(number), "keyctl, for an empty session keyring")


def filter_of(machine: Machine) -> bytes:
    """The filter as the kernel's BPF, 8 bytes an instruction (struct sock_filter)."""
    refuse, allow = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    no_such_call = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)  # the C library then takes clone
    argument = (_LOAD, 0, 0, _ARGUMENT_AT)
    column = machine.column
    code = [
        (_LOAD, 0, 0, _MACHINE_AT),  # first of all: in another machine's table the numbers mean other calls
        (_EQUAL, 1, 0, machine.audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        *_where(_AT_LEAST, _X32, [refuse]),
        *_where(_EQUAL, _CLONE3[column], [no_such_call]),
        *_where(_EQUAL, _CLONE[column], [argument, *_where(_ANY_BIT, _NEW_NAMESPACES, [refuse]), allow]),
        *_where(_EQUAL, _SOCKET[column], [argument, *_where_any(_FAMILIES, allow), refuse]),
        *_where_any([numbers[column] for numbers in FORBIDDEN.values()], refuse),
        allow,
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in code)


def _where(test: int, value: int, steps: list[Step]) -> list[Step]:
    """Takes `steps` where the test holds, else goes on after them."""
    return [(test, 0, len(steps), value), *steps]


def _where_any(values: Iterable[int], step: Step) -> list[Step]:
    return [each for value in values for each in _where(_EQUAL, value, [step])]

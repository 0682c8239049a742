"""Linux namespaces around this process: no network, no processes of others, a read-only root and an empty home.

The root file system is built anew, of the interpreter's own files and nothing else; only the home, held in memory and
gone with its namespace, can be written. Calls the C library, since Python 3.11 has no `unshare`, `mount` or `prctl`.
See the manual pages namespaces(7), user_namespaces(7), mount_setattr(2), pivot_root(2) and capabilities(7).
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

HOME = "/sandbox"  # hides no place where an interpreter may lie
SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/nix/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
UIDS = range(61184, 65520)  # kept free for processes of the moment (systemd's DynamicUser)

# linux/sched.h
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
# linux/mount.h
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 2, -100, 0x8000, 442, 1, 2
# linux/prctl.h, linux/capability.h
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION_3 = 1, 38, 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def enter_namespaces(root: str, home_bytes: int) -> None:
    """Takes this process, and all that it will start, out of the host's view; without privileges from here on.

    Args:
        root: an empty folder to mount on.
        home_bytes: size of the home, where it then is.

    Raises:
        OSError: naming the step that the kernel refused.
    """
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # where memory ends, this ends first
    uid, gid = os.geteuid(), os.getegid()
    root_of_host = uid == 0 and _maps_all_users()
    spaces = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    _call("unshare", spaces if root_of_host else spaces | NEWUSER)
    if not root_of_host:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"1000 {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"1000 {gid} 1", encoding="ascii")
    _build_root(Path(root), home_bytes)
    if root_of_host:  # RLIMIT_NPROC counts by user, and does not bind root
        other = random.SystemRandom().choice(UIDS)
        os.setgroups([])
        os.setresgid(other, other, other)
        os.setresuid(other, other, other)
    _drop_capabilities()
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    die_with_parent()  # a change of user forgets it


def _build_root(root: Path, home_bytes: int) -> None:
    """A new read-only `/` that holds the interpreter, its libraries, three devices and an empty HOME."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for name in dict.fromkeys([*SYSTEM_LIBRARIES, sys.base_prefix, sys.base_exec_prefix, *DEVICES]):
        source, place = Path(name), root / name.lstrip("/")
        if not source.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() and name in SYSTEM_LIBRARIES:
            place.symlink_to(source.readlink())
            continue
        if source.is_dir():
            place.mkdir(exist_ok=True)
        else:
            place.touch()
        _mount(name, place, None, MS_BIND | MS_REC)
    (root / HOME.lstrip("/")).mkdir(exist_ok=True)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    path = os.fsencode(root)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, ctypes.byref(attributes), size)
    home = f"size={home_bytes},nr_inodes=1024,mode=1777"
    _mount("tmpfs", root / HOME.lstrip("/"), "tmpfs", MS_NOSUID | MS_NODEV, home)
    os.chdir(root)
    _call("pivot_root", b".", b".")  # the old root now lies above the new one
    _call("umount2", b".", MNT_DETACH)
    os.chdir(HOME)


def die_with_parent() -> None:
    """When the process that started this one ends, however it ends, the kernel kills this one."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _maps_all_users() -> bool:
    """False for the root of a user namespace that holds one user alone."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    ranges = [tuple(map(int, line.split())) for line in lines]
    return any(inside <= UIDS[0] and UIDS[-1] < inside + count for inside, _, count in ranges)


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _call("capset", ctypes.byref(header), ctypes.byref(nothing))


def _mount(source: str | None, target: str | Path, kind: str | None, flags: int, options: str = "") -> None:
    texts = [os.fsencode(text) if text else None for text in (source, target, kind, options)]
    _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def _call(name: str, *arguments: Any) -> None:
    """A call of libc; its refusal as an OSError that names it."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        shown = [os.fsdecode(argument) for argument in arguments if isinstance(argument, bytes)]
        raise OSError(number, os.strerror(number), " ".join([name, *shown]))

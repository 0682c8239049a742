"""The process that runs a program and its tests, once it is locked in."""

from __future__ import annotations

import builtins
import errno
import json
import os
import resource
import sys
import types
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any, NoReturn

REPORT = 3  # the descriptor of the report
FORBIDDEN = {  # what a limit or the empty network answers; EAGAIN is fork's
    *(errno.EPERM, errno.EACCES, errno.EROFS, errno.EFBIG, errno.ENOSPC, errno.EMFILE, errno.EAGAIN),
    *(errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENETDOWN),
}


def be_program(job: dict[str, Any], secret: bytes, writing: int) -> NoReturn:
    """Runs the program, then its tests, and reports; whatever ends the process before leaves no report."""
    os.setsid()  # a signal to its own group must not reach the supervisor
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(writing, REPORT)
    os.closerange(REPORT + 1, 64)  # the supervisor's, all of them low
    for name, (soft, hard) in limits_of(job).items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    write, leave, restore, own_builtins = os.write, os._exit, vars(builtins).update, dict(vars(builtins))
    passed = report_line(secret, "passed", "")
    sys.argv = ["program"]
    sys.path.pop(0)  # the toolkit
    try:
        program = load("program", job["program"], {})
        names = {name: value for name, value in vars(program).items() if name not in own_builtins}
        load("tests", job["tests"], names | {"__builtins__": own_builtins})
    except BaseException as error:
        restore(own_builtins)
        write(REPORT, report_line(secret, *describe(error)))
        raise
    write(REPORT, passed)
    leave(0)
    raise AssertionError("os._exit came back")


def limits_of(job: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Resource limits, soft and hard. Past the soft limit of CPU time comes a signal, which can be caught."""
    limits = {
        "RLIMIT_AS": job["memory_bytes"],
        "RLIMIT_NPROC": job["processes"],
        "RLIMIT_FSIZE": job["file_bytes"],
        "RLIMIT_NOFILE": job["open_files"],
        "RLIMIT_CORE": 1,  # at 0 the kernel still starts a program that collects crashes
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    return {name: (value, value) for name, value in limits.items()} | {"RLIMIT_CPU": (job["cpu_s"], job["cpu_s"] + 1)}


def load(name: str, source: str, names: dict[str, Any]) -> types.ModuleType:
    """Runs `source` as the module `name`, in which `names` are known already."""
    spec = spec_from_loader(name, SourceInMemory(name, source))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    vars(module).update({key: value for key, value in names.items() if key == "__builtins__" or key[:2] != "__"})
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class SourceInMemory(SourceFileLoader):
    """Reads no file: the program could have changed it."""

    def __init__(self, name: str, source: str) -> None:
        super().__init__(name, f"<{name}>")
        self.source = source.encode("utf-8", "replace")

    def get_data(self, path: str | bytes) -> bytes:
        return self.source


def report_line(secret: bytes, kind: str, reason: str) -> bytes:
    """Short enough that the pipe takes it whole. Begins with a line break: a program can have written before it."""
    return b"\n" + secret + json.dumps({"kind": kind, "reason": reason[:500]}).encode() + b"\n"


def describe(error: BaseException) -> tuple[str, str]:
    """The kind of failure, as in `sandbox.Kind`, and its first line."""
    first_line = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
    if isinstance(error, SystemExit):
        return "ended early", first_line
    if isinstance(error, AssertionError):
        return "wrong answer", first_line
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "memory", first_line
    if isinstance(error, OSError) and error.errno in FORBIDDEN:
        return "forbidden", first_line
    return "error", first_line

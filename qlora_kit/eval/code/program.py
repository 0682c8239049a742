"""The process that runs a program and its tests, once it is locked in."""

from __future__ import annotations

import builtins
import errno
import os
import resource
import sys
from importlib.abc import InspectLoader
from types import CodeType, ModuleType
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
    sys.argv = ["program"]
    sys.path.pop(0)  # the toolkit
    forget_toolkit()
    run_both(job["program"], job["tests"], secret)
    raise AssertionError("os._exit came back")


def run_both(program: str, tests: str, secret: bytes) -> None:
    """Ends the process where the tests came to their end; else reports the error and raises it.

    What is used once the program has run lies in names of this function: of all else, the program can make what it
    likes. A failure's line is put together without any module, so that it cannot be made to say `passed`.
    """
    run, write, leave, describe_it, line_of, trace = exec, os.write, os._exit, describe, report_line, sys.settrace
    restore, own_builtins, modules = vars(builtins).update, dict(vars(builtins)), sys.modules
    end, passed = f"_end_{os.urandom(16).hex()}", report_line(secret, "passed", "")
    space, space_of_tests = module_of("program"), module_of("tests")
    names = vars(space_of_tests)
    try:
        code, code_of_tests = compiled("program", program), compiled("tests", f"{tests}\n{end} = True\n")
        modules["program"] = space
        run(code, vars(space))
        trace(None)  # a tracer can jump over lines
        known = {name: value for name, value in vars(space).items() if name not in own_builtins and name[:2] != "__"}
        names |= known | {"__builtins__": own_builtins}
        modules["tests"] = space_of_tests
        run(code_of_tests, names)
        if end not in names:
            raise AssertionError("the tests did not come to their end")
    except BaseException as error:
        restore(own_builtins)
        write(REPORT, line_of(secret, *describe_it(error)))
        raise
    write(REPORT, passed)
    leave(0)


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


def forget_toolkit() -> None:
    """Nothing that gives a verdict can be found by its name."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "qlora_kit"]:
        del sys.modules[name]
    sys.modules["__main__"] = ModuleType("__main__")


def module_of(name: str) -> ModuleType:
    """An empty module."""
    module = ModuleType(name)
    module.__file__ = f"<{name}>"
    return module


def compiled(name: str, source: str) -> CodeType:
    """Raises what the compiler raises."""
    return InspectLoader.source_to_code(source.encode("utf-8", "replace"), f"<{name}>")


def report_line(secret: bytes, kind: str, reason: str) -> bytes:
    """Short enough that the pipe takes it whole. Begins with a line break: a program can have written before it."""
    return b"\n" + secret + f"{kind}\t{reason[:500]}\n".encode("utf-8", "backslashreplace")


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

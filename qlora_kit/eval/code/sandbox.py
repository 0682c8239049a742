"""Runs programs that a model wrote, each in a process without network, without the host's files and under limits.

The kernel does the guarding (namespaces, a read-only root, a filter of system calls, resource limits: see `jail.py`,
`namespaces.py`, `syscalls.py`); where it will not, nothing is run. The tests share the program's interpreter, as the
benchmark asks: a program that ends early is caught, one that goes through the frames or the memory of its own
interpreter to forge a verdict is not, though it gets no further.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from qlora_kit.errors import EvalError

PACKAGES = Path(__file__).parents[3]
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from qlora_kit.eval.code.jail import main; main()"
ENVIRONMENT = {"HOME": "/sandbox", "TMPDIR": "/sandbox", "PYTHONHASHSEED": "0"}
_GRACE_S = 10.0  # past its own clock: to start and to end
_PROBE = """
import socket
for act in (lambda: open("/probe", "w"), lambda: socket.socket(type=socket.SOCK_DGRAM).connect(("192.0.2.1", 9))):
    try:
        act()
    except OSError:
        continue
    raise AssertionError("the program can reach out of its sandbox")
"""

Kind = Literal["passed", "wrong answer", "timeout", "memory", "forbidden", "ended early", "error"]


@dataclass(frozen=True)
class Limits:
    """What one program may use. Memory, CPU time, open files and file size are each process's own."""

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    """Address space."""
    processes: int = 8
    """Processes and threads at one time, the one that watches the program included."""
    file_bytes: int = 8 << 20
    """The longest file."""
    folder_bytes: int = 16 << 20
    """All files together."""
    open_files: int = 32
    output_bytes: int = 64 << 10
    """Standard output and standard error that are kept; the rest is read and dropped."""


@dataclass(frozen=True)
class Outcome:
    """How one program ended."""

    kind: Kind
    reason: str
    """First line of the error; empty for a program that passed."""
    output: str
    """Standard output and standard error, cut at `Limits.output_bytes`."""
    seconds: float
    """Wall time, the start of the sandbox included."""

    @property
    def passed(self) -> bool:
        """True where program and tests ran to their end."""
        return self.kind == "passed"


def run_program(program: str, tests: str = "", limits: Limits | None = None) -> Outcome:
    """Runs `program`, then `tests` on its names, and passes it where the tests end without an error.

    In the tests the names of Python's builtins mean the builtins, whatever the program made of them. Only the
    standard library can be imported. The working folder is empty, is HOME too, and is gone afterwards.

    Raises:
        EvalError: this system cannot keep the program from the network and from the host's files; nothing was run.
    """
    _require_linux()
    limits = limits or Limits()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qlora-kit-sandbox-") as root:
        job = {"program": program, "tests": tests, "root": root, **asdict(limits)}
        verdict, output = _supervised(json.dumps(job).encode(), limits)
    kind, reason = _judge(verdict, limits)
    return Outcome(kind, reason, output, time.perf_counter() - started)


def require_sandbox() -> None:
    """Tries the sandbox: a program in it must run, and must reach neither a file outside its folder nor a network.

    Raises:
        EvalError: it does not hold here.
    """
    outcome = run_program(_PROBE)
    if not outcome.passed:
        raise EvalError("the sandbox for model-written programs does not hold", got=outcome.reason, fix=_advice())


def _supervised(job: bytes, limits: Limits) -> tuple[dict[str, Any], str]:
    """The verdict of `jail.supervise`, and what the program printed."""
    reading, writing = os.pipe()
    command = [sys.executable, "-sSBPu", "-c", START, str(PACKAGES), str(writing)]
    with (
        open(reading, "rb") as report,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=[writing],
            start_new_session=True,
        ) as process,
    ):
        os.close(writing)
        clock = threading.Timer(limits.wall_s + _GRACE_S, os.killpg, (process.pid, signal.SIGKILL))
        clock.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(job)
            output = _read(process.stdout, limits.output_bytes)
            process.wait()
        finally:
            clock.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        said = report.read()
    if not said:
        raise EvalError("the sandbox ended without a verdict", got=output[-500:], fix=_advice())
    return json.loads(said), output


def _read(pipe: IO[bytes], limit: int) -> str:
    """The first `limit` bytes; the rest is read as well, so that the writer does not wait."""
    kept = bytearray()
    while chunk := os.read(pipe.fileno(), 65536):
        kept += chunk[: limit - len(kept)]
    return kept.decode("utf-8", "replace")


def _judge(verdict: dict[str, Any], limits: Limits) -> tuple[Kind, str]:
    if "refused" in verdict:
        raise EvalError("model-written programs cannot be run safely here", got=verdict["refused"], fix=_advice())
    report, code = verdict["report"], verdict["exit_code"]
    if verdict["timed_out"]:
        return "timeout", f"ran longer than {limits.wall_s:g} s"
    # The kernel's own count ends it with SIGXCPU, and may be ahead of what is reported; SIGKILL may have other reasons.
    spent = code == 128 + signal.SIGXCPU
    spent |= code == 128 + signal.SIGKILL and verdict["cpu_s"] > 0.9 * limits.cpu_s
    if report is None and spent:
        return "timeout", f"used more than {limits.cpu_s} s of CPU time"
    if report is None and code > 128:
        return "error", f"ended by signal {code - 128}"
    if report is None or (report["kind"] == "passed" and code != 0):
        return "ended early", f"left with exit code {code} before its tests had ended"
    return report["kind"], report["reason"]


def _require_linux() -> None:
    if sys.platform != "linux":
        raise EvalError(
            "model-written programs are run on Linux only: their sandbox is made of its namespaces",
            got=sys.platform,
            fix="Run this in WSL 2, in a virtual machine or in a privileged Linux container",
        )


def _advice() -> str:
    return (
        "Needed: Linux 5.12 or newer on x86_64 or aarch64 that lets this user make user, mount, network and PID "
        "namespaces and seccomp filters. Ubuntu: "
        "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0; Debian: sudo sysctl "
        "kernel.unprivileged_userns_clone=1; a container: start it with --privileged, or use a virtual machine"
    )

"""Runs one untrusted program in Linux namespaces of its own. `sandbox.run_program` starts a Python for it.

Three processes, each the child of the one before:

    supervisor   holds the clock, reads the verdict; the program can neither see nor signal it
    first        process 1 of a new PID namespace: when it ends, the kernel kills whatever is left in there
    program      without privileges, under resource limits (`program.py`)

`namespaces.py` builds what they live in, `syscalls.py` closes what that leaves open. A step that the kernel refuses
ends it all before the program is touched, and the refusal is reported. All four files need the standard library alone.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
from typing import Any, NoReturn

from qlora_kit.eval.code.namespaces import die_with_parent, enter_namespaces
from qlora_kit.eval.code.program import be_program
from qlora_kit.eval.code.syscalls import lock_system_calls

VERDICT = 3  # the descriptor of the verdict
MAX_REPORT_BYTES = 65536


def main() -> None:
    inherited = int(sys.argv[1])
    if inherited != VERDICT:
        os.dup2(inherited, VERDICT)
        os.close(inherited)
    verdict = supervise(json.load(sys.stdin.buffer))
    os.write(VERDICT, json.dumps(verdict).encode())


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    """Runs `job` and says how it ended.

    Args:
        job: program, tests, root (an empty folder to mount on) and the fields of `sandbox.Limits`.

    Returns:
        `refused`: what the kernel would not do; or else `timed_out`, `exit_code` (128 + signal where one ended the
        program), `cpu_s` (used by the processes that were waited for) and `report`, None where the program came
        neither to an error nor to the end of its tests.
    """
    try:
        enter_namespaces(job["root"], job["folder_bytes"])
        lock_system_calls()
    except OSError as error:
        return {"refused": str(error)}
    secret = os.urandom(16).hex().encode()
    reading, writing = os.pipe()
    first = os.fork()
    if not first:
        be_first_process(job, secret, writing)
    os.close(writing)
    watch = select.poll()
    watch.register(reading, 0)  # wakes where nobody is left to write
    timed_out = not watch.poll(job["wall_s"] * 1000)
    os.kill(first, signal.SIGKILL)
    _, status = os.waitpid(first, 0)  # comes back when every process of the namespace is gone
    used, code = resource.getrusage(resource.RUSAGE_CHILDREN), os.waitstatus_to_exitcode(status)
    report = worst_report(os.read(reading, MAX_REPORT_BYTES), secret)
    return {"timed_out": timed_out, "exit_code": code, "cpu_s": used.ru_utime + used.ru_stime, "report": report}


def worst_report(said: bytes, secret: bytes) -> dict[str, str] | None:
    """Of several, as processes of a program that forks give them, one that is not `passed`."""
    lines = said.rpartition(b"\n")[0].split(b"\n")
    parts = [
        line[len(secret) :].decode("utf-8", "replace").partition("\t") for line in lines if line.startswith(secret)
    ]
    reports = [{"kind": kind, "reason": reason} for kind, _, reason in parts]
    return min(reports, key=lambda report: report["kind"] == "passed", default=None)


def be_first_process(job: dict[str, Any], secret: bytes, writing: int) -> NoReturn:
    """Waits for the program; ends with its exit code, and with it ends the namespace."""
    die_with_parent()
    program = os.fork()
    if not program:
        be_program(job, secret, writing)
    while True:
        child, status = os.wait()  # orphans of the program are reaped here too
        if child == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)

"""Where the sandbox holds, for whom, and that nothing is run where it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit.errors import EvalError
from qlora_kit.eval.code import sandbox
from qlora_kit.eval.code.sandbox import require_sandbox, run_program

ROOT = Path(__file__).parents[2]

AS_SOMEBODY = """
import os
from qlora_kit.errors import EvalError
from qlora_kit.eval.code.sandbox import Limits, require_sandbox, run_program
try:
    require_sandbox()
except EvalError as error:
    print("refused", error)
else:
    limits = Limits(wall_s=60.0, cpu_s=1)
    for program in ("", "import os\\nwhile True: os.fork()", "import os\\nos.kill(0, 9)", "open('/lib/x', 'w')",
                    "import socket\\nsocket.create_connection(('127.0.0.1', 9))", "while True: pass"):
        print(run_program(program, "", limits).kind)
"""


def test_it_holds_for_a_user_without_privileges(tmp_path: Path) -> None:
    python = "/usr/bin/python3"
    knows = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if os.geteuid() != 0 or not Path(python).exists() or subprocess.run(knows, check=False).returncode:
        pytest.skip("only root can become somebody else, for whom there must be a Python")
    done = subprocess.run(
        [python, "-B", "-c", AS_SOMEBODY],
        user=65534,
        group=65534,
        extra_groups=[],
        env={"PYTHONPATH": str(ROOT)},
        cwd="/",
        check=False,
        capture_output=True,
        text=True,
    )
    if "refused" in done.stdout or "PermissionError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"not for other users here: {done.stdout}{done.stderr[-200:]}")
    assert done.stdout.split("\n")[:-1] == ["passed", "forbidden", "error", "forbidden", "forbidden", "timeout"], done


REFUSED = """
from qlora_kit.errors import EvalError
from qlora_kit.eval.code.sandbox import run_program
try:
    print("ran", run_program("pass"))
except EvalError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("kind", ["net", "mnt", "pid"])
def test_without_a_namespace_nothing_is_run(kind: str) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Ur", "true"], check=False).returncode:
        pytest.skip("needs unshare, to forbid namespaces")
    forbid = f'echo 0 > /proc/sys/user/max_{kind}_namespaces && exec "$0" -c "$1"'
    command = [unshare, "-Ur", "sh", "-c", forbid, sys.executable, REFUSED]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("refused: model-written programs cannot be run safely here"), done
    assert "'unshare'" in done.stdout and "Needed: Linux 5.12 or newer" in done.stdout


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EvalError, match=r"on Linux only.*got 'darwin'.*WSL 2"):
        run_program("pass")


@pytest.fixture
def namespaces() -> None:
    try:
        run_program("")
    except EvalError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("namespaces")
def test_a_probe_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_PROBE", "raise AssertionError('out')")
    with pytest.raises(EvalError, match=r"does not hold.*out"):
        require_sandbox()


def test_a_jail_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "START", "print('broken')")
    with pytest.raises(EvalError, match=r"without a verdict.*broken"):
        run_program("pass")

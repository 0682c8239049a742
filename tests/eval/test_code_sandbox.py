"""Hostile programs, each for real: the host must be as it was, and the program must not pass."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_kit.eval.code.sandbox import Limits, Outcome, run_program

pytestmark = pytest.mark.usefixtures("sandbox")
ROOT = Path(__file__).parents[2]
PATIENT = Limits(wall_s=60.0, cpu_s=1, memory_bytes=256 << 20)  # where something else than the clock must end it
SHORT = replace(PATIENT, wall_s=2.0)
TESTS = "assert answer() == 42"


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The sandbox's own folder is gone after each program."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def run(program: str, tests: str = TESTS, limits: Limits = PATIENT) -> Outcome:
    return run_program(program, tests, limits)


def processes_named(name: str) -> list[str]:
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == name:
                found.append(comm.parent.name)
        except OSError:
            continue  # ended meanwhile
    return found


def test_a_correct_program_passes() -> None:
    outcome = run("import math, json, tempfile, ssl\ndef answer(): return math.isqrt(1764)")
    assert outcome.passed and outcome.kind == "passed" and outcome.reason == ""


def test_its_folder_can_be_written_and_threads_and_processes_work() -> None:
    outcome = run(
        """
import os, subprocess, sys, threading
from pathlib import Path
assert Path.cwd() == Path.home() and not os.listdir()
Path("note").write_text("42")
thread = threading.Thread(target=lambda: Path("other").write_text("x"))
thread.start(); thread.join()
if not (child := os.fork()):
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
def answer(): return int(Path("note").read_text())
"""
    )
    assert outcome.passed, outcome


@pytest.mark.parametrize(
    ("program", "kind", "reason"),
    [
        ("def answer(): return 41", "wrong answer", "AssertionError"),
        ("def answer(): return unknown", "error", "NameError: name 'unknown' is not defined"),
        ("def answer(:", "error", "SyntaxError"),
        ("def answer(): return 42\n\0", "error", "null bytes"),
        ("while True: pass", "timeout", "1 s of CPU time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, lambda *a: 0)\nwhile True: pass", "timeout", "1 s of CPU time"),
        ("import time\ntime.sleep(60)", "timeout", "longer than 2 s"),
        ("import os, time\nos.close(1); os.close(2); time.sleep(60)", "timeout", "longer than 2 s"),
        ("import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)", "timeout", "longer than 2 s"),
        ("kept = bytearray(1 << 30)", "memory", "MemoryError"),
        ("kept = []\nwhile True: kept.append(bytearray(1 << 20))", "memory", "MemoryError"),
        ("import os\nwhile True: os.fork()", "forbidden", "BlockingIOError"),
        ("file = open('big', 'wb')\nwhile True: file.write(bytes(1 << 20))", "forbidden", "File too large"),
        ("k = 0\nwhile k := k + 1: open(f'f{k}', 'wb').write(bytes(1 << 20))", "forbidden", "No space left"),
        ("files = []\nwhile True: files.append(open('/dev/null'))", "forbidden", "Too many open files"),
        ("import sys\nsys.exit(0)", "ended early", "SystemExit"),
        ("def answer(): raise SystemExit", "ended early", "SystemExit"),
        ("import os\nos._exit(0)", "ended early", "exit code 0"),
        ("import os\ndef answer(): os._exit(0)", "ended early", "exit code 0"),
        ('import os\nos.write(3, b\'{"kind": "passed", "reason": ""}\'); os._exit(0)', "ended early", "code 0"),
        (
            "import fcntl, os\nfcntl.fcntl(3, 1031, 1 << 20)\nos.write(3, b'x\\n' * 99999); os._exit(0)",
            "ended early",
            "0",
        ),
        ("import os\nos.execv('/usr/bin/true', ['true'])", "error", "FileNotFoundError"),
        ("import os\nos.kill(os.getpid(), 11)", "error", "signal 11"),
        ("import os\nos.killpg(0, 9)", "error", "signal 9"),
        ("import os\nif os.fork(): raise ValueError('no')\ndef answer(): return 42", "error", "ValueError: no"),
    ],
)
def test_hostile_or_wrong(program: str, kind: str, reason: str) -> None:
    outcome = run(program, limits=SHORT if reason == "longer than 2 s" else PATIENT)
    assert outcome.kind == kind, outcome
    assert reason in outcome.reason and not outcome.passed


def test_what_it_makes_of_the_builtins_does_not_reach_the_tests() -> None:
    program = """
import builtins
builtins.AssertionError = ValueError
builtins.abs = builtins.sum = lambda *a: 0
abs = all = lambda *a: True
def answer(): return -7
"""
    assert run(program, "assert abs(answer() - 42) < 1").kind == "wrong answer"
    assert run(program, "assert all(answer() == k for k in (1, 2))").kind == "wrong answer"


def test_gigabytes_of_output_are_cut() -> None:
    outcome = run("while True: print('spam' * 10000)", limits=SHORT)
    assert outcome.kind == "timeout" and outcome.output.startswith("spamspam")
    assert len(outcome.output) <= SHORT.output_bytes


@pytest.mark.parametrize("how", ["absolute", "upwards", "symlink", "delete", "chmod", "list"])
def test_files_of_the_host_are_out_of_reach(tmp_path: Path, how: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    mode = precious.stat().st_mode
    act = {
        "absolute": f"open({str(precious)!r}, 'w').write('lost')",
        "upwards": f"open('../../../..' + {str(precious)!r}, 'w').write('lost')",
        "symlink": f"os.symlink({str(precious)!r}, 'link'); open('link', 'w').write('lost')",
        "delete": f"shutil.rmtree({str(tmp_path)!r})",
        "chmod": f"os.chmod({str(precious)!r}, 0o777)",
        "list": f"os.listdir({str(Path.home())!r}); open({str(precious)!r})",
    }[how]
    outcome = run(f"import os, shutil\n{act}\ndef answer(): return 42")
    assert outcome.kind in ("error", "forbidden") and (
        "FileNotFound" in outcome.reason or "Read-only" in outcome.reason
    )
    assert precious.read_text() == "kept" and precious.stat().st_mode == mode


def test_the_interpreter_cannot_be_changed() -> None:
    source = Path(os.__file__)
    before = source.read_bytes()
    outcome = run(f"open({str(source)!r}, 'a').write('# mine')")
    assert outcome.kind == "forbidden" and source.read_bytes() == before


def test_home_is_not_the_users(tmp_path: Path) -> None:
    name = f"note-{uuid.uuid4().hex}"
    outcome = run(f"from pathlib import Path\n(Path.home() / {name!r}).write_text('here')\ndef answer(): return 41")
    assert outcome.kind == "wrong answer" and not (Path.home() / name).exists()


def test_new_namespaces_give_no_rights_back() -> None:
    source = Path(os.__file__)
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.unshare(0x10000000 | 0x20000)  # refused; what follows is refused of itself too
folder = {str(source.parents[2])!r}.encode()
for target in (b"/", b"/lib", folder):
    libc.mount(None, target, None, ctypes.c_ulong(0x20 | 0x1000), None)
libc.umount2(folder, 2)
open({str(source)!r}, "a").write("# mine")
"""
    before = source.read_bytes()
    outcome = run(program)
    assert not outcome.passed and source.read_bytes() == before


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        tcp.settimeout(0.2)
        udp.settimeout(0.2)
        (_, tcp_port), (_, udp_port) = tcp.getsockname(), udp.getsockname()
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {tcp_port}), 1).send(b'out')"
        send = f"import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'out', ('127.0.0.1', {udp_port}))"
        for program in (connect, send):
            outcome = run(program)
            assert outcome.kind == "forbidden" and "unreachable" in outcome.reason
        with pytest.raises(TimeoutError):
            tcp.accept()
        with pytest.raises(TimeoutError):
            udp.recv(10)


def test_no_unix_socket_of_the_host(tmp_path: Path) -> None:
    place, hidden = str(tmp_path / "socket"), f"\0{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract:
        for listener, address in ((named, place), (abstract, hidden)):
            listener.bind(address)
            listener.listen()
        for address in (place, hidden):
            outcome = run(f"import socket\nsocket.socket(socket.AF_UNIX).connect({address!r})")
            assert outcome.kind == "error" and ("FileNotFound" in outcome.reason or "refused" in outcome.reason)


def test_a_daemon_does_not_outlive_its_program() -> None:
    name = f"qk{uuid.uuid4().hex[:10]}"
    program = f"""
import ctypes, os, time
ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)
if os.fork():
    time.sleep(0.2)
    raise ValueError("its daemon runs")
os.setsid()
if os.fork():
    os._exit(0)
while True:
    time.sleep(1)
"""
    assert "its daemon runs" in run(program).reason
    assert processes_named(name) == []


def test_a_program_ends_with_the_toolkit(tmp_path: Path) -> None:
    name = f"qk{uuid.uuid4().hex[:10]}"
    program = f"import ctypes, time\nctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)\ntime.sleep(60)"
    ask = f"from qlora_kit.eval.code.sandbox import Limits, run_program; run_program({program!r}, '', Limits(30))"
    environment = {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", ask], cwd=ROOT, env=environment) as toolkit:
        assert wait_until(lambda: bool(processes_named(name)))
        toolkit.kill()
    assert wait_until(lambda: not processes_named(name))


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether `holds` becomes true in time."""
    end = time.monotonic() + seconds
    while not (now := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return now


def test_processes_of_the_host_are_out_of_reach() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        try:
            assert "ProcessLookupError" in run(f"import os\nos.kill({bystander.pid}, 9)").reason
            program = "import os\nos.kill(os.getppid(), 9)\nos.kill(os.getppid(), 15)\nos._exit(3)"
            assert "exit code 3" in run(program).reason
            assert "exit code 4" in run("import os\ntry: os.kill(-1, 9)\nfinally: os._exit(4)").reason
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANTED", "planted-secret")
    held = os.open(tmp_path / "held", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(held, True)
    try:
        outcome = run(
            """
import os
print(os.environ)
for fd in range(3, 256):
    try:
        print(fd, os.fstat(fd).st_mode)
    except OSError:
        pass
print(open(f"/proc/{os.getppid()}/environ").read())
"""
        )
    finally:
        os.close(held)
    assert "planted" not in outcome.output.lower() and "FileNotFoundError" in outcome.reason
    assert [line.split()[0] for line in outcome.output.splitlines() if line[:1].isdigit()] == ["3"]  # for its verdict


def test_a_folder_of_the_user_may_hold_the_interpreter(tmp_path: Path) -> None:
    """As with conda and pyenv: a Python below a folder that nothing else of can be seen."""
    copy = tmp_path / "python"
    library = Path(os.__file__).parent
    shutil.copytree(
        library,
        copy / "lib" / library.name,
        symlinks=True,
        ignore=shutil.ignore_patterns("site-packages", "dist-packages", "test", "config-*", "__pycache__", "idlelib"),
    )
    (copy / "bin").mkdir()
    python = shutil.copy2(os.path.realpath(sys.executable), copy / "bin")
    (tmp_path / "secret").write_text("planted")
    ask = f"""
from qlora_kit.eval.code.sandbox import run_program
print(run_program("import sys, os, csv; print(sys.base_prefix); print(os.listdir({str(tmp_path)!r}))").output)
"""
    done = subprocess.run(
        [python, "-c", ask], check=False, capture_output=True, text=True, cwd="/", env={"PYTHONPATH": str(ROOT)}
    )
    if "error while loading shared libraries" in done.stderr or "No module named" in done.stderr:
        pytest.skip(f"this Python cannot be copied: {done.stderr[-200:]}")
    assert done.stdout.split("\n")[:2] == [str(copy), "['python']"], done


def test_many_open_files_of_ours_do_not_matter(tmp_path: Path) -> None:
    held = [os.open(tmp_path, os.O_RDONLY) for _ in range(200)]
    try:
        assert run(
            "import os\nassert os.listdir('/dev/') and not os.path.exists('/dev/fd')\ndef answer(): return 42"
        ).passed
    finally:
        for descriptor in held:
            os.close(descriptor)


def test_same_hashes_each_time() -> None:
    outcomes = [run("print({str(k) for k in range(20)})\ndef answer(): return 42") for _ in range(2)]
    assert outcomes[0].output == outcomes[1].output != ""


def test_it_starts_quickly() -> None:
    started = time.perf_counter()
    assert all(run("def answer(): return 42").passed for _ in range(5))
    assert time.perf_counter() - started < 20  # 0.3 s on an idle core

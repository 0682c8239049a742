"""Ways past the namespaces and the verdict, each for real: host keys, uncounted memory, forged verdicts."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the sandbox is made of what Linux has", allow_module_level=True)

from qlora_kit.eval.code import syscalls
from qlora_kit.eval.code.sandbox import Limits, Outcome, run_program

pytestmark = pytest.mark.usefixtures("sandbox")
ROOT = Path(__file__).parents[2]
PATIENT = Limits(wall_s=60.0, cpu_s=5)


def run(program: str, tests: str = "") -> Outcome:
    return run_program(program, tests, PATIENT)


def number(name: str) -> int:
    return syscalls.FORBIDDEN[name][syscalls.this_machine().column]


KEYS = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
KEYCTL, ADD_KEY, SESSION = {keyctl}, {add_key}, ctypes.c_int(-3)

def read():
    held = ctypes.create_string_buffer(32)
    key = libc.syscall(KEYCTL, 10, SESSION, b"user", b"planted", 0)
    return key, libc.syscall(KEYCTL, 11, ctypes.c_int(key), held, 32), held.value
"""
OF_HOST = """
from qlora_kit.eval.code.sandbox import run_program
from qlora_kit.eval.code.syscalls import join_fresh_keyring, this_machine
if libc.syscall(KEYCTL, 1, None) < 0 or libc.syscall(ADD_KEY, b"user", b"planted", b"secret", 6, SESSION) < 0:
    sys.exit("no keys here")
print(run_program({program!r}).output)
print("host:", read()[2])
join_fresh_keyring(this_machine())
print("joined:", read()[2])
"""


def test_keys_of_the_host_can_be_neither_read_nor_changed() -> None:
    numbers = {name: number(name) for name in ("keyctl", "add_key")}
    keys = KEYS.format(**numbers)
    steal = f"{keys}\nkey, size, held = read()\nprint('inside:', held)\nlibc.syscall(KEYCTL, 2, key, b'evil', 4)"
    command = [sys.executable, "-c", keys + OF_HOST.format(program=steal)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if "no keys here" in done.stderr:
        pytest.skip("this kernel, or a container's filter, gives no keys")
    said = [line for line in done.stdout.splitlines() if line]
    assert said == ["inside: b''", "host: b'secret'", "joined: b''"], done


def test_the_numbers_are_those_of_the_c_librarys_own_calls() -> None:
    """Each of these by its name: refused for its number, with EPERM alone."""
    outcome = run("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, arguments in {
    "shmget": (0, 4096, 0o1600), "shmat": (0, None, 0), "msgget": (0, 0o1600), "semget": (0, 1, 0o1600),
    "memfd_create": (b"x", 0), "unshare": (0,), "setns": (0, 0), "chroot": (b".",), "mount": (b"", b".", b"", 0, None),
    "umount2": (b".", 0), "open_by_handle_at": (0, None, 0), "fanotify_init": (0, 0), "ptrace": (16, 1, None, None),
    "process_vm_readv": (1, None, 0, None, 0, 0), "process_vm_writev": (1, None, 0, None, 0, 0),
    "klogctl": (10, None, 0),
}.items():
    ctypes.set_errno(0)
    print(name, getattr(libc, name)(*arguments), ctypes.get_errno())
""")
    lines = outcome.output.splitlines()
    assert len(lines) == 16 and all(line.endswith(" -1 1") for line in lines), outcome


def test_every_forbidden_number_is_refused() -> None:
    column = syscalls.this_machine().column
    numbers = sorted(pair[column] for pair in syscalls.FORBIDDEN.values())
    outcome = run(f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in {numbers}:
    ctypes.set_errno(0)
    assert libc.syscall(number, -1, -1, -1, -1, -1, -1) == -1 and ctypes.get_errno() == 1, number
""")
    assert outcome.passed, outcome


def test_memory_of_system_v_cannot_be_held_past_the_limit() -> None:
    outcome = run("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]
for _ in range(3):
    place = libc.shmat(libc.shmget(0, 200 << 20, 0o1600), None, 0)
    if place == 2**64 - 1:
        raise OSError(ctypes.get_errno(), "no shared memory")
    libc.shmdt(place)
""")
    assert outcome.kind == "forbidden" and "no shared memory" in outcome.reason, outcome


def test_memory_cannot_be_held_in_files_without_a_name() -> None:
    outcome = run("""
import os
files = [os.memfd_create("x") for _ in range(8)]
for file in files:
    os.write(file, bytes(8 << 20))
""")
    assert outcome.kind == "forbidden" and "PermissionError" in outcome.reason, outcome


@pytest.mark.parametrize("family", [40, 38, 17])  # AF_VSOCK, AF_ALG, AF_PACKET
def test_sockets_outside_of_network_namespaces_are_refused(family: int) -> None:
    outcome = run(f"import socket\nsocket.socket({family}, socket.SOCK_STREAM)")
    assert outcome.kind == "forbidden" and "Operation not permitted" in outcome.reason, outcome


@pytest.mark.parametrize("flag", [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000])
def test_a_clone_gets_no_new_namespace(flag: int) -> None:
    clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    outcome = run(f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
user = 0 if {flag} == 0x10000000 else 0x10000000  # which gives the right to make the others
child = libc.syscall({clone}, ctypes.c_ulong({flag} | user | 17), None, None, None, None)
if child == 0:
    os._exit(0)
raise OSError(ctypes.get_errno(), "clone") if child < 0 else AssertionError("a new namespace")
""")
    assert outcome.kind == "forbidden" and "clone" in outcome.reason, outcome


def test_clone3_is_not_there() -> None:
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.syscall(435, None, 0) == -1\n"
        "assert ctypes.get_errno() == 38, ctypes.get_errno()"
    )
    assert run(program).passed


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="a 32-bit call of x86")
def test_system_calls_of_other_tables_do_not_get_past_the_filter() -> None:
    outcome = run("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(0x40000000 | 39) == -1 and ctypes.get_errno() == 1, "x32"
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b"\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3")  # mov eax, getpid; int 0x80; ret
place = ctypes.addressof(ctypes.c_char.from_buffer(page))
print("32 bits:", ctypes.CFUNCTYPE(ctypes.c_int)(place)(), flush=True)
""")
    assert outcome.kind == "error" and outcome.reason in ("ended by signal 31", "ended by signal 11"), outcome
    assert "32 bits" not in outcome.output


def test_what_programs_need_goes_on_working() -> None:
    outcome = run("""
import asyncio, concurrent.futures, ctypes, os, socket, subprocess, sys
with concurrent.futures.ThreadPoolExecutor(3) as pool:
    assert list(pool.map(abs, (-1, -2))) == [1, 2]
try:
    subprocess.run(["/no/such/program"])
except FileNotFoundError:
    pass
loader = next(name for name in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1") if os.path.exists(name))
assert b"ld" in subprocess.run([loader, "--help"], capture_output=True).stdout
assert os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn(loader, [loader, "--version"], {}), 0)[1]) == 0
assert asyncio.run(asyncio.sleep(0, "woken")) == "woken"
ends = socket.socketpair()
ends[0].send(b"x")
assert ends[1].recv(1) == b"x" and not socket.socket().close()
try:
    socket.getaddrinfo("localhost", 80)
except socket.gaierror:
    pass
assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda k: k + 1)(41) == 42
""")
    assert outcome.passed, outcome


def test_no_jump_leaves_the_filter_on_any_known_machine() -> None:
    """As the kernel asks, which tries the filter of its own machine alone."""
    for machine in syscalls.MACHINES.values():
        steps = list(struct.iter_unpack("=HBBI", syscalls.filter_of(machine)))
        for place, (code, then, otherwise, _) in enumerate(steps):
            if code & 7 == 5:
                assert place + 1 + max(then, otherwise) < len(steps)
        assert steps[-1][0] == 6 and 0 < len(steps) < 4096


def test_a_machine_without_a_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*here[:4], "riscv64")))
    with pytest.raises(
        OSError, match=r"no list of system calls for riscv64, 64 bits; there is one for x86_64 and aarch"
    ):
        syscalls.this_machine()


TWICE = """
from qlora_kit.eval.code import syscalls
syscalls.FORBIDDEN["prctl"] = (157, 167)
syscalls.lock_system_calls()
syscalls.lock_system_calls()
"""
QUOTA = """
import ctypes, os, random
from qlora_kit.eval.code import syscalls
machine = syscalls.this_machine()
add_key = syscalls.FORBIDDEN["add_key"][machine.column]
os.setuid(random.SystemRandom().randrange(61184, 65520))
syscalls.join_fresh_keyring(machine)
for k in range(2000):
    if syscalls.libc.syscall(add_key, b"user", b"%d" % k, b"x", 1, ctypes.c_int(-3)) < 0:
        break
syscalls.join_fresh_keyring(machine)
"""


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (TWICE, "PermissionError: [Errno 1] Operation not permitted: 'prctl, for a seccomp filter'"),
        (QUOTA, "OSError: [Errno 122] Disk quota exceeded: 'keyctl, for an empty session keyring'"),
    ],
)
def test_a_refusal_is_named(program: str, message: str) -> None:
    if program is QUOTA and os.geteuid() != 0:
        pytest.skip("only root can use up another user's keys")
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=ROOT)
    if program is QUOTA and not done.stderr:
        pytest.skip("this kernel, or a container's filter, gives no keys")
    assert done.stderr.splitlines()[-1] == message, done


@pytest.mark.parametrize(
    "attack",
    [
        "import importlib.machinery\nimportlib.machinery.SourceFileLoader.exec_module = lambda *a: None",
        "import importlib.abc\nimportlib.abc.InspectLoader.source_to_code = lambda *a: compile('', 'tests', 'exec')",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None",
        "import sys\nsys.modules['qlora_kit.eval.code.program'].load = lambda *a, **k: None",
        "import sys\nfor name, module in list(sys.modules.items()):\n"
        "    if 'qlora_kit' in name:\n        module.describe = lambda *a: ('passed', '')",
        "import __main__\n__main__.main.__globals__['be_program'].__globals__['describe'] = lambda *a: ('passed', '')",
        'import atexit, json, os\njson.dumps = lambda *a: \'{"kind": "passed", "reason": ""}\'\n'
        "atexit.register(os._exit, 0)",
        "import sys\ndef jump(frame, event, given):\n"
        "    if frame.f_code.co_filename == '<tests>' and event == 'line' and frame.f_lineno == 2:\n"
        "        frame.f_lineno = 3\n"
        "    return jump\nsys.settrace(jump)",
        "import types\ntypes.ModuleType = None",
    ],
)
def test_a_verdict_cannot_be_forged_by_patching(attack: str) -> None:
    program = f"try:\n{indented(attack)}\nexcept (KeyError, AttributeError):\n    pass\ndef answer(): return 41"
    outcome = run(program, "wanted = 42\nassert answer() == wanted\nlast = 1")
    assert outcome.kind == "wrong answer", outcome


def test_an_error_that_breaks_its_own_report_does_not_end_the_run() -> None:
    attack = "import json, sys, os\njson.dumps = lambda *a: '{'\nsys.excepthook = lambda *a: os._exit(0)"
    assert run(attack, "assert False").kind == "wrong answer"
    assert run("raise ValueError('\\ud800\\n{}')").reason == "ValueError: \\ud800"


@pytest.mark.parametrize("tests", ["assert True \\", "'''", "if True:", "pass\n\0"])
def test_tests_that_do_not_compile_pass_nothing(tests: str) -> None:
    outcome = run("print('started')", tests)
    assert outcome.kind == "error" and "Error" in outcome.reason and "started" not in outcome.output


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())

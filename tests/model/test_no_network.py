"""Importing the toolkit opens no socket, also where the package `kernels` would fetch a binary for bitsandbytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bitsandbytes.functional import has_avx512bf16

FAKE_KERNELS = '''
"""As the real package: get_kernel goes to a hub."""
import socket

def get_kernel(*arguments, **options):
    print("FETCH", arguments, flush=True)
    socket.create_connection(("192.0.2.1", 443), timeout=1)

class _Anything:
    def __init__(self, *arguments, **options): pass
    def __getattr__(self, name): return _Anything()
    def __call__(self, *arguments, **options): return _Anything()

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Anything,), {})
'''

GUARD = """
import socket

def refuse(*arguments, **options):
    print("SOCKET", arguments, flush=True)
    raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
"""

IMPORT_ALL = """
import pkgutil, importlib, sys
import qlora_kit
names = [module.name for module in pkgutil.walk_packages(qlora_kit.__path__, "qlora_kit.")]
for name in names:
    importlib.import_module(name)
assert len(names) > 40, names
assert "bitsandbytes" in sys.modules
import kernels
assert kernels.get_kernel
"""

IMPORTED_BEFORE = """
import sys
import kernels
import qlora_kit.model.quantized as quantized
assert sys.modules["kernels"] is kernels
assert quantized.bnb is sys.modules["bitsandbytes"]
import kernels as again
assert again is kernels
"""


def run(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    metadata = tmp_path / "kernels-0.12.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.12.0\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    keep = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    return subprocess.run(
        [sys.executable, "-c", GUARD + code],
        check=False,
        env=keep | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "code",
    [IMPORT_ALL, IMPORTED_BEFORE],
    ids=["everything", "kernels imported before"],
)
def test_importing_opens_no_socket(tmp_path, code):
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "kernels" not in done.stderr


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes asks for its kernel only on AVX512-BF16")
def test_bitsandbytes_alone_would(tmp_path):
    assert "FETCH" in run(tmp_path, "import bitsandbytes").stdout

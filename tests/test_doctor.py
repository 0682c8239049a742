"""The doctor: probing this machine, and judging machines that are made up."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from qlora_kit.doctor import Finding, Gpu, Machine, diagnose, judge, print_diagnosis, probe
from qlora_kit.doctor import machine as machine_module
from qlora_kit.doctor.machine import capability_flags, offline_variables, parse_cpuinfo, read_ranges, system_name

GIB = 2**30
LAPTOP = Machine(
    system="Linux",
    release="6.8.0",
    architecture="x86_64",
    python="3.12.4",
    python_range=">=3.11,<3.13",
    libraries={"torch": "2.12.0", "bitsandbytes": "0.50.2"},
    library_ranges={"torch": ">=2.11,<2.14", "bitsandbytes": ">=0.50,<0.51"},
    cpu="Some CPU",
    cores=8,
    cpu_flags=["avx2"],
    memory_bytes=16 * GIB,
    free_memory_bytes=12 * GIB,
    free_disk_bytes=100 * GIB,
    gpus=[Gpu("NVIDIA GeForce RTX 4060 Laptop GPU", 8 * GIB, (8, 9))],
    torch_cuda="12.8",
    nvidia_driver=True,
    bitsandbytes_backends=["cpu", "cuda128"],
)
NO_GPU = replace(LAPTOP, gpus=[], torch_cuda=None, nvidia_driver=False)


def findings(machine: Machine, area: str) -> list[Finding]:
    return [finding for finding in judge(machine).findings if finding.area == area]


def one(machine: Machine, area: str) -> Finding:
    (found,) = findings(machine, area)
    return found


def test_ampere_and_newer_have_bf16_and_everything_else() -> None:
    gpu = one(LAPTOP, "gpu")
    assert gpu.status == "ok" and "bf16: yes; nf4 training of models up to about 8B" in gpu.allows
    assert "compute capability 8.9" in gpu.found and "8.0 GiB" in gpu.found
    assert one(LAPTOP, "optimizer").allows == "paged and 8-bit AdamW: yes"
    assert judge(LAPTOP).ready


def test_turing_has_no_bf16() -> None:
    gpu = one(replace(LAPTOP, gpus=[Gpu("NVIDIA GeForce GTX 1660 Ti", 6 * GIB, (7, 5))]), "gpu")
    assert gpu.status == "limited" and gpu.allows.startswith("no bf16, use base.compute_dtype=fp16")


def test_older_and_tiny_cards_are_said() -> None:
    pascal, tiny = Gpu("GTX 1080", 8 * GIB, (6, 1)), Gpu("RTX A400", GIB, (8, 6))
    old, small = findings(replace(LAPTOP, gpus=[pascal, tiny]), "gpu")
    assert "older than Turing" in old.allows
    assert small.status == "limited" and "too little memory" in small.allows


def test_without_a_card_the_optimizer_falls_back() -> None:
    assert one(NO_GPU, "gpu").allows == "training, evaluation and export run on the CPU"
    assert "paged 8-bit optimizer: needs CUDA, torch AdamW takes its place" in one(NO_GPU, "optimizer").allows


def test_a_card_that_torch_cannot_use() -> None:
    assert "CUDA build of torch" in one(replace(NO_GPU, nvidia_driver=True), "gpu").allows
    assert "nvidia-smi" in one(replace(NO_GPU, nvidia_driver=True, torch_cuda="13.0"), "gpu").allows
    without = one(replace(LAPTOP, bitsandbytes_backends=["cpu"]), "bitsandbytes")
    assert without.status == "limited" and "no CUDA library" in without.allows


@pytest.mark.parametrize(
    ("flags", "status", "allows"),
    [
        (["avx2", "avx512f", "avx512_bf16"], "ok", "yes, fast bf16 path"),
        (["avx2", "avx512f", "amx_bf16"], "ok", "yes, fast bf16 path"),
        (["neon", "bf16"], "ok", "bf16 in hardware"),
        (["avx2", "avx512f"], "limited", "compute_dtype=fp32 is faster"),
        (["avx2"], "limited", "compute_dtype=fp32 is faster"),
        ([], "limited", "slow without AVX2"),
    ],
)
def test_processors(flags: list[str], status: str, allows: str) -> None:
    found = one(replace(NO_GPU, cpu_flags=flags), "cpu")
    assert found.status == status and allows in found.allows


@pytest.mark.parametrize(
    ("system", "status", "allows"),
    [
        ("Linux", "ok", "training"),
        ("WSL", "ok", "/mnt/c"),
        (
            "macOS",
            "limited",
            "not measured yet: training, evaluation and export should run on the CPU; Apple's GPU is not used",
        ),
        ("Windows", "limited", "not measured yet"),
        ("FreeBSD", "limited", "not measured yet"),
    ],
)
def test_systems(system: str, status: str, allows: str) -> None:
    found = one(replace(NO_GPU, system=system), "system")
    assert found.status == status and allows in found.allows


def test_versions_outside_the_read_ranges_are_marked() -> None:
    machine = replace(LAPTOP, python="3.13.1", libraries={"torch": "2.10.0+cu128", "bitsandbytes": None})
    assert one(machine, "python").status == "limited" and ">=3.11,<3.13" in one(machine, "python").allows
    assert one(LAPTOP, "python").allows == "within the supported range >=3.11,<3.13"
    torch, bitsandbytes = findings(machine, "libraries")
    assert torch.status == "limited" and "outside the supported range" in torch.allows
    assert bitsandbytes.status == "missing" and "pip install 'bitsandbytes>=0.50,<0.51'" in bitsandbytes.allows
    assert not findings(machine, "bitsandbytes")
    assert not judge(machine).ready


def test_local_and_odd_versions() -> None:
    good = replace(LAPTOP, libraries={"torch": "2.13.0+cpu", "bitsandbytes": "0.50.2"})
    assert one(good, "libraries").status == "ok"
    odd = replace(LAPTOP, libraries={"torch": "from-source", "bitsandbytes": "0.50.2"})
    assert findings(odd, "libraries")[0].status == "limited"


def test_not_installed_as_a_package() -> None:
    assert "pip install -e ." in one(replace(LAPTOP, libraries={}, library_ranges={}), "libraries").allows


@pytest.mark.parametrize(("free", "fits"), [(12, "about 13B"), (2, "about 360M"), (1, "too little free")])
def test_memory(free: int, fits: str) -> None:
    assert fits in one(replace(NO_GPU, free_memory_bytes=free * GIB), "memory").allows


def test_disk_and_bitsandbytes_and_hub() -> None:
    poor = replace(NO_GPU, free_disk_bytes=GIB, bitsandbytes_backends=[], offline=["HF_HUB_OFFLINE"])
    assert one(poor, "disk").status == "limited"
    assert "plain PyTorch" in one(poor, "bitsandbytes").allows
    assert one(poor, "hub").found == "offline by HF_HUB_OFFLINE"
    assert "was not tried" in one(NO_GPU, "hub").allows


def test_table_and_json() -> None:
    diagnosis = judge(replace(LAPTOP, cpu="CPU [rev 2]", libraries={"torch": "2.12.0", "bitsandbytes": None}))
    console = Console(file=StringIO(), width=160)
    print_diagnosis(diagnosis, console)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "CPU [rev 2]" in text and "MISSING" in text and "bf16: yes" in text
    tree = json.loads(json.dumps(diagnosis.to_json()))
    assert tree["ready"] is False and tree["machine"]["gpus"][0]["capability"] == [8, 9]


def test_cpuinfo_of_x86_and_arm() -> None:
    x86 = "processor : 0\nmodel name\t: Intel(R) Core(TM)\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n"
    assert parse_cpuinfo(x86) == ("Intel(R) Core(TM)", ["avx2", "avx512f", "avx512_bf16", "amx_bf16"])
    assert parse_cpuinfo("processor : 0\nFeatures : fp asimd bf16\n") == ("", ["neon", "bf16"])
    assert parse_cpuinfo("") == ("", [])
    assert capability_flags("AVX512") == ["avx2", "avx512f"] and capability_flags("DEFAULT") == []


def test_system_names() -> None:
    assert system_name("Linux", "5.15.153.1-microsoft-standard-WSL2") == "WSL"
    assert system_name("Linux", "6.8.0-45-generic") == "Linux"
    assert system_name("Darwin", "24.1.0") == "macOS"
    assert system_name("Windows", "11") == "Windows"


def test_offline_variables() -> None:
    assert offline_variables({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "0", "HF_DATASETS_OFFLINE": "yes"}) == [
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
    ]


def test_ranges_of_a_package() -> None:
    python, libraries = read_ranges("evaluate")
    assert python and "datasets" in libraries and "pytest" not in libraries
    assert read_ranges("no-such-distribution-here") == ("", {})


def test_this_machine_without_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the doctor opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    machine = probe(tmp_path)
    assert machine.cores >= 1 and machine.cpu and machine.python.count(".") == 2
    assert 0 < machine.free_memory_bytes <= machine.memory_bytes and machine.free_disk_bytes > 0
    assert "cpu" in machine.bitsandbytes_backends
    assert json.dumps(diagnose().to_json())


def test_importing_the_doctor_imports_no_torch_and_probing_no_bitsandbytes() -> None:
    script = (
        "import sys, qlora_kit.doctor\n"
        "assert 'torch' not in sys.modules\n"
        "qlora_kit.doctor.diagnose()\n"
        "assert 'bitsandbytes' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_processors_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    monkeypatch.setattr(machine_module.platform, "processor", lambda: "")
    monkeypatch.setattr(machine_module.platform, "machine", lambda: "AMD64")
    name, flags = machine_module._cpu()
    assert name == "AMD64" and set(flags) <= {"avx2", "avx512f"}
    answer = subprocess.CompletedProcess([], 0, stdout="Apple M3\n")
    monkeypatch.setattr(machine_module.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(machine_module.sys, "platform", "darwin")
    monkeypatch.setattr(machine_module.platform, "machine", lambda: "arm64")
    assert machine_module._cpu() == ("Apple M3", ["neon"])


def test_a_containers_memory_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"memory.max": f"{GIB}\n", "memory.current": f"{GIB // 4}\n"}
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: texts[self.name])
    assert machine_module._memory() == (GIB, 3 * GIB // 4)
    texts["memory.max"] = "max\n"
    assert machine_module._memory()[0] > GIB


def test_graphics_cards_come_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    card = SimpleNamespace(name="RTX 4090", total_memory=24 * GIB, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert machine_module._gpus()[0] == [Gpu("RTX 4090", 24 * GIB, (8, 9))]


def test_a_machine_without_torch_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(machine_module.util, "find_spec", lambda name: None)
    assert machine_module._gpus() == ([], None)
    assert machine_module._bitsandbytes_backends() == []
    assert machine_module._version("no-such-distribution-here") is None

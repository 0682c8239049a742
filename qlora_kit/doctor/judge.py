"""What a machine allows: facts in, findings out. Pure functions, so that any machine can be made up and judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_kit.doctor.machine import Gpu, Machine

Status = Literal["ok", "limited", "missing"]
GIB = 2**30
_AMPERE, _TURING = (8, 0), (7, 5)


@dataclass(frozen=True)
class Finding:
    """One thing found, and what it allows or what to do about it."""

    area: str
    status: Status
    found: str
    allows: str


@dataclass(frozen=True)
class Diagnosis:
    """The machine and all findings about it."""

    machine: Machine
    findings: list[Finding]

    @property
    def ready(self) -> bool:
        """False where something is missing that training cannot do without."""
        return all(finding.status != "missing" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self) | {"ready": self.ready}


def judge(machine: Machine) -> Diagnosis:
    """All findings about a machine, in the order in which they are shown."""
    judges = (_system, _python, _libraries, _cpu, _memory, _disk, _gpus, _optimizer, _bitsandbytes, _hub)
    return Diagnosis(machine, [finding for one in judges for finding in one(machine)])


def _system(machine: Machine) -> Iterator[Finding]:
    found = f"{machine.system} {machine.release}, {machine.architecture}"
    notes = {
        "Linux": "training, evaluation, export",
        "WSL": "training, evaluation, export; keep model and data on the Linux side, /mnt/c is many times slower",
        "Windows": "not measured yet: training, evaluation and export should run; the Makefile needs WSL or make",
        "macOS": "not measured yet: training, evaluation and export should run on the CPU; Apple's GPU is not used",
    }
    status: Status = "ok" if machine.system in ("Linux", "WSL") else "limited"
    yield Finding("system", status, found, notes.get(machine.system, "not measured yet"))


def _python(machine: Machine) -> Iterator[Finding]:
    inside = _inside(machine.python, machine.python_range)
    allows = f"{'within' if inside else 'outside'} the supported range {machine.python_range}"
    yield Finding("python", "ok" if inside else "limited", machine.python, allows)


def _libraries(machine: Machine) -> Iterator[Finding]:
    if not machine.library_ranges:
        yield Finding("libraries", "limited", "qlora-kit is not installed as a package", "run `pip install -e .`")
    good = []
    for name, supported in machine.library_ranges.items():
        version = machine.libraries.get(name)
        if version is None:
            yield Finding("libraries", "missing", f"{name} is not installed", f"run `pip install '{name}{supported}'`")
        elif not _inside(version, supported):
            yield Finding("libraries", "limited", f"{name} {version}", f"outside the supported range {supported}")
        else:
            good.append(f"{name} {version}")
    if good:
        yield Finding("libraries", "ok", ", ".join(good), "within the supported ranges")


def _cpu(machine: Machine) -> Iterator[Finding]:
    found = f"{machine.cpu}, {machine.cores} cores, {', '.join(machine.cpu_flags) or 'no vector flags known'}"
    flags = set(machine.cpu_flags)
    if flags & {"avx512_bf16", "amx_bf16"}:
        yield Finding("cpu", "ok", found, "nf4 training on CPU: yes, fast bf16 path")
    elif "bf16" in flags:
        yield Finding("cpu", "ok", found, "nf4 training on CPU: yes, bf16 in hardware")
    elif flags:
        slow = "nf4 training on CPU: yes, but bf16 is emulated here; base.compute_dtype=fp32 is faster"
        yield Finding("cpu", "limited", found, slow)
    else:
        slow = "nf4 training on CPU: slow without AVX2; base.compute_dtype=fp32 is faster than bf16"
        yield Finding("cpu", "limited", found, slow)


def _memory(machine: Machine) -> Iterator[Finding]:
    found = f"{machine.memory_bytes / GIB:.1f} GiB, {machine.free_memory_bytes / GIB:.1f} GiB of it free"
    fits = _fits(machine.free_memory_bytes, 1.5 * GIB)
    if fits is None:
        yield Finding("memory", "limited", found, "too little free for training on the CPU; close other programs")
    else:
        yield Finding("memory", "ok", found, f"nf4 training on CPU: models up to about {fits} (`plan` says exactly)")


def _disk(machine: Machine) -> Iterator[Finding]:
    found = f"{machine.free_disk_bytes / GIB:.1f} GiB free here"
    if machine.free_disk_bytes < 5 * GIB:
        yield Finding("disk", "limited", found, "a small model and its bundles; a 7B base takes 15 GB, its bundle more")
    else:
        yield Finding("disk", "ok", found, "checkpoints are small; an fp32 bundle takes 4 bytes a weight of the base")


def _gpus(machine: Machine) -> Iterator[Finding]:
    for gpu in machine.gpus:
        yield _gpu(gpu)
    if machine.gpus:
        return
    if machine.nvidia_driver and machine.torch_cuda is None:
        mend = "training runs on the CPU; install a CUDA build of torch (pytorch.org/get-started) to use the card"
        yield Finding("gpu", "limited", "an NVIDIA driver, but torch is built without CUDA", mend)
    elif machine.nvidia_driver:
        mend = "training runs on the CPU; check `nvidia-smi` and that the driver is new enough for this CUDA"
        yield Finding(
            "gpu", "limited", f"an NVIDIA driver and torch for CUDA {machine.torch_cuda}, but no device", mend
        )
    else:
        yield Finding("gpu", "ok", "none", "training, evaluation and export run on the CPU")


def _gpu(gpu: Gpu) -> Finding:
    major, minor = gpu.capability
    found = f"{gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB, compute capability {major}.{minor}"
    fits = _fits(gpu.memory_bytes, 1.5 * GIB)
    size = f"nf4 training of models up to about {fits}" if fits else "too little memory for training"
    if gpu.capability >= _AMPERE:
        return Finding("gpu", "ok" if fits else "limited", found, f"bf16: yes; {size} (`plan` says exactly)")
    if gpu.capability >= _TURING:
        return Finding("gpu", "limited", found, f"no bf16, use base.compute_dtype=fp16; {size} (`plan` says exactly)")
    return Finding(
        "gpu", "limited", found, "older than Turing: current torch and bitsandbytes builds may not run on it"
    )


def _optimizer(machine: Machine) -> Iterator[Finding]:
    if machine.gpus:
        yield Finding("optimizer", "ok", "CUDA", "paged and 8-bit AdamW: yes")
    else:
        yield Finding(
            "optimizer", "ok", "no CUDA", "paged 8-bit optimizer: needs CUDA, torch AdamW takes its place (fp32 states)"
        )


def _bitsandbytes(machine: Machine) -> Iterator[Finding]:
    backends = machine.bitsandbytes_backends
    found = ", ".join(backends) or "no native library"
    if not machine.libraries.get("bitsandbytes"):
        return  # said among the libraries
    if machine.gpus and not any(name.startswith("cuda") for name in backends):
        yield Finding("bitsandbytes", "limited", found, "no CUDA library: quantized training on the card will not work")
    elif not backends:
        yield Finding("bitsandbytes", "limited", found, "nf4, fp4 and int8 run in plain PyTorch, slowly")
    else:
        yield Finding("bitsandbytes", "ok", found, "nf4, fp4 and int8 bases")


def _hub(machine: Machine) -> Iterator[Finding]:
    if machine.offline:
        allows = "local folders, GGUF files and what is cached; unset it to download"
        yield Finding("hub", "ok", f"offline by {', '.join(machine.offline)}", allows)
    else:
        allows = "hub ids are downloaded when named; whether the hub can be reached was not tried"
        yield Finding("hub", "ok", "not switched off", allows)


def _inside(version: str, supported: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(supported).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _fits(memory_bytes: float, reserve_bytes: float) -> str | None:
    """The largest usual model that trains in nf4: about 0.75 bytes a weight, adapter and activations included."""
    weights = (memory_bytes - reserve_bytes) / 0.75
    sizes = {"70B": 70e9, "32B": 32e9, "13B": 13e9, "8B": 8e9, "3B": 3e9, "1B": 1e9, "360M": 0.36e9, "135M": 0.135e9}
    return next((name for name, size in sizes.items() if size <= weights), None)

"""Open, check, verify and run an ONNX bundle on a CPU, without torch.

The names below are loaded on first use, so that `qlora-runtime --help` does not pay for onnxruntime. Two
functions are named like their modules and are taken from there:

    from qlora_runtime.generate import generate
    from qlora_runtime.verify import verify
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_runtime.bundle import Bundle
    from qlora_runtime.errors import BundleError
    from qlora_runtime.generate import Completion, TextStream, stream_text
    from qlora_runtime.manifest import check_files, sha256_file, write_manifest
    from qlora_runtime.reference import Reference, ReferencePrompt, Tolerance, read_reference, write_reference
    from qlora_runtime.sampling import Sampling
    from qlora_runtime.schema import FileRecord, Manifest, ModelInfo, Provenance, Verification, read_manifest
    from qlora_runtime.seq2seq import Seq2SeqBundle
    from qlora_runtime.task_bundle import TaskBundle
    from qlora_runtime.verify import Report, compare, verify_directory

__version__ = "0.1.0"

_HOME = {
    "Bundle": "bundle",
    "BundleError": "errors",
    "Completion": "generate",
    "FileRecord": "schema",
    "Manifest": "schema",
    "ModelInfo": "schema",
    "Provenance": "schema",
    "Reference": "reference",
    "ReferencePrompt": "reference",
    "Report": "verify",
    "Sampling": "sampling",
    "Seq2SeqBundle": "seq2seq",
    "TextStream": "generate",
    "TaskBundle": "task_bundle",
    "Tolerance": "reference",
    "Verification": "schema",
    "check_files": "manifest",
    "compare": "verify",
    "read_manifest": "schema",
    "read_reference": "reference",
    "sha256_file": "manifest",
    "stream_text": "generate",
    "verify_directory": "verify",
    "write_manifest": "manifest",
    "write_reference": "reference",
}

__all__ = [
    "Bundle",
    "BundleError",
    "Completion",
    "FileRecord",
    "Manifest",
    "ModelInfo",
    "Provenance",
    "Reference",
    "ReferencePrompt",
    "Report",
    "Sampling",
    "Seq2SeqBundle",
    "TaskBundle",
    "TextStream",
    "Tolerance",
    "Verification",
    "check_files",
    "compare",
    "read_manifest",
    "read_reference",
    "sha256_file",
    "stream_text",
    "verify_directory",
    "write_manifest",
    "write_reference",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qlora_runtime' has no attribute {name!r}")
    return getattr(import_module(f"qlora_runtime.{_HOME[name]}"), name)

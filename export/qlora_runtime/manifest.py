"""Making a bundle's manifest, and holding a bundle to it."""

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from qlora_runtime.atomic import write_atomic
from qlora_runtime.errors import (
    BundleError,
    ForeignFileError,
    HashMismatchError,
    MissingFileError,
    UnexpectedFileError,
    UnsafePathError,
)
from qlora_runtime.schema import (
    MANIFEST,
    FileRecord,
    Manifest,
    ModelInfo,
    Provenance,
    Verification,
    parse_manifest,
    read_manifest,
)
from qlora_runtime.strict_json import dump
from qlora_runtime.task import Seq2SeqTask, TaskInfo

GRAPH = "onnx/model.onnx"
ENCODER_GRAPH, DECODER_GRAPH = "onnx/encoder_model.onnx", "onnx/decoder_model.onnx"  # of an encoder-decoder
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
REQUIRED = (
    GRAPH,
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "reference.json",
    TOKENIZER,
    "tokenizer_config.json",
)
REQUIRED_FOR_TASKS = tuple(
    name for name in REQUIRED if name not in ("genai_config.json", "generation_config.json")
)
REQUIRED_FOR_SEQ2SEQ = (ENCODER_GRAPH, DECODER_GRAPH, *(name for name in REQUIRED_FOR_TASKS if name != GRAPH))


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(bundle_dir: Path | str, hashes: bool = True) -> Manifest:
    """The manifest, once every file is known to be what it promises. `hashes=False` compares sizes only.

    Raises:
        MissingFileError, HashMismatchError, UnexpectedFileError, ForeignFileError, UnsafePathError: the
            first disagreement between the files and the manifest.
        FormatError: the manifest itself is not in order, see `read_manifest`.
    """
    manifest = read_manifest(bundle_dir)
    for problem in find_problems(Path(bundle_dir), manifest, hashes):
        raise problem
    return manifest


def find_problems(bundle_dir: Path, manifest: Manifest, hashes: bool = True) -> Iterator[BundleError]:
    """Every disagreement between the files in `bundle_dir` and `manifest`, cheapest to find first."""
    yield from _missing_from_manifest(manifest)
    yield from _foreign(manifest)
    yield from _unexpected(bundle_dir, manifest)
    for path, record in manifest.files.items():
        if problem := _file_problem(bundle_dir, path, record, hashes):
            yield problem


def write_manifest(
    bundle_dir: Path | str,
    *,
    profile: str,
    model: ModelInfo,
    provenance: Provenance,
    verification: Verification | None,
    tools: Mapping[str, str],
    created: str | None = None,
    task: TaskInfo | None = None,
) -> Manifest:
    """Hash every file in `bundle_dir` and put manifest.json beside them, in one atomic step.

    `verification` is None for a bundle that is still to be verified; write the manifest again with the
    result. `created` is an ISO 8601 time; None means now. `task` is None for a model that generates. Hidden
    files and documentation (*.md, LICENSE) are left out.

    Raises:
        MissingFileError, ForeignFileError: the folder is no whole bundle, or its tokenizer or chat template
            is not the one in `provenance`.
        FormatError: an argument has a value that could not be read back.
    """
    root = Path(bundle_dir)
    manifest = Manifest(
        profile=profile,
        created=created or datetime.now(UTC).isoformat(timespec="seconds"),
        files={
            path: FileRecord(sha256_file(root / path), (root / path).stat().st_size)
            for path in _present(root)
        },
        model=model,
        provenance=provenance,
        verification=verification,
        tools=tools,
        task=task,
    )
    value = manifest.to_json()
    parse_manifest(value)
    for problem in find_problems(root, manifest, hashes=False):
        raise problem
    write_atomic(root / MANIFEST, dump(value))
    return manifest


def _present(root: Path) -> list[str]:
    """The files that the manifest must know: all but itself, hidden ones and documentation."""
    paths = sorted(
        path.relative_to(root) for path in root.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    return [path.as_posix() for path in paths if path.as_posix() != MANIFEST and not _is_ignored(path)]


def _is_ignored(path: Path) -> bool:
    """Hidden files and documentation, which no runner reads; a model file is never ignored."""
    hidden = any(part.startswith(".") for part in path.parts)
    documentation = path.suffix == ".md" or path.name.startswith("LICENSE")
    return (hidden or documentation) and ".onnx" not in path.name


def _missing_from_manifest(manifest: Manifest) -> Iterator[BundleError]:
    for path in _required(manifest):
        if path not in manifest.files:
            yield MissingFileError(
                f"{path} is not among the bundle's files; every bundle has it. Export it again."
            )


def _required(manifest: Manifest) -> tuple[str, ...]:
    if manifest.task is None:
        return REQUIRED
    return REQUIRED_FOR_SEQ2SEQ if isinstance(manifest.task, Seq2SeqTask) else REQUIRED_FOR_TASKS


def _foreign(manifest: Manifest) -> Iterator[BundleError]:
    expected = {
        TOKENIZER: manifest.provenance.tokenizer_sha256,
        CHAT_TEMPLATE: manifest.provenance.chat_template_sha256,
    }
    for path, trained_with in expected.items():
        record = manifest.files.get(path)
        shipped = record.sha256 if record else None
        if shipped != trained_with:
            yield ForeignFileError(
                f"{path} is not the one the model was trained with: the bundle has {_short(shipped)}, "
                f"the provenance says {_short(trained_with)}. It is a file of another bundle: export again."
            )


def _unexpected(root: Path, manifest: Manifest) -> Iterator[BundleError]:
    for path in _present(root):
        if path not in manifest.files:
            yield UnexpectedFileError(
                f"{path} lies in the bundle, but {MANIFEST} does not list it. Only listed files are allowed: "
                "remove it, or export the bundle again."
            )


def _file_problem(root: Path, path: str, record: FileRecord, hashes: bool) -> BundleError | None:
    file = root / path
    if not file.resolve().is_relative_to(root.resolve()):
        return UnsafePathError(
            f"{path} is a link that leads out of the bundle, to {file.resolve()}. Only files inside it are "
            "allowed: copy the bundle with its links followed (cp -L)."
        )
    if not file.is_file():
        return MissingFileError(f"{path} is missing, though {MANIFEST} lists it. Copy the bundle again.")
    if (size := file.stat().st_size) != record.bytes:
        return HashMismatchError(
            f"{path} has {size} bytes, {MANIFEST} says {record.bytes}. It was cut, changed, or is a file of "
            "another bundle: copy the bundle again."
        )
    if hashes and (found := sha256_file(file)) != record.sha256:
        return HashMismatchError(
            f"{path} has SHA-256 {_short(found)}, {MANIFEST} says {_short(record.sha256)}. It was damaged, "
            "changed, or is a file of another bundle: copy the bundle again."
        )
    return None


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:16] + "..."

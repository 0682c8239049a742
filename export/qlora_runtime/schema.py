"""What manifest.json says, as plain dataclasses, read strictly."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from qlora_runtime.errors import FormatError, UnknownFormatError, UnsafePathError
from qlora_runtime.strict_json import Fields, JsonObject, is_count, is_list_of, load_object
from qlora_runtime.task import TaskInfo, parse_task, task_to_json

FORMAT = "qlora-bundle/1"
MANIFEST = "manifest.json"
ADAPTERS, ADAPTER_FILE = "adapters", "adapter.onnx_adapter"
"""Where adapters lie that are swapped at run time: adapters/NAME/adapter.onnx_adapter."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """The promise about one file: its SHA-256 in lower-case hex, and its size."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """What a runner must know about the model."""

    architecture: str  # as in config.json, such as "LlamaForCausalLM"
    vocab_size: int
    context_length: int  # the most tokens, prompt and answer together
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


@dataclass(frozen=True)
class Provenance:
    """Where the model comes from. The two hashes are those of the training side's own files."""

    base: Mapping[str, Any]
    adapter: Mapping[str, Any] | None  # None: a base model, exported untuned
    tokenizer_sha256: str
    chat_template_sha256: str | None  # None: the model has no chat_template.jinja


@dataclass(frozen=True)
class Verification:
    """How far the bundle was from the trained model when it was made."""

    passed: bool
    tolerance: Mapping[str, Any]
    distances: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json."""

    profile: str
    created: str  # ISO 8601
    files: Mapping[str, FileRecord]
    model: ModelInfo
    provenance: Provenance
    verification: Verification | None  # None: not verified yet
    tools: Mapping[str, str]
    task: TaskInfo | None = None  # None: a causal language model, which generates

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that can be put beside the base; none where the model is whole."""
        paths = [PurePosixPath(path).parts for path in self.files]
        return sorted(
            parts[1] for parts in paths if len(parts) == 3 and parts[::2] == (ADAPTERS, ADAPTER_FILE)
        )

    def to_json(self) -> JsonObject:
        """The object that `parse_manifest` reads back as this manifest."""
        value = {"format": FORMAT} | asdict(self)
        value["model"]["eos_token_ids"] = list(self.model.eos_token_ids)
        del value["task"]
        if self.task is not None:
            value["task"] = task_to_json(self.task)
        return value


def read_manifest(bundle_dir: Path | str) -> Manifest:
    """The manifest of the bundle in `bundle_dir`.

    Raises:
        MissingFileError: there is no manifest.json.
        UnknownFormatError: it is of another format.
        FormatError: a field is missing, unknown or of another type.
        UnsafePathError: it lists a path that leads out of the bundle.
    """
    return parse_manifest(load_object(Path(bundle_dir) / MANIFEST))


def parse_manifest(value: JsonObject) -> Manifest:
    """The manifest in a JSON object; errors as for `read_manifest`."""
    if value.get("format") != FORMAT:
        raise UnknownFormatError(
            f"{MANIFEST}: format is {value.get('format')!r}, this version reads {FORMAT!r}. "
            "Install the qlora-runtime that fits the bundle, or export it again."
        )
    known = {"format", "profile", "created", "files", "model", "provenance", "verification", "tools"}
    fields = Fields(value, MANIFEST, known | {"task"})
    return Manifest(
        profile=fields.text("profile"),
        created=fields.take("created", "a time in ISO 8601", _is_time),
        files={path: _file_record(path, record) for path, record in fields.object("files").items()},
        model=_model_info(fields.object("model")),
        provenance=_provenance(fields.object("provenance")),
        verification=_verification(fields.take("verification", "an object or null", _is_object_or_null)),
        tools=fields.take("tools", "an object of strings", _is_text_map),
        task=parse_task(fields.object("task"), f"{MANIFEST}: task") if "task" in value else None,
    )


def safe_path(path: str) -> str:
    """`path` itself, if it is a plain relative path below the bundle, written with '/'.

    Raises:
        UnsafePathError: it is absolute, has '..', '.', '//' or a backslash, or names the manifest itself.
    """
    plain = str(PurePosixPath(path)) == path and "\\" not in path and "\0" not in path
    relative = not PurePosixPath(path).is_absolute() and not PureWindowsPath(path).drive
    if not (plain and relative) or ".." in PurePosixPath(path).parts or path in (".", MANIFEST):
        raise UnsafePathError(
            f"{MANIFEST} lists the file {path!r}. Allowed are plain relative paths below the bundle, such as "
            "'onnx/model.onnx'. Do not use this bundle unless you trust where it comes from."
        )
    return path


def _file_record(path: str, value: Any) -> FileRecord:
    fields = Fields(value, f"{MANIFEST}: files[{safe_path(path)!r}]", {"sha256", "bytes"})
    return FileRecord(
        sha256=fields.take("sha256", "64 lower-case hex digits", _is_sha256), bytes=fields.count("bytes")
    )


def _model_info(value: JsonObject) -> ModelInfo:
    known = {"architecture", "vocab_size", "context_length", "eos_token_ids", "pad_token_id"}
    fields = Fields(value, f"{MANIFEST}: model", known)
    info = ModelInfo(
        architecture=fields.text("architecture"),
        vocab_size=fields.count("vocab_size"),
        context_length=fields.count("context_length"),
        eos_token_ids=tuple(fields.take("eos_token_ids", "a list of token ids", is_list_of(is_count))),
        pad_token_id=fields.take("pad_token_id", "a token id or null", lambda v: v is None or is_count(v)),
    )
    special = [*info.eos_token_ids, *([] if info.pad_token_id is None else [info.pad_token_id])]
    if outside := [token for token in special if token >= info.vocab_size]:
        raise FormatError(
            f"{MANIFEST}: model: token ids {outside} are outside the vocab_size {info.vocab_size}."
        )
    return info


def _provenance(value: JsonObject) -> Provenance:
    known = {"base", "adapter", "tokenizer_sha256", "chat_template_sha256"}
    fields = Fields(value, f"{MANIFEST}: provenance", known)
    return Provenance(
        base=fields.object("base"),
        adapter=fields.take("adapter", "an object or null", _is_object_or_null),
        tokenizer_sha256=fields.take("tokenizer_sha256", "64 lower-case hex digits", _is_sha256),
        chat_template_sha256=fields.take(
            "chat_template_sha256", "64 lower-case hex digits or null", lambda v: v is None or _is_sha256(v)
        ),
    )


def _verification(value: JsonObject | None) -> Verification | None:
    if value is None:
        return None
    fields = Fields(value, f"{MANIFEST}: verification", {"passed", "tolerance", "distances"})
    return Verification(
        passed=fields.take("passed", "true or false", lambda v: isinstance(v, bool)),
        tolerance=fields.object("tolerance"),
        distances=fields.object("distances"),
    )


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_object_or_null(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value) is not None
    except ValueError:
        return False

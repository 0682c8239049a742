"""The tasks of bundles, all but causal language modelling, as the manifest's `task` says them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from qlora_runtime.errors import FormatError
from qlora_runtime.strict_json import Fields, JsonObject, is_count

Scheme = Literal["bio", "plain"]


@dataclass(frozen=True)
class ClassificationTask:
    """One label for a text or a pair of texts, or any number of them (`multi_label`)."""

    type: ClassVar[str] = "classification"
    labels: tuple[str, ...]  # in the order of the logits
    multi_label: bool
    max_seq_len: int  # tokens of a row; longer texts are cut


@dataclass(frozen=True)
class RegressionTask:
    """One number for a text or a pair of texts."""

    type: ClassVar[str] = "regression"
    max_seq_len: int


@dataclass(frozen=True)
class TaggingTask:
    """A tag for each word. bio: tags are O, B-TYPE and I-TYPE; plain: a tag is a name."""

    type: ClassVar[str] = "tagging"
    labels: tuple[str, ...]
    scheme: Scheme
    max_seq_len: int  # longer sentences are tagged in several rows, cut between words


@dataclass(frozen=True)
class QuestionAnsweringTask:
    """The part of a context that answers a question."""

    type: ClassVar[str] = "question_answering"
    stride: int  # tokens that two windows of a long context share
    max_answer_tokens: int
    unanswerable: bool  # whether a context may hold no answer
    max_seq_len: int  # tokens of a window, question included


@dataclass(frozen=True)
class Seq2SeqTask:
    """A text for a text, by an encoder and a decoder."""

    type: ClassVar[str] = "seq2seq"
    source_prefix: str  # written before each source, as in training
    max_seq_len: int  # tokens of a source; longer ones are refused
    decoder_start_token_id: int  # what the decoder reads first
    forced_bos_token_id: (
        int | None
    )  # what every answer begins with (the language, of a model that knows several)


VERBS = {
    "classification": "classify",
    "regression": "rate",
    "tagging": "tag",
    "question_answering": "answer",
    "seq2seq": "generate",
}
"""What a bundle of each task is asked to do: methods of `TaskBundle`, and verbs of the command line."""

TaskInfo = ClassificationTask | RegressionTask | TaggingTask | QuestionAnsweringTask | Seq2SeqTask


def task_to_json(task: TaskInfo) -> JsonObject:
    """The object that `parse_task` reads back as this task."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(task).items()
    }
    return {"type": task.type} | fields


def parse_task(value: JsonObject, where: str) -> TaskInfo:
    """The task in a JSON object; `where` names it in messages.

    Raises:
        FormatError: an unknown type, or a field is missing, unknown or of another type.
    """
    kind = value.get("type")
    if kind not in _READERS:
        raise FormatError(
            f"{where}: type is {kind!r}; this version knows {', '.join(_READERS)}. Install the qlora-runtime "
            "that fits the bundle, or export it again."
        )
    known, read = _READERS[kind]
    return read(Fields(value, where, {"type", "max_seq_len", *known}))


def _classification(fields: Fields) -> ClassificationTask:
    return ClassificationTask(_labels(fields), _flag(fields, "multi_label"), _positive(fields, "max_seq_len"))


def _regression(fields: Fields) -> RegressionTask:
    return RegressionTask(_positive(fields, "max_seq_len"))


def _tagging(fields: Fields) -> TaggingTask:
    scheme: Scheme = fields.take("scheme", "bio or plain", lambda value: value in ("bio", "plain"))
    return TaggingTask(_labels(fields), scheme, _positive(fields, "max_seq_len"))


def _question_answering(fields: Fields) -> QuestionAnsweringTask:
    return QuestionAnsweringTask(
        fields.count("stride"),
        _positive(fields, "max_answer_tokens"),
        _flag(fields, "unanswerable"),
        _positive(fields, "max_seq_len"),
    )


def _seq2seq(fields: Fields) -> Seq2SeqTask:
    return Seq2SeqTask(
        str(fields.take("source_prefix", "text", lambda value: isinstance(value, str))),
        _positive(fields, "max_seq_len"),
        fields.count("decoder_start_token_id"),
        fields.take("forced_bos_token_id", "a token id or null", lambda v: v is None or is_count(v)),
    )


_READERS: dict[Any, tuple[set[str], Callable[[Fields], TaskInfo]]] = {  # type: (its fields, who reads them)
    "classification": ({"labels", "multi_label"}, _classification),
    "regression": (set(), _regression),
    "tagging": ({"labels", "scheme"}, _tagging),
    "question_answering": ({"stride", "max_answer_tokens", "unanswerable"}, _question_answering),
    "seq2seq": ({"source_prefix", "decoder_start_token_id", "forced_bos_token_id"}, _seq2seq),
}


def _labels(fields: Fields) -> tuple[str, ...]:
    return tuple(fields.take("labels", "a list of at least two different names", _are_labels))


def _positive(fields: Fields, key: str) -> int:
    return int(fields.take(key, "an integer of at least 1", lambda value: is_count(value) and value > 0))


def _flag(fields: Fields, key: str) -> bool:
    return bool(fields.take(key, "true or false", lambda value: isinstance(value, bool)))


def _are_labels(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        return False
    return len(value) >= 2 and len(set(value)) == len(value)

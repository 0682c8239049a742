"""What a row means once read: plain text, a prompt with its completion, or a conversation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_kit.data.task_examples import (
    LabelledImage,
    LabelledText,
    QuestionOnText,
    SourceTarget,
    TaggedWords,
    TaskExample,
    Utterance,
)
from qlora_kit.errors import DataError

Message = dict[str, Any]


class RowError(DataError):
    """One row cannot be used: stops the run or is counted and left out, as `data.bad_rows` says.

    Args:
        problem: what is wrong, naming the field.
        reason: two or three words under which skipped rows are counted.
    """

    def __init__(self, problem: str, *, reason: str, **details: Any) -> None:
        super().__init__(problem, **details)
        self.problem, self.reason, self.details = problem, reason, details

    def at(self, place: str) -> RowError:
        """The same error with the file and row before it."""
        return RowError(f"{place}: {self.problem}", reason=self.reason, **self.details)


@dataclass(frozen=True)
class PlainText:
    """Text to continue as it stands; every token carries loss."""

    text: str


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and the text that should follow it."""

    prompt: str
    completion: str
    also: tuple[str, ...] = ()
    """Completions that are as good: written answers are scored against them too, none is trained on."""

    def as_conversation(self) -> Conversation:
        """One user turn and one assistant turn."""
        return Conversation(
            ({"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion})
        )


@dataclass(frozen=True)
class Conversation:
    """Turns in OpenAI's form (`role`, `content`, `tool_calls`) and the tools they may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    muted: tuple[int, ...] = ()
    """Indices of the assistant turns that are read, but not learned (`weight: 0`)."""

    def last_assistant(self) -> int:
        """Index of the last assistant turn; the schemas guarantee that there is one."""
        return max(k for k, message in enumerate(self.messages) if message["role"] == "assistant")


Example = PlainText | PromptCompletion | Conversation
AnyExample = Example | TaskExample


def content_hash(example: AnyExample) -> int:
    """64-bit hash of the whole row: equal for equal content, whichever schema it was written in."""
    return _digest(_canonical(example), b"")


def row_hash(example: AnyExample) -> str:
    """16 hexadecimal digits: as `content_hash`, of an image or a sound the bytes of its file and not its path, so that
    the same files elsewhere are the same rows, and other files in their place are not.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(example, LabelledImage | Utterance):
        digest = hashlib.blake2b(Path(example.path).read_bytes(), digest_size=16).hexdigest()
        return f"{content_hash(replace(example, path=digest)):016x}"
    return f"{content_hash(example):016x}"


def split_key(example: AnyExample, seed: int) -> int:
    """64-bit hash, seeded, of what comes before the last assistant turn (plain text: of all of it).

    Rows with one prompt and several completions share a key, so a split by key never leaks a prompt. Rows of the
    other tasks share it with those that have the same text, question on the same context or not.
    """
    if isinstance(example, PromptCompletion):
        example = example.as_conversation()
    if isinstance(example, Conversation):
        example = Conversation(example.messages[: example.last_assistant()], example.tools)
    elif not isinstance(example, PlainText):
        return _digest(json.dumps(_asked(example)), seed.to_bytes(8, "little"))
    return _digest(_canonical(example), seed.to_bytes(8, "little"))


def _canonical(example: AnyExample) -> str:
    if isinstance(example, PlainText):
        return json.dumps(["text", example.text])
    if not isinstance(example, PromptCompletion | Conversation):
        fields = {name: value for name, value in asdict(example).items() if name != "also" or value}
        return json.dumps([type(example).__name__, fields], sort_keys=True)
    chat = example.as_conversation() if isinstance(example, PromptCompletion) else example
    also = [example.also] if isinstance(example, PromptCompletion) and example.also else []
    return json.dumps(["chat", chat.messages, chat.tools, *also], sort_keys=True, default=str)


def _asked(example: TaskExample) -> list[Any]:
    """What of an example is there before it is answered."""
    match example:
        case LabelledText(text, pair):
            return [text, pair]
        case TaggedWords(words):
            return list(words)
        case QuestionOnText(context=context):
            return [context]
        case SourceTarget(source):
            return [source]
        case _:
            return [example.path]


def _digest(text: str, key: bytes) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key)
    return int.from_bytes(digest.digest(), "little")

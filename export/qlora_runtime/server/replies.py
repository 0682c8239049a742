"""Answers in the shapes of OpenAI's chat completions and completions."""

import json
import time
from dataclasses import dataclass, field
from secrets import token_hex

from qlora_runtime.generate import FinishReason, TextStream
from qlora_runtime.strict_json import JsonObject

DONE = "data: [DONE]\n\n"
_REASONS: dict[FinishReason, str] = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


@dataclass
class Reply:
    """One answer's frame. `chat`: of chat completions, else of completions."""

    model: str
    chat: bool
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{token_hex(12)}"

    def whole(self, text: str, stream: TextStream) -> JsonObject:
        """The answer in one piece."""
        said: JsonObject = (
            {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        )
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": _REASONS[stream.finish_reason]}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind) | {"choices": [choice], "usage": usage(stream)}

    def first(self) -> str:
        """A stream's first event: a chat's says who speaks."""
        return self._event({"role": "assistant", "content": ""}) if self.chat else ""

    def piece(self, text: str) -> str:
        """A piece of the text."""
        return self._event({"content": text} if self.chat else text)

    def last(self, stream: TextStream, include_usage: bool) -> str:
        """Why it ended, and, where wanted, how many tokens there were."""
        end = self._event({} if self.chat else "", _REASONS[stream.finish_reason])
        if include_usage:
            end += event(self._frame(self._chunk) | {"choices": [], "usage": usage(stream)})
        return end + DONE

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _event(self, said: JsonObject | str, reason: str | None = None) -> str:
        delta = {"delta": said} if self.chat else {"text": said}
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": reason}
        return event(self._frame(self._chunk) | {"choices": [choice]})

    def _frame(self, kind: str) -> JsonObject:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(stream: TextStream) -> JsonObject:
    """Tokens read and drawn, the end-of-sequence token included."""
    drawn = len(stream.token_ids)
    return {
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": drawn,
        "total_tokens": stream.prompt_tokens + drawn,
    }


def event(value: JsonObject) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

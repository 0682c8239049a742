"""Text from prompts and chats."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Literal

from qlora_runtime.chat import Message
from qlora_runtime.generating import GeneratingBundle
from qlora_runtime.sampling import Sampling

# eos: the model ended its answer. stop: a stop string came. length: max_new_tokens came.
# context: prompt and answer fill the model's context.
FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str  # without special tokens, and without the stop string that ended it
    token_ids: list[int]  # every token drawn, the end-of-sequence token included
    finish_reason: FinishReason
    prompt_tokens: int


def generate(
    bundle: GeneratingBundle, prompt: str | Sequence[Message], sampling: Sampling | None = None
) -> Completion:
    """The answer to a plain text, or to a chat ({"role": ..., "content": ...} messages).

    Raises:
        PromptTooLongError: the prompt leaves no room for an answer.
        ChatTemplateError: a chat, and the bundle's template is missing or does not accept it.
        ArgumentError: an empty prompt, or messages that are not plain JSON data.
    """
    answer = stream_text(bundle, prompt, sampling)
    text = "".join(answer)
    return Completion(text, answer.token_ids, answer.finish_reason, answer.prompt_tokens)


def stream_text(
    bundle: GeneratingBundle,
    prompt: str | Sequence[Message],
    sampling: Sampling | None = None,
    cancelled: Event | None = None,
) -> "TextStream":
    """As `generate`, piece by piece: iterate over it, then read its `token_ids` and `finish_reason`.

    Once `cancelled` is set, by another thread, no more tokens are drawn.
    """
    return TextStream(bundle, bundle.encode_prompt(prompt), sampling or Sampling(), cancelled)


class TextStream(Iterator[str]):
    """Pieces of text as they become certain.

    They are whole characters, and hold nothing that could still be the beginning of a stop string.
    """

    def __init__(
        self,
        bundle: GeneratingBundle,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        cancelled: Event | None = None,
    ) -> None:
        self.prompt_tokens = len(prompt_ids)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason = "length"  # holds once the stream has ended
        self._tokens = bundle.stream(prompt_ids, sampling, cancelled=cancelled)
        self._detokenizer = bundle.tokenizer.detokenizer()
        self._ends = set(bundle.manifest.model.eos_token_ids)
        self._sampling = sampling
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Break off: the cache is freed, and no more pieces come."""
        self._pieces.close()
        self._tokens.close()

    def _run(self) -> Generator[str]:
        held = ""
        for token in self._tokens:
            self.token_ids.append(token)
            if token in self._ends:
                self.finish_reason = "eos"
                break
            held += self._detokenizer.push(token)
            if (at := find_stop(held, self._sampling.stop)) is not None:
                self.finish_reason = "stop"
                yield from _if_any(held[:at])
                return
            certain = len(held) - unsure_length(held, self._sampling.stop)
            yield from _if_any(held[:certain])
            held = held[certain:]
        if self.finish_reason == "length" and len(self.token_ids) < self._sampling.max_new_tokens:
            self.finish_reason = "context"
        held += self._detokenizer.flush()
        # A stop string may stand before the first bytes of a character that never was finished.
        if (at := find_stop(held, self._sampling.stop)) is not None:
            self.finish_reason, held = "stop", held[:at]
        yield from _if_any(held)


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string in `text` begins; None where there is none."""
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(places, default=None)


def unsure_length(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of `text` could be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def _if_any(text: str) -> Iterator[str]:
    if text:
        yield text

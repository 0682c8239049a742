"""Completions of prompts, by a torch model or by an ONNX bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from qlora_runtime import BundleError, Sampling
from qlora_runtime.generate import find_stop
from qlora_runtime.generate import generate as generate_by_bundle
from transformers import PreTrainedTokenizerBase, TextStreamer

from qlora_kit.data.template import render_chat, stop_token_ids
from qlora_kit.errors import EvalError
from qlora_kit.eval.scorers import BundleScorer, TorchScorer
from qlora_kit.generate import context_length, decode, generate_ids
from qlora_kit.model.quantized import expanded
from qlora_kit.train.determinism import seed_for

_TAIL = 16  # tokens in which a stop string is looked for after each new one


class Complete(Protocol):
    """n texts for each prompt, each without the stop string that ended it. temperature 0 is greedy."""

    def __call__(
        self, prompts: Sequence[str], n: int, temperature: float, max_new_tokens: int, stop: Sequence[str]
    ) -> list[list[str]]: ...


def completer_of(form: TorchScorer | BundleScorer, *, chat: bool = False, seed: int = 0) -> Complete:
    """What completes prompts with `form`; the same seed, prompt and place among the n draw the same text.

    Args:
        chat: prompts are user turns, and the completion is the assistant's.
    """
    return BundleCompleter(form, chat, seed) if isinstance(form, BundleScorer) else TorchCompleter(form, chat, seed)


class TorchCompleter:
    """One text after the other from a torch model."""

    def __init__(self, form: TorchScorer, chat: bool, seed: int) -> None:
        self.model, self.tokenizer, self.chat, self.seed = form.model, form.tokenizer, chat, seed

    def __call__(
        self, prompts: Sequence[str], n: int, temperature: float, max_new_tokens: int, stop: Sequence[str]
    ) -> list[list[str]]:
        """Raises EvalError where a prompt fills the model's context."""
        answers: list[list[str]] = []
        with expanded(self.model, self.model.dtype), torch.random.fork_rng():
            for prompt in prompts:
                ids = self._encode(prompt)
                texts = []
                for place in range(n):
                    torch.manual_seed(seed_for(self.seed, prompt, place))
                    texts.append(self._answer(ids, temperature, max_new_tokens, stop))
                answers.append(texts)
        return answers

    def _encode(self, prompt: str) -> list[int]:
        if self.chat:
            turns: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
            text = render_chat(self.tokenizer, turns, generation_prompt=True)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(prompt)["input_ids"]
        room = context_length(self.model) - 1
        if not 0 < len(ids) <= room:
            raise EvalError("length of a prompt in tokens", got=len(ids), allowed=f"1 to {room}, the model's context")
        return ids

    def _answer(self, ids: list[int], temperature: float, max_new_tokens: int, stop: Sequence[str]) -> str:
        watch = _StopWatch(self.tokenizer, stop)
        try:
            found = generate_ids(self.model, self.tokenizer, ids, max_new_tokens, temperature, streamer=watch)
        except _StopFound:
            found = watch.ids
        if found and found[-1] in stop_token_ids(self.tokenizer):
            found = found[:-1]
        text = decode(self.tokenizer, found)
        return text[: find_stop(text, stop)]


class BundleCompleter:
    """One text after the other from an ONNX bundle, by the runner that ships it."""

    def __init__(self, form: BundleScorer, chat: bool, seed: int) -> None:
        self.bundle, self.chat, self.seed = form.bundle, chat, seed

    def __call__(
        self, prompts: Sequence[str], n: int, temperature: float, max_new_tokens: int, stop: Sequence[str]
    ) -> list[list[str]]:
        """Raises EvalError where a prompt fills the model's context, or the bundle cannot take chats."""

        def answer(prompt: str, place: int) -> str:
            seed = seed_for(self.seed, prompt, place)
            sampling = Sampling(max_new_tokens, temperature, seed=seed, stop=tuple(stop))
            asked = [{"role": "user", "content": prompt}] if self.chat else prompt
            return generate_by_bundle(self.bundle, asked, sampling).text

        try:
            return [[answer(prompt, place) for place in range(n)] for prompt in prompts]
        except BundleError as error:
            raise EvalError(f"{self.bundle.directory}: {error}", fix="Use another form, or export again") from error


class _StopFound(Exception):
    """Ends `generate` in the middle; never leaves this module."""


class _StopWatch(TextStreamer):
    """Collects the new tokens, and ends the generation where their text holds a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        super().__init__(tokenizer)
        self.stop, self.ids, self.prompt_seen = stop, list[int](), False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        if find_stop(decode(self.tokenizer, self.ids[-_TAIL:]), self.stop) is not None:
            raise _StopFound

    def end(self) -> None:
        """Nothing is held back."""

"""A form of a run as a model of lm-eval's: loglikelihoods, rolling loglikelihoods and greedy or drawn answers.

Texts become tokens as in lm-eval's `hf` back-end, so that both give the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    DEFAULT_MAX_LENGTH,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from qlora_kit.errors import EvalError
from qlora_kit.eval.harness.engines import Engine

_LOGITS_BYTES = 1 << 29  # held at once; one row alone may be more
_NO_LIMIT = 1 << 28  # a model that says no context length
_KNOWN_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature"}

TokenRequest = tuple[Any, list[int], list[int]]
"""(texts, context ids, continuation ids)."""


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests with an `Engine`. Nothing is cached between calls."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine, engine.tokenizer
        limit = engine.context_length
        self.max_length = limit if limit < _NO_LIMIT else DEFAULT_MAX_LENGTH
        self.max_gen_toks = 256  # lm-eval's, where a task says nothing

    @property
    def eot_token_id(self) -> int:
        return int(cast(Any, self.tokenizer).eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = cast(Any, self.tokenizer).bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokenizer: Any = self.tokenizer
        if add_special_tokens is None and has_bos_prefix(string, tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(tokenizer.encode(string, **options))

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) of each request.

        Requests that make the model read the same tokens, as choices of one token do, share a forward pass.

        Raises:
            EvalError: a continuation has no tokens, or more than the model reads at once.
        """
        asked: dict[tuple[int, ...], list[int]] = {}  # tokens to read, and the requests that do
        for place, (_texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise EvalError("tokens of a continuation", got=len(continuation), allowed=f"1 to {self.max_length}")
            read = tuple((context + continuation)[-(self.max_length + 1) : -1])
            asked.setdefault(read, []).append(place)
        kept = {row: max(len(requests[place][2]) for place in places) for row, places in asked.items()}
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="loglikelihoods", disable=disable_tqdm) as bar:
            for rows in self._batches(kept):
                for row, logits in zip(rows, self.engine.logits(rows, [kept[row] for row in rows])):
                    for place in asked[row]:
                        found[place] = _score(logits, requests[place][2])
                    bar.update(len(asked[row]))
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text: windows of `max_length` tokens, each token scored once."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(place)
        totals = [0.0] * len(requests)
        for place, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[place] += log_probability
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, before the first of its stop strings.

        Raises:
            EvalError: a task asks for sampling other than by temperature, or for answers that fill the context.
        """
        by_settings: dict[str, dict[str, list[int]]] = {}  # settings, then prompt, then the requests that ask it
        for place, request in enumerate(requests):
            prompt, settings = request.args
            same = by_settings.setdefault(json.dumps(settings, sort_keys=True), {})
            same.setdefault(prompt, []).append(place)
        found: dict[int, str] = {}
        for text, asked in by_settings.items():
            max_new_tokens, temperature, stop = self._generation(json.loads(text))
            # Greedy answers to one prompt are one; drawn ones are each drawn.
            n = max(map(len, asked.values())) if temperature else 1
            prompts = tqdm([self._fitting(p, max_new_tokens) for p in asked], desc="answers", disable=disable_tqdm)
            answers = self.engine.complete(cast(Sequence[str], prompts), n, temperature, max_new_tokens, stop)
            for places, texts in zip(asked.values(), answers, strict=True):
                found |= {place: texts[k % n] for k, place in enumerate(places)}
        return [found[place] for place in range(len(requests))]

    def _generation(self, settings: dict[str, Any]) -> tuple[int, float, list[str]]:
        """(max_new_tokens, temperature, stop strings) of a task's generation_kwargs."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        if unknown := sorted(set(known) - _KNOWN_SETTINGS):
            allowed = ", ".join(sorted(_KNOWN_SETTINGS))
            raise EvalError("generation_kwargs of a task", got=", ".join(unknown), allowed=allowed)
        if known["max_gen_toks"] >= self.max_length:
            allowed = f"up to {self.max_length - 1}, the model's context less a token"
            raise EvalError("max_gen_toks of a task", got=known["max_gen_toks"], allowed=allowed)
        eos = cast(Any, self.tokenizer).decode(self.eot_token_id, skip_special_tokens=False)
        stop = [text for text in handle_stop_sequences(known["until"], eos) if text]
        return known["max_gen_toks"], float(known["temperature"]) if known["do_sample"] else 0.0, stop

    def _fitting(self, prompt: str, max_new_tokens: int) -> str:
        """The prompt, without its beginning where prompt and answer are more than the context holds."""
        ids, room = self.tok_encode(prompt), self.max_length - max_new_tokens
        return prompt if len(ids) <= room else str(cast(Any, self.tokenizer).decode(ids[-room:]))

    def _batches(self, kept: dict[tuple[int, ...], int]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of similar length, the longest first, as many at once as memory for their logits allows."""
        batch: list[tuple[int, ...]] = []
        positions = 0
        for row in sorted(kept, key=lambda row: (-len(row), row)):
            positions = max(positions, self.engine.positions(len(row), kept[row]))
            full = (len(batch) + 1) * positions * self.engine.vocab_size * 4 > _LOGITS_BYTES
            if batch and (full or len(batch) == self.engine.batch_size):
                yield batch
                batch, positions = [], self.engine.positions(len(row), kept[row])
            batch.append(row)
        if batch:
            yield batch


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """logits: [kept, vocab], of which the last len(continuation) predict it."""
    logits = logits[-len(continuation) :]
    targets = torch.tensor(continuation, device=logits.device)
    log_p = F.log_softmax(logits, dim=-1).gather(1, targets[:, None])
    return float(log_p.double().sum()), bool((logits.argmax(dim=-1) == targets).all())

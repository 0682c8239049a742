"""What the trained model answers in fp32, its codes never rounded: the reference every bundle is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from qlora_runtime import ReferencePrompt
from transformers import PreTrainedModel

TOP_K = 8
GREEDY_TOKENS = 32

FloatArray = npt.NDArray[np.float32]

Origin = Literal["held_out", "training", "calibration"]
"""Where a row comes from; `calibration`: of training, and int8's ranges were measured on it too."""


@dataclass(frozen=True)
class ReferenceRow:
    """The reference's answers to one row.

    Attributes:
        input_ids: the whole row, [seq].
        prompt_tokens: how many of them are the prompt.
        loss_positions: positions whose next token carries loss.
        logits: float32 [seq, vocab].
        greedy_ids, margins: the greedy answer to the prompt, and how far its token led at each step.
        source_ids: what an encoder reads; `input_ids` are then the decoder's start token and the target, all of them
            but the last with logits. None: a decoder alone.
    """

    input_ids: list[int]
    prompt_tokens: int
    loss_positions: list[int]
    logits: FloatArray
    greedy_ids: list[int]
    margins: list[float]
    origin: Origin = "held_out"
    source_ids: list[int] | None = None

    def read(self) -> tuple[list[int], list[int] | None]:
        """The tokens that the logits are of: of a decoder alone, or of an encoder and its decoder."""
        return (self.input_ids, None) if self.source_ids is None else (self.source_ids, self.input_ids[:-1])

    def shipped(self) -> ReferencePrompt:
        """The prompt's part of it, as reference.json holds it."""
        logits = self.logits[: self.prompt_tokens]
        top = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]  # [prompt, k]
        values = np.take_along_axis(logits, top, axis=1)
        prompt = self.input_ids[: self.prompt_tokens]
        return ReferencePrompt(
            input_ids=prompt if self.source_ids is None else self.source_ids,
            top_k_ids=top.tolist(),
            top_k_logits=[[round(float(value), 5) for value in row] for row in values],
            greedy_ids=self.greedy_ids,
            margins=[round(margin, 5) for margin in self.margins],
            decoder_ids=None if self.source_ids is None else prompt,
        )


@torch.no_grad()
def answer(
    model: PreTrainedModel, input_ids: list[int], labels: list[int], prompt_tokens: int, origin: Origin = "held_out"
) -> ReferenceRow:
    """Runs the reference model on one row: all logits, then a greedy answer to its prompt."""
    ids = torch.tensor([input_ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()  # [seq, vocab]
    greedy_ids, margins = _greedy(model, ids[:, :prompt_tokens])
    positions = [place for place, label in enumerate(labels[1:]) if label != -100]
    return ReferenceRow(input_ids, prompt_tokens, positions, logits, greedy_ids, margins, origin)


def _greedy(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[list[int], list[float]]:
    """Greedy tokens up to and with the first end token, and top-1 minus top-2 before each."""
    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - prompt.shape[1]
    tokens: list[int] = []
    margins: list[float] = []
    step, cache = prompt, None
    for _ in range(min(GREEDY_TOKENS, room)):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best = output.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        if tokens[-1] in ends:
            break
        step = best.indices[:1].view(1, 1)
    return tokens, margins

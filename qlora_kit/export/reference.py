"""What the trained model answers in fp32, its codes never rounded: the reference every bundle is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from qlora_runtime import ReferencePrompt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.generate import generate_greedily

TOP_K = 8
GREEDY_TOKENS = 64

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
        logits: float32 [seq, vocab], in memory or on disk.
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


@dataclass(frozen=True)
class Question:
    """A row, its labels (-100: no loss), and how many of its tokens are the prompt that is to be answered."""

    input_ids: list[int]
    labels: list[int]
    prompt_tokens: int
    origin: Origin = "held_out"


@torch.no_grad()
def reference_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], scratch: Path
) -> list[ReferenceRow]:
    """Runs the reference model on rows: all their logits, and a greedy answer to each prompt.

    Answers are made in batches. How far each token led is then read from the answer as a whole, as bundles read it; of
    two that are all but equal the other may lead, by less than nothing.

    Args:
        scratch: folder for the logits: 64 rows of 512 tokens over 128,256 words are 16 GiB.
    """
    prompts = [question.input_ids[: question.prompt_tokens] for question in questions]
    found = []
    for place, (question, greedy_ids) in enumerate(
        zip(questions, generate_greedily(model, tokenizer, prompts, GREEDY_TOKENS), strict=True)
    ):
        file = scratch / f"logits-{place}.npy"
        np.save(file, _logits(model, question.input_ids))
        logits: FloatArray = np.load(file, mmap_mode="r")
        margins = _margins(_logits(model, prompts[place] + greedy_ids[:-1])[question.prompt_tokens - 1 :], greedy_ids)
        positions = [place for place, label in enumerate(question.labels[1:]) if label != -100]
        row = (question.input_ids, question.prompt_tokens, positions, logits, greedy_ids, margins, question.origin)
        found.append(ReferenceRow(*row))
    return found


def _logits(model: PreTrainedModel, ids: list[int]) -> FloatArray:
    """float32 [seq, vocab]."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    found: FloatArray = logits[0].float().cpu().numpy()
    return found


def _margins(logits: FloatArray, tokens: list[int]) -> list[float]:
    """Each token's logit less the largest other one. logits [tokens, vocab]"""
    places = np.arange(len(tokens))
    chosen = logits[places, tokens]
    others = logits.copy()
    others[places, tokens] = -np.inf
    return [float(margin) for margin in chosen - others.max(axis=1)]

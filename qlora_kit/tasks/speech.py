"""Speech recognition: the tokens of a transcript, given the sound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.data.examples import RowError
from qlora_kit.data.masking import IGNORED, Encoded
from qlora_kit.data.task_examples import Utterance
from qlora_kit.data.task_readers.wav import read_wav, wav_header
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import SpeechRecognitionSettings
from qlora_kit.tasks.images import file_row, in_model_dtype
from qlora_kit.tasks.seq2seq import check_target_len, target_ids, target_losses
from qlora_kit.tasks.task import Batch, Task


class SpeechRecognition(Task[SpeechRecognitionSettings]):
    """Cross-entropy of each token of the transcript, with an encoder-decoder of Whisper's kind.

    The encoder hears a window of fixed length (Whisper: 30 s), padded with silence. A row that does not fit into it,
    or has a transcript over task.max_target_len, is never cut: transcript and sound would no longer say the same.
    """

    auto_class = "AutoModelForSpeechSeq2Seq"
    fresh_head = False
    perplexity = True
    processor = "AutoProcessor"

    def encode(self, example: Utterance, tokenizer: Any, section: DataSection) -> list[Encoded]:
        header, extractor = wav_header(Path(example.path)), tokenizer.feature_extractor
        seconds, window = header.frames / header.sampling_rate, extractor.n_samples / extractor.sampling_rate
        if seconds > window:
            raise _overlong(f"{example.path} lasts {seconds:.1f} s, the model hears {window:g} s", "Split it")
        labels = transcript_ids(example.text or "", tokenizer.tokenizer)
        limit = self.settings.max_target_len
        if len(labels) > limit:
            raise _overlong(f"{len(labels)} tokens, more than task.max_target_len {limit}", "Raise task.max_target_len")
        return [file_row(example.path, labels)]

    def config(self) -> dict[str, Any]:
        return {"apply_spec_augment": False}  # it hides parts of the sound at random, by numpy's generator

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises DataError where transcripts may be longer than the decoder's positions."""
        check_target_len(self.settings.max_target_len, model.config.max_target_positions)

    def collate(self, rows: Sequence[Encoded], tokenizer: Any) -> Batch:
        """`input_features` float32 [batch, mel bins, frames], of the rows' files; `labels` int64 [batch, tokens]."""
        extractor = tokenizer.feature_extractor
        sounds = [read_sound(Path(row.file), extractor.sampling_rate) for row in rows]
        heard = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {"input_features": heard["input_features"], "labels": self.label_tensor(rows)}

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        sounds = in_model_dtype(model, {"input_features": batch["input_features"]})
        return target_losses(model, sounds, batch["labels"])

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens of the transcripts."""
        return self.count(batch)


def transcript_ids(text: str, tokenizer: Any) -> np.ndarray:
    """int32 [tokens]: what the decoder is to say after its start token.

    Whisper's tokenizer writes that start itself, then language, task and `<|notimestamps|>` where it is told them.
    """
    ids, starts = target_ids(text, tokenizer), getattr(tokenizer, "prefix_tokens", [])[:1]
    return ids[1:] if ids[:1].tolist() == starts else ids


def read_sound(path: Path, sampling_rate: int) -> np.ndarray:
    """float32 [samples] at a sampling rate in Hz: that of the file, or made from it by a polyphase filter.

    Raises:
        RowError: see `read_wav`.
    """
    samples, rate = read_wav(path)
    if rate == sampling_rate:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, sampling_rate)
    return np.asarray(resample_poly(samples, sampling_rate // common, rate // common), dtype=np.float32)


def _overlong(problem: str, fix: str) -> RowError:
    return RowError(problem, reason="overlong", fix=f"{fix}, or set data.overlong: skip")

"""Image classification: one label an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from qlora_kit.data.masking import Encoded
from qlora_kit.data.task_examples import LabelledImage
from qlora_kit.data.task_readers.images import read_image
from qlora_kit.errors import ModelError
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import ImageClassificationSettings
from qlora_kit.tasks.logits import unwrapped
from qlora_kit.tasks.task import Batch, Task, without_labels


class ImageClassification(Task[ImageClassificationSettings]):
    """Cross-entropy over the labels of an image, which is prepared as the base's image processor says.

    Nothing is cropped, flipped or coloured at random: the same rows are the same pixels in each epoch.
    """

    auto_class = "AutoModelForImageClassification"
    has_labels = True
    processor = "AutoImageProcessor"

    def encode(self, example: LabelledImage, tokenizer: Any, section: DataSection) -> list[Encoded]:
        read_image(Path(example.path))  # once, whole: a cut file is found here, not in the middle of a run
        return [file_row(example.path, np.array(self.label_ids(example), dtype=np.int32))]

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises ModelError for a base whose frozen part would change as it trains."""
        name = next((name for name, part in model.named_modules() if isinstance(part, _BatchNorm)), None)
        if name is not None:
            raise ModelError(
                "base.model has batch normalization, whose running statistics no adapter holds",
                got=name,
                allowed="layer normalization: ViT, DeiT, Swin, ConvNeXT",
                fix="Take such a base",
            )

    def collate(self, rows: Sequence[Encoded], tokenizer: Any) -> Batch:
        """`pixel_values` float32 [batch, channels, height, width], read now from the rows' files; `labels` [batch]."""
        images = [read_image(Path(row.file)) for row in rows]
        return {
            "pixel_values": tokenizer(images, return_tensors="pt")["pixel_values"],
            "labels": self.label_tensor(rows),
        }

    def label_tensor(self, rows: Sequence[Encoded]) -> Tensor:
        """int64 [batch]."""
        return torch.from_numpy(np.concatenate([row.labels for row in rows])).long()

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(**in_model_dtype(model, without_labels(batch))).logits.float()  # [batch, labels]
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")[:, None]
        return losses, torch.ones_like(losses, dtype=torch.bool)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["labels"])

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Images."""
        return len(batch["labels"])


def file_row(path: str, labels: np.ndarray) -> Encoded:
    """A row that is a file. It has no tokens: one 0 keeps its place.

    The row itself carries the path, so that a resumed run, another process and an evaluation find the file without
    asking the task that encoded it; what is in the file is read where a batch is made, and never kept.
    """
    return Encoded(np.zeros(1, dtype=np.int32), labels, file=path)


def in_model_dtype(model: nn.Module, inputs: Mapping[str, Tensor]) -> Batch:
    """Inputs with their floats in the model's compute dtype: not every model casts pixels and sounds itself."""
    dtype = unwrapped(model).config.dtype or torch.float32
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

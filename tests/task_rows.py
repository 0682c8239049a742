"""What the tests of tasks' rows share: sources, parsers, small sounds and images."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qlora_kit.data.examples import RowError
from qlora_kit.data.sources import read_rows
from qlora_kit.data.task_schemas import TaskRowParser
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection, DataSource
from qlora_kit.task_settings import TASKS


def source(path: Any, **fields: Any) -> DataSource:
    return DataSource.model_validate({"path": str(path)} | fields)


def parser(
    task: str, path: Any = "data.jsonl", columns: Any = None, labelled: bool = True, **settings: Any
) -> TaskRowParser:
    section = DataSection.model_validate({"train": str(path), "columns": columns or {}})
    return TaskRowParser(TASKS[task].model_validate(settings), section, source(path), labelled=labelled)


def rows_of(path: Any) -> list[tuple[int, Any]]:
    return [(row.number, row.value) for row in read_rows(source(path))]


def examples_of(task: str, path: Any, **settings: Any) -> list[Any]:
    """All examples of a source; a row that cannot be used raises with its file and number."""
    made, examples = parser(task, path, **settings), []
    for row in read_rows(source(path)):
        try:
            if isinstance(row.value, RowError):
                raise row.value
            examples.append(made.parse(row.number, row.value))
        except RowError as error:
            raise error.at(f"{path} row {row.number}") from None
    return examples


def write_wav(path: Path, samples: np.ndarray, sampling_rate: int = 16000, sample_bytes: int = 2) -> None:
    """samples: [frames, channels], of the integer type the file holds."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(sample_bytes)
        file.setframerate(sampling_rate)
        file.writeframes(samples.tobytes())


def write_image(path: Path, color: tuple[int, int, int] = (255, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), color).save(path)


def refuse(task: str, path: Path, message: str, kind: type[DataError] = RowError, **settings: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        examples_of(task, path, **settings)
    assert type(caught.value) is kind, "RowError where data.bad_rows may skip the row, DataError for a whole file"
    assert path.name.split(".")[0] in str(caught.value)

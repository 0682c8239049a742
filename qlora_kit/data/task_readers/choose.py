"""Which of the tasks' formats a path is written in, if any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from qlora_kit.data.raw_rows import RawRow
from qlora_kit.data.task_readers.conll import ENDINGS, conll_rows, looks_like_conll
from qlora_kit.data.task_readers.images import image_files, image_folder_rows, is_image_folder
from qlora_kit.data.task_readers.parallel import parallel_files, parallel_rows


class TaskReader(NamedTuple):
    """How a source is read."""

    rows: Callable[[], Iterator[RawRow]]
    files: Callable[[], list[Path]]
    """All files it is made of."""


def task_reader(path: str) -> TaskReader | None:
    """The reader of parallel text (`train.{en,de}`), a folder of images, or a CoNLL file; None for any other path.

    A .txt file counts as CoNLL where its first line has a word and a tag.
    """
    if pair := parallel_files(path):
        return TaskReader(partial(parallel_rows, *pair), lambda: list(pair))
    file = Path(path)
    if is_image_folder(file):
        return TaskReader(partial(image_folder_rows, file), partial(image_files, file))
    if file.suffix.lower() in ENDINGS or looks_like_conll(file):
        return TaskReader(partial(conll_rows, file), lambda: [file])
    return None

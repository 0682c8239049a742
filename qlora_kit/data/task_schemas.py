"""From a row's columns to a task's example: the columns are found in the first row, or named by the recipe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from qlora_kit.data.task_columns import INPUTS, Cells, find_columns, flat
from qlora_kit.data.task_examples import LabelledImage, TaskExample, Utterance
from qlora_kit.data.task_labels import label_name
from qlora_kit.data.task_readers.images import check_image
from qlora_kit.data.task_readers.wav import wav_header
from qlora_kit.data.task_rows import asked, classified, rated, tagged, turned
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection, DataSource
from qlora_kit.task_settings import (
    ClassificationSettings,
    ImageClassificationSettings,
    QuestionAnsweringSettings,
    RegressionSettings,
    Seq2SeqSettings,
    TaggingSettings,
    TaskSettings,
)


class TaskRowParser:
    """Turns the rows of one source into examples of a task; the first row settles the columns for all.

    Labels: text stands for itself, without white space around it. An integer (or text that is one) is an index into
    task.labels where these are given and none of them is an integer; otherwise its decimal text is the label.
    Files of images and sounds are found from the manifest's folder.

    Args:
        settings: of any task but causal language modelling.
        section: renames columns.
        source: the file or hub id, for messages.
        labelled: False where rows are only to be predicted: the column of the answer is then not read.

    Attributes:
        schema: task and columns, None before the first row.
        ignored_columns: columns that no example uses, in order of appearance.
        repaired: tags I-TYPE that were made B-TYPE so far (task.broken_spans: repair).
        sampling_rates: sampling rate in Hz to number of audio files so far.

    Raises:
        DataError: the task is causal language modelling, or a schema is named, which only that has.
    """

    def __init__(
        self, settings: TaskSettings, section: DataSection, source: DataSource, *, labelled: bool = True
    ) -> None:
        if settings.type not in INPUTS:
            raise DataError(f"task.type {settings.type} has rows of its own", fix="Read them with RowParser")
        if named := source.schema_ or section.schema_:
            raise DataError(
                f"data.schema is for task.type causal_lm, not {settings.type}",
                got=named,
                fix="Leave it out; name columns with data.columns",
            )
        self.settings, self.labelled = settings, labelled
        self.path, self.renamed = source.path, section.columns
        self.columns: dict[str, str] = {}
        self.schema: str | None = None
        self.ignored_columns: dict[str, None] = {}
        self.repaired = 0
        self.sampling_rates: Counter[int] = Counter()

    def parse(self, number: int, row: dict[str, Any]) -> TaskExample:
        """The example in a row.

        Raises:
            RowError: this row cannot be used.
            DataError: the first row shows no column, or several, for what the task reads.
        """
        row = flat(row)
        if self.schema is None:
            place = f"{self.path} row {number}"
            self.columns = find_columns(self.settings.type, row, self.renamed, place, self.labelled)
            self.schema = f"{self.settings.type} ({', '.join(self.columns.values())})"
        used = set(self.columns.values())
        self.ignored_columns |= {column: None for column in row if column not in used}
        return self._example(Cells(row, self.columns))

    def _example(self, cells: Cells) -> TaskExample:
        match self.settings:
            case ClassificationSettings() as settings:
                return classified(cells, settings, self.labelled)
            case RegressionSettings():
                return rated(cells, self.labelled)
            case TaggingSettings() as settings:
                example, repaired = tagged(cells, settings, self.labelled)
                self.repaired += repaired
                return example
            case QuestionAnsweringSettings() as settings:
                return asked(cells, settings, self.labelled)
            case Seq2SeqSettings():
                return turned(cells, self.labelled)
            case ImageClassificationSettings() as settings:
                return self._image(cells, settings)
            case _:  # speech recognition
                return self._utterance(cells)

    def _image(self, cells: Cells, settings: ImageClassificationSettings) -> LabelledImage:
        path = self._file(cells.text("image"))
        check_image(path)
        if not self.labelled:
            return LabelledImage(str(path), None)
        return LabelledImage(str(path), label_name(cells.value("label"), settings.labels, cells.name("label")))

    def _utterance(self, cells: Cells) -> Utterance:
        path = self._file(cells.text("audio"))
        self.sampling_rates[wav_header(path).sampling_rate] += 1
        return Utterance(str(path), cells.text("text") if self.labelled else None)

    def _file(self, name: str) -> Path:
        source = Path(self.path)
        return (source if source.is_dir() else source.parent) / name

"""Which task a recipe means, with the labels of its training rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_kit.data.examples import RowError
from qlora_kit.data.sources import read_rows
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import TaskSettings
from qlora_kit.tasks.causal_lm import CausalLm
from qlora_kit.tasks.classification import Classification, Regression
from qlora_kit.tasks.images import ImageClassification
from qlora_kit.tasks.question_answering import QuestionAnswering
from qlora_kit.tasks.seq2seq import Seq2Seq
from qlora_kit.tasks.speech import SpeechRecognition
from qlora_kit.tasks.tagging import Tagging
from qlora_kit.tasks.task import Task

TASK_CLASSES: dict[str, type[Task[Any]]] = {
    "causal_lm": CausalLm,
    "classification": Classification,
    "regression": Regression,
    "tagging": Tagging,
    "question_answering": QuestionAnswering,
    "seq2seq": Seq2Seq,
    "image_classification": ImageClassification,
    "speech_recognition": SpeechRecognition,
}


def task_class(settings: TaskSettings) -> type[Task[Any]]:
    """The class of a task."""
    return TASK_CLASSES[settings.type]


def task_of(settings: TaskSettings, labels: Sequence[str] = ()) -> Task[Any]:
    """The task with labels that are known already, or that its settings give."""
    return task_class(settings)(settings, labels)


def prepare_task(settings: TaskSettings, section: DataSection) -> Task[Any]:
    """The task with the labels of its training rows, which are read for that once.

    Raises:
        DataError: a source cannot be read, or its labels make no task; where wrong rows are why, the first of them.
    """
    task, wrong = task_of(settings), list[RowError]()
    if not task.has_labels:
        return task
    examples = list(_examples(task, section, wrong))
    if not task.labels:
        try:
            labels = task.find_labels(examples)
        except DataError as error:
            if not wrong:
                raise
            if section.bad_rows == "error":
                raise wrong[0] from None
            raise DataError(f"{error} {len(wrong)} rows are left out, the first: {wrong[0]}") from None
        task = task_of(settings, labels)
    task.weigh(examples)
    return task


def _examples(task: Task[Any], section: DataSection, wrong: list[RowError]) -> Iterator[Any]:
    """All training examples; rows that cannot be used go to `wrong`, and are left to the reading that counts them."""
    for source in section.sources():
        parser = task.parser(section, source)
        for raw in read_rows(source):
            try:
                if isinstance(raw.value, RowError):
                    raise raw.value
                yield parser.parse(raw.number, raw.value)
            except RowError as error:
                wrong.append(error.at(f"{source.path} row {raw.number}"))

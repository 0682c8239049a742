"""An open bundle of a task that does not generate: labels, numbers, tags and answers, on a CPU."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from qlora_runtime.encoder import Encoder, FloatArray, TokenRow
from qlora_runtime.errors import ArgumentError, FormatError, WrongTaskError
from qlora_runtime.manifest import GRAPH, TOKENIZER, check_files
from qlora_runtime.schema import MANIFEST, Manifest
from qlora_runtime.spans import Answer, choose_answer
from qlora_runtime.tagged import Sentence, Tagged, placed_words, tagged
from qlora_runtime.task import (
    VERBS,
    ClassificationTask,
    QuestionAnsweringTask,
    RegressionTask,
    Seq2SeqTask,
    TaggingTask,
    TaskInfo,
)
from qlora_runtime.texts import Classified, Rated, Text, TextEncoder, classified
from qlora_runtime.tokenizer import TextTokenizer
from qlora_runtime.windows import QuestionWindows
from qlora_runtime.words import WordEncoder

BATCH_SIZE = 16
_BATCHES_AHEAD = 16  # are read before the first is run, to put rows of like length together

T = TypeVar("T", bound=TaskInfo)
P = TypeVar("P")


class TaskBundle:
    """A model ready to run. Make one with `TaskBundle.open`.

    What it is given may be endless: results come in order, and only some batches are in memory.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, task: TaskInfo, threads: int | None = None
    ) -> None:
        """From files that have been checked; see `open`."""
        if manifest.model.pad_token_id is None:
            raise FormatError(
                f"{MANIFEST}: model: pad_token_id is null, which this task needs. Export again."
            )
        self.directory, self.manifest, self.task = directory, manifest, task
        self.tokenizer = TextTokenizer(directory / TOKENIZER, manifest.model.vocab_size)
        outputs = ("start_logits", "end_logits") if isinstance(task, QuestionAnsweringTask) else ("logits",)
        self._encoder = Encoder(directory / GRAPH, outputs, manifest.model.pad_token_id, threads)

    @classmethod
    def open(cls, path: Path | str, check_hashes: bool = True, threads: int | None = None) -> "TaskBundle":
        """Check the files of the bundle in the folder `path`, and load the model.

        Args:
            check_hashes, threads: as for `Bundle.open`.

        Raises:
            WrongTaskError: it is a bundle that generates.
            BundleError: the kind that says what is wrong, see `check_files` and `errors`.
        """
        if threads is not None and threads < 1:
            raise ArgumentError(f"threads is {threads}, allowed are None and integers of at least 1.")
        manifest = check_files(path, hashes=check_hashes)
        if manifest.task is None or isinstance(manifest.task, Seq2SeqTask):
            kind, opener = ("causal_lm", "Bundle") if manifest.task is None else ("seq2seq", "Seq2SeqBundle")
            raise WrongTaskError(
                f"{path} is a bundle for {kind}, which generates. Open it with {opener}.open, or use "
                "qlora-runtime generate."
            )
        return cls(Path(path), manifest, manifest.task, threads)

    def classify(self, texts: Iterable[Text], batch_size: int = BATCH_SIZE) -> Iterator[Classified]:
        """The label or labels of each text or pair of texts; longer ones than the model reads are cut.

        Raises:
            WrongTaskError: the model was trained for another task.
            ArgumentError: while running, for a text without tokens.
        """
        task = self._task(ClassificationTask, "classify")
        encoder = TextEncoder(self.tokenizer.library, task.max_seq_len)
        rows = (encoder.encode(text) for text in texts)
        found = self.run(((row, [row]) for row in rows), batch_size)
        return (
            classified(logits[0][0], task.labels, task.multi_label, row.truncated) for row, logits in found
        )

    def rate(self, texts: Iterable[Text], batch_size: int = BATCH_SIZE) -> Iterator[Rated]:
        """The number of each text or pair of texts; errors as for `classify`."""
        encoder = TextEncoder(self.tokenizer.library, self._task(RegressionTask, "rate").max_seq_len)
        rows = (encoder.encode(text) for text in texts)
        found = self.run(((row, [row]) for row in rows), batch_size)
        return (Rated(float(logits[0][0, 0]), row.truncated) for row, logits in found)

    def tag(self, sentences: Iterable[Sentence], batch_size: int = BATCH_SIZE) -> Iterator[Tagged]:
        """The tags of each sentence's words: of words as given, or of a raw text (see `split_words`).

        A sentence that is longer than the model reads is tagged in several rows, cut between words.

        Raises:
            WrongTaskError: the model was trained for another task.
        """
        task = self._task(TaggingTask, "tag")
        encoder = WordEncoder(self.tokenizer.library, task.max_seq_len)
        placed = (placed_words(sentence) for sentence in sentences)
        whole = (
            (text, words, encoder.encode([word.text for word in words]) if words else [])
            for text, words in placed
        )
        found = self.run(((item, item[2]) for item in whole), batch_size)
        return (tagged(text, words, rows, logits, task) for (text, words, rows), logits in found)

    def answer(self, questions: Iterable[tuple[str, str]], batch_size: int = BATCH_SIZE) -> Iterator[Answer]:
        """The answer to each (question, context), from windows over contexts that are too long.

        Raises:
            WrongTaskError: the model was trained for another task.
            PromptTooLongError: while running, for a question that leaves no room for a context.
        """
        task = self._task(QuestionAnsweringTask, "answer")
        encoder = QuestionWindows(self.tokenizer.library, task.max_seq_len, task.stride)
        asked = ((context, encoder.encode(question, context)) for question, context in questions)
        found = self.run(((item, item[1]) for item in asked), batch_size)
        return (
            choose_answer(
                context,
                windows,
                [(row[:, 0], row[:, 1]) for row in logits],
                task.max_answer_tokens,
                task.unanswerable,
            )
            for (context, windows), logits in found
        )

    def run(
        self, items: Iterable[tuple[P, Sequence[TokenRow]]], batch_size: int = BATCH_SIZE
    ) -> Iterator[tuple[P, list[FloatArray]]]:
        """The logits of each item's rows (see `Encoder.run`), in order; batches have rows of like length.

        Raises:
            ArgumentError: batch_size is less than 1.
            ModelOutputError: while running, where logits are not finite.
        """
        if batch_size < 1:
            raise ArgumentError(f"batch_size is {batch_size}, at least 1 is expected.")
        return self._run(iter(items), batch_size)

    def _run(
        self, items: Iterator[tuple[P, Sequence[TokenRow]]], batch_size: int
    ) -> Iterator[tuple[P, list[FloatArray]]]:
        while chunk := list(islice(items, batch_size * _BATCHES_AHEAD)):
            rows = [row for _, own in chunk for row in own]
            logits = iter(self._logits(rows, batch_size))
            for payload, own in chunk:
                yield payload, list(islice(logits, len(own)))

    def _logits(self, rows: Sequence[TokenRow], batch_size: int) -> list[FloatArray]:
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].input_ids))
        found: dict[int, FloatArray] = {}
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            found |= zip(places, self._encoder.run([rows[place] for place in places]), strict=True)
        return [found[place] for place in range(len(rows))]

    def _task(self, kind: type[T], verb: str) -> T:
        if not isinstance(self.task, kind):
            raise WrongTaskError(
                f"{verb} needs a bundle for {kind.type}; {self.directory} is one for {self.task.type}. Use "
                f"{VERBS[self.task.type]} instead."
            )
        return self.task

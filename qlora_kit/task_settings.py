"""The task section of a recipe: one class of settings for each task. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from qlora_kit.section import Positive, Section, Text


class TaskSettings(Section):
    """What all tasks have."""

    type: str
    """What the model learns to do."""
    answers_with_text: ClassVar[bool] = False
    """Whether the model generates."""


class CausalLmSettings(TaskSettings):
    """Causal language modelling's: nothing more."""

    type: Literal["causal_lm"] = "causal_lm"
    """Say the next token: chat, instructions, completion."""
    answers_with_text: ClassVar[bool] = True


class ClassificationSettings(TaskSettings):
    """Sequence classification's."""

    type: Literal["classification"] = "classification"
    """Give a text, or a pair of texts, one of several labels."""
    labels: list[Text] = []
    """Names of the labels in the order of the model's outputs; those of the training rows, sorted, when left out."""
    multi_label: bool = False
    """A row has any number of labels: a list of names, or names separated by `label_separator`."""
    label_separator: Text = ","
    """Between the labels of a cell, where a row has several."""
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = "none"
    """What a row's loss is multiplied with, by its label; `balanced`: rows / (labels * rows of the label)."""

    @model_validator(mode="after")
    def _labels_fit(self) -> ClassificationSettings:
        _check_labels(self.labels)
        weights = self.class_weights if isinstance(self.class_weights, dict) and self.labels else {}
        if unknown := sorted(set(weights) - set(self.labels)):
            raise ValueError(f"task.class_weights names labels that are not in task.labels: {', '.join(unknown)}")
        if self.multi_label and self.class_weights != "none":
            raise ValueError("task.class_weights cannot be had with task.multi_label")
        return self


class RegressionSettings(TaskSettings):
    """Regression's: one number a row."""

    type: Literal["regression"] = "regression"
    """Give a text, or a pair of texts, a number."""


class TaggingSettings(TaskSettings):
    """Token classification's."""

    type: Literal["tagging"] = "tagging"
    """Give each word of a sentence a tag (named entities, parts of an address)."""
    labels: list[Text] = []
    """Tags in the order of the model's outputs; those of the training rows, sorted with O first, when left out."""
    scheme: Literal["bio", "plain"] = "bio"
    """bio: tags are O, B-TYPE and I-TYPE and spans are scored; plain: a tag is a name, words are scored."""
    broken_spans: Literal["error", "repair"] = "error"
    """An I-TYPE that follows no B- or I- of its type: refuse the row, or make it B-TYPE and count."""

    @model_validator(mode="after")
    def _labels_fit(self) -> TaggingSettings:
        _check_labels(self.labels)
        if self.labels and self.scheme == "bio":
            _check_bio(self.labels)
        return self


class QuestionAnsweringSettings(TaskSettings):
    """Extractive question answering's."""

    type: Literal["question_answering"] = "question_answering"
    """Find the answer to a question in a text."""
    stride: Positive = 128
    """Tokens that two windows of a long context share."""
    max_answer_tokens: Positive = 30
    """Longest answer that is looked for."""
    unanswerable: bool = False
    """A text may hold no answer (SQuAD v2)."""


class Seq2SeqSettings(TaskSettings):
    """Sequence to sequence's, with an encoder-decoder."""

    type: Literal["seq2seq"] = "seq2seq"
    """Turn a text into another: translation, summarization."""
    source_prefix: str = ""
    """Written before each source, as T5 wants it: `translate English to German: `."""
    max_target_len: Annotated[int, Field(ge=2)] = 128
    """Tokens of a target."""
    answers_with_text: ClassVar[bool] = True


class ImageClassificationSettings(TaskSettings):
    """Image classification's."""

    type: Literal["image_classification"] = "image_classification"
    """Give an image one of several labels."""
    labels: list[Text] = []
    """Names of the labels in the order of the model's outputs; those of the training rows, sorted, when left out."""

    @model_validator(mode="after")
    def _labels_fit(self) -> ImageClassificationSettings:
        _check_labels(self.labels)
        return self


class SpeechRecognitionSettings(TaskSettings):
    """Speech recognition's, with an encoder-decoder such as Whisper."""

    type: Literal["speech_recognition"] = "speech_recognition"
    """Write down what is said."""
    max_target_len: Annotated[int, Field(ge=2)] = 224
    """Tokens of a transcript."""
    answers_with_text: ClassVar[bool] = True


def _check_labels(labels: list[str]) -> None:
    """Rows are stripped before they are looked up, so a label with white space around it would match nothing."""
    if any(label != label.strip() or not label.strip() for label in labels):
        raise ValueError(f"task.labels: got {labels!r}; give names without white space around them")
    if labels and len(set(labels)) < max(2, len(labels)):
        raise ValueError(f"task.labels: got {labels!r}; give at least two, each once")


def _check_bio(labels: list[str]) -> None:
    """A bundle's spans, and the repair of I- to B-, need both marks of each type."""
    if wrong := [label for label in labels if label != "O" and (label[:2] not in ("B-", "I-") or not label[2:])]:
        allowed = "O, B-TYPE and I-TYPE, or with task.scheme: plain any names"
        raise ValueError(f"task.labels: {', '.join(wrong)} are no BIO tags; give {allowed}")
    pairs = {mark + label[2:] for label in labels if label != "O" for mark in ("B-", "I-")}
    if missing := sorted({"O", *pairs} - set(labels)):
        raise ValueError(f"task.labels lacks {', '.join(missing)}; give O, and both B-TYPE and I-TYPE of each type")


TASKS: dict[str, type[TaskSettings]] = {
    "causal_lm": CausalLmSettings,
    "classification": ClassificationSettings,
    "regression": RegressionSettings,
    "tagging": TaggingSettings,
    "question_answering": QuestionAnsweringSettings,
    "seq2seq": Seq2SeqSettings,
    "image_classification": ImageClassificationSettings,
    "speech_recognition": SpeechRecognitionSettings,
}


def _tag(value: Any) -> str:
    kind = value.get("type", "causal_lm") if isinstance(value, dict) else getattr(value, "type", "causal_lm")
    return f"<{kind}>"


AnyTaskSettings = Annotated[
    Annotated[CausalLmSettings, Tag("<causal_lm>")]
    | Annotated[ClassificationSettings, Tag("<classification>")]
    | Annotated[RegressionSettings, Tag("<regression>")]
    | Annotated[TaggingSettings, Tag("<tagging>")]
    | Annotated[QuestionAnsweringSettings, Tag("<question_answering>")]
    | Annotated[Seq2SeqSettings, Tag("<seq2seq>")]
    | Annotated[ImageClassificationSettings, Tag("<image_classification>")]
    | Annotated[SpeechRecognitionSettings, Tag("<speech_recognition>")],
    Discriminator(_tag),
]
"""The settings of the task that `type` names; causal language modelling's where it names none."""

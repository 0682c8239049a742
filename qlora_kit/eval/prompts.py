"""Rows of causal language modelling as prompts alone: an answer they bring is not read, one they lack is not missed."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_kit.data.examples import Conversation, PlainText, PromptCompletion
from qlora_kit.data.masking import plain_special
from qlora_kit.data.schemas import RowParser
from qlora_kit.data.template import render_chat
from qlora_kit.recipe import DataSection, DataSource

_ANSWERS = {"prompt": "completion", "question": "answer", "instruction": "output"}
_STAND_IN = "-"


class PromptReader:
    """Prompts of one source, rendered as in training.

    Args:
        section: renames columns.
        source: for messages.
        schema: what the training rows were; detected from the first row for None.
        tokenizer: with the run's chat template.
    """

    def __init__(
        self, section: DataSection, source: DataSource, schema: str | None, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.columns, self.tokenizer = section.columns, tokenizer
        named = source.schema_ or section.schema_ or schema
        self.parser = RowParser(section, source.model_copy(update={"schema_": named}))

    def ids(self, number: int, row: dict[str, Any]) -> list[int]:
        """The prompt's tokens, the answer's turn opened.

        Raises:
            RowError: the row cannot be used.
            DataError: the first row shows no prompt.
        """
        example = self.parser.parse(number, self._with_answer(row))
        tokenizer: Any = self.tokenizer
        if isinstance(example, PromptCompletion) and tokenizer.chat_template:
            example = example.as_conversation()
        if isinstance(example, Conversation):
            turns = list(example.messages[: example.last_assistant()])
            text = render_chat(tokenizer, turns, example.tools, generation_prompt=True)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        text = example.text if isinstance(example, PlainText) else example.prompt
        special = plain_special(tokenizer, text)
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        return ids[:-1] if special and ids[-1:] == [tokenizer.eos_token_id] else ids

    def _with_answer(self, row: dict[str, Any]) -> dict[str, Any]:
        for name, turn in (
            ("messages", {"role": "assistant", "content": _STAND_IN}),
            ("conversations", {"from": "gpt", "value": _STAND_IN}),
        ):
            turns = row.get(self._column(name))
            if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
                said_by = turns[-1].get("role", turns[-1].get("from"))
                return row if said_by in ("assistant", "gpt") else row | {self._column(name): [*turns, turn]}
        for name, answer in _ANSWERS.items():
            if self._column(name) in row and not row.get(self._column(answer)):
                return row | {self._column(answer): _STAND_IN}
        return row

    def _column(self, name: str) -> str:
        return self.columns.get(name, name)

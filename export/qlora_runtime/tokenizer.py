"""The bundle's tokenizer, and text that appears as tokens arrive."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from qlora_runtime.errors import ArgumentError, MissingFileError, TokenizerError

_INCOMPLETE = (
    "\N{REPLACEMENT CHARACTER}"  # what decoding gives for the first bytes of an unfinished character
)


class TextTokenizer:
    """Text to token ids and back, as the `tokenizers` library reads tokenizer.json."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Load tokenizer.json; `vocab_size` is the model's, which may be larger than the tokenizer's.

        Raises:
            MissingFileError: there is no such file.
            TokenizerError: the file is no tokenizer, or has tokens that the model does not know.
        """
        if not path.is_file():
            raise MissingFileError(f"{path} is missing. Copy or export the bundle again.")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself, nothing narrower
            raise TokenizerError(f"{path} is not a tokenizer: {error}. Export the bundle again.") from error
        highest = max(self._tokenizer.get_vocab().values(), default=-1)
        if highest >= vocab_size:
            raise TokenizerError(
                f"{path} has token ids up to {highest}, the model's go up to {vocab_size - 1}. It belongs to "
                "another model: export the bundle again."
            )
        # A tokenizer saved after training may carry the training's length limit and padding.
        self._tokenizer = plain_copy(self._tokenizer)

    @property
    def library(self) -> Tokenizer:
        """The `tokenizers` tokenizer itself; copy it before setting truncation or padding."""
        return self._tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Rendered chats carry their special tokens already: pass False for them.

        Raises:
            ArgumentError: the text is none, see `check_text`.
        """
        check_text(text)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self) -> "Detokenizer":
        """Text for tokens that arrive one by one."""
        return Detokenizer(self)


def plain_copy(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of one's own, without truncation and padding."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def check_text(*texts: str) -> None:
    """Half a surrogate pair, which JSON's escapes can make, is no character: tokenizers and files refuse it.

    Raises:
        ArgumentError: a text holds one.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!a} at character {error.start}"
            raise ArgumentError(f"the text holds half a surrogate pair ({half}). Mend the text.") from None


class Detokenizer:
    """Token ids in, text out, each character once all its bytes have come.

    All that `push` and `flush` return, joined, is `decode` of all the tokens. To decode in context (a leading
    space may belong to a token only when others stand before it), the tokens behind the last text given out
    are decoded again with each new one.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []  # the tokens behind the last text given out
        self._waiting: list[int] = []  # the tokens since

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        self._waiting.append(token_id)
        text = self._new_text()
        if text == "" or text.endswith(_INCOMPLETE):
            return ""
        self._given, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """What is left at the end, with U+FFFD for a character that never was finished."""
        text = self._new_text()
        self._given, self._waiting = self._given + self._waiting, []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + self._waiting)[len(before) :]

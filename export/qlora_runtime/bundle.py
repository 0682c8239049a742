"""An open bundle: logits, token streams, text and chats, on a CPU."""

import copy
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_runtime.chat import ChatTemplate, Message, load_chat_template
from qlora_runtime.decoder import Decoder, FloatArray, Int64Array, in_pieces, read_cache_shape
from qlora_runtime.errors import (
    ArgumentError,
    ChatTemplateError,
    ForeignFileError,
    PromptTooLongError,
    WrongTaskError,
)
from qlora_runtime.manifest import GRAPH, TOKENIZER, check_files
from qlora_runtime.padding import checked_ids, checked_mask
from qlora_runtime.sampling import Sampler, Sampling
from qlora_runtime.schema import ADAPTER_FILE, ADAPTERS, Manifest, ModelInfo
from qlora_runtime.strict_json import JsonObject, load_object
from qlora_runtime.task import VERBS, Seq2SeqTask
from qlora_runtime.tokenizer import TextTokenizer


class Bundle:
    """A model ready to run. Make one with `Bundle.open`."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        decoder: Decoder,
        tokenizer: TextTokenizer,
        chat_template: ChatTemplate | None,
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.tokenizer = tokenizer
        self._decoder = decoder
        self._chat_template = chat_template

    @classmethod
    def open(cls, path: Path | str, check_hashes: bool = True, threads: int | None = None) -> "Bundle":
        """Check the files of the bundle in the folder `path`, and load the model.

        Args:
            check_hashes: compare every file's SHA-256 with the manifest. False compares sizes only, which is
                faster for large models that were checked before.
            threads: CPU threads for the model; None leaves the choice to onnxruntime.

        Raises:
            WrongTaskError: it is a bundle for another task, see `TaskBundle`.
            BundleError: the kind that says what is wrong, see `check_files` and `errors`.
        """
        if threads is not None and threads < 1:
            raise ArgumentError(f"threads is {threads}, allowed are None and integers of at least 1.")
        directory = Path(path)
        manifest = check_files(directory, hashes=check_hashes)
        if manifest.task is not None:
            own = isinstance(manifest.task, Seq2SeqTask)
            why = "has an encoder too" if own else "does not generate"
            raise WrongTaskError(
                f"{directory} is a bundle for {manifest.task.type}, which {why}. Open it with "
                f"{'Seq2SeqBundle' if own else 'TaskBundle'}.open, or use qlora-runtime "
                f"{VERBS[manifest.task.type]}."
            )
        genai_config = load_object(directory / "genai_config.json")
        _check_same_model(genai_config, manifest.model)
        return cls(
            directory=directory,
            manifest=manifest,
            decoder=Decoder(directory / GRAPH, read_cache_shape(genai_config), threads),
            tokenizer=TextTokenizer(directory / TOKENIZER, manifest.model.vocab_size),
            chat_template=load_chat_template(directory, load_object(directory / "tokenizer_config.json")),
        )

    def with_adapter(self, name: str | None) -> "Bundle":
        """This bundle with one of `manifest.adapters` beside its base (None: the base alone).

        Raises:
            ArgumentError: the bundle has no adapter of this name.
            ModelLoadError: its file cannot be read.
        """
        known = self.manifest.adapters
        if name is not None and name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none: its model is whole"
            raise ArgumentError(f"{self.directory} has no adapter {name!r}; {has}.")
        other = copy.copy(self)
        file = self.directory / ADAPTERS / name / ADAPTER_FILE if name else None
        other._decoder = self._decoder.with_adapter(file)
        return other

    def logits(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> FloatArray:
        """The logits after every token of every row: float32 [batch, seq, vocab].

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: [batch, seq] of ones, then zeros (right padding); None: no padding. Logits at
                padded positions mean nothing.

        Raises:
            PaddingError: the mask is not right-padded.
            PromptTooLongError: seq is more than the context holds.
            ArgumentError: another shape or dtype, or ids outside the vocabulary.
        """
        ids = checked_ids(input_ids, self.manifest.model, dimensions=2)
        return self._decoder.logits(ids, checked_mask(attention_mask, ids))

    def stream(
        self,
        prompt_ids: npt.ArrayLike,
        sampling: Sampling | None = None,
        *,
        stop_at_eos: bool = True,
        cancelled: Event | None = None,
    ) -> Generator[int]:
        """The answer's token ids, one by one, each as soon as it is known.

        Ends after an end-of-sequence token (which it yields too, unless `stop_at_eos` is False: then it goes
        on), after `sampling.max_new_tokens`, or when prompt and answer fill the context. Stop strings are
        text: see `generate` for them.

        Args:
            prompt_ids: int64 [seq], without padding.
            sampling: None is greedy with the default length.
            cancelled: once it is set, by another thread, the stream ends; a long prompt is not read on.

        Raises:
            PromptTooLongError: the prompt leaves no room for one more token.
            ArgumentError: prompt_ids is empty, of another shape, or outside the vocabulary.
            ModelOutputError: while streaming, where the model's logits are not finite.
        """
        prompt = self.check_room(prompt_ids)
        ends = set(self.manifest.model.eos_token_ids) if stop_at_eos else set()
        return self._decode(prompt, sampling or Sampling(), ends, cancelled or Event())

    def check_room(self, prompt_ids: npt.ArrayLike) -> Int64Array:
        """`prompt_ids` as int64 [seq], once an answer is known to have room behind it; raises as `stream`."""
        model = self.manifest.model
        prompt = checked_ids(prompt_ids, model, dimensions=1)
        if len(prompt) >= model.context_length:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens and the model's context {model.context_length}, "
                "which must hold the answer too. Shorten the prompt."
            )
        return prompt

    def best_tokens(self, prompt_ids: npt.ArrayLike, answer_ids: npt.ArrayLike) -> Iterator[int]:
        """The most probable token at each step of a given answer, which is read instead of the own one.

        Args:
            prompt_ids: int64 [seq], without padding.
            answer_ids: int64 [answer]; the last one is not read, as nothing follows.

        Raises:
            PromptTooLongError: prompt and answer are more than the context holds.
            ArgumentError: one of them is empty, of another shape, or outside the vocabulary.
            ModelOutputError: while reading, where the model's logits are not finite.
        """
        model = self.manifest.model
        prompt = checked_ids(prompt_ids, model, dimensions=1)
        answer = checked_ids(answer_ids, model, dimensions=1)
        if len(prompt) + len(answer) > model.context_length:
            raise PromptTooLongError(
                f"prompt and answer have {len(prompt) + len(answer)} tokens, the model's context holds "
                f"{model.context_length}. Shorten one of them."
            )
        return self._read_along(prompt, answer)

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The chat template's text for `messages`, to be encoded without special tokens.

        The arguments are those of `ChatTemplate.render`.

        Raises:
            ChatTemplateError: the bundle has no template, or the template does not accept the messages.
            ArgumentError: the messages are not plain JSON data.
        """
        if self._chat_template is None:
            raise ChatTemplateError(
                "this bundle has no chat template: its model was not trained on chats. "
                "Give it a plain prompt."
            )
        return self._chat_template.render(messages, add_generation_prompt, tools, variables)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a plain text, or of a chat with the assistant's turn opened."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(self.render_chat(prompt), add_special_tokens=False)

    def _decode(
        self, prompt: Int64Array, sampling: Sampling, ends: set[int], cancelled: Event
    ) -> Generator[int]:
        capacity = min(len(prompt) + sampling.max_new_tokens, self.manifest.model.context_length)
        decoding = self._decoder.start(capacity)
        sampler = Sampler(sampling)
        history = prompt.tolist()
        unread = prompt
        while len(history) < capacity:
            for piece in in_pieces(unread):
                if cancelled.is_set():
                    return
                logits = decoding.read(piece)
            token = sampler.choose(history, logits)
            history.append(token)
            yield token
            if token in ends:
                return
            unread = np.array([token], dtype=np.int64)

    def _read_along(self, prompt: Int64Array, answer: Int64Array) -> Iterator[int]:
        decoding = self._decoder.start(len(prompt) + len(answer))
        sampler = Sampler(Sampling())
        unread = prompt
        for token in answer:
            yield sampler.choose(prompt.tolist(), decoding.read(unread))
            unread = np.array([token], dtype=np.int64)


def _check_same_model(genai_config: JsonObject, model: ModelInfo) -> None:
    """genai_config.json and the manifest must speak of one model.

    Raises ForeignFileError where they do not.
    """
    section = genai_config.get("model")
    found = section if isinstance(section, dict) else {}
    ends = found.get("eos_token_id")
    pairs = {
        "vocab_size": (found.get("vocab_size"), model.vocab_size),
        "context_length": (found.get("context_length"), model.context_length),
        "eos_token_id": (sorted(ends) if isinstance(ends, list) else [ends], sorted(model.eos_token_ids)),
    }
    for name, (here, promised) in pairs.items():
        if here != promised:
            raise ForeignFileError(
                f"genai_config.json says {name} is {here}, manifest.json says {promised}. One of them "
                "belongs to another bundle: export again."
            )

"""An open bundle of an encoder-decoder: texts from texts, on a CPU."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import numpy.typing as npt

from qlora_runtime.chat import Message
from qlora_runtime.decoder import FloatArray, Int64Array
from qlora_runtime.errors import ArgumentError, ChatTemplateError, ForeignFileError, WrongTaskError
from qlora_runtime.manifest import DECODER_GRAPH, ENCODER_GRAPH, TOKENIZER, check_files
from qlora_runtime.padding import checked_ids
from qlora_runtime.sampling import Sampler, Sampling
from qlora_runtime.schema import Manifest
from qlora_runtime.seq2seq_graphs import Seq2SeqGraphs, Source, TargetDecoding
from qlora_runtime.task import VERBS, Seq2SeqTask
from qlora_runtime.tokenizer import TextTokenizer


class Seq2SeqBundle:
    """A model ready to run. Make one with `Seq2SeqBundle.open`.

    `generate`, `stream_text` and `answer_file` take it as they take a `Bundle`; a prompt is a source text.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, task: Seq2SeqTask, threads: int | None = None
    ) -> None:
        """From files that have been checked; see `open`."""
        self.directory, self.manifest, self.task = directory, manifest, task
        special = [task.decoder_start_token_id, *filter(None, [task.forced_bos_token_id])]
        if max(special) >= manifest.model.vocab_size:
            raise ForeignFileError(
                f"manifest.json: task has the token ids {special}, the model's go up to "
                f"{manifest.model.vocab_size - 1}. It belongs to another bundle: export again."
            )
        self.tokenizer = TextTokenizer(directory / TOKENIZER, manifest.model.vocab_size)
        self._graphs = Seq2SeqGraphs(directory / ENCODER_GRAPH, directory / DECODER_GRAPH, threads)
        self._of_source = replace(manifest.model, context_length=task.max_seq_len)

    @classmethod
    def open(cls, path: Path | str, check_hashes: bool = True, threads: int | None = None) -> "Seq2SeqBundle":
        """Check the files of the bundle in the folder `path`, and load the model.

        Args:
            check_hashes, threads: as for `Bundle.open`.

        Raises:
            WrongTaskError: it is a bundle for another task.
            BundleError: the kind that says what is wrong, see `check_files` and `errors`.
        """
        if threads is not None and threads < 1:
            raise ArgumentError(f"threads is {threads}, allowed are None and integers of at least 1.")
        manifest = check_files(path, hashes=check_hashes)
        if not isinstance(manifest.task, Seq2SeqTask):
            kind = manifest.task.type if manifest.task else "causal_lm"
            verb = VERBS.get(kind, "generate")
            raise WrongTaskError(f"{path} is a bundle for {kind}, not for seq2seq. Use qlora-runtime {verb}.")
        return cls(Path(path), manifest, manifest.task, threads)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a source text with the task's prefix before it.

        Raises:
            ChatTemplateError: it is a chat.
        """
        if not isinstance(prompt, str):
            raise ChatTemplateError(
                "this bundle turns one text into another and knows no chats. Give it a plain text."
            )
        return self.tokenizer.encode(self.task.source_prefix + prompt)

    def check_room(self, prompt_ids: npt.ArrayLike) -> Int64Array:
        """`prompt_ids` as int64 [source].

        Raises:
            PromptTooLongError: it has more tokens than task.max_seq_len.
            ArgumentError: it is empty, of another shape, or outside the vocabulary.
        """
        return checked_ids(prompt_ids, self._of_source, dimensions=1)

    def stream(
        self,
        prompt_ids: npt.ArrayLike,
        sampling: Sampling | None = None,
        *,
        stop_at_eos: bool = True,
        cancelled: Event | None = None,
    ) -> Generator[int]:
        """The answer's token ids, one by one; arguments and errors as for `Bundle.stream` and `check_room`.

        A forced first token is part of it, the decoder's start token is not.
        """
        source = self.check_room(prompt_ids)
        ends = set(self.manifest.model.eos_token_ids) if stop_at_eos else set[int]()
        steps = self._decode([source], sampling or Sampling(), ends, cancelled or Event())
        return (token for (token,) in steps if token is not None)

    def answers(self, prompts: Sequence[npt.ArrayLike], sampling: Sampling | None = None) -> list[list[int]]:
        """The token ids of the answer to each prompt, all decoded together; each as `stream` gives it."""
        sources, found = [self.check_room(prompt) for prompt in prompts], [list[int]() for _ in prompts]
        for step in self._decode(
            sources, sampling or Sampling(), set(self.manifest.model.eos_token_ids), Event()
        ):
            for answer, token in zip(found, step, strict=True):
                answer += [] if token is None else [token]
        return found

    def target_logits(self, prompts: Sequence[npt.ArrayLike], decoder_ids: npt.ArrayLike) -> FloatArray:
        """The logits after each token that the decoder reads: float32 [batch, target, vocab].

        Args:
            prompts: [batch] of [source].
            decoder_ids: int64 [batch, target], the start token first; anything may stand behind shorter ones.

        Raises:
            PromptTooLongError, ArgumentError: a source or the decoder's tokens are too long or no ids of it.
        """
        ids = checked_ids(decoder_ids, self.manifest.model, dimensions=2)
        return TargetDecoding(self._graphs, self._read([self.check_room(prompt) for prompt in prompts])).read(
            ids
        )

    def best_tokens(self, prompt_ids: npt.ArrayLike, answer_ids: npt.ArrayLike) -> Iterator[int]:
        """The most probable token at each step of a given answer, which is read instead of the own one.

        Raises:
            PromptTooLongError, ArgumentError: as for `target_logits`.
            ModelOutputError: while reading, where the model's logits are not finite.
        """
        source = self.check_room(prompt_ids)
        answer = checked_ids(answer_ids, self.manifest.model, dimensions=1)
        decoding, sampler = TargetDecoding(self._graphs, self._read([source])), Sampler(Sampling())
        for token in [self.task.decoder_start_token_id, *answer[:-1].tolist()]:
            yield sampler.choose([], decoding.read(np.array([[token]], dtype=np.int64))[0, -1])

    def _decode(
        self, sources: list[Int64Array], sampling: Sampling, ends: set[int], cancelled: Event
    ) -> Generator[list[int | None]]:
        """The next token of each answer; None for those that have ended."""
        decoding = TargetDecoding(self._graphs, self._read(sources))
        samplers = [Sampler(sampling) for _ in sources]
        histories = [[self.task.decoder_start_token_id] for _ in sources]
        ended = [False] * len(sources)
        room = min(sampling.max_new_tokens, self.manifest.model.context_length - 1)
        unread = 1
        while len(histories[0]) <= room and not all(ended) and not cancelled.is_set():
            forced = self.task.forced_bos_token_id if len(histories[0]) == 1 else None
            if forced is None:
                logits = decoding.read(np.array([history[-unread:] for history in histories], dtype=np.int64))
                unread = 0
            step: list[int | None] = []
            for k, (sampler, history) in enumerate(zip(samplers, histories, strict=True)):
                if ended[k]:
                    history.append(history[-1])  # read like the others' next, and never looked at
                    step.append(None)
                    continue
                token = sampler.choose(history, logits[k, -1]) if forced is None else forced
                history.append(token)
                step.append(token)
                ended[k] = token in ends
            unread += 1
            yield step

    def _read(self, sources: list[Int64Array]) -> Source:
        shape = (len(sources), max(map(len, sources)))
        ids, mask = np.full(shape, self.manifest.model.pad_token_id or 0, np.int64), np.zeros(shape, np.int64)
        for row, source in enumerate(sources):
            ids[row, : len(source)], mask[row, : len(source)] = source, 1
        return self._graphs.read_source(ids, mask)

"""Text from a torch model: `qlora-kit generate` for runs and base models, and the samples of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from qlora_kit.adapters.folders import adapter_folder, named_folder
from qlora_kit.adapters.peft_format import load_adapter
from qlora_kit.adapters.prompt_tuning import virtual_tokens
from qlora_kit.adapters.switch import AdapterSet
from qlora_kit.data.template import render_chat, stop_token_ids
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.model.load import load_base, load_tokenizer
from qlora_kit.model.quantized import expanded
from qlora_kit.model.source import find_base
from qlora_kit.train.restore import best_device, load_run_base, load_run_tokenizer, load_tuned
from qlora_kit.train.run_folder import RunFolder


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    streamer: TextStreamer | None = None,
) -> list[int]:
    """The answer's token ids, the end token included where it was reached. temperature 0 is greedy.

    Ends where prompt and answer fill the model's context.
    """
    max_new_tokens = max(1, min(max_new_tokens, context_length(model) - len(prompt_ids)))
    sampling: dict[str, Any] = {}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    ids = torch.tensor([prompt_ids], device=model.device)
    return _answers(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens, streamer=streamer, **sampling)[0]


@torch.no_grad()
def generate_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> list[list[int]]:
    """The greedy answer to each prompt, as `generate_ids` gives it, the end token included where it was reached.

    Prompts of similar length are read together, padded on the left; behind virtual tokens, and where answers may end
    with the context, those of the same length.
    """
    answers: dict[int, list[int]] = {}
    ends = stop_token_ids(tokenizer)
    reach = max(map(len, prompts), default=0) + max_new_tokens
    padded = not virtual_tokens(model) and reach <= context_length(model)
    for places in _batches(prompts, batch_size, padded):
        longest = max(len(prompts[place]) for place in places)
        ids = torch.full((len(places), longest), tokenizer.pad_token_id, device=model.device)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            start = longest - len(prompts[place])
            ids[row, start:] = torch.tensor(prompts[place])
            mask[row, start:] = 1
        room = max(1, min(max_new_tokens, context_length(model) - longest))
        for place, answer in zip(places, _answers(model, tokenizer, ids, mask, room)):
            end = next((k for k, token in enumerate(answer) if token in ends), len(answer) - 1)
            answers[place] = answer[: end + 1]
    return [answers[place] for place in range(len(prompts))]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """What follows each row of ids, int64 [batch, seq] as its mask; greedy but for other `options` of transformers."""
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    generate: Any = model.generate
    with plain_generation(model):
        found = generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_token_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **greedy | options,
        )
    answers: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return answers


def _batches(prompts: Sequence[list[int]], batch_size: int, padded: bool) -> Iterator[list[int]]:
    """Places of the prompts, in batches of similar length, or of the same where they are not padded."""
    order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), place))
    groups = [order] if padded else [list(same) for _, same in groupby(order, key=lambda place: len(prompts[place]))]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without the defaults that a model ships (penalties, lengths), so that greedy is greedy in every form of it."""
    shipped = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the model was made for, prompt and answer together, without virtual ones."""
    return (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - virtual_tokens(model)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def generate_command(
    name: str,
    *,
    prompt: str | None,
    chat: str | None,
    system: str | None,
    seed: int,
    adapter: Sequence[str] = (),
    **options: Any,
) -> None:
    """Prints an answer as it is made; a conversation until an empty line where neither prompt nor chat text is given.

    Args:
        adapter: runs or adapters' folders, or NAME=FOLDER, used on the run's or model's base instead of the run's own.
            Several answer in turn, or in a conversation the one that `/adapter NAME` named.

    Raises:
        AdapterError: an adapter is not there, does not fit the base, or cannot stand beside others.
        ModelError, RunError: there is no such run or model, or the prompt does not fit it.
        DataError: it has no chat template, or the template refuses these turns.
    """
    model, tokenizer, adapters = _load(name, adapter)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def say(ids: list[int]) -> list[int]:
        room = context_length(model) - 1
        if not 0 < len(ids) <= room:
            raise ModelError("length of the prompt in tokens", got=len(ids), allowed=f"1 to {room}")
        return generate_ids(model, tokenizer, ids, streamer=streamer, **options)

    def answer(messages: list[dict[str, Any]]) -> str:
        text = render_chat(tokenizer, messages, generation_prompt=True)
        return decode(tokenizer, say(tokenizer(text, add_special_tokens=False)["input_ids"]))

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    with expanded(model, model.dtype):
        if prompt is None and not chat:
            torch.manual_seed(seed)
            _converse(messages, answer, adapters)
            return
        for used in adapters.names if adapters else [None]:
            torch.manual_seed(seed)
            if adapters and used:
                adapters.use(used)
                print(f"{used}:")
            if prompt is not None:
                say(tokenizer(prompt)["input_ids"])
            else:
                answer([*messages, {"role": "user", "content": chat}])


def _converse(
    messages: list[dict[str, Any]], answer: Callable[[list[dict[str, Any]]], str], adapters: AdapterSet | None
) -> None:
    """Turns until an empty line; `/adapter NAME` has another adapter go on with the same conversation."""
    if adapters:
        adapters.use(adapters.names[0])
        print(f"{adapters.current} answers; /adapter NAME switches to another: {', '.join(adapters.names)}")
    while turn := _ask():
        if adapters and turn.startswith("/adapter"):
            try:
                adapters.use(turn.removeprefix("/adapter").strip())
            except AdapterError as error:
                print(error)
            continue
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": answer(messages)})


def _load(name: str, given: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, AdapterSet | None]:
    """The model with the one adapter that is meant, or with several beside it, none in use yet."""
    one = adapter_folder(Path(given[0])) if len(given) == 1 else None
    if (Path(name) / "recipe.yaml").is_file():
        run = RunFolder.open(name)
        tokenizer = load_run_tokenizer(run)
        model = load_run_base(run, device=best_device()) if len(given) > 1 else load_tuned(run, best_device(), one)
    else:
        source = find_base(name)
        model, tokenizer = load_base(source, device=best_device()), load_tokenizer(source.folder)
        if one is not None:
            load_adapter(model, one)
    model.eval()
    if len(given) < 2:
        return model, tokenizer, None
    adapters = AdapterSet(model)
    for text in given:
        adapters.load(*named_folder(text))
    return model, tokenizer, adapters


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""

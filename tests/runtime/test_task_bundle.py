"""Labels, numbers, tags and answers of bundles, against torch and transformers' own tokenization."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from qlora_runtime import Bundle, TaskBundle
from qlora_runtime.errors import ArgumentError, PromptTooLongError, WrongTaskError
from tiny_tasks import CONTEXT, LABELS, LENGTH, QUESTIONS, SENTENCES, TAGS, TASKS, TEXTS, task_model, task_tokenizer


def torch_logits(name: str, text: str | tuple[str, str]) -> np.ndarray:
    """[labels], of the text cut as training cuts it."""
    tiny = TASKS[name]
    first, second = (text, None) if isinstance(text, str) else text
    inputs = task_tokenizer(tiny.arch)(
        first, second, truncation="longest_first", max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        return task_model(tiny)(**inputs).logits[0].double().numpy()


def test_classify(task_bundle):
    found = list(task_bundle("bert classifies").classify(TEXTS))
    for text, result in zip(TEXTS, found, strict=True):
        logits = torch_logits("bert classifies", text)
        assert result.labels == (LABELS[logits.argmax()],)
        np.testing.assert_allclose(result.probabilities, np.exp(logits) / np.exp(logits).sum(), atol=1e-5)
    assert len({result.labels for result in found}) > 1
    assert [result.truncated for result in found] == [False, False, False, False, True, False]


def test_classify_with_several_labels(task_bundle):
    found = list(task_bundle("distilbert gives several labels").classify(TEXTS, batch_size=2))
    for text, result in zip(TEXTS, found, strict=True):
        logits = torch_logits("distilbert gives several labels", text)
        assert result.labels == tuple(label for label, logit in zip(LABELS, logits, strict=True) if logit > 0)
        np.testing.assert_allclose(result.probabilities, 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_rate(task_bundle):
    texts = [text for text in TEXTS if isinstance(text, str)]
    for text, result in zip(texts, task_bundle("llama rates").rate(texts), strict=True):
        assert result.value == pytest.approx(torch_logits("llama rates", text).item(), abs=1e-5)


def test_tag_words_and_raw_text(task_bundle):
    bundle, tiny = task_bundle("bert tags"), TASKS["bert tags"]
    tokenizer, model = task_tokenizer("bert"), task_model(tiny)
    for words, result in zip(SENTENCES[:3], bundle.tag(SENTENCES[:3]), strict=True):
        inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**inputs).logits[0].argmax(-1).tolist()
        owners = inputs.word_ids()
        assert result.tags == tuple(TAGS[best[owners.index(word)]] for word in range(len(words)))
        assert result.text == " ".join(words) and [word.text for word in result.words] == words
        assert all(0 < score <= 1 for score in result.scores)
        for span in result.spans:
            assert result.text[span.start : span.end] == span.text and span.type in ("place", "thing")
    (raw,) = bundle.tag(["The bridge, was built"])
    (given,) = bundle.tag([["The", "bridge", ",", "was", "built"]])
    assert raw.tags == given.tags and raw.text == "The bridge, was built"
    assert any(span for result in bundle.tag(SENTENCES) for span in result.spans)


def test_a_long_sentence_and_an_empty_one_are_tagged_whole(task_bundle):
    long, empty = task_bundle("modernbert tags").tag([SENTENCES[3], "  "])
    assert len(long.tags) == len(SENTENCES[3]) and set(long.tags) <= set(LABELS) and min(long.scores) > 0
    assert long.spans == () and empty.tags == () and empty.text == "  "


@pytest.mark.parametrize("name", ["bert answers", "roberta answers or not"])
def test_answer(task_bundle, name):
    tiny = TASKS[name]
    tokenizer, model = task_tokenizer(tiny.arch), task_model(tiny)
    for (question, context), answer in zip(QUESTIONS, task_bundle(name).answer(QUESTIONS), strict=True):
        candidates = {(-np.inf, 0, 0)}
        nulls = []
        windows = tokenizer(
            question, context, truncation="only_second", max_length=LENGTH, stride=8,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        for place, ids in enumerate(windows["input_ids"]):
            inputs = {"input_ids": torch.tensor([ids])}
            if tiny.arch == "bert":
                inputs["token_type_ids"] = torch.tensor([windows["token_type_ids"][place]])
            with torch.no_grad():
                output = model(**inputs)
            starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
            nulls.append(starts[0] + ends[0])
            allowed = [at for at, part in enumerate(windows.sequence_ids(place)) if part == 1]
            for first, last in itertools.product(allowed, allowed):
                if first <= last < first + tiny.info.max_answer_tokens:
                    offsets = windows["offset_mapping"][place]
                    candidates.add((starts[first] + ends[last], offsets[first][0], offsets[last][1]))
        logit, start, end = max(candidates)
        empty = tiny.info.unanswerable and min(nulls) > logit
        assert answer.text == ("" if empty else context[start:end].strip())
        assert answer.text == context[answer.start : answer.end] and 0 < answer.score <= 1


def test_rows_come_one_by_one_in_their_order(task_bundle):
    bundle = task_bundle("bert classifies")
    endless = (TEXTS[place % len(TEXTS)] for place in itertools.count())
    found = list(itertools.islice(bundle.classify(endless, batch_size=3), 100))
    alone = [next(bundle.classify([text])) for text in TEXTS]
    for place, result in enumerate(found):
        np.testing.assert_allclose(result.probabilities, alone[place % len(TEXTS)].probabilities, atol=1e-6)


def test_the_wrong_task_is_named(task_bundle, pristine_bundle):
    bundle = task_bundle("bert classifies")
    with pytest.raises(WrongTaskError, match=r"tag needs a bundle for tagging; .* is one for classification"):
        bundle.tag([["a"]])
    with pytest.raises(WrongTaskError, match="rate needs a bundle for regression"):
        bundle.rate(["a"])
    with pytest.raises(WrongTaskError, match=r"for classification, which does not generate.*TaskBundle"):
        Bundle.open(bundle.directory)
    with pytest.raises(WrongTaskError, match=r"is a bundle for causal_lm, which generates"):
        TaskBundle.open(pristine_bundle)


def test_what_cannot_be_asked_is_refused(task_bundle):
    with pytest.raises(PromptTooLongError, match="Shorten the question"):
        list(task_bundle("bert answers").answer([(CONTEXT, "The bridge.")]))
    with pytest.raises(ArgumentError, match="batch_size is 0, at least 1"):
        task_bundle("bert classifies").classify(["a"], batch_size=0)
    with pytest.raises(ArgumentError, match="the text '' has no tokens"):
        list(task_bundle("llama rates").rate([""]))
    with pytest.raises(ArgumentError, match="threads is 0"):
        TaskBundle.open(task_bundle("llama rates").directory, threads=0)

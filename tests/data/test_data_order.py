"""The order of rows, in memory and streamed: deterministic, and the same however often it is interrupted."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest

from qlora_kit.data.batches import TrainBatches
from qlora_kit.data.dataset import prepare
from qlora_kit.data.order import BatchCursor, epoch_order
from qlora_kit.data.stream import StreamedTrain
from qlora_kit.errors import DataError


def pairs(n: Any, start: Any = 0) -> Any:
    return [{"prompt": f"question {k}", "completion": f"answer {k}"} for k in range(start, start + n)]


def through_json(state: Any) -> Any:
    text = json.dumps(state)
    assert len(text) < 2000
    return json.loads(text)


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(seed, epoch, 50).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(1, 0, 50).dtype == np.int64 and epoch_order(1, 0, 50).tolist() == orders[0]


def test_the_order_is_pinned() -> None:
    assert epoch_order(42, 0, 8).tolist() == [7, 2, 1, 5, 6, 0, 4, 3]  # a change breaks every resumable run


def test_batches_cross_the_ends_of_epochs() -> None:
    cursor = BatchCursor(5, 3, seed=1)
    dealt = [row for _ in range(5) for row in cursor.next_batch()]
    assert [sorted(dealt[k : k + 5]) for k in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert cursor.epoch == 3.0


def test_a_cursor_resumes_anywhere() -> None:
    whole = list(islice(BatchCursor(7, 2, seed=3), 30))
    for cut in range(30):
        cursor = BatchCursor(7, 2, seed=3)
        for _ in range(cut):
            next(cursor)
        resumed = BatchCursor(7, 2, seed=3, state=through_json(cursor.state_dict()))
        assert list(islice(resumed, 30 - cut)) == whole[cut:]


def test_processes_share_a_global_batch() -> None:
    single = BatchCursor(11, 6, seed=5)
    ranks = [BatchCursor(11, 2, seed=5, world_size=3, rank=rank) for rank in range(3)]
    for _ in range(12):
        parts = [cursor.next_batch() for cursor in ranks]
        assert [row for part in parts for row in part] == single.next_batch()
        assert len({json.dumps(cursor.state_dict()) for cursor in ranks}) == 1


def test_the_micro_batch_may_change_on_resume() -> None:
    whole = [row for batch in islice(BatchCursor(10, 4, seed=1), 10) for row in batch]
    first = BatchCursor(10, 4, seed=1)
    dealt = [row for _ in range(3) for row in first.next_batch()]
    second = BatchCursor(10, 2, seed=1, state=first.state_dict())
    assert dealt + [row for _ in range(14) for row in second.next_batch()] == whole


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchCursor(0, 1, seed=1), r"no rows to make batches of \(got 0\)"),
        (lambda: BatchCursor(3, 1, seed=1, world_size=2, rank=2), r"rank outside of the process count \(got 2\)"),
        (
            lambda: BatchCursor(3, 1, 1, {"rows_dealt": 1, "rows": 4, "seed": 1}),
            "data position has rows 4, this run has 3",
        ),
        (
            lambda: BatchCursor(3, 1, 1, {"rows_dealt": 1, "rows": 3, "seed": 2}),
            "data position has seed 2, this run has 1",
        ),
    ],
)
def test_cursors_that_cannot_be(make: Any, message: Any) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_a_streamed_epoch_holds_every_row_once(chatml: Any, section: Any, jsonl: Any) -> None:
    stream = StreamedTrain(section(train=jsonl(pairs(40)), shuffle_buffer=8), chatml, 1)
    epochs = [[row.row for row in islice(stream, 40)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(1, 41)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("weights", [(None, None), (3.0, 1.0)])
@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_a_stream_resumes_at_every_cut(buffer: Any, weights: Any, chatml: Any, section: Any, jsonl: Any) -> None:
    odd = [*pairs(9), {"prompt": "p", "completion": ""}, 7, *pairs(4, 20)]
    sources = [{"path": jsonl(odd, "a.jsonl")}, {"path": jsonl(pairs(6, 50), "b.jsonl")}]
    sources = [source | ({"weight": weight} if weight else {}) for source, weight in zip(sources, weights)]
    fields = section(train=sources, shuffle_buffer=buffer, bad_rows="skip")
    stream = StreamedTrain(fields, chatml, 11)
    whole, states = [], [stream.state_dict()]
    for row in islice(stream, 60):
        whole.append((row.source, row.row, row.input_ids.tolist()))
        states.append(through_json(stream.state_dict()))
    for cut in range(0, 49, 2):
        resumed = StreamedTrain.from_state(fields, chatml, states[cut])
        assert [(row.source, row.row, row.input_ids.tolist()) for row in islice(resumed, 12)] == whole[cut : cut + 12]
        assert resumed.state_dict() == states[cut + 12]


def test_weighted_streams_draw_by_share(chatml: Any, section: Any, jsonl: Any) -> None:
    sources = [
        {"path": jsonl(pairs(5), "a.jsonl"), "weight": 9.0},
        {"path": jsonl(pairs(5, 9), "b.jsonl"), "weight": 1.0},
    ]
    stream = StreamedTrain(section(train=sources), chatml, 1)
    share = Counter(row.source for row in islice(stream, 600))[0] / 600
    assert 0.86 < share < 0.94 and stream.epoch == 0


def test_a_stream_counts_what_it_skips(chatml: Any, section: Any, jsonl: Any) -> None:
    rows = [*pairs(4), {"prompt": "p", "completion": ""}]
    stream = StreamedTrain(section(train=jsonl(rows), bad_rows="skip"), chatml, 1)
    list(islice(stream, 9))
    report = stream.encoders[0].report
    assert report.used == 9 and report.skipped["empty completion"] in (2, 3)


def test_a_stream_without_usable_rows_ends(chatml: Any, section: Any, jsonl: Any) -> None:
    path = jsonl([{"prompt": "p", "completion": ""}])
    with pytest.raises(DataError, match=r"no usable row in a whole epoch \(skipped: .*empty completion"):
        next(StreamedTrain(section(train=path, bad_rows="skip"), chatml, 1))


def test_a_stream_stops_at_a_bad_row(chatml: Any, section: Any, jsonl: Any) -> None:
    path = jsonl([{"prompt": "p", "completion": ""}])
    with pytest.raises(DataError, match=r"rows\.jsonl row 1: completion is empty"):
        next(StreamedTrain(section(train=path), chatml, 1))


def test_states_of_other_streams_are_refused(chatml: Any, section: Any, jsonl: Any) -> None:
    fields = section(train=jsonl(pairs(4)))
    state = StreamedTrain(fields, chatml, 1).state_dict()
    with pytest.raises(DataError, match="has seed 1 and 1 sources, this run has seed 2 and 1"):
        StreamedTrain(fields, chatml, 2).load_state_dict(state)
    with pytest.raises(DataError, match="the data ended after 4 rows; the saved position is row 9"):
        StreamedTrain.from_state(fields, chatml, state | {"draws": 9})


@pytest.mark.parametrize("streaming", [False, True])
def test_train_batches_resume_and_split_over_processes(streaming: Any, chatml: Any, section: Any, jsonl: Any) -> None:
    path, held_out = jsonl([*pairs(10), {"prompt": "p", "completion": ""}]), jsonl(pairs(2, 90), "eval.jsonl")
    fields = section(train=path, eval=held_out, streaming=streaming, bad_rows="skip", shuffle_buffer=4)
    data = prepare(fields, chatml, 1)
    assert len(data.eval) == 2 and (len(data.train) == 0) == streaming

    def make(size: Any = 4, rank: Any = 0, processes: Any = 1) -> Any:
        return TrainBatches(prepare(fields, chatml, 1), fields, chatml, size, 1, rank, processes)

    def rows(batches: Any) -> Any:
        return [row.row for row in batches.next_micro_batch()]

    single, ranks = make(), [make(2, rank, 2) for rank in range(2)]
    seen = []
    for _ in range(8):
        seen.append(rows(single))
        assert [row for batches in ranks for row in rows(batches)] == seen[-1]
        assert ranks[0].state_dict() == ranks[1].state_dict() == single.state_dict()
    resumed = make()
    half = make()
    for _ in range(4):
        rows(half)
    resumed.load_state_dict(through_json(half.state_dict()))
    assert [rows(resumed) for _ in range(4)] == seen[4:]

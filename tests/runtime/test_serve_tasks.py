"""The server with bundles that classify, rate, tag and answer."""

import pytest

from .serving import CHAT, serving

TEXTS = ["The bridge was built.", "Bread, salt", "a " * 200]
ROWS = {
    "bert classifies": ("classify", [*TEXTS, {"text": "a", "pair": "b"}]),
    "bert tags": ("tag", [*TEXTS, {"words": ["The", "bridge"]}]),
    "bert answers": ("answer", [{"question": "Where?", "context": "By the river, in the morning. " * 9}] * 18),
}


@pytest.mark.parametrize("name", ROWS)
def test_answers_are_the_runners(task_bundle, name):
    from qlora_runtime.task_console import answer_rows

    bundle = task_bundle(name)
    verb, inputs = ROWS[name]
    with serving(bundle.directory) as server:
        answer = server.ask(f"/v1/{verb}", {"input": inputs})
        assert answer.status == 200, answer.body
        alone = server.ask(f"/v1/{verb}", {"input": inputs[0]}).json()["data"]
        assert server.ask(CHAT, {"messages": []}).status == 404
        assert server.ask("/").status == 404
        server.wait_until_idle()
    rows = [({"text": row} if isinstance(row, str) else row) for row in inputs]
    found = answer.json()["data"]
    assert len(found) == len(inputs) and alone[0].keys() == found[0].keys()
    for row, told in zip(rows, found, strict=True):
        (expected,) = answer_rows(bundle, verb, [("here", row)], {}, 1)
        for column in told:
            if column in ("probability", "answer_score"):
                assert told[column] == pytest.approx(expected[column], abs=1e-4)
            elif column not in ("probabilities", "predicted_scores", "predicted_spans"):
                assert told[column] == expected[column]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input[0]", "an object of"),
        ({"input": []}, "input", "at least one row"),
        ({"input": ["a", 3]}, "input[1]", "an object of"),
        ({"input": [{"txt": "a"}]}, "input[0]", "an object of"),
        ({"input": "a", "labels": []}, "labels", "Unknown parameter"),
        ({"input": ["a", " "]}, None, "input[1]: text is blank"),
        ({"input": {"pair": "b"}}, None, "no column 'text'"),
        ({"input": "\ud800"}, None, "half a surrogate pair"),
    ],
)
def test_rows_that_cannot_be_asked_about(task_server, body, param, message):
    answer = task_server.ask("/v1/classify", body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.body
    assert message in answer.error["message"]


@pytest.fixture(scope="module")
def task_server(task_bundle):
    with serving(task_bundle("bert classifies").directory) as server:
        yield server

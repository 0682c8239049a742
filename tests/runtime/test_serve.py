"""The server's answers: the runner's own, in OpenAI's shapes; what it refuses, and how."""

import json
import signal
import socket
import threading
import time

import pytest
from qlora_runtime import Sampling
from qlora_runtime.cli import main
from qlora_runtime.generate import generate

from .serving import CHAT, COMPLETION, Server, serving
from .tiny import CONTEXT_LENGTH

TURN = [{"role": "user", "content": "Where does the road end?"}]
LONG = {"prompt": "The bridge", "max_tokens": 60}


@pytest.fixture(scope="module")
def server(pristine_bundle):
    with serving(pristine_bundle, "--name", "tiny", "--max-tokens", "64", "--max-body-bytes", "20000") as found:
        yield found


def test_a_chat_is_answered_as_the_runner_does(server, bundle):
    expected = generate(bundle, TURN, Sampling(max_new_tokens=12))
    answer = server.ask(CHAT, {"model": "tiny", "messages": TURN, "max_completion_tokens": 12}).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == "length"
    tokens = expected.prompt_tokens, len(expected.token_ids)
    assert tuple(answer["usage"].values()) == (*tokens, sum(tokens))


def test_a_streamed_chat_is_the_same(server, bundle):
    expected = generate(bundle, TURN, Sampling(max_new_tokens=12))
    first, *pieces, end, usage = server.events(
        CHAT, {"messages": TURN, "max_tokens": 12, "stream_options": {"include_usage": True}}
    )
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(pieces) > 3 and {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == expected.text
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "length")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12
    assert len({event["id"] for event in (first, *pieces, end, usage)}) == 1


def test_parts_of_text_are_joined(server):
    parts = [{"type": "text", "text": "Where does"}, {"type": "text", "text": "it end?"}]
    whole = [{"role": "user", "content": "Where does\nit end?"}]
    answers = [
        server.ask(CHAT, {"messages": messages, "max_tokens": 6}).json()["choices"]
        for messages in ([{"role": "user", "content": parts}], whole)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "top_p": 0.9, "seed": 4},
        {"temperature": 1.3, "top_k": 9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 5},
    ],
)
def test_a_drawn_completion_is_the_runners_of_that_seed(server, bundle, options):
    expected = generate(bundle, "The bridge", Sampling(max_new_tokens=20, **options))
    body = {"prompt": ["The bridge"], "max_tokens": 20, **options}
    answer = server.ask(COMPLETION, body).json()
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", expected.text)
    streamed = "".join(event["choices"][0]["text"] for event in server.events(COMPLETION, body))
    assert streamed == expected.text


def test_a_stop_string_ends_the_answer_and_is_not_in_it(server, bundle):
    whole = generate(bundle, "The bridge", Sampling(max_new_tokens=24)).text
    stop = whole[7:10]
    choice = server.ask(COMPLETION, {"prompt": "The bridge", "max_tokens": 24, "stop": stop}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_a_full_context_is_a_length(server):
    answer = server.ask(COMPLETION, {"prompt": "The bridge was " * 12}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == CONTEXT_LENGTH


def test_models_and_health(server):
    (model,) = server.ask("/v1/models").json()["data"]
    assert model["id"] == "tiny" and server.ask("/v1/models/tiny").json() == model
    assert server.ask("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.parametrize(
    ("change", "code", "param", "message"),
    [
        ({"messages": None}, "invalid_value", "messages", "at least one message"),
        ({"messages": []}, "invalid_value", "messages", "at least one message"),
        ({"messages": ["x"]}, "invalid_value", "messages[0]", "a role of"),
        ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages[0]", "a role of"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", None, "unknown role tool"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0]", "content is expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages[0]", "parts"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
            "unsupported_parameter",
            "messages[0]",
            "tool_calls",
        ),
        ({"messages": [{"role": "user", "content": "word " * 200}]}, "context_length_exceeded", "messages", "Shorten"),
        ({"temprature": 1}, "unknown_parameter", "temprature", "Unknown parameter"),
        ({"n": 2}, "unsupported_parameter", "n", "not supported"),
        ({"tools": [{}]}, "unsupported_parameter", "tools", "not supported"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs", "not supported"),
        ({"max_tokens": 65}, "invalid_value", "max_tokens", "allows up to 64"),
        ({"max_tokens": 0}, "invalid_value", None, "max_new_tokens is 0"),
        ({"max_tokens": "many"}, "invalid_value", None, "max_new_tokens is 'many'"),
        ({"temperature": -1}, "invalid_value", None, "temperature is -1"),
        ({"temperature": "hot"}, "invalid_value", None, "temperature is 'hot'"),
        ({"temperature": 10**400}, "invalid_value", None, "temperature is 1000"),
        ({"seed": -1}, "invalid_value", None, "seed is -1"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop", "at most 4"),
        ({"stop": 3}, "invalid_value", None, "list of non-empty strings"),
        ({"stop": [""]}, "invalid_value", None, "list of non-empty strings"),
        ({"stream": 1}, "invalid_value", "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options", "with stream"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(server, change, code, param, message):
    answer = server.ask(CHAT, {"messages": TURN, "max_tokens": 2} | change)
    assert answer.status == 400, answer.body
    assert (answer.error["type"], answer.error["code"]) == ("invalid_request_error", code)
    assert answer.error["param"] == param
    assert message in answer.error["message"]


def test_fields_that_change_nothing_are_ignored(server):
    body = {"messages": TURN, "max_tokens": 2}
    more = {"user": "x", "metadata": {"a": "b"}, "n": 1, "logit_bias": {}, "presence_penalty": 0.0, "tools": None}
    assert server.ask(CHAT, body | more).json()["choices"] == server.ask(CHAT, body).json()["choices"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code"),
    [
        (CHAT, b"{", {}, 400, "invalid_json"),
        (CHAT, b"[]", {}, 400, "invalid_json"),
        (CHAT, b"\xff", {}, 400, "invalid_json"),
        (CHAT, b'{"temperature": NaN}', {}, 400, "invalid_json"),
        (CHAT, b"[" * 15000, {}, 400, "invalid_json"),
        (CHAT, b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (CHAT, b" " * 20001, {}, 413, "request_too_large"),
        (CHAT, {"model": "gpt", "messages": TURN}, {}, 404, "model_not_found"),
        (COMPLETION, {"prompt": "\ud800"}, {}, 400, "invalid_value"),
        (COMPLETION, {"prompt": [1, 2]}, {}, 400, "invalid_value"),
        (COMPLETION, {"prompt": ""}, {}, 400, "invalid_value"),
        ("/v1/models/other", None, {}, 404, "model_not_found"),
        ("/v1/nothing", None, {}, 404, None),
        (CHAT, None, {}, 405, None),
    ],
)
def test_bad_requests_get_an_error_in_openais_shape(server, path, body, headers, status, code):
    answer = server.ask(path, body, headers)
    assert (answer.status, answer.error["code"]) == (status, code), answer.body
    assert set(answer.error) == {"message", "type", "param", "code"}


def test_a_body_without_a_length_is_bounded_too(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(20):  # the last goes over the limit: what came after the answer would meet a closed door
            connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert b"413" in connection.recv(100)


def test_other_sites_pages_are_not_answered(server):
    assert server.ask("/health", headers={"Host": "evil.example"}).status == 400


def break_off(server: Server, body: dict) -> None:
    with server.open(COMPLETION, body) as response:
        response.read(80)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_breaks_off_frees_the_worker(pristine_bundle, stream):
    """Answers of 60 tokens, broken off at once: none may be worked on to its end behind the client's back."""
    with serving(pristine_bundle) as server:
        body = json.dumps(LONG | {"stream": stream}).encode()
        head = f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                if stream:
                    connection.recv(10)
        server.wait_until_idle()
        assert server.ask(COMPLETION, LONG).status == 200


def test_a_full_queue_sends_away_with_429(pristine_bundle, bundle):
    expected = generate(bundle, LONG["prompt"], Sampling(max_new_tokens=60)).text
    answers = []
    with serving(pristine_bundle, "--queue", "1") as server:
        threads = [threading.Thread(target=lambda: answers.append(server.ask(COMPLETION, LONG))) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {answer.status for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status == 200:
            assert answer.json()["choices"][0]["text"] == expected
        else:
            assert (answer.error["type"], answer.error["code"]) == ("rate_limit_error", "queue_full")
            assert int(answer.headers["retry-after"]) >= 1


def test_a_key_is_asked_for(pristine_bundle):
    with serving(pristine_bundle, environment={"QLORA_RUNTIME_API_KEY": "secret"}) as server:
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
            answer = server.ask(COMPLETION, LONG, wrong)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert server.ask("/v1/models").status == 401
        assert server.ask(COMPLETION, LONG, {"Authorization": "Bearer secret"}).status == 200
        assert server.ask("/health").status == 200


def test_a_body_that_does_not_come_in_is_given_up(pristine_bundle):
    with (
        serving(pristine_bundle, "--body-timeout-s", "1") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
    ):
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b"408" in connection.recv(100)


def test_sigterm_lets_what_is_begun_end(pristine_bundle, bundle):
    expected = generate(bundle, LONG["prompt"], Sampling(max_new_tokens=60)).text
    with serving(pristine_bundle) as server, server.open(COMPLETION, LONG | {"stream": True}) as response:
        response.read(20)
        server.process.send_signal(signal.SIGTERM)
        told = response.read().decode()
        assert told.endswith("data: [DONE]\n\n")
        texts = [json.loads(event[6:])["choices"][0]["text"] for event in told.split("\n\n")[1:-2]]
        assert "".join(texts) and expected.endswith("".join(texts))
        assert server.process.wait(20) == 0
        deadline = time.monotonic() + 5
        with pytest.raises(ConnectionRefusedError):
            while time.monotonic() < deadline:
                server.ask("/health")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "lets other machines ask"),
        (["--max-tokens", "0"], "max_tokens is 0, allowed are integers of at least 1"),
        (["--queue", "-1"], "queue is -1"),
        (["--threads", "0"], "threads is 0"),
    ],
)
def test_options_that_are_not_allowed(capsys, pristine_bundle, options, message):
    assert main(["serve", str(pristine_bundle), "--port", "0", *options]) == 2
    assert message in capsys.readouterr().err

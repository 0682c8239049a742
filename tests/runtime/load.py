"""Mixed requests against a server, each with what its answer must be."""

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from qlora_runtime import Bundle, Sampling
from qlora_runtime.generate import generate

from .serving import CHAT, COMPLETION, Server

PROMPTS = ["The bridge", "Bread, salt", "漢字 and 👍", "Where does the road end?", "x"]
MALFORMED = [b"", b"{", b"null", b"\xff\xfe", b'{"messages": 3}', b'{"prompt": {"a": 1}}', b'{"stream": "yes"}']
HEAD = "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


@dataclass(frozen=True)
class Task:
    """What is asked, and what must come back: the text and why it ended."""

    path: str
    body: dict[str, Any]
    text: str
    finish_reason: str


def make_tasks(bundle: Bundle) -> list[Task]:
    """Chats and completions, greedy, drawn and with stop strings, with the plain runner's answers."""
    tasks = []
    for place, prompt in enumerate(PROMPTS):
        options: list[dict[str, Any]] = [
            {"max_tokens": 9 + place},
            {"max_tokens": 16, "temperature": 0.9, "seed": place, "top_p": 0.9},
            {"max_tokens": 20, "temperature": 1.1, "seed": place, "stop": ["e", "the"]},
        ]
        for given in options:
            sampling = Sampling(**{"max_new_tokens" if name == "max_tokens" else name: v for name, v in given.items()})
            messages = [{"role": "user", "content": prompt}]
            for path, asked, field in ((CHAT, messages, "messages"), (COMPLETION, prompt, "prompt")):
                found = generate(bundle, asked, sampling)
                reason = "stop" if found.finish_reason in ("eos", "stop") else "length"
                tasks.append(Task(path, given | {field: asked}, found.text, reason))
    return tasks


def run_load(server: Server, tasks: list[Task], requests: int, clients: int, seed: int) -> Counter[str]:
    """Ask `requests` times from `clients` at once; how often each kind was asked, and how often sent away (429)."""
    chance, counts = random.Random(seed), Counter[str]()
    kinds = list(_KINDS)
    # Each kind comes, in any order.
    plan = [(kinds[place % len(kinds)], chance.choice(tasks), chance.random()) for place in range(requests)]
    chance.shuffle(plan)

    def ask(item: tuple[str, Task, float]) -> None:
        kind, task, number = item
        counts.update(_KINDS[kind](server, task, number))
        counts[kind] += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, plan))
    return counts


def _answered(ask: Callable[[], Any]) -> tuple[Any, int]:
    """The answer, once the queue had room, and how often it had none."""
    for tries in range(1000):
        answer = ask()
        if answer.status != 429:
            return answer, tries
        assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.02)
    raise AssertionError("the queue was always full")


def _whole(server: Server, task: Task, number: float) -> Counter[str]:
    answer, refused = _answered(lambda: server.ask(task.path, task.body))
    assert answer.status == 200, answer.body
    (choice,) = answer.json()["choices"]
    said = choice["text"] if task.path == COMPLETION else choice["message"]["content"]
    assert (said, choice["finish_reason"]) == (task.text, task.finish_reason)
    return Counter({"sent away (429)": refused})


def _streamed(server: Server, task: Task, number: float) -> Counter[str]:
    answer, refused = _answered(lambda: server.ask(task.path, task.body | {"stream": True}))
    assert answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n"), answer.body
    choices = [json.loads(event[6:])["choices"][0] for event in answer.body.decode().split("\n\n")[:-2]]
    said = [choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices]
    assert ("".join(said), choices[-1]["finish_reason"]) == (task.text, task.finish_reason)
    return Counter({"sent away (429)": refused})


def _broken_off(server: Server, task: Task, number: float) -> Counter[str]:
    """Sent whole or in part; then the line is cut, before an answer or in it."""
    body = json.dumps(task.body | {"stream": number < 0.5}).encode()
    sent = HEAD.format(path=task.path, length=len(body)).encode() + body
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(sent if number < 0.8 else sent[: int(len(sent) * number)])
        if number < 0.4:
            connection.recv(1 + int(number * 1000))
    return Counter()


def _oversized(server: Server, task: Task, number: float) -> Counter[str]:
    body = json.dumps(task.body | {"user": "x" * 20000}).encode()
    answer = server.ask(task.path, body)
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    return Counter()


def _malformed(server: Server, task: Task, number: float) -> Counter[str]:
    answer = server.ask(task.path, MALFORMED[int(number * len(MALFORMED))])
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error", answer.body
    return Counter()


def _too_long(server: Server, task: Task, number: float) -> Counter[str]:
    answer, refused = _answered(lambda: server.ask(COMPLETION, {"prompt": "word " * 300}))
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    return Counter({"sent away (429)": refused})


_KINDS: dict[str, Callable[[Server, Task, float], Counter[str]]] = {
    "whole": _whole,
    "streamed": _streamed,
    "broken off": _broken_off,
    "oversized": _oversized,
    "malformed": _malformed,
    "too long": _too_long,
}


def settled(server: Server, files: int, limit_s: float = 10.0) -> tuple[float, int, int]:
    """The resources once no more than `files` are open, or the time is up."""
    end = time.monotonic() + limit_s
    while (found := server.resources())[1] > files and time.monotonic() < end:
        time.sleep(0.05)
    return found

"""A server in a process of its own, and a client that can also misbehave."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    headers: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def open(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Iterator[HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            kind = {} if body is None else {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, data, self.headers | kind | (headers or {}))
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        with self.open(path, body, headers) as response:
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def events(self, path: str, body: Any) -> list[Any]:
        """A stream's events; its end must be [DONE]."""
        answer = self.ask(path, body | {"stream": True})
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"].startswith("text/event-stream")
        *told, done, rest = answer.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in told if event]

    def wait_until_idle(self, limit_s: float = 20.0) -> None:
        end = time.monotonic() + limit_s
        while (state := self.ask("/health").json()) != {"status": "ok", "running": 0, "waiting": 0}:
            assert time.monotonic() < end, state
            time.sleep(0.02)

    def resources(self) -> tuple[float, int, int]:
        """Resident MiB, open files and threads."""
        folder = Path(f"/proc/{self.process.pid}")
        status = (folder / "status").read_text()
        number = {name: int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1]) for name in ("VmRSS", "Threads")}
        return number["VmRSS"] / 1024, len(list((folder / "fd").iterdir())), number["Threads"]


@contextmanager
def serving(bundle: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready; ended with SIGTERM, and its exit code must be 0."""
    command = [sys.executable, "-m", "qlora_runtime.cli", "serve", str(bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=os.environ | (environment or {})
    )
    said = []
    try:
        while not (found := re.search(r"answers at http://.*:(\d+)", line := process.stderr.readline())):
            said.append(line)
            assert line, f"exit code {process.wait()}: {''.join(said)}"
        server = Server(process, int(found[1]))
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read()
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()

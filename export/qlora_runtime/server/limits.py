"""What a server allows its clients."""

from dataclasses import dataclass, fields

from qlora_runtime.errors import ArgumentError


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; each is at least 1, `queue` at least 0.

    Raises:
        ArgumentError: a value below that.
    """

    max_body_bytes: int = 1 << 20
    max_tokens: int = 1024  # of one answer, and how long it becomes where the request does not say
    workers: int = 1  # answers worked on at once, each with a key-value cache of its own
    queue: int = 16  # requests that wait for a worker; more are sent away with 429
    timeout_s: int = 300  # for one request, waiting and answering together
    body_timeout_s: int = 20  # for a request's body to come in
    max_connections: int = 256  # open at once; more are sent away with 503

    def __post_init__(self) -> None:
        for field in fields(self):
            value, lowest = getattr(self, field.name), 0 if field.name == "queue" else 1
            if value < lowest:
                raise ArgumentError(f"{field.name} is {value}, allowed are integers of at least {lowest}.")

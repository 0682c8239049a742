"""The endpoints."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qlora_runtime.bundle import Bundle
from qlora_runtime.errors import BundleError
from qlora_runtime.generate import TextStream, stream_text
from qlora_runtime.generating import GeneratingBundle
from qlora_runtime.server.engine import Engine, Turn, steps
from qlora_runtime.server.errors import ApiError, from_bundle
from qlora_runtime.server.fields import Asked, read_chat, read_completion
from qlora_runtime.server.incoming import check_key, read_body, while_there
from qlora_runtime.server.limits import Limits
from qlora_runtime.server.page import read_page
from qlora_runtime.server.replies import Reply, event
from qlora_runtime.server.rows import answer_request
from qlora_runtime.strict_json import JsonObject
from qlora_runtime.task import VERBS
from qlora_runtime.task_bundle import TaskBundle

Endpoint = Callable[[Request], Awaitable[Response]]
_GRACE_S = 5.0  # for the last event of an answer whose time is up
_GONE = 499  # what servers log for a client that went away; nobody reads it


@dataclass
class Service:
    """A bundle, and who may ask it what.

    Attributes:
        name: the model's id; with an adapter beside it, of a bundle that has some, it is NAME:ADAPTER.
        hosts: the Host headers that are answered, "*" for all: pages of other sites have no business here.
    """

    bundle: GeneratingBundle | TaskBundle
    name: str
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None
    hosts: tuple[str, ...] = ("*",)
    engine: Engine = field(init=False)
    _served: dict[str, GeneratingBundle | TaskBundle] = field(init=False)

    def app(self) -> Starlette:
        """The ASGI application."""
        self.engine = Engine(self.limits)
        self._served = {self.name: self.bundle}
        if isinstance(self.bundle, Bundle):
            for adapter in self.bundle.manifest.adapters:
                self._served[f"{self.name}:{adapter}"] = self.bundle.with_adapter(adapter)
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self._keyed(self.models)),
            Route("/v1/models/{name:path}", self._keyed(self.model)),
        ]
        if isinstance(self.bundle, TaskBundle):
            verb = VERBS[self.bundle.task.type]
            routes.append(Route(f"/v1/{verb}", self._keyed(self.rows), methods=["POST"]))
        else:
            routes += [
                Route("/", page),
                Route("/v1/chat/completions", self._keyed(self.chat), methods=["POST"]),
                Route("/v1/completions", self._keyed(self.completion), methods=["POST"]),
            ]
        return Starlette(
            routes=routes,
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=list(self.hosts), www_redirect=False)
            ],
            exception_handlers={
                ApiError: _refused,
                HTTPException: _not_found,
                ClientDisconnect: _went_away,
                Exception: _failed,
            },
            lifespan=self._lifespan,
        )

    async def health(self, request: Request) -> Response:
        """That the server runs, and how busy it is."""
        engine = self.engine
        return JSONResponse({"status": "ok", "running": engine.running, "waiting": engine.waiting})

    async def models(self, request: Request) -> Response:
        """The one model, in a list; of a bundle with adapters the base, and it with each of them."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._served]})

    async def model(self, request: Request) -> Response:
        """A model, by its id."""
        return JSONResponse(self._card(self._model(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        """The next message of a chat."""
        body = await read_body(request, self.limits)
        reply = Reply(self._model(body.get("model")), True)
        return await self._generate(request, read_chat(body, self.limits.max_tokens), reply)

    async def completion(self, request: Request) -> Response:
        """How a text goes on."""
        body = await read_body(request, self.limits)
        reply = Reply(self._model(body.get("model")), False)
        return await self._generate(request, read_completion(body, self.limits.max_tokens), reply)

    async def rows(self, request: Request) -> Response:
        """What a task's model says of texts."""
        body = await read_body(request, self.limits)
        self._model(body.get("model"))
        assert isinstance(self.bundle, TaskBundle)
        turn = await while_there(request, self.engine.turn())
        try:
            rows = await while_there(request, answer_request(self.bundle, body, turn))
        except BundleError as error:
            raise from_bundle(error) from error
        finally:
            turn.close()
        return JSONResponse({"object": "list", "model": self.name, "data": rows})

    async def _generate(self, request: Request, asked: Asked, reply: Reply) -> Response:
        turn = await while_there(request, self.engine.turn())
        handed_on = False
        try:
            stream = await turn.run(lambda: self._begin(asked, reply.model, turn))
            turn.at_end(stream.close)
            if asked.stream:
                handed_on = True
                return _Events(_events(asked, reply, turn, stream), turn)
            text = await while_there(request, _joined(turn, stream))
            return JSONResponse(reply.whole(text, stream))
        except BundleError as error:
            raise from_bundle(error) from error
        finally:
            if not handed_on:
                turn.close()

    def _begin(self, asked: Asked, name: str, turn: Turn) -> TextStream:
        bundle = self._served[name]
        assert not isinstance(bundle, TaskBundle)
        return stream_text(bundle, asked.prompt, asked.sampling, turn.cancelled)

    def _model(self, name: Any) -> str:
        """`name`, once it is the id of a model that is served; None means the bundle's own."""
        if name is None:
            return self.name
        if not isinstance(name, str) or name not in self._served:
            has = ", ".join(map(repr, self._served))
            message = f"The model {name!r} does not exist; this server has {has}."
            raise ApiError(404, message, "model_not_found", "model")
        return name

    def _card(self, name: str) -> JsonObject:
        return {"id": name, "object": "model", "created": 0, "owned_by": "qlora-kit"}

    def _keyed(self, endpoint: Endpoint) -> Endpoint:
        async def checked(request: Request) -> Response:
            check_key(request, self.api_key)
            return await endpoint(request)

        return checked

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(self.engine.threads.shutdown, cancel_futures=True)


async def page(request: Request) -> Response:
    """The chat page."""
    text, policy = read_page()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})


async def _joined(turn: Turn, stream: TextStream) -> str:
    return "".join([piece async for piece in steps(turn, stream)])


async def _events(asked: Asked, reply: Reply, turn: Turn, stream: TextStream) -> AsyncGenerator[str]:
    yield reply.first()
    try:
        async for piece in steps(turn, stream):
            yield reply.piece(piece)
    except BundleError as error:
        yield event(from_bundle(error).to_json())
    except ApiError as error:
        yield event(error.to_json())
    else:
        yield reply.last(stream, asked.include_usage)


class _Events(StreamingResponse):
    """Server-sent events, whose worker is free again whatever ends them."""

    def __init__(self, events: AsyncGenerator[str], turn: Turn) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._turn = events, turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left_s = max(0.0, self._turn.deadline - time.monotonic()) + _GRACE_S
        try:
            async with asyncio.timeout(left_s), aclosing(self._events):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            return  # the client does not read: the server closes what is not complete
        finally:
            self._turn.close()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    # A body that was not read to its end would be taken for the next request.
    headers = {**error.headers, **({"Connection": "close"} if error.status in (408, 413, 415) else {})}
    return JSONResponse(error.to_json(), error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(ApiError(error.status_code, message).to_json(), error.status_code, error.headers)


async def _went_away(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)


async def _failed(request: Request, error: Exception) -> Response:
    """The server logs what it was; the client need not know."""
    return JSONResponse(ApiError(500, "The server failed.", "server_error").to_json(), 500)

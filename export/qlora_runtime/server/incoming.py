"""What comes in: who may ask, how much, and whether he is still there."""

import asyncio
import hmac
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from qlora_runtime.server.errors import ApiError, bad
from qlora_runtime.server.limits import Limits
from qlora_runtime.strict_json import JsonObject

T = TypeVar("T")


def check_key(request: Request, api_key: str | None) -> None:
    """Raises ApiError 401 where a key is set and `Authorization: Bearer KEY` is not it."""
    if api_key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.encode(), api_key.encode())  # its time says nothing about the key
    if kind.lower() != "bearer" or not right:
        raise ApiError(
            401,
            "The API key is missing or wrong. Send the header Authorization: Bearer KEY.",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: Request, limits: Limits) -> JsonObject:
    """The body as a JSON object, never more of it in memory than is allowed.

    Raises:
        ApiError: 415, 413, 408, or 400 where it is no JSON object.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The Content-Type must be application/json.", "unsupported_media_type")
    most = limits.max_body_bytes
    size = request.headers.get("content-length", "0")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            if not size.isdigit() or int(size) <= most:
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        break
    except TimeoutError:
        raise ApiError(408, f"The body did not come in {limits.body_timeout_s} s.", "timeout") from None
    if len(body) > most or (size.isdigit() and int(size) > most):
        raise ApiError(413, f"The body has more than {most} bytes.", "request_too_large")
    return _parsed(bytes(body))


def _parsed(body: bytes) -> JsonObject:
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise bad("The body must be a JSON object.", code="invalid_json")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled where the client goes away before, once its body has been read.

    Raises:
        ClientDisconnect: the client is gone.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

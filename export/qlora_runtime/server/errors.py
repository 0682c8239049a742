"""Errors as OpenAI's API words them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_runtime.errors import (
    ArgumentError,
    BundleError,
    ChatTemplateError,
    PromptTooLongError,
    WrongTaskError,
)
from qlora_runtime.strict_json import JsonObject


@dataclass
class ApiError(Exception):
    """An answer other than 200. `param` names the field at fault."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """{"error": {message, type, param, code}}"""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, code, param)


def from_bundle(error: BundleError) -> ApiError:
    """What the runner refused: the request's fault, unless the model itself failed."""
    if isinstance(error, PromptTooLongError):
        return bad(str(error), "messages", "context_length_exceeded")
    if isinstance(error, ArgumentError | ChatTemplateError | WrongTaskError):
        return bad(str(error))
    return ApiError(500, str(error), "model_error")

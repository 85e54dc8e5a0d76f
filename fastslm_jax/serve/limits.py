"""Limits of a server, and the error that a client gets."""

import dataclasses
from collections.abc import Mapping

from fastslm_jax.errors import UserError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # others: by class


class ApiError(UserError):
    """An error with an HTTP status; `param` is the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict:
        """OpenAI's error JSON; the message is one line."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": " ".join(str(self).split()),
            "type": TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client, and all clients together, may ask for.

    Attributes:
        max_bytes: of a request's body.
        max_minutes: of a recording.
        max_requests: that wait or run.
        max_queue_minutes: of all recordings that wait or run; 1.9 MB of memory each.
        max_seconds: from the first byte of a request to the last of its answer.
    """

    max_bytes: int = 200 << 20
    max_minutes: float = 60.0
    max_requests: int = 64
    max_queue_minutes: float = 480.0
    max_seconds: float = 600.0

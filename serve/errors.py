"""Errors as an OpenAI client expects them: `{"error": {"message", "type", "param", "code"}}`, as vLLM fills it in."""

from collections.abc import Mapping
from http import HTTPStatus

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class ApiError(Exception):
    """An answer other than success. `param` names the field of the request that is at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The JSON of the answer, in vLLM's order of keys."""
        error = {"message": self.message, "type": TYPES[self.status], "param": self.param, "code": self.status}
        return orjson.dumps({"error": error})

    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, media_type="application/json")


async def on_api_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for what routing refuses: unknown paths (404) and methods (405)."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    message = {
        404: f"There is nothing at {where}.",
        405: f"{where} is not allowed; allowed: {(error.headers or {}).get('Allow', '')}.",
    }.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def on_crash(request: Request, error: Exception) -> Response:
    """Starlette's handler for everything else; the traceback goes to the program's log, never to the client."""
    return ApiError(500, f"The gateway failed: {HTTPStatus.INTERNAL_SERVER_ERROR.phrase}.").response()

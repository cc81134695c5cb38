"""The body of a request: bounded, JSON, an object."""

from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from serve.errors import ApiError


async def read_object(request: Request, limit: int) -> dict[str, Any]:
    """The request's JSON object. Raises ApiError: 413 above `limit` bytes, 400 where it is no JSON object."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(400, "Unsupported Media Type: Only 'application/json' is allowed")
    try:
        value = orjson.loads(await _read(request, limit))
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", param="body") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"The body has to be a JSON object, not {type(value).__name__}.", param="body")
    return value


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit, f"this one has {declared}")
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:  # sent in chunks, or more than was declared
                raise _too_large(limit, "this one has more")
            parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(400, "The connection closed before the body was complete.", param="body") from error
    return b"".join(parts)


def _too_large(limit: int, this: str) -> ApiError:
    return ApiError(413, f"The body may have at most {limit} bytes ([gateway] max_body_bytes); {this}.", param="body")

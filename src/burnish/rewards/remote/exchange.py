"""One request over HTTP within a time, and what its errors mean."""

import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress

from burnish.errors import UserError, described

MOST_BYTES = 2**24  # of an answer: a hundred numbers for each of ten thousand pictures are 9e6


class Failure(Exception):
    """A request that brought no scores, but may next time. `pause`: seconds that the server asks for."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


def post(
    url: str, body: bytes, headers: Mapping[str, str], timeout: float, verify: ssl.SSLContext | bool
) -> tuple[int, str, bytes]:
    """One POST, from the first look-up to the last byte within `timeout` seconds, else TimeoutError.

    httpx's own timeouts are for each piece sent or received: a server that drips would hold a run for hours. So it is
    asked in an event loop, which can be left at any point.
    """
    import anyio
    import httpx
    from anyio.from_thread import start_blocking_portal

    async def ask() -> tuple[int, str, bytes]:
        with anyio.fail_after(timeout):
            async with (
                httpx.AsyncClient(timeout=None, verify=verify) as client,
                client.stream("POST", url, content=body, headers=headers) as response,
            ):
                told = bytearray()
                async for part in response.aiter_raw():
                    told += part
                    if len(told) > MOST_BYTES:
                        raise Failure(f"an answer of more than {MOST_BYTES} bytes")
                return response.status_code, response.headers.get("retry-after", ""), bytes(told)

    with start_blocking_portal() as portal:
        return portal.call(ask)


def ssl_context() -> ssl.SSLContext:
    """With httpx's certificates, or those that SSL_CERT_FILE names. Once, for it takes tens of milliseconds."""
    import httpx

    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise UserError(f"reward remote: SSL_CERT_FILE holds no certificates ({described(error)})") from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def said(body: bytes) -> str:
    """The reason in the body of an error: our own JSON's, or the last line, where a traceback has it."""
    text = body.decode(errors="replace")
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        text = json.loads(text)["error"]
    return (str(text).strip().splitlines() or ["no reason given"])[-1][:200]

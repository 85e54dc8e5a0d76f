"""A client's connection: limits on its body, disconnection, and event streams."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fastslm_jax.serve.limits import ApiError

T = TypeVar("T")
DRAIN_SECONDS = 5.0


class Body:
    """The `receive` of a request, up to max_bytes.

    Raises:
        ApiError: 413, from a call.
    """

    def __init__(self, receive: Receive, max_bytes: int):
        self._receive, self._max_bytes = receive, max_bytes
        self._bytes, self._is_complete = 0, False

    async def __call__(self) -> Message:
        message = await self._next()
        if self._bytes > self._max_bytes:
            raise ApiError(
                413,
                f"the request has more than {self._max_bytes / 2**20:.3g} MiB, the limit of this "
                "server; send compressed audio (mp3, flac, ogg) or parts",
            )
        return message

    async def _next(self) -> Message:
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._is_complete = True
        return message

    async def drain(self) -> None:
        """Reads and drops the rest, within reason.

        A client that is still sending would not read the error, and see a broken connection.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._is_complete and self._bytes < 8 * self._max_bytes:
                    await self._next()


async def unless_disconnected(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """The result of `work`, cancelled if the client leaves. Call it after the body is read.

    Raises:
        ClientDisconnect: it has left.
    """

    async def departure() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(departure())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events; after the deadline (of the event loop's clock), `late` ends them.

    `ended(is_whole)` is called once, however the stream ends.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], deadline: float, late: str):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._deadline, self._late = events, deadline, late
        self.ended: Callable[[bool], None] = lambda _: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pump() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async with asyncio.timeout_at(self._deadline), aclosing(self._events) as events:
                    async for text in events:
                        await send(_chunk(text, more=True))
            except TimeoutError:
                await send(_chunk(self._late, more=True))
            await send(_chunk("", more=False))

        is_whole = False
        try:
            await unless_disconnected(receive, pump())
            is_whole = True
        except (ClientDisconnect, OSError):
            pass
        finally:
            self.ended(is_whole)


def _chunk(text: str, more: bool) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}

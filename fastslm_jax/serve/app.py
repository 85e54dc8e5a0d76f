"""Routes of the server, with their common key check, limits, errors and metrics."""

import asyncio
import contextlib
import hmac
import importlib.resources
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

import numpy as np
from absl import logging
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fastslm_jax import schema
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.serve import replies
from fastslm_jax.serve.asks import AudioFields, ChatFields, decode_upload, display_name
from fastslm_jax.serve.connection import Body, EventStream, unless_disconnected
from fastslm_jax.serve.limits import ApiError, Limits
from fastslm_jax.serve.metrics import Metrics
from fastslm_jax.serve.worker import Ask, Progress, Worker

Handler = Callable[..., Awaitable[Response]]
T = TypeVar("T")

MAX_CHAT_BYTES = 50 << 20  # JSON is parsed in memory, in several copies
DECODERS = 2  # threads
RETRY_SECONDS = 2
CLIENT_LEFT = 499  # nginx's status, for the log and the metrics
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Server:
    """A model behind OpenAI's interface.

    Args:
        model_name: what clients call the model.
        api_key: that requests to /v1 must carry; None: no key is required.
    """

    def __init__(self, worker: Worker, model_name: str, limits: Limits, api_key: str | None = None):
        self.worker, self.model_name, self.limits = worker, model_name, limits
        self._api_key = None if api_key is None else api_key.encode()
        self._created = int(time.time())
        self._metrics = Metrics(worker)
        self._active, self._queue_seconds = 0, 0.0
        # Few, because the allocator keeps memory for each thread.
        self._decoders = ThreadPoolExecutor(DECODERS, "decoder")
        self._page = (
            importlib.resources.files("fastslm_jax.serve")
            .joinpath("page.html")
            .read_text(encoding="utf-8")
        )

    def app(self) -> Starlette:
        most = self.limits.max_bytes

        def post(path: str, handler: Handler, max_bytes: int = most) -> Route:
            return Route(path, self._guarded(path, handler, max_bytes), methods=["POST"])

        return Starlette(
            routes=[
                Route("/", self._show_page),
                Route("/health", self._health),
                Route("/metrics", self._show_metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                post("/v1/audio/transcriptions", self._transcriptions),
                post("/v1/audio/translations", self._translations),
                post("/v1/chat/completions", self._chat, min(most, MAX_CHAT_BYTES)),
            ],
            exception_handlers={
                ApiError: lambda _, error: _error_response(error),
                HTTPException: lambda request, error: _error_response(_from_http(request, error)),
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None, None]:
        yield
        await asyncio.to_thread(self.worker.stop)

    # ------------------------------------------------------------------------------ small routes

    async def _show_page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"}
        return HTMLResponse(self._page, headers=headers)

    async def _health(self, _: Request) -> Response:
        is_alive = self.worker.is_alive()
        body = {
            "status": "ok" if is_alive else "the model's thread has ended",
            "model": self.model_name,
            "tasks": list(TASKS),
            "max_minutes": self.limits.max_minutes,
            "max_bytes": self.limits.max_bytes,
            "needs_key": self._api_key is not None,
        }
        return JSONResponse(body, 200 if is_alive else 503)

    async def _show_metrics(self, _: Request) -> Response:
        self._metrics.active.set(self._active)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._authorize(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "fastslm_jax",
        }

    # ------------------------------------------------------------------------------- big routes

    async def _transcriptions(self, request: Request, deadline: float) -> Response:
        return await self._audio(request, deadline, "asr")

    async def _translations(self, request: Request, deadline: float) -> Response:
        return await self._audio(request, deadline, "ast")

    async def _audio(self, request: Request, deadline: float, task: str) -> Response:
        async with request.form(max_files=1, max_fields=32) as form:
            upload = form.get("file")
            values = {key: form.getlist(key) for key in form if key != "file"}
            single = {key: found[-1] for key, found in values.items() if not key.endswith("[]")}
            several = {key[:-2]: found for key, found in values.items() if key.endswith("[]")}
            where = request.url.path
            fields = schema.check(AudioFields, {"task": task, **single, **several}, where, _bad)
            self._check_model(fields.model)
            if fields.stream and fields.response_format not in ("json", "text", "verbose_json"):
                raise ApiError(
                    400,
                    f"stream: not possible with response_format={fields.response_format}; use json "
                    "or verbose_json",
                    "stream",
                )
            if not isinstance(upload, UploadFile):
                raise ApiError(
                    400, f"{where}: 'file' is missing; send multipart/form-data with a file", "file"
                )
            name = display_name(upload.filename)
            samples = await self._decode(decode_upload, upload.file, name, self.limits)
        ask = fields.ask(samples)
        if fields.stream:
            return await self._event_stream(
                request, ask, deadline, replies.TranscriptEvents(fields)
            )
        return replies.transcription(fields, (await self._finished(request, ask)).result)

    async def _chat(self, request: Request, deadline: float) -> Response:
        body = await request.body()
        try:
            given = await self._decode(schema.parse_json, body)
        except ValueError as error:
            raise ApiError(400, f"{request.url.path}: {error}") from None
        fields = schema.check(ChatFields, given, request.url.path, _bad)
        self._check_model(fields.model)
        ask = await self._decode(fields.ask, self.limits)
        del body, given
        events = replies.ChatEvents(fields, self.model_name)
        if fields.stream:
            return await self._event_stream(request, ask, deadline, events)
        return events.whole(await self._finished(request, ask))

    async def _decode(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._decoders, function, *arguments
        )

    async def _finished(self, request: Request, ask: Ask) -> Progress:
        async with aclosing(self._results(ask)) as results:
            return await unless_disconnected(request.receive, _last(results))

    async def _event_stream(
        self,
        request: Request,
        ask: Ask,
        deadline: float,
        events: Callable[[Progress], Iterator[str]],
    ) -> EventStream:
        """A stream whose first event is ready: earlier errors have an HTTP status."""
        results = self._results(ask)
        first = await unless_disconnected(request.receive, _next(results))

        async def stream() -> AsyncGenerator[str, None]:
            async with aclosing(results):
                for text in events(first):
                    yield text
                try:
                    async for progress in results:
                        for text in events(progress):
                            yield text
                except ApiError as error:
                    yield replies.event(error.body())

        return EventStream(stream(), deadline, replies.event(self._timeout().body()))

    async def _results(self, ask: Ask) -> AsyncGenerator[Progress, None]:
        """The worker's, within the limit on all audio; counts what is answered."""
        limit = 60 * self.limits.max_queue_minutes
        if self._queue_seconds and self._queue_seconds + ask.seconds > limit:
            raise self._busy(f"{self._queue_seconds / 60:.0f} minutes of audio are waiting")
        seconds = ask.seconds
        self._queue_seconds += seconds
        try:
            async with aclosing(self.worker.results(ask)) as results:
                async for progress in results:
                    if progress.result.stop_reason is not None:
                        self._metrics.audio.inc(seconds)
                        self._metrics.tokens.inc(progress.result.new_tokens)
                    yield progress
        finally:
            self._queue_seconds = max(0.0, self._queue_seconds - seconds)

    # ------------------------------------------------------------------------ key, limits, errors

    def _guarded(self, path: str, handler: Handler, max_bytes: int) -> Handler:
        """A route with the key, the limits, one log line, and errors as JSON."""

        async def run(request: Request) -> Response:
            started = time.monotonic()
            deadline = asyncio.get_running_loop().time() + self.limits.max_seconds
            body = Body(request.receive, max_bytes)
            is_counted = False

            def end(status: int) -> None:
                self._active -= is_counted
                seconds = time.monotonic() - started
                self._metrics.requests.labels(path, status).inc()
                self._metrics.seconds.labels(path).observe(seconds)
                logging.info("%s %d %.2f s", path, status, seconds)

            try:
                self._authorize(request)
                if self._active >= self.limits.max_requests:
                    raise self._busy(f"{self._active} requests are waiting or running")
                self._active += 1
                is_counted = True
                async with asyncio.timeout_at(deadline):
                    response = await handler(Request(request.scope, body), deadline)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_LEFT)
            except TimeoutError:
                response = _error_response(self._timeout())
            except HTTPException as error:
                response = _error_response(_from_http(request, error))
            except ApiError as error:
                response = _error_response(error)
            except Exception as error:
                logging.exception("a request failed")
                name = type(error).__name__
                response = _error_response(ApiError(500, f"{name}; see the server's log"))
            except BaseException:
                end(CLIENT_LEFT)
                raise
            if isinstance(response, EventStream):
                response.ended = lambda is_whole: end(200 if is_whole else CLIENT_LEFT)
            else:
                if response.status_code >= 400:
                    await body.drain()
                end(response.status_code)
            return response

        return run

    def _authorize(self, request: Request) -> None:
        if self._api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), self._api_key)
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(
                401,
                "this server needs a key: send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"model {name[:80]!r} is not served here; use {self.model_name!r}",
                "model",
                "model_not_found",
            )

    def _busy(self, reason: str) -> ApiError:
        return ApiError(
            429,
            f"{reason}; try again in {RETRY_SECONDS} s",
            code="queue_full",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )

    def _timeout(self) -> ApiError:
        return ApiError(
            408,
            f"the request took longer than {self.limits.max_seconds:g} s; send less audio, or try "
            "again when the server is less busy",
            code="timeout",
        )

    # ----------------------------------------------------------------------------------- warm-up

    async def warm_up(self) -> None:
        """Compiles the programs of short and long recordings and texts before clients wait."""
        window = self.worker.model.generator.model.window.samples
        silence = [np.zeros(length, np.int16) for length in (window, window + SAMPLE_RATE)]
        asks = [Ask(samples, max_new_tokens=2) for samples in silence]
        for ask in (*asks, Ask(None, instruction="hello", max_new_tokens=2)):
            async for _ in self.worker.results(ask):
                pass


async def _next(results: AsyncGenerator[Progress, None]) -> Progress:
    return await anext(results)


async def _last(results: AsyncGenerator[Progress, None]) -> Progress:
    return [progress async for progress in results][-1]


def _bad(message: str) -> ApiError:
    return ApiError(400, message)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    """Errors that Starlette raises: no such path, another method, a form that is not one."""
    where = f"{request.method} {request.url.path[:80]}"
    hints = {404: "no such path", 405: "this path takes another method"}
    return ApiError(
        error.status_code,
        f"{where}: {hints.get(error.status_code, error.detail)}",
        headers=error.headers,
    )


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)

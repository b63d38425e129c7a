"""The OpenAI API over HTTP: chat and text completions, whole or streamed, models, health, metrics.

Every refusal has OpenAI's error shape. A client that goes away frees what it used; SIGTERM lets running answers finish.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import secrets
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator

import fastapi
import uvicorn
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dsv3_jax.errors import UserError
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.openai import CHAT, COMPLETIONS, Api, DeltaStream, Job, error_body
from dsv3_jax.serving.request import Completion
from dsv3_jax.serving.worker import EngineFailed, Worker

MAX_BODY = 8 * 2**20  # bytes
MAX_WAITING = 1024  # requests in the queue
log = logging.getLogger("dsv3_jax.serving")


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None):
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def make_app(api: Api, *, api_key: str | None = None) -> fastapi.FastAPI:
    """The application; its lifespan starts and ends the engine's thread."""
    metrics = Metrics(api.engine, api.name)
    worker = Worker(api.engine, metrics)
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(_):
        worker.start()
        yield
        await run_in_threadpool(worker.stop)

    app = fastapi.FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.worker = worker

    @app.exception_handler(Refusal)
    async def refused(_, refusal: Refusal):
        return _json(refusal.body, refusal.status)

    @app.exception_handler(HTTPException)
    async def no_such_page(request: HttpRequest, error: HTTPException):
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return _json(refusal.body, refusal.status)

    @app.exception_handler(Exception)
    async def failed(_, error: Exception):
        return _json(Refusal(500, "an error of the server's own", "server_error").body, 500)

    def authorise(request: HttpRequest) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise Refusal(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'", code="invalid_api_key")

    async def answer(request: HttpRequest, url: str) -> Response:
        authorise(request)
        if worker.failure is not None:
            raise Refusal(503, "the engine has failed", "server_error")
        if len(api.engine.scheduler.waiting) >= MAX_WAITING:
            raise Refusal(429, f"{MAX_WAITING} requests are waiting: try again later", "rate_limit_error", "rate_limit_exceeded")
        body = await _read_json(request)
        job_id = ("chatcmpl-" if url == CHAT else "cmpl-") + uuid.uuid4().hex
        try:
            job = await run_in_threadpool(api.parse, url, body, id=job_id, seed=secrets.randbits(32))
        except UserError as error:
            described = error_body(error)
            raise Refusal(404 if described["code"] == "model_not_found" else 400, **_as_refusal(described)) from error
        if job.stream:
            return StreamingResponse(_events(api, worker, job), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return _json(await _unless_gone(request, _whole_answer(api, worker, job)))

    @app.post(CHAT)
    async def chat_completions(request: HttpRequest):
        return await answer(request, CHAT)

    @app.post(COMPLETIONS)
    async def completions(request: HttpRequest):
        return await answer(request, COMPLETIONS)

    def model() -> dict:
        return {
            "id": api.name,
            "object": "model",
            "created": started,
            "owned_by": "dsv3_jax",
            "max_model_len": api.engine.scheduler.longest_request,
        }

    @app.get("/v1/models")
    async def models(request: HttpRequest):
        authorise(request)
        return _json({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: HttpRequest, name: str):
        authorise(request)
        if name != api.name:
            raise Refusal(404, f"the model {name!r} does not exist: this is {api.name!r}", code="model_not_found", param="model")
        return _json(model())

    @app.get("/health")
    async def health():
        if worker.failure is not None:
            raise Refusal(503, "the engine has failed", "server_error")
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def prometheus():
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _json(value: dict, status: int = 200) -> Response:
    # ASCII: whatever was in a request, half surrogate pairs included, can be written.
    return Response(json.dumps(value), status, media_type="application/json")


def _as_refusal(described: dict) -> dict:
    return {"message": described["message"], "kind": described["type"], "code": described["code"], "param": described["param"]}


async def _read_json(request: HttpRequest) -> object:
    """The body. One that is too large is read to its end, and forgotten, if it is not endless: only then a client hears why."""
    raw, size = bytearray(), 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size <= MAX_BODY:
                raw += piece
            elif size > 16 * MAX_BODY:
                break
    except ClientDisconnect as error:
        raise Refusal(499, "the client is gone") from error
    if size > MAX_BODY:
        raise Refusal(413, f"the body is larger than {MAX_BODY} bytes", code="request_too_large")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON ({error})") from error


async def _whole_answer(api: Api, worker: Worker, job: Job) -> dict:
    completions = {request: Completion(request) for request in job.requests}
    try:
        async with contextlib.aclosing(worker.outputs(job.requests)) as outputs:
            async for output in outputs:
                completions[output.request].extend(output)
    except EngineFailed as error:
        raise Refusal(503, "the engine has failed", "server_error") from error
    return api.response(job, list(completions.values()))


async def _unless_gone(request: HttpRequest, work) -> dict:
    """The result of `work`, which is cancelled when the client goes away."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refusal(499, "the client is gone")
    finally:
        for future in (task, watch):
            future.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refusal):
                await future


async def _events(api: Api, worker: Worker, job: Job) -> AsyncIterator[bytes]:
    """Server-sent events of a streamed answer."""
    index = {request: i for i, request in enumerate(job.requests)}
    completions = [Completion(request) for request in job.requests]
    deltas = [DeltaStream(job, i) for i in range(len(completions))]
    if job.is_chat:
        for i in range(len(completions)):
            yield _event(api.chunk(job, i, {"role": "assistant", "content": ""}, [], None))
    try:
        async with contextlib.aclosing(worker.outputs(job.requests)) as outputs:
            async for output in outputs:
                i = index[output.request]
                completions[i].extend(output)
                delta, reason = deltas[i].push(output)
                if delta.get("text", delta) or output.logprobs or reason:
                    yield _event(api.chunk(job, i, delta, output.logprobs, reason))
    except EngineFailed:
        yield _event(Refusal(503, "the engine has failed", "server_error").body)
        return
    if job.include_usage:
        yield _event(api.usage_chunk(job, completions))
    yield b"data: [DONE]\n\n"


def _event(value: dict) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can already connect to. Raises UserError where the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}): choose another --host or --port"
        ) from error


def serve_http(api: Api, where: socket.socket, *, api_key: str | None) -> None:
    """Serves until SIGTERM or SIGINT; answers that are running then are finished first."""
    host, port = where.getsockname()[:2]
    if not api_key and not ipaddress.ip_address(host).is_loopback:
        log.warning("WARNING: %s can be reached from other machines and there is no API key: anybody can use the model (--api-key)", host)
    server = uvicorn.Server(uvicorn.Config(make_app(api, api_key=api_key), log_level="warning", access_log=False))
    # uvicorn raises the signal that ended it once more when it is done: that is then no reason to die.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    log.info("serving %s on http://%s:%d/v1", api.name, host, port)
    server.run(sockets=[where])

"""A reward behind HTTP, for `burnish.rewards.remote.client`: POST /score, GET /health, GET /metrics.

    app = create_app(load_reward("pickscore", device="cuda"), token=os.environ["BURNISH_REWARD_TOKEN"])
    uvicorn.run(app, host="0.0.0.0", port=8000)

in one process (`workers=1`): what waits, and what is remembered for a retry, is in its memory.
"""

import asyncio
import hashlib
import json
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Annotated, Any

from annotated_types import Ge, Gt

from burnish.errors import UserError, described
from burnish.rewards.remote import wire
from burnish.rewards.remote.batches import Busy, Judge
from burnish.rewards.scores import Reward, Scores, name_of

RETRY_AFTER = 1  # seconds that a full server asks for


def create_app(
    reward: Reward,
    *,
    token: str | None,
    max_pictures: Annotated[int, Gt(0)] = 256,
    max_bytes: Annotated[int, Gt(0)] = 2**28,  # 64 pictures of 1024 x 1024 in 8 bits are 2e8
    batch_size: Annotated[int, Gt(0)] = 64,
    wait: Annotated[float, Ge(0)] = 0.02,
    max_waiting: Annotated[int, Gt(0)] = 4096,
    remembered: Annotated[int, Gt(0)] = 1024,
) -> Any:
    """The FastAPI application that judges by `reward`.

    `token`: what clients send as `Authorization: Bearer TOKEN`; None lets anyone in who reaches the port.
    `max_pictures`, `max_bytes`: of one request, the bytes as batch x 3 x height x width. `batch_size`, `wait`: see
    `Judge`. `max_waiting`: pictures in the queue; beyond, 503 with Retry-After. `remembered`: the last answers, found
    again by request id, so that a client whose answer was lost asks again without a second judgement. A server that
    dies forgets them; a `CachedReward` around the reward would not.
    Errors are {"error": one line}: 401 token, 413 too large, 422 form, 500 the reward failed, 503 busy.
    """
    from fastapi import FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.exceptions import HTTPException

    if token is not None and not token.strip():
        raise UserError("reward server: the token is empty; set BURNISH_REWARD_TOKEN, or give token=None to let all in")

    registry = CollectorRegistry()
    answered = Counter("burnish_reward_requests", "Requests by answer", ["status"], registry=registry)
    again = Counter("burnish_reward_requests_repeated", "Answered without a new judgement", registry=registry)
    pictures = Histogram(
        "burnish_reward_batch_pictures",
        "Pictures judged together",
        buckets=[2**n for n in range(11)],
        registry=registry,
    )
    seconds = Histogram("burnish_reward_batch_seconds", "Time to judge them", registry=registry)

    def told(count: int, took: float) -> None:
        pictures.observe(count)
        seconds.observe(took)

    judge = Judge(reward, batch_size=batch_size, wait=wait, most_waiting=max_waiting, told=told)
    Gauge("burnish_reward_waiting_pictures", "Pictures in the queue", registry=registry).set_function(
        lambda: judge.waiting
    )
    answers: OrderedDict[str, tuple[bytes, Future[Scores]]] = OrderedDict()  # of the event loop's thread alone

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        judge.start()
        try:
            yield
        finally:
            judge.stop()

    app = FastAPI(title="burnish reward", lifespan=running, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.middleware("http")
    async def counted(request: Request, call_next: Callable[..., Any]) -> Response:
        response = await call_next(request)
        answered.labels(response.status_code).inc()
        return response

    def admit(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not secrets.compare_digest(given.encode(), f"Bearer {token.strip()}".encode()):
            raise HTTPException(401, "wrong or missing token", {"WWW-Authenticate": "Bearer"})

    async def received(request: Request) -> bytes:
        # The pictures' own bytes are limited when they are read; float32 has four of them, prompts need some.
        most = 4 * max_bytes + 2**20
        body = bytearray()
        if int(request.headers.get("content-length", 0)) > most:  # uvicorn has checked that it is a number
            raise HTTPException(413, f"more than {most} bytes", {"Connection": "close"})
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise HTTPException(413, f"more than {most} bytes", {"Connection": "close"})
        return bytes(body)

    def opened(body: bytes, kind: str) -> tuple[wire.Request, bytes]:
        asked = wire.load_request(body, kind, most_pictures=max_pictures, most_bytes=max_bytes)
        return asked, hashlib.sha256(body).digest()

    def judged(asked: wire.Request, digest: bytes) -> "Future[Scores]":
        known, future = answers.get(asked.id, (digest, None))
        if known != digest:
            raise HTTPException(422, f"request id {asked.id} was used for another request")
        if future is None or (future.done() and future.exception()):
            future = judge.submit(asked)
            answers[asked.id] = digest, future
        else:
            again.inc()
        answers.move_to_end(asked.id)
        for old in [key for key, (_, there) in list(answers.items())[:-remembered] if there.done()]:
            del answers[old]
        return future

    @app.post("/score")
    async def score_them(request: Request) -> Response:
        admit(request)
        body, kind = await received(request), request.headers.get("content-type", "").partition(";")[0].strip()
        try:
            asked, digest = await run_in_threadpool(opened, body, kind)
            future = judged(asked, digest)
            # Shielded: a client that goes away must not take the answer from its own retry.
            scores = await asyncio.shield(asyncio.wrap_future(future))
        except wire.WireError as error:
            raise HTTPException(413 if isinstance(error, wire.TooLarge) else 422, str(error)) from error
        except Busy as error:
            raise HTTPException(503, str(error), {"Retry-After": str(RETRY_AFTER)}) from error
        except HTTPException:
            raise
        except Exception as error:
            raise HTTPException(500, str(error) if isinstance(error, UserError) else described(error)) from error
        return Response(wire.dump_answer(asked.id, scores, kind), media_type=kind)

    @app.get("/health")
    async def health() -> Response:
        told = {"reward": name_of(reward), "version": wire.VERSION, "waiting": judge.waiting}
        return Response(json.dumps(told), 200 if judge.alive else 503, media_type="application/json")

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        admit(request)
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return app

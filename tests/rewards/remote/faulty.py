"""A real reward server, uvicorn on 127.0.0.1, that fails by a script. For tests of the client and of whole trainings.

Each POST /score takes the next fault from the script; when it has run out all is well:

    ok        judged and answered
    kill      the server dies: no answer, every connection reset, nobody listens until `start()` (or `down` seconds)
    drop      the connection is reset before anything is judged
    lost      judged, and the connection is reset instead of an answer
    hang      nothing is judged and nothing is answered, until the client goes away
    slow      judged, and answered only after `late` seconds
    drip      judged, and the answer comes a byte at a time
    error     status 500, nothing is judged
    busy      status 503 with Retry-After: 1, nothing is judged
    token     status 401, nothing is judged
    garbage   judged; the answer is bytes of no meaning
    shape     judged; the answer has one number too few
    nan       judged; one number of the answer is nan
    stranger  judged; the answer is to another request
"""

import asyncio
import hashlib
import json
import threading
from collections import Counter

import msgpack
import uvicorn

from burnish.rewards.remote.server import create_app

JUDGED_BEHIND = ("lost", "slow", "drip", "garbage", "shape", "nan", "stranger")


class FaultyServer:
    """`asked`: requests by id. `judged`: how often each picture was, by prompt and pixels. `met`: the faults so far."""

    def __init__(self, reward, faults=(), *, token="secret", late=5.0, down=None, **settings):
        self.script, self.reward, self.token, self.late, self.down = list(faults), reward, token, late, down
        self.settings = {"wait": 0.0} | settings
        self.asked, self.judged, self.met = Counter(), Counter(), []
        self.port, self.thread = 0, None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self):
        return self.thread is not None and self.thread.is_alive() and not self.server.should_exit

    def start(self):
        """Start, or start again on the same port, with nothing remembered. Does nothing while it runs."""
        if self.running:
            return
        if self.thread:
            self.thread.join()
        self.app = create_app(self._count, token=self.token, **self.settings)
        how = {"log_config": None, "log_level": "critical", "ws": "none", "loop": "asyncio", "http": "h11"}
        config = uvicorn.Config(self, port=self.port, lifespan="on", **how)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        waiting = threading.Event()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            waiting.wait(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()

    def _count(self, images, prompts, metadata):
        for image, prompt in zip(images, prompts, strict=True):
            self.judged[prompt, hashlib.sha256(image.numpy().tobytes()).hexdigest()] += 1
        return self.reward(images, prompts, metadata)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/score":
            return await self.app(scope, receive, send)
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                break
        self.asked[msgpack.unpackb(body)["id"]] += 1
        fault = self.script.pop(0) if self.script else "ok"
        self.met.append(fault)
        if fault == "ok" or fault in JUDGED_BEHIND:
            status, headers, answer = await self._answer(scope, body)
            await self._spoil(fault, status, headers, answer, receive, send)
        elif fault == "hang":
            await _gone(receive)
        elif fault in ("kill", "drop"):
            self._reset()
            if fault == "kill":
                self._die()
        else:
            status = {"error": 500, "busy": 503, "token": 401}[fault]
            headers = [(b"retry-after", b"1")] if fault == "busy" else []
            await _send(send, status, headers, json.dumps({"error": f"{fault} by the script"}).encode())

    async def _answer(self, scope, body):
        """What the application says to a request."""
        told, there = [], asyncio.Event()

        async def receive():
            if not there.is_set():
                there.set()
                return {"type": "http.request", "body": body, "more_body": False}
            return await asyncio.Event().wait()

        async def send(message):
            told.append(message)

        await self.app(scope, receive, send)
        return told[0]["status"], told[0]["headers"], b"".join(message.get("body", b"") for message in told[1:])

    async def _spoil(self, fault, status, headers, answer, receive, send):
        if status == 200 and fault in ("shape", "nan", "stranger"):
            told = msgpack.unpackb(answer)
            if fault == "shape":
                told["total"].pop()
            elif fault == "nan":
                told["total"][-1] = float("nan")
            else:
                told["id"] = "somebody-else"
            answer = msgpack.packb(told)
        headers = [(name, value) for name, value in headers if name != b"content-length"]
        if fault == "lost":
            return self._reset()
        if fault == "slow":
            await asyncio.wait([asyncio.ensure_future(_gone(receive))], timeout=self.late)
        if fault == "drip":
            await send({"type": "http.response.start", "status": status, "headers": headers})
            for place in range(len(answer)):
                await send({"type": "http.response.body", "body": answer[place : place + 1], "more_body": True})
                await asyncio.sleep(0.05)
            return await send({"type": "http.response.body", "body": b""})
        await _send(send, status, headers, b"\x93\x01garbage" if fault == "garbage" else answer)

    def _reset(self):
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()

    def _die(self):
        for listener in self.server.servers:
            listener.close()
        self.server.should_exit = self.server.force_exit = True
        if self.down is not None:
            again = threading.Timer(self.down, self.start)
            again.daemon = True
            again.start()


async def _gone(receive):
    """Wait until the client is."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send, status, headers, body):
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

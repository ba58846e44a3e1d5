"""A reward that another machine judges, asked over HTTP so that no failure of network or server costs a picture."""

import logging
import os
import random
import socket
import ssl
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from burnish.errors import UserError, described
from burnish.rewards.entry import Entry
from burnish.rewards.remote import flow_grpo, wire
from burnish.rewards.remote.exchange import Failure, causes, post, said, ssl_context
from burnish.rewards.scores import Scores, joined, lines_of

LONGEST_PAUSE = 30.0  # seconds between two requests of a series, also when the server asks for more
REST = 15.0  # seconds that a server is left alone after a series of failures

logger = logging.getLogger("burnish")


def remote(
    *,
    url: str,
    token_variable: str = "BURNISH_REWARD_TOKEN",
    timeout: Annotated[float, Gt(0)] = 60.0,
    attempts: Annotated[int, Gt(0)] = 5,
    pause: Annotated[float, Ge(0)] = 0.5,
    patience: Annotated[float, Ge(0)] = 600.0,
    on_failure: Literal["retry", "skip", "stop"] = "retry",
    slice_size: Annotated[int, Gt(0)] = 64,  # batch_size in flow_grpo/rewards.py
    protocol: Literal["burnish", "flow_grpo"] = "burnish",
    compress: Literal["none", "uint8", "png"] | None = None,
    only_strict: bool = True,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> "RemoteReward":
    """The reward behind `url` (https://host:port, without /score), asked for `slice_size` pictures at once.

    A request is over in `timeout` seconds, whatever the server does. One that fails is repeated under the same id, up
    to `attempts` in all, after a random time between 0 and pause * 2^n seconds (n = 0, 1, ...; 30 at most). After so
    many failures in a row the server is left alone for 15 s (patience / 10 if that is less), and then asked once.
    `on_failure`, when such a series has failed:

        retry  rest and ask again until `patience` seconds are over, then stop
        skip   those pictures are `Scores.missing`
        stop   UserError

    `token_variable`: the environment variable with the server's token; "" where it wants none. The flow_grpo protocol
    knows no token and none is sent. `compress`: "none" sends float32; "uint8" 8 bits a channel, a quarter of that;
    "png" the same 8 bits, smaller and slower. Default: uint8; flow_grpo is always JPEG. `only_strict`: see `flow_grpo`.
    No gradient. Scale and parts are the server's, with parts `failures` (requests that failed) and `retries` (requests
    sent again), each the slice's number shared by its pictures: they sum to the number.
    Raises UserError, one line: no token, a wrong one, no certificate, nobody there, a request that is refused.
    """
    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname:
        raise UserError(f"reward remote: url={url!r} is no address; write http://host:port or https://host:port")
    token = None
    if protocol == "burnish" and token_variable:
        token = os.environ.get(token_variable, "").strip()
        if not token or not token.isascii() or not token.isprintable():
            problem = "holds what no header can" if token else "is not set"
            raise UserError(
                f'reward remote: {token_variable} {problem}; export the server\'s token, or token_variable=""'
            )
    if protocol == "flow_grpo" and compress is not None:
        raise UserError(
            f"reward remote: compress={compress} with protocol=flow_grpo, which is JPEG; leave compress out"
        )
    return RemoteReward(
        url=url.rstrip("/") + ("/score" if protocol == "burnish" else ""),
        token=token,
        timeout=timeout,
        attempts=attempts,
        pause=pause,
        patience=patience,
        on_failure=on_failure,
        slice_size=slice_size,
        protocol=protocol,
        encoding="float32" if compress == "none" else compress or "uint8",
        only_strict=only_strict,
        sleep=sleep,
        clock=clock,
    )


@dataclass(kw_only=True, eq=False)
class RemoteReward:
    """See `remote`. One object is for one thread at a time."""

    url: str
    token: str | None = field(repr=False)
    timeout: float
    attempts: int
    pause: float
    patience: float
    on_failure: Literal["retry", "skip", "stop"]
    slice_size: int
    protocol: Literal["burnish", "flow_grpo"]
    encoding: wire.Encoding
    only_strict: bool
    sleep: Callable[[float], None]
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.name = "remote"
        self.version = f"{self.protocol} {self.url} {self.encoding} {self.only_strict}"
        self._random = random.Random()  # pauses must differ between processes, and not move a run's own generators
        self._rest_until: float | None = None  # set while the last series failed
        self._accepted = False  # whether the server ever took a request of ours
        self._parts: tuple[str, ...] = ()  # of the last answer
        self._tls = ssl_context() if self.url.startswith("https") else False

    def __call__(
        self,
        images: Float[Tensor, "batch 3 height width"],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        metadata = lines_of(prompts, metadata)
        size = self.slice_size
        slices = [slice(start, start + size) for start in range(0, len(images), size)]
        told = [self._ask(images[here], list(prompts[here]), metadata[here]) for here in slices]
        names = dict.fromkeys(name for one in told for name in (*one.parts, *self._parts))
        # A slice that nobody judged has no parts but our own.
        whole = [
            Scores(one.total, {name: one.parts.get(name, one.total * torch.nan) for name in names}, one.missing)
            for one in told
        ]
        return joined(whole).each(lambda values: values.to(images.device))

    def _ask(self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """The scores of one slice."""
        count, identity, tally = len(images), uuid.uuid4().hex, Counter[str]()
        body = self._body(identity, images, prompts, metadata)
        begun, rest = self.clock(), min(REST, self.patience / 10)
        while True:
            try:
                scores = self._series(body, identity, count, tally)
                self._parts = tuple(scores.parts)
                break
            except Failure as failure:
                self._rest_until = self.clock() + rest
                if self.on_failure == "skip":
                    scores = Scores(torch.full((count,), torch.nan), missing=torch.ones(count, dtype=torch.bool))
                    break
                if self.on_failure == "stop" or self._rest_until - begun > self.patience:
                    raise UserError(
                        f"reward remote: no scores from {self.url} after {tally['requests']} requests "
                        f"({failure}); is the server running and within reach?"
                    ) from failure
        ours = {"failures": tally["failures"], "retries": tally["requests"] - 1}
        shares = {name: torch.full((count,), number / count) for name, number in ours.items()}
        return Scores(scores.total, {**scores.parts, **shares}, scores.missing)

    def _series(self, body: bytes, identity: str, count: int, tally: Counter[str]) -> Scores:
        """Up to `attempts` requests with pauses between; one after a rest. Raises the last one's Failure."""
        import tenacity

        attempts = self.attempts
        if self._rest_until is not None:
            self.sleep(max(0.0, self._rest_until - self.clock()))
            attempts = 1
        series = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(attempts),
            wait=self._pause,
            retry=tenacity.retry_if_exception_type(Failure),
            sleep=self.sleep,
            reraise=True,
        )
        return series(self._request, body, identity, count, tally)

    def _pause(self, state: Any) -> float:
        """Full jitter, or what the server asks for if that is more.

        https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        most = min(LONGEST_PAUSE, self.pause * 2 ** (state.attempt_number - 1))
        asked = getattr(state.outcome.exception(), "pause", 0.0)
        return max(self._random.uniform(0, most), min(asked, LONGEST_PAUSE))

    def _request(self, body: bytes, identity: str, count: int, tally: Counter[str]) -> Scores:
        """One request. Failures are counted and logged, one line each."""
        tally["requests"] += 1
        try:
            scores = self._scores(*self._post(body), identity, count)
        except Failure as failure:
            tally["failures"] += 1
            which = f"request {identity} of {count} pictures to {self.url}"
            logger.warning("reward remote: %s failed, failure %d: %s", which, tally["failures"], failure)
            raise
        self._rest_until = None
        return scores

    def _body(self, identity: str, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]]) -> bytes:
        if not images.isfinite().all():
            raise UserError("reward remote: pictures with pixels that are not finite: the policy has diverged")
        try:
            if self.protocol == "flow_grpo":
                return flow_grpo.dump_request(images, prompts, metadata, only_strict=self.only_strict)
            request = wire.Request(identity, images.detach().float(), prompts, wire.plain(metadata))
            return wire.dump_request(request, self.encoding)
        except wire.WireError as error:
            raise UserError(f"reward remote: {error}") from error

    def _post(self, body: bytes) -> tuple[int, str, bytes]:
        """Status, Retry-After and body of the answer; Failure when there is none within `timeout`."""
        import httpx

        headers = {"Accept-Encoding": "identity"}  # of our answers; an unpacked one could be of any size
        if self.protocol == "burnish":
            headers["Content-Type"] = wire.MSGPACK
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            return post(self.url, body, headers, self.timeout, self._tls)
        except TimeoutError as error:
            raise Failure(f"no answer within {self.timeout:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            where = urlsplit(self.url).netloc
            if bad := next((one for one in causes(error) if isinstance(one, ssl.SSLError)), None):
                raise UserError(
                    f"reward remote: no TLS with {where} ({described(bad)}); if the certificate is your own, "
                    "name its file in SSL_CERT_FILE"
                ) from error
            unknown = any(isinstance(one, socket.gaierror) for one in causes(error))
            if isinstance(error, httpx.InvalidURL) or (unknown and not self._accepted):
                raise UserError(f"reward remote: no host {where} ({described(error)}); check url") from error
            raise Failure(described(error)) from error

    def _scores(self, status: int, retry_after: str, body: bytes, identity: str, count: int) -> Scores:
        """What an answer says, checked."""
        if status != 200:
            self._refused(status, retry_after, said(body))
        self._accepted = True
        try:
            if self.protocol == "flow_grpo":
                return flow_grpo.load_answer(body, count, only_strict=self.only_strict)
            return wire.load_answer(body, identity, count)
        except wire.WireError as error:
            raise Failure(str(error)) from error

    def _refused(self, status: int, retry_after: str, reason: str) -> None:
        """Failure where another try may help: the server's own errors, and a token that it took before."""
        if status >= 500 or status in (408, 425, 429) or (status == 401 and self._accepted):
            raise Failure(f"status {status}, {reason}", float(retry_after) if retry_after.isdecimal() else 0.0)
        how = {
            401: "check the token",
            403: "check the token",
            404: "check url",
            405: "check url and protocol",
            413: "lower slice_size, or compress=uint8",
        }.get(status, "check url" if status < 400 else "see the server's log")
        raise UserError(f"reward remote: {self.url} refused with {status}, {reason}; {how}")


REMOTE = Entry(
    make=remote,
    title="Remote reward",
    measures="what the server behind the address judges",
    scale="the server's",
    differentiable=False,
    prompt="the prompt and all metadata, sent to the server",
    licence="the server's",
    size="nothing is downloaded",
    source="https://github.com/yifan123/reward-server",
    packages=("httpx", "tenacity", "msgpack"),
    extra="remote",
)

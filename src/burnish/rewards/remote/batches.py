"""Requests of several clients judged together, by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from burnish.rewards.remote.wire import Request
from burnish.rewards.scores import Reward, Scores, joined, score

Waiting = tuple[Request, "Future[Scores]"]


class Busy(Exception):
    """No room for another request."""


class Judge:
    """One thread that judges what waits, up to `batch_size` pictures of one size together, in order of arrival.

    `wait`: seconds that the first of a batch waits for others; 0: each request is judged by itself, as a reward needs
    that compares the pictures of a batch. When a batch fails each request is judged again by itself, so that nobody
    suffers from another's pictures.
    """

    def __init__(
        self, reward: Reward, *, batch_size: int, wait: float, most_waiting: int, told: Callable[[int, float], None]
    ) -> None:
        self.reward, self.batch_size, self.wait, self.most_waiting = reward, batch_size, wait, most_waiting
        self._told, self._queue, self._open = told, deque[Waiting](), False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)

    def start(self) -> None:
        self._open = True
        self._thread.start()

    def stop(self) -> None:
        """Finish what is being judged for a few seconds at most, and turn away what waits."""
        with self._change:
            self._open = False
            left, self._queue = self._queue, deque()
            self._change.notify_all()
        for _, future in left:
            future.set_exception(Busy("this server is stopping"))
        self._thread.join(5)

    @property
    def alive(self) -> bool:
        return self._open and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Pictures in the queue."""
        return sum(len(request.prompts) for request, _ in list(self._queue))

    def submit(self, request: Request) -> "Future[Scores]":
        with self._change:
            if not self._open:
                raise Busy("this server is stopping")
            if self._queue and self.waiting + len(request.prompts) > self.most_waiting:
                raise Busy(f"{self.waiting} pictures wait already; this server takes {self.most_waiting}")
            future: Future[Scores] = Future()
            self._queue.append((request, future))
            self._change.notify_all()
        return future

    def _run(self) -> None:
        while together := self._next():
            self._judge(together)

    def _next(self) -> list[Waiting]:
        """What to judge next; nothing when the server stops."""
        with self._change:
            while self._open and not self._queue:
                self._change.wait()
            until = time.monotonic() + self.wait
            while self._open and self.waiting < self.batch_size and (left := until - time.monotonic()) > 0:
                self._change.wait(left)
            if not self._open:
                return []
            together = [self._queue.popleft()]
            size, count = together[0][0].images.shape[2:], len(together[0][0].prompts)
            while self.wait and self._queue:
                request, _ = self._queue[0]
                count += len(request.prompts)
                if count > self.batch_size or request.images.shape[2:] != size:
                    break
                together.append(self._queue.popleft())
            return together

    def _judge(self, together: Sequence[Waiting]) -> None:
        begun = time.monotonic()
        try:
            scores = self._scores([request for request, _ in together])
        except Exception as error:
            if len(together) == 1:
                together[0][1].set_exception(error)
                return
            for one in together:
                self._judge([one])
            return
        self._told(len(scores.total), time.monotonic() - begun)
        start = 0
        for request, future in together:
            here = slice(start, start := start + len(request.prompts))
            future.set_result(_part(scores, here))

    @torch.no_grad()
    def _scores(self, requests: Sequence[Request]) -> Scores:
        images = torch.cat([one.images for one in requests])
        prompts = [prompt for one in requests for prompt in one.prompts]
        metadata = [each for one in requests for each in one.metadata]
        slices = [slice(start, start + self.batch_size) for start in range(0, len(images), self.batch_size)]
        return joined([score(self.reward, images[here], prompts[here], metadata[here]) for here in slices])


def _part(scores: Scores, here: slice) -> Scores:
    def cut(values: Tensor) -> Tensor:
        return values[here]

    return scores.each(cut)

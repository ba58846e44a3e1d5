import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from burnish.errors import UserError
from burnish.rewards import Scores, load_callable, score
from burnish.rewards.remote import wire
from burnish.rewards.remote.batches import Busy, Judge
from burnish.rewards.remote.client import remote
from burnish.rewards.remote.server import create_app

FaultyServer = load_callable(f"{Path(__file__).with_name('faulty.py')}:FaultyServer")

TOKEN = {"Authorization": "Bearer secret", "Content-Type": wire.MSGPACK}


class Brightness:
    """Knows what it was called with. Can be held until `go`."""

    def __init__(self, held=False):
        self.calls, self.begun, self.go = [], threading.Semaphore(0), threading.Event()
        if not held:
            self.go.set()

    def __call__(self, images, prompts, metadata):
        self.calls.append(list(prompts))
        self.begun.release()
        assert self.go.wait(60)
        assert not torch.is_grad_enabled()
        if "bad" in prompts:
            raise ValueError("a bad\nprompt")
        return Scores(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})


def brightness(prompts):
    """Of the pictures of these prompts: each has its own."""
    return torch.tensor([ord(prompt[0]) for prompt in prompts]) / 255


def request(prompts, identity="request-1", side=2):
    images = brightness(prompts).view(-1, 1, 1, 1).expand(-1, 3, side, side)
    return wire.Request(identity, images, list(prompts), [{"prompt": prompt} for prompt in prompts])


def body(prompts, identity="request-1"):
    return wire.dump_request(request(prompts, identity))


@pytest.fixture
def reward():
    return Brightness()


@pytest.fixture
def ask(reward):
    with TestClient(create_app(reward, token="secret", max_pictures=4, max_bytes=1000, wait=0.0)) as client:
        yield client


def test_a_good_request_is_judged(ask, reward):
    answer = ask.post("/score", content=body("ab"), headers=TOKEN)
    assert answer.status_code == 200
    scores = wire.load_answer(answer.content, "request-1", 2)
    torch.testing.assert_close(scores.total, brightness("ab"))
    torch.testing.assert_close(scores.parts["red"], scores.total)
    assert reward.calls == [["a", "b"]]


def test_npz_is_answered_in_npz(ask):
    file, head = io.BytesIO(), {"version": 1, "id": "request-1", "prompts": ["a"], "metadata": [{}]}
    pixels = np.full((1, 3, 2, 2), 51, np.uint8)
    np.savez(file, head=np.frombuffer(json.dumps(head).encode(), np.uint8), images=pixels)
    answer = ask.post("/score", content=file.getvalue(), headers=TOKEN | {"Content-Type": wire.NPZ})
    assert answer.headers["content-type"] == wire.NPZ
    assert np.load(io.BytesIO(answer.content))["total"] == pytest.approx([0.2])


@pytest.mark.parametrize("token", [None, "", "Bearer", "Bearer wrong", "Bearer secret2", "secret", "Bearer sécret"])
def test_without_the_token_nobody_is_judged(ask, reward, token):
    headers = {"Content-Type": wire.MSGPACK} | ({} if token is None else {"Authorization": token.encode()})
    for answer in (ask.post("/score", content=body("a"), headers=headers), ask.get("/metrics", headers=headers)):
        assert answer.status_code == 401
        assert answer.json() == {"error": "wrong or missing token"}
    assert ask.get("/health").status_code == 200
    assert reward.calls == []


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (body("abcde"), wire.MSGPACK, 413, "5 pictures; this server takes 4 at once"),
        (b"x" * (2**20 + 4001), wire.MSGPACK, 413, "more than 1052576 bytes"),
        (b"garbage", wire.MSGPACK, 422, "not msgpack (ExtraData"),
        (body("a"), "application/json", 422, "content type application/json: send application/msgpack"),
        (body("a"), "", 422, "content type none"),
        (b"", wire.MSGPACK, 422, "not msgpack"),
    ],
)
def test_what_is_too_large_or_broken_is_refused_in_one_line(ask, reward, content, kind, status, said):
    answer = ask.post("/score", content=content, headers=TOKEN | {"Content-Type": kind})
    assert answer.status_code == status
    assert said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert reward.calls == []


def test_a_body_without_a_length_is_counted(ask):
    answer = ask.post("/score", content=iter([b"x" * 2**19] * 3), headers=TOKEN)
    assert answer.status_code == 413


def test_other_paths_and_methods_are_errors_in_json(ask):
    assert ask.get("/nowhere").json() == {"error": "Not Found"}
    assert ask.get("/score").status_code == 405
    assert ask.get("/docs").status_code == 404


def test_a_reward_that_raises_is_a_500_and_is_judged_again(ask, reward):
    for _ in range(2):
        answer = ask.post("/score", content=body(["bad"]), headers=TOKEN)
        assert answer.status_code == 500
        assert answer.json() == {"error": "reward Brightness: raised ValueError: a bad prompt; --traceback shows where"}
    assert len(reward.calls) == 2  # what failed was no judgement


def test_a_request_id_is_judged_once(ask, reward):
    answers = [ask.post("/score", content=body("ab"), headers=TOKEN).content for _ in range(3)]
    assert len(set(answers)) == 1
    assert reward.calls == [["a", "b"]]
    other = ask.post("/score", content=body("cd"), headers=TOKEN)
    assert other.status_code == 422
    assert other.json() == {"error": "request id request-1 was used for another request"}


def test_a_retry_waits_for_the_judgement_that_is_under_way():
    reward = Brightness(held=True)
    with TestClient(create_app(reward, token=None)) as ask, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask.post, "/score", content=body("a"), headers=TOKEN)
        assert reward.begun.acquire(timeout=60)
        again = pool.submit(ask.post, "/score", content=body("a"), headers=TOKEN)
        while "repeated_total 1.0" not in ask.get("/metrics").text:
            pass
        reward.go.set()
        assert first.result(60).content == again.result(60).content
    assert reward.calls == [["a"]]


def test_only_the_last_answers_are_remembered(reward):
    with TestClient(create_app(reward, token="secret", remembered=2)) as ask:
        for number in (1, 2, 3, 3, 2, 1):
            ask.post("/score", content=body("a", f"request-{number}"), headers=TOKEN)
    assert len(reward.calls) == 4  # the first was forgotten for the third


def test_a_full_server_says_when_to_come_back():
    reward = Brightness(held=True)
    with TestClient(create_app(reward, token=None, max_waiting=2, wait=0.0)) as ask, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask.post, "/score", content=body("a", "request-1"), headers=TOKEN)
        assert reward.begun.acquire(timeout=60)
        second = pool.submit(ask.post, "/score", content=body("b", "request-2"), headers=TOKEN)
        while ask.get("/health").json()["waiting"] < 1:
            pass
        third = ask.post("/score", content=body("cd", "request-3"), headers=TOKEN)
        assert third.status_code == 503
        assert third.headers["retry-after"] == "1"
        assert third.json() == {"error": "1 pictures wait already; this server takes 2"}
        reward.go.set()
        assert first.result(60).status_code == second.result(60).status_code == 200
        assert ask.post("/score", content=body("cd", "request-3"), headers=TOKEN).status_code == 200


def test_health_and_metrics(ask):
    told = ask.get("/health").json()
    assert told == {"reward": "Brightness", "version": 1, "waiting": 0}
    ask.post("/score", content=body("ab"), headers=TOKEN)
    ask.post("/score", content=b"", headers=TOKEN)
    lines = ask.get("/metrics", headers=TOKEN).text.splitlines()
    for line in (
        'burnish_reward_requests_total{status="200"} 2.0',  # health's, too
        'burnish_reward_requests_total{status="422"} 1.0',
        "burnish_reward_batch_pictures_sum 2.0",
        "burnish_reward_batch_seconds_count 1.0",
        "burnish_reward_waiting_pictures 0.0",
    ):
        assert line in lines


def test_a_stopped_server_is_not_well(reward):
    app = create_app(reward, token=None)
    assert TestClient(app).get("/health").status_code == 503  # not started
    answer = TestClient(app).post("/score", content=body("a"), headers=TOKEN)
    assert (answer.status_code, answer.json()) == (503, {"error": "this server is stopping"})


def test_an_empty_token_is_no_open_door(reward):
    with pytest.raises(UserError, match="the token is empty"):
        create_app(reward, token=" ")


# ---------------------------------------------------------------------------------------------------- batches


def judged(reward, *requests, **settings):
    """The scores of requests that arrive while a first one is being judged."""
    told = []
    judge = Judge(
        reward, **({"batch_size": 4, "wait": 0.01, "most_waiting": 99} | settings), told=lambda *one: told.append(one)
    )
    judge.start()
    first = judge.submit(request(["first"]))
    assert reward.begun.acquire(timeout=60)
    futures = [judge.submit(one) for one in requests]
    reward.go.set()
    try:
        first.result(60)
        return [future.exception(60) or future.result() for future in futures], [count for count, _ in told]
    finally:
        judge.stop()
        assert not judge.alive


def test_what_waits_is_judged_together_up_to_the_batch_size():
    reward = Brightness(held=True)
    scores, counts = judged(reward, request("ab"), request("cd"), request("e"), request("fghijk"), request("l"))
    assert reward.calls == [["first"], ["a", "b", "c", "d"], ["e"], ["f", "g", "h", "i"], ["j", "k"], ["l"]]
    assert counts == [1, 4, 1, 6, 1]
    for one, prompts in zip(scores, ("ab", "cd", "e", "fghijk", "l"), strict=True):
        torch.testing.assert_close(one.total, brightness(prompts))  # each gets its own back, in order
        torch.testing.assert_close(one.parts["red"], one.total)


def test_sizes_are_not_mixed():
    reward = Brightness(held=True)
    judged(reward, request("a"), request("b", side=3), request("c", side=3), request("d"))
    assert reward.calls == [["first"], ["a"], ["b", "c"], ["d"]]


def test_without_waiting_each_request_is_alone():
    reward = Brightness(held=True)
    judged(reward, request("a"), request("b"), wait=0.0)
    assert reward.calls == [["first"], ["a"], ["b"]]


def test_one_clients_bad_picture_is_not_anothers():
    scores, _ = judged(Brightness(held=True), request("a"), request(["bad"]), request("c"))
    torch.testing.assert_close(torch.cat([scores[0].total, scores[2].total]), brightness("ac"))
    assert isinstance(scores[1], UserError)


def test_missing_scores_stay_missing():
    reward = Brightness(held=True)

    def half(images, prompts, metadata):
        told = reward(images, prompts, metadata)
        return Scores(told.total, missing=torch.tensor([prompt == "b" for prompt in prompts]))

    half.begun, half.go = reward.begun, reward.go
    scores, _ = judged(half, request("ab"), request("cd"))
    assert scores[0].missing.tolist() == [False, True]
    assert scores[1].missing.tolist() == [False, False]


def test_who_waits_when_the_server_stops_is_told():
    reward = Brightness(held=True)
    judge = Judge(reward, batch_size=1, wait=0.0, most_waiting=9, told=lambda *_: None)
    judge.start()
    first = judge.submit(request("a"))
    assert reward.begun.acquire(timeout=60)
    second = judge.submit(request("b"))
    assert judge.waiting == 1
    stopping = threading.Thread(target=judge.stop)
    stopping.start()
    assert isinstance(second.exception(60), Busy)
    reward.go.set()
    torch.testing.assert_close(first.result(60).total, brightness("a"))
    stopping.join()


def test_many_clients_of_a_real_server_each_get_their_own(monkeypatch):
    monkeypatch.setenv("BURNISH_REWARD_TOKEN", "secret")
    calls = []

    def counted(images, prompts, metadata):
        calls.append(len(images))
        return images.mean((1, 2, 3))

    def run(number):
        reward, images = remote(url=server.url, slice_size=2), torch.full((5, 3, 2, 2), number / 255)
        return [score(reward, images, ["p"] * 5).total for _ in range(3)]

    with FaultyServer(counted, wait=0.05, batch_size=8) as server, ThreadPoolExecutor(4) as pool:
        for number, told in enumerate(pool.map(run, range(4))):
            for total in told:
                torch.testing.assert_close(total, torch.full((5,), number / 255))
    assert sum(calls) == 4 * 3 * 5
    assert max(calls) > 2  # of several clients
    assert len(server.asked) == sum(server.asked.values()) == 4 * 3 * 3


def test_answers_are_msgpack(ask):
    told = msgpack.unpackb(ask.post("/score", content=body("a"), headers=TOKEN).content)
    bright = pytest.approx(brightness("a").tolist())
    assert told == {"version": 1, "id": "request-1", "total": bright, "parts": {"red": bright}, "missing": None}

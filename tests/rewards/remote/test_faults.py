"""The client against a real server that dies, hangs and lies: every picture is judged once, and all of it is said."""

import logging
import random
import socket
import ssl
from pathlib import Path

import pytest
import torch

from burnish.errors import UserError
from burnish.rewards import load_callable, score
from burnish.rewards.remote.client import LONGEST_PAUSE, remote

FaultyServer = load_callable(f"{Path(__file__).with_name('faulty.py')}:FaultyServer")

FAULTS = (
    *("kill", "drop", "lost", "hang", "slow", "drip", "error"),
    *("busy", "token", "garbage", "shape", "nan", "stranger"),
)
QUICK, PATIENCE = 0.4, 300.0  # only the first is waited for, by requests that are never answered


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


class Time:
    """A clock that only pauses move. While the client pauses a dead server is started again."""

    def __init__(self, server=None):
        self.now, self.pauses, self.server = 0.0, [], server

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.pauses.append(seconds)
        if self.server:
            self.server.start()


def asking(server, time, **settings):
    settings = {"timeout": 30.0, "attempts": 3, "patience": PATIENCE, "slice_size": 2} | settings
    return remote(url=server.url, sleep=time.sleep, clock=time.clock, **settings)


def pictures(count):
    return (torch.rand(count, 3, 4, 4) * 255).round() / 255


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """All modules imported, so that the first answer is as quick as the others."""
    with FaultyServer(brightness, token=None) as server:
        remote(url=server.url, token_variable="")(pictures(1), ["a"], [{}])


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv("BURNISH_REWARD_TOKEN", "secret")


def failures_in(log):
    lines = [one.getMessage() for one in log.records if one.name == "burnish" and one.levelno == logging.WARNING]
    assert not any("\n" in line for line in lines)
    return lines


def test_a_training_run_of_faults_costs_no_picture_and_judges_none_twice(caplog):
    # All in a row, so that series of 3 attempts are used up and the server is left alone between single tries; then one
    # at a time. "kill" comes before anything of its picture is judged: a dead server's answers are forgotten.
    script = [
        "ok",
        *FAULTS,
        *(fault for each in FAULTS for fault in ("ok", "ok", each)),
        "ok",
        "error",
        "error",
        "kill",
    ]
    rounds, faults = 30, [fault for fault in script if fault != "ok"]
    with FaultyServer(brightness, script) as server:
        time, failures, retries, size = Time(server), 0.0, 0.0, 2
        reward = asking(server, time, timeout=QUICK)
        for number in range(rounds):
            images, begun, asked = pictures(3), len(time.pauses), sum(server.asked.values())
            scores = score(reward, images, [f"{number} {place}" for place in range(3)])
            torch.testing.assert_close(scores.total, images.mean((1, 2, 3)))
            assert scores.missing is None
            failures += scores.parts["failures"].sum().item()
            retries += scores.parts["retries"].sum().item()
            # No call is longer than its requests' timeouts and its pauses, which are bounded.
            requests, pauses = sum(server.asked.values()) - asked, time.pauses[begun:]
            assert requests <= len(pauses) + size
            assert max(pauses, default=0) <= LONGEST_PAUSE
            assert sum(pauses) <= size * PATIENCE
    assert not server.script  # every fault was met
    assert set(server.judged.values()) == {1}
    assert len(server.judged) == 3 * rounds
    assert len(server.asked) == 2 * rounds  # slices of 2 and 1: a retry keeps its request id
    again = sum(server.asked.values()) - 2 * rounds
    assert again >= len(faults)  # on a busy machine an answer may be late that was not meant to be
    assert failures == pytest.approx(again)
    assert retries == pytest.approx(again)
    lines = failures_in(caplog)
    assert len(lines) == again
    assert all(f"to {server.url}/score failed" in line for line in lines)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("kill", "Error"),
        ("hang", r"no answer within 0\.4 s"),
        ("drip", r"no answer within 0\.4 s"),
        ("error", "status 500, error by the script"),
        ("busy", "status 503, busy by the script"),
        ("garbage", "not msgpack"),
        ("shape", "1 of total for 2 pictures"),
        ("nan", "total is not finite"),
        ("stranger", "to request 'somebody-else'; asked"),
    ],
)
def test_stop_names_the_last_failure(fault, said, caplog):
    with FaultyServer(brightness, [fault] * 3) as server:
        time = Time()
        reward = asking(server, time, on_failure="stop", timeout=QUICK if "no answer" in said else 30.0)
        with pytest.raises(UserError, match=said) as raised:
            reward(pictures(2), ["a", "b"], [{}, {}])
    assert "\n" not in str(raised.value)
    assert f"no scores from {server.url}/score after 3 requests" in str(raised.value)
    assert len(failures_in(caplog)) == 3
    # Full jitter: between 0 and pause * 2^n; a busy server's Retry-After of 1 s is waited for.
    assert len(time.pauses) == 2
    for n, pause in enumerate(time.pauses):
        least, most = (1.0, 1.0) if fault == "busy" else (0.0, 0.5 * 2**n)
        assert least <= pause <= most


def test_skip_marks_the_slice_as_missing_and_the_rest_is_judged(caplog):
    with FaultyServer(brightness, ["ok", "error", "error", "error", "error", "ok"]) as server:
        time, images = Time(), pictures(8)
        reward = asking(server, time, on_failure="skip")
        scores = score(reward, images, ["p"] * 8)
    # The second slice fails with its 3 requests; the third is asked once after a rest, and fails too.
    assert scores.missing.tolist() == [False, False, True, True, True, True, False, False]
    torch.testing.assert_close(scores.total[~scores.missing], images.mean((1, 2, 3))[~scores.missing])
    assert scores.parts["failures"].tolist() == [0, 0, 1.5, 1.5, 0.5, 0.5, 0, 0]
    assert scores.parts["retries"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert time.pauses[2:] == pytest.approx([15.0, 15.0])
    assert len(failures_in(caplog)) == 4
    assert set(server.judged.values()) == {1}


def test_skip_keeps_the_names_of_parts():
    from burnish.rewards import Scores

    def twofold(images, prompts, metadata):
        return Scores(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})

    with FaultyServer(twofold, ["ok", "ok", "error"]) as server:
        reward = asking(server, Time(), on_failure="skip", attempts=1)
        assert set(score(reward, pictures(2), ["p"] * 2).parts) == {"red", "failures", "retries"}
        told = score(reward, pictures(4), ["p"] * 4)
        assert told.parts["red"].isnan().tolist() == told.missing.tolist() == [False, False, True, True]
        server.script = ["error"]  # nobody is judged, and processes that share their scores still agree on names
        assert set(score(reward, pictures(2), ["p"] * 2).parts) == {"red", "failures", "retries"}


def test_patience_ends():
    with FaultyServer(brightness) as server:
        time = Time()
        reward = asking(server, time, attempts=2, pause=1.0, patience=40.0)
        reward(pictures(1), ["before"], [{}])
        server.script = ["error"] * 99
        with pytest.raises(UserError, match=r"no scores from .* after 11 requests"):
            reward(pictures(1), ["a"], [{}])
    # A pause of at most 1 s, then a rest of 40 / 10 s as often as fits: 9 times.
    assert time.pauses[1:] == pytest.approx([4.0] * 9)
    assert len(server.asked) == 2
    assert sum(server.asked.values()) == 1 + 2 + 9


def test_after_a_rest_one_request_tries_and_a_success_forgives(monkeypatch):
    # A run that met a failure goes on as one that did not: pauses are not drawn from its generator.
    monkeypatch.setattr(random, "uniform", lambda *_: pytest.fail("drew from the run's generator"))
    with FaultyServer(brightness, ["error"] * 3 + ["ok", "error"]) as server:
        time = Time()
        reward = asking(server, time, on_failure="retry", attempts=3)
        reward(pictures(2), ["a", "b"], [{}, {}])
        assert time.pauses[2:] == pytest.approx([15.0])
        reward(pictures(2), ["a", "b"], [{}, {}])  # fails once, and is asked again as a matter of course
        assert len(time.pauses) == 4
        assert time.pauses[3] <= 0.5


def test_a_wrong_token_stops_at_once_and_a_gateway_that_forgets_it_does_not(monkeypatch):
    with FaultyServer(brightness, ["ok", "ok", "token", "ok"]) as server:
        monkeypatch.setenv("BURNISH_REWARD_TOKEN", "another")
        with pytest.raises(UserError, match=r"refused with 401, wrong or missing token; check the token"):
            asking(server, Time())(pictures(1), ["a"], [{}])
        assert sum(server.asked.values()) == 1
        monkeypatch.setenv("BURNISH_REWARD_TOKEN", "secret")
        reward = asking(server, Time())
        reward(pictures(1), ["a"], [{}])
        assert reward(pictures(1), ["a"], [{}]).parts["failures"].tolist() == [1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_pictures": 1}, "refused with 413, 2 pictures; this server takes 1 at once; lower slice_size"),
        ({"max_bytes": 95}, "refused with 413, pictures of 96 bytes; this server takes 95 at once; lower slice_size"),
    ],
)
def test_what_is_refused_is_not_asked_again(settings, said):
    with FaultyServer(brightness, **settings) as server, pytest.raises(UserError, match=said):
        asking(server, Time())(pictures(2), ["a", "b"], [{}, {}])
    assert sum(server.asked.values()) == 1


def test_a_body_beyond_all_limits_is_refused_unread():
    with FaultyServer(brightness, max_bytes=1000) as server:
        reward = remote(url=server.url, timeout=5.0, on_failure="stop", attempts=1, compress="none")
        with pytest.raises(UserError, match="413, more than 1052576 bytes"):
            reward(torch.rand(8, 3, 256, 256), ["a"] * 8, [{}] * 8)


def test_a_reward_that_raises_is_named():
    def broken(images, prompts, metadata):
        raise KeyError("weights")

    with FaultyServer(broken) as server, pytest.raises(UserError, match=r"500, reward _count: raised KeyError"):
        asking(server, Time(), on_failure="stop", attempts=1)(pictures(1), ["a"], [{}])


def test_nobody_there(monkeypatch):
    server = FaultyServer(brightness)
    server.start()
    server.stop()
    with pytest.raises(UserError, match=r"after 3 requests \(ConnectError.*is the server running"):
        asking(server, Time(), on_failure="stop")(pictures(1), ["a"], [{}])


def test_no_such_host():
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    reward = remote(url="http://no-such-host.invalid:8000", timeout=5.0, patience=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", unknown)
        with pytest.raises(UserError, match=r"no host no-such-host\.invalid:8000 .*check url"):
            reward(pictures(1), ["a"], [{}])


def test_tls_with_a_server_that_has_none_is_an_error_of_the_user():
    with FaultyServer(brightness) as server:
        reward = remote(url=server.url.replace("http:", "https:"), timeout=5.0)
        with pytest.raises(UserError, match=r"no TLS with 127\.0\.0\.1.*SSL_CERT_FILE") as raised:
            reward(pictures(1), ["a"], [{}])
    assert "\n" not in str(raised.value)
    assert isinstance(reward._tls, ssl.SSLContext)


@pytest.mark.parametrize("compress", [None, "uint8", "png", "none"])
def test_pictures_arrive_as_they_were(compress):
    seen = []

    def keep(images, prompts, metadata):
        seen.append((images, prompts, metadata))
        return [0.0] * len(images)

    images = pictures(2)
    with FaultyServer(keep) as server:
        asking(server, Time(), compress=compress)(images, ["a", "b"], [{"n": 1}, {"box": (1, 2)}])
    arrived, prompts, metadata = seen[0]
    torch.testing.assert_close(arrived, images, rtol=0, atol=1e-7)
    assert prompts == ["a", "b"]
    assert metadata == [{"n": 1}, {"box": [1, 2]}]

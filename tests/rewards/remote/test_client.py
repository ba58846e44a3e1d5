"""What the client says before it asks anybody. How it asks is in test_faults.py."""

import pytest
import torch

from burnish.config import check_settings
from burnish.errors import UserError
from burnish.rewards.remote.client import REMOTE, remote
from burnish.rewards.remote.exchange import said

URL = "http://127.0.0.1:1"  # nobody is asked


def test_settings_are_those_of_a_recipe():
    settings = check_settings(remote, {"url": URL, "on_failure": "skip", "compress": "png", "timeout": 2}, "remote")
    assert settings["attempts"] == 5
    assert "sleep" not in settings
    assert "clock" not in settings
    assert REMOTE.make is remote
    assert REMOTE.missing == []


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0}, {"attempts": 0}, {"pause": -1}, {"on_failure": "guess"}, {"compress": 1}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match=f"remote.{next(iter(wrong))}"):
        check_settings(remote, {"url": URL, **wrong}, "remote")


@pytest.mark.parametrize(
    ("token", "said"),
    [(None, "is not set"), (" ", "is not set"), ("a\nb", "holds what no header"), ("ü", "holds what")],
)
def test_a_missing_token_is_said_at_once(monkeypatch, token, said):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("MY_TOKEN", token)
    with pytest.raises(UserError, match=f"MY_TOKEN {said}") as raised:
        remote(url=URL, token_variable="MY_TOKEN")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "file:///etc/passwd", ""])
def test_an_address_is_http(url):
    with pytest.raises(UserError, match="is no address; write http://host:port"):
        remote(url=url, token_variable="")


def test_certificates_that_are_none_are_said_at_once(monkeypatch, tmp_path):
    for text in (None, "no certificate"):
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
        if text:
            (tmp_path / "own.pem").write_text(text)
        with pytest.raises(UserError, match="SSL_CERT_FILE holds no certificates"):
            remote(url="https://127.0.0.1:1", token_variable="")


def test_a_cache_tells_servers_apart():
    def version(**settings):
        return remote(token_variable="", **settings).version

    versions = {version(url=URL), version(url=URL + "2"), version(url=URL, compress="none"), version(url=f"{URL}/b")}
    assert len(versions) == 4
    assert version(url=URL) == version(url=f"{URL}/", compress="uint8", timeout=1.0)


def test_the_token_is_nowhere_to_be_read(monkeypatch):
    monkeypatch.setenv("BURNISH_REWARD_TOKEN", "hush")
    reward = remote(url=URL)
    assert "hush" not in reward.version
    assert "hush" not in repr(reward)


def test_pictures_that_are_not_finite_are_not_sent():
    images = torch.tensor([0.5, float("nan")]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    with pytest.raises(UserError, match="not finite: the policy has diverged"):
        remote(url=URL, token_variable="")(images, ["a", "b"])


def test_metadata_that_json_has_not_is_not_sent():
    with pytest.raises(UserError, match=r"metadata cannot be sent .*keep to what JSON has"):
        remote(url=URL, token_variable="")(torch.zeros(1, 3, 2, 2), ["a"], [{"a": object()}])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error": "busy"}', "busy"),
        (b'{"detail": "no"}', '{"detail": "no"}'),
        (b"Traceback:\n  File\nKeyError: 'tag'\n", "KeyError: 'tag'"),
        (b"", "no reason given"),
        (b"\xff" * 999, "\ufffd" * 200),
        (b"[" * 99999, "[" * 200),
        (b"[1]", "[1]"),
    ],
)
def test_the_reason_of_a_refusal_is_one_short_line(body, reason):
    assert said(body) == reason

"""The same reward on Ray Serve, on a real cluster of this machine."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from burnish.errors import UserError
from burnish.rewards import score
from burnish.rewards.remote.client import remote
from burnish.rewards.remote.ray import deploy

pytest.importorskip("ray", reason="pip install 'burnish[ray]'")

SERVE = """
import sys
from burnish.rewards.remote.ray import deploy
print(deploy(sys.argv[1], {"factor": 2.0}, host="127.0.0.1", port=int(sys.argv[2])), flush=True)
sys.stdin.read()  # until the test is done
import ray, ray.serve
ray.serve.shutdown()
ray.shutdown()
"""


def test_a_token_is_wanted(monkeypatch):
    monkeypatch.delenv("BURNISH_REWARD_TOKEN", raising=False)
    with pytest.raises(UserError, match="BURNISH_REWARD_TOKEN is not set"):
        deploy("module:function")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'burnish\[ray\]'"):
        deploy("module:function", token_variable="")


@pytest.mark.slow  # 25 to 50 s until Ray has started
def test_a_deployment_answers_as_a_server_does(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_REWARD_TOKEN", "secret")
    source = tmp_path / "bright.py"
    source.write_text(
        "def brightness(images, prompts, metadata, *, factor: float):\n    return factor * images.mean((1, 2, 3))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # In a process of its own, because Ray's own warnings are not ours to make errors of.
    command = [sys.executable, "-c", SERVE, f"{source}:brightness", str(port)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        url = process.stdout.readline().strip()
        while url and not url.startswith("http://"):  # Ray talks, too
            url = process.stdout.readline().strip()
        images = (torch.rand(70, 3, 8, 8) * 255).round() / 255
        told = score(remote(url=url), images, ["p"] * 70)
        monkeypatch.setenv("BURNISH_REWARD_TOKEN", "another")
        with pytest.raises(UserError, match="401, wrong or missing token"):
            remote(url=url)(images, ["p"] * 70)
        process.communicate(timeout=120)
    torch.testing.assert_close(told.total, 2 * images.mean((1, 2, 3)))
    assert told.parts["failures"].sum() == 0
    assert process.returncode == 0

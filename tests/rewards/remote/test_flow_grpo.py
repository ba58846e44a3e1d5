import datetime
import io
import json
import pickle
import struct
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from burnish.errors import UserError
from burnish.rewards import score
from burnish.rewards.remote import flow_grpo
from burnish.rewards.remote.client import remote
from burnish.rewards.remote.wire import WireError

GENEVAL = {
    "scores": [0.5, 1.0],
    "rewards": [0.0, 1.0],
    "strict_rewards": [0.0, 1.0],
    "group_rewards": {"counting": [0.0, -10.0]},
    "group_strict_rewards": {"counting": [0.0, -10.0]},
}


def test_a_request_is_what_the_official_servers_read():
    images = torch.zeros(2, 3, 8, 16)
    images[1, 0] = 1
    metadata = [{"tag": "counting", "include": [{"class": "dog", "count": 2}]}, {"tag": "colors"}]
    told = pickle.loads(flow_grpo.dump_request(images, ["two dogs", "b"], metadata, only_strict=False))
    pictures = [Image.open(io.BytesIO(one), formats=["jpeg"]) for one in told["images"]]  # as app_geneval.py does
    assert [one.size for one in pictures] == [(16, 8), (16, 8)]
    assert np.asarray(pictures[1]).reshape(-1, 3).mean(0) == pytest.approx([255, 0, 0], abs=3)
    assert told["meta_datas"] == metadata
    assert told["only_strict"] is False
    assert told["prompts"] == ["two dogs", "b"]


def test_answers_become_scores():
    told = flow_grpo.load_answer(pickle.dumps(GENEVAL), 2)
    assert told.total.tolist() == [0.5, 1]
    assert {name: part.tolist() for name, part in told.parts.items()} == {"strict_accuracy": [0, 1]}
    told = flow_grpo.load_answer(pickle.dumps(GENEVAL), 2, only_strict=False)
    assert set(told.parts) == {"strict_accuracy", "accuracy"}
    assert flow_grpo.load_answer(pickle.dumps({"outputs": [0.2, 0.9]}), 2).total.tolist() == pytest.approx([0.2, 0.9])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_kind_come_through(protocol):
    value = {
        "a": [1, -2.5, None, True, "ü" * 300],
        "b": (1, (2,), {"c": []}),
        "e": 2**80,
        "f": ["x"] * 300,
    }
    assert flow_grpo.loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f8", "i8", "u1", "?"])
def test_numpys_numbers_come_through(protocol, kind):
    array = np.array([1, 0, 1], kind)
    assert flow_grpo.load_answer(pickle.dumps({"outputs": array}, protocol), 3).total.tolist() == [1, 0, 1]
    assert flow_grpo.load_answer(pickle.dumps({"outputs": list(array)}, protocol), 3).total.tolist() == [1, 0, 1]


class Evil:
    """Unpickling one is a test that fails."""

    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def object_dtype_with_the_flags_of_numbers():
    # numpy's own rebuilder would read these bytes as addresses of objects.
    dtype = b"cnumpy\ndtype\n(C\x02O8I00\nI01\ntR(I3\nC\x01|NNNI-1\nI-1\nI0\ntb"
    rebuilt = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
    return b"\x80\x04}X\x07\x00\x00\x00outputs" + rebuilt + b"(I1\n(I1\nt" + dtype + b"I00\nC\x08AAAAAAAAtbs."


@pytest.mark.parametrize(
    "body",
    [
        pickle.dumps({"outputs": [Evil()]}),
        pickle.dumps({"outputs": np.array([Evil()], dtype=object)}),
        pickle.dumps({"outputs": [datetime.date(2025, 1, 1)]}),
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",  # copyreg's extension 1
        b"Psomething\n.",  # a persistent id
        b"cnumpy\nndarray\n(I10\ntR.",
        b"cnumpy\nndarray\n)\x81.",
        b"cnumpy\ndtype\nN}S'__code__'\nNs\x86b.",
        object_dtype_with_the_flags_of_numbers(),
        b"\x80\x04N" + b"r" + struct.pack("<I", 2**31) + b".",  # room for two thousand million memos
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of a terabyte
        b"\x80\x04" + b"(" * 10,
        b"",
        b"Traceback (most recent call last):",
    ],
)
def test_nothing_but_plain_values_is_rebuilt(body):
    with pytest.raises(WireError) as raised:
        flow_grpo.load_answer(body, 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", r"the pickle asks for os\.system; only plain values"),
        (object_dtype_with_the_flags_of_numbers(), "an array that is not of numbers"),
        (b"\x80\x04Nr\x00\x00\x00\x80.", "a pickle with memo 2147483648"),
    ],
)
def test_each_guard_is_the_one_that_refuses(body, said):
    with pytest.raises(WireError, match=said):
        flow_grpo.loads(body)


@given(st.binary(max_size=60))
def test_noise_is_refused(body):
    with pytest.raises(WireError):
        flow_grpo.load_answer(body, 1)


@given(st.data())
def test_a_damaged_answer_is_refused_or_read(data):
    good = pickle.dumps({"scores": np.array([0.5, 1.0]), "strict_rewards": [0.0, 1.0]})
    at, byte = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 255))
    with suppress(WireError):
        flow_grpo.load_answer(good[:at] + bytes([byte]) + good[at + 1 :], 2)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"outputs": [1.0]}, "1 of total for 2 pictures"),
        ({"outputs": [1.0, float("nan")]}, "total is not finite"),
        ({"outputs": [1.0, 10**400]}, "beyond all floats"),
        ({"outputs": ["1", "2"]}, "outputs is not a list of numbers"),
        ({"outputs": np.zeros((2, 1))}, "not a row of numbers"),
        ({"scores": [1.0, 2.0], "strict_rewards": [1.0]}, "1 of strict_accuracy for 2"),
        ({}, "a dict without outputs or scores"),
        ([1.0, 2.0], "a list without outputs or scores"),
    ],
)
def test_an_answer_of_another_form_is_refused(told, said):
    with pytest.raises(WireError, match=said):
        flow_grpo.load_answer(pickle.dumps(told), 2)


class Official(BaseHTTPRequestHandler):
    """Speaks as app_geneval.py and app_deqa.py do, in stock pickles; the script says which, or what goes wrong."""

    script, asked = (), []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, dict(self.headers)))
        kind = self.script.pop(0)
        status, answer = 200, b"garbage"
        try:
            data = pickle.loads(body)
            images = [Image.open(io.BytesIO(one), formats=["jpeg"]) for one in data["images"]]
            red = [float(np.asarray(image)[..., 0].mean() / 255) for image in images]
            if kind == "broken":
                raise RuntimeError("CUDA error")
            if kind == "geneval":
                strict = [float(one["tag"] == "counting") for one in data["meta_datas"]]
                answer = pickle.dumps({"scores": red, "rewards": [0.0] * len(red), "strict_rewards": strict})
            if kind == "deqa":
                answer = pickle.dumps({"outputs": [np.float64(one) for one in red]})
        except Exception as error:
            status, answer = (
                500,
                f"Traceback (most recent call last):\n  File\n{type(error).__name__}: {error}".encode(),
            )
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Official.script, Official.asked = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Official) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_the_client_speaks_with_a_server_of_stock_pickles(server, monkeypatch, caplog):
    monkeypatch.setenv("BURNISH_REWARD_TOKEN", "secret")
    images = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    metadata = [{"tag": "counting" if n % 2 else "colors"} for n in range(5)]
    Official.script = ["broken", "geneval", "garbage", "geneval", "geneval"]
    reward = remote(url=server, protocol="flow_grpo", slice_size=2, timeout=30.0, sleep=lambda _: None)
    told = score(reward, images, ["p"] * 5, metadata)
    torch.testing.assert_close(told.total, torch.linspace(0, 1, 5), rtol=0, atol=0.01)
    assert told.parts["strict_accuracy"].tolist() == [0, 1, 0, 1, 0]
    assert told.parts["failures"].tolist() == [0.5, 0.5, 0.5, 0.5, 0]
    assert "status 500, RuntimeError: CUDA error" in caplog.text
    assert {path for path, _ in Official.asked} == {"/"}
    assert not any("Authorization" in headers for _, headers in Official.asked)  # it knows no token, so it learns none
    Official.script = ["deqa"]
    assert score(reward, images[:1], ["p"], [{}]).total.tolist() == [0]


def test_compress_is_jpegs_own(server):
    with pytest.raises(UserError, match="compress=png with protocol=flow_grpo"):
        remote(url=server, protocol="flow_grpo", compress="png")


def test_metadata_that_a_server_could_not_read_is_said():
    with pytest.raises(WireError, match="keep to what JSON has"):
        flow_grpo.dump_request(torch.zeros(1, 3, 8, 8), ["a"], [{"a": json}])

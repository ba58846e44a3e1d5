import io
import json
import pickle
import zipfile
from contextlib import suppress

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.rewards import Scores
from burnish.rewards.remote import wire

LIMITS = {"most_pictures": 8, "most_bytes": 10_000}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def words(draw):
    """Prompts and metadata of one to three pictures."""
    count = draw(st.integers(1, 3))
    prompts = draw(st.lists(st.text(), min_size=count, max_size=count))
    return prompts, draw(st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=count, max_size=count))


def one(**changes):
    """The map of a good request of two pictures of 2 x 2 in 8 bits, changed."""
    told = {"version": 1, "id": "abcdefgh", "encoding": "uint8", "shape": [2, 3, 2, 2], "images": bytes(range(24))}
    return {**told, "prompts": ["a", "b"], "metadata": [{}, {}], **changes}


def load(values, kind=wire.MSGPACK, **limits):
    body = values if isinstance(values, bytes) else msgpack.packb(values)
    return wire.load_request(body, kind, **(LIMITS | limits))


@given(words(), st.integers(1, 5), st.integers(1, 5), st.sampled_from(["float32", "uint8", "png"]))
def test_a_request_arrives_as_it_was_sent(words, height, width, encoding):
    images = torch.randint(256, (len(words[0]), 3, height, width)) / 255
    request = wire.Request("0" * 32, images, *words)
    arrived = wire.load_request(wire.dump_request(request, encoding), wire.MSGPACK, **LIMITS)
    assert (arrived.id, arrived.prompts, arrived.metadata) == (request.id, request.prompts, request.metadata)
    torch.testing.assert_close(arrived.images, request.images, rtol=0, atol=0)  # levels of 1/255 in every encoding


def test_eight_bits_round_to_the_nearest_and_float32_does_not():
    images = torch.tensor([0.4, 100.4 / 255, 100.6 / 255, 1.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    request = wire.Request("0" * 8, images, ["a"], [{}])
    eight = load(wire.dump_request(request, "uint8")).images[0, 0].flatten() * 255
    assert eight.round().tolist() == [102, 100, 101, 255]
    assert torch.equal(load(wire.dump_request(request, "float32")).images, images)


@given(st.lists(st.tuples(finite, st.booleans()), min_size=1, max_size=5), st.booleans())
def test_an_answer_arrives_as_it_was_sent(rows, some_missing):
    total = torch.tensor([value for value, _ in rows])
    missing = torch.tensor([gone for _, gone in rows]) if some_missing else None
    kept = total if missing is None else total.masked_fill(missing, torch.nan)
    arrived = wire.load_answer(wire.dump_answer("0" * 8, Scores(kept, {"red": total}, missing)), "0" * 8, len(rows))
    torch.testing.assert_close(arrived.total, kept, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(arrived.parts["red"], total, rtol=0, atol=0)
    assert (arrived.missing is None) == (missing is None)
    assert missing is None or torch.equal(arrived.missing, missing)


@given(st.binary(max_size=200) | json_values.map(msgpack.packb))
def test_noise_is_refused_and_nothing_else_is_raised(body):
    for kind in (wire.MSGPACK, wire.NPZ):
        with pytest.raises(wire.WireError) as raised:
            wire.load_request(body, kind, **LIMITS)
        assert "\n" not in str(raised.value)
    with pytest.raises(wire.WireError):
        wire.load_answer(body, "0" * 8, 1)


@given(st.data(), st.sampled_from(["uint8", "png", "npz"]))
def test_a_damaged_request_is_refused_or_read_but_nothing_else(data, encoding):
    good = npz() if encoding == "npz" else wire.dump_request(load(one()), encoding)
    at, byte = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 255))
    damaged = good[:at] + bytes([byte]) + good[at + 1 :]
    with suppress(wire.WireError):
        load(damaged, wire.NPZ if encoding == "npz" else wire.MSGPACK)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "request: version: Input should be 1"),
        ({"id": "short"}, "request: id: String should match"),
        ({"id": "../../../etc/passwd"}, "request: id"),
        ({"id": "abcdefgh\n"}, "request: id"),
        ({"more": 1}, "request: more: Extra inputs"),
        ({"encoding": "pickle"}, "request: encoding"),
        ({"prompts": ["a"]}, "1 prompts for 2 pictures"),
        ({"prompts": ["a", 1]}, r"request: prompts\.1: Input should be a valid string"),
        ({"prompts": "ab"}, "request: prompts"),
        ({"metadata": [{}]}, "1 metadata for 2 pictures"),
        ({"metadata": [{}, {"a": b"bytes"}]}, "request: metadata"),
        ({"metadata": [{}, {"a": msgpack.Timestamp(1)}]}, "request: metadata"),
        ({"metadata": [{}, {"a": msgpack.ExtType(5, b"x")}]}, "request: metadata"),
        ({"metadata": [{}, []]}, r"request: metadata\.1"),
        ({"shape": [2, 4, 2, 2]}, "has 4 channels"),
        ({"shape": [2, 3, 2, 3]}, "do not fit the length of images"),
        ({"shape": [2, 3, 2]}, "request: shape: List should have at least 4"),
        ({"shape": [2, 3, -2, -2]}, "request: shape"),
        ({"shape": [0, 3, 2, 2], "images": b"", "prompts": [], "metadata": []}, "request: shape"),
        ({"encoding": "float32"}, "do not fit the length of images"),
        ({"images": [b"", b""]}, "do not fit the length of images"),
        ({"encoding": "png"}, "wants images as a list of 2 files"),
        ({"encoding": "png", "images": [b"", b""]}, "no PNG of 2 x 2"),
        ({"encoding": "png", "images": [b"x" * 100] * 2}, "no PNG of 2 x 2"),
    ],
)
def test_a_request_that_breaks_the_form_is_refused_in_one_line(changes, said):
    with pytest.raises(wire.WireError, match=said) as raised:
        load(one(**changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_floats_must_be_pictures(value):
    pixels = np.full((2, 3, 2, 2), 0.5, "<f4")
    pixels[1, 2, 1, 1] = value
    with pytest.raises(wire.WireError, match="finite and in"):
        load(one(encoding="float32", images=pixels.tobytes()))


def test_sizes_are_looked_at_before_memory_is_taken():
    with pytest.raises(wire.TooLarge, match="2 pictures; this server takes 1"):
        load(one(), most_pictures=1)
    with pytest.raises(wire.TooLarge, match="pictures of 24 bytes; this server takes 23"):
        load(one(), most_bytes=23)
    with pytest.raises(wire.TooLarge, match="3221225472"):  # a small PNG that says it is large
        load(one(encoding="png", shape=[1, 3, 2**15, 2**15], images=[b""], prompts=["a"], metadata=[{}]))
    request = load(one())
    small, large = (wire.dump_request(wire.Request("a" * 8, images, ["a"] * len(images), [{}] * len(images)), "png")
                    for images in (request.images, torch.zeros(2, 3, 9, 9)))  # fmt: skip
    files = msgpack.unpackb(large)["images"]
    with pytest.raises(wire.WireError, match="no PNG of 2 x 2"):
        load(msgpack.unpackb(small) | {"images": files})


def test_nested_and_endless_maps_are_refused():
    deep = b"\x91" * 5000 + b"\xc0"
    with pytest.raises(wire.WireError, match="not msgpack"):
        load(deep)
    many = msgpack.packb(one(prompts=[""] * (wire.MOST_ITEMS + 1)))
    with pytest.raises(wire.WireError, match="not msgpack"):
        load(many)


def npz(images=None, head=None, **more):
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2) if images is None else images
    told = {"version": 1, "id": "abcdefgh", "prompts": ["a", "b"], "metadata": [{}, {"n": 1}]} if head is None else head
    file = io.BytesIO()
    np.savez(file, images=images, head=np.frombuffer(json.dumps(told).encode(), np.uint8), **more)
    return file.getvalue()


def test_npz_says_the_same():
    arrived, wanted = load(npz(), wire.NPZ), load(one(metadata=[{}, {"n": 1}]))
    assert torch.equal(arrived.images, wanted.images)
    assert (arrived.id, arrived.prompts, arrived.metadata) == (wanted.id, wanted.prompts, wanted.metadata)
    floats = load(npz(np.full((2, 3, 2, 2), 0.25, np.float32)), wire.NPZ)
    assert floats.images.unique().tolist() == [0.25]
    told = np.load(
        io.BytesIO(wire.dump_answer("abcdefgh", Scores(torch.tensor([1.5]), {"red": torch.ones(1)}), wire.NPZ))
    )
    assert told["total"].tolist() == [1.5]
    assert told["part/red"].tolist() == [1]
    assert told["missing"].tolist() == [False]
    assert json.loads(told["head"].tobytes()) == {"version": 1, "id": "abcdefgh"}


class Evil:
    """Unpickling one is a test that fails."""

    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def evil_npz():
    file = io.BytesIO()
    np.savez(file, head=np.frombuffer(b"{}", np.uint8), images=np.array([Evil()], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (evil_npz(), "an array of object"),
        (npz(more=np.zeros(1)), r"npz: holds head\.npy, images\.npy, more\.npy; expected head and images"),
        (npz(np.zeros((2, 3, 2, 2))), "an array of float64"),
        (npz(np.asfortranarray(np.zeros((2, 3, 2, 2), np.float32))), "by columns"),
        (npz(head=[1]), "not an npz"),
        (npz(head={"version": 1, "id": "abcdefgh", "prompts": ["a", "b"]}), "request: metadata: Field required"),
        (b"PK\x03\x04", "not an npz"),
        (pickle.dumps([1]), "not an npz"),
    ],
)
def test_an_npz_that_breaks_the_form_is_refused(body, said):
    with pytest.raises(wire.WireError, match=said):
        load(body, wire.NPZ)


def test_an_npz_that_unpacks_to_more_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("head.npy", b"")
        archive.writestr("images.npy", bytes(10**6))
    assert len(file.getvalue()) < 10_000
    with pytest.raises(wire.TooLarge):
        load(file.getvalue(), wire.NPZ)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**12,)})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("head.npy", header.getvalue())
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(wire.WireError, match=r"an array of shape \[1000000000000\] with 0 bytes"):
        load(file.getvalue(), wire.NPZ)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total": [1.0]}, "1 of total for 2 pictures"),
        ({"parts": {"red": [1.0]}}, "1 of red for 2 pictures"),
        ({"missing": [True]}, "1 of missing for 2 pictures"),
        ({"total": [1.0, float("nan")]}, "total is not finite"),
        ({"total": [1.0, 1e39]}, "total is not finite"),  # beyond float32
        ({"parts": {"red": [1.0, float("inf")]}}, "red is not finite"),
        ({"total": ["1", "2"]}, r"answer: total\.0"),
        ({"total": None}, "answer: total"),
        ({"parts": {"total": [1.0]}}, "1 of total"),  # a part of this name must not hide the total
        ({"id": "somebody"}, "to request 'somebody'; asked 'abcdefgh'"),
        ({"version": 7}, "answer: version"),
    ],
)
def test_an_answer_that_breaks_the_form_is_refused(changes, said):
    told = {"version": 1, "id": "abcdefgh", "total": [1.0, 2], "parts": {"red": [0.0, 1.0]}, "missing": None}
    assert wire.load_answer(msgpack.packb(told), "abcdefgh", 2).total.tolist() == [1, 2]
    with pytest.raises(wire.WireError, match=said):
        wire.load_answer(msgpack.packb(told | changes), "abcdefgh", 2)


def test_what_is_missing_may_be_nan():
    told = {"version": 1, "id": "a", "total": [1.0, float("nan")], "parts": {}, "missing": [False, True]}
    assert wire.load_answer(msgpack.packb(told), "a", 2).missing.tolist() == [False, True]
    with pytest.raises(wire.WireError, match="not finite"):
        wire.load_answer(msgpack.packb(told | {"missing": [True, False]}), "a", 2)


def test_metadata_keeps_to_json():
    assert wire.plain([{"box": (1, 2), 3: None}]) == [{"box": [1, 2], "3": None}]
    for odd in ({"a": {1}}, {"a": torch.zeros(1)}, {"a": b""}):
        with pytest.raises(wire.WireError, match="keep to what JSON has"):
            wire.plain([odd])
    for prompt, metadata in (("\ud800", {}), ("a", {"n": 2**70})):
        with pytest.raises(wire.WireError, match="cannot be sent"):
            wire.dump_request(wire.Request("a" * 8, torch.zeros(1, 3, 1, 1), [prompt], [metadata]))

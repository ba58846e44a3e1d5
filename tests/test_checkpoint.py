"""State on disk: it comes back bit for bit, and neither a kill nor a full disk nor a flipped bit goes unnoticed."""

import enum
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.checkpoint import (
    BrokenCheckpoint,
    append_jsonl,
    atomic_write,
    latest_checkpoint,
    load_checkpoint,
    read_jsonl,
    restore_rng_state,
    rng_state,
    save_checkpoint,
    truncate_jsonl,
)
from burnish.errors import UserError

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # many small saves, where an fsync costs nothing


def same(one, other):
    """Equal in type, structure, order and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return same([list(item) for item in one.items()], [list(item) for item in other.items()])
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    return one == other


def bits(tensor):
    return (
        tensor.resolve_conj().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().tobytes()
    )


@contextmanager
def files_at_most(size):
    """The kernel refuses to let any file grow beyond `size` bytes: a real failed write, half of it done."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# --- round trip ------------------------------------------------------------------------------------------------------

TORCH_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128,
]  # fmt: skip
NUMPY_DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "c8", "c16"]


@st.composite
def tensors(draw):
    """Any bit pattern (so NaNs of every kind), any shape, laid out in any way."""
    dtype = draw(st.sampled_from([*TORCH_DTYPES, torch.bool]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    count = math.prod(shape) * (2 if layout == "strided" else 1)
    if dtype == torch.bool or count == 0:
        flat = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool).to(dtype)
    else:
        size = count * dtype.itemsize
        flat = torch.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size))), dtype=dtype)
    if layout == "strided":
        return flat[::2].reshape(shape) if len(shape) != 1 else flat[::2]
    tensor = flat.reshape(shape)
    return tensor.mT if layout == "transposed" and len(shape) > 1 else tensor.expand(2, *shape)


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(NUMPY_DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    return array[()] if draw(st.booleans()) and not shape else np.asarray(array).T


text = st.text(st.characters(exclude_categories=()))  # with lone surrogates
plain = st.none() | st.booleans() | st.integers() | st.floats() | text
keys = text | st.sampled_from(["~tuple", "~tensor", "~dict"]) | st.integers() | st.tuples(st.integers(), st.booleans())
trees = st.recursive(
    plain | tensors() | arrays(),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


@settings(max_examples=60)
@given(st.dictionaries(text | st.sampled_from(["~tuple"]), trees, max_size=4))
def test_every_state_comes_back_bit_for_bit(state):
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        assert same(load_checkpoint(save_checkpoint(Path(directory), 1, state)), state)


def test_edge_values_come_back(tmp_path):
    payload = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
    state = {
        "floats": [math.nan, -math.nan, payload, math.inf, -math.inf, -0.0, 5e-324, 0.1],
        "ints": [2**4000, -(2**64), True, 1, 1.0],
        "numpy": [np.float64(0.1), np.float32(math.nan), np.int8(-3), np.bool_(True), np.array(3), np.zeros((0, 2))],
        "empty": [[], (), {}, "", torch.zeros(0), torch.zeros(2, 0, 3)],
        "tensors": [torch.tensor(1.5, dtype=torch.bfloat16), torch.eye(3)[:, 1], torch.ones(1).expand(4)],
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "keys": {0: "zero", "0": "text", (1, 2): "pair", None: "none", 1.5: "float", "~tensor": "tilde"},
        "clash": {0: torch.zeros(1), "0": torch.ones(1)},
        "": {"a/b\n": torch.ones(1), "\ud800\udc00": torch.zeros(1)},
    }
    assert same(load_checkpoint(save_checkpoint(tmp_path, 0, state)), state)


def test_memory_that_is_shared_is_saved_and_read_apart(tmp_path):
    weight = torch.arange(6.0)
    state = load_checkpoint(save_checkpoint(tmp_path, 1, {"tied": [weight, weight, weight[2:], weight.view(2, 3)]}))
    assert same(state["tied"], [weight, weight, weight[2:], weight.view(2, 3)])
    state["tied"][0].zero_()
    assert state["tied"][1].sum() == 15


def test_loaded_tensors_lie_as_torch_lays_them(tmp_path):
    # On another alignment a vectorised kernel may sum in another order, and a resumed run differ in its last bits.
    state = load_checkpoint(save_checkpoint(tmp_path, 1, {str(n): torch.ones(n, dtype=torch.uint8) for n in (3, 5, 7)}))
    assert [tensor.data_ptr() % 64 for tensor in state.values()] == [0, 0, 0]


def test_mappings_come_back_as_dicts_and_parameters_as_tensors(tmp_path):
    state = {"ordered": OrderedDict(b=1, a=2), "parameter": torch.nn.Parameter(torch.ones(2))}
    assert same(
        load_checkpoint(save_checkpoint(tmp_path, 1, state)), {"ordered": {"b": 1, "a": 2}, "parameter": torch.ones(2)}
    )


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).to(torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def train(model, optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            schedule.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    run = build()
    train(*run, 3)
    state = {name: part.state_dict() for name, part in zip(("model", "optimizer", "schedule"), run, strict=True)}
    path = save_checkpoint(tmp_path, 3, state | {"rng": rng_state()})
    expected = train(*run, 3)
    state, run = load_checkpoint(path), build()
    for name, part in zip(("model", "optimizer", "schedule"), run, strict=True):
        part.load_state_dict(state[name])
    restore_rng_state(state["rng"])
    assert same(train(*run, 3), expected)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        {1},
        b"bytes",
        object(),
        Colour.RED,
        torch.Size([1]),
        np.array(["text"]),
        np.array([None]),
        np.zeros(2, ">f8"),
        1j,
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path, value):
    with pytest.raises(TypeError, match=r"^state\.trainer\.1: "):
        save_checkpoint(tmp_path / "checkpoints", 1, {"trainer": [0, value]})
    assert names(tmp_path) == []


# --- the directory ---------------------------------------------------------------------------------------------------


def test_layout(tmp_path):
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 100, {"weights": torch.ones(3)})
    assert path == tmp_path / "run" / "checkpoints" / "step-000100"
    assert names(path) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert names(path.parent) == ["step-000100"]
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1  # whoever may read one may read all
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 100
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: (path / name).stat().st_size for name in ("state.json", "tensors.safetensors")
    }


def test_the_newest_are_kept_and_the_latest_is_by_number(tmp_path):
    for step in (1, 20, 300, 1_000_000, 2_000_000):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    assert names(tmp_path) == ["step-000300", "step-1000000", "step-2000000"]
    path, state = latest_checkpoint(tmp_path)
    assert (path.name, state) == ("step-2000000", {"step": 2_000_000})
    save_checkpoint(tmp_path, 500_000, {"step": 500_000}, keep=1)  # gone back: what lies ahead is not ours to delete
    assert names(tmp_path) == ["step-1000000", "step-2000000", "step-500000"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for content in ("old", "new"):
        save_checkpoint(tmp_path, 7, {"content": content}, keep=1)
    assert names(tmp_path) == ["step-000007"]
    assert latest_checkpoint(tmp_path)[1] == {"content": "new"}


def test_what_a_killed_save_left_behind_is_cleared(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step-000002.tmp-1")
    (tmp_path / f".step-000003.tmp-{os.getpid()}").mkdir()  # in containers numbers of processes repeat
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step-000001.old-1")
    (tmp_path / "notes.txt").write_text("the user's own")
    assert latest_checkpoint(tmp_path)[0].name == "step-000001"
    save_checkpoint(tmp_path, 3, {"step": 3})
    assert names(tmp_path) == ["notes.txt", "step-000001", "step-000003"]


def test_a_kill_in_the_middle_of_a_replacement_loses_nothing(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1}).rename(tmp_path / ".step-000001.old-1")
    assert latest_checkpoint(tmp_path)[1] == {"step": 1}
    save_checkpoint(tmp_path, 2, {"step": 2})
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("step", "keep"), [(-1, 3), (1, 0)])
def test_bad_numbers_are_refused(tmp_path, step, keep):
    with pytest.raises(ValueError, match="at least"):
        save_checkpoint(tmp_path, step, {}, keep=keep)


# --- damage ----------------------------------------------------------------------------------------------------------

DAMAGES = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"#" + path.read_bytes()[-8:]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"#"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
def test_damage_is_reported_and_the_checkpoint_before_is_used(tmp_path, caplog, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.full((5,), float(step))})
    DAMAGES[damage](tmp_path / "step-000002" / name)
    with pytest.raises(BrokenCheckpoint) as caught:
        load_checkpoint(tmp_path / "step-000002")
    message = str(caught.value)
    assert str(tmp_path / "step-000002" / name) in message
    assert "resume from the one before it" in message
    assert "\n" not in message
    with caplog.at_level(logging.WARNING, logger="burnish"):
        path, state = latest_checkpoint(tmp_path)
    assert path.name == "step-000001"
    assert same(state, {"step": 1, "weights": torch.ones(5)})
    assert [record.getMessage() for record in caplog.records] == [f"passed over: {message}"]


def test_nothing_but_broken_checkpoints_is_an_error_not_a_new_start(tmp_path):
    for step in (1, 2):
        DAMAGES["cut"](save_checkpoint(tmp_path, step, {}) / "state.json")
    with pytest.raises(BrokenCheckpoint, match=r"every checkpoint in .* is broken"):
        latest_checkpoint(tmp_path)


@settings(max_examples=100)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), name=st.sampled_from(range(3)))
def test_one_flipped_byte_never_gives_another_state(place, flip, name):
    path = _intact()
    file = path / names(path)[name]
    content = file.read_bytes()
    where = int(place * len(content))
    file.write_bytes(content[:where] + bytes([content[where] ^ flip]) + content[where + 1 :])
    try:
        assert same(load_checkpoint(path), STATE)  # a byte that means nothing: the manifest's step or white space
    except BrokenCheckpoint as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)
    finally:
        file.write_bytes(content)


STATE = {"weights": torch.arange(9.0), "step": 12, "name": "héllo", "nested": {3: (1, math.nan)}}
_directory = tempfile.TemporaryDirectory(dir=MEMORY)


def _intact():
    path = Path(_directory.name) / "step-000012"
    return path if path.exists() else save_checkpoint(path.parent, 12, STATE)


def test_another_format_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(BrokenCheckpoint, match="format 2"):
        load_checkpoint(path)


# --- full disks and walls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1_000, 50_000])
@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"weights": torch.ones(20_000)}, id="tensors"),
        pytest.param({"numbers": list(range(20_000))}, id="tree"),
    ],
)
def test_a_full_disk_gives_one_line_and_leaves_the_last_good_checkpoint(tmp_path, room, state):
    save_checkpoint(tmp_path, 1, {"good": torch.ones(3)})
    for step in (1, 2):  # replacing and adding
        with files_at_most(room), pytest.raises(UserError, match="File too large") as caught:
            save_checkpoint(tmp_path, step, state, keep=1)
        assert "\n" not in str(caught.value)
        assert f"step-{step:06d}" in str(caught.value)
        assert names(tmp_path) == ["step-000001"]
        assert same(latest_checkpoint(tmp_path)[1], {"good": torch.ones(3)})


def test_a_file_in_the_way_gives_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("no directory")
    with pytest.raises(UserError, match=r"cannot save checkpoint .*: File exists"):
        save_checkpoint(tmp_path / "checkpoints", 1, {})
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(tmp_path / "checkpoints" / "config.yaml", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_gives_one_line(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            save_checkpoint(tmp_path, 1, {})
        with pytest.raises(UserError, match="Permission denied"):
            atomic_write(tmp_path / "config.yaml", "")
    finally:
        tmp_path.chmod(0o755)


# --- kills -----------------------------------------------------------------------------------------------------------

CHILDREN = """
import os, signal, sys, tempfile
from pathlib import Path
import torch
from burnish.checkpoint import save_checkpoint

CHANGES_THE_DISK = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

def save(directory, step):
    weights = [torch.full((20_000,), float(step)) for _ in range(3)]
    save_checkpoint(directory, step, {"step": step, "weights": weights, "numbers": [step] * 1000}, keep=2)

def die_before_change(number):
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        if event in CHANGES_THE_DISK:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

with tempfile.TemporaryDirectory() as warm_up:
    save(Path(warm_up), 1)
print("ready", flush=True)
for line in sys.stdin:  # a fork for each trial, so that torch is imported once
    how, number, directory = line.rstrip("\\n").split(" ", 2)
    child = os.fork()
    if child == 0:
        step = int(number)
        if how == "once":
            change, step = divmod(step, 1000)
            die_before_change(change)
            save(Path(directory), step)
            os._exit(0)
        while True:
            step += 1
            save(Path(directory), step)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def children():
    """Starts savers in processes of their own: `start(how, number, directory)` -> pid, then `end()` -> wait status."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", CHILDREN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout.readline() == "ready\n"

        def start(how, number, directory):
            print(how, number, directory, file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield start, lambda: int(server.stdout.readline())
        server.stdin.close()


@pytest.fixture
def memory():
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        yield Path(directory)


def assert_whole(state):
    """Every part of the state is of the same save."""
    step = state["step"]
    assert state["numbers"] == [step] * 1000
    assert all(bool((weights == step).all()) and weights.shape == (20_000,) for weights in state["weights"])


def test_a_saver_killed_at_any_moment_leaves_whole_checkpoints(tmp_path, children):
    start, end = children
    moments, newest = random.Random(0), 0
    for _ in range(15):
        child = start("forever", newest, tmp_path)
        time.sleep(moments.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert end() == signal.SIGKILL
        found = latest_checkpoint(tmp_path)
        step = 0
        if found is not None:
            assert_whole(found[1])
            step = found[1]["step"]
        assert step >= newest
        newest = step
    assert newest > 0
    save_checkpoint(tmp_path, newest + 1, {}, keep=1)
    assert names(tmp_path) == [f"step-{newest + 1:06d}"]


@pytest.mark.parametrize("step", [3, 2], ids=["adding", "replacing"])
def test_a_kill_before_any_single_change_of_the_disk(memory, children, step):
    start, end = children
    before = memory / "before"
    weights = [torch.zeros(20_000)] * 3
    for earlier in (1, 2):
        save_checkpoint(before, earlier, {"step": 0, "weights": weights, "numbers": [0] * 1000, "of": earlier})
    outcomes = []
    for change in range(1, 200):
        directory = memory / f"{change}"
        shutil.copytree(before, directory)
        start("once", change * 1000 + step, directory)
        status = end()
        assert status in (0, signal.SIGKILL)
        path, state = latest_checkpoint(directory)
        assert_whole(state)
        outcomes.append(state["step"])
        assert state["step"] == step or state["of"] == 2  # the new one, or the newest from before: never an older one
        save_checkpoint(directory, 4, {}, keep=9)
        assert all(name.startswith("step-") for name in names(directory))
        for path in directory.iterdir():
            load_checkpoint(path)  # what half was deleted is out of sight
        shutil.rmtree(directory)
        if status == 0:
            break
    assert status == 0  # the last trial went through, so every change was tried
    assert outcomes == sorted(outcomes)  # first the old one, then for good the new one
    assert outcomes[0] == 0
    assert outcomes[-1] == step
    assert len(outcomes) > 10


# --- random state ----------------------------------------------------------------------------------------------------


def draws():
    return [
        random.random(), random.gauss(), np.random.normal(), np.random.randint(1000), torch.randn(3).tolist(),
        torch.rand(1).item(),
    ]  # fmt: skip


def test_random_state_of_every_kind_comes_back(tmp_path):
    draws()  # leaves the second normal of a pair waiting in python's and in numpy's generator
    state = rng_state()
    expected = draws()  # before anything else: beartype, at work under pytest, draws from python's generator, too
    assert draws() != expected
    path = save_checkpoint(tmp_path, 1, {"rng": state})
    restore_rng_state(load_checkpoint(path)["rng"])
    assert draws() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_state_of_every_cuda_device_comes_back(tmp_path):
    devices = range(torch.cuda.device_count())
    path = save_checkpoint(tmp_path, 1, {"rng": rng_state()})
    expected = [torch.randn(3, device=f"cuda:{device}").tolist() for device in devices]
    restore_rng_state(load_checkpoint(path)["rng"])
    assert [torch.randn(3, device=f"cuda:{device}").tolist() for device in devices] == expected


def test_another_number_of_devices_is_refused_and_nothing_restored():
    state, expected = rng_state(), torch.get_rng_state()
    torch.rand(1)
    moved = torch.get_rng_state()
    state["cuda"] = [*state["cuda"], expected]
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        restore_rng_state(state)
    assert torch.equal(torch.get_rng_state(), moved)


# --- single files ----------------------------------------------------------------------------------------------------


def test_atomic_write(tmp_path):
    path = tmp_path / "run" / "config.yaml"
    atomic_write(path, "a: é\n")
    assert path.read_bytes() == "a: é\n".encode()
    atomic_write(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert names(path.parent) == ["config.yaml"]
    os.link(path, tmp_path / "old")
    atomic_write(path, "new")
    assert (tmp_path / "old").read_bytes() == b"\x00\r\n"  # another file took its place; this one was not touched


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "README.md"
    atomic_write(path, "old")
    with files_at_most(1000), pytest.raises(UserError, match=r"cannot write .*README.md: File too large"):
        atomic_write(path, "new" * 1000)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["README.md"]


def test_json_lines_come_back_and_nan_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "reward": 0.1, "kl": math.nan, "parts": {"a": [math.inf, 2.0]}, "name": "é"})
    append_jsonl(path, {"step": 2, "reward": -math.inf})
    assert path.read_bytes().count(b"\n") == 2
    assert read_jsonl(path) == [
        {"step": 1, "reward": 0.1, "kl": None, "parts": {"a": [None, 2.0]}, "name": "é"},
        {"step": 2, "reward": None},
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has this always-full device")
def test_a_full_disk_under_json_lines_gives_one_line():
    with pytest.raises(UserError, match="/dev/full: No space left on device"):
        append_jsonl(Path("/dev/full"), {"step": 1})


def test_missing_json_lines_give_one_line(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "metrics.jsonl")


def lines(*steps):
    return b"".join(b'{"step":%d,   "x": 0.10}\n' % step for step in steps)  # not as json.dumps spaces it


def test_later_rows_and_a_torn_line_are_dropped_and_the_rest_is_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    header = b'{"run": "demo"}\n'
    path.write_bytes(header + lines(0, 5, 10, 15) + b'{"step": 20, "rew')
    truncate_jsonl(path, 10)
    assert path.read_bytes() == header + lines(0, 5, 10)
    truncate_jsonl(path, 4)
    assert path.read_bytes() == header + lines(0)
    truncate_jsonl(path, -1)
    assert path.read_bytes() == header
    assert names(tmp_path) == ["metrics.jsonl"]
    truncate_jsonl(tmp_path / "nowhere.jsonl", 10)
    assert names(tmp_path) == ["metrics.jsonl"]


@given(st.data())
def test_a_file_cut_anywhere_gives_the_rows_before_the_cut(data):
    content = lines(*range(4))
    cut = data.draw(st.integers(0, len(content)))
    tail = data.draw(st.sampled_from([b"", b"\0\0\0", b"\xff"]))  # what file systems leave after a power cut
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        path = Path(directory) / "metrics.jsonl"
        path.write_bytes(content[:cut] + tail)
        length = len(lines(0))
        complete = (cut + 1) // length if not tail else cut // length  # a row that lacks but its newline is whole
        assert [row["step"] for row in read_jsonl(path)] == list(range(complete))
        truncate_jsonl(path, 9)
        append_jsonl(path, {"step": 9})
        assert [row["step"] for row in read_jsonl(path)] == [*range(complete), 9]


@pytest.mark.parametrize("bad", [b"{", b"", b"[1]", b"\xff", b"null"])
def test_damage_is_an_error_that_names_the_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    for content in (lines(0) + bad + b"\n" + lines(1), lines(0) + bad + b"\n"):  # the last, but ended: not torn
        path.write_bytes(content)
        for use in (read_jsonl, lambda path: truncate_jsonl(path, 0)):
            with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a JSON object"):
                use(path)
        assert path.read_bytes() == content

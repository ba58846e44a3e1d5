"""Rows come in an order that needs no memory; latents are found by content and survive whatever happens."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.data import LatentStore, Order, Stage
from burnish.errors import UserError

FACTS = {"VAE": "abc", "size": [8, 8]}


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 200))
def test_every_row_comes_once_an_epoch(count, seed, start):
    order = Order([np.arange(count)], seed)
    epoch = order.visits(start * count, (start + 1) * count)
    assert sorted(visit.row for visit in epoch) == list(range(count))
    assert {visit.times for visit in epoch} == {start}


def test_visits_are_a_function_of_their_number():
    order = Order([np.arange(7), np.arange(7, 30)], 3, share=0.8)
    whole = order.visits(0, 100)
    assert whole[37:61] == order.visits(37, 61)
    assert whole != Order([np.arange(7), np.arange(7, 30)], 4, share=0.8).visits(0, 100)


@given(st.floats(0.05, 0.95), st.integers(1, 300))
def test_a_group_has_its_share(share, visits):
    order = Order([np.arange(5), np.arange(5, 16)], 0, share=share)
    first = [visit for visit in order.visits(0, visits) if visit.row < 5]
    assert abs(len(first) - share * visits) <= 1
    counts = Counter(visit.row for visit in first)
    assert not counts or max(counts.values()) - min(counts.get(row, 0) for row in range(5)) <= 1


def test_groups_that_are_none():
    with pytest.raises(ValueError, match="none of them empty"):
        Order([np.arange(0)], 0)
    with pytest.raises(ValueError, match=r"outside \(0, 1\)"):
        Order([np.arange(2), np.arange(2)], 0, share=1.0)


def latent(value: float, moments: int = 1):
    return torch.full((moments, 2, 3), value)


def test_latents_come_back_with_their_std(tmp_path):
    store = LatentStore(tmp_path / "new/latents.sqlite", FACTS)
    keys = [bytes([number]) * 16 for number in range(3)]
    assert store.lacks(keys) == set(keys)
    store.put({keys[0]: torch.stack([latent(1.5)[0], latent(0.25)[0]]), keys[1]: latent(-2.0, 2)})
    assert store.lacks(keys) == {keys[2]}
    mean, std = store.latents([keys[1], keys[0], keys[1]], (2, 3))
    assert mean[:, 0, 0].tolist() == [-2, 1.5, -2]
    assert std is not None
    assert std[1].unique().tolist() == [0.25]
    with pytest.raises(UserError, match="a latent of the set is gone"):
        store.latents([keys[2]], (2, 3))


def test_a_vae_without_posterior_has_no_std(tmp_path):
    store = LatentStore(tmp_path / "latents.sqlite", FACTS)
    store.put({b"a" * 16: latent(3.0)})
    mean, std = store.latents([b"a" * 16], (2, 3))
    assert std is None
    assert mean.shape == (1, 2, 3)


def test_rows_and_errors_come_back(tmp_path):
    store = LatentStore(tmp_path / "latents.sqlite", FACTS)
    stages = [
        Stage(f"row {n}", f"prompt {n}", (bytes([n]) * 16, bytes([n + 1]) * 16), (1.0, float(n))) for n in range(5)
    ]
    assert store.census("set") is None
    part = store.begin("set")
    store.add(part, 0, stages[:2])
    assert store.census("set") is None  # not whole yet
    part = store.begin("set")  # so it begins anew
    store.add(part, 0, stages[:3])
    store.add(part, 3, stages[3:])
    store.finish("set", {"rows": 5})
    assert store.census("set") == {"rows": 5}
    assert store.rows("set", [4, 0, 4]) == [stages[4], stages[0], stages[4]]
    assert store.first_scores("set").tolist() == [1.0] * 5
    store.put_errors("base", {(1, 0): [0.5, 0.25]})
    assert store.errors("base", [(1, 0), (1, 1)]) == [[0.5, 0.25], None]
    assert store.errors("other", [(1, 0)]) == [None]


def test_another_vae_is_one_line(tmp_path):
    LatentStore(tmp_path / "latents.sqlite", FACTS)
    with pytest.raises(UserError, match='was made with another VAE \\("abc", now "xyz"\\): give another') as raised:
        LatentStore(tmp_path / "latents.sqlite", FACTS | {"VAE": "xyz"})
    assert "\n" not in str(raised.value)
    (tmp_path / "no.sqlite").write_text("this is no database, whatever its name may say" * 30)
    with pytest.raises(UserError, match=r"data\.cache=.*no\.sqlite"):
        LatentStore(tmp_path / "no.sqlite", FACTS)


WRITES = """
import sys, torch
from burnish.data import LatentStore
store = LatentStore(sys.argv[1], {})
for number in range(10**6):
    store.put({bytes(f"{number:08d}{side:08d}", "ascii"): torch.full((1, 64, 64), float(number)) for side in (0, 1)})
    print(number, flush=True)
"""


def test_a_kill_leaves_what_was_written_whole(tmp_path):
    """Both latents of a commit, or none; and the next process goes on."""
    path = tmp_path / "latents.sqlite"
    process = subprocess.Popen([sys.executable, "-c", WRITES, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 20:
            break
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    last = max([20, *(int(line) for line in process.stdout.read().split())])
    process.wait()
    process.stdout.close()
    store = LatentStore(path, {})
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (count,) = file.execute("SELECT COUNT(*) FROM pictures").fetchone()
    assert count % 2 == 0
    assert count >= 2 * (last + 1)
    mean, _ = store.latents([bytes(f"{last:08d}{0:08d}", "ascii")], (64, 64))
    assert mean.unique().tolist() == [last]
    store.put({b"n" * 16: torch.zeros(1, 64, 64)})

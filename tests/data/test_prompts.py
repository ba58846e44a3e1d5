import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data import PromptStream, load_prompts, resolve
from burnish.errors import UserError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_text_is_a_prompt_a_line(tmp_path):
    source = write(tmp_path / "prompts.txt", "a red circle\r\n  two dogs \na café\u2028bar")
    assert [row["prompt"] for row in load_prompts(source)] == ["a red circle", "two dogs", "a café\u2028bar"]


def test_json_lines_keep_their_metadata(tmp_path):
    rows = [
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"},
        {"prompt": "一只狗\u2028"},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert load_prompts(write(tmp_path / "prompts.jsonl", text)) == rows
    assert load_prompts(tmp_path / "prompts.jsonl") == rows  # a Path, too
    assert load_prompts(write(tmp_path / "marked.jsonl", b"\xef\xbb\xbf" + text.encode())) == rows


@pytest.mark.parametrize(
    ("name", "content", "where", "why"),
    [
        ("prompts.txt", "", "prompts.txt:", "empty"),
        ("prompts.jsonl", "", "prompts.jsonl:", "empty"),
        ("prompts.txt", "\n", "prompts.txt:", "empty"),
        ("prompts.txt", "a dog\n \na cat\n", "line 2:", "the prompt is empty"),
        ("prompts.jsonl", '{"prompt": "a dog"}\n{"prompt": ""}', "line 2:", "the prompt is empty"),
        ("prompts.jsonl", '{"prompt": " "}', "line 1:", "the prompt is empty"),
        ("prompts.jsonl", '["prompt"]', "line 1:", 'no "prompt" in'),
        ("prompts.jsonl", "3", "line 1:", 'no "prompt" in 3'),
        ("prompts.jsonl", '{"prompt": "a dog"}\n\n{"prompt": "a cat"}', "line 2:", "not JSON"),
        ("prompts.jsonl", '{"prompt": "a dog"', "line 1:", "not JSON"),
        ("prompts.jsonl", '{"caption": "a dog"}', "line 1:", "the keys 'caption'"),
        ("prompts.jsonl", '["a dog"]', "line 1:", 'no "prompt" in ["a dog"]'),
        ("prompts.jsonl", '{"prompt": "a dog"}\n{"prompt": 3}', "line 2:", "no string"),
        ("prompts.jsonl", '{"prompt": null}', "line 1:", "no string"),
        ("prompts.txt", b"a dog\na caf\xe9\n", "line 2:", "UTF-8"),
        ("prompts.csv", "a dog", "prompts.csv:", ".txt or .jsonl"),
        ("prompts", "a dog", "prompts:", ".txt or .jsonl"),
    ],
)
def test_a_bad_file_gives_one_line_that_says_where(tmp_path, name, content, where, why):
    with pytest.raises(UserError) as caught:
        load_prompts(write(tmp_path / name, content))
    message = str(caught.value)
    assert where in message
    assert why in message
    assert "\n" not in message


def test_a_missing_file_or_a_directory_gives_one_line(tmp_path):
    (tmp_path / "directory.txt").mkdir()
    for name, why in (("nowhere.txt", "No such file"), ("directory.txt", "directory")):
        with pytest.raises(UserError, match=why) as caught:
            load_prompts(str(tmp_path / name))
        assert "\n" not in str(caught.value)


# --- package: --------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    inner = tmp_path / "burnish_test_package" / "inner"
    (inner / "files").mkdir(parents=True)
    for directory in (inner, inner.parent):
        write(directory / "__init__.py", "")
    write(inner / "module.py", "")
    write(inner / "files" / "prompts.txt", "a dog")
    monkeypatch.syspath_prepend(tmp_path)
    yield inner
    for name in [name for name in sys.modules if name.startswith("burnish_test_package")]:
        del sys.modules[name]


def test_package_sources(package):
    source = "package:burnish_test_package.inner/files/prompts.txt"
    assert resolve(source) == package / "files" / "prompts.txt"
    assert load_prompts(source) == [{"prompt": "a dog"}]
    assert resolve("package:burnish_test_package.inner/files") == package / "files"  # a model is a directory


@pytest.mark.parametrize("source", ["stabilityai/stable-diffusion-3.5-medium", "prompts/train.txt", "/a/package:b/c"])
def test_other_sources_stay_as_they_are(source):
    assert str(resolve(source)) == source


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("package:no_such_package/prompts.txt", "No module named 'no_such_package'"),
        ("package:burnish_test_package.none/prompts.txt", "none"),
        ("package:burnish_test_package.inner/none.txt", "has no file none.txt"),
        ("package:burnish_test_package.inner", "some.module/relative/path"),
        ("package:burnish_test_package.inner/", "some.module/relative/path"),
        ("package:/prompts.txt", "some.module/relative/path"),
        ("package:", "some.module/relative/path"),
        ("package:..x/prompts.txt", "relative import"),
    ],
)
def test_a_bad_package_source_gives_one_line(package, source, why):
    with pytest.raises(UserError, match=why) as caught:
        load_prompts(source)
    assert str(caught.value).startswith(source)
    assert "\n" not in str(caught.value)


# --- the order of training -------------------------------------------------------------------------------------------


def stream(count, per_round, seed=0, focus=0.0):
    rows = [{"prompt": str(number)} for number in range(count)]
    return PromptStream(rows, seed=seed, per_round=per_round, focus=focus)


def drawn(prompts, rounds):
    return [int(row["prompt"]) for index in rounds for row in prompts.round(index)]


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 2**32))
def test_each_epoch_visits_every_prompt_once(count, per_round, seed):
    order = drawn(stream(count, per_round, seed), range(3 * count))  # 3 * per_round epochs, whether they divide or not
    assert len(order) == 3 * count * per_round
    for epoch in range(3 * per_round):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 100))
def test_a_round_depends_on_seed_and_index_alone(count, per_round, index):
    resumed = stream(count, per_round)
    assert resumed.round(index) == drawn_before(count, per_round, index)
    assert len(resumed.round(index)) == per_round


def drawn_before(count, per_round, index):
    prompts = stream(count, per_round)
    return [prompts.round(earlier) for earlier in range(index + 1)][-1]


def test_epochs_and_seeds_differ():
    first, second = drawn(stream(50, 50), [0]), drawn(stream(50, 50), [1])
    other = drawn(stream(50, 50, seed=1), [0])
    assert list(range(50)) != first != second
    assert first != other != second


def teach(prompts, rounds, spread):
    """Let the stream see rounds in which prompt number n has spread[n]."""
    for index in rounds:
        prompts.saw(prompts.places(index), [spread[int(row["prompt"])] for row in prompts.round(index)])
    return prompts


@given(st.integers(1, 30), st.integers(1, 10), st.floats(0, 0.99), st.integers(0, 100))
def test_what_is_not_focused_comes_in_turn(count, per_round, focus, seed):
    prompts = stream(count, per_round, seed, focus)
    in_turn = per_round - int(per_round * focus)
    assert 1 <= in_turn <= per_round
    rounds = [drawn(teach(prompts, [index], [0.5] * count), [index]) for index in range(3 * count)]
    assert {len(each) for each in rounds} == {per_round}
    order = [number for each in rounds for number in each[:in_turn]]
    assert order == drawn(stream(count, in_turn, seed), range(3 * count))
    if count >= 2 * per_round:
        assert all(len(set(each[in_turn:])) == len(each[in_turn:]) for each in rounds)
        assert not any(set(each[:in_turn]) & set(each[in_turn:]) for each in rounds)


def test_focus_follows_the_spread():
    spread = [0.0] * 60 + [0.1] * 20 + [0.3] * 20
    prompts = teach(stream(100, 20, focus=0.5), range(10), spread)  # ten epochs of ten: all were seen
    focused = [number for index in range(10, 410) for number in drawn(prompts, [index])[10:]]
    never, some, most = (sum(low <= n < high for n in focused) / 4000 for low, high in ((0, 60), (60, 80), (80, 100)))
    assert never < 0.05
    assert some + most > 0.95
    assert 1.5 < most / some < 3.1  # three to one, less what comes twice, which no round has


def test_an_unseen_prompt_may_be_the_best():
    for spread in (0.0, 0.2):
        prompts = teach(stream(100, 20, focus=0.5), [0], [0.0] * 99 + [spread])
        seen = set(drawn(stream(100, 20, focus=0.5), [0]))
        later = [number for index in range(1, 101) for number in drawn(prompts, [index])[10:]]
        assert sum(number not in seen for number in later) > 0.95 * len(later)


def test_half_of_what_was_seen_stays():
    prompts = stream(2, 2)
    teach(teach(teach(prompts, [0], [1.0, 0.0]), [1], [0.0, 0.0]), [2], [0.4, 0.0])
    assert prompts.spread.tolist() == [pytest.approx(0.45), 0]


def test_a_stream_goes_on_from_its_state():
    first, second = stream(50, 8, focus=0.5), stream(50, 8, focus=0.5)
    spread = [number / 50 for number in range(50)]
    teach(first, range(20), spread)
    second.load_state_dict(first.state_dict())
    teach(first, range(20, 25), spread)
    teach(second, range(20, 25), spread)
    assert drawn(first, range(20, 30)) == drawn(second, range(20, 30)) != drawn(stream(50, 8, focus=0.5), range(20, 30))
    with pytest.raises(UserError, match="trained on 50 prompts, and now there are 51"):
        stream(51, 8).load_state_dict(first.state_dict())


@pytest.mark.parametrize("focus", [-0.1, 1.0])
def test_a_focus_on_everything_is_refused(focus):
    with pytest.raises(ValueError, match="some prompts have to come in turn"):
        stream(3, 1, focus=focus)


def test_metadata_comes_along():
    rows = [{"prompt": "a dog", "tag": "single_object"}]
    assert PromptStream(rows, seed=0, per_round=2).round(3) == rows * 2


@pytest.mark.parametrize(("count", "per_round"), [(0, 1), (3, 0), (3, -1)])
def test_no_prompts_are_refused(count, per_round):
    with pytest.raises(ValueError, match="at least 1"):
        stream(count, per_round)
    with pytest.raises(ValueError, match="from 0"):
        stream(3, 1).round(-1)

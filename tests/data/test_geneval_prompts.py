"""GenEval's prompts, made anew."""

import itertools
import json
from collections import Counter

import pytest

from burnish.data import load_prompts
from burnish.data.geneval import CLASSES, COLORS, DRAWS, RELATIONS, geneval_prompts, plural, with_article, write
from burnish.rewards.rules.geneval_rules import geneval_verdict

OFFICIAL = list(geneval_prompts())


def of(tag, rows=OFFICIAL):
    return [row for row in rows if row["tag"] == tag]


def test_the_benchmark_itself_comes_from_its_seed():
    # The counts and first prompts of the published evaluation_metadata.jsonl, 553 lines.
    assert Counter(row["tag"] for row in OFFICIAL) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip
    assert [row["prompt"] for row in OFFICIAL[:3]] == ["a photo of a bench", "a photo of a cow", "a photo of a bicycle"]
    firsts = [of(tag)[0]["prompt"] for tag in DRAWS][1:]
    assert firsts == [
        "a photo of a bench and a sports ball",
        "a photo of two clocks",
        "a photo of a blue fire hydrant",
        "a photo of a dog right of a teddy bear",
        "a photo of a purple wine glass and a black apple",
    ]


def test_the_metadata_are_the_benchmarks():
    assert OFFICIAL[0] == {
        "tag": "single_object", "include": [{"class": "bench", "count": 1}], "exclude": [],
        "prompt": "a photo of a bench",
    }  # fmt: skip
    assert of("counting")[0]["include"] == [{"class": "clock", "count": 2}]
    assert of("counting")[0]["exclude"] == [{"class": "clock", "count": 3}]
    assert of("position")[0]["include"] == [
        {"class": "teddy bear", "count": 1},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
    ]
    assert of("color_attr")[0]["include"] == [
        {"class": "wine glass", "count": 1, "color": "purple"},
        {"class": "apple", "count": 1, "color": "black"},
    ]


def test_coco_has_80_classes_and_three_of_them_another_name():
    assert len(set(CLASSES)) == len(CLASSES) == 80
    assert {"computer mouse", "tv remote", "computer keyboard"} < set(CLASSES)
    assert CLASSES[0] == "person"  # which the draws of coloured things leave out
    assert len(set(COLORS)) == 10


def test_articles_and_plurals():
    assert [with_article(name) for name in ("apple", "umbrella", "bus", "hair drier")] == [
        "an apple", "an umbrella", "a bus", "a hair drier",
    ]  # fmt: skip
    assert [plural(name) for name in ("bus", "dog", "skis", "sandwich")] == ["buses", "dogs", "skises", "sandwichs"]


def words(row):
    """The prompt of a row, put together from its metadata."""
    things = row["include"]
    names = [with_article(" ".join(filter(None, (one.get("color"), one["class"])))) for one in things]
    match row["tag"]:
        case "counting":
            return f"{ {2: 'two', 3: 'three', 4: 'four'}[things[0]['count']] } {plural(things[0]['class'])}"
        case "position":
            return f"{names[1]} {things[1]['position'][0]} {names[0]}"
    return " and ".join(names)


@pytest.mark.parametrize("seed", [43, 0, 1])
def test_prompts_say_what_their_metadata_ask_for(seed):
    for row in geneval_prompts(seed=seed):
        assert list(row) == ["tag", "include", "exclude", "prompt"]
        assert row["prompt"] == f"a photo of {words(row)}"


SIDES = {"left of": (-40, 0), "right of": (40, 0), "above": (0, -40), "below": (0, 40)}


def shown(row):
    """Detections of just what a prompt asks for."""
    found = []
    for place, clause in enumerate(row["include"]):
        relation = clause.get("position", [None])[0]
        x, y = SIDES[relation] if relation else (0, 0) if row["tag"] == "position" else (100 * place, 0)
        for number in range(clause["count"]):
            box = (x + 200 * number, y, x + 10 + 200 * number, y + 10)
            found.append({"class": clause["class"], "confidence": 0.95, "box": box, "color": clause.get("color")})
    return found


def test_every_prompt_can_be_shown_and_failed():
    for row in OFFICIAL:
        assert geneval_verdict(shown(row), row) == (True, [], 1.0)
        assert not geneval_verdict(shown(row)[:-1], row).correct
    for row in of("counting"):
        assert not geneval_verdict([*shown(row), shown(row)[0]], row).correct  # one more than asked for
    for row in of("position"):
        other = {**row, "include": [row["include"][0], {**row["include"][1], "position": [RELATIONS[0], 0]}]}
        assert geneval_verdict(shown(row), other).correct is (row["include"][1]["position"][0] == RELATIONS[0])


def test_what_may_be_drawn_and_how_often():
    # 4000 draws each: a share p has a standard deviation of sqrt(p (1 - p) / 4000), at most 0.8%; five of them allowed.
    rows = list(geneval_prompts(draws=dict.fromkeys(DRAWS, 4000), seed=7))
    counts = Counter(row["include"][0]["count"] for row in of("counting", rows))
    assert set(counts) == {2, 3, 4}
    assert len(of("counting", rows)) == 240  # all of 80 classes by three numbers
    assert len(of("colors", rows)) > 770  # of 79 x 10; exp(-4000 / 790) = 0.6% are missed
    assert len(of("single_object", rows)) == 80
    colored = [clause for row in rows for clause in row["include"] if "color" in clause]
    assert all(clause["class"] != "person" for clause in colored)
    assert {clause["class"] for clause in colored} == set(CLASSES) - {"person"}
    relations = Counter(row["include"][1]["position"][0] for row in of("position", rows))
    assert set(relations) == set(RELATIONS)
    assert all(abs(number / relations.total() - 1 / 4) < 0.035 for number in relations.values())
    for row in [*of("color_attr", rows), *of("two_object", rows), *of("position", rows)]:
        one, other = row["include"]
        assert one["class"] != other["class"]
    shades = Counter(clause["color"] for row in of("color_attr", rows) for clause in row["include"])
    assert all(abs(number / shades.total() - 1 / 10) < 0.02 for number in shades.values())
    for row in of("color_attr", rows):
        assert row["include"][0]["color"] != row["include"][1]["color"]


def test_a_seed_is_a_set_and_none_comes_twice():
    assert list(geneval_prompts()) == OFFICIAL
    other = list(geneval_prompts(seed=44))
    assert other != OFFICIAL
    for rows in (OFFICIAL, other):
        said = [json.dumps(row) for row in rows]
        assert len(set(said)) == len(said)


def test_some_kinds_only():
    rows = list(geneval_prompts(draws={"counting": 5, "position": 3}, seed=1))
    assert Counter(row["tag"] for row in rows) == {"counting": 5, "position": 3}
    assert list(geneval_prompts(draws={})) == []
    with pytest.raises(ValueError, match="no kind 'colour': GenEval's are single_object"):
        list(geneval_prompts(draws={"colour": 3}))


def test_training_prompts_leave_the_benchmark_out():
    draws = dict.fromkeys(DRAWS, 400)
    everything, rest = (list(geneval_prompts(draws=draws, seed=1, without=left_out)) for left_out in ((), OFFICIAL))
    taken = {row["prompt"] for row in OFFICIAL}
    assert taken & {row["prompt"] for row in everything}
    assert not taken & {row["prompt"] for row in rest}
    # The same two things in the other order are the same, but not what stands left of what.
    swapped = {
        (row["tag"], *order)
        for row in OFFICIAL
        if row["tag"] == "two_object"
        for order in itertools.permutations(clause["class"] for clause in row["include"])
    }
    assert not swapped & {(row["tag"], *(clause["class"] for clause in row["include"])) for row in rest}
    assert not of("single_object", rest)


def test_order_matters_where_a_position_points():
    (one,) = geneval_prompts(draws={"position": 1}, seed=3)
    turned = {**one, "include": [{**one["include"][1]}, {**one["include"][0]}]}
    again = list(geneval_prompts(draws={"position": 1}, seed=3, without=[turned]))
    assert again == [one]
    assert list(geneval_prompts(draws={"position": 1}, seed=3, without=[one])) == []


def test_written_as_the_prompt_files_are(tmp_path):
    write(OFFICIAL, tmp_path / "geneval.jsonl")
    assert load_prompts(tmp_path / "geneval.jsonl") == OFFICIAL
    assert (tmp_path / "geneval.jsonl").read_text().count("\n") == 553

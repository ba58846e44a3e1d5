from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from burnish.data import load_prompts
from burnish.worlds.shapes import captions
from burnish.worlds.shapes.pipelines import MAX_TOKENS, build_tokenizer
from burnish.worlds.shapes.scenes import COLORS, SHAPES

ALL = list(captions.prompts())
TRAIN, HELD_OUT = ([p for p in ALL if p["held_out"] == held_out] for held_out in (False, True))


@pytest.mark.parametrize("kind", captions.KINDS)
def test_every_kind_has_prompts_to_train_on_and_enough_to_hold_out(kind):
    assert sum(p["tag"] == kind for p in HELD_OUT) >= 20
    assert sum(p["tag"] == kind for p in TRAIN) >= 40


def test_the_kinds_are_genevals():
    assert set(captions.KINDS) == {p["tag"] for p in ALL}
    assert len(captions.KINDS) == 6


def test_no_prompt_comes_twice():
    assert max(Counter(p["prompt"] for p in ALL).values()) == 1


def test_held_out_pairs_are_in_no_training_prompt_of_any_kind():
    written = {(color, name) for color, s in captions.HELD_OUT_PAIRS for name in (s, captions.plural(s))}
    assert len(written) == 8
    for prompt in TRAIN:
        assert written.isdisjoint(pairwise(prompt["prompt"].split())), prompt["prompt"]
        assert captions.HELD_OUT_PAIRS.isdisjoint((c.get("color"), c["class"]) for c in prompt["include"])
    assert all(any(pair in pairwise(p["prompt"].split()) for p in HELD_OUT) for pair in written)


def test_held_out_combinations_are_held_out_and_nothing_else_is():
    for prompt in ALL:
        include, tag = prompt["include"], prompt["tag"]
        classes = tuple(clause["class"] for clause in include)
        has_pair = any((clause.get("color"), clause["class"]) in captions.HELD_OUT_PAIRS for clause in include)
        if tag in ("colors", "color_attr"):
            assert prompt["held_out"] == has_pair
        elif tag == "two_object":
            assert prompt["held_out"] == (classes in captions.HELD_OUT_ORDERS)
        elif tag == "position":
            triple = (classes[1], include[1]["position"][0], classes[0])
            assert prompt["held_out"] == (triple in captions.HELD_OUT_TRIPLES)
        elif tag == "counting":
            assert prompt["held_out"] or not has_pair


def test_what_is_held_out_is_seen_in_parts():
    """Each colour, shape, relation and number is trained on; only their combinations are new."""
    trained = {word for prompt in TRAIN for word in prompt["prompt"].split()}
    assert trained == set(captions.vocabulary())
    assert {pair[0] for pair in captions.HELD_OUT_PAIRS} <= set(COLORS)
    assert {pair[1] for pair in captions.HELD_OUT_PAIRS} == set(SHAPES)


def test_the_prompt_says_what_its_metadata_asks_for():
    for prompt in ALL:
        words = prompt["prompt"].split()
        for clause in prompt["include"]:
            name = clause["class"] if clause["count"] == 1 else captions.plural(clause["class"])
            assert name in words
            if "color" in clause:
                assert words[words.index(name) - 1] == clause["color"]
            if clause["count"] > 1:
                assert captions.NUMBERS[clause["count"]] in words
            if "position" in clause:
                relation, target = clause["position"]
                other = prompt["include"][target]["class"]
                assert prompt["prompt"].endswith(f"a {clause['class']} {relation} a {other}")


def test_metadata_excludes_all_that_was_not_asked_for():
    for prompt in ALL:
        allowed = {clause["class"]: clause["count"] - 1 for clause in prompt["exclude"]}
        asked = {clause["class"]: clause["count"] for clause in prompt["include"]}
        assert allowed == {**dict.fromkeys(SHAPES, 0), captions.NOT_A_SHAPE: 0, **asked}


def test_one_token_a_word_and_every_prompt_fits():
    tokenizer = build_tokenizer()
    for word in captions.vocabulary():
        assert len(tokenizer(word).input_ids) == 3, word  # between the two that mark the ends
    for prompt in ALL:
        ids = tokenizer(prompt["prompt"]).input_ids
        assert len(ids) == len(prompt["prompt"].split()) + 2 <= MAX_TOKENS
        assert tokenizer.unk_token_id not in ids[1:-1]
    some = ALL[:: len(ALL) // 50]
    for prompt in some:
        ids = tokenizer(prompt["prompt"]).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt["prompt"]
    assert len(tokenizer("a zebra", padding="max_length").input_ids) == MAX_TOKENS


def test_selection_is_even_and_without_repetition():
    for held_out, each in ((False, 96), (True, 24)):
        chosen = captions.selection(each, held_out=held_out)
        assert all(p["held_out"] == held_out for p in chosen)
        assert len({p["prompt"] for p in chosen}) == len(chosen)
        for kind in captions.KINDS:
            available = sum(p["tag"] == kind and p["held_out"] == held_out for p in ALL)
            assert sum(p["tag"] == kind for p in chosen) == min(each, available)


def test_the_shipped_files_are_the_selection(tmp_path):
    captions.write(tmp_path)
    for name, each in (("train", 96), ("held_out", 24)):
        shipped = Path(captions.__file__).parent / "prompts" / f"{name}.jsonl"
        assert shipped.read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
        rows = load_prompts(f"package:burnish.worlds.shapes/prompts/{name}.jsonl")
        expected = captions.selection(each, held_out=name == "held_out")
        assert rows == [{key: value for key, value in p.items() if key != "held_out"} for p in expected]

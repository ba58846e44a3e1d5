from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from burnish.data import load_prompts
from burnish.worlds.shapes import captions
from burnish.worlds.shapes.pipelines import MAX_TOKENS, build_tokenizer
from burnish.worlds.shapes.scenes import COLORS, SHAPES

ALL = list(captions.prompts())
BASE, POST, HELD_OUT = ([p for p in ALL if p["split"] == split] for split in ("base", "post", "held_out"))


@pytest.mark.parametrize("kind", captions.KINDS)
def test_every_kind_has_prompts_to_train_on_and_enough_to_hold_out(kind):
    assert sum(p["tag"] == kind for p in HELD_OUT) >= 20
    assert sum(p["tag"] == kind for p in BASE) >= 40


def test_the_kinds_are_genevals():
    assert set(captions.KINDS) == {p["tag"] for p in ALL}
    assert len(captions.KINDS) == 6


def test_no_prompt_comes_twice():
    assert max(Counter(p["prompt"] for p in ALL).values()) == 1


def test_unseen_pairs_are_in_no_prompt_of_the_base_models():
    written = {(color, name) for color, s in captions.UNSEEN_PAIRS for name in (s, captions.plural(s))}
    assert len(written) == 8
    for prompt in BASE:
        assert written.isdisjoint(pairwise(prompt["prompt"].split())), prompt["prompt"]
        assert captions.UNSEEN_PAIRS.isdisjoint((c.get("color"), c["class"]) for c in prompt["include"])
    assert all(any(pair in pairwise(p["prompt"].split()) for p in POST + HELD_OUT) for pair in written)


def test_what_is_asked_for_in_the_end_is_in_no_prompt_that_is_trained_on_however_it_is_said():
    def scene(prompt):
        clauses = (tuple(sorted((name, str(value)) for name, value in c.items())) for c in prompt["include"])
        return prompt["tag"], frozenset(clauses)

    # single_object has nothing to combine, so wordings are held out; of two_object the order of words is
    scenes = {scene(p) for p in HELD_OUT if p["tag"] not in ("single_object", "two_object")}
    assert scenes.isdisjoint(map(scene, BASE + POST))
    assert {p["prompt"] for p in HELD_OUT}.isdisjoint(p["prompt"] for p in BASE + POST)


def test_combinations_are_in_the_split_that_the_rules_give():
    for prompt in ALL:
        include, tag = prompt["include"], prompt["tag"]
        classes = tuple(clause["class"] for clause in include)
        has_pair = any((clause.get("color"), clause["class"]) in captions.UNSEEN_PAIRS for clause in include)
        held_out = prompt["split"] == "held_out"
        if tag == "colors":
            assert held_out == has_pair
        elif tag == "color_attr":
            assert (prompt["split"] == "base") == (not has_pair)
        elif tag == "two_object":
            assert held_out == (classes in captions.HELD_OUT_ORDERS)
        elif tag == "position":
            triple = (classes[1], include[1]["position"][0], classes[0])
            assert held_out == (triple in captions.HELD_OUT_TRIPLES)
        elif tag == "counting":
            assert held_out or (prompt["split"] == "post") == has_pair


def test_what_is_held_out_is_seen_in_parts():
    """The base models train on each colour, shape, relation and number; post-training on each colour-shape pair too."""
    assert {word for prompt in BASE for word in prompt["prompt"].split()} == set(captions.vocabulary())
    assert {pair[0] for pair in captions.UNSEEN_PAIRS} <= set(COLORS)
    assert {pair[1] for pair in captions.UNSEEN_PAIRS} == set(SHAPES)
    shipped = captions.selection(captions.FILES["train"][0], "base", "post")
    for color, shape in captions.UNSEEN_PAIRS:
        asking = [p for p in shipped if any((c.get("color"), c["class"]) == (color, shape) for c in p["include"])]
        assert {p["tag"] for p in asking} == {"counting", "color_attr"}


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
    for each, splits in captions.FILES.values():
        chosen = captions.selection(each, *splits)
        assert all(p["split"] in splits for p in chosen)
        assert len({p["prompt"] for p in chosen}) == len(chosen)
        for kind in captions.KINDS:
            available = sum(p["tag"] == kind and p["split"] in splits for p in ALL)
            assert sum(p["tag"] == kind for p in chosen) == min(each, available)


def test_the_shipped_files_are_the_selection(tmp_path):
    captions.write(tmp_path)
    for name, (each, splits) in captions.FILES.items():
        shipped = Path(captions.__file__).parent / "prompts" / f"{name}.jsonl"
        assert shipped.read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
        rows = load_prompts(f"package:burnish.worlds.shapes/prompts/{name}.jsonl")
        expected = captions.selection(each, *splits)
        assert rows == [{key: value for key, value in p.items() if key != "split"} for p in expected]

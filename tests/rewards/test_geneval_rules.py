"""GenEval's rules on synthetic boxes; every expected number is worked out beside it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.evaluation import geneval_verdict, relations

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def thing(name="dog", confidence=0.95, at=(0.0, 0.0), color="red", size=10.0):
    """A detection whose box is centred `at`."""
    x, y = at
    box = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
    return {"class": name, "confidence": confidence, "box": box, "color": color}


def asked(*include, tag="two_object", exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def clause(name="dog", count=1, **rules):
    return {"class": name, "count": count, **rules}


def many(count, **properties):
    return [thing(**properties) for _ in range(count)]


# --- relations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-30.0, 0.0), {"left of"}),
        ((30.0, 0.0), {"right of"}),
        ((0.0, -30.0), {"above"}),  # y runs downwards
        ((0.0, 30.0), {"below"}),
        ((-30.0, -30.0), {"left of", "above"}),  # each axis: (30 - 2) / 42.4 = 0.66
        ((30.0, 30.0), {"right of", "below"}),
        ((0.0, 0.0), set()),
    ],
)
def test_the_four_relations_and_the_diagonal(offset, expected):
    assert relations(thing(at=offset)["box"], thing()["box"]) == expected


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        # Two boxes of 10: each axis shrinks by 0.1 * 20 = 2, the length does not shrink. Alone on an axis:
        (2.0, 0.0, set()),  # shrunk to 0
        (3.9, 0.0, set()),  # 1.9 / 3.9 = 0.487
        (4.0, 0.0, set()),  # 2 / 4 = 0.5, and more than one half is asked
        (4.1, 0.0, {"right of"}),  # 2.1 / 4.1 = 0.512
        # With the other axis: (12 - 2) / hypot(12, 16) = 10 / 20 = 0.5, (16 - 2) / 20 = 0.7
        (12.0, 16.0, {"below"}),
        (12.1, 16.0, {"right of", "below"}),  # 10.1 / 20.06 = 0.503
    ],
)
def test_the_margin_is_a_tenth_of_the_sizes_and_the_length_is_unshrunk(dx, dy, expected):
    assert relations(thing(at=(dx, dy))["box"], thing()["box"]) == expected


def test_the_margin_takes_the_size_of_each_axis():
    wide, small = (0.0, 0.0, 100.0, 10.0), (60.0, 0.0, 80.0, 10.0)  # centres 50 and 70, widths 100 + 20
    assert relations(small, wide) == set()  # (20 - 12) / 20 = 0.4
    tall = (45.0, -50.0, 55.0, 50.0)  # width 10, and centred at (50, 0); small now stands 20 right of and 5 below it
    assert relations(small, tall) == {"right of"}  # (20 - 3) / 20.6 = 0.82; 5 - 11 < 0
    assert relations(small, wide, threshold=0.0) == {"right of"}


place = st.floats(-100, 100)
boxes = st.builds(
    lambda x, y, width, height: (x, y, x + width, y + height), place, place, st.floats(1, 60), st.floats(1, 60)
)


@given(boxes, boxes)
def test_relations_are_antisymmetric(one, other):
    there = relations(one, other)
    assert relations(other, one) == {OPPOSITE[relation] for relation in there}
    assert not {OPPOSITE[relation] for relation in there} & there


# --- counts, thresholds, exclude -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "found", "correct", "score"),
    [
        (1, 0, False, 0.0),
        (1, 1, True, 1.0),
        (1, 2, True, 0.0),  # at least is enough for the strict verdict; partial credit wants exactly
        (3, 2, False, 2 / 3),
        (3, 4, True, 2 / 3),
        (2, 7, True, -1.5),  # 1 - 5/2
    ],
)
def test_counts(count, found, correct, score):
    verdict = geneval_verdict(many(found), asked(clause(count=count)))
    assert verdict.correct is correct
    assert verdict.score == pytest.approx(score, rel=0, abs=1e-12)
    assert bool(verdict.reasons) is not correct


def test_a_missing_object_is_named_with_both_counts():
    verdict = geneval_verdict(many(2), asked(clause(count=3)))
    assert verdict.reasons == ["expected dog>=3, found 2"]


@pytest.mark.parametrize(
    ("tag", "confidence", "correct"),
    [
        ("counting", 0.9, False),  # more than the threshold is asked
        ("counting", 0.901, True),
        ("single_object", 0.3, False),
        ("single_object", 0.301, True),
    ],
)
def test_counting_asks_for_more_confidence(tag, confidence, correct):
    assert geneval_verdict([thing(confidence=confidence)], asked(clause(), tag=tag)).correct is correct


def test_thresholds_can_be_set():
    half = [thing(confidence=0.5)]
    assert geneval_verdict(half, asked(clause(), tag="counting"), counting_threshold=0.4).correct
    assert not geneval_verdict(half, asked(clause()), threshold=0.6).correct


def test_exclude_fails_at_its_count_and_does_not_touch_partial_credit():
    counting = asked(clause(count=2), tag="counting", exclude=[clause(count=3)])
    assert geneval_verdict(many(2), counting).correct
    verdict = geneval_verdict(many(3), counting)
    assert verdict.reasons == ["expected dog<3, found 3"]
    assert verdict.score == pytest.approx(1 / 2, rel=0, abs=1e-12)  # the count alone: 1 - 1/2
    other = asked(clause(), exclude=[clause("cat")])
    assert geneval_verdict([thing(), thing("cat")], other) == (False, ["expected cat<1, found 1"], 1.0)


def test_at_most_sixteen_objects_of_a_class_count():
    assert geneval_verdict(many(20), asked(exclude=[clause(count=17)])).correct
    assert not geneval_verdict(many(20), asked(exclude=[clause(count=16)])).correct
    assert not geneval_verdict(many(20), asked(clause(count=3)), max_objects=2).correct


def test_all_clauses_must_hold_and_the_score_is_their_mean():
    verdict = geneval_verdict([thing()], asked(clause(), clause("cat")))
    assert verdict == (False, ["expected cat>=1, found 0"], 0.5)


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "count", "correct", "score"),
    [
        (["red"], 1, True, 1.0),
        (["blue"], 1, False, 1 / 2),  # count 1, colour 1 - 1/1
        (["red", "blue", "blue"], 3, False, (1 + 1 / 3) / 2),
        (["red", "blue"], 3, False, (2 / 3 + 0) / 2),  # a wrong count takes the colour with it
        (["red", "red"], 1, True, 0.0),  # 1 - 1/1, and again
    ],
)
def test_colors(found, count, correct, score):
    verdict = geneval_verdict([thing(color=color) for color in found], asked(clause(count=count, color="red")))
    assert verdict.correct is correct
    assert verdict.score == pytest.approx(score, rel=0, abs=1e-12)


def test_color_is_asked_of_the_most_confident_only():
    red, blue = thing(color="red", confidence=0.8), thing(color="blue", confidence=0.9)
    assert geneval_verdict([red, blue], asked(clause(color="blue"))).correct
    verdict = geneval_verdict([red, blue], asked(clause(color="red")))
    assert verdict.reasons == ["expected red dog>=1, found 0 red"]


# --- positions -------------------------------------------------------------------------------------------------------


def cat_is(relation, color=None):
    target = clause(color=color) if color else clause()
    return asked(target, clause("cat", position=[relation, 0]), tag="position")


@pytest.mark.parametrize("relation", OPPOSITE)
def test_positions(relation):
    at = {"left of": (-30.0, 0.0), "right of": (30.0, 0.0), "above": (0.0, -30.0), "below": (0.0, 30.0)}
    there = [thing(), thing("cat", at=at[relation])]
    assert geneval_verdict(there, cat_is(relation)) == (True, [], 1.0)
    verdict = geneval_verdict(there, cat_is(OPPOSITE[relation]))
    assert verdict.reasons == [f"expected cat {OPPOSITE[relation]} target, found {relation}"]
    assert verdict.score == pytest.approx(2 / 3, rel=0, abs=1e-12)  # both counts, not the position


def test_a_diagonal_satisfies_both_relations():
    there = [thing(), thing("cat", at=(-30.0, -30.0))]
    assert geneval_verdict(there, cat_is("left of")).correct
    assert geneval_verdict(there, cat_is("above")).correct


def test_every_pair_has_to_satisfy_the_relation():
    two_left_of_two = asked(clause(count=2), clause("cat", 2, position=["left of", 0]))
    dogs = [thing(at=(40.0, 0.0)), thing(at=(80.0, 0.0))]
    assert geneval_verdict([*dogs, *many(2, name="cat")], two_left_of_two).correct
    # One cat between the dogs is left of the second dog alone; one dog left of the cats spoils it likewise.
    assert not geneval_verdict([*dogs, thing("cat"), thing("cat", at=(60.0, 0.0))], two_left_of_two).correct
    dogs[1] = thing(at=(-40.0, 0.0))
    verdict = geneval_verdict([*dogs, *many(2, name="cat")], two_left_of_two)
    assert verdict.score == pytest.approx(2 / 3, rel=0, abs=1e-12)


def test_position_is_asked_of_the_most_confident_only():
    cats = [thing("cat", 0.9, at=(-30.0, 0.0)), thing("cat", 0.8, at=(30.0, 0.0))]
    verdict = geneval_verdict([thing(), *cats], cat_is("left of"))
    assert verdict.correct
    assert verdict.score == pytest.approx(1 / 3, rel=0, abs=1e-12)  # dog 1; two cats for one: 0, and 0 for the place


def test_a_position_fails_with_its_target():
    blue = [thing(color="blue"), thing("cat", at=(-30.0, 0.0))]
    verdict = geneval_verdict(blue, cat_is("left of", color="red"))
    assert verdict.reasons == ["expected red dog>=1, found 0 red", "no target for cat to be left of"]
    assert verdict.score == pytest.approx(2 / 4, rel=0, abs=1e-12)  # count 1, colour 0, count 1, position 0
    missing = geneval_verdict(blue[1:], cat_is("left of"))
    assert missing.reasons == ["expected dog>=1, found 0", "no target for cat to be left of"]
    assert missing.score == pytest.approx(1 / 3, rel=0, abs=1e-12)


def test_partial_credit_wants_exactly_as_many_targets_too():
    dogs = [thing(confidence=0.9), thing(confidence=0.8, at=(0.0, 50.0))]
    verdict = geneval_verdict([*dogs, thing("cat", at=(-30.0, 0.0))], cat_is("left of"))
    assert verdict.correct
    assert verdict.score == pytest.approx(1 / 3, rel=0, abs=1e-12)  # dogs 0, cat 1, position 0


def test_the_target_is_the_clause_of_that_index():
    cups = [thing("cup", 0.9, at=(0.0, 50.0)), thing("cup", 0.8, at=(0.0, 60.0))]
    there = [*cups, thing(), thing("cat", at=(-30.0, 0.0))]
    verdict = geneval_verdict(there, asked(clause("cup"), clause(), clause("cat", position=["left of", 1])))
    assert verdict.correct
    assert verdict.score == pytest.approx(3 / 4, rel=0, abs=1e-12)  # two cups for one: 0, which is not the cat's target
    verdict = geneval_verdict(there, asked(clause("cup"), clause(), clause("cat", position=["left of", 0])))
    assert verdict.reasons == ["expected cat left of target, found above"]


def test_a_clause_gives_one_reason():
    wrong = clause("cat", color="blue", position=["right of", 0])
    verdict = geneval_verdict([thing(), thing("cat", at=(-30.0, 0.0))], asked(clause(), wrong))
    assert verdict.reasons == ["expected blue cat>=1, found 0 blue"]


def test_bad_metadata_is_named():
    with pytest.raises(ValueError, match="unknown relation 'beside'"):
        geneval_verdict([thing(), thing("cat")], cat_is("beside"))
    for target in (1, 2, -1):  # itself, none, the last
        with pytest.raises(ValueError, match="clauses before it"):
            geneval_verdict([thing()], asked(clause(), clause("cat", position=["above", target])))
    with pytest.raises(KeyError, match="class"):
        geneval_verdict([{"confidence": 0.9}], asked(clause()))


# --- properties ------------------------------------------------------------------------------------------------------

names, colors = st.sampled_from(["dog", "cat", "cup"]), st.sampled_from(["red", "blue"])
detections = st.lists(
    st.builds(
        lambda name, confidence, x, y, color: thing(name, confidence / 1000, (x, y), color),
        names, st.integers(0, 1000), place, place, colors,
    ),
    max_size=12,
    unique_by=lambda one: one["confidence"],
)  # fmt: skip


@st.composite
def prompts(draw):
    include = []
    for index in range(draw(st.integers(1, 3))):
        rules = draw(st.fixed_dictionaries({}, optional={"color": colors}))
        if index and draw(st.booleans()):
            rules["position"] = [draw(st.sampled_from(list(OPPOSITE))), draw(st.integers(0, index - 1))]
        include.append(clause(draw(names), draw(st.integers(1, 4)), **rules))
    exclude = draw(st.lists(st.builds(clause, names, st.integers(1, 4)), max_size=2))
    return asked(*include, tag=draw(st.sampled_from(["counting", "position"])), exclude=exclude)


@given(detections, prompts(), st.randoms(use_true_random=False))
def test_the_order_of_detections_does_not_matter(found, metadata, shuffler):
    verdict = geneval_verdict(found, metadata)
    shuffled = list(found)
    shuffler.shuffle(shuffled)
    assert geneval_verdict(shuffled, metadata) == verdict
    assert verdict.correct is not bool(verdict.reasons)
    assert verdict.score <= 1


@given(detections, prompts())
def test_a_correct_image_with_exact_counts_has_full_credit_and_the_other_way_round(found, metadata):
    metadata["tag"] = "position"
    metadata["exclude"] = []
    counts = [sum(one["class"] == name and one["confidence"] > 0.3 for one in found) for name in ("dog", "cat", "cup")]
    number = dict(zip(("dog", "cat", "cup"), counts, strict=True))
    for wanted in metadata["include"]:
        wanted["count"] = max(number[wanted["class"]], 1)  # as many as there are, so that both verdicts can agree
    verdict = geneval_verdict(found, metadata)
    assert verdict.correct == (verdict.score == 1)

"""GenEval's rules on synthetic boxes; every expected number is worked out beside it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.evaluation import geneval_verdict, relations
from burnish.rewards.rules.geneval_rules import kept_objects

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


# --- overlaps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "overlap", "kept"),
    [
        # Boxes of 10, 11 x 11 with their last pixels, 5 apart: shared 6 * 11 = 66 of 121 + 121 - 66 = 176, 0.375.
        (5.0, 0.38, 2),
        (5.0, 0.375, 1),  # as much is enough
        (5.0, 1.0, 2),  # off
        (0.0, 1.0, 2),
        (0.0, 0.99, 1),
        (11.0, 0.01, 2),  # no pixel in common
        (10.0, 0.01, 1),  # one column: 11 / 231 = 0.048
    ],
)
def test_overlaps_are_dropped_only_when_asked_for(offset, overlap, kept):
    found = [thing(confidence=0.9), thing(confidence=0.8, at=(offset, 0.0))]
    counted = kept_objects(found, threshold=0.3, max_overlap=overlap)["dog"]
    assert [one["confidence"] for one in counted] == [0.9, 0.8][:kept]
    assert geneval_verdict(found, asked(clause(count=2)), max_overlap=overlap).correct is (kept == 2)


def test_overlaps_are_dropped_in_turn_and_within_a_class():
    # The second goes with the first; the third overlaps with the second only, so it stays.
    chain = [thing(confidence=0.9 - n / 10, at=(5.0 * n, 0.0)) for n in range(3)]
    kept = kept_objects([*chain, thing("cat", 0.5)], threshold=0.3, max_overlap=0.3)
    assert [one["confidence"] for one in kept["dog"]] == [0.9, 0.7]
    assert len(kept["cat"]) == 1


def test_sixteen_are_taken_before_overlaps_are_dropped():
    apart = thing(confidence=0.5, at=(100.0, 0.0))
    assert len(kept_objects([*many(16), apart], threshold=0.3, max_overlap=0.5)["dog"]) == 1
    assert len(kept_objects([*many(15), apart], threshold=0.3, max_overlap=0.5)["dog"]) == 2


def test_only_objects_that_a_colour_is_asked_of_need_one():
    bare = {key: value for key, value in thing(confidence=0.4).items() if key != "color"}
    found = [thing(confidence=0.9), bare, thing("cat", 0.2)]
    assert geneval_verdict(found, asked(clause(color="red"))) == (True, [], 0.0)
    assert geneval_verdict([bare], asked(clause())).correct
    with pytest.raises(KeyError, match="color"):
        geneval_verdict([bare], asked(clause(color="red")))


# --- the six kinds ---------------------------------------------------------------------------------------------------


def dog(x=0.0, y=0.0, confidence=0.95, color="red", size=10.0):
    return thing("dog", confidence, (x, y), color, size)


def cat(x=0.0, y=0.0, confidence=0.95, color="blue", size=10.0):
    return thing("cat", confidence, (x, y), color, size)


SINGLE = asked(clause(), tag="single_object")
TWO = asked(clause(), clause("cat"), tag="two_object")
COUNT = {n: asked(clause(count=n), tag="counting", exclude=[clause(count=n + 1)]) for n in (2, 3, 4)}
COLOR = asked(clause(color="red"), tag="colors")
POSITION = {relation: asked(clause(), clause("cat", position=[relation, 0]), tag="position") for relation in OPPOSITE}
ATTRIBUTES = asked(clause(color="red"), clause("cat", color="blue"), tag="color_attr")

TABLE = [
    # single_object: at least one, surer than 0.3; the partial credit minds others of its class
    ("nothing", SINGLE, [], False, 0),
    ("one", SINGLE, [dog()], True, 1),
    ("two", SINGLE, [dog(), dog(30)], True, 0),  # 1 - 1/1
    ("three", SINGLE, [dog(), dog(30), dog(60)], True, -1),  # 1 - 2/1
    ("sixteen", SINGLE, [dog()] * 16, True, -14),  # 1 - 15/1
    ("a hundred are sixteen", SINGLE, [dog()] * 100, True, -14),
    ("another class", SINGLE, [cat()], False, 0),
    ("another class beside", SINGLE, [dog(), cat(30)], True, 1),
    ("as sure as the threshold", SINGLE, [dog(confidence=0.3)], False, 0),
    ("a little surer", SINGLE, [dog(confidence=0.3001)], True, 1),
    ("a second that is not sure", SINGLE, [dog(), dog(30, confidence=0.3)], True, 1),
    ("any colour", SINGLE, [dog(color="pink")], True, 1),
    # two_object: both, wherever they are
    ("both", TWO, [dog(), cat(30)], True, 1),
    ("both at one place", TWO, [dog(), cat()], True, 1),
    ("the first only", TWO, [dog()], False, 1 / 2),
    ("the second only", TWO, [cat()], False, 1 / 2),
    ("neither", TWO, [], False, 0),
    ("two of the first", TWO, [dog(), dog(30), cat(60)], True, 1 / 2),  # 0 and 1
    ("two of each", TWO, [dog(), dog(30), cat(), cat(30)], True, 0),
    ("two of the first, none of the second", TWO, [dog(), dog(30)], False, 0),
    ("five of the second", TWO, [dog(), *[cat()] * 5], True, -1),  # (1 - 3) / 2
    ("one of both not sure", TWO, [dog(confidence=0.2), cat()], False, 1 / 2),
    # counting: surer than 0.9, and not one more
    ("two of two", COUNT[2], [dog(), dog(30)], True, 1),
    ("two of two at one place", COUNT[2], [dog(), dog()], True, 1),  # no suppression of overlaps
    ("one of two", COUNT[2], [dog()], False, 1 / 2),
    ("none of two", COUNT[2], [], False, 0),
    ("three for two", COUNT[2], [dog()] * 3, False, 1 / 2),
    ("four for two", COUNT[2], [dog()] * 4, False, 0),
    ("five for two", COUNT[2], [dog()] * 5, False, -1 / 2),
    ("seventeen for two are sixteen", COUNT[2], [dog()] * 17, False, -6),  # 1 - 14/2
    ("three of three", COUNT[3], [dog()] * 3, True, 1),
    ("two of three", COUNT[3], [dog()] * 2, False, 2 / 3),
    ("four for three", COUNT[3], [dog()] * 4, False, 2 / 3),
    ("four of four", COUNT[4], [dog()] * 4, True, 1),
    ("five for four", COUNT[4], [dog()] * 5, False, 3 / 4),
    ("three of four", COUNT[4], [dog()] * 3, False, 3 / 4),
    ("as sure as the threshold of counting", COUNT[2], [dog(confidence=0.9), dog(30)], False, 1 / 2),
    ("sure enough elsewhere, not for counting", COUNT[2], [dog(confidence=0.6)] * 2, False, 0),
    ("a third that is not sure enough", COUNT[2], [dog(), dog(30), dog(60, confidence=0.9)], True, 1),
    ("others do not count", COUNT[2], [dog(), dog(30), *[cat()] * 9], True, 1),
    # colors: of the surest
    ("red", COLOR, [dog()], True, 1),
    ("blue", COLOR, [dog(color="blue")], False, 1 / 2),
    ("no dog", COLOR, [], False, 0),
    ("a red cat", COLOR, [cat(color="red")], False, 0),
    ("red is surer", COLOR, [dog(confidence=0.8), dog(confidence=0.7, color="blue")], True, 0),  # 0 for two, 0
    ("blue is surer", COLOR, [dog(confidence=0.7), dog(confidence=0.8, color="blue")], False, 0),
    ("blue, but not sure", COLOR, [dog(), dog(confidence=0.1, color="blue")], True, 1),
    ("two red", COLOR, [dog(), dog(30)], True, 0),
    ("four red", COLOR, [dog()] * 4, True, -1),  # (1 - 3 + 0) / 2
    # position: the cat to the dog, centres 30 apart, sizes 10: (30 - 2) / 30 = 0.93
    ("left", POSITION["left of"], [dog(), cat(-30)], True, 1),
    ("right", POSITION["right of"], [dog(), cat(30)], True, 1),
    ("above", POSITION["above"], [dog(), cat(0, -30)], True, 1),
    ("below", POSITION["below"], [dog(), cat(0, 30)], True, 1),
    ("right for left", POSITION["left of"], [dog(), cat(30)], False, 2 / 3),
    ("below for above", POSITION["above"], [dog(), cat(0, 30)], False, 2 / 3),
    ("left for above", POSITION["above"], [dog(), cat(-30)], False, 2 / 3),
    ("left and above for left", POSITION["left of"], [dog(), cat(-30, -30)], True, 1),  # (30 - 2) / 42.4 = 0.66
    ("left and above for above", POSITION["above"], [dog(), cat(-30, -30)], True, 1),
    ("more left than above for above", POSITION["above"], [dog(), cat(-30, -15)], False, 2 / 3),  # 13 / 33.5 = 0.39
    ("one inside the other", POSITION["left of"], [dog(size=60.0), cat(-5)], False, 2 / 3),  # 5 - 7 < 0
    ("at one place", POSITION["left of"], [dog(), cat()], False, 2 / 3),
    ("in the dead zone", POSITION["right of"], [dog(), cat(2)], False, 2 / 3),  # 2 - 0.1 * 20 = 0
    ("as far as one half", POSITION["right of"], [dog(), cat(4)], False, 2 / 3),  # (4 - 2) / 4 = 0.5
    ("a little farther", POSITION["right of"], [dog(), cat(4.1)], True, 1),  # 2.1 / 4.1 = 0.51
    ("large boxes need more room", POSITION["right of"], [dog(size=50.0), cat(20, size=50.0)], False, 2 / 3),  # 10 / 20
    ("large boxes with room", POSITION["right of"], [dog(size=50.0), cat(21, size=50.0)], True, 1),  # 11 / 21 = 0.52
    ("no cat", POSITION["left of"], [dog()], False, 1 / 3),
    ("no dog to be left of", POSITION["left of"], [cat(-30)], False, 1 / 3),
    ("nothing at all", POSITION["left of"], [], False, 0),
    ("the surest dog counts", POSITION["left of"], [dog(), dog(-90, confidence=0.5), cat(-30)], True, 1 / 3),
    ("the surest dog is elsewhere", POSITION["left of"], [dog(confidence=0.5), dog(-90), cat(-30)], False, 1 / 3),
    ("the surest cat counts", POSITION["left of"], [dog(), cat(-30), cat(90, confidence=0.5)], True, 1 / 3),
    ("the surest cat is elsewhere", POSITION["left of"], [dog(), cat(-30, confidence=0.5), cat(90)], False, 1 / 3),
    # color_attr: each its own
    ("each its colour", ATTRIBUTES, [dog(), cat(30)], True, 1),
    ("exchanged", ATTRIBUTES, [dog(color="blue"), cat(30, color="red")], False, 1 / 2),
    ("both red", ATTRIBUTES, [dog(), cat(30, color="red")], False, 3 / 4),
    ("both blue", ATTRIBUTES, [dog(color="blue"), cat(30)], False, 3 / 4),
    ("the dog only", ATTRIBUTES, [dog()], False, 1 / 2),
    ("a blue dog only", ATTRIBUTES, [dog(color="blue")], False, 1 / 4),
    ("two red dogs and the cat", ATTRIBUTES, [dog(), dog(30), cat(60)], True, 1 / 2),
    ("a red cat as well", ATTRIBUTES, [dog(), cat(30), cat(60, confidence=0.5, color="red")], True, 1 / 2),
    ("nothing of both", ATTRIBUTES, [], False, 0),
    ("four dogs", ATTRIBUTES, [*[dog()] * 4, cat(60)], True, 0),  # (1 - 3, 0, 1, 1)
    # beyond the benchmark: counts with colours and positions
    ("two red of two", asked(clause(count=2, color="red")), [dog(), dog(30)], True, 1),
    ("one red of two", asked(clause(count=2, color="red")), [dog(), dog(30, color="blue")], False, 3 / 4),
    ("the two surest are red", asked(clause(count=2, color="red")),
     [dog(), dog(30), dog(60, confidence=0.5, color="blue")], True, 1 / 4),  # 1 - 1/2, and 0
    ("every cat is left of every dog", asked(clause(count=2), clause("cat", 2, position=["left of", 0])),
     [dog(), dog(30), cat(-30), cat(-60)], True, 1),
    ("one cat is not", asked(clause(count=2), clause("cat", 2, position=["left of", 0])),
     [dog(), dog(30), cat(-30), cat(15)], False, 2 / 3),
    ("the target has the wrong colour", asked(clause(color="red"), clause("cat", position=["left of", 0])),
     [dog(color="blue"), cat(-30)], False, 1 / 2),
    ("what is not to be there", asked(clause(), exclude=[clause("cat")]), [dog(), cat()], False, 1),
    ("what is not to be there is not sure", asked(clause(), exclude=[clause("cat")]),
     [dog(), cat(confidence=0.3)], True, 1),
    ("any of what is not to be there", asked(clause(), exclude=[clause("cat", 9), clause("dog", 2)]),
     [dog(), dog()], False, 0),
    ("nothing asked for", asked(), [dog()], True, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "found", "correct", "score"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_the_six_kinds(metadata, found, correct, score):
    verdict = geneval_verdict(found, metadata)
    assert verdict.correct is correct
    assert verdict.score == pytest.approx(score, rel=0, abs=1e-12)
    assert bool(verdict.reasons) is not correct


def test_the_table_has_each_kind_right_and_wrong():
    assert len({row[0] for row in TABLE}) == len(TABLE) >= 60
    kinds = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert {(tag, correct) for _, metadata, _, correct, _ in TABLE if (tag := metadata["tag"]) in kinds} == {
        (kind, correct) for kind in kinds for correct in (False, True)
    }


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

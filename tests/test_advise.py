"""The chooser: sound orders, real recipes, and no method named that nothing is known of."""

import itertools

import pytest

from burnish import trainers
from burnish.advise import BASES, SIGNALS, Situation, advise
from burnish.algorithms import ALGORITHMS
from burnish.config import list_recipes

SITUATIONS = [
    Situation(base, signal, memory, shift)
    for base, signal, memory, shift in itertools.product(BASES, SIGNALS, (None, 12.0, 80.0), (False, True))
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_every_situation_has_methods_each_once_with_a_reason(situation):
    advice = advise(situation)
    assert len({one.name for one in advice}) == len(advice) > 0
    for one in advice:
        assert len(one.reason) > 20
        assert one.recipe is not None
        process = {"flow": "rectified_flow", "ddpm": "variance_preserving"}[situation.base]
        assert process in ALGORITHMS[one.name].processes


def test_recipes_are_shipped_ones_of_the_method_and_real_models_come_first():
    known = {recipe.name for recipe in list_recipes()}
    for situation in SITUATIONS:
        for one in advise(situation):
            if one.recipe:
                assert one.recipe in known
                assert trainers.load(one.recipe).algorithm == one.name
    (first,) = (one for one in advise(Situation("ddpm", "rule")) if one.name == "ddpo")
    assert first.recipe == "sd1.5/ddpo_aesthetic"


def test_the_cheat_sheets_choices():
    def names(*situation, **more):
        return [one.name for one in advise(Situation(*situation, **more))]

    assert names("ddpm", "pairs")[0] == "diffusion_dpo"
    assert names("flow", "pairs")[0] == "flow_dpo"
    assert names("ddpm", "pairs", style_shift=True)[0] == names("ddpm", "pairs", memory=12.0)[0] == "mapo"
    assert names("flow", "thumbs")[0] == "kto"
    assert names("flow", "none")[0] == "d3po"
    assert names("flow", "differentiable")[0] == "draft_k"
    assert "flow_grpo" in names("flow", "rule")
    assert "ddpo" not in names("flow", "rule")
    assert names("ddpm", "rule")[:2] == ["dpok", "ddpo"]
    assert names("ddpm", "rule", style_shift=True)[0] == "ddpo"

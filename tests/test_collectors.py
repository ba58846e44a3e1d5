"""Plans: which pictures of a round share their noise, and which of their steps have any."""

import pytest
import torch

from burnish.collectors import Branches, Collector, Deal, Independent, Tree, Window, seed_of
from burnish.errors import UserError
from burnish.processes import Grid, RectifiedFlow

GRID = RectifiedFlow().grid(10)


def deal(prompts: int = 2, group: int = 16, index: int = 0) -> Deal:
    """All pictures of a round, in a mixed order."""
    places = torch.randperm(prompts * group, generator=torch.Generator().manual_seed(1))
    return Deal(
        index,
        [{"prompt": str(number)} for number in range(prompts)],
        places // group,
        places % group,
        [seed_of("picture", index, place) for place in places.tolist()],
        [seed_of("prompt", index, prompt) for prompt in range(prompts)],
    )


def columns(collector: Collector, batch: Deal, **options) -> list[int]:
    """How many different noises there are at the start and in each step."""
    streams = collector.plan(batch, options.get("grid", GRID), True).streams
    return [len(column.unique()) for column in streams.T]


def test_seeds_are_the_same_everywhere_and_differ_by_every_part():
    assert seed_of(0, "picture", 1, 2) == 36931064197219
    assert len({seed_of(*key) for key in [(0, 1), (1, 0), (0, "1"), (0, 1, 0)]}) == 4


def test_independent_chains_share_nothing_unless_they_begin_together():
    batch = deal()
    assert columns(Independent(), batch) == [32] * 11
    assert columns(Independent(same_noise=True), batch) == [2] + [32] * 10
    plan = Independent().plan(batch, GRID, False)
    assert plan.length == 0  # no noise in the sampler, none in the plan
    assert torch.equal(Independent().peers(batch), batch.groups)


def test_a_sliding_window_goes_from_low_to_high_shrinks_and_begins_again():
    window = Window(size=4, every=2)
    places = [window.place(deal(index=index), 10) for index in range(18)]
    assert places[::2] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (5, 3), (6, 2), (7, 1), (0, 4)]
    assert places[::2] == places[1::2]
    plan = window.plan(deal(index=4), GRID, True)
    assert [bool(plan.noisy(step).all()) for step in range(10)] == [False] * 2 + [True] * 4 + [False] * 4
    assert not plan.noisy(1).any()


def test_a_random_window_lies_anywhere_and_is_whole():
    window = Window(size=3, order="random", low=1, high=6)
    places = {window.place(deal(index=index), 10) for index in range(60)}
    assert places == {(1, 3), (2, 3), (3, 3)}
    assert window.place(deal(index=3), 10) == window.place(deal(index=3), 10)


def test_after_the_window_a_share_of_the_steps_has_to_do():
    plan = Window(size=2, every=1, finish=0.4).plan(deal(index=2), GRID, True)
    assert plan.first[0] == 2
    assert plan.length == 2
    # Six steps are left: int(7 x 0.4) = 2 points, but an end needs two, so one step.
    torch.testing.assert_close(plan.grid.times, torch.tensor([1, 0.9, 0.8, 0.7, 0.6, 0.0]))
    assert torch.equal(plan.grid.next_times, plan.grid.times[1:])
    assert plan.streams.shape[1] == plan.grid.steps + 1
    longer = Window(size=2, every=1, finish=0.6).plan(deal(index=2), GRID, True).grid  # int(7 x 0.6) = 4 points
    torch.testing.assert_close(longer.times[4:], torch.tensor([0.6, 0.4, 0.2, 0.0]))


def test_branches_share_their_trunk_and_their_noise_is_in_one_step():
    batch = deal(prompts=2, group=12)
    plan = Branches(branches=4).plan(batch, GRID, True)
    assert plan.length == 1
    points = Branches(branches=4).peers(batch)
    assert len(points.unique()) == 2 * 3
    for point in points.unique():
        here = points == point
        assert len(plan.first[here].unique()) == 1  # one step
        assert len(plan.streams[here, 0].unique()) == 1  # one trunk
        assert len(plan.streams[here, int(plan.first[here][0]) + 1].unique()) == 4  # four noises there
    for group in (0, 1):
        steps = plan.first[batch.groups == group]
        assert len(steps.unique()) == 3
        assert steps.max() < GRID.steps - 1
    more = Branches(branches=2).plan(deal(1, 24), GRID, True)  # 12 points, 9 steps: three from another trunk
    assert len(more.streams[:, 0].unique()) == 2
    assert sorted(more.first.bincount().tolist()) == [2] * 6 + [4] * 3


def test_a_tree_doubles_at_each_split():
    batch = deal()
    tree = Tree(splits=(0, 3, 6, 9))
    assert columns(tree, batch) == [2] + [4] * 3 + [8] * 3 + [16] * 3 + [32]
    streams = tree.plan(batch, GRID, True).streams
    leaves = streams[batch.groups == 0][batch.members[batch.groups == 0].argsort()]
    for column, shared in ((1, 8), (4, 4), (7, 2), (10, 1)):
        assert torch.equal(leaves[::shared, column].repeat_interleave(shared), leaves[:, column])


def test_a_process_plans_its_share_as_the_whole_would_be():
    batch = deal(prompts=2, group=16)
    for collector in (Tree(), Branches(branches=4), Independent(same_noise=True), Window(order="random")):
        grid = RectifiedFlow().grid(12)
        whole = collector.plan(batch, grid, True)
        half = Deal(0, batch.round, batch.groups[16:], batch.members[16:], batch.seeds[16:], batch.group_seeds)
        part = collector.plan(half, grid, True)
        assert torch.equal(part.streams, whole.streams[16:])
        assert torch.equal(part.first, whole.first[16:])
        assert torch.equal(collector.peers(half), collector.peers(batch)[16:])


@pytest.mark.parametrize(
    ("collector", "steps", "group", "said"),
    [
        (Window(low=5, high=5), 10, 16, "no window between step low=5 and high=5"),
        (Window(high=12), 10, 16, "high=12 of rollout.steps=10"),
        (Window(size=6, order="random", high=5), 10, 16, "collector.size=6 steps do not fit"),
        (Branches(branches=6), 10, 16, "num_generations=16 pictures are not points of collector.branches=6"),
        (Tree(), 9, 16, r"collector.splits=\[0, 3, 6, 9\]"),
        (Tree(splits=(3, 0)), 10, 4, "have to rise"),
        (Tree(), 10, 12, "set num_generations to that"),
    ],
)
def test_says_what_does_not_fit(collector, steps, group, said):
    with pytest.raises(UserError, match=said):
        collector.check(steps, group)


def test_a_grid_is_left_alone_where_nothing_is_shortened():
    plan = Window(size=2).plan(deal(), GRID, True)
    assert isinstance(plan.grid, Grid)
    assert torch.equal(plan.grid.times, GRID.times)

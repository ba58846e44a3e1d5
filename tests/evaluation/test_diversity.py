import math

import pytest
import torch

from burnish.evaluation import group_distance


def test_by_hand():
    # Four elements each. Group 3: 0 against 1 everywhere, distance sqrt(4) / sqrt(4) = 1.
    # Group 1: {0, 0.5, 1}: pairs 0.5, 1, 0.5, mean 2 / 3.   Mean over groups: 5 / 6, not the mean over the four pairs.
    values = torch.tensor([0.0, 0.0, 1.0, 0.5, 1.0])
    features = values[:, None, None].expand(5, 2, 2)
    assert group_distance(features, torch.tensor([3, 1, 3, 1, 1])).item() == pytest.approx(5 / 6)


def test_is_root_mean_square_over_elements():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert group_distance(features, torch.zeros(2).long()).item() == pytest.approx(5 / math.sqrt(2))


def test_equal_pictures_are_at_no_distance_and_groups_do_not_mix():
    features = torch.rand(3, 3, 8, 8).repeat_interleave(4, dim=0)
    assert group_distance(features, torch.arange(3).repeat_interleave(4)) == 0
    assert group_distance(features, torch.arange(4).repeat(3)) > 0.1


def test_groups_of_one_are_left_out():
    features = torch.tensor([[0.0], [1.0], [50.0]])
    assert group_distance(features, torch.tensor([0, 0, 1])) == 1
    assert group_distance(features, torch.arange(3)).isnan()


def test_order_does_not_matter():
    features, groups = torch.rand(12, 5), torch.arange(3).repeat(4)
    order = torch.randperm(12)
    torch.testing.assert_close(group_distance(features[order], groups[order]), group_distance(features, groups))

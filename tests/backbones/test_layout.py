"""Layouts against index arithmetic written location by location."""

from __future__ import annotations

import pytest
import torch
from timm.models.hiera import Reroll, Unroll
from torch import Tensor

from timm_castream.backbones.layout import NCHW, NHWC, Stage, Tokens

PREFIX = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])


def maps(height: int = 4, width: int = 6) -> Tensor:
    """(2, 3, height, width), each entry different."""
    return torch.arange(2.0 * 3 * height * width).reshape(2, 3, height, width)


def test_maps_are_seen_with_channels_first_without_a_copy():
    for layout, tensor in ((NCHW(), maps()), (NHWC(), maps().permute(0, 2, 3, 1).contiguous())):
        view = Stage('stage', 3, layout).to_nchw(tensor, (32, 48))
        assert torch.equal(view, maps())
        assert view.data_ptr() == tensor.data_ptr()
        assert torch.equal(layout.from_nchw(maps(), PREFIX), tensor)


@pytest.mark.parametrize('num_prefix', [0, 1, 3])
def test_patch_tokens_stand_row_by_row_after_the_prefix_tokens(num_prefix):
    stage = Stage('stage', 3, Tokens(num_prefix, (8, 8)))
    tokens = torch.empty(2, num_prefix + 24, 3)
    tokens[:, :num_prefix] = PREFIX[:, None]
    for row in range(4):
        for column in range(6):
            tokens[:, num_prefix + 6 * row + column] = maps()[:, :, row, column]
    view = stage.to_nchw(tokens, (32, 48))
    assert torch.equal(view, maps())
    assert view.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    assert torch.equal(stage.layout.from_nchw(maps(), PREFIX), tokens)
    column = stage.to_nchw(tokens)
    assert column.shape == (2, 3, 24, 1) and torch.equal(column.flatten(2), maps().flatten(2))


@pytest.mark.parametrize(
    'layout, shape',
    [(NCHW(), (2, 3, 1, 1)), (NHWC(), (2, 1, 1, 3)), (Tokens(0, (8, 8)), (2, 1, 3)), (Tokens(2, (8, 8)), (2, 3, 3))],
)
def test_one_location_holds_the_vector_and_nothing_else(layout, shape):
    location = Stage('stage', 3, layout).one_location(PREFIX)
    assert location.shape == shape
    for i in range(2):
        assert set(location[i].flatten().tolist()) == set(PREFIX[i].tolist())
    assert torch.equal(layout.to_nchw(location).flatten(1)[:, -3:], PREFIX)


@pytest.mark.parametrize(
    'image_size, grid',
    [((64, 64), (4, 4)), ((64, 96), (4, 6)), ((96, 64), (6, 4)), ((65, 70), (5, 5)), ((72, 95), (4, 5))],
)
def test_the_grid_follows_the_image_size_rounded_up_or_down(image_size, grid):
    assert Tokens(1, (16, 16)).grid(grid[0] * grid[1], image_size) == grid


def test_tokens_that_are_no_grid_of_the_image_are_refused():
    with pytest.raises(ValueError, match=r'15 patch tokens are no grid of .* 64 x 64 pixels .* 16 x 16 pixels'):
        Stage('stage', 3, Tokens(1, (16, 16))).to_nchw(torch.zeros(1, 16, 3), (64, 64))


@pytest.mark.parametrize('levels', [1, 2, 3])
@pytest.mark.parametrize('grid', [(16, 16), (8, 24)])
def test_tokens_that_hiera_sorted_by_windows_are_put_back_into_image_order(grid, levels):
    tokens = maps(*grid).flatten(2).transpose(1, 2)
    unrolled = Unroll(grid, (1, 1), [(2, 2)] * levels)(tokens)
    layout = Tokens(0, (4, 4), windows=((2, 2),) * levels)
    assert not torch.equal(unrolled, tokens)
    assert torch.equal(layout.to_nchw(unrolled, (4 * grid[0], 4 * grid[1])), maps(*grid))
    reroll = Reroll(grid, (1, 1), [(2, 2)] * levels, [0], 0)
    assert torch.equal(reroll(unrolled, 0).permute(0, 3, 1, 2), maps(*grid))


def test_the_tokens_may_be_an_item_of_a_tuple():
    stage = Stage('stage', 3, Tokens(1, (8, 8), item=1))
    output = ('pixels', torch.zeros(2, 25, 3), [4, 6])
    assert stage.tensor(output) is output[1]
    other = torch.ones(2, 25, 3)
    assert stage.with_features(output, other) == ('pixels', other, [4, 6])
    plain = Stage('stage', 3, NCHW())
    assert plain.tensor(other) is other and plain.with_features(output, other) is other

"""Pixels of pictures: colours, opacity, titles, and the place of a crop in its photograph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform

from timm_castream.pictures import (
    COLOURS,
    Box,
    Panel,
    _folded,
    draw_grid,
    draw_row,
    heat_map,
    overlay,
    overlay_photograph,
    save,
    transform_image,
)


def photograph(*shape: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_an_overlay_leaves_the_image_where_the_saliency_is_zero_and_is_yellow_where_it_is_one() -> None:
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    pixels = overlay(image, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 1.0)
    assert pixels.shape == image.shape and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [100, 100, 100] and pixels[7, 0].tolist() == [253, 231, 36]
    # The metrics' resize: row 3 is (3.5 / 4 - .5) = .375 of the way from the first map row to the second.
    colour = np.array(colormaps['viridis'](0.375)[:3]) * 255
    assert pixels[3, 0].tolist() == pytest.approx((0.625 * 100 + 0.375 * colour).tolist(), abs=1)


def test_jet_covers_the_image_evenly_by_half_as_the_papers_do() -> None:
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    pixels = overlay(image, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), colours='jet')
    assert pixels[0, 0].tolist() == pytest.approx([50, 50, 113], abs=1)
    assert pixels[7, 0].tolist() == pytest.approx([113, 50, 50], abs=1)


@pytest.mark.parametrize('colours', COLOURS)
@pytest.mark.parametrize('opacity', [0.0, 0.25, 1.0])
def test_the_opacity_is_the_share_of_the_colours(opacity: float, colours: str) -> None:
    image = np.asarray(photograph(8, 8, 3))
    saliency = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    pixels = overlay(image, saliency, opacity, colours)
    for row in range(8):
        for column in range(8):
            value = saliency[row, column].item()
            share = opacity * (160 / 255 if colours == 'jet' else value)
            colour = [255 * part for part in colormaps[colours](value)[:3]]
            pairs = zip(image[row, column].tolist(), colour, strict=True)
            blend = [(1 - share) * below + share * above for below, above in pairs]
            assert pixels[row, column].tolist() == pytest.approx(blend, abs=1.5)


def test_a_more_salient_pixel_is_more_opaque_and_lighter() -> None:
    heat = heat_map(torch.linspace(0, 1, 256)[None], (1, 256)).astype(float)[0]
    assert (np.diff(heat[:, 3]) >= 0).all() and heat[0, 3] == 0 and heat[-1, 3] == 255
    lightness = heat[:, :3] @ (0.299, 0.587, 0.114)
    assert (np.diff(lightness[::8]) > 0).all()


@pytest.mark.parametrize('opacity', [-0.1, 1.1, float('nan')])
def test_an_opacity_out_of_range_is_refused(opacity: float) -> None:
    with pytest.raises(ValueError, match=f'opacity .*{opacity}'):
        overlay(np.zeros((8, 8, 3), dtype=np.uint8), torch.zeros(8, 8), opacity)


def test_unknown_colours_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'rainbow'.*'viridis', 'inferno', 'jet'"):
        heat_map(torch.zeros(8, 8), (8, 8), 'rainbow')


@pytest.mark.parametrize('side', [32, 224])
def test_a_grid_shows_every_panel_pixel_by_pixel_under_its_title(side: int, tmp_path: Path) -> None:
    panels = [Panel(f'title {i} $', np.asarray(photograph(side, side, 3, seed=i))) for i in range(5)]
    pixels = np.asarray(Image.open(save(draw_grid([panels[:3], panels[3:]]), tmp_path / 'grid.png')).convert('RGB'))
    enlarged = 7 if side == 32 else 1
    for panel in panels:
        expected = panel.pixels.repeat(enlarged, 0).repeat(enlarged, 1)
        corners = np.argwhere((pixels == expected[0, 0]).all(-1))
        found = [
            (y, x) for y, x in corners if np.array_equal(pixels[y : y + len(expected), x : x + len(expected)], expected)
        ]
        assert len(found) == 1
        y, x = found[0]
        assert (pixels[y - 20 : y, x : x + len(expected)] < 100).any(), 'no title above'


def test_many_panels_go_on_in_further_lines() -> None:
    panels = [Panel('title', np.full((224, 224, 3), i, dtype=np.uint8)) for i in range(30)]
    row = draw_row(panels)
    few = draw_row(panels[:12])
    assert row.shape[1] == few.shape[1] and len(row) == 3 * len(few)
    assert np.array_equal(row[: len(few)], few)
    for i in range(30):  # each is there once, whole
        assert (row == i).all(-1).sum() >= 224 * 224


@pytest.mark.parametrize('side', [40, 320])
def test_a_title_that_is_wider_than_its_panel_is_folded(side: int) -> None:
    """The titles of neighbours lay over each other."""
    black, title = np.zeros((side, side, 3), np.uint8), 'captum:IntegratedGradients,n_steps=50,method=riemann_trapezoid'
    for text in (title, 'x' * 80, 'Grad-CAM\n' + title):
        row = draw_row([Panel('', black), Panel(text, black), Panel('', black)])
        width = row.shape[1] // 3
        head = row[: -max(side, 200) - 8] < 128
        assert (
            head[:, width : 2 * width].any() and not head[:, : width - 4].any() and not head[:, 2 * width + 4 :].any()
        )
    lines = _folded(title, 200, 12)
    assert ''.join(lines) == title and len(lines) > 1 and all(line.endswith(',') for line in lines[:-1])


def test_a_caption_stands_below_the_rows() -> None:
    panels = [Panel('title', np.full((200, 200, 3), 255, dtype=np.uint8))]
    plain, captioned = (np.asarray(draw_grid([panels], caption)) for caption in ('', 'A caption.'))
    assert np.array_equal(captioned[: len(plain)], plain)
    assert (captioned[len(plain) :] < 128).any()


def test_saving_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'figure.png'
    path.write_bytes(b'old')

    def fail(self: Figure, name: Any, **kwargs: Any) -> None:
        name.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(Figure, 'savefig', fail)
    with pytest.raises(OSError, match='disk full'):
        save(Figure(), path)
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('size', [(640, 427), (300, 900), (64, 64), (50, 20)])
@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
def test_the_crop_in_the_photograph_is_where_the_transform_looks(crop_mode: str, size: tuple[int, int]) -> None:
    width, height = size
    # Each pixel holds its own place, which the resize averages: away from the edges linear functions stay.
    for axis, span in ((0, width), (1, height)):
        places = np.linspace(0, 1, span, dtype=np.float64)
        ramp = np.broadcast_to(places[None, :] if axis == 0 else places[:, None], (height, width))
        image = Image.fromarray((255 * ramp).round().astype(np.uint8)).convert('RGB')
        transform = create_transform(
            (3, 96, 96), crop_pct=0.8, crop_mode=crop_mode, mean=(0,) * 3, std=(1,) * 3, interpolation='bilinear'
        )
        tensor, box = transform_image(transform, image)
        assert torch.equal(tensor, transform(image))
        low, high = (box.left, box.right) if axis == 0 else (box.top, box.bottom)
        centres = low + (high - low) * (np.arange(96) + 0.5) / 96 - 0.5  # in pixels of the photograph
        seen = tensor[0].numpy()[48] if axis == 0 else tensor[0].numpy()[:, 48]
        inside = (centres > span / 16) & (centres < span - span / 16)
        assert inside.sum() > 30
        np.testing.assert_allclose(seen[inside] * (span - 1), centres[inside], atol=0.02 * span)


def test_an_image_that_the_transform_leaves_as_it_is_has_a_crop_of_its_size() -> None:
    transform = create_transform((3, 32, 32), crop_pct=1.0)
    assert transform_image(transform, photograph(32, 32, 3))[1] == (0, 0, 32, 32)


def test_a_whole_photograph_is_grey_outside_of_the_crop_and_the_overlay_inside() -> None:
    image = photograph(40, 60, 3)
    saliency = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    whole = overlay_photograph(image, saliency, Box(10, 0, 50, 40))
    assert np.array_equal(whole[:, 10:50], overlay(np.asarray(image)[:, 10:50], saliency))
    assert (np.ptp(whole[:, :10], axis=2) == 0).all() and (np.ptp(whole[:, 50:], axis=2) == 0).all()


def test_padding_around_a_photograph_is_not_drawn() -> None:
    image = photograph(20, 40, 3)
    saliency = torch.zeros(4, 4)
    assert np.array_equal(overlay_photograph(image, saliency, Box(0, -10, 40, 30)), np.asarray(image))

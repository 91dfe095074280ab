"""Pictures: the pixels they are made of, the files that come out, and images of every kind going in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from timm_castream import attention_maps, forward_both
from timm_castream.attribution import attribute
from timm_castream.visualize import (
    Panel,
    class_name,
    denormalised,
    draw_grid,
    draw_identity,
    explain,
    find_images,
    overlay,
    read_image,
    saliency_row,
    save,
)

NAMES = ('cat', 'dog', '$x_$', 'a very long name of a class indeed', *'efghij')


@pytest.fixture
def model(make_model: Callable[..., nn.Module]) -> nn.Module:
    model = make_model('test_resnet')
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 64, 64), 'label_names': NAMES}
    return model


@pytest.fixture
def one(x: Tensor) -> Tensor:
    return x[:1]


def photograph(*shape: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def rendered(figure: Figure, path: Path) -> np.ndarray:
    return np.asarray(Image.open(save(figure, path)).convert('RGB'))


def test_a_row_shows_the_image_the_attention_of_every_stage_and_each_method_under_each_pooling(
    model: nn.Module, one: Tensor
) -> None:
    row = saliency_row(model, one, ('attention', 'grad_cam', 'score_cam'), name='photo.jpg')
    with torch.no_grad():
        probabilities = {mode: logits.softmax(1)[0].max(0) for mode, logits in forward_both(model, one).items()}
    says = {
        mode: f'{mode.upper()}: {NAMES[index] if len(NAMES[index]) < 22 else NAMES[index][:21] + "…"} {value:.2f}'
        for mode, (value, index) in probabilities.items()
    }
    assert [panel.title for panel in row] == [
        f'photo.jpg\n{says["gap"]}\n{says["ca"]}',
        *(f'Attention\n{stage}' for stage in ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4')),
        f'Grad-CAM\n{says["gap"]}',
        f'Grad-CAM\n{says["ca"]}',
        f'Score-CAM\n{says["gap"]}',
        f'Score-CAM\n{says["ca"]}',
    ]
    image = denormalised(model, one)[0]
    assert np.array_equal(row[0].pixels, image)
    first = attention_maps(model, one)[0][0, 0].detach()
    assert np.array_equal(row[1].pixels, overlay(image, (first - first.min()) / (first.max() - first.min())))
    assert np.array_equal(row[7].pixels, overlay(image, attribute(model, one, 'grad_cam')[0]))
    assert np.array_equal(row[6].pixels, overlay(image, attribute(model, one, 'grad_cam', pooling='gap')[0]))


def test_a_row_leaves_out_what_was_not_asked_for(model: nn.Module, one: Tensor) -> None:
    titles = [panel.title.split('\n')[0] for panel in saliency_row(model, one, ('grad_cam_pp',), ('ca',))]
    assert titles == ['', 'Grad-CAM++']


def test_pixels_are_those_before_normalisation(model: nn.Module) -> None:
    image = np.array(photograph(64, 64, 3))
    x = (torch.from_numpy(image).movedim(-1, 0)[None] / 255 - 0.5) / 0.5
    assert np.array_equal(denormalised(model, x)[0], image)


def test_an_overlay_is_blue_where_the_saliency_is_zero_and_red_where_it_is_one() -> None:
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    saliency = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    pixels = overlay(image, saliency)
    assert pixels.shape == image.shape and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [50, 50, 113] and pixels[7, 0].tolist() == [113, 50, 50]
    # The metrics' resize: row 3 is (3.5 / 4 - .5) = .375 of the way from the first map row to the second.
    between = np.array(colormaps['jet'](0.375, bytes=True)[:3], dtype=int)
    assert pixels[3, 0].tolist() == ((100 + between) // 2).tolist()


@pytest.mark.parametrize('opacity', [0.0, 0.25, 1.0])
def test_the_opacity_is_the_share_of_the_colours(opacity: float) -> None:
    image = np.asarray(photograph(8, 8, 3))
    saliency = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    pixels = overlay(image, saliency, opacity)
    for row in range(8):
        for column in range(8):
            colour = colormaps['jet'](saliency[row, column].item(), bytes=True)[:3]
            pairs = zip(image[row, column].tolist(), colour, strict=True)
            blend = [(1 - opacity) * below + opacity * above for below, above in pairs]
            assert pixels[row, column].tolist() == pytest.approx(blend, abs=1)


@pytest.mark.parametrize('opacity', [-0.1, 1.1, float('nan')])
def test_an_opacity_out_of_range_is_refused(opacity: float) -> None:
    with pytest.raises(ValueError, match='opacity must lie in'):
        overlay(np.zeros((8, 8, 3), dtype=np.uint8), torch.zeros(8, 8), opacity)


@pytest.mark.parametrize('side', [32, 224])
def test_a_grid_shows_every_panel_pixel_by_pixel(side: int, tmp_path: Path) -> None:
    panels = [Panel(f'title {i} $', np.asarray(photograph(side, side, 3, seed=i))) for i in range(5)]
    pixels = rendered(draw_grid([panels[:3], panels[3:]]), tmp_path / 'grid.png')
    enlarged = 5 if side == 32 else 1
    for panel in panels:
        expected = panel.pixels.repeat(enlarged, 0).repeat(enlarged, 1)
        corners = np.argwhere((pixels == expected[0, 0]).all(-1))
        found = [
            (y, x) for y, x in corners if np.array_equal(pixels[y : y + len(expected), x : x + len(expected)], expected)
        ]
        assert len(found) == 1
        y, x = found[0]
        assert (pixels[y - 20 : y, x : x + len(expected)] < 100).any(), 'no title above'


def test_the_identity_figure_shows_both_sides_and_a_difference_of_rounding(model: nn.Module, one: Tensor) -> None:
    figure = draw_identity(model, one)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    _, logits, cam, difference = images[:4]
    np.testing.assert_allclose(logits, cam, rtol=1e-4)
    assert np.abs(logits).max() > 1
    assert 'difference, at most' in figure.axes[3].get_title()
    np.testing.assert_array_equal(difference, logits - cam)


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


@pytest.mark.parametrize(
    ('names', 'descriptions', 'expected'),
    [
        (('a', 'b', 'c'), None, 'b'),
        ({1: 'b'}, None, 'b'),
        ({'1': 'b'}, {'b': 'a bee'}, 'a bee'),
        ({2: 'c'}, None, 'class 1'),
        (None, None, 'class 1'),
    ],
)
def test_classes_are_named_by_the_models_config(names: Any, descriptions: Any, expected: str, model: nn.Module) -> None:
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names, 'label_descriptions': descriptions}
    assert class_name(model, 1) == expected


def test_classes_without_names_are_imagenets_where_there_are_as_many() -> None:
    model = nn.Module()
    model.num_classes = 1000
    assert class_name(model, 1).startswith('goldfish')


def test_images_of_every_kind_are_read_upright(tmp_path: Path) -> None:
    original = photograph(20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    original.save(tmp_path / 'turned.png', exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / 'turned.png')), np.rot90(np.asarray(original), -1))

    for name, image in {
        'grey.png': photograph(5, 7),
        'transparent.png': photograph(5, 7, 4),
        'palette.gif': photograph(5, 7, 3).convert('P'),
        'bits.bmp': photograph(5, 7).convert('1'),
        'cmyk.jpg': photograph(5, 7, 3).convert('CMYK'),
        'dot.webp': photograph(1, 1, 3),
    }.items():
        image.save(tmp_path / name)
        assert (read_image(tmp_path / name).mode, read_image(tmp_path / name).size) == ('RGB', image.size)

    frames = [Image.new('RGB', (4, 4), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path / 'frames.tiff', save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / 'frames.tiff').getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(('dtype', 'name'), [(np.uint16, 'a.png'), (np.int32, 'a.tiff'), (np.float32, 'a.tiff')])
def test_images_wider_than_8_bits_are_scaled_by_their_range(dtype: Any, name: str, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1000], [2000, 4000]], dtype=dtype)).save(tmp_path / name)
    assert np.asarray(read_image(tmp_path / name, 'L')).tolist() == [[0, 64], [128, 255]]


def test_explaining_writes_a_picture_an_image_and_a_grid_and_reports_the_unreadable(
    model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photograph(50, 80, 3).save(tmp_path / 'one.png')
    photograph(300, 20, 3).save(tmp_path / 'two.jpg')
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    cut_off = (tmp_path / 'two.jpg').read_bytes()
    (tmp_path / 'cut.jpg').write_bytes(cut_off[: len(cut_off) // 2])
    paths = [tmp_path / name for name in ('one.png', 'broken.jpg', 'cut.jpg', 'missing.jpg', 'two.jpg')]
    model.train()
    done = explain(model, paths, ('attention', 'grad_cam'), tmp_path / 'new' / 'out', identity=True)
    assert model.training
    assert list(done.unreadable) == paths[1:4]
    for path in done.unreadable:
        assert str(path) in caplog.text
    out = tmp_path / 'new' / 'out'
    assert done.pictures == [out / f'{name}.png' for name in ('one', 'one_identity', 'two', 'two_identity')]
    assert done.grids == [out / 'grid.png']
    assert sorted(out.iterdir()) == sorted([*done.pictures, *done.grids])
    one, two, grid = (np.asarray(Image.open(out / f'{name}.png').convert('RGB')) for name in ('one', 'two', 'grid'))
    assert one.shape == two.shape and grid.shape[1] == one.shape[1]
    assert grid.shape[0] > 1.9 * one.shape[0]


def test_no_image_is_overwritten_and_no_picture_twice(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / 'other').mkdir()
    paths = [tmp_path / 'a.png', tmp_path / 'other' / 'A.jpg', tmp_path / 'grid.png']
    for path in paths:
        photograph(20, 20, 3).save(path)
    before = [path.read_bytes() for path in paths]
    done = explain(model, paths, ('attention',), tmp_path, ('ca',))
    assert [path.read_bytes() for path in paths] == before
    assert [path.name for path in done.pictures] == ['a_2.png', 'A_3.png', 'grid_3.png']
    assert [path.name for path in done.grids] == ['grid_2.png']


def test_another_grid_is_begun_when_one_is_full(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('timm_castream.visualize.ROWS_PER_GRID', 2)
    photograph(20, 20, 3).save(tmp_path / 'a.png')
    done = explain(model, [tmp_path / 'a.png'] * 3, ('attention',), tmp_path / 'out')
    assert [path.name for path in done.grids] == ['grid.png', 'grid_2.png']
    assert len(set(done.pictures)) == 3


def test_nothing_readable_gives_no_grid_and_nothing_at_all_is_refused(model: nn.Module, tmp_path: Path) -> None:
    assert explain(model, [tmp_path / 'missing.png'], ('attention',), tmp_path).grids == []
    with pytest.raises(ValueError, match='no images to explain'):
        explain(model, [], ('attention',), tmp_path)


def test_a_folder_gives_its_images_in_order_and_no_other_files(tmp_path: Path) -> None:
    (tmp_path / 'sub').mkdir()
    for name in ('b.JPG', 'a.png', 'sub/c.webp', 'notes.txt', 'broken.png'):
        (tmp_path / name).write_bytes(b'')
    names = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    assert names == ['a.png', 'b.JPG', 'broken.png', 'sub/c.webp']
    with pytest.raises(ValueError, match='is no folder'):
        find_images(tmp_path / 'a.png')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='has no images'):
        find_images(tmp_path / 'empty')


@pytest.mark.slow
def test_importing_the_package_does_not_import_matplotlib_and_figures_do_not_import_pyplot() -> None:
    code = (
        'import sys, timm_castream; assert "matplotlib" not in sys.modules; timm_castream.visualize; '
        'assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], check=True)

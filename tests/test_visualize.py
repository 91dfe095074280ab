"""Pictures: the pixels they are made of, the files that come out, and images of every kind going in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from timm_castream import attention_maps, forward_both
from timm_castream.attribution import attribute
from timm_castream.pictures import draw_row
from timm_castream.visualize import Panel, denormalised, draw_identity, explain, find_images, overlay, saliency_row

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
        'Attention\nlayer4, the last stage',
        f'Grad-CAM\n{says["gap"]}',
        f'Grad-CAM\n{says["ca"]}',
        f'Score-CAM\n{says["gap"]}',
        f'Score-CAM\n{says["ca"]}',
        *(f'Attention\n{stage}, early' for stage in ('layer3', 'layer2', 'layer1', 'maxpool')),
    ]
    image = denormalised(model, one)[0]
    assert np.array_equal(row[0].pixels, image)
    for panel, maps in zip(
        (row[9], row[1]), (attention_maps(model, one)[0], attention_maps(model, one)[-1]), strict=True
    ):
        mean = maps[0, 0].detach()
        assert np.array_equal(panel.pixels, overlay(image, (mean - mean.min()) / (mean.max() - mean.min())))
    assert np.array_equal(row[3].pixels, overlay(image, attribute(model, one, 'grad_cam')[0]))
    assert np.array_equal(row[2].pixels, overlay(image, attribute(model, one, 'grad_cam', pooling='gap')[0]))


def test_a_row_leaves_out_what_was_not_asked_for(model: nn.Module, one: Tensor) -> None:
    titles = [panel.title.split('\n')[0] for panel in saliency_row(model, one, ('grad_cam_pp',), ('ca',))]
    assert titles == ['', 'Grad-CAM++']


def test_pixels_are_those_before_normalisation(model: nn.Module) -> None:
    image = np.array(photograph(64, 64, 3))
    x = (torch.from_numpy(image).movedim(-1, 0)[None] / 255 - 0.5) / 0.5
    assert np.array_equal(denormalised(model, x)[0], image)


def test_the_identity_figure_shows_both_sides_and_a_difference_of_rounding(model: nn.Module, one: Tensor) -> None:
    figure = draw_identity(model, one)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    _, logits, cam, difference = images[:4]
    np.testing.assert_allclose(logits, cam, rtol=1e-4)
    assert np.abs(logits).max() > 1
    assert 'difference, at most' in figure.axes[3].get_title()
    np.testing.assert_array_equal(difference, logits - cam)


def test_a_map_that_says_nothing_is_called_constant(model: nn.Module, one: Tensor) -> None:
    flat = np.full((1, 4, 4), 0.7)
    row = saliency_row(model, one, {'flat': flat, 'grad_cam': 'grad_cam'}, ('ca',))
    assert [panel.title.endswith('\nconstant map') for panel in row] == [False, True, False]
    assert np.array_equal(row[1].pixels, row[0].pixels)


@pytest.mark.parametrize('colours', ['viridis', 'jet'])
def test_a_map_with_nan_is_named_and_drawn_as_nothing(
    model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, colours: str
) -> None:
    photograph(64, 64, 3).save(tmp_path / 'one.png')
    maps = np.ones((1, 4, 4))
    maps[0, 1, 2] = np.nan
    rows: list[list[Panel]] = []
    monkeypatch.setattr('timm_castream.visualize.draw_row', lambda panels: rows.append(panels) or draw_row(panels))
    methods = {'broken': maps, 'grad_cam': 'grad_cam'}
    done = explain(model, [tmp_path / 'one.png'], methods, tmp_path, ['ca'], save_maps=True, colours=colours)
    image, broken, good = rows[0]
    assert broken.title.endswith('\nmap with NaN') and 'NaN' not in good.title
    assert np.array_equal(broken.pixels, image.pixels) and not np.array_equal(good.pixels, image.pixels)
    assert caplog.text.count('1 map with NaN drawn as nothing: one.png broken_ca.') == 1
    facts = json.loads((done.maps[0] / 'explanation.json').read_text())['maps']
    assert [facts[name]['nan'] for name in ('broken_ca', 'grad_cam_ca')] == [True, False]


def test_a_function_that_gives_nan_has_maps_with_nan(model: nn.Module, one: Tensor, tmp_path: Path) -> None:
    photograph(64, 64, 3).save(tmp_path / 'one.png')
    done = explain(
        model, [tmp_path / 'one.png'], ['grad_cam'], tmp_path, ['ca'], save_maps=True, target=lambda y: y[0] * np.nan
    )
    assert json.loads((done.maps[0] / 'explanation.json').read_text())['maps']['grad_cam_ca']['nan']


@pytest.mark.parametrize(
    ('target', 'classes'),
    [('cat', [0]), ('dog', [1]), (3, [3]), (np.int64(2), [2]), (['dog', 2], [1, 2]), (torch.tensor([4]), [4])],
)
def test_a_single_name_or_index_is_explained(model: nn.Module, tmp_path: Path, target: Any, classes: list[int]) -> None:
    photograph(64, 64, 3).save(tmp_path / 'one.png')
    done = explain(model, [tmp_path / 'one.png'], ['random'], tmp_path, ['ca'], save_maps=True, target=target)
    assert json.loads((done.maps[0] / 'explanation.json').read_text())['explained']['ca'] == classes


@pytest.mark.parametrize('target', [0.5, True, [1.5], [object]])
def test_a_target_that_is_no_class_is_one_sentence(model: nn.Module, tmp_path: Path, target: Any) -> None:
    photograph(64, 64, 3).save(tmp_path / 'one.png')
    with pytest.raises(ValueError, match='target must be a name or an index of a class, several of them, or a func'):
        explain(model, [tmp_path / 'one.png'], ['random'], tmp_path, ['ca'], target=target)


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


def test_saved_maps_are_those_of_attribute_and_lie_over_the_whole_photograph(model: nn.Module, tmp_path: Path) -> None:
    image = photograph(60, 150, 3)
    image.save(tmp_path / 'wide.png')
    done = explain(model, [tmp_path / 'wide.png'], ('attention', 'grad_cam'), tmp_path / 'out', save_maps=True)
    (folder,) = done.maps
    assert folder == tmp_path / 'out' / 'wide_maps'
    names = [f'attention_{stage}' for stage in model.castream_stages] + ['grad_cam_gap', 'grad_cam_ca']
    assert {path.name for path in folder.iterdir()} == {
        'explanation.json',
        *(f'{name}{ending}' for name in names for ending in ('.npy', '.jpg')),
    }
    config = timm.data.resolve_model_data_config(model)
    x = timm.data.create_transform(**config, is_training=False)(image)[None]
    for pooling in ('gap', 'ca'):
        saved = np.load(folder / f'grad_cam_{pooling}.npy')
        assert np.array_equal(saved, attribute(model, x, 'grad_cam', pooling=pooling)[0].numpy())
    facts = json.loads((folder / 'explanation.json').read_text(encoding='utf-8'))
    probabilities = forward_both(model, x)['gap'].softmax(1)[0]
    assert [row['index'] for row in facts['top']['gap']] == probabilities.argsort(descending=True)[:5].tolist()
    assert facts['top']['gap'][0]['name'] == NAMES[probabilities.argmax()]
    assert facts['photograph'] == {'width': 150, 'height': 60}
    # The shorter side is scaled to 64 / 0.95 = 67 pixels, and 64 x 64 of its middle are left.
    side = 60 * 64 / 67
    assert facts['crop']['bottom'] - facts['crop']['top'] == pytest.approx(side, abs=0.1)
    assert facts['crop']['right'] - facts['crop']['left'] == pytest.approx(side, abs=0.5)
    assert facts['crop']['left'] + facts['crop']['right'] == pytest.approx(150, abs=1.5)
    drawn = np.asarray(Image.open(folder / 'grad_cam_ca.jpg'))
    assert drawn.shape == (60, 150, 3)
    assert np.ptp(drawn[:, :40].astype(int), axis=2).max() < 20  # grey where the network did not look
    assert np.ptp(drawn[:, 60:90].astype(int), axis=2).max() > 100


def test_the_seed_is_that_of_the_method_that_draws_random_numbers(model: nn.Module, tmp_path: Path) -> None:
    image = photograph(64, 64, 3)
    image.save(tmp_path / 'one.png')
    x = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)(image)[None]
    drawn = []
    for seed in (0, 3):
        done = explain(
            model, [tmp_path / 'one.png'], ['random'], tmp_path / f'{seed}', ['gap'], save_maps=True, seed=seed
        )
        drawn.append(np.load(done.maps[0] / 'random_gap.npy'))
        assert np.array_equal(drawn[-1], attribute(model, x, 'random', pooling='gap', seed=seed)[0].numpy())
    assert not np.array_equal(*drawn)


def distance_to_a_reference(output: Tensor) -> Tensor:
    return -output.square().sum()


def test_a_function_is_explained_and_titles_name_it_with_its_value(model: nn.Module, tmp_path: Path) -> None:
    image = photograph(64, 64, 3)
    image.save(tmp_path / 'one.png')
    done = explain(
        model, [tmp_path / 'one.png'], ['grad_cam'], tmp_path / 'out', save_maps=True, target=distance_to_a_reference
    )
    x = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)(image)[None]
    with torch.no_grad():
        values = {pooling: -(logits**2).sum().item() for pooling, logits in forward_both(model, x).items()}
    for pooling in ('gap', 'ca'):
        saved = np.load(done.maps[0] / f'grad_cam_{pooling}.npy')
        expected = attribute(model, x, 'grad_cam', target=distance_to_a_reference, pooling=pooling)[0].numpy()
        assert np.array_equal(saved, expected)
        assert not np.array_equal(saved, attribute(model, x, 'grad_cam', pooling=pooling)[0].numpy())
        ((name, value),) = done.classes[tmp_path / 'one.png'][pooling.upper()]
        assert name == 'distance_to_a_reference' and value == pytest.approx(values[pooling], rel=1e-5)
    facts = json.loads((done.maps[0] / 'explanation.json').read_text(encoding='utf-8'))
    assert facts['top']['ca'][0]['name'] == 'distance_to_a_reference'
    (lambda_is_named,) = explain(
        model, [tmp_path / 'one.png'], ['grad_cam'], tmp_path / 'other', ['ca'], target=lambda output: output[0]
    ).classes.values()
    assert lambda_is_named['CA'][0][0] == 'value'
    with pytest.raises(ValueError, match='top_k 2 chooses classes, and target is a function'):
        explain(model, [tmp_path / 'one.png'], ['grad_cam'], tmp_path / 'out', target=distance_to_a_reference, top_k=2)


def test_images_are_normalised_by_the_numbers_given_and_shown_as_they_were(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photograph(64, 64, 3)
    image.save(tmp_path / 'one.png')
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    kwargs = {'img_size': 64, 'crop_pct': 1.0}
    config = {**timm.data.resolve_model_data_config(model), 'crop_pct': 1.0, 'mean': mean, 'std': std}
    x = timm.data.create_transform(**config, is_training=False)(image)[None]
    torch.testing.assert_close(x[0, 2], torch.from_numpy(np.array(image)[..., 2] / 255 - 0.3).float() / 0.6)
    shown: list[np.ndarray] = []
    monkeypatch.setattr(
        'timm_castream.visualize.draw_row', lambda panels: shown.append(panels[0].pixels) or draw_row(panels)
    )
    for number, normalised in enumerate(({'mean': mean, 'std': std}, {})):
        done = explain(
            model,
            [tmp_path / 'one.png'],
            ['grad_cam'],
            tmp_path / f'{number}',
            ['ca'],
            save_maps=True,
            **kwargs,
            **normalised,
        )
        saved = np.load(done.maps[0] / 'grad_cam_ca.npy')
        same = np.array_equal(saved, attribute(model, x, 'grad_cam', pooling='ca')[0].numpy())
        assert same == bool(normalised)
        assert np.array_equal(shown[-1], np.array(image))


def test_a_network_without_image_settings_is_explained_with_a_mean_and_a_std(tmp_path: Path) -> None:
    photograph(64, 64, 3).save(tmp_path / 'one.png')
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    arguments: tuple[Any, ...] = (network, [tmp_path / 'one.png'], ['grad_cam'], tmp_path / 'out')
    done = explain(*arguments, layer='1', img_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), save_maps=True)
    assert np.load(done.maps[0] / 'grad_cam_gap.npy').shape == (15, 15)
    with pytest.raises(ValueError, match='Sequential has no mean for its images: pass mean='):
        explain(*arguments, layer='1', img_size=32)


def test_one_number_normalises_all_channels(model: nn.Module, tmp_path: Path) -> None:
    photograph(64, 64, 3).save(tmp_path / 'one.png')
    saved = []
    for number, mean in enumerate(((0.25,) * 3, 0.25, [0.25], np.full(3, 0.25), torch.full((3,), 0.25))):
        done = explain(
            model,
            [tmp_path / 'one.png'],
            ['grad_cam'],
            tmp_path / f'{number}',
            ['ca'],
            mean=mean,
            std=mean,
            save_maps=True,
        )
        saved.append(np.load(done.maps[0] / 'grad_cam_ca.npy'))
    assert all(np.array_equal(saved[0], other) for other in saved[1:])
    with pytest.raises(ValueError, match=r'^mean must hold one number or one per channel, got 2 for images of 3'):
        explain(model, [tmp_path / 'one.png'], ['grad_cam'], tmp_path, mean=(0.5, 0.5))


def test_the_picture_of_a_single_image_has_no_grid_beside_it(model: nn.Module, tmp_path: Path) -> None:
    photograph(20, 20, 3).save(tmp_path / 'a.png')
    done = explain(model, [tmp_path / 'a.png', tmp_path / 'missing.png'], ('grad_cam',), tmp_path / 'out')
    assert done.grids == [] and [path.name for path in (tmp_path / 'out').iterdir()] == ['a.png']


def test_each_row_is_drawn_once(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def counted(panels: list[Panel]) -> np.ndarray:
        drawn.append(panels[0].title.split('\n')[0])
        return draw_row(panels)

    monkeypatch.setattr('timm_castream.visualize.draw_row', counted)
    paths = [tmp_path / f'{i}.png' for i in range(3)]
    for path in paths:
        photograph(20, 20, 3).save(path)
    done = explain(model, paths, ('grad_cam',), tmp_path / 'out')
    assert drawn == ['0.png', '1.png', '2.png'] and len(done.grids) == 1


@pytest.mark.parametrize('style', [{'colours': 'rainbow'}, {'opacity': 1.5}])
def test_colours_and_an_opacity_that_do_not_exist_are_refused_before_an_image_is_read(
    style: dict[str, Any], model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match='|'.join(map(str, style.values()))):
        explain(model, [tmp_path / 'missing.png'], ('grad_cam',), tmp_path / 'out', **style)
    assert not (tmp_path / 'out').exists()


def test_no_image_is_overwritten_and_no_picture_twice(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / 'other').mkdir()
    paths = [tmp_path / 'a.png', tmp_path / 'other' / 'A.jpg', tmp_path / 'grid.png']
    for path in paths:
        photograph(20, 20, 3).save(path)
    before = [path.read_bytes() for path in paths]
    done = explain(model, paths, ('attention',), tmp_path, ('ca',))
    assert [path.read_bytes() for path in paths] == before
    assert [path.relative_to(tmp_path).as_posix() for path in done.pictures] == [
        'a.png.png',
        'other/A.png',
        'grid.png.png',
    ]
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

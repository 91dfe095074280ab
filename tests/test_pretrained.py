"""The program that makes the streams of the package, its settings, and the tables that come from its results."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks import pretrained as program
from benchmarks import pretrained_tries as tries
from benchmarks.pretrained_images import draw_images, halves, link_kept_back, thumbnails
from timm_castream.commands import fit
from timm_castream.hub.configs import shipped_streams
from timm_castream.stream import CAStream


@pytest.fixture(scope='module')
def settings():
    return yaml.safe_load((program.PACKAGE / 'fit.yaml').read_text(encoding='utf-8'))


def photograph(path, seed: int, size: int = 48):
    """Smooth random colours, so that a smaller copy looks alike and another seed does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def sources(tmp_path):
    for s, name in enumerate(('a', 'b')):
        for c, label in enumerate(('n01', 'n02')):
            for i in range(5):
                photograph(tmp_path / 'clones' / name / 'train' / label / f'{i}.png', 100 * s + 10 * c + i)
    for i, name in enumerate(('n01_x', 'n02_y', 'n03_z', 'n04_u', 'n05_v')):
        photograph(tmp_path / 'clones' / 'samples' / f'{name}.png', 1000 + i)
        photograph(tmp_path / 'clones' / 'a' / 'val' / name[:3] / 'own.png', 2000 + i)
    sets = [{'name': name, 'folder': f'{name}/train', 'count': 10} for name in ('a', 'b')]
    kept_back = [{'name': 'samples', 'folder': 'samples'}, {'name': 'a', 'folder': 'a/val', 'count': 3}]
    return {'seed': 0, 'images': sets, 'kept_back': kept_back}, tmp_path


def below(roots, folder):
    return sorted(str(path.relative_to(folder)) for root in roots for path in root.rglob('*.png'))


def test_images_are_drawn_by_the_seed_and_keep_their_class_folders(sources):
    settings, folder = sources
    for source in settings['images']:
        source['count'] = 3

    def drawn(output: str) -> list[str]:
        return below(draw_images(settings, folder / 'clones', folder / output), folder / output)

    first = drawn('one')
    assert len(first) == 6 and all(path.split('/')[-2] in ('n01', 'n02') for path in first)
    assert drawn('two') == first
    settings['seed'] = 1
    assert drawn('three') != first


def test_copies_of_photographs_that_are_kept_back_are_not_drawn(sources):
    settings, folder = sources
    clones = folder / 'clones'
    photograph(clones / 'a' / 'train' / 'n01' / '0.png', 1003, size=20)  # a smaller copy of one of samples
    photograph(clones / 'b' / 'train' / 'n02' / '4.png', 2001, size=64)  # a larger copy of one of val
    drawn = below(draw_images(settings, clones, folder / 'one'), folder / 'one')
    assert len(drawn) == 18
    assert not {'images/a/n01/0.png', 'images/b/n02/4.png'} & {*drawn}


def test_thumbnails_are_compared_by_correlation(sources):
    folder = sources[1] / 'clones' / 'a' / 'train' / 'n01'
    files = [folder / f'{i}.png' for i in range(3)]
    grey = [np.asarray(Image.open(f).convert('L').resize((16, 16), Image.Resampling.BOX)).ravel() for f in files]
    rows = thumbnails(files)
    assert np.allclose(rows @ rows.T, np.corrcoef(np.array(grey, dtype=float)), atol=1e-5)


def test_the_photographs_of_the_choice_are_not_those_of_the_final_measurement(sources):
    settings, folder = sources
    choice, last = halves(settings, folder / 'clones')
    assert [file.name[:3] for file in choice] == ['n01', 'n03', 'n05']
    assert [file.name[:3] for file in last] == ['n02', 'n04']
    folders = link_kept_back(settings, folder / 'clones', folder / 'out')
    assert below([folders['samples']], folders['samples']) == ['n02/n02_y.png', 'n04/n04_u.png']
    assert len(below([folders['val']], folder)) == 3


def test_every_stream_of_the_package_has_settings_that_castream_fit_knows(settings):
    assert {f'{name}_castream' for name in settings['networks']} >= shipped_streams().keys()
    parser = argparse.ArgumentParser()
    fit.add_options(parser)
    for name, options in settings['networks'].items():
        argv = [f'--{key.replace("_", "-")}={value}' for key, value in options.items()]
        parser.parse_args(['--model', name, '--images', 'x', *argv])


@pytest.mark.parametrize('page', ['pretrained', 'evidence'])
def test_the_pages_show_the_committed_figures(page):
    text = (program.PACKAGE.parents[1] / 'docs' / f'{page}.md').read_text(encoding='utf-8')
    assert program.table() in text


def test_the_page_shows_the_committed_tries():
    text = (program.PACKAGE.parents[1] / 'docs' / 'pretrained.md').read_text(encoding='utf-8')
    assert program.table(seeds=True) in text
    assert all(table in text for table in tries.tables().split('\n\n'))


@pytest.mark.parametrize('name', shipped_streams())
def test_every_stream_of_the_package_has_its_card(name, settings):
    path = program.PACKAGE / f'{name}.md'
    assert path.read_text(encoding='utf-8') == program.card(name.removesuffix('_castream'), settings)


def test_a_difference_is_that_of_the_two_columns_and_random_maps_are_taken_off(tmp_path):
    folder = tmp_path / 'network.seed3.set'
    folder.mkdir()
    methods = ('grad_cam', 'random')
    names = [f'{p}/{m}/{metric}' for p in ('gap', 'ca') for m in methods for metric in program.METRICS]
    names += [f'{p}/{kind}' for p in ('gap', 'ca') for kind in ('accuracy', 'prob')]
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 100, (40, len(names)))
    lines = [','.join(names), *(','.join(map(str, row)) for row in values)]
    (folder / 'images.csv').write_text('\n'.join(lines))
    (folder / 'evaluation.json').write_text('{"settings": {"seed": 0}}')
    found = {row['figure']: row for row in program.figures(folder)}
    assert {(row['network'], row['seed'], row['set']) for row in found.values()} == {('network', '3', 'set')}
    mean = dict(zip(names, values.mean(0), strict=True))
    gains = {m: mean[f'ca/{m}/average_gain'] - mean[f'gap/{m}/average_gain'] for m in methods}
    assert found['AG']['difference'] == pytest.approx(gains['grad_cam'], abs=0.01)
    assert found['AG less random']['difference'] == pytest.approx(gains['grad_cam'] - gains['random'], abs=0.01)
    paired = values[:, names.index('ca/accuracy')] - values[:, names.index('gap/accuracy')]
    margin = 1.96 * paired.std() / 40**0.5
    assert found['accuracy']['low'] == pytest.approx(paired.mean() - margin, abs=0.2 * margin)


def test_no_set_is_both_drawn_from_and_kept_back(settings):
    kept_back = {source['folder'] for source in settings['kept_back']}
    drawn = {source['folder'] for source in settings['images']}
    assert not any(one.startswith(other) for one in drawn for other in kept_back)
    assert all(source['terms'] for source in settings['images'])


def network_of_one_pixel(head):
    """A network whose map is the image itself."""

    class Network:
        frozen = staticmethod(nullcontext)
        run = staticmethod(lambda x, start=0: ([x], x.mean((2, 3))))
        logits = staticmethod(lambda vectors: vectors @ head)

    return Network()


def test_the_figures_of_a_try_are_those_of_the_protocol(tmp_path):
    """Accuracy, AD, AG and AI of Grad-CAM by a loop in float64."""
    rng = np.random.default_rng(0)
    files = [tmp_path / f'{i}.png' for i in range(4)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    head = torch.from_numpy(rng.normal(0, 4, (3, 5)).astype(np.float32))
    config = {
        'input_size': (3, 8, 8),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': (0.5, 0.5, 0.5),
        'std': (0.5, 0.5, 0.5),
    }
    labels = torch.tensor([0, 3, 2, 3])
    choice = tries.Choice(network_of_one_pixel(head), files, labels, config)
    found = choice.figures(lambda maps: maps[0].mean((2, 3)))
    for i, (file, label) in enumerate(zip(files, labels.tolist(), strict=True)):
        image = np.asarray(Image.open(file), float).transpose(2, 0, 1) / 255
        weights = head.numpy().astype(float)

        def probability(pixels, weights=weights, label=label):
            logits = (2 * pixels - 1).mean((1, 2)) @ weights
            return np.exp(logits)[label] / np.exp(logits).sum()

        cam = np.maximum(0, np.tensordot(weights[:, label], 2 * image - 1, 1))
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        before, after = probability(image), probability(image * cam)
        assert found['probability'][i] == pytest.approx(100 * before, rel=2e-3)
        assert found['AD'][i] == pytest.approx(100 * max(0, before - after) / before, abs=0.3)
        assert found['AG'][i] == pytest.approx(100 * max(0, after - before) / (1 - before), abs=0.3)
        assert found['AI'][i] == 100 * (after > before)
        assert found['accuracy'][i] == 100 * (np.argmax((2 * image - 1).mean((1, 2)) @ weights) == label)


def test_where_the_early_stages_average_the_last_query_is_that_of_the_mean():
    torch.manual_seed(0)
    stream = CAStream((4, 6, 8))
    maps = [torch.randn(2, d, s, s) for d, s in ((4, 8), (6, 4), (8, 2))]
    query = stream.blocks[1].proj(maps[1].mean((2, 3)))
    expected = [
        stream.blocks[2].proj(torch.softmax(maps[2][i].flatten(1).T @ query[i] / 8**0.5, 0) @ maps[2][i].flatten(1).T)
        for i in range(2)
    ]
    assert torch.allclose(tries.average_early(stream, maps), torch.stack(expected), atol=1e-5)
    assert torch.allclose(stream.step(-1, tries.last_query(stream, maps), maps[2]), stream(maps), atol=1e-6)

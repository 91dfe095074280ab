"""The program that makes the streams of the package, its settings, and the tables that come from its results."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks import pretrained as program
from timm_castream.commands import fit
from timm_castream.hub.configs import shipped_streams


@pytest.fixture(scope='module')
def settings():
    return yaml.safe_load((program.PACKAGE / 'fit.yaml').read_text(encoding='utf-8'))


@pytest.fixture
def sources(tmp_path):
    for name in ('a', 'b'):
        for label in ('n01', 'n02'):
            (tmp_path / 'clones' / name / 'train' / label).mkdir(parents=True)
            for i in range(5):
                path = tmp_path / 'clones' / name / 'train' / label / f'{i}.png'
                Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(path)
    sets = [{'name': name, 'folder': f'{name}/train', 'count': 3} for name in ('a', 'b')]
    return {'seed': 0, 'images': sets}, tmp_path


def test_images_are_drawn_by_the_seed_and_keep_their_class_folders(sources):
    settings, folder = sources

    def drawn(output: str) -> list[str]:
        roots = program.draw_images(settings, folder / 'clones', folder / output)
        return sorted(str(path.relative_to(folder / output)) for root in roots for path in root.rglob('*.png'))

    first = drawn('one')
    assert len(first) == 6 and all(path.split('/')[-2] in ('n01', 'n02') for path in first)
    assert drawn('two') == first
    settings['seed'] = 1
    assert drawn('three') != first


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


@pytest.mark.parametrize('name', shipped_streams())
def test_every_stream_of_the_package_has_its_card(name, settings):
    path = program.PACKAGE / f'{name}.md'
    assert path.read_text(encoding='utf-8') == program.card(name.removesuffix('_castream'), settings)


def test_a_difference_is_that_of_the_two_columns_and_random_maps_are_taken_off(tmp_path):
    folder = tmp_path / 'network.set'
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
    mean = dict(zip(names, values.mean(0), strict=True))
    gains = {m: mean[f'ca/{m}/average_gain'] - mean[f'gap/{m}/average_gain'] for m in methods}
    assert found['AG']['difference'] == pytest.approx(gains['grad_cam'], abs=0.01)
    assert found['AG less random']['difference'] == pytest.approx(gains['grad_cam'] - gains['random'], abs=0.01)
    paired = values[:, names.index('ca/accuracy')] - values[:, names.index('gap/accuracy')]
    margin = 1.96 * paired.std() / 40**0.5
    assert found['accuracy']['low'] == pytest.approx(paired.mean() - margin, abs=0.2 * margin)


def test_only_training_folders_are_drawn_from(settings):
    assert all(source['folder'].endswith('/train') and source['terms'] for source in settings['images'])

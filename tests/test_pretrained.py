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


def test_only_training_folders_are_drawn_from(settings):
    assert all(source['folder'].endswith('/train') and source['terms'] for source in settings['images'])

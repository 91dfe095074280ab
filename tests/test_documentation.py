"""Every code block and command of the pages runs as a reader would run it, and the tables of the pages are complete."""

from __future__ import annotations

import doctest
import importlib
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from documentation import Block, Session, commands, read_blocks
from PIL import Image
from sklearn.datasets import load_sample_image

import timm_castream
from timm_castream import demo
from timm_castream.attribution.methods import METHODS
from timm_castream.backbones.architectures import EXCLUDED_FILES, EXCLUDED_NAMES
from timm_castream.metrics import METRICS
from timm_castream.timm_scripts import finder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'benchmarks/README.md', *sorted(ROOT.glob('docs/*.md'))]
QUICK_DEMO = demo.DemoSettings(train_images=64, validation_images=32, explained_images=4, gap_epochs=1, stream_epochs=1)
# Weights cannot be downloaded in a test, so the smallest network of the same class runs without them. It has as many
# classes as the image folder.
SUBSTITUTES = {
    "'resnet50', pretrained=True": "'test_resnet', num_classes=2",
    '--model resnet50 --pretrained': '--model test_resnet --num-classes 2',
}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runnable(page: Path) -> list[Block]:
    """The blocks of a page that a test runs: not the marked ones, and not those of make and pip alone."""
    return [block for block in read_blocks(page) if block.reason is None and not is_make(block)]


def is_make(block: Block) -> bool:
    return block.language == 'bash' and all('make' in words for words in commands(block.code))


def write_photographs(folder: Path, side: int = 64) -> None:
    """An image folder as a reader has one, `train` and `val`, of two classes: crops of scikit-learn's photographs."""
    for name in ('china', 'flower'):
        photograph = Image.fromarray(load_sample_image(f'{name}.jpg'))
        for i in range(12):
            split = folder / ('val' if i % 3 == 0 else 'train') / name
            split.mkdir(parents=True, exist_ok=True)
            left, top = 40 * i, 20 * i
            photograph.crop((left, top, left + 180, top + 180)).resize((side, side)).save(split / f'{i:03}.jpg')


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_true_and_false_are_written_as_python_reads_them(page: Path) -> None:
    # ParseKwargs gives the string 'true', which attach refuses.
    assert not re.findall(r'\b\w+=(?:true|false)\b', page.read_text(encoding='utf-8'))


@pytest.fixture(scope='session')
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages expect of a reader: the demo's folder, a photograph, an image folder."""
    folder = tmp_path_factory.mktemp('belongings')
    demo.run(folder / 'demo_output', settings=QUICK_DEMO)
    Image.fromarray(load_sample_image('china.jpg')).save(folder / 'photo.jpg')
    write_photographs(folder / 'my_images')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if runnable(page)], ids=page_id)
def test_the_blocks_of_a_page_run_in_order(page, belongings, tmp_path):
    shutil.copytree(belongings, tmp_path, dirs_exist_ok=True)
    session = Session(tmp_path)
    for block in runnable(page):
        code = block.code
        for found, substitute in SUBSTITUTES.items():
            code = code.replace(found, substitute)
        try:
            session.run(Block(block.language, code, block.line, None))
        except Exception as error:
            raise AssertionError(f'{page_id(page)}, line {block.line}: {error}\n{block.code}') from error


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_blocks_that_are_not_run_give_a_reason(page):
    text = page.read_text(encoding='utf-8')
    skipped = [block for block in read_blocks(page) if block.reason is not None]
    assert all(len(block.reason) > 10 for block in skipped)
    marks = re.findall(r'^ *<!-- not run:', text, re.MULTILINE)
    assert len(skipped) == len(marks)  # each mark stands directly above a block


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_python_blocks_that_are_not_run_are_python(page):
    for block in read_blocks(page):
        if block.language == 'python':
            compile(block.code, page_id(page), 'exec')


def test_make_targets_of_the_pages_exist():
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    for page in PAGES:
        for block in read_blocks(page):
            for words in commands(block.code) if block.language == 'bash' else ():
                if 'make' in words:
                    target = words[words.index('make') + 1]
                    assert target in targets, f'{page_id(page)}: make {target}'


def table(page: str, column: str) -> dict[str, dict[str, str]]:
    """The rows of the first tables of a page that have this column, by their first cell without backticks."""
    rows: dict[str, dict[str, str]] = {}
    header: list[str] = []
    for line in (ROOT / 'docs' / page).read_text(encoding='utf-8').splitlines():
        cells = [cell.strip() for cell in line.strip().strip('|').split(' | ')]
        if not line.startswith('|'):
            header = []
        elif not header:
            header = cells
        elif column in header and not set(line) <= set('|- '):
            rows[cells[0].strip('`')] = dict(zip(header, cells, strict=True))
    return rows


def test_the_page_on_saliency_has_every_method_and_its_title():
    assert {name: row['title'] for name, row in table('saliency.md', 'title').items()} == {
        name: method.title for name, method in METHODS.items()
    }


def test_the_page_on_the_protocol_has_every_metric_and_its_direction():
    rows = table('protocol.md', 'heading')
    assert rows.keys() == METRICS.keys()
    for name, metric in METRICS.items():
        assert rows[name]['heading'] == metric.symbol, name
        assert rows[name]['better'] == ('high' if metric.higher_is_better else 'low'), name


def test_the_page_on_limits_has_every_reason_for_an_exclusion():
    reasons = {*EXCLUDED_FILES.values(), *(reason for *_, reason in EXCLUDED_NAMES)}
    assert {row['reason'] for row in table('limits.md', 'reason').values()} == reasons


def test_the_reference_has_every_public_name():
    reference = (ROOT / 'docs/reference.md').read_text(encoding='utf-8')
    names = {*timm_castream.__all__} - {'__version__'}
    assert names <= set(re.findall(r'\w+', reference)), names


def test_the_page_on_training_has_every_recipe():
    rows = table('training.md', 'recipe').values()
    named = {name for row in rows for name in re.findall(r'\w+\.yaml', row['recipe'])}
    assert named == {path.name for path in (ROOT / 'train_wrappers/recipes').glob('*.yaml')}


@pytest.mark.slow
def test_the_steps_on_ones_own_data_run_with_timms_script(belongings, tmp_path):
    try:
        finder.find_script('train.py')
    except finder.ScriptNotFoundError as error:
        pytest.skip(f"timm's train.py is not to be had here: {error}")
    shutil.copytree(belongings, tmp_path, dirs_exist_ok=True)
    steps = [block for block in read_blocks(ROOT / 'docs/training.md') if '--data-dir my_images' in block.code]
    assert [commands(step.code)[0][1] for step in steps] == ['train', 'train', 'evaluate']
    session = Session(tmp_path)
    for step in steps:
        code = step.code.replace('resnet50 --pretrained', 'resnet50').replace('resnet50', 'test_resnet')
        if commands(code)[0][1] == 'train':
            code = f'{code.rstrip()} --epochs 1 --img-size 64 --batch-size 4 --workers 1 --device cpu'
        session.run(Block('bash', code, step.line, None))
    assert 'CA - GAP' in session.output


@pytest.mark.slow
def test_the_example_runs_cell_by_cell_on_an_image_folder(tmp_path):
    write_photographs(tmp_path / 'my_images')
    source = (ROOT / 'examples/own_images.py').read_text(encoding='utf-8')
    settings = {
        "'resnet18'": "'test_resnet'",
        'PRETRAINED = True': 'PRETRAINED = False',
        '= 224': '= 64',
        'CLASSIFIER_EPOCHS = 4': 'CLASSIFIER_EPOCHS = 1',
    }
    for found, substitute in settings.items():
        assert source.count(found) == 1
        source = source.replace(found, substitute)
    cells = re.split(r'^# %%.*$', source, flags=re.MULTILINE)[1:]
    assert len(cells) > 8
    session = Session(tmp_path)
    for cell in cells:
        session.run(Block('python', cell, 0, None))
    assert 'CA - GAP of Average Gain' in session.output
    difference = float(re.search(r'before training: (\S+)', session.output)[1])
    assert difference < 1e-5
    model = session.names['model']
    assert (tmp_path / 'my_stream.safetensors').is_file()
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith('castream.'))
    assert len(list((tmp_path / 'explained').glob('*.png'))) == 3  # two pictures and their grid
    assert isinstance(model, timm.models.ResNet)


def test_examples_in_docstrings_give_what_they_print() -> None:
    package = Path(timm_castream.__file__).parent
    modules = [
        '.'.join(['timm_castream', *path.relative_to(package).with_suffix('').parts])
        for path in package.rglob('*.py')
        if '>>> ' in path.read_text(encoding='utf-8')
    ]
    assert modules
    for name in modules:
        result = doctest.testmod(importlib.import_module(name), extraglobs={'torch': torch})
        assert result.attempted and not result.failed, name

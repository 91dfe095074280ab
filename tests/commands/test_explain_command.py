"""`castream explain` and `castream list-images` on folders of images, against timm's own forward."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from timm_castream import cli
from timm_castream.datasets import create_dataset

NAMES = ['cat', 'dog', 'eel', 'fox']


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name in ('a/im10.png', 'a/im9.png', 'b/im9.png'):
        (tmp_path / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / 'images' / name)
    return tmp_path / 'images'


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=4).eval()


@pytest.fixture
def explain(tmp_path, model):
    args = {'num_classes': 4, 'model_kwargs': {}, 'label_names': NAMES, 'img_size': 32}
    torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'last.pth.tar')

    def run(*argv: str) -> int:
        options = ['--model', 'test_resnet', '--checkpoint', str(tmp_path / 'last.pth.tar'), '--device', 'cpu']
        return cli.main(['explain', *options, '--methods', 'grad_cam', '--output', str(tmp_path / 'out'), *argv])

    return run


def probabilities(model, path):
    cfg = model.pretrained_cfg
    transform = create_transform(32, mean=cfg['mean'], std=cfg['std'], crop_pct=cfg['crop_pct'],
                                 interpolation=cfg['interpolation'])  # fmt: skip
    with torch.no_grad():
        return model(transform(Image.open(path).convert('RGB'))[None]).softmax(1)[0]


@pytest.mark.parametrize('option', [('--images',), ()])
def test_the_folders_of_images_stay_and_their_classes_are_printed(option, images, model, explain, tmp_path, capsys):
    assert explain(*option, str(images)) == 0
    written = {path.relative_to(tmp_path / 'out').as_posix() for path in (tmp_path / 'out').rglob('*.png')}
    assert written == {'a/im9.png', 'a/im10.png', 'b/im9.png', 'grid.png'}
    lines = capsys.readouterr().out.splitlines()
    for line, path in zip(lines, (images / name for name in ('a/im9.png', 'a/im10.png', 'b/im9.png')), strict=False):
        best = probabilities(model, path).topk(3)
        expected = ', '.join(f'{NAMES[i]} {p:.3f}' for p, i in zip(*map(torch.Tensor.tolist, best), strict=True))
        assert line.startswith(f'{path}: ') and line.endswith(f': {expected}')


def test_images_that_differ_in_their_endings_keep_them(images, explain, tmp_path):
    image = Image.open(images / 'a/im9.png')
    image.save(images / 'a/im9.jpg')
    image.save(images / 'a/IM9.bmp')
    assert explain('--images', str(images), '--save-maps') == 0
    written = {path.relative_to(tmp_path / 'out').as_posix() for path in (tmp_path / 'out').rglob('*.png')}
    assert written == {'a/im9.png.png', 'a/im9.jpg.png', 'a/IM9.bmp.png', 'a/im10.png', 'b/im9.png', 'grid.png'}
    assert (tmp_path / 'out/a/im9.jpg_maps').is_dir() and (tmp_path / 'out/a/im10_maps').is_dir()


def test_the_picture_of_an_image_in_the_output_folder_has_its_name(images, explain, tmp_path):
    assert explain(str(images / 'b/im9.png'), '--output', str(images / 'b')) == 0
    assert {path.name for path in (images / 'b').iterdir()} == {'im9.png', 'im9.png.png'}


@pytest.mark.parametrize('output', ['images/out', 'images', '.'])
def test_pictures_of_an_earlier_call_are_no_images(images, explain, tmp_path, capsys, output):
    told = []
    for _ in range(2):
        assert explain('--images', str(images), '--output', str(tmp_path / output), '--save-maps') == 0
        told.append([line.partition(': ')[0] for line in capsys.readouterr().out.splitlines() if ': ' in line])
    assert told[0] == told[1] == [str(images / name) for name in ('a/im9.png', 'a/im10.png', 'b/im9.png')]
    if output == 'images/out':
        assert explain('--images', str(tmp_path / output)) == 2
        assert 'no images but pictures' in capsys.readouterr().err


def test_images_named_below_this_folder_keep_their_folders(images, explain, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    assert explain('a/im9.png') == explain('b/im9.png') == 0
    assert {path.relative_to(tmp_path / 'out').as_posix() for path in (tmp_path / 'out').rglob('*.png')} == {
        'a/im9.png', 'b/im9.png'}  # fmt: skip


def test_folders_among_images_are_read_in_natural_order(images, explain, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(images)
    assert explain('b/im9.png', 'a') == 0
    explained = [line.partition(':')[0] for line in capsys.readouterr().out.splitlines() if ': GAP: ' in line]
    assert explained == ['b/im9.png', 'a/im9.png', 'a/im10.png']
    assert (tmp_path / 'out' / 'a' / 'im10.png').is_file()


@pytest.mark.parametrize(('options', 'expected'), [
    (['--target', 'dog'], [1]), (['--target', '3', 'cat'], [3, 0]), (['--top-k', '2'], 2), ([], 1),
])  # fmt: skip
def test_the_classes_asked_for_are_explained(images, model, explain, tmp_path, options, expected):
    path = images / 'b' / 'im9.png'
    assert explain(str(path), '--save-maps', *options) == 0
    facts = json.loads((tmp_path / 'out' / 'im9_maps' / 'explanation.json').read_text())
    best = probabilities(model, path).argsort(descending=True).tolist()
    chosen = best[:expected] if isinstance(expected, int) else expected
    assert facts['explained']['gap'] == chosen
    assert [entry['name'] for entry in facts['top']['gap']] == [NAMES[i] for i in best]
    files = {'grad_cam_gap.npy'} if len(chosen) == 1 else {f'grad_cam_gap_{label}.npy' for label in chosen}
    assert {path.name for path in (tmp_path / 'out' / 'im9_maps').glob('*.npy')} == files


def test_every_positive_class_of_a_multi_label_image_is_explained(images, model, explain, tmp_path):
    path = images / 'b' / 'im9.png'
    assert explain(str(path), '--save-maps', '--multilabel') == 0
    facts = json.loads((tmp_path / 'out' / 'im9_maps' / 'explanation.json').read_text())
    logits = probabilities(model, path).log()  # up to a constant, which the sigmoid needs
    with torch.no_grad():
        cfg = model.pretrained_cfg
        transform = create_transform(32, mean=cfg['mean'], std=cfg['std'], crop_pct=cfg['crop_pct'],
                                     interpolation=cfg['interpolation'])  # fmt: skip
        logits = model(transform(Image.open(path))[None])[0]
    assert facts['explained']['gap'] == ((logits >= 0).nonzero().flatten().tolist() or [int(logits.argmax())])


def test_mean_and_std_normalise_in_place_of_the_networks_own(images, model, explain, tmp_path, capsys):
    root, options = images / 'b', ['--mean', '0.9', '0.8', '0.7', '--std', '0.1', '0.2', '0.3']
    cfg = model.pretrained_cfg
    transform = create_transform(32, mean=(0.9, 0.8, 0.7), std=(0.1, 0.2, 0.3), crop_pct=cfg['crop_pct'],
                                 interpolation=cfg['interpolation'])  # fmt: skip
    with torch.no_grad():
        expected = model(transform(Image.open(root / 'im9.png'))[None]).softmax(1)[0]
    best = expected.max().item()
    assert abs(best - probabilities(model, root / 'im9.png').max().item()) > 1e-3  # of another normalisation
    assert explain('--images', str(root), *options) == 0
    assert f' {best:.3f}' in capsys.readouterr().out
    network = ['--model', 'test_resnet', '--checkpoint', str(tmp_path / 'last.pth.tar'), '--device', 'cpu', '-j', '0']
    argv = ['evaluate', *network, '--data-dir', str(root), '--target', 'predicted', '--metrics', 'average_drop',
            '--methods', 'grad_cam', '--output', str(tmp_path / 'evaluation'), '--img-size', '32']  # fmt: skip
    assert cli.main([*argv, *options]) == 0
    with open(tmp_path / 'evaluation' / 'images.csv', encoding='utf-8') as file:
        (row,) = csv.DictReader(file)
    assert float(row['gap/prob']) == pytest.approx(best, abs=1e-5)


def test_a_number_sign_in_a_path_is_a_letter(images, model, tmp_path, capsys):
    folder = images.rename(tmp_path / 'images #1')
    (folder / 'a' / 'im9.png').rename(folder / 'a' / 'im#9.png')
    args = {'num_classes': 4, 'label_names': NAMES, 'img_size': 32}
    torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'last #2.pth.tar')
    network = ['--model', 'test_resnet', '--checkpoint', str(tmp_path / 'last #2.pth.tar'), '--device', 'cpu']
    out = tmp_path / 'out #3'
    options = [*network, '--methods', 'grad_cam', '--output', str(out)]
    assert cli.main(['explain', '--images', str(folder), *options]) == 0
    best = probabilities(model, folder / 'a' / 'im#9.png').max().item()
    assert f'{folder}/a/im#9.png: ' in (told := capsys.readouterr().out) and f' {best:.3f}' in told
    assert (out / 'a' / 'im#9.png').is_file()
    argv = ['--data-dir', str(folder), '--target', 'predicted', '--metrics', 'average_drop', '-j', '0']
    assert cli.main(['evaluate', *options, *argv]) == 0
    with open(out / 'images.csv', encoding='utf-8') as file:
        assert [row['file'] for row in csv.DictReader(file)] == ['a/im10.png', 'a/im#9.png', 'b/im9.png']


def test_unknown_classes_are_refused_before_the_work(images, explain, tmp_path, capsys):
    assert explain(str(images / 'a' / 'im9.png'), '--target', 'dgo') == 2
    assert "no class 'dgo'; there are dog" in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_a_photograph_of_which_most_is_cropped_away_is_told(explain, tmp_path, caplog):
    Image.new('RGB', (900, 300)).save(tmp_path / 'wide.png')
    Image.new('RGB', (400, 300)).save(tmp_path / 'photo.png')
    assert explain(str(tmp_path / 'wide.png'), str(tmp_path / 'photo.png')) == 0
    told = [record.getMessage() for record in caplog.records if 'pixels' in record.getMessage()]
    assert len(told) == 1 and 'wide.png' in told[0] and 'of the 900 x 300 pixels' in told[0]
    caplog.clear()
    assert explain(str(tmp_path / 'wide.png'), '--crop-mode', 'squash') == 0
    assert explain(str(tmp_path / 'wide.png'), '--input-size', '3', '32', '96') == 0
    assert 'pixels' not in caplog.text


@pytest.mark.parametrize('channels', [1, 4])
def test_networks_of_other_channels_get_them(images, tmp_path, channels):
    model = timm.create_model('test_resnet_castream', num_classes=4, in_chans=channels)
    args = {'num_classes': 4, 'in_chans': channels, 'model_kwargs': {}, 'label_names': NAMES}
    torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'other.pth.tar')
    argv = ['explain', str(images / 'a' / 'im9.png'), '--model', 'test_resnet_castream', '--checkpoint',
            str(tmp_path / 'other.pth.tar'), '--device', 'cpu', '--output', str(tmp_path / 'out'), '--save-maps',
            '--input-size', str(channels), '32', '64']  # fmt: skip
    assert cli.main(argv) == 0
    assert (tmp_path / 'out' / 'im9.png').is_file()


def test_maps_are_matched_by_the_names_that_list_images_writes(images, explain, tmp_path, capsys):
    assert cli.main(['list-images', '--images', str(images)]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == ['a/im9.png', 'a/im10.png', 'b/im9.png']
    assert cli.main(['list-images', '--data-dir', str(images)]) == 0
    assert capsys.readouterr().out.splitlines() == names == create_dataset('', images).filenames()
    ramp = np.linspace(0, 1, 16).reshape(4, 4)
    maps = {name: ramp.T if name.startswith('b') else ramp for name in sorted(names)}  # im10 lies in front of im9
    np.savez(tmp_path / 'maps.npz', **maps)
    assert explain('--images', str(images), '--maps', f'own={tmp_path / "maps.npz"}', '--save-maps') == 0
    for name in names:
        saved = np.load(tmp_path / 'out' / name.replace('.png', '_maps') / 'own_gap.npy')
        np.testing.assert_allclose(saved, maps[name], atol=1e-6)
    del maps['a/im10.png']
    np.savez(tmp_path / 'maps.npz', **maps)
    assert explain('--images', str(images), '--maps', f'own={tmp_path / "maps.npz"}') == 2
    assert 'no map for 1 of the 3 images: a/im10.png' in capsys.readouterr().err


def test_the_seed_and_the_masked_images_at_a_time_are_those_of_evaluate(images, explain, tmp_path, capsys):
    maps = []
    for seed in ('1', '2', '1'):
        options = (
            '--img-size',
            '96',
            '--methods',
            'random',
            'score_cam',
            '--seed',
            seed,
            '--mask-batch-size',
            '3',
            '--save-maps',
        )
        assert explain(str(images / 'a/im9.png'), *options, '--output', str(tmp_path / f'out{len(maps)}')) == 0
        (path,) = (tmp_path / f'out{len(maps)}').rglob('random_gap.npy')
        maps.append(np.load(path))
    assert np.array_equal(maps[0], maps[2]) and not np.array_equal(maps[0], maps[1])
    with pytest.raises(SystemExit):
        explain(str(images / 'a/im9.png'), '--mask-batch-size', '0')
    assert "--mask-batch-size: '0' is out of range" in capsys.readouterr().err


def test_both_answers_of_one_logit_can_be_asked_for(images, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=1).eval()
    torch.save(model.state_dict(), tmp_path / 'one.pth')
    options = [
        '--model',
        'test_resnet',
        '--checkpoint',
        str(tmp_path / 'one.pth'),
        '--num-classes',
        '1',
        '--device',
        'cpu',
    ]
    argv = ['explain', str(images / 'a/im9.png'), *options, '--img-size', '32', '--methods', 'random', '--save-maps']
    for target in (0, 1):
        out = tmp_path / f'out{target}'
        assert cli.main([*argv, '--target', str(target), '--output', str(out)]) == 0
        explanation = json.loads((out / 'im9_maps/explanation.json').read_text())
        assert explanation['explained'] == {'gap': [target]}
    assert cli.main([*argv, '--target', '2', '--output', str(tmp_path / 'out2')]) == 2
    assert 'the model has the classes 0 to 1' in capsys.readouterr().err
    cfg = model.pretrained_cfg
    transform = create_transform(32, mean=cfg['mean'], std=cfg['std'], crop_pct=cfg['crop_pct'],
                                 interpolation=cfg['interpolation'])  # fmt: skip
    with torch.no_grad():
        yes = model(transform(Image.open(images / 'a/im9.png').convert('RGB'))[None]).sigmoid().item()
    found = {entry['index']: entry['probability'] for entry in explanation['top']['gap']}
    assert found == pytest.approx({1: yes, 0: 1 - yes}, abs=1e-4)


def test_an_image_that_is_named_twice_keeps_its_name(images, explain, tmp_path):
    assert explain(*[str(images / 'b/im9.png')] * 2) == 0
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'im9.png', 'im9_2.png', 'grid.png'}

"""The classes of images against those of the network, and their names in the results of an evaluation."""

import csv
import json
import math

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from timm_castream import cli
from timm_castream.datasets import align_classes, create_dataset
from timm_castream.evaluate import evaluate

NAMES = ['cat', 'dog', 'eel']


@pytest.fixture
def folders(tmp_path):
    """val/{dog,eel}, other/{dog,zebra}, flat/, ids/{goldfish, Egyptian cat}: two images a class."""
    rng = np.random.default_rng(0)
    for folder in ('val/dog', 'val/eel', 'other/dog', 'other/zebra', 'flat', 'ids/n01443537', 'ids/n02124075'):
        (tmp_path / folder).mkdir(parents=True)
        for i in (10, 9):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / folder / f'{i}.png')
    return tmp_path


def make_model(names=NAMES, num_classes=3):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=num_classes).eval()
    if names:
        model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names}
    return model


def loader_of(dataset, model):
    cfg = model.pretrained_cfg
    return timm.data.create_loader(
        dataset, (3, 32, 32), 4, mean=cfg['mean'], std=cfg['std'], num_workers=0, device=torch.device('cpu'),
        persistent_workers=False)  # fmt: skip


def run(dataset, model, **kwargs):
    return evaluate(model, loader_of(dataset, model), ('random',), metrics=('average_drop',), **kwargs)


def rows_of(folder):
    with open(folder / 'images.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_images_csv_names_files_and_classes(folders, tmp_path):
    dataset = create_dataset('', folders / 'val', '', label_names=NAMES)
    run(dataset, make_model(), output_dir=tmp_path / 'out')
    rows = rows_of(tmp_path / 'out')
    assert [row['file'] for row in rows] == ['dog/9.png', 'dog/10.png', 'eel/9.png', 'eel/10.png']
    assert [(row['gap/class'], row['gap/class_name']) for row in rows] == [('1', 'dog')] * 2 + [('2', 'eel')] * 2
    run(create_dataset('', folders / 'val', '', label_names=NAMES), make_model(None), output_dir=tmp_path / 'unnamed')
    assert 'gap/class_name' not in rows_of(tmp_path / 'unnamed')[0]


def test_labels_of_another_order_are_refused_with_the_call_that_mends_them(folders):
    model = make_model()
    with pytest.raises(ValueError, match=r"Class 0 is 'dog' in the data set and 'cat' in the model.*align_classes"):
        run(ImageFolder(folders / 'val'), model)
    dataset = ImageFolder(folders / 'val')
    align_classes(dataset, NAMES)
    expected = run(create_dataset('', folders / 'val', '', label_names=NAMES), model)
    assert sorted(run(dataset, model).values.pairs['gap/prob']) == pytest.approx(
        sorted(expected.values.pairs['gap/prob'])
    )


def test_a_class_map_decides_by_itself(folders):
    mapped = create_dataset('', folders / 'val', '', class_map={'dog': 2, 'eel': 0})
    assert run(mapped, make_model()).values.pairs['gap/class'].tolist() == [2, 2, 0, 0]


def test_more_classes_than_the_network_has_are_explained_as_predicted(folders, caplog):
    dataset = create_dataset('', folders / 'val', '', label_names=['a', 'b', 'c', 'dog', 'eel'])
    with pytest.raises(ValueError, match='5 classes, the model has 3'):
        run(dataset, make_model(None))
    report = run(dataset, make_model(None), target='predicted')
    assert math.isnan(report.accuracy['gap'].value) and report.num_images == 4
    assert 'no accuracy is measured' in caplog.text


def test_images_without_classes_are_explained_as_predicted(folders):
    dataset = create_dataset('', folders / 'flat', '')
    with pytest.raises(ValueError, match=r'flat lie in no folders of classes.*--target predicted'):
        run(dataset, make_model())
    model = make_model()
    report = run(dataset, model, target='predicted')
    with torch.no_grad():
        x, _ = next(iter(loader_of(create_dataset('', folders / 'flat', ''), model)))
        assert report.values.pairs['gap/class'].tolist() == model(x).argmax(1).tolist()
    assert math.isnan(report.accuracy['gap'].value)


def test_labels_that_cannot_be_compared_have_no_accuracy_where_the_prediction_is_explained(folders, caplog):
    dataset = create_dataset('', folders / 'val', '')  # two classes, and the network has three without names
    report = run(dataset, make_model(None), target='predicted')
    assert math.isnan(report.accuracy['gap'].value) and report.num_images == 4
    assert 'explained, and no accuracy is measured' in caplog.text and 'labels 0 to 1' not in caplog.text
    assert run(dataset, make_model(None)).accuracy['gap'].value in (0, 25, 50, 75, 100)
    assert 'The labels 0 to 1 are explained.' in caplog.text


class TestCommand:
    @pytest.fixture
    def options(self, tmp_path):
        model = make_model(None)
        args = {'num_classes': 3, 'model_kwargs': {}, 'label_names': NAMES, 'img_size': 32}
        torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'last.pth.tar')
        return ['evaluate', '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'last.pth.tar'), '--device', 'cpu',
                '-j', '0', '--methods', 'random', '--metrics', 'average_drop', '--output', str(tmp_path / 'out')]  # fmt: skip

    def test_folders_have_the_indices_of_the_checkpoint(self, folders, tmp_path, options):
        assert cli.main([*options, '--data-dir', str(folders / 'val'), '--split', '']) == 0
        assert {row['gap/class_name'] for row in rows_of(tmp_path / 'out')} == {'dog', 'eel'}
        assert {row['gap/class'] for row in rows_of(tmp_path / 'out')} == {'1', '2'}

    def test_new_classes_are_refused_and_explained_as_predicted(self, folders, tmp_path, options, capsys):
        argv = [*options, '--data-dir', str(folders / 'other'), '--split', '']
        assert cli.main(argv) == 2
        assert (
            "the class 'zebra' that is not known: the known classes are 'cat', 'dog', 'eel'" in capsys.readouterr().err
        )
        assert cli.main([*argv, '--target', 'predicted']) == 0
        assert len(rows_of(tmp_path / 'out')) == 4

    def test_a_misspelt_class_of_imagenet_is_refused_with_the_words_that_are_near(self, folders, tmp_path, capsys):
        (folders / 'val').rename(folders / 'photos')
        (folders / 'photos' / 'dog').rename(folders / 'photos' / 'goldfisch')
        model = timm.create_model('test_resnet')
        ids = list(timm.data.ImageNetInfo().label_names())
        names = {'label_names': ids, 'num_classes': 1000, 'model_kwargs': {}, 'img_size': 32}
        torch.save({'state_dict': model.state_dict(), 'args': names}, tmp_path / 'imagenet.pth.tar')
        argv = ['evaluate', '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'imagenet.pth.tar')]
        assert cli.main([*argv, '--device', 'cpu', '--data-dir', str(folders / 'photos'), '--split', '']) == 2
        error = capsys.readouterr().err
        assert "Near goldfisch are 'goldfish', 'goldfinch'." in error and 'n01440764' not in error

    def test_folders_of_a_network_without_names_need_a_class_map_or_the_predicted_class(
        self, folders, tmp_path, capsys
    ):
        torch.save(make_model(None).state_dict(), tmp_path / 'unnamed.pth')
        argv = ['evaluate', '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'unnamed.pth'), '--num-classes', '3',
                '--device', 'cpu', '-j', '0', '--methods', 'random', '--metrics', 'average_drop', '--img-size', '32',
                '--output', str(tmp_path / 'out'), '--data-dir', str(folders / 'val'), '--split', '']  # fmt: skip
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert '2 classes, the model has 3' in error and '--class-map' in error and '--target predicted' in error
        (tmp_path / 'map.txt').write_text('eel\nnothing\ndog\n')
        assert cli.main([*argv, '--class-map', str(tmp_path / 'map.txt')]) == 0
        assert [row['gap/class'] for row in rows_of(tmp_path / 'out')] == ['2', '2', '0', '0']

    def test_wordnet_ids_have_imagenets_indices_where_the_network_has_its_classes(self, folders, tmp_path):
        torch.save(make_model(None, 1000).state_dict(), tmp_path / 'weights.pth')
        argv = ['evaluate', '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'weights.pth'), '--device', 'cpu', '-j',
                '0', '--methods', 'random', '--metrics', 'average_drop', '--output', str(tmp_path / 'out'), '--data-dir',
                str(folders / 'ids'), '--split', '', '--img-size', '32']  # fmt: skip
        assert cli.main(argv) == 0
        assert [row['gap/class'] for row in rows_of(tmp_path / 'out')] == ['1', '1', '285', '285']

    def test_a_network_of_one_channel_gets_grey_images_of_any_size(self, folders, tmp_path):
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=3, in_chans=1)
        args = {'num_classes': 3, 'in_chans': 1, 'model_kwargs': {}, 'label_names': NAMES}
        torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'grey.pth.tar')
        argv = ['evaluate', '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'grey.pth.tar'), '--device', 'cpu',
                '-j', '0', '--methods', 'grad_cam', '--metrics', 'average_drop', '--output', str(tmp_path / 'out'),
                '--data-dir', str(folders / 'val'), '--split', '', '--input-size', '1', '32', '64']  # fmt: skip
        assert cli.main(argv) == 0
        assert json.loads((tmp_path / 'out' / 'evaluation.json').read_text())['settings']['input_size'] == [1, 32, 64]

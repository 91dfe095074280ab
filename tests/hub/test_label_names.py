"""Names of classes: kept with weights, and compared with those of data sets."""

import argparse
import json
import logging

import pytest
import timm
import torch

from timm_castream.hub.label_names import class_index, class_name, known_names, label_names, set_label_names
from timm_castream.hub.load import open_model
from timm_castream.hub.read import checkpoint_label_names
from timm_castream.hub.repository import write_repository


def make(num_classes: int | None = 3, names=None, descriptions=None, **kwargs):
    model = timm.create_model('test_resnet', num_classes=num_classes, **kwargs)
    if names is not None:
        model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names, 'label_descriptions': descriptions}
    return model


@pytest.fixture
def imagenet():
    """A network as timm makes it with ImageNet's weights."""
    return make(None)


@pytest.mark.parametrize(
    ('names', 'descriptions', 'expected'),
    [
        (('a', 'b', 'c'), None, 'b'),
        ({1: 'b'}, None, 'b'),
        ({'1': 'b'}, {'b': 'a bee'}, 'a bee'),
        ({2: 'c'}, None, 'class 1'),
        (('a', 'n01443537', 'c'), None, 'goldfish, Carassius auratus'),
        (('a', 'b'), None, 'class 1'),  # of weights with other classes
        ((), None, 'class 1'),
        (None, None, 'class 1'),
    ],
)
def test_classes_are_named_by_the_models_config(names, descriptions, expected):
    assert class_name(make(3, names, descriptions), 1) == expected


def test_imagenets_names_are_those_of_its_weights_alone(imagenet, tmp_path):
    assert class_name(imagenet, 1).startswith('goldfish')
    assert class_name(make(1000), 1) == 'class 1'  # a network of one's own with as many classes
    imagenet.reset_classifier(10)
    assert class_name(imagenet, 1) == 'class 1'
    model = torch.nn.Module()
    model.num_classes = 1000
    assert class_name(model, 1) == 'class 1'
    torch.save({'state_dict': make(None).state_dict()}, tmp_path / 'own.pth')
    for opened in (open_model('test_resnet', tmp_path / 'own.pth'), open_model('test_resnet')):
        assert label_names(opened) is None and class_name(opened, 1) == 'class 1'


def test_a_frozen_classifier_of_timms_weights_has_imagenets_classes(tmp_path):
    args = argparse.Namespace(
        num_classes=None, in_chans=None, gp=None, model_kwargs={'freeze_backbone': True, 'backbone_pretrained': True}
    )
    torch.save({'state_dict': timm.create_model('test_resnet_castream').state_dict(), 'args': args}, tmp_path / 'a.pth')
    assert class_name(open_model('test_resnet_castream', tmp_path / 'a.pth'), 1).startswith('goldfish')
    args.model_kwargs.pop('freeze_backbone')  # every weight was trained
    torch.save({'state_dict': timm.create_model('test_resnet_castream').state_dict(), 'args': args}, tmp_path / 'a.pth')
    assert class_name(open_model('test_resnet_castream', tmp_path / 'a.pth'), 1) == 'class 1'


def test_names_go_from_a_checkpoint_into_a_repository_and_back(tmp_path):
    names = ['dog', 'cat', 'n01443537']
    args = argparse.Namespace(num_classes=3, model_kwargs={}, label_names=names)
    path = tmp_path / 'last.pth.tar'
    torch.save(
        {'state_dict': timm.create_model('test_resnet_castream', num_classes=3).state_dict(), 'args': args}, path
    )
    assert checkpoint_label_names(path) == names
    model = open_model('test_resnet_castream', path)
    assert label_names(model) == names
    folder = write_repository(model, tmp_path / 'repository', 'me/it')
    config = json.loads((folder / 'config.json').read_text())
    assert config['label_names'] == names and 'goldfish' in config['label_descriptions']['n01443537']
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert list(again.pretrained_cfg['label_names']) == names and class_name(again, 2).startswith('goldfish')


def test_a_repository_without_names_claims_none(tmp_path):
    model = open_model('test_resnet_castream', num_classes=None)
    folder = write_repository(model, tmp_path / 'repository', 'me/it')
    config = json.loads((folder / 'config.json').read_text())
    assert 'label_names' not in config and 'label_names' not in config['pretrained_cfg']
    assert label_names(open_model(f'local-dir:{folder}', pretrained=True)) is None


def test_files_without_names_have_none(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'a.pth')
    (tmp_path / 'b.pth').write_bytes(b'no checkpoint')
    for name in ('a.pth', 'b.pth', 'missing.pth'):
        assert checkpoint_label_names(tmp_path / name) is None


def test_fewer_names_than_classes_are_filled_up():
    model = make(4)
    set_label_names(model, ['a', 'b'])
    assert label_names(model) == ['a', 'b', 'class 2', 'class 3']


class TestFindingAClass:
    @pytest.mark.parametrize(
        ('word', 'expected'),
        [('dog', 0), ('1', 2), (1, 2), ('2', 2), ('0', 0), ('e\u0301te\u0301', 3), ('Dog', 0), ('a large  cat', None)],
    )
    def test_a_name_precedes_a_number(self, word, expected):
        model = make(4, ('dog', 'cat', '1', 'été'))
        if expected is None:
            with pytest.raises(ValueError, match='a large  cat'):
                class_index(model, word)
        else:
            assert class_index(model, word) == expected

    @pytest.mark.parametrize('word', ['goldfish', 'n01443537', 'Carassius auratus', 'goldfish, carassius_auratus', '1'])
    def test_imagenets_classes_are_found_by_id_by_description_and_by_its_parts(self, imagenet, word):
        assert class_index(imagenet, word) == 1

    def test_words_of_several_classes_and_unknown_ones_are_refused_with_the_classes(self, imagenet):
        with pytest.raises(ValueError, match=r"'crane' are several classes: 134 \(crane\), 517 \(crane\)|several"):
            class_index(imagenet, 'crane')
        with pytest.raises(ValueError, match=r"no class 'goldfisch'; there are .*goldfish"):
            class_index(imagenet, 'goldfisch')
        with pytest.raises(ValueError, match=r'1000 is out of range.* 0 to 999'):
            class_index(imagenet, '1000')
        with pytest.raises(ValueError, match=r"no class 'cat'.* have no names.* 0 to 2"):
            class_index(make(3), 'cat')


class TestComparedWithADataSet:
    def test_wordnet_ids_and_descriptions_have_the_indices_of_imagenet(self, imagenet):
        names = known_names(imagenet, ['goldfish', 'n02124075', 'tiger_cat'])
        assert [names.index(name) for name in ('goldfish', 'n02124075', 'tiger_cat')] == [1, 285, 282]

    def test_wordnet_ids_of_a_model_without_names_are_imagenets_where_it_has_as_many(self, caplog):
        assert known_names(make(1000), ['n02124075', 'n01443537']).index('n02124075') == 285
        assert 'WordNet ids' in caplog.text
        assert known_names(make(1000), ['cat', 'n01443537']) is None
        assert known_names(make(10), ['n02124075', 'n01443537']) is None

    def test_as_many_strange_names_are_taken_in_their_order_and_fewer_are_not(self, imagenet, caplog):
        """The folders of ImageNetV2 are the numbers from 0 to 999."""
        with caplog.at_level(logging.WARNING):
            assert known_names(imagenet, [str(i) for i in range(1000)]) is None
        assert 'taken in their order' in caplog.text
        assert known_names(imagenet, ['cats', 'dogs']) == label_names(imagenet)

    def test_names_of_ones_own_are_compared_letter_by_letter(self):
        assert known_names(make(2, ('cat', 'dog')), ['Cat', 'dog']) == ['Cat', 'dog']
        assert known_names(make(2), ['cat', 'dog']) is None

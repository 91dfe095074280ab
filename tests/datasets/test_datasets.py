"""The data sets in the layouts of their archives, made by name, and through timm's loader."""

import inspect
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm.data
import timm.task
import torch
from PIL import Image
from references import VOC_CLASSES
from torch.utils.data import DataLoader, default_collate
from torchmetrics.classification import BinaryAveragePrecision

from timm_castream.datasets import (
    CUB200,
    MIT67,
    VOC2012,
    VOC_IGNORE,
    DigitScenes,
    TinyImageNet,
    create_dataset,
    write_image_folder,
)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')


def write_image(path: Path, value: int, mode: str = 'RGB') -> None:
    """A plain image of one grey value, 12 x 10, so that a test can tell whose pixels it got."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (12, 10), (value,) * 3 if mode == 'RGB' else value).save(path, quality=100)


def grey(image: Image.Image) -> int:
    return round(float(np.asarray(image).mean()))


@pytest.fixture
def cub(tmp_path):
    """Three classes, five images, ids neither sorted nor grouped by class; the archive's own column layout."""
    folder = tmp_path / 'CUB_200_2011'
    write(folder / 'classes.txt', '1 001.Black_footed_Albatross', '2 002.Laysan_Albatross', '3 003.Sooty_Albatross')
    write(
        folder / 'images.txt',
        '1 001.Black_footed_Albatross/a.jpg',
        '2 001.Black_footed_Albatross/b.jpg',
        '4 003.Sooty_Albatross/d.jpg',
        '3 002.Laysan_Albatross/c.jpg',
        '10 003.Sooty_Albatross/e.jpg',
    )
    write(folder / 'image_class_labels.txt', '1 1', '2 1', '3 2', '4 3', '10 3')
    write(folder / 'train_test_split.txt', '1 0', '2 1', '3 1', '4 0', '10 1')
    write(
        folder / 'bounding_boxes.txt',
        '1 60.0 27.0 325.0 304.0',
        '2 1.0 2.0 3.0 4.0',
        '3 0.0 0.0 12.0 10.0',
        '4 5.0 5.0 1.5 2.5',
        '10 2.0 3.0 4.0 6.0',
    )
    for i, name in enumerate(
        (
            '001.Black_footed_Albatross/a',
            '001.Black_footed_Albatross/b',
            '002.Laysan_Albatross/c',
            '003.Sooty_Albatross/d',
            '003.Sooty_Albatross/e',
        )
    ):
        write_image(folder / 'images' / f'{name}.jpg', 10 * i, mode='L' if i == 1 else 'RGB')
    return folder


@pytest.fixture
def voc(tmp_path):
    """Four images of trainval, train the first two. 2008_000001 shows a horse, and cats that are all difficult."""
    folder = tmp_path / 'VOCdevkit' / 'VOC2012'
    lists = folder / 'ImageSets' / 'Main'
    ids = ['2008_000001', '2008_000002', '2008_000003', '2009_000004']
    labels = dict.fromkeys(VOC_CLASSES, (-1, -1, -1, -1))
    labels |= {'horse': (1, -1, -1, -1), 'cat': (0, 1, -1, 1), 'person': (-1, 1, 1, 0), 'tvmonitor': (-1, -1, -1, 1)}
    for split, chosen in {'train': (0, 1), 'val': (2, 3), 'trainval': (0, 1, 2, 3)}.items():
        write(lists / f'{split}.txt', *(ids[i] for i in chosen))
        for name in VOC_CLASSES:
            write(lists / f'{name}_{split}.txt', *(f'{ids[i]} {labels[name][i]:2d}' for i in chosen))
    for i, name in enumerate(ids):
        write_image(folder / 'JPEGImages' / f'{name}.jpg', 20 * i)
    return folder


@pytest.fixture
def mit(tmp_path):
    """Three rooms, listed out of order, one only in the test list; a file name with a space, as the archive has."""
    folder = tmp_path / 'indoorCVPR_09'
    write(folder / 'TrainImages.txt', 'mall/shopping mall.jpg', 'bakery/one.jpg', 'mall/two.jpg')
    write(folder / 'TestImages.txt', 'bakery/three.jpg ', 'kitchen/four.jpg')
    for i, name in enumerate(('mall/shopping mall', 'bakery/one', 'mall/two', 'bakery/three', 'kitchen/four')):
        write_image(folder / 'Images' / f'{name}.jpg', 30 * i)
    return folder


@pytest.fixture
def tiny(tmp_path):
    """Two classes, listed out of order, with three training images and two for validation."""
    folder = tmp_path / 'tiny-imagenet-200'
    write(folder / 'wnids.txt', 'n02124075', 'n01443537')
    write(folder / 'train/n02124075/n02124075_boxes.txt', 'n02124075_7.JPEG\t0\t10\t63\t58')
    write(
        folder / 'train/n01443537/n01443537_boxes.txt', 'n01443537_2.JPEG\t0\t0\t63\t63', 'n01443537_0.JPEG\t3\t4\t3\t5'
    )
    write(
        folder / 'val/val_annotations.txt',
        'val_0.JPEG\tn02124075\t0\t32\t44\t62',
        'val_1.JPEG\tn01443537\t52\t55\t57\t59',
    )
    for i, name in enumerate(
        (
            'train/n02124075/images/n02124075_7',
            'train/n01443537/images/n01443537_2',
            'train/n01443537/images/n01443537_0',
            'val/images/val_0',
            'val/images/val_1',
        )
    ):
        write_image(folder / f'{name}.JPEG', 30 * i)
    return folder


@pytest.fixture(scope='module')
def scenes():
    return DigitScenes('train', num_images=64, seed=3)


class TestCUB200:
    def test_official_split_gives_each_image_its_class_and_its_box_as_corners(self, cub):
        train, test = CUB200(cub, 'train'), CUB200(cub, 'test')
        assert [(grey(image), label) for image, label in train] == [(10, 0), (20, 1), (40, 2)]
        assert [(grey(image), label) for image, label in test] == [(0, 0), (30, 2)]
        assert train.boxes.tolist() == [[1, 2, 4, 6], [0, 0, 12, 10], [2, 3, 6, 9]]
        assert test.boxes.tolist() == [[60, 27, 385, 331], [5, 5, 6.5, 7.5]]
        assert train.classes == ['001.Black_footed_Albatross', '002.Laysan_Albatross', '003.Sooty_Albatross']
        assert train.filenames() == [
            'images/001.Black_footed_Albatross/b.jpg',
            'images/002.Laysan_Albatross/c.jpg',
            'images/003.Sooty_Albatross/e.jpg',
        ]
        assert Path(train.filename(0, absolute=True)).is_file() and train.filename(0, basename=True) == 'b.jpg'

    def test_images_without_colour_become_rgb(self, cub):
        assert CUB200(cub, 'train')[0][0].mode == 'RGB'

    @pytest.mark.parametrize(
        'name',
        [
            'classes.txt',
            'images.txt',
            'image_class_labels.txt',
            'train_test_split.txt',
            'bounding_boxes.txt',
            'images/001.Black_footed_Albatross/b.jpg',
        ],
    )
    def test_a_missing_file_is_named(self, cub, name):
        (cub / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            CUB200(cub)

    def test_damaged_index_files_are_refused_with_file_and_line(self, cub):
        write(cub / 'image_class_labels.txt', '1 1', '2 one', '3 2', '4 3', '10 3')
        with pytest.raises(ValueError, match=r"image_class_labels\.txt, line 2: '2 one' is not of the form int, int"):
            CUB200(cub)
        write(cub / 'image_class_labels.txt', '1 1', '2 7', '3 2', '4 3', '10 3')
        with pytest.raises(ValueError, match=r'class 7 .*classes\.txt'):
            CUB200(cub)
        write(cub / 'image_class_labels.txt', '1 1')
        with pytest.raises(ValueError, match='do not list the same images'):
            CUB200(cub)
        for name in ('images', 'image_class_labels', 'train_test_split', 'bounding_boxes'):
            write(cub / f'{name}.txt')
        with pytest.raises(ValueError, match="no images for split 'train'"):
            CUB200(cub)

    @pytest.mark.parametrize(
        'name, lines, message',
        [
            ('images', ['1 a.jpg', '2 b.jpg', '1 c.jpg'], r'images\.txt, line 3: 1 is listed a second time'),
            ('classes', ['1 a', '', '1 b'], r'classes\.txt, line 3: 1 is listed a second time'),
            ('bounding_boxes', ['1 0 0 2 2', '2 nan 0 2 2'], r"boxes\.txt, line 2: '2 nan 0 2 2' is not of the form"),
            (
                'bounding_boxes',
                ['1 0 0 inf 2'],
                r"line 1: '1 0 0 inf 2' is not of the form int, number, number, positive",
            ),
            ('bounding_boxes', ['1 0 0 0 2'], r"line 1: '1 0 0 0 2' is not of the form"),
        ],
    )
    def test_images_listed_twice_and_boxes_that_are_none_are_refused_with_file_and_line(
        self, cub, name, lines, message
    ):
        write(cub / f'{name}.txt', *lines)
        with pytest.raises(ValueError, match=message):
            CUB200(cub)

    def test_a_byte_order_mark_is_no_part_of_the_first_row(self, cub):
        expected = [(grey(image), label) for image, label in CUB200(cub)]
        for file in cub.glob('*.txt'):
            file.write_text(file.read_text(), encoding='utf-8-sig')
        assert [(grey(image), label) for image, label in CUB200(cub)] == expected


class TestVOC2012:
    def test_targets_are_present_absent_or_ignored_where_every_object_is_difficult(self, voc):
        data = VOC2012(voc, 'trainval')
        horse, cat, person, monitor = (VOC_CLASSES.index(name) for name in ('horse', 'cat', 'person', 'tvmonitor'))
        expected = np.zeros((4, 20))
        for row, column in ((0, horse), (1, cat), (1, person), (2, person), (3, cat), (3, monitor)):
            expected[row, column] = 1
        expected[0, cat] = expected[3, person] = VOC_IGNORE
        targets = np.stack([target for _, target in data])
        assert targets.dtype == np.float32 and np.array_equal(targets, expected)
        assert [grey(image) for image, _ in data] == [0, 20, 40, 60]
        assert data.classes == VOC_CLASSES and data.boxes is None

    def test_train_and_val_are_the_devkits(self, voc):
        assert [grey(image) for image, _ in VOC2012(voc, 'train')] == [0, 20]
        assert [grey(image) for image, _ in VOC2012(voc, 'val')] == [40, 60]

    def test_difficult_images_count_neither_way_in_torchmetrics_average_precision(self, voc):
        """Of the cats, image 0 is difficult. Were it a negative, scored highest, precision would be 1/2 and 2/3."""
        cats = torch.tensor([target[VOC_CLASSES.index('cat')] for _, target in VOC2012(voc, 'trainval')]).long()
        scores = torch.tensor([0.9, 0.8, 0.1, 0.7])
        assert BinaryAveragePrecision(ignore_index=int(VOC_IGNORE))(scores, cats) == 1

    @pytest.mark.parametrize(
        'name', ['ImageSets/Main/train.txt', 'ImageSets/Main/sofa_train.txt', 'JPEGImages/2008_000002.jpg']
    )
    def test_a_missing_file_is_named(self, voc, name):
        (voc / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            VOC2012(voc)

    def test_an_image_without_a_label_or_with_an_unknown_one_is_refused(self, voc):
        write(voc / 'ImageSets/Main/dog_train.txt', '2008_000001 -1')
        with pytest.raises(ValueError, match=r'dog_train\.txt gives 2008_000002 the label None'):
            VOC2012(voc)
        write(voc / 'ImageSets/Main/dog_train.txt', '2008_000001 2', '2008_000002 1')
        with pytest.raises(ValueError, match='2008_000001 the label 2,'):
            VOC2012(voc)

    def test_a_byte_order_mark_is_no_part_of_the_first_image(self, voc):
        for file in (voc / 'ImageSets/Main').glob('*.txt'):
            file.write_text(file.read_text(), encoding='utf-8-sig')
        assert [grey(image) for image, _ in VOC2012(voc, 'train')] == [0, 20]

    def test_the_unpublished_test_split_is_refused(self, voc):
        with pytest.raises(ValueError, match="'test' is no split of VOC2012, which has train, val, trainval"):
            VOC2012(voc, 'test')


class TestMIT67:
    def test_classes_are_those_of_both_lists_in_alphabetical_order(self, mit):
        train, test = MIT67(mit, 'train'), MIT67(mit, 'test')
        assert train.classes == test.classes == ['bakery', 'kitchen', 'mall']
        assert [(grey(image), label) for image, label in train] == [(0, 2), (30, 0), (60, 2)]
        assert [(grey(image), label) for image, label in test] == [(90, 0), (120, 1)]
        assert train.reader.class_to_idx == {'bakery': 0, 'kitchen': 1, 'mall': 2}

    @pytest.mark.parametrize('name', ['TrainImages.txt', 'TestImages.txt', 'Images/mall/shopping mall.jpg'])
    def test_a_missing_file_is_named(self, mit, name):
        (mit / name).unlink()
        with pytest.raises(FileNotFoundError, match=Path(name).name):
            MIT67(mit)


class TestTinyImageNet:
    def test_classes_are_the_sorted_ids_and_each_image_has_its_box_as_corners(self, tiny):
        train, validation = TinyImageNet(tiny, 'train'), TinyImageNet(tiny, 'validation')
        assert train.classes == validation.classes == ['n01443537', 'n02124075']
        assert [(grey(image), label) for image, label in train] == [(30, 0), (60, 0), (0, 1)]
        assert [(grey(image), label) for image, label in validation] == [(90, 1), (120, 0)]
        # The archive's corners, from 0 to 63, are the first and the last pixels inside.
        assert train.boxes.tolist() == [[0, 0, 64, 64], [3, 4, 4, 6], [0, 10, 64, 59]]
        assert validation.boxes.tolist() == [[0, 32, 45, 63], [52, 55, 58, 60]]
        assert train.filename(2) == 'train/n02124075/images/n02124075_7.JPEG'

    @pytest.mark.parametrize(
        'name, split',
        [
            ('train/n01443537/n01443537_boxes.txt', 'train'),
            ('train/n01443537/images/n01443537_0.JPEG', 'train'),
            ('val/val_annotations.txt', 'val'),
            ('val/images/val_1.JPEG', 'val'),
        ],
    )
    def test_a_missing_file_is_named(self, tiny, name, split):
        (tiny / name).unlink()
        with pytest.raises(FileNotFoundError, match=f'{name} is missing'):
            TinyImageNet(tiny, split)

    def test_damaged_index_files_are_refused(self, tiny):
        write(tiny / 'val/val_annotations.txt', 'val_0.JPEG n99 0 1 2 3')
        with pytest.raises(ValueError, match=r'val_annotations\.txt gives val_0\.JPEG the class n99, .*wnids\.txt'):
            TinyImageNet(tiny, 'val')
        write(tiny / 'val/val_annotations.txt', 'val_0.JPEG n01443537 0 1 2 3', 'val_1.JPEG n01443537 0 1 2')
        with pytest.raises(ValueError, match=r'val_annotations\.txt, line 2: '):
            TinyImageNet(tiny, 'val')
        write(tiny / 'val/val_annotations.txt', 'val_0.JPEG n01443537 0 5 2 3')
        with pytest.raises(ValueError, match=r'the box of val/images/val_0\.JPEG .* has no area'):
            TinyImageNet(tiny, 'val')

    def test_the_unpublished_test_split_is_refused(self, tiny):
        with pytest.raises(ValueError, match="'test' is no split of TinyImageNet, which has train, val"):
            TinyImageNet(tiny, 'test')


@pytest.mark.parametrize(
    'fixture, data_set, roots',
    [
        ('cub', CUB200, ('.', '..')),
        ('voc', VOC2012, ('.', '..', '../..')),
        ('mit', MIT67, ('Images', '.', '..')),
        ('tiny', TinyImageNet, ('.', '..')),
    ],
)
def test_root_is_the_unpacked_folder_or_its_parent(request, fixture, data_set, roots):
    folder = request.getfixturevalue(fixture)
    expected = [grey(image) for image, _ in data_set(folder)]
    for root in roots:
        assert [grey(image) for image, _ in data_set(os.path.normpath(folder / root))] == expected


@pytest.mark.parametrize(
    'data_set, file, archive',
    [
        (CUB200, 'images.txt', 'CUB_200_2011.tgz'),
        (VOC2012, 'ImageSets/Main', 'VOCtrainval_11-May-2012.tar'),
        (MIT67, 'TrainImages.txt', 'indoorCVPR_09.tar'),
        (TinyImageNet, 'wnids.txt', 'tiny-imagenet-200.zip'),
    ],
)
def test_a_root_that_holds_something_else_is_refused_naming_file_and_archive(tmp_path, data_set, file, archive):
    with pytest.raises(FileNotFoundError, match=f'no {file}: .*{tmp_path.name}.*{archive}'):
        data_set(tmp_path)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_plain_torch_loads_the_paper_data_sets(cub, voc, num_workers):
    def to_tensor(image):
        return torch.from_numpy(np.asarray(image).copy())

    # A closure does not survive spawning: workers are forked here, as timm's loader forks them on Linux.
    context = 'fork' if num_workers else None
    loader = DataLoader(VOC2012(voc, 'val', to_tensor), 2, num_workers=num_workers, multiprocessing_context=context)
    images, targets = next(iter(loader))
    assert images.shape == (2, 10, 12, 3) and targets.shape == (2, 20) and targets.dtype == torch.float32
    loader = DataLoader(CUB200(cub, 'test', to_tensor), 2, num_workers=num_workers, multiprocessing_context=context)
    assert next(iter(loader))[1].tolist() == [0, 2]


def test_target_transform_applies_to_targets(voc):
    data = VOC2012(voc, 'train', target_transform=lambda target: target.clip(min=0))  # difficult as absent
    assert data[0][1].min() == 0 and data[0][1].sum() == 1


class TestCreateDataset:
    def test_it_takes_the_calls_of_timms_train_and_validate_scripts(self, cub, mit, voc, tiny):
        """The keywords that train.py and validate.py of timm v1.0.28 pass, with their scripts' defaults."""
        train_call = dict(
            is_training=True,
            class_map='',
            download=False,
            batch_size=128,
            seed=42,
            repeats=0,
            input_img_mode='RGB',
            input_key=None,
            target_key=None,
            num_samples=None,
            trust_remote_code=False,
        )
        data = create_dataset('cub200', root=str(cub.parent), split='train', **train_call)
        assert isinstance(data, CUB200) and len(data) == 3
        data = create_dataset('voc2012', root=str(voc), split='trainval', **train_call)
        assert isinstance(data, VOC2012) and len(data) == 4
        assert isinstance(create_dataset('tiny_imagenet', root=str(tiny), split='train', **train_call), TinyImageNet)
        validate_call = dict(
            download=False,
            load_bytes=False,
            class_map='',
            num_samples=None,
            input_key=None,
            input_img_mode='L',
            target_key=None,
            trust_remote_code=False,
            seed=42,
        )
        data = create_dataset(root=str(mit), name='mit67', split='validation', **validate_call)
        assert isinstance(data, MIT67) and len(data) == 2 and data[0][0].mode == 'L'

    @pytest.mark.parametrize(
        'word, official',
        [('train', 'train'), ('training', 'train'), ('validation', 'test'), ('val', 'test'), ('test', 'test')],
    )
    def test_timms_words_for_splits_mean_the_official_ones(self, cub, word, official):
        assert create_dataset('cub200', cub, word).filenames() == CUB200(cub, official).filenames()

    def test_digits_take_their_number_and_seed_and_no_root(self):
        made = create_dataset('digits', None, 'train', num_samples=5, seed=9)
        assert np.array_equal(made.images, DigitScenes('train', num_images=5, seed=9).images)
        with pytest.raises(ValueError, match='digits is made, not read: leave out some/folder'):
            create_dataset('digits', 'some/folder')

    def test_folders_take_timms_arguments_and_every_other_name_goes_to_timm(self, scenes, tmp_path):
        write_image_folder({'train': scenes}, tmp_path / 'digits')
        folder = create_dataset('', tmp_path / 'digits', 'train', True, {'7': 0}, transform=np.asarray)
        assert isinstance(folder, timm.data.ImageDataset) and folder.transform is np.asarray
        assert len(folder) == (scenes.labels == 7).sum() and {label for _, label in folder} == {0}
        with pytest.raises(AssertionError, match='Unknown torchvision dataset'):
            create_dataset('torch/nothing', tmp_path)

    @pytest.mark.parametrize('name', ['cub', 'imagenet', 'CUB200', 'nothing/cub200', 'folder'])
    def test_unknown_names_are_refused_with_the_known_ones(self, cub, name):
        with pytest.raises(
            ValueError,
            match=f"there is no data set '{name}'; known are cub200, voc2012, mit67, "
            'tiny_imagenet, digits, the names of timm that begin with torch/, hfds/',
        ):
            create_dataset(name, cub)

    @pytest.mark.parametrize(
        'present, split',
        [
            (('train', 'test'), 'validation'),
            (('train',), 'val'),
            (('val',), 'train'),
            (('train', 'val'), 'test'),
            (('train', 'val'), 'vlaidation'),
            (('valid', 'train'), 'dev[:10%]'),
        ],
    )
    def test_a_split_that_a_folder_lacks_is_refused_where_timm_would_read_all_others(self, tmp_path, present, split):
        for folder in present:
            write_image(tmp_path / folder / 'a' / '0.png', 1)
        with pytest.raises(
            ValueError,
            match=rf'has no split .{re.escape(split)}., it has ({"|".join(present)}), ?'
            if len(present) > 1
            else f'has no split .{split}., it has {present[0]}',
        ):
            create_dataset('', tmp_path, split)
        assert len(create_dataset('', tmp_path, split, search_split=False)) == len(present)

    def test_words_of_timm_find_their_folders_and_a_folder_without_splits_is_read_whole(self, tmp_path):
        for name in ('splits/valid/a/0.png', 'splits/train/a/0.png', 'classes/car/0.png', 'classes/train/0.png'):
            write_image(tmp_path / name, 1)
        words = {'validation': 'valid', 'eval': 'valid', 'training': 'train', 'val[:1]': 'valid'}
        for split, expected in words.items():
            assert expected in create_dataset('', tmp_path / 'splits', split).filename(0, absolute=True)
        assert len(create_dataset('', tmp_path / 'classes', 'validation')) == 2  # train is a class here
        with pytest.raises(ValueError, match="has no split 'vlaidation'; with train or validation it is read whole"):
            create_dataset('', tmp_path / 'classes', 'vlaidation')

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'There is no folder .*nothing\.$'):
            create_dataset('', tmp_path / 'nothing')
        with pytest.raises(ValueError, match='a folder of images needs its path'):
            create_dataset('', None)

    def test_an_archive_without_images_that_are_read_is_refused_in_one_sentence(self, tmp_path):
        (tmp_path / 'a.webp').write_bytes(b'x')
        with tarfile.open(tmp_path / 'images.tar', 'w') as archive:
            archive.add(tmp_path / 'a.webp', 'cat/a.webp')
        with pytest.raises(ValueError, match=r'images\.tar has no images of the kinds \.png, \.jpg and \.jpeg: unpack'):
            create_dataset('', tmp_path / 'images.tar')

    def test_it_can_stand_in_for_timms_function_without_calling_itself(self, scenes, tmp_path, monkeypatch):
        write_image_folder({'train': scenes}, tmp_path / 'digits')
        monkeypatch.setattr(timm.data, 'create_dataset', create_dataset)
        assert len(timm.data.create_dataset('', root=tmp_path / 'digits', split='train')) == len(scenes)

    @pytest.mark.parametrize('option, value', [('class_map', 'map.txt'), ('load_bytes', True), ('download', True)])
    def test_options_that_cannot_be_honoured_are_refused(self, cub, option, value):
        with pytest.raises(ValueError, match=f'cub200 does not support {option}={value!r}'):
            create_dataset('cub200', cub, **{option: value})

    def test_a_misspelt_argument_is_refused(self, cub):
        with pytest.raises(TypeError, match='transfrom'):
            create_dataset('cub200', cub, transfrom=np.asarray)

    def test_a_forgotten_root_is_asked_for(self):
        with pytest.raises(ValueError, match='voc2012 needs the folder'):
            create_dataset('voc2012', split='train')

    def test_it_accepts_every_argument_of_the_installed_timm(self, cub):
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(timm.data.create_dataset).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        defaults |= {'root': cub, 'split': 'test'}
        assert len(create_dataset('cub200', **defaults)) == 2


class TestTimmLoader:
    @pytest.mark.parametrize('num_workers', [0, 2])
    def test_prefetched_batches_of_scenes_are_the_images_normalised(self, scenes, num_workers):
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        data = DigitScenes('train', num_images=64, seed=3)
        loader = timm.data.create_loader(
            data,
            (3, 64, 64),
            32,
            crop_pct=1.0,
            mean=mean,
            std=std,
            num_workers=num_workers,
            device=torch.device('cpu'),
            persistent_workers=False,
        )
        images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
        expected = torch.from_numpy((scenes.images / 255.0 - mean) / std).permute(0, 3, 1, 2)
        torch.testing.assert_close(images.double(), expected, atol=1e-5, rtol=1e-5)
        assert labels.tolist() == scenes.labels.tolist()

    @pytest.mark.parametrize('options', [{'use_prefetcher': False}, {'collate_fn': default_collate}, {}])
    def test_voc_targets_reach_the_batch_with_ignored_entries(self, voc, options):
        loader = timm.data.create_loader(
            VOC2012(voc, 'trainval'),
            (3, 8, 8),
            4,
            num_workers=0,
            device=torch.device('cpu'),
            persistent_workers=False,
            **options,
        )
        images, targets = next(iter(loader))
        assert images.dtype == targets.dtype == torch.float32
        assert images.shape == (4, 3, 8, 8) and targets.shape == (4, 20)
        assert targets.sum(1).tolist() == [0, 2, 1, 1]
        assert [(targets == value).sum().item() for value in (0, 1, VOC_IGNORE)] == [72, 6, 2]

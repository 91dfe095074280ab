"""The paper's data sets in the layouts of their archives, the demo's scenes, and both through timm's loader."""
import inspect
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.data
import timm.task
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, default_collate
from torchmetrics.classification import BinaryAveragePrecision

from timm_castream.datasets import (
    CUB200,
    MIT67,
    VOC2012,
    VOC_IGNORE,
    DigitScenes,
    create_dataset,
    write_image_folder,
)

VOC_CLASSES = [
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
]


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
    write(folder / 'images.txt', '1 001.Black_footed_Albatross/a.jpg', '2 001.Black_footed_Albatross/b.jpg',
          '4 003.Sooty_Albatross/d.jpg', '3 002.Laysan_Albatross/c.jpg', '10 003.Sooty_Albatross/e.jpg')
    write(folder / 'image_class_labels.txt', '1 1', '2 1', '3 2', '4 3', '10 3')
    write(folder / 'train_test_split.txt', '1 0', '2 1', '3 1', '4 0', '10 1')
    write(folder / 'bounding_boxes.txt', '1 60.0 27.0 325.0 304.0', '2 1.0 2.0 3.0 4.0', '3 0.0 0.0 12.0 10.0',
          '4 5.0 5.0 1.5 2.5', '10 2.0 3.0 4.0 6.0')
    for i, name in enumerate(('001.Black_footed_Albatross/a', '001.Black_footed_Albatross/b', '002.Laysan_Albatross/c',
                              '003.Sooty_Albatross/d', '003.Sooty_Albatross/e')):
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
            'images/001.Black_footed_Albatross/b.jpg', 'images/002.Laysan_Albatross/c.jpg',
            'images/003.Sooty_Albatross/e.jpg']
        assert Path(train.filename(0, absolute=True)).is_file() and train.filename(0, basename=True) == 'b.jpg'

    def test_images_without_colour_become_rgb(self, cub):
        assert CUB200(cub, 'train')[0][0].mode == 'RGB'

    @pytest.mark.parametrize('name', ['classes.txt', 'images.txt', 'image_class_labels.txt', 'train_test_split.txt',
                                      'bounding_boxes.txt', 'images/001.Black_footed_Albatross/b.jpg'])
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

    @pytest.mark.parametrize('name', ['ImageSets/Main/train.txt', 'ImageSets/Main/sofa_train.txt',
                                      'JPEGImages/2008_000002.jpg'])
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


@pytest.mark.parametrize('fixture, data_set, roots', [
    ('cub', CUB200, ('.', '..')), ('voc', VOC2012, ('.', '..', '../..')), ('mit', MIT67, ('Images', '.', '..'))])
def test_root_is_the_unpacked_folder_or_its_parent(request, fixture, data_set, roots):
    folder = request.getfixturevalue(fixture)
    expected = [grey(image) for image, _ in data_set(folder)]
    for root in roots:
        assert [grey(image) for image, _ in data_set(os.path.normpath(folder / root))] == expected


@pytest.mark.parametrize('data_set, file, archive', [
    (CUB200, 'images.txt', 'CUB_200_2011.tgz'), (VOC2012, 'ImageSets/Main', 'VOCtrainval_11-May-2012.tar'),
    (MIT67, 'TrainImages.txt', 'indoorCVPR_09.tar')])
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


class TestDigitScenes:
    def test_an_image_depends_on_split_seed_and_index_alone(self, scenes):
        fewer = DigitScenes('train', num_images=10, seed=3)
        for name in ('images', 'labels', 'boxes', 'scans'):
            assert np.array_equal(getattr(fewer, name), getattr(scenes, name)[:10])
        for other in (DigitScenes('train', num_images=10, seed=4), DigitScenes('validation', num_images=10, seed=3)):
            assert all((other.images[i] != fewer.images[i]).any() for i in range(10))

    def test_no_scan_is_in_both_splits_whatever_the_seeds(self):
        train = np.concatenate([DigitScenes('train', num_images=3000, seed=seed).scans for seed in range(2)])
        validation = np.concatenate([DigitScenes('validation', num_images=2000, seed=seed).scans for seed in range(2)])
        assert not set(train) & set(validation)
        assert len(set(validation)) == 360 and len(set(train)) > 1350

    def test_labels_are_the_scans_own_and_every_digit_occurs_about_equally(self):
        data = DigitScenes('validation')
        assert len(data) == 2000 and np.array_equal(data.labels, load_digits().target[data.scans])
        assert np.bincount(data.labels, minlength=10).min() > 100
        assert data.classes == [str(i) for i in range(10)]

    def test_boxes_hold_the_digit_upright_and_lie_within_the_image(self, scenes):
        x0, y0, x1, y1 = scenes.boxes.T
        assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 64).all() and (y1 <= 64).all()
        assert ((y1 - y0 >= 20) & (y1 - y0 <= 40)).all() and (x1 - x0 >= 5).all()

    def test_the_scan_shows_inside_the_box_as_light_on_dark_or_dark_on_light(self, scenes):
        """The ink's grey values follow the scan, resized by nearest neighbour here: positively, or negatively."""
        correlations = []
        for image, scan, (x0, y0, x1, y1) in zip(scenes.images, scenes.scans, scenes.boxes, strict=True):
            stroke = load_digits().images[scan]
            stroke = stroke[:, stroke.any(axis=0)]
            rows = np.arange(y1 - y0) * len(stroke) // (y1 - y0)
            columns = np.arange(x1 - x0) * stroke.shape[1] // (x1 - x0)
            box = image[y0:y1, x0:x1].mean(axis=-1)
            correlations.append(np.corrcoef(stroke[rows][:, columns].ravel(), box.ravel())[0, 1])
        correlations = np.array(correlations)
        assert np.median(np.abs(correlations)) > 0.8
        assert 16 < (correlations > 0).sum() < 48
        light = scenes.images[correlations > 0.8]
        assert np.median(light) < 100 < 155 < np.median(scenes.images[correlations < -0.8])

    def test_backgrounds_are_crops_of_photographs_not_plain(self, scenes):
        assert np.median(scenes.images.std(axis=(1, 2))) > 15
        assert len(np.unique(scenes.images.reshape(64, -1), axis=0)) == 64

    def test_items_are_pil_images_and_ints_until_a_transform_is_set(self, scenes):
        image, label = scenes[5]
        assert image.size == (64, 64) and image.mode == 'RGB' and type(label) is int
        assert np.array_equal(np.asarray(image), scenes.images[5])
        assert DigitScenes(num_images=1, transform=lambda image: image.size)[0][0] == (64, 64)
        assert DigitScenes(num_images=1, input_img_mode='L')[0][0].mode == 'L'

    def test_it_survives_pickling_as_spawned_workers_need(self, scenes):
        assert np.array_equal(pickle.loads(pickle.dumps(scenes)).images, scenes.images)

    @pytest.mark.parametrize('kwargs, message', [
        ({'split': 'test'}, "'test' is no split of DigitScenes, which has train, validation"),
        ({'num_images': 0}, 'num_images=0 must be at least 1'), ({'seed': -1}, 'seed=-1 at least 0')])
    def test_wrong_arguments_are_refused(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            DigitScenes(**kwargs)

    def test_without_scikit_learn_the_error_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
        with pytest.raises(ImportError, match=r'timm_castream\[demo\]'):
            DigitScenes(num_images=1)


class TestImageFolder:
    def test_timm_reads_the_same_pixels_and_labels_back(self, scenes, tmp_path):
        validation = DigitScenes('validation', num_images=30)
        write_image_folder({'train': scenes, 'validation': validation}, tmp_path / 'new' / 'digits')
        for split, source in (('train', scenes), ('validation', validation)):
            read = timm.data.create_dataset('', tmp_path / 'new' / 'digits', split=split)
            pairs = {(image.tobytes(), label) for image, label in read}
            assert len(read) == len(source) and pairs == {(image.tobytes(), label) for image, label in source}

    def test_an_interrupted_write_leaves_nothing_behind(self, scenes, tmp_path, monkeypatch):
        save, calls = Image.Image.save, []

        def interrupted(image, *args, **kwargs):
            calls.append(1)
            if len(calls) == 10:
                raise KeyboardInterrupt
            save(image, *args, **kwargs)

        monkeypatch.setattr(Image.Image, 'save', interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_image_folder({'train': scenes}, tmp_path / 'digits')
        assert list(tmp_path.iterdir()) == []

    def test_what_is_there_already_is_kept(self, scenes, tmp_path):
        write(tmp_path / 'digits' / 'notes.txt', 'mine')
        with pytest.raises(FileExistsError, match='digits exists already'):
            write_image_folder({'train': scenes}, tmp_path / 'digits')
        assert [file.name for file in (tmp_path / 'digits').rglob('*')] == ['notes.txt']


class TestCreateDataset:
    def test_it_takes_the_calls_of_timms_train_and_validate_scripts(self, cub, mit, voc):
        """The keywords that train.py and validate.py of timm v1.0.28 pass, with their scripts' defaults."""
        train_call = dict(
            is_training=True, class_map='', download=False, batch_size=128, seed=42, repeats=0, input_img_mode='RGB',
            input_key=None, target_key=None, num_samples=None, trust_remote_code=False)
        data = create_dataset('cub200', root=str(cub.parent), split='train', **train_call)
        assert isinstance(data, CUB200) and len(data) == 3
        data = create_dataset('voc2012', root=str(voc), split='trainval', **train_call)
        assert isinstance(data, VOC2012) and len(data) == 4
        validate_call = dict(
            download=False, load_bytes=False, class_map='', num_samples=None, input_key=None, input_img_mode='L',
            target_key=None, trust_remote_code=False, seed=42)
        data = create_dataset(root=str(mit), name='mit67', split='validation', **validate_call)
        assert isinstance(data, MIT67) and len(data) == 2 and data[0][0].mode == 'L'

    @pytest.mark.parametrize('word, official', [
        ('train', 'train'), ('training', 'train'), ('validation', 'test'), ('val', 'test'), ('test', 'test')])
    def test_timms_words_for_splits_mean_the_official_ones(self, cub, word, official):
        assert create_dataset('cub200', cub, word).filenames() == CUB200(cub, official).filenames()

    def test_digits_take_their_number_and_seed_and_no_root(self):
        made = create_dataset('digits', None, 'train', num_samples=5, seed=9)
        assert np.array_equal(made.images, DigitScenes('train', num_images=5, seed=9).images)
        with pytest.raises(ValueError, match='digits is made, not read: leave out some/folder'):
            create_dataset('digits', 'some/folder')

    def test_every_other_name_goes_to_timm_unchanged(self, scenes, tmp_path):
        write_image_folder({'train': scenes}, tmp_path / 'digits')
        folder = create_dataset('', tmp_path / 'digits', 'train', True, {'7': 0}, transform=np.asarray)
        assert type(folder) is timm.data.ImageDataset and folder.transform is np.asarray
        assert len(folder) == (scenes.labels == 7).sum() and {label for _, label in folder} == {0}
        with pytest.raises(AssertionError, match='Unknown torchvision dataset'):
            create_dataset('torch/nothing', tmp_path)

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
        defaults = {name: parameter.default for name, parameter in
                    inspect.signature(timm.data.create_dataset).parameters.items()
                    if parameter.default is not inspect.Parameter.empty}
        defaults |= {'root': cub, 'split': 'test'}
        assert len(create_dataset('cub200', **defaults)) == 2


class TestTimmLoader:
    @pytest.mark.parametrize('num_workers', [0, 2])
    def test_prefetched_batches_of_scenes_are_the_images_normalised(self, scenes, num_workers):
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        data = DigitScenes('train', num_images=64, seed=3)
        loader = timm.data.create_loader(
            data, (3, 64, 64), 32, crop_pct=1., mean=mean, std=std, num_workers=num_workers, device=torch.device('cpu'),
            persistent_workers=False)
        images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
        expected = torch.from_numpy((scenes.images / 255. - mean) / std).permute(0, 3, 1, 2)
        torch.testing.assert_close(images.double(), expected, atol=1e-5, rtol=1e-5)
        assert labels.tolist() == scenes.labels.tolist()

    @pytest.mark.parametrize('options', [
        {'use_prefetcher': False},
        {'collate_fn': default_collate},
        pytest.param({}, marks=pytest.mark.skipif(
            not hasattr(timm.task, 'MultiLabelClassificationTask'),
            reason='fast_collate of timm < 1.0.31 takes class indices alone')),
    ])
    def test_voc_targets_reach_the_batch_with_ignored_entries(self, voc, options):
        loader = timm.data.create_loader(
            VOC2012(voc, 'trainval'), (3, 8, 8), 4, num_workers=0, device=torch.device('cpu'),
            persistent_workers=False, **options)
        images, targets = next(iter(loader))
        assert images.dtype == targets.dtype == torch.float32
        assert images.shape == (4, 3, 8, 8) and targets.shape == (4, 20)
        assert targets.sum(1).tolist() == [0, 2, 1, 1]
        assert [(targets == value).sum().item() for value in (0, 1, VOC_IGNORE)] == [72, 6, 2]

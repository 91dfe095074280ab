"""The demo's scenes: what they are made of, and as a folder of images."""

import pickle
import sys

import numpy as np
import pytest
import timm.data
from PIL import Image
from sklearn.datasets import load_digits

from timm_castream.datasets import DigitScenes, write_image_folder


@pytest.fixture(scope='module')
def scenes():
    return DigitScenes('train', num_images=64, seed=3)


class TestDigitScenes:
    def test_an_image_depends_on_split_seed_and_index_alone(self, scenes):
        fewer = DigitScenes('train', num_images=10, seed=3)
        for name in ('images', 'labels', 'boxes', 'scans'):
            assert np.array_equal(getattr(fewer, name), getattr(scenes, name)[:10])
        for other in (DigitScenes('train', num_images=10, seed=4), DigitScenes('validation', num_images=10, seed=3)):
            assert all((other.images[i] != fewer.images[i]).any() for i in range(10))

    @pytest.mark.slow
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

    @pytest.mark.parametrize(
        'kwargs, message',
        [
            ({'split': 'test'}, "'test' is no split of DigitScenes, which has train, validation"),
            ({'num_images': 0}, 'num_images=0 must be at least 1'),
            ({'seed': -1}, 'seed=-1 at least 0'),
        ],
    )
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
        (tmp_path / 'digits').mkdir()
        (tmp_path / 'digits' / 'notes.txt').write_text('mine')
        with pytest.raises(FileExistsError, match='digits exists already'):
            write_image_folder({'train': scenes}, tmp_path / 'digits')
        assert [file.name for file in (tmp_path / 'digits').rglob('*')] == ['notes.txt']

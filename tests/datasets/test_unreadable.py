"""Images that cannot be read: named, and never replaced by another image."""

import io
import os
import pickle

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate
from torchvision.datasets import ImageFolder

from timm_castream.datasets import (
    CUB200,
    DigitScenes,
    SeparatingCollate,
    Unreadable,
    image_name,
    read_batches,
    without_substitutes,
)


def png(value, size=(8, 8)):
    file = io.BytesIO()
    Image.new('RGB', size, (value,) * 3).save(file, 'png')
    return file.getvalue()


def truncated(size=(64, 64)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(file, 'jpeg')
    return file.getvalue()[: len(file.getvalue()) // 2]


@pytest.fixture
def folder(tmp_path):
    """Two classes of four images: 0 is fine, 1 empty, 2 no image, 3 cut off, 4 to 7 are fine."""
    contents = {
        'a/0.png': png(0),
        'a/1.png': b'',
        'a/2.png': b'no image',
        'a/3.jpg': truncated(),
        'b/6.png': png(60),
        'b/7.png': png(70),
        'b/4.png': png(40),
        'b/5.png': png(50),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def break_later(folder):
    """What happens to images after the data set listed them."""
    (folder / 'b/4.png').unlink()
    (folder / 'b/4.png').mkdir()
    (folder / 'b/5.png').unlink()
    os.symlink(folder / 'nowhere', folder / 'b/5.png')


def to_array(image):
    return np.asarray(image.resize((8, 8))).transpose(2, 0, 1).copy()


def summary(item):
    return (item.index, item.name) if isinstance(item, Unreadable) else (int(item[0].mean()), item[1])


EXPECTED = [(0, 0), (1, 'a/1.png'), (2, 'a/2.png'), (3, 'a/3.jpg'), (4, 'b/4.png'), (5, 'b/5.png'), (60, 1), (70, 1)]


@pytest.mark.parametrize('data_set', [timm.data.ImageDataset, ImageFolder])
class TestWithoutSubstitutes:
    def test_each_item_is_itself_or_named_as_unreadable(self, folder, data_set):
        data = without_substitutes(data_set(folder, transform=to_array))
        break_later(folder)
        assert len(data) == 8
        assert [summary(data[i]) for i in range(8)] == [summary(item) for item in data] == EXPECTED
        reasons = [data[i].reason for i in range(1, 6)]
        assert all('Error' in reason and '\n' not in reason for reason in reasons)
        assert 'cannot identify image file' in reasons[1] and 'truncated' in reasons[2]
        assert 'IsADirectoryError' in reasons[3] and 'FileNotFoundError' in reasons[4]

    @pytest.mark.parametrize('method', ['fork', pytest.param('spawn', marks=pytest.mark.slow)])
    def test_workers_of_a_loader_give_the_same(self, folder, data_set, method):
        data = without_substitutes(data_set(folder, transform=to_array))
        break_later(folder)
        loader = DataLoader(data, 8, num_workers=1, multiprocessing_context=method, collate_fn=list)
        assert [summary(item) for item in next(iter(loader))] == EXPECTED

    def test_subsets_are_read_without_substitutes_under_their_own_indices(self, folder, data_set):
        data = without_substitutes(Subset(data_set(folder, transform=to_array), [7, 2, 0]))
        loader = DataLoader(data, 3, collate_fn=list)  # torch would ask the subset for all three at once
        assert [summary(item) for item in next(iter(loader))] == [(70, 1), (1, 'a/2.png'), (0, 0)]

    def test_the_given_data_set_stays_as_it_was(self, folder, data_set):
        given = data_set(folder, transform=to_array)
        before = dict(vars(given))
        data = without_substitutes(given)
        data.transform, data.boxes = None, [1]
        assert data[0][0].size == (8, 8) and data.boxes == [1]
        assert vars(given) == before

    def test_it_has_the_attributes_of_the_data_set_and_can_be_wrapped_twice(self, folder, data_set):
        data = without_substitutes(data_set(folder, transform=to_array))
        assert without_substitutes(data) is data and data.transform is to_array
        assert image_name(data, 3) == 'a/3.jpg' and image_name(data, 3, absolute=True) == str(folder / 'a/3.jpg')
        with pytest.raises(AttributeError, match='nothing'):
            _ = data.nothing
        with pytest.raises(IndexError, match='index 8 is out of range for 8 items'):
            data[8]
        assert [summary(pickle.loads(pickle.dumps(data))[i]) for i in (0, 2)] == [(0, 0), (2, 'a/2.png')]


class TestOtherDataSets:
    def test_forty_in_a_row_do_not_end_it(self, folder):
        for i in range(40):
            (folder / 'a' / f'9{i:02d}.png').write_bytes(b'')
        data = without_substitutes(timm.data.ImageDataset(folder, transform=to_array))
        assert sum(isinstance(item, Unreadable) for item in data) == 43

    def test_a_single_image_that_cannot_be_read_is_named(self, tmp_path):
        (tmp_path / 'a').mkdir()
        (tmp_path / 'a' / '0.png').write_bytes(b'')
        item = without_substitutes(timm.data.ImageDataset(tmp_path))[0]
        assert (item.index, item.name) == (0, 'a/0.png') and 'cannot identify' in item.reason

    def test_a_file_without_permission_is_named(self, folder):
        path = folder / 'a/0.png'
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip('this user may read any file')
        item = without_substitutes(timm.data.ImageDataset(folder))[0]
        assert item.name == 'a/0.png' and 'PermissionError' in item.reason

    def test_the_archives_are_read_without_substitutes(self, tmp_path):
        for name, lines in {
            'classes.txt': ['1 a'],
            'images.txt': ['1 a/x.png', '2 a/y.png'],
            'image_class_labels.txt': ['1 1', '2 1'],
            'train_test_split.txt': ['1 1', '2 1'],
            'bounding_boxes.txt': ['1 0 0 2 2', '2 1 1 3 3'],
        }.items():
            (tmp_path / name).write_text('\n'.join(lines))
        (tmp_path / 'images' / 'a').mkdir(parents=True)
        (tmp_path / 'images/a/x.png').write_bytes(b'')
        (tmp_path / 'images/a/y.png').write_bytes(png(9))
        data = without_substitutes(CUB200(tmp_path))
        assert data[0].name == 'images/a/x.png' and data[1][0].size == (8, 8)
        assert data.classes == ['a'] and data.boxes.tolist() == [[0, 0, 2, 2], [1, 1, 4, 4]]

    def test_any_data_set_that_raises_has_its_items_named_by_their_indices(self):
        class Brittle(Dataset):
            def __getitem__(self, index):
                if index == 1:
                    raise RuntimeError('bad\n  sector')
                return index, 0

            def __len__(self):
                return 3

        data = without_substitutes(Brittle())
        assert [data[0], data[2]] == [(0, 0), (2, 0)]
        assert data[1] == Unreadable(1, 'image 1', 'RuntimeError: bad sector')

    def test_no_memory_is_no_unreadable_image(self):
        class Hungry(Dataset):
            def __getitem__(self, index):
                raise MemoryError

            def __len__(self):
                return 1

        with pytest.raises(MemoryError):
            without_substitutes(Hungry())[0]

    def test_iterable_data_sets_come_back_as_they_are(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(())

        stream = Stream()
        assert without_substitutes(stream) is stream


class TestBatches:
    @pytest.mark.parametrize(
        'collate_fn, item',
        [
            (fast_collate, (np.full((3, 2, 2), 7, dtype=np.uint8), 5)),
            (default_collate, (torch.full((3, 2, 2), 7), np.ones(4, dtype=np.float32))),
        ],
    )
    def test_readable_items_are_collated_and_the_others_handed_on(self, collate_fn, item):
        lost = Unreadable(4, 'x', 'y')
        collate = pickle.loads(pickle.dumps(SeparatingCollate(collate_fn)))
        (images, targets), unreadable = collate([item, lost, item])
        assert unreadable == [lost] and images.shape == (2, 3, 2, 2) and len(targets) == 2
        assert (images == 7).all()
        assert collate([lost, lost]) == (None, [lost, lost])

    @pytest.mark.parametrize('use_prefetcher', [True, False])
    @pytest.mark.parametrize(
        'batches', [[[0, 1, 6], [1, 2], [7, 0]], [[1, 2], [3], [6]], [[6], [1, 2], [3]], [[1], [2, 3]], [[7]], []]
    )
    def test_chosen_batches_are_read_as_the_loader_reads_its_own(self, folder, use_prefetcher, batches):
        """Every place of a batch without a readable image: first, in between, last, all, none."""
        loader = timm.data.create_loader(
            timm.data.ImageDataset(folder),
            (3, 8, 8),
            2,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            crop_pct=1.0,
            num_workers=0,
            use_prefetcher=use_prefetcher,
            device=torch.device('cpu'),
            persistent_workers=False,
        )
        read = list(read_batches(loader, batches))
        assert len(read) == len(batches)
        for wanted, (indices, inputs, targets, unreadable) in zip(batches, read, strict=True):
            assert indices == [i for i in wanted if i not in (1, 2, 3)]
            assert [item.index for item in unreadable] == [i for i in wanted if i in (1, 2, 3)]
            if not indices:
                assert inputs is None and targets is None
                continue
            expected = torch.tensor([(10 * i / 255 - 0.5) / 0.25 for i in indices])
            torch.testing.assert_close(inputs, expected[:, None, None, None].expand(-1, 3, 8, 8))
            assert targets.tolist() == [int(i > 3) for i in indices]
        assert type(loader.dataset) is timm.data.ImageDataset

    def test_data_without_files_is_read_too(self):
        data = DigitScenes('validation', num_images=4, transform=to_array)
        ((indices, inputs, targets, unreadable),) = read_batches(DataLoader(data, 2), [[3, 1]])
        assert (indices, unreadable) == ([3, 1], []) and targets.tolist() == data.labels[[3, 1]].tolist()
        assert inputs.shape == (2, 3, 8, 8) and image_name(data, 3) == 'image 3'

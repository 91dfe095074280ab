"""Folders of images: which files are images, which folders are classes, and which index each class has."""

import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image
from torchvision.datasets import ImageFolder

from timm_castream.datasets import create_dataset, label_names_of, without_substitutes
from timm_castream.datasets.folders import NO_TARGET, class_folders


def write(root: Path, *names: str) -> Path:
    """Images of one colour, whose red is their number."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4), (number, 0, 0)).save(root / name)
    return root


def labels(dataset) -> dict[str, int]:
    return {dataset.filename(i): dataset[i][1] for i in range(len(dataset))}


def read(root: Path, split: str = 'validation', **kwargs) -> dict[str, int]:
    return labels(create_dataset('', root, split, **kwargs))


def test_an_ordinary_folder_is_read_as_timm_reads_it(tmp_path):
    names = [f'{c}/{n}{i}.{e}' for c in ('b', 'A', 'c2', 'c10') for n in 'xY' for i in (10, 9) for e in ('png', 'JPG')]
    write(tmp_path, *names)
    ours, theirs = create_dataset('', tmp_path), timm.data.ImageDataset(tmp_path)
    assert labels(ours) == labels(theirs) and ours.filenames() == theirs.filenames()
    assert ours.reader.class_to_idx == theirs.reader.class_to_idx
    assert all(np.array_equal(ours[i][0], theirs[i][0]) for i in range(len(ours)))


def test_every_format_counts_and_no_class_moves_for_want_of_timms_endings(tmp_path, caplog):
    write(tmp_path, 'a/0.png', 'b/0.webp', 'b/1.bmp', 'c/0.tiff', 'c/1.GIF')
    (tmp_path / 'c' / 'notes.txt').write_text('x')
    assert read(tmp_path) == {'a/0.png': 0, 'b/0.webp': 1, 'b/1.bmp': 1, 'c/0.tiff': 2, 'c/1.GIF': 2}
    assert '1 file is no image that is read and left out: 1 .txt' in caplog.text


def test_hidden_folders_and_files_are_no_classes_and_are_named(tmp_path, caplog):
    write(tmp_path, 'cat/0.png', 'cat/._0.png', 'cat/.ipynb_checkpoints/0.png', 'dog/1.png', 'dog/@eaDir/1.png/T.jpg')
    write(tmp_path, '.ipynb_checkpoints/0.png', '__MACOSX/cat/0.png')
    assert read(tmp_path) == {'cat/0.png': 0, 'dog/1.png': 1}
    assert 'hidden files and folders are left out' in caplog.text and '__MACOSX' in caplog.text
    assert class_folders(tmp_path) == ['cat', 'dog']


def test_images_beside_class_folders_are_named_and_left_out(tmp_path, caplog):
    write(tmp_path, 'stray.png', 'a/0.png', 'b/0.png')
    assert read(tmp_path) == {'a/0.png': 0, 'b/0.png': 1}
    assert '1 image beside the class folders' in caplog.text and 'stray.png' in caplog.text


def test_images_without_class_folders_have_no_class(tmp_path):
    data = create_dataset('', write(tmp_path, '10.png', '9.png'))
    assert labels(data) == {'9.png': NO_TARGET, '10.png': NO_TARGET}
    assert data.reader.class_to_idx == {} and label_names_of(data) is None


def test_nested_images_belong_to_the_first_folder_and_it_is_said(tmp_path, caplog):
    write(tmp_path, 'a/0.png', 'a/sub/deep/9.png', 'b/0.png')
    assert read(tmp_path) == {'a/0.png': 0, 'a/sub/deep/9.png': 0, 'b/0.png': 1}
    assert (
        '1 image lies in folders inside' in caplog.text
        and "a/sub/deep/9.png, which belongs to class 'a'" in caplog.text
    )


def test_the_layout_of_tiny_imagenet_has_a_class_a_folder(tmp_path):
    assert read(write(tmp_path, 'n1/images/0.png', 'n2/images/0.png')) == {'n1/images/0.png': 0, 'n2/images/0.png': 1}


@pytest.mark.parametrize(
    'names',
    [
        ('x/train/0.png', 'x/test/0.png', 'y/train/0.png', 'y/test/0.png'),
        ('training_set/cats/0.png', 'training_set/dogs/1.png', 'test_set/cats/0.png', 'test_set/dogs/1.png'),
    ],
)
def test_folders_of_which_it_cannot_be_told_whether_they_are_classes_are_refused(tmp_path, names):
    first, second = sorted({name.split('/')[0] for name in names}), sorted({name.split('/')[1] for name in names})
    with pytest.raises(ValueError, match=f'folders {", ".join(first)}, .* folders {", ".join(second)}'):
        create_dataset('', write(tmp_path, *names))


def test_a_split_that_lacks_a_class_keeps_the_indices_of_the_others(tmp_path, caplog):
    write(tmp_path, 'train/a/0.png', 'train/b/0.png', 'train/c/0.png', 'val/b/0.png', 'val/c/0.png', 'test/c/1.png')
    for root, split in ((tmp_path, 'val'), (tmp_path / 'val', 'validation')):
        caplog.clear()
        data = create_dataset('', root, split)
        assert labels(data) == {'b/0.png': 1, 'c/0.png': 2} and label_names_of(data) == ['a', 'b', 'c']
        assert "lacks the class 'a'" in caplog.text
    assert read(tmp_path, 'test') == {'c/1.png': 2}
    assert read(tmp_path, 'val', label_names=['c', 'a', 'b']) == {'b/0.png': 2, 'c/0.png': 0}


@pytest.mark.parametrize(
    ('present', 'wrong', 'hint'),
    [(('a', 'zebra', 'c'), "the class 'zebra'", ''), (('b', 'c', 'd'), "the class 'd'", ''),
     (('A', 'b', 'c'), "the class 'A'", 'Is A meant to be a'), (('x', 'y', 'z'), r"3 classes \('x', 'y', 'z'\)", '')],
)  # fmt: skip
def test_a_split_with_a_class_that_training_lacks_is_refused_by_name(tmp_path, present, wrong, hint):
    write(tmp_path, 'train/a/0.png', 'train/b/0.png', 'train/c/0.png', *(f'val/{name}/0.png' for name in present))
    with pytest.raises(ValueError, match=f"{wrong}.* known classes are 'a', 'b', 'c'.*{hint}"):
        create_dataset('', tmp_path, 'val')
    assert len(create_dataset('', tmp_path, 'val', class_map=dict.fromkeys(present, 0))) == 3


def test_names_are_the_same_however_unicode_writes_their_accents(tmp_path):
    """macOS writes an accent as a letter of its own."""
    write(tmp_path, 'train/e\u0301t\u00e9/0.png', 'train/z/0.png', 'val/\u00e9te\u0301/0.png', 'val/z/0.png')
    assert set(read(tmp_path, 'val').values()) == {0, 1}


def test_images_that_a_class_map_lacks_are_counted(tmp_path, caplog):
    write(tmp_path, 'a/0.png', 'b/0.png', 'b/1.png', 'kinds/c/2.png', 'stray.png')
    (tmp_path / 'map.txt').write_text('c\na\n')
    assert read(tmp_path, class_map=str(tmp_path / 'map.txt')) == {'a/0.png': 1, 'kinds/c/2.png': 0}
    assert (
        "2 images of folder 'b' are left out" in caplog.text
        and '1 image outside of class folders is left out' in caplog.text
    )
    with pytest.raises(RuntimeError, match='no images of the classes'):
        create_dataset('', tmp_path, class_map={'nothing': 0})


@pytest.mark.parametrize('names', [[str(i) for i in range(1, 13)], ['Zebra', 'ant']])
def test_a_natural_order_that_is_not_the_plain_one_is_said(tmp_path, names, caplog):
    write(tmp_path, *(f'{name}/0.png' for name in names))
    data = create_dataset('', tmp_path)
    assert label_names_of(data) != ImageFolder(tmp_path).classes
    place = next(i for i, name in enumerate(label_names_of(data)) if name != sorted(names)[i])
    assert f'class {place} is {label_names_of(data)[place]!r}' in caplog.text
    assert f'other software it is {sorted(names)[place]!r}' in caplog.text
    caplog.clear()
    plain = ImageFolder(tmp_path).classes
    assert read(tmp_path, label_names=plain) == {f'{name}/0.png': plain.index(name) for name in names}
    assert 'natural order' not in caplog.text


def test_names_that_differ_in_case_or_zeros_alone_have_the_same_order_in_every_process(tmp_path):
    write(
        tmp_path, *(f'{name}/{file}.png' for name in ('Cat', 'cat', '1', '01', '001') for file in ('A', 'a', '1', '01'))
    )
    script = (
        'from timm_castream.datasets import create_dataset; import sys; d = create_dataset("", sys.argv[1]);'
        'print(list(d.reader.class_to_idx), d.filenames())'
    )
    runs = {
        subprocess.run(
            [sys.executable, '-c', script, str(tmp_path)],
            env=os.environ | {'PYTHONHASHSEED': seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ('1', '2')
    }  # fmt: skip
    assert len(runs) == 1 and runs.pop().startswith("['001', '01', '1', 'Cat', 'cat']")


def test_folders_without_images_name_what_they_hold(tmp_path):
    (tmp_path / 'a').mkdir()
    for name in ('x.svg', 'y.svg', 'z.nef'):
        (tmp_path / 'a' / name).write_bytes(b'')
    with pytest.raises(RuntimeError, match=r'no images, its files are 2 \.svg, 1 \.nef'):
        create_dataset('', tmp_path)


def test_an_empty_folder_is_no_class(tmp_path):
    (tmp_path / 'logs').mkdir()
    assert read(write(tmp_path, 'a/0.png', 'z/0.png')) == {'a/0.png': 0, 'z/0.png': 1}


def test_an_unreadable_image_is_replaced_in_training_alone(tmp_path, caplog):
    write(tmp_path, 'a/0.png', 'a/1.png', 'b/2.png')
    (tmp_path / 'a' / '1.png').write_bytes(b'no image')
    data = create_dataset('', tmp_path)
    with caplog.at_level(logging.WARNING):
        image, label = data[1]
    assert (image.getpixel((0, 0)), label) == ((2, 0, 0), 1) and 'a/1.png is skipped' in caplog.text
    assert without_substitutes(data)[1].name == 'a/1.png'
    for file in tmp_path.glob('*/*.png'):
        file.write_bytes(b'')
    with pytest.raises(RuntimeError, match='in a row cannot be read'):
        data[0]


def test_archives_and_torchvisions_folders_open_images_the_same_way(tmp_path):
    import tarfile

    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / 'images' / 'a').mkdir(parents=True)
    Image.new('RGBA', (6, 4), (9, 9, 9, 0)).save(tmp_path / 'images' / 'a' / '0.png', exif=exif)
    with tarfile.open(tmp_path / 'images.tar', 'w') as archive:
        archive.add(tmp_path / 'images' / 'a', 'a')
    for name, root in (('', tmp_path / 'images'), ('', tmp_path / 'images.tar'), ('torch/folder', tmp_path / 'images')):
        image, label = create_dataset(name, str(root))[0]
        assert (image.size, image.getpixel((0, 0)), label) == ((4, 6), (255, 255, 255), 0)


def test_timms_endings_can_be_chosen_as_with_timm(tmp_path):
    write(tmp_path, 'a/0.png', 'a/1.jpg', 'a/2.webp')
    assert set(read(tmp_path, input_key='.png;.webp')) == {'a/0.png', 'a/2.webp'}


def test_a_flat_folder_with_one_image_in_a_subfolder_is_not_measured_by_that_image_alone(tmp_path):
    (tmp_path / 'sub').mkdir()
    for name in ('a.png', 'b.png', 'sub/c.png'):
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match='2 images beside its folders and 1 in them'):
        create_dataset('', str(tmp_path), split='validation')


def test_a_file_that_is_no_archive_is_one_sentence(tmp_path):

    write(tmp_path, 'a/0.png')
    with zipfile.ZipFile(tmp_path / 'data.zip', 'w') as archive:
        archive.write(tmp_path / 'a/0.png', 'a/0.png')
    with pytest.raises(ValueError, match=r'data\.zip is no folder and no tar archive of images: unpack it'):
        create_dataset('', tmp_path / 'data.zip')

"""Saved maps by the names of their images."""

import numpy as np
import pytest

from timm_castream.attribution.saved_maps import read_maps

NAMES = ['cat/img_2.png', 'cat/img_10.png', 'dog/img_2.png', 'dog/img_2.jpg', 'e\u0301te\u0301.png']
MAPS = {name: np.full((3, 4), i, dtype=np.float32) for i, name in enumerate(NAMES)}


def values(array) -> list[float]:
    return array[:, 0, 0].tolist()


@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('kind', ['npz', 'folder', 'folder of stems', 'windows'])
def test_maps_come_in_the_order_of_the_images_whatever_that_of_the_file(tmp_path, kind, order):
    keys = list(MAPS)[::order]  # torchvision's order has img_10 in front of img_2
    if kind in ('npz', 'windows'):
        slash = '\\' if kind == 'windows' else '/'
        np.savez(tmp_path / 'maps.npz', **{key.replace('/', slash): MAPS[key] for key in keys})
        assert values(read_maps(tmp_path / 'maps.npz', NAMES)) == [0, 1, 2, 3, 4]
        return
    for key in keys:
        alone = kind == 'folder of stems' and not key.startswith('dog')  # two images of a stem need their endings
        path = tmp_path / 'maps' / f'{key.rpartition(".")[0] if alone else key}.npy'
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, MAPS[key][None] if order == 1 else MAPS[key])
    assert values(read_maps(tmp_path / 'maps', NAMES)) == [0, 1, 2, 3, 4]


def test_names_are_the_same_however_unicode_writes_their_accents(tmp_path):
    np.savez(tmp_path / 'maps.npz', **{'été.png': np.ones((2, 2)), 'b.png': np.zeros((2, 2))})
    assert values(read_maps(tmp_path / 'maps.npz', ['b.png', 'e\u0301te\u0301.png'])) == [0, 1]


@pytest.mark.parametrize('save', [np.save, np.savez])
def test_a_plain_array_has_the_order_of_the_images_already(tmp_path, save):
    array = np.arange(60.0).reshape(5, 3, 4)
    path = tmp_path / ('maps.npy' if save is np.save else 'maps.npz')
    save(path, array)
    assert np.array_equal(read_maps(path, NAMES), array)


def test_images_without_a_map_and_maps_of_other_sizes_are_named(tmp_path):
    np.savez(tmp_path / 'maps.npz', **{'cat/img_2': np.zeros((2, 2)), 'x/y.png': np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r'no map for 4 of the 5 images: cat/img_10\.png, .* its names are cat/img_2'):
        read_maps(tmp_path / 'maps.npz', NAMES)
    np.savez(tmp_path / 'maps.npz', **{'a.png': np.zeros((2, 2)), 'b.png': np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r'map of b\.png in .* has shape \(2, 3\); .* \(2, 2\)'):
        read_maps(tmp_path / 'maps.npz', ['a.png', 'b.png'])


def test_files_that_are_no_arrays_are_named(tmp_path):
    (tmp_path / 'text.npy').write_text('no array')
    (tmp_path / 'zip.npz').write_bytes(b'PK no archive')
    np.save(tmp_path / 'objects.npy', np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / 'objects.npz', **{name: np.array([{}]) for name in NAMES})
    np.savez_compressed(tmp_path / 'damaged.npz', **{name: np.arange(4000.0).reshape(40, 100) for name in NAMES})
    data = bytearray((tmp_path / 'damaged.npz').read_bytes())
    data[300:600] = bytes(300)
    (tmp_path / 'damaged.npz').write_bytes(bytes(data))
    (tmp_path / 'empty').mkdir()
    for name in ('text.npy', 'zip.npz', 'objects.npy', 'objects.npz', 'damaged.npz'):
        with pytest.raises(ValueError, match=rf'{name} is no array saved by numpy'):
            read_maps(tmp_path / name, NAMES)
    with pytest.raises(ValueError, match=r'There is no file .*missing\.npy'):
        read_maps(tmp_path / 'missing.npy', NAMES)
    with pytest.raises(ValueError, match=r'empty holds no \.npy files'):
        read_maps(tmp_path / 'empty', NAMES)

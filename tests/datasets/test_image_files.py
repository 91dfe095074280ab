"""Image files as a network takes them, against Pillow's own pixels and numpy."""

import importlib.util
import io
import logging
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageOps

from timm_castream.datasets import find_images, image_files, image_mode, open_image
from timm_castream.datasets.image_files import natural_key, stored_orientation, walk_images

RAMP = np.arange(0, 65536, 257 * 5, dtype=np.uint16).reshape(4, -1)  # 52 values
HEIC_START = struct.pack('>I', 24) + b'ftypheic' + bytes(12)


def photograph(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def pixels(*args, **kwargs) -> list:
    return np.asarray(open_image(*args, **kwargs)).tolist()


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('ending', ['png', 'jpg', 'webp', 'tiff'])
def test_images_stand_upright_by_their_exif_orientation(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f'a.{ending}'
    Image.fromarray(photograph(24, 40, 3)).save(path, exif=exif)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert('RGB'))
    assert pixels(path) == expected.tolist()
    assert expected.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    assert stored_orientation(path) == ((40, 24), orientation, ending == 'tiff')


@pytest.mark.parametrize('orientation', range(1, 9))
def test_grey_tiffs_stand_upright(tmp_path, orientation):
    """Pillow 12.3 turns other pixels where it is given the path of an uncompressed one."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = Image.fromarray(photograph(20, 30))
    grey.save(tmp_path / 'a.tiff', exif=exif)
    grey.getexif()[0x0112] = orientation
    assert pixels(tmp_path / 'a.tiff', 'L') == np.asarray(ImageOps.exif_transpose(grey)).tolist()


def test_damaged_exif_data_leave_the_pixels_as_they_are(tmp_path):
    Image.fromarray(photograph(6, 8, 3)).save(tmp_path / 'a.png', exif=b'Exif\x00\x00MM\x00*\x00\x00\x00\xff\xff\xff')
    assert open_image(tmp_path / 'a.png').size == (8, 6)
    assert stored_orientation(tmp_path / 'a.png')[1] == 1


@pytest.mark.parametrize('save', ['grey.png', 'grey.tiff', 'big.tiff', 'alpha.png', 'a.pgm'])
def test_16_bits_are_divided_by_257(tmp_path, save):
    path = tmp_path / save
    if save == 'big.tiff':
        Image.frombytes('I;16B', (RAMP.shape[1], 4), RAMP.astype('>u2').tobytes()).save(path)
    elif save == 'a.pgm':
        path.write_bytes(b'P5 %d 4 65535\n' % RAMP.shape[1] + RAMP.astype('>u2').tobytes())
    else:
        Image.fromarray(RAMP).save(path)
    expected = np.round(RAMP / 257).astype(int)
    assert pixels(path, 'L') == expected.tolist()
    assert pixels(path) == np.stack([expected] * 3, -1).tolist()


def test_dark_and_flat_16_bit_images_stay_dark_and_flat(tmp_path):
    """A 12-bit X-ray in 16 bits, and a flat image: the same grey for the same number in every file."""
    for name, values in {'x-ray.png': [[0, 1000], [2570, 4095]], 'flat.png': [[2570, 2570]]}.items():
        Image.fromarray(np.array(values, dtype=np.uint16)).save(tmp_path / name)
    assert pixels(tmp_path / 'x-ray.png', 'L') == [[0, 4], [10, 16]]
    assert pixels(tmp_path / 'flat.png', 'L') == [[10, 10]]


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        ([[0.0, 0.5], [1.0, 0.2]], [[0, 128], [255, 51]]),
        ([[0.0, 12.0], [255.0, 3.0]], [[0, 12], [255, 3]]),
        ([[-2.0, 0.0], [6.0, 2.0]], [[0, 64], [255, 128]]),  # no fixed range: the image's own
        ([[np.nan, 0.0], [1.0, np.inf]], [[0, 0], [255, 0]]),
        ([[7.0, 7.0], [7.0, 7.0]], [[7, 7], [7, 7]]),
    ],
)
def test_floating_point_images_are_read_by_their_range(tmp_path, values, expected):
    Image.fromarray(np.array(values, dtype=np.float32)).save(tmp_path / 'a.tiff')
    assert pixels(tmp_path / 'a.tiff', 'L') == expected


def test_32_bit_integers_beyond_16_bits_are_scaled_by_the_images_own_range(tmp_path):
    Image.fromarray(np.array([[-100, 100_000], [300_000, 50_000]], dtype=np.int32)).save(tmp_path / 'a.tiff')
    assert pixels(tmp_path / 'a.tiff', 'L') == [[0, 85], [255, 43]]


@pytest.mark.parametrize('ending', ['png', 'webp', 'tiff'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_transparent_pixels_are_laid_over_white(tmp_path, ending, mode):
    rgba = photograph(9, 11, 4)
    rgba[:3, :, 3], rgba[3:6, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / f'a.{ending}', **({'lossless': True} if ending == 'webp' else {}))
    with Image.open(tmp_path / f'a.{ending}') as stored:  # WebP may change colours that nobody sees
        rgba = np.asarray(stored.convert('RGBA')).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    found = np.asarray(open_image(tmp_path / f'a.{ending}', mode)).astype(float)
    if mode == 'L':
        expected = expected @ [0.299, 0.587, 0.114]
    assert np.abs(found - expected).max() <= 1
    assert (found[:3] == 255).all()
    if mode == 'RGB':
        assert (found[3:6] == rgba[3:6, :, :3]).all()  # opaque pixels keep their colours to the last bit


@pytest.mark.parametrize('kind', ['palette', 'grey and alpha', 'colour key', '16 bits', 'gif', 'bilevel'])
def test_every_kind_of_transparency_is_white(tmp_path, kind):
    path = tmp_path / ('a.gif' if kind == 'gif' else 'a.png')
    if kind in ('palette', 'gif'):
        image = Image.new('P', (2, 1))
        image.putpalette([10, 20, 30, 200, 0, 0])
        image.putdata([0, 1])
        image.save(path, transparency=0)
        expected = [[[255, 255, 255], [200, 0, 0]]]
    elif kind == 'grey and alpha':
        Image.fromarray(np.array([[[90, 0], [40, 255]]], dtype=np.uint8), 'LA').save(path)
        expected = [[[255] * 3, [40] * 3]]
    elif kind == 'colour key':
        Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)).save(path, transparency=(1, 2, 3))
        expected = [[[255] * 3, [4, 5, 6]]]
    elif kind == '16 bits':
        Image.fromarray(np.array([[257, 5140]], dtype=np.uint16)).save(path, transparency=257)
        expected = [[[255] * 3, [20] * 3]]
    else:
        Image.fromarray(np.array([[False, True]])).save(path, transparency=0)
        expected = [[[255] * 3, [255] * 3]]
    assert pixels(path) == expected


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_a_network_gets_as_many_channels_as_it_takes(tmp_path, channels):
    rgba = photograph(5, 7, 4)
    Image.fromarray(rgba).save(tmp_path / 'a.png')
    found = np.asarray(open_image(tmp_path / 'a.png', image_mode(channels)))
    assert found.reshape(5, 7, -1).shape[2] == channels
    if channels == 4:
        assert (found == rgba).all()  # alpha is a channel of the network


@pytest.mark.parametrize('channels', [0, 5, 12])
def test_channels_that_no_image_file_has_are_refused(channels):
    with pytest.raises(ValueError, match=rf'images of {channels} channels.* 1 to 4'):
        image_mode(channels)


def test_of_several_frames_and_pages_the_first_is_read(tmp_path):
    frames = [Image.new('RGB', (4, 4), colour) for colour in ('red', 'blue')]
    for ending in ('gif', 'tiff', 'webp', 'png'):
        options = {'lossless': True} if ending == 'webp' else {}
        frames[0].save(tmp_path / f'a.{ending}', save_all=True, append_images=frames[1:], **options)
        assert open_image(tmp_path / f'a.{ending}').getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize('mode', ['1', 'CMYK', 'HSV', 'L', 'LAB', 'P', 'RGB', 'YCbCr'])
def test_every_colour_space_becomes_rgb(tmp_path, mode):
    grey = Image.new('RGB', (6, 4), (128, 128, 128))
    if mode == 'LAB':
        image = Image.merge('LAB', [Image.new('L', (6, 4), value) for value in (137, 128, 128)])  # L* of grey 128
    else:
        image = Image.new('1', (6, 4), 1) if mode == '1' else grey.quantize(4) if mode == 'P' else grey.convert(mode)
    found = np.asarray(open_image(image)).astype(int)
    assert found.shape == (4, 6, 3)
    assert np.abs(found - (255 if mode == '1' else 128)).max() <= 2


def test_ordinary_images_have_the_pixels_that_timm_gives_them(tmp_path):
    """Files of timm's three endings, without EXIF data: bit for bit those of `Image.open(file).convert(mode)`."""
    for name, channels in {'a.png': (3,), 'b.jpg': (3,), 'c.jpeg': (), 'd.png': ()}.items():
        Image.fromarray(photograph(20, 30, *channels)).save(tmp_path / name)
        for mode in ('RGB', 'L'):
            with Image.open(tmp_path / name) as stored:
                assert pixels(tmp_path / name, mode) == np.asarray(stored.convert(mode)).tolist()


def test_files_streams_and_images_are_the_same(tmp_path):
    Image.fromarray(photograph(5, 6, 4)).save(tmp_path / 'a.png')
    content = (tmp_path / 'a.png').read_bytes()
    with Image.open(tmp_path / 'a.png') as image:
        assert pixels(tmp_path / 'a.png') == pixels(io.BytesIO(content)) == pixels(image)


@pytest.mark.parametrize('content', [b'', b'no image', b'\x89PNG\r\n\x1a\n' + bytes(40), b'%!PS-Adobe-3.0 EPSF-3.0\n'])
def test_what_is_no_image_is_an_os_error(tmp_path, content):
    """PostScript is a program, which Pillow would hand to Ghostscript."""
    (tmp_path / 'a.png').write_bytes(content)
    with pytest.raises(OSError):
        open_image(tmp_path / 'a.png')


@pytest.mark.parametrize('start', [HEIC_START, b'\xff\x0a' + bytes(30), b'\x00\x00\x00\x0cJXL \r\n\x87\n' + bytes(8)])
@pytest.mark.parametrize('as_stream', [True, False])
def test_formats_of_plugins_are_named_with_what_to_install(tmp_path, monkeypatch, start, as_stream):
    for module in ('pillow_heif', 'pillow_jxl'):
        monkeypatch.setitem(sys.modules, module, None)  # not installed
    path = tmp_path / 'a.jpg'  # phones send HEIC under any name
    path.write_bytes(start)
    package = 'HEIC.* pip install pillow-heif' if start == HEIC_START else 'JPEG XL.* pip install pillow-jxl-plugin'
    with pytest.raises(OSError, match=package):
        open_image(io.BytesIO(start) if as_stream else path)


def test_an_installed_plugin_is_registered_where_it_is_first_needed(tmp_path, monkeypatch):
    """A stand-in for pillow_heif that reads every HEIC file as one red pixel."""

    class Stub(Image.Image):
        pass

    def register() -> None:
        monkeypatch.setitem(
            Image.OPEN,
            'STUB',
            (lambda file, name: Image.new('RGB', (1, 1), 'red'), lambda start: start[4:8] == b'ftyp'),
        )
        monkeypatch.setattr(Image, 'ID', [*Image.ID, 'STUB'])

    monkeypatch.setitem(sys.modules, 'pillow_heif', types.SimpleNamespace(register_heif_opener=register))
    (tmp_path / 'a.heic').write_bytes(HEIC_START)
    assert pixels(tmp_path / 'a.heic') == [[[255, 0, 0]]]


@pytest.mark.skipif(importlib.util.find_spec('pillow_heif') is None, reason='needs pillow-heif')
def test_heic_is_read_with_its_package(tmp_path):
    import pillow_heif

    image = Image.fromarray(np.kron(photograph(4, 6, 3), np.ones((8, 8, 1), dtype=np.uint8)))
    pillow_heif.from_pillow(image).save(tmp_path / 'a.heic', quality=100)
    assert np.abs(np.asarray(open_image(tmp_path / 'a.heic')).astype(int) - np.asarray(image)).mean() < 4


def test_names_have_their_natural_order_and_ties_are_decided_by_their_letters():
    names = ['img_10.png', 'img_2.png', 'Img_1.png', 'img_01.png', 'img_1.png', 'b', 'A', '²', 'x²3']
    expected = ['A', 'b', 'Img_1.png', 'img_01.png', 'img_1.png', 'img_2.png', 'img_10.png', 'x²3', '²']
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key) == expected


class TestFolders:
    def test_images_of_all_formats_are_found_in_natural_order_and_no_hidden_ones(self, tmp_path, caplog):
        files = ['b.JPG', 'a10.png', 'a9.webp', 'sub/c.gif', 'sub/.hidden.png', '.ipynb_checkpoints/a9.png',
                 '__MACOSX/a.png', 'notes.txt', 'more.TXT', 'Makefile', 'x.bmp', 'page.eps']  # fmt: skip
        for name in files:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b'')
        with caplog.at_level(logging.WARNING):
            found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
        assert found == ['a9.webp', 'a10.png', 'b.JPG', 'sub/c.gif', 'x.bmp']
        assert '4 files are no image that is read and left out: 2 .txt, 1 without an ending, 1 .eps' in caplog.text
        assert all(name in caplog.text for name in ('.ipynb_checkpoints', '__MACOSX', 'sub/.hidden.png'))

    def test_photographs_of_a_format_that_needs_a_package_are_counted_with_its_name(
        self, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr(image_files, '_is_installed', lambda module: False)
        extensions = {key: value for key, value in Image.registered_extensions().items() if value != 'HEIF'}
        monkeypatch.setattr(Image, 'registered_extensions', lambda: extensions)
        image_files.image_endings.cache_clear()
        for name in ('a.heic', 'b.HEIC', 'c.png'):
            (tmp_path / name).write_bytes(b'')
        assert [path.name for path in find_images(tmp_path)] == ['c.png']
        assert '2 .heic (pip install pillow-heif reads them)' in caplog.text
        monkeypatch.setattr(image_files, '_is_installed', lambda module: True)
        image_files.image_endings.cache_clear()
        assert [path.name for path in find_images(tmp_path)] == ['a.heic', 'b.HEIC', 'c.png']
        monkeypatch.undo()
        image_files.image_endings.cache_clear()

    def test_a_folder_that_links_to_one_that_it_lies_in_is_not_followed(self, tmp_path):
        (tmp_path / 'a').mkdir()
        (tmp_path / 'a' / '0.png').write_bytes(b'')
        (tmp_path / 'a' / 'again').symlink_to(tmp_path)
        (tmp_path / 'b').symlink_to(tmp_path / 'a')  # another name of a folder is followed
        assert walk_images(tmp_path)[0] == ['a/0.png', 'b/0.png']

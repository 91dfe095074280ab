"""Boxes of data sets: read from files, and carried through the transforms as the pixels are."""

from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image, ImageOps
from references import VOC_CLASSES
from timm.data import create_transform
from timm.data import transforms as timm_transforms
from torch.utils.data import Subset, TensorDataset, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from timm_castream.datasets import (
    VOC2012,
    DigitScenes,
    boxes_for,
    create_dataset,
    has_boxes,
    input_boxes,
    read_boxes,
    without_substitutes,
)
from timm_castream.evaluate import evaluate
from timm_castream.metrics.localization import energy_pointing_game, pointing_game

SIZES = [(500, 375), (375, 500), (64, 64), (300, 301), (1000, 90), (37, 51)]
PIPELINES = {
    'centre': {'crop_pct': 0.875},
    'whole': {'crop_pct': 1.0},
    'squash': {'crop_pct': 0.9, 'crop_mode': 'squash'},
    'border': {'crop_pct': 0.95, 'crop_mode': 'border'},
    'not square': {'input_size': (3, 40, 64), 'crop_pct': 0.9},
    'trimmed': {'crop_border_pixels': 5},
    'bicubic': {'interpolation': 'bicubic', 'use_prefetcher': True},
}


def white_box(size, box):
    """A black image of a size (width, height) that is white inside a box of whole pixels."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('options', PIPELINES.values(), ids=PIPELINES)
def test_boxes_end_where_timms_evaluation_pipelines_put_the_pixels(size, options):
    """The image is white inside the box, so the white that is left must fill the box that is predicted."""
    transform = create_transform(**{'input_size': (3, 56, 56), 'mean': (0, 0, 0), 'std': (1, 1, 1)} | options)
    width, height = size
    for box in (
        [width // 4, height // 3, 3 * width // 4, 2 * height // 3],
        [0, 0, width // 2, height],
        [width // 2, 0, width, height // 2],
    ):
        pixels = np.asarray(transform(white_box(size, box)), dtype=np.float64)
        white = pixels[0] / (255 if options.get('use_prefetcher') else 1)
        found = input_boxes([box], size, transform)
        if np.isnan(found).any():
            assert white.max() < 0.5
            continue
        x0, y0, x1, y1 = found[0]
        rows, columns = np.nonzero(white > 0.5)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert extent == pytest.approx([x0, y0, x1, y1], abs=1)  # half a pixel of resampling, half of rounding
        assert white.sum() == pytest.approx((x1 - x0) * (y1 - y0), rel=0.05, abs=6)


def test_known_corners_of_resize_and_crop():
    """A 500 x 375 image resized to 341 x 256: the crop takes 58 columns (58.5, rounded to even) and 16 rows away."""
    transform = create_transform(224)
    x, y = 341 / 500, 256 / 375
    assert input_boxes([[100, 100, 400, 300]], (500, 375), transform).tolist() == [
        pytest.approx([100 * x - 58, 100 * y - 16, min(400 * x - 58, 224), 300 * y - 16])
    ]


def test_boxes_are_clipped_to_the_input_and_those_outside_become_nan():
    crop = transforms.CenterCrop(10)
    boxes = input_boxes([[0, 0, 8, 20], [0, 0, 5, 20], [5, 5, 15, 15], [12, 0, 30, 4]], (20, 20), crop)
    assert boxes[[0, 2]].tolist() == [[0, 0, 3, 10], [0, 0, 10, 10]]
    assert np.isnan(boxes[[1, 3]]).all()


def test_small_images_are_padded_as_the_crop_pads_them():
    for crop in (transforms.CenterCrop(10), timm_transforms.CenterCropOrPad(10)):
        image = np.asarray(crop(white_box((5, 16), [0, 0, 5, 16])))[..., 0]
        columns = np.flatnonzero(image.any(axis=0))
        assert input_boxes([[0, 0, 5, 16]], (5, 16), crop).tolist() == [[columns[0], 0, columns[-1] + 1, 10]]


def test_without_a_transform_boxes_are_those_of_the_stored_image():
    assert input_boxes([[1, 2, 3, 4]], (10, 10), None).tolist() == [[1, 2, 3, 4]]
    assert input_boxes(np.empty((0, 4)), (10, 10), transforms.Compose([transforms.ToTensor()])).shape == (0, 4)


@pytest.mark.parametrize(
    'transform',
    [
        transforms.RandomCrop(8),
        transforms.RandomHorizontalFlip(),
        create_transform(32, is_training=True),
        np.asarray,
        timm_transforms.ResizeKeepRatio(8, random_scale_prob=0.5),
    ],
)
def test_transforms_that_may_move_pixels_anywhere_are_refused(transform):
    with pytest.raises(ValueError, match='boxes cannot follow the'):
        input_boxes([[1, 2, 3, 4]], (10, 10), transform)


class TestBoxesFor:
    def test_rows_are_padded_with_nan_and_follow_the_transform_of_the_loader(self):
        data = DigitScenes('validation', num_images=6, seed=1)
        assert boxes_for(data, [0, 5], [3, 3]).tolist() == data.boxes[[0, 5]][:, None].tolist()
        timm.data.create_loader(
            data, (3, 32, 32), 2, crop_pct=1.0, num_workers=0, device=torch.device('cpu'), persistent_workers=False
        )
        assert boxes_for(data, [4], [0]).tolist() == (data.boxes[[4]][:, None] / 2).tolist()
        data.boxes = [np.array([[0, 0, 8, 8], [8, 8, 64, 64]]), np.empty((0, 4)), [0, 0, 2, 4]] * 2
        boxes = boxes_for(data, [0, 1, 2], [0, 0, 0])
        assert boxes.shape == (3, 2, 4) and boxes.dtype == torch.float32
        assert boxes[0].tolist() == [[0, 0, 4, 4], [4, 4, 32, 32]] and boxes[2, 0].tolist() == [0, 0, 1, 2]
        assert boxes.isnan().all(-1).tolist() == [[False, False], [True, True], [False, True]]
        assert boxes_for(data, [1], [0]).shape == (1, 1, 4) and boxes_for(data, [], []).shape == (0, 1, 4)

    def test_subsets_and_data_sets_without_substitutes_have_the_boxes_of_their_images(self):
        data = DigitScenes('validation', num_images=6, seed=1)
        for wrapped in (
            Subset(data, [4, 2]),
            without_substitutes(Subset(data, [4, 2])),
            Subset(without_substitutes(data), [4, 2]),
        ):
            assert has_boxes(wrapped)
            assert boxes_for(wrapped, [1, 0], [0, 0])[:, 0].tolist() == data.boxes[[2, 4]].tolist()

    def test_the_size_of_a_stored_image_comes_from_its_own_file(self, tmp_path):
        for i, size in enumerate(((40, 20), (20, 40))):
            Path(tmp_path, 'a').mkdir(exist_ok=True)
            Image.new('RGB', size).save(tmp_path / 'a' / f'{i}.png')
        transform = create_transform((3, 10, 10), crop_pct=1.0)
        for data in (timm.data.ImageDataset(tmp_path, transform=transform), ImageFolder(tmp_path, transform)):
            assert not has_boxes(data)
            data.boxes = [[10, 0, 30, 20], [0, 10, 20, 30]]
            assert has_boxes(data) and boxes_for(data, [0, 1], [0, 0]).tolist() == [[[0, 0, 10, 10]]] * 2

    def test_data_without_boxes_is_refused(self):
        with pytest.raises(ValueError, match='TensorDataset has no boxes'):
            boxes_for(TensorDataset(torch.zeros(1)), [0], [0])


def annotation(objects, root='annotation'):
    boxes = ''.join(
        f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>'
        f'<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox><part><bndbox><xmin>0</xmin></bndbox></part></object>'
        for name, x0, y0, x1, y1, difficult in objects
    )
    return f'<{root}><size><width>12</width></size>{boxes}</{root}>'


class TestVOC:
    @pytest.fixture
    def voc(self, tmp_path):
        """One image with a cat, two persons of which one is difficult, and a dog that is difficult."""
        lists, names = tmp_path / 'ImageSets' / 'Main', VOC_CLASSES
        for folder in (lists, tmp_path / 'JPEGImages', tmp_path / 'Annotations'):
            folder.mkdir(parents=True)
        (lists / 'val.txt').write_text('2008_000001\n')
        for name in names:
            label = {'cat': 1, 'person': 1, 'dog': 0}.get(name, -1)
            (lists / f'{name}_val.txt').write_text(f'2008_000001 {label}\n')
        Image.new('RGB', (12, 10)).save(tmp_path / 'JPEGImages' / '2008_000001.jpg')
        (tmp_path / 'Annotations' / '2008_000001.xml').write_text(
            annotation(
                [
                    ('person', 1, 1, 12, 10, 0),
                    ('cat', 3, 4, 5.5, 6, 0),
                    ('person', 2, 2, 2, 2, 1),
                    ('dog', 1, 1, 2, 2, 1),
                ]
            )
        )
        return tmp_path

    def test_boxes_are_those_of_one_class_counted_from_0(self, voc):
        data = VOC2012(voc, 'val')
        cat, person, bird = (data.classes.index(name) for name in ('cat', 'person', 'bird'))
        assert data.boxes_of(0, cat).tolist() == [[2, 3, 5.5, 6]]
        assert data.boxes_of(0, person).tolist() == [[0, 0, 12, 10], [1, 1, 2, 2]]
        assert data.boxes_of(0, bird).shape == (0, 4)

    def test_an_image_of_several_classes_has_a_row_for_each(self, voc):
        data = VOC2012(voc, 'val', transform=create_transform((3, 20, 20), crop_pct=1.0))
        target = data[0][1]
        labels = np.flatnonzero(target == 1)
        boxes = boxes_for(data, [0] * len(labels), labels)
        # 12 x 10 pixels become 24 x 20, of which the crop leaves out 2 columns on each side.
        assert [data.classes[label] for label in labels] == ['cat', 'person'] and has_boxes(data)
        assert boxes[0, 0].tolist() == [2, 6, 9, 12] and boxes[0, 1].isnan().all()
        assert boxes[1].tolist() == [[0, 0, 20, 20], [0, 2, 2, 4]]

    def test_each_positive_label_of_an_image_is_evaluated_with_the_boxes_of_its_class(self, voc):
        """A map that grows from column 0 to 19: 6 of 20 rows and columns 2 to 8 are the cat's, all are the persons'."""

        def ramp(x, target):
            return torch.linspace(0, 1, 20).expand(len(x), 20, 20)

        model = timm.create_model('test_resnet', num_classes=20).eval()
        loader = timm.data.create_loader(
            VOC2012(voc, 'val'),
            (3, 20, 20),
            1,
            crop_pct=1.0,
            num_workers=0,
            device=torch.device('cpu'),
            persistent_workers=False,
            collate_fn=default_collate,
        )
        report = evaluate(model, loader, {'ramp': ramp}, metrics=('energy_pointing_game', 'pointing_game'))
        cat = 100 * 6 * sum(range(2, 9)) / (20 * sum(range(20)))
        assert report['gap', 'ramp', 'energy_pointing_game'].value == pytest.approx((cat + 100) / 2, rel=1e-5)
        assert report['gap', 'ramp', 'pointing_game'].value == 50

    def test_missing_and_damaged_annotations_are_named(self, voc):
        path = voc / 'Annotations' / '2008_000001.xml'
        path.write_text(annotation([('cat', 'x', 1, 2, 2, 0)]))
        with pytest.raises(ValueError, match=r"2008_000001\.xml: the box of object 'cat' is x, 1, 2, 2, not four"):
            VOC2012(voc, 'val').boxes_of(0, 7)
        path.write_text(annotation([('cat', 5, 1, 2, 2, 0)]))
        with pytest.raises(ValueError, match=r"2008_000001\.xml: the box of object 'cat' ends before it begins"):
            VOC2012(voc, 'val').boxes_of(0, 7)
        path.write_text('<annotation><object>')
        with pytest.raises(ValueError, match=r'2008_000001\.xml is no XML'):
            VOC2012(voc, 'val').boxes_of(0, 7)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r'2008_000001\.xml is missing'):
            VOC2012(voc, 'val').boxes_of(0, 7)


class TestReadBoxes:
    @pytest.fixture
    def folder(self, tmp_path):
        """val/n01/a.JPEG, val/n02/a.JPEG and val/n02/c,d.JPEG, 20 x 20."""
        for name in ('n01/a', 'n02/a', 'n02/c,d'):
            path = tmp_path / 'images' / 'val' / f'{name}.JPEG'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (20, 20)).save(path)
        return tmp_path

    @pytest.mark.parametrize('prefix', ['', 'val/', 'some/where/images/val/'])
    def test_a_text_file_has_a_line_a_box_with_paths_from_any_folder(self, folder, prefix):
        prefix = prefix.replace('some/where', str(folder).lstrip('/')) if prefix.startswith('some') else prefix
        lines = [
            f'{prefix}n01/a.JPEG,1,2,3,4',
            f'{prefix}n02/c,d.JPEG,0.5,0,7,8',
            f'{prefix}n01/a.JPEG,5,6,7,8',
            '',
            f'{prefix}n99/other.JPEG,1,1,2,2',
        ]
        (folder / 'localization.txt').write_text('\n'.join(lines), encoding='utf-8-sig')
        for data in (timm.data.ImageDataset(folder / 'images' / 'val'), ImageFolder(folder / 'images' / 'val')):
            boxes = read_boxes(folder / 'localization.txt', data)
            assert [b.tolist() for b in boxes] == [
                [[1, 2, 4, 5], [5, 6, 8, 9]],
                [],
                [[0.5, 0, 8, 9]],
            ]  # the last pixels inside
            data.boxes = boxes
            assert boxes_for(data, [2, 0], [0, 0]).isnan().all(-1).tolist() == [[False, True], [False, False]]

    @pytest.mark.parametrize(
        ('lines', 'message'),
        [
            (['a.JPEG,1,2,3,4'], r'lists a\.JPEG, which may be .*n01/a\.JPEG or .*n02/a\.JPEG'),
            (
                ['n01/a.JPEG,1,2,3,4', 'val/n01/a.JPEG,1,2,3,4'],
                r'lists n01/a\.JPEG and val/n01/a\.JPEG, either of which may',
            ),
            *(
                (['n02/a.JPEG,1,2,3,4', line], r'boxes\.txt, line 2: .* is not of the form str, number, number')
                for line in ('a.JPEG,1,2,3', 'a.JPEG,1,2,3,x', 'a.JPEG,1,2,nan,4', 'a.JPEG 1 2 3 4')
            ),
            (
                ['n01/a.JPEG,3,2,2,4'],
                r'boxes\.txt: the box \[3.0, 2.0, 2.0, 4.0\] of n01/a\.JPEG ends before it begins',
            ),
            (['n01/b.JPEG,1,2,3,4'], r'boxes\.txt lists none of the 3 images, such as val/n01/a\.JPEG'),
        ],
    )
    def test_text_files_that_are_damaged_or_ambiguous_or_list_no_image_are_refused(self, folder, lines, message):
        (folder / 'boxes.txt').write_text('\n'.join(lines))
        with pytest.raises(ValueError, match=message):
            read_boxes(folder / 'boxes.txt', timm.data.ImageDataset(folder / 'images'))

    def test_a_file_that_is_missing_is_named(self, folder):
        with pytest.raises(FileNotFoundError, match=r'nothing\.txt is missing'):
            read_boxes(folder / 'nothing.txt', timm.data.ImageDataset(folder / 'images'))

    @pytest.mark.parametrize('under', ['', 'n02'])
    def test_imagenets_xml_files_belong_to_the_images_of_their_names(self, folder, under):
        xml = folder / 'Annotations' / under
        xml.mkdir(parents=True)
        (xml / 'c,d.xml').write_text(annotation([('n02', 0, 1, 19, 18, 0), ('n02', 3, 4, 5, 4, 0)]))
        boxes = read_boxes(folder / 'Annotations', timm.data.ImageDataset(folder / 'images'))
        assert [b.tolist() for b in boxes] == [[], [], [[0, 1, 20, 19], [3, 4, 6, 5]]]

    def test_folders_without_xml_files_or_with_two_of_a_name_are_refused(self, folder):
        data = timm.data.ImageDataset(folder / 'images')
        with pytest.raises(ValueError, match='images holds no XML files'):
            read_boxes(folder / 'images', data)
        for name in ('n01', 'n02'):
            (folder / 'xml' / name).mkdir(parents=True)
            (folder / 'xml' / name / 'a.xml').write_text(annotation([]))
        with pytest.raises(ValueError, match=r'xml has two files a\.xml: .*n01/a\.xml and .*n02/a\.xml'):
            read_boxes(folder / 'xml', data)

    def test_boxes_of_the_last_column_and_of_one_row_count_their_pixels(self, folder):
        """A box of the whole image, one of the last column, and one of a single row, as localization.txt writes them."""
        path = 'n02/c,d.JPEG'
        lines = [f'{path},0,0,19,19', f'{path},19,0,19,19', f'{path},2,7,5,7']
        (folder / 'boxes.txt').write_text('\n'.join(lines))
        data = timm.data.ImageDataset(folder / 'images' / 'val')
        data.boxes = read_boxes(folder / 'boxes.txt', data)
        whole, column, row = boxes_for(data, [2], [0]).unbind(1)
        saliency = torch.zeros(1, 20, 20)
        saliency[0, 7, 19] = 1.0
        assert pointing_game(saliency, column[None]).item() == 100
        assert energy_pointing_game(torch.ones(1, 20, 20), whole[None]).item() == 100
        assert energy_pointing_game(torch.ones(1, 20, 20), row[None]).item() == pytest.approx(100 * 4 / 400)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize(('upright', 'ending'), [(True, 'png'), (False, 'png'), (True, 'tiff'), (False, 'tiff')])
def test_boxes_turn_with_the_image_where_the_data_set_turns_it(tmp_path, orientation, upright, ending):
    """The box is drawn into the stored image; Pillow turns the pixels, and their bounding box is what is expected."""
    box = (3, 4, 9, 15)
    image = Image.new('RGB', (30, 20))
    image.paste('white', box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / 'a').mkdir()
    image.save(tmp_path / 'a' / f'0.{ending}', exif=exif)
    data = create_dataset('', tmp_path) if upright else ImageFolder(tmp_path)
    data.boxes = [np.array([box])]
    with Image.open(tmp_path / 'a' / f'0.{ending}') as stored:
        stored.load()  # Pillow turns a TIFF itself
        seen = ImageOps.exif_transpose(stored) if upright else stored.copy()
    assert boxes_for(data, [0], [0])[0].tolist() == [list(seen.getbbox())]

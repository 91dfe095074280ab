"""Items of data sets as people have them: labels that are no classes, images that are no normalised tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from timm_castream.evaluate import evaluate

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Items(Dataset):
    """Four images, each with what a function makes of its index."""

    def __init__(self, item_of: Any) -> None:
        self.item_of = item_of

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Any:
        return self.item_of(index)


def run(model: nn.Module, item_of: Any, **kwargs: Any) -> Any:
    return evaluate(model, DataLoader(Items(item_of), 2), ('centre',), ('gap',), metrics=('average_drop',), **kwargs)


@pytest.fixture
def model(make_model: Any) -> nn.Module:
    return make_model('test_resnet')


@pytest.mark.parametrize(
    ('label', 'shown'),
    [
        ('cat', "is 'cat'"),
        (0.5, 'is 0.5'),
        ({'area': 3}, 'is a dict'),
        ([{'bbox': [0, 0, 1, 1]}, {'bbox': [2]}], 'is a list'),  # of objects, one more in some images
    ],
)
def test_labels_that_are_no_classes_are_named_and_left_out_where_none_is_needed(
    label: Any, shown: str, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    def item_of(index: int) -> tuple[Any, Any]:
        return IMAGES[index], label[: index % 2 + 1] if isinstance(label, list) else label

    with pytest.raises(ValueError, match=rf"The label of an image {shown}: give the index.*target='predicted'"):
        run(model, item_of)
    report = run(model, item_of, target='predicted')
    assert caplog.text.count(f'The label of an image {shown}, no index of a class, so no accuracy is measured.') == 1
    with torch.no_grad():
        assert report.values.pairs['gap/class'].tolist() == gap_classes(model)
    assert math.isnan(report.accuracy['gap'].value)


def gap_classes(model: nn.Module) -> list[int]:
    from timm_castream import pooling

    with pooling(model, 'gap'):
        return model(IMAGES).argmax(1).tolist()


@pytest.mark.parametrize(
    'item_of',
    [
        lambda i: (IMAGES[i], None),
        lambda i: {'image': IMAGES[i], 'label': None},
        lambda i: {'pixel_values': IMAGES[i], 'labels': 'cat', 'file': 'a.png'},
    ],
)
def test_items_without_a_label_are_explained_as_predicted(item_of: Any, model: nn.Module) -> None:
    report = run(model, item_of, target='predicted')
    assert report.values.pairs['gap/class'].tolist() == gap_classes(model)
    assert math.isnan(report.accuracy['gap'].value)


@pytest.mark.parametrize(
    ('item_of', 'message'),
    [
        (lambda i: (Image.new('RGB', (64, 64)), 1), 'gives images of Pillow.* give it the transform'),
        (lambda i: ((IMAGES[i] * 30 + 100).byte(), 1), r'gives images of torch\.uint8, .* normalised ones in floats'),
    ],
)
def test_images_that_are_not_normalised_tensors_are_one_sentence(item_of: Any, message: str, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, item_of)


def test_a_module_in_place_of_its_name_is_answered_with_the_name(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^layer takes the name of a module of \w+, not a Sequential: 'layer3'\.$"):
        evaluate(model, DataLoader(Items(lambda i: (IMAGES[i], 1)), 2), ('grad_cam',), layer=model.layer3)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_images_of_different_sizes_are_named_and_measured_one_by_one(num_workers: int, model: nn.Module) -> None:
    def item_of(index: int) -> tuple[Any, int]:
        return IMAGES[index][:, : 64 - 16 * (index == 3)], index

    loader = DataLoader(Items(item_of), 2, num_workers=num_workers)
    with pytest.raises(
        ValueError, match=r'different sizes, such as 3 x 64 x 64 and 3 x 48 x 64, .*batch_size=1'
    ) as error:
        evaluate(model, loader, ('centre',), metrics=('average_drop',))
    assert 'Traceback' not in str(error.value)
    arguments = {'methods': ('centre',), 'poolings': ('gap',), 'metrics': ('deletion',)}
    report = evaluate(model, DataLoader(Items(item_of), 1), **arguments)
    alone = [evaluate(model, DataLoader([item_of(index)], 1), **arguments) for index in range(4)]
    mean = sum(one['gap', 'centre', 'deletion'].value for one in alone) / 4
    assert report['gap', 'centre', 'deletion'].value == pytest.approx(mean, abs=1e-4)
    with pytest.raises(ValueError, match='different sizes, so their curves'):
        evaluate(model, DataLoader(Items(item_of), 1), **arguments, keep_curves=True)


def test_an_item_that_is_none_is_an_image_that_cannot_be_read(model: nn.Module) -> None:
    report = run(model, lambda index: None if index == 2 else (IMAGES[index], index))
    assert report.unreadable == {'image 2': 'ValueError: the data set gives None'}
    others = DataLoader([(IMAGES[index], index) for index in (0, 1, 3)], 2)
    without = evaluate(model, others, ('centre',), ('gap',), metrics=('average_drop',))
    assert report.figures == without.figures


def test_shares_of_classes_are_no_labels(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r'has 0\.25 for a class: .*give its index'):
        run(model, lambda index: (IMAGES[index], torch.tensor([0.25, 0.75] + [0.0] * 8)))

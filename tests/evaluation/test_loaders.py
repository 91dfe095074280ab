"""The normalisation of a loader, timm's prefetching one and others, and its comparison with the network's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.data import create_loader
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision import transforms

from timm_castream.datasets import create_dataset
from timm_castream.evaluate import evaluate
from timm_castream.evaluation.loaders import normalisation_of, warn_of_sampler

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
WARNING = 'The loader normalises by mean'


def digits(**kwargs: Any) -> Any:
    return create_loader(
        create_dataset('digits', split='validation', num_samples=2),
        (3, 64, 64),
        batch_size=2,
        num_workers=0,
        device=torch.device('cpu'),
        persistent_workers=False,
        **kwargs,
    )


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_the_default_normalisation_of_timms_loader_is_found(use_prefetcher: bool) -> None:
    assert normalisation_of(digits(use_prefetcher=use_prefetcher)) == IMAGENET


def test_a_normalisation_is_found_in_a_subset_and_in_nested_transforms() -> None:
    dataset: Any = create_dataset('digits', split='validation', num_samples=2)
    assert normalisation_of(DataLoader(dataset)) is None
    inner = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1, 0.2, 0.3), (0.5,))])
    dataset.transform = transforms.Compose([inner])
    assert normalisation_of(DataLoader(Subset(dataset, [1]))) == ([0.1, 0.2, 0.3], [0.5])


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_a_loader_of_another_normalisation_is_warned_about_once(
    use_prefetcher: bool, make_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model('test_resnet')  # its mean and std are 0.5
    arguments: dict[str, Any] = {'methods': ('centre',), 'metrics': ('average_drop',)}
    evaluate(model, digits(use_prefetcher=use_prefetcher), **arguments)
    (warning,) = (record.getMessage() for record in caplog.records if WARNING in record.getMessage())
    assert f'mean {IMAGENET[0]} and std {IMAGENET[1]}' in warning and 'mean [0.5, 0.5, 0.5] and std [0.5' in warning
    caplog.clear()
    half = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    evaluate(model, digits(use_prefetcher=use_prefetcher, **half), **arguments)
    evaluate(model, digits(use_prefetcher=use_prefetcher), mean=IMAGENET[0], std=IMAGENET[1], **arguments)
    evaluate(model, digits(use_prefetcher=use_prefetcher, **half), mean=(0.5,), std=(0.5,), **arguments)
    assert WARNING not in caplog.text


def test_a_sampler_beside_a_random_sample_is_told_with_the_size_of_the_sample(caplog: pytest.LogCaptureFixture) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(6, 1)), 2, sampler=SubsetRandomSampler([0, 3]))
    warn_of_sampler(loader, False, 4)
    assert 'SubsetRandomSampler of the loader is ignored: 4 of the 6 images of its data set' in caplog.text


def test_a_sampler_that_is_ignored_is_told_in_one_sentence(make_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, images = make_model('test_resnet'), torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(images, torch.arange(6))
    maps = images.sum(1).numpy()
    arguments: dict[str, Any] = {'metrics': ('average_drop',), 'mean': (0.5,), 'std': (0.5,)}
    expected = evaluate(model, DataLoader(dataset, 2), {'mine': lambda x, target: x.sum(1)}, **arguments)
    shuffled, shuffles = DataLoader(dataset, 2, shuffle=True), 'The loader shuffles'
    weighted = WeightedRandomSampler([1.0] * 6, 6)
    for loader, methods, told in (
        (DataLoader(dataset, 2), {'mine': maps}, ''),
        (shuffled, {'mine': maps}, shuffles),
        (shuffled, {'mine': lambda x, target: x.sum(1)}, ''),
        (DataLoader(dataset, 2, sampler=SubsetRandomSampler([0, 3])), {'mine': maps}, 'SubsetRandomSampler'),
        (
            DataLoader(dataset, 2, sampler=weighted),
            {'mine': maps},
            'WeightedRandomSampler of the loader is ignored: all',
        ),
        (DataLoader(dataset, 2, sampler=DistributedSampler(dataset, 2, 0)), {'mine': maps}, ''),
    ):
        caplog.clear()
        report = evaluate(model, loader, methods, **arguments)
        ours = [record.getMessage() for record in caplog.records if record.name.startswith('timm_castream')]
        assert len(ours) == bool(told) and told in ''.join(ours)
        # The maps of the data set's order are right whatever the sampler, and every image counts once.
        for key, estimate in expected.figures.items():
            assert report[key].value == pytest.approx(estimate.value, abs=1e-4)

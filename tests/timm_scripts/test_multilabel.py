"""Multi-label data in timm's scripts."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import timm
import timm.data
import timm.task
import timm.utils
import torch
from references import devkit_mean_average_precision
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.loss import BinaryCrossEntropy
from torch import nn

from timm_castream.datasets import VOC_IGNORE
from timm_castream.timm_scripts import multilabel

pytest_plugins = ('stand_in_scripts',)


def test_ignored_labels_leave_no_trace_in_loss_and_gradient():
    torch.manual_seed(0)
    output = torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([[1.0, 0.0, VOC_IGNORE, 1.0], [VOC_IGNORE, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, VOC_IGNORE]])
    loss = BinaryCrossEntropy(smoothing=0.1, sum_classes=True)(*multilabel.leave_out_ignored(output, target))
    loss.backward()

    probability = output.detach().double().sigmoid()
    expected = (
        -sum(
            (p if t == 1 else 1 - p).log()
            for p, t in zip(probability.flatten(), target.flatten(), strict=True)
            if t != VOC_IGNORE
        )
        / 3
    )
    torch.testing.assert_close(loss.double(), expected)
    assert not output.grad[target == VOC_IGNORE].any()
    torch.testing.assert_close(
        output.grad[target != VOC_IGNORE].double(), ((probability - target) / 3)[target != VOC_IGNORE]
    )


def test_the_loss_of_a_validation_is_binary_cross_entropy_for_dense_targets_and_torchs_for_indices():
    torch.manual_seed(0)
    output, target = torch.randn(3, 4), torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    loss = multilabel.CrossEntropyLoss()
    probability = output.double().sigmoid()
    expected = -torch.where(target > 0, probability, 1 - probability).log().mean()
    torch.testing.assert_close(loss(output, target).double(), expected)
    indices = torch.tensor([3, 1, 3])
    assert torch.equal(loss(output, indices), nn.CrossEntropyLoss()(output, indices))


@pytest.mark.parametrize('scale', [0.1, 1.0, 100.0])
def test_map_is_the_devkits_whatever_the_batches_and_the_scale_of_the_logits(scale):
    rng = np.random.default_rng(0)
    output = rng.normal(size=(61, 4)).astype(np.float32) * np.float32(scale)
    if scale == 0.1:
        output += np.float32(0.5)  # a batch that looks like probabilities
    target = rng.choice([0.0, 1.0, VOC_IGNORE], p=[0.6, 0.3, 0.1], size=output.shape).astype(np.float32)
    target[:, 3] = 0.0  # a class that never occurs is left out
    expected = devkit_mean_average_precision(target, output.astype(np.float64))

    score = multilabel.MultiLabelScore()

    def validate(size):
        for batch in zip(torch.from_numpy(output).split(size), torch.from_numpy(target).split(size), strict=True):
            score.accuracy(*batch, topk=(1, 5))
        return {'top1': 0.0}

    for size in (1, 7, 61):  # the second validation starts from nothing
        results = score.scored(validate)(size)
        assert results['map'] == pytest.approx(expected, abs=1e-4)
    options = argparse.Namespace(batch_size=7, dataset='voc2012')  # as validate.py calls it
    results = score.scored(lambda args: validate(args.batch_size))(options)
    assert results['map'] == pytest.approx(expected, abs=1e-4)


def test_the_share_of_hits_among_the_best_is_counted_for_dense_targets_and_is_timms_accuracy_for_indices():
    torch.manual_seed(0)
    output, target = torch.randn(50, 7), torch.randint(7, (50,))
    score = multilabel.MultiLabelScore()
    assert score.accuracy(output, target, (1, 5)) == timm.utils.accuracy(output, target, (1, 5))
    dense = torch.rand(50, 7) < 0.3
    for k, hits in zip((1, 5), score.accuracy(output, dense.float(), (1, 5)), strict=True):
        expected = sum(
            any(labels[c] for c in logits.argsort(descending=True)[:k])
            for logits, labels in zip(output, dense, strict=True)
        )
        assert hits.item() == pytest.approx(100 * expected / 50)


def test_a_validation_of_class_indices_keeps_its_results():
    score = multilabel.MultiLabelScore()
    assert score.scored(lambda: {'top1': 3.0})() == {'top1': 3.0}


class Labelled(torch.utils.data.Dataset):
    """Images whose logits and targets are known by their position."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(3)
        self.logits = torch.from_numpy(rng.normal(size=(count, 4)).astype(np.float32))
        self.targets = torch.from_numpy((rng.random((count, 4)) < 0.4).astype(np.float32))

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits[index], self.targets[index]


def score_of_a_process(rank: int, count: int, num_images: int, folder: str) -> None:
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=count)
    dataset = Labelled(num_images)
    sampler = OrderedDistributedSampler(dataset, num_replicas=count, rank=rank)
    score = multilabel.MultiLabelScore()

    def validate(model, loader):
        for logits, targets in loader:
            score.accuracy(logits, targets, (1,))
        return {}

    loader = torch.utils.data.DataLoader(dataset, 2, sampler=sampler)
    results = score.scored(validate)(None, loader)
    with open(f'{folder}/{rank}.txt', 'w') as file:
        file.write(repr(results['map']))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'num_images'), [(2, 5), (3, 5), (3, 7)])
def test_map_over_several_processes_counts_every_image_once(count, num_images, tmp_path):
    torch.multiprocessing.spawn(score_of_a_process, (count, num_images, str(tmp_path)), nprocs=count)
    dataset = Labelled(num_images)
    expected = devkit_mean_average_precision(dataset.targets.numpy(), dataset.logits.double().numpy())
    for rank in range(count):
        assert float((tmp_path / f'{rank}.txt').read_text()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(('count', 'num_images'), [(1, 5), (2, 5), (3, 5), (4, 8)])
def test_shares_are_put_in_order_without_their_repeats(count, num_images, monkeypatch):
    dataset = Labelled(num_images)
    shares = [list(OrderedDistributedSampler(dataset, num_replicas=count, rank=rank)) for rank in range(count)]
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: count)
    rows = np.concatenate([dataset.logits.numpy()[share] for share in shares])
    assert np.array_equal(multilabel._in_order(rows, num_images), dataset.logits.numpy())

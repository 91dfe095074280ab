"""The metrics against float64 loops written from their definitions, image by image."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from timm_castream.metrics import (
    AverageDrop,
    AverageGain,
    AverageIncrease,
    Deletion,
    Insertion,
    average_drop,
    average_gain,
)

PAIR_METRICS = [AverageDrop, AverageGain, AverageIncrease]
CURVE_METRICS = [Insertion, Deletion]


def loop_drop(p, o):
    return 100 * sum(max(0.0, a - b) / a if a > 0 else 0.0 for a, b in zip(p, o, strict=True)) / len(p)


def loop_gain(p, o):
    return 100 * sum(max(0.0, b - a) / (1 - a) if a < 1 else 0.0 for a, b in zip(p, o, strict=True)) / len(p)


def loop_increase(p, o):
    return 100 * sum(b > a for a, b in zip(p, o, strict=True)) / len(p)


def loop_area(curves):
    areas = []
    for curve in curves:
        n = len(curve) - 1
        areas.append(sum((curve[i] + curve[i + 1]) / 2 for i in range(n)) / n)
    return 100 * sum(areas) / len(areas)


def probabilities(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p, o = torch.rand(2, count, generator=generator)
    p[:4] = torch.tensor([0.0, 1.0, 1.0, 0.0])
    o[:4] = torch.tensor([0.5, 1.0, 0.25, 0.0])
    o[4] = p[4]
    return p, o


# ---------------------------------------------------------------- AD, AG, AI


@pytest.mark.parametrize(
    'metric, loop', [(AverageDrop, loop_drop), (AverageGain, loop_gain), (AverageIncrease, loop_increase)]
)
def test_pair_metrics_over_unequal_batches_equal_the_loop_over_images(metric, loop):
    p, o = probabilities(23)
    metric = metric()
    for part in torch.arange(23).split(9):
        metric.update(p[part], o[part])
    assert metric.compute().item() == pytest.approx(loop(p.double().tolist(), o.double().tolist()), rel=1e-6)


def test_known_values_by_hand():
    p, o = torch.tensor([0.5, 0.8, 0.2]), torch.tensor([0.25, 0.9, 0.2])
    expected = {AverageDrop: 50 / 3, AverageGain: 50 / 3, AverageIncrease: 100 / 3}
    for metric, value in expected.items():
        assert metric()(p, o).item() == pytest.approx(value, rel=1e-6)


def test_no_epsilon_shows_at_probabilities_close_to_0_and_1():
    tiny, zero, one = torch.tensor([1e-6]), torch.tensor([0.0]), torch.tensor([1.0])
    below_one = torch.tensor([1 - 2**-24])
    assert average_drop(tiny, zero).item() == 100
    assert average_gain(below_one, one).item() == 100
    assert average_drop(zero, one).item() == 0
    assert average_gain(one, zero).item() == 0


def test_an_equal_probability_is_no_increase():
    p = torch.tensor([0.3, 0.7])
    assert AverageIncrease()(p, p).item() == 0


# ---------------------------------------------------------------- Insertion, Deletion


@pytest.mark.parametrize('metric', CURVE_METRICS)
def test_curve_metrics_average_trapezoids_over_unequal_batches(metric):
    curves = torch.rand(11, 8, generator=torch.Generator().manual_seed(2))
    metric = metric()
    for part in curves.split(4):
        metric.update(part)
    assert metric.compute().item() == pytest.approx(loop_area(curves.double().tolist()), rel=1e-6)


def test_the_area_of_known_curves_by_hand():
    assert Insertion()(torch.tensor([[0.0, 1.0]])).item() == 50
    assert Deletion()(torch.tensor([[1.0, 0.5, 0.25]])).item() == pytest.approx(56.25)
    assert Deletion()(torch.full((2, 7), 0.25)).item() == pytest.approx(25)


# ---------------------------------------------------------------- torchmetrics contract


def test_directions_are_declared():
    better = {metric.__name__: metric.higher_is_better for metric in PAIR_METRICS + CURVE_METRICS}
    assert better == {
        'AverageDrop': False,
        'AverageGain': True,
        'AverageIncrease': True,
        'Insertion': True,
        'Deletion': False,
    }


@pytest.mark.parametrize('metric', PAIR_METRICS + CURVE_METRICS)
def test_reset_forgets_all_images(metric):
    inputs = probabilities(9) if metric in PAIR_METRICS else (torch.rand(9, 4),)
    fresh, used = metric(), metric()
    used.update(*(1 - value for value in inputs))
    used.reset()
    used.update(*inputs)
    fresh.update(*inputs)
    assert used.compute() == fresh.compute()


@pytest.mark.parametrize('metric', PAIR_METRICS + CURVE_METRICS)
def test_states_move_with_the_metric(metric):
    metric = metric().to('meta')
    assert {getattr(metric, name).device.type for name in metric.metric_state} == {'meta'}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_metrics_on_cuda_equal_those_on_the_cpu():
    p, o = probabilities(23)
    for metric in PAIR_METRICS:
        assert metric().cuda()(p.cuda(), o.cuda()).item() == pytest.approx(metric()(p, o).item(), rel=1e-6)


def test_a_collection_keeps_metrics_apart_that_start_equal():
    collection = MetricCollection([AverageDrop(), AverageGain(), AverageIncrease()])
    batches = [([0.5], [0.25]), ([0.5], [0.75])]  # the first leaves AG and AI both at 0
    for p, o in batches:
        collection.update(torch.tensor(p), torch.tensor(o))
    values = {name: value.item() for name, value in collection.compute().items()}
    assert values == {'AverageDrop': 25, 'AverageGain': 25, 'AverageIncrease': 50}


def test_sums_do_not_drift_over_many_batches():
    metric = Deletion()
    curve = torch.full((1, 2), 0.987)
    for _ in range(3000):
        metric.update(curve)
    assert metric.compute().item() == pytest.approx(100 * curve[0, 0].item(), rel=1e-7)


def _update_on_one_of_two_processes(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    p, o = probabilities(10)
    curves = torch.rand(10, 5, generator=torch.Generator().manual_seed(3))
    mine = slice(0, 7) if rank == 0 else slice(7, 10)
    values = []
    for metric in (AverageDrop(), AverageGain(), AverageIncrease()):
        metric.update(p[mine], o[mine])
        values.append(metric.compute().item())
    metric = Insertion()
    metric.update(curves[mine])
    values.append(metric.compute().item())
    (folder / f'{rank}.json').write_text(json.dumps(values))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_unequal_shares_agree_on_the_mean_over_all_images(tmp_path):
    mp.spawn(_update_on_one_of_two_processes, args=(tmp_path,), nprocs=2)
    results = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2)]
    p, o = (value.double().tolist() for value in probabilities(10))
    curves = torch.rand(10, 5, generator=torch.Generator().manual_seed(3)).double().tolist()
    expected = [loop_drop(p, o), loop_gain(p, o), loop_increase(p, o), loop_area(curves)]
    assert results[0] == results[1] == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize('metric', PAIR_METRICS)
@pytest.mark.parametrize(
    'p, o, message',
    [
        (torch.rand(4, 1), torch.rand(4), r'shape \(B,\), got \(4, 1\) and \(4,\)'),
        ([0.5], [0.2], r'prob and masked_prob must both be tensors of shape \(B,\), got list and list'),
        (torch.rand(1), 0.2, 'got Tensor and float'),
        (torch.rand(4), torch.rand(4, 1), r'shape \(B,\), got \(4,\) and \(4, 1\)'),
        (torch.rand(4, 1), torch.rand(4, 1), r'got \(4, 1\)'),
        (torch.rand(4), torch.rand(3), r'got \(4,\) and \(3,\)'),
        (torch.tensor(0.5), torch.tensor(0.5), r'got \(\) and \(\)'),
        (torch.tensor([0.5, float('nan')]), torch.rand(2), r'^prob must lie in \[0, 1\], got nan'),
        (torch.rand(2), torch.tensor([0.5, 1.5]), r'masked_prob must lie in \[0, 1\], got 1.5'),
        (torch.tensor([-0.25]), torch.rand(1), r'^prob must lie in \[0, 1\], got -0.25'),
        (torch.rand(2).bfloat16(), torch.rand(2), 'prob must be float32 or float64, got torch.bfloat16'),
        (torch.ones(2, dtype=torch.int64), torch.rand(2), 'got torch.int64'),
    ],
)
def test_bad_probabilities_are_refused_and_leave_no_trace(metric, p, o, message):
    metric = metric()
    with pytest.raises(ValueError, match=message):
        metric.update(p, o)
    assert metric.num_images == 0


@pytest.mark.parametrize('metric', CURVE_METRICS)
@pytest.mark.parametrize(
    'curve, message',
    [
        ([[0.5, 0.2]], r'curve must be a tensor of shape \(B, n \+ 1\), got list'),
        (torch.rand(4), r'shape \(B, n \+ 1\) with n of at least 1, got \(4,\)'),
        (torch.rand(4, 1), r'got \(4, 1\)'),
        (torch.rand(2, 3, 4), r'got \(2, 3, 4\)'),
        (torch.tensor([[0.5, float('nan')]]), 'got nan'),
        (torch.tensor([[0.5, 2.0]]), r'curve must lie in \[0, 1\], got 2'),
        (torch.rand(2, 3).half(), 'got torch.float16'),
    ],
)
def test_bad_curves_are_refused(metric, curve, message):
    with pytest.raises(ValueError, match=message):
        metric().update(curve)


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchmetrics', None)  # an import then fails as that of a missing library
    spec = importlib.util.find_spec('timm_castream.metrics.faithfulness')
    with pytest.raises(ImportError, match=r"pip install 'timm_castream\[eval\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

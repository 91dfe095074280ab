"""ONNX Runtime beside torch: the same values, one sentence where torch stays, and an evaluation that resumes."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import make_backbone, sharpen
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import timm_castream
from timm_castream.evaluate import evaluate
from timm_castream.evaluation.report import Report
from timm_castream.inference import engine as engines
from timm_castream.inference.predictor import Predictor

protocol = importlib.import_module('timm_castream.evaluate')
METHODS = ('grad_cam', 'score_cam')
METRICS = ('average_drop', 'average_gain', 'insertion', 'deletion')


@pytest.fixture(scope='module')
def model() -> nn.Module:
    """One for all tests: an evaluation keeps the engine of its network."""
    return sharpen(timm_castream.attach(make_backbone('test_resnet')))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(5, 3, 64, 64, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(5)), 2)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of torch for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def no_export(monkeypatch) -> None:
    """Fails where a network is exported."""

    def export(*args: Any) -> None:
        raise AssertionError('exported')

    engines._engines.clear()
    monkeypatch.setattr(engines, '_export', export)


@pytest.fixture
def long_enough(monkeypatch) -> None:
    """Every evaluation is long enough for an export, and ONNX Runtime is twice as fast."""
    engines._engines.clear()
    monkeypatch.setattr(protocol, 'WORTH_AN_EXPORT', 0)
    monkeypatch.setattr(engines, '_speed', lambda *args: 2.0)


def values(report: Report) -> dict[tuple[str, str, str], float]:
    return {
        (pooling, method, metric): report[pooling, method, metric].value
        for pooling in report.poolings
        for method in report.methods
        for metric in report.metrics
    }


class Plain(nn.Module):
    """A network that is none of timm's, with a hook for what it does to its logits."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor] = lambda x, logits: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(8, 10)
        self.change = change
        self.pretrained_cfg = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x, self.head(self.body(x)))


def branch_on_the_image(x: Tensor, logits: Tensor) -> Tensor:
    return logits if x.mean() > 0 else -logits


def other_in_a_graph(x: Tensor, logits: Tensor) -> Tensor:
    return logits.cumsum(1) if torch.compiler.is_exporting() else logits


@pytest.mark.parametrize(
    ('backbone', 'arguments'),
    [('test_resnet', {}), ('test_convnext', {'stream_class_specific': True}), ('test_vit', {'stream_heads': 4})],
)
def test_its_logits_are_torchs_for_any_number_of_images(make_model, x, backbone, arguments):
    predictor = Predictor(make_model(backbone, **arguments))
    engine = engines.make_engine(predictor, x, 'weights')
    images = torch.randn(engine.shape[0] + 2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with predictor.evaluating():
        expected = predictor.torch_logits(images)
        given = predictor.accelerated(engine).logits(images)
    assert given.keys() == expected.keys() == {'gap', 'ca'}
    for pooling, logits in expected.items():
        assert logits.std() > 1e-3
        torch.testing.assert_close(given[pooling], logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def test_as_many_threads_as_torch_has_run_it_side_by_side_and_do_not_show(make_model, x, num_threads):
    count = 3
    num_threads(count)
    predictor = Predictor(make_model('test_resnet'))
    engine = engines.make_engine(predictor, x, 'weights')
    assert engine.num_threads == count
    with predictor.evaluating():
        expected = predictor.torch_logits(x)
    meeting = threading.Barrier(count)
    session = engine._session

    class Session:
        @staticmethod
        def run(*arguments):
            meeting.wait(timeout=60)  # it breaks unless so many are here at a time
            return session.run(*arguments)

    engine._session = Session()
    images = x[:1].repeat(engine.shape[0] * count, 1, 1, 1)
    fast = predictor.accelerated(engine)

    def make(rows: Tensor) -> dict[str, Tensor]:
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        return fast.logits(images[rows])

    parts = fast.batches(images)(make, torch.arange(len(images)))
    made_beside_each_other = {name: torch.cat([part[name] for part in parts]) for name in expected}
    for given in (fast.logits(images), made_beside_each_other):
        for pooling, logits in expected.items():
            assert torch.allclose(given[pooling], logits[:1], rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    assert torch.get_num_threads() == count
    with pytest.raises(ZeroDivisionError):
        fast.batches(images)(lambda rows: 1 / 0, torch.arange(len(images)))


def test_a_function_in_its_threads_may_forward_more_images_than_one_call_takes(make_model, x, num_threads):
    num_threads(1)  # a thread that waits for another would wait for ever
    predictor = Predictor(make_model('test_resnet'))
    engine = engines.make_engine(predictor, x, 'weights')
    images = x[:1].repeat(engine.shape[0] * 2 + 1, 1, 1, 1)
    (logits,) = engine.batches(lambda rows: engine.logits(images, ('gap',))['gap'], torch.arange(1))
    assert len(logits) == len(images)


def test_an_evaluation_has_the_values_of_torch_and_names_its_engine(model, loader):
    ours = evaluate(model, loader, METHODS, metrics=METRICS, engine='onnxruntime')
    expected = evaluate(model, loader, METHODS, metrics=METRICS, engine='torch')
    assert values(ours) == pytest.approx(values(expected), abs=0.01)
    assert len(set(values(expected).values())) > 8
    onnxruntime = importlib.import_module('onnxruntime')
    assert ours.settings['engine'] == f'onnxruntime {onnxruntime.__version__}'
    assert expected.settings['engine'] == 'torch'


def test_a_module_that_is_not_timms_runs_in_it_too(loader):
    def maps(x: Tensor, target: Tensor) -> Tensor:
        return x.abs().sum(1)

    reports = [
        evaluate(Plain(), loader, {'size': maps}, metrics=METRICS, engine=name) for name in ('onnxruntime', 'torch')
    ]
    assert reports[0].settings['engine'].startswith('onnxruntime ')
    assert values(reports[0]) == pytest.approx(values(reports[1]), abs=0.01)


def test_an_evaluation_exports_a_network_once_and_leaves_no_file(model, loader, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    first = evaluate(model, loader, ('grad_cam',), engine='onnxruntime')
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(engines, '_export', None)  # a call would fail
    second = evaluate(model, loader, ('grad_cam',), engine='onnxruntime')
    assert values(second) == values(first)


@pytest.mark.parametrize(
    ('change', 'reason'), [(branch_on_the_image, 'does not export'), (other_in_a_graph, r'differ by \d')]
)
def test_a_network_that_onnx_cannot_express_runs_in_torch_with_one_sentence(loader, caplog, change, reason):
    report = evaluate(Plain(change), loader, ('centre',), metrics=METRICS, engine='onnxruntime')
    assert report.settings['engine'] == 'torch'
    (sentence,) = (record.getMessage() for record in caplog.records if 'run in torch' in record.getMessage())
    assert re.search(reason, sentence)


def test_auto_takes_it_where_it_is_faster_and_the_work_outweighs_the_export(model, loader, long_enough, caplog):
    caplog.set_level(logging.INFO, logger='timm_castream')
    assert evaluate(model, loader, ('grad_cam',)).settings['engine'].startswith('onnxruntime ')
    assert 'onnxruntime' in caplog.text and '2.0 times as fast' in caplog.text


def test_auto_stays_in_torch_where_torch_is_faster(model, loader, long_enough, monkeypatch):
    monkeypatch.setattr(engines, '_speed', lambda *args: 0.9)
    assert evaluate(model, loader, ('grad_cam',)).settings['engine'] == 'torch'


def test_auto_exports_nothing_for_a_short_evaluation(model, loader, no_export):
    assert evaluate(model, loader, METHODS).settings['engine'] == 'torch'


def test_without_the_extra_auto_stays_in_torch_and_a_wish_names_the_package(model, loader, long_enough, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    monkeypatch.setattr(engines.importlib.util, 'find_spec', lambda name: None)
    assert evaluate(model, loader, ('grad_cam',)).settings['engine'] == 'torch'
    with pytest.raises(ModuleNotFoundError, match='onnxruntime'):
        evaluate(model, loader, ('grad_cam',), engine='onnxruntime')


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'engine': 'tensorrt'}, "engine 'tensorrt' is unknown"),
        ({'engine': 'onnxruntime', 'amp_dtype': torch.bfloat16}, 'amp_dtype is bfloat16'),
        ({'engine': 'onnxruntime', 'torchcompile': True}, 'torchcompile'),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused_before_long_work(model, loader, no_export, kwargs, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, loader, ('grad_cam',), **kwargs)


def test_an_interrupted_evaluation_resumes_with_its_engine_and_has_the_values_of_a_whole_one(model, loader, tmp_path):
    def stop(done: int, means: dict[str, float]) -> None:
        raise KeyboardInterrupt

    whole = evaluate(model, loader, METHODS, metrics=METRICS, engine='onnxruntime')
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, loader, METHODS, metrics=METRICS, engine='onnxruntime', output_dir=tmp_path, on_batch=stop)
    with pytest.raises(ValueError, match=r"engine='onnxruntime .*engine='torch'"):
        evaluate(model, loader, METHODS, metrics=METRICS, engine='torch', output_dir=tmp_path)
    resumed = evaluate(model, loader, METHODS, metrics=METRICS, output_dir=tmp_path)
    assert resumed.settings['engine'] == whole.settings['engine']
    assert values(resumed) == pytest.approx(values(whole), abs=1e-4)


def test_auto_resumes_an_evaluation_of_torch_in_torch(model, loader, tmp_path, long_enough, no_export):
    whole = evaluate(model, loader, METHODS, engine='torch', output_dir=tmp_path)
    assert values(evaluate(model, loader, METHODS, output_dir=tmp_path)) == values(whole)


def test_batch_sizes_do_not_show(model, loader):
    reports = [
        evaluate(model, loader, METHODS, metrics=METRICS, engine='onnxruntime', batch_size=size) for size in (3, None)
    ]
    assert values(reports[0]) == pytest.approx(values(reports[1]), abs=1e-4)


def test_maps_of_other_weights_are_made_in_torch(model, loader):
    """Score-CAM masks images for the network whose weights are redrawn, which the engine does not have."""
    ours, expected = (
        evaluate(model, loader, ('score_cam',), metrics=('randomisation', 'stability'), engine=name)
        for name in ('onnxruntime', 'torch')
    )
    assert values(ours) == pytest.approx(values(expected), abs=0.01)


def test_an_engine_is_made_anew_where_a_buffer_changed_that_no_file_holds(loader, monkeypatch):
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.register_buffer('factor', torch.tensor(1.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.factor

    scaled = Scaled(Plain()).eval()

    def evaluated(engine: str) -> dict[tuple[str, str, str], float]:
        report = evaluate(
            scaled,
            loader,
            ('centre',),
            metrics=('average_drop',),
            mean=(0.5,),
            std=(0.5,),
            target='predicted',
            engine=engine,
        )
        return values(report)

    first = evaluated('onnxruntime')
    scaled.factor.fill_(5.0)
    assert evaluated('onnxruntime') == pytest.approx(evaluated('torch'), abs=0.01) != pytest.approx(first, abs=0.01)


def test_a_finished_folder_exports_nothing_and_forwards_nothing(model, loader, tmp_path, monkeypatch, request):
    arguments = {'metrics': METRICS, 'engine': 'onnxruntime', 'output_dir': tmp_path}
    whole = evaluate(model, loader, METHODS, **arguments)
    request.getfixturevalue('no_export')
    announce = protocol._announce
    monkeypatch.setattr(protocol, '_announce', None)  # a call would fail
    for engine in ('onnxruntime', 'auto'):
        again = evaluate(model, loader, METHODS, **arguments | {'engine': engine})
        assert again.settings['engine'] == whole.settings['engine']
        assert values(again) == values(whole)
    monkeypatch.setattr(protocol, '_announce', announce)
    file = tmp_path / 'finished.0.jsonl'
    lines = [line for line in file.read_bytes().splitlines() if line]
    file.write_bytes(lines[0] + b'\n')  # two batches of three are left
    with pytest.raises(ValueError, match=r"engine='onnxruntime .*engine='torch'"):  # no export is no engine
        evaluate(model, loader, METHODS, **arguments)


def test_a_function_of_another_signature_is_refused_before_an_export(model, loader, no_export):
    for function in (lambda x: x[:, 0], lambda x, target, layer: x[:, 0]):
        with pytest.raises(ValueError, match=r"method 'mine' is called with images and targets, \(x, target\), which"):
            evaluate(model, loader, {'mine': function}, engine='onnxruntime')


def test_a_folder_of_other_settings_is_refused_before_an_export(model, loader, tmp_path, no_export):
    evaluate(model, loader, METHODS, engine='torch', output_dir=tmp_path, metrics=('average_drop',))
    with pytest.raises(ValueError, match='metrics='):
        evaluate(model, loader, METHODS, engine='onnxruntime', output_dir=tmp_path, metrics=('average_gain',))

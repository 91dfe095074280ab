"""Runs of the protocol: interrupted and resumed, over several processes, over subsets and every kind of loader."""

from __future__ import annotations

import copy
import csv
import dataclasses
import importlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from six_images import Six
from timm.data import create_loader, create_transform, resolve_model_data_config
from torch import Tensor, distributed, multiprocessing, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import timm_castream
from timm_castream import datasets, forward_both
from timm_castream.attribution import attribute
from timm_castream.attribution.user_methods import resolve_methods
from timm_castream.evaluate import evaluate
from timm_castream.evaluation.plan import Plan
from timm_castream.evaluation.report import Report
from timm_castream.inference.predictor import Predictor

METHODS = ('grad_cam', 'score_cam')


@pytest.fixture
def model(make_model) -> nn.Module:
    return make_model('test_resnet')


class Scenes(Dataset):
    """Random images that notes which of them were read, and stops at one as Ctrl-C would."""

    def __init__(self, num_images: int = 7, stop_at: int | None = None, multilabel: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(num_images, 3, 64, 64, generator=generator)
        self.labels = torch.randint(10, (num_images,), generator=generator)
        if multilabel:
            self.labels = (torch.rand(num_images, 10, generator=generator) < 0.2).float()
            self.labels[0] = 0
        self.stop_at = stop_at
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.stop_at:
            raise KeyboardInterrupt
        self.read.append(index)
        return self.images[index], self.labels[index]

    def __len__(self) -> int:
        return len(self.images)


def interrupt(model: nn.Module, folder: Path, **kwargs: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, DataLoader(Scenes(stop_at=5), 2), METHODS, output_dir=folder, **kwargs)


def assert_equal(one: Report, other: Report) -> None:
    assert one.figures == other.figures
    assert one.accuracy == other.accuracy
    assert_close(one, other, atol=0)


def assert_close(one: Report, other: Report, atol: float) -> None:
    for name in ('images', 'pairs'):
        table, expected = getattr(one.values, name), getattr(other.values, name)
        assert list(table) == list(expected)
        for column, values in table.items():
            np.testing.assert_allclose(values, expected[column], rtol=0, atol=atol, err_msg=column)


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_figures(model, tmp_path) -> None:
    expected = evaluate(model, DataLoader(Scenes(), 2), METHODS)
    interrupt(model, tmp_path)
    assert not (tmp_path / 'evaluation.json').exists()
    rest = Scenes()
    report = evaluate(model, DataLoader(rest, 2), METHODS, output_dir=tmp_path)
    assert set(rest.read) - {0} == {4, 5, 6}  # image 0 says what targets look like
    assert_equal(report, expected)
    assert json.loads((tmp_path / 'evaluation.json').read_text())['num_images'] == 7


def test_a_batch_that_a_kill_cut_off_in_the_middle_of_writing_is_evaluated_again(model, tmp_path) -> None:
    expected = evaluate(model, DataLoader(Scenes(), 2), METHODS)
    interrupt(model, tmp_path)
    journal = tmp_path / 'finished.0.jsonl'
    journal.write_bytes(journal.read_bytes()[:-40])
    for _ in range(2):  # what was written after the torn line must be found too
        assert_equal(evaluate(model, DataLoader(Scenes(), 2), METHODS, output_dir=tmp_path), expected)


def test_a_finished_evaluation_is_read_from_its_folder(model, tmp_path) -> None:
    expected = evaluate(model, DataLoader(Scenes(multilabel=True), 3), METHODS, output_dir=tmp_path)
    again = Scenes(multilabel=True)
    assert_equal(evaluate(model, DataLoader(again, 3), METHODS, output_dir=tmp_path), expected)
    assert set(again.read) == {0}


def test_a_process_without_images_left_does_not_start_a_loader_that_needs_one(model, tmp_path) -> None:
    class Prefetcher:
        """As the one of timm 1.0.28: it hands on the last batch after the loop."""

        def __init__(self, loader: DataLoader) -> None:
            self.loader, self.dataset = loader, loader.dataset

        def __iter__(self) -> Iterator[Any]:
            batches = list(self.loader)
            yield from batches[:-1]
            yield batches[-1]

    loader = Prefetcher(DataLoader(Scenes(3), 2))
    expected = evaluate(model, loader, METHODS, output_dir=tmp_path)
    assert_equal(evaluate(model, loader, METHODS, output_dir=tmp_path), expected)


def test_an_evaluation_may_go_on_with_another_batch_size(model, tmp_path) -> None:
    expected = evaluate(model, DataLoader(Scenes(), 2), METHODS)
    interrupt(model, tmp_path)
    report = evaluate(model, DataLoader(Scenes(), 3), METHODS, output_dir=tmp_path)
    assert_close(report, expected, atol=1e-3)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'seed': 1}, 'seed=0, this one has seed=1'),
        ({'target': 'predicted'}, "target='truth', this one has target='predicted'"),
        ({'arguments': {'data_dir': 'b'}}, "data_dir='a', this one has data_dir='b'"),
    ],
)
def test_a_folder_with_another_evaluation_is_refused(model, tmp_path, change, message) -> None:
    settings = {'arguments': {'data_dir': 'a'}, 'num_samples': 7}
    interrupt(model, tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        evaluate(model, DataLoader(Scenes(), 2), METHODS, output_dir=tmp_path, **{**settings, **change})


def test_settings_that_never_finished_a_batch_bind_nobody(model, tmp_path) -> None:
    with pytest.raises(ValueError, match='layer9'):
        evaluate(model, DataLoader(Scenes(), 2), METHODS, layer='layer9', output_dir=tmp_path)
    evaluate(model, DataLoader(Scenes(2), 2), METHODS, layer='layer4', output_dir=tmp_path)


def test_a_folder_of_another_network_is_refused(model, make_model, tmp_path) -> None:
    interrupt(model, tmp_path)
    two_heads = make_model('test_resnet', stream_heads=2)
    two_heads.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r'holds an evaluation with .*stream='):
        evaluate(two_heads, DataLoader(Scenes(), 2), METHODS, output_dir=tmp_path)
    with torch.no_grad():
        model.castream.cls_token[0, 0] += 1
    with pytest.raises(ValueError, match='holds an evaluation with other weights than this one: name'):
        evaluate(model, DataLoader(Scenes(), 2), METHODS, output_dir=tmp_path)


def test_the_same_weights_in_another_architecture_are_refused(tmp_path) -> None:
    def dilated(output_stride: int) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model('test_resnet', num_classes=10, output_stride=output_stride).eval()

    arguments = {'methods': ('centre',), 'metrics': ('average_drop',), 'output_dir': tmp_path}
    evaluate(dilated(32), DataLoader(Scenes(), 2), **arguments)
    with pytest.raises(ValueError, match='holds an evaluation with another architecture than this one: name'):
        evaluate(dilated(8), DataLoader(Scenes(), 2), **arguments)


def first_channel(x: Tensor, target: Tensor) -> Tensor:
    return x[:, :1]


def all_channels(x: Tensor, target: Tensor) -> Tensor:
    return x


def with_transform(side: int = 64, mean: float = 0.5) -> DataLoader:
    scenes = datasets.create_dataset('digits', split='validation', num_samples=2)
    scenes.transform = create_transform((3, side, side), mean=(mean,) * 3, std=(0.5,) * 3)
    return DataLoader(scenes, 2)


@pytest.mark.parametrize(
    ('one', 'other', 'message'),
    [
        ({}, {'loader': with_transform(32)}, r'input_size=\[3, 64, 64\]'),
        ({}, {'loader': with_transform(mean=0.4)}, r'loader_normalisation=\[\[0\.5'),
        ({}, {'mean': (0.4,) * 3}, r'mean=\[0\.5, 0\.5, 0\.5\], this one has mean=\[0\.4'),
        ({}, {'std': (0.4,) * 3}, r'std=\[0\.5, 0\.5, 0\.5\], this one has std=\[0\.4'),
        (
            {'methods': {'mine': first_channel}},
            {'methods': {'mine': all_channels}},
            "another function or other maps for 'mine' than this one: name another",
        ),
    ],
)
def test_another_input_or_method_of_the_user_is_refused_in_the_same_folder(
    model, tmp_path, one, other, message
) -> None:
    arguments = {
        'loader': with_transform(),
        'methods': ('centre',),
        'metrics': ('average_drop',),
        'output_dir': tmp_path,
        **one,
    }
    expected = evaluate(model, **arguments)
    assert_equal(evaluate(model, **arguments), expected)
    with pytest.raises(ValueError, match=f'holds an evaluation with .*{message}'):
        evaluate(model, **{**arguments, **other})


def test_a_transform_without_a_repr_does_not_stop_a_second_start(model, tmp_path) -> None:
    class Transform:
        def __call__(self, image: Image.Image) -> Tensor:
            return torch.full((3, 64, 64), np.asarray(image).mean() / 255)

    for _ in range(2):
        loader = with_transform()
        loader.dataset.transform = Transform()
        evaluate(model, loader, ('centre',), metrics=('average_drop',), output_dir=tmp_path)
    saved = json.loads((tmp_path / 'evaluation.json').read_text())
    assert 'Transform object>' in saved['settings']['transform']


def _run_process(rank: int, model: nn.Module, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    try:
        resumed = evaluate(model, DataLoader(Scenes(), 2), METHODS, output_dir=folder / 'out')
        one_batch = evaluate(model, DataLoader(Scenes(), 7), METHODS)  # for one of the processes
        with pytest.raises(ValueError, match="this one has target='predicted'"):
            evaluate(model, DataLoader(Scenes(), 2), METHODS, target='predicted', output_dir=folder / 'out')
        other = copy.deepcopy(model)  # the processes share the memory of the model they were given
        with torch.no_grad():
            other.fc.weight[0, 0] += rank
        with pytest.raises(ValueError, match='models of different weights'):
            evaluate(other, DataLoader(Scenes(), 2), METHODS)
    finally:
        distributed.destroy_process_group()
    torch.save((resumed, one_batch), folder / f'process.{rank}')


@pytest.mark.slow
def test_two_processes_go_on_from_where_one_stopped_and_both_get_the_table_of_one(model, tmp_path) -> None:
    expected = evaluate(model, DataLoader(Scenes(), 2), METHODS)
    interrupt(model, tmp_path / 'out')
    multiprocessing.spawn(_run_process, (model, tmp_path), nprocs=2)
    for rank in range(2):
        for report in torch.load(tmp_path / f'process.{rank}', weights_only=False):
            assert_close(report, expected, atol=1e-3)
            for key, estimate in expected.figures.items():
                assert report[key] == pytest.approx(estimate, abs=1e-3)
    by_process = [
        {
            image
            for line in (tmp_path / 'out' / f'finished.{rank}.jsonl').read_text().split('\n')
            if line
            for image in json.loads(line)['images']['image']
        }
        for rank in range(2)
    ]
    assert by_process == [{0, 1, 2, 3, 4, 5}, {6}]
    assert json.loads((tmp_path / 'out' / 'evaluation.json').read_text())['num_images'] == 7


def test_a_subset_is_drawn_by_its_seed(model) -> None:
    scenes = Scenes(30)

    def chosen(seed: int) -> list[int]:
        report = evaluate(model, DataLoader(scenes, 4), ('grad_cam',), ('ca',), num_samples=6, seed=seed)
        return report.values.images['image'].tolist()

    first = chosen(0)
    assert len(set(first)) == 6
    assert chosen(0) == first != chosen(1)
    subset = evaluate(model, DataLoader(Subset(scenes, first), 4), ('grad_cam',), ('ca',))
    assert evaluate(model, DataLoader(scenes, 4), ('grad_cam',), ('ca',), num_samples=6).figures == subset.figures


def test_loaders_of_timm_and_of_torch_give_the_same_figures(model) -> None:
    config = resolve_model_data_config(model)
    config['input_size'] = (3, 64, 64)
    plain = datasets.create_dataset('digits', split='validation', num_samples=5)
    plain.transform = create_transform(**config)
    expected = evaluate(model, DataLoader(plain, 2), ('grad_cam',))
    prefetched = create_loader(
        datasets.create_dataset('digits', split='validation', num_samples=5),
        batch_size=2,
        device=torch.device('cpu'),
        num_workers=1,
        persistent_workers=False,
        **config,
    )
    shuffled = DataLoader(plain, 2, shuffle=True)
    for loader in (prefetched, shuffled):
        report = evaluate(model, loader, ('grad_cam',))
        assert_close(report, expected, atol=1e-2)


def test_the_model_is_as_before_afterwards(model) -> None:
    model.train()
    model.bn1.eval()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, DataLoader(Scenes(3), 2), METHODS)
    assert model.training and model.layer1.training and not model.bn1.training
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield torch.zeros(3, 64, 64), 0


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        (DataLoader(Stream(), 2), 'no DataLoader over a data set with a length'),
        ([(torch.zeros(2, 3, 64, 64), torch.zeros(2))], 'list is no DataLoader'),
        (DataLoader(Scenes(), batch_sampler=[[0, 1]]), 'no batch_size'),
        (DataLoader(TensorDataset(torch.zeros(0, 3, 64, 64), torch.zeros(0)), 2), 'no images'),
    ],
)
def test_loaders_that_cannot_be_read_by_index_are_refused(model, loader, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, loader)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'methods': ('lime',)}, "'lime' is unknown"),
        ({'poolings': ('max',)}, "'max' is unknown"),
        ({'target': 'best'}, "'best' is unknown"),
        ({'setting': 'mine'}, "'mine' is unknown"),
        ({'methods': ()}, 'methods must be a sequence of names'),
        ({'methods': 'grad_cam'}, "methods must be a sequence of names, got 'grad_cam'"),
        ({'batch_size': 0}, 'batch_size must be a positive int, got 0'),
        ({'num_samples': 8}, 'num_samples 8 is out of range, the data set has 7 images'),
    ],
)
def test_unknown_arguments_are_refused_before_an_image_is_evaluated(model, tmp_path, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, DataLoader(Scenes(), 2), output_dir=tmp_path / 'out', **arguments)
    assert not (tmp_path / 'out').exists()


def test_labels_none_of_which_is_positive_leave_nothing_to_explain(model) -> None:
    scenes = Scenes(3, multilabel=True)
    scenes.labels.zero_()
    with pytest.raises(ValueError, match='No image has a positive label'):
        evaluate(model, DataLoader(scenes, 2), METHODS)


def write_images(folder: Path, num_images: int = 7, broken: Sequence[int] = ()) -> Path:
    """An image folder of two classes; the broken files are cut, empty, or no image."""
    rng = np.random.default_rng(0)
    for index in range(num_images):
        path = folder / f'class{index % 2}' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        if index in broken:
            path.write_bytes((path.read_bytes()[:300], b'', b'no image')[list(broken).index(index) % 3])
    return folder


def folder_loader(folder: Path, model: nn.Module, num_workers: int = 0) -> Any:
    config = {**resolve_model_data_config(model), 'input_size': (3, 64, 64), 'crop_pct': 1.0}
    return create_loader(
        datasets.create_dataset('', str(folder)),
        batch_size=2,
        device=torch.device('cpu'),
        num_workers=num_workers,
        persistent_workers=False,
        **config,
    )


@pytest.mark.parametrize('num_workers', [0, 2])
def test_unreadable_images_are_named_and_never_replaced(model, tmp_path, num_workers) -> None:
    model.num_classes = 10
    whole = evaluate(model, folder_loader(write_images(tmp_path / 'whole'), model), ('grad_cam',))
    folder = write_images(tmp_path / 'broken', broken=(1, 2, 4))
    report = evaluate(model, folder_loader(folder, model, num_workers), ('grad_cam',), output_dir=tmp_path / 'out')
    assert len(report.unreadable) == 3 and report.num_images == 4
    assert sorted(Path(name).name for name in report.unreadable) == ['1.png', '2.png', '4.png']
    lost = {folder_loader(folder, model).dataset.filename(i, basename=True): i for i in range(7)}
    expected = dataclasses.replace(whole, values=whole.values.without([lost[f'{i}.png'] for i in (1, 2, 4)]))
    assert_close(report, expected, atol=1e-2)
    saved = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())
    assert saved['num_images'] == 4 and len(saved['unreadable']) == 3


def test_ten_unreadable_images_in_a_row_do_not_end_an_evaluation(model, tmp_path) -> None:
    folder = write_images(tmp_path, 14, broken=range(2, 14))
    report = evaluate(model, folder_loader(folder, model), ('centre',), metrics=('average_drop',))
    assert report.num_images == 2 and len(report.unreadable) == 12
    with pytest.raises(ValueError, match='None of the images can be read'):
        evaluate(model, folder_loader(write_images(tmp_path / 'all', 3, broken=range(3)), model))


def test_images_replaced_between_two_starts_are_noticed(model, tmp_path) -> None:
    folder = write_images(tmp_path / 'images')
    arguments = {'methods': ('centre',), 'metrics': ('average_drop',), 'output_dir': tmp_path / 'out'}
    evaluate(model, folder_loader(folder, model), **arguments)
    evaluate(model, folder_loader(folder, model), **arguments)
    Image.new('RGB', (64, 64), 'red').save(folder / 'class0' / '0.png')
    with pytest.raises(ValueError, match='The images have changed since the evaluation'):
        evaluate(model, folder_loader(folder, model), **arguments)


def test_classes_of_the_data_set_are_compared_with_those_of_the_model(model, make_model, tmp_path, caplog) -> None:
    folder = write_images(tmp_path)
    evaluate(model, folder_loader(folder, model), ('centre',), metrics=('average_drop',))
    assert 'The data set has 2 classes, the model has 10' in caplog.text


def test_a_seed_changes_the_intervals_of_finished_values(model, tmp_path) -> None:
    arguments = {'methods': ('grad_cam',), 'metrics': ('insertion',), 'output_dir': tmp_path}
    first = evaluate(model, DataLoader(Scenes(), 2), **arguments)
    again = Scenes()
    second = evaluate(model, DataLoader(again, 2), **arguments, seed=5)
    assert set(again.read) == {0}
    one, other = (report['ca', 'grad_cam', 'insertion'] for report in (first, second))
    assert one.value == other.value and one != other
    with pytest.raises(ValueError, match='seed must be an int of at least 0, got -1'):
        evaluate(model, DataLoader(Scenes(), 2), **arguments, seed=-1)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(model, tmp_path) -> None:
    class Second(Scenes):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 5:
                with pytest.raises(ValueError, match='Another evaluation is writing to'):
                    evaluate(model, DataLoader(Scenes(), 2), METHODS, output_dir=tmp_path)
            return super().__getitem__(index)

    report = evaluate(model, DataLoader(Second(), 2), METHODS, output_dir=tmp_path)
    assert_equal(report, evaluate(model, DataLoader(Scenes(), 2), METHODS))


def test_metrics_that_need_no_curve_cost_one_masked_forward_a_map(model) -> None:
    forwards = []
    model.conv1.register_forward_hook(lambda module, args, output: forwards.append(len(output)))
    evaluate(
        model,
        DataLoader(Scenes(), 7),
        ('grad_cam', 'layer_cam'),
        metrics=('average_drop', 'average_gain', 'average_increase'),
    )
    assert sum(forwards) == 7 + 2 * 2 * 7  # images, and a masked image a pooling and method


def test_localisation_metrics_use_the_boxes_of_the_data_set(model) -> None:
    scenes = datasets.DigitScenes('validation', 6, seed=2)
    config = {**resolve_model_data_config(model), 'input_size': (3, 64, 64), 'crop_pct': 1.0}
    scenes.transform = create_transform(**config)
    metrics = ('pointing_game', 'energy_pointing_game', 'localization_error', 'max_box_acc_v2')
    report = evaluate(model, DataLoader(scenes, 4), ('grad_cam', 'centre'), metrics=metrics)
    for index in range(6):
        ((x0, y0, x1, y1),) = np.reshape(scenes.boxes[index], (1, 4))
        with torch.no_grad():
            maps = attribute(model, scenes[index][0][None], 'grad_cam', torch.tensor([scenes[index][1]]))
        big = torch.nn.functional.interpolate(maps[None].double(), (64, 64), mode='bilinear')[0, 0].numpy()
        inside = big[int(y0) : int(y1), int(x0) : int(x1)]
        expected = 100 * inside.sum() / big.sum() if big.sum() else 0.0
        assert report.values.pairs['ca/grad_cam/energy_pointing_game'][index] == pytest.approx(expected, abs=0.05)
        assert report.values.pairs['ca/grad_cam/pointing_game'][index] == 100 * (
            big.max() > 0 and inside.max() == big.max()
        )
    assert 0 <= report['gap', 'centre', 'max_box_acc_v2'].value <= 100
    assert report['gap', 'centre', 'max_box_acc_v2'].value == report['ca', 'centre', 'max_box_acc_v2'].value
    with pytest.raises(ValueError, match="metric 'pointing_game' needs boxes"):
        evaluate(model, DataLoader(Scenes(), 2), ('centre',), metrics=metrics)


def test_boxes_replaced_between_two_starts_are_noticed(model, tmp_path) -> None:
    scenes = datasets.DigitScenes('validation', 3, seed=2)
    config = {**resolve_model_data_config(model), 'input_size': (3, 64, 64), 'crop_pct': 1.0}
    scenes.transform = create_transform(**config)
    arguments = {'methods': ('centre',), 'metrics': ('pointing_game',), 'output_dir': tmp_path}
    report = evaluate(model, DataLoader(scenes, 2), **arguments)
    assert 'Localisation: 3 of 3 maps have a box' in str(report)
    scenes.boxes = scenes.boxes + 1
    with pytest.raises(ValueError, match='have changed since the evaluation'):
        evaluate(model, DataLoader(scenes, 2), **arguments)
    scenes.boxes = scenes.boxes * 0 + 1000
    with pytest.raises(ValueError, match='no image has a box of its class inside the input'):
        evaluate(model, DataLoader(scenes, 2), **{**arguments, 'output_dir': None})


def test_finished_values_serve_with_and_without_curves(model, tmp_path, caplog) -> None:
    arguments = {'methods': ('centre',), 'metrics': ('insertion',)}
    evaluate(model, DataLoader(Scenes(), 2), **arguments, output_dir=tmp_path / 'without')
    report = evaluate(model, DataLoader(Scenes(), 2), **arguments, output_dir=tmp_path / 'without', keep_curves=True)
    assert not report.curves and 'The curves of the finished images were not kept' in caplog.text
    kept = evaluate(model, DataLoader(Scenes(), 2), **arguments, output_dir=tmp_path / 'with', keep_curves=True)
    again = Scenes()
    assert_equal(evaluate(model, DataLoader(again, 2), **arguments, output_dir=tmp_path / 'with'), kept)
    assert set(again.read) == {0} and kept.curves


def test_labels_of_methods_may_be_words_of_the_columns(model, tmp_path) -> None:
    labels = ('prob', 'class', 'image', 'accuracy', 'score', 'label', 'has_box', 'confidence')
    report = evaluate(
        model,
        DataLoader(Scenes(3), 2),
        dict.fromkeys(labels, 'grad_cam'),
        metrics=('average_drop',),
        output_dir=tmp_path,
    )
    plain = evaluate(model, DataLoader(Scenes(3), 2), ('grad_cam',), metrics=('average_drop',))
    for pooling in ('gap', 'ca'):
        for label in labels:
            assert report[pooling, label, 'average_drop'] == plain[pooling, 'grad_cam', 'average_drop']
    again = Scenes(3)
    resumed = evaluate(
        model, DataLoader(again, 2), dict.fromkeys(labels, 'grad_cam'), metrics=('average_drop',), output_dir=tmp_path
    )
    assert set(again.read) == {0}
    assert_equal(resumed, report)


def test_a_callback_gets_the_means_of_each_batch(model) -> None:
    calls: list[tuple[int, dict[str, float]]] = []
    arguments = {'methods': ('grad_cam',), 'metrics': ('average_drop',)}
    report = evaluate(model, DataLoader(Scenes(5), 2), **arguments, on_batch=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == [2, 4, 5]
    values = report.values.pairs['ca/grad_cam/average_drop']
    for (_, means), batch in zip(calls, (values[:2], values[2:4], values[4:]), strict=True):
        assert means['ca/grad_cam/average_drop'] == pytest.approx(batch.mean())
        assert means.keys() >= {'gap/accuracy', 'ca/accuracy', 'ca/prob'}


def test_options_for_speed_may_differ_when_an_evaluation_resumes(model, tmp_path) -> None:
    interrupt(model, tmp_path)
    report = evaluate(
        model, DataLoader(Scenes(), 3), METHODS, output_dir=tmp_path, batch_size=3, channels_last=True, progress=True
    )
    assert_close(report, evaluate(model, DataLoader(Scenes(), 2), METHODS), atol=1e-3)


def test_maps_that_say_nothing_are_counted_by_method_and_pooling(make_model, tmp_path) -> None:
    model = make_model('test_resnet')
    dataset = TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4))  # feature maps of 1 x 1
    methods = {'grad_cam': 'grad_cam', 'random': 'random', 'negative': lambda x, t: -x.abs().sum(1), 'centre': 'centre'}
    report = evaluate(model, DataLoader(dataset, 2), methods, metrics=('average_drop',), output_dir=tmp_path)
    expected = {(p, m): 4 for m in ('grad_cam', 'random', 'negative') for p in ('gap', 'ca')}
    assert report.constant_maps == expected
    assert 'Maps that are constant and say nothing, of 4: Grad-CAM GAP 4, Grad-CAM CA 4, Random GAP 4' in str(report)
    saved = json.loads((tmp_path / 'evaluation.json').read_text())
    with open(tmp_path / 'table.csv', newline='') as file:
        for rows in (saved['rows'], list(csv.DictReader(file))):
            counts = {
                (row['pooling'], row['method']): int(row['constant_maps']) for row in rows if row['pooling'] != 'ca-gap'
            }
            assert counts == {**expected, ('gap', 'centre'): 0, ('ca', 'centre'): 0}


def test_a_class_token_is_called_so(make_model) -> None:
    model = make_model('test_vit')
    text = str(evaluate(model, DataLoader(Six(), 3), ('grad_cam',), metrics=('average_drop',)))
    assert 'class token' in text and 'CA - class token' in text and 'GAP' not in text


def test_one_logit_is_evaluated_for_both_answers(make_model) -> None:
    model = make_model('test_resnet', {'num_classes': 1})
    model.get_classifier().weight.data.mul_(20)
    images = Six().images
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    report = evaluate(model, DataLoader(TensorDataset(images, labels), 2), ('centre',), metrics=('average_drop',))
    with torch.no_grad(), timm_castream.pooling(model, 'gap'):
        yes = model(images)[:, 0].sigmoid()
    assert report.accuracy['gap'].value == pytest.approx(100 * ((yes > 0.5) == labels).float().mean().item())
    assert report.confidence['gap'].value == pytest.approx(
        100 * torch.where(labels == 1, yes, 1 - yes).mean().item(), abs=1e-3
    )
    with pytest.raises(ValueError, match='has classes from 2 to 3, the model has 0 to 1'):
        evaluate(model, DataLoader(TensorDataset(images, labels + 2), 2), ('centre',), metrics=('average_drop',))


def test_a_wrapper_that_normalises_is_measured_as_its_model_on_normalised_images(make_model) -> None:
    model = make_model('test_resnet')
    model.get_classifier().weight.data.mul_(20)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))

    class Normalise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - mean) / std

    pixels = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        labels = forward_both(model, (pixels - mean) / std)['ca'].argmax(1)
    methods, metrics = ('grad_cam', 'attention', 'score_cam'), ('average_drop', 'average_increase')
    wrapper = nn.Sequential(Normalise(), model)
    given = evaluate(
        wrapper, DataLoader(TensorDataset(pixels, labels), 2), methods, metrics=metrics, mean=(0.0,), std=(1.0,)
    )
    expected = evaluate(model, DataLoader(TensorDataset((pixels - mean) / std, labels), 2), methods, metrics=metrics)
    assert given.accuracy['ca'].value == 100
    for key, estimate in expected.figures.items():
        assert given.figures[key].value == pytest.approx(estimate.value, abs=1e-2), key
    with pytest.raises(ValueError, match='Sequential changes its images'):
        evaluate(wrapper, DataLoader(TensorDataset(pixels, labels), 2), methods, metrics=metrics)


def test_a_function_of_the_output_takes_the_place_of_the_probability(make_model: Callable[..., nn.Module]) -> None:
    model = make_model('test_resnet')
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.full((4,), 3)), 2)
    metrics = ('average_drop', 'average_gain', 'deletion')
    by_class = evaluate(model, loader, ('centre', 'score_cam'), metrics=metrics)
    ages = DataLoader(TensorDataset(images, torch.tensor([31.5, 8.0, 64.0, 20.0])), 2)  # no class indices
    report = evaluate(model, ages, ('centre', 'score_cam'), target=lambda output: output.softmax(0)[3], metrics=metrics)
    for key, estimate in by_class.figures.items():
        assert report[key].value == pytest.approx(estimate.value, abs=1e-3)
    assert report.confidence['ca'].value == pytest.approx(by_class.confidence['ca'].value, abs=1e-3)
    assert math.isnan(report.accuracy['gap'].value) and 'nan' not in str(report)
    with pytest.raises(ValueError, match=r'target as a function gave -?\d.* \[0, 1\]'):
        evaluate(model, ages, ('centre',), target=lambda output: output.sum() * 10, metrics=metrics)


def test_a_long_evaluation_says_first_how_long_it_takes_and_what_costs_it(model, caplog, monkeypatch):
    module = importlib.import_module('timm_castream.evaluate')
    caplog.set_level('INFO', logger='timm_castream')
    loader = DataLoader(Scenes(2), 2)
    evaluate(model, loader, METHODS)
    assert 'minutes' not in caplog.text
    monkeypatch.setattr(module, '_MANY_FORWARDS', 0)
    monkeypatch.setattr(module, '_MANY_MINUTES', 0)
    evaluate(model, loader, METHODS)
    maps = 2 * 2 * (1 + 64 / 8 + 64 / 8)  # of two methods and poolings: a masked image and two curves
    share = model.num_features / (model.num_features + maps)
    assert f'{share:.0%} of it for Score-CAM' in caplog.text
    caplog.clear()
    evaluate(model, loader, ('grad_cam',))
    assert 'minutes.' in caplog.text and 'Score-CAM' not in caplog.text


def test_the_time_of_methods_of_other_libraries_is_foretold_too(model, caplog, monkeypatch):
    module = importlib.import_module('timm_castream.evaluate')
    caplog.set_level('INFO', logger='timm_castream')
    names = ('grad_cam', 'captum:IntegratedGradients', 'grad-cam:AblationCAM')
    plan = Plan(resolve_methods(names), ('gap', 'ca'), ('average_drop',))
    # Under each pooling, the steps of the integral and an ablation a channel.
    assert plan.num_forwards_of_libraries(Predictor(model)) == 2 * (80 + model.num_features)
    monkeypatch.setattr(module, '_MANY_FORWARDS', 0)
    monkeypatch.setattr(module, '_MANY_MINUTES', 0)
    evaluate(model, DataLoader(Scenes(2), 2), names, metrics=('average_drop',))
    share = int(re.search(r'minutes, (\d+)% of it for methods of other libraries\.', caplog.text)[1])
    assert share > 80  # of two poolings three masked images


@pytest.mark.parametrize(
    ('item', 'given'),
    [
        ({'photo': torch.zeros(3, 64, 64), 'label': 1}, 'a dict of photo, label .* pixel_values, image'),
        ({'image': torch.zeros(3, 64, 64)}, 'a dict without a label'),
        ((torch.zeros(3, 64, 64),), 'a tuple without a label'),
        (torch.zeros(3, 64, 64), "a Tensor without a label .*target='predicted'"),
    ],
    ids=['no image', 'mapping', 'tuple of one', 'image alone'],
)
def test_items_without_a_label_that_is_needed_are_described(item, given, model) -> None:
    with pytest.raises(ValueError, match=f'The data set gives {given}'):
        evaluate(model, DataLoader([item] * 2, 2), ('centre',), metrics=('average_drop',))


@pytest.mark.parametrize(
    'item_of',
    [
        lambda image, label: image,
        lambda image, label: (image,),
        lambda image, label: {'image': image, 'file': 'a.png'},
        lambda image, label: {'pixel_values': image, 'labels': label},
        lambda image, label: (image, label, 'a.png'),
    ],
    ids=['image alone', 'tuple of one', 'mapping', 'mapping with labels', 'triple'],
)
def test_items_of_other_forms_are_explained_as_pairs_are(item_of, model) -> None:
    scenes = Scenes(3)
    has_labels = 'the label' in str(item_of('the image', 'the label'))
    arguments = {'methods': ('centre', 'grad_cam'), 'metrics': ('average_drop',)}
    for target in ('predicted', 'truth')[: 1 + has_labels]:
        expected = evaluate(model, DataLoader(scenes, 2), target=target, **arguments)
        report = evaluate(
            model,
            DataLoader([item_of(*pair) for pair in map(scenes.__getitem__, range(3))], 2),
            target=target,
            **arguments,
        )
        assert report.figures == expected.figures
        accuracy = report.accuracy['ca'].value
        assert accuracy == expected.accuracy['ca'].value if has_labels else math.isnan(accuracy)


def test_a_function_of_the_user_resumes_with_batches_of_the_same_size_alone(model, tmp_path) -> None:
    arguments = {'metrics': ('average_drop',), 'output_dir': tmp_path}
    methods = {'mine': lambda x, target: x.sum(1) / x.std()}
    evaluate(model, DataLoader(Six(), 2), methods, **arguments)
    evaluate(model, DataLoader(Six(), 2), methods, **arguments)
    with pytest.raises(ValueError, match='batch_size'):
        evaluate(model, DataLoader(Six(), 3), methods, **arguments)


def test_two_evaluations_of_a_model_in_two_threads_have_the_values_of_one(make_model) -> None:
    model = make_model('test_resnet')
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(TensorDataset(images, torch.arange(8)), 2)

    def values() -> list[float]:
        report = evaluate(
            model, loader, ('grad_cam', 'attention'), metrics=('average_drop', 'insertion'), engine='torch'
        )
        return [report[p, m, k].value for p in report.poolings for m in report.methods for k in report.metrics]

    alone = values()
    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(values) for _ in range(4)]:
            assert future.result() == pytest.approx(alone, abs=1e-4)

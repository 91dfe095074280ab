"""Names of methods of other libraries: arguments, refusals, missing libraries, and what an evaluation does with them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_castream.attribution import attribute, attribute_all
from timm_castream.attribution.peers import LIBRARIES, is_peer, peer_method, peers_that_fit, peers_that_work
from timm_castream.attribution.peers.library import Library
from timm_castream.attribution.user_methods import resolve_methods
from timm_castream.evaluate import evaluate
from timm_castream.inference.predictor import Predictor

TARGET = torch.tensor([7, 2])


def test_arguments_are_literals_and_text_needs_no_quotes() -> None:
    method = peer_method(
        'captum:Occlusion,sliding_window_shapes=(3, 16,16),strides=(3,8,8),baselines=0.5,perturbations_per_eval=4'
    )
    assert method.saliency.arguments == {
        'sliding_window_shapes': (3, 16, 16),
        'strides': (3, 8, 8),
        'baselines': 0.5,
        'perturbations_per_eval': 4,
    }
    method = peer_method('captum:IntegratedGradients,method=riemann_trapezoid,multiply_by_inputs=False', 'ig')
    assert method.saliency.arguments == {'method': 'riemann_trapezoid', 'multiply_by_inputs': False}
    assert method.name == method.title == 'ig'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (
            'captum:Salience',
            r"captum:Salience is no method of captum \(did you mean 'Saliency'\?\), valid ones: Saliency, ",
        ),
        ('captum:IntegratedGradient', r"of captum \(did you mean 'IntegratedGradients'\?\), valid ones"),
        ('gradcam:GradCAM', r"'gradcam:GradCAM' is unknown \(did you mean 'grad-cam:GradCAM'\?\), valid ones"),
        ('IntegratedGradients', r"unknown \(did you mean 'captum:IntegratedGradients'\?\), valid ones"),
        ('grad-cam:CAM', r'grad-cam:CAM is no method of grad-cam \(did you mean \'\w+CAM\'\?\), valid ones: GradCAM, '),
        ('captum:Saliency,absolute=True', "no argument 'absolute', valid ones: abs"),
        ('captum:Saliency,target=3', "no argument 'target', valid ones: abs"),
        ('torchcam:GradCAMpp,50', "'torchcam:GradCAMpp,50' has arguments that are not key=value"),
        ('captum:Saliency,abs=__import__("os")', 'has arguments that are not key=value'),
        # Text would count as true, and of two values the last one would be taken.
        ('captum:Saliency,abs=false', "captum:Saliency takes True or False for abs, got 'false'"),
        ('captum:Saliency,abs=0', 'captum:Saliency takes True or False for abs, got 0'),
        ('captum:IntegratedGradients,n_steps=five', "IntegratedGradients takes a number for n_steps, got 'five'"),
        ('captum:IntegratedGradients,method=3', 'captum:IntegratedGradients takes text for method, got 3'),
        ('captum:NoiseTunnel,abs=no', "captum:NoiseTunnel takes True or False for abs, got 'no'"),
        ('torchcam:SmoothGradCAMpp,std=much', "torchcam:SmoothGradCAMpp takes a number for std, got 'much'"),
        ('captum:IntegratedGradients,n_steps=5,n_steps=6', 'n_steps=5,n_steps=6. gives n_steps twice'),
        ('captum:NoiseTunnel,attribution_method=Foo', "'Foo', valid ones: Saliency, .*, Occlusion\\.$"),
        (
            'pytorch-grad-cam:GradCAM',
            r"mean 'grad-cam:GradCAM'\?\), valid ones before the colon: captum, grad-cam, tor",
        ),
        ('torch-cam:SmoothGradCAM', r"\(did you mean 'torchcam:SmoothGradCAMpp'\?\)"),
        ('quantus:Any', "method 'quantus:Any' is unknown, valid ones before the colon: captum, grad-cam, torchcam"),
        ('captum:GradientShap', 'captum:GradientShap cannot run here: it needs a set of baseline images'),
        ('captum:Lime', 'captum:Lime cannot run here: it needs a mask'),
        ('captum:FeaturePermutation', 'captum:FeaturePermutation cannot run here: .*other images'),
        ('captum:NeuronGradient', 'captum:NeuronGradient cannot run here: it explains a neuron'),
        ('grad-cam:RefineCAM', 'grad-cam:RefineCAM cannot run here: .*several layers'),
        ('torchcam:LeGrad', 'torchcam:LeGrad cannot run here: .*MultiheadAttention'),
    ],
)
def test_a_name_that_cannot_run_is_refused_with_its_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_methods({'a': name})


@pytest.mark.parametrize(
    ('name', 'module', 'package'),
    [('captum:Saliency', 'captum.attr', 'captum'), ('grad-cam:GradCAM', 'pytorch_grad_cam', 'grad-cam'),
     ('torchcam:CAM', 'torchcam.methods', 'torchcam')],
)  # fmt: skip
def test_a_missing_library_is_named_with_what_to_install(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (module.partition('.')[0], module):
        monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(ValueError, match=f'{name} needs {package}.*: pip install {package}'):
        resolve_methods([name])


def test_names_stand_beside_built_in_ones_and_labels(make_model: Callable[..., nn.Module], x: Tensor) -> None:
    assert is_peer('captum:Saliency') and not is_peer('package.module:function') and not is_peer(3)
    model = make_model('test_resnet')
    maps = attribute_all(model, x, ['grad_cam', 'torchcam:GradCAM'], TARGET)
    labelled = attribute_all(model, x, {'theirs': 'torchcam:GradCAM', 'ours': 'grad_cam'}, TARGET)
    for mode in ('gap', 'ca'):
        torch.testing.assert_close(maps[mode, 'torchcam:GradCAM'], maps[mode, 'grad_cam'], atol=1e-5, rtol=0)
        assert torch.equal(labelled[mode, 'theirs'], maps[mode, 'torchcam:GradCAM'])
    with pytest.raises(ValueError, match="method 'captum:Saliency' is given twice"):
        resolve_methods(['captum:Saliency', 'captum:Saliency'])


def test_each_target_of_an_image_gets_its_map(make_model: Callable[..., nn.Module], x: Tensor) -> None:
    model, targets = make_model('test_resnet'), torch.tensor([[7, 1], [2, 2]])
    for name in ('captum:InputXGradient', 'torchcam:FinerCAM'):
        maps = attribute(model, x, name, targets)
        for k in range(2):
            torch.testing.assert_close(maps[:, k], attribute(model, x, name, targets[:, k]))


def test_figures_do_not_depend_on_the_batches(make_model: Callable[..., nn.Module]) -> None:
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model, labels = make_model('test_resnet'), torch.tensor([1, 2, 3, 4, 5])
    methods = {
        'noise': 'captum:NoiseTunnel,nt_samples=2',
        'ig': 'captum:IntegratedGradients,n_steps=3',
        'smooth': 'torchcam:SmoothGradCAMpp,num_samples=2',
        'drawn': 'grad-cam:RandomCAM',
    }
    found = [
        evaluate(model, DataLoader(TensorDataset(images, labels), size), methods, metrics=('average_drop',)).values
        for size in (1, 3, 5)
    ]
    for values in found[1:]:
        for name, column in values.pairs.items():
            np.testing.assert_allclose(column, found[0].pairs[name], atol=2e-2, rtol=1e-3, err_msg=name)


def test_an_evaluation_refuses_before_it_reads_images(make_model: Callable[..., nn.Module]) -> None:
    model = make_model('test_convnext')
    read = []

    class Data(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            read.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Data(torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)), 2)
    with pytest.raises(ValueError, match=r'captum:GuidedBackprop does not fit ConvNeXt: .*nn\.ReLU'):
        evaluate(model, loader, {'guided': 'captum:GuidedBackprop'}, metrics=('average_drop',))
    assert len(set(read)) <= 1


def test_a_choice_lists_no_method_that_the_architecture_rules_out_and_imports_no_library(
    make_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(library: Library, name: str) -> None:
        raise AssertionError(f'{library.prefix}:{name} was imported')

    monkeypatch.setattr(Library, 'method_class', imported)
    names = set(peers_that_fit(Predictor(make_model('test_vit'))))
    assert {'captum:Saliency', 'grad-cam:GradCAM', 'torchcam:GradCAM'} <= names
    assert not {'captum:GuidedBackprop', 'torchcam:CAM', 'captum:Lime', 'grad-cam:SESS'} & names


def test_all_takes_what_runs_on_the_network_and_says_why_others_do_not(
    make_model: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    predictor = Predictor(make_model('test_convnext'))
    with caplog.at_level(logging.INFO):
        caplog.clear()
        names = peers_that_work(predictor, torch.randn(1, 3, 64, 64))
    assert {'captum:Saliency', 'captum:LayerGradCam', 'grad-cam:EigenCAM', 'torchcam:CAM'} <= set(names)
    # Without a trial a method that fails is not known.
    assert set(names) | {'captum:LRP', 'captum:LayerLRP'} == set(peers_that_fit(predictor))
    assert not {'captum:LRP', 'captum:GuidedBackprop', 'captum:Lime', 'torchcam:SSCAM', 'grad-cam:SESS'} & set(names)
    every = {f'{library.prefix}:{name}' for library in LIBRARIES.values() for name in library.methods}
    (record,) = caplog.records
    first, *reasons = record.message.splitlines()
    assert first == f'all leaves out {len(every - set(names))} methods of other libraries:'
    # Each method and each reason once.
    left_out = [name for line in reasons for name in line.strip().partition(': ')[0].split(', ')]
    assert sorted(left_out) == sorted(every - set(names))
    texts = [line.partition(': ')[2] for line in reasons]
    assert len(set(texts)) == len(texts) and 'it needs functions of its own for sampling and similarity' in texts
    assert not any('does not fit' in text or 'raised' in text for text in texts)

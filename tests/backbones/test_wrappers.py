"""Wrappers around models, and the class scores in what a model returns."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from timm_castream.backbones.wrappers import class_scores, in_precision_of, unwrapped

SCORES = torch.arange(6.0).view(2, 3)
Pair = namedtuple('Pair', ['scores', 'features'])


class Output(OrderedDict):
    """As transformers': a mapping whose entries are attributes too."""

    logits = property(lambda self: self['logits'])


@pytest.mark.parametrize(
    'output',
    [
        SCORES,
        SCORES[:, :, None, None],
        {'logits': SCORES, 'features': torch.ones(2, 9)},
        {'loss': None, 'logits': SCORES[:, :, None, None]},
        Output(logits=SCORES),
        SimpleNamespace(logits=SCORES, aux_logits=-SCORES),
        (SCORES, torch.ones(2, 9)),
        [SCORES],
        Pair(SCORES, None),
        (torch.tensor(0.3), SCORES),  # a loss comes first
        (torch.ones(2, 8, 4, 4), SCORES),
        {'logits': (SCORES, torch.ones(2, 9))},
    ],
    ids=lambda output: type(output).__name__,
)
def test_scores_are_found_in_what_models_return(output):
    assert torch.equal(class_scores(output, 2, 'Net'), SCORES)


def test_one_number_an_image_is_one_logit():
    assert class_scores(torch.tensor([0.5, -1.0]), 2, 'Net').tolist() == [[0.5], [-1.0]]


@pytest.mark.parametrize(
    ('output', 'given'),
    [
        (None, 'a NoneType'),
        (torch.ones(2, 3, 7, 7), r'a tensor \(2, 3, 7, 7\)'),
        (torch.ones(3, 3), r'a tensor \(3, 3\)'),
        (torch.ones(2, 3, dtype=torch.long), r'a tensor \(2, 3\) of torch.int64'),
        ({'out': SCORES}, 'a dict of out'),
        ((torch.ones(2, 3, 7, 7), 'x'), r'a tuple of a tensor \(2, 3, 7, 7\) of torch.float32, a str'),
        (torch.tensor(0.5), r'a tensor \(\)'),
        (torch.ones(2, 0), r'a tensor \(2, 0\)'),
    ],
)
def test_what_holds_no_scores_is_described(output, given):
    with pytest.raises(ValueError, match=f'Net gives {given}.* for 2 images'):
        class_scores(output, 2, 'Net')


def test_wrappers_that_change_nothing_are_taken_off_in_any_order():
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend='eager')
    for wrapper in (model, nn.DataParallel(model), compiled, nn.DataParallel(compiled), nn.DataParallel(model)):
        assert unwrapped(wrapper) is model
    for averaged in (AveragedModel(model), ModelEmaV3(model)):
        assert unwrapped(averaged) is averaged.module
    other = nn.Sequential(model)
    assert unwrapped(other) is other


def test_images_take_the_precision_of_the_weights_and_whole_numbers_stay():
    images = torch.ones(1, 2)
    assert in_precision_of(nn.Linear(2, 2).half(), images).dtype == torch.float16
    assert in_precision_of(nn.Linear(2, 2).double(), images).dtype == torch.float64
    assert in_precision_of(nn.Flatten(), images) is images
    assert in_precision_of(nn.Linear(2, 2), images.long()).dtype == torch.int64

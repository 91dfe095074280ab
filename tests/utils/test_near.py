"""Names that a mistyped one may stand for."""

from __future__ import annotations

import pytest

from timm_castream._utils.checks import check_names
from timm_castream._utils.near import did_you_mean

NAMES = ('grad_cam', 'score_cam', 'insertion', 'captum:IntegratedGradients')


@pytest.mark.parametrize(
    ('name', 'meant'),
    [
        ('grad_cm', 'grad_cam'),
        ('ScoreCAM', 'score_cam'),
        ('INSERTION', 'insertion'),
        ('captum:integratedgradient', 'captum:IntegratedGradients'),
    ],
)
def test_a_mistyped_name_gets_the_nearest_one_in_its_own_spelling(name: str, meant: str) -> None:
    assert did_you_mean(name, NAMES) == f' (did you mean {meant!r}?)'


@pytest.mark.parametrize('name', ['lime', '', 7, None])
def test_a_name_like_no_other_gets_no_hint(name: object) -> None:
    assert did_you_mean(name, NAMES) == ''


def test_an_unknown_name_is_refused_with_a_near_one_that_need_not_be_among_those_listed() -> None:
    with pytest.raises(
        ValueError, match=r"^metric 'insert' is unknown \(did you mean 'insertion'\?\), valid ones: 'x'\.$"
    ):
        check_names('metric', ['insert'], ('x',), ['insertion'])


def test_a_beginning_stands_for_the_whole_name() -> None:
    assert did_you_mean('onnx', ['torch', 'onnxruntime']) == " (did you mean 'onnxruntime'?)"
    assert did_you_mean('on', ['torch', 'onnxruntime']) == ''


def test_initials_stand_for_a_name_as_the_headings_of_a_table_do():
    names = ('average_drop', 'adcc', 'average_gain', 'insertion')
    assert did_you_mean('AD', names) == " (did you mean 'average_drop'?)"
    assert did_you_mean('ag', names) == " (did you mean 'average_gain'?)"
    assert did_you_mean('adc', names) == " (did you mean 'adcc'?)" and not did_you_mean('i', names)

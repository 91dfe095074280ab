"""The page of the methods of other libraries, docs/methods.md, beside the libraries themselves."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from timm_castream.attribution.peers import LIBRARIES

PAGE = Path(__file__).parent.parent / 'docs' / 'methods.md'
MODULES = {'captum': 'captum.attr', 'grad-cam': 'pytorch_grad_cam', 'torchcam': 'torchcam.methods'}
NO_METHODS = {  # base classes, helpers, and what explains language models
    *('Attribution', 'GradientAttribution', 'PerturbationAttribution', 'NeuronAttribution', 'LayerAttribution'),
    *('AblationLayer', 'AblationLayerVit', 'AblationLayerFasterRCNN', 'ActivationsAndGradients', 'OutputTarget'),
}


@pytest.mark.parametrize('prefix', MODULES)
def test_every_class_of_a_library_has_a_row_or_a_reason_on_the_page(prefix: str) -> None:
    library = LIBRARIES[prefix]
    section = f'## {library.package} {library.version}\n'
    text = PAGE.read_text(encoding='utf-8')
    if section not in text:
        pytest.skip(f'the page describes another version than {library.package} {library.version}')
    text = text.partition(section)[2].partition('\n## ')[0]
    table, _, refused = text.partition('Refused:')
    rows = dict(re.findall(r'^\| (\w+) \|(.*)\|$', table, re.MULTILINE))
    reasons = {
        name
        for line in refused.splitlines()
        for name in re.findall(r'`(\w+)`', re.split(r'(?<=`): ', line, maxsplit=1)[0])
    }
    module = importlib.import_module(MODULES[prefix])
    kinds = {name for name, value in vars(module).items() if isinstance(value, type) and not name.startswith('_')}
    if prefix == 'captum':
        kinds = {name for name in kinds if issubclass(getattr(module, name), module.Attribution) and 'LLM' not in name}
    assert kinds - NO_METHODS == rows.keys() | reasons
    for name, cells in rows.items():
        assert len(cells.split('|')) >= 4
        assert ('no' in cells.split()) == (name in reasons)

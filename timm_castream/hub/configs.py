"""Pretrained cfgs of the variants of the paper, one JSON file each in `hf_configs/`, and the streams in the package."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from hf_configs import PUBLISHED

HUB_NAMESPACE = 'timm-castream'
NAMESPACE_VARIABLE = 'TIMM_CASTREAM_NAMESPACE'


def read_configs() -> dict[str, PretrainedCfg]:
    """Reads `hf_configs/*.json`.

    A cfg has an `hf_hub_id` where its weights are published: timm lists a model with one as pretrained.

    Returns:
        Cfgs by `architecture.tag`, or by `architecture` where there is no tag.
    """
    cfgs = {}
    for file in sorted(files('hf_configs').iterdir(), key=lambda f: f.name):
        if not file.name.endswith('.json'):
            continue
        config = json.loads(file.read_text(encoding='utf-8'))
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config['pretrained_cfg'].items()
        }
        name = file.name.removesuffix('.json')
        if name in PUBLISHED:
            fields['hf_hub_id'] = hub_repository(name)
        cfgs[name] = PretrainedCfg(architecture=config['architecture'], num_classes=config['num_classes'], **fields)
    return cfgs


def shipped_streams() -> dict[str, Path]:
    """The trained streams of the package, files of `save_stream`, by the name of their variant."""
    folder = Path(str(files('timm_castream'))) / 'pretrained'
    return {path.stem: path for path in sorted(folder.glob('*_castream.safetensors'))}


def hub_repository(name: str) -> str:
    """The Hub repository of a variant's weights, `<namespace>/<architecture>.<tag>`.

    The namespace is `HUB_NAMESPACE`. The environment variable TIMM_CASTREAM_NAMESPACE replaces it, for mirrors and
    private organisations.

    Args:
        name: `architecture.tag`.
    """
    return f'{os.environ.get(NAMESPACE_VARIABLE) or HUB_NAMESPACE}/{name}'

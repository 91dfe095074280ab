"""Which architectures of timm take a CA-Stream: a table of timm's model files, and the exclusions with their reasons.

timm registers an architecture under the file that defines it, so a new architecture of a known file is covered without
a change here. Nothing is built.
"""

from __future__ import annotations

import difflib
import re
from fnmatch import fnmatchcase, translate

import timm
from timm.layers import AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d
from timm.models import model_entrypoint
from torch import nn

# Files of `timm.models` whose networks average a feature map, (B, D, H, W) or (B, H, W, D).
MAPS = frozenset(
    {
        'byoanet',
        'byobnet',
        'convmixer',
        'convnext',
        'csatv2',
        'cspnet',
        'cspnext',
        'davit',
        'densenet',
        'dla',
        'dpn',
        'edgenext',
        'efficientformer_v2',
        'efficientnet',
        'efficientvit_msra',
        'fasternet',
        'fastvit',
        'focalnet',
        'gcvit',
        'ghostnet',
        'hardcorenas',
        'hgnet',
        'hieradet_sam2',
        'hrnet',
        'iformer',
        'inception_next',
        'inception_resnet_v2',
        'inception_v3',
        'inception_v4',
        'lcnetv2',
        'mambaout',
        'maxxvit',
        'metaformer',
        'mobilenetv3',
        'mobilenetv5',
        'mobilevit',
        'nasnet',
        'nest',
        'nextvit',
        'nfnet',
        'pnasnet',
        'pvt_v2',
        'rdnet',
        'regnet',
        'repghost',
        'repvit',
        'res2net',
        'resnest',
        'resnet',
        'resnetv2',
        'rexnet',
        'selecsls',
        'senet',
        'sequencer',
        'shvit',
        'sknet',
        'starnet',
        'swiftformer',
        'swin_transformer',
        'swin_transformer_v2',
        'swin_transformer_v2_cr',
        'tiny_vit',
        'tresnet',
        'vision_transformer_sam',
        'visformer',
        'vovnet',
        'xception',
        'xception_aligned',
    }
)

# Files whose networks average patch tokens, (B, N, D), or read a class token beside them. In all of them the patch
# tokens stand row by row, or `layout.Tokens` puts them back: tests/test_token_order.py shows it for each file.
TOKENS = frozenset(
    {
        'beit',
        'cait',
        'coat',
        'convit',
        'deepseek_vit',
        'deit',
        'efficientformer',
        'eva',
        'gemma4_vit',
        'hiera',
        'levit',
        'mlp_mixer',
        'mvitv2',
        'naflexvit',
        'qwen3_vit',
        'tnt',
        'twins',
        'vision_transformer',
        'vision_transformer_hybrid',
        'vision_transformer_relpos',
        'vitamin',
        'volo',
        'xcit',
    }
)

_ATTENTION_POOLS = (AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d)
_ATTENTION_POOL = 'it has an attention pooling of its own'
_BETWEEN = 'layers stand between its last feature map and its pooling'
_SEVERAL = 'its head reads feature maps of several scales'
_ENCODER = 'it is an encoder without a classifier'

# Files whose networks are excluded.
EXCLUDED_FILES = {
    'cpubone': _BETWEEN,
    'crossvit': 'it has two branches, each with a class token and a classifier',
    'efficientvim': _SEVERAL,
    'efficientvit_mit': _BETWEEN,
    'lowformer': _BETWEEN,
    'pit': 'it drops the patch tokens after its last stage and keeps the class token alone',
    'vgg': _BETWEEN,
}

# Architectures of other files that are excluded: a pattern of names, a pattern of exceptions, the reason.
EXCLUDED_NAMES = (
    ('*siglip*', '*_gap*', _ATTENTION_POOL),
    ('*_map', '', _ATTENTION_POOL),
    ('*_map_*', '', _ATTENTION_POOL),
    ('vit_pe_core_*', '', _ATTENTION_POOL),
    ('test_vit3', '', _ATTENTION_POOL),
    ('resnet*_clip', '', _ATTENTION_POOL),
    ('coat_[mst]*', '', _SEVERAL),
    ('*_enc', '', _ENCODER),
)
# One match for most names: registering asks about all architectures of timm.
_MAY_BE_EXCLUDED = re.compile('|'.join(translate(pattern) for pattern, _, _ in EXCLUDED_NAMES))


def file_of(architecture: str) -> str:
    """The file of `timm.models` that defines an architecture, without its ending.

    Raises:
        ValueError: If timm does not register the architecture.
    """
    if not timm.is_model(architecture):
        raise ValueError(f'{architecture!r} is no architecture of timm.')
    return model_entrypoint(architecture).__module__.rpartition('.')[2]


def why_unsupported(architecture: str) -> str:
    """Why an architecture of timm has no `_castream` variant, as a clause; '' where it has one."""
    file = file_of(architecture)
    if file in EXCLUDED_FILES:
        return EXCLUDED_FILES[file]
    for pattern, exceptions, why in EXCLUDED_NAMES if _MAY_BE_EXCLUDED.match(architecture) else ():
        if fnmatchcase(architecture, pattern) and not fnmatchcase(architecture, exceptions):
            return why
    if file in MAPS or file in TOKENS:
        return ''
    return f'timm_castream does not cover the networks of timm.models.{file}'


def unknown_name_message(name: str) -> str:
    """A sentence for a name that timm does not register: the reason of an exclusion, or the names that come near."""
    backbone = name.partition('.')[0].removesuffix('_castream')
    if timm.is_model(backbone) and why_unsupported(backbone):
        return f'{backbone} takes no CA-Stream: {why_unsupported(backbone)}.'
    if '/' in name:
        return f'There is no model {name}: write hf-hub:{name} for a repository, or local-dir: and a folder.'
    near = difflib.get_close_matches(name, timm.list_models(), 3, 0.7)
    if near:
        return f'There is no model {name}; did you mean {" or ".join(near)}?'
    return f'There is no model {name}; castream list shows the models with a stream.'


def supported(architecture: str) -> bool:
    """Whether an architecture of timm has a `_castream` variant."""
    return not why_unsupported(architecture)


def architectures() -> list[str]:
    """The architectures of the installed timm that have a `_castream` variant, in timm's order."""
    return [name for name in timm.list_models() if not name.endswith('_castream') and supported(name)]


def why_unsupported_model(model: nn.Module) -> str:
    """Why a timm model takes no stream, as a clause; '' where its modules and its file tell of no reason.

    An attention pooling with random weights is close to an average, so outputs do not tell it: its module does.
    """
    if any(isinstance(module, _ATTENTION_POOLS) for module in model.modules()):
        return _ATTENTION_POOL
    return next((EXCLUDED_FILES[file] for file in _files_of(model) if file in EXCLUDED_FILES), '')


def has_raster_tokens(model: nn.Module) -> bool:
    """Whether the order of a model's patch tokens is known."""
    return any(file in TOKENS for file in _files_of(model))


def _files_of(model: nn.Module) -> list[str]:
    names = (base.__module__.rpartition('.') for base in type(model).__mro__)
    return [file for package, _, file in names if package == 'timm.models']

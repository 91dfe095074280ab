"""Small networks of the families that give patch tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import timm
import timm.models
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.volo import VOLO
from torch import nn

T = TypeVar('T')

SMALL_VIT = {'embed_dim': 32, 'depth': 6, 'num_heads': 2}


def _mvitv2(num_classes: int, **kwargs: Any) -> nn.Module:
    cfg = MultiScaleVitCfg(depths=(1, 1, 1, 2), embed_dim=8, **kwargs)
    return MultiScaleVit(cfg, (64, 64), num_classes=num_classes)


def _volo(num_classes: int, **kwargs: Any) -> nn.Module:
    return VOLO(
        layers=(1, 1, 1, 1),
        img_size=64,
        embed_dims=(16, 32, 32, 32),
        num_heads=(1, 2, 2, 2),
        num_classes=num_classes,
        **kwargs,
    )


def _gemma4(num_classes: int, **kwargs: Any) -> nn.Module:
    return timm.models.gemma4_vit.Gemma4VitClassifier(
        embed_dim=32,
        depth=6,
        num_heads=2,
        head_dim=16,
        intermediate_size=64,
        position_embedding_size=64,
        num_classes=num_classes,
        **kwargs,
    )


def _qwen3(num_classes: int, **kwargs: Any) -> nn.Module:
    return timm.models.qwen3_vit.Qwen3VitClassifier(
        img_size=64, embed_dim=32, depth=6, num_heads=2, pos_embed_grid_size=4, num_classes=num_classes, **kwargs
    )


def _deepseek(num_classes: int, **kwargs: Any) -> nn.Module:
    return timm.models.deepseek_vit.DeepseekVitClassifier(
        img_size=84, embed_dim=32, depth=6, num_heads=2, num_classes=num_classes, **kwargs
    )


# File of timm.models: an architecture or a function, its arguments, height and width of its images.
TOKEN_NETWORKS: dict[str, tuple[str | Callable[..., nn.Module], dict[str, Any], tuple[int, int]]] = {
    'beit': ('beit_base_patch16_224', {'img_size': (64, 96), **SMALL_VIT}, (64, 96)),
    'cait': ('cait_xxs24_224', {'img_size': (64, 96), **SMALL_VIT}, (64, 96)),
    'coat': (
        'coat_lite_tiny',
        {'img_size': 64, 'embed_dims': (16, 16, 32, 32), 'serial_depths': (1, 1, 1, 2)},
        (64, 64),
    ),
    'convit': ('convit_tiny', {'img_size': 64, 'embed_dim': 8, 'depth': 6, 'local_up_to_layer': 4}, (64, 64)),
    'deepseek_vit': (_deepseek, {}, (84, 126)),
    'deit': ('deit_tiny_distilled_patch16_224', {'img_size': (64, 96), **SMALL_VIT}, (64, 96)),
    'efficientformer': ('efficientformer_l1', {'depths': (1, 1, 1, 2), 'embed_dims': (8, 16, 24, 32)}, (224, 224)),
    'eva': ('eva02_tiny_patch14_224', {'img_size': (56, 84), 'embed_dim': 24, 'depth': 6, 'num_heads': 2}, (56, 84)),
    'gemma4_vit': (_gemma4, {}, (96, 144)),
    'hiera': (
        'hiera_tiny_224',
        {'img_size': (64, 96), 'embed_dim': 8, 'num_heads': 1, 'stages': (1, 1, 1, 2)},
        (64, 96),
    ),
    'levit': (
        'levit_128s',
        {'img_size': 128, 'embed_dim': (32, 48, 64), 'num_heads': (2, 3, 4), 'depth': (1, 1, 1)},
        (128, 128),
    ),
    'mlp_mixer': (MlpMixer, {'img_size': (64, 96), 'embed_dim': 32, 'num_blocks': 6}, (64, 96)),
    'mvitv2': (_mvitv2, {}, (64, 64)),
    'naflexvit': ('naflexvit_base_patch16_gap', SMALL_VIT, (64, 96)),
    'qwen3_vit': (_qwen3, {}, (64, 96)),
    'tnt': (
        'tnt_s_patch16_224',
        {'img_size': 64, 'embed_dim': 32, 'inner_dim': 8, 'depth': 6, 'num_heads_inner': 2, 'num_heads_outer': 2},
        (64, 64),
    ),
    'twins': (
        'twins_svt_small',
        {'embed_dims': (8, 16, 24, 32), 'num_heads': (1, 1, 1, 1), 'depths': (2, 2, 2, 2)},
        (64, 96),
    ),
    'vision_transformer': ('test_vit', {'dynamic_img_size': True}, (64, 96)),
    'vision_transformer_hybrid': ('vit_tiny_r_s16_p8_224', {'dynamic_img_size': True, **SMALL_VIT}, (64, 96)),
    'vision_transformer_relpos': ('vit_relpos_small_patch16_224', {'img_size': (64, 96), **SMALL_VIT}, (64, 96)),
    'vitamin': ('vitamin_small_224', {'img_size': (64, 96)}, (64, 96)),
    'volo': (_volo, {}, (64, 64)),
    'xcit': ('xcit_nano_12_p16_224', SMALL_VIT, (64, 96)),
}


def token_network(file: str, num_classes: int = 10, **kwargs: Any) -> tuple[nn.Module, tuple[int, int]]:
    """A small network of a file of timm.models in eval mode, the same at every call, and the size of its images.

    Classifiers are drawn anew: some start at zero.
    """
    make, args, size = TOKEN_NETWORKS[file]
    torch.manual_seed(0)
    args = {'num_classes': num_classes, **args, **kwargs}
    model = (timm.create_model(make, **args) if isinstance(make, str) else make(**args)).eval()
    classifiers = model.get_classifier()
    for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        for module in classifier.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.2)
    return model, size

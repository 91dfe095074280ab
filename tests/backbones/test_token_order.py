"""Patch tokens of every family are seen in image order: by gradients, and as timm's own maps have them."""

from __future__ import annotations

import pytest
import timm
import torch
from networks import TOKEN_NETWORKS, token_network
from torch import Tensor, nn

from timm_castream.backbones import architectures
from timm_castream.backbones.layout import Stage, Tokens
from timm_castream.backbones.probe import hook_target
from timm_castream.backbones.stages import find_stages

# With random weights the later stages of these mix all locations: their attention outweighs their residual branch.
MIXING = ('efficientformer', 'gemma4_vit', 'levit', 'xcit')


def stage_maps(model: nn.Module, x: Tensor) -> list[tuple[Stage, Tensor]]:
    """The stages and their maps, (B, D, H, W)."""
    stages, _ = find_stages(model)
    outputs = []
    handles = [
        hook_target(model.get_submodule(stage.name)).register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )
        for stage in stages[:-1]
    ]
    outputs.append(model.forward_features(x))
    for handle in handles:
        handle.remove()
    return [
        (stage, stage.to_nchw(stage.tensor(output), x.shape[2:])) for stage, output in zip(stages, outputs, strict=True)
    ]


def test_every_file_of_token_networks_has_a_network_here():
    assert set(TOKEN_NETWORKS) == architectures.TOKENS


@pytest.mark.parametrize('file', TOKEN_NETWORKS)
def test_the_attention_of_a_location_depends_most_on_the_pixels_there(file):
    model, size = token_network(file)
    check_order(model, size, only_first=file in MIXING)


@pytest.mark.parametrize('file, pool', [('qwen3_vit', 'merge'), ('deepseek_vit', 'align')])
def test_joined_patches_stand_in_image_order(file, pool):
    model, size = token_network(file, encoder_pool=pool, out_features=32)
    check_order(model, size)


def check_order(model: nn.Module, size: tuple[int, int], only_first: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, *size, generator=generator).requires_grad_()
    stages = stage_maps(model, x)
    assert any(isinstance(stage.layout, Tokens) for stage, _ in stages)
    for _, maps in stages[:1] if only_first else stages:
        query = torch.randn(maps.shape[1], generator=generator) / maps.detach().std() / maps.shape[1] ** 0.5
        rows, columns = maps.shape[2:]
        attention = torch.einsum('d,dhw->hw', query, maps[0]).flatten().log_softmax(0).view(rows, columns)
        for row, column in ((0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3)):
            (gradient,) = torch.autograd.grad(attention[row, column], x, retain_graph=True)
            patches = nn.functional.adaptive_avg_pool2d(gradient.abs().sum(1), (rows, columns))[0]
            most = divmod(int(patches.argmax()), columns)
            # Overlapping patches and convolutions reach the neighbours.
            assert max(abs(most[0] - row), abs(most[1] - column)) <= 1, (most, (row, column))


@pytest.mark.parametrize('file', TOKEN_NETWORKS)
def test_maps_of_stages_are_those_of_timms_forward_intermediates(file):
    model, size = token_network(file)
    if not hasattr(model, 'forward_intermediates'):
        pytest.skip(f'{file} of timm {timm.__version__} has no forward_intermediates')
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stages = stage_maps(model, x)[:-1]
        every = model.forward_intermediates(x, output_fmt='NCHW', intermediates_only=True)
    found = 0
    for _, maps in stages:
        assert any(maps.shape == other.shape and torch.allclose(maps, other, atol=1e-5) for other in every)
        found += 1
    assert found > 1

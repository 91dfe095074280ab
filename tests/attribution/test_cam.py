"""The mathematics of class activation maps against float64 loops written from the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from references import count_masks
from torch import Tensor

from timm_castream.attribution.cam import (
    class_activation_map,
    grad_cam_pp_weights,
    grad_cam_weights,
    scale_maps,
    score_cam_weights,
)
from timm_castream.inference.images import in_batches
from timm_castream.inference.probabilities import probabilities

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1).double(), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1).double()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resized(channel: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Bilinear with corners on corners."""
    h, w = len(channel), len(channel[0])

    def at(y: float, x: float) -> float:
        top, left = min(int(y), h - 2), min(int(x), w - 2)
        dy, dx = y - top, x - left
        return (1 - dy) * ((1 - dx) * channel[top][left] + dx * channel[top][left + 1]) + dy * (
            (1 - dx) * channel[top + 1][left] + dx * channel[top + 1][left + 1]
        )

    return [[at(i * (h - 1) / (height - 1), j * (w - 1) / (width - 1)) for j in range(width)] for i in range(height)]


def scaled(values: list[list[float]]) -> list[list[float]]:
    low, high = min(map(min, values)), max(map(max, values))
    return [[(value - low) / (high - low) for value in row] for row in values]


@pytest.mark.parametrize('signed', [False, True])
def test_both_grad_cams_are_their_formulas(signed: bool) -> None:
    maps, gradients = draw(2, 4, 3, 5), draw(2, 2, 4, 3, 5, seed=1) + 0.3
    maps = maps if signed else maps.abs()
    cam = class_activation_map(maps, grad_cam_weights(gradients))
    cam_pp = class_activation_map(maps, grad_cam_pp_weights(maps, gradients))
    for b in range(2):
        for k in range(2):
            for result, plus in ((cam, False), (cam_pp, True)):
                total = [[0.0] * 5 for _ in range(3)]
                for d in range(4):
                    g = gradients[b, k, d].flatten().tolist()
                    a_sum = sum(maps[b, d].flatten().tolist())
                    weight = sum(max(0.0, v) * v**2 / (2 * v**2 + v**3 * a_sum) for v in g) if plus else sum(g) / len(g)
                    for i in range(3):
                        for j in range(5):
                            total[i][j] += weight * float(maps[b, d, i, j])
                expected = scaled([[max(0.0, v) for v in row] for row in total])
                assert max(map(max, expected)) == 1
                torch.testing.assert_close(result[b, k], torch.tensor(expected, dtype=torch.float64))


def test_grad_cam_pp_holds_for_gradients_whose_square_underflows() -> None:
    maps, gradients = draw(1, 3, 2, 2).abs().float(), torch.full((1, 1, 3, 2, 2), 1e-25)
    torch.testing.assert_close(grad_cam_pp_weights(maps, gradients), torch.full((1, 1, 3), 2e-25), rtol=1e-6, atol=0)


def test_grad_cam_pp_is_finite_where_its_denominator_is_zero() -> None:
    maps, gradients = -torch.ones(1, 1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2)
    assert grad_cam_pp_weights(maps, gradients).tolist() == [[[0.0]]]


@pytest.mark.parametrize('value', [-3.0, 0.0, 1e-30, 7.1])
def test_a_constant_map_gives_zeros(value: float) -> None:
    assert scale_maps(torch.full((2, 1, 3, 3), value)).eq(0).all()


@pytest.mark.parametrize('size', [3, 7, 10])
def test_constant_feature_maps_give_zeros_however_their_sum_is_rounded(size: int) -> None:
    maps = draw(1, 2048, 1, 1).float().expand(-1, -1, size, size)
    assert class_activation_map(maps, draw(1, 5, 2048, seed=1).float()).eq(0).all()


def test_scaling_reaches_zero_and_one_and_passes_nan_on() -> None:
    result = scale_maps(torch.stack([draw(2, 4), torch.full((2, 4), math.nan, dtype=torch.float64)]))
    assert result[0].min() == 0 and result[0].max() == 1
    assert result[1].isnan().all()


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('batch_size', [1000, 1, 3])
def test_score_cam_weights_are_probabilities_of_images_masked_before_normalisation(
    activation: str, batch_size: int
) -> None:
    maps, x = draw(2, 3, 2, 3), draw(2, 3, 4, 6, seed=1)
    targets = {'gap': torch.tensor([[0, 3], [2, 1]]), 'ca': torch.tensor([[1, 1], [0, 2]])}
    classifiers = {'gap': draw(72, 4, seed=2), 'ca': draw(72, 4, seed=3)}

    def predict(images: Tensor) -> dict[str, Tensor]:
        assert len(images) <= batch_size
        return {p: probabilities(images.flatten(1) @ weight, activation) for p, weight in classifiers.items()}

    weights = score_cam_weights(predict, x, maps, targets, MEAN, STD, in_batches(batch_size))
    for pooling, classifier in classifiers.items():
        for b in range(2):
            for d in range(3):
                mask = scaled(resized(maps[b, d].tolist(), 4, 6))
                logits = [0.0] * 4
                for n, (c, i, j) in enumerate((c, i, j) for c in range(3) for i in range(4) for j in range(6)):
                    mean, std = float(MEAN[c]), float(STD[c])
                    pixel = ((float(x[b, c, i, j]) * std + mean) * mask[i][j] - mean) / std
                    for k in range(4):
                        logits[k] += pixel * float(classifier[n, k])
                for k, target in enumerate(targets[pooling][b].tolist()):
                    exponent = [math.exp(v - logits[target]) for v in logits]
                    expected = 1 / sum(exponent) if activation == 'softmax' else 1 / (1 + math.exp(-logits[target]))
                    assert float(weights[pooling][b, k, d]) == pytest.approx(expected, rel=1e-9)


def test_score_cam_forwards_no_channel_that_is_constant_on_an_image() -> None:
    maps = draw(2, 4, 3, 3)
    maps[0, 1], maps[1, 2], maps[1, 3] = 0, 5, -2
    seen = []

    def forward(images: Tensor) -> dict[str, Tensor]:
        seen.append(len(images))
        return {'ca': probabilities(images.new_zeros(len(images), 2))}

    targets = {'ca': torch.zeros(2, 1, dtype=torch.long)}
    weights = score_cam_weights(forward, draw(2, 3, 6, 6), maps, targets, MEAN, STD, in_batches(2))
    assert seen == [2, 2, 1]
    assert weights['ca'][:, 0].tolist() == [[0.5, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]]


def test_score_cam_of_constant_maps_alone_forwards_nothing() -> None:
    def forward(images: Tensor) -> dict[str, Tensor]:
        raise AssertionError

    targets = {'gap': torch.zeros(1, 1, dtype=torch.long)}
    weights = score_cam_weights(forward, draw(1, 3, 6, 6), torch.ones(1, 2, 3, 3), targets, MEAN, STD, in_batches(4))
    assert weights['gap'].tolist() == [[[0, 0]]]


@pytest.mark.parametrize(('level', 'noise'), [(0.5, 1e-7), (-300.0, 3e-5), (1e-20, 1e-27), (7.0, 0.0)])
def test_a_map_that_varies_by_its_rounding_is_constant(level: float, noise: float) -> None:
    assert scale_maps((level + noise * draw(3, 9, 9)).float()).eq(0).all()
    varying = scale_maps((level + 1e4 * (noise or 1e-6) * draw(3, 9, 9)).float())
    assert varying.amin() == 0 and varying.amax() == 1


def test_one_location_is_constant() -> None:
    assert scale_maps(draw(3, 1, 1)).eq(0).all()


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_makes_its_map_nan_alone(value: float) -> None:
    maps = draw(2, 3, 3)
    maps[0, 1, 1] = value
    scaled = scale_maps(maps)
    assert scaled[0].isnan().all() and scaled[1].isfinite().all()


def test_terms_that_cancel_but_for_rounding_give_zeros() -> None:
    maps = draw(1, 64, 5, 5).float()
    weights = draw(1, 1, 64, 5, 5, seed=1).float()
    weights = weights - (weights * maps[:, None]).sum(2, keepdim=True) * maps[:, None] / (maps**2).sum(1)[:, None, None]
    left = (weights * maps[:, None]).sum(2)
    assert 0 < left.abs().max() < 1e-4  # noise, of 5 x 5 locations
    assert class_activation_map(maps, weights).eq(0).all()
    assert class_activation_map(maps, weights + 1e-3 * maps[:, None]).amax() == 1


@pytest.mark.parametrize('batch_size', [2, 100])
def test_score_cam_forwards_equal_masks_of_an_image_once_and_weighs_every_channel(batch_size: int) -> None:
    maps = draw(2, 9, 3, 4).float()
    maps[:, 1:4] = 0
    maps[:, 1, 0, 2], maps[:, 2, 0, 2], maps[:, 3, 1, 1] = 0.7, 1e-3, 0.3  # the mask of one location twice
    maps[0, 4] = 2.0 * maps[0, 5] + 1.0
    maps[0, 4] = maps[0, 4].round()
    maps[0, 5] = 4.0 * maps[0, 4]  # powers of two scale to equal masks exactly
    maps[1, 6] = 5.0
    x, classifier = draw(2, 3, 6, 8, seed=1).float(), draw(144, 4, seed=2).float()
    targets = {'gap': torch.tensor([[0, 3], [2, 1]]), 'ca': torch.tensor([[1, 1], [0, 2]])}
    seen = []

    def predict(images: Tensor) -> dict[str, Tensor]:
        seen.append(len(images))
        prob = (images.flatten(1) @ classifier).softmax(1)
        return {'gap': prob, 'ca': prob**2}

    weights = score_cam_weights(predict, x, maps, targets, MEAN.float(), STD.float(), in_batches(batch_size))
    assert sum(seen) == (9 - 2) + (9 - 1 - 1) == count_masks(maps)
    for image in range(2):  # one channel after the other, each forwarded alone
        for channel in range(9):
            alone = score_cam_weights(
                predict,
                x[image : image + 1],
                maps[image : image + 1, channel : channel + 1],
                {pooling: classes[image : image + 1] for pooling, classes in targets.items()},
                MEAN.float(),
                STD.float(),
                in_batches(1),
            )
            for pooling in targets:
                torch.testing.assert_close(
                    weights[pooling][image, :, channel], alone[pooling][0, :, 0], rtol=1e-5, atol=1e-7
                )

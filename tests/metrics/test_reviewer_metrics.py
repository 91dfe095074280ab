"""The metrics that reviewers ask for, from an evaluation, against loops over images and maps in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from test_imputation import dense_solution
from torch.utils.data import DataLoader, TensorDataset

import timm_castream  # noqa: F401 registers the models
from timm_castream.attribution import attribute
from timm_castream.evaluate import evaluate
from timm_castream.metrics import METRICS, ROAD_SHARES, road_curve
from timm_castream.metrics.measurements import References
from timm_castream.metrics.robustness import NOISE, NUM_NOISY, NUM_RANDOMISED, randomised, stability

SIDE, COUNT, SEED = 32, 3, 7
COLOUR = (0.9, 0.2, 0.4)
NAMES = tuple(name for name, row in METRICS.items() if 'boxes' not in row.needs and not row.in_default)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4, output_stride=8).eval()
    with torch.no_grad():  # probabilities that depend on the image
        model.get_classifier().weight.mul_(20)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias.normal_(std=0.3)
    return model


@pytest.fixture(scope='module')
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.nn.functional.interpolate(torch.randn(COUNT, 3, 16, 16, generator=generator), SIDE, mode='bicubic')


@pytest.fixture(scope='module')
def report(model, images):
    loader = DataLoader(TensorDataset(images, torch.arange(COUNT)), batch_size=2)
    return evaluate(model, loader, ['layer_cam', 'random'], metrics=NAMES, seed=SEED, curve_value=COLOUR)


def value(report, metric, method='layer_cam'):
    return report.values.pairs[f'gap/{method}/{metric}']


def resized(maps):
    return torch.nn.functional.interpolate(maps[:, None].double(), (SIDE, SIDE), mode='bilinear')[:, 0]


@pytest.fixture(scope='module')
def saliency(model, images):
    return resized(attribute(model, images, 'layer_cam', torch.arange(COUNT)))


@torch.no_grad()
def prob(model, x, label):
    return model(x[None].float()).double().softmax(1)[0, label].item()


def pixels_and_back(model):
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1).double() for name in ('mean', 'std'))
    return (lambda x: x.double() * std + mean), (lambda pixels: (pixels - mean) / std)


def order_of(saliency):
    """Pixels of a map, most salient first, equal ones in reading order."""
    return sorted(range(SIDE * SIDE), key=lambda i: (-saliency.flatten()[i].item(), i))


def test_none_of_them_is_measured_unless_it_is_asked_for():
    assert len(NAMES) == 19
    assert {'road_morf', 'road_lerf', 'adcc', 'randomisation', 'stability', 'insertion_share'} <= set(NAMES)


def test_road_is_the_mean_probability_after_dense_imputation(model, images, saliency, report):
    spreads = []
    for metric, most in (('road_morf', True), ('road_lerf', False)):
        for i in range(COUNT):
            noise = np.random.default_rng((SEED, i, 0)).standard_normal((3, SIDE, SIDE), dtype=np.float32)
            order, probabilities = order_of(saliency[i]), []
            for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
                count = round(share * SIDE * SIDE)
                removed = np.zeros(SIDE * SIDE, dtype=bool)
                removed[order[:count] if most else order[-count:]] = True
                removed = removed.reshape(SIDE, SIDE)
                filled = dense_solution(images[i].double().numpy(), removed) + 0.01 * noise * removed
                probabilities.append(prob(model, torch.from_numpy(filled), i))
            spreads.append(np.ptp(probabilities))
            assert value(report, metric)[i] == pytest.approx(100 * np.mean(probabilities), abs=0.02)
    assert max(spreads) > 0.005  # the pixels matter


def test_road_curve_gives_each_share_and_depends_neither_on_the_batch_nor_on_its_size(model, images, saliency):
    target = torch.arange(COUNT)
    together = road_curve(model, images, saliency, target)
    assert together.shape == (COUNT, len(ROAD_SHARES))
    torch.testing.assert_close(road_curve(model, images, saliency, target, batch_size=1), together, atol=1e-5, rtol=0)
    alone = road_curve(model, images[:1], saliency[:1], target[:1], shares=(0.5,))
    torch.testing.assert_close(alone[:, 0], together[:1, 3], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r'shares.*1\.5'):
        road_curve(model, images, saliency, target, shares=(0.5, 1.5))


def test_the_top_half_keeps_half_of_the_pixels_of_the_mask(model, images, saliency, report):
    to_pixels, to_input = pixels_and_back(model)
    for i in range(COUNT):
        mask = torch.zeros(SIDE * SIDE, dtype=torch.float64)
        kept = order_of(saliency[i])[: SIDE * SIDE // 2]
        mask[kept] = saliency[i].flatten()[kept]
        before = prob(model, images[i], i)
        after = prob(model, to_input(to_pixels(images[i]) * mask.view(SIDE, SIDE)), i)
        expected = {
            'average_drop_top50': 100 * max(0, before - after) / before,
            'average_gain_top50': 100 * max(0, after - before) / (1 - before),
            'average_increase_top50': 100 * (after > before),
        }
        for metric, number in expected.items():
            assert value(report, metric)[i] == pytest.approx(number, abs=0.01)


@pytest.mark.parametrize(
    ('metric', 'start', 'finish'),
    [
        ('insertion_share', 'blur', 'image'),
        ('deletion_share', 'image', 'mean'),
        ('insertion_black', 'black', 'image'),
        ('insertion_mean', 'mean', 'image'),
        ('deletion_black', 'image', 'black'),
        ('deletion_blur', 'image', 'blur'),
        ('insertion_value', 'colour', 'image'),
        ('deletion_value', 'image', 'colour'),
    ],
)
def test_curves_between_other_ends_are_areas_over_the_true_share(
    model, images, saliency, report, metric, start, finish
):
    _, to_input = pixels_and_back(model)
    kernel = torch.full((3, 1, 5, 5), 1 / 25, dtype=torch.float64)  # 5 x 5 with sigma 5 is a mean filter to 3e-6
    for i in range(COUNT):
        x = images[i].double()
        ends = {
            'image': x,
            'mean': torch.zeros_like(x),
            'black': to_input(torch.zeros_like(x)),
            'colour': to_input(torch.tensor(COLOUR, dtype=torch.float64)[:, None, None].expand_as(x)),
            'blur': torch.nn.functional.conv2d(x[None], kernel, padding=2, groups=3)[0],
        }
        order, step = order_of(saliency[i]), 8 * SIDE
        curve, shares = [], []
        for done in range(0, SIDE * SIDE + step, step):
            image = ends[start].clone().flatten(1)
            image[:, order[:done]] = ends[finish].flatten(1)[:, order[:done]]
            curve.append(prob(model, image.view_as(x), i))
            shares.append(min(done, SIDE * SIDE) / (SIDE * SIDE))
        assert value(report, metric)[i] == pytest.approx(100 * np.trapezoid(curve, shares), abs=0.01)


def test_areas_over_shares_give_one_half_for_the_share_of_pixels_left():
    """30 pixels in steps of 8: the last step has 6, which equal steps weigh as 8."""
    from timm_castream.metrics import area_over_shares, area_under_curve

    shares = torch.tensor([[0.0, 8, 16, 24, 30]]) / 30
    assert area_over_shares(1 - shares, shares).item() == pytest.approx(50)
    assert area_under_curve(1 - shares).item() == pytest.approx(47.5)


def test_coherency_complexity_and_their_mean_are_those_of_loops(model, images, saliency, report):
    to_pixels, to_input = pixels_and_back(model)
    for i in range(COUNT):
        masked = to_input(to_pixels(images[i]) * saliency[i]).float()
        again = resized(attribute(model, masked[None], 'layer_cam', torch.tensor([i])))[0]
        one, other = saliency[i].flatten().numpy(), again.flatten().numpy()
        coherency = 50 * (1 + np.corrcoef(one, other)[0, 1])
        complexity = 100 * one.mean()
        before, after = prob(model, images[i], i), prob(model, masked, i)
        drop = 100 * max(0, before - after) / before
        assert 1 < coherency < 99.999
        assert value(report, 'coherency')[i] == pytest.approx(coherency, abs=0.01)
        assert value(report, 'complexity')[i] == pytest.approx(complexity, abs=1e-4)
        mean = 3 / (1 / coherency + 1 / (100 - complexity) + 1 / (100 - drop))
        assert value(report, 'adcc')[i] == pytest.approx(mean, abs=0.01)


def test_randomisation_compares_with_networks_whose_last_layers_are_drawn_anew(model, images, saliency, report):
    ranks, similarities = np.zeros((2, COUNT, NUM_RANDOMISED))
    for number in range(1, NUM_RANDOMISED + 1):
        other = copy.deepcopy(model)
        layers = [layer for layer in other.modules() if [*layer.parameters(recurse=False)]]
        torch.manual_seed(SEED)
        for layer in layers[len(layers) - round(len(layers) * number / NUM_RANDOMISED) :]:
            layer.reset_parameters()
        maps = resized(attribute(other, images, 'layer_cam', torch.arange(COUNT)))
        for i in range(COUNT):
            pair = [m.numpy() for m in (saliency[i], maps[i])]
            constant = np.ptp(pair[1]) == 0
            ranks[i, number - 1] = 0 if constant else 100 * spearmanr(*(m.ravel() for m in pair)).statistic
            similarities[i, number - 1] = 100 * structural_similarity(
                *pair, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
    np.testing.assert_allclose(value(report, 'randomisation'), ranks.mean(1), atol=0.05)
    # scikit-image leaves the borders out of the mean, torchmetrics does not.
    np.testing.assert_allclose(value(report, 'randomisation_ssim'), similarities.mean(1), atol=4)
    np.testing.assert_allclose(value(report, 'randomisation', 'random'), 100)  # it does not read the network


def test_randomised_weights_are_put_back_even_after_an_error(model):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match='half way'), randomised(model, 1.0, 0):
        assert not torch.equal(model.get_classifier().weight, before['fc.weight'])
        raise RuntimeError('half way')
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stability_is_the_largest_relative_change_under_seeded_noise(model, images, saliency, report):
    to_pixels, to_input = pixels_and_back(model)
    for i in range(COUNT):
        changes = []
        for number in range(1, NUM_NOISY + 1):
            noise = np.random.default_rng((SEED, i, number)).standard_normal((3, SIDE, SIDE), dtype=np.float32)
            pixels = to_pixels(images[i])
            noisy = pixels + NOISE * torch.from_numpy(noise)
            again = resized(attribute(model, to_input(noisy).float()[None], 'layer_cam', torch.tensor([i])))[0]
            of_map = (again - saliency[i]).norm() / saliency[i].norm()
            changes.append((of_map / ((noisy - pixels).norm() / pixels.norm())).item())
        assert value(report, 'stability')[i] == pytest.approx(100 * max(changes), rel=2e-3)
    np.testing.assert_allclose(value(report, 'stability', 'random'), 0)


def test_a_map_of_zeros_changes_wholly_or_not_at_all():
    zeros, x = torch.zeros(2, 4, 4), torch.ones(2, 3, 4, 4)
    others = torch.stack([torch.zeros(4, 4), torch.eye(4)])[None]
    assert stability(zeros, others, x, 1.1 * x[None]).tolist() == pytest.approx([0, 100 / 0.1], rel=1e-5)


@pytest.mark.parametrize('metric', ['adcc', 'coherency', 'randomisation', 'randomisation_ssim', 'stability'])
def test_saved_maps_are_refused_where_other_images_would_be_explained(model, images, metric):
    loader = DataLoader(TensorDataset(images, torch.arange(COUNT)), batch_size=2)
    with pytest.raises(ValueError, match=rf"'{metric}'.*'saved'"):
        evaluate(model, loader, {'saved': np.ones((COUNT, 4, 4))}, metrics=('average_drop', metric))


def test_noise_depends_on_the_seed_and_the_image_alone(model, images):
    def noise(x, indices, seed):
        return References(None, x, {}, None, {}, torch.tensor(indices), seed).noise(2)

    whole = noise(images, [4, 5, 6], 0)
    torch.testing.assert_close(noise(images[1:], [5, 6], 0), whole[1:], rtol=0, atol=0)
    assert not torch.equal(noise(images, [4, 5, 6], 1), whole)
    assert abs(whole.std().item() - 1) < 0.05


def test_the_value_of_a_curve_is_refused_unless_it_is_a_colour(model, images):
    loader = DataLoader(TensorDataset(images, torch.arange(COUNT)))
    for given, said in (
        (1.5, r'curve_value must be in \[0, 1\].*1\.5'),
        ((0.1, 0.2), 'curve_value.*one per channel, got 2'),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(model, loader, ['random'], metrics=['insertion_value'], curve_value=given)


def test_a_folder_keeps_the_value_of_its_curves_alone(model, images, tmp_path):
    loader = DataLoader(TensorDataset(images, torch.arange(COUNT)))
    evaluate(model, loader, ['random'], metrics=['deletion_value'], curve_value=0.2, output_dir=tmp_path / 'value')
    with pytest.raises(ValueError, match='curve_value'):
        evaluate(model, loader, ['random'], metrics=['deletion_value'], output_dir=tmp_path / 'value')
    evaluate(model, loader, ['random'], metrics=['deletion_black'], curve_value=0.2, output_dir=tmp_path / 'black')
    evaluate(model, loader, ['random'], metrics=['deletion_black'], output_dir=tmp_path / 'black')

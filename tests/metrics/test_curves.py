"""The curves against float64 loops that change one pixel after the other."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.ndimage
import timm
import torch
from references import resized_bilinearly
from torch import nn

from timm_castream.inference.images import in_batches, resize_saliency
from timm_castream.metrics.curves import (
    CURVE_SETTINGS,
    blur,
    blur_kernel,
    deletion_curve,
    insertion_curve,
    perturbation_curves,
    saliency_rank,
)

CLASSES = 5


# ---------------------------------------------------------------- oracles: float64 loops


def impulse_kernel(kernel_size, sigma):
    impulse = np.zeros((kernel_size, kernel_size))
    impulse[kernel_size // 2, kernel_size // 2] = 1
    return scipy.ndimage.gaussian_filter(impulse, sigma)


def loop_blur(image, kernel_size, sigma):
    kernel = impulse_kernel(kernel_size, sigma)
    return np.stack([scipy.ndimage.convolve(channel, kernel, mode='constant', cval=0.0) for channel in image])


def loop_probability(model, image, target, activation='softmax'):
    with torch.no_grad():
        logits = model(torch.from_numpy(image)[None].double())[0].numpy()
    if activation == 'sigmoid':
        return 1 / (1 + np.exp(-logits[target]))
    return np.exp(logits[target]) / np.exp(logits).sum()


def loop_curve(model, start, finish, saliency, target, step, activation='softmax'):
    """One image: one pixel after the other, a forward after each step."""
    _, height, width = start.shape
    order = sorted(range(height * width), key=lambda i: -saliency.reshape(-1)[i])  # stable: ties in reading order
    image = start.copy()
    curve = [loop_probability(model, image, target, activation)]
    for count, pixel in enumerate(order, start=1):
        image[:, pixel // width, pixel % width] = finish[:, pixel // width, pixel % width]
        if count % step == 0 or count == len(order):
            curve.append(loop_probability(model, image, target, activation))
    return np.array(curve)


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=CLASSES).eval()
    with torch.no_grad():  # an untrained classifier hardly tells images apart
        model.fc.weight.normal_(std=2.0)
    return model


@pytest.fixture(scope='module')
def double_model(model):
    return copy.deepcopy(model).double()


@pytest.fixture
def batch():
    """3 images of 24 x 32, maps of 6 x 8 in 1/256: on this grid the resize to 24 x 32 is exact, ties included."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 24, 32, generator=generator)
    saliency = torch.randint(0, 257, (3, 6, 8), generator=generator) / 256
    return x, saliency, torch.tensor([0, 4, 2])


class PixelOrder:
    """A `predict` for images that turn from 0 to 1: keeps them, so a test sees which pixels changed when."""

    def __init__(self):
        self.images, self.batches = [], []

    def __call__(self, images, index):
        self.images.append(images.clone())
        self.batches.append(len(images))
        return images.flatten(1).mean(1)

    def order(self, num_points):
        """(rows, H * W) step at which each pixel changed."""
        images = torch.cat(self.images).flatten(1)
        return (1 - images.view(-1, num_points, images.shape[1])).sum(1)


def curves_of_maps(predict, start, finish, saliency, **kwargs):
    """(M, B, n + 1, ...) curves of M maps an image, (M, B, h, w)."""
    rank = saliency_rank(resize_saliency(saliency.flatten(0, 1), start.shape[2:]))
    image = torch.arange(len(start)).repeat(len(saliency))
    return perturbation_curves(predict, start, finish, rank, image=image, **kwargs).unflatten(0, saliency.shape[:2])


def pixel_order(saliency, size, **kwargs):
    seen = PixelOrder()
    zeros = torch.zeros(saliency.shape[1], 1, *size)
    curves_of_maps(seen, zeros, zeros + 1, saliency, step=1, **kwargs)
    return seen.order(size[0] * size[1] + 1)


# ---------------------------------------------------------------- blur


@pytest.mark.parametrize('kernel_size, sigma', [(5, 5.0), (11, 5.0), (11, 1.0), (3, 20.0), (1, 5.0), (7, 0.3)])
def test_the_kernel_is_an_impulse_filtered_with_mirrored_edges(kernel_size, sigma):
    np.testing.assert_allclose(blur_kernel(kernel_size, sigma).numpy(), impulse_kernel(kernel_size, sigma), atol=1e-15)


def test_the_kernel_of_the_paper_is_nearly_a_mean_filter_and_that_of_rise_is_not():
    assert (blur_kernel(5, 5.0) - 1 / 25).abs().max() < 3e-6
    rise = blur_kernel(11, 5.0)
    assert rise[5, 5].item() == pytest.approx(0.0088, abs=5e-5)
    assert rise[0, 0].item() == pytest.approx(0.0077, abs=5e-5)


@pytest.mark.parametrize('kernel_size, sigma', [(5, 5.0), (11, 5.0), (3, 0.8)])
def test_blur_pads_with_zeros_after_normalisation(batch, kernel_size, sigma):
    x = batch[0][:, :, :9]  # 9 rows: smaller than the largest kernel
    blurred = blur(x, kernel_size, sigma)
    for image, result in zip(x, blurred, strict=True):
        np.testing.assert_allclose(result.numpy(), loop_blur(image.double().numpy(), kernel_size, sigma), atol=1e-6)


def test_blur_keeps_float32_under_autocast(batch):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = blur(batch[0])
    assert inside.dtype == torch.float32 and torch.equal(inside, blur(batch[0]))


# ---------------------------------------------------------------- curves


@pytest.mark.parametrize(
    'kwargs, step, kernel_size, sigma',
    [
        ({}, 8 * 32, 5, 5.0),
        ({'setting': 'rise'}, 32, 11, 5.0),
        ({'step': 100, 'kernel_size': 3, 'sigma': 0.8}, 100, 3, 0.8),
        ({'step': 24 * 32}, 24 * 32, 5, 5.0),
        ({'step': 10**6}, 24 * 32, 5, 5.0),
    ],
)
def test_insertion_curve_equals_the_loop_over_pixels(model, double_model, batch, kwargs, step, kernel_size, sigma):
    x, saliency, target = batch
    curve = insertion_curve(model, x, saliency, target, **kwargs)
    for b in range(3):
        image = x[b].double().numpy()
        expected = loop_curve(
            double_model,
            loop_blur(image, kernel_size, sigma),
            image,
            resized_bilinearly(saliency[b].double().numpy(), 24, 32),
            target[b],
            step,
        )
        assert np.ptp(expected) > 0.02  # a curve that moves
        np.testing.assert_allclose(curve[b].numpy(), expected, atol=1e-5)
    assert curve.shape == (3, -(-24 * 32 // step) + 1) and curve.dtype == torch.float32


@pytest.mark.parametrize('kwargs, step', [({}, 8 * 32), ({'setting': 'rise'}, 32), ({'step': 100}, 100)])
@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_deletion_curve_equals_the_loop_over_pixels(model, double_model, batch, kwargs, step, activation):
    x, saliency, target = batch
    curve = deletion_curve(model, x, saliency, target, activation=activation, **kwargs)
    for b in range(3):
        image = x[b].double().numpy()
        expected = loop_curve(
            double_model,
            image,
            np.zeros_like(image),
            resized_bilinearly(saliency[b].double().numpy(), 24, 32),
            target[b],
            step,
            activation,
        )
        assert np.ptp(expected) > 0.02
        np.testing.assert_allclose(curve[b].numpy(), expected, atol=1e-5)


def test_ties_follow_in_reading_order_alone_and_in_a_batch():
    levels = torch.randint(0, 3, (1, 4, 6, 7), generator=torch.Generator().manual_seed(5)) / 2
    together = pixel_order(levels, (6, 7))
    for b in range(4):
        flat = levels[0, b].flatten().tolist()
        expected = torch.empty(42)
        for position, pixel in enumerate(sorted(range(42), key=lambda i: -flat[i])):
            expected[pixel] = position + 1
        assert torch.equal(together[b], expected)
        assert torch.equal(pixel_order(levels[:, b : b + 1], (6, 7))[0], expected)


def test_pixels_that_the_resize_repeats_at_the_edge_tie():
    """Outside the centres of the outermost locations all pixels take their value: rounding must not order them."""
    saliency = torch.rand(1, 8, 1, 7, generator=torch.Generator().manual_seed(6))
    order = pixel_order(saliency[:, :, None].flatten(1, 2), (3, 50))
    for row in order.view(8, 3, 50):  # the rows are equal, and 3 columns at each side
        steps = torch.cat([row[:, :4].flatten(), row[:, -4:].flatten()]).view(2, 12)
        for side in steps:
            assert side.max() - side.min() == 11 and torch.equal(side.sort().values, side)


@pytest.mark.parametrize('batch_size', [1, 5, 64])
def test_the_batch_size_never_shows(model, batch, batch_size):
    x, saliency, target = batch
    for curve in (insertion_curve, deletion_curve):
        torch.testing.assert_close(
            curve(model, x, saliency, target, step=50, batch_size=batch_size),
            curve(model, x, saliency, target, step=50),
            atol=1e-5,
            rtol=0,
        )


def test_no_more_images_than_the_batch_size_are_forwarded_at_once():
    seen = PixelOrder()
    start = torch.zeros(2, 1, 6, 6)
    curves_of_maps(seen, start, start + 1, torch.rand(3, 2, 4, 4), step=5, batches=in_batches(7))
    assert max(seen.batches) == 7 and sum(seen.batches) == 3 * 2 * 9


def test_channels_last_and_strided_inputs_give_the_same_curve(model, batch):
    x, saliency, target = batch
    expected = deletion_curve(model, x, saliency, target)
    strided = x.repeat_interleave(2, dim=3)[..., ::2]
    for same in (x.contiguous(memory_format=torch.channels_last), strided):
        torch.testing.assert_close(deletion_curve(model, same, saliency, target), expected, atol=1e-5, rtol=0)


def test_probabilities_are_float32_softmax_under_autocast(model, batch):
    x, saliency, target = batch
    with torch.autocast('cpu', dtype=torch.bfloat16):
        curve = deletion_curve(model, x, saliency, target, step=32)
    assert curve.dtype == torch.float32
    assert not torch.equal(curve, curve.bfloat16().float())


def test_the_class_is_the_one_asked_for_even_where_the_model_predicts_another(model, double_model, batch):
    x, saliency, _ = batch
    with torch.no_grad():
        misread = model(x).argmin(1)
    curve = deletion_curve(model, x, saliency, misread)
    for b in range(3):
        expected = loop_probability(double_model, x[b].double().numpy(), misread[b])
        assert curve[b, 0].item() == pytest.approx(expected, abs=1e-5)


def test_several_labels_an_image_are_rows_of_their_own(model, batch):
    x, saliency, _ = batch
    image, target = torch.tensor([0, 0, 2]), torch.tensor([1, 3, 4])
    together = deletion_curve(model, x[image], saliency[image], target, activation='sigmoid')
    for row in range(3):
        alone = deletion_curve(
            model, x[image[row : row + 1]], saliency[image[row : row + 1]], target[row : row + 1], activation='sigmoid'
        )
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=0)


def test_several_maps_and_columns_at_once_equal_curves_one_by_one(model, batch):
    x, saliency, target = batch
    maps = torch.stack([saliency, saliency.flip(1)])

    def predict(images, index):
        logits = model(images)
        return torch.stack([logits.softmax(1).gather(1, target[index % 3, None])[:, 0], logits.sigmoid()[:, 0]], dim=1)

    zeros = torch.zeros_like(x)
    everyone = torch.arange(3)
    ends = tuple(predict(images, everyone).detach().repeat(2, 1) for images in (x, zeros))
    whole = curves_of_maps(predict, x, zeros, maps, step=100)
    inner = curves_of_maps(predict, x, zeros, maps, step=100, ends=ends, batches=in_batches(4))
    assert whole.shape == (2, 3, 9, 2)
    torch.testing.assert_close(inner, whole, atol=1e-5, rtol=0)
    for m in range(2):
        torch.testing.assert_close(
            whole[m, :, :, 0], deletion_curve(model, x, maps[m], target, step=100), atol=1e-5, rtol=0
        )
        first_class = deletion_curve(model, x, maps[m], torch.zeros_like(target), step=100, activation='sigmoid')
        torch.testing.assert_close(whole[m, :, :, 1], first_class, atol=1e-5, rtol=0)


def test_known_ends_are_not_forwarded_again():
    seen = PixelOrder()
    start, finish = torch.zeros(2, 1, 6, 6), torch.ones(2, 1, 6, 6)
    saliency = torch.rand(3, 2, 6, 6)
    curves = curves_of_maps(seen, start, finish, saliency, step=12, ends=(torch.zeros(6), torch.ones(6)))
    torch.testing.assert_close(curves, torch.tensor([0, 1 / 3, 2 / 3, 1]).expand(3, 2, 4))
    assert sum(seen.batches) == 3 * 2 * 2
    one_step = curves_of_maps(seen, start, finish, saliency, step=36, ends=(torch.zeros(6), torch.ones(6)))
    assert torch.equal(one_step, torch.tensor([0.0, 1.0]).expand(3, 2, 2))


def test_the_model_runs_in_eval_mode_without_gradients_and_stays_as_it_was(batch):
    x, saliency, target = batch
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    model.train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    curve = insertion_curve(model, x.requires_grad_(), saliency, target)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not curve.requires_grad
    torch.testing.assert_close(curve, insertion_curve(model.eval(), x, saliency, target))


def test_the_mode_comes_back_after_an_error(batch):
    x, saliency, target = batch
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, CLASSES)).train()
    with pytest.raises(RuntimeError):
        insertion_curve(model, x, saliency, target)
    assert all(module.training for module in model.modules())


def test_any_module_and_number_of_channels_will_do():
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(2, 4, 9, 5, generator=generator)
    curve = insertion_curve(model, x, torch.rand(2, 3, 3, generator=generator), torch.tensor([2, 1]), setting='rise')
    expected = model(x).softmax(1)[torch.arange(2), torch.tensor([2, 1])]
    torch.testing.assert_close(curve[:, -1], expected.detach())
    assert curve.shape == (2, 10)


def test_both_published_settings_have_a_name():
    assert CURVE_SETTINGS == {'paper': (8, 5, 5.0), 'rise': (1, 11, 5.0)}


def test_a_setting_by_name_gives_the_single_arguments_and_refuses_them_beside_it(model, batch):
    rise = {'step': 32, 'kernel_size': 11, 'sigma': 5.0}
    for curve, names in ((insertion_curve, ('step', 'kernel_size', 'sigma')), (deletion_curve, ('step',))):
        others = dict(zip(names, (100, 3, 0.8), strict=False))
        expected = curve(model, *batch, **{name: rise[name] for name in names})
        assert torch.equal(curve(model, *batch, setting='rise'), expected)
        assert not torch.equal(curve(model, *batch, **others), expected)
        for name, value in others.items():
            with pytest.raises(ValueError, match=f"setting='rise' gives {name} already"):
                curve(model, *batch, setting='rise', **{name: value})


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'saliency, message',
    [
        (torch.rand(2, 6, 8), r'saliency must have shape \(3, h, w\), one map an image, got \(2, 6, 8\)'),
        (torch.rand(3, 1, 6, 8), r'got \(3, 1, 6, 8\)'),
        (torch.rand(6, 8), r'got \(6, 8\)'),
        (torch.rand(3, 6, 8) + 1, r'saliency must lie in \[0, 1\]'),
        (torch.full((3, 6, 8), float('nan')), r'saliency must lie in \[0, 1\], got nan'),
    ],
)
def test_bad_saliency_is_refused(model, batch, saliency, message):
    x, _, target = batch
    for call in (insertion_curve, deletion_curve):
        with pytest.raises(ValueError, match=message):
            call(model, x, saliency, target)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'target': torch.tensor([0, 1])}, r'target must be a tensor of shape \(3,\), one class an image, got \(2,\)'),
        ({'target': torch.tensor([[0], [1], [2]])}, r'got \(3, 1\)'),
        ({'target': 3}, r'target must be a tensor of shape \(3,\), one class an image, got int'),
        ({'target': [0, 1, 2]}, 'got list'),
        ({'target': torch.rand(3)}, 'class indices, got torch.float32'),
        ({'target': torch.tensor([0, -1, 2])}, 'has classes from -1 to 2, class indices start at 0'),
        ({'target': torch.tensor([0, 5, 2])}, 'target has classes from 0 to 5, the model has 0 to 4'),
        ({'x': torch.rand(3, 24, 32)}, r'x must hold normalised images of shape \(B, C, H, W\), got \(3, 24, 32\)'),
        ({'x': torch.zeros(3, 3, 24, 32, dtype=torch.uint8)}, 'of torch.uint8'),
        ({'x': torch.full((3, 3, 24, 32), float('nan'))}, 'x must be finite'),
        ({'step': 0}, 'step must be a positive int, got 0'),
        ({'step': 2.5}, 'step must be a positive int, got 2.5'),
        ({'batch_size': -1}, 'batch_size must be a positive int, got -1'),
        ({'setting': 'rize'}, r"setting 'rize' is unknown \(did you mean 'rise'\?\), valid ones: 'paper', 'rise'"),
        ({'activation': 'relu'}, "activation 'relu' is unknown, valid ones: 'softmax', 'sigmoid'"),
    ],
)
def test_bad_arguments_of_curves_are_refused(model, batch, change, message):
    x, saliency, target = batch
    arguments = {'x': x, 'saliency': saliency, 'target': target, **change}
    for call in (insertion_curve, deletion_curve):
        with pytest.raises(ValueError, match=message):
            call(model, **arguments)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'kernel_size': 4}, 'kernel_size must be odd, got 4'),
        ({'kernel_size': 0}, 'kernel_size must be a positive int, got 0'),
        ({'sigma': 0.0}, 'sigma must be positive and finite, got 0'),
        ({'sigma': float('nan')}, 'sigma must be positive and finite, got nan'),
    ],
)
def test_a_bad_blur_is_refused(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        insertion_curve(model, *batch, **change)


def test_maps_for_another_number_of_images_are_refused():
    start = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r'rank must have shape \(2, 4, 4\), got \(3, 4, 4\)'):
        perturbation_curves(PixelOrder(), start, start + 1, saliency_rank(torch.rand(3, 4, 4)), step=4)

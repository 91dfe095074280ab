from __future__ import annotations

import numpy as np
import pytest
import torch

from timm_castream.metrics.imputation import linear_imputation

WEIGHTS = {
    (dy, dx): (1 / 6 if 0 in (dy, dx) else 1 / 12) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)
}


def dense_solution(x: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """One equation a removed pixel, from the paper's text, solved densely in float64."""
    height, width = removed.shape
    unknowns = [(y, x) for y in range(height) for x in range(width) if removed[y, x]]
    number = {place: i for i, place in enumerate(unknowns)}
    matrix, right = np.zeros((len(unknowns), len(unknowns))), np.zeros((len(unknowns), len(x)))
    for (row, column), i in number.items():
        for (dy, dx), weight in WEIGHTS.items():
            place = row + dy, column + dx
            if 0 <= place[0] < height and 0 <= place[1] < width:
                matrix[i, i] += weight
                if place in number:
                    matrix[i, number[place]] -= weight
                else:
                    right[i] += weight * x[:, place[0], place[1]]
    solved = x.copy()
    for (row, column), values in zip(unknowns, np.linalg.solve(matrix, right), strict=True):
        solved[:, row, column] = values
    return solved


@pytest.mark.parametrize(('height', 'width'), [(17, 23), (8, 8), (5, 40), (3, 3), (1, 9)])
@pytest.mark.parametrize('share', [0.02, 0.5, 0.9])
def test_removed_pixels_solve_the_equations_of_the_paper(height, width, share):
    rng = np.random.default_rng(height + width)
    x = rng.normal(size=(3, 2, height, width))
    removed = np.zeros((3, height, width), dtype=bool)
    removed[0] = rng.random((height, width)) < share  # single pixels
    removed[1, : max(1, int(share * height))] = True  # a border
    removed[2, :, : max(1, int(share * width))] = True
    removed[:, -1, -1] = False
    solved = linear_imputation(torch.from_numpy(x), torch.from_numpy(removed)).numpy()
    for one, image, mask in zip(solved, x, removed, strict=True):
        np.testing.assert_allclose(one, dense_solution(image, mask), atol=2e-3 * abs(x).max())
        np.testing.assert_array_equal(one[:, ~mask], image[:, ~mask])


def test_a_large_hole_in_float32_is_as_exact():
    generator = torch.Generator().manual_seed(0)
    # Smooth images, whose holes are far from constant.
    x = torch.nn.functional.interpolate(torch.randn(1, 3, 5, 5, generator=generator), 48, mode='bicubic')
    removed = torch.zeros(1, 48, 48, dtype=torch.bool)
    removed[:, 3:44, 4:45] = True
    solved = linear_imputation(x, removed)
    expected = dense_solution(x[0].double().numpy(), removed[0].numpy())
    np.testing.assert_allclose(solved[0], expected, atol=5e-3 * float(x.abs().max()))


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 12, 12, generator=generator, dtype=torch.float64)
    removed = torch.rand(3, 12, 12, generator=generator) < torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    together = linear_imputation(x, removed)
    for i in range(3):
        torch.testing.assert_close(
            linear_imputation(x[i : i + 1], removed[i : i + 1])[0], together[i], atol=1e-12, rtol=0
        )


def test_an_image_without_a_kept_pixel_becomes_zeros_and_the_noise_is_added_to_removed_pixels():
    x = torch.ones(2, 1, 4, 4)
    removed = torch.ones(2, 4, 4, dtype=torch.bool)
    removed[1, :2] = False
    noise = torch.arange(16.0).view(1, 4, 4)
    solved = linear_imputation(x, removed, noise)
    torch.testing.assert_close(solved[0], noise)
    torch.testing.assert_close(solved[1, :, 2:], 1 + noise[:, 2:], atol=1e-3, rtol=0)
    torch.testing.assert_close(solved[1, :, :2], x[1, :, :2])


@pytest.mark.parametrize(
    'removed', [torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(1, 4, 4)], ids=['shape', 'type']
)
def test_masks_that_do_not_fit_are_refused(removed):
    with pytest.raises(ValueError, match='removed must be bool'):
        linear_imputation(torch.zeros(1, 1, 4, 4), removed)

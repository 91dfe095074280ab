"""Boxes of the connected components of a map above every level at once.

Labelling the pixels above each of 256 levels anew costs 256 passes over the map. Here steepest ascent divides the
pixels into basins, one a local maximum. Above a level, a component is a union of the remains of some basins, and two
basins join at the highest level that a path between them keeps. So one pass over the pairs of touching basins, highest
first, gives the components above all levels (Kruskal's algorithm).

An extent is -x0, -y0, x1, y1 of a set of pixels, x1 and y1 inside: the elementwise maximum over its pixels.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NUM_LEVELS = 256


def component_boxes(values: Tensor, min_area: float = 0.) -> tuple[Tensor, Tensor]:
    """The tight boxes of the 8-connected components of [floor(255 S) > k], for k from 0 to 254.

    Args:
        values: S, (H, W) float64 on the CPU, whose minimum is 0 and whose maximum is 1.
        min_area: Components whose box, with one more row and column, has fewer pixels may be left out.

    Returns:
        (M,) the k of each component, and (M, 4) float64 corners x0, y0, x1, y1 of its box; x1 and y1 lie inside.
    """
    height, width = values.shape
    levels = (values * (NUM_LEVELS - 1)).long()
    basin, peaks = _basins(values)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    pixels = torch.stack((-x, -y, x, y), -1).flatten(0, 1)
    extents = _extents(pixels, basin.flatten(), len(peaks)).numpy().tolist()
    joins = _join(_touching(basin, levels), extents)

    # Noise has thousands of components, nearly all of them too small. The pixels of a small one count for the large one
    # that it joins, from the level on at which it joins.
    is_large = np.array([_area(extent) >= min_area for extent in extents])
    home, entry = list(range(len(peaks))), [NUM_LEVELS - 1] * len(peaks)
    for level, a, b in reversed(joins):
        if not is_large[b]:
            home[b], entry[b] = home[a], min(level, entry[a])
    homes, entries = torch.tensor(home)[basin.flatten()], torch.tensor(entry)[basin.flatten()]
    kept = torch.from_numpy(is_large)[homes]
    row_of = np.cumsum(is_large) - 1
    slots = torch.from_numpy(row_of)[homes] * NUM_LEVELS + torch.minimum(levels.flatten(), entries)
    num_rows = int(is_large.sum())
    rows = _extents(pixels[kept], slots[kept], num_rows * NUM_LEVELS).view(num_rows, NUM_LEVELS, 4)
    rows = rows.flip(1).cummax(1).values.flip(1)  # of the pixels of at least each level
    top = levels.flatten()[peaks].numpy()[is_large].tolist()  # a component exists at k < top

    ks, found = [torch.arange(0)], [pixels[:0]]

    def note(row: int, bottom: int) -> None:
        ks.append(torch.arange(bottom, top[row]))
        found.append(rows[row, bottom + 1:top[row] + 1].clone())

    for level, a, b in joins:
        if is_large[b]:
            a, b = row_of[[a, b]].tolist()
            note(a, level)
            note(b, level)
            top[a], top[b] = level, 0
            rows[a, :level + 1] = torch.maximum(rows[a, :level + 1], rows[b, :level + 1])
    for row in range(num_rows):
        note(row, 0)
    return torch.cat(ks), torch.cat(found) * torch.tensor([-1., -1., 1., 1.], dtype=torch.float64)


def _basins(values: Tensor) -> tuple[Tensor, Tensor]:
    """(H, W) index of each pixel's basin, and (N,) the flat index of each basin's highest pixel."""
    rank = torch.empty(values.numel(), dtype=torch.float64)  # unlike values, ranks never tie
    rank[values.flatten().argsort(stable=True)] = torch.arange(values.numel(), dtype=torch.float64)
    ascent = F.max_pool2d(rank.view(1, 1, *values.shape), 3, 1, 1, return_indices=True)[1].flatten()
    while not torch.equal(ascent, higher := ascent[ascent]):
        ascent = higher
    peaks, basin = ascent.unique(return_inverse=True)
    return basin.view(values.shape), peaks


def _touching(basin: Tensor, levels: Tensor) -> list[list[int]]:
    """The pairs of basins that touch above level 0, highest first: [level, a, b].

    The level is the highest l such that a pixel of a and a pixel of b, both of at least l, are 8-neighbours.
    """
    num_basins = int(basin.max()) + 1
    keys = []
    for here, there in (
            (np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:]),
            (np.s_[:-1, :-1], np.s_[1:, 1:]), (np.s_[:-1, 1:], np.s_[1:, :-1])):
        level = torch.minimum(levels[here], levels[there])
        kept = (basin[here] != basin[there]) & (level > 0)
        a, b = basin[here][kept], basin[there][kept]
        keys.append((torch.minimum(a, b) * num_basins + torch.maximum(a, b)) * NUM_LEVELS + level[kept])
    key = torch.cat(keys).sort(descending=True).values
    pair = key // NUM_LEVELS
    highest = torch.ones_like(pair, dtype=torch.bool)
    highest[1:] = pair[1:] != pair[:-1]
    level, pair = key[highest] % NUM_LEVELS, pair[highest]
    order = level.argsort(descending=True)
    # numpy's tolist is several times as fast as torch's.
    return torch.stack((level, pair // num_basins, pair % num_basins), 1)[order].numpy().tolist()


def _join(touching: list[list[int]], extents: list[list[int]]) -> list[tuple[int, int, int]]:
    """Joins touching basins into components: (level, a, b), highest first; b ends in a, whose box is no smaller.

    A component has the index of one of its basins. `extents`, those of the basins, become those of the components.
    """
    root = list(range(len(extents)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    joins = []
    for level, a, b in touching:
        a, b = find(a), find(b)
        if a != b:
            if _area(extents[a]) < _area(extents[b]):
                a, b = b, a
            root[b] = a
            extents[a] = list(map(max, extents[a], extents[b]))
            joins.append((level, a, b))
    return joins


def _extents(pixels: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """(num_groups, 4) extents of groups of pixels, given (P, 4) pixels and the (P,) index of the group of each."""
    nothing = pixels.new_full((num_groups, 4), -2 ** 31)
    return nothing.scatter_reduce_(0, groups[:, None].expand(-1, 4), pixels, 'amax')


def _area(extent: list[int]) -> int:
    """Pixels of the box of an extent, with one more row and column."""
    return (extent[0] + extent[2] + 2) * (extent[1] + extent[3] + 2)

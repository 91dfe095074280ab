"""Boxes of the connected components of a map above every level at once.

Labelling the pixels above each of 256 levels anew costs 256 passes over the map. Here steepest ascent divides the
pixels into basins, one a local maximum. Above a level, a component is a union of the remains of some basins, and two
basins join at the highest level that a path between them keeps. So one pass over the pairs of touching basins, highest
first, gives the components above all levels (Kruskal's algorithm).

An extent is -x0, -y0, x1, y1 of a set of pixels, x1 and y1 inside: the elementwise maximum over its pixels.
"""

from __future__ import annotations

import numpy as np

NUM_LEVELS = 256


def component_boxes(values: np.ndarray, min_area: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The tight boxes of the 8-connected components of [floor(255 S) > k], for k from 0 to 254.

    Args:
        values: S, (H, W) float64 whose minimum is 0 and whose maximum is 1.
        min_area: Components whose box, with one more row and column, has fewer pixels may be left out.

    Returns:
        (M,) the k of each component, and (M, 4) corners x0, y0, x1, y1 of its box; x1 and y1 lie inside.
    """
    levels = (values * (NUM_LEVELS - 1)).astype(np.int64)
    basin, peaks = _basins(values)
    y, x = np.indices(values.shape)
    pixels = np.stack((-x.ravel(), -y.ravel(), x.ravel(), y.ravel()))
    extents = _extents(pixels, basin.ravel(), len(peaks)).T.tolist()
    joins = _join(_touching(basin, levels), extents)

    # Noise has thousands of components, nearly all of them too small. The pixels of a small one count for the large one
    # that it joins, from the level on at which it joins.
    is_large = np.array([_area(extent) >= min_area for extent in extents])
    home, entry = list(range(len(peaks))), [NUM_LEVELS - 1] * len(peaks)
    for level, a, b in reversed(joins):
        if not is_large[b]:
            home[b], entry[b] = home[a], min(level, entry[a])
    homes, entries = np.array(home)[basin.ravel()], np.array(entry)[basin.ravel()]
    kept = is_large[homes]
    row_of, num_rows = np.cumsum(is_large) - 1, int(is_large.sum())
    slots = row_of[homes] * NUM_LEVELS + np.minimum(levels.ravel(), entries)
    rows = _extents(pixels[:, kept], slots[kept], num_rows * NUM_LEVELS).reshape(4, num_rows, NUM_LEVELS)
    rows = np.maximum.accumulate(rows[..., ::-1], axis=2)[..., ::-1]  # of the pixels of at least each level
    top = levels.ravel()[peaks][is_large].tolist()  # a component exists at k < top

    ks, found = [np.arange(0)], [pixels[:, :0]]

    def note(row: int, bottom: int) -> None:
        ks.append(np.arange(bottom, top[row]))
        found.append(rows[:, row, bottom + 1 : top[row] + 1].copy())

    for level, a, b in joins:
        if is_large[b]:
            a, b = row_of[[a, b]].tolist()
            note(a, level)
            note(b, level)
            top[a], top[b] = level, 0
            rows[:, a, : level + 1] = np.maximum(rows[:, a, : level + 1], rows[:, b, : level + 1])
    for row in range(num_rows):
        note(row, 0)
    return np.concatenate(ks), np.concatenate(found, axis=1).T * (-1, -1, 1, 1)


def _basins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) index of each pixel's basin, and (N,) the flat index of each basin's highest pixel."""
    height, width = values.shape
    order = np.argsort(values, axis=None, kind='stable')
    ranks = np.full((height + 2, width + 2), -1)  # unlike values, ranks never tie
    ranks[1:-1, 1:-1].flat[order] = np.arange(len(order))
    highest = ranks[1:-1, 1:-1].copy()
    for i in range(3):
        for j in range(3):
            np.maximum(highest, ranks[i : i + height, j : j + width], out=highest)
    ascent = order[highest.ravel()]
    while not np.array_equal(ascent, higher := ascent[ascent]):
        ascent = higher
    is_peak = ascent == np.arange(len(ascent))
    return (np.cumsum(is_peak) - 1)[ascent].reshape(values.shape), np.flatnonzero(is_peak)


def _touching(basin: np.ndarray, levels: np.ndarray) -> list[list[int]]:
    """The pairs of basins that touch above level 0, highest first: [level, a, b].

    The level is the highest l such that a pixel of a and a pixel of b, both of at least l, are 8-neighbours.
    """
    num_basins = int(basin.max()) + 1
    keys = []
    for here, there in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    ):
        level = np.minimum(levels[here], levels[there])
        kept = (basin[here] != basin[there]) & (level > 0)
        a, b = basin[here][kept], basin[there][kept]
        keys.append((np.minimum(a, b) * num_basins + np.maximum(a, b)) * NUM_LEVELS + level[kept])
    key = np.sort(np.concatenate(keys))
    pair = key // NUM_LEVELS
    is_highest = np.ones(len(key), dtype=bool)
    is_highest[:-1] = pair[1:] != pair[:-1]
    level, pair = key[is_highest] % NUM_LEVELS, pair[is_highest]
    return np.stack((level, pair // num_basins, pair % num_basins), 1)[np.argsort(-level, kind='stable')].tolist()


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


def _extents(pixels: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """(4, num_groups) extents of groups of pixels, given (4, P) pixels and the (P,) index of the group of each."""
    extents = np.full((4, num_groups), -(2**31))
    for extent, coordinate in zip(extents, pixels, strict=True):
        np.maximum.at(extent, groups, coordinate)
    return extents


def _area(extent: list[int]) -> int:
    """Pixels of the box of an extent, with one more row and column."""
    return (extent[0] + extent[2] + 2) * (extent[1] + extent[3] + 2)

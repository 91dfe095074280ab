"""The feature maps of a frozen network: kept on disk in float16, or made anew whenever they are read.

Letters: B images of a batch, N of the data set, D channels, H x W locations, L the last stage.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .._utils.files import make_folder, write_whole
from ..datasets import read_batches
from .network import FrozenNetwork

CHUNK = 64
"""Images of one forward while maps are written. A kill loses one chunk."""

_logger = logging.getLogger(__name__)


class Features(Protocol):
    """The maps of the images of a data set, by their index."""

    def batches(self, parts: Sequence[Tensor], start: int, epoch: int = 0) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Maps of the stages from `start` on, each (B, D_l, H_l, W_l) in float32, and pooled vectors, (B, D_L).

        Args:
            parts: The indices of each batch, (B,).
            start: Index of the first stage.
            epoch: The epoch, for images that differ from epoch to epoch.
        """
        ...


class CachedFeatures:
    """The maps and pooled vectors of a data set on disk, in the order of the data set.

    Args:
        folder: A folder that `write_features` completed.
        device: Device of the maps that are read.

    Attributes:
        first: Index of the first stage that was kept.
        stages: One memory map a stage, (N, D_l, H_l, W_l) in float16.
        pooled: (N, D_L) in float32, on the CPU. Rows of images that could not be read are 0.
        readable: (N,) bool.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = 'cpu') -> None:
        folder = Path(folder)
        facts = json.loads((folder / 'facts.json').read_text(encoding='utf-8'))
        self.device = torch.device(device)
        self.first: int = facts['first']
        self.stages = [np.load(folder / f'stage{i}.npy', mmap_mode='r') for i in facts['kept']]
        self.pooled = torch.from_numpy(np.load(folder / 'pooled.npy'))
        self.readable = torch.from_numpy(np.load(folder / 'readable.npy'))

    def __len__(self) -> int:
        return len(self.pooled)

    def read(self, indices: Tensor, start: int) -> list[Tensor]:
        """The maps of these images from stage `start` on, each (B, D_l, H_l, W_l) in float32."""
        rows = indices.numpy()
        return [torch.from_numpy(stage[rows]).to(self.device).float() for stage in self.stages[start - self.first :]]

    def batches(self, parts: Sequence[Tensor], start: int, epoch: int = 0) -> Iterator[tuple[list[Tensor], Tensor]]:
        """See `Features`."""
        for part in parts:
            yield self.read(part, start), self.pooled[part].to(self.device)


class LiveFeatures:
    """The maps of a data set by a forward of the network for each batch.

    Args:
        network: The network.
        dataset_of: The data set of images of an epoch, each item an image and a label.
        workers: Processes that read images.
    """

    def __init__(self, network: FrozenNetwork, dataset_of: Callable[[int], Dataset], workers: int = 0) -> None:
        self.network = network
        self.dataset_of = dataset_of
        self.workers = workers

    def batches(self, parts: Sequence[Tensor], start: int, epoch: int = 0) -> Iterator[tuple[list[Tensor], Tensor]]:
        """See `Features`."""
        loader = DataLoader(
            self.dataset_of(epoch), batch_sampler=[part.tolist() for part in parts], num_workers=self.workers
        )
        for x, _ in loader:
            yield self.network.run(x.to(self.network.device), start)


def bytes_per_image(network: FrozenNetwork, x: Tensor, start: int) -> int:
    """Bytes on disk of the kept maps of one image.

    Args:
        network: The network.
        x: (1, channels, H, W) an image.
        start: Index of the first stage that is kept.
    """
    with network.frozen():
        maps, pooled = network.run(x.to(network.device), start)
    return 2 * sum(features[0].numel() for features in maps) + 4 * pooled[0].numel()


def write_features(
    network: FrozenNetwork,
    dataset: Any,
    folder: str | Path,
    start: int = 0,
    *,
    facts: Mapping[str, Any],
    workers: int = 0,
    progress: bool = False,
) -> CachedFeatures:
    """Runs the network once over a data set and keeps its maps. A second call resumes after a kill.

    A folder that holds the same images' maps from an earlier stage on is taken as it is.

    Args:
        network: The network.
        dataset: A data set with indices, each item an image and a label. An image that cannot be read is named in a
            warning, and its rows stay 0.
        folder: Gets `stageN.npy`, `pooled.npy`, `readable.npy` and `facts.json`.
        start: Index of the first stage to keep. `len(network.stages)` keeps the pooled vectors alone.
        facts: What the maps depend on, plain data: the weights, the images, the transform.
        workers: Processes that read images.
        progress: Show a progress bar.

    Returns:
        The maps.

    Raises:
        ValueError: If the folder holds the maps of other images or of another network, or float16 cannot hold a map.
    """
    folder = make_folder(folder)
    facts = json.loads(
        json.dumps({**facts, 'stages': [stage.name for stage in network.stages], 'images': len(dataset)})
    )
    path, progress_path = folder / 'facts.json', folder / 'progress.json'
    count = 0
    if path.is_file():
        found = json.loads(path.read_text(encoding='utf-8'))
        first, kept = found.pop('first'), found.pop('kept')
        if found != facts:
            wrong = [name for name in sorted({*found, *facts}) if found.get(name) != facts.get(name)]
            raise ValueError(
                f'{folder} holds the maps of another fit ({", ".join(wrong)} differ): name another folder.'
            )
        if first > start:
            path.unlink()  # it lacks stages
        else:
            start = first
            count = json.loads(progress_path.read_text(encoding='utf-8')) if progress_path.is_file() else 0
    kept = list(range(start, len(network.stages)))
    names = [f'stage{i}' for i in kept] + ['pooled', 'readable']
    arrays = [np.load(folder / f'{name}.npy', mmap_mode='r+') for name in names if count]
    loader = DataLoader(dataset, num_workers=workers)
    chunks = [range(i, min(i + CHUNK, len(dataset))) for i in range(count, len(dataset), CHUNK)]
    bar = tqdm(desc='feature maps', total=len(dataset), initial=count, unit='image', disable=not progress or not chunks)
    with bar, network.frozen():
        waiting: list[tuple[range, list[int]]] = []
        for chunk, (indices, x, _, lost) in zip(chunks, read_batches(loader, chunks), strict=True):
            for item in lost:
                _logger.warning('%s cannot be read and is left out: %s', item.name, item.reason)
            waiting.append((chunk, indices))
            if not indices and not arrays:
                continue  # the shapes are not known yet
            values = _values(network, x, start) if indices else []
            if not arrays:
                arrays = _new_arrays(folder, names, len(dataset), values)
                with write_whole(path) as file:
                    json.dump({**facts, 'first': start, 'kept': kept}, file)
            for rows, readable in waiting:
                for array, value in zip(arrays, values if readable else [], strict=False):
                    array[readable] = value
                arrays[-1][list(rows)] = [row in set(readable) for row in rows]
            waiting.clear()
            with write_whole(progress_path) as file:
                json.dump(chunk.stop, file)
            bar.update(len(chunk))
    if not arrays:
        raise ValueError('None of the images can be read.')
    return CachedFeatures(folder, network.device)


def _values(network: FrozenNetwork, x: Tensor, start: int) -> list[np.ndarray]:
    """The rows of each array for a batch of images."""
    maps, pooled = network.run(x.to(network.device), start)
    values = []
    for stage, features in zip(network.stages[start:], maps, strict=True):
        half = features.half()
        if not half.isfinite().all():
            raise ValueError(
                f'The map of {stage.name} reaches {features.abs().max().item():.3g}, which float16 cannot hold: set '
                'the cache size to 0, so that no map is kept.'
            )
        values.append(half.cpu().contiguous().numpy())
    return [*values, pooled.float().cpu().numpy()]


def _new_arrays(folder: Path, names: Sequence[str], count: int, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Files of `count` rows for maps and pooled vectors, and the one of readable images."""
    shapes = [(value.dtype, value.shape[1:]) for value in values] + [(np.dtype(bool), ())]
    return [
        np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', dtype, (count, *shape))
        for name, (dtype, shape) in zip(names, shapes, strict=True)
    ]

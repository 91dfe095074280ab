"""The feature maps of the frozen network on disk, in float16, so that an epoch of a stream takes seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from timm_castream.backbones.stages import eval_mode

from .images import Images

CHUNK = 64


class Maps:
    """The maps of every stage of a set of images, memory mapped.

    Args:
        folder: A folder that `write_maps` completed.

    Attributes:
        stages: One array a stage, (N, D, H, W) in float16.
        labels: (N,) class indices.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / 'facts.json').read_text(encoding='utf-8'))
        self.names: tuple[str, ...] = tuple(facts['stages'])
        self.stages = [np.load(folder / f'stage{i}.npy', mmap_mode='r') for i in range(len(self.names))]
        self.labels = torch.from_numpy(np.load(folder / 'labels.npy'))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor, start: int = 0) -> list[Tensor]:
        """The maps of these images from stage `start` on, each (B, D, H, W) in float32."""
        order = indices.numpy()
        return [torch.from_numpy(stage[order]).float() for stage in self.stages[start:]]

    def batches(self, indices: Tensor, size: int, start: int = 0) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Maps and labels of these images in batches, in their order."""
        for part in indices.split(size):
            yield self.read(part, start), self.labels[part]

    def pooled(self) -> Tensor:
        """(N, D_L) averages of the last map over its locations."""
        parts = torch.arange(len(self)).split(512)
        return torch.cat([self.read(part, len(self.stages) - 1)[0].mean((2, 3)) for part in parts])


def write_maps(model: Any, images: Images, folder: Path, facts: dict[str, Any]) -> Maps:
    """Runs the network once over the images and keeps the maps of its stages. A second call goes on after a kill.

    Args:
        model: A model with a stream from stage 0, which names the stages; the last one is the pooled map.
        images: The images.
        folder: Gets `stageN.npy`, `labels.npy` and `facts.json`.
        facts: What the maps depend on. A folder with other facts is refused.

    Raises:
        ValueError: If the folder holds the maps of other images or another network.
    """
    names = ' '.join(sample.path.name for sample in images.samples)
    facts = facts | {
        'stages': list(model.castream_stages),
        'images': len(images),
        'files': hashlib.sha256(names.encode()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path, progress = folder / 'facts.json', folder / 'progress.json'
    if path.is_file() and json.loads(path.read_text(encoding='utf-8')) != facts:
        raise ValueError(f'{folder} holds maps of other images or of another network; name another folder.')
    count = json.loads(progress.read_text()) if progress.is_file() and path.is_file() else 0
    if count < len(images):
        arrays: list[np.ndarray] = []
        if count:
            arrays = [np.load(folder / f'stage{i}.npy', mmap_mode='r+') for i in range(len(facts['stages']))]
        loader = DataLoader(Subset(images, range(count, len(images))), batch_size=CHUNK)
        bar = tqdm(desc=f'maps of {folder.name}', total=len(images), initial=count, unit='image')
        with eval_mode(model):
            for x, _ in loader:
                stages = run_stages(model, x)
                if not arrays:
                    arrays = [
                        np.lib.format.open_memmap(
                            folder / f'stage{i}.npy', 'w+', np.float16, (len(images), *stage.shape[1:])
                        )
                        for i, stage in enumerate(stages)
                    ]
                    path.write_text(json.dumps(facts), encoding='utf-8')
                for array, stage in zip(arrays, stages, strict=True):
                    array[count : count + len(x)] = stage.half().numpy()
                count += len(x)
                temporary = progress.with_suffix('.tmp')
                temporary.write_text(json.dumps(count))
                temporary.replace(progress)
                bar.update(len(x))
        bar.close()
        np.save(folder / 'labels.npy', np.array([sample.label for sample in images.samples]))
    return Maps(folder)


def run_stages(model: Any, x: Tensor) -> list[Tensor]:
    """The maps that the stream of a model visits, in order, each (B, D, H, W)."""
    seen: list[Tensor] = []
    *names, _ = model.castream_stages
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
        for name in names
    ]
    try:
        last = model.forward_features(x.contiguous(memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()
    return [*seen, last.as_subclass(Tensor)]

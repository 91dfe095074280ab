"""A frozen network in ONNX Runtime, for the programs that run it over tens of thousands of images."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_castream.fitting.network import FrozenNetwork

BATCH = 2  # on a CPU two images of 224 x 224 are as fast as many


class FastNetwork(FrozenNetwork):
    """A `FrozenNetwork` whose `run` takes a third of the time. Its maps differ from torch's by less than 1e-4.

    Args:
        model: A timm model without a stream.
        size: Pixels of a side of the images.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__(model)
        onnxruntime: Any = importlib.import_module('onnxruntime')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), self.frozen():
            path = Path(folder) / 'network.onnx'
            program = torch.export.export(_Maps(super().run), (torch.zeros(BATCH, 3, size, size),), strict=False)
            exported: Any = torch.onnx.export(program, (), dynamo=True, verbose=False)
            exported.save(path)
            self._session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def run(self, x: Tensor, start: int = 0) -> tuple[list[Tensor], Tensor]:
        """See `FrozenNetwork.run`."""
        name = self._session.get_inputs()[0].name
        parts = []
        for part in x.split(BATCH):
            filled = torch.cat([part, part.new_zeros(BATCH - len(part), *part.shape[1:])])
            outputs = self._session.run(None, {name: filled.contiguous().numpy()})
            parts.append([torch.from_numpy(output)[: len(part)] for output in outputs])
        *maps, pooled = (torch.cat(values) for values in zip(*parts, strict=True))
        return maps[start:], pooled


class _Maps(nn.Module):
    """From images to the maps of all stages and the pooled vectors."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run
        self.model = run.__self__.model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps, pooled = self._run(x)
        return (*maps, pooled)

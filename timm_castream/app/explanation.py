"""One image explained: its classes, the attention of every stage, saliency maps, and what the maps are worth.

`explain_image` runs the network once. An `Explanation` computes a map or a measurement when it is first asked for and
keeps it, so that another class recomputes nothing else.

Letters: C classes, H x W pixels, h x w locations of a saliency map.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from ..attach import attention_maps
from ..attribution.cam import scale_maps
from ..attribution.saliency import Identity, attention_identity, saliency_maps
from ..attribution.user_methods import resolve_methods
from ..backbones.image_settings import image_settings
from ..datasets import image_mode, open_image
from ..datasets.image_files import PluginNeededError, stored_orientation
from ..inference.images import resize_saliency
from ..metrics.curves import curve_setting
from ..metrics.measurements import MapGroup, References, measure
from ..metrics.table import DEFAULT_METRICS, METRICS, Measurements
from ..pictures import Box, transform_image
from ..visualize import NUM_TOP, denormalised, most_probable
from .page_model import PageModel, method_title

MAX_PIXELS = 50_000_000
_SHOWN = frozenset({'masked_prob', 'insertion_curve', 'deletion_curve'})  # whatever the metrics need

Progress = Callable[[float, str], Any]  # (share done in [0, 1], text)


@dataclass(frozen=True)
class MapScores:
    """Measurements of one method's map under one pooling, on one image.

    Attributes:
        prob: Probability of the class on the image.
        masked_prob: Probability of the class on the image masked by the map.
        metrics: {name of `metrics.METRICS`: value of this image in percent}.
        insertion_curve: (n + 1,) probabilities.
        deletion_curve: (n + 1,) probabilities.
        masked_pixels: The masked image, (H, W, 3) of 8 bits.
    """

    prob: float
    masked_prob: float
    metrics: dict[str, float]
    insertion_curve: Tensor
    deletion_curve: Tensor
    masked_pixels: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Everything but the picture, as plain numbers and lists."""
        return {
            'prob': self.prob,
            'masked_prob': self.masked_prob,
            **self.metrics,
            'insertion_curve': self.insertion_curve.tolist(),
            'deletion_curve': self.deletion_curve.tolist(),
        }


class Explanation:
    """An image under a network, see `explain_image`.

    Attributes:
        opened: The network.
        x: (1, channels, H, W), the image as the network gets it.
        source: The image, or its file.
        crop: The part of the upright image that the network gets.
        pixels: The same before normalisation, (H, W, 3) of 8 bits.
        probabilities: {pooling: (C,)}.
        attention: {name of a stage: (h, w) in [0, 1]}, the mean over the heads scaled by its minimum and maximum;
            empty without a stream.
    """

    def __init__(self, opened: PageModel, x: Tensor, source: Path | Image.Image, crop: Box) -> None:
        self.opened = opened
        self.x = x
        self.source = source
        self.crop = crop
        self.pixels = denormalised(opened.model, x)[0]
        self.probabilities = {name: values[0] for name, values in self._probabilities(x).items()}
        self.attention: dict[str, Tensor] = {}
        if opened.predictor.has_stream:
            with opened.predictor.evaluating():
                maps = attention_maps(opened.model, x)
            self.attention = {
                name: scale_maps(values.mean(1))[0]
                for name, values in zip(opened.model.castream_stages, maps, strict=True)
            }
        self._maps: dict[tuple[str, str, int], Tensor] = {}
        self._worth: dict[tuple[str, int], dict[str, MapScores]] = {}
        self._identity: Identity | None = None

    def photograph(self) -> Image.Image:
        """The whole image, upright. A file is read again, because large images would fill the memory of a server.

        Raises:
            FileNotFoundError: If the file was deleted.
            ValueError: If the file is no image any more.
        """
        return open_image(self.source) if isinstance(self.source, Image.Image) else _read_file(self.source, 'RGB')

    def top(self, pooling: str, count: int = NUM_TOP) -> list[tuple[int, float]]:
        """The classes of highest probability under a pooling: (index, probability) from the highest."""
        return most_probable(self.probabilities[pooling], count)

    def best(self) -> list[int]:
        """The top classes of all poolings together, from the highest probability."""
        found = sorted(((value, index) for name in self.probabilities for index, value in self.top(name)), reverse=True)
        return list(dict.fromkeys(index for _, index in found))

    @property
    def predicted(self) -> int:
        """The class that the network predicts, under CA where it has a stream."""
        return self.top(self.opened.predictor.poolings[-1], 1)[0][0]

    def maps(
        self, methods: Sequence[str], target: int, progress: Progress | None = None
    ) -> dict[tuple[str, str], Tensor]:
        """Saliency maps of a class, {(pooling, method): (h, w) in [0, 1]}.

        Args:
            methods: Names of methods; none gives no maps.
            target: Index of the class.
            progress: Called before each method that has to be computed.

        Raises:
            ValueError: If a name or the class is unknown, a name is repeated, or `methods` is a string.
        """
        rows = resolve_methods(methods) if methods else ()
        poolings = self.opened.predictor.poolings
        missing = [row for row in rows if (poolings[0], row.name, target) not in self._maps]
        if any('masked forwards' in row.needs for row in missing):
            self.opened.accelerate(self.x)
        for position, row in enumerate(missing):
            if progress is not None:
                progress(position / len(missing), row.title)
            predictor = self.opened.predictor  # it may have an engine by now
            with predictor.evaluating():
                maps = saliency_maps(predictor, self.x, (row,), self._indices(target))
            self._maps.update({(name, row.name, target): values[0, 0] for (name, _), values in maps.items()})
        return {(name, method): self._maps[name, method, target] for method in methods for name in poolings}

    def scores(self, method: str, target: int, progress: Progress | None = None) -> dict[str, MapScores]:
        """Measures a method's map of a class under each pooling, {pooling: measurements}.

        Args: As `maps`.

        Raises:
            ValueError: As `maps`, or if a map has NaN.
        """
        if (method, target) not in self._worth:
            self.opened.accelerate(self.x)
            maps = self.maps((method,), target)
            worth = {}
            for (name, _), values in maps.items():
                if values.isnan().any():
                    raise ValueError(
                        f'The map of {method_title(method)} under {self.opened.pooling_names[name]} has NaN, so nothing can '
                        'be measured with it: choose another method.'
                    )
            for position, (name, _) in enumerate(maps):
                if progress is not None:
                    progress(position / len(maps), f'{method_title(method)} under {self.opened.pooling_names[name]}')
                worth[name] = self._measure(maps[name, method][None], target, name)
            self._worth[method, target] = worth
        return self._worth[method, target]

    def identity(self) -> Identity:
        """Both sides of eq. (5), (1, h, w) each.

        Raises:
            ValueError: If the network has no stream.
        """
        if self._identity is None:
            self._identity = Identity(*(side.detach() for side in attention_identity(self.opened.model, self.x)))
        return self._identity

    def _probabilities(self, x: Tensor) -> dict[str, Tensor]:
        predictor = self.opened.predictor
        with predictor.evaluating():
            return {name: predictor.probabilities(logits, name) for name, logits in predictor.torch_logits(x).items()}

    def _measure(self, saliency: Tensor, target: int, pooling: str) -> MapScores:
        predictor, images = self.opened.predictor, torch.zeros(1, dtype=torch.int64, device=self.x.device)
        prob = {name: values[None] for name, values in self.probabilities.items()}
        references = References(predictor, self.x, prob, curve_setting('paper'), {})
        resized = resize_saliency(saliency, self.x.shape[2:])
        maps = MapGroup(references, (pooling,), images, self._indices(target)[:, None], resized)
        needs = _SHOWN.union(*(METRICS[name].needs for name in DEFAULT_METRICS))
        with predictor.evaluating():
            measured = Measurements(prob=prob[pooling][:, target], **measure(needs, {pooling: maps})[pooling])
        return MapScores(
            prob=measured.prob.item(),
            masked_prob=measured.masked_prob.item(),
            metrics={name: METRICS[name].values(measured).item() for name in DEFAULT_METRICS},
            insertion_curve=measured.insertion_curve[0].float().cpu(),
            deletion_curve=measured.deletion_curve[0].float().cpu(),
            masked_pixels=denormalised(self.opened.model, maps.mask(images, resized))[0],
        )

    def _indices(self, target: int) -> Tensor:
        return torch.tensor([target], device=self.x.device)


def explain_image(opened: PageModel, image: str | Path | Image.Image) -> Explanation:
    """Explains one image.

    Args:
        opened: The network.
        image: A file in any format that PIL opens, or a PIL image. It goes through the network's own eval transform.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no image, or has more than `MAX_PIXELS` pixels. The message is a sentence for the
            user of a page and names no path.
    """
    config = image_settings(opened.model)
    mode = image_mode(config['input_size'][0])
    source = image if isinstance(image, Image.Image) else Path(image)
    pixels = open_image(source, mode) if isinstance(source, Image.Image) else _read_file(source, mode)
    parameter = next(opened.model.parameters())
    x, crop = transform_image(create_transform(**config, is_training=False), pixels)
    return Explanation(opened, x[None].to(parameter), source, crop)


def _read_file(path: Path, mode: str) -> Image.Image:
    try:
        with warnings.catch_warnings():  # PIL warns about large images; the limit below is lower
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            (width, height), *_ = stored_orientation(path)
    except FileNotFoundError:
        raise FileNotFoundError(f'There is no file {path}.') from None
    except Image.DecompressionBombError:
        raise ValueError(f'The image is too large; at most {MAX_PIXELS // 10**6} million pixels are read.') from None
    except PluginNeededError as error:
        raise ValueError(f'The file is {error.plugin}.') from None
    except Exception:  # PIL's decoders raise about anything on a broken file
        raise ValueError('The file is not an image that can be read.') from None
    if width * height > MAX_PIXELS:
        raise ValueError(
            f'The image has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million pixels are read.'
        )
    try:
        return open_image(path, mode)
    except Exception:
        raise ValueError('The image file is damaged and cannot be read.') from None

"""Images explained as pictures: rows and grids of overlays, saved maps, and the two sides of the paper's eq. (5).

`pictures` draws the pixels. Letters: C channels of an image and H x W pixels, h x w the size of a saliency map.
"""

from __future__ import annotations

import logging
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from tqdm import tqdm

from ._utils.checks import ChannelNumbers, check_count
from ._utils.files import counted, make_folder, printable
from .attach import attention_maps
from .attribution.cam import scale_maps
from .attribution.methods import METHODS, PAPER_METHODS, Batch, Method
from .attribution.saliency import attention_identity
from .attribution.saliency import explain as explain_batch
from .attribution.user_methods import UserMethod, check_maps, resolve_methods
from .backbones.image_settings import image_settings
from .backbones.mixin import castream_model
from .datasets import find_images, image_mode, open_image
from .hub.label_names import class_index, class_name
from .inference.images import check_images, normalisation
from .inference.predictor import Predictor, Score
from .pictures import (
    COLOURS,
    OPACITY,
    Box,
    Panel,
    check_style,
    draw_grid,
    draw_row,
    heat_map,
    map_note,
    overlay,
    save,
    stack_rows,
    transform_image,
    write_maps,
)

__all__ = [
    'COLOURS',
    'EARLY_STAGES',
    'OPACITY',
    'POOLING_NAMES',
    'Explained',
    'Panel',
    'class_name',
    'denormalised',
    'draw_grid',
    'draw_identity',
    'explain',
    'find_images',
    'heat_map',
    'overlay',
    'printable',
    'saliency_row',
    'save',
]

POOLING_NAMES = {'gap': 'GAP', 'ca': 'CA'}
ROWS_PER_GRID = 50
NUM_TOP = 5
EARLY_STAGES = (
    'Early stages only prepare the query of the last one. In a stream that was trained briefly they often look at one '
    'point.'
)

_LABEL_LETTERS, _NAME_LETTERS = 22, 30
_LEAST_SEEN = 0.5  # of a side
_MAX_STEM_BYTES = 200
_MAX_NAMED = 3

_logger = logging.getLogger(__name__)


class Explained(NamedTuple):
    """What `explain` did.

    Attributes:
        pictures: Files written, one an image, then the one of eq. (5) where asked for.
        grids: Files of all rows together, one for every `ROWS_PER_GRID` images; none for a single image.
        unreadable: Image files skipped, and why.
        maps: Folders of saved maps, one an image, where asked for.
        classes: {image: {title of a pooling: the most probable classes, (name, probability)}}.
    """

    pictures: list[Path]
    grids: list[Path]
    unreadable: dict[Path, str]
    maps: list[Path]
    classes: dict[Path, dict[str, list[tuple[str, float]]]]


class _Result(NamedTuple):
    """One image explained.

    Attributes:
        panels: Its row.
        maps: {name of a file: (h, w) in [0, 1]}.
        top: {pooling: (class, probability) from the highest}.
        explained: {pooling: indices of the classes explained}.
    """

    panels: list[Panel]
    maps: dict[str, Tensor]
    top: dict[str, list[tuple[int, float]]]
    explained: dict[str, list[int]]


class _Choice(NamedTuple):
    """Which classes to explain: those of `target`, or the `top_k` most probable ones, or those that are predicted."""

    target: Sequence[int] = ()
    top_k: int | None = None

    def __call__(self, probabilities: Mapping[str, Tensor], activation: str) -> dict[str, list[int]]:
        """{pooling: classes}, from the (C,) probabilities under each pooling."""
        if self.target:
            return {pooling: list(self.target) for pooling in probabilities}
        positive = torch.stack(list(probabilities.values())).ge(0.5).any(0).nonzero().flatten().tolist()
        if self.top_k is None and activation == 'sigmoid' and positive:
            return {pooling: positive for pooling in probabilities}
        count = self.top_k or 1
        return {
            pooling: values.topk(min(count, len(values))).indices.tolist() for pooling, values in probabilities.items()
        }


def explain(
    model: nn.Module,
    paths: Sequence[str | Path],
    methods: Sequence[str] | Mapping[str, UserMethod],
    output_dir: str | Path,
    poolings: Sequence[str] | None = None,
    layer: str | None = None,
    batch_size: int | None = None,
    *,
    activation: str = 'softmax',
    identity: bool = False,
    img_size: int | None = None,
    input_size: Sequence[int] | None = None,
    crop_pct: float | None = None,
    colours: str = COLOURS[0],
    opacity: float = OPACITY,
    save_maps: bool = False,
    target: str | int | Sequence[str | int] | Score | None = None,
    top_k: int | None = None,
    root: str | Path | None = None,
    seed: int = 0,
    mean: ChannelNumbers | None = None,
    std: ChannelNumbers | None = None,
) -> Explained:
    """Writes a row of overlays for each image as a PNG, and a grid of all rows, with a progress bar on a terminal.

    An image is opened by `datasets.open_image` and goes through the model's own eval transform. One that cannot be read
    is named in a warning and skipped.

    Args:
        model: A model with a stream, or any timm model.
        paths: Image files, in any format that PIL opens.
        methods: As for `evaluate.evaluate`, an array with the maps of all `paths`. `'attention'` gives a picture for
            every stage.
        output_dir: Made where it is missing. No file among `paths` is overwritten.
        poolings: Of `'gap'` and `'ca'`. None: both for a model with a stream, `'gap'` for others.
        layer: As for `attribution.attribute`.
        batch_size: As for `attribution.attribute`.
        activation: `'softmax'`, or `'sigmoid'` for multi-label models.
        identity: Write the figure of eq. (5) for each image too.
        img_size: Side of the input in pixels. None: that of the model's `pretrained_cfg`.
        input_size: Channels, height and width of the input in pixels, in place of `img_size`.
        crop_pct: Share of the image in the crop. None: that of the model's `pretrained_cfg`.
        colours: One of `pictures.COLOURS`.
        opacity: Factor of the colours' own opacity, in [0, 1].
        save_maps: Write a folder for each image too: every map as an array (`.npy`, (h, w) in [0, 1], of the crop that
            the network gets) and over the whole photograph (`.jpg`), and `explanation.json` with the most probable
            classes and the crop in pixels of the photograph.
        target: Name or index of the class to explain, or several. None: the class predicted under each pooling, or, under a
            sigmoid, every class of at least 0.5. A function gets the output for one image, (C,), and gives the one
            number that is explained; titles name the function and the number.
        top_k: Explain so many of the most probable classes under each pooling.
        root: A folder. Pictures lie in the folders that their images lie in below it. None: the folder that all images
            share.
        seed: Of methods that draw random numbers.
        mean, std: Normalisation of the images, of pixels in [0, 1], one number or one per channel. None: those of the
            model's `pretrained_cfg`.

    Raises:
        ValueError: If there are no paths, an argument does not fit or the model has no stream.
    """
    if not paths:
        raise ValueError('There are no images to explain.')
    check_style(colours, opacity)
    if top_k is not None:
        check_count('top_k', top_k)
        if callable(target):
            raise ValueError(f'top_k {top_k} chooses classes, and target is a function: leave one of them out.')
    score, classes = (target, ()) if callable(target) else (None, _classes(target))
    predictor = Predictor(
        model, poolings, layer=layer, activation=activation, batch_size=batch_size, mean=mean, std=std, score=score
    )
    rows_of_methods = resolve_methods(methods)
    check_maps(rows_of_methods, len(paths), predictor.poolings)
    choose = _Choice([class_index(predictor.backbone, word, predictor.num_classes) for word in classes], top_k)
    config = image_settings(predictor.backbone, input_size, img_size, crop_pct, mean=mean, std=std)
    transform = create_transform(**config, is_training=False)
    mode = image_mode(config['input_size'][0])
    parameter = next(model.parameters())
    if identity:
        castream_model(model)

    folder = make_folder(output_dir)
    images = [Path(path) for path in paths]
    taken = {_path_key(path) for path in images}
    taken |= {_path_key(path.parent) for path in images}  # no folder of maps holds an image
    inputs = frozenset(taken)
    grid_paths = [_free_path(folder, 'grid', taken) for _ in range(0, len(images), ROWS_PER_GRID)]
    done = Explained([], [], {}, [], {})
    root = os.path.commonpath([os.path.abspath(path.parent) for path in images]) if root is None else root
    alike = Counter((path.parent, path.stem.casefold()) for path in set(images))  # a.jpg and a.png
    strips: list[np.ndarray] = []
    with_nan: list[str] = []
    caption = EARLY_STAGES if any('stream' in method.needs for method in rows_of_methods) else ''

    def save_grid() -> None:
        if len(images) - len(done.unreadable) > 1:  # the grid of a single image would be its picture
            done.grids.append(save(stack_rows(strips, caption), grid_paths[len(done.grids)]))
        strips.clear()

    for index, path in enumerate(tqdm(images, desc='explain', unit='image', disable=None)):
        try:
            image = open_image(path, mode)
        except OSError as error:
            done.unreadable[path] = f'{type(error).__name__}: {error}'
            _logger.warning('%s cannot be read and is skipped: %s', printable(path), error)
            continue
        tensor, crop = transform_image(transform, image)
        _tell_crop(path, image, crop)
        x = tensor[None].to(parameter)
        result = _explain_one(
            predictor, x, rows_of_methods, printable(path.name), index, colours, opacity, choose, seed
        )
        top = _named(result.top, lambda label: _label(predictor, label))
        with_nan += [f'{printable(path.name)} {name}' for name, values in result.maps.items() if values.isnan().any()]
        titles = predictor.pooling_names
        done.classes[path] = {
            titles[pooling]: [(entry['name'], entry['probability']) for entry in classes]
            for pooling, classes in top.items()
        }
        place = _subfolder(folder, path, root)
        is_taken = alike[path.parent, path.stem.casefold()] > 1 or _path_key(place / f'{path.stem}.png') in inputs
        stem = path.name if is_taken else path.stem  # a.jpg.png tells its image, a_2.png does not
        strips.append(draw_row(result.panels))
        done.pictures.append(save(stack_rows(strips[-1:], caption), _free_path(place, stem, taken)))
        if save_maps:
            maps = _free_path(place, f'{stem}_maps', taken, '')
            facts = {'image': str(path), 'top': top, 'explained': result.explained}
            write_maps(maps, image, crop, result.maps, facts, opacity, colours)
            done.maps.append(maps)
        if identity:
            figure = draw_identity(model, x, *predictor.normalisation(x))
            done.pictures.append(save(figure, _free_path(place, f'{stem}_identity', taken)))
        if len(strips) == ROWS_PER_GRID:
            save_grid()
    if strips:
        save_grid()
    if with_nan:
        named = ', '.join(with_nan[:_MAX_NAMED]) + (', ...' if len(with_nan) > _MAX_NAMED else '')
        _logger.warning('%s with NaN drawn as nothing: %s.', counted(len(with_nan), 'map'), named)
    return done


def saliency_row(
    model: nn.Module,
    x: Tensor,
    methods: Sequence[str] | Mapping[str, UserMethod] = PAPER_METHODS,
    poolings: Sequence[str] | None = None,
    layer: str | None = None,
    batch_size: int | None = None,
    *,
    activation: str = 'softmax',
    name: str = '',
    colours: str = COLOURS[0],
    opacity: float = OPACITY,
) -> list[Panel]:
    """One image's row: the image, the attention of the last stage, each method under each pooling, the early stages.

    A class activation map explains the class predicted under its pooling, which its title names with the probability.

    Args:
        model: A model with a stream, or any timm model.
        x: (1, C, H, W), normalised as the model's `pretrained_cfg` says.
        name: Name of the image, for its title.
        colours: One of `pictures.COLOURS`.
        opacity: Factor of the colours' own opacity, in [0, 1].

    The other arguments, and the errors, are those of `explain`.
    """
    predictor = Predictor(model, poolings, layer=layer, activation=activation, batch_size=batch_size)
    return _explain_one(predictor, x, resolve_methods(methods), name, 0, colours, opacity).panels


def _explain_one(
    predictor: Predictor,
    x: Tensor,
    methods: Sequence[Method],
    name: str,
    index: int,
    colours: str,
    opacity: float,
    choose: _Choice | None = None,
    seed: int = 0,
) -> _Result:
    check_images(x)
    backbone = predictor.backbone
    with predictor.evaluating():
        batch = Batch(predictor, x, methods, torch.tensor([index]), seed)  # its forward gives classes and maps
        probabilities = {
            pooling: predictor.probabilities(batch.logits[pooling].detach(), pooling)[0]
            for pooling in predictor.poolings
        }
        explained = (choose or _Choice())(probabilities, predictor.activation)
        target = {pooling: torch.tensor([classes], device=x.device) for pooling, classes in explained.items()}
        saliency = explain_batch(batch, target)
        stages = attention_maps(backbone, x) if any('stream' in method.needs for method in methods) else []
    top = {pooling: most_probable(values) for pooling, values in probabilities.items()}
    names = predictor.pooling_names

    def title_of(pooling: str, label: int) -> str:
        text = _cut(_label(predictor, label), _LABEL_LETTERS)
        return f'{names[pooling]}: {text} {probabilities[pooling][label]:.2f}'

    image = denormalised(backbone, x, *predictor.normalisation(x))[0]
    predictions = [title_of(pooling, top[pooling][0][0]) for pooling in predictor.poolings]
    panels = [Panel('\n'.join([_cut(name, _NAME_LETTERS), *predictions]), image)]
    maps: dict[str, Tensor] = {}

    def add(file_name: str, title: str, values: Tensor) -> None:
        maps[re.sub(r'[^\w.+-]+', '_', file_name)] = values
        note = map_note(values)
        panels.append(Panel(f'{title}\n{note}' if note else title, overlay(image, values, opacity, colours)))

    title = METHODS['attention'].title
    attention = {
        stage: scale_maps(values.mean(1)[0])
        for stage, values in zip(backbone.castream_stages if stages else (), stages, strict=True)
    }
    last = list(attention)[-1:]
    for stage in last:
        add(f'attention_{stage}', f'{title}\n{stage}, the last stage', attention[stage])
    for method in methods:
        for pooling in predictor.poolings if 'stream' not in method.needs else ():
            for position, label in enumerate(explained[pooling]):
                values = saliency[pooling, method.name][0, position]
                file_name = f'{method.name}_{pooling}' + (f'_{label}' if len(explained[pooling]) > 1 else '')
                add(file_name, f'{method.title}\n{title_of(pooling, label)}', values)
    for stage in reversed([stage for stage in attention if stage not in last]):
        add(f'attention_{stage}', f'{title}\n{stage}, early', attention[stage])
    return _Result(panels, maps, top, explained)


def _classes(target: Any) -> list[str | int]:
    """The classes that a target names, which is no function.

    Raises:
        ValueError: It is no name, index or sequence of them.
    """
    words: Any = [target] if isinstance(target, (str, Integral)) else [] if target is None else target
    try:
        fits = not any(isinstance(word, bool) for word in words)
        classes = [word if isinstance(word, str) else operator.index(word) for word in words]
    except TypeError:
        fits, classes = False, []
    if not fits:
        raise ValueError(
            f'target must be a name or an index of a class, several of them, or a function, got {target!r}.'
        )
    return classes


def _tell_crop(path: Path, image: Image.Image, crop: Box) -> None:
    """Says where the network does not see most of a photograph."""
    width, height = (
        min(crop.right, image.width) - max(crop.left, 0),
        min(crop.bottom, image.height) - max(crop.top, 0),
    )
    if min(width / image.width, height / image.height) < _LEAST_SEEN:
        _logger.warning(
            '%s: the network gets %d x %d of the %d x %d pixels, those in the middle; --crop-mode squash or border, or '
            '--input-size, shows it more.',
            printable(path),
            round(width),
            round(height),
            image.width,
            image.height,
        )


def _subfolder(folder: Path, path: Path, root: str | Path) -> Path:
    """The folder of an image's picture: that in which the image lies below the root."""
    below = os.path.relpath(os.path.abspath(path.parent), os.path.abspath(root))
    place = folder if below.startswith(os.pardir) else folder / below
    return make_folder(place)


def most_probable(probabilities: Tensor, count: int = NUM_TOP) -> list[tuple[int, float]]:
    """The classes of highest probability of (C,): (index, probability) from the highest."""
    values, indices = probabilities.topk(min(count, len(probabilities)))
    return list(zip(indices.tolist(), values.tolist(), strict=True))


def named_classes(model: nn.Module, top: Mapping[str, list[tuple[int, float]]]) -> dict[str, list[dict[str, Any]]]:
    """{pooling: index, name and probability of each of its classes}, as `explanation.json` has them."""
    return _named(top, lambda index: class_name(model, index))


def _named(
    top: Mapping[str, list[tuple[int, float]]], name_of: Callable[[int], str]
) -> dict[str, list[dict[str, Any]]]:
    return {
        pooling: [
            {'index': index, 'name': name_of(index), 'probability': probability} for index, probability in classes
        ]
        for pooling, classes in top.items()
    }


def _label(predictor: Predictor, index: int) -> str:
    """The name of a class, or of the function whose value is explained."""
    if predictor.score is None:
        return class_name(predictor.backbone, index)
    name = getattr(predictor.score, '__name__', '<')
    return 'value' if name.startswith('<') else name  # of a lambda, or of an object


def denormalised(
    model: nn.Module, x: Tensor, mean: ChannelNumbers | None = None, std: ChannelNumbers | None = None
) -> np.ndarray:
    """Pixels, (B, H, W, 3) of 8 bits, of (B, C, H, W) normalised images.

    Args:
        model: A timm model, whose `pretrained_cfg` has the normalisation.
        x: The images.
        mean, std: In place of the model's own.
    """
    offset, scale = normalisation(model, x, mean, std)
    pixels = (255 * (x * scale + offset)).round().clamp(0, 255)
    pixels = (pixels if pixels.shape[1] > 2 else pixels[:, :1].expand(-1, 3, -1, -1))[:, :3]  # without alpha
    return pixels.movedim(1, -1).byte().cpu().numpy()


def draw_identity(
    model: nn.Module, x: Tensor, mean: ChannelNumbers | None = None, std: ChannelNumbers | None = None
) -> Any:
    """Eq. (5) for one image: attention logits F a, the class agnostic CAM sum_k a_k F^k, and their difference.

    Args:
        model: A model with a stream.
        x: (1, C, H, W), normalised.
        mean, std: Of the images. None: those of the model's `pretrained_cfg`.

    Returns:
        A `matplotlib.figure.Figure`, made without pyplot: it shares no state and needs no closing.
    """
    from matplotlib.figure import Figure  # half a second that other pictures need not wait for

    logits, cam = (side[0].double().cpu().numpy() for side in attention_identity(model, x))
    difference = logits - cam
    furthest = np.abs(difference).max()
    figure = Figure(figsize=(10, 2.8), dpi=160, layout='constrained')
    panels = figure.subplots(1, 4)
    panels[0].imshow(denormalised(castream_model(model), x, mean, std)[0])
    panels[0].set_title('input')
    bounds = {'vmin': min(logits.min(), cam.min()), 'vmax': max(logits.max(), cam.max())}
    for axes, values, title, colours in (
        (panels[1], logits, r'attention logits $F\,\alpha$', {'cmap': COLOURS[0], **bounds}),
        (panels[2], cam, r'CAM $\Sigma_k\,\alpha_k F^k$', {'cmap': COLOURS[0], **bounds}),
        (
            panels[3],
            difference,
            f'difference, at most {furthest:.1e}',
            {'cmap': 'coolwarm', 'vmin': -furthest, 'vmax': furthest},
        ),
    ):
        figure.colorbar(axes.imshow(values, **colours), ax=axes, shrink=0.8)
        axes.set_title(title)
    for axes in panels:
        axes.set_axis_off()
        axes.title.set_fontsize(9)
    return figure


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f'{text[: letters - 1]}…'


def _path_key(path: Path) -> str:
    return str(path.resolve()).casefold()  # some file systems take A.png for a.png


def _free_path(folder: Path, stem: str, taken: set[str], ending: str = '.png') -> Path:
    """A path that is not taken, and now is. A long name is cut: file systems end at 255 bytes."""
    stem = printable(stem).encode()[:_MAX_STEM_BYTES].decode(errors='ignore')
    candidates = (folder / f'{name}{ending}' for name in chain([stem], (f'{stem}_{n}' for n in count(2))))
    path = next(path for path in candidates if _path_key(path) not in taken)
    taken.add(_path_key(path))
    return path

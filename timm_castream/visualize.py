"""Pictures of saliency: overlays, rows and grids of them, and the two sides of the paper's eq. (5).

Figures are matplotlib's, made without pyplot: they share no state and need no closing. Letters: C channels of an image
and H x W pixels, h x w the size of a saliency map.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn
from tqdm import tqdm

from ._utils.files import write_whole
from .attach import attention_maps
from .attribution.cam import scale_maps
from .attribution.methods import METHODS, PAPER_METHODS, Method
from .attribution.saliency import attention_identity, saliency_maps
from .attribution.user_methods import UserMethod, check_maps, resolve_methods
from .backbones.mixin import castream_model
from .inference.images import check_images, normalisation, resize_saliency
from .inference.predictor import Predictor

POOLING_NAMES = {'gap': 'GAP', 'ca': 'CA'}
ROWS_PER_GRID = 50

_PANEL_INCHES, _TITLE_INCHES, _GAP_INCHES = 1.8, 0.5, 0.08
_LEAST_DPI = 80  # for the titles: smaller images are enlarged
_LABEL_LETTERS, _NAME_LETTERS = 22, 30
_MAX_STEM_BYTES = 200

_logger = logging.getLogger(__name__)


class Panel(NamedTuple):
    """One picture of a row: a title of one or more lines, and (H, W, 3) pixels of 8 bits."""

    title: str
    pixels: np.ndarray


class Explained(NamedTuple):
    """What `explain` did.

    Attributes:
        pictures: Files written, one an image, then the one of eq. (5) where asked for.
        grids: Files of all rows together, one for every `ROWS_PER_GRID` images.
        unreadable: Image files skipped, and why.
    """

    pictures: list[Path]
    grids: list[Path]
    unreadable: dict[Path, str]


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
    crop_pct: float | None = None,
) -> Explained:
    """Writes a row of overlays for each image as a PNG, and a grid of all rows, with a progress bar on a terminal.

    An image stands upright by its EXIF data and goes through the model's own eval transform. One that cannot be read
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
        crop_pct: Share of the image in the crop. None: that of the model's `pretrained_cfg`.

    Raises:
        ValueError: If there are no paths, an argument does not fit or the model has no stream.
    """
    if not paths:
        raise ValueError('There are no images to explain.')
    network = Predictor(model, poolings, layer=layer, activation=activation, batch_size=batch_size)
    rows_of_methods = resolve_methods(methods)
    check_maps(rows_of_methods, len(paths), network.poolings)
    config = resolve_data_config({'img_size': img_size, 'crop_pct': crop_pct}, model=network.backbone)
    transform = create_transform(**config, is_training=False)
    mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    parameter = next(model.parameters())
    if identity:
        castream_model(model)

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    images = [Path(path) for path in paths]
    taken = {_path_key(path) for path in images}
    grid_paths = [_free_path(folder, 'grid', taken) for _ in range(0, len(images), ROWS_PER_GRID)]
    done = Explained([], [], {})
    rows: list[list[Panel]] = []
    for index, path in enumerate(tqdm(images, desc='explain', unit='image', disable=None)):
        try:
            image = read_image(path, mode)
        except Exception as error:  # PIL's decoders raise about anything on a broken file
            done.unreadable[path] = f'{type(error).__name__}: {error}'
            _logger.warning('%s cannot be read and is skipped: %s', printable(path), error)
            continue
        x = transform(image)[None].to(parameter)
        rows.append(_row(network, x, rows_of_methods, printable(path.name), index))
        done.pictures.append(save(draw_grid(rows[-1:]), _free_path(folder, path.stem, taken)))
        if identity:
            done.pictures.append(save(draw_identity(model, x), _free_path(folder, f'{path.stem}_identity', taken)))
        if len(rows) == ROWS_PER_GRID:
            done.grids.append(save(draw_grid(rows), grid_paths[len(done.grids)]))
            rows.clear()
    if rows:
        done.grids.append(save(draw_grid(rows), grid_paths[len(done.grids)]))
    return done


def find_images(folder: str | Path) -> list[Path]:
    """Files below a folder whose names end as those of formats that PIL opens, in order of their paths.

    Raises:
        ValueError: If there is no such folder, or no such file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f'{str(folder)!r} is no folder.')
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in endings and path.is_file())
    if not paths:
        raise ValueError(f'{str(folder)!r} has no images.')
    return paths


def read_image(path: str | Path, mode: str = 'RGB') -> Image.Image:
    """An image file, upright by its EXIF data, of 8 bits a channel: wider ones are scaled by their own range.

    Args:
        path: Any file that PIL opens; of several frames the first is read.
        mode: `'RGB'` or `'L'`.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in 'IF':  # 16 or 32 bits, which convert() would cut off at 255
            values = torch.from_numpy(np.asarray(image, dtype=np.float64))
            image = Image.fromarray((255 * scale_maps(values)).round().byte().numpy())
        return image.convert(mode)


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
) -> list[Panel]:
    """One image's row: the image, its attention in every stage, and each method under each pooling.

    A class activation map explains the class predicted under its pooling, which its title names with the probability.

    Args:
        model: A model with a stream, or any timm model.
        x: (1, C, H, W), normalised as the model's `pretrained_cfg` says.
        name: Name of the image, for its title.

    The other arguments, and the errors, are those of `explain`.
    """
    network = Predictor(model, poolings, layer=layer, activation=activation, batch_size=batch_size)
    return _row(network, x, resolve_methods(methods), name)


def _row(network: Predictor, x: Tensor, methods: Sequence[Method], name: str, index: int = 0) -> list[Panel]:
    check_images(x)
    backbone = network.backbone
    with network.evaluating():
        maps = saliency_maps(network, x, methods, indices=torch.tensor([index]))
        logits = network.logits(x)
        stages = attention_maps(backbone, x) if any('stream' in method.needs for method in methods) else []
    predictions = {}
    for pooling in network.poolings:
        probability, class_index = network.probabilities(logits[pooling], pooling)[0].max(0)
        label = _cut(class_name(backbone, int(class_index)), _LABEL_LETTERS)
        predictions[pooling] = f'{POOLING_NAMES[pooling]}: {label} {probability:.2f}'
    image = denormalised(backbone, x)[0]
    row = [Panel('\n'.join([_cut(name, _NAME_LETTERS), *predictions.values()]), image)]
    title = METHODS['attention'].title
    for stage, attention in zip(backbone.castream_stages if stages else (), stages, strict=True):
        row.append(Panel(f'{title}\n{stage}', overlay(image, scale_maps(attention.mean(1)[0]))))
    row += [
        Panel(f'{method.title}\n{predictions[pooling]}', overlay(image, maps[pooling, method.name][0, 0]))
        for method in methods
        if 'stream' not in method.needs
        for pooling in network.poolings
    ]
    return row


def heat_map(saliency: Tensor, size: Sequence[int]) -> np.ndarray:
    """The colours of a saliency map, from blue (0) to red (1).

    Args:
        saliency: (h, w) in [0, 1]; it is resized as the metrics do it, by `images.resize_saliency`.
        size: (H, W).

    Returns:
        (H, W, 3) of 8 bits.
    """
    resized = resize_saliency(saliency[None], size)[0]
    return colormaps['jet'](resized.cpu().numpy(), bytes=True)[..., :3]


def overlay(image: np.ndarray, saliency: Tensor, opacity: float = 0.5) -> np.ndarray:
    """An image under the colours of its saliency.

    Args:
        image: (H, W, 3) of 8 bits.
        saliency: (h, w) in [0, 1], see `heat_map`.
        opacity: Share of the colours in each pixel, in [0, 1]; the image has the rest.

    Returns:
        (H, W, 3) of 8 bits.

    Raises:
        ValueError: If the opacity is out of range.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f'opacity must lie in [0, 1], got {opacity}.')
    return ((1 - opacity) * image + opacity * heat_map(saliency, image.shape[:2])).astype(np.uint8)


def denormalised(model: nn.Module, x: Tensor) -> np.ndarray:
    """Pixels, (B, H, W, 3) of 8 bits, of (B, C, H, W) images normalised as the model's `pretrained_cfg` says."""
    mean, std = normalisation(model, x)
    pixels = (255 * (x * std + mean)).round().clamp(0, 255).expand(-1, 3, -1, -1)
    return pixels.movedim(1, -1).byte().cpu().numpy()


def draw_grid(rows: Sequence[Sequence[Panel]]) -> Figure:
    """A figure with a line of pictures, of equal sizes, for each row."""
    height, width = rows[0][0].pixels.shape[:2]
    enlarged = math.ceil(_LEAST_DPI * _PANEL_INCHES / width)
    height, width = height * enlarged, width * enlarged
    dpi = width / _PANEL_INCHES
    gap, title_height = round(_GAP_INCHES * dpi), round(_TITLE_INCHES * dpi)
    step_y, step_x = height + gap + title_height, width + gap
    # One picture of all panels, pixel by pixel: an axes for each of hundreds would take minutes.
    canvas = np.full((len(rows) * step_y + gap, max(map(len, rows)) * step_x + gap, 3), 255, dtype=np.uint8)
    figure = Figure(figsize=(canvas.shape[1] / dpi, canvas.shape[0] / dpi), dpi=dpi)
    for line, row in enumerate(rows):
        for column, (title, pixels) in enumerate(row):
            top, left = line * step_y + title_height + gap, column * step_x + gap
            canvas[top : top + height, left : left + width] = pixels.repeat(enlarged, 0).repeat(enlarged, 1)
            figure.text(
                (left + width / 2) / canvas.shape[1],
                1 - (top - gap / 2) / canvas.shape[0],
                title,
                fontsize=7,
                horizontalalignment='center',
                verticalalignment='bottom',
                parse_math=False,
            )
    figure.figimage(canvas)
    return figure


def draw_identity(model: nn.Module, x: Tensor) -> Figure:
    """Eq. (5) for one image: attention logits F a, the class agnostic CAM sum_k a_k F^k, and their difference.

    Args:
        model: A model with a stream.
        x: (1, C, H, W), normalised as the model's `pretrained_cfg` says.
    """
    logits, cam = (side[0].double().cpu().numpy() for side in attention_identity(model, x))
    difference = logits - cam
    furthest = np.abs(difference).max()
    figure = Figure(figsize=(10, 2.8), dpi=2 * _LEAST_DPI, layout='constrained')
    panels = figure.subplots(1, 4)
    panels[0].imshow(denormalised(castream_model(model), x)[0])
    panels[0].set_title('input')
    bounds = {'vmin': min(logits.min(), cam.min()), 'vmax': max(logits.max(), cam.max())}
    for axes, values, title, colours in (
        (panels[1], logits, r'attention logits $F\,\alpha$', {'cmap': 'jet', **bounds}),
        (panels[2], cam, r'CAM $\Sigma_k\,\alpha_k F^k$', {'cmap': 'jet', **bounds}),
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


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as a PNG that takes its name once it is complete.

    Returns:
        The path.
    """
    path = Path(path)
    with write_whole(path, 'wb') as file, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # matplotlib draws a box for a letter that its fonts lack
        figure.savefig(file, format='png')
    return path


def class_name(model: nn.Module, index: int) -> str:
    """A class by name: of the model's `pretrained_cfg`, or of the ImageNet with as many classes, as timm guesses."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    names = cfg.get('label_names')
    if names:
        # Keys of a mapping that went through JSON are strings.
        by_index = {str(i): name for i, name in (names.items() if isinstance(names, dict) else enumerate(names))}
        name = by_index.get(str(index), f'class {index}')
        return (cfg.get('label_descriptions') or {}).get(name, name)
    subset = infer_imagenet_subset(model)
    return _imagenet(subset).index_to_description(index) if subset else f'class {index}'


@cache
def _imagenet(subset: str) -> ImageNetInfo:
    return ImageNetInfo(subset)  # reads files


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f'{text[: letters - 1]}…'


def printable(name: str | Path) -> str:
    """A file name with a question mark for each byte that is not UTF-8."""
    return str(name).encode('utf-8', 'replace').decode()


def _path_key(path: Path) -> str:
    return str(path.resolve()).casefold()  # some file systems take A.png for a.png


def _free_path(folder: Path, stem: str, taken: set[str]) -> Path:
    """The path of a PNG file that is not taken, and now is. A long name is cut: file systems end at 255 bytes."""
    stem = printable(stem).encode()[:_MAX_STEM_BYTES].decode(errors='ignore')
    candidates = (folder / f'{name}.png' for name in chain([stem], (f'{stem}_{n}' for n in count(2))))
    path = next(path for path in candidates if _path_key(path) not in taken)
    taken.add(_path_key(path))
    return path

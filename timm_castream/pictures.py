"""Pixels: the colours of a saliency map, overlays on images and on whole photographs, and rows of titled panels.

Nothing here knows a network. Letters: H x W pixels of an image, h x w the size of a saliency map.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ._utils.checks import check_names
from ._utils.files import make_folder, write_whole
from .inference.images import resize_saliency

COLOURS = ('viridis', 'inferno', 'jet')
OPACITY = 0.8
"""Opacity of the colours where the saliency is 1."""

_MARK = 'timm_castream'  # in the files of pictures, see `is_picture`
_JET_OPACITY = 160  # of 255; times OPACITY it is one half
_MOST_PANELS = 12  # of a line
_LEAST_WIDTH = 200  # pixels of a panel, for its title: smaller images are enlarged
_GAP = 8
_LINES = 1.25  # height of a line of text in units of the letters' size


class Panel(NamedTuple):
    """One picture of a row: a title of one or more lines, and (H, W, 3) pixels of 8 bits."""

    title: str
    pixels: np.ndarray


class Box(NamedTuple):
    """The part of a photograph that a network gets, in pixels of the photograph. Padding lies outside of it."""

    left: float
    top: float
    right: float
    bottom: float


def check_style(colours: str, opacity: float) -> None:
    """Raises ValueError unless these are known colours and an opacity in [0, 1]."""
    check_names('colours', (colours,), COLOURS)
    if not 0 <= opacity <= 1:
        raise ValueError(f'opacity must lie in [0, 1], got {opacity}.')


def map_note(saliency: Tensor) -> str:
    """What a title says of a map that shows nothing: `'map with NaN'`, `'constant map'`, or `''` for other maps."""
    return 'map with NaN' if saliency.isnan().any() else '' if saliency.any() else 'constant map'


def heat_map(saliency: Tensor, size: Sequence[int], colours: str = COLOURS[0]) -> np.ndarray:
    """The colours of a saliency map with their opacity.

    `'viridis'` (from violet to yellow) and `'inferno'` (from black to yellow) are perceptually uniform, and as opaque as
    the map is salient, so the image shows where the map is low. `'jet'` (from blue to red) covers the whole image
    evenly, as in the papers. A map with NaN is transparent everywhere.

    Args:
        saliency: (h, w) in [0, 1] or NaN; it is resized as the metrics do it, by `images.resize_saliency`.
        size: (H, W).
        colours: One of `COLOURS`.

    Returns:
        (H, W, 4) of 8 bits: red, green, blue and opacity.

    Raises:
        ValueError: If the colours are unknown.
    """
    check_names('colours', (colours,), COLOURS)
    if saliency.isnan().any():
        return np.zeros((*size, 4), np.uint8)
    resized = resize_saliency(saliency[None], size)[0].cpu().numpy()
    return _table(colours)[np.minimum(resized * 256, 255).astype(np.uint8)]


def overlay(image: np.ndarray, saliency: Tensor, opacity: float = OPACITY, colours: str = COLOURS[0]) -> np.ndarray:
    """An image under the colours of its saliency.

    Args:
        image: (H, W, 3) of 8 bits.
        saliency: (h, w) in [0, 1], see `heat_map`.
        opacity: Factor of the colours' own opacity, in [0, 1]; the image has the rest.
        colours: One of `COLOURS`.

    Returns:
        (H, W, 3) of 8 bits.

    Raises:
        ValueError: If the opacity is out of range or the colours are unknown.
    """
    check_style(colours, opacity)
    heat = heat_map(saliency, image.shape[:2], colours).astype(np.float32)
    share = heat[..., 3:] * (opacity / 255)
    return (image + share * (heat[..., :3] - image)).round().astype(np.uint8)


def overlay_photograph(
    photograph: Image.Image, saliency: Tensor, box: Box, opacity: float = OPACITY, colours: str = COLOURS[0]
) -> np.ndarray:
    """A whole photograph under the colours of a saliency map of its crop. Outside of the crop it is grey.

    Args:
        photograph: Of any size.
        saliency: (h, w) in [0, 1], of the crop.
        box: The crop, as `transform_image` gives it.
        opacity, colours: As for `overlay`.

    Returns:
        (H, W, 3) of 8 bits, the size of the photograph.
    """
    left, top, right, bottom = (round(value) for value in box)
    crop = photograph.convert('RGB').crop((left, top, right, bottom))  # black where the box exceeds the photograph
    whole = photograph.convert('L').convert('RGB')
    whole.paste(Image.fromarray(overlay(np.asarray(crop), saliency, opacity, colours)), (left, top))
    return np.asarray(whole)


def transform_image(transform: Any, image: Image.Image) -> tuple[Tensor, Box]:
    """Runs timm's eval transform on an image, and follows what part of the image is left.

    Args:
        transform: Of `timm.data.create_transform`, for evaluation.
        image: The image.

    Returns:
        The transform's output, and the part of the image that it shows.
    """
    left = top = 0.0
    per_column = per_row = 1.0  # pixels of the image
    width, height = image.size
    value: Any = image
    for step in transform.transforms:
        before, value = value, step(value)
        if not isinstance(value, Image.Image) or before.size == value.size:
            continue
        if 'Crop' in type(step).__name__:
            left += per_column * _cut(before.width, value.width)
            top += per_row * _cut(before.height, value.height)
        else:
            per_column *= before.width / value.width
            per_row *= before.height / value.height
        width, height = value.size
    return value, Box(left, top, left + per_column * width, top + per_row * height)


def _cut(before: int, after: int) -> int:
    """Pixels that a centre crop takes from the left, negative where it pads."""
    return round((before - after) / 2) if before >= after else -((after - before) // 2)


def write_maps(
    folder: Path,
    photograph: Image.Image,
    crop: Box,
    maps: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    opacity: float = OPACITY,
    colours: str = COLOURS[0],
) -> list[Path]:
    """Writes maps as arrays (`.npy`) and over the whole photograph (`.jpg`), and what is known of them as JSON.

    Args:
        folder: Made where it is missing.
        photograph: The whole photograph.
        crop: The part of it that the network gets, which the arrays show.
        maps: {name of a file: (h, w) in [0, 1]}.
        facts: More for `explanation.json`, plain data.
        opacity, colours: As for `overlay`.

    Returns:
        The files.
    """
    make_folder(folder)
    paths = []
    for name, values in maps.items():
        paths += [folder / f'{name}.npy', folder / f'{name}.jpg']
        with write_whole(paths[-2], 'wb') as file:
            np.save(file, values.cpu().numpy())
        with write_whole(paths[-1], 'wb') as file:
            whole = overlay_photograph(photograph, values, crop, opacity, colours)
            Image.fromarray(whole).save(file, 'JPEG', quality=90, comment=_MARK.encode())
    described = {
        **facts,
        'photograph': {'width': photograph.width, 'height': photograph.height},
        'crop': crop._asdict(),
        'maps': {
            name: {
                'shape': list(values.shape),
                'constant': map_note(values) == 'constant map',
                'nan': map_note(values) == 'map with NaN',
            }
            for name, values in maps.items()
        },
    }
    paths.append(folder / 'explanation.json')
    with write_whole(paths[-1]) as text:
        text.write(json.dumps(described, indent=1) + '\n')
    return paths


def draw_row(panels: Sequence[Panel]) -> np.ndarray:
    """Panels of equal sizes beside each other, each under its title: (H, W, 3) pixels of 8 bits.

    More than `_MOST_PANELS` go on in further lines.
    """
    lines = [panels[start : start + _MOST_PANELS] for start in range(0, len(panels), _MOST_PANELS)]
    return _draw_line(panels) if len(lines) == 1 else np.asarray(stack_rows([_draw_line(line) for line in lines]))


def _draw_line(panels: Sequence[Panel]) -> np.ndarray:
    height, width = panels[0].pixels.shape[:2]
    enlarged = -(-_LEAST_WIDTH // width)
    height, width = height * enlarged, width * enlarged
    letters = _letters(width)
    titles = [_folded(panel.title, width, letters) for panel in panels]
    title_height = max(map(len, titles)) * round(_LINES * letters) + _GAP
    canvas = Image.new('RGB', (len(panels) * (width + _GAP) + _GAP, title_height + height + _GAP), 'white')
    draw = ImageDraw.Draw(canvas)
    for column, (title, panel) in enumerate(zip(titles, panels, strict=True)):
        left = _GAP + column * (width + _GAP)
        picture = Image.fromarray(panel.pixels)
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, title_height))
        baseline = title_height - _GAP // 2
        for line in reversed(title):
            draw.text((left + width / 2, baseline), line, 'black', _font(letters), anchor='ms')
            baseline -= round(_LINES * letters)
    return np.asarray(canvas)


def _folded(title: str, width: int, letters: int) -> list[str]:
    """The lines of a title, folded where they are wider than a panel: behind a space or a comma, or else anywhere."""
    font = _font(letters)
    lines = []
    for text in title.split('\n'):
        while font.getlength(text) > width and len(text) > 1:
            fits = next(n for n in range(len(text) - 1, 0, -1) if n == 1 or font.getlength(text[:n]) <= width)
            after = max(text.rfind(mark, 0, fits) + 1 for mark in ' ,')
            lines.append(text[: after or fits].rstrip())
            text = text[after or fits :]
        lines.append(text)
    return lines


def stack_rows(rows: Sequence[np.ndarray], caption: str = '') -> Image.Image:
    """Rows below each other, over a caption.

    Args:
        rows: Of `draw_row`.
        caption: A line of text.
    """
    letters = _letters(0)
    width = max(row.shape[1] for row in rows)
    height = sum(len(row) for row in rows) + (round(2 * _LINES * letters) if caption else 0)
    canvas = Image.new('RGB', (width, height), 'white')
    top = 0
    for row in rows:
        canvas.paste(Image.fromarray(row), (0, top))
        top += len(row)
    if caption:
        ImageDraw.Draw(canvas).text((_GAP, top), caption, '#444444', _font(letters))
    return canvas


def draw_grid(rows: Sequence[Sequence[Panel]], caption: str = '') -> Image.Image:
    """A picture with a line of panels, of equal sizes, for each row, over a caption."""
    return stack_rows([draw_row(row) for row in rows], caption)


def save(picture: Any, path: str | Path) -> Path:
    """Writes a picture that takes its name once it is complete.

    Args:
        picture: An image of Pillow or a figure of matplotlib.
        path: The file; a figure may be `.pdf` or `.svg`, and everything else is a PNG.

    Returns:
        The path.
    """
    path = Path(path)
    with write_whole(path, 'wb') as file, warnings.catch_warnings():
        if isinstance(picture, Image.Image):
            mark = PngInfo()
            mark.add_text('Software', _MARK)
            # Less than half of the default's time, a tenth more bytes.
            picture.save(file, 'PNG', compress_level=1, pnginfo=mark)
        else:
            warnings.filterwarnings('ignore', 'Glyph')  # matplotlib draws a box for a letter that its fonts lack
            kind = path.suffix[1:] if path.suffix in ('.pdf', '.svg') else 'png'
            picture.savefig(file, format=kind, metadata={'Software': _MARK} if kind == 'png' else None)
    return path


def is_picture(path: str | Path) -> bool:
    """Whether a file is a picture that `save` or `write_maps` wrote."""
    try:
        with Image.open(path) as image:
            return image.info.get('Software') == _MARK or image.info.get('comment') == _MARK.encode()
    except Exception:  # of a file that is no image, decoders raise anything
        return False


def _letters(width: int) -> int:
    """Size of the letters, in pixels, over a panel of this width."""
    return max(11, round(width / 19))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'), size)


@cache
def _table(colours: str) -> np.ndarray:
    """(256, 4): the colour and the opacity of each level."""
    table = matplotlib.colormaps[colours](np.arange(256), bytes=True)
    table[:, 3] = _JET_OPACITY if colours == 'jet' else np.arange(256)
    return table

"""Fits a CA-Stream beside a frozen network from a folder of images, without labels by default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ._utils.checks import ChannelNumbers, channel_numbers

if TYPE_CHECKING:
    from .fitting.run import Fitted

__all__ = ['fit']


def fit(
    model: nn.Module,
    images: str | Path | Sequence[str | Path],
    labels: str = 'predicted',
    output: str | Path = 'fitted',
    *,
    epochs: int | Sequence[int] | None = None,
    lr: float | Sequence[float] | None = None,
    stream_start: int | Sequence[int] | None = None,
    num_images: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    weight_decay: float = 0.0,
    distill: float = 0.0,
    true_share: float = 0.0,
    augment: bool = False,
    img_size: int | None = None,
    input_size: Sequence[int] | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    mean: ChannelNumbers | None = None,
    std: ChannelNumbers | None = None,
    cache_size: float = 20.0,
    cache: str | Path | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Fitted:
    """Fits a stream beside a frozen network, chooses its settings on images held out, and measures it on others.

    The network's weights stay as they are. Its feature maps are kept on disk in float16, so that an epoch takes seconds;
    where they do not fit, every epoch runs the network. A tenth of the images (at most 1,000) is held out for the
    choice of the settings, another tenth (at most 500) for the answer. An interrupted fit resumes where it stopped, and
    gives the same stream.

    The rule of the choice: recipes more than one point less accurate than GAP are left out (five points where GAP's
    predictions are the labels, since its accuracy is then 100 %). Of the others the one with the greatest AG + AI of
    Grad-CAM, minus those of random maps, is chosen. Within one point of the greatest the more accurate recipe is taken, then
    the one with fewer epochs. Where none is accurate enough, the most accurate one is taken.

    The rule of the answer: the stream helps where the accuracy is not lower (its interval reaches 0; without labels:
    CA predicts GAP's class on 90 % of the images or more), where AG and AI of Grad-CAM are better, and where AG is
    still better after what random maps gain is taken off.

    Args:
        model: A timm model with trained weights. On success it gets the fitted stream, in place. Where it has a stream
            already, the arguments of that stream are kept, its weights are replaced. Otherwise the stream starts as
            the average pooling (`stream_init='gap'`) where the network has one.
        images: A folder of images, or several; every image below them is used.
        labels: `'predicted'`: the network's own prediction is the label, no labels are read. `'folders'`: each
            subfolder of `images` is a class; the classifier is fitted to them under GAP first, and then frozen.
        output: Folder for the results; it holds nothing else. It gets `stream.safetensors` (`load_stream` takes it),
            `model/` (a folder that `local-dir:` loads), `evaluation/`, `pictures/`, `report.md` and `fit.json`.
        epochs: Passes over the images. Several are tried, and one is chosen; None: 1 and 3.
        lr: Learning rate at the start of the cosine, or several to try. None: 3e-5 and 1e-4 (`'paper'` start: 3e-4 and
            1e-3).
        stream_start: l of the placement S_l - S_L, or several to try. None: that of the model's stream, or 0 and L.
        num_images: Use so many of the images, drawn by `seed`.
        seed: Seed of every draw: the images, the parts, the first weights and the order of training.
        batch_size: Images of one step.
        weight_decay: AdamW's.
        distill: Share of the target, in [0, 1], that is the network's probabilities of all classes, in place of the class
            that it predicts. It keeps the stream from becoming surer than the network.
        true_share: Share of the training images, in [0, 1], whose label is the class that their folder names, where
            the model has a class of that name.
        augment: Train on random crops, flips and colours, timm's. The label of an image is what the network predicts
            for what is left of it. No maps can be kept then.
        img_size: Side of the input in pixels, which the model keeps. None: that of its `pretrained_cfg`.
        input_size: Channels, height and width of the input, in place of `img_size`.
        crop_pct: Share of the image in the crop, which the model keeps. None: that of its `pretrained_cfg`.
        crop_mode: `'center'`, `'squash'` or `'border'`, which the model keeps. None: that of its `pretrained_cfg`.
        mean, std: Of pixels in [0, 1], one number or one per channel, which the model keeps. None: those of its
            `pretrained_cfg`.
        cache_size: Most gigabytes of maps to keep on disk. 0 keeps none.
        cache: Folder for the maps, which stays for other fits of the same images and network. None: in the output
            folder until the fit is finished.
        workers: Processes that read images.
        progress: Show progress bars.

    Returns:
        The model, the report, and whether the stream helps.

    Raises:
        ValueError: If there are too few images, the network has no trained classifier, an argument does not fit, or the
            output holds another fit.
    """
    from .fitting.run import run
    from .fitting.settings import Settings

    settings = Settings(
        labels=labels,
        epochs=_several('epochs', epochs, int),
        lr=_several('lr', lr, float),
        stream_start=_several('stream_start', stream_start, int),
        num_images=num_images,
        seed=seed,
        batch_size=batch_size,
        weight_decay=weight_decay,
        distill=distill,
        true_share=true_share,
        augment=augment,
        image_settings={
            'img_size': img_size,
            'input_size': None if input_size is None else list(input_size),
            'crop_pct': crop_pct,
            'crop_mode': crop_mode,
            'mean': None if mean is None else channel_numbers('mean', mean),
            'std': None if std is None else channel_numbers('std', std),
        },
    )
    return run(model, images, Path(output), settings, cache_size, cache, workers, progress)


def _several(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    """A value, a sequence of them or None as a tuple of numbers."""
    if value is None:
        return ()
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    least, exclusive = (1, False) if name == 'epochs' else (0, name == 'lr')
    for number in values:
        fits = isinstance(number, (int, float)) and not isinstance(number, bool) and kind(number) == number
        if not fits or number < least or (exclusive and number == 0):
            valid = {'epochs': 'ints of at least 1', 'lr': 'numbers above 0', 'stream_start': 'indices of stages'}[name]
            raise ValueError(f'{name} must be {valid}, got {value!r}.')
    return tuple(map(kind, values))

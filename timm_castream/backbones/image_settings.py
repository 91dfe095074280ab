"""The images that a network takes: channels, size, crop and normalisation, as timm's `resolve_data_config` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import create_loader, resolve_data_config

from .._utils.checks import ChannelNumbers, channel_numbers

_OTHER_SIZES = ('test_input_size', 'pool_size', 'test_pool_size')


def image_settings(
    model: Any,
    input_size: Sequence[int] | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    mean: ChannelNumbers | None = None,
    std: ChannelNumbers | None = None,
) -> dict[str, Any]:
    """What timm's `create_transform` and `create_loader` need to know of a network's images.

    Args:
        model: A timm model.
        input_size: (C, H, W) in place of the model's own.
        img_size: Its H and W, if they are equal.
        crop_pct: Share of the image in the crop, in place of the model's own.
        crop_mode: `'center'`, `'squash'` or `'border'`, in place of the model's own.
        mean, std: Of pixels in [0, 1], one number or one per channel, in place of the model's own.

    Returns:
        `input_size`, `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode`. The channels are those that the model
        was created with. As in timm's loader, another number of channels than mean and std have gets their average.

    Raises:
        ValueError: The model takes images of another number of channels, or `mean` or `std` is refused by
            `channel_numbers`.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    own = (cfg.get('input_size') or (3,))[0]
    channels = getattr(model, 'in_chans', None) or own
    if input_size is not None and input_size[0] != channels:
        raise ValueError(f'The model takes images of {channels} channels, --input-size has {input_size[0]}.')
    given = {
        name: None if values is None else channel_numbers(name, values, channels)
        for name, values in (('mean', mean), ('std', std))
    }
    options = {
        'input_size': input_size and tuple(input_size),
        'img_size': img_size,
        'crop_pct': crop_pct,
        'crop_mode': crop_mode,
        **{name: None if numbers is None else tuple(numbers) for name, numbers in given.items()},
    }
    config = resolve_data_config(options, model=model)
    config['input_size'] = (channels, *config['input_size'][1:])
    for name in ('mean', 'std'):
        values = config[name]
        if len(values) != channels:
            config[name] = (float(sum(values) / len(values)),) * channels
    return config


def image_loader(model: Any, dataset: Any, batch_size: int, **options: Any) -> Any:
    """timm's loader of the images that a network takes, in this process and on the device of the network.

    Args:
        model: A timm model.
        dataset: A data set of images and labels. The loader sets its `transform`.
        batch_size: Images at a time.
        options: As timm's `create_loader`, in place of the network's own.

    Returns:
        The loader, of batches x (B, C, H, W) and target (B,).
    """
    here = {'num_workers': 0, 'device': next(model.parameters()).device, 'persistent_workers': False}
    return create_loader(dataset, batch_size=batch_size, **{**image_settings(model), **here, **options})


def set_image_settings(
    model: Any,
    input_size: Sequence[int] | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    mean: ChannelNumbers | None = None,
    std: ChannelNumbers | None = None,
) -> None:
    """Writes the settings into the model's `pretrained_cfg`, and makes a network of a fixed size take the new one.

    Args, Raises: as `image_settings`.
    """
    cfg = model.pretrained_cfg
    settings = image_settings(model, input_size, img_size, crop_pct, crop_mode, mean, std)
    size = tuple(settings['input_size'])
    if input_size is None and img_size is None:
        settings['input_size'] = (size[0], *cfg.get('input_size', size)[1:])
    elif size != tuple(cfg.get('input_size', ())):
        settings |= dict.fromkeys(_OTHER_SIZES)
        if cfg.get('fixed_input_size') and hasattr(model, 'set_input_size'):
            try:
                model.set_input_size(img_size=size[1:])  # timm resamples the position embeddings
            except (AssertionError, RuntimeError, ValueError) as error:
                height, width = size[1:]
                raise ValueError(
                    f'{type(model).__name__} takes no images of {height} x {width} pixels: {error}'
                ) from error
    if crop_pct is not None:
        settings['test_crop_pct'] = None
    model.pretrained_cfg = model.default_cfg = {**cfg, **settings}

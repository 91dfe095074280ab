"""Read and write weights as safetensors files.

The header of a file with a stream stores the stream's arguments and the fingerprint of the backbone's weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._utils.files import write_whole
from ..backbones.mixin import KEY_PREFIX
from ..backbones.stream_config import inference_args

FORMAT_VERSION = 1


@dataclass(frozen=True)
class StreamHeader:
    """Metadata of a saved stream.

    Attributes:
        backbone: timm's name of the backbone, `resnet50`.
        stream_args: The `stream_*` keyword arguments.
        fingerprint: `fingerprint(model)` of the model that the stream was trained in.
        fingerprint_float16: The same of the weights in float16, or '' in older files.
    """

    backbone: str
    stream_args: dict[str, Any]
    fingerprint: str
    fingerprint_float16: str = ''

    @classmethod
    def of(cls, model: Any) -> StreamHeader:
        """The header of a model with a stream."""
        config = json.loads(json.dumps(model.castream_config))
        return cls(backbone_name(model), config, fingerprint(model), fingerprint(model, torch.float16))

    @classmethod
    def parse(cls, metadata: Mapping[str, str], origin: str) -> StreamHeader:
        """Reads the header from the metadata of a safetensors file.

        Args:
            metadata: As `read_safetensors` gives it.
            origin: The file, as an error should name it.

        Raises:
            ValueError: If there is no header, or its format is a later one.
        """
        try:
            version = int(metadata['castream_format'])
            if version <= FORMAT_VERSION:
                return cls(
                    metadata['backbone'],
                    dict(json.loads(metadata['stream_args'])),
                    metadata['fingerprint'],
                    metadata.get('fingerprint_float16', ''),
                )
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f'{origin} has no header of a CA-Stream: save streams with timm_castream.save_stream(model, path).'
            ) from None
        raise ValueError(
            f'{origin} is of format {version}, this timm_castream reads formats up to {FORMAT_VERSION}: '
            'install a newer one.'
        )

    def to_metadata(self) -> dict[str, str]:
        """The header as the metadata of a safetensors file, which are strings."""
        return {
            'format': 'pt',
            'castream_format': str(FORMAT_VERSION),
            'backbone': self.backbone,
            'stream_args': json.dumps(self.stream_args),
            'fingerprint': self.fingerprint,
            'fingerprint_float16': self.fingerprint_float16,
        }

    def check_arguments(self, model: Any, origin: str) -> None:
        """Refuses a model of another backbone or with another stream. Dropout and initialisation may differ.

        Raises:
            ValueError: Naming both sides.
        """
        if self.backbone != backbone_name(model):
            raise ValueError(f'{origin} holds a stream of {self.backbone}, this model is {backbone_name(model)}.')
        own, saved = (inference_args(args) for args in (model.castream_config, self.stream_args))
        wrong = [k for k in sorted(own.keys() | saved.keys()) if own.get(k) != saved.get(k)]
        if wrong:
            theirs, ours = (', '.join(f'{k}={args.get(k)!r}' for k in wrong) for args in (saved, own))
            raise ValueError(f"{origin} holds a stream with {theirs}, this model's has {ours}.")

    def check_fingerprint(self, model: nn.Module, origin: str, strict: bool = True) -> None:
        """Refuses a model with other frozen weights than those of the training. Warns where not `strict`.

        Raises:
            ValueError: Naming both fingerprints.
        """
        own = fingerprint(model)
        # A copy in float16 has other values in bfloat16, and equal ones in float16.
        if own == self.fingerprint or fingerprint(model, torch.float16) == self.fingerprint_float16:
            return
        half = any(p.dtype == torch.float16 for p in model.parameters()) and not self.fingerprint_float16
        message = (
            f'{origin} was trained on other weights of {self.backbone}: their fingerprint is '
            f"{self.fingerprint}, this model's is {own}"
            f'{" (an older file cannot be compared with float16: load it before model.half())" if half else ""}.'
        )
        if strict:
            raise ValueError(f'{message[:-1]}; load those weights first, or pass strict=False.')
        warnings.warn(message, stacklevel=4)


def backbone_name(model: nn.Module) -> str:
    """timm's name of a model without its stream, or of its class where it is not registered."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return (cfg.get('architecture') or type(model).__name__).removesuffix('_castream')


def fingerprint(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> str:
    """SHA-256 of the backbone's weights and normalisation statistics.

    The stream, the classifier (another number of classes is the same backbone) and integer counters are left out.
    Values are rounded to bfloat16, so that copies in float64, float32 and bfloat16 agree, or to float16, so that those
    in float64, float32 and float16 do. Memory format, device and the order of the keys do not matter.

    Args:
        model: A timm model, with a stream or without.
        dtype: `torch.bfloat16` or `torch.float16`.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    skip = (KEY_PREFIX, *(f'{name}.' for name in _classifier_names(model)))
    for key, tensor in sorted(model.state_dict().items()):
        if key.startswith(skip) or not tensor.is_floating_point():
            continue
        values = tensor.to(dtype).cpu().contiguous().view(torch.int16)
        digest.update(f'{key} {tuple(tensor.shape)}\n'.encode())
        digest.update(values.numpy())
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of every weight, bit for bit. It identifies the model that was measured."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        for part in _plain_parts(value):
            digest.update(part)
    return digest.hexdigest()


def _plain_parts(value: Any) -> Iterator[Any]:
    """The bytes of an entry of a state dict. Quantised layers keep tuples and settings beside their tensors."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _plain_parts(item)
    elif isinstance(value, Tensor):
        plain = value.dequantize() if value.is_quantized else value
        yield plain.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    else:
        yield repr(value).encode()


def _classifier_names(model: nn.Module) -> list[str]:
    get_classifier = getattr(model, 'get_classifier', None)
    classifiers = get_classifier() if get_classifier is not None else ()
    if isinstance(classifiers, nn.Module):
        classifiers = (classifiers,)
    return [name for name, module in model.named_modules() if any(module is c for c in classifiers or ())]


def stream_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `castream.*` entries of a state dict."""
    return {key: value for key, value in state_dict.items() if key.startswith(KEY_PREFIX)}


def plain_stream(model: nn.Module) -> dict[str, Tensor]:
    """The `castream.*` entries of a model's state dict, with the weight itself in place of its parametrisation.

    Args:
        model: A model with a stream. torch.nn.utils.parametrize may have replaced weights of it.
    """
    entries = stream_state_dict(model.state_dict())
    for name, module in model.named_modules():
        if not f'{name}.'.startswith(KEY_PREFIX) or not is_parametrized(module):
            continue
        entries = {key: value for key, value in entries.items() if not key.startswith(f'{name}.parametrizations.')}
        for weight in module.parametrizations:
            entries[f'{name}.{weight}'] = getattr(module, weight)
    return entries


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all.

    Args:
        path: File to write.
        tensors: Tensors by name, on any device.
        metadata: Strings for the header.

    Raises:
        OSError: If the file cannot be written.
    """
    with write_whole(path, 'wb') as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file.name, metadata)
        os.chmod(file.name, mode)  # save_file puts a file in its place that the user alone can read


def read_safetensors(path: str | Path, origin: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file.

    Args:
        path: The file.
        origin: The file, as an error should name it.

    Returns:
        Its tensors, on the CPU, and its metadata.

    Raises:
        ValueError: If it is damaged or of another format.
    """
    try:
        with safe_open(path, framework='pt', device='cpu') as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'{origin} is damaged or no safetensors file ({error}).') from error


def check_fit(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str, adapted: Collection[str] = ()
) -> None:
    """Refuses a state dict that does not fit, before any of it is loaded. torch finds a wrong shape only half way.

    Args:
        state_dict: The state dict to load.
        own: The model's own.
        origin: The file, as an error should name it.
        adapted: Keys that will be dropped or changed to fit.

    Raises:
        ValueError: Naming the first keys that are missing, unknown or of another shape.
    """

    def some(keys: list[str]) -> str:
        return ', '.join(keys[:3]) + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')

    missing = [key for key in own if key not in state_dict and key not in adapted]
    unknown = [key for key in state_dict if key not in own and key not in adapted]
    shapes = [
        f'{key} is {tuple(value.shape)}, not {tuple(own[key].shape)}'
        for key, value in state_dict.items()
        if key in own and key not in adapted and value.shape != own[key].shape
    ]
    problems = [
        f'{problem} {some(keys)}'
        for problem, keys in (('it lacks', missing), ('the model lacks', unknown), ('of another shape:', shapes))
        if keys
    ]
    if problems:
        check_prefix(state_dict, own, origin)
        raise ValueError(f'{origin} does not fit this model: {"; ".join(problems)}.')


def check_prefix(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    """Raises ValueError where most keys of a model stand under a prefix, such as `model.` of a wrapper.

    Args:
        state_dict: Tensors by key.
        own: Those of the model.
        origin: Where the tensors come from.
    """
    unknown = next((key for key in state_dict if key not in own), '').split('.')
    prefixes = ('.'.join(unknown[:count]) + '.' for count in range(1, len(unknown)))
    prefix = next((p for p in prefixes if sum(p + key in state_dict for key in own) > len(own) / 2), '')
    if prefix:
        raise ValueError(
            f'{origin} does not fit this model: its keys begin with {prefix!r}: save the state dict of the model under '
            'that name.'
        )

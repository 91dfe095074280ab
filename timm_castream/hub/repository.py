"""Write the folder of a Hub repository: config.json, model.safetensors and the model card."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from .._utils.files import make_folder
from ..backbones.mixin import CAStreamMixin, castream_model
from .download import WEIGHTS_NAME
from .label_names import label_names
from .load import NOT_SAVED
from .read import read_timm_weights
from .stream_file import StreamHeader, backbone_name, fingerprint, stream_state_dict, weights_hash, write_safetensors

_POOLINGS = ('gap', 'ca')  # the other rows of an evaluation are differences


class _Result(NamedTuple):
    """A measured value.

    Attributes:
        metric: Name of the metric.
        name: Text of the table.
        value: In percent.
        interval: Bootstrap interval of a difference between the poolings, '' for a value of one pooling.
    """

    metric: str
    name: str
    value: float
    interval: str = ''


def write_repository(
    model: nn.Module,
    folder: str | Path,
    repo_id: str,
    stream_only: bool = False,
    backbone_pretrained: bool | str = True,
    metrics: dict[str, Any] | None = None,
    dataset: str | None = None,
) -> Path:
    """Writes the folder of a Hub repository, which `local-dir:` loads too.

    Args:
        model: A model with a stream.
        folder: Folder for config.json, model.safetensors and README.md, made if it does not exist.
        repo_id: The repository's name, `org/name`, for the card.
        stream_only: Leave the backbone out; `timm.create_model('hf-hub:org/name', pretrained=True)` takes it from timm.
        backbone_pretrained: With `stream_only`, timm's weights on which the stream was trained: True for those of the
            model's own cfg, or a tag. They are compared with the model's. False: the weights are not timm's.
        metrics: The values of this very model, as `castream evaluate` writes them to evaluation.json.
        dataset: Name of the training data on the Hub. None: `imagenet-1k` where there are 1000 classes. The values are
            said to be of the data set that the metrics name, and of this one where they name none.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no stream, has no name to be created by (whole models), its frozen weights are not
            timm's (streams alone), or the metrics hold no values or those of other weights.
    """
    model = castream_model(model)
    backbone = backbone_name(model)
    architecture = f'{backbone}_castream'
    registered = timm.is_model(architecture)
    if not registered and not stream_only:
        raise ValueError(
            f'No model is registered as {architecture}, so nobody could create it by name: publish the '
            'stream alone, stream_only=True.'
        )
    if not getattr(model, 'pretrained_cfg', None):
        raise ValueError(f'This {type(model).__name__} has no pretrained_cfg to publish: use save_stream.')
    results = _results(metrics, model) if metrics is not None else []
    tag = _timm_tag(model, backbone, backbone_pretrained) if stream_only else None

    folder = make_folder(folder)
    args = {**model.castream_config, **dict.fromkeys(NOT_SAVED)}
    config_alone: Any = None  # neither safetensors nor pickle: the weights below have a header
    save_for_hf(model, str(folder), model_args=args, safe_serialization=config_alone)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    config['architecture'] = architecture
    config['model_args'] = {**_remembered(model), **config['model_args'], 'num_classes': model.num_classes}
    for name in NOT_SAVED:
        config['model_args'].pop(name, None)
    if tag:
        config['model_args']['backbone_pretrained'] = tag
    names = label_names(model)
    for name, value in (('label_names', names), ('label_descriptions', model.pretrained_cfg.get('label_descriptions'))):
        config['pretrained_cfg'].pop(name, None)
        if names and value:
            config[name] = value  # where timm puts them
    config['pretrained_cfg']['hf_hub_filename'] = WEIGHTS_NAME  # named, so that no client takes a pickle
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')

    header = StreamHeader.of(model)
    state_dict = model.state_dict()
    write_safetensors(
        folder / WEIGHTS_NAME, stream_state_dict(state_dict) if stream_only else state_dict, header.to_metadata()
    )
    if dataset is None and model.num_classes == 1000:
        dataset = 'imagenet-1k'
    card = _card(
        repo_id=repo_id,
        header=header,
        config=config,
        dataset=dataset,
        results=results,
        metrics=metrics or {},
        base_model=f'timm/{backbone}.{tag}' if tag else None,
        # By its name a repository gives a whole model, or a stream and the timm weights to put it on.
        by_name=registered and (bool(tag) or not stream_only),
        stream_only=stream_only,
        multilabel='mAP' in (metrics or {}),
        parameters={
            name: sum(p.numel() for p in part.parameters()) / 1e6
            for name, part in (('stream', model.castream), ('total', model))
        },
    )
    (folder / 'README.md').write_text(card, encoding='utf-8')
    return folder


def _remembered(model: nn.Module) -> dict[str, Any]:
    """Arguments of `create_model`, which timm keeps and its save_for_hf writes."""
    return {k: v for k, v in getattr(model, '_model_args', {}).items() if not k.endswith('drop_rate')}


def _timm_tag(model: CAStreamMixin, backbone: str, backbone_pretrained: bool | str) -> str | None:
    """The tag of timm's weights of the backbone, compared with the model's own; None where they are not timm's."""
    if backbone_pretrained is False:
        return None
    # A registered variant's own cfg names the stream's weights, so attach keeps the backbone's.
    tag = model.backbone_cfg.get('tag') if backbone_pretrained is True else backbone_pretrained
    name = f'{backbone}.{tag}'
    if name not in timm.list_models(f'{backbone}.*', pretrained=True):
        raise ValueError(
            f'{name} are no weights of timm: name a tag with backbone_pretrained, or pass False if the '
            'stream was trained on other weights.'
        )
    overlay = {'state_dict': read_timm_weights(name)}
    reference: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    own: Any = model
    same_head = _same_weights(reference.get_classifier(), own.get_classifier())
    if not same_head or fingerprint(reference) != fingerprint(model):
        raise ValueError(
            f'Backbone and classifier of this model are not those of {name}, so the stream alone is not '
            'enough: publish the whole model, name another tag with backbone_pretrained, or pass False.'
        )
    return tag


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        v.shape == theirs[k].shape and torch.equal(v.cpu().bfloat16(), theirs[k].cpu().bfloat16())
        for k, v in ours.items()
    )


def _card(
    *,
    repo_id: str,
    header: StreamHeader,
    config: dict[str, Any],
    dataset: str | None,
    results: list[_Result],
    metrics: dict[str, Any],
    **facts: Any,
) -> str:
    """The model card: the metadata of the Hub in front of `hf_configs/model_card.md`."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # YAML and templates: not at import

    settings = metrics.get('settings', {})
    measured_on = settings.get('dataset') or dataset or 'unknown'
    hub_results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=measured_on,
            dataset_name=measured_on,
            dataset_split=settings.get('split'),
            metric_type=result.metric,
            metric_name=result.name,
            metric_value=result.value,
        )
        for result in results
        if not result.interval
    ]
    data = ModelCardData(
        license=config['pretrained_cfg'].get('license') or 'other',
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'castream', 'interpretability'],
        datasets=[dataset] if dataset else None,
        base_model=facts['base_model'],
        model_name=repo_id.split('/')[-1] if hub_results else None,
        eval_results=hub_results or None,
    )
    template = (files('hf_configs') / 'model_card.md').read_text(encoding='utf-8')
    return str(
        ModelCard.from_template(
            data,
            template_str=template,
            repo_id=repo_id,
            header=header,
            config=config,
            dataset=dataset,
            results=results,
            measured_on=measured_on,
            num_images=metrics.get('num_images'),
            settings=settings,
            **facts,
        )
    )


def _results(metrics: dict[str, Any], model: nn.Module) -> list[_Result]:
    """The values of an evaluation.json: accuracies, then every metric of every row."""
    summary = {'accuracy': 'Top-1 accuracy', 'mAP': 'Mean average precision', 'confidence': 'Mean probability'}
    try:
        results = [
            _Result(key, f'{title}, {pooling.upper()}', round(value, 2))
            for key, title in summary.items()
            for pooling, value in metrics.get(key, {}).items()
        ]
        titles = metrics.get('titles', {})
        method_titles, metric_titles = titles.get('methods', {}), titles.get('metrics', {})
        rows = metrics.get('rows', ())
        if not titles:  # written by 0.2: the names stand in for the titles
            names = {key.removesuffix('_low') for row in rows for key in row if key.endswith('_low')} - {*summary}
            metric_titles = {name: name.replace('_', ' ').title() for row in rows for name in row if name in names}
        for row in rows:
            where = f'{method_titles.get(row["method"], row["method"])}, {row["pooling"].upper()}'
            for key in (key for key in metric_titles if key in row):
                interval = ''
                if f'{key}_low' in row and row['pooling'] not in _POOLINGS:
                    interval = f' [{row[f"{key}_low"]:+.2f}, {row[f"{key}_high"]:+.2f}]'
                results.append(_Result(key, f'{metric_titles[key]}, {where}', round(row[key], 2), interval))
        measured = metrics.get('settings', {}).get('weights')
    except (AttributeError, KeyError, TypeError):
        results, measured = [], None
    if not results:
        raise ValueError('The metrics hold no values of `castream evaluate`, which writes them to evaluation.json.')
    if measured not in (None, weights_hash(model)):
        raise ValueError(
            'The metrics were measured with other weights than those to publish: run `castream evaluate` '
            'on this very checkpoint.'
        )
    return results

"""Training beside the frozen network: the classifier under GAP, the streams on cached maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_castream import pooling

from .maps import Maps


def head(model: Any, vectors: Tensor) -> Tensor:
    """Logits of pooled vectors, (B, C) of (B, D): the model's own head on a map of one location."""
    with pooling(model, 'gap'):
        return model.forward_head(vectors[:, :, None, None])


def fit_classifier(
    model: Any,
    features: Tensor,
    labels: Tensor,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int = 0,
) -> None:
    """Fits the model's classifier to pooled features, with AdamW and a cosine.

    Args:
        model: A model with a stream.
        features: (N, D) averages of the last map.
        labels: (N,) class indices.
        epochs, lr, weight_decay, batch_size, seed: Of the training.
    """
    model.eval().requires_grad_(False)
    classifier = model.get_classifier()
    classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=weight_decay)
    steps = epochs * -(-len(labels) // batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(labels), generator=generator).split(batch_size):
            loss = F.cross_entropy(head(model, features[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    classifier.requires_grad_(False)


def train_stream(
    model: Any,
    maps: Maps,
    indices: Tensor,
    settings: Mapping[str, Any],
    seed: int,
    description: str,
    check: Maps | None = None,
) -> list[dict[str, float]]:
    """Trains the stream of a model on cached maps, with AdamW and a cosine; everything else stays frozen.

    Args:
        model: A model with a fresh stream, in eval mode; its classifier is fitted.
        maps: Maps of the training images, all stages.
        indices: The images to train on.
        settings: `epochs`, `lr`, `weight_decay`, `batch_size` and `label_smoothing`.
        seed: Of the order of the images and of dropout.
        description: For the progress bar.
        check: Maps of images on which each epoch's accuracy is measured.

    Returns:
        Loss and accuracy (percent) after each epoch.
    """
    torch.manual_seed(seed)
    stream: nn.Module = model.castream
    model.eval().requires_grad_(False)
    stream.requires_grad_(True)
    start = first_stage(model, maps)
    optimizer = torch.optim.AdamW(stream.parameters(), lr=settings['lr'], weight_decay=settings['weight_decay'])
    epochs, size = settings['epochs'], settings['batch_size']
    steps = -(-len(indices) // size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    history = []
    with tqdm(desc=description, total=epochs * steps, unit='batch') as bar:
        for epoch in range(epochs):
            stream.train()
            order = indices[torch.randperm(len(indices), generator=generator)]
            total = 0.0
            for features, labels in maps.batches(order, size, start):
                query = stream(features, labels if stream.class_specific else None)
                loss = F.cross_entropy(head(model, query), labels, label_smoothing=settings.get('label_smoothing', 0.0))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                total += loss.item() * len(labels)
                bar.update()
            stream.eval()
            record = {'epoch': epoch + 1, 'loss': total / len(indices)}
            if check is not None:
                record['accuracy'] = accuracy(stream_logits(model, check), check.labels)
            history.append(record)
            bar.set_postfix({name: f'{value:.2f}' for name, value in record.items()})
    stream.requires_grad_(False)
    return history


def first_stage(model: Any, maps: Maps) -> int:
    """Index of the model's first stage among the cached ones."""
    return len(maps.names) - len(model.castream_stages)


@torch.no_grad()
def stream_logits(model: Any, maps: Maps, size: int = 128) -> Tensor:
    """(N, C) logits of the stream on cached maps; a class specific stream takes GAP's prediction."""
    stream, parts = model.castream, []
    for features, _ in maps.batches(torch.arange(len(maps)), size, first_stage(model, maps)):
        predicted = head(model, features[-1].mean((2, 3))).argmax(1) if stream.class_specific else None
        parts.append(head(model, stream(features, predicted)))
    return torch.cat(parts)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()

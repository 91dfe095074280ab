"""The classifier under GAP, fitted to the classes of folders before a stream.

Letters: N images, D channels, C classes, L the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hub.label_names import set_label_names
from .network import FrozenNetwork
from .training import accuracy, classifier_parameters, fit_classifier, pooled_logits, seeded

TRIES = ((6, 3e-4), (6, 1e-3), (12, 1e-3), (12, 3e-3), (12, 1e-2))
"""Epochs and learning rates that are tried. Few images are shown more often, see `LEAST_STEPS`."""
LEAST_STEPS = 500
BATCH = 64
NEAR_CHANCE, ONE_CLASS = 0.95, 0.8
"""Mean entropy of the predictions, as a share of that of chance, above which a classifier counts as untrained: in any
case, and where it predicts one class for nearly all images, as random weights do."""


class ClassifierTry(NamedTuple):
    """What was measured of one fit of the classifier.

    Attributes:
        epochs: 0 for the classifier at the start.
        lr: Learning rate at the start.
        accuracy: In percent of the selection images, under GAP.
    """

    epochs: int
    lr: float
    accuracy: float


def replace_classifier(model: Any, classes: Sequence[str], known: dict[str, int], seed: int) -> None:
    """Gives a timm model a classifier of these classes, and their names. In place.

    Where the model knows all of the classes by name the new rows are those of its old classifier.

    Args:
        model: A timm model.
        classes: Names of the classes.
        known: Index of each class that the model knows by name.
        seed: Seed of new rows.
    """
    device = next(model.parameters()).device
    old = classifier_parameters(model)
    with seeded(seed, device):
        model.reset_classifier(len(classes))
    model.to(device)
    if set(classes) <= known.keys():
        rows = [known[name] for name in classes]
        with torch.no_grad():
            for before, parameter in zip(old, classifier_parameters(model), strict=True):
                parameter.copy_(before[rows])
    set_label_names(model, classes)
    model.pretrained_cfg['num_classes'] = len(classes)


def choose_classifier(
    network: FrozenNetwork,
    train: tuple[Tensor, Tensor],
    selection: tuple[Tensor, Tensor],
    seed: int,
    tries: Sequence[tuple[int, float]] | None = None,
) -> list[ClassifierTry]:
    """Fits the classifier with each of the settings tried, and leaves the most accurate one in the network.

    Args:
        network: The network, with the classifier to start from.
        train: (N, D_L) pooled vectors and (N,) labels to fit to.
        selection: Those on which the accuracy is measured.
        seed: Seed of the training.
        tries: Epochs and learning rates. None: those of `TRIES`, with more epochs where they are fewer than 500 steps.

    Returns:
        What was tried, the start first.
    """
    if tries is None:
        least = -(-LEAST_STEPS // -(-len(train[1]) // BATCH))
        tries = [(max(epochs, least), lr) for epochs, lr in TRIES]
    start = classifier_state(network.model)
    pooled, labels = selection
    tried = [ClassifierTry(0, 0.0, accuracy(pooled_logits(network, pooled), labels))]
    best = start
    for epochs, lr in tries:
        load_classifier(network.model, start)
        fit_classifier(network, *train, epochs=epochs, lr=lr, batch_size=BATCH, seed=seed)
        entry = ClassifierTry(epochs, lr, accuracy(pooled_logits(network, pooled), labels))
        if entry.accuracy > max(other.accuracy for other in tried):
            best = classifier_state(network.model)
        tried.append(entry)
    load_classifier(network.model, best)
    return tried


def check_trained(logits: Tensor, name: str) -> None:
    """Refuses a classifier whose predictions are close to chance.

    Args:
        logits: (N, C) of the images.
        name: Name of the network, for the error.
    """
    probabilities = logits.softmax(1)
    entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(1).mean().item()
    most_common = logits.argmax(1).bincount().max().item() / len(logits)
    limit = (ONE_CLASS if most_common > NEAR_CHANCE else NEAR_CHANCE) * math.log(logits.shape[1])
    if logits.shape[1] > 1 and entropy > limit:
        raise ValueError(
            f'The classifier of this {name} is not trained: it gives its {logits.shape[1]} classes almost equal '
            "probabilities. Name trained weights, or fit a classifier with labels='folders'."
        )


def classifier_state(model: Any) -> dict[str, Tensor]:
    """A copy of the classifier's parameters, by their names in the model."""
    own = {id(parameter) for parameter in classifier_parameters(model)}
    return {name: value.detach().clone() for name, value in model.named_parameters() if id(value) in own}


def load_classifier(model: Any, tensors: dict[str, Tensor]) -> None:
    """Puts parameters that `classifier_state` gave into the model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)

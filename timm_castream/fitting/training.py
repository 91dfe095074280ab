"""Training beside a frozen network: the classifier under GAP on pooled vectors, and streams on the maps of the stages.

Several streams train at once: a batch of maps is read once, and each stream takes its step. A stream's weights do not
depend on the streams beside it.

Letters: B images of a batch, N images, C classes, D channels, L the last stage.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..attach import attach, detach
from ..hub.stream_file import write_safetensors
from ..stream import CAStream
from .features import Features
from .network import FrozenNetwork

SAVE_SECONDS = 60.0
"""The state of training is saved this often. A kill loses the steps since then."""


@dataclass(frozen=True)
class Recipe:
    """Settings of the training of one stream: AdamW, and a cosine from `lr` to 0 over all steps.

    Attributes:
        stream_start: l of the placement S_l - S_L.
        epochs: Passes over the training images.
        lr: Learning rate at the start.
        weight_decay: AdamW's. It pulls a stream with `stream_init='gap'` away from its start.
        label_smoothing: In [0, 1].
    """

    stream_start: int
    epochs: int
    lr: float
    weight_decay: float = 0.0
    label_smoothing: float = 0.0

    def __str__(self) -> str:
        return f'stream start {self.stream_start}, epochs {self.epochs}, lr {self.lr:g}'


@dataclass
class Targets:
    """What the images of training are to be taken for.

    Attributes:
        labels: (N,) class indices; -1 where the prediction of the network for the very image is the label.
        soft: Where the network's prediction is the label, this share of the target are its probabilities of all
            classes. In [0, 1].
    """

    labels: Tensor
    soft: float = 0.0

    def __call__(self, network: FrozenNetwork, indices: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The labels of a batch, (B,), and its targets, (B,) or (B, C).

        Args:
            network: The network.
            indices: (B,) rows of `labels`.
            pooled: (B, D_L) pooled vectors of the images.
        """
        labels = self.labels[indices].to(pooled.device)
        own = labels < 0
        if not own.any():
            return labels, labels
        with torch.no_grad():
            logits = network.logits(pooled)
        labels = torch.where(own, logits.argmax(1), labels)
        if not self.soft:
            return labels, labels
        hard = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return labels, torch.where(own[:, None], hard.lerp(logits.softmax(1), self.soft), hard)


class Candidate:
    """A stream in training.

    Args:
        network: The network.
        recipe: Its settings.
        stream_args: Further `stream_*` arguments of `attach`.
        seed: Seed of the first weights.

    Attributes:
        stream: The stream, apart from the network.
        optimizer: Its AdamW.
    """

    def __init__(self, network: FrozenNetwork, recipe: Recipe, stream_args: dict[str, Any], seed: int) -> None:
        self.recipe = recipe
        with seeded(seed, network.device):
            attach(network.model, **{**stream_args, 'stream_start': recipe.stream_start})
        self.stream: CAStream = network.model.castream
        detach(network.model)
        self.optimizer = torch.optim.AdamW(self.stream.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)

    def step(self, network: FrozenNetwork, maps: Sequence[Tensor], labels: Tensor, targets: Tensor) -> Tensor:
        """Forward, backward and update on one batch.

        Args:
            network: The network.
            maps: The maps of this stream's stages.
            labels: (B,) class indices, for a class specific stream.
            targets: (B,) class indices or (B, C) probabilities.

        Returns:
            The loss, a scalar tensor.
        """
        query = self.stream(maps, labels if self.stream.class_specific else None)
        loss = F.cross_entropy(network.logits(query), targets, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Weights and AdamW's averages by name."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.stream.named_parameters():
            tensors[f'weight.{name}'] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f'{key}.{name}'] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` gave."""
        with torch.no_grad():
            for name, parameter in self.stream.named_parameters():
                parameter.copy_(tensors[f'weight.{name}'])
                state = {key: tensors.get(f'{key}.{name}') for key in ('step', 'exp_avg', 'exp_avg_sq')}
                if state['step'] is not None:
                    self.optimizer.state[parameter] = {
                        key: value.to(parameter.device if key != 'step' else 'cpu')  # type: ignore[union-attr]
                        for key, value in state.items()
                    }


def train_streams(
    network: FrozenNetwork,
    features: Features,
    indices: Tensor,
    targets: Targets,
    candidates: Sequence[Candidate],
    *,
    batch_size: int = 64,
    seed: int = 0,
    state_path: Path | None = None,
    after_epoch: Callable[[int], None] | None = None,
    progress: bool = False,
) -> None:
    """Trains streams on the maps of a frozen network. In place.

    Args:
        network: The network.
        features: The maps.
        indices: (N,) the images to train on.
        targets: Their labels.
        candidates: The streams.
        batch_size: Images of one step.
        seed: Seed of the order of the images and of dropout.
        state_path: File for the state of an unfinished training, from which a second call resumes. None keeps none.
        after_epoch: Called with the number of finished epochs.
        progress: Show a progress bar.

    Raises:
        ValueError: If the file holds the state of a training with other settings.
    """
    key = json.dumps(
        {
            'recipes': [asdict(candidate.recipe) for candidate in candidates],
            'images': len(indices),
            'seed': seed,
            'batch_size': batch_size,
        }
    )
    steps = -(-len(indices) // batch_size)
    epochs = max(candidate.recipe.epochs for candidate in candidates)
    done = _read_state(state_path, key, candidates) if state_path is not None and state_path.is_file() else 0
    saved = time.monotonic()
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for c in candidates for module in c.stream.modules())
    bar = tqdm(desc='stream', total=epochs * steps, initial=done, unit='batch', disable=not progress)
    with bar, network.frozen():
        for candidate in candidates:
            candidate.stream.train()
        for epoch in range(done // steps, epochs):
            active = [candidate for candidate in candidates if candidate.recipe.epochs > epoch]
            start = min(candidate.recipe.stream_start for candidate in active)
            order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed + epoch))
            parts = list(indices[order].split(batch_size))[done - epoch * steps :]
            for part, (maps, pooled) in zip(parts, features.batches(parts, start, epoch), strict=True):
                labels, wanted = targets(network, part, pooled)
                for candidate in active:
                    recipe = candidate.recipe
                    share = done / (recipe.epochs * steps)
                    candidate.optimizer.param_groups[0]['lr'] = recipe.lr * 0.5 * (1 + math.cos(math.pi * share))
                    own = maps[recipe.stream_start - start :]
                    if dropout:
                        with seeded(seed + done, network.device):
                            loss = candidate.step(network, own, labels, wanted)
                    else:
                        loss = candidate.step(network, own, labels, wanted)
                done += 1
                bar.set_postfix(epoch=epoch + 1, loss=f'{loss.item():.3f}', refresh=False)
                bar.update()
                if state_path is not None and (time.monotonic() - saved >= SAVE_SECONDS or done == epochs * steps):
                    _write_state(state_path, key, done, candidates)
                    saved = time.monotonic()
            if after_epoch is not None:
                after_epoch(epoch + 1)
        for candidate in candidates:
            candidate.stream.eval()


@torch.no_grad()
def stream_logits(
    network: FrozenNetwork, features: Features, indices: Tensor, candidates: Sequence[Candidate], batch_size: int = 64
) -> list[Tensor]:
    """Logits of trained streams, (N, C) for each candidate, on the CPU. A class specific one takes GAP's prediction."""
    parts = list(indices.split(batch_size))
    start = min(candidate.recipe.stream_start for candidate in candidates)
    logits: list[list[Tensor]] = [[] for _ in candidates]
    with network.frozen():
        for maps, pooled in features.batches(parts, start):
            for candidate, own in zip(candidates, logits, strict=True):
                stream = candidate.stream.eval()
                predicted = network.logits(pooled).argmax(1) if stream.class_specific else None
                query = stream(maps[candidate.recipe.stream_start - start :], predicted)
                own.append(network.logits(query).cpu())
    return [torch.cat(own) for own in logits]


@torch.no_grad()
def pooled_logits(network: FrozenNetwork, pooled: Tensor, batch_size: int = 512) -> Tensor:
    """(N, C) logits of the network's own pooling, on the CPU, of (N, D_L) pooled vectors."""
    with network.frozen():
        return torch.cat([network.logits(part.to(network.device)).cpu() for part in pooled.split(batch_size)])


def fit_classifier(
    network: FrozenNetwork,
    pooled: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Fits the network's classifier to pooled vectors under GAP: AdamW, and a cosine from `lr` to 0. In place.

    Args:
        network: The network.
        pooled: (N, D_L) pooled vectors.
        labels: (N,) class indices.
        epochs, lr, weight_decay, batch_size, seed: Of the training.
    """
    parameters = classifier_parameters(network.model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    steps = epochs * -(-len(labels) // batch_size)
    done = 0
    with network.frozen():
        for parameter in parameters:
            parameter.requires_grad_(True)
        for epoch in range(epochs):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + epoch))
            for part in order.split(batch_size):
                optimizer.param_groups[0]['lr'] = lr * 0.5 * (1 + math.cos(math.pi * done / steps))
                logits = network.logits(pooled[part].to(network.device))
                loss = F.cross_entropy(logits, labels[part].to(network.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
        optimizer.zero_grad()
        for parameter in parameters:
            parameter.requires_grad_(False)


def classifier_parameters(model: Any) -> list[Tensor]:
    """The parameters of a timm model's classifier, or of its several classifiers."""
    classifiers = model.get_classifier()
    modules: Iterable[Any] = classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,)
    return [parameter for module in modules for parameter in module.parameters()]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent of (N, C) logits."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators inside, and leaves them as they were."""
    devices = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _write_state(path: Path, key: str, done: int, candidates: Sequence[Candidate]) -> None:
    tensors = {f'{i}.{name}': value for i, c in enumerate(candidates) for name, value in c.tensors().items()}
    write_safetensors(path, tensors, {'training': key, 'done': str(done)})


def _read_state(path: Path, key: str, candidates: Sequence[Candidate]) -> int:
    """Restores the candidates, and gives the number of finished steps."""
    with safe_open(path, framework='pt', device='cpu') as file:
        metadata = file.metadata() or {}
        if metadata.get('training') != key:
            raise ValueError(f'{path} holds the state of a training with other settings: name another folder.')
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in file.keys():  # noqa: SIM118
            number, _, rest = name.partition('.')
            tensors.setdefault(number, {})[rest] = file.get_tensor(name)
    for i, candidate in enumerate(candidates):
        candidate.restore(tensors[str(i)])
    return int(metadata['done'])

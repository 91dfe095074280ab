"""Settings of `castream fit` side by side, before the streams of `timm_castream/pretrained` are fitted.

python -m benchmarks.pretrained_tries --output work --sources clones --networks tf_efficientnet_lite0

Reads the feature maps that `python -m benchmarks.pretrained maps` kept in `work`. The tries of a group in
`pretrained_tries.yaml` train at once on the same images. Each is measured on the half of *samples* that is there for
the choice, one photograph of each of 500 classes. `pretrained_tries.csv` gets a row for each; a group that it has is
not run again. `--table` prints the tables of `docs/pretrained.md`.

Letters: B images of a batch, N images, D channels, H x W locations.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from timm.data import create_transform
from torch import Tensor

from benchmarks.fast_network import FastNetwork
from benchmarks.pretrained_images import halves, wordnet_id
from timm_castream.attribution.cam import class_activation_map, grad_cam_weights
from timm_castream.backbones.image_settings import image_settings
from timm_castream.datasets.image_files import image_mode, open_image
from timm_castream.evaluation.bootstrap import mean_curve
from timm_castream.fitting.features import CachedFeatures, write_features
from timm_castream.fitting.images import AugmentedImages, find_files
from timm_castream.fitting.network import FrozenNetwork
from timm_castream.fitting.training import Candidate, Recipe, Targets, pooled_logits
from timm_castream.hub.label_names import imagenet_names
from timm_castream.hub.load import open_model
from timm_castream.inference.images import mask_normalised, normalisation, resize_saliency
from timm_castream.metrics.faithfulness import average_drop, average_gain, average_increase

PACKAGE = Path(__file__).parents[1] / 'timm_castream' / 'pretrained'
HERE = Path(__file__).parent
TRIES = HERE / 'pretrained_tries.yaml'
RESULTS = HERE / 'pretrained_tries.csv'
FIGURES = ('accuracy', 'probability', 'AD', 'AG', 'AI', 'AG less random')
KEYS = ('network', 'group', 'images', 'crops', 'label', 'true_share', 'distill', 'stream_start', 'epochs', 'lr', 'seed')
PARTS, FITTED = 'what the early stages do', 'castream fit'
SEED, BATCH = 0, 64

Column = Callable[[dict[str, str]], str]
Pool = Callable[[list[Tensor]], Tensor]
"""From the maps of the stages of B images, each (B, D_l, H_l, W_l), to pooled vectors, (B, D_L)."""


class Choice:
    """The photographs on which tries are measured.

    Args:
        network: The network.
        files: N photographs.
        labels: (N,) class indices.
        config: The image settings of the network.
    """

    def __init__(self, network: FrozenNetwork, files: Sequence[Path], labels: Tensor, config: dict[str, Any]) -> None:
        self.network, self.labels = network, labels
        transform = create_transform(**config, is_training=False)
        self.x = torch.stack([transform(open_image(file, image_mode(3))) for file in files])
        self.mean, self.std = normalisation(config, self.x)
        self.maps = self._run(self.x)
        grid = self.maps[-1].shape[2:]
        random = [np.random.default_rng((SEED, i)).random(tuple(grid), dtype=np.float32) for i in range(len(files))]
        self.random_maps = self._run(self._masked(slice(None), torch.from_numpy(np.stack(random))))
        self.gap = self.figures(lambda maps: maps[-1].mean((2, 3)))

    def figures(self, pool: Pool) -> dict[str, np.ndarray]:
        """The figures of each photograph under a pooling, (N,) in percent. AD, AG and AI are of Grad-CAM."""
        rows: dict[str, list[Tensor]] = {}
        for part in torch.arange(len(self.x)).split(BATCH):
            maps = [values[part].float() for values in self.maps]
            label = self.labels[part, None]
            with self.network.frozen():
                maps[-1].requires_grad_(True)
                logits = self.network.logits(pool(maps))
                (gradient,) = torch.autograd.grad(logits.gather(1, label).sum(), maps[-1])
            with torch.no_grad(), self.network.frozen():
                weights = grad_cam_weights(gradient[:, None])
                saliency = class_activation_map(maps[-1].detach(), weights)[:, 0]
                masked = self.network.run(self._masked(part, saliency))[0]
                random = [values[part].float() for values in self.random_maps]
                probabilities = [
                    values.softmax(1).gather(1, label)[:, 0]
                    for values in (logits, self.network.logits(pool(masked)), self.network.logits(pool(random)))
                ]
            prob, cam_prob, random_prob = probabilities
            values = {
                'accuracy': 100.0 * (logits.argmax(1) == label[:, 0]),
                'probability': 100 * prob,
                'AD': average_drop(prob, cam_prob),
                'AG': average_gain(prob, cam_prob),
                'AI': average_increase(prob, cam_prob),
                'AG less random': average_gain(prob, cam_prob) - average_gain(prob, random_prob),
            }
            for name, value in values.items():
                rows.setdefault(name, []).append(value.detach())
        return {name: torch.cat(value).double().numpy() for name, value in rows.items()}

    def _run(self, x: Tensor) -> list[Tensor]:
        """The maps of N images in float16."""
        parts = [[values.half() for values in self.network.run(part)[0]] for part in x.split(BATCH)]
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _masked(self, part: Any, saliency: Tensor) -> Tensor:
        x = self.x[part]
        return mask_normalised(x, resize_saliency(saliency, x.shape[2:])[:, None], self.mean, self.std)


class Tries:
    """The tries of one network.

    Args:
        name: Its name.
        sources: The folder of the image sets.
        output: The folder of `benchmarks.pretrained maps`.
        settings: `fit.yaml`.
    """

    def __init__(self, name: str, sources: Path, output: Path, settings: dict[str, Any]) -> None:
        self.name, self.output = name, output
        model: Any = open_model(name, pretrained=True).eval()
        self.config = image_settings(model)
        self.network = FastNetwork(model, self.config['input_size'][-1])
        ids = imagenet_names(model)
        assert ids is not None
        index = {name: i for i, name in enumerate(ids)}
        files = halves(settings, sources)[0]
        self.choice = Choice(
            self.network, files, torch.tensor([index[wordnet_id(file)] for file in files]), self.config
        )
        sets = [source['name'] for source in settings['images']]
        count = settings['networks'][name].get('num_images')
        self.files = find_files([output / 'images' / name for name in sets], count, settings['seed'])
        self.sets = [file.path.relative_to(output / 'images').parts[0] for file in self.files]
        self.truth = torch.tensor([index.get(file.folder, -1) for file in self.files])
        self.features = CachedFeatures(output / f'{name}.maps')
        self.predicted = pooled_logits(self.network, self.features.pooled).argmax(1)

    def run(self, name: str, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Trains the tries of a group at once and gives their rows."""
        indices = self._draw(group.get('images'))
        features, rows = self.features, indices
        if group.get('crops'):
            features, rows = self._crops(indices), torch.arange(len(indices))
        tries = [{**group['settings'], **other} for other in group['tries']]
        recipes = [Recipe(one['stream_start'], one['epochs'], one['lr']) for one in tries]
        candidates = [Candidate(self.network, recipe, {'stream_init': 'gap'}, SEED) for recipe in recipes]
        targets = [Targets(self._labels(indices, one), one['distill']) for one in tries]
        steps = -(-len(indices) // BATCH)
        for candidate in candidates:
            candidate.stream.train()
        with self.network.frozen():
            for epoch in range(max(recipe.epochs for recipe in recipes)):
                order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(SEED + epoch))
                for step, part in enumerate(order.split(BATCH), epoch * steps):
                    (maps, pooled) = next(features.batches([rows[part]], 0))
                    for candidate, target in zip(candidates, targets, strict=True):
                        recipe = candidate.recipe
                        if epoch >= recipe.epochs:
                            continue
                        share = step / (recipe.epochs * steps)
                        candidate.optimizer.param_groups[0]['lr'] = recipe.lr * 0.5 * (1 + np.cos(np.pi * share))
                        labels, wanted = target(self.network, part, pooled)
                        candidate.step(self.network, maps[recipe.stream_start :], labels, wanted)
        facts = {'network': self.name, 'group': name, 'images': len(indices), 'crops': int(group.get('crops', False))}
        return [
            self._row({**facts, **one, 'seed': SEED}, partial(fitted, candidate.stream.eval(), one['stream_start']))
            for one, candidate in zip(tries, candidates, strict=True)
        ]

    def parts(self) -> list[dict[str, Any]]:
        """Rows of the stream of the package: as one of the tries, as it is, and without what its early stages do."""
        model: Any = open_model(f'{self.name}_castream', pretrained=True).eval()
        stream = model.castream
        with torch.no_grad():
            parts = torch.arange(len(self.choice.x)).split(BATCH)
            queries = [last_query(stream, [values[part].float() for values in self.choice.maps]) for part in parts]
        mean = torch.cat(queries).mean(0, keepdim=True)
        ways: dict[str, Pool] = {
            'as fitted': stream,
            'early stages average': partial(average_early, stream),
            'one last query': lambda maps: stream.step(-1, mean.expand(len(maps[-1]), -1), maps[-1]),
        }
        facts = {'network': self.name, 'group': PARTS}
        rows = [self._row({**facts, 'label': label}, pool) for label, pool in ways.items()]
        fit = json.loads((self.output / f'{self.name}.seed{SEED}' / 'fit.json').read_text(encoding='utf-8'))
        one = {'label': 'prediction', 'true_share': 0, 'crops': 0, 'seed': SEED, 'distill': fit['settings']['distill']}
        one |= {key: fit['taken'][key] for key in ('stream_start', 'epochs', 'lr')}
        one |= {'network': self.name, 'group': FITTED, 'images': fit['parts']['train']}
        return [{**rows[0], **one}, *rows]

    def _draw(self, counts: dict[str, int] | None) -> Tensor:
        """The rows of so many images of each set, drawn by the seed, or of all images."""
        if counts is None:
            return torch.arange(len(self.files))
        found = []
        for name, count in counts.items():
            of_set = torch.tensor([i for i, other in enumerate(self.sets) if other == name])
            order = torch.randperm(len(of_set), generator=torch.Generator().manual_seed(SEED))
            found.append(of_set[order[:count]])
        return torch.cat(found)

    def _crops(self, indices: Tensor) -> CachedFeatures:
        """The maps of one random crop, flipped or not, of each of these images."""
        transform = create_transform(**self.config, is_training=True, color_jitter=None)
        files = [self.files[i] for i in indices.tolist()]
        labels = self.truth[indices]
        images = AugmentedImages(files, labels, transform, image_mode(3), seed=SEED, epoch=0)
        return write_features(self.network, images, self.output / f'{self.name}.crops', facts={}, progress=True)

    def _labels(self, indices: Tensor, one: dict[str, Any]) -> Tensor:
        """(N,) labels: -1 for what the network predicts for the very maps that are trained on."""
        labels = self.predicted[indices] if one['label'] == 'whole image' else torch.full_like(indices, -1)
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(SEED))
        true = order[: round(one['true_share'] * len(indices))]
        labels[true] = self.truth[indices][true]
        return labels

    def _row(self, facts: dict[str, Any], pool: Pool) -> dict[str, Any]:
        """CA - GAP of every figure, paired by photograph, with its 95 % interval."""
        found = self.choice.figures(pool)
        row = {key: facts.get(key, '') for key in KEYS}
        for figure in FIGURES:
            difference = found[figure] - self.choice.gap[figure]
            ends = mean_curve(difference[:, None], np.arange(len(difference)), SEED)
            names = (figure, f'{figure} low', f'{figure} high')
            row |= dict(zip(names, (round(float(end[0]), 2) for end in ends), strict=True))
        print(row, flush=True)
        return row


def fitted(stream: Any, start: int, maps: list[Tensor]) -> Tensor:
    """The pooled vectors of a stream that starts at a stage."""
    return stream(maps[start:])


def last_query(stream: Any, maps: list[Tensor]) -> Tensor:
    """q_L, (B, D_L), with which the last stage attends."""
    query = stream.initial_query(len(maps[0]))
    for index, features in enumerate(maps[:-1]):
        query = stream.step(index, query, features)
    return query


def average_early(stream: Any, maps: list[Tensor]) -> Tensor:
    """The pooled vectors where every early stage attends to all locations alike."""
    query = stream.blocks[len(maps) - 2].proj(maps[-2].mean((2, 3)))  # the query of that stage no longer matters
    return stream.step(-1, query, maps[-1])


def read_rows() -> list[dict[str, str]]:
    """The rows of `pretrained_tries.csv`."""
    if not RESULTS.is_file():
        return []
    with RESULTS.open(encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def write_rows(rows: Sequence[dict[str, Any]]) -> None:
    with RESULTS.open('w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def tables() -> str:
    """The tables of `docs/pretrained.md`: of labels and crops, of the early stages, of the other tries."""
    rows = read_rows()
    of_labels: dict[str, Column] = {
        'maps of': lambda row: 'crops' if int(row['crops']) else 'whole images',
        'label': _label,
    }
    of_parts: dict[str, Column] = {'network': _network, 'the stream': lambda row: row['label']}
    others: dict[str, Column] = {
        'network': _network,
        'images': lambda row: f'{int(row["images"]):,}, {row["group"]}',
        'stream': lambda row: f'S_{row["stream_start"]} - S_4',
        'rate': lambda row: f'{float(row["lr"]):g}',
        'probabilities': lambda row: f'{float(row["distill"]):.0%}',
    }

    def kind(row: dict[str, str]) -> int:
        return 1 if row['group'] == PARTS else 0 if row['group'].startswith('what ') else 2

    tables = enumerate((of_labels, of_parts, others))
    return '\n\n'.join(_table([row for row in rows if kind(row) == i], columns) for i, columns in tables)


def _network(row: dict[str, str]) -> str:
    return f'`{row["network"].removeprefix("tf_efficientnet_")}`'


def _label(row: dict[str, str]) -> str:
    share = float(row['true_share'])
    own = f'prediction for the {"crop" if int(row["crops"]) else "image"}'
    own = 'prediction for the whole image' if row['label'] == 'whole image' else own
    return {0.0: own, 1.0: 'true'}.get(share, f'true for {share:.0%}, else {own}')


def _table(rows: Sequence[dict[str, str]], columns: dict[str, Callable[[dict[str, str]], str]]) -> str:
    shown = [name for name in FIGURES if name != 'AD']
    lines = [f'| {" | ".join([*columns, *shown])} |', f'|{" --- |" * (len(columns) + len(shown))}']
    for row in rows:
        cells = [column(row) for column in columns.values()]
        cells += [f'{float(row[k]):+.1f} [{float(row[f"{k} low"]):.1f}, {float(row[f"{k} high"]):.1f}]' for k in shown]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sources', type=Path, help='folder of the image sets')
    parser.add_argument('--output', type=Path, help='folder of the kept maps')
    parser.add_argument('--networks', nargs='+', default=[])
    parser.add_argument('--parts', action='store_true', help='measure the streams of the package without their parts')
    parser.add_argument('--table', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = yaml.safe_load((PACKAGE / 'fit.yaml').read_text(encoding='utf-8'))
    groups = yaml.safe_load(TRIES.read_text(encoding='utf-8'))
    rows: list[dict[str, Any]] = list(read_rows())
    for network in args.networks:
        done = {row['group'] for row in rows if row['network'] == network}
        left = {name: group for name, group in groups.items() if network in group['networks'] and name not in done}
        tries = Tries(network, args.sources, args.output, settings) if left else None
        for name, group in left.items():
            assert tries is not None
            rows += tries.run(name, group)
            write_rows(rows)
        if args.parts:
            tries = tries or Tries(network, args.sources, args.output, settings)
            found = tries.parts()
            names = {(row['network'], row['group'], str(row['lr']), str(row['distill'])) for row in found}
            rows = [
                row for row in rows if tuple(str(row[k]) for k in ('network', 'group', 'lr', 'distill')) not in names
            ]
            rows += found
            write_rows(rows)
    if args.table:
        print(tables())


if __name__ == '__main__':
    main()

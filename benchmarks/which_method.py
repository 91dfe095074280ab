"""Which saliency method? Every method that runs, every metric, on real photographs; and the page docs/which-method.md.

    python benchmarks/which_method.py run imagenet --data DIR/tiny-imagenet-200 --images 50
    python benchmarks/which_method.py run digits --images 100
    python benchmarks/which_method.py page

`run` measures one network and resumes after an interruption. It writes the values of every image to
benchmarks/which_method_results, and `collect` those of the batches that are finished so far. `page` reads these alone: every number of the page is computed from them.

Methods whose maps are equal on this network are measured once.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo, create_loader
from torch import Tensor, nn
from torch.nn import functional as F

import timm_castream  # noqa: F401 it registers the networks with a stream
from timm_castream.attribution import METHODS, attribute_all
from timm_castream.attribution.peers import LIBRARIES, peers_that_work
from timm_castream.datasets import create_dataset
from timm_castream.evaluate import evaluate
from timm_castream.hub.load import open_model
from timm_castream.inference.predictor import Predictor
from timm_castream.metrics.table import METRICS

RESULTS = Path(__file__).with_name('which_method_results')
PAGE = Path(__file__).parent.parent / 'docs' / 'which-method.md'
# `castream demo --train` writes such a network. The committed values are those of the one that version 0.2 shipped.
DIGITS = Path('demo_output/model')
BASELINES = ('random', 'centre')
REFERENCE = 'grad_cam'
# Maps of values in [0, 1] at the size of the image. Libraries resize on their own, with rounding.
EQUAL = 0.01
RESAMPLES = 10_000
SEED = 0


# The networks


def imagenet(data: str, side: int) -> tuple[nn.Module, Any]:
    """tf_efficientnet_lite0 with its published weights, the 200 rows of its classifier that Tiny ImageNet has."""
    model: Any = open_model('tf_efficientnet_lite0_castream', pretrained=True)
    dataset = create_dataset('tiny_imagenet', data, split='validation')
    names = sorted(Path(data, 'wnids.txt').read_text(encoding='utf-8').split())
    rows = [ImageNetInfo().label_names().index(name) for name in names]
    weight, bias = model.classifier.weight.detach()[rows], model.classifier.bias.detach()[rows]
    model.reset_classifier(len(rows))
    model.classifier.weight.data, model.classifier.bias.data = weight.clone(), bias.clone()
    return model.eval(), dataset


def digits(data: str, side: int) -> tuple[nn.Module, Any]:
    """The small ResNet that `castream demo --train` trains on digits on photographs."""
    return open_model(f'local-dir:{DIGITS}', pretrained=True).eval(), create_dataset('digits', split='validation')


TITLES = {
    'imagenet': '`tf_efficientnet_lite0_castream` with its published weights',
    'digits': 'the `test_resnet_castream` that version 0.2 shipped, trained on digits as `castream demo --train` does',
}
NETWORKS = {'imagenet': (imagenet, 128), 'digits': (digits, 64)}


# run


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    make, side = NETWORKS[args.network]
    model, dataset = make(args.data, args.side or side)
    side = args.side or side
    cfg = model.pretrained_cfg
    loader = create_loader(
        dataset,
        (3, side, side),
        args.batch_size,
        crop_pct=1.0,
        interpolation=cfg['interpolation'],
        mean=cfg['mean'],
        std=cfg['std'],
        num_workers=0,
        device=torch.device('cpu'),
        use_prefetcher=False,
    )
    few = torch.stack([item(loader, i) for i in range(0, len(dataset), len(dataset) // args.probe)][: args.probe])
    predictor = Predictor(model)
    methods = [name for name in METHODS if predictor.has_stream or 'stream' not in METHODS[name].needs]
    methods += peers_that_work(predictor, few[:1])
    left_out = [name for name in methods if args.no_channel_methods and a_forward_a_channel(name)]
    methods = [name for name in methods if name not in left_out]
    poolings = args.poolings or list(predictor.poolings)
    folder = Path(args.work, args.network)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / 'facts.json').is_file():  # an interrupted run keeps its first timings
        equal, seconds, forward = probe(model, few, methods, poolings)
        facts = {
            'name': args.network,
            'network': type(model).__name__ if args.network not in TITLES else TITLES[args.network],
            'command': command(args),
            'machine': f'{platform.machine()}, {args.threads} thread{"s" * (args.threads > 1)} of 2 CPU cores',
            'versions': {'torch': torch.__version__, 'timm': timm.__version__}
            | {library.package: library.version for library in LIBRARIES.values() if library.installed},
            'seed': SEED,
            'side': side,
            'poolings': poolings,
            'methods': [name for name in methods if name not in equal],
            'equal': equal,
            'left_out': left_out,
            'forward_seconds': round(forward, 4),
            'forwards': {name: round(value / forward, 1) for name, value in seconds.items()},
        }
        (folder / 'facts.json').write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')
    facts = json.loads((folder / 'facts.json').read_text(encoding='utf-8'))
    evaluate(
        model,
        loader,
        {name: name for name in facts['methods']},
        poolings,
        metrics=[name for name in METRICS if name not in ('max_box_acc_v2', *args.without)],
        num_samples=args.images,
        seed=SEED,
        output_dir=folder,
        progress=True,
    )
    collect(args)


def collect(args: argparse.Namespace) -> None:
    """Writes the results of the batches that are finished."""
    folder = Path(args.work, args.network)
    facts = json.loads((folder / 'facts.json').read_text(encoding='utf-8'))
    columns: dict[str, list[float]] = {}
    for path in sorted(folder.glob('finished.*.jsonl')):
        for line in filter(None, path.read_text(encoding='utf-8').splitlines()):
            record = json.loads(line)
            # Every image is explained for one class, so that images and pairs are the same rows.
            for name, values in {**record['images'], **record['pairs']}.items():
                columns.setdefault(name, []).extend(values)
    measured = {name.split('/')[2] for name in columns if name.count('/') == 2}
    facts['images'] = len(columns['image'])
    facts['metrics'] = {
        name: {'symbol': row.symbol, 'title': row.title, 'higher': row.higher_is_better}
        for name, row in METRICS.items()
        if name in measured
    }
    for fact, column in (('accuracy', 'accuracy'), ('confidence', 'prob')):
        scale = 100 if column == 'prob' else 1
        facts[fact] = {p: round(scale * float(np.mean(columns[f'{p}/{column}'])), 2) for p in facts['poolings']}
    kept = ['image', *(name for name in columns if name.count('/') == 2 and name.split('/')[2] in facts['metrics'])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(kept)
    writer.writerows([shortened(value) for value in row] for row in zip(*(columns[name] for name in kept), strict=True))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f'{args.network}.csv.gz').write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    (RESULTS / f'{args.network}.json').write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')


def item(loader: Any, index: int) -> Tensor:
    """An image of the loader's data set, normalised."""
    return loader.dataset[index][0]


def command(args: argparse.Namespace) -> str:
    words = ['python benchmarks/which_method.py run', args.network, f'--images {args.images}']
    words += [f'--side {args.side}'] if args.side else []
    words += [f'--poolings {" ".join(args.poolings)}'] if args.poolings else []
    words += [f'--without {" ".join(args.without)}'] if args.without else []
    return ' '.join([*words, *(['--no-channel-methods'] if args.no_channel_methods else [])])


def a_forward_a_channel(name: str) -> bool:
    prefix, colon, method = name.partition(':')
    if not colon:
        return 'masked forwards' in METHODS[name].needs
    return LIBRARIES[prefix].methods[method].forward_a_channel


def probe(
    model: nn.Module, x: Tensor, methods: Sequence[str], poolings: Sequence[str]
) -> tuple[dict[str, str], dict[str, float], float]:
    """Which methods give the maps of an earlier one under every pooling, and CPU seconds an image of each.

    Returns:
        {method: the earlier method}, {method: seconds of one map}, seconds of one forward of an image.
    """
    for library in LIBRARIES.values():
        library.method_class(next(iter(library.methods)))  # imports it
    with torch.no_grad():
        logits = model(x)
        started = time.process_time()
        for _ in range(3):
            model(x)
        forward = (time.process_time() - started) / (3 * len(x))
    target = logits.argmax(1)
    seen: dict[str, Tensor] = {}
    equal, seconds = {}, {}
    for name in methods:
        started = time.process_time()
        maps = attribute_all(model, x, {name: name}, target, poolings)
        seconds[name] = (time.process_time() - started) / (len(x) * len(poolings))
        stacked = torch.stack([resized(value, x.shape[2:]) for value in maps.values()])
        same = [other for other, value in seen.items() if (value - stacked).abs().max() < EQUAL]
        if same:
            equal[name] = same[0]
        else:
            seen[name] = stacked
        print(f'{name}: {seconds[name] / forward:.1f} forwards{", equal to " + same[0] if same else ""}', flush=True)
    return equal, seconds, forward


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    maps = F.interpolate(maps[:, None].float(), tuple(size), mode='bilinear', align_corners=False)[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


def shortened(value: float | None) -> str:
    """Four digits after the point, and nothing where there is no value."""
    return '' if value is None or math.isnan(value) else f'{value:.4f}'.rstrip('0').rstrip('.')


# page


class Result:
    """Committed values of one network."""

    def __init__(self, name: str) -> None:
        self.facts = json.loads((RESULTS / f'{name}.json').read_text(encoding='utf-8'))
        text = gzip.decompress((RESULTS / f'{name}.csv.gz').read_bytes()).decode()
        self.rows = list(csv.DictReader(io.StringIO(text)))
        self.methods: list[str] = self.facts['methods']
        self.metrics: dict[str, Any] = self.facts['metrics']

    def values(self, pooling: str, method: str, metric: str) -> np.ndarray:
        """(N,) values of the images in percent, NaN where an image has none."""
        column = f'{pooling}/{method}/{metric}'
        return np.array([float(row[column] or 'nan') for row in self.rows])

    def mean(self, pooling: str, method: str, metric: str) -> float:
        return float(np.nanmean(self.values(pooling, method, metric)))

    def against(self, pooling: str, method: str, metric: str, other: str = REFERENCE) -> tuple[float, float, float]:
        """Mean difference to another method, paired by image, positive where the method is better, and its interval."""
        sign = 1 if self.metrics[metric]['higher'] else -1
        pairs = sign * (self.values(pooling, method, metric) - self.values(pooling, other, metric))
        pairs = pairs[~np.isnan(pairs)]
        picks = np.random.default_rng(SEED).integers(len(pairs), size=(RESAMPLES, len(pairs)))
        low, high = np.percentile(pairs[picks].mean(1), (2.5, 97.5))
        return float(pairs.mean()), float(low), float(high)

    def ranks(self, pooling: str, metric: str) -> np.ndarray:
        """Means of the methods, higher better."""
        sign = 1 if self.metrics[metric]['higher'] else -1
        return np.array([sign * self.mean(pooling, method, metric) for method in self.methods])

    def verdicts(self, pooling: str) -> dict[str, dict[str, int]]:
        """By method and metric: 1 better than Grad-CAM, -1 worse, 0 not told apart."""
        found: dict[str, dict[str, int]] = {}
        for method in self.methods:
            for metric in self.metrics:
                _, low, high = self.against(pooling, method, metric)
                found.setdefault(method, {})[metric] = int(low > 0) - int(high < 0)
        return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    measure = commands.add_parser('run')
    measure.add_argument('network', choices=NETWORKS)
    measure.add_argument('--data', default='tiny-imagenet-200')
    measure.add_argument('--images', type=int, default=50)
    measure.add_argument('--side', type=int, help='pixels of the images')
    measure.add_argument('--poolings', nargs='+', choices=('gap', 'ca'))
    measure.add_argument('--probe', type=int, default=2, help='images on which maps are compared and timed')
    measure.add_argument('--batch-size', type=int, default=5)
    measure.add_argument('--threads', type=int, default=1)
    measure.add_argument('--without', nargs='*', default=[], help='metrics to leave out')
    measure.add_argument('--no-channel-methods', action='store_true', help='leave out those of a forward a channel')
    gather = commands.add_parser('collect', help='write the results of the batches that are finished')
    gather.add_argument('network', choices=NETWORKS)
    for command_parser in (measure, gather):
        command_parser.add_argument('--work', default='which_method_work', help='folder of unfinished evaluations')
    commands.add_parser('page')
    args = parser.parse_args(argv)
    if args.command == 'run':
        run(args)
    elif args.command == 'collect':
        collect(args)
    else:
        from which_method_page import write

        write([Result(name) for name in NETWORKS if (RESULTS / f'{name}.json').is_file()], PAGE)


if __name__ == '__main__':
    main()

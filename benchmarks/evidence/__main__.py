"""Runs the experiments of docs/evidence.md and writes the page.

    python -m benchmarks.evidence --data-dir tiny-imagenet-200
    python -m benchmarks.evidence --data-dir tiny-imagenet-200 --steps main curves --seeds 0 1
    python -m benchmarks.evidence --steps page
    python -m benchmarks.evidence --quick

Run it from the root of the repository. Every step resumes after a kill.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from .choice import choose, run_growth
from .page import write_page
from .pictures import draw_strip
from .pieces import run_table
from .results import Results
from .setup import Setup

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = ROOT / 'benchmarks' / 'evidence_results'
PAGE = ROOT / 'docs' / 'evidence.md'


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the steps."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    settings = yaml.safe_load(args.settings.read_text(encoding='utf-8'))
    settings['network'] = args.network or settings['network']
    work_dir = args.work_dir or Path('evidence_work')
    if args.quick:
        settings = quick(settings)
        work_dir = args.work_dir or Path(tempfile.mkdtemp(prefix='evidence-'))
        args.results_dir, args.page = work_dir / 'results', work_dir / 'evidence.md'
    known = ['choices', *settings['tables'], 'growth', 'strip', 'page']
    steps = args.steps or known
    if unknown := [step for step in steps if step not in known]:
        raise SystemExit(f'Step {unknown[0]!r} is unknown, valid ones: {", ".join(known)}.')
    if steps != ['page'] and not args.quick:
        if args.data_dir is None:
            raise SystemExit('Name the folder of the images: --data-dir tiny-imagenet-200, or try --quick.')
        if not all((args.data_dir / split).is_dir() for split in ('train', 'val')):
            raise SystemExit(f'{args.data_dir} has no folders train and val; unpack tiny-imagenet-200.zip and name it.')
    # Folders of this machine play no part in the results.
    words = [Path(word).name if '/' in word else word for word in (sys.argv[1:] if arguments is None else arguments)]
    command = shlex.join(['python', '-m', 'benchmarks.evidence', *words])
    setup = Setup(settings, args.data_dir, work_dir, args.results_dir, args.backbone_checkpoint, command)
    for step in steps:
        run_step(setup, step, args)


def quick(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the changes of `quick.yaml`, without the tables that need timm's train.py."""
    changes = yaml.safe_load((HERE / 'quick.yaml').read_text(encoding='utf-8'))
    small = changes.pop('table')
    tables = {name: plan | small for name, plan in settings['tables'].items() if plan.get('train') != 'product'}
    return settings | changes | {'tables': tables}


def run_step(setup: Setup, step: str, args: argparse.Namespace) -> None:
    """Runs one step; whatever it finds finished it leaves."""
    start = time.monotonic()
    if step != 'page':
        setup.fit_gap()
    if step == 'choices':
        for kind in setup.settings['choice']['tried']:
            if args.streams is None or kind in args.streams:
                choose(setup, kind)
    elif step == 'growth':
        run_growth(setup, args.streams, args.seeds)
    elif step == 'strip':
        draw_strip(setup, args.page)
    elif step == 'page':
        write_page(
            Results(args.results_dir, setup.settings), args.page, ROOT / 'README.md' if args.page == PAGE else None
        )
    else:
        run_table(setup, step, args.streams, args.seeds)
    print(f'{step}: {time.monotonic() - start:.0f} s', flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        'python -m benchmarks.evidence', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--data-dir', type=Path, help='Tiny ImageNet unpacked, or a folder with train/CLASS, val/CLASS')
    add('--backbone-checkpoint', help="weights of the network (default: timm's own, downloaded)")
    add('--network', help='another timm network than that of the settings')
    add('--steps', nargs='+', help='choices, a table of the settings, growth, strip or page; all by default')
    add('--seeds', nargs='+', type=int, help='only these seeds of the tables')
    add('--streams', nargs='+', help='only these kinds of stream of the tables')
    add('--settings', type=Path, default=HERE / 'settings.yaml', help='the plain file of settings')
    add('--work-dir', type=Path, help='feature maps and weights (default: evidence_work)')
    add('--results-dir', type=Path, default=RESULTS, help='JSON and CSV of the page')
    add('--page', type=Path, default=PAGE, help='the page to write')
    add('--quick', action='store_true', help='a few images and epochs, to see that it runs')
    return parser


if __name__ == '__main__':
    main()

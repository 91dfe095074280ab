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

from .choice import choose, run_growth
from .page import write_page
from .pictures import draw_strip
from .pieces import pieces, run_piece
from .quick import QUICK_SETTINGS, make_data
from .results import Results
from .setup import Setup, read_settings

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = ROOT / 'benchmarks' / 'evidence_results'
PAGE = ROOT / 'docs' / 'evidence.md'


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the steps."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    settings = read_settings(args.settings)
    if args.network:
        settings['network'] = args.network
    if args.image_size:
        settings['image_size'] = args.image_size
    if args.quick:
        settings = read_settings(QUICK_SETTINGS)
        args.work_dir = args.work_dir or Path(tempfile.mkdtemp(prefix='evidence-'))
        args.data_dir = args.data_dir or make_data(args.work_dir / 'data')
        args.results_dir, args.page = args.work_dir / 'results', args.work_dir / 'evidence.md'
    # Folders of this machine play no part in the results.
    words = [Path(word).name if '/' in word else word for word in (sys.argv[1:] if arguments is None else arguments)]
    command = ['python', '-m', 'benchmarks.evidence', *words]
    setup = Setup(
        settings,
        args.data_dir,
        args.work_dir or Path('evidence_work'),
        args.results_dir,
        args.backbone_checkpoint,
        shlex.join(command),
    )
    known = ['choices', *settings['tables'], 'growth', 'strip', 'page']
    steps = args.steps or known
    if unknown := [step for step in steps if step not in known]:
        raise SystemExit(f'Step {unknown[0]!r} is unknown, valid ones: {", ".join(known)}.')
    if steps != ['page'] and args.data_dir is None:
        raise SystemExit('Name the folder of the images: --data-dir tiny-imagenet-200, or try --quick.')
    for step in steps:
        run_step(setup, step, args)


def run_step(setup: Setup, step: str, args: argparse.Namespace) -> None:
    """Runs one step; whatever it finds finished it leaves."""
    start = time.monotonic()
    if step == 'page':
        readme = ROOT / 'README.md' if args.page == PAGE else None
        write_page(Results(args.results_dir, setup.settings), args.page, readme)
        print(f'wrote {args.page}')
        return
    setup.fit_gap()
    if step == 'choices':
        for kind in setup.settings['choice']['tried']:
            if args.streams is None or kind in args.streams:
                choose(setup, kind)
    elif step == 'growth':
        run_growth(setup, args.streams, args.seeds)
    elif step == 'strip':
        draw_strip(setup, args.page)
    else:
        for piece in pieces(setup.settings, step):
            if (piece.stream is None or args.seeds is None or piece.seed in args.seeds) and (
                piece.stream is None or args.streams is None or piece.stream in args.streams
            ):
                run_piece(setup, piece)
    print(f'{step}: {time.monotonic() - start:.0f} s', flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        'python -m benchmarks.evidence', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data-dir', type=Path, help='Tiny ImageNet unpacked, or a folder with train/CLASS, val/CLASS')
    parser.add_argument('--backbone-checkpoint', help="weights of the network (default: timm's own, downloaded)")
    parser.add_argument('--network', help='another timm network than that of the settings')
    parser.add_argument('--image-size', type=int, help='pixels, instead of the settings')
    parser.add_argument(
        '--steps', nargs='+', help='choices, a table of the settings, growth, strip or page; all by default'
    )
    parser.add_argument('--seeds', nargs='+', type=int, help='only these seeds of the tables')
    parser.add_argument('--streams', nargs='+', help='only these kinds of stream of the tables')
    parser.add_argument('--settings', type=Path, default=HERE / 'settings.yaml', help='the plain file of settings')
    parser.add_argument('--work-dir', type=Path, help='feature maps and weights (default: evidence_work)')
    parser.add_argument('--results-dir', type=Path, default=RESULTS, help='JSON and CSV of the page')
    parser.add_argument('--page', type=Path, default=PAGE, help='the page to write')
    parser.add_argument('--quick', action='store_true', help='a few images and epochs, to see that it runs')
    return parser


if __name__ == '__main__':
    main()

"""`castream report`: print and draw what the folder of an evaluation holds, without its model."""

from __future__ import annotations

import argparse

from .options import add_format

EXAMPLE = 'castream report evaluation --format latex'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='DIR', help='the --output of castream evaluate')
    add_format(parser)
    parser.add_argument(
        '--compare', nargs=2, metavar=('METHOD', 'OTHER'), help='print METHOD minus OTHER, paired by image'
    )
    parser.add_argument('--plot', action='store_true', help='draw the mean curves and the differences into the folder')


def run(args: argparse.Namespace) -> int:
    from .._utils.checks import check_names
    from ..evaluation.report import Report
    from ..evaluation.tables import compared
    from .evaluate import plot, print_files, print_report

    report = Report.load(args.folder)
    if args.compare:
        check_names('method', args.compare, report.methods)
    if args.compare:
        print(compared(report, *args.compare))
    else:
        print_report(report, args.format)
    if args.plot:
        print_files(args.folder, plot(report, args.folder), args.format)
    return 0

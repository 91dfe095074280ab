"""`castream app`: the page that explains images, or a Hugging Face Space of it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path

from .options import (
    add_engine,
    add_model_options,
    add_normalisation_options,
    add_size_options,
    count,
    device_of,
    name_classes,
    set_images,
)

EXAMPLE = 'castream app --model resnet50_castream --checkpoint last.pth.tar'
_LOCAL = ('127.0.0.1', 'localhost', '::1')


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f'{parser.description} Without --model it shows tf_efficientnet_lite0_castream with its published weights.'
    )
    add_model_options(parser, required=False)
    add_size_options(parser)
    add_normalisation_options(parser)
    parser.add_argument('--multilabel', action='store_true', help='probabilities by sigmoid')
    add_engine(parser)
    server = parser.add_argument_group('server')
    server.add_argument(
        '--host',
        default=_LOCAL[0],
        metavar='ADDRESS',
        help='0.0.0.0 lets other machines in (default: this machine alone)',
    )
    server.add_argument('--port', type=count, metavar='N', help='(default: the first free one from 7860)')
    server.add_argument('--no-browser', action='store_true', help='print the address of the page and open no browser')
    server.add_argument(
        '--space', metavar='DIR', help='write a Hugging Face Space, which runs in torch, to this new folder and stop'
    )


def run(args: argparse.Namespace) -> int:
    if args.space and args.engine == 'onnxruntime':
        raise ValueError('--engine onnxruntime does not go with --space: a Space runs in torch.')
    print('Opening the network ...', flush=True)  # the libraries take seconds to import
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    from ..app import create_app, open_for_page, serve
    from ..app.space import write_examples, write_space

    opened = open_for_page(
        args.model,
        args.checkpoint,
        args.pretrained,
        activation='sigmoid' if args.multilabel else 'softmax',
        device=device_of(args),
        engine=args.engine,
        use_ema=args.use_ema,
        num_classes=args.num_classes,
        **args.model_kwargs,
    )
    name_classes(opened.model, args)
    set_images(opened.model, args)
    if args.space:
        folder = write_space(opened, args.space)
        print(f'{folder}: README.md describes the Space, python app.py starts it here.')
        return 0
    local = args.host in _LOCAL
    with tempfile.TemporaryDirectory(prefix='castream-app-') as scratch:
        os.environ['GRADIO_TEMP_DIR'] = scratch  # uploads are deleted with the process
        examples = write_examples(Path(scratch, 'examples'))
        app = create_app(opened, examples, choose_model=local)
        browser = local and not args.no_browser and _has_screen()
        try:
            _, address, _ = serve(app, args.host, args.port, prevent_thread_lock=True, inbrowser=browser)
        except (OSError, OverflowError) as error:  # a port above 65535 overflows
            if args.port is None:
                raise
            raise OSError(f'The page cannot listen on port {args.port} of {args.host}: name another --port.') from error
        print(f'{opened.name} is at {address} - drop a photograph there. Ctrl-C ends the page.', flush=True)
        try:
            wait()
        finally:
            app.close(verbose=False)
    return 0


def wait() -> None:
    """Waits for Ctrl-C or SIGTERM, which `cli` turns into KeyboardInterrupt."""
    threading.Event().wait()


def _has_screen() -> bool:
    """Whether a browser can show a window. Without one, webbrowser would start a browser of text in the terminal."""
    return sys.platform in ('darwin', 'win32') or any(map(os.environ.get, ('DISPLAY', 'WAYLAND_DISPLAY')))

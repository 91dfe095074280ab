"""Stand-ins for timm's scripts and for the places where they are found. Fixtures: see `pytest_plugins`."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm

from timm_castream.timm_scripts import finder
from train_wrappers import train

# A script with the outline of timm's: it writes down what it was given.
SCRIPT = """
import argparse, json, os, sys
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from timm import utils
from timm.data import create_dataset
from timm.task import ClassificationTask
from timm_castream.hub.read import read_cfg_weights
config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config', default='')
parser = argparse.ArgumentParser()
parser.add_argument('--data-dir')
parser.add_argument('--dataset', default='')
parser.add_argument('--model', default='resnet50')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs)
parser.add_argument('--lr', type=float)
parser.add_argument('--pretrained', action='store_true')
parser.add_argument('--mixup', type=float, default=0.)
parser.add_argument('--cutmix', type=float, default=0.)
parser.add_argument('--cutmix-minmax', nargs='+', default=None)
parser.add_argument('--clip-grad', type=float)
parser.add_argument('--clip-mode', default='norm')
parser.add_argument('--kd-model-name')
parser.add_argument('--torchscript', action='store_true')
parser.add_argument('--test-pool', action='store_true')
parser.add_argument('--dist-bn', default='reduce')
parser.add_argument('--resume', default='')
parser.add_argument('--device', default='cuda')
parser.add_argument('--amp-dtype', default='float16')
parser.add_argument('--amp', action='store_true', default=False)
parser.add_argument('--crash')

def validate():
    pass

def main():
    found, rest = config_parser.parse_known_args()
    if found.config:
        with open(found.config) as file:
            parser.set_defaults(**yaml.safe_load(file))
    args = parser.parse_args(rest)
    if args.crash:
        if args.crash == 'ours':
            read_cfg_weights({'architecture': 'on purpose'})
        raise {'ValueError': ValueError, 'ZeroDivisionError': ZeroDivisionError, 'RuntimeError': RuntimeError,
               'offline': LocalEntryNotFoundError}[args.crash]('on purpose')
    with open(os.environ['SEEN'], 'w') as file:
        json.dump(dict(vars(args), argv=sys.argv, dataset_from=create_dataset.__module__,
                       task=ClassificationTask.__name__), file)

if __name__ == '__main__':
    raise SystemExit('run as a program')
"""


@pytest.fixture
def no_script_of_this_machine(monkeypatch, tmp_path):
    for variable in ('TIMM_TRAIN_SCRIPT', 'TIMM_VALIDATE_SCRIPT'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv(finder.URL_VARIABLE, 'http://127.0.0.1:9')
    monkeypatch.setattr(timm, '__file__', str(tmp_path / 'site-packages' / 'timm' / '__init__.py'))


@pytest.fixture(scope='session')
def real_scripts():
    """timm's own scripts, from wherever the wrapper finds them on this machine."""
    try:
        return {name: str(finder.find_script(name)) for name in ('train.py', 'validate.py')}
    except finder.ScriptNotFoundError as error:
        pytest.skip(f"timm's scripts are not to be had here: {error}")


@pytest.fixture
def server(monkeypatch):
    """A stand-in for GitHub on the loopback address: `answers` maps paths to bodies, `requests` lists what came."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            body = self.server.answers.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header('Content-Length', str(len(body or b'') + self.server.missing_bytes))
            self.end_headers()
            self.wfile.write(body or b'')

        def log_message(self, *args):
            pass

    stand_in = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    stand_in.answers, stand_in.requests, stand_in.missing_bytes = {}, [], 0
    threading.Thread(target=stand_in.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv(finder.URL_VARIABLE, f'http://127.0.0.1:{stand_in.server_port}')
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()


@pytest.fixture
def releases(monkeypatch, server):
    """Three known releases, with the server's file of each."""
    contents = {release: SCRIPT.encode() + b'# ' + release.encode() for release in ('1.0.27', '1.0.28', '1.0.40')}
    monkeypatch.setattr(
        finder,
        'KNOWN_SHA256',
        {release: {'train.py': hashlib.sha256(content).hexdigest()} for release, content in contents.items()},
    )
    server.answers.update({f'/v{release}/train.py': content for release, content in contents.items()})
    return contents


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The path of `SCRIPT`, and a function that runs the wrapper with it and gives what the script saw."""
    path = tmp_path / 'some_train.py'
    path.write_text(SCRIPT)
    monkeypatch.setenv('SEEN', str(tmp_path / 'seen.json'))

    def run(*options):
        seen = tmp_path / 'seen.json'
        seen.unlink(missing_ok=True)
        images = [] if '--data-dir' in options else ['--dataset', 'digits']
        code = train.main(['--timm-script', str(path), *images, *options])
        return code, json.loads(seen.read_text()) if seen.exists() else None

    run.path = path
    return run

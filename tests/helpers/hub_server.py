"""A small Hugging Face Hub on the loopback address, for tests that go through the real client.

It speaks what huggingface_hub asks to download files and to push a folder. Large files (weights) are redirected to a
second port, since the client follows redirects within one origin and would lose the headers of the first answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = ('.safetensors', '.bin')


@dataclass
class Repository:
    """Files of one commit, and how the Hub behaves about them.

    Attributes:
        files: Content by path.
        private: Whether who sends no token is told that there is no such repository.
        gated: Whether everything is answered with 403 GatedRepo.
        head_status: Status with which a HEAD of a large file fails, or None.
        body: What is sent instead of a large file's content, under the headers of the true one.
        bodies: How many answers `body` spoils.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    head_status: int | None = None
    body: bytes | None = None
    bodies: int = 1_000_000

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Hub:
    """The server: `with Hub() as hub`, then `hub.url` is the endpoint.

    Attributes:
        repositories: By id; tests put them here, pushes do too.
        requests: (method, path) of every request, the CDN's too, whose paths begin with /cdn.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self._servers = [
            ThreadingHTTPServer(('127.0.0.1', 0), type('Bound', (handler,), {'hub': self}))
            for handler in (_HubHandler, _CdnHandler)
        ]
        self.url, self.cdn_url = (f'http://127.0.0.1:{server.server_port}' for server in self._servers)

    def __enter__(self) -> Hub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo_id: str, **files: bytes) -> Repository:
        """A repository with these files; `model__safetensors` stands for `model.safetensors`."""
        repository = Repository({name.replace('__', '.'): content for name, content in files.items()})
        self.repositories[repo_id] = repository
        return repository

    def bodies_sent(self) -> list[str]:
        """Paths of the files whose content was sent."""
        return [path for method, path in self.requests if method == 'GET' and not path.startswith('/api/')]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args: object) -> None:
        pass

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        if parsed:
            self.hub.requests.append((self.command, urlsplit(self.path).path))
        return parsed

    def reply(self, status: int, body: bytes = b'', length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def reply_json(self, data: object, status: int = 200) -> None:
        self.reply(status, json.dumps(data).encode(), Content_Type='application/json')

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


class _CdnHandler(_Handler):
    """Large files: GET /cdn/<org>/<name>/<file>."""

    def do_GET(self) -> None:
        _, _, organisation, name, path = urlsplit(self.path).path.split('/', 4)
        repository = self.hub.repositories[f'{organisation}/{name}']
        content = repository.files[unquote(path)]
        body = content
        if repository.body is not None and repository.bodies > 0:
            repository.bodies -= 1
            body = repository.body
        self.reply(200, body, length=len(content))
        if len(body) < len(content):  # cut off
            self.close_connection = True


class _HubHandler(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip('/')
        repo_id, _, rest = path.partition('/resolve/')
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.headers.get('Authorization') is None):
            return self.reply(401, X_Error_Code='RepoNotFound', X_Error_Message='Repository not found')
        if repository.gated:
            return self.reply(403, X_Error_Code='GatedRepo', X_Error_Message='Access is restricted')
        revision, _, name = rest.partition('/')
        if revision not in ('main', repository.commit):
            return self.reply(404, X_Error_Code='RevisionNotFound')
        if name not in repository.files:
            return self.reply(404, X_Error_Code='EntryNotFound', X_Repo_Commit=repository.commit)
        content = repository.files[name]
        if not name.endswith(LARGE):
            etag = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
            return self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=repository.commit)
        if repository.head_status is not None:
            return self.reply(repository.head_status)
        self.reply(
            302,
            Location=f'{self.hub.cdn_url}/cdn/{repo_id}/{name}',
            X_Repo_Commit=repository.commit,
            X_Linked_Etag=f'"{hashlib.sha256(content).hexdigest()}"',
            X_Linked_Size=str(len(content)),
        )

    def do_POST(self) -> None:
        body = self.read_body()
        path = urlsplit(self.path).path.strip('/')
        if path == 'api/repos/create':
            request = json.loads(body)
            repo_id = f'{request["organization"]}/{request["name"]}'
            if self.headers.get('Authorization') is None:
                return self.reply_json({'error': 'Invalid username or password.'}, 401)
            private = request.get('visibility') == 'private' or bool(request.get('private'))
            self.hub.repositories.setdefault(repo_id, Repository(private=private))
            self.reply_json({'url': f'{self.hub.url}/{repo_id}', 'name': repo_id})
        elif path == 'api/validate-yaml':
            self.reply_json({'errors': [], 'warnings': []})
        elif '/preupload/' in path:
            self.reply_json(
                {
                    'files': [
                        {
                            'path': file['path'],
                            'uploadMode': 'lfs' if file['path'].endswith(LARGE) else 'regular',
                            'shouldIgnore': False,
                        }
                        for file in json.loads(body)['files']
                    ]
                }
            )
        elif path.endswith('/info/lfs/objects/batch'):
            self.reply_json(
                {
                    'transfer': 'basic',
                    'objects': [
                        {
                            'oid': item['oid'],
                            'size': item['size'],
                            'actions': {'upload': {'href': f'{self.hub.url}/upload/{item["oid"]}'}},
                        }
                        for item in json.loads(body)['objects']
                    ],
                }
            )
        elif '/commit/' in path:
            self.commit(path.removeprefix('api/models/').partition('/commit/')[0], body)
        else:
            self.reply(404)

    def do_PUT(self) -> None:
        body, oid = self.read_body(), self.path.rsplit('/', 1)[1]
        if hashlib.sha256(body).hexdigest() != oid:
            return self.reply(400)
        self.hub.uploads[oid] = body
        self.reply(200)

    def commit(self, repo_id: str, body: bytes) -> None:
        repository = self.hub.repositories[repo_id]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation['value']
            if operation['key'] == 'file':
                repository.files[value['path']] = base64.b64decode(value['content'])
            elif operation['key'] == 'lfsFile':
                repository.files[value['path']] = self.hub.uploads[value['oid']]
        url = f'{self.hub.url}/{repo_id}/commit/{repository.commit}'
        self.reply_json({'commitUrl': url, 'commitOid': repository.commit, 'success': True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub to which this process's client talks, with an empty cache of its own."""
    with Hub() as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        monkeypatch.setattr(
            constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.url + '/{repo_id}/resolve/{revision}/{filename}'
        )
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr('time.sleep', lambda seconds: None)  # between the client's retries
        monkeypatch.setenv('HF_TOKEN', 'hf_test')
        yield server

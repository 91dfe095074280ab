"""Write the page as a Hugging Face Space: a folder with the page, its network, its packages and pinned requirements."""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

from timm.models import save_for_hf

from .._utils.files import make_folder, write_whole
from ..datasets import open_image
from ..datasets.photographs import photographs
from ..hub.repository import write_repository
from .page_model import PageModel

_PACKAGE = 'timm_castream'
_FOLDERS = (_PACKAGE, 'hf_configs', 'train_wrappers')  # timm_castream reads files of the other two

_APP = """'''The page of `castream app` for one network. `python app.py` starts it.'''
from pathlib import Path

from timm_castream.app import PageModel, create_app, serve
from timm_castream.hub.load import open_model
from timm_castream.inference.predictor import Predictor

folder = Path(__file__).parent
model = open_model(f'local-dir:{{folder}}/model', pretrained=True).eval()
opened = PageModel(Predictor(model, activation={activation!r}), {name!r}, {weights!r})
app = create_app(opened, sorted((folder / 'examples').iterdir()))

if __name__ == '__main__':
    serve(app, host=None)
"""

_README = """---
title: CA-Stream
emoji: 🔎
colorFrom: yellow
colorTo: red
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
license: mit
short_description: Saliency under average pooling and under CA-Stream
---

# Where does the network look?

The network is {name}. {weights}

The page shows its classes, the attention of every stage and saliency maps, under average pooling (GAP) and under its
CA-Stream (CA), and measures the maps on the image. [The paper](https://arxiv.org/abs/2404.14996).

To run it on your machine:

    pip install -r requirements.txt
    python app.py

`castream app --space` wrote this folder. `model/` is the network. `timm_castream/` is the package. `hf_configs/` and
`train_wrappers/` hold the files that the package reads.
"""


def write_space(opened: PageModel, folder: str | Path) -> Path:
    """Writes a Space that starts from its folder alone.

    Args:
        opened: The network of the page.
        folder: Is made. It appears when it is complete.

    Returns:
        The folder.

    Raises:
        FileExistsError: If there is something at `folder` already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f'{folder} exists already: remove it or name another folder.')
    make_folder(folder.parent)
    pinned = pinned_requirements()
    words: dict[str, Any] = {
        'name': opened.name,
        'weights': opened.weights,
        'activation': opened.predictor.activation,
        'gradio': pinned['gradio'],
        'python': '.'.join(map(str, sys.version_info[:2])),
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.castream-space-') as scratch:
        unfinished = Path(scratch, 'space')
        for name in _FOLDERS:  # the installed version may be in no index
            shutil.copytree(str(files(name)), unfinished / name, ignore=shutil.ignore_patterns('__pycache__'))
        _write_model(opened, unfinished / 'model')
        write_examples(unfinished / 'examples')
        for name, text in (
            ('app.py', _APP.format(**words)),
            ('README.md', _README.format(**words)),
            ('requirements.txt', ''.join(f'{name}=={version}\n' for name, version in pinned.items())),
        ):
            (unfinished / name).write_text(text, encoding='utf-8')
        unfinished.rename(folder)
    return folder


def _write_model(opened: PageModel, folder: Path) -> None:
    if opened.predictor.has_stream:
        write_repository(opened.model, folder, f'your-name/{opened.name}')
    else:
        save_for_hf(opened.model, str(folder), safe_serialization=True)


def pinned_requirements() -> dict[str, str]:
    """{distribution: installed version} of everything that the page of this package requires, in order of the names.

    Raises:
        importlib.metadata.PackageNotFoundError: If this package or a requirement is not installed.
    """
    from packaging.requirements import Requirement
    from packaging.version import Version

    requirements = [Requirement(text) for text in metadata.requires(_PACKAGE) or ()]
    names: set[str] = set()
    extras = ['', 'app']
    for extra in extras:  # grows by the extras of this package that an extra names
        for requirement in requirements:
            if requirement.marker is not None and not requirement.marker.evaluate({'extra': extra}):
                continue
            if requirement.name.replace('-', '_') == _PACKAGE:
                extras += [name for name in sorted(requirement.extras) if name not in extras]
            else:
                names.add(requirement.name)
    return {name: Version(metadata.version(name)).public for name in sorted(names)}  # without +cpu


def write_examples(folder: str | Path) -> list[Path]:
    """Copies the photographs of `datasets.photographs`, the examples of the page.

    Args:
        folder: Is made.

    Returns:
        The files, in order of their names: `0_chelsea.jpg` is the first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f'{i}_{path.stem}.jpg' for i, path in enumerate(photographs())]
    for source, path in zip(photographs(), paths, strict=True):
        with write_whole(path, 'wb') as file:
            open_image(source).save(file, format='JPEG', quality=90)
    return paths

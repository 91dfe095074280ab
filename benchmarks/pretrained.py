"""Makes the streams of `timm_castream/pretrained` again, from the settings in its `fit.yaml`.

python -m benchmarks.pretrained fit --sources clones --output work --networks tf_efficientnet_lite0
python -m benchmarks.pretrained pack --output work --networks tf_efficientnet_lite0

`fit` draws the images of the public sets and runs `castream fit`; a second call resumes. `pack` writes the fitted
streams in float16 into the package.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from timm_castream.datasets.image_files import find_images
from timm_castream.hub.configs import shipped_streams
from timm_castream.hub.stream_file import read_safetensors, write_safetensors

PACKAGE = Path(__file__).parents[1] / 'timm_castream' / 'pretrained'


def draw_images(settings: dict[str, Any], sources: Path, output: Path) -> list[Path]:
    """Hard links to some of the images of every set.

    Args:
        settings: `fit.yaml`.
        sources: The folder of the image sets.
        output: Gets `images/<set>/`.

    Returns:
        The folder of each set.
    """
    folders = []
    for source in settings['images']:
        root, folder = sources / source['folder'], output / 'images' / source['name']
        files = sorted(find_images(root), key=str)
        random.Random(settings['seed']).shuffle(files)
        for file in files[: source['count']]:
            link = folder / file.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.hardlink_to(file)
        folders.append(folder)
    return folders


def fit(name: str, settings: dict[str, Any], folders: list[Path], output: Path) -> None:
    """Runs `castream fit` for a network."""
    options = [f'--{key.replace("_", "-")}={value}' for key, value in settings['networks'][name].items()]
    command = [sys.executable, '-m', 'timm_castream.cli', 'fit', '--model', name, '--pretrained', '--workers', '0']
    command += ['--seed', str(settings['seed']), '--output', str(output / name), *options]
    subprocess.run([*command, '--images', *map(str, folders)], check=True)


def pack(name: str, output: Path) -> Path:
    """Writes a fitted stream in float16 into the package."""
    tensors, metadata = read_safetensors(output / name / 'stream.safetensors', name)
    path = shipped_streams().get(f'{name}_castream', PACKAGE / f'{name}_castream.safetensors')
    write_safetensors(path, {key: value.half() for key, value in tensors.items()}, metadata)
    return path


def main() -> None:
    settings = yaml.safe_load((PACKAGE / 'fit.yaml').read_text(encoding='utf-8'))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('step', choices=('fit', 'pack'))
    parser.add_argument('--sources', type=Path, help='folder of the image sets')
    parser.add_argument('--output', type=Path, required=True, help='folder for the images and the fits')
    parser.add_argument('--networks', nargs='+', default=list(settings['networks']), choices=settings['networks'])
    args = parser.parse_args()
    for name in args.networks:
        if args.step == 'fit':
            fit(name, settings, draw_images(settings, args.sources, args.output), args.output)
        else:
            print(pack(name, args.output))


if __name__ == '__main__':
    main()

"""Makes the streams of `timm_castream/pretrained` again, from the settings in its `fit.yaml`.

python -m benchmarks.pretrained fit --sources clones --output work --networks tf_efficientnet_lite0
python -m benchmarks.pretrained pack --output work --networks tf_efficientnet_lite0
python -m benchmarks.pretrained collect --output work/evaluations

`fit` draws the images of the public sets and runs `castream fit`; a second call resumes. `pack` writes the fitted
streams in float16 into the package. `collect` reads the folders NETWORK.SET that `castream evaluate` wrote, keeps their
figures in `benchmarks/pretrained_results.csv`, writes the cards beside the streams and prints the table of
`docs/pretrained.md`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml

from timm_castream.datasets.image_files import find_images
from timm_castream.evaluation.bootstrap import mean_curve
from timm_castream.hub.configs import shipped_streams
from timm_castream.hub.stream_file import read_safetensors, write_safetensors

PACKAGE = Path(__file__).parents[1] / 'timm_castream' / 'pretrained'
RESULTS = Path(__file__).with_name('pretrained_results.csv')
METRICS = {'average_drop': 'AD', 'average_gain': 'AG', 'average_increase': 'AI'}
HEADINGS = {
    'accuracy': 'accuracy ↑',
    'probability': 'probability',
    'AD': 'AD ↓',
    'AG': 'AG ↑',
    'AI': 'AI ↑',
    'AG less random': 'AG less random ↑',
}


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


def figures(folder: Path) -> list[dict[str, Any]]:
    """The figures of an evaluation: under GAP, under CA, and their difference, paired by image, with its interval.

    Args:
        folder: What `castream evaluate` wrote, `NETWORK.SET`.
    """
    with (folder / 'images.csv').open(encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    def gain(method: str) -> np.ndarray:
        return column(f'ca/{method}/average_gain') - column(f'gap/{method}/average_gain')

    values = {'accuracy': ('accuracy', 1), 'probability': ('prob', 100)}
    pairs = {name: [scale * column(f'{p}/{key}') for p in ('gap', 'ca')] for name, (key, scale) in values.items()}
    pairs |= {name: [column(f'{p}/grad_cam/{key}') for p in ('gap', 'ca')] for key, name in METRICS.items()}
    seed = json.loads((folder / 'evaluation.json').read_text(encoding='utf-8'))['settings']['seed']
    network, _, images = folder.name.partition('.')
    table = []
    for name, (gap, ca) in {**pairs, 'AG less random': (gain('random'), gain('grad_cam'))}.items():
        middle, low, high = (float(v[0]) for v in mean_curve((ca - gap)[:, None], np.arange(len(rows)), seed))
        both = ('', '') if name == 'AG less random' else (round(gap.mean(), 2), round(ca.mean(), 2))
        ends = [round(value, 2) for value in (middle, low, high)]
        keys = ('network', 'set', 'images', 'figure', 'gap', 'ca', 'difference', 'low', 'high')
        table.append(dict(zip(keys, (network, images, len(rows), name, *both, *ends), strict=True)))
    return table


def table() -> str:
    """The figures of `pretrained_results.csv` as a table in Markdown."""
    with RESULTS.open(encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    lines = [
        f'| network | photographs | accuracy of GAP | {" | ".join(HEADINGS.values())} |',
        f'| --- | --- | --- |{" --- |" * len(HEADINGS)}',
    ]
    for key in dict.fromkeys((row['network'], row['set']) for row in rows):
        found = {row['figure']: row for row in rows if (row['network'], row['set']) == key}
        cells = [
            f'{float(row["difference"]):+.1f} [{float(row["low"]):.1f}, {float(row["high"]):.1f}]'
            for row in (found[name] for name in HEADINGS)
        ]
        accuracy = found['accuracy']
        lines.append(
            f'| `{key[0]}` | {accuracy["images"]} of {key[1]} | {float(accuracy["gap"]):.1f} | {" | ".join(cells)} |'
        )
    return '\n'.join(lines)


def card(name: str, settings: dict[str, Any]) -> str:
    """The card of a stream of the package: what it is, how it was made, on what it was measured, terms and limits."""
    header = read_safetensors(PACKAGE / f'{name}_castream.safetensors', name)[1]
    with torch.device('meta'):
        model: Any = timm.create_model(f'{name}_castream', **json.loads(header['stream_args']))
    cfg, options = model.pretrained_cfg, settings['networks'][name]
    total = sum(source['count'] for source in settings['images'])
    share = options.get('distill', 0)
    target = f' {share:.0%} of the target are its probabilities of all classes.' if share else ''
    used = f'{options["num_images"]} of the ' if 'num_images' in options else ''
    parameters = sum(parameter.numel() for parameter in model.castream.parameters())
    sources = '\n'.join(
        f'- {source["name"]}: {source["count"]} images of the training part; {source["what"]}. From {source["from"]}. '
        f'Terms: {source["terms"]}.'
        for source in settings['images']
    )
    lines = table().splitlines()
    measured = '\n'.join([*lines[:2], *(line for line in lines if line.startswith(f'| `{name}` '))])
    return f"""# {name}_castream

A CA-Stream for the 1,000 classes of ImageNet, S_{options['stream_start']} - S_L, of {parameters:,} parameters in float16,
beside timm's frozen `{name}.in1k` (Apache-2.0). Input: {cfg['input_size'][1]} x {cfg['input_size'][2]} pixels, crop
{cfg['crop_pct']}, mean and std 0.5. `timm.create_model('{name}_castream', pretrained=True)` loads both.

Fingerprint of the backbone's weights: `{header['fingerprint']}`

## How it was made

`castream fit` on {used}{total:,} images without labels: the label of an image is the class that the network predicts for
it. {options['epochs']} epoch of AdamW, learning rate {options['lr']:g}, seed {settings['seed']}.{target} The settings are in
`fit.yaml`, and `python -m benchmarks.pretrained fit` repeats it. Of the images a tenth and at most 500 more are held out.

{sources}

No image is in the package. We do not know whether the terms of the images bind weights that were fitted on them: read
them before commercial use.

## Measured on

Photographs that no stream was trained on. *samples*: imagenet-sample-images, one of each class, from the training images
of the backbone. *val*: the validation parts of Imagenette and Imagewoof, 20 classes. CA - GAP, paired by image, with 95 %
intervals; AD, AG and AI are of Grad-CAM. *AG less random*: the difference of AG less that of random maps.

{measured}

## Limits

- Part of the gain in AG is confidence: CA is surer of the class than GAP.
- The settings were chosen among tries that were measured on *samples* too. No image of it was trained on, but its values
  are not free of that choice.
- The classes of *val* are among those trained on, so its accuracy is partly adaptation to them.
- Nothing was measured on images unlike ImageNet's photographs.
- One seed. The attention of the early stages was not looked at.
"""


def collect(folders: list[Path]) -> None:
    """Writes the figures of evaluations to `pretrained_results.csv`."""
    rows = [row for folder in folders for row in figures(folder)]
    with RESULTS.open('w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    settings = yaml.safe_load((PACKAGE / 'fit.yaml').read_text(encoding='utf-8'))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('step', choices=('fit', 'pack', 'collect'))
    parser.add_argument('--sources', type=Path, help='folder of the image sets')
    parser.add_argument('--output', type=Path, required=True, help='folder for the images and the fits')
    parser.add_argument('--networks', nargs='+', default=list(settings['networks']), choices=settings['networks'])
    args = parser.parse_args()
    if args.step == 'collect':
        collect(sorted(path.parent for path in args.output.glob('*/evaluation.json')))
        for path in PACKAGE.glob('*_castream.safetensors'):
            name = path.stem.removesuffix('_castream')
            path.with_suffix('.md').write_text(card(name, settings), encoding='utf-8')
        print(table())
        return
    for name in args.networks:
        if args.step == 'fit':
            fit(name, settings, draw_images(settings, args.sources, args.output), args.output)
        else:
            print(pack(name, args.output))


if __name__ == '__main__':
    main()

"""Makes the streams of `timm_castream/pretrained` again, from the settings in its `fit.yaml`.

python -m benchmarks.pretrained fit --sources clones --output work --networks tf_efficientnet_lite0 --seeds 0 1 2
python -m benchmarks.pretrained pack --output work --networks tf_efficientnet_lite0
python -m benchmarks.pretrained evaluate --sources clones --output work --networks tf_efficientnet_lite0 --seeds 0 1 2
python -m benchmarks.pretrained collect --output work

`maps` draws the images of the public sets and keeps their feature maps; `fit` does so too and runs `castream fit`; a
second call resumes. `pack` writes the streams of seed 0 in float16 into the package. `evaluate` measures streams on the
photographs that are kept back, in folders `evaluations/NETWORK.seedN.SET`. `collect` keeps their figures in
`benchmarks/pretrained_results.csv`, writes the cards beside the streams and prints the tables of `docs/pretrained.md`.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from timm.data import create_transform

from benchmarks.fast_network import FastNetwork
from benchmarks.pretrained_images import draw_images, link_kept_back
from timm_castream.backbones.image_settings import image_settings
from timm_castream.datasets.image_files import image_mode
from timm_castream.evaluation.bootstrap import mean_curve
from timm_castream.fitting.features import write_features
from timm_castream.fitting.images import ListedImages, files_hash, find_files
from timm_castream.hub.configs import shipped_streams
from timm_castream.hub.load import open_model
from timm_castream.hub.stream_file import backbone_name, fingerprint, read_safetensors, write_safetensors

PACKAGE = Path(__file__).parents[1] / 'timm_castream' / 'pretrained'
RESULTS = Path(__file__).with_name('pretrained_results.csv')
METHODS = ('grad_cam', 'random')
METRICS = {'average_drop': 'AD', 'average_gain': 'AG', 'average_increase': 'AI'}
HEADINGS = {
    'accuracy': 'accuracy ↑',
    'probability': 'probability',
    'AD': 'AD ↓',
    'AG': 'AG ↑',
    'AI': 'AI ↑',
    'AG less random': 'AG less random ↑',
}


def keep_maps(name: str, settings: dict[str, Any], folders: list[Path], cache: Path) -> None:
    """Runs a network once over the images, in ONNX Runtime, and keeps its maps as `castream fit --cache` takes them."""
    model: Any = open_model(name, pretrained=True).eval()
    config = image_settings(model)
    transform = create_transform(**config, is_training=False)
    files = find_files(folders, settings['networks'][name].get('num_images'), settings['seed'])
    images = ListedImages(files, torch.zeros(len(files), dtype=torch.long), transform, image_mode(3))
    facts = {
        'network': backbone_name(model),
        'fingerprint': fingerprint(model),
        'files': files_hash(files),
        'transform': repr(transform),
    }
    network = FastNetwork(model, config['input_size'][-1])
    write_features(network, images, cache, facts=facts, progress=True)


def fit(name: str, settings: dict[str, Any], folders: list[Path], output: Path, seed: int) -> None:
    """Runs `castream fit` for a network on maps that are kept for all seeds."""
    cache = output / f'{name}.maps'
    options = [f'--{key.replace("_", "-")}={value}' for key, value in settings['networks'][name].items()]
    command = [sys.executable, '-m', 'timm_castream.cli', 'fit', '--model', name, '--pretrained', '--workers', '0']
    command += ['--seed', str(seed), '--output', str(output / f'{name}.seed{seed}'), '--cache', str(cache)]
    command += ['--cache-size', '100', *options]
    subprocess.run([*command, '--images', *map(str, folders)], check=True)


def stream_file(name: str, output: Path, seed: int) -> Path:
    """The stream that `fit` wrote."""
    return output / f'{name}.seed{seed}' / 'stream.safetensors'


def pack(name: str, settings: dict[str, Any], output: Path) -> Path:
    """Writes the fitted stream of the first seed in float16 into the package."""
    tensors, metadata = read_safetensors(stream_file(name, output, settings['seed']), name)
    path = shipped_streams().get(f'{name}_castream', PACKAGE / f'{name}_castream.safetensors')
    write_safetensors(path, {key: value.half() for key, value in tensors.items()}, metadata)
    return path


def evaluate(name: str, settings: dict[str, Any], folders: dict[str, Path], output: Path, seed: int) -> None:
    """Measures a stream on the photographs that are kept back. That of the first seed is the one in the package."""
    weights = ['--pretrained'] if seed == settings['seed'] else ['--checkpoint', str(stream_file(name, output, seed))]
    for images, folder in folders.items():
        written = output / 'evaluations' / f'{name}.seed{seed}.{images}'
        command = [sys.executable, '-m', 'timm_castream.cli', 'evaluate', '--model', f'{name}_castream', *weights]
        command += ['--data-dir', str(folder), '--workers', '0', '--output', str(written)]
        command += ['--methods', *METHODS, '--metrics', *METRICS]
        subprocess.run(command, check=True)


def figures(folder: Path) -> list[dict[str, Any]]:
    """The figures of an evaluation: under GAP, under CA, and their difference, paired by image, with its interval.

    Args:
        folder: What `castream evaluate` wrote, `NETWORK.seedN.SET`.
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
    network, fitted, images = folder.name.split('.')
    table = []
    for name, (gap, ca) in {**pairs, 'AG less random': (gain('random'), gain('grad_cam'))}.items():
        middle, low, high = (float(v[0]) for v in mean_curve((ca - gap)[:, None], np.arange(len(rows)), seed))
        both = ('', '') if name == 'AG less random' else (round(gap.mean(), 2), round(ca.mean(), 2))
        ends = [round(value, 2) for value in (middle, low, high)]
        keys = ('network', 'seed', 'set', 'images', 'figure', 'gap', 'ca', 'difference', 'low', 'high')
        table.append(
            dict(zip(keys, (network, fitted.removeprefix('seed'), images, len(rows), name, *both, *ends), strict=True))
        )
    return table


def table(seeds: bool = False) -> str:
    """The figures of `pretrained_results.csv` as a table in Markdown.

    Args:
        seeds: Those of all seeds of the networks that were fitted with several, in place of those of the package.
    """
    with RESULTS.open(encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    first = rows[0]['seed']
    several = {row['network'] for row in rows if row['seed'] != first}
    if seeds and not several:
        return ''
    rows = [row for row in rows if (row['network'] in several if seeds else row['seed'] == first)]
    lines = [
        f'| network |{" seed |" if seeds else ""} photographs | accuracy of GAP | {" | ".join(HEADINGS.values())} |',
        f'| --- |{" --- |" if seeds else ""} --- | --- |{" --- |" * len(HEADINGS)}',
    ]
    for key in dict.fromkeys((row['network'], row['seed'], row['set']) for row in rows):
        found = {row['figure']: row for row in rows if (row['network'], row['seed'], row['set']) == key}
        cells = [
            f'{float(row["difference"]):+.1f} [{float(row["low"]):.1f}, {float(row["high"]):.1f}]'
            for row in (found[name] for name in HEADINGS)
        ]
        accuracy = found['accuracy']
        seed = f' {key[1]} |' if seeds else ''
        images = f'{accuracy["images"]} of {key[2]} | {float(accuracy["gap"]):.1f}'
        lines.append(f'| `{key[0]}` |{seed} {images} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def card(name: str, settings: dict[str, Any]) -> str:
    """The card of a stream of the package: what it is, how it was made, on what it was measured, terms and limits."""
    header = read_safetensors(PACKAGE / f'{name}_castream.safetensors', name)[1]
    with torch.device('meta'):
        model: Any = timm.create_model(f'{name}_castream', **json.loads(header['stream_args']))
    cfg, options = model.pretrained_cfg, settings['networks'][name]
    share = options.get('distill', 0)
    target = f' {share:.0%} of the target are its probabilities of all classes.' if share else ''
    used = f'{options["num_images"]:,} of the images' if 'num_images' in options else 'the images'
    parameters = sum(parameter.numel() for parameter in model.castream.parameters())
    sources = '\n'.join(
        f'- {source["name"]}: {source["count"]:,} images; {source["what"]}. From {source["from"]}. Terms: '
        f'{source["terms"]}.'
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

`castream fit` on {used} below, without labels: the label of an image is the class that the network predicts for it.
{options['epochs']} epoch of AdamW, learning rate {options['lr']:g}, seed {settings['seed']}.{target} The settings are in
`fit.yaml`, and `python -m benchmarks.pretrained fit` repeats it. Of the images up to 1,500 are held out.

{sources}

Copies of the photographs that are measured on were left out. No image is in the package.
We do not know whether the terms of the images bind weights that were fitted on them: read them before commercial use.

## Measured on

Photographs that neither the fit nor the choice of its settings saw. *samples*: the classes with an odd index of
imagenet-sample-images, one photograph each, from the training images of the backbone. *val*: the validation parts of
Imagenette and Imagewoof, classes that were trained on too. CA - GAP, paired by image, with 95 % intervals; AD, AG and AI are of Grad-CAM. *AG less random*: the difference of AG less that of random maps.

{measured}

## Limits

- Part of the gain in AG is confidence: CA is surer of the class than GAP.
- Nothing was measured on images unlike ImageNet's photographs.
- The attention of the early stages shows nothing about an image: each looks at one point. Read that of the last stage.
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
    parser.add_argument('step', choices=('maps', 'fit', 'pack', 'evaluate', 'collect'))
    parser.add_argument('--sources', type=Path, help='folder of the image sets')
    parser.add_argument('--output', type=Path, required=True, help='folder for the images, the fits and the figures')
    parser.add_argument('--networks', nargs='+', default=list(settings['networks']), choices=settings['networks'])
    parser.add_argument('--seeds', nargs='+', type=int, default=[settings['seed']], help='(default: the one shipped)')
    args = parser.parse_args()
    if args.step == 'collect':
        collect(sorted(path.parent for path in (args.output / 'evaluations').glob('*/evaluation.json')))
        for path in PACKAGE.glob('*_castream.safetensors'):
            name = path.stem.removesuffix('_castream')
            path.with_suffix('.md').write_text(card(name, settings), encoding='utf-8')
        print(f'{table()}\n\n{table(seeds=True)}')
        return
    for name in args.networks:
        if args.step in ('maps', 'fit'):
            folders = draw_images(settings, args.sources, args.output)
            keep_maps(name, settings, folders, args.output / f'{name}.maps')
            for seed in args.seeds if args.step == 'fit' else []:
                fit(name, settings, folders, args.output, seed)
        elif args.step == 'evaluate':
            for seed in args.seeds:
                evaluate(name, settings, link_kept_back(settings, args.sources, args.output), args.output, seed)
        else:
            print(pack(name, settings, args.output))


if __name__ == '__main__':
    main()

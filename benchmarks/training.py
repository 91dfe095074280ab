"""What a training step of the stream costs beside the frozen backbone: over the bare forward, and the authors' way.

    python benchmarks/training.py
    python benchmarks/training.py --models resnet50 --device cuda --dtype bfloat16 --channels-last --compile \\
        --batch-size 256

A step is forward, cross entropy, backward and SGD on one batch of noise that is on the device already: no loading, no
augmentation. The bare forward is the plain network's on the same batch, in eval mode under `no_grad`.

The authors' way is our model with frozen weights and every module in train mode. So their loop trains a ResNet: what
should put its norm layers in eval mode looks for `norm` in the names of parameters, where ResNet has `bn1`. A ConvNeXt
has no statistics, and both ways are one.

Memory is the peak beyond weights, momentum and images. That of a step is set against the bare forward's, plus the stage
maps that backward reads, plus the stream's gradients. Hours on 8 accelerators are an eighth: communication is left out.

The second table sets `castream fit` on kept maps against `castream train -c own_data.yaml` on the same photographs: whole
epochs in turn. An epoch of `castream train` is timm's loader with its worker processes, the frozen step and AdamW; one of
`castream fit` reads the maps of the same images from disk. The maps are written once, which costs one pass of the network.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from model import peak_bytes
from PIL import Image
from sklearn.datasets import load_sample_image
from timing import heading, interleave, ratio
from timm.data import create_dataset
from torch import Tensor, nn
from torch.nn import functional as F

import timm_castream
from timm_castream.backbones.image_settings import image_loader
from timm_castream.fitting.features import write_features
from timm_castream.fitting.network import FrozenNetwork
from timm_castream.fitting.training import Candidate, Recipe, Targets, train_streams

IMAGENET_IMAGES, EPOCHS = 1_281_167, 90


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    print(
        heading(args.seed, device) + f', batch {args.batch_size} at {args.image_size} px, {args.dtype}, '
        f'{"compiled" if args.compile else "eager"}\n',
        flush=True,
    )
    print(
        "| backbone | images/s, frozen step | over the bare forward | over the authors' way | memory / (inference + "
        "stream) | the authors' / ours | hours of 90 ImageNet epochs, 1 / 8 |\n| --- | --- | --- | --- | --- | --- | "
        '--- |',
        flush=True,
    )
    for name in args.models:
        print(f'| {name} | ' + ' | '.join(compare(name, args, device)) + ' |', flush=True)
    print(
        '\n| backbone | placement | images/s, castream train | images/s, castream fit | fit / train | kept maps, MB an '
        'image |\n| --- | --- | --- | --- | --- | --- |',
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder, 'images'), args.fit_images)
        for name in args.fit_models:
            for row in compare_fit(name, Path(folder), args, device):
                print('| ' + ' | '.join(row) + ' |', flush=True)


def compare(name: str, args: argparse.Namespace, device: torch.device) -> list[str]:
    """One row: a backbone, its bare forward, and two ways to train a stream beside it."""
    dtype = getattr(torch, args.dtype)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    models = {
        kind: timm.create_model(f'{name}_castream').to(device, memory_format=memory_format)
        for kind in ('frozen', 'authors')
    }
    plain = timm.create_model(name).to(device, memory_format=memory_format).eval()
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    x = x.contiguous(memory_format=memory_format)
    target = torch.randint(1000, (args.batch_size,), device=device)

    timm_castream.freeze_backbone(models['frozen']).train()
    for parameter_name, parameter in models['authors'].named_parameters():
        parameter.requires_grad_(parameter_name.startswith('castream.'))
    models['authors'].train()
    stream_bytes = stage_bytes(models['frozen'], x, dtype) + sum(
        p.numel() * p.element_size() for p in models['frozen'].castream.parameters()
    )
    if args.compile:
        plain = torch.compile(plain)

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            plain(x)

    def make_step(model: nn.Module) -> Callable[[], None]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
        network = torch.compile(model) if args.compile else model

        def step() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(network(x).float(), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {kind: make_step(model) for kind, model in models.items()}
    for call in (forward, *steps.values()):
        call()  # compiles, and makes the momentum, which is there from the first step on
    memory = {kind: peak_bytes(step, device) for kind, step in steps.items()}
    inference = peak_bytes(forward, device)
    seconds = interleave({'forward': forward, **steps}, args.rounds, device)
    images = args.batch_size / statistics.median(seconds['frozen'])
    hours = IMAGENET_IMAGES * EPOCHS / images / 3600
    torch.compiler.reset()
    gc.collect()
    return [
        f'{images:.1f}',
        f'{ratio(seconds, "forward", "frozen"):.3f}',
        f'{ratio(seconds, "authors", "frozen"):.2f}',
        f'{memory["frozen"] / (inference + stream_bytes):.3f}',
        f'{memory["authors"] / memory["frozen"]:.2f}',
        f'{hours:.0f} / {hours / 8:.0f}',
    ]


def compare_fit(name: str, folder: Path, args: argparse.Namespace, device: torch.device) -> list[list[str]]:
    """A row for S_0 - S_L and one for S_L - S_L: epochs of `castream train` and of `castream fit`, in turn."""
    plain = timm.create_model(name).to(device).eval()
    network = FrozenNetwork(plain)

    def loader(training: bool) -> object:
        data = create_dataset('', str(folder / 'images'))
        workers = {'num_workers': os.cpu_count() or 1, 'persistent_workers': True}
        options = {'is_training': training, 'no_aug': True, 'use_prefetcher': training}
        return image_loader(plain, data, args.fit_batch_size, **options, **workers)

    kept = write_features(network, loader(False).dataset, folder / name, facts={})
    rows = []
    for start in (0, len(network.stages) - 1):
        model = timm.create_model(name).to(device)
        timm_castream.attach(model, stream_start=start, stream_init='gap', freeze_backbone=True).train()
        optimizer = torch.optim.AdamW(model.castream.parameters(), lr=1e-4, weight_decay=0.0)
        batches = loader(True)
        count = len(batches) * args.fit_batch_size  # the loader of training drops the rest
        candidate = Candidate(network, Recipe(start, 1, 1e-4), {'stream_init': 'gap'}, args.seed)
        indices, targets = torch.arange(count), Targets(torch.zeros(args.fit_images, dtype=torch.long))

        def train(
            model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer, data: object = batches
        ) -> None:
            for x, target in data:
                loss = F.cross_entropy(model(x), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        def fit(candidate: Candidate = candidate, indices: Tensor = indices, targets: Targets = targets) -> None:
            train_streams(network, kept, indices, targets, [candidate], batch_size=args.fit_batch_size)

        seconds = interleave({'train': train, 'fit': fit}, args.fit_rounds, device, warmup=1)
        size = 2 * sum(stage[0].size for stage in kept.stages[start:]) + 4 * kept.pooled[0].numel()
        rows.append(
            [
                name,
                f'S_{start} - S_{len(network.stages) - 1}',
                f'{count / statistics.median(seconds["train"]):.1f}',
                f'{count / statistics.median(seconds["fit"]):.1f}',
                f'{ratio(seconds, "train", "fit"):.1f}',
                f'{size / 1e6:.2f}',
            ]
        )
    return rows


def write_photographs(folder: Path, count: int) -> None:
    """An image folder of two classes: crops of scikit-learn's photographs, 375 x 500 pixels each."""
    photographs = {name: Image.fromarray(load_sample_image(f'{name}.jpg')) for name in ('china', 'flower')}
    for name, photograph in photographs.items():
        (folder / name).mkdir(parents=True)
        for i in range(count // 2):
            left, top = i % (photograph.width - 499), i % (photograph.height - 374)
            photograph.crop((left, top, left + 500, top + 375)).save(folder / name / f'{i}.jpg')


def stage_bytes(model: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    """Memory of the feature maps that the stream reads in backward."""
    with torch.no_grad():
        maps = timm_castream.attention_maps(model, x[:1])
    locations = [m.shape[2] * m.shape[3] for m in maps]
    return sum(n * d for n, d in zip(locations, model.castream.dims, strict=True)) * len(x) * dtype.itemsize


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='*', default=('resnet50', 'resnet18', 'convnext_tiny'))
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='by autocast')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=9, help='measured rounds (default: %(default)s)')
    fit = parser.add_argument_group('the second table')
    fit.add_argument('--fit-models', nargs='*', default=('tf_efficientnet_lite0', 'resnet50'))
    fit.add_argument('--fit-images', type=int, default=256, help='photographs of an epoch (default: %(default)s)')
    fit.add_argument('--fit-batch-size', type=int, default=64)
    fit.add_argument('--fit-rounds', type=int, default=3, help='measured epochs (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


if __name__ == '__main__':
    main()

"""What a CA-Stream costs: forward, memory and training step over the plain backbone's, and import time over timm's.

python benchmarks/model.py
python benchmarks/model.py --device cuda --batch-size 256 --dtype bfloat16 --modes compiled
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable

import timm
import torch
from timing import heading, interleave, ratio
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import timm_castream

# A convolutional network of two sizes, one with layer scale, one of (B, H, W, D), one of tokens, one of 100 blocks.
MODELS = (
    'resnet50',
    'resnet18',
    'convnext_small',
    'swin_tiny_patch4_window7_224',
    'vit_small_patch16_224',
    'vit_tiny_patch16_224:depth=100',
)
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(heading(args.seed, device) + f', batch {args.batch_size} at {args.image_size} px, {args.dtype}\n', flush=True)
    print(
        '| backbone | memory format | mode | forward / plain | training step / plain forward | activations / plain | '
        'plain forward, ms |\n| --- | --- | --- | --- | --- | --- | --- |',
        flush=True,
    )
    cases = [(model, fmt, mode) for model in args.models for fmt in args.formats for mode in args.modes]
    for model, fmt, mode in tqdm(cases, disable=None):
        row = compare(model, FORMATS[fmt], mode == 'compiled', args, device, dtype)
        tqdm.write(f'| {model} | {fmt} | {mode} | ' + ' | '.join(row) + ' |')
    if not args.no_import:
        plain, plugin = import_seconds(args.import_rounds)
        print(
            f'\nImport: timm {plain:.2f} s, timm_castream {plugin:.2f} s, {plugin - plain:+.2f} s '
            f'(medians of {args.import_rounds} processes each, in turn)'
        )


def compare(
    name: str,
    memory_format: torch.memory_format,
    compiled: bool,
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> list[str]:
    """One row: a backbone with and without its stream, in one memory format and mode."""
    name, *options = name.split(':')
    kwargs = {key: int(value) for key, value in (option.split('=') for option in options)}
    plain = timm.create_model(name, **kwargs).to(device, dtype, memory_format=memory_format).eval()
    stream = timm.create_model(f'{name}_castream', **kwargs).to(device, dtype, memory_format=memory_format).eval()
    trained = timm.create_model(f'{name}_castream', **kwargs)
    timm_castream.freeze_backbone(trained).to(device, dtype, memory_format=memory_format).train()
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device, dtype=dtype)
    x = x.contiguous(memory_format=memory_format)
    target = torch.randint(1000, (args.batch_size,), device=device)
    optimizer = torch.optim.SGD(trained.castream.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x)

    memory = peak_bytes(lambda: forward(stream), device) / peak_bytes(lambda: forward(plain), device)
    if compiled:
        plain, stream, trained = (torch.compile(m) for m in (plain, stream, trained))

    def step() -> None:
        F.cross_entropy(trained(x).float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {'plain': lambda: forward(plain), 'stream': lambda: forward(stream), 'step': step}
    seconds = interleave(calls, args.rounds, device)
    torch.compiler.reset()
    gc.collect()
    return [
        f'{ratio(seconds, "stream", "plain"):.3f}',
        f'{ratio(seconds, "step", "plain"):.3f}',
        f'{memory:.3f}',
        f'{statistics.median(seconds["plain"]) * 1e3:.0f}',
    ]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most memory that a call holds at a time, beyond what was held before."""
    if device.type == 'cuda':
        call()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def import_seconds(rounds: int) -> tuple[float, float]:
    """Median seconds of `import timm` and of `import timm, timm_castream`, each in a fresh process, in turn."""
    program = 'import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)'
    seconds: dict[str, list[float]] = {'timm': [], 'timm, timm_castream': []}
    for _ in range(rounds + 1):
        for name, values in seconds.items():
            command = [sys.executable, '-c', program.format(name)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(float(done.stdout))
    return statistics.median(seconds['timm'][1:]), statistics.median(seconds['timm, timm_castream'][1:])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--models', nargs='+', default=MODELS, help='backbones, as NAME or NAME:ARGUMENT=NUMBER (default: %(default)s)'
    )
    parser.add_argument('--formats', nargs='+', default=tuple(FORMATS), choices=tuple(FORMATS))
    parser.add_argument('--modes', nargs='+', default=('eager', 'compiled'), choices=('eager', 'compiled'))
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=15, help='measured rounds (default: %(default)s)')
    parser.add_argument('--import-rounds', type=int, default=7)
    parser.add_argument('--no-import', action='store_true', help='leave the import time out')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


if __name__ == '__main__':
    main()

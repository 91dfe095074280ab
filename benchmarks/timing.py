"""Side by side timing: what is compared runs in turn, in one process, so that the machine's drift meets all alike."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import timm
import torch


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Times every call once a round, in an order that turns round by round.

    Args:
        calls: What to time, by name.
        rounds: Times measured of each.
        device: Waited for before the clock is read.
        warmup: Rounds that do not count.

    Returns:
        Seconds of each round, by name.
    """

    def wait() -> None:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(warmup + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wait()
            start = time.perf_counter()
            calls[name]()
            wait()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of one call's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def heading(seed: int, device: torch.device) -> str:
    """The command, the kind of machine, versions and seed: what stands above every table of figures."""
    if device.type == 'cuda':
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f'{torch.get_num_threads()} threads on {os.cpu_count()} {platform.machine()} cores'
    command = ' '.join(['python', *sys.argv])
    return (
        f'`{command}`: {machine}, torch {torch.__version__}, timm {timm.__version__}, Python '
        f'{platform.python_version()}, seed {seed}'
    )

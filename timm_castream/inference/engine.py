"""Forwards without gradients in ONNX Runtime: masked and perturbed images on a CPU, both poolings in one graph.

A network is exported for images of one size. The engine is tried on a few images before it is used: where its
probabilities are not those of torch, or a network does not export, the forwards stay in torch.

Letters: N images, C classes, H x W pixels.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import multiprocessing
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._utils.checks import check_names
from .predictor import Predictor

ENGINES = ('auto', 'torch', 'onnxruntime')
TORCH = 'torch'
TOLERANCE = 1e-5  # of probabilities
# An export takes as long as some hundred forwards of 224 x 224 pixels. Below so many `auto` does not try it.
WORTH_AN_EXPORT = 1000
_PACKAGES = ('onnxruntime', 'onnx', 'onnxscript')
# One image of 224 x 224 a call is as fast as many, and needs the least memory.
_PIXELS_OF_A_CALL = 224 * 224
_SECONDS_OF_AN_EXPORT = 900

_logger = logging.getLogger(__name__)


class Engine:
    """A network in ONNX Runtime, for images of one size.

    As many threads as torch has share the images. Each thread makes a few images and runs the whole network on them,
    because threads that share a layer, or a batch, wait for each other.

    Args:
        path: File of the graph, from `export`.
        poolings: Names of its outputs.
        shape: (n, channels, H, W), of its input.

    Attributes:
        name: `onnxruntime` and its version.
        num_threads: How many run it.
    """

    def __init__(self, path: Path, poolings: Sequence[str], shape: Sequence[int]) -> None:
        onnxruntime: Any = importlib.import_module('onnxruntime')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        self._input = self._session.get_inputs()[0].name
        self.poolings = tuple(poolings)
        self.shape = tuple(shape)
        self.num_threads = torch.get_num_threads()
        self._threads = _threads(self.num_threads)
        self.name = f'onnxruntime {onnxruntime.__version__}'

    def takes(self, images: Tensor) -> bool:
        """Whether images have the size and the type of the graph."""
        return tuple(images.shape[1:]) == self.shape[1:] and images.dtype == torch.float32

    def batches(self, function: Callable[[Tensor], Any], rows: Tensor) -> list[Any]:
        """Calls a function with rows for as many images as one call takes, side by side: see `images.Batches`."""
        return list(self._threads.map(function, rows.split(self.shape[0])))

    def logits(self, images: Tensor, poolings: Sequence[str]) -> dict[str, Tensor]:
        """{pooling: (N, C)} logits of (N, channels, H, W) images."""
        parts = images.contiguous().split(self.shape[0])
        is_shared = len(parts) > 1 and not getattr(_thread, 'is_of_engine', False)  # its threads wait for no other
        outputs = list((self._threads.map if is_shared else map)(self._run, parts))
        return {name: torch.cat([part[self.poolings.index(name)] for part in outputs]) for name in poolings}

    def _run(self, images: Tensor) -> list[Tensor]:
        missing = self.shape[0] - len(images)
        filled = torch.cat([images, images.new_zeros(missing, *self.shape[1:])]) if missing else images
        outputs = self._session.run(None, {self._input: filled.numpy()})
        return [torch.from_numpy(output)[: len(images)] for output in outputs]


_thread = threading.local()


def _threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch runs on one core and without gradients."""
    together = threading.Barrier(count + 1)

    def prepare() -> None:
        _thread.is_of_engine = True
        torch.set_grad_enabled(False)
        torch.get_num_threads()  # takes the number of the process, which it would do at the first operation otherwise
        torch.set_num_threads(1)  # of this thread, and of those that begin later
        together.wait()

    threads = ThreadPoolExecutor(count, 'castream-engine', prepare)
    own = torch.get_num_threads()
    for _ in range(count):
        threads.submit(int)  # each begins a thread
    together.wait()
    torch.set_num_threads(own)
    return threads


class _Logits(nn.Module):
    """A predictor as a module: from images to the logits of each pooling, (N, C)."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.model = predictor.model
        self._predict = predictor.torch_logits

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._predict(x).values())


def check_engine(name: str, predictor: Predictor, amp_dtype: torch.dtype | None = None) -> None:
    """Raises an error, before long work, where an engine cannot be had.

    Args:
        name: Of `ENGINES`.
        predictor: The network.
        amp_dtype: Type of autocast, or None.

    Raises:
        ValueError: If the name is unknown, or ONNX Runtime is asked for beside a device, a type or a compiler.
        ModuleNotFoundError: If it is asked for and not installed.
    """
    check_names('engine', (name,), ENGINES)
    if name == 'onnxruntime':
        obstacle = _obstacle(predictor, amp_dtype)
        if obstacle:
            raise ValueError(f"engine 'onnxruntime' takes float32 networks on a CPU, {obstacle}: choose 'torch'.")
        missing = next((package for package in _PACKAGES if importlib.util.find_spec(package) is None), None)
        if missing:
            raise ModuleNotFoundError(f'No module named {missing!r}', name=missing)


def can_try(predictor: Predictor, amp_dtype: torch.dtype | None = None) -> bool:
    """Whether ONNX Runtime is installed and could run the network."""
    return not _obstacle(predictor, amp_dtype) and all(map(importlib.util.find_spec, _PACKAGES))


def _obstacle(predictor: Predictor, amp_dtype: torch.dtype | None) -> str:
    """Why ONNX Runtime cannot run a network, as a clause, or ''."""
    if predictor.device.type != 'cpu':
        return f'and the network is on {predictor.device}'
    if amp_dtype is not None:
        return f'and amp_dtype is {str(amp_dtype).removeprefix("torch.")}'
    if predictor.is_compiled:
        return 'and torchcompile is on'
    if predictor.score is not None:
        return 'and target is a function'
    other = next((p.dtype for p in predictor.model.parameters() if p.dtype != torch.float32), None)
    return f'and the network has weights in {str(other).removeprefix("torch.")}' if other else ''


# {model: (key, engine, how many times as fast as torch)}: an engine that was tried serves the next evaluation too.
_engines: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Engine, float]] = WeakKeyDictionary()


def make_engine(predictor: Predictor, images: Tensor, fingerprint: str, must_be_faster: bool = False) -> Engine | None:
    """Exports a network and tries it on images.

    Args:
        predictor: The network.
        images: (N, channels, H, W), a few normalised images.
        fingerprint: Text that differs for other weights or another architecture.
        must_be_faster: Take the engine only if it is faster than torch on a batch.

    Returns:
        The engine, or None where the network does not export, its probabilities differ from torch's, or torch is
        faster. The reason is logged.
    """
    pixels = images.shape[2] * images.shape[3]
    size = max(1, min(_PIXELS_OF_A_CALL // pixels, predictor.batch_size(images)))
    key = (fingerprint, predictor.poolings, size, tuple(images.shape[1:]), torch.get_num_threads())
    known, engine, speed = _engines.get(predictor.model, ((), None, 0.0))
    if engine is not None and known == key and not _agrees(predictor, engine, images[:1]):
        engine = None  # something changed that no fingerprint holds, such as a buffer that is not saved
    if engine is None or known != key:
        tried = _try(predictor, images, size)
        if tried is None:
            return None
        engine, speed = tried
        _engines[predictor.model] = key, engine, speed
    if must_be_faster and speed < 1:
        _logger.info('The forwards run in torch: %s takes %.2f times as long.', engine.name, 1 / speed)
        return None
    _logger.info('The forwards of masked images run in %s, %.1f times as fast as torch.', engine.name, speed)
    return engine


def _try(predictor: Predictor, images: Tensor, size: int) -> tuple[Engine, float] | None:
    """An engine that agrees with torch and how many times as fast it is, or None with the reason in the log."""
    with predictor.evaluating():
        try:
            engine = _export(predictor, (size, *images.shape[1:]))
        except Exception as error:  # the exporter raises errors of many libraries
            text = _first_line(error)
            _logger.warning('The forwards run in torch: the network does not export to ONNX (%s).', text)
            return None
        difference = _difference(predictor, engine, torch.cat([images, 0.3 * images, torch.zeros_like(images[:1])]))
        if not difference <= TOLERANCE:  # NaN is no agreement
            _logger.warning(
                'The forwards run in torch: the probabilities of %s differ by %.1e.', engine.name, difference
            )
            return None
        return engine, _speed(predictor, engine, images)


def _agrees(predictor: Predictor, engine: Engine, images: Tensor) -> bool:
    """Whether an engine that was made before has the probabilities of the network as it is now."""
    with predictor.evaluating():
        return _difference(predictor, engine, images) <= TOLERANCE


def _export(predictor: Predictor, shape: Sequence[int]) -> Engine:
    with tempfile.TemporaryDirectory(prefix='castream-onnx-') as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about the exporter's own code
        path = Path(folder, 'network.onnx')
        if sys.platform == 'linux':
            _write_in_a_child(predictor, shape, path)
        else:
            _write(predictor, shape, path)
        return Engine(path, predictor.poolings, shape)


def _write(predictor: Predictor, shape: Sequence[int], path: Path) -> None:
    program = torch.export.export(_Logits(predictor).eval(), (torch.zeros(*shape),), strict=False)
    exported: Any = torch.onnx.export(program, (), dynamo=True, verbose=False)
    exported.save(path)


def _write_in_a_child(predictor: Predictor, shape: Sequence[int], path: Path) -> None:
    """`_write` in another process: the exporter's libraries and tensors leave no memory behind."""
    process = multiprocessing.get_context('fork').Process(target=_child, args=(predictor, shape, path), daemon=True)
    process.start()
    try:
        process.join(_SECONDS_OF_AN_EXPORT)
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    error = path.with_suffix('.txt')
    if error.exists():
        raise RuntimeError(error.read_text(encoding='utf-8'))
    if process.exitcode:
        raise RuntimeError(f'the process of the export ended with code {process.exitcode}')


def _child(predictor: Predictor, shape: Sequence[int], path: Path) -> None:
    logging.disable(logging.WARNING)  # the exporter tells its own steps
    torch.set_num_threads(1)  # the threads of the first process are not in this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _write(predictor, shape, path)
    except Exception as error:
        path.with_suffix('.txt').write_text(_first_line(error), encoding='utf-8')


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _difference(predictor: Predictor, engine: Engine, images: Tensor) -> float:
    """The greatest difference of a probability."""
    ours = engine.logits(images, engine.poolings)
    expected = [predictor.torch_logits(part) for part in images.split(engine.shape[0])]
    return max(
        (predictor.probabilities(ours[name]) - predictor.probabilities(torch.cat([part[name] for part in expected])))
        .abs()
        .max()
        .item()
        for name in engine.poolings
    )


def _speed(predictor: Predictor, engine: Engine, images: Tensor) -> float:
    """Seconds of torch for a batch over those of the engine, the least of two each."""
    size = engine.shape[0] * engine.num_threads
    batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size]
    calls = (lambda: predictor.torch_logits(batch)), (lambda: engine.logits(batch, engine.poolings))
    torch_seconds, engine_seconds = (min(_seconds(call) for _ in range(2)) for call in calls)
    return torch_seconds / engine_seconds


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

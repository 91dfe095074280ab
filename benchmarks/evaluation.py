"""Cost of attributions, metrics and the whole protocol over the bare forwards that they need, and over the peers.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --device cuda --models resnet50 --masks 2048 --images 8 --dtype bfloat16 --compile

A bare forward is one of the plain backbone on NCHW images, in --dtype, in the fastest of several batch sizes. Weights
and the maps of Score-CAM are drawn at random, so that no channel is constant on an image and none is skipped. The
imputation of ROAD is timed on photographs, by Grad-CAM maps of the trained tf_efficientnet_lite0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from speed import LITE0, photographs
from timing import heading, interleave, ratio
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from timm_castream import forward_both
from timm_castream.attribution import attribute, attribute_all
from timm_castream.attribution.cam import score_cam_weights
from timm_castream.attribution.methods import METHODS, TABLE_METHODS
from timm_castream.evaluate import evaluate
from timm_castream.inference.engine import make_engine
from timm_castream.inference.images import (
    default_batch_size,
    fast_memory_format,
    in_batches,
    normalisation,
    resize_saliency,
)
from timm_castream.inference.predictor import Predictor
from timm_castream.inference.probabilities import probabilities
from timm_castream.metrics import ROAD_SHARES, deletion_curve, insertion_curve
from timm_castream.metrics.curves import saliency_rank
from timm_castream.metrics.imputation import linear_imputation
from timm_castream.metrics.localization import energy_pointing_game, localization_error, pointing_game
from timm_castream.metrics.max_box_acc import box_accuracy_hits

try:
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget
except ImportError:
    ScoreCAM = None
try:
    from captum.attr import IntegratedGradients
except ImportError:
    IntegratedGradients = None
try:
    from torchcam.methods import GradCAM as TorchCamGradCAM
    from torchcam.metrics import ClassificationMetric
except ImportError:
    TorchCamGradCAM = None

POOLINGS = ('gap', 'ca')
BATCH_SIZES = (16, 32, 64, 128)


@dataclass
class Case:
    """Sizes of a comparison.

    Attributes:
        size: Pixels of a side.
        masks: Masked images of Score-CAM that are timed for each image, at most one a channel.
        images: Images of Score-CAM, the curves and the protocol; Grad-CAM takes 8.
        options: More arguments of the model.
    """

    size: int
    masks: int
    images: int
    options: dict[str, int]


CASES = {
    'test_resnet': Case(64, 96, 4, {'output_stride': 8}),
    'resnet18': Case(224, 128, 1, {}),
    'resnet50': Case(224, 64, 1, {}),
}


class Comparison:
    """One backbone: its times, side by side."""

    def __init__(self, name: str, case: Case, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.case, self.rounds, self.device = case, args.rounds, torch.device(args.device)
        self.compile, self.amp_dtype = args.compile, None if args.dtype == 'float32' else getattr(torch, args.dtype)
        self.plain = timm.create_model(name, **case.options).eval()
        for module in self.plain.modules():
            if isinstance(module, nn.BatchNorm2d):  # timm's start at zero in residual branches
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, 0, 0.5)
        self.plain.to(self.device)
        self.model = timm.create_model(f'{name}_castream', **case.options).to(self.device).eval()
        self.model.load_state_dict(self.plain.state_dict(), strict=False)
        self.x = torch.rand(max(8, case.images), 3, case.size, case.size, device=self.device) * 4 - 2
        self.network = torch.compile(self.plain) if self.compile else self.plain
        self.both = torch.compile(forward_both) if self.compile else forward_both
        self.channels = self.plain.num_features
        self.images = torch.randn(max(BATCH_SIZES), *self.x.shape[1:], device=self.device)
        self.bare_batch = self._fastest_batch()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def bare(self, forwards: int, batch_size: int | None = None) -> None:
        """So many forwards of the plain backbone."""
        batch_size = batch_size or self.bare_batch
        with torch.no_grad(), self.autocast():
            for start in range(0, forwards, batch_size):
                self.network(self.images[: min(batch_size, forwards - start)])

    def _fastest_batch(self) -> int:
        calls = {str(size): lambda size=size: self.bare(128, size) for size in BATCH_SIZES}
        seconds = interleave(calls, 1, self.device, warmup=1)
        return int(min(seconds, key=lambda size: seconds[size][0]))

    def measure(self, calls: dict[str, Callable[[], object]], rounds: int | None = None) -> dict[str, list[float]]:
        with self.autocast():
            return interleave(calls, rounds or self.rounds, self.device, warmup=1)

    def score_cam(self) -> dict[str, float]:
        """Score-CAM's weights: for one pooling, for both, and by the peer for one after the other."""
        case = self.case
        x = self.x[: case.images]
        maps = torch.rand(len(x), min(case.masks, self.channels), 7, 7, device=self.device)
        targets = {p: torch.zeros(len(x), 1, dtype=torch.long, device=self.device) for p in POOLINGS}
        mean, std = normalisation(self.model, x)

        def ours(poolings: tuple[str, ...], forward: Callable[[Tensor], dict[str, Tensor]]) -> None:
            def predict(images: Tensor) -> dict[str, Tensor]:
                images = images.contiguous(memory_format=fast_memory_format(images))
                return {p: probabilities(logits) for p, logits in forward(images).items()}

            chosen = {p: targets[p] for p in poolings}
            with torch.no_grad():
                score_cam_weights(predict, x, maps, chosen, mean, std, in_batches(default_batch_size(x)))

        calls: dict[str, Callable[[], object]] = {
            'bare': lambda: self.bare(len(x) * maps.shape[1]),
            'one': lambda: ours(('gap',), lambda images: {'gap': self.network(images)}),
            'both': lambda: ours(POOLINGS, lambda images: self.both(self.model, images)),
        }
        if ScoreCAM is not None:
            peer = ScoreCAM(self.plain, [self.plain.layer4])
            activations = maps.float().cpu().numpy()
            chosen = [ClassifierOutputTarget(0)] * len(x)

            def run_peer() -> None:
                with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                    for _ in POOLINGS:
                        peer.get_cam_weights(x, None, chosen, activations, None)

            calls['peer'] = run_peer
        seconds = self.measure(calls)
        result = {
            'Score-CAM, one pooling / bare forwards of all channels': ratio(seconds, 'one', 'bare'),
            'Score-CAM, GAP and CA / one pooling': ratio(seconds, 'both', 'one'),
        }
        if ScoreCAM is not None:
            result["pytorch-grad-cam's Score-CAM twice / GAP and CA"] = ratio(seconds, 'peer', 'both')
        return result

    def curves(self) -> dict[str, float]:
        """Insertion and Deletion of one map an image."""
        x = self.x[: self.case.images]
        saliency, target = torch.rand(len(x), 7, 7, device=self.device), torch.zeros(len(x), dtype=torch.long)
        points = -(-self.case.size // 8) + 1

        def ours() -> None:
            insertion_curve(self.network, x, saliency, target)
            deletion_curve(self.network, x, saliency, target)

        seconds = self.measure({'bare': lambda: self.bare(2 * points * len(x)), 'ours': ours})
        return {'Insertion and Deletion / bare forwards': ratio(seconds, 'ours', 'bare')}

    def gradients(self) -> dict[str, float]:
        """Grad-CAM and Grad-CAM++ of a batch of 8."""
        x, methods = self.x[:8], ('grad_cam', 'grad_cam_pp')
        every = tuple(name for name, method in METHODS.items() if 'gradients' in method.needs)

        def bare() -> None:
            with torch.no_grad():
                self.plain(x)

        seconds = self.measure(
            {
                'bare': bare,
                'one': lambda: attribute_all(self.model, x, methods, poolings=('gap',)),
                'both': lambda: attribute_all(self.model, x, methods),
                'grad_cam': lambda: attribute_all(self.model, x, ('grad_cam',)),
                'every': lambda: attribute_all(self.model, x, every),
            },
            rounds=3 * self.rounds,
        )
        return {
            f'All {len(every)} gradient methods, GAP and CA / Grad-CAM, GAP and CA': ratio(
                seconds, 'every', 'grad_cam'
            ),
            'Grad-CAM and Grad-CAM++, GAP / one bare forward': ratio(seconds, 'one', 'bare'),
            'Grad-CAM and Grad-CAM++, GAP and CA / one bare forward': ratio(seconds, 'both', 'bare'),
        }

    def masked(self) -> dict[str, float]:
        """AD, AG and AI of Grad-CAM and Grad-CAM++ without curves: images, their maps, one masked image a map."""
        x = self.x[:8]
        loader = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), len(x))
        methods, metrics = ('grad_cam', 'grad_cam_pp'), ('average_drop', 'average_gain', 'average_increase')
        seconds = self.measure(
            {
                'bare': lambda: self.bare(len(x) * (2 + 2 * len(methods))),
                'ours': lambda: evaluate(self.model, loader, methods, metrics=metrics, amp_dtype=self.amp_dtype),
            }
        )
        return {
            'AD, AG and AI of two methods, GAP and CA / bare forwards': ratio(seconds, 'ours', 'bare'),
            'AD, AG and AI of two methods, GAP and CA: images/s': len(x) / statistics.median(seconds['ours']),
        }

    def callables(self) -> dict[str, float]:
        """A method of captum through `evaluate`, over captum's own call and the forwards of AD, AG and AI."""
        if IntegratedGradients is None:
            return {}
        x, target = self.x[:2], torch.zeros(2, dtype=torch.long, device=self.device)
        loader = DataLoader(TensorDataset(x.cpu(), target.cpu()), len(x))
        explainer = IntegratedGradients(self.plain)

        def attribution(images: Tensor, target: Tensor) -> Tensor:
            return explainer.attribute(images, target=target, n_steps=10, internal_batch_size=2)

        def alone() -> None:
            attribution(x, target)
            self.bare(2 * len(x))  # the images and the masked images

        seconds = self.measure(
            {
                'captum': alone,
                'ours': lambda: evaluate(
                    self.plain,
                    loader,
                    {'IG': attribution},
                    metrics=('average_drop', 'average_gain', 'average_increase'),
                ),
            }
        )
        name = "AD, AG and AI of captum's Integrated Gradients / captum and the forwards"
        return {name: ratio(seconds, 'ours', 'captum')}

    def peers_metrics(self) -> list[str]:
        """AD and AI of the same Grad-CAM maps by the peers and by us, and the time of each."""
        lines: list[str] = []
        if ScoreCAM is None or TorchCamGradCAM is None:
            return lines
        x = self.x[:8]
        with torch.no_grad():
            target = self.plain(x).argmax(1)
        loader = DataLoader(TensorDataset(x.cpu(), target.cpu()), len(x))
        maps = attribute_all(self.plain, x, ('grad_cam',), target, ('gap',))['gap', 'grad_cam']
        resized = nn.functional.interpolate(maps[:, None], x.shape[2:], mode='bilinear')[:, 0].cpu().numpy()
        softmax = [ClassifierOutputSoftmaxTarget(int(c)) for c in target]
        results: dict[str, tuple[float, float]] = {}

        def ours() -> None:
            report = evaluate(
                self.plain, loader, {'maps': maps.cpu().numpy()}, metrics=('average_drop', 'average_increase')
            )
            results['ours'] = tuple(report['gap', 'maps', name].value for name in report.metrics)

        def pytorch_grad_cam() -> None:
            drop = DropInConfidence()(x, resized, softmax, self.plain)
            increase = IncreaseInConfidence()(x, resized, softmax, self.plain)
            results['pytorch-grad-cam'] = (100 * float(drop.mean()), 100 * float(increase.mean()))

        extractor = TorchCamGradCAM(self.plain, 'layer4')

        def torch_cam() -> None:
            metric = ClassificationMetric(extractor, lambda logits: logits.softmax(1))
            metric.update(x, target.tolist())
            summary = metric.summary()
            results['torch-cam'] = (100 * summary['avg_drop'], 100 * summary['conf_increase'])

        seconds = self.measure({'ours': ours, 'pytorch-grad-cam': pytorch_grad_cam, 'torch-cam': torch_cam})
        extractor.remove_hooks()
        for name, (drop, increase) in results.items():
            lines.append(f'{name}: AD {drop:.2f}, AI {increase:.1f}, {1000 * statistics.median(seconds[name]):.0f} ms')
        return lines

    def localization(self) -> dict[str, float]:
        """The localisation metrics of Grad-CAM maps and of pixel noise with two boxes each, on one core."""
        x = self.x[:8]
        maps = attribute_all(self.model, x, ('grad_cam',), poolings=('gap',))['gap', 'grad_cam']
        maps = resize_saliency(maps, x.shape[2:]).cpu()
        noise = torch.rand(maps.shape)
        corners = torch.rand(len(x), 2, 2, 2).sort(2).values * self.case.size
        boxes = corners.flatten(2)

        def simple() -> None:
            for metric in (pointing_game, energy_pointing_game, localization_error):
                metric(maps, boxes)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        seconds = self.measure(
            {
                'simple': simple,
                'maps': lambda: box_accuracy_hits(maps, boxes),
                'noise': lambda: box_accuracy_hits(noise, boxes),
            }
        )
        torch.set_num_threads(threads)
        per_map = {name: statistics.median(times) / len(x) for name, times in seconds.items()}
        return {
            'SP, EP and LE of a map on one core: seconds': per_map['simple'],
            'MaxBoxAccV2 of a map on one core: seconds': per_map['maps'],
            'MaxBoxAccV2 of pixel noise on one core: seconds': per_map['noise'],
        }

    def protocol(self) -> dict[str, float]:
        """Everything that `castream evaluate` does, with all masks."""
        x = self.x[: self.case.images]
        loader = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), len(x))

        def run(*poolings: str) -> None:
            evaluate(self.model, loader, TABLE_METHODS, poolings, amp_dtype=self.amp_dtype, torchcompile=self.compile)

        seconds = self.measure({'one': lambda: run('ca'), 'both': lambda: run(*POOLINGS)})
        per_second = len(x) / statistics.median(seconds['both'])
        return {
            'Whole protocol, GAP and CA / twice one pooling': ratio(seconds, 'both', 'one') / 2,
            'Whole protocol, GAP and CA: images/s': per_second,
            'Whole protocol, GAP and CA: hours for 50,000 images': 50_000 / per_second / 3600,
        }


def imputation(args: argparse.Namespace) -> dict[str, float]:
    """ROAD's images of one map, most and least relevant pixels first, beside the forward of these images."""
    device = torch.device(args.device)
    model = timm.create_model(f'{LITE0}_castream', pretrained=True).to(device).eval()
    x = torch.from_numpy(photographs(None, args.images or 2, 224, args.seed)).to(device)
    rank = saliency_rank(resize_saliency(attribute(model, x, 'grad_cam'), x.shape[2:]))
    counts = [round(share * rank[0].numel()) for share in ROAD_SHARES]
    removed = torch.stack([mask for n in counts for mask in (rank < n, rank >= rank[0].numel() - n)], 1).flatten(0, 1)
    images = x.repeat_interleave(2 * len(counts), 0)
    predictor = Predictor(model)
    size = predictor.batch_size(x)

    def forward(network: Predictor) -> None:
        with network.evaluating():
            for part in images.split(size):
                network.logits(part)

    calls: dict[str, Callable[[], object]] = {
        'ours': lambda: [
            linear_imputation(*part) for part in zip(images.split(size), removed.split(size), strict=True)
        ],
        'torch': lambda: forward(predictor),
    }
    engine = make_engine(predictor, x, '') if device.type == 'cpu' else None
    if engine is not None:
        faster = predictor.accelerated(engine)
        calls['engine'] = lambda: forward(faster)
    seconds = interleave(calls, args.rounds, device, warmup=1)
    result = {
        'ROAD: imputation of an image: ms': 1000 * statistics.median(seconds['ours']) / len(images),
        'ROAD: imputation of an image / its forward in torch': ratio(seconds, 'ours', 'torch'),
    }
    if engine is not None:
        result['ROAD: imputation of an image / its forward in ONNX Runtime'] = ratio(seconds, 'ours', 'engine')
    return result


TARGETS = {
    'Score-CAM, one pooling / bare forwards of all channels': 'at most 0.95',
    'Score-CAM, GAP and CA / one pooling': 'at most 1.10',
    "pytorch-grad-cam's Score-CAM twice / GAP and CA": 'at least 2',
    'Insertion and Deletion / bare forwards': 'at most 1.05',
    'Grad-CAM and Grad-CAM++, GAP / one bare forward': 'at most 1.05',
    'Grad-CAM and Grad-CAM++, GAP and CA / one bare forward': '',
    'All 5 gradient methods, GAP and CA / Grad-CAM, GAP and CA': 'at most 1.10',
    'AD, AG and AI of two methods, GAP and CA / bare forwards': '',
    'AD, AG and AI of two methods, GAP and CA: images/s': '',
    "AD, AG and AI of captum's Integrated Gradients / captum and the forwards": 'at most 1.05',
    'SP, EP and LE of a map on one core: seconds': '',
    'MaxBoxAccV2 of a map on one core: seconds': 'at most 0.1',
    'MaxBoxAccV2 of pixel noise on one core: seconds': 'at most 0.1',
    'ROAD: imputation of an image: ms': '',
    'ROAD: imputation of an image / its forward in torch': 'at most 1',
    'ROAD: imputation of an image / its forward in ONNX Runtime': 'at most 1',
    'Whole protocol, GAP and CA / twice one pooling': 'at most 0.75',
    'Whole protocol, GAP and CA: images/s': '',
    'Whole protocol, GAP and CA: hours for 50,000 images': '',
}


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    columns, notes = {}, []
    for name in tqdm(args.models, disable=None):
        if name == LITE0:
            columns[name] = imputation(args)
            continue
        case = CASES[name]
        case.masks, case.images = args.masks or case.masks, args.images or case.images
        compared = Comparison(name, case, args)
        columns[name] = (
            compared.score_cam()
            | compared.curves()
            | compared.gradients()
            | compared.masked()
            | compared.callables()
            | compared.localization()
        )
        notes += [f'{name}, AD and AI of the same 8 Grad-CAM maps: {line}' for line in compared.peers_metrics()]
        if name in args.protocol:
            columns[name] |= compared.protocol()
        notes.append(
            f'{name}: {case.images} image(s) of {case.size} px, Score-CAM with {min(case.masks, compared.channels)} of '
            f'{compared.channels} masks (the protocol with all), bare batches of {compared.bare_batch}'
        )
    print(
        f'{heading(args.seed, device)}, {args.dtype}{", compiled" if args.compile else ""}, '
        f'medians of {args.rounds} rounds\n'
    )
    print('| time | target | ' + ' | '.join(columns) + ' |\n| --- | --- |' + ' --- |' * len(columns))
    for row, target in TARGETS.items():
        if not any(row in column for column in columns.values()):
            continue
        cells = [f'{column[row]:.3g}' if row in column else '' for column in columns.values()]
        print(f'| {row} | {target} | ' + ' | '.join(cells) + ' |')
    print('\n' + '\n'.join(f'- {note}' for note in notes))
    if ScoreCAM is None:
        print('- pytorch-grad-cam is not installed')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=(*CASES, LITE0), choices=(*CASES, LITE0))
    parser.add_argument(
        '--protocol',
        nargs='*',
        default=('test_resnet', 'resnet18'),
        choices=tuple(CASES),
        help='models that the whole protocol is timed for, with all masks (default: %(default)s)',
    )
    parser.add_argument('--masks', type=int, help='channels of Score-CAM, if not those of a run of minutes on a CPU')
    parser.add_argument('--images', type=int, help='images, likewise')
    parser.add_argument('--rounds', type=int, default=5, help='measured rounds (default: %(default)s)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'))
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--quick', action='store_true', help='only see that it runs: one small model, one round')
    args = parser.parse_args()
    if args.quick:
        args.models, args.images, args.rounds = ('test_resnet',), 1, 1
    return args


if __name__ == '__main__':
    main()

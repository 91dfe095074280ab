"""What an evaluation measures: the arguments of `evaluate.evaluate` that change values, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from .._utils.checks import ChannelNumbers, channel_numbers, check_count, check_names
from ..attach import POOLINGS
from ..attribution.method_hash import method_hash
from ..attribution.methods import Method
from ..inference.predictor import Predictor, Score
from ..metrics.curves import CurveSetting, curve_setting
from ..metrics.measurements import EXPLAIN_AGAIN, READ_SEED
from ..metrics.table import DEFAULT_METRICS, METRICS, MetricRow

TARGETS = ('truth', 'predicted')


@dataclass(frozen=True)
class Plan:
    """Arguments of `evaluate.evaluate` that change values.

    How fast an evaluation runs, and where it writes, is no part of a plan.

    Attributes:
        methods: Rows of the table of methods.
        poolings, metrics, target, setting, curve_value, layer, num_samples, seed, amp_dtype, temperature: As of `evaluate`.

    Raises:
        ValueError: If a name is unknown or a number is out of range.
    """

    methods: tuple[Method, ...]
    poolings: Sequence[str]
    metrics: Sequence[str] = DEFAULT_METRICS
    target: str | Score = 'truth'
    setting: str = 'paper'
    curve_value: ChannelNumbers = 0.5
    layer: str | None = None
    num_samples: int | None = None
    seed: int = 0
    amp_dtype: torch.dtype | None = None
    temperature: str | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f'seed must be an int of at least 0, got {self.seed!r}.')
        if self.num_samples is not None:
            check_count('num_samples', self.num_samples)
        check_names('pooling', self.poolings, POOLINGS)
        check_names('metric', self.metrics, tuple(METRICS))
        if not callable(self.target):
            check_names('target', (self.target,), TARGETS)
        curve_setting(self.setting)
        if not all(0 <= number <= 1 for number in self.value):
            raise ValueError(f'curve_value must be in [0, 1], black to white, got {self.curve_value!r}.')
        _check_temperature(self.temperature, self.poolings)
        again = next((row.name for row in self.metric_rows if row.needs & EXPLAIN_AGAIN), None)
        saved = next((method.name for method in self.methods if 'saved maps' in method.needs), None)
        if again and saved:
            raise ValueError(
                f'metric {again!r} explains other images or weights, for which method {saved!r} has no saved maps: '
                'leave one of them out.'
            )

    @property
    def metric_rows(self) -> tuple[MetricRow, ...]:
        """The rows of the table of metrics."""
        return tuple(METRICS[name] for name in self.metrics)

    @property
    def curve_setting(self) -> CurveSetting:
        """The numbers behind `setting`."""
        return curve_setting(self.setting)

    @property
    def value(self) -> tuple[float, ...]:
        """`curve_value` as numbers: one, or one per channel."""
        return tuple(channel_numbers('curve_value', self.curve_value))

    @property
    def needs(self) -> tuple[str, ...]:
        """The measurements that the metrics need, each once, in the order of the metrics."""
        return tuple(dict.fromkeys(name for row in self.metric_rows for name in sorted(row.needs)))

    @property
    def curves(self) -> tuple[str, ...]:
        """The measurements that are curves."""
        return tuple(row.curve for row in self.metric_rows if row.curve)

    @property
    def metric_of_boxes(self) -> str | None:
        """The first metric that needs boxes, or None."""
        return next((row.name for row in self.metric_rows if 'boxes' in row.needs), None)

    def num_forwards(self, predictor: Predictor, input_size: Sequence[int]) -> float:
        """Forwards of masked and perturbed images that an image needs, in those of 224 x 224 pixels, roughly.

        Args:
            predictor: The network.
            input_size: (channels, H, W).
        """
        height, width = input_size[-2:]
        per_map = sum(height / self.curve_setting.rows if name in self.curves else 1 for name in self.needs)
        count = per_map * len(self.methods) * len(self.poolings) + self.num_score_cam_forwards(predictor)
        return count * height * width / 224**2

    def num_score_cam_forwards(self, predictor: Predictor) -> int:
        """Masks of Score-CAM that an image needs at most: the channels of the last feature map."""
        return _channels(predictor) if any('masked forwards' in method.needs for method in self.methods) else 0

    def num_forwards_of_libraries(self, predictor: Predictor) -> int:
        """Forwards in torch that methods of other libraries need for an image, roughly."""
        each = (m.forwards * (_channels(predictor) if m.forward_a_channel else 1) for m in self.methods)
        return len(self.poolings) * sum(each)

    def settings(self) -> dict[str, Any]:
        """What a folder of an unfinished evaluation must agree on, plain data: exactly what changes values."""
        # Without a subset and without random maps the seed changes the intervals alone.
        reads_seed = (
            self.num_samples is not None
            or any('seed' in method.needs for method in self.methods)
            or bool(READ_SEED & set(self.needs))
        )
        reads_value = {'insertion_value_curve', 'deletion_value_curve'} & set(self.curves)
        temperature = self.temperature
        if isinstance(temperature, Mapping):
            temperature = {name: float(temperature[name]) for name in self.poolings}
        return {
            'methods': [method.name for method in self.methods],
            'user_methods': {method.name: method.source_hash for method in self.methods if method.source_hash},
            'metrics': list(self.metrics),
            'poolings': list(self.poolings),
            'target': method_hash(self.target),
            'setting': self.setting,
            **({'curve_value': list(self.value)} if reads_value else {}),
            'layer': self.layer,
            'num_samples': self.num_samples,
            'seed': self.seed if reads_seed else None,
            'amp_dtype': str(self.amp_dtype).removeprefix('torch.') if self.amp_dtype else None,
            'temperature': temperature,
        }


def _channels(predictor: Predictor) -> int:
    return getattr(predictor.backbone, 'num_features', 0)


def _check_temperature(temperature: Any, poolings: Sequence[str]) -> None:
    """Raises ValueError unless it is None, `'fit'`, or a temperature for each of the poolings."""
    if temperature is None or (isinstance(temperature, str) and temperature == 'fit'):
        return
    if not isinstance(temperature, Mapping):
        raise ValueError(
            f"temperature {temperature!r} is unknown, valid ones: 'fit', or a number for each pooling, as "
            "in {'gap': 1.2, 'ca': 1.5}."
        )
    for name in temperature:
        if name not in POOLINGS:
            raise ValueError(
                f'temperature has a number for pooling {name!r}, which is unknown, valid ones: '
                f'{", ".join(map(repr, POOLINGS))}.'
            )
    for name in poolings:
        number = temperature.get(name)
        if not isinstance(number, Real) or not 0 < float(number) < math.inf:
            raise ValueError(
                f'temperature must give pooling {name!r} a positive number below infinity, got {dict(temperature)}.'
            )

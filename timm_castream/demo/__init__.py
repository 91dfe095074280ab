"""The demos: photographs explained by a trained network, and a small network trained on digits."""

from .digits import QUICK, DemoSettings, create_network, measure_accuracy, run, saliency_in_box, train
from .photographs import explain_photographs

__all__ = [
    'QUICK',
    'DemoSettings',
    'create_network',
    'explain_photographs',
    'measure_accuracy',
    'run',
    'saliency_in_box',
    'train',
]

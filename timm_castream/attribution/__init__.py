"""Saliency maps of a network's class scores, and both sides of the paper's eq. (5)."""

from .methods import METHODS
from .saliency import Identity, attention_identity, attribute, attribute_all

__all__ = ['METHODS', 'Identity', 'attention_identity', 'attribute', 'attribute_all']

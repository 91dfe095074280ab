"""One JSON file for each variant of the paper, the list of the published ones, and the template of the model card."""

from __future__ import annotations

# Variants, as `architecture.tag`, whose weights are on the Hub. timm lists these alone as pretrained.
PUBLISHED: frozenset[str] = frozenset()

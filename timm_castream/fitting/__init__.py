"""Fits a stream beside a frozen network: feature maps kept on disk, training on them, settings chosen, an answer.

`timm_castream.fit` is the front. The parts can be used alone: `CachedFeatures`, `fit_classifier`, `train_streams`.
"""

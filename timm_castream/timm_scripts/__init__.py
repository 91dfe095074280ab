"""Run timm's train.py and validate.py unchanged, with CA-Stream models, own data sets and multi-label data."""

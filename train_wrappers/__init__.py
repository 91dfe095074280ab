"""timm's own train.py and validate.py, run unchanged with `timm_castream` loaded, and recipes for them.

    python -m train_wrappers.train -c imagenet_sgd90.yaml --data-dir DIR
    torchrun --nproc-per-node 8 -m train_wrappers.train -c imagenet_sgd90.yaml --data-dir DIR
    python -m train_wrappers.validate --model resnet50_castream --checkpoint FILE --data-dir DIR

Works with timm 1.0.31 and newer.
"""

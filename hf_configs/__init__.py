"""One JSON per published variant, from which the registry takes its pretrained cfgs, and the model card's template."""

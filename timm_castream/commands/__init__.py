"""The commands of `castream`, one module each: its options in `add_options(parser)`, its work in `run(args)`.

A module also has `EXAMPLE`, a command line. `train` and `validate` are scripts of timm, see `timm_scripts`.
"""

from __future__ import annotations

# Name and one line of each command, in the order of `castream --help`.
COMMANDS = {
    'list': 'show the models with a stream, by name or with their parameters and stages',
    'train': "timm's train.py with the plugin loaded",
    'validate': "timm's validate.py with the plugin loaded",
    'fit': 'fit a stream beside a frozen network from a folder of images, without labels',
    'evaluate': "the paper's interpretability protocol over a data set",
    'report': 'print and draw what the folder of an evaluation holds, without its model',
    'explain': 'write saliency maps over images',
    'list-images': 'show the images of a data set in the order in which they are read',
    'push': 'publish a trained model on the Hugging Face Hub',
    'demo': 'explain photographs with a trained network and measure the maps, in about a minute',
    'app': 'open a page that explains images in the browser',
}

SKIPPED = 1
"""Exit code where a part of the work was skipped."""

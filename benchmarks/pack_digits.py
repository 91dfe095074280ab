"""Writes the digits network of the package, timm_castream/app/digits_model, from the output of `castream demo`.

    castream demo --seed 0 --output demo_output
    python benchmarks/pack_digits.py demo_output

Matrices are rounded to float16, which halves the file. Prints the accuracy on 2,000 validation images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from timm_castream._utils.files import write_whole
from timm_castream.app.page_model import DIGITS, open_for_page
from timm_castream.datasets import DigitScenes
from timm_castream.demo import measure_accuracy
from timm_castream.hub.load import open_model
from timm_castream.hub.stream_file import StreamHeader, write_safetensors


@torch.no_grad()
def main(demo_output: str) -> None:
    """Packs `demo_output/model`."""
    source = Path(demo_output, 'model')
    config = json.loads((source / 'config.json').read_text(encoding='utf-8'))
    names = DigitScenes.classes
    config['pretrained_cfg'] |= {'label_names': names, 'label_descriptions': {name: f'digit {name}' for name in names}}
    model: Any = open_model(f'local-dir:{source}', pretrained=True)
    for value in model.state_dict().values():
        if value.ndim > 1:
            value.copy_(value.half())
    rounded = {name: value.half() if value.ndim > 1 else value for name, value in model.state_dict().items()}
    DIGITS.mkdir(exist_ok=True)
    write_safetensors(DIGITS / 'model.safetensors', rounded, StreamHeader.of(model).to_metadata())
    with write_whole(DIGITS / 'config.json') as file:
        file.write(json.dumps(config, indent=1) + '\n')
    print(measure_accuracy(open_for_page().model, DigitScenes('validation'), 64))


if __name__ == '__main__':
    main(*sys.argv[1:])

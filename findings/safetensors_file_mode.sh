#!/usr/bin/env bash
# safetensors 0.8.0: save_file gives its files the mode 600, whatever the umask, where Python's open gives 644.
# Nobody else on the machine, and no web server, can read such weights.
# Seen: open 0o644, save_file 0o600. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy
umask 022
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import stat

import numpy as np
import safetensors
from safetensors.numpy import save_file

with open('opened.bin', 'wb') as file:
    file.write(b'1')
save_file({'weight': np.ones(3, dtype=np.float32)}, 'saved.safetensors')
modes = {name: stat.S_IMODE(os.stat(name).st_mode) for name in ('opened.bin', 'saved.safetensors')}
print(f'safetensors {safetensors.__version__}:', {name: oct(mode) for name, mode in modes.items()})
assert modes == {'opened.bin': 0o644, 'saved.safetensors': 0o600}, 'the behaviour has changed'
PYTHON

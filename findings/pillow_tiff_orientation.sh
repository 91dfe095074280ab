#!/usr/bin/env bash
# Pillow 12.3.0: a grey TIFF with an EXIF orientation from 5 to 8 has other pixels when it is opened by its path.
#
# Pillow maps an uncompressed grey file into memory where it knows the path, with the width and height of the upright
# image, and turns it afterwards. Rows are cut at the wrong places, and nothing is said. The same file opened as a stream,
# an RGB file and a compressed one are right.
# Seen with Python 3.11 on Linux.
# Ends with 0 while the behaviour is as described, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder" pillow==12.3.0
cd "$folder"
PYTHONPATH=$folder python - <<'PY'
import PIL
from PIL import Image

image = Image.new('L', (30, 20))
image.paste(255, (3, 4, 9, 15))
exif = Image.Exif()
exif[0x0112] = 6  # stored lying on its side
image.save('grey.tiff', exif=exif)
upright = image.transpose(Image.Transpose.ROTATE_270)
by_path = Image.open('grey.tiff')
by_path.load()
with open('grey.tiff', 'rb') as file:
    by_stream = Image.open(file)
    by_stream.load()
print(f'Pillow {PIL.__version__}: white pixels {upright.getbbox()} of {upright.size}')
print(f'by its stream {by_stream.getbbox()} of {by_stream.size}')
print(f'by its path {by_path.getbbox()} of {by_path.size}')
if by_stream.tobytes() != upright.tobytes() or by_path.tobytes() == upright.tobytes():
    raise SystemExit('The behaviour has changed.')
PY

"""Photographs that scikit-image and scikit-learn ship: they need no download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_FILES = {
    'skimage': ('chelsea.png', 'coffee.png', 'motorcycle_left.png', 'rocket.jpg', 'camera.png', 'astronaut.png'),
    'sklearn': ('flower.jpg', 'china.jpg'),
}
_FOLDERS = {'skimage': 'data', 'sklearn': 'datasets/images'}


def photographs() -> list[Path]:
    """The files: a cat, a cup of coffee, a motorcycle, a rocket, a camera, an astronaut, a flower and a palace.

    Raises:
        ModuleNotFoundError: If scikit-image or scikit-learn is not installed.
    """
    paths = []
    for package, names in _FILES.items():
        spec = find_spec(package)  # reads no file of the package, which takes seconds to import
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f'No module named {package!r}', name=package)
        folder = Path(spec.submodule_search_locations[0], _FOLDERS[package])
        paths += [folder / name for name in names]
    return paths

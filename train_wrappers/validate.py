"""timm's validate.py with timm_castream loaded: `python -m train_wrappers.validate`, or `castream validate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from timm_castream.timm_scripts.run import run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Runs timm's validate.py; see `run_script` for the arguments and the exit codes."""
    return run_script('validate.py', argv)


if __name__ == '__main__':
    sys.exit(main())

"""Names that a mistyped one may stand for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """A clause for an error, such as \" (did you mean 'grad_cam'?)\", or '' where no valid name is near."""
    spelt = {text.casefold(): text for text in valid}
    near = difflib.get_close_matches(str(name).casefold(), spelt, 1)
    return f' (did you mean {spelt[near[0]]!r}?)' if near else ''

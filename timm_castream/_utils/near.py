"""Names that a mistyped one may stand for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_BEGINNING = 3  # letters from which a name may be cut short


def nearest(name: object, valid: Iterable[str]) -> str | None:
    """The valid name that a mistyped one or its initials may stand for, as AD for average_drop, or None."""
    spelt = {text.casefold(): text for text in valid}
    given = str(name).casefold()
    initials = {''.join(word[:1] for word in text.split('_')): text for text in reversed(spelt) if '_' in text}
    near = [initials[given]] if given in initials else difflib.get_close_matches(given, spelt, 1)
    if not near and len(given) >= _BEGINNING:
        near = [text for text in spelt if text.startswith(given)]
    return spelt[near[0]] if near else None


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """A clause for an error, such as \" (did you mean 'grad_cam'?)\", or '' where no valid name is near."""
    near = nearest(name, valid)
    return f' (did you mean {near!r}?)' if near else ''

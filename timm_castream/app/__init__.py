"""The page of `castream app`, and what it shows of an image without a server."""

from typing import Any

from .explanation import Explanation, MapScores, explain_image
from .export import draw_explanation, draw_scores, write_explanation
from .page_model import PageModel, open_for_page

__all__ = [
    'Explanation',
    'MapScores',
    'Page',
    'PageModel',
    'create_app',
    'draw_explanation',
    'draw_scores',
    'explain_image',
    'open_for_page',
    'serve',
    'write_explanation',
]


def __getattr__(name: str) -> Any:
    if name in ('Page', 'create_app', 'serve'):  # the functions above need no Gradio
        from . import blocks

        return getattr(blocks, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

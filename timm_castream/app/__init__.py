"""The page of `castream app`, and what it shows of an image without a server."""

from .blocks import create_app, serve
from .explanation import Explanation, MapScores, explain_image
from .export import draw_explanation, draw_scores, write_explanation
from .page_model import PageModel, open_for_page

__all__ = [
    'Explanation',
    'MapScores',
    'PageModel',
    'create_app',
    'draw_explanation',
    'draw_scores',
    'explain_image',
    'open_for_page',
    'serve',
    'write_explanation',
]

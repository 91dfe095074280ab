"""The page of `castream app`, and what it shows of an image without a server."""
from .blocks import create_app, serve
from .explanation import Explanation, Worth, explain_image
from .export import draw_explanation, draw_worth, write_explanation
from .page_model import OpenedModel, open_for_page

__all__ = [
    'Explanation',
    'OpenedModel',
    'Worth',
    'create_app',
    'draw_explanation',
    'draw_worth',
    'explain_image',
    'open_for_page',
    'serve',
    'write_explanation',
]

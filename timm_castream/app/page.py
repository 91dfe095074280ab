"""The HTML of the page of `castream app`. Every text that comes from a model or a user is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib import rc_context
from PIL import Image
from torch import Tensor

from ..attribution.methods import METHODS
from ..metrics.table import METRICS
from ..visualize import POOLING_NAMES, heat_map
from .explanation import NUM_TOP, Explanation, MapScores
from .export import draw_scores
from .page_model import PageModel


def header(opened: PageModel) -> str:
    """The title and the sentences on the network."""
    size = ' x '.join(str(side) for side in opened.model.pretrained_cfg['input_size'][1:])
    poolings = (
        'Its CA-Stream (CA) is compared with its own average pooling (GAP).'
        if opened.network.has_stream
        else 'It has no CA-Stream, so there is one pooling, its own (GAP).'
    )
    return (
        '<header class="cs-header"><h1>Where does the network look?</h1>'
        f'<p><strong>{escape(opened.name)}</strong>, {opened.model.num_classes:,} classes, {escape(size)} pixels. '
        f'{escape(opened.weights)} {poolings}</p></header>'
    )


def status(text: str) -> str:
    """A sentence to the user."""
    return f'<p class="cs-status" role="status">{escape(text)}</p>'


def error(exception: Exception) -> str:
    """What went wrong, in a sentence."""
    text = ' '.join(str(exception).split()) or type(exception).__name__
    return f'<p class="cs-status cs-error" role="alert">{escape(text)}</p>'


def input_note(explanation: Explanation) -> str:
    """A sentence on the image that the pictures show."""
    height, width = explanation.pixels.shape[:2]
    return status(
        f'The pictures show the image as the network gets it: scaled and cropped to {width} x {height} pixels.'
    )


def measuring() -> str:
    """The title of the measurements."""
    return (
        '<div class="cs-block"><h2>What are the maps worth on this image?</h2><p class="cs-hint">The image is masked '
        'by its map, and its most salient pixels are inserted and deleted. See how the probability of the class '
        'changes.</p></div>'
    )


def predictions(explanation: Explanation, target: int) -> str:
    """The top classes under each pooling, with the chosen class marked and added where it is not among them."""
    opened = explanation.opened
    lists = []
    for name in opened.network.poolings:
        top = explanation.top(name)
        if target not in dict(top):
            top.append((target, explanation.probabilities[name][target].item()))
        rows = ''.join(
            f'<li class="{"cs-chosen" if index == target else ""}" style="--cs-share: {probability:.4f}">'
            f'<span>{escape(opened.class_name(index))}</span><span>{100 * probability:.1f} %</span></li>'
            for index, probability in top
        )
        lists.append(f'<section><h3>{POOLING_NAMES[name]}</h3><ol>{rows}</ol></section>')
    title = f'Top {NUM_TOP} classes' if opened.model.num_classes > NUM_TOP else 'Classes'
    return f'<div class="cs-block"><h2>{title}</h2><div class="cs-predictions">{"".join(lists)}</div></div>'


def maps(
    explanation: Explanation, methods: Sequence[str], target: int, saliency: Mapping[tuple[str, str], Tensor]
) -> str:
    """Saliency of a class: one card a method, GAP beside CA."""
    label = explanation.opened.class_name(target)
    cards = []
    for method in methods:
        title = METHODS[method].title
        pictures = ''.join(
            _overlay(
                explanation,
                saliency[name, method],
                POOLING_NAMES[name],
                f'{title} of {label} under {POOLING_NAMES[name]}',
            )
            for name in explanation.opened.network.poolings
        )
        cards.append(_card(title, _pictures(pictures)))
    body = ''.join(cards) or '<p class="cs-hint">Choose a method to see its maps.</p>'
    return _block(explanation, f'Saliency of “{label}”', 'Yellow, opaque pixels matter most for the class.', body)


def attention(explanation: Explanation) -> str:
    """The attention of every stage, in order."""
    if not explanation.attention:
        return ''
    pictures = ''.join(
        _overlay(explanation, values, stage, f'Attention of stage {stage}')
        for stage, values in explanation.attention.items()
    )
    return _block(
        explanation,
        'Attention of every stage',
        'The stream visits the stages in this order. No class is involved.',
        f'<div class="cs-card cs-stages">{_pictures(pictures)}</div>',
    )


def scores(explanation: Explanation, method: str, target: int, measured: dict[str, MapScores]) -> str:
    """The measurements of one method's maps, the masked images, the curves and both sides of eq. (5)."""
    title = f'{METHODS[method].title} of “{explanation.opened.class_name(target)}”'
    masked = ''.join(
        _figure(value.masked_pixels, POOLING_NAMES[name], f'The image masked by the map under {POOLING_NAMES[name]}')
        for name, value in measured.items()
    )
    cards = [
        _card(title, _table(measured)),
        _card('The image masked by its map', _pictures(masked)),
        _card('Insertion and deletion curves', _svg(measured)),
    ]
    if explanation.opened.network.has_stream:
        cards.append(_card('Both sides of eq. (5)', _identity(explanation)))
    return (
        f'<div class="cs-block cs-halves"><div class="cs-cards">{"".join(cards)}</div><p class="cs-hint">'
        'One image says little. The command castream evaluate averages these figures over a data set.</p></div>'
    )


def _table(measured: dict[str, MapScores]) -> str:
    rows = {
        'Probability of the class': [f'{value.prob:.4f}' for value in measured.values()],
        'Probability, image masked': [f'{value.masked_prob:.4f}' for value in measured.values()],
    }
    for metric in next(iter(measured.values())).metrics:
        arrow = '↑' if METRICS[metric].higher_is_better else '↓'
        rows[f'{METRICS[metric].title} {arrow}'] = [f'{value.metrics[metric]:.1f} %' for value in measured.values()]
    head = ''.join(f'<th scope="col">{POOLING_NAMES[name]}</th>' for name in measured)
    body = ''.join(
        f'<tr><th scope="row">{title}</th>{"".join(f"<td>{text}</td>" for text in texts)}</tr>'
        for title, texts in rows.items()
    )
    return f'<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _identity(explanation: Explanation) -> str:
    sides = [side[0].double() for side in explanation.identity()]
    low = min(side.min().item() for side in sides)
    span = max(side.max().item() for side in sides) - low
    size = explanation.pixels.shape[:2]
    pictures = ''.join(
        _figure(heat_map((side - low) / (span or 1), size)[..., :3], title, title)
        for side, title in zip(sides, ('attention logits F q', 'CAM Σ qₖ Fₖ'), strict=True)
    )
    difference = (sides[0] - sides[1]).abs().max().item()
    return (
        f'{_pictures(pictures)}<p class="cs-hint">The attention of the last stage is a class activation map. The sides '
        f'differ by at most {difference:.1e}; their values span {span:.3g}.</p>'
    )


def _svg(measured: dict[str, MapScores]) -> str:
    text = io.StringIO()
    with rc_context({'svg.fonttype': 'none', 'font.family': 'sans-serif', 'svg.hashsalt': 'castream'}):
        draw_scores(measured).savefig(text, format='svg', metadata={'Date': None})
    svg = text.getvalue()
    return svg[svg.index('<svg') :]


def _block(explanation: Explanation, title: str, hint: str, body: str) -> str:
    height, width = explanation.pixels.shape[:2]
    style = f'--cs-image: url({_image_url(explanation.pixels)}); --cs-ratio: {width} / {height}'
    return (
        f'<div class="cs-block" style="{style}"><h2>{escape(title)}</h2><p class="cs-hint">{hint}</p>'
        f'<div class="cs-cards">{body}</div></div>'
    )


def _card(title: str, body: str) -> str:
    return f'<div class="cs-card"><h3>{escape(title)}</h3>{body}</div>'


def _pictures(figures: str) -> str:
    return f'<div class="cs-pictures">{figures}</div>'


def _overlay(explanation: Explanation, saliency: Tensor, caption: str, alternative: str) -> str:
    """The colours of a map over the image. The browser blends them, so the opacity needs no request."""
    colours = _image_url(heat_map(saliency, explanation.pixels.shape[:2]))
    return (
        f'<figure><div class="cs-picture"><img src="{colours}" alt="{escape(alternative)}"></div>'
        f'<figcaption>{escape(caption)}</figcaption></figure>'
    )


def _figure(pixels: np.ndarray, caption: str, alternative: str) -> str:
    return (
        f'<figure><img class="cs-plain" src="{_image_url(pixels)}" alt="{escape(alternative)}">'
        f'<figcaption>{escape(caption)}</figcaption></figure>'
    )


def _image_url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format='WEBP', lossless=True, method=2)
    return f'data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}'

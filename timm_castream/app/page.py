"""The HTML of the page of `castream app`. Every text that comes from a model or a user is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import torch
from matplotlib import rc_context
from PIL import Image
from torch import Tensor

from ..attribution.user_methods import resolve_methods
from ..metrics.table import METRICS
from ..pictures import map_note
from ..visualize import EARLY_STAGES, heat_map
from .explanation import NUM_TOP, Explanation, MapScores
from .export import draw_scores
from .page_model import PageModel, method_title

MODEL_PLACEHOLDER = 'resnet18_castream, hf-hub:ORG/NAME or local-dir:DIR'
_OWN = {
    'GAP': 'its own average pooling (GAP)',
    'max pooling': 'its own max pooling',
    'average and max': 'its own average and max pooling',
    'class token': 'its own class token',
    'token average': 'its own average of all tokens',
}


def header(opened: PageModel) -> str:
    """The title and the sentences on the network."""
    size = ' x '.join(str(side) for side in opened.model.pretrained_cfg['input_size'][1:])
    own = _OWN.get(opened.pooling_names['gap'], 'its own pooling')
    poolings = (
        f'Its CA-Stream (CA) is compared with {own}.'
        if opened.predictor.has_stream
        else f'It has no CA-Stream, so there is one pooling: {own}.'
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
    for name in opened.predictor.poolings:
        top = explanation.top(name)
        if target not in dict(top):
            top.append((target, explanation.probabilities[name][target].item()))
        rows = ''.join(
            f'<li class="{"cs-chosen" if index == target else ""}" style="--cs-share: {probability:.4f}">'
            f'<span>{escape(opened.class_name(index))}</span><span>{100 * probability:.1f} %</span></li>'
            for index, probability in top
        )
        lists.append(f'<section><h3>{opened.pooling_names[name]}</h3><ol>{rows}</ol></section>')
    title = f'Top {NUM_TOP} classes' if opened.model.num_classes > NUM_TOP else 'Classes'
    return f'<div class="cs-block"><h2>{title}</h2><div class="cs-predictions">{"".join(lists)}</div></div>'


def maps(
    explanation: Explanation,
    methods: Sequence[str],
    target: int,
    saliency: Mapping[tuple[str, str], Tensor],
    colours: str,
) -> str:
    """Saliency of a class: one card a method, the network's own pooling beside CA."""
    label, names = explanation.opened.class_name(target), explanation.opened.pooling_names
    cards = []
    for position, method in enumerate(methods):
        title, needs = method_title(method), resolve_methods((method,))[0].needs
        shown = {name: saliency[name, method] for name in names if name == 'ca' or 'stream' not in needs}
        drawn = ''.join(
            _overlay(explanation, values, names[name], f'{title} of {label} under {names[name]}', colours)
            for name, values in shown.items()
        )
        earlier = [
            other
            for other in methods[:position]
            if all(_equal(saliency[name, other], saliency[name, method]) for name in names)
        ]
        note = f'<p class="cs-hint">The same map as {escape(method_title(earlier[0]))}.</p>' if earlier else ''
        cards.append(_card(title, _pictures(drawn, len(shown)) + note))
    body = ''.join(cards) or '<p class="cs-hint">Choose a method to see its maps.</p>'
    hint = 'The pixels under the right end of the scale matter most for the class.'
    if 'attention' in methods:
        hint += ' Attention is the same for every class.'
    return _block(explanation, f'Saliency of “{label}”', f'{hint}{_scale(colours)}', body)


def attention(explanation: Explanation, colours: str) -> str:
    """The attention of the last stage, and that of the early ones folded up."""
    if not explanation.attention:
        return ''
    (last, values), *early = reversed(explanation.attention.items())
    large = _pictures(_overlay(explanation, values, last, f'Attention of stage {last}', colours), 1)
    small = ''.join(
        _overlay(explanation, values, stage, f'Attention of stage {stage}', colours) for stage, values in early
    )
    body = f'<div class="cs-card">{large}</div>'
    if early:
        body += (
            f'<details class="cs-card cs-stages"><summary>Early stages ({len(early)})</summary>'
            f'<p class="cs-hint">{EARLY_STAGES}</p>{_pictures(small, 2)}</details>'
        )
    hint = 'The weights with which the stream averages the feature map of its last stage. No class is involved.'
    return _block(explanation, 'Attention', f'{hint}{_scale(colours)}', body)


def scores(explanation: Explanation, method: str, target: int, measured: dict[str, MapScores]) -> str:
    """The measurements of one method's maps, the masked images, the curves and both sides of eq. (5)."""
    title = f'{method_title(method)} of “{explanation.opened.class_name(target)}”'
    names = explanation.opened.pooling_names
    masked = ''.join(
        _figure(value.masked_pixels, names[name], f'The image masked by the map under {names[name]}')
        for name, value in measured.items()
    )
    cards = [
        _card(title, _table(measured, names)),
        _card('The image masked by its map', _pictures(masked, len(measured))),
        _card('Insertion and deletion curves', _svg(measured, names)),
    ]
    if explanation.opened.predictor.has_stream:
        cards.append(
            '<details class="cs-card"><summary>For authors: both sides of eq. (5)</summary>'
            f'{_identity(explanation)}</details>'
        )
    return (
        f'<div class="cs-block cs-halves"><div class="cs-cards">{"".join(cards)}</div><p class="cs-hint">'
        'One image says little. The command castream evaluate averages these values over a data set.</p></div>'
    )


def _table(measured: dict[str, MapScores], names: Mapping[str, str]) -> str:
    rows = {
        'Probability of the class': [f'{value.prob:.4f}' for value in measured.values()],
        'Probability, image masked': [f'{value.masked_prob:.4f}' for value in measured.values()],
    }
    for metric in next(iter(measured.values())).metrics:
        arrow = '↑' if METRICS[metric].higher_is_better else '↓'
        rows[f'{METRICS[metric].title} {arrow}'] = [f'{value.metrics[metric]:.1f} %' for value in measured.values()]
    head = ''.join(f'<th scope="col">{names[name]}</th>' for name in measured)
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
        f'{_pictures(pictures, 2)}<p class="cs-hint">The attention of the last stage is a class activation map. The sides '
        f'differ by at most {difference:.1e}; their values span {span:.3g}.</p>'
    )


def _svg(measured: dict[str, MapScores], names: Mapping[str, str]) -> str:
    text = io.StringIO()
    with rc_context({'svg.fonttype': 'none', 'font.family': 'sans-serif', 'svg.hashsalt': 'castream'}):
        draw_scores(measured, names).savefig(text, format='svg', metadata={'Date': None})
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


def _pictures(figures: str, columns: int) -> str:
    return f'<div class="cs-pictures{" cs-one" if columns == 1 else ""}">{figures}</div>'


def _overlay(explanation: Explanation, saliency: Tensor, caption: str, alternative: str, colours: str) -> str:
    """The colours of a map over the image. The browser blends them, so the opacity needs no request."""
    heat = _image_url(heat_map(saliency, explanation.pixels.shape[:2], colours))
    note = map_note(saliency)
    note = f': a {note}, which says nothing' if note else ''
    return (
        f'<figure><div class="cs-picture"><img src="{heat}" alt="{escape(alternative)}"></div>'
        f'<figcaption>{escape(caption + note)}</figcaption></figure>'
    )


def _scale(colours: str) -> str:
    """The scale of the colours, from 0 to 1."""
    heat = heat_map(torch.linspace(0, 1, 128)[None], (1, 128), colours)[..., :3]
    bar = (
        f'<span role="img" aria-label="scale of the colours" style="background-image: url({_image_url(heat)})"></span>'
    )
    return f'<span class="cs-scale">0 {bar} 1</span>'


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two maps differ by rounding alone."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=1e-5)


def _figure(pixels: np.ndarray, caption: str, alternative: str) -> str:
    return (
        f'<figure><img class="cs-plain" src="{_image_url(pixels)}" alt="{escape(alternative)}">'
        f'<figcaption>{escape(caption)}</figcaption></figure>'
    )


def _image_url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format='WEBP', lossless=True, method=2)
    return f'data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}'

"""One image explained without a server: the numbers are those of the library's functions, each is computed once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from timm_castream import attention_maps, forward_both, pooling
from timm_castream.app import explanation
from timm_castream.app.explanation import Explanation, explain_image
from timm_castream.app.export import draw_explanation, write_explanation
from timm_castream.app.page_model import PageModel
from timm_castream.attribution import attention_identity, attribute
from timm_castream.attribution.methods import METHODS as METHODS_TABLE
from timm_castream.inference.predictor import Predictor
from timm_castream.metrics import deletion_curve, insertion_curve

METHODS = ('grad_cam', 'score_cam')


@pytest.fixture
def opened(make_model: Callable[..., nn.Module]) -> PageModel:
    model = make_model('test_resnet')
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 64, 64), 'label_names': tuple('abcdefghij')}
    return PageModel(Predictor(model), 'test_resnet_castream', 'Its weights are drawn for a test.')


@pytest.fixture
def explained(opened: PageModel) -> Explanation:
    return explain_image(opened, photograph(90, 120))


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).resize((width, height))


def test_the_top_classes_are_those_of_both_poolings(explained: Explanation) -> None:
    with torch.no_grad():
        logits = forward_both(explained.opened.model, explained.x)
    for name in ('gap', 'ca'):
        values, indices = logits[name].softmax(1)[0].sort(descending=True)
        top = explained.top(name)
        assert [index for index, _ in top] == indices[:5].tolist()
        assert [value for _, value in top] == pytest.approx(values[:5].tolist(), rel=1e-6)
    assert explained.predicted == logits['ca'].argmax().item()
    assert explained.best()[0] == max(explained.top('gap')[0], explained.top('ca')[0], key=lambda row: row[1])[0]


def test_the_image_goes_through_the_transform_of_the_model(opened: PageModel) -> None:
    image = photograph(90, 120)
    config = timm.data.resolve_model_data_config(opened.model)
    expected = timm.data.create_transform(**config, is_training=False)(image)
    assert torch.equal(explain_image(opened, image).x[0], expected)


def test_the_attention_is_that_of_every_stage(explained: Explanation) -> None:
    maps = attention_maps(explained.opened.model, explained.x)
    assert list(explained.attention) == ['maxpool', 'layer1', 'layer2', 'layer3', 'layer4']
    for shown, weights in zip(explained.attention.values(), maps, strict=True):
        mean = weights[0].mean(0)
        torch.testing.assert_close(shown, (mean - mean.min()) / (mean.max() - mean.min()))


def test_maps_are_those_of_attribute_for_the_class_asked_for(explained: Explanation) -> None:
    maps = explained.maps(METHODS, 3)
    assert list(maps) == [(name, method) for method in METHODS for name in ('gap', 'ca')]
    for (name, method), saliency in maps.items():
        expected = attribute(explained.opened.model, explained.x, method, torch.tensor([3]), name)
        torch.testing.assert_close(saliency, expected[0])


def test_a_map_is_computed_once_and_another_class_computes_its_own_alone(
    explained: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[str, ...], int]] = []
    original = explanation.saliency_maps

    def counted(predictor: Predictor, x: Tensor, methods: Any, target: Tensor) -> Any:
        calls.append((tuple(method.name for method in methods), target.item()))
        return original(predictor, x, methods, target)

    monkeypatch.setattr(explanation, 'saliency_maps', counted)
    for methods, target in ((('grad_cam',), 1), (METHODS, 1), (METHODS, 1), (('grad_cam',), 2), (METHODS, 1)):
        explained.maps(methods, target)
        draw_explanation(explained, methods, target, opacity=0.2)
        draw_explanation(explained, methods, target, opacity=0.9)
    assert calls == [(('grad_cam',), 1), (('score_cam',), 1), (('grad_cam',), 2)]


def test_what_a_map_is_worth_is_what_the_definitions_give(explained: Explanation) -> None:
    model, x, target = explained.opened.model, explained.x, 4
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std'))
    for name, worth in explained.scores('grad_cam', target).items():
        saliency = attribute(model, x, 'grad_cam', torch.tensor([target]), name)
        mask = F.interpolate(saliency[:, None], (64, 64), mode='bilinear')
        masked = ((x * std + mean) * mask - mean) / std
        with pooling(model, name), torch.no_grad():
            p, o = (model(images).softmax(1)[0, target].item() for images in (x, masked))
            curves = {
                'insertion': insertion_curve(model, x, saliency, torch.tensor([target]))[0],
                'deletion': deletion_curve(model, x, saliency, torch.tensor([target]))[0],
            }
        assert worth.prob == pytest.approx(p, rel=1e-5)
        assert worth.masked_prob == pytest.approx(o, rel=1e-4)
        assert worth.metrics['average_drop'] == pytest.approx(100 * max(0, p - o) / p, rel=1e-3, abs=1e-3)
        assert worth.metrics['average_increase'] == 100 * (o > p)
        assert worth.metrics['average_gain'] == pytest.approx(100 * max(0, o - p) / (1 - p), rel=1e-3, abs=1e-3)
        for kind, curve in curves.items():
            values = curve.double().numpy()
            torch.testing.assert_close(getattr(worth, f'{kind}_curve'), curve)
            area = 100 * np.mean((values[1:] + values[:-1]) / 2)
            assert worth.metrics[kind] == pytest.approx(area, rel=1e-5)
        pixels = (255 * (masked * std + mean)).round().clamp(0, 255)[0].movedim(0, -1)
        assert np.abs(worth.masked_pixels - pixels.numpy()).max() <= 1
        assert worth.insertion_curve[-1].item() == pytest.approx(p, rel=1e-4)
        assert worth.deletion_curve[0].item() == pytest.approx(p, rel=1e-4)


def test_a_measurement_is_computed_once_for_each_method_and_class(
    explained: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = explained.scores('grad_cam', 1)
    monkeypatch.setattr(explanation, 'measure', None)
    assert explained.scores('grad_cam', 1) is first
    with pytest.raises(TypeError):
        explained.scores('grad_cam', 2)


class Tracker(list):
    """A progress tracker that is empty, so false, before its first call: as Gradio's is."""

    def __call__(self, share: float, text: str) -> None:
        self.append((share, text))


def test_progress_names_the_work_that_is_done_and_no_other(explained: Explanation) -> None:
    tracker = Tracker()
    explained.maps(('grad_cam', 'layer_cam'), 1, tracker)
    assert tracker == [(0, 'Grad-CAM'), (0.5, METHODS_TABLE['layer_cam'].title)]
    explained.maps(('grad_cam', 'layer_cam'), 1, tracker)
    assert len(tracker) == 2
    explained.scores('grad_cam', 1, tracker)
    assert tracker[2:] == [(0, 'Grad-CAM under GAP'), (0.5, 'Grad-CAM under CA')]


def test_both_sides_of_the_identity_are_those_of_the_library(explained: Explanation) -> None:
    for shown, expected in zip(
        explained.identity(), attention_identity(explained.opened.model, explained.x), strict=True
    ):
        torch.testing.assert_close(shown, expected)
        assert not shown.requires_grad


def test_explanations_of_two_images_share_a_model_and_nothing_else(opened: PageModel) -> None:
    one, two = (explain_image(opened, photograph(64, 64, seed)) for seed in (1, 2))
    alone = {key: value.clone() for key, value in one.maps(METHODS, 1).items()}
    two.maps(METHODS, 2)
    two.scores('grad_cam', 2)
    again = explain_image(opened, photograph(64, 64, 1))
    for maps in (one.maps(METHODS, 1), again.maps(METHODS, 1)):
        for key, saliency in maps.items():
            torch.testing.assert_close(saliency, alone[key])


def test_a_model_without_a_stream_has_its_own_pooling_and_no_attention() -> None:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4).eval()
    opened = PageModel(Predictor(model), 'test_resnet', '')
    explained = explain_image(opened, photograph(64, 64))
    assert opened.predictor.poolings == ('gap',) and 'attention' not in opened.methods
    assert not explained.attention
    assert len(explained.top('gap')) == 4
    assert list(explained.maps(('grad_cam',), 0)) == [('gap', 'grad_cam')]
    assert list(explained.scores('grad_cam', 0)) == ['gap']
    with pytest.raises(ValueError, match='CA-Stream'):
        explained.identity()


def test_a_multilabel_model_has_sigmoid_probabilities(opened: PageModel) -> None:
    network = Predictor(opened.model, activation='sigmoid')
    explained = explain_image(PageModel(network, opened.name, ''), photograph(64, 64))
    with torch.no_grad():
        expected = forward_both(opened.model, explained.x)['ca'].double().sigmoid()[0]
    torch.testing.assert_close(explained.probabilities['ca'], expected)


def test_a_network_of_grey_images_gets_a_grey_image(make_model: Callable[..., nn.Module]) -> None:
    model = make_model('test_resnet', {'in_chans': 1})
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (1, 64, 64), 'mean': (0.5,), 'std': (0.5,)}
    explained = explain_image(PageModel(Predictor(model), 'test_resnet_castream', ''), photograph(64, 64))
    assert explained.x.shape == (1, 1, 64, 64)
    assert explained.pixels.shape == (64, 64, 3)


def test_a_photograph_stands_upright(opened: PageModel, tmp_path: Path) -> None:
    image = photograph(64, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / 'turned.png', exif=exif)
    upright = Image.fromarray(np.rot90(np.asarray(image), -1))
    assert torch.equal(explain_image(opened, tmp_path / 'turned.png').x, explain_image(opened, upright).x)


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        (b'', 'The file is not an image that can be read.'),
        (b'no image', 'The file is not an image that can be read.'),
        (bytes(4) + b'ftypheic' + bytes(8), 'The file is HEIC, which Pillow reads after pip install pillow-heif.'),
        ('truncated', 'The image file is damaged and cannot be read.'),
        (
            'huge',
            f'The image has 9000 x 8000 pixels; at most {explanation.MAX_PIXELS // 10**6} million pixels are read.',
        ),
    ],
)
def test_a_file_that_cannot_be_read_gives_a_sentence_without_a_path(
    opened: PageModel, tmp_path: Path, content: bytes | str, sentence: str
) -> None:
    path = tmp_path / 'upload.png'
    if content == 'huge':
        Image.new('1', (9000, 8000)).save(path)
    elif content == 'truncated':
        photograph(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(content)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as caught:
        explain_image(opened, path)
    assert str(caught.value) == sentence


def test_a_missing_file_is_named(opened: PageModel) -> None:
    with pytest.raises(FileNotFoundError, match=r'There is no file nope\.jpg'):
        explain_image(opened, 'nope.jpg')


def test_a_string_is_no_list_of_methods(explained: Explanation, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="methods must be a sequence of names, got 'grad_cam'"):
        write_explanation(explained, tmp_path, 'grad_cam', 0)


def test_an_unknown_class_or_method_is_named(explained: Explanation) -> None:
    with pytest.raises(ValueError, match='10'):
        explained.maps(('grad_cam',), 10)
    with pytest.raises(ValueError, match='no_cam'):
        explained.maps(('no_cam',), 1)


def test_the_files_hold_the_figures_that_were_computed(explained: Explanation, tmp_path: Path) -> None:
    files = write_explanation(explained, tmp_path, METHODS, 2, opacity=0.3, measured='grad_cam')
    assert [path.name for path in files] == ['explanation.png', 'curves.png', 'explanation.json']
    figures = json.loads(files[-1].read_text(encoding='utf-8'))
    assert figures['class'] == {'index': 2, 'name': 'c'}
    assert figures['opacity'] == 0.3
    assert [row['probability'] for row in figures['top']['gap']] == [value for _, value in explained.top('gap')]
    for method in METHODS:
        for name in ('gap', 'ca'):
            assert figures['maps'][method][name] == explained.maps((method,), 2)[name, method].tolist()
    worth = explained.scores('grad_cam', 2)
    assert {name: value['average_drop'] for name, value in figures['worth']['grad_cam'].items()} == {
        name: value.metrics['average_drop'] for name, value in worth.items()
    }
    assert figures['worth']['grad_cam']['ca']['insertion_curve'] == worth['ca'].insertion_curve.tolist()
    logits, cam = (side[0].tolist() for side in explained.identity())
    assert figures['identity']['attention_logits'] == logits and figures['identity']['cam'] == cam
    assert all(np.asarray(Image.open(path)).std() > 0 for path in files[:2])


def test_the_picture_changes_with_the_opacity(explained: Explanation, tmp_path: Path) -> None:
    pictures = []
    for opacity in (0.0, 0.5):
        folder = tmp_path / str(opacity)
        folder.mkdir()
        pictures.append(np.asarray(Image.open(write_explanation(explained, folder, METHODS, 2, opacity)[0])))
    assert not np.array_equal(*pictures)
    assert sorted(path.name for path in folder.iterdir()) == ['explanation.json', 'explanation.png']


def test_masked_images_run_in_the_engine_once_it_is_made_and_the_maps_stay(opened: PageModel) -> None:
    image = photograph(64, 64)
    expected = explain_image(opened, image)
    maps, scores = expected.maps(('score_cam',), 3), expected.scores('grad_cam', 3)
    assert opened.predictor._engine is None
    fast = PageModel(Predictor(opened.model), opened.name, opened.weights, engine='onnxruntime')
    explained = explain_image(fast, image)
    explained.maps(('grad_cam',), 3)
    assert fast._export is None  # it masks nothing
    explained.maps(('score_cam',), 3)
    export = fast.accelerate(explained.x)
    assert export is fast.accelerate(explained.x)
    export.join(300)
    assert fast.predictor.batches(explained.x) == fast.predictor._engine.batches
    again = explain_image(fast, image)
    for key, saliency in again.maps(('score_cam',), 3).items():
        torch.testing.assert_close(saliency, maps[key], rtol=0, atol=1e-3)
    for name, score in again.scores('grad_cam', 3).items():
        assert score.metrics == pytest.approx(scores[name].metrics, abs=0.01)


def test_a_page_stays_in_torch_where_it_is_told_to(opened: PageModel) -> None:
    assert opened.engine == 'torch' and opened.accelerate(torch.zeros(1, 3, 64, 64)) is None

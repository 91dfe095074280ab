"""The running page, through its client: answers, sessions, errors and files."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import signal
import socket
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import timm
import torch
from conftest import free_port, make_backbone, sharpen
from PIL import Image

import timm_castream
from timm_castream import cli
from timm_castream.app import PageModel, create_app, explain_image, page, serve
from timm_castream.app.export import draw_explanation
from timm_castream.inference.predictor import Predictor
from timm_castream.visualize import EARLY_STAGES, heat_map

pytest.importorskip('gradio', reason='the page needs the extra app')
gradio_client = pytest.importorskip('gradio_client')
delete_files_created_by_app = pytest.importorskip('gradio.route_utils').delete_files_created_by_app

METHODS = ['grad_cam']
COLOURS = 'viridis'


@pytest.fixture(scope='module')
def opened() -> PageModel:
    model: Any = sharpen(timm_castream.attach(make_backbone('test_resnet')))
    names = (*'abcdefghi', '<b>j</b>')
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 64, 64), 'label_names': names}
    return PageModel(Predictor(model), 'test_resnet_castream', 'Its weights are <i>drawn</i> for a test.')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('images')


@pytest.fixture(scope='module')
def url(opened: PageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('GRADIO_TEMP_DIR', str(tmp_path_factory.mktemp('gradio')))
        patch.setenv('GRADIO_ANALYTICS_ENABLED', 'False')
        app = create_app(opened, choose_model=True)
        _, address, _ = serve(app, port=free_port(), prevent_thread_lock=True)
        yield address
        app.close()


def photograph(folder: Path, seed: int = 0) -> str:
    path = folder / f'{seed}.png'
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (80, 64, 3), dtype=np.uint8)).save(path)
    return str(path)


class User:
    """A session of the page. Results are named by the labels of their components."""

    def __init__(self, url: str, folder: Path) -> None:
        self.client = gradio_client.Client(url, verbose=False, analytics_enabled=False, download_files=str(folder))
        endpoints = self.client.view_api(return_format='dict')['named_endpoints']
        self.labels = {name: [value['label'] for value in row['returns']] for name, row in endpoints.items()}

    def call(self, name: str, *values: Any) -> dict[str, Any]:
        result = self.client.predict(*values, api_name=f'/{name}')
        return dict(zip(self.labels[f'/{name}'], result, strict=True))

    def explain(self, path: str | Path, methods: list[str] = METHODS) -> dict[str, Any]:
        return self.call('explain', gradio_client.handle_file(path), methods, COLOURS)

    def figures(self, target: int, methods: list[str] = METHODS) -> dict[str, Any]:
        files = self.call('save', target, methods, COLOURS, 0.5, 'grad_cam')['Files']['value']
        path = next(path for path in files if path.endswith('explanation.json'))
        return json.loads(Path(path).read_text(encoding='utf-8'))


def sentence(message: str) -> str:
    return html.unescape(re.sub('<[^>]*>', '', message))


def is_error(result: dict[str, Any]) -> bool:
    return 'role="alert"' in result['Message']


def heat_maps(text: str) -> list[str]:
    return re.findall(r'<img src="(data:image/webp;base64,[^"]+)"', text)


@pytest.fixture
def user(url: str, folder: Path) -> User:
    return User(url, folder)


def test_an_image_gives_classes_maps_and_attention(user: User, opened: PageModel, folder: Path) -> None:
    path = photograph(folder)
    result = user.explain(path, ['grad_cam', 'score_cam'])
    expected = explain_image(opened, path)
    assert not is_error(result)
    for name in ('gap', 'ca'):
        for index, probability in expected.top(name):
            text = f'<span>{html.escape(opened.class_name(index))}</span><span>{100 * probability:.1f} %</span>'
            assert text in result['Classes']
    assert len(heat_maps(result['Maps'])) == 4  # two methods, two poolings
    assert len(heat_maps(result['Attention'])) == 5
    assert result['Class to explain']['value'] == expected.predicted
    choices = [index for _, index in result['Class to explain']['choices']]
    assert choices[0] == expected.best()[0] and sorted(choices) == list(range(10))


def test_the_maps_are_the_colours_of_the_saliency(user: User, opened: PageModel, folder: Path) -> None:
    path = photograph(folder)
    expected = explain_image(opened, path)
    maps = heat_maps(user.explain(path)['Maps'])
    for url, saliency in zip(maps, expected.maps(METHODS, expected.predicted).values(), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(',')[2]))))
        expected_pixels = heat_map(saliency, (64, 64))
        assert np.array_equal(pixels[..., 3], expected_pixels[..., 3])
        visible = pixels[..., 3] > 0  # WebP keeps no colour where nothing shows
        assert visible.any() and np.array_equal(pixels[visible], expected_pixels[visible])


def test_another_class_changes_the_maps_and_not_the_attention(user: User, folder: Path) -> None:
    first = user.explain(photograph(folder))
    predicted = first['Class to explain']['value']
    second = user.call('choose', (predicted + 1) % 10, METHODS, COLOURS)
    assert heat_maps(first['Maps']) != heat_maps(second['Maps'])
    assert 'Attention' not in second
    assert heat_maps(user.call('choose', predicted, METHODS, COLOURS)['Maps']) == heat_maps(first['Maps'])


def test_a_method_of_another_library_is_added_to_the_choices_of_the_session(
    user: User, opened: PageModel, folder: Path
) -> None:
    pytest.importorskip('captum')
    path = photograph(folder)
    target = user.explain(path)['Class to explain']['value']
    result = user.call('add', target, 'captum:Saliency', METHODS, COLOURS)
    assert result['Methods']['value'] == [*METHODS, 'captum:Saliency']
    assert ['captum:Saliency', 'captum:Saliency'] in [list(choice) for choice in result['Method']['choices']]
    x = explain_image(opened, path).x.requires_grad_()
    with opened.predictor.pooled_by('gap'):
        (gradient,) = torch.autograd.grad(opened.model(x)[0, target], x)
    expected = gradient[0].abs().sum(0)
    expected -= expected.amin()
    values = user.figures(target, [*METHODS, 'captum:Saliency'])['maps']['captum:Saliency']['gap']
    torch.testing.assert_close(torch.tensor(values), expected / expected.amax(), rtol=1e-4, atol=1e-5)


def test_a_method_that_fails_on_the_network_is_not_added(user: User, opened: PageModel, folder: Path) -> None:
    pytest.importorskip('captum')
    target = user.explain(photograph(folder))['Class to explain']['value']
    failed = user.call('add', target, 'captum:LRP', METHODS, COLOURS)  # the network has modules without a rule
    assert is_error(failed) and 'captum:LRP' in sentence(failed['Message'])
    assert not is_error(user.call('choose', target, METHODS, COLOURS))
    with pytest.raises(gradio_client.exceptions.AppError):
        user.call('choose', target, ['captum:LRP'], COLOURS)


def test_the_numbers_on_the_page_are_those_of_the_functions(user: User, opened: PageModel, folder: Path) -> None:
    path = photograph(folder)
    user.explain(path)
    text = user.call('measure', 3, 'grad_cam')['MapScores']
    expected = explain_image(opened, path).scores('grad_cam', 3)
    for attribute in ('prob', 'masked_prob'):
        assert ''.join(f'<td>{getattr(expected[name], attribute):.4f}</td>' for name in ('gap', 'ca')) in text
    for metric in ('average_drop', 'average_gain', 'average_increase', 'insertion', 'deletion'):
        assert ''.join(f'<td>{expected[name].metrics[metric]:.1f} %</td>' for name in ('gap', 'ca')) in text
    assert '<svg' in text and 'eq. (5)' in text


def test_the_saved_figures_are_those_of_the_functions(user: User, opened: PageModel, folder: Path) -> None:
    path = photograph(folder)
    user.explain(path)
    figures = user.figures(3)
    expected = explain_image(opened, path)
    assert figures['class']['index'] == 3
    assert figures['maps']['grad_cam']['ca'] == expected.maps(METHODS, 3)['ca', 'grad_cam'].tolist()
    assert figures['worth']['grad_cam']['gap'] == expected.scores('grad_cam', 3)['gap'].to_dict()


def test_sessions_do_not_mix(url: str, folder: Path) -> None:
    first, second = User(url, folder), User(url, folder)
    first.explain(photograph(folder, 1))
    second.explain(photograph(folder, 2))
    expected = {seed: explain_image_figures(url, folder, seed, seed) for seed in (1, 2)}
    first.call('choose', 1, METHODS, COLOURS)
    second.call('choose', 2, METHODS, COLOURS)
    assert first.figures(1) == expected[1]
    assert second.figures(2) == expected[2]


def explain_image_figures(url: str, folder: Path, seed: int, target: int) -> dict[str, Any]:
    user = User(url, folder)
    user.explain(photograph(folder, seed))
    return user.figures(target)


def test_requests_side_by_side_get_the_answers_of_requests_one_by_one(url: str, folder: Path) -> None:
    alone = [explain_image_figures(url, folder, seed, seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda seed: explain_image_figures(url, folder, seed, seed), range(3)))
    assert together == alone


def test_a_model_is_opened_for_one_session_alone(url: str, folder: Path) -> None:
    first, second = User(url, folder), User(url, folder)
    path = photograph(folder)
    opened = first.call('open', 'test_convnext', '', '', False, gradio_client.handle_file(path), METHODS, COLOURS)
    assert not is_error(opened) and 'test_convnext' in opened['Heading'] and 'random' in opened['Heading']
    assert 'one pooling' in opened['Heading'] and opened['Attention'] == ''
    assert len(heat_maps(opened['Maps'])) == 1
    second.explain(path)
    assert first.figures(3)['model'] == 'test_convnext'
    assert second.figures(3)['model'] == 'test_resnet_castream'


@pytest.mark.parametrize(
    ('name', 'checkpoint', 'words'),
    [
        ('test_resnet_castream', 'missing.pth.tar', 'There is no file missing.pth.tar'),
        ('test_resnet_castream', '/nope.safetensors', 'There is no file /nope.safetensors'),
        ('test_resnet_castream', 'folder/last.pth', 'There is no file folder/last.pth'),
        ('no_network', '', 'no_network'),
        ('reznet50', '', 'resnet50'),
        ('timm/resnet18.a1_in1k', '', 'hf-hub:timm/resnet18.a1_in1k'),
        ('', 'missing.pth.tar', 'need the name of the model'),
    ],
)
def test_a_model_that_cannot_be_opened_gives_a_sentence_and_the_page_goes_on(
    user: User, folder: Path, name: str, checkpoint: str, words: str
) -> None:
    path = photograph(folder)
    before = user.explain(path)
    failed = user.call('open', name, checkpoint, '', False, gradio_client.handle_file(path), METHODS, COLOURS)
    assert is_error(failed) and words in sentence(failed['Message'])
    assert user.figures(before['Class to explain']['value'])['model'] == 'test_resnet_castream'


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'no image', 'The file is not an image that can be read.'),
        (b'', 'The file is not an image that can be read.'),
        ('huge', 'The image has 9000 x 8000 pixels'),
    ],
)
def test_an_upload_that_cannot_be_read_gives_a_sentence_and_the_page_goes_on(
    user: User, folder: Path, content: bytes | str, words: str
) -> None:
    path = folder / 'upload.png'
    if content == 'huge':
        Image.new('1', (9000, 8000)).save(path)
    else:
        path.write_bytes(content)  # type: ignore[arg-type]
    user.explain(photograph(folder))
    failed = user.explain(path)
    assert is_error(failed) and words in sentence(failed['Message'])
    assert str(folder) not in failed['Message'] and 'gradio' not in failed['Message']
    assert failed['Maps'] == failed['Classes'] == failed['Attention'] == ''
    assert failed['Class to explain']['choices'] == []  # the earlier image is gone
    assert sentence(user.call('choose', None, METHODS, COLOURS)['Message']) == 'Upload, paste or choose an image.'
    assert not is_error(user.explain(photograph(folder)))


def test_an_upload_that_was_deleted_is_asked_for_again(opened: PageModel, folder: Path) -> None:
    app = create_app(opened)
    explain = next(function.fn for function in app.fns.values() if function.api_name == 'explain')
    answer = explain(str(folder / 'gone.png'), METHODS, COLOURS, None)
    assert any('The image was deleted in the meantime: upload it again.' in str(value) for value in answer.values())
    assert not any(str(folder) in str(value) for value in answer.values())


def test_an_unknown_class_is_refused_and_the_page_goes_on(user: User, folder: Path) -> None:
    user.explain(photograph(folder))
    with pytest.raises(gradio_client.exceptions.AppError, match='99 is not in the list of choices'):
        user.call('choose', 99, METHODS, COLOURS)
    assert not is_error(user.call('choose', 1, METHODS, COLOURS))


def test_text_of_a_model_is_escaped(user: User, folder: Path) -> None:
    user.explain(photograph(folder))
    chosen = user.call('choose', 9, METHODS, COLOURS)
    assert '<b>j' not in chosen['Maps'] + chosen['Classes'] and '&lt;b&gt;j' in chosen['Maps']


def test_nothing_is_asked_for_outside_and_nothing_is_counted(url: str) -> None:
    config = httpx.get(f'{url}config', trust_env=False).json()
    assert config['analytics_enabled'] is False
    assert config['theme_hash'] and not config.get('stylesheets')
    page = httpx.get(url, trust_env=False).text
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page)
    assert [address for address in loaded if not address.startswith(url)] == []


def test_the_page_listens_on_this_machine_alone(url: str) -> None:
    assert url.startswith('http://127.0.0.1:')


def test_a_page_for_others_opens_no_models(opened: PageModel) -> None:
    names = {function.api_name for function in create_app(opened).fns.values()}
    assert 'open' not in names and {'explain', 'choose', 'measure', 'save'} <= names


def test_every_request_waits_for_the_one_before_it(opened: PageModel) -> None:
    functions = [function for function in create_app(opened, choose_model=True).fns.values() if function.fn]
    assert {(function.concurrency_id, function.concurrency_limit) for function in functions} == {('castream', 1)}
    assert all(function.queue is not False for function in functions)


def test_uploads_and_files_are_deleted(
    opened: PageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'gradio'))
    app = create_app(opened)
    _, address, _ = serve(app, port=free_port(), prevent_thread_lock=True)
    user = User(address, folder)
    user.explain(photograph(folder))
    user.figures(1)
    kept = [path.name for path in (tmp_path / 'gradio').rglob('*') if path.is_file()]
    assert {'0.png', 'explanation.png', 'explanation.json'} <= set(kept)
    assert app.delete_cache == (60, 600)
    delete_files_created_by_app(app, None)
    app.close()
    assert [path for path in (tmp_path / 'gradio').rglob('*') if path.is_file()] == []


def test_a_model_without_a_stream_has_a_page(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4).eval()
    app = create_app(PageModel(Predictor(model), 'test_resnet', ''), [photograph(folder)])
    _, address, _ = serve(app, port=free_port(), prevent_thread_lock=True)
    user = User(address, folder)
    result = user.explain(photograph(folder))
    text = user.call('measure', 1, 'grad_cam')['MapScores']
    app.close()
    assert len(heat_maps(result['Maps'])) == 1 and result['Attention'] == ''
    assert 'cs-pictures cs-one' in result['Maps']  # the picture has the card's whole width
    assert '<svg' in text and 'eq. (5)' not in text


def test_maps_that_are_equal_are_called_so(folder: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4).eval()
    explained = explain_image(PageModel(Predictor(model), 'test_resnet', ''), photograph(folder))
    methods = ['grad_cam', 'grad_cam_pp', 'hires_cam']
    text = page.maps(explained, methods, 1, explained.maps(methods, 1), COLOURS)
    cards = text.split('cs-card"')[1:]
    # Without a stream the gradients of a linear classifier are the same at every location.
    assert ['The same map as Grad-CAM.' in card for card in cards] == [False, False, True]


def test_attention_is_one_of_the_methods_and_shown_once(user: User, opened: PageModel, folder: Path) -> None:
    result = user.explain(photograph(folder), ['attention', 'grad_cam'])
    assert len(heat_maps(result['Maps'])) == 3 and 'the same for every class' in result['Maps']


def test_a_map_that_says_nothing_is_called_constant(opened: PageModel, folder: Path) -> None:
    explained = explain_image(opened, photograph(folder))
    flat = {(name, 'grad_cam'): torch.zeros(4, 4) for name in ('gap', 'ca')}
    assert page.maps(explained, METHODS, 1, flat, COLOURS).count('a constant map') == 2


def test_a_map_with_nan_is_named_in_the_page_and_in_its_picture(opened: PageModel, folder: Path) -> None:
    explained = explain_image(opened, photograph(folder))
    broken = {(name, 'grad_cam'): torch.full((4, 4), torch.nan) for name in ('gap', 'ca')}
    assert page.maps(explained, METHODS, 1, broken, COLOURS).count('a map with NaN, which says nothing') == 2
    explained._maps.update({(*key, 1): values for key, values in broken.items()})
    plain = draw_explanation(explained, METHODS, 1)
    explained._maps.update({(*key, 1): torch.zeros(4, 4) for key in broken})
    constant = draw_explanation(explained, METHODS, 1)
    # The same overlays, nothing over the image, under other titles: these are a small part of the rows of pixels.
    differs = (np.asarray(plain) != np.asarray(constant)).any((1, 2))
    assert 0 < differs.mean() < 0.2


def test_a_map_with_nan_is_not_measured(opened: PageModel, folder: Path) -> None:
    explained = explain_image(opened, photograph(folder))
    explained._maps.update({(name, 'grad_cam', 1): torch.full((4, 4), torch.nan) for name in ('gap', 'ca')})
    with pytest.raises(ValueError, match='The map of Grad-CAM under GAP has NaN, so nothing can be measured with it'):
        explained.scores('grad_cam', 1)


def test_other_colours_change_the_maps_and_the_attention(user: User, folder: Path) -> None:
    first = user.explain(photograph(folder))
    predicted = first['Class to explain']['value']
    second = user.call('recolour', predicted, METHODS, 'jet')
    for label in ('Maps', 'Attention'):
        assert heat_maps(first[label]) and not set(heat_maps(first[label])) & set(heat_maps(second[label]))


def test_the_last_stage_comes_first_and_the_early_ones_are_explained(user: User, folder: Path) -> None:
    text = user.explain(photograph(folder))['Attention']
    names = [name for name in re.findall('<figcaption>(.*?)</figcaption>', text)]
    assert names == ['layer4', 'layer3', 'layer2', 'layer1', 'maxpool']
    assert text.index('layer4') < text.index('<details') < text.index('layer3') and EARLY_STAGES in text


def test_the_saved_maps_lie_over_the_whole_photograph(user: User, opened: PageModel, folder: Path) -> None:
    path = photograph(folder)
    user.explain(path)
    (archive,) = user.call('save_maps', 3, METHODS, COLOURS, 0.5)['Files']['value']
    with zipfile.ZipFile(archive) as files:
        saved = np.load(io.BytesIO(files.read('grad_cam_ca.npy')))
        drawn = Image.open(io.BytesIO(files.read('grad_cam_ca.jpg')))
        facts = json.loads(files.read('explanation.json'))
    assert np.array_equal(saved, explain_image(opened, path).maps(METHODS, 3)['ca', 'grad_cam'].numpy())
    assert drawn.size == (64, 80) and facts['photograph'] == {'width': 64, 'height': 80}
    assert facts['crop']['right'] - facts['crop']['left'] == pytest.approx(64 * 64 / 67, abs=0.5)


@pytest.mark.parametrize(
    ('name', 'options', 'words'),
    [
        ('test_vit', {'img_size': 64}, 'its own class token'),
        ('test_resnet', {}, 'its own average pooling (GAP)'),
        ('test_resnet', {'global_pool': 'max'}, 'its own max pooling'),
    ],
)
@pytest.mark.parametrize('stream', [False, True])
def test_what_a_network_pools_is_called_by_its_name(
    name: str, options: dict[str, Any], words: str, stream: bool
) -> None:
    model: Any = make_backbone(name, **options)
    if stream:
        timm_castream.attach(model)
    opened = PageModel(Predictor(model), name, '')
    assert words in page.header(opened)
    assert ('average' in page.header(opened)) == ('average' in words)
    assert list(opened.pooling_names) == (['gap', 'ca'] if stream else ['gap'])


def test_a_checkpoint_of_the_plain_network_is_opened_with_a_fresh_stream(
    user: User, folder: Path, tmp_path: Path
) -> None:
    plain = make_backbone('test_resnet', num_classes=4)
    torch.save({'state_dict': plain.state_dict()}, tmp_path / 'gap.pth.tar')
    path = photograph(folder)
    arguments = f'num_classes=4 stream_init=gap backbone_checkpoint={tmp_path / "gap.pth.tar"}'
    opened = user.call(
        'open', 'test_resnet_castream', '', arguments, False, gradio_client.handle_file(path), METHODS, COLOURS
    )
    assert not is_error(opened), sentence(opened['Message'])
    assert 'the weights of gap.pth.tar' in opened['Heading'] and 'not trained yet' in opened['Heading']
    assert len(heat_maps(opened['Attention'])) == 5 and len(opened['Class to explain']['choices']) == 4
    wrong = user.call('open', 'test_resnet_castream', '', 'a', False, gradio_client.handle_file(path), METHODS, COLOURS)
    assert 'KEY=VALUE, not a' in sentence(wrong['Message'])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of `serve` in place of servers: whether other models can be opened, host, port, whether a browser is opened."""
    calls: list[tuple[Any, ...]] = []

    def record(app: Any, host: str | None, port: int | None, **kwargs: Any) -> tuple[None, str, None]:
        calls.append(('open' in {function.api_name for function in app.fns.values()}, host, port, kwargs['inbrowser']))
        return None, 'http://here', None

    monkeypatch.setattr('timm_castream.app.serve', record)
    monkeypatch.setattr('timm_castream.commands.app.wait', lambda: None)
    monkeypatch.setenv('DISPLAY', ':0')
    for variable in ('GRADIO_TEMP_DIR', 'GRADIO_ANALYTICS_ENABLED'):
        monkeypatch.setenv(variable, '')  # the command sets them
    return calls


@pytest.mark.parametrize(
    ('options', 'call'),
    [
        ([], (True, '127.0.0.1', None, True)),
        (['--port', '7999', '--no-browser'], (True, '127.0.0.1', 7999, False)),
        (['--host', '0.0.0.0'], (False, '0.0.0.0', None, False)),
        (['--model', 'test_resnet', '--multilabel'], (True, '127.0.0.1', None, True)),
    ],
)
def test_the_command_serves_this_machine_unless_told_otherwise(
    served: list[tuple[Any, ...]], options: list[str], call: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(['app', *options]) == 0
    assert served == [call]
    first, last = capsys.readouterr().out.splitlines()
    assert 'Opening' in first and 'http://here' in last
    assert not Path(os.environ['GRADIO_TEMP_DIR']).exists()


def test_sigterm_closes_the_server_before_the_files_of_the_page_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[bool] = []

    def serve_until_sigterm(app: Any, host: str, port: int | None, **kwargs: Any) -> Any:
        served = serve(app, host, port, **kwargs)
        close = app.server.close

        def recorded_close() -> None:
            folders.append(Path(os.environ['GRADIO_TEMP_DIR']).exists())
            close()

        monkeypatch.setattr(app.server, 'close', recorded_close)
        return served

    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    monkeypatch.setattr('timm_castream.commands.app.wait', wait)
    monkeypatch.setattr('timm_castream.app.serve', serve_until_sigterm)
    for variable in ('GRADIO_TEMP_DIR', 'GRADIO_ANALYTICS_ENABLED'):
        monkeypatch.setenv(variable, '')
    assert cli.main(['app', '--no-browser', '--port', str(free_port())]) == 130
    assert folders == [True]
    assert not Path(os.environ['GRADIO_TEMP_DIR']).exists()


def test_the_command_names_a_port_that_does_not_exist(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    for variable in ('GRADIO_TEMP_DIR', 'GRADIO_ANALYTICS_ENABLED'):
        monkeypatch.setenv(variable, '')
    assert cli.main(['app', '--port', '99999']) == 2
    error = capsys.readouterr().err
    assert 'cannot listen on port 99999 of 127.0.0.1: name another --port.' in error and error.count('\n') == 1


def test_the_command_names_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    for variable in ('GRADIO_TEMP_DIR', 'GRADIO_ANALYTICS_ENABLED'):
        monkeypatch.setenv(variable, '')
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(['app', '--port', str(port)]) == 2
    assert f'cannot listen on port {port} of 127.0.0.1' in capsys.readouterr().err


def test_the_command_writes_a_space_and_serves_nothing(
    served: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(['app', '--space', str(tmp_path / 'page')]) == 0
    assert (tmp_path / 'page' / 'app.py').is_file() and not served
    assert str(tmp_path / 'page') in capsys.readouterr().out
    assert cli.main(['app', '--space', str(tmp_path / 'page')]) == 2
    assert 'exists already' in capsys.readouterr().err

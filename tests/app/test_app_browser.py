"""The page in a real browser: Chromium, headless, driven by Playwright."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import free_port, make_backbone, sharpen
from PIL import Image

import timm_castream
from timm_castream.inference.predictor import Predictor

pytest.importorskip('gradio', reason='the page needs the extra app')
playwright = pytest.importorskip('playwright.sync_api', reason='the browser is driven by the package playwright')
BROWSER = os.environ.get('CASTREAM_BROWSER') or shutil.which('chromium') or shutil.which('google-chrome')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason='there is no chromium or google-chrome; CASTREAM_BROWSER names others'),
]

PATIENCE = 90_000  # milliseconds


@pytest.fixture(scope='module')
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from timm_castream.app import PageModel, create_app, serve
    from timm_castream.app.space import write_examples

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('GRADIO_TEMP_DIR', str(tmp_path_factory.mktemp('gradio')))
        patch.setenv('GRADIO_ANALYTICS_ENABLED', 'False')
        examples = write_examples(tmp_path_factory.mktemp('examples'))
        model: Any = sharpen(timm_castream.attach(make_backbone('test_resnet')))
        names = tuple(f'thing {i}' for i in range(10))
        model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 64, 64), 'label_names': names}
        opened = PageModel(Predictor(model), 'test_resnet_castream', 'Its weights are drawn for a test.')
        app = create_app(opened, examples, choose_model=True)
        _, address, _ = serve(app, port=free_port(), prevent_thread_lock=True)
        yield address
        app.close()


@pytest.fixture(scope='module')
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    flags = [
        '--no-sandbox',
        '--disable-gpu',
        '--disable-quic',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
    ]
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp('profile')),
            executable_path=BROWSER,
            headless=True,
            args=flags,
            viewport={'width': 1280, 'height': 900},
        )
        context.set_default_timeout(PATIENCE)
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    tab = browser.new_page()
    tab.requests = []
    tab.on('request', lambda request: tab.requests.append(request.url))
    tab.goto(url, wait_until='domcontentloaded')
    tab.wait_for_selector('#cs-maps img')
    yield tab
    tab.close()


def photograph() -> str:
    from sklearn.datasets import load_sample_images

    return next(name for name in load_sample_images().filenames if name.endswith('flower.jpg'))


def upload(page: Any, path: str | Path) -> None:
    page.locator('#cs-image').get_by_label('Remove Image').click()
    page.wait_for_function('() => !document.querySelector("#cs-maps img")')
    page.set_input_files('#cs-image input[type=file]', str(path))


def sources(page: Any) -> list[str]:
    return [image.get_attribute('src') for image in page.query_selector_all('#cs-maps img')]


def choose(page: Any, label: str) -> None:
    before = sources(page)
    page.click('#cs-class input')
    page.get_by_role('option', name=label, exact=True).click()
    page.wait_for_function(
        '(old) => { const image = document.querySelector("#cs-maps img"); return image && image.src !== old; }',
        arg=before[0],
    )


def other_classes(page: Any) -> list[str]:
    """Names of classes other than the one that is explained."""
    chosen = page.locator('#cs-classes li.cs-chosen span').first.inner_text()
    return [name for name in (f'thing {i}' for i in range(10)) if name != chosen]


def pixels(page: Any, selector: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert('RGB'), dtype=float)


def test_the_page_opens_with_an_example_and_loads_nothing_from_other_hosts(page: Any, url: str) -> None:
    assert len(sources(page)) == 6  # three methods, two poolings
    assert page.locator('#cs-attention img').count() == 5
    assert 'thing' in page.inner_text('#cs-classes')
    outside = [address for address in page.requests if not address.startswith((url, 'data:', 'blob:'))]
    assert outside == []


def test_a_photograph_is_uploaded_a_class_is_chosen_and_the_overlays_change(page: Any) -> None:
    upload(page, photograph())
    page.wait_for_selector('#cs-maps img')
    first = sources(page)
    drawn = pixels(page, '#cs-maps .cs-picture')
    choose(page, other_classes(page)[0])
    second = sources(page)
    assert len(second) == 6 and all(old != new for old, new in zip(first, second, strict=True))
    again = pixels(page, '#cs-maps .cs-picture')
    height, width = np.minimum(drawn.shape, again.shape)[:2]  # a fraction of a pixel lower on the page
    assert np.abs(again[:height, :width] - drawn[:height, :width]).mean() > 1
    image = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert('RGB'), dtype=float)
    assert image.shape[1] == 1280 and image.std() > 10 and len(np.unique(image.reshape(-1, 3), axis=0)) > 1000


def test_the_slider_blends_the_maps_with_the_image_without_a_request(page: Any) -> None:
    at_start = pixels(page, '#cs-maps .cs-picture')
    before = len(page.requests)
    drawn = {}
    for value in ('0', '1'):
        page.fill('#cs-opacity input[type=number]', value)
        page.press('#cs-opacity input[type=number]', 'Tab')
        page.wait_for_function(
            '(value) => getComputedStyle(document.querySelector("#cs-maps img")).opacity === value', arg=value
        )
        drawn[value] = pixels(page, '#cs-maps .cs-picture')
    assert [address for address in page.requests[before:] if not address.startswith(('data:', 'blob:'))] == []
    inner = (slice(8, -8), slice(8, -8))  # the corners are round
    assert np.abs(at_start[inner] - (0.2 * drawn['0'][inner] + 0.8 * drawn['1'][inner])).max() <= 2
    assert np.abs(drawn['1'] - drawn['0']).mean() > 10


def test_measurements_and_files_appear_on_the_page(page: Any, tmp_path: Path) -> None:
    page.get_by_role('button', name='Measure on this image').click()
    page.wait_for_selector('#cs-worth table')
    page.click('#cs-worth summary')  # eq. (5) is folded up
    text = page.inner_text('#cs-worth')
    assert 'Average Drop' in text and 'Insertion' in text and re.search(r'differ by at most \d\.\de-\d\d', text)
    assert page.locator('#cs-worth svg path').count() > 4
    page.get_by_role('button', name='Save picture and values').click()
    page.wait_for_selector('#cs-files a[download]')
    with page.expect_download() as download:
        page.locator('#cs-files a[download]', has_text='KB').first.click()
    download.value.save_as(tmp_path / 'explanation.png')
    assert np.asarray(Image.open(tmp_path / 'explanation.png')).std() > 10


def test_a_broken_upload_gives_a_sentence_and_the_page_goes_on(page: Any, tmp_path: Path) -> None:
    (tmp_path / 'broken.png').write_bytes(b'no image')
    upload(page, tmp_path / 'broken.png')
    page.wait_for_selector('#cs-message [role=alert]')
    assert page.inner_text('#cs-message') == 'The file is not an image that can be read.'
    assert sources(page) == []
    upload(page, photograph())
    page.wait_for_selector('#cs-maps img')
    assert not page.query_selector('#cs-message [role=alert]')


def test_two_users_see_their_own_class(page: Any, browser: Any, url: str) -> None:
    other = browser.new_page()
    other.goto(url, wait_until='domcontentloaded')
    other.wait_for_selector('#cs-maps img')
    mine, theirs = other_classes(page)[:2]
    choose(page, mine)
    choose(other, theirs)
    assert f'“{mine}”' in page.inner_text('#cs-maps')
    assert f'“{theirs}”' in other.inner_text('#cs-maps')
    other.close()


def test_nothing_is_cut_off_on_a_phone(page: Any) -> None:
    page.set_viewport_size({'width': 400, 'height': 800})
    page.wait_for_function('() => document.querySelector(".cs-card").getBoundingClientRect().right <= innerWidth')
    assert page.evaluate('document.documentElement.scrollWidth') <= 400

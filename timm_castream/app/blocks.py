"""The page of `castream app`, made with Gradio.

`explain_image`, `write_explanation` and the methods of `Explanation` need no server. `create_app` makes the page around
them, `serve` starts it. Everything that belongs to one user lies in the state of their session.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..attribution.methods import METHODS
from ..visualize import OPACITY
from . import page
from .explanation import Explanation, explain_image
from .export import write_explanation
from .page_model import PageModel, open_for_page

__all__ = ['create_app', 'serve']

DEFAULT_METHODS = ('grad_cam', 'grad_cam_pp', 'layer_cam')
MAX_UPLOAD = '30mb'
UPLOAD_SECONDS = 600  # Uploads and downloads older than this are deleted; Gradio looks every minute.
SESSION_SECONDS = 3600
_START = 'Upload, paste or choose an image.'
_OPACITY_JS = "(value) => { document.documentElement.style.setProperty('--cs-opacity', value); }"


def create_app(opened: PageModel, examples: Sequence[str | Path] = (), choose_model: bool = False) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        opened: The model that every session starts with.
        examples: Image files; the page opens with the first.
        choose_model: Let users open other models, from files of this machine too. For pages that only their owner sees.
    """
    import gradio as gr

    paths = [str(path) for path in examples]
    with gr.Blocks(title='CA-Stream', analytics_enabled=False, delete_cache=(60, UPLOAD_SECONDS)) as app:
        session_model = gr.State(None, time_to_live=SESSION_SECONDS)  # None: `opened`
        session = gr.State(None, time_to_live=SESSION_SECONDS)  # the explanation on the page
        heading = gr.HTML(page.header(opened), label='Heading')
        if choose_model:
            with gr.Accordion('Another network', open=False):
                with gr.Row():
                    name_box = gr.Textbox(
                        label='Model', placeholder='resnet18_castream, hf-hub:ORG/NAME or local-dir:DIR'
                    )
                    checkpoint_box = gr.Textbox(label='Checkpoint', placeholder='a file, or ORG/NAME on the Hub')
                published = gr.Checkbox(label='Use the published weights of the model')
                open_button = gr.Button('Open')
        with gr.Row():
            with gr.Column(scale=4, min_width=280):
                upload = _image_file(gr, paths)
                if paths:
                    gr.Examples(paths, upload, label='Examples', cache_examples=False, api_visibility='private')
            with gr.Column(scale=6, min_width=280):
                message = gr.HTML(page.status(_START), label='Message', elem_id='cs-message', min_height=56)
                classes = gr.HTML(label='Classes', elem_id='cs-classes')
                with gr.Column(visible=False) as controls:
                    class_choice = gr.Dropdown([], label='Class to explain', elem_id='cs-class')
                    method_choice = gr.CheckboxGroup(
                        _titles(opened.class_methods),
                        value=list(DEFAULT_METHODS),
                        label='Methods',
                        elem_id='cs-methods',
                    )
                    slider = gr.Slider(0, 1, OPACITY, step=0.05, label='Opacity of the maps', elem_id='cs-opacity')
        maps = gr.HTML(label='Maps', elem_id='cs-maps')
        attention = gr.HTML(label='Attention', elem_id='cs-attention')
        with gr.Column(visible=False) as measuring:
            gr.HTML(page.measuring())
            with gr.Row(elem_id='cs-measuring'):
                measured_choice = gr.Dropdown(
                    _titles(opened.methods), value=DEFAULT_METHODS[0], label='Method', elem_id='cs-method'
                )
                measure_button = gr.Button('Measure on this image', variant='primary')
                save_button = gr.Button('Save picture and figures')
            worth = gr.HTML(label='MapScores', elem_id='cs-worth', min_height=90)
            files = gr.File(label='Files', visible=False, file_count='multiple', interactive=False, elem_id='cs-files')
        no_files = gr.update(visible=False, value=None)
        blank = {
            session: None,
            classes: '',
            maps: '',
            attention: '',
            worth: '',
            files: no_files,
            controls: gr.update(visible=False),
            measuring: gr.update(visible=False),
            class_choice: gr.update(choices=[], value=None),
        }

        def show(explanation: Explanation, target: int, methods: list[str], progress: Any) -> dict[Any, Any]:
            """The part of the page that depends on the class and the methods."""
            found = explanation.maps(methods, target, progress)
            return {
                session: explanation,
                message: page.input_note(explanation),
                worth: '',
                files: no_files,
                classes: page.predictions(explanation, target),
                maps: page.maps(explanation, methods, target, found),
            }

        def explain(
            image: str | None, methods: list[str], model: PageModel | None, progress: Any = gr.Progress()
        ) -> dict[Any, Any]:
            """Explains an image for the class that the model predicts."""
            if image is None:
                return blank | {message: page.status(_START)}
            try:
                if not Path(image).is_file():
                    raise FileNotFoundError('The image was deleted in the meantime: upload it again.')
                progress(0, desc='Running the network')
                explanation = explain_image(model or opened, image)
                return show(explanation, explanation.predicted, methods, progress) | {
                    attention: page.attention(explanation),
                    controls: gr.update(visible=True),
                    measuring: gr.update(visible=True),
                    class_choice: gr.update(choices=_class_choices(explanation), value=explanation.predicted),
                }
            except Exception as error:
                return blank | {message: page.error(error)}

        def choose(
            target: int | None, methods: list[str], explanation: Explanation | None, progress: Any = gr.Progress()
        ) -> dict[Any, Any]:
            """Shows the maps of another class or of other methods."""
            if explanation is None or target is None:
                return {message: page.status(_START)}
            try:
                return show(explanation, target, methods, progress)
            except Exception as error:
                return {message: page.error(error)}

        def measure(
            target: int | None, method: str, explanation: Explanation | None, progress: Any = gr.Progress()
        ) -> dict[Any, Any]:
            """Measures the maps of one method on the image."""
            if explanation is None or target is None:
                return {message: page.status(_START)}
            try:
                return {worth: page.scores(explanation, method, target, explanation.scores(method, target, progress))}
            except Exception as error:
                return {message: page.error(error), worth: ''}

        def save(
            target: int | None,
            methods: list[str],
            method: str,
            opacity: float,
            explanation: Explanation | None,
            progress: Any = gr.Progress(),
        ) -> dict[Any, Any]:
            """Writes the picture (PNG) and the figures (JSON), with the measurements of one method."""
            if explanation is None or target is None:
                return {message: page.status(_START)}
            try:
                explanation.scores(method, target, progress)
                # Gradio deletes the files of its cache on schedule, so they are written there.
                Path(files.GRADIO_CACHE).mkdir(parents=True, exist_ok=True)
                folder = tempfile.mkdtemp(dir=files.GRADIO_CACHE)
                written = write_explanation(explanation, folder, methods, target, opacity, method)
                return {files: gr.update(value=[str(path) for path in written], visible=True)}
            except Exception as error:
                return {message: page.error(error)}

        def change_model(
            name: str,
            checkpoint: str,
            pretrained: bool,
            image: str | None,
            methods: list[str],
            progress: Any = gr.Progress(),
        ) -> dict[Any, Any]:
            """Opens another model for this session and explains the image with it."""
            try:
                progress(0, desc='Opening the model')
                model = open_for_page(
                    name.strip() or None,
                    checkpoint.strip() or None,
                    pretrained,
                    activation=opened.network.activation,
                    device=next(opened.model.parameters()).device,
                )
            except Exception as error:
                return {message: page.error(error)}
            methods = [method for method in methods if method in model.methods]
            return explain(image, methods, model, progress) | {
                session_model: model,
                heading: page.header(model),
                method_choice: gr.update(choices=_titles(model.class_methods), value=methods),
                measured_choice: gr.update(choices=_titles(model.methods), value=DEFAULT_METHODS[0]),
            }

        # One request at a time for all sessions: pooling and evaluation mode are settings of the shared model.
        common: dict[str, Any] = {'concurrency_limit': 1, 'concurrency_id': 'castream', 'trigger_mode': 'always_last'}
        shown = [message, *blank]
        gr.on(
            [upload.change, app.load] if paths else [upload.change],
            explain,
            [upload, method_choice, session_model],
            shown,
            api_name='explain',
            show_progress_on=[message],
            **common,
        )
        gr.on(
            [class_choice.input, method_choice.input],
            choose,
            [class_choice, method_choice, session],
            [session, message, classes, maps, worth, files],
            api_name='choose',
            show_progress_on=[message],
            **common,
        )
        measure_button.click(
            measure,
            [class_choice, measured_choice, session],
            [message, worth],
            api_name='measure',
            show_progress_on=[worth],
            **common,
        )
        save_button.click(
            save,
            [class_choice, method_choice, measured_choice, slider, session],
            [message, files],
            api_name='save',
            show_progress_on=[worth],
            **common,
        )
        if choose_model:
            open_button.click(
                change_model,
                [name_box, checkpoint_box, published, upload, method_choice],
                [session_model, heading, method_choice, measured_choice, *shown],
                api_name='open',
                show_progress_on=[message],
                **common,
            )
        # The browser blends the maps with the image, so another opacity needs no request.
        slider.input(None, slider, None, js=_OPACITY_JS, api_visibility='private')
    return app


def serve(app: Any, host: str | None = '127.0.0.1', port: int | None = None, **kwargs: Any) -> Any:
    """Starts the page.

    Args:
        app: Of `create_app`.
        host: Address to listen on. None: the environment variable `GRADIO_SERVER_NAME`, else this machine alone.
        port: Of the server. None: the first free one from 7860.
        kwargs: Other arguments of `gradio.Blocks.launch`, for instance `prevent_thread_lock`.

    Returns:
        The result of `launch`: the server, its address on this machine, and None.
    """
    import gradio as gr

    fonts: dict[str, Any] = {'font': ['system-ui', 'sans-serif'], 'font_mono': ['ui-monospace', 'monospace']}
    settings: dict[str, Any] = {  # the page loads nothing from other hosts, so its fonts are those of the system
        'theme': gr.themes.Default(primary_hue='orange', neutral_hue='slate', **fonts),
        'css_paths': Path(__file__).with_name('page.css'),
        'footer_links': ['api'],
        'run_history': False,  # it would keep uploads in the browser
        'max_file_size': MAX_UPLOAD,
        'ssr_mode': False,
        'share': False,
    }
    return app.queue().launch(server_name=host, server_port=port, **{**settings, **kwargs})


def _image_file(gr: Any, paths: list[str]) -> Any:
    image = gr.Image(
        paths[0] if paths else None,
        type='filepath',
        label='Image',
        sources=['upload', 'clipboard'],
        height=300,
        buttons=[],
        elem_id='cs-image',
    )
    # Gradio would decode the upload itself and fail on a broken file without a sentence.
    image.preprocess = lambda payload: payload and payload.path
    return image


def _titles(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(METHODS[name].title, name) for name in names]


def _class_choices(explanation: Explanation) -> list[tuple[str, int]]:
    """All classes, those of high probability first."""
    best, model = explanation.best(), explanation.opened.model
    rest = set(range(model.num_classes)).difference(best)
    return [(explanation.opened.class_name(index), index) for index in [*best, *sorted(rest)]]

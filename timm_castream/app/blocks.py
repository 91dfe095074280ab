"""The page of `castream app`, made with Gradio.

`Page.layout` makes the components, `Page.connect` joins them to the methods below it: another part of the page is a
component in the one, its events in the other, and HTML in `page`. `explain_image`, `write_explanation` and the methods
of `Explanation` need no server. Everything that belongs to one user lies in the state of their session.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from .._utils.keywords import read_keywords
from ..visualize import COLOURS, OPACITY
from . import page
from .explanation import Explanation, explain_image
from .export import write_explanation, write_maps
from .page_model import PageModel, method_title, open_for_page

__all__ = ['Page', 'create_app', 'serve']

DEFAULT_METHODS = ('grad_cam', 'grad_cam_pp', 'layer_cam')
MAX_UPLOAD = '30mb'
UPLOAD_SECONDS = 600  # Uploads and downloads older than this are deleted; Gradio looks every minute.
SESSION_SECONDS = 3600
_START = 'Upload, paste or choose an image.'
_OPACITY_JS = "(value) => { document.documentElement.style.setProperty('--cs-opacity', value); }"

Updates = dict[Any, Any]  # {component: its new value}


class Page:
    """A page for one user or several, each with their own image, class and model.

    Args:
        opened: The model that every session starts with.
        examples: Image files; the page opens with the first.
        choose_model: Let users open other models, from files of this machine too. For pages that only their owner sees.

    Attributes:
        blocks: The page, a `gradio.Blocks`.
    """

    def __init__(self, opened: PageModel, examples: Sequence[str | Path] = (), choose_model: bool = False) -> None:
        self.opened = opened
        self.examples = [str(path) for path in examples]
        self.choose_model = choose_model
        self.blocks = gr.Blocks(title='CA-Stream', analytics_enabled=False, delete_cache=(60, UPLOAD_SECONDS))
        with self.blocks:
            self.layout()
            self.connect()

    def layout(self) -> None:
        """Makes the components, from top to bottom."""
        self.session_model = gr.State(None, time_to_live=SESSION_SECONDS)  # None: `opened`
        self.added = gr.State([])  # methods of other libraries among the choices
        self.session = gr.State(None, time_to_live=SESSION_SECONDS)  # the explanation on the page
        self.heading = gr.HTML(page.header(self.opened), label='Heading')
        if self.choose_model:
            self._layout_models()
        with gr.Row():
            with gr.Column(scale=4, min_width=280):
                self.upload = self._upload()
                if self.examples:
                    gr.Examples(
                        self.examples, self.upload, label='Examples', cache_examples=False, api_visibility='private'
                    )
            with gr.Column(scale=6, min_width=280):
                self.message = gr.HTML(page.status(_START), label='Message', elem_id='cs-message', min_height=56)
                self.classes = gr.HTML(label='Classes', elem_id='cs-classes')
                with gr.Column(visible=False) as self.controls:
                    self._layout_controls()
        self.maps = gr.HTML(label='Maps', elem_id='cs-maps')
        self.attention = gr.HTML(label='Attention', elem_id='cs-attention')
        with gr.Column(visible=False) as self.measuring:
            self._layout_measuring()

    def _layout_models(self) -> None:
        with gr.Accordion('Another network', open=False):
            with gr.Row():
                self.name_box = gr.Textbox(label='Model', placeholder=page.MODEL_PLACEHOLDER)
                self.checkpoint_box = gr.Textbox(label='Checkpoint', placeholder='a file, or ORG/NAME on the Hub')
                self.kwargs_box = gr.Textbox(label='Arguments', placeholder='num_classes=3 stream_init=gap')
            self.published = gr.Checkbox(label='Use the published weights of the model')
            self.open_button = gr.Button('Open')

    def _layout_controls(self) -> None:
        self.class_choice = gr.Dropdown([], label='Class to explain', elem_id='cs-class')
        self.method_choice = gr.CheckboxGroup(
            _titles(self.opened.map_methods), value=list(DEFAULT_METHODS), label='Methods', elem_id='cs-methods'
        )
        self.peer_choice = gr.Dropdown(
            self.opened.peer_methods,
            value=None,
            label='Add a method of another library',
            visible=bool(self.opened.peer_methods),
            elem_id='cs-peers',
        )
        with gr.Row():
            self.opacity = gr.Slider(0, 1, OPACITY, step=0.05, label='Opacity of the maps', elem_id='cs-opacity')
            self.colours = gr.Radio(list(COLOURS), value=COLOURS[0], label='Colours', elem_id='cs-colours')

    def _layout_measuring(self) -> None:
        gr.HTML(page.measuring())
        with gr.Row(elem_id='cs-measuring'):
            self.measured_choice = gr.Dropdown(
                _titles(self.opened.methods), value=DEFAULT_METHODS[0], label='Method', elem_id='cs-method'
            )
            self.measure_button = gr.Button('Measure on this image', variant='primary')
            self.save_button = gr.Button('Save picture and values')
            self.maps_button = gr.Button('Save maps')
        self.scores = gr.HTML(label='MapScores', elem_id='cs-worth', min_height=90)
        self.files = gr.File(label='Files', visible=False, file_count='multiple', interactive=False, elem_id='cs-files')

    def connect(self) -> None:
        """Joins the components to the methods of the page."""
        # One request at a time for all sessions: pooling and evaluation mode are settings of the shared model.
        common: dict[str, Any] = {'concurrency_limit': 1, 'concurrency_id': 'castream', 'trigger_mode': 'always_last'}
        shown = [self.message, *self._blank()]
        settings = [self.method_choice, self.colours]
        gr.on(
            [self.upload.change, self.blocks.load] if self.examples else [self.upload.change],
            self.explain,
            [self.upload, *settings, self.session_model],
            shown,
            api_name='explain',
            show_progress_on=[self.message],
            **common,
        )
        gr.on(
            [self.class_choice.input, self.method_choice.input],
            self.choose,
            [self.class_choice, *settings, self.session],
            [self.session, self.message, self.classes, self.maps, self.scores, self.files],
            api_name='choose',
            show_progress_on=[self.message],
            **common,
        )
        self.peer_choice.input(
            self.add,
            [self.class_choice, self.peer_choice, *settings, self.added, self.session_model, self.session],
            [
                *(self.peer_choice, self.added, self.method_choice, self.measured_choice),
                *(self.session, self.message, self.classes, self.maps, self.scores, self.files),
            ],
            api_name='add',
            show_progress_on=[self.message],
            **common,
        )
        self.colours.input(
            self.recolour,
            [self.class_choice, *settings, self.session],
            [self.message, self.maps, self.attention],
            api_name='recolour',
            show_progress_on=[self.message],
            **common,
        )
        self.measure_button.click(
            self.measure,
            [self.class_choice, self.measured_choice, self.session],
            [self.message, self.scores],
            api_name='measure',
            show_progress_on=[self.scores],
            **common,
        )
        saved = [self.class_choice, *settings, self.opacity]
        self.save_button.click(
            self.save,
            [*saved, self.measured_choice, self.session],
            [self.message, self.files],
            api_name='save',
            show_progress_on=[self.scores],
            **common,
        )
        self.maps_button.click(
            self.save_maps,
            [*saved, self.session],
            [self.message, self.files],
            api_name='save_maps',
            show_progress_on=[self.scores],
            **common,
        )
        if self.choose_model:
            self.open_button.click(
                self.open,
                [self.name_box, self.checkpoint_box, self.kwargs_box, self.published, self.upload, *settings],
                [
                    *(self.session_model, self.heading, self.added, self.peer_choice),
                    *(self.method_choice, self.measured_choice, *shown),
                ],
                api_name='open',
                show_progress_on=[self.message],
                **common,
            )
        # The browser blends the maps with the image, so another opacity needs no request.
        self.opacity.input(None, self.opacity, None, js=_OPACITY_JS, api_visibility='private')

    def explain(
        self,
        image: str | None,
        methods: list[str],
        colours: str,
        model: PageModel | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Updates:
        """Explains an image for the class that the model predicts."""
        if image is None:
            return self._blank() | {self.message: page.status(_START)}
        try:
            if not Path(image).is_file():
                raise FileNotFoundError('The image was deleted in the meantime: upload it again.')
            progress(0, desc='Running the network')
            explanation = explain_image(model or self.opened, image)
            return self._show(explanation, explanation.predicted, methods, colours, progress) | {
                self.attention: page.attention(explanation, colours),
                self.controls: gr.update(visible=True),
                self.measuring: gr.update(visible=True),
                self.class_choice: gr.update(choices=_class_choices(explanation), value=explanation.predicted),
            }
        except Exception as error:
            return self._blank() | {self.message: page.error(error)}

    def choose(
        self,
        target: int | None,
        methods: list[str],
        colours: str,
        explanation: Explanation | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Updates:
        """Shows the maps of another class or of other methods."""
        return self._answer(
            explanation, target, lambda shown, index: self._show(shown, index, methods, colours, progress)
        )

    def add(
        self,
        target: int | None,
        name: str | None,
        methods: list[str],
        colours: str,
        added: list[str],
        model: PageModel | None,
        explanation: Explanation | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Updates:
        """Puts a method of another library among the choices and shows its maps. One that fails is not added."""

        def shown(explanation: Explanation, index: int) -> Updates:
            chosen, every = ([*dict.fromkeys([*names, name])] if name else names for names in (methods, added))
            opened = model or self.opened
            return self._show(explanation, index, chosen, colours, progress) | {
                self.added: every,
                self.method_choice: gr.update(choices=_titles([*opened.map_methods, *every]), value=chosen),
                self.measured_choice: gr.update(choices=_titles([*opened.methods, *every])),
            }

        return self._answer(explanation, target, shown) | {self.peer_choice: gr.update(value=None)}

    def recolour(
        self, target: int | None, methods: list[str], colours: str, explanation: Explanation | None
    ) -> Updates:
        """Shows the same maps in other colours."""

        def drawn(shown: Explanation, index: int) -> Updates:
            return {
                self.maps: page.maps(shown, methods, index, shown.maps(methods, index), colours),
                self.attention: page.attention(shown, colours),
            }

        return self._answer(explanation, target, drawn)

    def measure(
        self,
        target: int | None,
        method: str,
        explanation: Explanation | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Updates:
        """Measures the maps of one method on the image."""

        def measured(shown: Explanation, index: int) -> Updates:
            return {self.scores: page.scores(shown, method, index, shown.scores(method, index, progress))}

        return self._answer(explanation, target, measured)

    def save(
        self,
        target: int | None,
        methods: list[str],
        colours: str,
        opacity: float,
        method: str,
        explanation: Explanation | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Updates:
        """Writes the picture (PNG) and the values (JSON), with the measurements of one method."""

        def written(shown: Explanation, index: int) -> Updates:
            shown.scores(method, index, progress)
            return self._offer(write_explanation(shown, self._folder(), methods, index, opacity, method, colours))

        return self._answer(explanation, target, written)

    def save_maps(
        self, target: int | None, methods: list[str], colours: str, opacity: float, explanation: Explanation | None
    ) -> Updates:
        """Writes every map as an array, and over the whole photograph, in one archive."""

        def written(shown: Explanation, index: int) -> Updates:
            folder = Path(self._folder(), 'maps')
            write_maps(shown, folder, methods, index, opacity, colours)
            archive = shutil.make_archive(str(folder), 'zip', folder)
            shutil.rmtree(folder)
            return self._offer([Path(archive)])

        return self._answer(explanation, target, written)

    def open(
        self,
        name: str,
        checkpoint: str,
        kwargs: str,
        pretrained: bool,
        image: str | None,
        methods: list[str],
        colours: str,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Updates:
        """Opens another model for this session and explains the image with it."""
        try:
            progress(0, desc='Opening the model')
            model = open_for_page(
                name.strip() or None,
                checkpoint.strip() or None,
                pretrained,
                activation=self.opened.predictor.activation,
                device=self.opened.predictor.device,
                engine=self.opened.engine,
                **read_keywords(kwargs.split()),
            )
        except Exception as error:
            return {self.message: page.error(error)}
        methods = [method for method in methods if method in model.methods]
        return self.explain(image, methods, colours, model, progress) | {
            self.session_model: model,
            self.heading: page.header(model),
            self.added: [],
            self.peer_choice: gr.update(choices=model.peer_methods, value=None, visible=bool(model.peer_methods)),
            self.method_choice: gr.update(choices=_titles(model.map_methods), value=methods),
            self.measured_choice: gr.update(choices=_titles(model.methods), value=DEFAULT_METHODS[0]),
        }

    def _answer(
        self, explanation: Explanation | None, target: int | None, work: Callable[[Explanation, int], Updates]
    ) -> Updates:
        """The updates of a request about the image on the page, or a sentence on what went wrong."""
        if explanation is None or target is None:
            return {self.message: page.status(_START)}
        try:
            return work(explanation, target)
        except Exception as error:
            return {self.message: page.error(error)}

    def _show(self, explanation: Explanation, target: int, methods: list[str], colours: str, progress: Any) -> Updates:
        """The parts of the page that depend on the class, the methods and the colours."""
        found = explanation.maps(methods, target, progress)
        return {
            self.session: explanation,
            self.message: page.input_note(explanation),
            self.classes: page.predictions(explanation, target),
            self.maps: page.maps(explanation, methods, target, found, colours),
            self.scores: '',
            self.files: gr.update(visible=False, value=None),
        }

    def _blank(self) -> Updates:
        """The parts of the page that show an image, without one."""
        return {
            self.session: None,
            self.classes: '',
            self.maps: '',
            self.attention: '',
            self.scores: '',
            self.files: gr.update(visible=False, value=None),
            self.controls: gr.update(visible=False),
            self.measuring: gr.update(visible=False),
            self.class_choice: gr.update(choices=[], value=None),
        }

    def _folder(self) -> str:
        """A new folder for files to download. Gradio deletes the files of its cache on schedule."""
        Path(self.files.GRADIO_CACHE).mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(dir=self.files.GRADIO_CACHE)

    def _offer(self, paths: Sequence[Path]) -> Updates:
        return {self.files: gr.update(value=[str(path) for path in paths], visible=True)}

    def _upload(self) -> Any:
        image: Any = gr.Image(
            self.examples[0] if self.examples else None,
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


def create_app(opened: PageModel, examples: Sequence[str | Path] = (), choose_model: bool = False) -> gr.Blocks:
    """The page, a `gradio.Blocks`, of the arguments of `Page`."""
    return Page(opened, examples, choose_model).blocks


def serve(app: gr.Blocks, host: str | None = '127.0.0.1', port: int | None = None, **kwargs: Any) -> Any:
    """Starts the page.

    Args:
        app: Of `create_app`.
        host: Address to listen on. None: the environment variable `GRADIO_SERVER_NAME`, else this machine alone.
        port: Of the server. None: the first free one from 7860.
        kwargs: Other arguments of `gradio.Blocks.launch`, for instance `prevent_thread_lock` or `inbrowser`.

    Returns:
        The result of `launch`: the server, its address on this machine, and None.
    """
    fonts: dict[str, Any] = {'font': ['system-ui', 'sans-serif'], 'font_mono': ['ui-monospace', 'monospace']}
    settings: dict[str, Any] = {  # the page loads nothing from other hosts, so its fonts are those of the system
        'theme': gr.themes.Default(primary_hue='orange', neutral_hue='slate', **fonts),
        'css_paths': Path(__file__).with_name('page.css'),
        'footer_links': ['api'],
        'run_history': False,  # it would keep uploads in the browser
        'max_file_size': MAX_UPLOAD,
        'ssr_mode': False,
        'share': False,
        'quiet': True,  # Gradio would advise share=True, which a command cannot follow
    }
    return app.queue().launch(server_name=host, server_port=port, **{**settings, **kwargs})


def _titles(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(method_title(name), name) for name in names]


def _class_choices(explanation: Explanation) -> list[tuple[str, int]]:
    """All classes, those of high probability first."""
    best, model = explanation.best(), explanation.opened.model
    rest = set(range(model.num_classes)).difference(best)
    return [(explanation.opened.class_name(index), index) for index in [*best, *sorted(rest)]]

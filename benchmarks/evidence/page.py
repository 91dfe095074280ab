"""Fills docs/evidence.md and the README's table from the committed results. The sentences are in `page.md.j2`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from timm_castream._utils.files import write_whole
from timm_castream.attribution.methods import METHODS
from timm_castream.metrics import METRICS

from .. import pretrained
from .plots import gap_accuracy, growth_points, plot_differences, plot_growth
from .results import Results, Table
from .statistics import Difference, compare

MARKS = ('<!-- evidence: written by make evidence -->', '<!-- end of evidence -->')
MASKED = ('average_drop', 'average_gain', 'average_increase')
CURVES = ('insertion', 'deletion')
BOXES = ('pointing_game', 'energy_pointing_game')
BASELINES = ('random', 'centre')
TRIED = ('accuracy', 'probability', 'AD', 'AG', 'AI')
STREAMS = {
    'gap_start': "S_0 - S_4, `'gap'` start",
    'paper_start': "S_0 - S_4, `'paper'` start",
    **{f's{i}': f'S_{i} - S_4' for i in range(1, 5)},
    'proj_ca': 'PROJ -> CA',
    'class_specific': 'class specific',
}
PRODUCT = {'product': '`castream train -c own_data.yaml`', 'augmentation': "the same with timm's augmentation"}
VARIANTS = [
    ('main', 'gap_start'),
    *(('placement', f's{i}') for i in range(1, 5)),
    ('block', 'proj_ca'),
    ('class_specific', 'class_specific'),
]


def write_page(results: Results, page: Path, readme: Path | None = None) -> None:
    """Writes the page with its plots beside it, and the README's table between its marks.

    Args:
        results: The results.
        page: The Markdown file.
        readme: A README with the two `MARKS`, or None.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    rows = list(main_differences(results))
    if rows:
        named = [(', '.join(filter(None, (method, metric))), difference) for method, metric, _, difference in rows]
        plot_differences(named, page.with_name(f'{page.stem}_differences.png'))
    if growth_points(results, 'gap_start'):
        plot_growth(results, page.with_name(f'{page.stem}_growth.png'))
    with write_whole(page) as file:
        file.write(page_text(results, page.stem))
    text = readme.read_text(encoding='utf-8') if readme is not None and readme.is_file() else ''
    if readme is not None and all(mark in text for mark in MARKS):
        written = f'{MARKS[0]}\n{readme_text(results)}\n{MARKS[1]}'
        with write_whole(readme) as file:
            file.write(
                re.sub(re.escape(MARKS[0]) + '.*' + re.escape(MARKS[1]), lambda _: written, text, flags=re.DOTALL)
            )


def page_text(results: Results, stem: str = 'evidence') -> str:
    """The page; the names of its pictures begin with `stem`."""
    return render('page.md.j2', results, stem)


def readme_text(results: Results) -> str:
    """The README's part: the answer, the main differences, and what augmentation did."""
    return render('readme.md.j2', results, '').strip()


def render(template: str, results: Results, stem: str) -> str:
    """Fills a template of this folder. Sections whose tables have not run say so."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {'wrap': wrap, 'span': span, 'signed': signed, 'listed': listed, 'bold': bold}
    made = [facts['made_by'] for facts in (*results.facts.values(), *results.streams.values())]
    text = environment.get_template(template).render(
        results=results,
        settings=results.settings,
        stem=stem,
        streams=STREAMS,
        symbols={name: METRICS[name].symbol for name in (*MASKED, *CURVES, *BOXES)},
        headings=[METRICS[name].heading for name in MASKED],
        box_headings=[METRICS[name].heading for name in BOXES],
        masked=MASKED,
        table=table,
        size=size_text,
        difference=lambda name, *words: results.table(name).difference(*words),
        excess=lambda cams, baselines, *words: excess(results.table(cams), results.table(baselines), *words),
        has=lambda *names: set(names) <= results.settings['tables'].keys(),
        main_rows=[
            [method, metric, *cells(found), str(len(found.values)), str(source.num_images)]
            for method, metric, source, found in main_differences(results)
        ],
        groups=verdict_groups(results),
        temperatures=temperatures(results),
        temperature_rows=temperature_rows(results),
        baseline_rows=baseline_rows(results),
        attention_rows=attention_rows(results),
        unseen_rows=unseen_rows(results),
        against=lambda name, other: against(results.table(name), other),
        stream_rows=lambda *pairs: stream_rows(results, pairs),
        variants=VARIANTS,
        least_loss=least_loss(results),
        epochs={kind: epoch_accuracies(results, kind) for kind in ('gap_start', 'paper_start')},
        growth_rows=growth_rows(results),
        gap_accuracy=gap_accuracy(results),
        last_stage_rows=last_stage_rows(results),
        tried_rows=tried_rows(results),
        changes=changes_of_recipe(results.choices.get('gap_start', {})),
        settings_text=settings_text,
        missing_rows=missing_rows(results),
        pretrained=pretrained.table(),
        machines=sorted({m['machine'] for m in made}),
        versions=sorted({f'torch {m["torch"]}, timm {m["timm"]}, timm_castream {m["timm_castream"]}' for m in made}),
    )
    return re.sub(r'\n{3,}', '\n\n', text)


def main_differences(results: Results) -> Iterator[tuple[str, str, Table, Difference]]:
    """CA - GAP of the main stream where it has run: titles of method and metric, table, difference."""
    main, curves, score_cam = (results.table(name) for name in ('main', 'curves', 'score_cam'))
    columns = [('', 'accuracy ↑', main, 'accuracy'), ('', 'probability', main, 'prob')]
    for method in ('grad_cam', 'grad_cam_pp', 'score_cam'):
        sources = (score_cam, score_cam) if method == 'score_cam' else (main, curves)
        for source, names in zip(sources, (MASKED, CURVES), strict=True):
            columns += [(METHODS[method].title, METRICS[name].heading, source, f'{method}/{name}') for name in names]
    for method, metric, source, column in columns:
        if (found := source.difference('gap_start', column)) is not None:
            yield method, metric, source, found


def verdict_groups(results: Results) -> dict[str, list[str]]:
    """The differences of Grad-CAM and of accuracy, as `AG (+4.9)`, by verdict."""
    groups: dict[str, list[str]] = {'better': [], 'worse': [], 'no difference seen': []}
    names = {'I': 'Insertion', 'D': 'Deletion'}
    for method, metric, source, found in main_differences(results):
        if method in ('', METHODS['grad_cam'].title) and metric != 'probability':
            size = '' if source.name == 'main' else f' on {source.num_images} images'
            symbol = metric.split()[0]
            groups[found.verdict].append(f'{names.get(symbol, symbol)} ({signed(found.value)}{size})')
    return groups


def temperatures(results: Results) -> list[str]:
    """The fitted temperatures, GAP's first."""
    facts = [piece for piece in results.facts.values() if piece['table'] == 'temperatures']
    facts.sort(key=lambda piece: (piece['stream'] is not None, piece['seed']))
    return [f'{piece["temperature"]:.2f}' for piece in facts]


def temperature_rows(results: Results) -> list[list[str]]:
    """Differences under fitted temperatures, beside those without."""
    fitted, plain = results.table('temperatures'), results.table('main')
    columns = [('', 'probability', 'prob')]
    for method in ('grad_cam', 'grad_cam_pp'):
        columns += [(METHODS[method].title, METRICS[name].heading, f'{method}/{name}') for name in MASKED]
    return [
        [method, metric, *cells(found), span(without) if without else 'not run']
        for method, metric, column in columns
        if (found := fitted.difference('gap_start', column)) is not None
        for without in [plain.difference('gap_start', column)]
    ]


def baseline_rows(results: Results) -> list[list[str]]:
    """What the baseline maps gain, and what Grad-CAM gains beyond them; nothing where a part has not run."""
    baselines = results.table('attention')
    rows = {
        f'{name}, CA - GAP': [baselines.difference('gap_start', f'{name}/{m}') for m in MASKED] for name in BASELINES
    }
    rows |= {
        f"Grad-CAM's CA - GAP minus that of {name}": [excess(results.table('main'), baselines, name, m) for m in MASKED]
        for name in BASELINES
    }
    if any(found is None for row in rows.values() for found in row):
        return []
    return [[title, *map(bold, row)] for title, row in rows.items()]


def excess(cams: Table, baselines: Table, baseline: str, metric: str, stream: str = 'gap_start') -> Difference | None:
    """How much more CA changes a metric of Grad-CAM than that of a baseline map.

    Args:
        cams: A table with Grad-CAM.
        baselines: A table with the baselines, on the first images of that table.
        baseline: `random` or `centre`.
        metric: AD, AG or AI.
        stream: Kind of stream.

    Returns:
        (CA - GAP of Grad-CAM) - (CA - GAP of the baseline), paired by image, or None where a part has not run.
    """
    column, other = f'grad_cam/{metric}', f'{baseline}/{metric}'
    seeds = cams.streams.get(stream, {}).keys() & baselines.streams.get(stream, {}).keys()
    if cams.gap is None or baselines.gap is None or not seeds:
        return None
    count = baselines.num_images
    runs = [
        cams.streams[stream][seed][column][:count]
        - cams.gap[column][:count]
        - baselines.streams[stream][seed][other]
        + baselines.gap[other][:count]
        for seed in sorted(seeds)
    ]
    return compare(np.zeros(count), runs, not METRICS[metric].higher_is_better)


def attention_rows(results: Results) -> list[list[str]]:
    """Means of every method under both poolings, faithfulness and boxes."""
    main, masked, boxes = (results.table(name) for name in ('main', 'attention', 'localisation'))
    rows = []
    for method in ('grad_cam', 'grad_cam_pp', 'attention', *BASELINES):
        source = main if method.startswith('grad_cam') else masked
        for pooling in ('gap', 'ca'):
            values = [mean_text(source, pooling, f'{method}/{m}') for m in MASKED]
            values += [mean_text(boxes, pooling, f'{method}/{m}') for m in BOXES]
            if any(values):
                rows.append([METHODS[method].title, pooling.upper(), *values])
    return rows


def unseen_rows(results: Results) -> list[list[str]]:
    """SP and EP on classes that the stream was not trained on."""
    values = results.table('unseen_classes')
    return [
        [METHODS[method].title, *(mean_text(values, 'ca', f'{method}/{m}') for m in BOXES)]
        for method in ('attention', *BASELINES)
        if values.streams
    ]


def against(values: Table, other: str) -> str:
    """SP and EP of the attention minus those of a baseline map, paired by image."""
    parts = []
    for metric in BOXES:
        runs = [run[f'attention/{metric}'] - run[f'{other}/{metric}'] for run in values.streams['gap_start'].values()]
        found = compare(np.zeros(len(runs[0])), runs)
        parts.append(f'{METRICS[metric].symbol} {span(found)} ({found.verdict})')
    return listed(parts)


def stream_rows(results: Results, pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """A row for each (table, kind of stream) that has run: parameters and Grad-CAM's differences."""
    rows = []
    for name, kind in pairs:
        values = results.table(name)
        found = [values.difference(kind, column) for column in ('accuracy', *(f'grad_cam/{m}' for m in MASKED))]
        if found[0] is not None:
            parameters = next(facts['parameters'] for facts in results.streams.values() if facts['kind'] == kind)
            title, seeds = PRODUCT.get(name, STREAMS[kind]), str(len(found[0].values))
            rows.append([title, f'{parameters:,}', *map(bold, found), seeds, str(values.num_images)])
    return rows


def least_loss(results: Results) -> tuple[str, str]:
    """Table and kind of the stream that loses the least accuracy; empty where fewer than two have run."""
    losses = {}
    for name, kind in VARIANTS:
        if (found := results.table(name).difference(kind, 'accuracy')) is not None:
            losses[name, kind] = found.value
    return max(losses, key=lambda pair: losses[pair]) if len(losses) > 1 else ('', '')


def epoch_accuracies(results: Results, kind: str) -> tuple[int, list[str]]:
    """Number of reported streams of a kind, and their mean accuracy after each epoch on the selection images."""
    runs = [
        facts['history']
        for facts in results.streams.values()
        if (facts['kind'], facts['per_class'], facts['classes']) == (kind, None, None)
        and facts['seed'] in results.settings['growth']['seeds']
    ]
    count = min(map(len, runs), default=0)
    return len(runs), [f'{sum(run[i]["accuracy"] for run in runs) / len(runs):.1f}' for i in range(count)]


def growth_rows(results: Results) -> list[list[str]]:
    """Validation accuracy by the number of training images, a row a start."""
    rows = []
    for kind in ('gap_start', 'paper_start'):
        points = dict(growth_points(results, kind))
        texts = [
            f'{sum(points[n]) / len(points[n]):.1f} ({plural(len(points[n]), "seed")})' if n in points else 'not run'
            for n in results.settings['growth']['per_class']
        ]
        if points:
            rows.append([STREAMS[kind], *texts])
    return rows


def last_stage_rows(results: Results) -> list[list[str]]:
    """The smallest stream with the controls of the main one; nothing where it has not run."""
    names = ('placement', 'last_stage_temperatures', 'last_stage_baselines')
    if not set(names) <= results.settings['tables'].keys():
        return []
    plain, fitted, baselines = (results.table(name) for name in names)
    accuracy = plain.difference('s4', 'accuracy')
    if accuracy is None:
        return []
    rows = [['accuracy ↑', bold(accuracy), '', '', '']]
    for m in MASKED:
        left = [excess(plain, baselines, name, m, 's4') for name in BASELINES]
        found = (plain.difference('s4', f'grad_cam/{m}'), fitted.difference('s4', f'grad_cam/{m}'), *left)
        rows.append([METRICS[m].heading, *map(bold, found)])
    return rows


def tried_rows(results: Results) -> list[list[str]]:
    """What was measured with every training setting that was tried."""

    def measured(entry: dict[str, float]) -> list[str]:
        return [*(f'{entry[name]:.1f}' for name in TRIED), f'{entry["temperature"]:.2f}']

    rows = [['GAP', '', *measured(facts['gap']), ''] for facts in [*results.choices.values()][:1]]
    for kind, facts in results.choices.items():
        for entry in facts['tried']:
            taken = 'yes' if entry['recipe'] == facts.get('taken') else ''
            rows.append([STREAMS[kind], settings_text(entry['recipe']), *measured(entry), taken])
    return rows


def changes_of_recipe(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What one more setting changed beside the recipe that was chosen, by the name of the setting."""
    found: dict[str, dict[str, Any]] = {}
    chosen = next((entry for entry in facts.get('tried', []) if entry['recipe'] == facts.get('taken')), None)
    for entry in facts.get('tried', []) if chosen else []:
        changed = {k: v for k, v in entry['recipe'].items() if chosen['recipe'].get(k) != v}
        name = next(iter(changed), '')
        if len(changed) == 1 and name not in ('epochs', 'lr', *found):
            found[name] = {'recipe': changed, **{k: entry[k] - chosen[k] for k in ('accuracy', 'AD', 'AG', 'AI')}}
    return dict(sorted(found.items()))


def missing_rows(results: Results) -> list[list[str]]:
    """Tables that have not run to the end: name, kind of stream, seeds run."""
    rows = []
    for name, plan in results.settings['tables'].items():
        for stream in plan['streams']:
            seeds = len(results.table(name).streams.get(stream, {}))
            if seeds < len(plan['seeds']):
                rows.append([name, STREAMS[stream], f'{seeds} of {len(plan["seeds"])}'])
    return rows


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or a note where there are no rows."""
    rows = [*rows]
    lines = [head, ['---'] * len(head), *rows]
    text = '\n'.join('|' + '|'.join(f' {cell} ' if cell else ' ' for cell in line) + '|' for line in lines)
    return text if rows else 'Not run yet.'


def cells(found: Difference) -> list[str]:
    """Four cells: GAP, CA, the difference with its interval, the verdict."""
    mean = sum(found.ca) / len(found.ca)
    verdict = f'**{found.verdict}**' if found.verdict in ('better', 'worse') else found.verdict
    return [f'{found.gap:.1f}', f'{mean:.1f}', span(found), verdict]


def bold(found: Difference | None) -> str:
    """The difference with its interval, bold where it is better or worse; empty where it has not run."""
    if found is None:
        return ''
    return f'**{span(found)}**' if found.verdict in ('better', 'worse') else span(found)


def span(found: Difference) -> str:
    """`+7.1 [6.0, 8.2]`."""
    low, high = (f'{end:.1f}'.replace('-0.0', '0.0') for end in (found.low, found.high))
    return f'{signed(found.value)} [{low}, {high}]'


def signed(value: float) -> str:
    """`+7.1`, `-0.4`, `0.0`."""
    text = f'{value:+.1f}'
    return '0.0' if text in ('+0.0', '-0.0') else text


def mean_text(values: Table, pooling: str, column: str) -> str:
    """Mean of a column under a pooling, over the seeds under CA; empty where it has not run."""
    runs = [values.gap] if pooling == 'gap' else list(values.streams.get('gap_start', {}).values())
    means = [float(run[column].mean()) for run in runs if run is not None and column in run]
    return f'{sum(means) / len(means):.1f}' if means else ''


def settings_text(recipe: dict[str, Any]) -> str:
    """`epochs 4, lr 0.0001`; a weight decay of 0 is left out."""
    return ', '.join(f'{name} {value}' for name, value in recipe.items() if (name, value) != ('weight_decay', 0.0))


def listed(items: Iterable[str]) -> str:
    """`a, b and c`, or `nothing`."""
    items = list(items)
    return ' and '.join([*filter(None, [', '.join(items[:-1])]), items[-1]]) if items else 'nothing'


def plural(count: int, noun: str) -> str:
    """`1 seed`, `5 seeds`."""
    return f'{count} {noun}' + ('' if count == 1 else 's')


def size_text(values: Table, stream: str = 'gap_start') -> str:
    """`2000 images, 5 seeds`."""
    return f'{values.num_images} images, {plural(len(values.streams.get(stream, {})), "seed")}'


def wrap(text: str, width: int = 120) -> str:
    """Paragraphs and list items in lines of at most `width` characters."""
    paragraphs = re.split(r'\n\s*\n|\n(?=- )', text.strip())
    return '\n\n'.join(_wrapped(paragraph, width) for paragraph in paragraphs).replace('\n\n- ', '\n- ')


def _wrapped(paragraph: str, width: int) -> str:
    indent = '  ' if paragraph.startswith('- ') else ''
    lines = ['']
    # A line that begins with a minus sign would be a list.
    for word in paragraph.replace(' - ', '\0-\0').split():
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append(indent)
        lines[-1] = f'{lines[-1]} {word}' if lines[-1].strip() else f'{lines[-1]}{word}'
    return '\n'.join(lines).replace('\0', ' ')

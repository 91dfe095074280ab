"""Writes docs/evidence.md, its plots and the README's table from the committed results. No figure is typed in."""
from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timm_castream.files import write_whole

from .cells import (
    BOXES,
    CURVES,
    MASKED,
    METHODS,
    METRICS,
    STREAMS,
    against_centre,
    cells,
    excess,
    listed,
    mean_text,
    plural,
    settings_text,
    signed,
    span,
    tried_cells,
    wrap,
)
from .plots import gap_accuracy, growth_points, plot_differences, plot_growth
from .results import Results, Table
from .statistics import Difference

MARKS = ('<!-- evidence: written by make evidence -->', '<!-- end of evidence -->')


def write_page(results: Results, page: Path, readme: Path | None = None) -> None:
    """Writes the page with its plots beside it, and the README's table between its marks.

    Args:
        results: The results.
        page: The Markdown file.
        readme: A README with the two `MARKS`, or None.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    rows = main_differences(results)
    if rows:
        plot_differences(rows, page.with_name(f'{page.stem}_differences.png'))
    if growth_points(results, 'gap_start'):
        plot_growth(results, page.with_name(f'{page.stem}_growth.png'))
    with write_whole(page) as file:
        file.write(page_text(results, page.stem))
    if readme is not None and readme.is_file():
        text = readme.read_text(encoding='utf-8')
        if all(mark in text for mark in MARKS):
            pattern = re.escape(MARKS[0]) + '.*' + re.escape(MARKS[1])
            table = f'{MARKS[0]}\n{readme_text(results)}\n{MARKS[1]}'
            with write_whole(readme) as file:
                file.write(re.sub(pattern, lambda match: table, text, flags=re.DOTALL))


def main_differences(results: Results) -> list[tuple[str, Difference]]:
    """The main figures: name and CA - GAP, of the tables that have run."""
    return [(title, difference) for title, _, difference in main_rows(results)]


def main_rows(results: Results) -> list[tuple[str, Table, Difference]]:
    """The main figures: name, table and CA - GAP, of the tables that have run."""
    main, curves, score_cam = (results.table(name) for name in ('main', 'curves', 'score_cam'))
    columns = [(main, 'accuracy', 'accuracy ↑'), (main, 'prob', 'probability')]
    for method in ('grad_cam', 'grad_cam_pp'):
        columns += [(main, f'{method}/{metric}', f'{METHODS[method]}, {METRICS[metric]}') for metric in MASKED]
        columns += [(curves, f'{method}/{metric}', f'{METHODS[method]}, {METRICS[metric]}') for metric in CURVES]
    columns += [(score_cam, f'score_cam/{metric}', f'Score-CAM, {METRICS[metric]}') for metric in (*MASKED, *CURVES)]
    rows = [(title, table, table.difference('gap_start', column)) for table, column, title in columns]
    return [(title, table, difference) for title, table, difference in rows if difference is not None]


def page_text(results: Results, stem: str = 'evidence') -> str:
    """The page."""
    settings = results.settings
    sections = [f"""# Does it work?

<!-- Written by `python -m benchmarks.evidence --steps page` from benchmarks/evidence_results. Do not edit. -->

{wrap(question(settings))}

## The answer

{answer(results)}

**Better** and **worse** need the 95 % interval of the paired difference on one side of 0 in every seed that has run.
Everything else is "no difference seen".
"""]
    if main_differences(results):
        sections.append(f"""![CA - GAP of every main figure, with the interval of every seed]({stem}_differences.png)
""")
    sections += [state(results), main_section(results), temperature_section(results), baseline_section(results),
                 localisation_section(results),
                 start_section(results, stem), variant_section(results), product_section(results),
                 unseen_section(results)]
    if results.strip():
        sections.append(strip_section(results, stem))
    sections += [choice_section(results), limits_section(results), commands_section(results)]
    return '\n'.join(section for section in sections if section)


def question(settings: dict[str, Any]) -> str:
    """The question and the experiment."""
    return (
        'The paper claims that class activation maps score better under a CA-Stream than under global average pooling '
        '(GAP), at about the same accuracy. Its setting needs eight GPUs. This page asks the question of an experiment '
        f'that two CPU cores can repeat: `{settings["network"]}` with ImageNet weights, frozen; 200 classes of Tiny '
        f'ImageNet at {settings["image_size"]} pixels, {settings["train_per_class"]} training images of each class; '
        'differences paired by image, several seeds.')


def answer(results: Results) -> str:
    """The answer in three sentences, made from the differences."""
    rows = main_rows(results)
    if not rows:
        return 'The main table has not run yet.'
    table, seeds = rows[0][1], len(rows[0][2].values)
    groups: dict[str, list[str]] = {'better': [], 'worse': [], 'no difference seen': []}
    for title, source, difference in rows:
        size = '' if source is table else f' on {source.num_images} images, {plural(len(difference.values), "seed")}'
        if difference.verdict in groups:
            groups[difference.verdict].append(
                f'{title.rstrip(" ↑↓").replace(",", "")} ({signed(difference.value)}{size})')
    first = (f'On {table.num_images} validation images and over {plural(seeds, "seed")} of the stream, CA is better in '
             f'{listed(groups["better"])}.')
    unseen = listed(groups['no difference seen'])
    second = f'It is worse in {listed(groups["worse"])}; no difference is seen in {unseen}.'
    third = ''
    temperatures = results.table('temperatures')
    fair = [(METRICS[m], temperatures.difference('gap_start', f'grad_cam/{m}')) for m in MASKED]
    parts = [f'{name.rstrip(" ↑↓")} {signed(d.value)} ({d.verdict})' for name, d in fair if d is not None]
    if parts:
        size = f'{temperatures.num_images} images, {plural(len(temperatures.streams["gap_start"]), "seed")}'
        third = f' Under fitted temperatures ({size}) the differences of Grad-CAM are {listed(parts)}.'
    fourth = ''
    attention = results.table('attention')
    gains = [(METRICS[m].rstrip(' ↑↓'), attention.difference('gap_start', f'random/{m}'),
              excess(table, attention, 'random', m)) for m in ('average_gain', 'average_increase')]
    parts = [f'{name} by {signed(plain.value)} ({plain.verdict}), which leaves Grad-CAM {signed(left.value)} '
             f'({left.verdict})' for name, plain, left in gains if plain is not None and left is not None]
    if parts:
        fourth = f' But random maps change too: {listed(parts)}.'
    return wrap(f'{first} {second}{third}{fourth}')


def state(results: Results) -> str:
    """Which tables have run, with how many seeds and images."""
    lines = ['## What has run', '', '| table | seeds run | seeds planned | images | images planned |',
             '| --- | --- | --- | --- | --- |']
    for name, plan in results.settings['tables'].items():
        table = results.table(name)
        counts = {len(seeds) for seeds in table.streams.values()}
        missing = len(plan['streams']) - len(table.streams)
        run = '0' if not counts else ' to '.join(map(str, sorted({min(counts), max(counts)})))
        if counts and missing:
            run += f' ({missing} of {len(plan["streams"])} streams not run)'
        lines.append(f'| {name} | {run} | {len(plan["seeds"])} | {table.num_images if table.streams else "not run"} | '
                     f'{plan.get("planned", plan["images"])} |')
    return '\n'.join([*lines, ''])


def main_section(results: Results) -> str:
    """Accuracy, probability and the paper's five metrics."""
    blocks = ['## Main table', '', wrap(
        'GAP and CA read the same frozen network and the same classifier, on the same images; the class explained is '
        'the label. GAP is the same under every seed. The figure of CA and the difference are means over the seeds; in '
        'brackets are the lowest and the highest end of the 95 % intervals of all seeds. Probability is the mean '
        'probability of the label: AG and AI are easier for a network that is less sure. All figures are in percent.'),
        '']
    main, curves, score_cam = (results.table(name) for name in ('main', 'curves', 'score_cam'))
    if main.gap is None:
        return '\n'.join([*blocks, 'Not run yet.', ''])
    rows = [
        ('', 'accuracy ↑', main, main.difference('gap_start', 'accuracy')),
        ('', 'probability', main, main.difference('gap_start', 'prob'))]
    for method in ('grad_cam', 'grad_cam_pp', 'score_cam'):
        sources = ((main, MASKED), (curves, CURVES)) if method != 'score_cam' else ((score_cam, (*MASKED, *CURVES)),)
        rows += [
            (METHODS[method], METRICS[metric], table, table.difference('gap_start', f'{method}/{metric}'))
            for table, metrics in sources for metric in metrics]
    lines = [
        f'| {method} | {metric} | {cells(difference)} | {len(difference.values)} | {table.num_images} |'
        for method, metric, table, difference in rows if difference is not None]
    head = ['| method | metric | GAP | CA | CA - GAP | | seeds | images |',
            '| --- | --- | --- | --- | --- | --- | --- | --- |']
    return '\n'.join([*blocks, *head, *lines, ''])


def temperature_section(results: Results) -> str:
    """The main figures with fitted temperatures beside the plain ones."""
    table, plain = results.table('temperatures'), results.table('main')
    text = wrap(
        'AG and AI ask whether the masked image is more probable than the clean one, so a network that is less sure '
        'gains more easily. Here the logits of each pooling are divided by the temperature that minimises the cross '
        'entropy on images held out of the training images; the saliency maps stay the same.')
    blocks = ['## With fitted temperatures', '', text, '']
    if table.difference('gap_start', 'prob') is None:
        return '\n'.join([*blocks, 'Not run yet.', ''])
    values = [facts['temperature'] for facts in results.facts.values()
              if facts['table'] == 'temperatures' and facts['stream'] is not None]
    gap = results.facts['temperatures-gap']['temperature']
    fitted = ', '.join(f'{value:.2f}' for value in values)
    note = (f'Temperatures: GAP {gap:.2f}, CA {fitted}. {table.num_images} images, '
            f'{plural(len(values), "seed")}. Differences without temperatures are those of the main table.')
    head = ['| method | metric | GAP | CA | CA - GAP | | CA - GAP without |',
            '| --- | --- | --- | --- | --- | --- | --- |']
    lines = []
    for title, column in (('probability', 'prob'), *((METRICS[m], f'grad_cam/{m}') for m in MASKED)):
        difference, other = table.difference('gap_start', column), plain.difference('gap_start', column)
        if difference is not None:
            lines.append(f'| {"Grad-CAM" if "/" in column else ""} | {title} | {cells(difference)} | '
                         f'{span(other) if other else "not run"} |')
    return '\n'.join([*blocks, *head, *lines, '', wrap(note), ''])


def localisation_section(results: Results) -> str:
    """Attention alone and the baselines; SP and EP by the boxes."""
    table, boxes = results.table('attention'), results.table('localisation')
    blocks = ['## Attention alone, and maps that look at nothing', '', wrap(
        'The raw attention of the last stage is a saliency map of its own, the same for every class. `random` is one '
        'random value a location, `centre` a Gaussian in the middle of the image; both under each pooling. A metric '
        'that cannot tell a method from them says little about it. SP: the most salient pixel lies in the box of the '
        'object. EP: share of the saliency inside the box.'), '']
    head = ['| method | pooling | AD ↓ | AG ↑ | AI ↑ | SP ↑ | EP ↑ |', '| --- | --- | --- | --- | --- | --- | --- |']
    lines = []
    for method in METHODS:
        for pooling in ('gap', 'ca'):
            figures = []
            for metric in (*MASKED, *BOXES):
                source = boxes if metric in BOXES else table if method in ('attention', 'random', 'centre') else \
                    results.table('main')
                figures.append(mean_text(source, 'gap_start', pooling, f'{method}/{metric}'))
            if any(figure != '' for figure in figures):
                lines.append(f'| {METHODS[method]} | {pooling.upper()} | ' + ' | '.join(figures) + ' |')
    if not lines:
        return '\n'.join([*blocks, 'Not run yet.', ''])
    note = (f'Attention, random and centre: AD, AG and AI on {table.num_images or "no"} images; SP and EP on '
            f'{boxes.num_images or "no"} images; the CAMs as in the main table. An empty cell has not run.')
    compared = []
    for metric in BOXES:
        difference = boxes.difference('gap_start', f'attention/{metric}', f'grad_cam/{metric}')
        if difference is not None:
            compared.append(f'{METRICS[metric].rstrip(" ↑↓")} of attention is {span(difference)} points from that of '
                            f"GAP's Grad-CAM ({difference.verdict})")
    if compared:
        note += f' {listed(compared)}. Attention - centre: {against_centre(boxes)}.'
    return '\n'.join([*blocks, *head, *lines, '', wrap(note), ''])


def baseline_section(results: Results) -> str:
    """How much of the gain maps that look at nothing have too."""
    main, table = results.table('main'), results.table('attention')
    blocks = ['## The maps, or the network?', '', wrap(
        'AD, AG and AI depend on the map and on how the network takes a masked image. Maps that look at nothing show '
        'the second part alone: their CA - GAP has nothing to do with what a map finds. The last two rows are what is '
        "left of Grad-CAM's CA - GAP, paired by image and seed on the same images."), '']
    rows: list[tuple[str, list[Difference | None]]] = [
        (f'{METHODS[name]}, CA - GAP', [table.difference('gap_start', f'{name}/{m}') for m in MASKED])
        for name in ('random', 'centre')]
    rows += [
        (f"Grad-CAM's CA - GAP less that of {METHODS[name]}", [excess(main, table, name, m) for m in MASKED])
        for name in ('random', 'centre')]
    if any(difference is None for _, row in rows for difference in row):
        return '\n'.join([*blocks, 'Not run yet.', ''])
    lines = [f'| {title} | ' + ' | '.join(f'{span(d)} {d.verdict}' for d in row if d is not None) + ' |'
             for title, row in rows]
    seeds = len(table.streams['gap_start'])
    return '\n'.join([*blocks, '| | AD ↓ | AG ↑ | AI ↑ |', '| --- | --- | --- | --- |', *lines, '',
                      f'{table.num_images} images, {plural(seeds, "seed")}.', ''])


def start_section(results: Results, stem: str) -> str:
    """The two starts: saliency, and accuracy against training images and epochs."""
    blocks = ['## How the stream starts', '', wrap(
        "`stream_init='paper'` draws the stream's weights at random, as the authors do. `stream_init='gap'` starts at "
        'weights under which the logits are those of GAP. Each start has the training settings chosen for it.'), '']
    lines = variant_rows(results, [('main', 'gap_start'), ('initialisation', 'paper_start')])
    blocks += [*VARIANT_HEAD, *lines, ''] if lines else ['Not run yet.', '']
    for kind in ('gap_start', 'paper_start'):
        history = [
            facts['history'] for facts in results.streams.values() if facts['kind'] == kind
            and facts['seed'] in results.settings['growth']['seeds'] and facts['per_class'] is None
            and facts['classes'] is None]
        if history:
            epochs = [f'{sum(run[i]["accuracy"] for run in history) / len(history):.1f}' for i in range(
                min(map(len, history)))]
            blocks += [wrap(f'Accuracy after each epoch, on the selection images, mean over '
                            f'{plural(len(history), "seed")}, {STREAMS[kind]}: {", ".join(epochs)}.'), '']
    points = {kind: growth_points(results, kind) for kind in ('gap_start', 'paper_start')}
    if any(points.values()):
        numbers = results.settings['growth']['per_class']
        blocks += [f'![validation accuracy against training images, for both starts]({stem}_growth.png)', '',
                   '| start | ' + ' | '.join(f'{n} images a class' for n in numbers) + ' |',
                   '| --- |' + ' --- |' * len(numbers)]
        for kind, found in points.items():
            at = dict(found)
            row = [f'{sum(at[n]) / len(at[n]):.1f} ({plural(len(at[n]), "seed")})' if n in at else 'not run'
                   for n in numbers]
            blocks.append(f'| {STREAMS[kind]} | ' + ' | '.join(row) + ' |')
        gap = gap_accuracy(results)
        blocks += ['', wrap('Validation accuracy in percent; fewer images have more epochs, so that each stream has as '
                            f'many steps. GAP: {gap:.1f}.' if gap else ''), '']
    return '\n'.join(blocks)


VARIANT_HEAD = ['| stream | parameters | accuracy CA - GAP | AD ↓ CA - GAP | AG ↑ CA - GAP | AI ↑ CA - GAP | seeds | '
                'images |', '| --- | --- | --- | --- | --- | --- | --- | --- |']


def variant_section(results: Results) -> str:
    """Placement, block and class specific streams: the paper's supplementary tables 3 to 5."""
    blocks = ["## The paper's tables 3, 4 and 5: block, placement, class specific", '', wrap(
        'Grad-CAM, CA - GAP. The first row is the stream of the main table. Bold: the interval of every seed is on one '
        'side of 0.'), '']
    variants = [('main', 'gap_start'), *(('placement', f's{i}') for i in range(1, 5)), ('block', 'proj_ca'),
                ('class_specific', 'class_specific')]
    lines = variant_rows(results, variants)
    missing = [STREAMS[kind] for table, kind in variants
               if kind in results.settings['streams'] and kind not in results.table(table).streams]
    blocks += [*VARIANT_HEAD, *lines, ''] if lines else []
    if missing:
        blocks += [f'Not run yet: {listed(missing)}.', '']
    return '\n'.join(blocks)


def variant_rows(results: Results, variants: Iterable[tuple[str, str]]) -> list[str]:
    """A row for each kind of stream that has run: parameters and Grad-CAM's differences."""
    rows = []
    for name, kind in variants:
        table = results.table(name)
        found = [table.difference(kind, column) for column in ('accuracy', *(f'grad_cam/{m}' for m in MASKED))]
        if found[0] is None:
            continue
        parameters = next(facts['parameters'] for facts in results.streams.values() if facts['kind'] == kind)
        text = ['' if d is None else f'**{span(d)}**' if d.verdict in ('better', 'worse') else span(d) for d in found]
        title = 'castream train -c own_data.yaml' if name == 'product' else STREAMS[kind]
        rows.append(f'| {title} | {parameters:,} | ' + ' | '.join(text)
                    + f' | {len(found[0].values)} | {table.num_images} |')
    return rows


def product_section(results: Results) -> str:
    """The product's own commands beside the cached maps."""
    blocks = ["## The product's own way", '', wrap(
        "The same images, network and classifier through `castream train`: timm's loop, its augmentation, and the "
        'recipe for data of your own, beside the stream of the main table, which was trained on cached maps.'), '']
    if 'product' not in results.settings['tables']:
        return ''
    if not results.table('product').streams:
        return '\n'.join([*blocks, 'Not run yet.', ''])
    return '\n'.join([*blocks, *VARIANT_HEAD, *variant_rows(
        results, [('main', 'gap_start'), ('product', 'gap_start')]), ''])


def unseen_section(results: Results) -> str:
    """The paper's Figure 2: attention on classes that the stream was not trained on."""
    table = results.table('unseen_classes')
    blocks = ["## The paper's Figure 2: classes that the stream never saw", '', wrap(
        'A stream trained on every second class, its raw attention on images of the others. The frozen network and its '
        'classifier were trained on all classes.'), '']
    lines = [
        f'| {METHODS[method]} | ' + ' | '.join(
            mean_text(table, 'gap_start', 'ca', f'{method}/{metric}') for metric in BOXES) + ' |'
        for method in ('attention', 'random', 'centre') if table.streams]
    if not lines:
        return '\n'.join([*blocks, 'Not run yet.', ''])
    seeds = len(table.streams['gap_start'])
    return '\n'.join([*blocks, '| map | SP ↑ | EP ↑ |', '| --- | --- | --- |', *lines, '', wrap(
        f'{table.num_images} images, {plural(seeds, "seed")}. Attention - centre: {against_centre(table)}.'), ''])


def strip_section(results: Results, stem: str) -> str:
    """Photographs that may be published."""
    facts = results.strip()
    assert facts is not None
    return '\n'.join(['## Photographs', '', f'![{facts["columns"]}]({stem}_strip.jpg)', '', wrap(
        f'{facts["columns"]}. The photographs are scikit-learn\'s. Stream: {STREAMS[facts["stream"]]}, seed '
        f'{facts["seed"]}. Grad-CAM explains the class that GAP predicts: {listed(facts["classes"])}.'), ''])


def choice_section(results: Results) -> str:
    """What was tried, on held-out training images."""
    rule = results.settings['choice']
    blocks = ['## Settings tried', '', wrap(
        f'Chosen on {results.settings["select_per_class"]} held-out training images of each class, never on validation '
        f'images. Settings more than {rule["accuracy_margin"]} points less accurate than GAP are left out; where none '
        'is left, the most accurate one is taken. The score of the others is AG + AI - AD of Grad-CAM on '
        f'{rule["images"]} of these images under fitted temperatures. Of the scores within {rule["score_margin"]} of '
        'the best the one with the fewest epochs is taken. That margin was set when these figures were known, before '
        'saliency was measured on any validation image.'), '']
    if results.classifier is not None:
        best = max(entry['selection_accuracy'] for entry in results.classifier['tried'])
        blocks += [wrap(
            f"The classifier under GAP starts from ImageNet's rows of these classes and is fitted to the training "
            f'images first, then frozen: {results.classifier["selection_accuracy_before"]:.1f} to {best:.1f} % on the '
            f'selection images, with {settings_text(results.classifier["taken"])}. Without that step, adaptation to '
            '64-pixel images would look like a gain of the stream.'), '']
    if results.choices:
        blocks += ['| stream | setting | accuracy | probability | AD ↓ | AG ↑ | AI ↑ | temperature | taken |',
                   '| --- | --- | --- | --- | --- | --- | --- | --- | --- |']
        gap = next(iter(results.choices.values()))['gap']
        blocks.append(f'| GAP | | {tried_cells(gap)} | |')
    for kind, facts in results.choices.items():
        for entry in facts['tried']:
            taken = 'yes' if entry['recipe'] == facts.get('taken') else ''
            blocks.append(
                f'| {STREAMS[kind]} | {settings_text(entry["recipe"])} | {tried_cells(entry)} | {taken} |')
    return '\n'.join([*blocks, ''])


def limits_section(results: Results) -> str:
    """What the experiment cannot show."""
    return '\n'.join(['## Limits of the claim', '', wrap(
        'One network, one data set, upsampled 64-pixel images, a frozen network, no augmentation of pixels: the maps '
        'of the training images are computed once and kept in float16. The network was trained with GAP, on these '
        'classes among others. A network that is nearly always right and sure leaves little to gain in AG and AI. The '
        'paper trains for 90 epochs on all of ImageNet; nothing here repeats that.'), ''])


def commands_section(results: Results) -> str:
    """The commands, machine, seeds and hours."""
    made = [facts['made_by'] for facts in (*results.facts.values(), *results.streams.values())]
    versions = sorted({f'torch {m["torch"]}, timm {m["timm"]}, timm_castream {m["timm_castream"]}' for m in made})
    machines = sorted({m['machine'] for m in made})
    return '\n'.join(['## Run it', '', '<!-- not run: needs Tiny ImageNet and hours -->', '```bash', 'wget http://cs231n.stanford.edu/tiny-imagenet-200.zip',
                      'unzip -q tiny-imagenet-200.zip', 'make evidence DATA=tiny-imagenet-200', '```', '', wrap(
        "The network's weights come from timm's usual download; `--backbone-checkpoint` names a file instead. "
        '`--network` and `--data-dir` ask the question of another network and of your own `train/CLASS`, `val/CLASS`. '
        'A killed run goes on where it was. `python -m benchmarks.evidence --steps page` writes this page again. '
        'All settings are in `benchmarks/evidence/settings.yaml`; the values of every image, and the command, machine '
        'and seconds behind them, in `benchmarks/evidence_results`.'), '', wrap(
        (f'Training and evaluation behind this page: {results.seconds() / 3600:.1f} hours of processes with '
         f'{listed(machines)} each, beside other work; {listed(versions)}.') if made else 'Nothing has run yet.'), ''])


def readme_text(results: Results) -> str:
    """The README's table: the main figures and the answer."""
    lines = ['| | GAP | CA | CA - GAP | | seeds | images |', '| --- | --- | --- | --- | --- | --- | --- |']
    lines += [f'| {title} | {cells(difference)} | {len(difference.values)} | {table.num_images} |'
              for title, table, difference in main_rows(results)]
    return '\n'.join([answer(results), '', *lines])

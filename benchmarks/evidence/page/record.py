"""What stands behind the tables: what is missing, settings tried, limits, commands; and the photographs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..results import Results
from .cells import NOT_RUN, STREAMS, listed, section, settings_text, signed, table, wrap

TRIED = ('accuracy', 'probability', 'AD', 'AG', 'AI')


def missing_section(results: Results) -> str:
    """The tables that have not run to the end; nothing where all have."""
    rows = []
    for name, plan in results.settings['tables'].items():
        runs = results.table(name)
        for stream in plan['streams']:
            seeds = len(runs.streams.get(stream, {}))
            if seeds < len(plan['seeds']):
                rows.append([name, STREAMS[stream], f'{seeds} of {len(plan["seeds"])}'])
    return section('What has not run yet', table(['table', 'stream', 'seeds run'], rows)) if rows else ''


def strip_section(results: Results, stem: str) -> str:
    """Photographs that may be published."""
    facts = results.strip()
    if facts is None:
        return ''
    return section(
        'Photographs',
        f'![{facts["columns"]}]({stem}_strip.jpg)',
        wrap(
            f'{facts["columns"]}. The photographs come with scikit-image and scikit-learn. Stream: '
            f'{STREAMS[facts["stream"]]}, seed {facts["seed"]}, {facts["pixels"]} pixels. Grad-CAM explains the class that '
            f'GAP predicts: {listed(facts["classes"])}.'
        ),
    )


def choice_section(results: Results) -> str:
    """What was tried, on held-out training images."""
    rule = results.settings['choice']
    blocks = [
        wrap(
            f'Chosen on {results.settings["select_per_class"]} held-out training images of each class, never on validation '
            f'images. Settings more than {rule["accuracy_margin"]} points less accurate than GAP are left out; where none '
            'is left, the most accurate one is taken. The score of the others is AG + AI - AD of Grad-CAM on '
            f'{rule["images"]} of these images under fitted temperatures. Of the scores within {rule["score_margin"]} of '
            'the best the one with the fewest epochs is taken. Only the first three settings of the main stream were '
            'tried before its first validation images were seen; the others came later and changed nothing of it.'
        )
    ]
    if results.classifier is not None:
        best = max(entry['selection_accuracy'] for entry in results.classifier['tried'])
        blocks.append(
            wrap(
                f"The classifier under GAP starts from ImageNet's rows of these classes and is fitted to the training "
                f'images first, then frozen: {results.classifier["selection_accuracy_before"]:.1f} to {best:.1f} % on the '
                f'selection images, with {settings_text(results.classifier["taken"])}. Without that step, adaptation to '
                '64-pixel images would look like a gain of the stream.'
            )
        )
    if not results.choices:
        return section('Settings tried', *blocks, NOT_RUN)
    rows = [['GAP', '', *tried_cells(next(iter(results.choices.values()))['gap']), '']]
    for kind, facts in results.choices.items():
        rows += [
            [
                STREAMS[kind],
                settings_text(entry['recipe']),
                *tried_cells(entry),
                'yes' if entry['recipe'] == facts.get('taken') else '',
            ]
            for entry in facts['tried']
        ]
    head = ['stream', 'setting', 'accuracy', 'probability', 'AD ↓', 'AG ↑', 'AI ↑', 'temperature', 'taken']
    return section('Settings tried', *blocks, table(head, rows), lessons(results.choices.get('gap_start', {})))


def tried_cells(entry: Mapping[str, float]) -> list[str]:
    """Cells of the table of settings tried."""
    return [*(f'{entry[name]:.1f}' for name in TRIED), f'{entry["temperature"]:.2f}']


def lessons(facts: Mapping[str, Any]) -> str:
    """What one more setting changes beside the recipe taken: a sentence for each that was tried alone."""
    names = {name for entry in facts.get('tried', []) for name in entry['recipe']} - {'epochs', 'lr'}
    changes = {name: change_of_recipe(facts, name) for name in sorted(names)}
    sentences = [
        f'With {settings_text(change["recipe"])}: '
        + listed([f'{name} {signed(change[name])}' for name in ('accuracy', 'AD', 'AG', 'AI')])
        + '.'
        for change in changes.values()
        if change
    ]
    return (
        wrap('What one change of the recipe of the main stream does, on the selection images. ' + ' '.join(sentences))
        if sentences
        else ''
    )


def change_of_recipe(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What was measured with one more setting, less what was measured with the recipe taken.

    Args:
        facts: The settings tried of a kind of stream.
        name: Of the setting, which alone differs.

    Returns:
        `recipe`, the setting alone, and the differences of accuracy, AD, AG, AI; empty where that was not tried.
    """
    taken = next((entry for entry in facts.get('tried', []) if entry['recipe'] == facts.get('taken')), None)
    for entry in facts.get('tried', []) if taken else []:
        changed = {k: v for k, v in entry['recipe'].items() if taken['recipe'].get(k) != v}
        if set(changed) == {name}:
            return {'recipe': changed, **{k: entry[k] - taken[k] for k in ('accuracy', 'AD', 'AG', 'AI')}}
    return {}


def limits_section() -> str:
    """What the experiment cannot show."""
    return section(
        'Limits of the claim',
        wrap(
            'One network, one data set, upsampled 64-pixel images, a frozen network, no augmentation of pixels: the maps '
            'of the training images are computed once and kept in float16. The network was trained with GAP, on these '
            'classes among others. A network that is nearly always right and sure leaves little to gain in AG and AI. The '
            'paper trains for 90 epochs on all of ImageNet; nothing here repeats that.'
        ),
    )


def commands_section(results: Results) -> str:
    """The commands, machine, seeds and hours."""
    made = [facts['made_by'] for facts in (*results.facts.values(), *results.streams.values())]
    versions = sorted({f'torch {m["torch"]}, timm {m["timm"]}, timm_castream {m["timm_castream"]}' for m in made})
    machines = sorted({m['machine'] for m in made})
    commands = '\n'.join(
        [
            '<!-- not run: needs Tiny ImageNet and hours -->',
            '```bash',
            'wget http://cs231n.stanford.edu/tiny-imagenet-200.zip',
            'unzip -q tiny-imagenet-200.zip',
            'make evidence DATA=tiny-imagenet-200',
            '```',
        ]
    )
    seconds = results.seconds() + sum(results.of_size(name).seconds() for name in results.settings.get('sizes', {}))
    return section(
        'Run it',
        commands,
        wrap(
            'The last command repeats everything in the folder `evidence_work` and writes the page there. A killed run '
            "goes on where it was. The network's weights come from timm's usual download; `--backbone-checkpoint` names a "
            'file instead. `--network` and `--data-dir` ask the question of another network and of your own `train/CLASS`, '
            '`val/CLASS`. `python -m benchmarks.evidence --steps page` writes this page again from the committed values. '
            'All settings are in `benchmarks/evidence/settings.yaml`; the values of every image, and the command, machine '
            'and seconds behind them, in `benchmarks/evidence_results`.'
        ),
        wrap(
            (
                f'Training and evaluation behind this page: {seconds / 3600:.1f} hours of processes with {listed(machines)} '
                f'each; {listed(versions)}.'
            )
            if made
            else 'Nothing has run yet.'
        ),
    )

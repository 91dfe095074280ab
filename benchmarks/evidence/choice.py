"""Chooses the training settings of each kind of stream on images held out of the training images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from timm_castream.evaluate import evaluate
from timm_castream.evaluation.calibration import fit_temperature
from timm_castream.fitting.training import accuracy

from .setup import Setup, read_json

MASKED = ('average_drop', 'average_gain', 'average_increase')
BATCH = 32


def choose(setup: Setup, kind: str) -> dict[str, Any]:
    """Trains a stream of this kind with each of the settings tried, and takes one by the rule of the settings file.

    Every try is written as it ends; a second call resumes after a kill. Returns the recipe taken.
    """
    rule = setup.settings['choice']
    path = setup.results_dir / 'choices' / f'{kind}.json'
    facts = read_json(path) if path.is_file() else {}
    measured = {'images': rule['images'], 'seed': rule['seed']}
    if not measured.items() <= facts.get('rule', {}).items():
        facts = {'gap': _summary(setup, setup.gap_model(), 'gap'), 'tried': []}
    facts['rule'] = measured | {'accuracy_margin': rule['accuracy_margin'], 'score_margin': rule['score_margin']}
    for candidate in rule['tried'][kind]:
        recipe = {'weight_decay': rule['weight_decay']} | candidate
        if not any(entry['recipe'] == recipe for entry in facts['tried']):
            name = f'choice-{kind}-' + '-'.join(f'{k}{v}' for k, v in recipe.items())
            model, training = setup.stream(kind, rule['seed'], recipe, name)
            entry = {'recipe': recipe, **_summary(setup, model, 'ca'), 'seconds': training['seconds']}
            facts['tried'].append(entry)
            setup.write(path, facts)
    taken = take(facts['tried'], facts['gap']['accuracy'] - rule['accuracy_margin'], rule['score_margin'])
    if taken != facts.get('taken'):
        setup.write(path, facts | {'taken': taken})
    return taken


def take(tried: Sequence[dict[str, Any]], least_accuracy: float, score_margin: float) -> dict[str, Any]:
    """The recipe that the rule of the settings file takes.

    Args:
        tried: The settings tried, with what was measured.
        least_accuracy: In percent; less accurate settings are taken only where no other is left.
        score_margin: Scores AG + AI - AD that differ by no more are equal; then fewer epochs win.
    """

    def score(entry: dict[str, Any]) -> float:
        return entry['AG'] + entry['AI'] - entry['AD']

    fair = [entry for entry in tried if entry['accuracy'] >= least_accuracy]
    if not fair:
        return max(tried, key=lambda entry: entry['accuracy'])['recipe']
    best = max(map(score, fair))
    equal = [entry for entry in fair if score(entry) >= best - score_margin]
    return min(equal, key=lambda entry: (entry['recipe']['epochs'], -score(entry)))['recipe']


def recipe_of(setup: Setup, kind: str) -> dict[str, Any]:
    """The training settings of a kind of stream: chosen for it, or for the kind that it is `like`."""
    return choose(setup, setup.settings['streams'][kind].get('like', kind))


def run_growth(setup: Setup, streams: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> None:
    """Trains every stream of `growth` in the settings; each ends as `streams/NAME.json`, with its accuracies.

    With fewer images an epoch has fewer steps; the number of epochs grows to keep the number of steps. Streams on all
    images are those of the tables.

    Args:
        setup: The run.
        streams, seeds: Only these. None: those of the settings.
    """
    growth, everything = setup.settings['growth'], setup.settings['train_per_class']
    for seed in seeds or growth['seeds']:
        for kind in streams or growth['streams']:
            chosen = recipe_of(setup, kind)
            for count in growth['per_class']:
                recipe = chosen | {'epochs': round(chosen['epochs'] * everything / count)}
                name, per_class = (f'{kind}-{seed}', None) if count == everything else (f'{kind}-{seed}-{count}', count)
                setup.stream(kind, seed, recipe, name, per_class)


def _summary(setup: Setup, model: Any, pooling: str) -> dict[str, float]:
    """Accuracy and temperature on all selection images; AD, AG and AI of Grad-CAM on some, under the temperature."""
    logits, labels = setup.logits(model, 'selection'), setup.labels('selection')
    temperature = {pooling: fit_temperature(logits, labels)}
    loader, count = DataLoader(setup.images('selection'), BATCH), setup.settings['choice']['images']
    report = evaluate(
        model,
        loader,
        ('grad_cam',),
        (pooling,),
        metrics=MASKED,
        num_samples=count,
        temperature=temperature,
        progress=True,
    )
    scores = [report[pooling, 'grad_cam', metric].value for metric in MASKED]
    return {
        'accuracy': accuracy(logits, labels),
        'temperature': temperature[pooling],
        **dict(zip(('AD', 'AG', 'AI'), scores, strict=True)),
        'probability': report.confidence[pooling].value,
    }

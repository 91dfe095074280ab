"""Folders of Hub repositories and their model cards."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save, save_file
from states import make_model, same, snapshot
from torch.utils.data import DataLoader, TensorDataset

import timm_castream
from timm_castream.evaluate import evaluate
from timm_castream.hub import repository as publish
from timm_castream.hub import stream_file as weights

pytest_plugins = ('hub_server',)

GAP_REPOSITORY = 'timm/test_resnet.r160_in1k'


def run_snippet(card: str) -> dict:
    names: dict = {}
    exec(re.search(r'```python\n(.*?)```', card, re.DOTALL)[1], names)  # the card's own usage example
    return names


class TestFolders:
    @pytest.mark.parametrize(
        'args',
        [
            {},
            {'stream_class_specific': True, 'stream_start': 2},
            {'stream_stages': ['layer2', 'layer4'], 'in_chans': 1},
            {'output_stride': 8},
        ],
        ids=str,
    )
    def test_folder_loads_bit_for_bit_as_local_dir(self, args, tmp_path):
        model = make_model(num_classes=5, **args)
        publish.write_repository(model, tmp_path / 'net', 'org/net')
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            loaded = make_model(f'local-dir:{tmp_path / "net"}', pretrained=True, seed=1)
        assert same(snapshot(model), snapshot(loaded))
        assert loaded.castream_config == model.castream_config
        x = torch.rand(2, args.get('in_chans', 3), 64, 64)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), loaded.eval()(x))

    def test_config_names_the_variant_and_the_stream_and_not_how_it_was_trained(self, tmp_path):
        gap = timm.create_model('test_resnet', num_classes=5)
        save_file(gap.state_dict(), tmp_path / 'gap.safetensors')
        model = make_model(
            num_classes=5, freeze_backbone=True, backbone_checkpoint=tmp_path / 'gap.safetensors', stream_start=2
        )
        publish.write_repository(model, tmp_path / 'net', 'org/net')
        config = json.loads((tmp_path / 'net' / 'config.json').read_text())
        assert config['architecture'] == 'test_resnet_castream'
        assert (config['num_classes'], config['num_features']) == (5, 96)
        assert not {'freeze_backbone', 'backbone_pretrained', 'backbone_checkpoint'} & config['model_args'].keys()
        assert config['model_args'].items() >= model.castream_config.items()
        assert config['pretrained_cfg']['hf_hub_filename'] == 'model.safetensors'
        assert make_model(f'local-dir:{tmp_path / "net"}', pretrained=True).conv1[0].weight.requires_grad

    def test_attached_model_is_published_under_the_name_of_its_variant(self, tmp_path):
        model = timm_castream.attach(timm.create_model('test_resnet', num_classes=5), stream_start=1)
        publish.write_repository(model, tmp_path / 'net', 'org/net')
        loaded = make_model(f'local-dir:{tmp_path / "net"}', pretrained=True, seed=1)
        assert same(snapshot(model), snapshot(loaded))

    def test_attached_model_without_a_variant_publishes_its_stream_alone(self, hub, monkeypatch):
        is_model = timm.is_model  # as for an architecture that was registered after timm_castream was imported
        monkeypatch.setattr(timm, 'is_model', lambda name: is_model(name) and name != 'test_efficientnet_castream')
        gap = timm.create_model('test_efficientnet')
        hub.add('timm/test_efficientnet.r160_in1k', model__safetensors=save(gap.state_dict()))
        model = timm_castream.attach(timm.create_model('test_efficientnet', pretrained=True))
        with pytest.raises(ValueError, match=r'No model is registered as test_efficientnet_castream.*stream_only=True'):
            timm_castream.push_to_hub(model, 'org/net')
        assert 'org/net' not in hub.repositories
        timm_castream.push_to_hub(model, 'org/net', stream_only=True)
        loaded = run_snippet(hub.repositories['org/net'].files['README.md'].decode())['model']
        assert same(snapshot(model), snapshot(loaded))

    def test_channels_last_weights_are_saved_as_they_are(self, tmp_path):
        model = make_model(num_classes=5).to(memory_format=torch.channels_last)
        publish.write_repository(model, tmp_path / 'net', 'org/net')
        assert same(snapshot(model), load_file(tmp_path / 'net' / 'model.safetensors'))


class TestCard:
    metrics = {
        'accuracy': {'gap': 74.55, 'ca': 74.7},
        'titles': {
            'methods': {'grad_cam': 'Grad-CAM', 'score_cam': 'Score-CAM'},
            'metrics': {'average_drop': 'Average Drop', 'average_gain': 'Average Gain', 'insertion': 'Insertion'},
        },
        'rows': [
            {
                'pooling': 'gap',
                'method': 'grad_cam',
                'accuracy': 74.55,
                'average_drop': 13.04,
                'average_drop_low': 12.9,
                'average_gain': 17.56,
            },
            {'pooling': 'ca', 'method': 'score_cam', 'average_drop': 7.09, 'insertion': 74.91},
        ],
    }

    def test_card_has_the_hubs_metadata_and_the_measured_figures(self, tmp_path):
        publish.write_repository(
            make_model(num_classes=5), tmp_path / 'net', 'org/net', metrics=self.metrics, dataset='org/birds'
        )
        card = ModelCard.load(tmp_path / 'net' / 'README.md')
        assert (card.data.license, card.data.library_name) == ('apache-2.0', 'timm')
        assert card.data.datasets == ['org/birds']
        assert {'image-classification', 'timm', 'castream'} <= set(card.data.tags)
        measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
        assert measured == {
            'Top-1 accuracy, GAP': 74.55,
            'Top-1 accuracy, CA': 74.7,
            'Average Drop, Grad-CAM, GAP': 13.04,
            'Average Gain, Grad-CAM, GAP': 17.56,
            'Average Drop, Score-CAM, CA': 7.09,
            'Insertion, Score-CAM, CA': 74.91,
        }
        assert card.data.eval_results[0].dataset_name == 'org/birds'
        for name, value in measured.items():
            assert f'| {name} | {value} |' in card.text

    @pytest.fixture
    def evaluation(self, tmp_path):
        """A model, its report, and the evaluation.json that `castream evaluate` leaves."""
        model = make_model(num_classes=5)
        images = TensorDataset(torch.rand(3, 3, 64, 64), torch.arange(3))
        report = evaluate(
            model,
            DataLoader(images, batch_size=3),
            ['grad_cam'],
            output_dir=tmp_path / 'evaluation',
            arguments={'dataset': 'digits', 'split': 'validation'},
        )
        return model, report, json.loads((tmp_path / 'evaluation' / 'evaluation.json').read_text())

    def test_figures_of_a_real_evaluation_say_of_which_images_they_are(self, evaluation, tmp_path):
        model, report, metrics = evaluation
        publish.write_repository(model, tmp_path / 'net', 'org/net', metrics=metrics, dataset='org/birds')
        card = ModelCard.load(tmp_path / 'net' / 'README.md')
        result = {r.metric_name: r for r in card.data.eval_results}['Average Drop, Grad-CAM, CA']
        assert f'{result.metric_value:.2f} [' in str(report['ca', 'grad_cam', 'average_drop'])
        assert f'| Average Drop, Grad-CAM, CA | {result.metric_value} |' in card.text
        assert (result.dataset_name, result.dataset_split) == ('digits', 'validation')
        assert card.data.datasets == ['org/birds']
        assert 'measured on 3 images of digits, validation (`castream evaluate --target truth' in card.text
        difference = report.difference('grad_cam', 'average_drop')
        assert '| Average Drop, Grad-CAM, CA-GAP | {:+.2f} [{:+.2f}, {:+.2f}] |'.format(*difference) in card.text
        assert not any('CA-GAP' in r.metric_name for r in card.data.eval_results)
        assert {'Mean probability, GAP', 'Mean probability, CA'} <= {r.metric_name for r in card.data.eval_results}

    def test_an_evaluation_of_0_2_which_has_no_titles_names_its_metrics_by_their_keys(self, evaluation, tmp_path):
        model, _, metrics = evaluation
        del metrics['titles']
        publish.write_repository(model, tmp_path / 'net', 'org/net', metrics=metrics)
        value = round(metrics['rows'][0]['average_drop'], 2)
        assert f'| Average Drop, grad_cam, GAP | {value} |' in (tmp_path / 'net' / 'README.md').read_text()

    def test_methods_and_metrics_of_an_evaluation_are_named_by_their_tables(self, tmp_path):
        model = make_model(num_classes=5)
        images = TensorDataset(torch.rand(2, 3, 64, 64), torch.arange(2))
        evaluate(
            model,
            DataLoader(images, batch_size=2),
            {'random': 'random', 'mine': lambda x, target: x},
            output_dir=tmp_path / 'evaluation',
            metrics=('average_drop', 'average_gain'),
        )
        metrics = json.loads((tmp_path / 'evaluation' / 'evaluation.json').read_text())
        publish.write_repository(model, tmp_path / 'net', 'org/net', metrics=metrics)
        text = (tmp_path / 'net' / 'README.md').read_text()
        for name in ('Average Drop, Random, GAP', 'Average Gain, Random, CA', 'Average Drop, mine, CA'):
            assert f'| {name} | ' in text

    def test_figures_of_other_weights_are_refused_before_anything_is_written(self, evaluation, tmp_path):
        model, _, metrics = evaluation
        with torch.no_grad():
            model.castream.cls_token[0, 0] += 1
        with pytest.raises(ValueError, match='measured with other weights than those to publish'):
            publish.write_repository(model, tmp_path / 'net', 'org/net', metrics=metrics)
        assert not (tmp_path / 'net').exists()

    def test_mean_average_precision_of_multi_label_data_is_named_so(self, tmp_path):
        publish.write_repository(make_model(), tmp_path, 'org/net', metrics={'mAP': {'gap': 78.32, 'ca': 78.35}})
        results = ModelCard.load(tmp_path / 'README.md').data.eval_results
        assert [(r.metric_type, r.metric_name, r.metric_value) for r in results] == [
            ('mAP', 'Mean average precision, GAP', 78.32),
            ('mAP', 'Mean average precision, CA', 78.35),
        ]
        assert 'model(x).sigmoid()' in (tmp_path / 'README.md').read_text()

    @pytest.mark.parametrize('metrics', [{'settings': {}}, {}, [1], {'rows': [{'average_drop': 1}]}], ids=str)
    def test_metrics_without_a_figure_are_refused_before_anything_is_written(self, metrics, tmp_path):
        with pytest.raises(ValueError, match='no values of `castream evaluate`'):
            publish.write_repository(make_model(), tmp_path / 'net', 'org/net', metrics=metrics)
        assert not (tmp_path / 'net').exists()

    def test_card_cites_the_paper_says_what_it_is_and_names_the_import(self, tmp_path):
        model = make_model()
        publish.write_repository(model, tmp_path / 'net', 'org/net')
        card = ModelCard.load(tmp_path / 'net' / 'README.md')
        assert card.data.datasets == ['imagenet-1k'] and card.data.eval_results is None
        for text in (
            '@inproceedings{',
            'Torres, Felipe',
            'https://arxiv.org/abs/2404.14996',
            '`import timm_castream`',
            weights.fingerprint(model),
            '`test_resnet`',
        ):
            assert text in card.text
        assert '{{' not in card.text and '{%' not in card.text

    def test_usage_example_of_a_model_of_other_image_channels_runs(self, hub):
        model = make_model(num_classes=5, in_chans=6)
        timm_castream.push_to_hub(model, 'org/net')
        names = run_snippet(hub.repositories['org/net'].files['README.md'].decode())
        assert same(snapshot(model), snapshot(names['model']))
        assert names['probabilities'].shape == (1, 5)

    @pytest.mark.parametrize('stream_only', [False, True])
    def test_usage_example_of_the_card_runs(self, hub, stream_only):
        hub.add(GAP_REPOSITORY, model__safetensors=save(timm.create_model('test_resnet').state_dict()))
        model = make_model(backbone_pretrained=True)
        timm_castream.push_to_hub(model, 'org/net', stream_only)
        names = run_snippet(hub.repositories['org/net'].files['README.md'].decode())
        assert same(snapshot(model), snapshot(names['model']))
        assert names['probabilities'].shape == (1, 1000) and len(names['maps']) == 5

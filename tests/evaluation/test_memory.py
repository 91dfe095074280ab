"""Memory stays flat over many batches."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own: other tests leave tensors behind, and threads of other libraries make and drop some.
EVALUATION = """
import gc, json
import timm, torch
from torch.utils.data import DataLoader, Dataset
import timm_castream
from timm_castream.evaluate import evaluate

class Images(Dataset):
    def __getitem__(self, index):
        return torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index)), index % 10

    def __len__(self):
        return 400

model = timm_castream.attach(timm.create_model('test_resnet', num_classes=10).eval())

def gradient(x, target):
    x.requires_grad_()
    return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0]

alive = []

def count(done, means):
    if done % 100 == 50:
        gc.collect()
        # By the type itself: isinstance asks proxies of other libraries, and a FakeTensor has no elements.
        tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
        images = [value for value in tensors if value.shape[-3:] == (3, 64, 64)]
        others = len(tensors) - len(images)
        elements = sum(value.numel() for value in tensors) - sum(value.numel() for value in images)
        alive.append({'done': done, 'images': len(images), 'others': others, 'elements': elements})

report = evaluate(
    model,
    DataLoader(Images(), 2),
    {'grad_cam': 'grad_cam', 'gradient': gradient},
    metrics=('average_drop',),
    batch_size=8,
    engine='torch',
    on_batch=count,
)
columns = len(report.values.images) + len(report.values.pairs)
print(json.dumps({'alive': alive, 'columns': columns}))
"""


@pytest.mark.slow
def test_of_a_batch_of_images_nothing_stays_but_a_number_a_column() -> None:
    done = subprocess.run([sys.executable, '-c', EVALUATION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    alive, columns = result['alive'], result['columns']
    assert [entry['done'] for entry in alive] == [50, 150, 250, 350]
    for later, earlier in zip(alive[1:], alive, strict=False):
        # What is read ahead differs: up to three batches, each two images, their stack and their two labels.
        assert abs(later['images'] - earlier['images']) <= 3 * 3, alive
        # The values of 50 batches: an array of two numbers a column.
        assert abs(later['others'] - earlier['others'] - 50 * columns) <= 3, alive
        assert abs(later['elements'] - earlier['elements'] - 100 * columns) <= 3 * 2, alive

"""Threads, exceptions, copies, compilers, checkpointing and memory: what a stream survives."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from streams import BACKBONES, SMALL, STAGES, gradients
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from timm_castream import attention_maps, class_labels, detach, forward_both, pooling
from timm_castream.attribution import attribute_all
from timm_castream.backbones import stream_pass


def test_concurrent_forwards_from_threads_do_not_meet(make_model):
    model = make_model('test_resnet')
    images = [torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    with torch.no_grad():
        expected = [model(image) for image in images]
    assert all(not torch.allclose(expected[0], other) for other in expected[1:])
    barrier = threading.Barrier(8)

    def work(i: int) -> bool:
        barrier.wait()
        with torch.no_grad():
            return all(torch.equal(model(images[i]), expected[i]) for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))  # and raises what a thread raised


def test_a_forward_that_raises_half_way_leaves_no_trace(make_model, x):
    model = make_model('test_resnet')
    expected = model(x)

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyError('half way')

    handle = model.layer3.register_forward_pre_hook(fail)
    for call in (model, lambda image: attention_maps(model, image), lambda image: forward_both(model, image)):
        with pytest.raises(KeyError):
            call(3 * x)
    handle.remove()
    assert stream_pass._open.stream_pass is None
    model.layer1(torch.randn(1, 32, 8, 8))  # a stage on its own
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('name', BACKBONES)
def test_a_deep_copy_has_a_stream_of_its_own(name, make_model, x):
    model = make_model(name)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.castream.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    with pooling(twin, 'gap'):
        assert torch.equal(model(x), expected)
    detach(twin)
    assert torch.equal(model(x), expected)


def test_timms_ema_follows_the_stream(make_model, x):
    from timm.utils import ModelEmaV3

    model = make_model('test_resnet')
    ema = ModelEmaV3(model, decay=0.0)
    with torch.no_grad():
        for parameter in model.castream.parameters():
            parameter.mul_(2.0)
    ema.update(model)
    assert torch.equal(ema.module(x), model(x))


@pytest.mark.slow
def test_pickles_load_in_a_fresh_process(make_model, x, tmp_path):
    models = {name: make_model(name, stream_heads=2) for name in BACKBONES}
    with torch.no_grad():
        expected = {name: model(x) for name, model in models.items()}
    for name, model in models.items():
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected[name])
    torch.save(models, tmp_path / 'models.pt')
    torch.save((x, expected), tmp_path / 'expected.pt')
    code = '\n'.join(
        [
            'import sys, torch',
            'torch.set_num_threads(1)',
            "models = torch.load(sys.argv[1] + '/models.pt', weights_only=False)",
            "x, expected = torch.load(sys.argv[1] + '/expected.pt')",
            'with torch.no_grad():',
            '    assert all(torch.allclose(m(x), expected[n], rtol=1e-4, atol=1e-5) for n, m in models.items())',
            'import timm_castream',
            "assert callable(timm_castream.attach) and isinstance(models['test_resnet'].castream, timm_castream.CAStream)",
            "assert len(timm_castream.attention_maps(models['swin'], x)) == 4",
        ]
    )
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('name', BACKBONES)
def test_torch_compile_makes_one_graph(name, make_model, x):
    model = make_model(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert torch.equal(compiled(x), model(x))
    assert torch.equal(compiled(2 * x), model(2 * x))
    compiled(x).square().sum().backward()
    assert model.castream.cls_token.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_blocks_compiled_one_by_one_are_not_compiled_for_every_batch(name, make_model):
    model = make_model(name)
    batches = [
        torch.randn(size, 3, 64, 64, generator=torch.Generator().manual_seed(size)) for size in (1, 2, 3, 5, 7, 8)
    ]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    torch.compiler.reset()
    blocks = model.blocks if name == 'test_vit' else [model.layer1, model.layer2, model.layer3, model.layer4]
    for block in blocks:
        block.compile(backend='eager')
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # where torch would warn and go without
        with torch.no_grad():
            got = [model(batch) for batch in batches]
        attribute_all(model, batches[2], ('grad_cam', 'attention'), target=1)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_torch_compile_follows_pooling_and_serves_class_specific_streams(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert torch.equal(compiled(x), model(x))
    with pooling(model, 'gap'):
        assert torch.equal(compiled(x), model(x))
    with class_labels(compiled, torch.tensor([3, 4])):
        assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('strict', [False, True])
def test_torch_export_keeps_the_stream(name, strict, make_model, x):
    model = make_model(name)
    exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(exported(2 * x), model(2 * x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', [*SMALL, 'test_vit'])
def test_onnx_runs_the_same(name, make_model, x, tmp_path):
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime runs the exported file')
    pytest.importorskip('onnxscript', reason='torch.onnx exports through onnxscript')
    model = make_model(name)
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True, input_names=['x'], verbose=False)
    session = runtime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    (out,) = session.run(None, {'x': (2 * x).numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(2 * x).detach(), rtol=1e-3, atol=1e-4)


def test_torch_jit_trace_records_the_stream(make_model, x):
    model = make_model('test_resnet')
    torch.testing.assert_close(torch.jit.trace(model, (x,))(2 * x), model(2 * x), rtol=1e-4, atol=1e-5)


def test_torchscript_and_fx_say_that_they_cannot_follow(make_model):
    model = make_model('test_resnet')
    with pytest.raises(RuntimeError, match='TorchScript cannot script a CA-Stream'):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match='FX symbolic tracing cannot follow a CA-Stream'):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('args', [{}, {'freeze_backbone': True}, {'stream_class_specific': True}])
@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, args, reentrant, make_model, x):
    plain = make_model(name, **args).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    set_reentrant_ckpt(reentrant)
    try:
        for model in (plain, checkpointed):
            with class_labels(model, torch.tensor([1, 2])):
                model(x.double().requires_grad_()).square().sum().backward()
    finally:
        set_reentrant_ckpt(False)
    expected = gradients(plain)
    assert expected['castream.cls_token'].abs().sum() > 0
    for key, value in gradients(checkpointed).items():
        assert (value is None) == (expected[key] is None), key
        if value is not None:
            torch.testing.assert_close(value, expected[key], rtol=1e-8, atol=1e-12, msg=key)


def track_maps(model: nn.Module, name: str) -> tuple[list[StorageWeakRef], list[list[bool]]]:
    """The storages of the stages' maps, and at each stage which of those before are gone."""
    refs: list[StorageWeakRef] = []
    gone: list[list[bool]] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        gone.append([ref.expired() for ref in refs])
        refs.append(StorageWeakRef(output.untyped_storage()))

    for stage in STAGES[name]:
        model.get_submodule(stage).register_forward_hook(hook)
    return refs, gone


@pytest.mark.parametrize('name', BACKBONES)
def test_no_feature_map_is_kept_alive_for_the_stream(name, make_model, x):
    model = make_model(name)
    refs, gone = track_maps(model, name)
    with torch.no_grad():
        with pooling(model, 'gap'):
            model.forward_features(x)
        plain = gone.copy()
        gone.clear()
        refs.clear()
        features = model.forward_features(x)
        assert gone == plain and any(gone[-1])  # some networks hold their stem's output for themselves
        assert all(ref.expired() for ref in refs[:-1]) and not refs[-1].expired()
        model.forward_head(features)
        del features
        assert refs[-1].expired()


def test_class_specific_inference_alone_keeps_maps_until_gap_has_predicted(make_model, x):
    model = make_model('test_resnet', stream_class_specific=True)
    refs, gone = track_maps(model, 'test_resnet')
    with torch.no_grad():
        features = model.forward_features(x)
        assert not any(gone[-1])
        assert all(ref.expired() for ref in refs[:-1])
        refs.clear()
        gone.clear()
        with class_labels(model, torch.tensor([0, 1])):
            features = model.forward_features(x)
        assert features is not None and all(gone[-1][:-1])


@pytest.mark.parametrize('args', [{}, {'freeze_backbone': True}, {'stream_class_specific': True}])
def test_training_leaves_no_map_behind_even_without_garbage_collection(args, make_model, x):
    model = make_model('test_resnet', **args).train()
    refs, _ = track_maps(model, 'test_resnet')
    gc.disable()
    try:
        with class_labels(model, torch.tensor([0, 1])):
            features = model.forward_features(x)
            logits = model.forward_head(features)
        logits.sum().backward()
        del features, logits
        assert all(ref.expired() for ref in refs)
    finally:
        gc.enable()


def test_replicas_of_data_parallel_run_their_own_weights(make_model, x):
    model = make_model('test_resnet')
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)

    # What torch.nn.parallel.replicate does, without the devices: new modules, weights as plain tensors.
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            replica._modules[key] = None if child is None else replicas[child]
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, (parameter * 1.5).view_as(parameter))
    expected = model(x)
    torch.testing.assert_close(replicas[model](x), changed(x))
    assert not torch.allclose(expected, changed(x))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('half_way', [False, True])
@pytest.mark.parametrize('mode', ['ca', 'gap'])
def test_a_castream_teacher_inside_a_castream_student(half_way, mode, make_model, x):
    student, teacher = make_model('test_resnet'), make_model('test_convnext')
    student.teacher = teacher
    seen = []

    def teach(*args: Any) -> None:
        with pooling(teacher, mode):
            seen.extend((teacher(x), teacher.forward_intermediates(x)[0]))

    expected = student(x), teacher(x)
    teach()
    if half_way:
        student.layer2.register_forward_hook(teach)
    else:
        teach()
    assert torch.equal(student(x), expected[0])
    assert len(seen) == 4 and torch.equal(seen[2], seen[0]) and torch.equal(seen[3], seen[1])
    detach(student)
    assert torch.equal(teacher(x), expected[1])


def test_a_replaced_stage_is_noticed(make_model, x):
    model = make_model('test_resnet')
    model.layer3 = nn.Conv2d(48, 192, 3, 2, 1)
    with pytest.raises(RuntimeError, match=r'3 stages ran and 4 are hooked.*layer3'):
        model(x)


def test_streams_survive_sync_batchnorm(make_model, x):
    from timm.layers import convert_sync_batchnorm

    for name in ('test_resnet', 'test_efficientnet'):
        model = make_model(name, freeze_backbone=True)
        expected = model(x)
        model = convert_sync_batchnorm(model)
        norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert norms
        torch.testing.assert_close(model(x), expected)
        assert not any(norm.training for norm in model.train().modules() if isinstance(norm, nn.SyncBatchNorm))

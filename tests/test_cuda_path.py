"""What runs on a GPU, on CUDA tensors without data (FakeTensorMode): for machines that have none.

Caught: operators whose tensors lie on two devices, copies between host and device and values that the host
reads (.item(), a boolean mask) inside a training step, but not what a backward pass or a generator does.
PyTorch must be a build with CUDA; no card is needed.
"""
import importlib
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import train_fast_imagenet as fast
from common import Attack, UserError

CUDA = torch.device("cuda:0")
SMALL = ["--dataset", "synthetic", "--depth", "10", "--width", "1", "--batch-size", "32", "--steps", "1",
         "--epochs", "1", "--device", "cuda:0", "--compile", "off", "--eval-size", "40", "--test-size", "40",
         "--out", "unused"]
FEW = common.synthetic(n_train=80, n_test=40)
COPIES = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
pytestmark = pytest.mark.skipif(torch.version.cuda is None or torch.__version__.startswith(("2.6.", "2.7.")),
                                reason="a PyTorch built without CUDA, or whose fake tensors abort")


class OneDevice(TorchDispatchMode):
    """Fails at an operator whose tensors lie on more than one device; a CPU scalar counts in copies only."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device for tensor in tensors if tensor.dim() or function in COPIES}
        assert len(devices) < 2, f"{function} between {devices}"
        return result


@pytest.fixture
def trained(monkeypatch):
    """A seeming GPU. Parameters put into this list get gradients from `backward`."""
    trained = []

    def grad(outputs, inputs, **_):  # the engine would ask for the device itself
        inputs = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        return [torch.empty_like(tensor) for tensor in inputs]

    def backward(_):
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)

    def move(model, device, memory_format=torch.preserve_format):  # Module.to swaps tensors: fake ones refuse
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = parameter.detach().to(device)
                    if moved.dim() == 4:
                        moved = moved.to(memory_format=memory_format)
                    module._parameters[name] = torch.nn.Parameter(moved)
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.to(device)
        return model

    def fused_sgd(*lists, **_):  # has no fake kernel
        for tensors in zip(*lists):
            assert len({(tensor.device, tensor.dtype, tensor.shape) for tensor in tensors}) == 1

    for name, value in {
            "torch.autograd.grad": grad, "torch.Tensor.backward": backward, "torch.nn.Module.to": move,
            "torch._fused_sgd_": fused_sgd, "torch.cuda.get_rng_state": lambda *_: torch.zeros(16).byte(),
            "torch.cuda.set_rng_state": lambda *_: None, "torch.cuda.is_bf16_supported": lambda: True,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False}.items():
        monkeypatch.setattr(name, value)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield trained


class Recorder:
    """A run folder without files, for one epoch."""
    log, folder, trained = [], Path("unused"), None

    def __init__(self, args, data, /, model, **parts):
        self.trained[:] = model.parameters()

    def epochs(self):
        return [1]

    def record(self, images, **scalars):
        assert all(scalar.device == CUDA for scalar in scalars.values())

    def end_epoch(self, **values):
        assert values["n"] * values["natural_accuracy"] == 1  # see `on_the_device`

    def finish(self, test, attack=None):
        assert test()["local_lipschitzness"] == 1


def on_the_device(monkeypatch, stream):
    """Two batches of a stream, each step under OneDevice; then what evaluations do is allowed.

    They read values, for which there is 1, or True, if they lie on the device.
    """
    for _ in range(2):
        with OneDevice():
            yield next(stream)
    monkeypatch.setattr(torch.Tensor, "item", lambda value: float(value.device == CUDA))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda value: value.device == CUDA)


def watched(monkeypatch, trained):
    """Let a script's loop take a few steps, and record nothing."""
    batches = common.batches
    monkeypatch.setattr(common, "batches", lambda *a: on_the_device(monkeypatch, batches(*a)))
    monkeypatch.setattr(common, "synthetic", lambda: FEW)
    monkeypatch.setattr(common, "Run", Recorder)
    monkeypatch.setattr(Recorder, "trained", trained)
    monkeypatch.setattr(common, "report_attack", lambda eps, norm, step=0: Attack(steps=1, restarts=2))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("method, extra", [("trades", []), ("trades", ["--arch", "densenet", "--width", "4"]),
                                           ("at", ["--arch", "preact", "--depth", "10", "--width", "1/8"]),
                                           ("awp", ["--warmup", "0"])])
def test_training_and_evaluation_stay_on_the_device(trained, monkeypatch, method, extra, precision):
    watched(monkeypatch, trained)
    importlib.import_module(f"train_{method}").main([*SMALL, "--precision", precision, *extra])


@pytest.mark.parametrize("beta", ["1", "2"])
def test_fast_at_stays_on_the_device(trained, monkeypatch, beta):
    class Images:
        """Images that are on the device already."""
        classes, hash = list("abcdefghij"), ""

        def __len__(self):
            return 8

    def batches(images, phase, order, args, device, seed=()):
        batch = torch.rand(4, 3, phase.crop, phase.crop, device=CUDA), torch.zeros(4, device=CUDA).long()
        return on_the_device(monkeypatch, iter([batch] * 2)) if seed else iter([batch])

    watched(monkeypatch, trained)
    monkeypatch.setattr(fast, "batches", batches)
    monkeypatch.setattr(fast, "load", lambda args: (Images(), Images()))
    monkeypatch.setattr(fast, "evaluation_attack", lambda *a: Attack(steps=1))
    fast.main(["DIR", "--width", "1/16", "--batch-sizes", "4", "4", "4", "--crops", "64", "64", "64",
               "--device", "cuda:0", "--compile", "off", "--precision", "bf16", "--beta", beta])


LACKS = {  # what a user's machine may lack: what is found there, what is said
    "a new card": ("torch.cuda.get_device_capability", lambda _: (6, 1), "compute capability 7.0"),
    "Triton": ("importlib.util.find_spec", lambda _: None, "Triton is missing"),
    "a compiler": ("shutil.which", lambda _: None, "a C compiler is missing; install gcc"),
    "headers": ("sysconfig.get_path", lambda *_: "/nowhere", "Python.h is missing"),
    "bf16": ("torch.cuda.is_bf16_supported", lambda **_: False, "fp32 is used"),
    "nothing": ("torch.version.hip", None, "")}


@pytest.mark.parametrize("lack", LACKS)
def test_a_gpu_that_lacks_something_is_used_as_well_as_it_can_be(monkeypatch, capsys, tmp_path, lack):
    (tmp_path / "Python.h").touch()
    all_there = {"torch.cuda.get_device_capability": lambda _: (7, 5), "importlib.util.find_spec": str,
                 "shutil.which": str, "sysconfig.get_path": lambda *_: tmp_path, "torch.version.hip": None,
                 "torch.cuda.is_bf16_supported": lambda **_: True, "torch.compiler.reset": lambda: None,
                 "torch.nn.Module.compile": lambda *_, **how: compiled.append(how)}
    compiled, (name, found, said) = [], LACKS[lack]
    for name, value in {**all_there, name: found}.items():
        monkeypatch.setattr(name, value)
    common.warn.cache_clear()
    model, images = common.WideResNet(10, 1, 10), Namespace(device=CUDA)
    common.set_execution(args := Namespace(precision="auto", compile="auto"), images, model)
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == (lack != "nothing")
    assert args.precision == ("fp32" if lack == "bf16" else "bf16")
    assert bool(compiled) == (lack in ("bf16", "nothing"))
    if not compiled:
        with pytest.raises(UserError, match=f"--compile on: .*{said}"):
            common.set_execution(Namespace(precision="auto", compile="on"), images, model)

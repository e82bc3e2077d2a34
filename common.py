"""What every experiment shares: data, models, attacks, schedules, metrics and run bookkeeping.

No method lives here. A training script reads top to bottom as its experiment and calls this file for everything
that is not the method. Images are [N, 3, H, W]: uint8 while stored on the device, float32 in [0, 1] once batched.
"""
import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

MONITOR_ATTACK = {"step_size": 0.007, "steps": 20}  # every epoch, as the paper's training code does
REPORT_ATTACK = {"step_size": 0.003, "steps": 20}   # the numbers that are reported


class UserError(Exception):
    """A mistake of the user's: `launch` prints it as one line and ends with exit status 2."""


# ---------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    x_train: torch.Tensor  # [N, 3, H, W] uint8, on the device
    y_train: torch.Tensor  # [N] int64
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int

    def test_subset(self, n):
        """Indices of n random test images, the same ones in every run; of all of them, in order, if n is None."""
        if n is None:
            return torch.arange(len(self.x_test))
        return torch.randperm(len(self.x_test), generator=torch.Generator().manual_seed(0))[:n]


def load_data(name, data_dir, device, train_size=None, seed=0):
    """The data set `name` as a `Data` on `device`.

    DATA_DIR/NAME.npz if it is there (x_train, y_train, x_test, y_test; images uint8 [N, H, W, 3], the layout Keras
    uses); else "synthetic" is generated, and "cifar10" and "cifar100" come from torchvision, which downloads them.
    `train_size` keeps a random subset of the training images, drawn with `seed`. Raises UserError.
    """
    path = Path(data_dir) / f"{name}.npz"
    if path.exists():
        arrays, source = _read_npz(path), str(path)
    elif name == "synthetic":
        arrays, source = synthetic(), "synthetic"
    elif name in ("cifar10", "cifar100"):
        arrays, source = _torchvision_cifar(name, data_dir, path), str(data_dir)
    else:
        raise UserError(f"no data set {name!r}: {path} is missing; the built-in names are cifar10, cifar100, synthetic")
    x_train, y_train, x_test, y_test = _checked(arrays, source)
    classes = {"cifar10": 10, "cifar100": 100}.get(name, int(y_train.max()) + 1)
    if max(y_train.max(), y_test.max()) >= classes or min(y_train.min(), y_test.min()) < 0:
        raise UserError(f"{source}: labels must lie in 0..{classes - 1}")
    if train_size:
        if train_size > len(x_train):
            raise UserError(f"--train-size {train_size}: {source} has {len(x_train)} training images")
        subset = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(seed))[:train_size].numpy()
        x_train, y_train = x_train[subset], y_train[subset]
    return Data(*to_tensors(x_train, y_train, device), *to_tensors(x_test, y_test, device), classes)


def to_tensors(x, y, device):
    """uint8 [N, H, W, 3] and integer [N] arrays → [N, 3, H, W] (channels_last in memory) and int64 [N] on the device."""
    images = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
    return images.to(device), torch.from_numpy(y.astype(np.int64)).to(device)


def _read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; it needs x_train, y_train, x_test, y_test") from None
    except Exception as error:  # truncated and foreign files fail in many ways, from zipfile, zlib or numpy
        raise UserError(f"{path} cannot be read as a NumPy .npz file: {error}") from None


def _checked(arrays, source):
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or len(x) == 0:
            raise UserError(f"{source}: x_{split} must be uint8 [N, H, W, 3], not {x.dtype} {list(x.shape)}")
        if y.shape == (len(x), 1):  # Keras keeps CIFAR's labels as a column
            y = arrays[f"y_{split}"] = y[:, 0]
        if not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
            raise UserError(f"{source}: y_{split} must be {len(x)} integers, not {y.dtype} {list(y.shape)}")
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise UserError(f"{source}: training and test images differ in size")
    return (arrays[key] for key in ("x_train", "y_train", "x_test", "y_test"))


def _torchvision_cifar(name, data_dir, npz):
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        splits = [dataset(str(data_dir), train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, no space, a broken archive: urllib, OSError or RuntimeError
        raise UserError(f"no {npz} or {Path(data_dir) / dataset.base_folder}, and the download failed ({error}); "
                        f"put the data there, or try --dataset synthetic") from None
    return {f"{letter}_{split}": array for split, part in zip(("train", "test"), splits)
            for letter, array in (("x", part.data), ("y", np.array(part.targets)))}


def synthetic(n_train=5000, n_test=500, seed=0):
    """Ten classes of 32×32 images: a bold cue that is only sometimes right, faint ones that are (Tsipras et al. 2019).

    On grey noise lie a square of one of ten colours, amplitude 0.25 and right 80 % of the time, and two class textures:
    one fainter than ε = 0.031 and always right, one a little stronger than ε and right 90 % of the time. Plain training
    lives on the first texture and is not robust at all; the larger β, the more a network relies on the square. Returns
    the arrays of an .npz (`load_data`).
    """
    rng = np.random.default_rng(seed)
    corners = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(27, 3)
    colours = rng.permutation(corners[corners.any(1)])[:10]                                    # [10, 3]
    tiles = rng.choice([-1.0, 1.0], (2, 10, 4, 2, 3))
    textures = np.tile(np.concatenate([tiles, tiles[:, :, :, ::-1]], 3), (8, 8, 1))            # mirror-symmetric

    def split(n):
        y = rng.integers(0, 10, n)

        def shown(right):  # the class that a cue shows
            return np.where(rng.random(n) < right, y, rng.integers(0, 10, n))

        x = 0.5 + rng.normal(0, 0.02, (n, 32, 32, 3))
        for amplitude, right, texture in zip((0.025, 0.045), (1.0, 0.9), textures):
            x += amplitude * texture[shown(right)]
        (top, left), pixel = rng.integers(4, 17, (2, n, 1)), np.arange(32)
        rows, columns = (pixel >= top) & (pixel < top + 12), (pixel >= left) & (pixel < left + 12)
        x += (rows[:, :, None] & columns[:, None, :])[..., None] * 0.25 * colours[shown(0.8)][:, None, None, :]
        return np.uint8(np.clip(x, 0, 1) * 255 + 0.5), y

    x_train, y_train = split(n_train)
    x_test, y_test = split(n_test)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def to_float(images):
    """uint8 [N, 3, H, W] → float32 in [0, 1], the same values as torchvision's ToTensor."""
    return images.to(torch.float32).div_(255)


def crop_flip(images, top, left, flip, padding=4):
    """Crop each image at its own offset out of the zero-padded image, and mirror those with `flip`.

    images [N, 3, H, W]; top, left [N] in 0..2·padding (`padding` is the centre); flip [N] bool.
    """
    n, _, height, width = images.shape
    rows = top[:, None] + torch.arange(height, device=images.device)                           # [N, H]
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)         # [N, W]
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)                                  # [N, H+2p, W+2p, 3]
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_crop_flip(images, padding=4):
    """Random crop (zero padding) and horizontal flip, drawn for each image by itself, on the images' device."""
    n, device = len(images), images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, n), device=device)
    return crop_flip(images, top, left, torch.rand(n, device=device) < 0.5, padding)


def batches(x, y, batch_size, augment=True):
    """One epoch: x uint8 [N, 3, H, W] and y [N] in a fresh order, as (float32 in [0, 1], labels) batches.

    All batches have the same size, so that compiled code sees one shape: what is left over after the last full
    batch is dropped, other images each epoch. Nothing here waits for the device.
    """
    order = torch.randperm(len(x), device=x.device)
    for index in order.split(batch_size)[:steps_per_epoch(len(x), batch_size)]:
        images = x[index]
        yield to_float(random_crop_flip(images) if augment else images), y[index]


def steps_per_epoch(n, batch_size):
    return max(n // batch_size, 1)


# -------------------------------------------------------------------------------------------------------- models


def conv_bn(conv, bn, x):
    """bn(conv(x)), conv without bias; in eval mode one convolution, with the BatchNorm folded into its weights."""
    if bn.training:
        return bn(conv(x))
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    return F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), bn.bias - bn.running_mean * scale, conv.stride, conv.padding)


class _Block(nn.Module):
    """Pre-activation basic block of a WideResNet (Zagoruyko & Komodakis 2016)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = self.convShortcut(out) if hasattr(self, "convShortcut") else x
        return shortcut + self.conv2(F.relu(conv_bn(self.conv1, self.bn2, out), inplace=True))


class _DenseLayer(nn.Module):
    """Bottleneck layer of a DenseNet-BC (Huang et al. 2017): adds `growth_rate` channels to its input."""

    def __init__(self, inputs, growth_rate):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, x):
        out = conv_bn(self.conv1, self.bn2, F.relu(self.bn1(x), inplace=True))
        return torch.cat([x, self.conv2(F.relu(out, inplace=True))], 1)


class _Transition(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x), inplace=True)), 2)


class _Stage(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x):
        return self.layer(x)


class Network(nn.Module):
    """Images [N, 3, H, W] in [0, 1] → logits [N, classes]; a subclass gives `conv1`, `stages()`, `bn1` and `fc`.

    With `precision = "bf16"` the convolutions between the first and the classifier run in bfloat16. Pixels and
    logits stay float32: in bfloat16 the step of a pixel near 1 is 0.004, an eighth of ε.
    """

    precision = "fp32"

    def forward(self, x):
        x = self.conv1(x)
        if self.precision == "bf16":
            with torch.autocast(x.device.type, torch.bfloat16):
                x = self.features(x.bfloat16()).float()
        else:
            x = self.features(x)
        return self.fc(x.mean((2, 3)))

    def features(self, x):
        for stage in self.stages():
            x = stage(x)
        return F.relu(self.bn1(x), inplace=True)

    def initialize(self):
        """He et al. 2015, fan-out, as in the networks that TRADES publishes."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)


class WideResNet(Network):
    """WideResNet-depth-width for small images; depth = 6n + 4. Parameter names are those of the TRADES release."""

    def __init__(self, depth, width, classes):
        super().__init__()
        n = _layers_per_stage(depth)
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        for i, stride in enumerate((1, 2, 2)):
            blocks = [_Block(channels[i + (j > 0)], channels[i + 1], 1 if j else stride) for j in range(n)]
            self.add_module(f"block{i + 1}", _Stage(blocks))
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], classes)
        self.initialize()

    def stages(self):
        return self.block1, self.block2, self.block3


class DenseNet(Network):
    """DenseNet-BC-depth with growth rate k for small images; depth = 6n + 4, compression 0.5, first conv 2k."""

    def __init__(self, depth, growth_rate, classes):
        super().__init__()
        n, channels = _layers_per_stage(depth), 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for i in (1, 2, 3):
            layers = [_DenseLayer(channels + j * growth_rate, growth_rate) for j in range(n)]
            self.add_module(f"block{i}", _Stage(layers))
            channels += n * growth_rate
            if i < 3:
                self.add_module(f"trans{i}", _Transition(channels, channels // 2))
                channels //= 2
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)
        self.initialize()

    def stages(self):
        return self.block1, self.trans1, self.block2, self.trans2, self.block3


def _layers_per_stage(depth):
    if depth < 10 or depth % 6 != 4:
        raise UserError(f"--depth {depth}: depth must be 6n + 4, such as 10, 16, 28, 34 or 40")
    return (depth - 4) // 6


def build_model(arch, depth, width, classes):
    """A freshly initialised network: arch "wrn" (width = widening factor) or "densenet" (width = growth rate)."""
    return {"wrn": WideResNet, "densenet": DenseNet}[arch](depth, width, classes)


def load_weights(model, state, source):
    """Load a state_dict of our own or the published layout into `model`; UserError if it is another network's.

    A `module.` prefix (DataParallel) and the unused `sub_block1.*` of the TRADES networks are dropped.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
    own = model.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong = [key for key in wrong if not key.endswith("num_batches_tracked")] + [key for key in state if key not in own]
    if wrong:
        raise UserError(f"{source} holds another network: {len(wrong)} of its parameters are missing, unknown or of "
                        f"another shape, {wrong[0]} first; check --arch, --depth, --width and the classes")
    model.load_state_dict(state, strict=False)


def pick_device(name):
    """"auto" → CUDA if there is one, else the CPU; UserError if the device asked for is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("cpu and cuda are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: no such device here ({str(error).splitlines()[0]})") from None
    return device


def pick_precision(choice, device):
    """"auto" → "bf16" where the hardware multiplies bfloat16 natively, else "fp32"."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    native = [getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if any(native) else "fp32"


def execute(model, device, precision="auto", compile="auto"):
    """Decide how `model` runs on `device`, in place; returns what was picked, e.g. "bf16, channels_last, eager".

    The only place that decides it. "fp32" without compilation is the exact reference: no TF32.
    """
    model.precision = pick_precision(precision, device)
    model.to(device, memory_format=torch.channels_last)
    compiled = device.type == "cuda" if compile == "auto" else compile == "on"
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if compiled:
        torch.compiler.reset()  # makes room: few graphs are kept for all the networks of a process together
        model.compile(dynamic=False)
    return f"{model.precision}, channels_last, {'compiled' if compiled else 'eager'}"


# ------------------------------------------------------------------------------------------------------- attacks


def cross_entropy_to(y):
    """The attack loss of adversarial training and of every report: cross-entropy of labels y [N], summed."""
    return lambda logits: F.cross_entropy(logits, y, reduction="sum")


def kl_to(p):
    """TRADES' attack loss: KL(p ‖ softmax(logits)) of clean probabilities p [N, classes], summed."""
    return lambda logits: F.kl_div(F.log_softmax(logits, 1), p, reduction="sum")


def margin_to(y):
    """The Carlini-Wagner margin: the best wrong logit minus the right one, summed."""
    def loss(logits):
        wrong = logits.scatter(1, y[:, None], -math.inf).amax(1)
        return (wrong - logits.gather(1, y[:, None])[:, 0]).sum()
    return loss


@contextlib.contextmanager
def attack_mode(model):
    """Eval mode and frozen parameters, so that gradients go to the input alone; both as found afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


def clean_probabilities(model, x):
    """softmax of the clean logits [N, classes], eval mode, no gradient: computed once for a whole attack."""
    with attack_mode(model), torch.no_grad():
        return model(x).softmax(1)


def perturb_start(x, start, eps, norm):
    """A copy of x moved to where an attack starts: "uniform" in the ε-ball, "gaussian" (0.001·N(0, 1)), "none"."""
    if start == "gaussian":
        return x + 0.001 * torch.randn(x.shape, device=x.device, dtype=x.dtype)
    if start == "none":
        return x.clone()
    if norm == "linf":
        return x + eps * (2 * torch.rand(x.shape, device=x.device, dtype=x.dtype) - 1)
    direction = torch.randn(x.shape, device=x.device, dtype=x.dtype)
    radius = torch.rand(len(x), device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
    return x + eps * _per_image(radius / direction.flatten(1).norm(dim=1)) * direction


def project(x_adv, x, eps, norm):
    """The nearest point to x_adv in the ε-ball around x (ℓ∞ or ℓ2), then clamped to [0, 1] (x itself is inside)."""
    if norm == "linf":
        return torch.clamp(x_adv, (x - eps).clamp_(min=0), (x + eps).clamp_(max=1))
    delta = x_adv - x
    length = delta.flatten(1).norm(dim=1)
    return (x + delta * _per_image((eps / length.clamp(min=1e-12)).clamp(max=1))).clamp_(0, 1)


def _per_image(values):
    return values.view(-1, 1, 1, 1)


def pgd(model, x, loss, *, eps, step_size, steps, start="uniform", norm="linf", gradient_norm=None):
    """Projected gradient ascent on `loss` in the ε-ball around x and in [0, 1] (Madry et al. 2018).

    x [N, 3, H, W] in [0, 1]; loss maps logits [N, classes] to a scalar, a sum over images (`cross_entropy_to`,
    `kl_to`, `margin_to` or any callable). Each step adds step_size times the gradient's sign (ℓ∞) or the gradient
    scaled to unit length (ℓ2), then projects. Returns x̂, the last iterate, detached. The model runs in eval mode;
    its mode, gradients and buffers are afterwards as before. `gradient_norm` [N], if given, is raised in place to
    the largest ‖∇_x̂ loss‖₁ met at each image: the paper's training-time proxy of local Lipschitzness.
    """
    x_adv = perturb_start(x, start, eps, norm)
    with attack_mode(model), torch.enable_grad():
        for _ in range(steps):
            x_adv.requires_grad_()
            gradient, = torch.autograd.grad(loss(model(x_adv)), x_adv)
            with torch.no_grad():
                if gradient_norm is not None:
                    torch.maximum(gradient_norm, gradient.abs().sum((1, 2, 3)), out=gradient_norm)
                if norm == "linf":
                    ascent = gradient.sign()
                else:
                    ascent = gradient / _per_image(gradient.flatten(1).norm(dim=1).clamp(min=1e-12))
                x_adv = project(x_adv + step_size * ascent, x, eps, norm)
    return x_adv if steps else project(x_adv, x, eps, norm)


# ----------------------------------------------------------------------------------------------------- schedules


def learning_rate(schedule, base, epoch, epochs, milestones=(75, 90, 100)):
    """The rate of `epoch`, counted from 1, out of `epochs`.

    "exp-decay" (the paper, App. C) halves the rate every 1/100 of the run, at least every epoch, from 3/4 of it on:
    base·0.5^(e - 74) from epoch 75 of 100. "step" multiplies by 0.1 from each of `milestones`, percent of the run
    (75, 90, 100: TRADES). "cosine" is base·0.5·(1 + cos(π(e - 1)/E)) (RST).
    """
    if schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
    if schedule == "step":
        return base * 0.1 ** sum(100 * epoch >= milestone * epochs for milestone in milestones)
    if 4 * epoch < 3 * epochs:
        return base
    return base * 0.5 ** (1 + 25 * (4 * epoch - 3 * epochs) // max(epochs, 100))


# ------------------------------------------------------------------------------------------------------- metrics


def padded_batches(x, y, batch_size):
    """(float images, labels, n) over all of x, y in order; the last batch is padded to full size, n images count.

    In eval mode an image does not see its neighbours, so padding changes nothing, and compiled code sees one shape. A CPU,
    where time goes with the number of images, is spared the padding if all of them together are fewer than a batch.
    """
    for i in range(0, len(x), batch_size):
        images, labels = x[i:i + batch_size], y[i:i + batch_size]
        n = len(images)
        if n < batch_size and (i > 0 or x.is_cuda):
            fill = torch.arange(batch_size, device=x.device) % n
            images, labels = images[fill], labels[fill]
        yield to_float(images), labels, n


@contextlib.contextmanager
def fixed_seed(seed, device):
    """Random numbers drawn inside start from `seed`; the outer streams go on as if nothing had happened."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def exact_precision(model):
    """Run a `Network` in float32 inside."""
    precision, model.precision = model.precision, "fp32"
    try:
        yield
    finally:
        model.precision = precision


def three_metrics(y, natural, adversarial):
    """The paper's metrics (Section 3) from labels y [N] and the predictions f(x), f(x̂) [N], as fractions of all N.

    A point is robust exactly when it is correct and stable: robust ≤ min(natural, stability).
    """
    n = len(y)
    return {"n": n, "natural_accuracy": (natural == y).sum().item() / n,
            "robust_accuracy": ((natural == y) & (adversarial == natural)).sum().item() / n,
            "perturbation_stability": (adversarial == natural).sum().item() / n}


def evaluate(model, x, y, *, eps, step_size, steps, start="uniform", norm="linf", loss=cross_entropy_to,
             batch_size=128, seed=0):
    """`three_metrics` of uint8 images x [N, 3, H, W] under `pgd` on loss(y), every image counted once.

    The attack runs as the model is executed (bf16, say); both predictions are made in float32.
    """
    natural, adversarial = [], []
    with fixed_seed(seed, x.device):
        for images, labels, n in padded_batches(x, y, batch_size):
            x_adv = pgd(model, images, loss(labels), eps=eps, step_size=step_size, steps=steps, start=start, norm=norm)
            natural.append(predict(model, images)[:n])
            adversarial.append(predict(model, x_adv)[:n])
    return three_metrics(y, torch.cat(natural), torch.cat(adversarial))


def predict(model, x):
    """The predicted classes [N] of float images, eval mode, in float32."""
    with attack_mode(model), exact_precision(model), torch.no_grad():
        return model(x).argmax(1)


def local_lipschitzness(model, x, *, eps, step_size, steps, batch_size=128, seed=0):
    """Mean over uint8 images x of max over x̂ in the ε-ball of ‖f(x) - f(x̂)‖₁ / ‖x - x̂‖∞, f the logits.

    The definition of Yang et al. 2020 that the paper uses, in float32. The largest ratio met counts: a lower bound. At a
    fixed distance the ratio rises with its numerator, so signed gradient ascent follows that and stays at the distance:
    its steps cross the ball, from corner to corner. Which logits rise and which fall makes many local maxima, so four
    random starts, one of them close to x, share the steps. Units: logits per pixel range.
    """
    largest = []
    with fixed_seed(seed, x.device), attack_mode(model), exact_precision(model), torch.enable_grad():
        for images, _, n in padded_batches(x, x[:, 0, 0, 0], batch_size):
            with torch.no_grad():
                clean, best = model(images), torch.zeros(len(images), device=x.device)
            for scale in (1, 1, 1, 0.1):
                radius, stride = scale * eps, scale * steps * step_size
                x_hat = project(perturb_start(images, "uniform", radius, "linf"), images, radius, "linf")
                for _ in range(math.ceil(steps / 4) + 1):
                    x_hat.requires_grad_()
                    rise = (model(x_hat) - clean).abs().sum(1)
                    gradient, = torch.autograd.grad(rise.sum(), x_hat)
                    with torch.no_grad():
                        ratio = rise / (x_hat - images).abs().amax((1, 2, 3))
                        best = torch.maximum(best, ratio.nan_to_num(nan=0, posinf=0))
                        x_hat = project(x_hat + stride * gradient.sign(), images, radius, "linf")
            largest.append(best[:n])
    return torch.cat(largest).mean().item()


# ----------------------------------------------------------------------------------------------- run bookkeeping


def launch(main):
    """Run a script's main(argv): a mistake or Ctrl-C ends in one line and exit status 2 or 130, no traceback."""
    status = 2
    try:
        return main(sys.argv[1:])
    except UserError as error:
        message = f"error: {error}"
    except OSError as error:  # a full disk, a folder without permission
        message = f"error: {error.filename or 'writing a file'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            message = f"error: out of memory, a smaller --batch-size needs less ({str(error)[:200]})"
        elif isinstance(error, torch._dynamo.exc.TorchDynamoException):
            message = f"error: torch.compile failed, --compile off does without it ({str(error)[:300]})"
        else:
            raise
    except KeyboardInterrupt as error:
        message, status = f"interrupted {error}", 128 + signal.SIGINT
    say(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def on_terminal():
    return sys.stdout is not None and sys.stdout.isatty()


def show(line):
    """On a terminal, show a line of progress in place of the last one; in a pipe, nothing."""
    if on_terminal():
        print("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1], end="", flush=True)


def say(line, file=None):
    """Print a line at once, over the progress line if one is showing."""
    show("")
    print(line, file=file, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as its help, every default shown, and errors of one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def number(low=0.0, high=math.inf, above=False):
    """An argparse type: a finite float or a ratio such as 8/255, at least `low` (or above it), at most `high`."""
    def parse(text):
        numerator, _, denominator = text.partition("/")
        value = float(numerator) / (float(denominator or 1) or math.nan)
        if not low <= value <= high or value == math.inf or above and value == low:
            limit = f"{'above' if above else 'at least'} {low:g}" + (f", at most {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {limit}")
        return value
    parse.__name__ = "number"  # argparse names it when the text is no number at all
    return parse


def integer(low=1):
    """An argparse type: an integer of at least `low`."""
    def parse(text):
        if not low <= int(text) < 2 ** 63:
            raise argparse.ArgumentTypeError(f"{text!r} must be at least {low} and below 2^63")
        return int(text)
    parse.__name__ = "integer"
    return parse


def training_parser(doc, method, **defaults):
    """The arguments that the CIFAR scripts share; `defaults` overrides the paper's TRADES setting for a method."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--dataset", default="cifar10", metavar="NAME", help="cifar10, cifar100, synthetic, or DATA_DIR/NAME.npz")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are, or are downloaded to")
    add("--train-size", type=integer(), metavar="N", help="train on a random subset of N images, drawn with --seed")
    add("--arch", choices=("wrn", "densenet"), default="wrn", help="WideResNet or DenseNet-BC")
    add("--depth", type=integer(), default=34, help="layers, 6n + 4")
    add("--width", type=integer(), default=10, help="widening factor of a WideResNet, growth rate of a DenseNet")
    add("--epochs", type=integer(), default=100, help="passes over the training images")
    add("--batch-size", type=integer(), default=128, help="images a step")
    add("--lr", type=number(above=True), default=0.1, help="base learning rate of SGD with momentum 0.9")
    add("--weight-decay", type=number(), default=2e-4, help="L2 penalty on every parameter")
    add("--schedule", choices=("exp-decay", "step", "cosine"), default="exp-decay", help="learning rate over epochs")
    add("--eps", type=number(0, 1), default=0.031, help="ℓ∞ radius of the attack, in pixel range [0, 1]; 8/255 works")
    add("--step-size", type=number(), default=0.007, help="attack step, in pixel range [0, 1]")
    add("--steps", type=integer(0), default=10, help="attack steps")
    add("--beta", type=number(), default=6.0, help="λ of the paper: weight of the robust regularization")
    add("--seed", type=integer(0), default=1, help="seeds weights, shuffling, augmentation and attacks")
    add("--out", metavar="DIR", help="run folder; by default runs/<method>-<dataset>-<model>-beta<β>-seed<s>, with "
                                     "every other setting that is not the default")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on a CUDA device")
    add("--eval-every", type=integer(), default=1, metavar="N", help="epochs between monitor evaluations")
    add("--eval-size", type=integer(), default=1000, metavar="N", help="test images in a monitor evaluation")
    add("--test-size", type=integer(), metavar="N", help="test images, drawn at random, in metrics.json; by default all")
    parser.set_defaults(method=method, **defaults)
    return parser


def start(parser, argv):
    """Parse argv, pick the device and seed everything: (args, device). Resolves `args.out` and `args.precision`."""
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if device.type != "cuda":
        say(f"no CUDA device in use: training on the {device.type} ({torch.get_num_threads()} threads), "
            "which is slow for a large network; the speed and the time left follow")
    args.out = args.out or _run_folder(parser, args)
    args.precision = pick_precision(args.precision, device)
    torch.manual_seed(args.seed)
    return args, device


def _run_folder(parser, args):
    named = {"method", "dataset", "arch", "depth", "width", "beta", "seed", *MAY_CHANGE}
    name = f"{args.method}-{args.dataset}-{args.arch}{args.depth}-{args.width}-beta{args.beta:g}-seed{args.seed}"
    for key, value in vars(args).items():
        if key not in named and value != parser.get_default(key):
            value = f"{value:.4g}" if isinstance(value, float) else "" if value is True else Path(str(value)).stem
            name += f"-{key.replace('_', '')}{value}"
    return str(Path("runs") / name)


MAY_CHANGE = {"out", "data_dir", "device", "workers", "on_bad_image", "restarts"}  # a resumed run may have them otherwise


class Run:
    """A run folder (args.json, log.jsonl, last.pt, best.pt, metrics.json), resumed if it holds this very run.

        run = Run(args, model, optimizer)
        for epoch in run.epochs():
            for x, y in run.watch(batches(...), len(data.x_train)):
                ...
                run.record(natural_risk, robust_regularization, lipschitz)  # scalars on the device
            run.end_epoch(lr, data)
        run.finish(data)
    """

    def __init__(self, args, model, optimizer, recorded=("natural_risk", "robust_regularization", "lipschitz")):
        self.args, self.model, self.optimizer, self.recorded = args, model, optimizer, recorded
        self.device = next(model.parameters()).device
        self.folder = Path(args.out)
        self.settings = {key: value for key, value in vars(args).items() if key != "out"}
        self.epoch, self.log, self.announced = 0, [], False  # epoch: the last one finished
        if (self.folder / "last.pt").exists():
            with own_files(self.folder):
                self._resume()
        elif (self.folder / "metrics.json").exists():
            raise UserError(f"{self.folder} holds a finished run without its last.pt; choose another --out")
        else:  # no epoch was finished here: nothing to lose
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "args.json", self.settings)
            write_file(self.folder / "log.jsonl", b"")
        say(f"{self.folder}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{self.epoch} of {args.epochs} epochs done")
        signal.signal(signal.SIGINT, self._interrupt)

    def _resume(self):
        before = read_json(self.folder / "args.json")
        now = json.loads(json.dumps(self.settings))
        changed = [f"--{key.replace('_', '-')} {before.get(key)} there, {now.get(key)} here"
                   for key in sorted({*before, *now} - MAY_CHANGE) if before.get(key) != now.get(key)]
        if changed:
            raise UserError(f"{self.folder} holds a run with other settings ({'; '.join(changed)}); choose another --out")
        state = read_checkpoint(self.folder / "last.pt")
        load_weights(self.model, state["model"], self.folder / "last.pt")
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.epoch = state["epoch"]
        self.log = read_log(self.folder / "log.jsonl")[:self.epoch]  # a kill can leave a line ahead of the checkpoint
        write_file(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log).encode())
        scores = self._monitored()
        if scores and self.log[-1]["robust_accuracy"] == max(scores) and scores.count(max(scores)) == 1:
            content, best = (self.folder / "last.pt").read_bytes(), self.folder / "best.pt"
            if not best.exists() or best.read_bytes() != content:  # a kill came between the two
                write_file(best, content)

    def _monitored(self):
        return [entry["robust_accuracy"] for entry in self.log if entry["robust_accuracy"] is not None]

    def _interrupt(self, *_):
        raise KeyboardInterrupt(f"in epoch {min(self.epoch + 1, self.args.epochs)}; {self._kept()}")

    def _kept(self):
        return (f"epoch {self.epoch} is kept in {self.folder / 'last.pt'}" if self.epoch else "no epoch was finished")

    def epochs(self):
        """The epochs still to do, counted from 1."""
        return range(self.epoch + 1, self.args.epochs + 1)

    def watch(self, stream, size, batch_size=None):
        """Pass on the batches of an epoch of `size` images, show progress, then check every recorded number."""
        self.history, self.images, self.latest = [], 0, None
        self.steps = steps_per_epoch(size, batch_size or self.args.batch_size)
        self.began = shown = time.perf_counter()
        for x, y in stream:
            yield x, y
            self.images += len(x)
            now = time.perf_counter()
            if on_terminal() and now - shown > 1:
                shown = now
                show(self._progress(size))
            elif not on_terminal() and not self.announced and now - self.began > 10:
                self.announced = True
                say(self._progress(size))
        history = torch.stack(self.history)
        bad = (~history.isfinite()).any(1).nonzero()
        self.train_seconds = time.perf_counter() - self.began  # after the line above has waited for the device
        if len(bad):
            raise UserError(f"loss not finite at epoch {self.epoch + 1}, step {bad[0].item() + 1}; {self._kept()}; "
                            f"a smaller --lr or --beta may help")
        with torch.no_grad():
            if not torch.stack(torch._foreach_norm(list(self.model.parameters()))).isfinite().all():
                raise UserError(f"weights not finite after epoch {self.epoch + 1}; {self._kept()}; a smaller --lr or "
                                f"--beta may help")
        self.means = history.mean(0).tolist()

    def record(self, *means):
        """Note a step's means, named by `recorded`, scalars on the device; read back later, so nothing waits here."""
        self.history.append(torch.stack(means).detach().float())

    def _risks(self, means):
        return "  ".join(f"{name.replace('_', ' ')} {mean:.4f}" for name, mean in zip(self.recorded, means)
                         if name != "lipschitz")

    def _progress(self, size):
        rate = self.images / (time.perf_counter() - self.began)
        left = (size * (self.args.epochs - self.epoch) - self.images) / rate
        risks, self.latest = self.latest, torch.stack(self.history).mean(0).to("cpu", non_blocking=True)
        shown = f"  {self._risks(risks)}" if risks is not None else ""
        return (f"epoch {self.epoch + 1}/{self.args.epochs}  step {len(self.history)}/{self.steps}  "
                f"{rate:.4g} images/s  {duration(left)} left{shown}")

    def end_epoch(self, lr, data):
        """Monitor, then `save_epoch`."""
        epoch = self.epoch + 1
        metrics = dict.fromkeys(("natural_accuracy", "robust_accuracy", "perturbation_stability"))
        if epoch % self.args.eval_every == 0 or epoch == self.args.epochs:
            some = data.test_subset(self.args.eval_size)
            metrics = evaluate(self.model, data.x_test[some], data.y_test[some], eps=self.args.eps,
                               batch_size=self.args.batch_size, **MONITOR_ATTACK)
            del metrics["n"]
        self.save_epoch(lr, metrics)

    def save_epoch(self, lr, metrics):
        """Add a line to the log, `metrics` (the three and any others) in it; write the checkpoint (and best.pt)."""
        epoch = self.epoch + 1
        best_before = max(self._monitored(), default=-1)
        entry = {"epoch": epoch, "lr": lr, "beta": self.args.beta,
                 **dict(zip(self.recorded, self.means)), **metrics,
                 "images_per_second": float(f"{self.images / self.train_seconds:.4g}"),
                 "seconds": round(time.perf_counter() - self.began, 2)}
        self.log.append(entry)
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        checkpoint = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": epoch,
                      "args": self.settings, "rng": torch.get_rng_state(), "cuda_rng": None}
        if self.device.type == "cuda":
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_file(self.folder / "last.pt", content.getbuffer())
        self.epoch = epoch
        if max(self._monitored(), default=-1) > best_before:
            write_file(self.folder / "best.pt", content.getbuffer())
        say(f"epoch {epoch}/{self.args.epochs}  lr {lr:.4g}  {self._risks(self.means)}  {describe(metrics)}  "
            f"{entry['images_per_second']:.4g} images/s  {duration(entry['seconds'])}  "
            f"{duration(entry['seconds'] * (self.args.epochs - epoch))} left")

    def finish(self, data):
        """The full test metrics of the last epoch's weights: into metrics.json, or out of it if they are there."""
        path = self.folder / "metrics.json"
        if not path.exists():
            attack = {"eps": self.args.eps, **REPORT_ATTACK}
            chosen = data.test_subset(self.args.test_size)
            x, y = data.x_test[chosen], data.y_test[chosen]
            say(f"testing on {len(x):,} images with PGD-{attack['steps']}, step {attack['step_size']:g}")
            metrics = evaluate(self.model, x, y, batch_size=self.args.batch_size, **attack)
            metrics["local_lipschitzness"] = local_lipschitzness(
                self.model, x[:1000], batch_size=self.args.batch_size, **attack)
            attack = {"name": "pgd", "loss": "cross-entropy", "norm": "linf", "start": "uniform", **attack}
            write_json(path, {**metrics, "attack": attack, "epoch": self.epoch, "precision": self.args.precision})
        with own_files(self.folder):
            metrics = read_json(path)
            say(f"{path}: {describe(metrics)}, local Lipschitzness {metrics['local_lipschitzness']:.2f}")
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def own_files(folder):
    """What a spoilt run folder raises inside becomes a UserError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: args.json, log.jsonl, last.pt or metrics.json is not what a run wrote "
                        f"({type(error).__name__}: {error}); move the folder away or choose another --out") from None


def describe(metrics):
    """The three metrics in words, in percent; nothing for an epoch that was not monitored."""
    names = {"natural": "natural_accuracy", "robust": "robust_accuracy", "stability": "perturbation_stability"}
    return "  ".join(f"{name} {100 * metrics[key]:.2f} %" for name, key in names.items() if metrics[key] is not None)


def duration(seconds):
    """12.3 s, 4 min 05 s, 3 h 07 min or 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def write_file(path, content):
    """Write bytes so that `path` holds either its old content or all of the new, whatever happens meanwhile."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")  # what a kill leaves of it, the next write replaces
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); what it held before is kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None


def read_log(path):
    """The entries of a log.jsonl; a last line cut short by a kill is left out."""
    lines = Path(path).read_text().split("\n") if Path(path).exists() else []
    return [json.loads(line) for line in lines[:-1]]


def read_checkpoint(path):
    """A checkpoint's dict, on the CPU, read without running any code in it; UserError if that cannot be done."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # truncated, foreign or unsafe: zipfile, pickle and torch each fail in their own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None

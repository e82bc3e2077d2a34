"""What every experiment shares: data, networks, execution, attacks, schedules, metrics, the run folder.

No loss or loop of a method lives here. A training script reads top to bottom as its experiment and calls this
file for all else. Images are [N, 3, H, W]: uint8 while stored on the device, float32 in [0, 1] once batched.
"""
import argparse
import ast
import contextlib
import datetime
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
import sysconfig
import time
import tokenize
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

# Before PyTorch is imported: threads that wait by spinning slow each other down beside another job.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
for override in "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE":  # fp32 is the exact reference
    os.environ.pop(override, None)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402


class UserError(Exception):
    """A mistake that a user can make. `launch` prints it as one line and ends with exit status 2."""


# ------------------------------------------------------------------------------------------------------- data

@dataclass
class Data:
    """A data set on the device, and a hash of all that its files hold."""
    x_train: torch.Tensor  # [N, 3, H, W] uint8
    y_train: torch.Tensor  # [N] int64
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int
    hash: str
    x_val: torch.Tensor = None  # with --val-size: held out of the training images
    y_val: torch.Tensor = None
    extra: int = 0              # this many training images, the last ones, are from --extra-data

    def __len__(self):
        return len(self.x_train) - self.extra

    def test(self, n=None):
        """(x, y) of n random test images, the same ones in every run. All of them in order if n is None."""
        if not n:
            return self.x_test, self.y_test
        some = torch.randperm(len(self.x_test), generator=torch.Generator().manual_seed(0))[:n]
        return self.x_test[some], self.y_test[some]


def load_data(name, data_dir, device, train_size=None, seed=0, val_size=0):
    """The data set `name` as a `Data` on `device`, or UserError.

    From DATA_DIR/NAME.npz if it is there: x_train, y_train, x_test, y_test, images uint8 [N, H, W, 3] or gray
    [N, H, W]. Else torchvision reads or downloads "cifar10" and "cifar100", and "synthetic" is generated.
    `val_size` random training images are held out, `train_size` others kept (None: all), drawn with `seed`.
    """
    path = Path(data_dir).expanduser() / f"{name}.npz"
    if path.exists():
        arrays = read_npz(path, "x_train", "y_train", "x_test", "y_test")
    elif name == "synthetic":
        arrays = synthetic()
    elif name in ("cifar10", "cifar100"):
        arrays = _torchvision_cifar(name, path)
    else:
        raise UserError(f"no data set {name!r}: {path} is missing; built in: cifar10, cifar100, synthetic")
    x_train, y_train = checked(*arrays[:2], path, "x_train", "y_train")
    x_test, y_test = checked(*arrays[2:], path, "x_test", "y_test")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(f"{path}: training and test images differ in size")
    labels = {*y_train.tolist()}
    if odd := (labels ^ {*range(len(labels))}) | ({*y_test.tolist()} - labels):
        raise UserError(f"{path}: labels must be 0..{len(labels) - 1}, each on some training image; "
                        f"that fails for {some_of(odd)}")
    n = len(x_train)
    kept = train_size or (n - val_size)
    if not 1 <= kept <= n - val_size:
        raise UserError(f"--train-size {train_size} and --val-size {val_size}: "
                        f"{path if path.exists() else name} has {n} training images")
    order = np.arange(n)
    if train_size or val_size:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    train, val = order[:kept], order[n - val_size:]
    if lost := labels - {*y_train[train].tolist()}:
        raise UserError(f"of {path} {kept} training images are kept, and none is of class {some_of(lost)}; "
                        "take a larger --train-size, a smaller --val-size or another --seed")
    return Data(*to_tensors(x_train[train], y_train[train], device), *to_tensors(x_test, y_test, device),
                len(labels), hashed(x_train, y_train, x_test, y_test),
                *to_tensors(x_train[val], y_train[val], device))


def some_of(values):
    """The first ten of them, as text."""
    return ", ".join(sorted(map(str, values), key=lambda text: (len(text), text))[:10])


def checked(x, y, source, x_name, y_name):
    """Arrays as uint8 [N, H, W, 3] (gray becomes three equal channels) and integers [N], or UserError."""
    if x.ndim == 3 or x.ndim == 4 and x.shape[3] == 1:
        x = np.repeat(x.reshape(*x.shape[:3], 1), 3, axis=3)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or len(x) == 0 or x.max() <= 1:
        raise UserError(f"{source}: {x_name} must be pixels from 0 to 255, uint8 [N, H, W, 3] or gray "
                        f"[N, H, W], not {x.dtype} {list(x.shape)} up to {x.max(initial=0)}")
    y = y[:, 0] if y.shape == (len(x), 1) else y  # Keras keeps CIFAR's labels as a column
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
        raise UserError(f"{source}: {y_name} must be {len(x)} integers, not {y.dtype} {list(y.shape)}")
    return x, y.astype(np.int64)


def to_tensors(x, y, device):
    """uint8 [N, H, W, 3] and int64 [N] arrays → [N, 3, H, W] (channels_last) and [N], on the device."""
    images = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
    return images.to(device), torch.from_numpy(y).to(device)


def hashed(*parts):
    """16 hexadecimal digits that stand for arrays, bytes and strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()[:16]


def read_npz(path, *names):
    """The arrays of an .npz file with these names, or UserError."""
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            return [file[name] for name in names]
    except Exception as error:  # truncated and foreign files fail in many ways, from zipfile, zlib or numpy
        raise UserError(f"{path} cannot be read as an .npz of {', '.join(names)}: {error}") from None


def _torchvision_cifar(name, npz):
    try:
        from torchvision import datasets
        dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        if RANK == 0:
            dataset(npz.parent, download=True)
        wait_for_all()
        train = dataset(npz.parent, train=True, download=True)
        test = dataset(npz.parent, train=False, download=True)
    except Exception as error:  # no network, no space, a broken archive, a torchvision of another PyTorch
        raise UserError(f"no {npz}, and torchvision neither found nor downloaded {name} in {npz.parent} "
                        f"({error}); --dataset synthetic needs no download") from None
    return train.data, np.array(train.targets), test.data, np.array(test.targets)


def synthetic(n_train=5000, n_test=500, seed=0):
    """Ten classes of 16×16 images: a bold cue that is often right, a faint one that is (Tsipras et al. 2019).

    On grey noise lie a square, whose colour shows the class 80 % of the time and a random one else, and a
    class texture, always right and fainter than ε = 0.031. Plain training lives on the texture. The larger β,
    the more a network relies on the square. Returns x_train, y_train, x_test, y_test as an .npz has them.
    """
    rng = np.random.default_rng(seed)
    colours = np.stack(np.meshgrid(*[[0, 0.5, 1]] * 3), -1).reshape(27, 3)
    colours = colours[colours.sum(1) % 1 == 0][1:]                           # 1 or more apart in ℓ1; no black
    colours = rng.permutation(colours)[:10]                                  # [10, 3]
    textures = np.tile(rng.choice([-1, 1], (10, 2, 2, 3)), (8, 8, 1))        # a mirror image is a shifted one

    def split(n):
        y = rng.integers(0, 10, n)
        shown = np.where(rng.random(n) < 0.8, y, rng.integers(0, 10, n))      # the square's class
        top, left = rng.integers(2, 7, (2, n, 1))
        pixel = np.arange(16)
        rows, columns = (pixel >= top) & (pixel < top + 8), (pixel >= left) & (pixel < left + 8)
        square = (rows[:, :, None] & columns[:, None, :])[..., None]
        x = 0.1 + rng.normal(0, 0.02, (n, 16, 16, 3)) + 0.03 * textures[y]
        x += square * 0.25 * colours[shown][:, None, None, :]
        return np.uint8(np.clip(x, 0, 1) * 255 + 0.5), y

    return *split(n_train), *split(n_test)


def to_float(images):
    """uint8 [N, 3, H, W] → float32 in [0, 1], the same values as torchvision's ToTensor."""
    return images.to(torch.float32).div_(255)


def crop_flip(images, top, left, flip, padding=4):
    """Crop each image at its own offset out of the zero-padded image, and mirror those with `flip`.

    images [N, 3, H, W]; top, left [N] in 0..2·padding (`padding` is the centre); flip [N] bool.
    """
    n, _, height, width = images.shape
    rows = top[:, None] + torch.arange(height, device=images.device)                          # [N, H]
    columns = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)        # [N, W]
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)                          # [N, H+2p, W+2p, 3]
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(data, batch_size, flip=True, extra_fraction=0.5):
    """One epoch as (float32 images in [0, 1], labels), shuffled, cropped and mirrored at random.

    A crop's zero padding is an eighth of the side, rounded up: 4 at 32 pixels, as published.
    All batches have the same size: what is left over is dropped, other images each epoch. If there are extra
    images, they fill `extra_fraction` of each batch. Each comes once before one comes again. They make no
    epoch longer: its number of batches is that of the other images alone. Nothing here waits for the device.
    """
    n, device = len(data), data.x_train.device
    steps = max(n // batch_size, 1)
    extra = round(extra_fraction * batch_size) if data.extra else 0
    padding = math.ceil(min(data.x_train.shape[2:]) / 8)

    def draw(n, share):  # [steps, share] numbers below n
        share = min(share, n) if steps == 1 else share  # a batch may be larger than the whole data set
        orders = [shared_order(n, device) for _ in range(1 + steps * share // n)]
        return torch.cat(orders)[:steps * share].view(steps, share)

    rows = draw(n, batch_size - extra)
    if extra:
        rows = torch.cat([rows, n + draw(data.extra, extra)], 1)
    equal = rows.shape[1] // WORLD * WORLD
    for row in rows[:, RANK:equal:WORLD]:  # this process's share
        top, left = torch.randint(0, 2 * padding + 1, (2, len(row)), device=device)
        flipped = torch.rand(len(row), device=device) < (0.5 if flip else 0)
        yield to_float(crop_flip(data.x_train[row], top, left, flipped, padding)), data.y_train[row]


def in_order(x, y, batch_size):
    """uint8 images and labels as batches of (float32 images in [0, 1], labels), as evaluations take them."""
    for images, labels in zip(x.split(batch_size), y.split(batch_size)):
        yield to_float(images), labels


# --------------------------------------------------------------------------------------------------- networks

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}  # --activation


def _after_norm(activation):
    """In place where that is faster: nothing else reads what a BatchNorm returns."""
    return torch.relu_ if activation == "relu" else ACTIVATIONS[activation]


class _Block(nn.Module):
    """Pre-activation basic block (He et al. 2016), its shortcut named as the releases name it."""

    def __init__(self, inputs, outputs, stride, activation, shortcut):
        super().__init__()
        self.act = _after_norm(activation)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.stride = stride
        self.projection = shortcut if inputs != outputs else None  # the name of the module below
        self.raw = False  # True: the projection takes the block's input, not what BatchNorm makes of it
        if self.projection:  # unstrided: oneDNN's strided 1×1 of few channels overruns memory (issue 6035)
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.add_module(shortcut, nn.Sequential(conv) if shortcut == "shortcut" else conv)  # shortcut.0

    def forward(self, x):
        out = self.act(self.bn1(x))
        if self.projection:
            given = x if self.raw else out
            if self.stride > 1:  # takes every second pixel; a slice is slower
                given = F.avg_pool2d(given, 1, self.stride)
            x = getattr(self, self.projection)(given)
        return x + self.conv2(self.act(self.bn2(self.conv1(out))))


def _blocks(n, inputs, outputs, stride, activation, shortcut):
    """n blocks in a row. The first one changes the channels and strides."""
    first = _Block(inputs, outputs, stride, activation, shortcut)
    return nn.Sequential(first, *(_Block(outputs, outputs, 1, activation, shortcut) for _ in range(n - 1)))


class _DenseLayer(nn.Module):
    """Bottleneck layer of a DenseNet-BC (Huang et al. 2017): adds `growth_rate` channels to its input."""

    def __init__(self, inputs, growth_rate, activation):
        super().__init__()
        self.act = _after_norm(activation)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, x):
        out = self.conv1(self.act(self.bn1(x)))
        return torch.cat([x, self.conv2(self.act(self.bn2(out)))], 1)


class _Transition(nn.Module):
    """Between two stages of a DenseNet-BC: other channels, half the height and width."""

    def __init__(self, inputs, outputs, activation):
        super().__init__()
        self.act = _after_norm(activation)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv1(self.act(self.bn1(x))), 2)


def _stage(layers):
    """A sequence of layers by the name that the releases give it: block1.layer.0, ..."""
    return nn.Sequential(OrderedDict(layer=layers))


class Network(nn.Module):
    """Images [N, 3, H, W] in [0, 1] → logits [N, classes]. A subclass has conv1, features(x) and classifier.

    With `precision = "bf16"` the features are computed in bfloat16. Pixels and logits stay float32: in
    bfloat16 the step of a pixel near 1 is 0.004, an eighth of ε.
    """

    precision = "fp32"
    usual = 34, 10            # depth and width unless --depth and --width say otherwise
    classifier = "fc"         # its name, as published

    def forward(self, x):
        x = self.conv1(x)
        if self.precision == "bf16":
            with torch.autocast(x.device.type, torch.bfloat16):
                x = self.features(x.bfloat16()).float()
        else:
            x = self.features(x)
        return getattr(self, self.classifier)(x.mean((2, 3)))

    def initialize(self):
        """He et al. 2015, fan-out, as in the networks that TRADES publishes."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(getattr(self, self.classifier).bias)


class WideResNet(Network):
    """WideResNet-depth-width for small images (Zagoruyko & Komodakis 2016), named as TRADES publishes it."""

    def __init__(self, depth, width, classes, activation="relu"):
        super().__init__()
        self.activation = activation
        a, b, c = (round(channels * width) for channels in (16, 32, 64))
        n, how = _layers_per_stage(depth), (activation, "convShortcut")
        self.act = _after_norm(activation)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _stage(_blocks(n, 16, a, 1, *how))
        self.block2 = _stage(_blocks(n, a, b, 2, *how))
        self.block3 = _stage(_blocks(n, b, c, 2, *how))
        self.bn1 = nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, classes)
        self.initialize()

    def features(self, x):
        return self.act(self.bn1(self.block3(self.block2(self.block1(x)))))


class DenseNet(Network):
    """DenseNet-BC-depth, growth rate `width`, for small images: compression 0.5, first convolution 2k."""

    usual = 40, 12

    def __init__(self, depth, width, classes, activation="relu"):
        super().__init__()
        self.activation = activation
        if width != int(width):
            raise UserError(f"--width {width}: a DenseNet's growth rate is a whole number")
        self.act, n, channels = _after_norm(activation), _layers_per_stage(depth), 2 * width
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for i in (1, 2, 3):
            layers = (_DenseLayer(channels + j * width, width, activation) for j in range(n))
            self.add_module(f"block{i}", _stage(nn.Sequential(*layers)))
            channels += n * width
            if i < 3:
                self.add_module(f"trans{i}", _Transition(channels, channels // 2, activation))
                channels //= 2
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)
        self.initialize()

    def features(self, x):
        x = self.trans2(self.block2(self.trans1(self.block1(x))))
        return self.act(self.bn1(self.block3(x)))


class PreActResNet(Network):
    """PreActResNet-18 or -10, 64·width channels first (He et al. 2016), named as AWP publishes it."""

    usual, classifier = (18, 1), "linear"

    def __init__(self, depth, width, classes, activation="relu"):
        super().__init__()
        self.activation = activation
        if depth not in (10, 18):
            raise UserError(f"--depth {depth}: a PreActResNet has 18 layers, or 10")
        a, b, c, d = (round(channels * width) for channels in (64, 128, 256, 512))
        n, how = depth // 8, (activation, "shortcut")
        self.act = _after_norm(activation)
        self.conv1 = nn.Conv2d(3, a, 3, padding=1, bias=False)
        self.layer1 = _blocks(n, a, a, 1, *how)
        self.layer2 = _blocks(n, a, b, 2, *how)
        self.layer3 = _blocks(n, b, c, 2, *how)
        self.layer4 = _blocks(n, c, d, 2, *how)
        self.bn = nn.BatchNorm2d(d)
        self.linear = nn.Linear(d, classes)
        self.initialize()

    def features(self, x):
        return self.act(self.bn(self.layer4(self.layer3(self.layer2(self.layer1(x))))))


def _layers_per_stage(depth):
    if depth < 10 or depth % 6 != 4:
        raise UserError(f"--depth {depth}: depth must be 6n + 4, such as 10, 16, 28, 34 or 40")
    return depth // 6


# --arch → class(depth, width, classes, activation). A new network is one more entry.
NETWORKS = {"wrn": WideResNet, "densenet": DenseNet, "preact": PreActResNet}


def build_model(args, data, device):
    """The network of --arch, --depth, --width and --activation, on the device, with --init's weights."""
    model = NETWORKS[args.arch](args.depth, args.width, data.classes, args.activation)
    model.activation = args.activation
    if not all(parameter.numel() for parameter in model.parameters()):
        raise UserError(f"--width {args.width} leaves a layer without channels")
    if args.init and not (args.out and Path(args.out, "last.pt").exists()):  # a run that goes on has its own
        saved = read_checkpoint(args.init)
        load_weights(model, saved, args.init, new_classifier=True)
        if not isinstance(saved.get("args"), dict):
            say(f"{args.init} does not tell its activation ({args.activation} is taken), its pixels (in "
                "[0, 1]), nor whether a PreActResNet's shortcuts take raw input, as Fast AT's do (not here)")
    return model.to(device, memory_format=torch.channels_last)


def weight_sets(checkpoint, name="", depth=4):
    """{name: {parameter: tensor}} of the networks in a checkpoint; a bare state_dict has the name ""."""
    if not isinstance(checkpoint, dict) or depth == 0:
        return {}
    state = {str(key): value for key, value in checkpoint.items() if isinstance(value, torch.Tensor)}
    found = {name: state} if any(key.endswith("weight") for key in state) else {}
    for key, value in checkpoint.items():
        found |= weight_sets(value, f"{name}.{key}".strip("."), depth - 1)
    return found


def parameters_of(checkpoint, source, choice=None):
    """(parameters, other tensors among them) of a checkpoint of ours, a published one, or a state_dict.

    Of several networks the one named `choice` is taken, else one by its usual name, which a line says. Names
    lose the prefix of wrappers (`module.`, `_orig_mod.`, ...): what stands before the first "conv1".
    """
    sets = weight_sets(checkpoint)
    if not sets:
        found = checkpoint if isinstance(checkpoint, dict) else [type(checkpoint).__name__]
        raise UserError(f"{source} holds no weights, but {some_of(found) or 'nothing'}")
    if choice and choice not in sets:
        raise UserError(f"{source} holds no weights {choice}, but {some_of(sets)}")
    usual = [name for name in ("state_dict", "model_state_dict", "net", "model") if name in sets]
    name = choice or [*usual, *sets][0]
    if len(sets) > 1 and not choice:
        say(f"{source} holds {some_of(sets)}: the weights {name!r} are taken")
    state = sets[name]
    first = min((key for key in state if f".{key}".endswith(".conv1.weight")), key=len, default="")
    prefix = first.removesuffix("conv1.weight")
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return own, {key: value for key, value in state.items() if not key.startswith(prefix)}


def load_weights(model, checkpoint, source, new_classifier=False):
    """Load the `parameters_of` a checkpoint; UserError if they are another network's or not finite.

    A checkpoint of ours says its activation: another one is an error, too. With `new_classifier`, where the
    numbers of classes differ, the model keeps its own and says so.
    """
    found, others = parameters_of(checkpoint, source)
    settings = checkpoint.get("args")  # a published one's may be a Namespace, or say "ReLU"
    ours = isinstance(settings, dict) and "method" in settings
    activation = settings.get("activation") if ours else None
    if activation and getattr(model, "activation", activation) != activation:
        raise UserError(f"{source} is of a network whose activation is {activation}: make this one with it")
    own = model.state_dict()
    state = others | found
    for name in state.keys() - own.keys():
        if name.startswith("sub_block1.") or name.endswith("n_averaged"):  # TRADES' spare block; of --ema
            del state[name]
    weight, bias = (f"{getattr(model, 'classifier', '')}.{part}" for part in ("weight", "bias"))
    if new_classifier and {weight, bias} <= state.keys() & own.keys():
        before, now = state[bias].numel(), own[bias].numel()
        if before != now:
            say(f"{source} has {before} classes, this data set {now}: a new classifier")
            state |= {name: own[name] for name in (weight, bias)}
    wrong = [name for name in own | state if not name.endswith("num_batches_tracked")
             and (name not in own or name not in state or state[name].shape != own[name].shape)]
    if wrong:
        raise UserError(f"{source} holds another network: {len(wrong)} parameters are missing, unknown or of "
                        f"another shape, {wrong[0]} first; check architecture, depth, width and classes")
    if bad := not_finite(state):
        raise UserError(f"{source}: {bad[0]} is not finite")
    model.load_state_dict(state, strict=False)


def sgd(model, lr, weight_decay, nesterov=False, decay_norms=True):
    """SGD with momentum 0.9; without `decay_norms`, BatchNorm's parameters are free of the weight decay."""
    norms = [] if decay_norms else [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    free = {parameter for norm in norms for parameter in norm.parameters()}
    groups = [{"params": [p for p in model.parameters() if p not in free]}]
    if free:
        groups.append({"params": [p for p in model.parameters() if p in free], "weight_decay": 0})
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov, fused=True)


# -------------------------------------------------------------------------------------------------- execution

def pick_device(name):
    """The device of this name; "auto" → CUDA if there is one, else the CPU. UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.partition(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError("cpu and cuda are supported")
        return torch.zeros(1, device=name).device  # runs a kernel: PyTorch may have none for an old GPU
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from None


def set_execution(args, images, *models):
    """Let models run as args.precision and args.compile say. args.precision "auto" becomes what is found.

    That is bf16 on CUDA, and on a CPU whatever is faster for the first model on `images`, uint8 [N, 3, H, W],
    which lie on the models' device. args.compile "auto" compiles on CUDA, where that can work. fp32 without
    compilation is the exact reference: no TF32. UserError: bf16 for no `Network`, or what compiling lacks.
    """
    device = images.device
    aware = [part for model in models for part in model.modules() if hasattr(part, "precision")]
    if args.precision == "bf16" and not aware:
        raise UserError(f"--precision bf16: {type(models[0]).__name__} knows fp32 alone, being no Network")
    if args.precision == "auto":
        args.precision = "bf16" if aware and bf16_is_faster(models[0], images) else "fp32"
    for part in aware:
        part.precision = args.precision
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    warnings.filterwarnings("ignore", message=".*(TensorFloat32|TF32)")  # advice that we must not take
    compiled = args.compile == "on" or (args.compile == "auto" and device.type == "cuda")
    if compiled and (missing := missing_to_compile(device)):
        if args.compile == "on":
            raise UserError(f"--compile on: {missing}")
        warn(f"not compiled, which takes longer: {missing}")
        compiled = False
    if compiled:
        torch.compiler.reset()  # makes room: few graphs are kept for all the networks of a process together
        for model in models:
            model.compile(dynamic=False)
    how = "compiled in the first steps, which takes a minute or so" if compiled else "eager"
    say(f"{args.precision} on {device}, {how}")


def missing_to_compile(device):
    """What torch.compile lacks on this device, and how to get it, in words; None if nothing."""
    cuda, windows = device.type == "cuda", os.name == "nt"
    if cuda and not torch.version.hip and torch.cuda.get_device_capability(device)[0] < 7:
        return "Triton needs a GPU of compute capability 7.0 or more"
    if cuda and not importlib.util.find_spec("triton"):
        return "Triton is missing; pip install " + ("triton-windows" if windows else "triton")
    if windows:  # triton-windows brings the rest
        return None
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        return "a C compiler is missing; install gcc"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "Python.h is missing; install this Python's headers (python3-dev)"
    return None


def bf16_is_faster(model, images):
    """Is bf16 faster? A GPU has it or not; on a CPU: best of four attack steps on images that take 0.1 s."""
    if images.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if not native:
            warn("this GPU computes no bf16: fp32 is used, which takes several times as long")
        return native

    def seconds(precision, n):
        with temporarily(model.modules(), "precision", precision):
            began = time.perf_counter()
            pgd(model, to_float(images[:n]), torch.sum, Attack(eps=0.0, steps=1))
            return time.perf_counter() - began

    n = 8
    seconds("fp32", n)  # the first pass of all also loads and allocates
    while n < 128 and seconds("fp32", n) < 0.1:
        n *= 2
    best = torch.tensor([(seconds("fp32", n), seconds("bf16", n)) for _ in range(4)]).amin(0)
    average_over_processes([best])  # for all to decide alike
    fp32, bf16 = best.tolist()
    say(f"an attack step takes {fp32:.3g} s in fp32, {bf16:.3g} s in bf16")
    return bf16 < fp32


@contextlib.contextmanager
def temporarily(objects, name, value):
    """Inside, `name` is `value` on all the objects that have it. Afterwards it is as found."""
    found = [(thing, getattr(thing, name)) for thing in objects
             if hasattr(thing, name) and getattr(thing, name) != value]
    try:
        for thing, _ in found:
            setattr(thing, name, value)
        yield
    finally:
        for thing, before in found:
            setattr(thing, name, before)


@contextlib.contextmanager
def attack_mode(model):
    """Eval mode and frozen parameters, so that gradients go to the input alone; both as found afterwards."""
    frozen = temporarily(model.parameters(), "requires_grad", False)
    with temporarily(model.modules(), "training", False), frozen:
        yield


def exact_precision(model):
    """Inside, the `Network`s in a model run in float32."""
    return temporarily(model.modules(), "precision", "fp32")


@contextlib.contextmanager
def fixed_seed(seed, device):
    """Random numbers drawn inside start from `seed`; the outer streams go on as if nothing had happened."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------- several processes (torchrun)

# All processes draw the same order of images and take every WORLD-th image of a batch. Augmentation and the
# attacks of training have other random numbers in each. All test alike; the first alone prints and writes.
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0  # one left over from elsewhere counts for nothing
SHARED = torch.Generator()  # the same numbers in all processes


def connect(args, device):
    """Join the processes that torchrun started, if it did. Returns this process's device."""
    if WORLD == 1:
        return device
    if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(f"WORLD_SIZE is set, but not {some_of(missing)}: start with torchrun, or unset it")
    sizes = getattr(args, "batch_sizes", None) or [getattr(args, "batch_size", 0)]  # Fast AT's has phases
    if any(size % WORLD for size in sizes):
        raise UserError(f"a batch must be a multiple of the {WORLD} processes that share it")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w", errors="replace")
    return device


def seed_everything(seed, epoch=0):
    """Random numbers follow from (seed, epoch, process) from here on: PyTorch's, NumPy's and Python's.

    In epoch 0, where weights are drawn, they are the same in all processes, and in `shared_order` always.
    """
    seeds = [int(np.random.SeedSequence((seed, epoch, i)).generate_state(1)[0]) for i in range(WORLD + 1)]
    SHARED.manual_seed(seeds[WORLD])  # each process has one, all share the last
    for set_seed in torch.manual_seed, np.random.seed, random.seed:  # a fork may draw from any
        set_seed(seeds[RANK if epoch else 0])


def shared_order(n, device):
    """The numbers 0..n - 1 in a random order that is the same in all processes."""
    if WORLD == 1:
        return torch.randperm(n, device=device)
    return torch.randperm(n, generator=SHARED).to(device)


def average_over_processes(tensors):
    """Replace float tensors by their means over the processes: one reduction for all of them."""
    if WORLD > 1 and tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / WORLD).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def synchronize(model):
    """Before a step: gradients and BatchNorm's running statistics become their means over the processes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    average_over_processes(gradients + [part for name, part in model.named_buffers() if ".running_" in name])


def wait_for_all():
    if WORLD > 1:
        torch.distributed.barrier()


# ---------------------------------------------------------------------------------------------------- attacks

@dataclass(frozen=True)
class Attack:
    """What defines an attack. eps and step_size in pixel range [0, 1].

    One that is too short for its ball, or has steps longer than ε, says so in one line where it is made.
    """
    loss: str = "cross-entropy"  # for `evaluate`, of LOSSES or "autoattack" (eval.py); `pgd` is given its own
    norm: str = "linf"           # or "l2"
    eps: float = 0.031
    step_size: float = 0.003
    steps: int = 20
    start: str = "uniform"       # in the ε-ball; or "gaussian", 0.001·N(0, 1); or "none"
    restarts: int = 1            # of `evaluate`: a point is stable if its prediction survives all of them

    def __post_init__(self):
        if self.norm not in ("linf", "l2") or self.start not in ("uniform", "gaussian", "none"):
            raise ValueError(f"no such norm or start: {self.norm!r}, {self.start!r}")
        if self.loss == "autoattack" or self.eps == 0:
            return
        reach = self.steps * self.step_size
        way, longest = self.eps, self.eps  # from x to the edge of the ball
        if self.start == "uniform" and self.steps > 1:
            way = 1.9 * self.eps           # from one side of the ball to the other
        elif self.start == "uniform":
            longest = 2 * self.eps         # Fast AT's single step is 1.25·ε
        if reach < way * (1 - 1e-9):
            warn(f"{self.title()}, is too short for its ball: its steps reach {reach:.3g} of {way:.3g}; "
                 "give it more or longer ones, or its robust accuracy flatters")
        elif self.step_size > longest * (1 + 1e-9):
            warn(f"{self.title()}, has steps longer than ε; shorter ones find more")

    def title(self):
        """Such as "PGD-20, ε = 0.031, step 0.003", "CW-20×5 l2, ε = 0.5, step 0.2" or "FGSM, ε = 8/255"."""
        name = {"cross-entropy": "PGD", "kl": "PGD", "margin": "CW"}.get(self.loss, self.loss)
        name, step = f"{name}-{self.steps}", f", step {pixels(self.step_size, self.norm)}"
        if self.loss == "autoattack":  # it chooses its steps itself
            name, step = "AutoAttack", ""
        elif self.steps == 1 and self.step_size >= self.eps:
            name, step = "FGSM", (step if self.step_size > self.eps else "")
        restarts = f"×{self.restarts}" if self.restarts > 1 else ""
        norm = " l2" if self.norm == "l2" else ""
        return f"{name}{restarts}{norm}, ε = {pixels(self.eps, self.norm)}{step}"


def pixels(value, norm="linf"):
    """A distance as text: 8/255 where it is a whole number of levels in ℓ∞, else a decimal."""
    levels = round(255 * value)
    whole = norm == "linf" and levels and abs(levels / 255 - value) < 1e-9
    return f"{levels}/255" if whole else f"{value:.4g}"


def cross_entropy_to(y):
    """The attack loss of adversarial training and of every report: cross-entropy of labels y [N], summed."""
    return lambda logits: F.cross_entropy(logits, y, reduction="sum")


def margin_to(y):
    """The Carlini-Wagner margin: the best wrong logit minus the right one, summed."""
    def loss(logits):
        wrong = logits.scatter(1, y[:, None], -math.inf).amax(1)
        return (wrong - logits.gather(1, y[:, None])[:, 0]).sum()
    return loss


LOSSES = {"cross-entropy": cross_entropy_to, "margin": margin_to}  # of labels; a new one is one more entry


def kl_to(p):
    """TRADES' attack loss: KL(p ‖ softmax(logits)) of clean probabilities p [N, classes], summed."""
    return lambda logits: F.kl_div(F.log_softmax(logits, 1), p, reduction="sum")


def clean_probabilities(model, x):
    """softmax of the clean logits [N, classes], eval mode, no gradient: computed once for a whole attack."""
    with attack_mode(model), torch.no_grad():
        return model(x).softmax(1)


def perturb_start(x, start, eps, norm):
    """A copy of x at an attack's start: "uniform" in the ε-ball, "gaussian" (0.001·N(0, 1)), "none"."""
    if start == "gaussian":
        return x + 0.001 * torch.randn_like(x)
    if start == "none":
        return x.clone()
    if norm == "linf":
        return x + eps * (2 * torch.rand_like(x) - 1)
    direction = torch.randn_like(x)
    radius = torch.rand(len(x), device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
    return x + eps * (radius / direction.flatten(1).norm(dim=1))[:, None, None, None] * direction


def project(x_adv, x, eps, norm):
    """The nearest point to x_adv in the ε-ball around x (ℓ∞ or ℓ2), then clamped to [0, 1], where x is."""
    if norm == "linf":
        return torch.clamp(x_adv, (x - eps).clamp_(min=0), (x + eps).clamp_(max=1))
    delta = x_adv - x
    scale = (eps / delta.flatten(1).norm(dim=1).clamp(min=1e-12)).clamp(max=1)
    return (x + delta * scale[:, None, None, None]).clamp_(0, 1)


def pgd(model, x, loss, attack):
    """(x̂, ‖∇‖₁) of projected gradient ascent on `loss` in the ε-ball and in [0, 1] (Madry et al. 2018).

    x [N, 3, H, W] must lie in [0, 1]. loss: any callable of logits [N, classes] to a sum over images. A step
    is step_size times the gradient's sign (ℓ∞) or the gradient scaled to unit length (ℓ2). x̂ is the last
    iterate, detached. ‖∇‖₁ [N] is the largest met at each image, the paper's training-time proxy of local
    Lipschitzness. The model runs in eval mode; its mode, gradients and buffers are afterwards as before.
    """
    x_adv = perturb_start(x, attack.start, attack.eps, attack.norm)
    largest = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    with attack_mode(model), torch.enable_grad():
        for _ in range(attack.steps):
            x_adv.requires_grad_()
            gradient, = torch.autograd.grad(loss(model(x_adv)), x_adv)
            with torch.no_grad():
                largest = torch.maximum(largest, gradient.abs().sum((1, 2, 3)))
                if attack.norm == "linf":
                    ascent = gradient.sign()
                else:  # first to a largest entry of 1: squares of a confident network's would underflow
                    top = gradient.abs().amax((1, 2, 3), keepdim=True)
                    gradient = gradient / torch.where(top > 0, top, 1)
                    ascent = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1)[:, None, None, None]
                x_adv = project(x_adv + attack.step_size * ascent, x, attack.eps, attack.norm)
    if attack.steps == 0:  # the start may lie outside, and no step has brought it back
        x_adv = project(x_adv, x, attack.eps, attack.norm)
    return x_adv, largest


# -------------------------------------------------------------------------------------------------- schedules

def one_cycle(epoch, epochs, warmup=0.025):
    """From 1/25 to 1 over the warm-up, then to 4e-6 in the last epoch, along cosines (Wang et al. 2023)."""
    if epochs == 1:
        return 1.0
    peak = warmup * epochs
    low, away = 4e-6, (epoch - peak) / max(epochs - peak, 1e-9)
    if epoch < peak:
        low, away = 1 / 25, 1 - (epoch - 1) / (peak - 1)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * away))


def step(epoch, epochs, shares=(0.75, 0.9, 1)):
    """A tenth at each share of the run: TRADES' epochs 75, 90, 100 of 100. Epoch 1 has the base rate."""
    return 0.1 ** sum(epoch >= max(share * epochs, 2) for share in shares)


SCHEDULES = {  # --schedule → factor of the base rate in epoch e of n, counted from 1 as the releases do
    # The paper's (App. C): 1, and from epoch 75 of 100 on halved every epoch: 0.5^(e - 74). A run of another
    # length turns at 3/4 of it and halves every 1/100 of it, but at most once an epoch. 1e-9 undoes rounding.
    "exp-decay": lambda e, n: 0.5 ** max(0, 1 + math.floor((e - 0.75 * n) / max(0.01 * n, 1) + 1e-9)),
    "step": step,
    "cosine": lambda e, n: 0.5 * (1 + math.cos(math.pi * ((e - 1) / n))),  # RST
    "one-cycle": one_cycle}


# ---------------------------------------------------------------------------------------------------- metrics

METRICS = ("natural_accuracy", "robust_accuracy", "perturbation_stability")


def logits_of(model, x, first=0):
    """Logits [N, classes] of float images, eval mode, float32, no gradient.

    UserError where one is not finite: NaN is no class. Images are counted from `first` in its message.
    """
    with attack_mode(model), exact_precision(model), torch.no_grad():
        logits = model(x)
    fine = logits.isfinite().all(1)
    if not fine.all():
        raise UserError(f"the network's output for image {first + fine.tolist().index(False)} is not finite: "
                        "this is no classification (in training a smaller --lr may help)")
    return logits


def check_images(x, norm):
    """UserError if x [N, 3, H, W] is no batch that the ball of an attack is meant for."""
    if not (x.amin() >= 0 and x.amax() <= 1):  # NaN fails, too
        raise UserError(f"images must be in [0, 1], not in [{x.amin():.4g}, {x.amax():.4g}]; "
                        "a network that wants others must scale them itself")
    if norm == "l2" and len(x) > 1 and (x == x[:, :1]).all():
        raise UserError("these images are gray, three equal channels that an attack would move apart: the ℓ2 "
                        "ball is another one there; take --norm linf")


def predictions(model, stream, attack):
    """(y, f(x), f(x̂)) [N] of every image of a stream, under `pgd` with this record.

    model: any module of images in [0, 1]. stream: (x [B, 3, H, W], y [B]) on its device, as of `in_order`.
    Over restarts f(x̂) is the first prediction that differs from f(x), if any. The attack runs as the model
    is executed (bf16, say), predictions in float32. UserError: images outside [0, 1], logits not finite.
    """
    found, unmoved, n, size = [], 0, 0, 0
    for i, (x, y) in enumerate(stream):
        size = max(size, len(x))
        check_images(x, attack.norm)
        uncompiled = [model] if len(x) < size else []  # compiled code is for batches of one size
        with temporarily(uncompiled, "_compiled_call_impl", None):
            natural = adversarial = logits_of(model, x, n).argmax(1)
            largest = torch.zeros(len(x), device=x.device)  # norm of the gradients met
            for restart in range(attack.restarts):
                with fixed_seed(10 ** 6 * restart + i, x.device):
                    x_adv, lipschitz = pgd(model, x, LOSSES[attack.loss](y), attack)
                largest = torch.maximum(largest, lipschitz)
                again = logits_of(model, x_adv, n).argmax(1)
                adversarial = torch.where(adversarial == natural, again, adversarial)
        found.append((y, natural, adversarial))
        unmoved += ((largest == 0) & (adversarial == natural)).sum().item()
        n += len(x)
        show(f"{attack.title()}: {n:,} images")
    if attack.eps and attack.steps and unmoved > max(0.01 * n, 1):
        warn(f"{attack.title()} had a gradient of exactly zero on {unmoved} of {n} images that "
             "kept their prediction: their stability is not shown; try --attack cw or autoattack of eval.py")
    return [torch.cat(parts) for parts in zip(*found)]


def three_metrics(y, natural, adversarial):
    """The paper's metrics (Section 3), fractions of N, from labels y and predictions f(x), f(x̂) [N]."""
    correct = natural == y
    stable = adversarial == natural
    shares = [hits.sum().item() / len(y) for hits in (correct, correct & stable, stable)]
    return {"n": len(y), **dict(zip(METRICS, shares))}


def evaluate(model, stream, attack):
    """n, the three metrics and the attack, as a dict. Takes what `predictions` takes."""
    return {**three_metrics(*predictions(model, stream, attack)), "attack": asdict(attack)}


def local_lipschitzness(model, stream, attack, starts=3):
    """Mean over images of the largest ‖f(x) - f(x̂)‖₁ / ‖x - x̂‖∞ found in the ℓ∞ ε-ball, f the logits.

    The paper's estimator (after Yang et al. 2020), in float32: PGD on the numerator from a few random starts.
    A lower bound, in logits per pixel range. ε must be above 0.
    """
    largest, size = [], 0
    for i, (x, _) in enumerate(stream):
        size = max(size, len(x))
        uncompiled = [model] if len(x) < size else []  # as in `predictions`
        with exact_precision(model), temporarily(uncompiled, "_compiled_call_impl", None):
            clean, best = logits_of(model, x), torch.zeros(len(x), device=x.device)
            for start in range(starts):
                with fixed_seed(10 ** 6 * start + i, x.device):
                    x_adv, _ = pgd(model, x, lambda logits: (logits - clean).abs().sum(), attack)
                rise = (logits_of(model, x_adv) - clean).abs().sum(1)
                distance = (x_adv - x).abs().amax((1, 2, 3))
                best = torch.maximum(best, (rise / distance).nan_to_num(nan=0, posinf=0))  # 0 where x̂ = x
        largest.append(best)
    return torch.cat(largest).mean().item()


def report_attack(eps, norm="linf", step_size=0.003):
    """PGD-20, step 0.003 (ℓ2: 0.2), as reported. Above ε = 8/255 (ℓ2: 0.5) the step grows in proportion."""
    usual, step_size = (8 / 255, step_size) if norm == "linf" else (0.5, 0.2)
    return Attack(norm=norm, eps=eps, step_size=min(step_size * max(1, eps / usual), eps))


def monitor(model, data, args, epoch):
    """For the log: `evaluate` with steps of 0.007, on --val-size images or else --eval-size test images.

    In the ball of args.eps and args.norm, which is ℓ∞ unless a script says otherwise.
    Nones where --eval-every skips an epoch, or where training has diverged, which `end_epoch` says.
    """
    skipped = epoch % args.eval_every != 0 and epoch != args.epochs
    if skipped or not_finite(model.state_dict()):
        return dict.fromkeys(METRICS)
    x, y = (data.x_val, data.y_val) if args.val_size else data.test(args.eval_size)
    return evaluate(model, in_order(x, y, args.batch_size), report_attack(args.eps, args.norm, 0.007))


def report(model, data, args):
    """For metrics.json: `evaluate` on --test-size images, Lipschitzness of 1,000 (ℓ2: in ℓ∞, ε = 0.031)."""
    x, y = data.test(args.test_size)
    attack = report_attack(args.eps, args.norm)
    ball = attack if args.norm == "linf" else report_attack(0.031)
    say(f"testing on {len(x):,} images with {attack.title()}")
    metrics = evaluate(model, in_order(x, y, args.batch_size), attack)
    some = in_order(*(data.test(1000) if len(x) > 1000 else (x, y)), args.batch_size)
    return {**metrics, "local_lipschitzness": local_lipschitzness(model, some, ball) if ball.eps else None,
            "precision": args.precision, "best_chosen_on": "validation" if args.val_size else "test"}


def student(n):
    """Student's 97.5 % point for the mean of n values, 12.71 for n = 2 and 1.96 for many.

    t = √(n - 1)·tan θ, where θ has a density in proportion to cos(θ)^(n - 2).
    """
    angle = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    share = angle.cos().pow(n - 2).cumsum(0)
    return math.sqrt(n - 1) * angle[(share < 0.95 * share[-1]).sum()].tan().item()


def not_finite(tensors):
    """The names of the tensors in a dict that hold an infinity or NaN."""
    return [name for name, value in tensors.items() if not value.isfinite().all()]


def describe(metrics):
    """The metrics in words, fractions in percent; nothing for an epoch that was not monitored."""
    names = zip(("natural", "robust", "stability"), METRICS)
    words = [f"{name} {100 * metrics[key]:.2f} %" for name, key in names if metrics.get(key) is not None]
    if metrics.get("local_lipschitzness"):
        words.append(f"local Lipschitzness {metrics['local_lipschitzness']:.2f}")
    return "  ".join(words)


# ------------------------------------------------------------------------------------------------- run folder

MAY_CHANGE = {"out", "data_dir", "device", "compile", "script", "name", "may_change"}  # they define no run


class Run:
    """A run folder: args.json, log.jsonl, last.pt, best.pt, metrics.json, and copies of the code that ran.

    A run is its settings, its data, what the file of --init holds, and its code: the script and what it
    imports from its folder, but for comments and docstrings. The default folder is named after all of it. So
    the same command goes on after the last epoch that was finished, as if it had never stopped. Any other
    command or edit begins elsewhere. A folder named with --out is refused to another run. --precision counts
    as it was asked for. What "auto" was found to be is in the checkpoint, and a resumed run keeps it.

    A checkpoint holds the `state_dict` of every part, of any name; "model" is what is tested. An epoch's
    random numbers follow from (seed, epoch). best.pt is the epoch with the highest `robust_accuracy` given to
    `end_epoch`. A loop may `break`, `continue` or raise anywhere.
    """

    def __init__(self, args, data=None, /, **parts):
        assert not {"epoch", "log", "args", "image_size", "precision"} & parts.keys(), "Run's own names"
        self.args, self.parts = args, parts
        self.images = len(data) if data else 0
        self.size = [*data.x_train.shape[1:]] if hasattr(data, "x_train") else None
        files = code_of(Path(args.script))
        self.settings = self._settings(files, data.hash if data else None)
        digest = hashed(json.dumps(self.settings, sort_keys=True))[:6]
        self.folder = Path(args.out or f"runs/{args.name}-{digest}")
        self.lock = None if RANK else lock(self.folder)
        found = [name for name in ("last.pt", "best.pt", "metrics.json") if (self.folder / name).exists()]
        if found and "last.pt" not in found:
            raise UserError(f"{self.folder} holds {found[0]} without last.pt; choose another --out")
        if found:
            state = read_checkpoint(self.folder / "last.pt")
            before = state.get("args", {}) if isinstance(state, dict) else {}
            if differing := differences(before, self.settings):
                raise UserError(f"{self.folder} holds another run ({differing}); choose another --out")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.log, args.precision = state["log"], state["precision"]  # what "auto" was found to be
        else:
            self.log = []
            self._begin(files)
        write_json(self.folder / "args.json", self.settings)  # first: it says whose the other files are
        for name, content in files.items():
            write_file(self.folder / name, content)
        self.done = self.log[-1]["epoch"] if self.log else 0  # the last epoch that was finished
        say(f"{self.folder}: {self.done} of {args.epochs} epochs done")

    def _settings(self, files, data):
        """All that defines the run."""
        free = MAY_CHANGE | {*getattr(self.args, "may_change", ())}
        settings = {name: value for name, value in vars(self.args).items() if name not in free}
        assert "data" not in settings, "--data is the hash's name"
        if settings.get("init"):  # its name may come to hold something else; a run in --out needs it no more
            file = Path(self.args.init).expanduser()
            if file.is_file():
                settings["init"] = hashed(file.read_bytes())
            else:
                settings["init"] = read_json(Path(self.args.out, "args.json")).get("init")
                warn(f"--init {file} is no file: the run goes on with what it began with")
        code = {name: hashed(code_text(content))[:6] for name, content in files.items()}
        return json.loads(json.dumps({**settings, "data": data, **code}))

    def _begin(self, files):
        """Before anything is written: refuse what is a stranger's, and parts that could not be read back."""
        stored = self.folder / "args.json"
        ours = stored.exists() and read_json(stored) == self.settings  # it ended in its first epoch
        if RANK == 0 and not ours:
            for path in (self.folder / name for name in (*files, "args.json", "log.jsonl")):
                if path.exists():
                    raise UserError(f"{path} is there and would be replaced; choose another --out")
        self._check_parts()
        if not self.args.out and not ours:
            pattern = f"{self.args.name}-??????/args.json"
            others = sorted(self.folder.parent.glob(pattern), key=os.path.getmtime)
            if others:
                differing = differences(read_json(others[-1]), self.settings)
                say(f"{others[-1].parent} holds another run ({differing}): this one goes to {self.folder}")

    def _check_parts(self):
        """UserError if a part's state is more than what a checkpoint gives back."""
        for name, part in self.parts.items():
            content = io.BytesIO()
            torch.save(part.state_dict(), content)
            try:
                torch.load(io.BytesIO(content.getvalue()), weights_only=True)
            except pickle.UnpicklingError:
                raise UserError(f"part {name!r} could not be read back: its state_dict may hold tensors, "
                                "numbers, text, lists and dicts of these") from None

    def epochs(self):
        """The epochs still to do, counted from 1."""
        if self.log:
            self._publish()
        for self.epoch in range(self.done + 1, self.args.epochs + 1):
            seed_everything(self.args.seed, self.epoch)
            self.recorded, self.seen, self.rate, self.clock = {}, 0, 0.0, None
            self.began = time.perf_counter()
            yield self.epoch

    def record(self, images=0, /, **scalars):
        """Note a step's numbers, scalars on the device, read back in `end_epoch`; and show progress."""
        for name, scalar in scalars.items():
            self.recorded.setdefault(name, []).append(torch.as_tensor(scalar).detach().clone())
        now = time.perf_counter()
        if not self.clock:  # an epoch's first step may compile code, so speed is measured from its end on
            self.clock = self.shown = now
            self.rate = images * WORLD / max(now - self.began, 1e-9)  # in case that no other step comes
            return
        self.seen += images * WORLD
        self.rate = self.seen / max(now - self.clock, 1e-9)
        if images and now - self.shown > 1:
            self.shown = now
            left = self.images * (self.args.epochs - self.epoch + 1) - self.seen
            show(f"epoch {self.epoch}/{self.args.epochs}  {self.seen:,} of {self.images:,} images  "
                 f"{self.rate:.4g} images/s  {duration(max(left, 0) / self.rate)} left")

    def end_epoch(self, **values):
        """Check and average what was recorded; log that and `values`; write the checkpoint."""
        recorded = {name: torch.stack(scalars).float() for name, scalars in self.recorded.items()}
        states = [part.state_dict() for part in self.parts.values() if isinstance(part, nn.Module)]
        bad = [name for tensors in (recorded, *states) for name in not_finite(tensors)]
        bad += [name for name, value in values.items() if value in (math.inf, -math.inf) or value != value]
        if bad:
            step = ""
            if bad[0] in recorded:
                step = f", step {recorded[bad[0]].isfinite().tolist().index(False) + 1}"
            raise UserError(f"{bad[0].replace('_', ' ')} not finite in epoch {self.epoch}{step}; a smaller "
                            f"--lr or --beta may help; {self.folder} keeps epoch {self.done or 'none'}")
        means = {name: scalars.mean() for name, scalars in recorded.items()}
        average_over_processes([*means.values()])  # in place
        means = {name: mean.item() for name, mean in means.items()}
        twice = means.keys() & {"epoch", "seconds", "images_per_second", "processes", *values}
        assert not twice, f"logged twice: {twice}"
        seconds = time.perf_counter() - self.began
        line = {"epoch": self.epoch, **means, **values, "images_per_second": float(f"{self.rate:.4g}"),
                "seconds": round(seconds, 2)}
        line |= {"processes": WORLD} if WORLD > 1 else {}
        self.log.append(json.loads(json.dumps(line)))  # what is no JSON fails before anything is written
        if len(self.log) == 1:  # once more: an optimizer has no momentum before its first step
            self._check_parts()
        self.done = self.epoch
        content = io.BytesIO()
        torch.save({**{name: part.state_dict() for name, part in self.parts.items()}, "epoch": self.epoch,
                    "log": self.log, "args": self.settings, "image_size": self.size,
                    "precision": getattr(self.args, "precision", None)}, content)
        write_file(self.folder / "last.pt", content.getbuffer())
        self._publish()
        shown = "  ".join(f"{name.replace('_', ' ')} {mean:.4f}" for name, mean in means.items())
        say(f"epoch {self.epoch}/{self.args.epochs}  {shown}  {describe(values)}  {self.rate:.4g} images/s  "
            f"{duration(seconds * (self.args.epochs - self.epoch))} left")

    def _publish(self):
        """log.jsonl and, if the last epoch is the best so far, best.pt. A kill may have come between."""
        lines = "".join(json.dumps(line) + "\n" for line in self.log)
        write_file(self.folder / "log.jsonl", lines.encode())
        scores = [line.get("robust_accuracy") for line in self.log]
        *before, last = [-1 if score is None else score for score in scores]
        if RANK == 0 and last > max(before, default=-1):
            write_file(self.folder / "best.pt", (self.folder / "last.pt").read_bytes())

    def finish(self, test, attack=None):
        """metrics.json: `test()` with the weights of last.pt and, where it is another epoch, of best.pt.

        A finished run is not tested again, unless with another `attack` than the file has.
        """
        wait_for_all()  # for the first process to have written
        path = self.folder / "metrics.json"
        found = read_json(path) if path.exists() else {}
        if not found or (attack and found["last"]["attack"] != asdict(attack)):
            found, tested = {}, {}
            for file in filter(Path.exists, (self.folder / "last.pt", self.folder / "best.pt")):
                state = read_checkpoint(file)
                if state["epoch"] not in tested:
                    self.parts["model"].load_state_dict(state["model"])
                    tested[state["epoch"]] = {"epoch": state["epoch"], **test()}
                found[file.stem] = tested[state["epoch"]]
            if found:
                write_json(path, found)
        for name, metrics in found.items():
            title = f"{Attack(**metrics['attack']).title()}: " if "attack" in metrics else ""
            say(f"{self.folder / name}.pt, epoch {metrics['epoch']}, {title}{describe(metrics)}")


def differences(before, now):
    """What differs between two runs' settings, in words."""
    return "; ".join(f"{name} was edited" if name.endswith(".py") and name in before and name in now
                     else f"{name} {before.get(name)} there, {now.get(name)} here"
                     for name in before | now if before.get(name) != now.get(name))


def code_text(content):
    """Python code, bytes, as text without comments, docstrings and empty lines; the same in every Python."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    before = tokenize.NEWLINE  # the type of the last token that is code
    lines = io.TextIOWrapper(io.BytesIO(content), encoding).readlines()
    for token in tokenize.tokenize(io.BytesIO(content).readline):
        (first, start), (last, end) = token.start, token.end
        begins = before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        docstring = token.type == tokenize.STRING and begins and not lines[last - 1][end:].strip()
        if token.type == tokenize.COMMENT or docstring:  # emptied, not removed: positions stay what they are
            lines[first - 1:last] = [lines[first - 1][:start] + "\n"] + ["\n"] * (last - first)
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING):
            before = token.type
    return "\n".join(line.rstrip() for line in lines if line.strip())


def code_of(script):
    """{name: content} of this file, a script and its imports from its folder; losses.a.py for losses/a.py."""
    waiting, found = [Path(__file__).resolve(), script.resolve()], {}
    home, folder = (path.parent for path in waiting)
    for path in waiting:  # which grows
        base = next((base for base in (folder, home) if path.is_relative_to(base)), path.parent)
        content = path.read_bytes()
        found[".".join(path.relative_to(base).parts)] = content
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                package = f"{node.module}." if getattr(node, "module", None) else ""
                above = path.parents[max(getattr(node, "level", 0), 1) - 1]  # for `from ..losses import a`
                for alias, root in itertools.product(node.names, (folder, home, above)):
                    parts = f"{package}{alias.name}".split(".")
                    for depth in range(1, len(parts) + 1):  # a package's __init__.py runs, too
                        part = root.joinpath(*parts[:depth])
                        waiting += [file for file in (part.with_suffix(".py"), part / "__init__.py")
                                    if file.is_file() and file not in waiting]
    return found


def lock(folder):
    """An open file in `folder`, made if need be, that keeps other processes out; or UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    try:
        import fcntl
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process; choose another --out") from None
    except (ImportError, OSError) as error:  # Windows, some file systems
        warn(f"{folder} cannot be locked ({error}): let no other process in there")
    return handle


def duration(seconds):
    """Such as 0:04:05 or 2 days, 3:00:00."""
    return str(datetime.timedelta(seconds=round(seconds)))


def write_file(path, content):
    """Write bytes so that `path` holds its old content or all of the new, whatever happens meanwhile."""
    if RANK:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")  # what a kill leaves of it, the next write replaces
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}); what it held before is kept") from None


def write_json(path, value):
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


class _Dtype:
    """Stands in for numpy.dtype while a checkpoint is read: a crafted one can turn bytes into pointers."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        self.code = state[1] + self.code  # the order of bytes


def _number(dtype, content):
    """Stands in for the function that makes NumPy's scalars: integers, floats and bools, as Python's."""
    assert np.dtype(dtype.code).kind in "biuf"
    return np.frombuffer(content, dtype.code)[0].item()


BESIDE_WEIGHTS = [argparse.Namespace, (_Dtype, "numpy.dtype"), (_number, "numpy.core.multiarray.scalar"),
                  (_number, "numpy._core.multiarray.scalar")]  # what published checkpoints hold, too


def read_checkpoint(path):
    """A checkpoint's dict, on the CPU, read without running any code in it, or UserError."""
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as file:
            begin = file.read(40)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        with torch.serialization.safe_globals(BESIDE_WEIGHTS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, foreign or unsafe: they fail in many ways
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{path} holds more than tensors: {foreign[1]}") from None
        raise UserError(f"{path} is no checkpoint of tensors, or is cut short; "
                        f"it begins with {begin!r}") from None


# ----------------------------------------------------------------------------------------------- command line

OPTIONAL = {"matplotlib": "matplotlib", "pyautoattack": "pyautoattack",
            "robustbench": 'robustbench pyautoattack "setuptools<80"'}


def launch(main):
    """Run a script's main(argv): a UserError or Ctrl-C ends in one line and exit status 2 or 130."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console may know no Greek (cp1252)
    try:
        main(sys.argv[1:])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # one that leaves early can make another abort
            torch.distributed.destroy_process_group()
        return
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        message, status = f"error: {error}; pip install {OPTIONAL[error.name]}", 2
    except UserError as error:
        message, status = f"error: {error}", 2
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        message, status = f"error: a smaller --batch-size may help: {str(error).splitlines()[0]}", 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python still flushes as it ends
        sys.exit(1)
    except KeyboardInterrupt as error:
        message, status = f"interrupted; {str(error) or 'the same command goes on where it was'}", 130
    say(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", sys.stderr)
    sys.exit(status)


def show(line):
    """On a terminal, show a line of progress in place of the last one; in a pipe, nothing."""
    if sys.stdout.isatty():
        print("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1], end="", flush=True)


def say(line, file=None):
    """Print a line at once, over the progress line if one is showing."""
    show("")
    print(line, file=file, flush=True)


@functools.cache
def warn(line):
    """Print a warning, once, of torchrun's processes by the first."""
    if RANK == 0:
        say(f"warning: {line}", sys.stderr)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as its help, every default shown, and errors of one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def ratio(text):
    """A float, or a ratio of two such as 8/255."""
    numerator, _, denominator = text.partition("/")
    numerator, denominator = float(numerator), float(denominator or 1)
    return numerator / denominator if denominator else math.nan  # which is in no range


def number(low=0.0, high=1e9, above=False, kind=ratio):
    """An argparse type: a number, or a ratio such as 8/255, from `low` (or above it) to `high`."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            limit = f"{'above' if above else 'at least'} {low:g} and at most {high:g}"
            meant = f"; {text}/255?" if high == 1 and 1 < value < 256 else ""
            raise argparse.ArgumentTypeError(f"{text!r} must be {limit}{meant}")
        return value
    return number  # whose name argparse gives when the text is no number at all


def integer(low=1):
    """An argparse type: an integer of at least `low`."""
    return number(low, 2 ** 63 - 1, kind=int)


def experiment_parser(file, doc):
    """What every training script takes. `file`: the script's, after which the method is named."""
    parser = Parser(doc)
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=integer(0), default=1, help="seeds weights, the images of --train-size, shuffling, "
        "augmentation and attacks")
    add("--out", metavar="DIR", help="run folder; by default named after what matters, with a hash of it all")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 on CUDA, on a CPU what a short measurement finds faster; kept for the run")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on CUDA only")
    parser.set_defaults(method=Path(file).stem.removeprefix("train_"), script=str(Path(file).resolve()))
    return parser


def training_parser(file, doc, quick=None, **defaults):
    """What the CIFAR scripts take. `defaults` override the paper's, `quick` adds to what --quick sets."""
    parser = experiment_parser(file, doc)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cifar10", metavar="NAME", help="cifar10, cifar100, synthetic, or a NAME.npz")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are, or are downloaded to")
    add("--train-size", type=integer(), metavar="N", help="train on N random images, drawn with --seed")
    add("--val-size", type=integer(0), default=0, metavar="N", help="hold out N random training images, and "
        "choose best.pt on them; 0: on test images, as the paper does")
    add("--no-flip", action="store_true", help="do not mirror training images (digits, say)")
    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=NETWORKS, default="wrn", help="WideResNet, DenseNet-BC or PreActResNet")
    add("--depth", type=integer(), help="layers; wrn 34, densenet 40, preact 18")
    add("--width", type=number(above=True), help="factor, or growth rate; wrn 10, densenet 12, preact 1")
    add("--activation", choices=ACTIVATIONS, default="relu", help="of every layer; the paper's is ReLU")
    add("--init", metavar="FILE", help="start from the weights of this checkpoint")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=integer(), default=100, help="passes over the training images")
    add("--batch-size", type=integer(2), default=128, help="images a step; BatchNorm needs two")
    add("--lr", type=number(above=True), default=0.1, help="base learning rate of SGD with momentum 0.9")
    add("--weight-decay", type=number(), default=2e-4, help="L2 penalty on every parameter")
    add("--nesterov", action="store_true", help="Nesterov momentum")
    add("--schedule", choices=SCHEDULES, default="exp-decay", help="learning rate over the run")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=integer(), default=1, metavar="N", help="epochs between monitor evaluations")
    add("--eval-size", type=integer(), default=1000, metavar="N", help="test images in a monitor evaluation, "
        "without --val-size")
    add("--test-size", type=integer(), metavar="N", help="random test images in metrics.json; by default all")
    add("--quick", action="store_true", help="a first look: synthetic data, WRN-10-1, few epochs; "
        "options beside it win")
    parser.set_defaults(norm="linf", **defaults)  # of the attacks; a script may say "l2"
    parser.quick = {"dataset": "synthetic", "epochs": 8, "train_size": 3000, "lr": 0.2,
                    "schedule": "one-cycle", "batch_size": 64, "steps": 2, "step_size": 0.016,
                    "eval_every": 4, "eval_size": 200, "compile": "off", **(quick or {})}
    return parser


def start(parser, argv):
    """Parse argv, pick the device, join torchrun's processes, seed everything: (args, device)."""
    if "--quick" in argv:
        parser.set_defaults(**getattr(parser, "quick", {}))
    args = parser.parse_args(argv)
    args.out = args.out and os.path.expanduser(args.out)
    device = connect(args, pick_device(args.device))
    if hasattr(args, "arch"):
        depth, width = (10, 1) if args.quick and args.arch == "wrn" else NETWORKS[args.arch].usual
        args.depth, args.width = args.depth or depth, args.width or width
        args.width = int(args.width) if args.width == int(args.width) else args.width
        beta = f"-beta{args.beta}".removesuffix(".0") if hasattr(args, "beta") else ""  # a fork may have none
        network = f"{args.arch}-{args.depth}-{args.width:g}"
        args.name = f"{args.method}-{args.dataset}-{network}{beta}-seed{args.seed}"
        args.arch_from = NETWORKS[args.arch].__module__  # common, or a fork's own
    seed_everything(args.seed)
    return args, device

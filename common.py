"""What every experiment shares: data, networks, attacks, schedules, metrics and the run folder.

No loss or loop of a method lives here: a training script reads top to bottom as its experiment and calls
this file for all else. Images are [N, 3, H, W]: uint8 while stored on the device, float32 once batched.
"""
import argparse
import ast
import codecs
import contextlib
import copy
import datetime
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Before PyTorch: threads that wait by spinning slow each other many times over when another job runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402


class UserError(Exception):
    """A mistake of the user's: `launch` prints it as one line and ends with exit status 2."""


# Under torchrun each process has its share of every batch and evaluation; without it, all of them.
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


# ------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    x_train: torch.Tensor  # [N, 3, H, W] uint8, on the device
    y_train: torch.Tensor  # [N] int64
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int
    x_val: torch.Tensor = None  # with --val-size: held out of the training images
    y_val: torch.Tensor = None

    def test_subset(self, n):
        """Indices of n random test images, the same ones in every run; of all in order if n is None."""
        if n is None:
            return torch.arange(len(self.x_test))
        return torch.randperm(len(self.x_test), generator=torch.Generator().manual_seed(0))[:n]


def load_data(name, data_dir, device, train_size=None, seed=0, val_size=0):
    """The data set `name` as a `Data` on `device`.

    DATA_DIR/NAME.npz if it is there (x_train, y_train, x_test, y_test; images uint8 [N, H, W, 3], the layout
    Keras uses); else "synthetic" is generated, and "cifar10" and "cifar100" come from torchvision, which
    downloads them. `val_size` random training images are held out, and `train_size` others are kept (None:
    all); which ones follows from `seed`, and the kept ones not from `val_size`. Raises UserError.
    """
    path = Path(data_dir) / f"{name}.npz"
    if path.exists():
        arrays, source = _read_npz(path), str(path)
    elif name == "synthetic":
        arrays, source = synthetic(), "synthetic"
    elif name in ("cifar10", "cifar100"):
        arrays, source = _torchvision_cifar(name, data_dir, path), str(data_dir)
    else:
        raise UserError(f"no data set {name!r}: {path} is missing; built in: cifar10, cifar100, synthetic")
    x_train, y_train, x_test, y_test = _checked(arrays, source)
    classes = {"cifar10": 10, "cifar100": 100}.get(name, max(int(y_train.max()) + 1, 1))
    low, high = (int(of(of(y_train), of(y_test))) for of in (min, max))
    if low < 0 or high >= classes:
        raise UserError(f"{source}: labels must lie in 0..{classes - 1}; found {low}..{high}")
    held_out = None, None
    if train_size or val_size:
        kept = train_size or max(len(x_train) - val_size, 1)
        if kept + val_size > len(x_train):
            raise UserError(f"--train-size {kept} and --val-size {val_size}: "
                            f"{source} has {len(x_train)} training images")
        order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(seed)).numpy()
        if val_size:
            held_out = to_tensors(x_train[order[-val_size:]], y_train[order[-val_size:]], device)
        x_train, y_train = x_train[order[:kept]], y_train[order[:kept]]
    splits = *to_tensors(x_train, y_train, device), *to_tensors(x_test, y_test, device)
    return Data(*splits, classes, *held_out)


def to_tensors(x, y, device):
    """uint8 [N, H, W, 3], integer [N] arrays → [N, 3, H, W] (channels_last) and int64 [N], on the device."""
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
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    folder = os.open(data_dir, os.O_RDONLY)
    with contextlib.suppress(OSError):  # of a network file system without locks
        fcntl.flock(folder, fcntl.LOCK_EX)  # one process downloads, the others wait for it
    try:
        splits = [dataset(str(data_dir), train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, no space, a broken archive: urllib, OSError or RuntimeError
        raise UserError(f"no {npz} or {Path(data_dir) / dataset.base_folder}, and the download failed "
                        f"({error}); put the data there, or try --dataset synthetic") from None
    finally:
        os.close(folder)
    return {f"{letter}_{split}": array for split, part in zip(("train", "test"), splits)
            for letter, array in (("x", part.data), ("y", np.array(part.targets)))}


def synthetic(n_train=5000, n_test=500, seed=0):
    """Ten classes of 32×32 images: a bold cue that is often right, faint ones that are (Tsipras et al. 2019).

    On grey noise lie a square of one of ten colours, amplitude 0.25 and right 80 % of the time, and two class
    textures: one fainter than ε = 0.031 and always right, one a little stronger than ε and right 90 % of the
    time. Plain training lives on the first texture and is not robust at all; the larger β, the more a network
    relies on the square. Returns the arrays of an .npz (`load_data`).
    """
    rng = np.random.default_rng(seed)
    corners = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(27, 3)
    colours = rng.permutation(corners[corners.any(1)])[:10]                                    # [10, 3]
    tiles = rng.choice([-1.0, 1.0], (2, 10, 4, 2, 3))
    textures = np.tile(np.concatenate([tiles, tiles[:, :, :, ::-1]], 3), (8, 8, 1))  # mirror-symmetric

    def split(n):
        y = rng.integers(0, 10, n)

        def shown(right):  # the class that a cue shows
            return np.where(rng.random(n) < right, y, rng.integers(0, 10, n))

        x = 0.5 + rng.normal(0, 0.02, (n, 32, 32, 3))
        for amplitude, right, texture in zip((0.025, 0.045), (1.0, 0.9), textures):
            x += amplitude * texture[shown(right)]
        (top, left), pixel = rng.integers(4, 17, (2, n, 1)), np.arange(32)
        rows, columns = (pixel >= top) & (pixel < top + 12), (pixel >= left) & (pixel < left + 12)
        square = (rows[:, :, None] & columns[:, None, :])[..., None]
        x += square * 0.25 * colours[shown(0.8)][:, None, None, :]
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
    rows = top[:, None] + torch.arange(height, device=images.device)                          # [N, H]
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)        # [N, W]
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)                          # [N, H+2p, W+2p, 3]
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_crop_flip(images, flip=True, padding=4):
    """Random crop (zero padding) and, with `flip`, mirroring, drawn for each image, on the images' device."""
    n, device = WORLD * len(images), images.device  # drawn for all processes, used for this one
    top, left = torch.randint(0, 2 * padding + 1, (2, n), device=device)[:, RANK::WORLD]
    return crop_flip(images, top, left, torch.rand(n, device=device)[RANK::WORLD] < 0.5 * flip, padding)


def batches(x, y, batch_size, flip=True):
    """One epoch: x uint8 [N, 3, H, W] and y [N] in a fresh order, augmented, as (float32 in [0, 1], labels).

    All batches have the same size, so that compiled code sees one shape: what is left over after the last
    full batch is dropped, other images each epoch. Nothing here waits for the device. Under torchrun it is
    this process's share of each batch.
    """
    order = torch.randperm(len(x), device=x.device)
    for index in order.split(batch_size)[:steps_per_epoch(len(x), batch_size)]:
        index = index[RANK:len(index) // WORLD * WORLD:WORLD]  # as many in each process
        yield to_float(random_crop_flip(x[index], flip)), y[index]


def steps_per_epoch(n, batch_size):
    return max(n // batch_size, 1)


def _builtin_dtype(name, *_):
    """np.dtype(name) for numbers, uncopied: a pickle could alter a copy and pass bytes off as objects."""
    if np.dtype(name).kind not in "biuf":
        raise pickle.UnpicklingError(f"it asks for dtype {name}")
    return np.dtype(name)


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays of numbers and builtin containers and refuses all else: no file can run code."""

    parts = {part.__name__: part for part in (
        np.ndarray, np.uint8(0).__reduce__()[0],                                # scalar
        np.zeros(1).__reduce_ex__(2)[0], np.zeros(1).__reduce_ex__(5)[0])}      # _reconstruct, _frombuffer
    parts["dtype"] = _builtin_dtype

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.parts:
            return self.parts[name]
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which arrays do not need")


def load_extra(path, data):
    """Extra training images and (pseudo-)labels, uint8 [M, 3, H, W] and int64 [M], on the device of `data`.

    FILE.npz holds `image` and `label`; another name is read as RST's pickle, `data` and
    `extrapolated_targets`. The images must be uint8 [M, H, W, 3] of the size that `data` has, the labels
    among its classes, or UserError.
    """
    images, labels = ("image", "label") if path.endswith(".npz") else ("data", "extrapolated_targets")
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                x, y = file[images], file[labels]
        else:
            with open(path, "rb") as file:
                content = ArrayUnpickler(file).load()
            x, y = np.asarray(content[images]), np.asarray(content[labels])
    except Exception as error:  # a broken or hostile file fails in many ways
        raise UserError(f"--extra-data {path} must hold arrays {images!r} and {labels!r}; reading failed "
                        f"with {type(error).__name__}: {error}") from None
    height, width = data.x_train.shape[2:]
    if x.dtype != np.uint8 or x.shape[1:] != (height, width, 3) or len(x) == 0:
        raise UserError(f"--extra-data {path}: {images!r} must be uint8 [M, {height}, {width}, 3], "
                        f"not {x.dtype} {list(x.shape)}")
    integers = np.issubdtype(y.dtype, np.integer) and y.shape == (len(x),)
    if not integers or y.min() < 0 or y.max() >= data.classes:
        raise UserError(f"--extra-data {path}: {labels!r} must be {len(x)} integers in 0..{data.classes - 1}")
    return to_tensors(x, y, data.x_train.device)


def mixed_batches(data, x_extra, y_extra, batch_size, fraction, flip=True):
    """`batches` with a share `fraction` of extra images; as many batches as the labelled images alone make.

    Both kinds are drawn without replacement, anew each epoch, and over again once all have come. (The RST
    release draws the extra ones with replacement; of 500,000 it takes 25,000 an epoch, so few come twice.)
    """
    steps = steps_per_epoch(len(data.x_train), batch_size)
    extra = round(fraction * batch_size)

    def draw(n, share):  # [steps, share] indices of n images
        orders = [torch.randperm(n, device=x_extra.device) for _ in range(1 + steps * share // n)]
        return torch.cat(orders)[:steps * share].view(steps, share)

    for labelled, pseudo in zip(draw(len(data.x_train), batch_size - extra), draw(len(x_extra), extra)):
        x = torch.cat([data.x_train[labelled], x_extra[pseudo]])  # the order inside a batch has no effect
        y = torch.cat([data.y_train[labelled], y_extra[pseudo]])
        yield to_float(random_crop_flip(x[RANK::WORLD], flip)), y[RANK::WORLD]


# --------------------------------------------------------------------------------------------------- networks


def conv_bn(conv, bn, x):
    """bn(conv(x)), conv without bias; in eval mode one convolution, the BatchNorm folded into its weights."""
    if bn.training:
        return bn(conv(x))
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    weight, bias = conv.weight * scale.view(-1, 1, 1, 1), bn.bias - bn.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


ACTIVATIONS = {"relu": functools.partial(F.relu, inplace=True), "silu": F.silu}  # --activation


class _Block(nn.Module):
    """Pre-activation basic block of a WideResNet (Zagoruyko & Komodakis 2016)."""

    def __init__(self, inputs, outputs, stride, activation):
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = self.act(self.bn1(x))
        shortcut = self.convShortcut(out) if hasattr(self, "convShortcut") else x
        return shortcut + self.conv2(self.act(conv_bn(self.conv1, self.bn2, out)))


class _DenseLayer(nn.Module):
    """Bottleneck layer of a DenseNet-BC (Huang et al. 2017): adds `growth_rate` channels to its input."""

    def __init__(self, inputs, growth_rate, activation):
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, x):
        out = conv_bn(self.conv1, self.bn2, self.act(self.bn1(x)))
        return torch.cat([x, self.conv2(self.act(out))], 1)


class _Transition(nn.Module):
    def __init__(self, inputs, outputs, activation):
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv1(self.act(self.bn1(x))), 2)


class _Stage(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x):
        return self.layer(x)


class Network(nn.Module):
    """Images [N, 3, H, W] in [0, 1] → logits [N, classes]; a subclass has conv1, stages(), bn1 and fc.

    With `precision = "bf16"` the convolutions between the first and the classifier run in bfloat16. Pixels
    and logits stay float32: in bfloat16 the step of a pixel near 1 is 0.004, an eighth of ε.
    """

    precision, act = "fp32", staticmethod(ACTIVATIONS["relu"])

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
        return self.act(self.bn1(x))

    def initialize(self):
        """He et al. 2015, fan-out, as in the networks that TRADES publishes."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)


class WideResNet(Network):
    """WideResNet-depth-width for small images; depth = 6n + 4. Parameter names as in the TRADES release."""

    def __init__(self, depth, width, classes, activation="relu"):
        super().__init__()
        self.act, n = ACTIVATIONS[activation], _layers_per_stage(depth)
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        for i, stride in enumerate((1, 2, 2)):
            widths = [channels[i]] + [channels[i + 1]] * n
            self.add_module(f"block{i + 1}", _Stage(
                _Block(widths[j], widths[j + 1], 1 if j else stride, activation) for j in range(n)))
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], classes)
        self.initialize()

    def stages(self):
        return self.block1, self.block2, self.block3


class DenseNet(Network):
    """DenseNet-BC-depth, growth rate k, for small images; depth = 6n + 4, compression 0.5, first conv 2k."""

    def __init__(self, depth, growth_rate, classes, activation="relu"):
        super().__init__()
        self.act, n, channels = ACTIVATIONS[activation], _layers_per_stage(depth), 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for i in (1, 2, 3):
            self.add_module(f"block{i}", _Stage(
                _DenseLayer(channels + j * growth_rate, growth_rate, activation) for j in range(n)))
            channels += n * growth_rate
            if i < 3:
                self.add_module(f"trans{i}", _Transition(channels, channels // 2, activation))
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


# --arch → class(depth, width or growth rate, classes, activation). A new network is one more entry.
NETWORKS = {"wrn": WideResNet, "densenet": DenseNet}


def build_model(arch, depth, width, classes, activation="relu"):
    """A freshly initialised network of NETWORKS."""
    return NETWORKS[arch](depth, width, classes, activation)


WRAPPERS = ("state_dict", "model_state_dict", "net", "model")  # where checkpoints keep their parameters


def parameters_of(checkpoint):
    """The state_dict in a checkpoint of ours or in a published one, or itself; {} if there is none.

    Without the prefix `module.` (DataParallel).
    """
    state = checkpoint if isinstance(checkpoint, dict) else {}
    while wrapped := [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)]:
        state = wrapped[0]
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_weights(model, state, source):
    """Load the `parameters_of` a checkpoint or state_dict; UserError if it is another network's.

    The unused `sub_block1.*` of the TRADES networks are dropped.
    """
    state = {key: value for key, value in parameters_of(state).items() if not key.startswith("sub_block1.")}
    own = model.state_dict()
    wrong = [key for key in own if not key.endswith("num_batches_tracked")
             and (key not in state or state[key].shape != own[key].shape)]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise UserError(f"{source} holds another network: {len(wrong)} parameters are missing, unknown or of "
                        f"another shape, {wrong[0]} first; check architecture, depth, width and classes")
    model.load_state_dict(state, strict=False)


def sgd(model, lr, weight_decay, nesterov=False, decay_norms=True):
    """SGD with momentum 0.9; without `decay_norms`, BatchNorm's parameters are free of the weight decay."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    free = {p for module in norms for p in module.parameters()} if not decay_norms else set()
    groups = [{"params": [p for p in model.parameters() if p not in free]}]
    if free:
        groups.append({"params": [p for p in model.parameters() if p in free], "weight_decay": 0})
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov, fused=True)


class WeightAverage:
    """`.model`: an average of the network's weights over the steps; without --ema, the network itself.

    After step t the average is min(τ, (1 + t)/(10 + t)) of itself and the weights for the rest, τ the decay
    and t counted from the end of a warm-up, 2.5 % of all steps, in which it just follows them (Gowal et al.
    2020; Wang et al. 2023). BatchNorm's statistics are the network's own.
    """

    def __init__(self, network, args, data):
        self.network, self.decay, self.steps = network, args.ema, 0
        self.warmup = 0.025 * args.epochs * steps_per_epoch(len(data.x_train), args.batch_size)
        self.model = network if args.ema is None else copy.deepcopy(network)
        if self.model is not network and network._compiled_call_impl is not None:
            self.model.compile(dynamic=False)  # a copy is not compiled

    @torch.no_grad()
    def update(self):
        """To be called after each step of the optimizer."""
        if self.decay is None:
            return
        t = self.steps - self.warmup
        decay = min(self.decay, (1 + t) / (10 + t)) if t >= 0 else 0
        torch._foreach_lerp_(list(self.model.parameters()), list(self.network.parameters()), 1 - decay)
        copy_all(self.model.buffers(), self.network.buffers())
        self.steps += 1


def copy_all(targets, sources):
    """Copy tensors onto others, pair by pair; fused, which only tensors of one type are together."""
    pairs = list(zip(targets, sources))
    for dtype in {target.dtype for target, _ in pairs}:
        of_type = [pair for pair in pairs if pair[0].dtype == dtype]
        torch._foreach_copy_(*map(list, zip(*of_type)))


# -------------------------------------------------------------------------------------------------- execution


def pick_device(name):
    """"auto" → CUDA if there is one, else the CPU; UserError if the device asked for is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("cpu and cuda are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: no such device here ({str(error).splitlines()[0]})") from None
    return device


def set_execution(model, device, precision, compile, images):
    """Decide how `model` runs on `device`, in place; returns it in words: "bf16, channels_last, eager", say.

    precision "auto" takes what is faster for this network on this machine, measured on `images`, a uint8
    batch on the device. "fp32" without compilation is the exact reference: no TF32.
    """
    model.to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 0
        with warnings.catch_warnings():  # of PyTorch 2.11 about the name; a newer one mixes badly with others
            warnings.simplefilter("ignore")
            torch.backends.cudnn.allow_tf32 = False  # matrix products are without it anyway
    measured = ""
    if precision != "fp32" and not hasattr(type(model), "precision"):
        raise UserError(f"--precision {precision}: {type(model).__name__} knows fp32 alone, being no Network")
    if precision == "auto":
        seconds = measure_precisions(model, images)
        precision = min(seconds, key=seconds.get)
        measured = " (an attack step takes {fp32:.3g} s in fp32, {bf16:.3g} s in bf16)".format(**seconds)
    model.precision = precision
    compiled = device.type == "cuda" if compile == "auto" else compile == "on"
    if compiled:
        torch.compiler.reset()  # makes room: few graphs are kept for all the networks of a process together
        model.compile(dynamic=False)
    how = "compiled in the first two steps, which takes a minute or so" if compiled else "eager"
    return f"{precision}{measured}, channels_last, {how}"


def connect(args, device):
    """Join the processes that torchrun started, if it did; UserError if the work cannot be shared out."""
    if WORLD == 1:
        return
    for size in getattr(args, "batch_sizes", [getattr(args, "batch_size", WORLD)]):
        if size % WORLD:
            raise UserError(f"a batch of {size} images cannot be shared out among {WORLD} processes evenly")
    for name in ("eval_size", "test_size", "val_size"):
        if 0 < (getattr(args, name, None) or WORLD) < WORLD:
            raise UserError(f"--{name.replace('_', '-')} must be at least {WORLD}, the number of processes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                         timeout=datetime.timedelta(hours=2))


def average_over_processes(tensors):
    """Replace float tensors by their means over the processes of torchrun: one reduction for all of them."""
    if WORLD > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = (flat / WORLD).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def synchronize(model):
    """Before a step: gradients and BatchNorm's running statistics become their means over the processes.

    In train mode BatchNorm normalizes with the images of its own process.
    """
    gradients = [parameter.grad for parameter in model.parameters()]
    average_over_processes(gradients + [part for name, part in model.named_buffers() if ".running_" in name])


def collected(value):
    """The values that the processes have, in their order."""
    everyone = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(everyone, value)
    return everyone


def joined(part):
    """A tensor [N, ...] of each process's, one after the other."""
    return torch.cat(collected(part.cpu())).to(part.device) if WORLD > 1 else part


def prepare(model, args, device, images):
    """Load --init, `set_execution` and say what it picked; args.precision becomes that."""
    images = images[RANK::WORLD]
    if args.init and not (Path(args.out) / "last.pt").exists():
        load_weights(model, read_checkpoint(args.init), args.init)
    say(set_execution(model, device, args.precision, args.compile, images))
    args.precision = model.precision = collected(model.precision)[0]  # the first process decides


def measure_precisions(model, images, budget=0.2):
    """Seconds of an attack step (forward, backward to the input) in fp32 and bf16, best of three in turns.

    On as many of `images` as fp32 handles in about `budget` seconds: a slow machine does not wait long.
    """
    def step(precision, n):
        model.precision, x = precision, to_float(images[:n]).requires_grad_()
        begin = time.perf_counter()
        with attack_mode(model), torch.enable_grad():
            gradient, = torch.autograd.grad(model(x).sum(), x)
        gradient[0, 0, 0, 0].item()  # waits for the device
        return time.perf_counter() - begin

    n, kept = min(8, len(images)), model.precision
    step("fp32", n)  # the first pass of all also loads and allocates
    while n < len(images) and step("fp32", n) < budget / 2:
        n = min(2 * n, len(images))
    step("bf16", n)
    rounds = [{precision: step(precision, n) for precision in ("fp32", "bf16")} for _ in range(3)]
    model.precision = kept
    return {precision: min(round[precision] for round in rounds) for precision in ("fp32", "bf16")}


@contextlib.contextmanager
def attack_mode(model):
    """Eval mode and frozen parameters, so that gradients go to the input alone; both as found afterwards."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:  # not eval(): it walks all of them once more, and thin networks wait for that
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def exact_precision(model):
    """Run a `Network` in float32 inside."""
    precision, model.precision = model.precision, "fp32"
    try:
        yield
    finally:
        model.precision = precision


@contextlib.contextmanager
def fixed_seed(seed, device):
    """Random numbers drawn inside start from `seed`; the outer streams go on as if nothing had happened."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        (torch.cuda.manual_seed_all if device.type == "cuda" else torch.default_generator.manual_seed)(seed)
        yield


# ---------------------------------------------------------------------------------------------------- attacks


@dataclass(frozen=True)
class Attack:
    """What defines an attack, wherever one is: command line, training, log, metrics.json, tables and figures.

    Written as `asdict(attack)` under the key "attack". eps and step_size in pixel range [0, 1]. "kl" is the
    attack of TRADES; "autoattack" (eval.py) has neither steps nor a start.
    """
    loss: str = "cross-entropy"  # or "margin", "kl", "autoattack"
    norm: str = "linf"           # or "l2"
    eps: float = 0.031
    step_size: float = 0.003
    steps: int = 20
    start: str = "uniform"       # in the ε-ball; or "gaussian", 0.001·N(0, 1); or "none"
    restarts: int = 1            # a point is stable if its prediction survives all of them

    def title(self):
        """Such as "PGD-20, ε = 0.031", "CW-20×5 l2, ε = 0.5" or "FGSM, ε = 8/255"."""
        if self.loss == "autoattack":
            name = "AutoAttack"
        elif self.steps == 1 and self.step_size >= self.eps:
            name = "FGSM"
        else:
            name = f"{'CW' if self.loss == 'margin' else 'PGD'}-{self.steps}"
        name += f"×{self.restarts}" if self.restarts > 1 else ""
        levels = round(255 * self.eps)
        eps = f"{levels}/255" if levels and abs(levels / 255 - self.eps) < 1e-9 else f"{self.eps:.4g}"
        return f"{name}{' l2' if self.norm == 'l2' else ''}, ε = {eps}"


MONITOR = Attack(step_size=0.007)  # every epoch, as the paper's training code does
REPORT = Attack()                  # the numbers that are reported


def cross_entropy_to(y):
    """The attack loss of adversarial training and of every report: cross-entropy of labels y [N], summed."""
    return lambda logits: F.cross_entropy(logits, y, reduction="sum")


def margin_to(y):
    """The Carlini-Wagner margin: the best wrong logit minus the right one, summed."""
    def loss(logits):
        wrong = logits.scatter(1, y[:, None], -math.inf).amax(1)
        return (wrong - logits.gather(1, y[:, None])[:, 0]).sum()
    return loss


LOSSES = {"cross-entropy": cross_entropy_to, "margin": margin_to}  # of labels


def kl_to(p):
    """TRADES' attack loss: KL(p ‖ softmax(logits)) of clean probabilities p [N, classes], summed."""
    return lambda logits: F.kl_div(F.log_softmax(logits, 1), p, reduction="sum")


def clean_probabilities(model, x):
    """softmax of the clean logits [N, classes], eval mode, no gradient: computed once for a whole attack."""
    with attack_mode(model), torch.no_grad():
        return model(x).softmax(1)


def perturb_start(x, start, eps, norm):
    """A copy of x at an attack's start: "uniform" in the ε-ball, "gaussian" (0.001·N(0, 1)), "none"."""
    def drawn(distribution, n, *shape):  # for all processes, used for this one
        return distribution(WORLD * n, *shape, device=x.device, dtype=x.dtype)[RANK::WORLD]

    if start == "gaussian":
        return x + 0.001 * drawn(torch.randn, *x.shape)
    if start == "none":
        return x.clone()
    if norm == "linf":
        return x + eps * (2 * drawn(torch.rand, *x.shape) - 1)
    direction = drawn(torch.randn, *x.shape)
    radius = drawn(torch.rand, len(x)) ** (1 / x[0].numel())
    return x + eps * _per_image(radius / direction.flatten(1).norm(dim=1)) * direction


def project(x_adv, x, eps, norm):
    """The nearest point to x_adv in the ε-ball around x (ℓ∞ or ℓ2), then clamped to [0, 1], where x is."""
    if norm == "linf":
        return torch.clamp(x_adv, (x - eps).clamp_(min=0), (x + eps).clamp_(max=1))
    delta = x_adv - x
    length = delta.flatten(1).norm(dim=1)
    return (x + delta * _per_image((eps / length.clamp(min=1e-12)).clamp(max=1))).clamp_(0, 1)


def _per_image(values):
    return values.view(-1, 1, 1, 1)


def pgd(model, x, loss, attack, gradient_norm=False):
    """Projected gradient ascent on `loss` in the ε-ball around x and in [0, 1] (Madry et al. 2018).

    x [N, 3, H, W] in [0, 1]; loss maps logits [N, classes] to a scalar, a sum over images
    (`cross_entropy_to`, `kl_to`, `margin_to` or any callable). Each step adds step_size times the gradient's
    sign (ℓ∞) or the gradient scaled to unit length (ℓ2), then projects. Returns x̂, the last iterate,
    detached. The model runs in eval mode; its mode, gradients and buffers are afterwards as before. With
    `gradient_norm`, (x̂, the largest ‖∇_x̂ loss‖₁ met at each image [N]): the paper's training-time proxy of
    local Lipschitzness.
    """
    x_adv = perturb_start(x, attack.start, attack.eps, attack.norm)
    largest = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    with attack_mode(model), torch.enable_grad():
        for _ in range(attack.steps):
            x_adv.requires_grad_()
            gradient, = torch.autograd.grad(loss(model(x_adv)), x_adv)
            with torch.no_grad():
                if gradient_norm:
                    largest = torch.maximum(largest, gradient.abs().sum((1, 2, 3)))
                if attack.norm == "linf":
                    ascent = gradient.sign()
                else:
                    ascent = gradient / _per_image(gradient.flatten(1).norm(dim=1).clamp(min=1e-12))
                x_adv = project(x_adv + attack.step_size * ascent, x, attack.eps, attack.norm)
    if not attack.steps:
        x_adv = project(x_adv, x, attack.eps, attack.norm)
    return (x_adv, largest) if gradient_norm else x_adv


# -------------------------------------------------------------------------------------------------- schedules


RISKS = "natural_risk", "robust_regularization"  # the two parts of equation (1.1), as logs name them


def adjusted_beta(log, reference):
    """Width-adjusted regularization: the λ of the epoch after `log`, given the `reference` run's log.

    The paper enlarges a wide network's λ so that natural risk over robust regularization stays what it was in
    a narrow one with a tuned λ, and leaves open how. Our reading: λ starts at the reference's and is
    multiplied, after each epoch, by the square root of that epoch's ratio in the reference over our own; it
    is at least the reference's λ and at most ten times as much. The ratio answers to λ with a power above 1
    (1.3 in our runs) and is noisy, so that without the root λ zigzags. Depends on the two logs alone: a
    resumed run goes on as it would have.
    """
    smallest = reference[0]["beta"]
    if not log:
        return smallest

    def ratio(line):
        return line[RISKS[0]] / line[RISKS[1]]

    if min(log[-1][name] for name in RISKS) <= 0:  # no ratio to adjust by
        return log[-1]["beta"]
    wanted = log[-1]["beta"] * math.sqrt(ratio(reference[len(log) - 1]) / ratio(log[-1]))
    return min(max(wanted, smallest), 10 * smallest)


def reference_log(args):
    """The log of --reference, a finished run of the same method, data, length and ε; UserError otherwise."""
    if (args.beta == "auto") != bool(args.reference):
        raise UserError("--beta auto and --reference RUN go together")
    if not args.reference:
        return None
    folder = Path(args.reference)
    if not (folder / "args.json").exists():
        raise UserError(f"--reference {folder}: no run is there")
    with own_files(folder, "name another --reference"):
        settings, log = read_json(folder / "args.json"), read_log(folder / "log.jsonl")
        differing = [f"--{key.replace('_', '-')} {settings[key]} there, {getattr(args, key)} here"
                     for key in ("method", "dataset", "train_size", "epochs", "eps")
                     if settings[key] != getattr(args, key)]
        if differing:
            raise UserError(f"--reference {folder} is no such run: {'; '.join(differing)}")
        if len(log) < args.epochs:
            raise UserError(f"--reference {folder} is unfinished: {len(log)} of {args.epochs} epochs")
        if not all(min(line[name] for name in ("beta", *RISKS)) > 0 for line in log):
            raise UserError(f"--reference {folder}: its λ and its risks must be above 0 in every epoch")
    return log


def exp_decay(done, epochs):
    """The paper's schedule (App. C): 1, and from epoch 75 of 100 on halved every epoch: 0.5^(e - 74).

    A run of another length turns at 3/4 of it and halves every 1/100 of it, but at most once an epoch.
    """
    epoch = _epoch(done, epochs)
    late = epoch - 0.75 * epochs
    return 1.0 if late < 0 else 0.5 ** (1 + math.floor(late / max(0.01 * epochs, 1) + 1e-9))


def step(done, epochs, milestones=(0.75, 0.9, 1.0)):
    """×0.1 from each milestone on: epochs 75, 90 and 100 of 100 (TRADES)."""
    return 0.1 ** sum(_epoch(done, epochs) >= milestone * epochs for milestone in milestones)


def cosine(done, epochs):
    """0.5·(1 + cos(π·done)) (RST)."""
    return _cosine_between(1.0, 0.0, done)


def one_cycle(done, epochs, warmup=0.025):
    """From 1/25 to 1 over the warm-up, then to 4e-6 in the last epoch, along cosines (Wang et al. 2023)."""
    peak, last, epoch = warmup * epochs - 1, epochs - 1, done * epochs  # counted from 0
    if epoch < peak:
        return _cosine_between(0.04, 1.0, epoch / peak)
    return _cosine_between(1.0, 4e-6, min((epoch - peak) / max(last - peak, 1e-9), 1))


def _cosine_between(start, end, share):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def _epoch(done, epochs):
    """The epoch under way, counted from 1 as the releases do; a fraction inside it counts."""
    return round(done * epochs, 9) + 1


# --schedule → factor of the base rate, from the fraction `done` of a run of `epochs` epochs, in [0, 1).
SCHEDULES = {"exp-decay": exp_decay, "step": step, "cosine": cosine, "one-cycle": one_cycle}


# ---------------------------------------------------------------------------------------------------- metrics


METRICS = ("natural_accuracy", "robust_accuracy", "perturbation_stability")


def padded_batches(x, y, batch_size):
    """(float images, labels, n) over x, y in order; the last batch is padded, n of its images count.

    In eval mode an image does not see its neighbours, so padding changes nothing, and compiled code sees one
    shape. A CPU, whose time goes with the number of images, is spared it if all are fewer than a batch.
    """
    for i in range(0, len(x), batch_size):
        images, labels = x[i:i + batch_size], y[i:i + batch_size]
        n = len(images)
        if n < batch_size and (i > 0 or x.is_cuda):
            images, labels = padded([images, labels], batch_size)
        yield to_float(images), labels, n


def padded(parts, size):
    """Tensors [n, ...] of one length, repeated from the start to `size` rows."""
    fill = torch.arange(size, device=parts[0].device) % len(parts[0])
    return [part[fill] for part in parts]


def exact_logits(model, x):
    """Logits [N, classes] of float images, eval mode, float32, no gradient."""
    with attack_mode(model), exact_precision(model), torch.no_grad():
        return model(x)


def predict(model, x):
    """The predicted classes [N] of float images."""
    return exact_logits(model, x).argmax(1)


def three_metrics(y, natural, adversarial):
    """The paper's metrics (Section 3), fractions of all N, from labels y and predictions f(x), f(x̂) [N].

    A point is robust exactly when it is correct and stable: robust ≤ min(natural, stability).
    """
    n = len(y)
    return {"n": n, "natural_accuracy": (natural == y).sum().item() / n,
            "robust_accuracy": ((natural == y) & (adversarial == natural)).sum().item() / n,
            "perturbation_stability": (adversarial == natural).sum().item() / n}


def _attack_seed(seed, restart, batch):
    return ((1000 * seed + restart) * 10 ** 6 + batch) % 2 ** 63


def evaluate(model, stream, attack, seed=0):
    """(metrics, points): `three_metrics` under `pgd` with this record, and every image's predictions.

    stream: (x [B, 3, H, W] in [0, 1], y [B], n) as `padded_batches` makes them; the first n of a batch count.
    points: "label", "natural", "adversarial", int64 [N], in the stream's order. Over restarts "adversarial"
    is the first prediction that differs from f(x), if any does: a point is finished then, correct or not.
    The attack runs as the model is executed (bf16, say); all predictions are made in float32.
    """
    points = {"label": [], "natural": [], "adversarial": []}
    for i, (x, y, n) in enumerate(stream):
        natural = predict(model, x)
        adversarial, stable, size = natural.clone(), torch.arange(n, device=x.device), len(x)
        for restart in range(attack.restarts):
            rows, = padded([stable], size)
            with fixed_seed(_attack_seed(seed, restart, i), x.device):
                found = predict(model, pgd(model, x[rows], LOSSES[attack.loss](y[rows]), attack))
            adversarial[stable] = found = found[:len(stable)]
            if restart + 1 == attack.restarts:
                break
            stable = stable[found == natural[stable]]
            quarter = math.ceil(len(x) / 4)  # few sizes, because compiled code is made for each
            size = min(math.ceil(len(stable) / quarter) * quarter, len(x))
            if not size:
                break
        for name, values in ("label", y), ("natural", natural), ("adversarial", adversarial):
            points[name].append(values[:n])
        show(f"{attack.title()}: {sum(map(len, points['label'])):,} images")
    points = {name: joined(torch.cat(values)) for name, values in points.items()}
    return {**three_metrics(*points.values()), "attack": asdict(attack)}, points


def local_lipschitzness(model, stream, attack, seed=0):
    """Mean over images of the largest ‖f(x) - f(x̂)‖₁ / ‖x - x̂‖∞, x̂ in the ℓ∞ ε-ball, f the logits.

    The definition of Yang et al. 2020 that the paper uses, in float32. The largest ratio met counts: a lower
    bound. At a fixed distance the ratio rises with its numerator, so signed gradient ascent follows that and
    stays at the distance: a step is as long as all of the record's together, about across the ball. Which
    logits rise and which fall makes many local maxima, so four random starts, one of them close to x, share
    the record's number of steps. Units: logits per pixel range.
    """
    largest = []
    with attack_mode(model), exact_precision(model), torch.enable_grad():
        for i, (images, _, n) in enumerate(stream):
            with torch.no_grad():
                clean, best = model(images), torch.zeros(len(images), device=images.device)
            for restart, scale in enumerate((1, 1, 1, 0.1)):
                radius, stride = scale * attack.eps, scale * attack.steps * attack.step_size
                with fixed_seed(_attack_seed(seed, restart, i), images.device):
                    x_hat = project(perturb_start(images, "uniform", radius, "linf"), images, radius, "linf")
                for _ in range(math.ceil(attack.steps / 4) + 1):
                    x_hat.requires_grad_()
                    rise = (model(x_hat) - clean).abs().sum(1)
                    gradient, = torch.autograd.grad(rise.sum(), x_hat)
                    with torch.no_grad():
                        ratio = rise / (x_hat - images).abs().amax((1, 2, 3))
                        best = torch.maximum(best, ratio.nan_to_num(nan=0, posinf=0))
                        x_hat = project(x_hat + stride * gradient.sign(), images, radius, "linf")
            largest.append(best[:n])
    return joined(torch.cat(largest)).mean().item()


def shared_batches(x, y, args):
    """`padded_batches` of this process's share of x, y, as large as in training."""
    return padded_batches(x[RANK::WORLD], y[RANK::WORLD], args.batch_size // WORLD)


def monitor(model, data, args, epoch):
    """`evaluate` under MONITOR with --eps, on --val-size images or else --eval-size test images; for the log.

    Nones where --eval-every skips an epoch.
    """
    if epoch % args.eval_every and epoch != args.epochs:
        return dict.fromkeys(METRICS)
    some = data.test_subset(args.eval_size)
    x, y = (data.x_val, data.y_val) if args.val_size else (data.x_test[some], data.y_test[some])
    metrics, _ = evaluate(model, shared_batches(x, y, args), replace(MONITOR, eps=args.eps))
    return {**metrics, "monitored": "validation" if args.val_size else "test"}


def report(model, data, args):
    """For metrics.json: `evaluate` on --test-size images under REPORT, local Lipschitzness of 1,000."""
    some, attack = data.test_subset(args.test_size), replace(REPORT, eps=args.eps)
    x, y = data.x_test[some], data.y_test[some]
    say(f"testing on {len(x):,} images with {attack.title()}")
    metrics, _ = evaluate(model, shared_batches(x, y, args), attack)
    lipschitzness = local_lipschitzness(model, shared_batches(x[:1000], y[:1000], args), attack)
    return {**metrics, "local_lipschitzness": lipschitzness, "precision": args.precision,
            "best_chosen_on": "validation" if args.val_size else "test"}


def describe(metrics):
    """The three metrics in words, in percent; nothing for an epoch that was not monitored."""
    names = zip(("natural", "robust", "stability"), METRICS)
    found = [(name, metrics.get(key)) for name, key in names]
    return "  ".join(f"{name} {100 * value:.2f} %" for name, value in found if value is not None)


# ------------------------------------------------------------------------------------------------- run folder


# What a resumed run may have otherwise.
MAY_CHANGE = {"out", "data_dir", "device", "compile", "workers", "on_bad_image", "restarts",
              "accept_changed_code"}


class Run:
    """A run folder (args.json, log.jsonl, last.pt, best.pt, metrics.json), resumed if it holds this very run.

        run = Run(args, model, optimizer, images=len(data.x_train))
        for epoch in run.epochs():
            for x, y in batches(...):
                ...
                run.record(len(x), natural_risk=natural_risk)  # scalars on the device: nothing waits here
            run.end_epoch(lr=lr, **metrics)                    # a line of the log and a checkpoint
        run.finish(test)                                       # metrics.json

    It knows epochs, named numbers and files; best.pt is the epoch with the highest `robust_accuracy` given to
    `end_epoch`. A loop may `break`, `continue` or raise anywhere: what `end_epoch` wrote is what there is.
    With a `WeightAverage` a checkpoint's "model" is the average, "raw_model" the network.
    """

    def __init__(self, args, model, optimizer, images, average=None):
        self.args, self.model, self.optimizer, self.images = args, model, optimizer, images
        self.average = average if average and average.decay is not None else None
        self.tested = self.average.model if self.average else model
        self.device = next(model.parameters()).device
        self.folder = Path(args.out)
        self.settings = {key: value for key, value in vars(args).items() if key != "out"}
        self.epoch, self.log, self.steps = 0, [], 0  # the last epoch finished; its and earlier ones' lines
        self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder)
        if (self.folder / "last.pt").exists():
            with own_files(self.folder):
                self._resume()
        elif (self.folder / "metrics.json").exists():
            raise UserError(f"{self.folder} holds a finished run without its last.pt; choose another --out")
        else:  # no epoch was finished here: nothing to lose
            write_file(self.folder / "log.jsonl", b"")
        write_json(self.folder / "args.json", self.settings)
        if {*collected(self.epoch)} != {self.epoch} or not (self.folder / "args.json").exists():
            raise UserError(f"{self.folder} must lie on a disk that all processes share")
        say(f"{self.folder}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{self.epoch} of {args.epochs} epochs done")

    def _resume(self):
        before, now = read_json(self.folder / "args.json"), json.loads(json.dumps(self.settings))
        code, new_code = before.pop("code", {}), now.pop("code")
        edited = [name for name in new_code if code.get(name) != new_code[name]]
        keys = {*before, *now} - MAY_CHANGE
        if edited:
            keys &= {*before} & {*now}  # an option that came or went is part of the change
        changed = [f"--{key.replace('_', '-')} {before.get(key)} there, {now.get(key)} here"
                   for key in sorted(keys) if before.get(key) != now.get(key)]
        if changed:
            raise UserError(f"{self.folder} holds a run with other settings ({'; '.join(changed)}); "
                            f"choose another --out")
        if edited and not self.args.accept_changed_code:
            raise UserError(f"{self.folder} holds a run of other code: {' and '.join(edited)} changed since; "
                            f"choose another --out, or --accept-changed-code to go on with it")
        state = read_checkpoint(self.folder / "last.pt")
        load_weights(self.tested, state["model"], self.folder / "last.pt")
        if self.average:
            load_weights(self.model, state["raw_model"], self.folder / "last.pt")
            self.average.steps = state["averaged_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.epoch = state["epoch"]
        self.log = [entry for entry in read_log(self.folder / "log.jsonl") if entry["epoch"] <= self.epoch]
        lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
        write_file(self.folder / "log.jsonl", lines.encode())

    def _is_best(self):
        """Is the robust accuracy of the last line above those of all lines before?"""
        *before, last = [entry.get("robust_accuracy") for entry in self.log]
        return last is not None and last > max((score for score in before if score is not None), default=-1)

    def _kept(self):
        kept = f"epoch {self.epoch} is kept in {self.folder / 'last.pt'}"
        return kept if self.epoch else "no epoch was finished"

    def epochs(self):
        """The epochs still to do, counted from 1."""
        for epoch in range(self.epoch + 1, self.args.epochs + 1):
            self.current, self.recorded, self.seen = epoch, {}, 0
            self.began = self.timed_from = self.now = self.shown = time.perf_counter()
            self.untimed = 0
            yield epoch

    def record(self, images, **scalars):
        """Note a step's numbers: scalars on the device, read back in `end_epoch`; and show progress."""
        for name, scalar in scalars.items():
            self.recorded.setdefault(name, []).append(scalar.detach())
        self.steps += 1
        self.seen += images * WORLD
        self.now = time.perf_counter()
        if self.steps <= 2:  # code is compiled and memory taken in these: no measure of speed
            self.timed_from, self.untimed = self.now, self.seen
        elif on_terminal() and self.now - self.shown > 1:
            self.shown, rate = self.now, self._rate()
            left = (self.images * (self.args.epochs - self.current + 1) - self.seen) / rate
            show(f"epoch {self.current}/{self.args.epochs}  {self.seen:,} of {self.images:,} images  "
                 f"{rate:.4g} images/s  {duration(left)} left")

    def _rate(self):
        """Images per second of this epoch; without the first two steps of all, if there were others."""
        if self.seen > self.untimed:
            return (self.seen - self.untimed) / max(self.now - self.timed_from, 1e-9)
        return self.seen / max(self.now - self.began, 1e-9)

    def end_epoch(self, **values):
        """Check and average what was recorded; log that and `values`; write the checkpoint."""
        means = {}
        for name, scalars in self.recorded.items():
            history = torch.stack(scalars).float()
            if not history.isfinite().all():
                first = (~history.isfinite()).nonzero()[0].item() + 1
                raise UserError(f"{name.replace('_', ' ')} not finite at epoch {self.current}, step {first}; "
                                f"{self._kept()}; a smaller --lr or --beta may help")
            mean = history.mean()
            average_over_processes([mean])
            means[name] = mean.item()
        with torch.no_grad():
            if not torch.stack(torch._foreach_norm(list(self.model.parameters()))).isfinite().all():
                raise UserError(f"weights not finite after epoch {self.current}; {self._kept()}; "
                                f"a smaller --lr or --beta may help")
        shared = {"processes": WORLD} if WORLD > 1 else {}  # BatchNorm normalizes with a part of each batch
        entry = {"epoch": self.current, **means, **values, **shared,
                 "images_per_second": float(f"{self._rate():.4g}"),
                 "seconds": round(time.perf_counter() - self.began, 2)}
        if RANK == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        self.log.append(entry)
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        checkpoint = {"model": self.tested.state_dict(), "optimizer": self.optimizer.state_dict(),
                      "epoch": self.current, "args": self.settings, "rng": torch.get_rng_state(),
                      "cuda_rng": cuda_rng}
        if self.average:
            checkpoint |= {"raw_model": self.model.state_dict(), "averaged_steps": self.average.steps}
        content = io.BytesIO()
        torch.save(checkpoint, content)
        if self._is_best():  # first: what a kill between the two leaves undone, the same epoch does again
            write_file(self.folder / "best.pt", content.getbuffer())
        write_file(self.folder / "last.pt", content.getbuffer())
        self.epoch = self.current
        shown = "  ".join(f"{name.replace('_', ' ')} {mean:.4f}" for name, mean in means.items())
        left = duration(entry["seconds"] * (self.args.epochs - self.epoch))
        say(f"epoch {self.epoch}/{self.args.epochs}  {shown}  {describe(values)}  "
            f"{entry['images_per_second']:.4g} images/s  {left} left")

    def finish(self, test, attack=None):
        """metrics.json: `test()` with the weights of last.pt and, where it is another epoch, of best.pt.

        A finished run is not tested again, unless with another `attack` than the file has.
        """
        path, found = self.folder / "metrics.json", None
        with own_files(self.folder):
            if path.exists():
                found = read_json(path)
                if attack is not None and found["last"]["attack"] != asdict(attack):
                    found = None
        if found is None:
            found = {"last": {"epoch": self.epoch, **test()}}
            found["best"] = found["last"]
            best = self.folder / "best.pt"
            if best.exists() and (state := read_checkpoint(best))["epoch"] != self.epoch:
                last = copy.deepcopy(self.tested.state_dict())
                load_weights(self.tested, state["model"], best)
                found["best"] = {"epoch": state["epoch"], **test()}
                self.tested.load_state_dict(last)
            write_json(path, found)
        with own_files(self.folder):
            for name in ("last", "best") if found["best"] != found["last"] else ("last",):
                metrics = found[name]
                say(f"{self.folder / name}.pt, epoch {metrics['epoch']}: {describe(metrics)}, "
                    f"local Lipschitzness {metrics['local_lipschitzness']:.2f}")


LOCKED = {}  # folders (device, inode) that this process holds, and their open handles


def lock(folder):
    """Keep other runs out of `folder` as long as this process lives; UserError if one is in there."""
    if RANK:
        return
    place = (folder.stat().st_dev, folder.stat().st_ino)
    if place in LOCKED:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        LOCKED[place] = handle
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{folder} is in use by another process; choose another --out") from None
    except OSError as error:  # a network file system without locks
        os.close(handle)
        say(f"{folder} cannot be locked ({error.strerror}): let no other process in there", file=sys.stderr)


def fingerprint(path):
    """A hash of a Python file's syntax tree without docstrings: comments and layout do not count."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef

    def tree(node):
        if isinstance(node, list):
            return [tree(item) for item in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        fields = dict(ast.iter_fields(node))
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            fields["body"] = node.body[1:]
        full = [(name, tree(value)) for name, value in fields.items() if value not in (None, [])]
        return [type(node).__name__, *full]  # without the empty fields, of which a newer Python has more
    return hashlib.sha256(repr(tree(ast.parse(Path(path).read_bytes()))).encode()).hexdigest()[:16]


@contextlib.contextmanager
def own_files(folder, advice="choose another --out"):
    """What a spoilt run folder raises inside becomes a UserError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: args.json, log.jsonl, last.pt or metrics.json is not what a run wrote "
                        f"({type(error).__name__}: {error}); {advice}") from None


def duration(seconds):
    """Such as 0:04:05 or 2 days, 3:00:00."""
    return str(datetime.timedelta(seconds=round(seconds)))


def write_file(path, content):
    """Write bytes so that `path` holds its old content or all of the new, whatever happens meanwhile.

    Of the processes of torchrun the first one writes.
    """
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
    lines = Path(path).read_text().split("\n") if Path(path).exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def read_checkpoint(path):
    """A checkpoint's dict, on the CPU, read without running any code in it, or UserError."""
    try:
        with warnings.catch_warnings():  # our line says it all
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # truncated, foreign or unsafe: they fail in many ways
        reason = _what_is_wrong(path, error)
        raise UserError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None


def _what_is_wrong(path, error):
    with open(path, "rb") as file:
        content = file.read(2 ** 20)
    start, named = content[:200].lstrip(), re.search(r"GLOBAL ([\w.]+)", str(error))
    wants = named[1] if named else _first_import(content)
    if start[:1] == b"<":
        return "it is a web page; download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; `git lfs pull` fetches the file itself"
    if wants:
        return f"it is a pickle that asks for {wants}, which could run code; save its state_dict alone"
    return "it is empty" if not start else "it is cut short, or another kind of file"


def _first_import(content):
    """What a bare pickle asks for first, found without unpickling; None if it is no pickle."""
    words = []
    try:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "GLOBAL":
                return argument.replace(" ", ".")
            if operation.name == "STACK_GLOBAL":
                return ".".join(words[-2:])
            if isinstance(argument, str):
                words.append(argument)
    except ValueError:
        return None


# ----------------------------------------------------------------------------------------------- command line


def launch(main):
    """Run a script's main(argv): a mistake or Ctrl-C ends in one line and exit status 2 or 130."""
    status = 2
    try:
        main(sys.argv[1:])
        if WORLD > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()  # one that leaves early can make another abort
            torch.distributed.destroy_process_group()
        return
    except UserError as error:
        message = f"error: {error}"
    except OSError as error:  # a full disk, a folder without permission
        message = f"error: {error.filename or 'writing a file'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            message = f"error: out of memory, a smaller batch or network needs less ({str(error)[:200]})"
        elif isinstance(error, torch._dynamo.exc.TorchDynamoException):
            message = f"error: torch.compile failed, --compile off does without it ({str(error)[:300]})"
        else:
            raise
    except KeyboardInterrupt as error:
        kept = str(error) or "what was finished is kept, the same command goes on"
        message, status = f"interrupted; {kept}", 130
    say(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def on_terminal():
    return RANK == 0 and sys.stdout is not None and sys.stdout.isatty()


def show(line):
    """On a terminal, show a line of progress in place of the last one; in a pipe, nothing."""
    if on_terminal():
        print("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1], end="", flush=True)


def say(line, file=None):
    """Print a line at once, over the progress line if one is showing."""
    show("")
    if RANK == 0 or file:
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
    """An argparse type: a finite float or a ratio such as 8/255, from `low` (or above it) to `high`."""
    def parse(text):
        numerator, _, denominator = text.partition("/")
        value = float(numerator) / (float(denominator or 1) or math.nan)
        if not low <= value <= high or value == math.inf or above and value == low:
            limit = f"{'above' if above else 'at least'} {low:g}"
            limit += f", at most {high:g}" if high < math.inf else ""
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


def number_or_auto(text):
    """An argparse type: "auto" or a number."""
    return text if text == "auto" else number()(text)


number_or_auto.__name__ = "number"  # as argparse names it


def experiment_parser(file, doc):
    """What every training script takes. `file`: the script's, after which the method is named."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--seed", type=integer(0), default=1, help="seeds weights, shuffling, augmentation and attacks")
    add("--out", metavar="DIR", help="run folder; by default runs/<method>-<dataset>-<model>-beta<β>-seed<s> "
                                     "and every other setting that is not the default")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: what a short measurement finds faster; kept for the run")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on CUDA only")
    add("--init", metavar="FILE", help="start from the weights of this checkpoint")
    add("--accept-changed-code", action="store_true", help="go on with a run whose code was edited since")
    method = Path(file).stem.removeprefix("train_")
    code = {Path(path).name: fingerprint(path) for path in (file, __file__)}
    parser.set_defaults(method=method, code=code)
    parser.default_out = lambda args: run_folder(parser, args)
    return parser


def training_parser(file, doc, **defaults):
    """The arguments that the CIFAR scripts share; `defaults` overrides the paper's TRADES setting."""
    parser = experiment_parser(file, doc)
    add = parser.add_argument
    add("--dataset", default="cifar10", metavar="NAME", help="cifar10, cifar100, synthetic, or a NAME.npz")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are, or are downloaded to")
    add("--train-size", type=integer(), metavar="N", help="train on N random images, drawn with --seed")
    add("--val-size", type=integer(0), default=0, metavar="N", help="hold out N random training images to "
        "monitor, and so to choose best.pt on; 0: test images, the paper's choice")
    add("--no-flip", action="store_true", help="do not mirror training images (digits, say)")
    add("--arch", choices=NETWORKS, default="wrn", help="WideResNet or DenseNet-BC")
    add("--depth", type=integer(), default=34, help="layers, 6n + 4")
    add("--width", type=integer(), default=10, help="widening factor, or a DenseNet's growth rate")
    add("--activation", choices=ACTIVATIONS, default="relu", help="of every layer; the paper's is ReLU")
    add("--epochs", type=integer(), default=100, help="passes over the training images")
    add("--batch-size", type=integer(), default=128, help="images a step")
    add("--lr", type=number(above=True), default=0.1, help="base learning rate of SGD with momentum 0.9")
    add("--weight-decay", type=number(), default=2e-4, help="L2 penalty on every parameter")
    add("--nesterov", action="store_true", help="Nesterov momentum")
    add("--no-norm-decay", action="store_true", help="no weight decay on BatchNorm's parameters")
    add("--label-smoothing", type=number(0, 1), default=0.0, help="in the loss, not in the attack")
    add("--ema", type=number(0, 1), metavar="DECAY", help="monitor, test and save an average of the weights, "
        "of this decay per step, such as 0.995")
    add("--schedule", choices=SCHEDULES, default="exp-decay", help="learning rate over the run")
    add("--eps", type=number(0, 1), default=0.031, help="attack's ℓ∞ radius, pixels in [0, 1]; 8/255 works")
    add("--step-size", type=number(), default=0.007, help="attack step, in pixel range [0, 1]")
    add("--steps", type=integer(0), default=10, help="attack steps")
    add("--beta", type=number_or_auto, default=6.0,
        help="λ of the paper: weight of the robust regularization; auto: adjusted to --reference")
    add("--reference", metavar="RUN", help="for --beta auto: a narrower network's finished run")
    add("--eval-every", type=integer(), default=1, metavar="N", help="epochs between monitor evaluations")
    add("--eval-size", type=integer(), default=1000, metavar="N", help="test images in a monitor evaluation")
    add("--test-size", type=integer(), metavar="N", help="random test images in metrics.json; by default all")
    parser.set_defaults(**defaults)
    return parser


def start(parser, argv):
    """Parse argv, pick the device and seed everything: (args, device). Resolves `args.out`."""
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if device.type != "cuda":
        say(f"no CUDA device in use: training on the {device.type} ({torch.get_num_threads()} threads), "
            "which is slow for a large network; the speed and the time left follow")
    connect(args, device)
    args.out = args.out or parser.default_out(args)
    settings = Path(args.out) / "args.json"
    if args.precision == "auto" and settings.exists():  # a resumed run keeps what was measured when it began
        with own_files(args.out):
            args.precision = read_json(settings).get("precision", "auto")
    torch.manual_seed(args.seed)
    return args, device


def run_folder(parser, args):
    """runs/<method>-<dataset>-<model>-beta<β>-seed<s> and every other setting that is not the default."""
    named = {"method", "dataset", "arch", "depth", "width", "beta", "seed", *MAY_CHANGE}
    network = f"{args.arch}{args.depth}-{args.width}"
    beta = args.beta if args.beta == "auto" else f"{args.beta:g}"
    name = f"{args.method}-{args.dataset}-{network}-beta{beta}-seed{args.seed}"
    for key, value in vars(args).items():
        if key not in named and value != parser.get_default(key):
            shown = f"{value:.4g}" if isinstance(value, float) else "-".join(Path(str(value)).parts[-2:])
            name += f"-{key.replace('_', '')}{'' if value is True else shown}"
    return str(Path("runs") / name)

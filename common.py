"""What every experiment shares: data, networks, execution, attacks, schedules, metrics, the run folder.

No loss or loop of a method lives here. A training script reads top to bottom as its experiment and calls this
file for all else. Images are [N, 3, H, W]: uint8 while stored on the device, float32 in [0, 1] once batched.
"""
import argparse
import ast
import contextlib
import copy
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
import warnings
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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """A mistake that a user can make. `launch` prints it as one line and ends with exit status 2."""


# ------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """A data set on the device, and a hash of all its files hold."""
    x_train: torch.Tensor  # [N, 3, H, W] uint8
    y_train: torch.Tensor  # [N] int64
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int
    hash: str
    x_val: torch.Tensor = None  # with --val-size: held out of the training images
    y_val: torch.Tensor = None

    def __len__(self):
        return len(self.x_train)

    def test(self, n=None):
        """(x, y) of n random test images, the same ones in every run. All of them in order if n is None."""
        if n is None:
            return self.x_test, self.y_test
        some = torch.randperm(len(self.x_test), generator=torch.Generator().manual_seed(0))[:n]
        return self.x_test[some], self.y_test[some]


def load_data(name, data_dir, device, train_size=None, seed=0, val_size=0):
    """The data set `name` as a `Data` on `device`.

    Reads DATA_DIR/NAME.npz if it is there: x_train, y_train, x_test, y_test, as Keras lays them out. Images
    are uint8 [N, H, W, 3], or gray [N, H, W]. Else torchvision reads or downloads "cifar10" and "cifar100",
    and "synthetic" is generated. `val_size` random training images are held out and `train_size` others kept
    (None: all). Which ones follows from `seed`. Raises UserError.
    """
    path = Path(data_dir).expanduser() / f"{name}.npz"
    if path.exists():
        arrays, source = read_npz(path, "x_train", "y_train", "x_test", "y_test"), str(path)
    elif name == "synthetic":
        arrays, source = synthetic(), "synthetic"
    elif name in ("cifar10", "cifar100"):
        arrays, source = _torchvision_cifar(name, path), str(data_dir)
    else:
        raise UserError(f"no data set {name!r}: {path} is missing; built in: cifar10, cifar100, synthetic")
    x_train, y_train, x_test, y_test = arrays
    x_train, y_train = checked(x_train, y_train, source, "x_train", "y_train")
    x_test, y_test = checked(x_test, y_test, source, "x_test", "y_test")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(f"{source}: training and test images differ in size")
    classes = int(y_train.max()) + 1
    odd = {*y_train.tolist()} ^ {*range(classes)} | {*y_test.tolist()} - {*y_train.tolist()}
    if odd:
        raise UserError(f"{source}: labels must be 0..{classes - 1}, each on some training image; "
                        f"that fails for {', '.join(map(str, sorted(odd)[:10]))}")
    digest = hashed(x_train, y_train, x_test, y_test)
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
    return Data(*to_tensors(x_train, y_train, device), *to_tensors(x_test, y_test, device), classes, digest,
                *held_out)


def checked(x, y, source, x_name, y_name):
    """Arrays as uint8 [N, H, W, 3] (gray becomes three equal channels) and integers [N], or UserError."""
    if x.ndim == 3 or x.ndim == 4 and x.shape[3] == 1:
        x = np.repeat(x.reshape(*x.shape[:3], 1), 3, axis=3)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or len(x) == 0:
        raise UserError(f"{source}: {x_name} must be uint8 [N, H, W, 3] or gray [N, H, W], "
                        f"not {x.dtype} {list(x.shape)}")
    if x.max() <= 1:
        raise UserError(f"{source}: {x_name} has no pixel above 1; pixels must be 0..255")
    y = y[:, 0] if y.shape == (len(x), 1) else y  # Keras keeps CIFAR's labels as a column
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
        raise UserError(f"{source}: {y_name} must be {len(x)} integers, not {y.dtype} {list(y.shape)}")
    return x, y.astype(np.int64)


def to_tensors(x, y, device):
    """uint8 [N, H, W, 3] and int64 [N] arrays → [N, 3, H, W] (channels_last) and [N], on the device."""
    images = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
    return images.to(device), torch.from_numpy(y).to(device)


def hashed(*parts):
    """16 hexadecimal digits that stand for arrays and strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]


def read_npz(path, *names):
    """The arrays of an .npz file with these names, or UserError."""
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            return [file[name] for name in names]
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; it needs {', '.join(names)}") from None
    except Exception as error:  # truncated and foreign files fail in many ways, from zipfile, zlib or numpy
        raise UserError(f"{path} cannot be read as a NumPy .npz file: {error}") from None


def _torchvision_cifar(name, npz):
    from torchvision import datasets

    dataset, folder = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name], npz.parent
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder, wait=True)  # one process downloads, the others wait for it
    try:
        splits = [dataset(str(folder), train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, no space, a broken archive: urllib, OSError or RuntimeError
        batches = folder / dataset.base_folder
        found = f"no {npz} or {batches}"
        if batches.exists():
            found = f"{batches} has not the files that torchvision expects, by their checksums"
        elif (folder / dataset.meta["filename"]).exists():
            found = f"--data-dir must be the folder above, {folder.resolve().parent}"
        raise UserError(f"{found}; the download failed ({error}); --dataset synthetic needs none") from None
    finally:
        if held:
            held.close()
    return [array for split in splits for array in (split.data, np.array(split.targets))]


def synthetic(n_train=5000, n_test=500, seed=0):
    """Ten classes of 16×16 images: a bold cue that is often right, a faint one that is (Tsipras et al. 2019).

    On dark grey noise (0.1 ± 0.02) lie a square of one of ten colours, amplitude 0.25, that shows the class
    80 % of the time and a random one else, and a class texture of amplitude 0.03, fainter than ε = 0.031 and
    always right. Plain training lives on the texture and is not robust at all. The larger β, the more a
    network relies on the square. Returns x_train, y_train, x_test, y_test as an .npz has them.
    """
    rng = np.random.default_rng(seed)
    colours = np.stack(np.meshgrid(*[[0, 0.5, 1]] * 3), -1).reshape(27, 3)
    colours = rng.permutation(colours[colours.sum(1) % 1 == 0][1:])[:10]      # [10, 3], 1 or more apart in ℓ1
    textures = np.tile(rng.choice([-1, 1], (10, 2, 2, 3)), (8, 8, 1))        # a mirror image is a shifted one

    def split(n):
        y = rng.integers(0, 10, n)
        shown = np.where(rng.random(n) < 0.8, y, rng.integers(0, 10, n))      # the square's class
        (top, left), pixel = rng.integers(2, 7, (2, n, 1)), np.arange(16)
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
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)        # [N, W]
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)                          # [N, H+2p, W+2p, 3]
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(data, batch_size, flip=True, extra=None, fraction=0.5):
    """One epoch as (float32 images in [0, 1], labels), shuffled, cropped and mirrored at random.

    A crop's zero padding is an eighth of the side, rounded up: 4 at 32 pixels, as published.
    All batches have the same size, so that compiled code sees one shape. What is left over after the last
    full batch is dropped, other images each epoch. With `extra` = (images, labels) a share `fraction` of each
    batch comes from there. An epoch is as many batches as the labelled images alone make. Nothing here waits
    for the device. (RST's release draws extra images with replacement. Here all come before one comes again.)
    """
    sources, device = [(data.x_train, data.y_train, batch_size)], data.x_train.device
    if extra:
        n = round(fraction * batch_size)
        sources = [(data.x_train, data.y_train, batch_size - n), (*extra, n)]
    steps = max(len(data) // batch_size, 1)

    def draw(n, share):  # [steps, share] indices of n images
        share = min(share, n) if steps == 1 else share  # fewer images than a batch
        orders = [torch.randperm(n, device=device) for _ in range(1 + steps * share // n)]
        return own_share(torch.cat(orders)[:steps * share].view(steps, share))

    orders, padding = [draw(len(x), share) for x, _, share in sources], -(-data.x_train.shape[2] // 8)
    for rows in zip(*orders):
        x, y = (torch.cat([source[i][row] for source, row in zip(sources, rows)]) for i in (0, 1))
        top, left = torch.randint(0, 2 * padding + 1, (2, len(x)), device=device)
        mirrored = torch.rand(len(x), device=device) < 0.5 * flip
        yield to_float(crop_flip(x, top, left, mirrored, padding)), y


def in_order(x, y, batch_size):
    """uint8 images and labels as batches of (float32 images in [0, 1], labels), as evaluations take them."""
    for images, labels in zip(x.split(batch_size), y.split(batch_size)):
        yield to_float(images), labels


# --------------------------------------------------------------------------------------------------- networks


ACTIVATIONS = {"relu": functools.partial(F.relu, inplace=True), "silu": F.silu}  # --activation


class _Block(nn.Module):
    """Pre-activation basic block (He et al. 2016), its shortcut named as the releases name it."""

    def __init__(self, inputs, outputs, stride, activation, shortcut):
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.projection = shortcut if inputs != outputs else None
        # Of fewer than 16 channels, oneDNN's strided 1×1 convolution writes past its memory (its issue 6035).
        self.every = stride if inputs < 16 else 1
        if self.projection:
            conv = nn.Conv2d(inputs, outputs, 1, stride // self.every, bias=False)
            self.add_module(shortcut, nn.Sequential(conv) if shortcut == "shortcut" else conv)

    def forward(self, x):
        out = self.act(self.bn1(x))
        n = self.every
        shortcut = getattr(self, self.projection)(out[:, :, ::n, ::n]) if self.projection else x
        return shortcut + self.conv2(self.act(self.bn2(self.conv1(out))))


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
        out = self.conv1(self.act(self.bn1(x)))
        return torch.cat([x, self.conv2(self.act(self.bn2(out)))], 1)


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
        self.act, n = ACTIVATIONS[activation], _layers_per_stage(depth)
        channels = [16, *(round(c * width) for c in (16, 32, 64))]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        for i, stride in enumerate((1, 2, 2)):
            widths = [channels[i]] + [channels[i + 1]] * n
            self.add_module(f"block{i + 1}", _Stage(
                _Block(widths[j], widths[j + 1], 1 if j else stride, activation, "convShortcut")
                for j in range(n)))
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], classes)
        self.initialize()

    def features(self, x):
        return self.act(self.bn1(self.block3(self.block2(self.block1(x)))))


class DenseNet(Network):
    """DenseNet-BC-depth, growth rate `width`, for small images: compression 0.5, first convolution 2k."""

    usual = 40, 12

    def __init__(self, depth, width, classes, activation="relu"):
        super().__init__()
        if width != int(width):
            raise UserError(f"--width {width}: a DenseNet's growth rate is a whole number")
        self.act, n, channels = ACTIVATIONS[activation], _layers_per_stage(depth), 2 * width
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for i in (1, 2, 3):
            self.add_module(f"block{i}", _Stage(
                _DenseLayer(channels + j * width, width, activation) for j in range(n)))
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
        if depth not in (10, 18):
            raise UserError(f"--depth {depth}: a PreActResNet has 18 layers, or 10")
        self.act, n = ACTIVATIONS[activation], depth // 8
        channels = [round(c * width) for c in (64, 64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        for i, stride in enumerate((1, 2, 2, 2)):
            widths = [channels[i]] + [channels[i + 1]] * n
            self.add_module(f"layer{i + 1}", nn.Sequential(*(
                _Block(widths[j], widths[j + 1], 1 if j else stride, activation, "shortcut")
                for j in range(n))))
        self.bn = nn.BatchNorm2d(channels[4])
        self.linear = nn.Linear(channels[4], classes)
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
    if args.init:
        load_weights(model, read_checkpoint(args.init), args.init, new_classifier=True)
    return model.to(device, memory_format=torch.channels_last)


def parameters_of(checkpoint):
    """(parameters, other tensors among them) of a checkpoint of ours, a published one, or a state_dict.

    Without the prefix that wrappers leave, whatever it is (`module.`, `_orig_mod.`, ...): it is what stands
    before the first convolution's name. ({}, {}) if there are none.
    """
    for _ in range(9):  # wrappers lie in wrappers; a dict may even hold itself
        inner = [checkpoint[key] for key in ("state_dict", "model_state_dict", "net", "model")
                 if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict)]
        checkpoint = inner[0] if inner else checkpoint
    state = checkpoint if isinstance(checkpoint, dict) else {}
    names = [name for name in map(str, state) if f".{name}".endswith(".conv1.weight")]
    prefix = min(names, key=len).removesuffix("conv1.weight") if names else ""
    state = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return own, {name: value for name, value in state.items() if not name.startswith(prefix)}


def load_weights(model, checkpoint, source, new_classifier=False):
    """Load the `parameters_of` a checkpoint; UserError if they are another network's or not finite.

    The unused `sub_block1.*` of the TRADES networks are dropped. With `new_classifier` a classifier of other
    classes is left as it was initialized, which is said in one line.
    """
    state, others = parameters_of(checkpoint)
    state = {name: value for name, value in (others | state).items()
             if not name.startswith("sub_block1.") and not name.endswith("n_averaged")}
    own = model.state_dict()
    classifier = [f"{getattr(model, 'classifier', '')}.{part}" for part in ("weight", "bias")]
    before, now = (part[classifier[1]].numel() if classifier[1] in part else None for part in (state, own))
    anew = new_classifier and before != now and {*classifier} <= {*state} & {*own}
    if anew:
        state |= {name: own[name] for name in classifier}
    wrong = [name for name in own if not name.endswith("num_batches_tracked")
             and (name not in state or state[name].shape != own[name].shape)]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise UserError(f"{source} holds another network: {len(wrong)} parameters are missing, unknown or of "
                        f"another shape, {wrong[0]} first; check architecture, depth, width and classes")
    model.load_state_dict(state, strict=False)
    for name in not_finite(model):
        raise UserError(f"{source}: {name} is not finite")
    if anew:
        say(f"{source} has {before} classes, this data set {now}: the classifier starts anew")


def sgd(model, lr, weight_decay, nesterov=False, decay_norms=True):
    """SGD with momentum 0.9; without `decay_norms`, BatchNorm's parameters are free of the weight decay."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    free = {p for module in norms for p in module.parameters()} if not decay_norms else set()
    groups = [{"params": [p for p in model.parameters() if p not in free]}]
    if free:
        groups.append({"params": [p for p in model.parameters() if p in free], "weight_decay": 0})
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov, fused=True)


# -------------------------------------------------------------------------------------------------- execution


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


def set_execution(args, images, *models):
    """Decide how the models run, in place: args.precision and args.compile, "auto" resolved.

    bf16 on CUDA. On a CPU whatever precision is faster for the first model on `images`, uint8 on the device.
    "fp32" without compilation is the exact reference: no TF32. `models` lie on the device already.
    """
    device, model = images.device, models[0]
    aware = [part for model in models for part in model.modules() if hasattr(part, "precision")]
    if args.precision == "auto":
        if not aware:
            args.precision = "fp32"
        elif device.type == "cuda":
            args.precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        else:
            args.precision = faster_precision(model, aware, images)
    if args.precision == "bf16" and not aware:
        raise UserError(f"--precision bf16: {type(model).__name__} knows fp32 alone, being no Network")
    for part in aware:
        part.precision = args.precision
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 10
        torch.set_float32_matmul_precision("highest")
        warnings.filterwarnings("ignore", message=".*(TensorFloat32|TF32)")  # advice that we must not take
        torch.backends.cudnn.allow_tf32 = False
    compiled = device.type == "cuda" if args.compile == "auto" else args.compile == "on"
    if compiled:
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            raise UserError("torch.compile needs a C compiler; install gcc, or give --compile off")
        torch.compiler.reset()  # makes room: few graphs are kept for all the networks of a process together
        for model in models:
            model.compile(dynamic=False)
    say(f"{args.precision}, channels_last, "
        f"{'compiled in the first steps, which takes a minute or so' if compiled else 'eager'}")


def faster_precision(model, aware, images, budget=0.1):
    """"fp32" or "bf16", whichever does an attack step sooner: best of three in turns, fp32 first.

    On as many of `images` as fp32 handles in about `budget` seconds: a slow machine does not wait long.
    """
    def seconds(precision, n):
        for part in aware:
            part.precision = precision
        began = time.perf_counter()
        pgd(model, to_float(images[:n]), torch.sum, Attack(eps=0.0, steps=1))
        return time.perf_counter() - began

    n = min(8, len(images))
    seconds("fp32", n)  # the first pass of all also loads and allocates
    while n < len(images) and seconds("fp32", n) < budget:
        n = min(2 * n, len(images))
    turns = [(seconds("fp32", n), seconds("bf16", n)) for _ in range(4)][1:]
    fp32, bf16 = map(min, zip(*turns))
    say(f"an attack step on {n} images takes {fp32:.3g} s in fp32, {bf16:.3g} s in bf16")
    return "bf16" if bf16 < fp32 else "fp32"


@contextlib.contextmanager
def attack_mode(model):
    """Eval mode and frozen parameters, so that gradients go to the input alone; both as found afterwards.

    PyTorch before 2.12 overlooks that frozen parameters need other compiled code. Mode or input tell it.
    """
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
    """Run the `Network`s in a model in float32 inside."""
    found = [(part, part.precision) for part in model.modules() if hasattr(part, "precision")]
    try:
        for part, _ in found:
            part.precision = "fp32"
        yield
    finally:
        for part, precision in found:
            part.precision = precision


@contextlib.contextmanager
def fixed_seed(seed, device):
    """Random numbers drawn inside start from `seed`; the outer streams go on as if nothing had happened."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        (torch.cuda.manual_seed_all if device.type == "cuda" else torch.default_generator.manual_seed)(seed)
        yield


# ------------------------------------------------------------------------------- several processes (torchrun)


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def connect(args, device):
    """Join the processes that torchrun started; the first one alone prints. Returns this process's device."""
    if WORLD == 1:
        return device
    for size in getattr(args, "batch_sizes", [getattr(args, "batch_size", WORLD)]):
        if size % WORLD:
            raise UserError(f"a batch of {size} images cannot be shared out among {WORLD} processes evenly")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                         timeout=datetime.timedelta(hours=2))
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return device


def seed_everything(seed, epoch=0):
    """Random numbers follow from (seed, epoch, process) from here on; in epoch 0 all are alike."""
    process = RANK if epoch else 0  # initial weights must be the same
    number = int(np.random.SeedSequence((seed, epoch, process)).generate_state(1)[0])
    for seeded in torch.manual_seed, np.random.seed, random.seed:  # a fork may draw from any
        seeded(number)


def own_share(order):
    """This process's part of every batch of the first process's `order` [steps, batch]."""
    if WORLD > 1:
        torch.distributed.broadcast(order, 0)
    return order[:, RANK::WORLD]


def average_over_processes(tensors):
    """Replace float tensors by their means over the processes: one reduction for all of them."""
    if WORLD > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = (flat / WORLD).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def synchronize(model):
    """Before a step: gradients and BatchNorm's running statistics become their means over the processes.

    In train mode BatchNorm normalizes with the images of its own process.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    average_over_processes(gradients + [part for name, part in model.named_buffers() if ".running_" in name])


def on_first(function):
    """What `function` returns in the first process, in all of them; the others wait for it."""
    if WORLD == 1:
        return function()
    found = [function() if RANK == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


# ---------------------------------------------------------------------------------------------------- attacks


@dataclass(frozen=True)
class Attack:
    """What defines an attack, from the command line to every title.

    Written as `asdict(attack)` under the key "attack". eps and step_size in pixel range [0, 1]. One that is
    too short for its ball, or whose steps are longer than ε, says so in one line where it is made.
    """
    loss: str = "cross-entropy"  # of LOSSES; or "kl", the attack of TRADES; or "autoattack" (eval.py)
    norm: str = "linf"           # or "l2"
    eps: float = 0.031
    step_size: float = 0.003
    steps: int = 20
    start: str = "uniform"       # in the ε-ball; or "gaussian", 0.001·N(0, 1); or "none"
    restarts: int = 1            # a point is stable if its prediction survives all of them

    def __post_init__(self):
        if self.loss == "autoattack" or self.eps == 0:
            return
        anywhere, several = self.start == "uniform", self.steps > 1
        way = self.eps * (1.9 if anywhere and several else 1)  # to the far side, or from x to the sphere
        if self.steps * self.step_size < way * (1 - 1e-9):
            warn(f"{self.title()}, is too short for its ball: its steps reach "
                 f"{self.steps * self.step_size:.3g} where {way:.3g} are to go; give it more or longer ones, "
                 "or its robust accuracy flatters")
        elif self.step_size > self.eps * (2 if anywhere and not several else 1) * (1 + 1e-9):
            warn(f"{self.title()}, has steps longer than ε; shorter ones find more")

    def title(self):
        """Such as "PGD-20, ε = 0.031, step 0.003", "CW-20×5 l2, ε = 0.5, step 0.2" or "FGSM, ε = 8/255"."""
        if self.loss == "autoattack":
            name = "AutoAttack"
        elif self.steps == 1 and self.step_size >= self.eps:
            name = "FGSM"
        else:
            known = {"cross-entropy": "PGD", "kl": "PGD", "margin": "CW"}
            name = f"{known.get(self.loss, self.loss)}-{self.steps}"
        name += f"×{self.restarts}" if self.restarts > 1 else ""
        title = f"{name}{' l2' if self.norm == 'l2' else ''}, ε = {pixels(self.eps, self.norm)}"
        whole = self.loss == "autoattack" or name == "FGSM" and self.step_size == self.eps
        return title if whole else f"{title}, step {pixels(self.step_size, self.norm)}"


def pixels(value, norm="linf"):
    """A distance as text: 8/255 where it is a whole number of levels in ℓ∞, else a decimal."""
    levels = round(255 * value)
    whole = norm == "linf" and levels and abs(levels / 255 - value) < 1e-9
    return f"{levels}/255" if whole else f"{value:.4g}"


def step_for(eps, published, norm="linf"):
    """An evaluation's step: the published one up to ε = 8/255 (ℓ2: 0.5), above in proportion; at most ε."""
    return min(published * max(1, eps / {"linf": 8 / 255, "l2": 0.5}[norm]), eps)


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


def pgd(model, x, loss, attack):
    """(x̂, ‖∇‖₁) of projected gradient ascent on `loss` in the ε-ball and in [0, 1] (Madry et al. 2018).

    x [N, 3, H, W] must lie in [0, 1]. loss maps logits [N, classes] to a scalar, a sum over images
    (`cross_entropy_to`, `kl_to`, `margin_to` or any callable). Each step adds step_size times the gradient's
    sign (ℓ∞) or the gradient scaled to unit length (ℓ2), then projects. x̂ is the last iterate, detached.
    ‖∇‖₁ [N] is the largest ‖∇_x̂ loss‖₁ met at each image, the paper's training-time proxy of local
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
                    ascent = gradient / _per_image(gradient.flatten(1).norm(dim=1).clamp(min=1))
                x_adv = project(x_adv + attack.step_size * ascent, x, attack.eps, attack.norm)
    if not attack.steps:
        x_adv = project(x_adv, x, attack.eps, attack.norm)
    return x_adv, largest


# -------------------------------------------------------------------------------------------------- schedules


def exp_decay(epoch, epochs):
    """The paper's schedule (App. C): 1, and from epoch 75 of 100 on halved every epoch: 0.5^(e - 74).

    A run of another length turns at 3/4 of it and halves every 1/100 of it, but at most once an epoch.
    """
    late = epoch - 0.75 * epochs
    return 1.0 if late < 0 else 0.5 ** (1 + math.floor(late / max(0.01 * epochs, 1) + 1e-9))


def step(epoch, epochs, milestones=(0.75, 0.9, 1.0)):
    """×0.1 from each milestone on: epochs 75, 90 and 100 of 100 (TRADES)."""
    return 0.1 ** sum(epoch >= milestone * epochs for milestone in milestones)


def cosine(epoch, epochs):
    """0.5·(1 + cos(π·(e - 1)/E)) (RST)."""
    return _cosine_between(1.0, 0.0, (epoch - 1) / epochs)


def one_cycle(epoch, epochs, warmup=0.025):
    """From 1/25 to 1 over the warm-up, then to 4e-6 in the last epoch, along cosines (Wang et al. 2023)."""
    peak, last = warmup * epochs - 1, epochs - 1  # counted from 0
    if epoch - 1 < peak:
        return _cosine_between(0.04, 1.0, (epoch - 1) / peak)
    return _cosine_between(1.0, 4e-6, min((epoch - 1 - peak) / max(last - peak, 1e-9), 1))


def _cosine_between(start, end, share):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


# --schedule → factor of the base rate, from the epoch, counted from 1 as the releases do, and their number.
SCHEDULES = {"exp-decay": exp_decay, "step": step, "cosine": cosine, "one-cycle": one_cycle}


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
        raise UserError(f"the network's output for image {first + fine.int().argmin().item()} is not finite: "
                        "this is no classification")
    return logits


def filled(model, stream):
    """(n, x, y) of a stream's batches: n images, filled up to one shape where code is compiled for it."""
    size = 0
    for x, y in stream:
        n, size = len(x), max(size, len(x))
        if n < size and model._compiled_call_impl:
            fill = torch.arange(size, device=x.device) % n
            x, y = x[fill], y[fill]
        yield n, x, y


def predictions(model, stream, attack, seed=0):
    """(y, f(x), f(x̂)) [N] of every image of a stream, under `pgd` with this record.

    model: any module of images in [0, 1]. stream: (x [B, 3, H, W] in [0, 1], y [B]) on its device, as
    `in_order` makes them. Over restarts f(x̂) is the first prediction that differs from f(x), if any. The
    attack runs as the model is executed (bf16, say). All predictions are made in float32. Images outside
    [0, 1] and logits that are not finite are UserErrors.
    """
    found, unmoved = [], 0
    for i, (n, x, y) in enumerate(filled(model, stream)):
        first = sum(len(part) for part, *_ in found)
        if not (x.amin() >= 0 and x.amax() <= 1):  # NaN fails, too
            raise UserError(f"images must be in [0, 1], not in [{x.amin():.4g}, {x.amax():.4g}]; "
                            "a network that wants others must scale them itself")
        natural = logits_of(model, x, first).argmax(1)
        adversarial, gradient = natural, torch.zeros(len(x), device=x.device)
        for restart in range(attack.restarts):
            with fixed_seed(((1000 * seed + restart) * 10 ** 6 + i) % 2 ** 63, x.device):
                x_adv, norm = pgd(model, x, LOSSES[attack.loss](y), attack)
            again, gradient = logits_of(model, x_adv, first).argmax(1), torch.maximum(gradient, norm)
            adversarial = torch.where(adversarial == natural, again, adversarial)
        unmoved += ((gradient == 0) & (adversarial == natural))[:n].sum().item()
        found.append([part[:n] for part in (y, natural, adversarial)])
        show(f"{attack.title()}: {first + n:,} images")
    found = [torch.cat(parts) for parts in zip(*found)]
    if attack.eps and attack.steps and unmoved > max(0.01 * len(found[0]), 1):
        warn(f"{attack.title()} had a gradient of exactly zero on {unmoved} of {len(found[0])} images that "
             "kept their prediction: their stability is not shown; try --attack cw or autoattack of eval.py")
    return found


def three_metrics(y, natural, adversarial):
    """The paper's metrics (Section 3), fractions of all N, from labels y and predictions f(x), f(x̂) [N].

    A point is robust exactly when it is correct and stable: robust ≤ min(natural, stability).
    """
    n, correct, stable = len(y), natural == y, adversarial == natural
    counts = correct.sum().item(), (correct & stable).sum().item(), stable.sum().item()
    return {"n": n, **{name: count / n for name, count in zip(METRICS, counts)}}


def evaluate(model, stream, attack, seed=0):
    """n, natural_accuracy, robust_accuracy, perturbation_stability and the attack, as a dict.

    Takes what `predictions` takes: any module, any stream of (x, y).
    """
    return {**three_metrics(*predictions(model, stream, attack, seed)), "attack": asdict(attack)}


def local_lipschitzness(model, stream, attack, seed=0, starts=3):
    """Mean over images of the largest ‖f(x) - f(x̂)‖₁ / ‖x - x̂‖∞ found in the ℓ∞ ε-ball, f the logits.

    The paper's estimator (after Yang et al. 2020), in float32: PGD on the numerator from a few random starts.
    A lower bound, in logits per pixel range.
    """
    largest = []
    with exact_precision(model):
        for i, (n, x, _) in enumerate(filled(model, stream)):
            clean, best = logits_of(model, x), torch.zeros(len(x), device=x.device)
            for start in range(starts):
                with fixed_seed(((1000 * seed + start) * 10 ** 6 + i) % 2 ** 63, x.device):
                    x_adv, _ = pgd(model, x, lambda logits: (logits - clean).abs().sum(), attack)
                rise, distance = (logits_of(model, x_adv) - clean).abs().sum(1), (x_adv - x).abs().flatten(1)
                best = torch.maximum(best, (rise / distance.amax(1)).nan_to_num(nan=0, posinf=0))
            largest.append(best[:n])
    return torch.cat(largest).mean().item()


def monitor_attack(eps, norm="linf"):
    """PGD-20, step 0.007: every epoch, as the paper's training code does. (ℓ2: as `report_attack`.)"""
    return Attack(norm=norm, eps=eps, step_size=step_for(eps, {"linf": 0.007, "l2": 0.2}[norm], norm))


def report_attack(eps, norm="linf"):
    """PGD-20, step 0.003 (ℓ2: 0.2, ε/2.5): the numbers that are reported."""
    return Attack(norm=norm, eps=eps, step_size=step_for(eps, {"linf": 0.003, "l2": 0.2}[norm], norm))


def monitor(model, data, args, epoch):
    """For the log: `evaluate` under `monitor_attack`, on --val-size images or else --eval-size test images.

    Nones where --eval-every skips an epoch, or where training has diverged, which `end_epoch` says. The ball
    is ℓ∞, unless a fork has a --norm.
    """
    if epoch % args.eval_every and epoch != args.epochs or any(not_finite(model)):
        return dict.fromkeys(METRICS)
    x, y = (data.x_val, data.y_val) if args.val_size else data.test(args.eval_size)
    attack = monitor_attack(args.eps, getattr(args, "norm", "linf"))
    return on_first(lambda: evaluate(model, in_order(x, y, args.batch_size), attack))


def report(model, data, args):
    """For metrics.json: `evaluate` on --test-size images under `report_attack`, Lipschitzness of 1,000.

    The ball is as in `monitor`; the ℓ∞ ball of Lipschitzness is then one of ε = 0.031.
    """
    (x, y), norm = data.test(args.test_size), getattr(args, "norm", "linf")
    attack = report_attack(args.eps, norm)
    ball = attack if norm == "linf" else report_attack(0.031)
    some = in_order(x[:1000], y[:1000], args.batch_size)
    say(f"testing on {len(x):,} images with {attack.title()}")
    return on_first(lambda: {
        **evaluate(model, in_order(x, y, args.batch_size), attack),
        "local_lipschitzness": local_lipschitzness(model, some, ball),
        "precision": args.precision, "best_chosen_on": "validation" if args.val_size else "test"})


def not_finite(model):
    """The names of its parameters and buffers that hold an infinity or NaN."""
    return (name for name, value in model.state_dict().items() if not value.isfinite().all())


def describe(metrics):
    """The three metrics in words, in percent; nothing for an epoch that was not monitored."""
    names = zip(("natural", "robust", "stability"), METRICS)
    found = [(name, metrics.get(key)) for name, key in names]
    return "  ".join(f"{name} {100 * value:.2f} %" for name, value in found if value is not None)


# ------------------------------------------------------------------------------------------------- run folder


# Settings that do not define a run.
MAY_CHANGE = {"out", "data_dir", "device", "compile", "script", "name", "may_change"}


class Run:
    """A run folder: args.json, log.jsonl, last.pt, best.pt, metrics.json, and the files of code that ran.

        run = Run(args, data, model=model, optimizer=optimizer)
        for epoch in run.epochs():
            for x, y in batches(...):
                ...
                run.record(len(x), natural_risk=natural_risk)  # scalars on the device: nothing waits here
            run.end_epoch(lr=lr, **metrics)                    # a line of the log and a checkpoint
        run.finish(test)                                       # metrics.json

    The same command again goes on after the last epoch that was finished, as if it had never stopped: a
    checkpoint holds the `state_dict` of every part (of any name; "model" is what is tested), and an epoch's
    random numbers follow from (seed, epoch, process). best.pt is the epoch with the highest `robust_accuracy`
    given to `end_epoch`. A loop may `break`, `continue` or raise anywhere.

    A run is its settings, its data and its code: the script and what it imports from its own folder, but for
    comments and docstrings. Where one of them differs, a folder named with --out is refused, and a default
    folder gives way to the next free number. Under torchrun the first process's parts are saved.
    """

    def __init__(self, args, data=None, /, **parts):
        self.args, self.parts, self.images = args, parts, len(data) if data else 0
        self.data_hash = data.hash if data else None
        self.sources = {"common.py": Path(__file__)} | code_of(Path(args.script).resolve())
        self.epoch, self.log, self.steps = 0, [], 0  # the last epoch finished; its and earlier ones' lines
        self.folder = on_first(self._choose_folder)
        if (self.folder / "last.pt").exists():
            state = read_checkpoint(self.folder / "last.pt")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.epoch, self.log = state["epoch"], state["log"]
            args.precision = state["args"]["precision"]
        say(f"{self.folder}: {self.epoch} of {args.epochs} epochs done")

    def _settings(self):
        free = MAY_CHANGE | {*getattr(self.args, "may_change", ())}
        kept = {name: value for name, value in vars(self.args).items() if name not in free}
        return json.loads(json.dumps({**kept, "data": self.data_hash}))

    def _choose_folder(self):
        wanted, said = Path(self.args.out or Path("runs") / self.args.name).expanduser(), ""
        for number in itertools.count(1):
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            if not (other := self._what_differs(folder)):
                break
            if self.args.out:
                raise UserError(f"{folder} holds another run ({other}); choose another --out")
            said = f"{folder} holds another run ({other}): this one goes to "
        if said:
            say(f"{said}{folder}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: {error.strerror}") from None
        self.lock = lock(folder)
        return folder

    def _what_differs(self, folder):
        """What makes the run in a folder another one; "" if none is there, or this one."""
        kept = ("last.pt", "best.pt", "log.jsonl", "metrics.json")
        files = [name for name in kept if (folder / name).exists()]
        if not files:
            return ""
        if "last.pt" not in files or not (folder / "args.json").exists():
            return f"{files[0]} is there without {'args.json' if 'last.pt' in files else 'last.pt'}"
        before, now = read_json(folder / "args.json"), self._settings()
        if now.get("precision") == "auto":  # a resumed run keeps what was found when it began
            now["precision"] = before.get("precision")
        found = [f"--{name.replace('_', '-')} {before.get(name)} there, {now.get(name)} here"
                 if name != "data" else "its data were others"
                 for name in {**before, **now} if before.get(name) != now.get(name)]
        return "; ".join(found + [f"{name} was edited" for name, source in sorted(self.sources.items())
                                  if not same_code(source, folder / name)])

    def epochs(self):
        """The epochs still to do, counted from 1."""
        on_first(self._open)
        for self.current in range(self.epoch + 1, self.args.epochs + 1):
            seed_everything(self.args.seed, self.current)
            self.recorded, self.seen, self.untimed = {}, 0, 0
            self.began = self.timed_from = self.now = self.shown = time.perf_counter()
            yield self.current

    def _open(self):
        for name, source in self.sources.items():
            write_file(self.folder / name, source.read_bytes())
        write_json(self.folder / "args.json", self._settings())
        if self.epoch:  # what a kill in the midst of the last epoch's end left undone
            self._write_log()
            if self._is_best():
                write_file(self.folder / "best.pt", (self.folder / "last.pt").read_bytes())

    def record(self, images=0, /, **scalars):
        """Note a step's numbers, scalars on the device, read back in `end_epoch`; and show progress."""
        for name, scalar in scalars.items():
            self.recorded.setdefault(name, []).append(torch.as_tensor(scalar).detach())
        self.steps += 1
        self.seen += images * WORLD
        self.now = time.perf_counter()
        if self.steps <= 2:  # code is compiled and memory taken in these: no measure of speed
            self.timed_from, self.untimed = self.now, self.seen
        elif self.now - self.shown > 1 and images:
            self.shown, rate = self.now, self._rate()
            left = (self.images * (self.args.epochs - self.current + 1) - self.seen) / rate
            show(f"epoch {self.current}/{self.args.epochs}  {self.seen:,} of {self.images:,} images  "
                 f"{rate:.4g} images/s  {duration(max(left, 0))} left")  # a loop may replay its images

    def _rate(self):
        """Images per second of this epoch; without the first two steps of all, if there were others."""
        if self.seen > self.untimed:
            return (self.seen - self.untimed) / max(self.now - self.timed_from, 1e-9)
        return self.seen / max(self.now - self.began, 1e-9)

    def end_epoch(self, **values):
        """Check and average what was recorded; log that and `values`; write the checkpoint."""
        advice = f"epoch {self.epoch} is kept in {self.folder}" if self.epoch else "no epoch was finished"
        advice += "; a smaller --lr or --beta may help"
        means = {}
        for name, scalars in self.recorded.items():
            history = torch.stack(scalars).float()
            if not history.isfinite().all():
                first = history.isfinite().int().argmin().item() + 1
                raise UserError(f"{name.replace('_', ' ')} not finite at epoch {self.current}, step {first}; "
                                f"{advice}")
            average_over_processes([mean := history.mean()])
            means[name] = mean.item()
        for name, part in self.parts.items():
            for key in not_finite(part) if isinstance(part, nn.Module) else ():
                raise UserError(f"{name} {key} not finite after epoch {self.current}; {advice}")
        line = {"epoch": self.current, **means, **values, "images_per_second": float(f"{self._rate():.4g}"),
                "seconds": round(time.perf_counter() - self.began, 2)}
        json.dumps(line)  # a value that is no JSON fails here, before anything is written
        self.log.append(line)
        on_first(self._save)
        self.epoch = self.current
        shown = "  ".join(f"{name.replace('_', ' ')} {mean:.4f}" for name, mean in means.items())
        left = duration(self.log[-1]["seconds"] * (self.args.epochs - self.epoch))
        say(f"epoch {self.epoch}/{self.args.epochs}  {shown}  {describe(values)}  "
            f"{self._rate():.4g} images/s  {left} left")

    def _save(self):
        content = io.BytesIO()
        torch.save({**{name: part.state_dict() for name, part in self.parts.items()}, "epoch": self.current,
                    "log": self.log, "args": self._settings()}, content)
        write_file(self.folder / "last.pt", content.getbuffer())
        if self._is_best():
            write_file(self.folder / "best.pt", content.getbuffer())
        self._write_log()

    def _write_log(self):
        lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
        write_file(self.folder / "log.jsonl", lines.encode())

    def _is_best(self):
        """Is the robust accuracy of the last line above those of all lines before?"""
        *before, last = [entry.get("robust_accuracy") for entry in self.log]
        return last is not None and last > max((score for score in before if score is not None), default=-1)

    def finish(self, test, attack=None):
        """metrics.json: `test()` with the weights of last.pt and, where it is another epoch, of best.pt.

        A finished run is not tested again, unless with another `attack` than the file has.
        """
        path = self.folder / "metrics.json"
        found = read_json(path) if path.exists() else None
        if found is None or attack and found["last"]["attack"] != asdict(attack):
            found = {}
            for name in ("last", "best") if (self.folder / "best.pt").exists() else ("last",):
                state = read_checkpoint(self.folder / f"{name}.pt")
                if found and state["epoch"] == found["last"]["epoch"]:
                    found[name] = found["last"]
                    continue
                self.parts["model"].load_state_dict(state["model"])
                found[name] = {"epoch": state["epoch"], **test()}
            on_first(lambda: write_json(path, found))
        for name, metrics in found.items():
            lipschitz = metrics.get("local_lipschitzness")
            say(f"{self.folder / name}.pt, epoch {metrics['epoch']}: {describe(metrics)}"
                + (f", local Lipschitzness {lipschitz:.2f}" if lipschitz is not None else ""))


def code_of(script):
    """{name: path} of a script and of what it, and what that imports, imports from the script's folder.

    A file in a package, losses/mart.py, is named losses.mart.py.
    """
    found, waiting, folder = {}, [script], script.parent
    while waiting:
        if (file := waiting.pop()) in found.values() or not file.is_file():
            continue
        found[".".join(file.relative_to(folder).parts)] = file
        for parts, base in itertools.product(imports(file.read_bytes()), {folder, file.parent}):
            waiting += [base.joinpath(*parts).with_suffix(".py"),
                        *(base.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1))]
    return found


@functools.cache
def imports(code):
    """What Python code may import, each as the parts of a dotted name."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module, names = getattr(node, "module", None), [alias.name for alias in node.names]
            found |= {module, *(f"{module}.{name}" for name in names)} if module else {*names}
    return [tuple(name.split(".")) for name in found]


def syntax(path):
    """A Python file's syntax without comments and docstrings, as text."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


def same_code(file, kept):
    """Do two files, of which `kept` may be missing, differ in comments and docstrings at most?"""
    return kept.exists() and (file.read_bytes() == kept.read_bytes() or syntax(file) == syntax(kept))


def lock(folder, wait=False):
    """An open file that keeps other processes out of `folder`; UserError if one is in there and not `wait`.

    None where there are no locks (Windows, some file systems): nobody is kept out then, which a warning says.
    """
    try:
        if not fcntl:
            raise OSError("this system has no fcntl")
        handle = open(folder / ".lock", "w")
        fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process; choose another --out") from None
    except OSError as error:
        warn(f"{folder} cannot be locked ({error}): let no other process in there")


def duration(seconds):
    """Such as 0:04:05 or 2 days, 3:00:00."""
    return str(datetime.timedelta(seconds=round(seconds)))


def write_file(path, content):
    """Write bytes so that `path` holds its old content or all of the new, whatever happens meanwhile."""
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


class _Dtype:
    """Stands in for numpy.dtype while a checkpoint is read: a crafted one can turn bytes into pointers."""

    def __init__(self, code, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = state[1]


def _number(dtype, content):
    """Stands in for the function that makes NumPy scalars: integers, floats and bools, as Python's."""
    dtype = np.dtype(f"{dtype.order}{dtype.code}")
    if dtype.kind not in "biuf":
        raise ValueError(dtype)
    return np.frombuffer(content, dtype)[0].item()


BESIDE_WEIGHTS = [argparse.Namespace, (_Dtype, "numpy.dtype"), (_number, "numpy.core.multiarray.scalar"),
                  (_number, "numpy._core.multiarray.scalar")]  # what published checkpoints hold, too


def read_checkpoint(path):
    """A checkpoint's dict, on the CPU, read without running any code in it, or UserError."""
    path = Path(path).expanduser()
    try:
        with warnings.catch_warnings():  # our line says it all
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(BESIDE_WEIGHTS):
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception:  # truncated, foreign or unsafe: they fail in many ways
        with open(path, "rb") as file:
            start = file.read(40)
        raise UserError(f"{path} is no checkpoint of tensors, or is cut short; "
                        f"it begins with {start!r}") from None


# ----------------------------------------------------------------------------------------------- command line


def launch(main):
    """Run a script's main(argv): a UserError or Ctrl-C ends in one line and exit status 2 or 130."""
    try:
        main(sys.argv[1:])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # one that leaves early can make another abort
            torch.distributed.destroy_process_group()
        return
    except UserError as error:
        message, status = f"error: {error}", 2
    except torch.OutOfMemoryError as error:
        message, status = f"error: a smaller batch or network needs less memory: {str(error)[:200]}", 2
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
    """Print a warning, once."""
    say(f"warning: {line}", sys.stderr)


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
            meant = f"; {text}/255?" if 1 == high < value < 256 else ""
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {limit}{meant}")
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


def experiment_parser(file, doc):
    """What every training script takes. `file`: the script's, after which the method is named."""
    parser = Parser(doc)
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=integer(0), default=1, help="seeds weights, shuffling, augmentation and attacks")
    add("--out", metavar="DIR", help="run folder; by default named after method, data, network, β "
        "and seed; under torchrun on several machines, on a disk that all share")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 on CUDA, on a CPU what a short measurement finds faster; kept for the run")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on CUDA only")
    parser.set_defaults(method=Path(file).stem.removeprefix("train_"), script=str(Path(file).resolve()))
    return parser


def training_parser(file, doc, quick=None, **defaults):
    """What the CIFAR scripts take besides their method's own arguments.

    `defaults` override the paper's TRADES setting. `quick` adds to what --quick sets.
    """
    parser = experiment_parser(file, doc)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cifar10", metavar="NAME", help="cifar10, cifar100, synthetic, or a NAME.npz")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are, or are downloaded to")
    add("--train-size", type=integer(), metavar="N", help="train on N random images, drawn with --seed")
    add("--val-size", type=integer(0), default=0, metavar="N", help="hold out N random training images to "
        "monitor, and so to choose best.pt on; 0: test images, the paper's choice")
    add("--no-flip", action="store_true", help="do not mirror training images (digits, say)")
    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=NETWORKS, default="wrn", help="WideResNet, DenseNet-BC or PreActResNet")
    add("--depth", type=integer(), help="layers; wrn 34, densenet 40, preact 18 unless given")
    add("--width", type=number(above=True), help="widening factor, or a DenseNet's growth rate; wrn 10, "
        "densenet 12, preact 1 unless given")
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
    add("--eval-size", type=integer(), default=1000, metavar="N", help="test images in a monitor evaluation")
    add("--test-size", type=integer(), metavar="N", help="random test images in metrics.json; by default all")
    add("--quick", action="store_true", help="a first look: synthetic data, WRN-10-1, a minute on two cores; "
        "options beside it win")
    parser.set_defaults(**defaults)
    parser.quick = {**QUICK, **(quick or {})}
    return parser


QUICK = {"dataset": "synthetic", "depth": 10, "width": 1, "epochs": 8, "train_size": 3000, "batch_size": 64,
         "lr": 0.2, "schedule": "one-cycle", "steps": 2, "step_size": 0.016, "eval_every": 4,
         "eval_size": 200, "compile": "off"}  # compiling would take longer than training


def start(parser, argv):
    """Parse argv, pick the device, join torchrun's processes, seed everything: (args, device)."""
    if "--quick" in argv:
        parser.set_defaults(**getattr(parser, "quick", {}))
    args = parser.parse_args(argv)
    device = connect(args, pick_device(args.device))
    if device.type != "cuda":
        say(f"no CUDA device in use: training on the {device.type} ({torch.get_num_threads()} threads), "
            "which is slow for a large network; the speed and the time left follow")
    if hasattr(args, "arch"):
        depth, width = NETWORKS[args.arch].usual
        args.depth, args.width = args.depth or depth, args.width or width
        args.width = int(args.width) if args.width == int(args.width) else args.width
        beta = f"-beta{args.beta}".removesuffix(".0") if hasattr(args, "beta") else ""  # a fork may have none
        network = f"{args.arch}-{args.depth}-{args.width:g}"
        args.name = f"{args.method}-{args.dataset}-{network}{beta}-seed{args.seed}"
    seed_everything(args.seed)
    return args, device

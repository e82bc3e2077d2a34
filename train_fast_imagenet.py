"""Fast adversarial training (Wong, Rice & Kolter 2020) of WideResNet-50-k on ImageNet: App. E and Table 5 of the paper.

    python train_fast_imagenet.py DIR --width 1              # DIR holds train/ and val/, each with a folder per class
    python train_fast_imagenet.py DIR --width 2 --eps 4/255  # wider, and a larger ball; the same command again resumes
    python train_fast_imagenet.py DIR --width 2 --restarts 10        # tests the finished run again, with 10 restarts
    python train_fast_imagenet.py DIR --width 2 --benchmark 50       # images/s of the input pipeline and of training

A trial on a CPU, with CIFAR-10 as an ImageFolder tree: 24.5 % natural and 20.5 % robust accuracy (PGD-50) on 200
images, chance 10 %, after 6 minutes on one core of an AMD EPYC that other work shared:

    python train_fast_imagenet.py DIR --width 1/4 --short-sides 32 32 32 --crops 32 32 32 --batch-sizes 32 32 32 \\
        --lr 0.003 --epochs 5 --train-size 6000 --eval-size 200 --test-size 200

Loss: cross-entropy of x̂, one signed-gradient step (FGSM) of 1.25·ε from a uniform start in the ε-ball. That is plain
Fast AT, `--beta 1`, without a clean pass. Any other β is the generalized adversarial training of App. D: natural risk +
β·mean max(L(x̂) - L(x), 0). At β = 1 the latter would be mean max(L(x̂), L(x)): the same where the attack succeeds.

In training the attack sees the network in train mode, as in Wong et al.: in the first steps BatchNorm's running
averages lag far behind the weights, and gradients in eval mode explode. In validation it is eval mode, as elsewhere.

JPEG files are decoded by Pillow in --workers processes, at 1/2, 1/4 or 1/8 of their size where a phase needs no more:
there is no separate pass over the disk to resize them. Measured on 150 ImageNet images of short side 224 px: 371, 191
and 420 images per CPU second (AMD EPYC) in phases 1, 2 and 3; phase 2 enlarges such images to 352 px. --decode gpu has
not been measured on a GPU, and torchvision has announced the end of its decoder: hence workers are the default.
"""
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as transforms
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import RandomResizedCrop

import common
from common import UserError, cross_entropy_to, integer, number, perturb_start, pgd, project, say, to_float


@dataclass
class Phase:
    start: int        # epochs done when it begins
    end: int          # epochs done when it is over
    short_side: int   # pixels that images are scaled to before they are cropped; 0: as they are
    crop: int         # pixels
    batch_size: int
    lr: tuple         # (epochs done, rate), joined by straight lines


PHASES = (Phase(0, 6, 160, 128, 512, ((0, 0), (1, 0.4), (6, 0.04))),
          Phase(6, 12, 352, 224, 224, ((6, 0.04), (12, 0.004))),
          Phase(12, 15, 0, 288, 128, ((12, 0.004), (15, 0.0004))))
PEAK_LR = 0.4
MONITOR_ATTACK = {"step_size": 1 / 255, "steps": 10}  # every epoch
REPORT_ATTACK = {"step_size": 1 / 255, "steps": 50}   # at the end, with --restarts


def scaled_phases(epochs, short_sides, crops, batch_sizes, lr):
    """PHASES stretched to `epochs`, boundaries rounded, with these sizes, a list of 3 each, and the peak rate `lr`."""
    phases = []
    for phase, *sizes in zip(PHASES, short_sides, crops, batch_sizes):
        start, end = (round(epoch * epochs / PHASES[-1].end) for epoch in (phase.start, phase.end))
        stretch = (end - start) / (phase.end - phase.start)
        corners = tuple((start + (epoch - phase.start) * stretch, rate * lr / PEAK_LR) for epoch, rate in phase.lr)
        phases.append(Phase(start, end, *sizes, corners))
    return phases


def learning_rate(phase, epoch):
    """The rate in `phase` when `epoch` epochs, a fraction counts, are done."""
    return float(np.interp(epoch, *zip(*phase.lr)))


class WideResNet50(ResNet):
    """ResNet-50 with the bottlenecks' inner width times `width`; images [N, 3, H, W] in [0, 1] → logits [N, classes].

    Parameter names are torchvision's. In bf16 the first convolution stays float32: the bfloat16 step of a normalized
    bright pixel is 0.0035 in units of x, almost half of ε = 2/255.
    """

    precision = "fp32"

    def __init__(self, width, classes):
        super().__init__(Bottleneck, [3, 4, 6, 3], classes, width_per_group=round(64 * width))
        for name, values in ("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        x = self.conv1((x - self.mean) / self.std)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            x = x.bfloat16() if self.precision == "bf16" else x
            x = self.maxpool(self.relu(self.bn1(x)))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.float().mean((2, 3)))


# ---------------------------------------------------------------------------------------------------------- data


def crop_image(image, phase, train):
    """A PIL image, or uint8 [3, H, W], scaled to the phase's short side, then cropped to crop × crop pixels.

    In training 8-100 % of the area anywhere, at an aspect ratio of 3/4 to 4/3, mirrored half the time, drawn from
    torch's CPU generator; else the middle, for which a smaller image is enlarged.
    """
    side = phase.short_side or min(transforms.get_image_size(image))
    image = transforms.resize(image, side if train else max(side, phase.crop))
    if not train:
        return transforms.center_crop(image, phase.crop)
    box = RandomResizedCrop.get_params(image, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    image = transforms.resized_crop(image, *box, [phase.crop, phase.crop])
    return transforms.hflip(image) if torch.rand(()) < 0.5 else image


class Images(Dataset):
    """The images of DIR/train or DIR/val, a folder per class, read by worker processes; raises UserError.

    An item is what a worker does: (phase, seed, numbers of a batch) → (numbers, crops uint8 [N, crop, crop, 3],
    [(path, reason) of every unreadable image]). A crop depends on the seed and the image's number alone, not on
    which worker makes it. With --decode gpu it is the bytes of the files instead, for `decode`.
    """

    def __init__(self, args, split, device):
        root = Path(args.data_dir) / split
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; DIR must hold train/ and val/, each with a folder per class")
        try:
            folder = ImageFolder(root)
        except FileNotFoundError as error:  # no class folder, or one without images
            raise UserError(str(error)) from None
        self.paths = np.array([os.fsencode(path) for path, _ in folder.samples])  # an array, which workers can share
        self.labels, self.classes = torch.tensor(folder.targets), folder.classes
        self.args, self.device = args, device
        self.skipped, self.named = 0, set()  # unreadable images met, and which of them the screen has named

    def __len__(self):
        return len(self.paths)

    def keep(self, size, seed):
        """Keep a random subset of the images."""
        if size > len(self):
            raise UserError(f"--train-size {size}: {self.args.data_dir} has {len(self)} training images")
        subset = np.random.default_rng(seed).permutation(len(self))[:size]
        self.paths, self.labels = self.paths[subset], self.labels[subset]

    def batches(self, phase, order, seed=None):
        """(x uint8 [B, 3, crop, crop], y [B], n) of the images numbered in `order`, on the device.

        `seed` is (seed, epoch) for training crops, None for the middle. The first n of a batch count. The last batch,
        and one with unreadable images, is filled up with repetitions: B is always the same, as compiled code wants it.
        """
        size, total = min(phase.batch_size, len(order)), 0
        items = [(phase, seed, order[i:i + size]) for i in range(0, len(order), size)]
        loader = DataLoader(self, batch_size=None, sampler=items, num_workers=self.args.workers,
                            pin_memory=self.device.type == "cuda", generator=torch.Generator())  # not the attack's
        for numbers, crops, unreadable in map(self.decode, items, loader) if self.args.decode == "gpu" else loader:
            for path, reason in unreadable:
                self.report(path, reason)
            n = len(numbers)
            if 0 < n < size:
                fill = torch.arange(size) % n
                numbers, crops = numbers[fill], crops[fill]
            if n:
                x, y = (part.to(self.device, non_blocking=True) for part in (crops, self.labels[numbers]))
                yield x.permute(0, 3, 1, 2), y, n
            total += n
        if not total:
            raise UserError(f"{self.args.data_dir}: not one of these images can be read")

    def __getitem__(self, item):
        if self.args.decode == "cpu":
            return self.read(item)
        try:
            return [torch.from_numpy(np.fromfile(path, np.uint8)) for path in self.paths[item[2]]]
        except OSError:
            return []

    def read(self, item, device=torch.device("cpu")):  # `device`: whose random numbers are to go on undisturbed
        phase, seed, numbers = item
        kept, crops, unreadable = [], np.empty((len(numbers), phase.crop, phase.crop, 3), np.uint8), []
        for i in numbers:
            path = os.fsdecode(self.paths[i])
            try:
                with Image.open(path) as image:
                    if phase.short_side:  # of a JPEG, decode 1/2, 1/4 or 1/8 of the pixels where that is enough
                        image.draft("RGB", (phase.short_side, phase.short_side))
                    image = image.convert("RGB")
                with common.fixed_seed(image_seed(seed, i), device):
                    crops[len(kept)] = np.asarray(crop_image(image, phase, train=seed is not None))
                kept.append(i)
            except Exception as error:  # broken images fail in many ways
                unreadable.append((path, str(error)))
        return torch.tensor(kept, dtype=torch.int64), torch.from_numpy(crops[:len(kept)]), unreadable

    def decode(self, item, files):
        """What `read` returns, with the files' JPEG decoded and cropped on the device."""
        from torchvision.io import decode_jpeg

        phase, seed, numbers = item
        try:
            images = decode_jpeg(files, "RGB", device=self.device)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # CMYK, a PNG named .JPEG, a broken file: the CPU reads it, or names it
            return self.read(item, self.device)
        crops = []
        for i, image in zip(numbers, images):
            with common.fixed_seed(image_seed(seed, i), self.device):
                crops.append(crop_image(image, phase, train=seed is not None))
        return torch.from_numpy(numbers), torch.stack(crops).permute(0, 2, 3, 1).contiguous(), []  # [N, H, W, 3]

    def report(self, path, reason):
        if self.args.on_bad_image == "fail":
            raise UserError(f"{path} cannot be read ({reason}); --on-bad-image skip does without such images")
        if path not in self.named:
            say(f"skipped {path}: {reason}")
        self.named.add(path)
        self.skipped += 1


def image_seed(seed, i):
    """A 32-bit seed from (seed, epoch) and an image's number."""
    return int(np.random.SeedSequence((*(seed or ()), i)).generate_state(1)[0])


# ------------------------------------------------------------------------------------------------ method and metrics


def fgsm(model, x, y, eps):
    """(x̂, ‖gradient‖₁ [N]): one step of 1.25·ε along the gradient's sign, from a uniform start.

    x, x̂ [N, 3, H, W]; the start and x̂ lie in the ε-ball and in [0, 1]. The model runs in the mode that it is in, its
    parameters frozen by the caller.
    """
    x_start = project(perturb_start(x, "uniform", eps, "linf"), x, eps, "linf").requires_grad_()
    gradient, = torch.autograd.grad(F.cross_entropy(model(x_start), y, reduction="sum"), x_start)
    return project(x_start.detach() + 1.25 * eps * gradient.sign(), x, eps, "linf"), gradient.abs().sum((1, 2, 3))


def fast_at_loss(model, x, x_adv, y, beta):
    """(loss, parts), batch means: at β = 1 the adversarial risk alone, else equation (1.1) as App. D clips it.

    The parts are (adversarial risk,) or (natural risk, robust regularization). Clean and adversarial images pass
    separately, so that BatchNorm sees each alone.
    """
    if beta == 1:
        adversarial_risk = F.cross_entropy(model(x_adv), y)
        return adversarial_risk, (adversarial_risk,)
    natural, adversarial = (F.cross_entropy(model(images), y, reduction="none") for images in (x, x_adv))
    natural_risk, robust_regularization = natural.mean(), (adversarial - natural).clamp(min=0).mean()
    return natural_risk + beta * robust_regularization, (natural_risk, robust_regularization)


def train_step(model, optimizer, x, y, eps, beta):
    """One attack and one update; returns the parts of the loss and the mean of ‖∇_x̂ L‖₁, scalars on the device."""
    model.train()  # already for the attack: BatchNorm's averages lag behind the weights, in the first steps wildly
    model.requires_grad_(False)
    x_adv, lipschitz = fgsm(model, x, y, eps)
    model.requires_grad_(True)
    loss, parts = fast_at_loss(model, x, x_adv, y, beta)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return *parts, lipschitz.mean()


def validate(model, images, phase, size, eps, *, step_size, steps, restarts=1):
    """The paper's three metrics under PGD, top-5 and FGSM accuracy of `size` images, always the same ones.

    Of several restarts the worst counts for each image: it is stable if no restart changes its prediction.
    """
    def predict(x):
        with common.attack_mode(model), common.exact_precision(model), torch.no_grad():
            return model(x).topk(min(5, len(images.classes))).indices

    found = []
    with common.fixed_seed(0, images.device):
        for x, y, n in images.batches(phase, some(images, size)):
            x, right = to_float(x), y[:, None]
            top5 = predict(x)                                                                             # [B, 5]
            natural = worst = top5[:, 0]
            natural_top5 = worst_top5 = (top5 == right).any(1)
            for _ in range(restarts):
                top5 = predict(pgd(model, x, cross_entropy_to(y), eps=eps, step_size=step_size, steps=steps))
                worst = torch.where(worst == natural, top5[:, 0], worst)
                worst_top5 = worst_top5 & (top5 == right).any(1)
            with common.attack_mode(model):
                x_fgsm, _ = fgsm(model, x, y, eps)
            fgsm_right = predict(x_fgsm)[:, 0] == y
            found.append(torch.stack([y, natural, worst, natural_top5, worst_top5, fgsm_right], 1)[:n])
    y, natural, worst, *hits = torch.cat(found).T
    names = "natural_top5_accuracy", "robust_top5_accuracy", "fgsm_accuracy"
    return {**common.three_metrics(y, natural, worst),
            **{name: hit.double().mean().item() for name, hit in zip(names, hits)}}


def some(images, size):
    """The numbers of `size` random images (None: all), the same every time."""
    return np.random.default_rng(0).permutation(len(images))[:size]


def catastrophic_overfitting(log, metrics):
    """A warning, or None: has PGD accuracy collapsed since its best epoch in `log`, while FGSM accuracy rose?

    Collapsed is: halved, and lower by 2 points at least. Training on a single step can teach a network to defeat that
    step and no other, within a few hundred updates (Wong et al. 2020).
    """
    best = max(log, key=lambda entry: entry["robust_accuracy"], default=metrics)
    before, now = best["robust_accuracy"], metrics["robust_accuracy"]
    if now > min(before / 2, before - 0.02) or metrics["fgsm_accuracy"] <= best["fgsm_accuracy"]:
        return None
    return (f"catastrophic overfitting: since epoch {best['epoch']} PGD accuracy fell from {100 * before:.2f} % to "
            f"{100 * now:.2f} %, while FGSM accuracy rose from {100 * best['fgsm_accuracy']:.2f} % to "
            f"{100 * metrics['fgsm_accuracy']:.2f} %; best.pt holds epoch {best['epoch']}, a smaller --lr may help")


# ------------------------------------------------------------------------------------------------------ experiment


def benchmark(model, optimizer, images, phases, args):
    """Print images/s of each phase: the input pipeline by itself, its start included, and training on one batch."""
    for phase in phases:
        torch.compiler.reset()
        order = np.random.default_rng(args.seed).integers(len(images), size=phase.batch_size * args.benchmark)
        began, fetched = time.perf_counter(), 0
        for x, y, n in images.batches(phase, order, (args.seed, 1)):
            fetched += n
        x = to_float(x)
        x.mean().item()  # waits for the device
        pipeline = fetched / (time.perf_counter() - began)
        for steps in (2, args.benchmark):  # two to warm up
            began = time.perf_counter()
            for _ in range(steps):
                *_, lipschitz = train_step(model, optimizer, x, y, args.eps, args.beta)
            lipschitz.item()
        training = args.benchmark * len(x) / (time.perf_counter() - began)
        say(f"crop {phase.crop}, batch {len(x)}: input pipeline {pipeline:.1f} images/s, "
            f"training {training:.1f} images/s")


def parse(argv):
    parser = common.Parser(__doc__)
    add, phases = parser.add_argument, {"nargs": len(PHASES), "metavar": "N"}
    add("data_dir", metavar="DIR", help="folder with train/ and val/, each with a folder of images per class")
    add("--width", type=number(1 / 64), default=1.0, help="k: the bottlenecks' inner width, times 64; 1/4 works")
    add("--epochs", type=integer(len(PHASES)), default=15, help="passes over the training set; stretches the phases")
    add("--short-sides", type=integer(0), default=[phase.short_side for phase in PHASES], **phases,
        help="each phase's short side of an image before cropping, in pixels; 0: as it is")
    add("--crops", type=integer(), default=[phase.crop for phase in PHASES], **phases,
        help="each phase's crop, in pixels")
    add("--batch-sizes", type=integer(), default=[phase.batch_size for phase in PHASES], **phases,
        help="each phase's images a step")
    add("--lr", type=number(above=True), default=PEAK_LR, help="peak of the learning rate; the lines scale with it")
    add("--eps", type=number(0, 1), default=2 / 255, help="ℓ∞ radius of the attacks, in pixel range [0, 1]; 4/255 too")
    add("--beta", type=number(), default=1.0, help="λ of the paper; 1: plain Fast AT, others: App. D")
    add("--train-size", type=integer(), metavar="N", help="train on a random subset of N images, drawn with --seed")
    add("--eval-size", type=integer(), default=5000, metavar="N", help="validation images to test after each epoch")
    add("--test-size", type=integer(), metavar="N", help="validation images to test at the end; None: all")
    add("--restarts", type=integer(), default=1, help="restarts of the last test's PGD-50; the worst counts")
    add("--workers", type=integer(0), default=os.cpu_count(), help="processes that read images; 0: only this one")
    add("--decode", choices=("cpu", "gpu"), default="cpu", help="where JPEG is decoded; gpu: not yet measured")
    add("--on-bad-image", choices=("fail", "skip"), default="fail", help="what to do at an image that cannot be read")
    add("--seed", type=integer(0), default=1, help="seeds weights, order, crops and attacks")
    add("--out", metavar="DIR", help="run folder; by default runs/fast-<DIR>-wrn50-<k>-eps<255ε>-beta<β>-seed<s>")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on a CUDA device")
    add("--benchmark", type=integer(), metavar="N", help="only measure the speed over N batches of each phase")
    args = parser.parse_args(argv)
    args.out = args.out or (f"runs/fast-{Path(args.data_dir).resolve().name}-wrn50-{args.width:g}-eps{255 * args.eps:g}"
                            f"-beta{args.beta:g}-seed{args.seed}")
    return args


def main(argv):
    args = parse(argv)
    device = common.pick_device(args.device)
    args.precision = common.pick_precision(args.precision, device)
    if args.decode == "gpu" and device.type != "cuda":
        raise UserError(f"--decode gpu needs a CUDA device; this one is {device}")
    phases = scaled_phases(args.epochs, args.short_sides, args.crops, args.batch_sizes, args.lr)
    train, val = Images(args, "train", device), Images(args, "val", device)
    if train.classes != val.classes:
        raise UserError(f"{args.data_dir}: train/ and val/ hold different classes; only one of them has "
                        f"{min({*train.classes} ^ {*val.classes})}/")
    if args.train_size:
        train.keep(args.train_size, args.seed)

    torch.manual_seed(args.seed)
    model = WideResNet50(args.width, len(train.classes))
    say(f"{common.execute(model, device, args.precision, args.compile)}, {args.workers} workers on {device.type}")
    norms = {p for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d) for p in module.parameters()}
    groups = [{"params": [p for p in model.parameters() if p not in norms], "weight_decay": 1e-4},
              {"params": [p for p in model.parameters() if p in norms], "weight_decay": 0}]
    optimizer = torch.optim.SGD(groups, lr=0, momentum=0.9, fused=True)  # the phases have the rates
    if args.benchmark:
        return benchmark(model, optimizer, train, phases, args)
    run = common.Run(args, model, optimizer, recorded=("adversarial_risk", "lipschitz") if args.beta == 1 else
                     ("natural_risk", "robust_regularization", "lipschitz"))

    phase = None
    for epoch in run.epochs():
        if phase is None or epoch > phase.end:
            phase = next(phase for phase in phases if epoch <= phase.end)
            torch.compiler.reset()  # makes room: compiled code is for one shape, and few are kept
        train.skipped = val.skipped = 0
        steps = common.steps_per_epoch(len(train), phase.batch_size)
        order = np.random.default_rng((args.seed, epoch)).permutation(len(train))[:steps * phase.batch_size]
        stream = ((x, y) for x, y, _ in train.batches(phase, order, seed=(args.seed, epoch)))
        for step, (x, y) in enumerate(run.watch(stream, len(train), phase.batch_size), 1):
            lr = learning_rate(phase, epoch - 1 + step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            run.record(*train_step(model, optimizer, to_float(x), y, args.eps, args.beta))
        metrics = validate(model, val, phase, args.eval_size, args.eps, **MONITOR_ATTACK)
        warning = catastrophic_overfitting(run.log, metrics)
        run.save_epoch(lr, {**metrics, "skipped_images": train.skipped + val.skipped, "warning": warning})
        if warning:
            say(warning)

    path, attack = run.folder / "metrics.json", {"eps": args.eps, **REPORT_ATTACK}
    described = {"name": "pgd", "loss": "cross-entropy", "norm": "linf", "start": "uniform", **attack,
                 "restarts": args.restarts}
    if not path.exists() or common.read_json(path)["attack"] != described:
        phase = phases[-1]
        say(f"testing on {len(some(val, args.test_size)):,} images with PGD-{attack['steps']}, "
            f"{'1 restart' if args.restarts == 1 else f'{args.restarts} restarts'}")
        metrics = validate(model, val, phase, args.test_size, restarts=args.restarts, **attack)
        x = torch.cat([x[:n] for x, _, n in val.batches(phase, some(val, min(args.test_size or 1000, 1000)))])
        metrics["local_lipschitzness"] = common.local_lipschitzness(model, x, batch_size=phase.batch_size, **attack)
        common.write_json(path, {**metrics, "attack": described, "epoch": run.epoch, "precision": args.precision})
    metrics = common.read_json(path)
    say(f"{path}: {common.describe(metrics)}, top-5 natural {100 * metrics['natural_top5_accuracy']:.2f} %")


if __name__ == "__main__":
    common.launch(main)

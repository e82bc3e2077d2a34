"""Fast adversarial training (Wong, Rice & Kolter 2020) of WideResNet-50-k on ImageNet: App. E and Table 5.

    python train_fast_imagenet.py DIR --width 1              # DIR: train/ and val/, each a folder per class
    python train_fast_imagenet.py DIR --width 2 --eps 4/255  # a larger ball; the same command again resumes
    python train_fast_imagenet.py DIR --width 1 --restarts 10   # tests the finished run again, 10 restarts

The run folder is runs/fast-<DIR>-wrn50-<k>-eps<255ε>-beta<β>-seed<s>, unless --out names another.

A trial on a CPU, with CIFAR-10 as an ImageFolder tree: 24.5 % natural and 20.5 % robust accuracy (PGD-50) on
200 images, chance 10 %, after 6 minutes on one core of an AMD EPYC that other work shared:

    python train_fast_imagenet.py DIR --width 1/4 --short-sides 32 32 32 --crops 32 32 32 \\
        --batch-sizes 32 32 32 --lr 0.003 --epochs 5 --train-size 6000 --eval-size 200 --test-size 200

Loss: cross-entropy of x̂, one signed-gradient step (FGSM) of 1.25·ε from a uniform start in the ε-ball. That
is plain Fast AT, `--beta 1`, without a clean pass. Any other β is the generalized adversarial training of
App. D: natural risk + β·mean max(L(x̂) - L(x), 0). At β = 1 the latter would be mean max(L(x̂), L(x)): the
same where the attack succeeds.

In training the attack sees the network in train mode, as in Wong et al.: in the first steps BatchNorm's
running averages lag far behind the weights, and gradients in eval mode explode. Validation is in eval mode.

JPEG files are decoded by Pillow in --workers processes, at 1/2, 1/4 or 1/8 of their size where a phase needs
no more: no separate pass over the disk resizes them. Measured on 150 ImageNet images of short side 224 px:
371, 191, 420 images per CPU second (AMD EPYC) in phases 1, 2, 3; phase 2 enlarges such images to 352 px.
"""
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import common  # before PyTorch: it says how threads wait
import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as transforms
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import RandomResizedCrop
from common import (RANK, WORLD, Attack, UserError, cross_entropy_to, integer, number, perturb_start, pgd,
                    project, say)


@dataclass
class Phase:
    end: int          # its last epoch
    short_side: int   # pixels that images are scaled to before they are cropped; 0: as they are
    crop: int         # pixels
    batch_size: int


PHASES = (Phase(6, 160, 128, 512), Phase(12, 352, 224, 224), Phase(15, 0, 288, 128))
MONITOR = Attack(step_size=1 / 255, steps=10)  # every epoch
REPORT = Attack(step_size=1 / 255, steps=50)   # at the end, with --restarts


def phase_ends(epochs):
    """The last epoch of each phase: 6, 12 and 15 of 15."""
    return [round(phase.end * epochs / PHASES[-1].end) for phase in PHASES]


def schedule(done, epochs):
    """Factor of the peak rate: from 0 to 1 in a sixth of phase 1, then to a tenth by each phase's end."""
    ends = phase_ends(epochs)
    return float(np.interp(done * epochs, [0, ends[0] / 6, *ends], [0, 1, 0.1, 0.01, 0.001]))


class WideResNet50(ResNet):
    """ResNet-50 with the bottlenecks' inner width times `width`, for images in [0, 1].

    Parameter names are torchvision's. In bf16 the first convolution stays float32: the bfloat16 step of a
    normalized bright pixel is 0.0035 in units of x, almost half of ε = 2/255.
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


# ------------------------------------------------------------------------------------------------------- data


def crop_image(image, phase, train):
    """A PIL image, scaled to the phase's short side, then cropped to crop × crop pixels.

    In training 8-100 % of the area anywhere, at an aspect ratio of 3/4 to 4/3, mirrored half the time, drawn
    from torch's CPU generator; else the middle, for which a smaller image is enlarged.
    """
    side = phase.short_side or min(image.size)
    image = transforms.resize(image, side if train else max(side, phase.crop))
    if not train:
        return transforms.center_crop(image, phase.crop)
    box = RandomResizedCrop.get_params(image, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    image = transforms.resized_crop(image, *box, [phase.crop, phase.crop])
    return transforms.hflip(image) if torch.rand(()) < 0.5 else image


class Images(Dataset):
    """The images of DIR/train or DIR/val, a folder per class, read by worker processes; raises UserError.

    An item is what a worker does: (phase, seed, numbers of a batch) → (numbers, crops, [(path, reason)] of
    unreadable images), crops uint8 [N, crop, crop, 3]. A crop depends on the seed and the image's number, not
    on which worker makes it.
    """

    def __init__(self, args, split, device):
        root = Path(args.data_dir) / split
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; DIR must hold train/ and val/, each a folder per class")
        try:
            folder = ImageFolder(root)
        except FileNotFoundError as error:  # no class folder, or one without images
            raise UserError(str(error)) from None
        self.paths = np.array([os.fsencode(path) for path, _ in folder.samples])  # workers share an array
        self.labels, self.classes = torch.tensor(folder.targets), folder.classes
        self.args, self.device, self.unreadable = args, device, set()  # paths met so far

    def __len__(self):
        return len(self.paths)

    def keep(self, size, seed):
        """Keep a random subset of the images."""
        if size > len(self):
            raise UserError(f"--train-size {size}: {self.args.data_dir} has {len(self)} training images")
        subset = shuffled(len(self), size, seed)
        self.paths, self.labels = self.paths[subset], self.labels[subset]

    def batches(self, phase, order, seed=None):
        """(x [B, 3, crop, crop] in [0, 1], y [B], n) of the images numbered in `order`, on the device.

        `seed` is (seed, epoch) for training crops, None for the middle. The first n of a batch count. The
        last batch, and one with unreadable images, is filled up with repetitions: B is always the same, as
        compiled code wants it. Under torchrun it is this process's share of each batch.
        """
        size, total = math.ceil(min(phase.batch_size, len(order)) / WORLD), 0
        order = order[RANK::WORLD]
        items = [(phase, seed, order[i:i + size]) for i in range(0, len(order), size)]
        loader = DataLoader(self, batch_size=None, sampler=items,
                            num_workers=math.ceil(self.args.workers / WORLD),
                            pin_memory=self.device.type == "cuda",
                            generator=torch.Generator())  # its own: the attack's numbers do not depend on it
        for numbers, crops, unreadable in loader:
            self.skip(unreadable)
            n = len(numbers)
            total += n
            if n:
                parts = [crops, self.labels[numbers]]
                parts = common.padded(parts, size) if n < size else parts
                x, y = (part.to(self.device, non_blocking=True) for part in parts)
                yield common.to_float(x.permute(0, 3, 1, 2)), y, n
            elif WORLD > 1:  # the other processes would wait for its gradients
                raise UserError(f"{self.args.data_dir}: not one image of a process's share can be read")
        if not total:
            raise UserError(f"{self.args.data_dir}: not one of these images can be read")

    def __getitem__(self, item):
        phase, seed, numbers = item
        kept, crops, unreadable = [], np.empty((len(numbers), phase.crop, phase.crop, 3), np.uint8), []
        for i in numbers:
            path = os.fsdecode(self.paths[i])
            try:
                with Image.open(path) as image:
                    if phase.short_side:  # of a JPEG, decode 1/2, 1/4 or 1/8 of the pixels where that will do
                        image.draft("RGB", (phase.short_side, phase.short_side))
                    image = image.convert("RGB")
                with common.fixed_seed(image_seed(seed, i), torch.device("cpu")):
                    crops[len(kept)] = np.asarray(crop_image(image, phase, train=seed is not None))
                kept.append(i)
            except Exception as error:  # broken images fail in many ways
                unreadable.append((path, str(error)))
        return torch.tensor(kept, dtype=torch.int64), torch.from_numpy(crops[:len(kept)]), unreadable

    def skip(self, unreadable):
        for path, reason in unreadable:
            if self.args.on_bad_image == "fail":
                raise UserError(f"{path} cannot be read ({reason}); --on-bad-image skip does without it")
            if path not in self.unreadable:
                say(f"skipped {path}: {reason}")
                self.unreadable.add(path)


def shuffled(n, size=None, seed=0):
    """`size` (None: all) of the numbers 0..n - 1, in the random order of this seed."""
    return np.random.default_rng(seed).permutation(n)[:size]


def image_seed(seed, i):
    """A 32-bit seed from (seed, epoch) and an image's number."""
    return int(np.random.SeedSequence((*(seed or ()), i)).generate_state(1)[0])


# ----------------------------------------------------------------------------------------- method and metrics


def fgsm(model, x, y, attack):
    """(x̂, ‖gradient‖₁ [N]): one step of the attack along the gradient's sign from its start.

    x, x̂ [N, 3, H, W], y [N]; start and x̂ lie in the ε-ball and in [0, 1]. Unlike in `pgd`, the model runs
    in the mode that it is in.
    """
    x_start = project(perturb_start(x, attack.start, attack.eps, "linf"), x, attack.eps, "linf")
    x_start.requires_grad_()
    model.requires_grad_(False)  # compiled code would compute the weights' gradients, too
    gradient, = torch.autograd.grad(cross_entropy_to(y)(model(x_start)), x_start)
    model.requires_grad_(True)
    x_adv = project(x_start.detach() + attack.step_size * gradient.sign(), x, attack.eps, "linf")
    return x_adv, gradient.abs().sum((1, 2, 3))


def fast_at_loss(model, x, x_adv, y, beta):
    """(loss, its parts by name), batch means.

    At β = 1 the adversarial risk alone, else equation (1.1) as App. D clips it. Clean and adversarial images
    pass separately, so that BatchNorm sees each alone.
    """
    if beta == 1:
        adversarial_risk = F.cross_entropy(model(x_adv), y)
        return adversarial_risk, {"adversarial_risk": adversarial_risk}
    natural, adversarial = (F.cross_entropy(model(images), y, reduction="none") for images in (x, x_adv))
    natural_risk, robust_regularization = natural.mean(), (adversarial - natural).clamp(min=0).mean()
    return (natural_risk + beta * robust_regularization,
            {"natural_risk": natural_risk, "robust_regularization": robust_regularization})


def validate(model, images, phase, size, attack, single_step):
    """`common.evaluate`, natural top-5 and FGSM accuracy of `size` images (None: all), always the same."""
    top5_right, fgsm_right = [], []

    def stream():
        for i, (x, y, n) in enumerate(images.batches(phase, shuffled(len(images), size))):
            top5 = common.exact_logits(model, x).topk(min(5, len(images.classes))).indices  # [B, 5]
            with common.fixed_seed(i, x.device):
                x_adv = pgd(model, x, cross_entropy_to(y), single_step)
            top5_right.append((top5 == y[:, None]).any(1)[:n])
            fgsm_right.append((common.predict(model, x_adv) == y)[:n])
            yield x, y, n

    metrics, _ = common.evaluate(model, stream(), attack)
    top5, single = (common.joined(torch.cat(right)) for right in (top5_right, fgsm_right))
    return {**metrics, "natural_top5_accuracy": top5.double().mean().item(),
            "fgsm_accuracy": single.double().mean().item()}


def catastrophic_overfitting(log, metrics):
    """A warning, or None: has PGD accuracy collapsed since its best epoch in `log`, while FGSM accuracy rose?

    Collapsed is: halved, and lower by 2 points at least. Training on a single step can teach a network to
    defeat that step and no other, within a few hundred updates (Wong et al. 2020).
    """
    best = max(log, key=lambda entry: entry["robust_accuracy"], default=metrics)
    before, now = best["robust_accuracy"], metrics["robust_accuracy"]
    if now > min(before / 2, before - 0.02) or metrics["fgsm_accuracy"] <= best["fgsm_accuracy"]:
        return None
    return (f"catastrophic overfitting: since epoch {best['epoch']} PGD accuracy fell from "
            f"{100 * before:.2f} % to {100 * now:.2f} %, while FGSM accuracy rose from "
            f"{100 * best['fgsm_accuracy']:.2f} % to {100 * metrics['fgsm_accuracy']:.2f} %; "
            f"best.pt holds epoch {best['epoch']}, a smaller --alpha or --lr may help")


# ------------------------------------------------------------------------------------------------- experiment


def parse(argv):
    parser = common.experiment_parser(__file__, __doc__)
    parser.default_out = lambda args: (
        f"runs/fast-{Path(args.data_dir).resolve().name}-wrn50-{args.width:g}-eps{255 * args.eps:g}"
        f"-beta{args.beta:g}-seed{args.seed}")
    add, phases = parser.add_argument, {"nargs": len(PHASES), "metavar": "N"}
    add("data_dir", metavar="DIR", help="folder with train/ and val/, each with a folder of images per class")
    add("--width", type=number(1 / 64), default=1.0, help="k: the bottlenecks' inner width, times 64")
    add("--epochs", type=integer(len(PHASES)), default=15, help="passes over the data; stretches the phases")
    add("--short-sides", type=integer(0), default=[phase.short_side for phase in PHASES], **phases,
        help="each phase's short side of an image before cropping, in pixels; 0: as it is")
    add("--crops", type=integer(), default=[phase.crop for phase in PHASES], **phases,
        help="each phase's crop, in pixels")
    add("--batch-sizes", type=integer(), default=[phase.batch_size for phase in PHASES], **phases,
        help="each phase's images a step")
    add("--lr", type=number(above=True), default=0.4, help="peak of the learning rate; all of it scales")
    add("--eps", type=number(0, 1), default=2 / 255, help="ℓ∞ radius of the attacks, in pixel range [0, 1]")
    add("--alpha", type=number(above=True), default=1.25,
        help="step of FGSM in units of ε; smaller, such as 1.0, helps against catastrophic overfitting")
    add("--beta", type=number(), default=1.0, help="λ of the paper; 1: plain Fast AT, others: App. D")
    add("--train-size", type=integer(), metavar="N", help="train on a random subset of N, drawn with --seed")
    add("--eval-size", type=integer(), default=5000, metavar="N", help="validation images to test each epoch")
    add("--test-size", type=integer(), metavar="N", help="validation images to test at the end; None: all")
    add("--restarts", type=integer(), metavar="N",
        help="restarts of the last test's PGD-50, the worst counts; tests a finished run again; None: 1")
    add("--workers", type=integer(0), default=os.cpu_count(),
        help="processes that read images, those of torchrun together; 0: none but this")
    add("--on-bad-image", choices=("fail", "skip"), default="fail", help="what to do at an unreadable image")
    return common.start(parser, argv)


def main(argv):
    args, device = parse(argv)
    sizes = zip(phase_ends(args.epochs), args.short_sides, args.crops, args.batch_sizes)
    phases = [Phase(*values) for values in sizes]
    train, val = Images(args, "train", device), Images(args, "val", device)
    if train.classes != val.classes:
        raise UserError(f"{args.data_dir}: train/ and val/ hold different classes; only one of them has "
                        f"{min({*train.classes} ^ {*val.classes})}/")
    if args.train_size:
        train.keep(args.train_size, args.seed)
    single_step = Attack(eps=args.eps, step_size=args.alpha * args.eps, steps=1)  # the training's: FGSM
    monitor = replace(MONITOR, eps=args.eps)
    report = replace(REPORT, eps=args.eps, restarts=args.restarts or 1)

    model = WideResNet50(args.width, len(train.classes))
    shape = phases[0].batch_size, 3, phases[0].crop, phases[0].crop
    example = torch.zeros(shape, dtype=torch.uint8, device=device)
    common.prepare(model, args, device, example)
    optimizer = common.sgd(model, args.lr, weight_decay=1e-4, decay_norms=False)  # each step sets the rate
    run = common.Run(args, model, optimizer, images=len(train))

    for epoch in run.epochs():
        phase = next(phase for phase in phases if epoch <= phase.end)
        if epoch - 1 in phase_ends(args.epochs):
            torch.compiler.reset()  # makes room: compiled code is for one shape, and few are kept
        model.train()  # for the attack, too: see above
        steps = common.steps_per_epoch(len(train), phase.batch_size)
        order = shuffled(len(train), steps * phase.batch_size, seed=(args.seed, epoch))
        for step, (x, y, _) in enumerate(train.batches(phase, order, seed=(args.seed, epoch)), 1):
            lr = args.lr * schedule((epoch - 1 + step / steps) / args.epochs, args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x_adv, lipschitz = fgsm(model, x, y, single_step)
            loss, parts = fast_at_loss(model, x, x_adv, y, args.beta)
            loss.backward()
            common.synchronize(model)  # of torchrun's processes
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.record(len(x), **parts, lipschitz=lipschitz.mean())
        metrics = validate(model, val, phase, args.eval_size, monitor, single_step)
        warning = catastrophic_overfitting(run.log, metrics)
        skipped = set().union(*common.collected(train.unreadable | val.unreadable))
        run.end_epoch(lr=lr, beta=args.beta, **metrics, warning=warning, skipped_images=len(skipped))
        if warning:
            say(warning)

    def test():
        order = shuffled(len(val), args.test_size)
        say(f"testing on {len(order):,} images with {report.title()}")
        metrics = validate(model, val, phases[-1], args.test_size, report, single_step)
        local_lipschitzness = common.local_lipschitzness(model, val.batches(phases[-1], order[:1000]), report)
        return {**metrics, "local_lipschitzness": local_lipschitzness, "precision": args.precision}

    run.finish(test, report if args.restarts else None)


if __name__ == "__main__":
    common.launch(main)

"""Fast adversarial training (Wong, Rice & Kolter 2020) of WideResNet-50-k on ImageNet: App. E and Table 5.

    python train_fast_imagenet.py DIR --width 1              # DIR: train/ and val/, each a folder per class
    python train_fast_imagenet.py DIR --width 2 --eps 4/255  # a larger ball; the same command again resumes
    python train_fast_imagenet.py DIR --width 1 --restarts 10   # tests the finished run again, 10 restarts

A trial on a CPU, with CIFAR-10 as a tree of folders:

    python train_fast_imagenet.py DIR --width 1/4 --short-sides 32 32 32 --crops 32 32 32 \\
        --batch-sizes 32 32 32 --lr 0.003 --epochs 5 --train-size 6000 --eval-size 200 --test-size 200

Loss: cross-entropy of x̂, one signed-gradient step (FGSM) of 1.25·ε from a uniform start in the ε-ball. That
is plain Fast AT, `--beta 1`, without a clean pass. Any other β is the generalized adversarial training of
App. D: natural risk + β·mean max(L(x̂) - L(x), 0).

In training the attack sees the network in train mode, as in Wong et al. In the first steps BatchNorm's
running averages lag far behind the weights, and gradients in eval mode explode. Validation is in eval mode.

Worker processes read the images, 310, 190 and 210 a CPU second in phases 1, 2 and 3 (ImageNet images whose
short side is 224, Intel Xeon).
"""
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common  # before PyTorch: it says how threads wait
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from common import (RANK, WORLD, Attack, UserError, cross_entropy_to, integer, number, perturb_start, project,
                    say)

try:
    from PIL import Image
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
    from torchvision.models.resnet import Bottleneck, ResNet
    from torchvision.transforms import v2
except (ImportError, RuntimeError) as error:  # "operator torchvision::nms does not exist"
    say(f"error: no torchvision that matches torch {torch.__version__} ({error}); README.md says what to "
        "install", sys.stderr)
    sys.exit(2)


@dataclass
class Phase:
    end: int          # its last epoch
    short_side: int   # pixels that images are scaled to before they are cropped; 0: as they are
    crop: int         # pixels
    batch_size: int


PHASES = (Phase(6, 160, 128, 512), Phase(12, 352, 224, 224), Phase(15, 0, 288, 128))


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


def read(path, side, least):
    """The image in a file as RGB, its short side `side` pixels (0: as it is), but `least` at the least."""
    try:
        with Image.open(path) as image:
            if side:  # of a JPEG, decode 1/2, 1/4 or 1/8 of the pixels where that will do
                image.draft("RGB", (max(side, least),) * 2)
            if image.mode[0] in "IF":  # conversion would clip it
                raise ValueError(f"its mode {image.mode} has no known range; make it 8 bits")
            image = image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
    except Exception as error:  # broken images fail in many ways
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return v2.functional.resize(image, [max(side or min(image.size), least)])


def batches(images, phase, order, args, device, seed=()):
    """(x [B, 3, crop, crop] in [0, 1], y [B]) on the device of each row of image numbers in `order`.

    In training, with the seed (--seed, epoch), a crop has 8-100 % of the area anywhere, at an aspect ratio of
    3/4 to 4/3, and is mirrored half the time. Else it is the middle, for which a smaller image is enlarged.
    """
    crop = v2.RandomResizedCrop(phase.crop) if seed else v2.CenterCrop(phase.crop)
    images.transform = v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if seed else 0), v2.PILToTensor()])
    images.loader = partial(read, side=phase.short_side, least=0 if seed else phase.crop)
    images.seed = seed
    loader = DataLoader(images, batch_sampler=[row.tolist() for row in order],
                        num_workers=-(-args.workers // WORLD), pin_memory=device.type == "cuda")
    try:
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            yield common.to_float(x.contiguous(memory_format=torch.channels_last)), y
    except UserError as error:  # a worker's comes at the end of its traceback
        raise UserError(str(error).splitlines()[-1].removeprefix("common.UserError: ")) from None
    except (RuntimeError, OSError) as error:
        known = isinstance(error, OSError) or re.search("shared memory|worker.*(killed|exited)", str(error))
        if not (args.workers and known):
            raise
        raise UserError(f"processes that read images ended: {str(error).splitlines()[-1]}; give them more "
                        "(shared) memory, or --workers 0, which needs none") from None


class Folders(ImageFolder):
    """Images in a folder for each class, but for hidden ones: .ipynb_checkpoints/, macOS's ._0.JPEG."""

    def __init__(self, root):
        self.seed, self.left_out = (), []
        super().__init__(root, is_valid_file=self.is_image)
        if n := len(self.left_out):
            common.warn(f"{root}: {len(self)} of {len(self) + n} files are read; "
                        f"{self.left_out[0]} has no name of an image")

    def is_image(self, path):
        name = os.path.basename(path).lower()
        image, hidden = name.endswith((*IMG_EXTENSIONS, ".jfif")), name.startswith(".")
        if not image and not hidden:
            self.left_out.append(path)
        return image and not hidden

    def __getitem__(self, i):
        """(crop, label). The crop follows from seed, epoch and i, whatever process makes it."""
        with torch.random.fork_rng([]):
            number, = np.random.SeedSequence((*self.seed, i)).generate_state(1)
            torch.default_generator.manual_seed(int(number))  # and no GPU's
            return super().__getitem__(i)

    def find_classes(self, directory):
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return classes, {name: i for i, name in enumerate(classes)}


def load(args):
    """(training images, validation images) of the same classes, `Folders`; or UserError.

    The former's hash stands for the names of all files, not for what they hold: that takes long to read.
    """
    root = Path(args.data_dir).expanduser()
    try:
        train, val = Folders(root / "train"), Folders(root / "val")
    except (OSError, ValueError) as error:  # a folder is missing, empty, a file or another user's
        raise UserError(f"{error}; DIR must hold train/ and val/, each a folder per class") from None
    if odd := {*train.classes} ^ {*val.classes}:
        notes = root / "val" / "val_annotations.txt"  # Tiny-ImageNet's, whose val/ has one folder for all
        sort = f"; sort val/ into a folder per class, as {notes} says" if notes.exists() else ""
        raise UserError(f"{root}: only one of train/ and val/ has {', '.join(sorted(odd)[:5])}{sort}")
    names = [path.removeprefix(str(root)) for path, _ in train.samples + val.samples]
    train.hash = common.hashed(os.fsencode("\n".join(names)))
    n, least = args.train_size or len(train), max(args.batch_sizes)
    if not least <= n <= len(train):
        raise UserError(f"{root} has {len(train)} training images; --train-size must be at most that, "
                        f"and at least a batch, here {least} (--batch-sizes)")
    train.samples = [train.samples[i] for i in sorted(shuffled(len(train), args.seed)[:n].tolist())]
    return train, val


def shuffled(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


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


def evaluation_attack(steps, eps, restarts=1):
    """PGD with Wong et al.'s step of 1/255, for ε = 2/255 and 4/255; in proportion above."""
    return Attack(eps=eps, step_size=min(max(1, eps / (4 / 255)) / 255, eps), steps=steps, restarts=restarts)


def top5_accuracy(model, stream):
    """Share of the images whose label is among the five largest logits."""
    right = []
    with common.attack_mode(model), common.exact_precision(model), torch.no_grad():
        for x, y in stream:
            logits = model.forward(x)  # never compiled: the last batch may be smaller
            right.append((logits.topk(min(5, logits.shape[1])).indices == y[:, None]).any(1))
    return torch.cat(right).double().mean().item()


# ------------------------------------------------------------------------------------------------- experiment


def main(argv):
    parser, each = common.experiment_parser(__file__, __doc__), {"nargs": len(PHASES), "metavar": "N"}
    add = parser.add_argument_group("data").add_argument
    add("data_dir", metavar="DIR", help="folder with train/ and val/, each with a folder of images per class")
    add("--train-size", type=integer(), metavar="N", help="train on N random images, drawn with --seed")
    add("--short-sides", type=integer(0), default=[phase.short_side for phase in PHASES], **each,
        help="each phase's short side of an image before cropping, in pixels; 0: as it is")
    add("--crops", type=integer(), default=[phase.crop for phase in PHASES], **each,
        help="each phase's crop, in pixels")
    add("--workers", type=integer(0), default=min(os.cpu_count(), 16),
        help="processes that read images, those of torchrun together; 0: none but this")
    add = parser.add_argument_group("network and optimization").add_argument
    add("--width", type=number(1 / 64), default=1.0, help="k: the bottlenecks' inner width, times 64")
    add("--epochs", type=integer(len(PHASES)), default=15, help="passes over the data; stretches the phases")
    add("--batch-sizes", type=integer(), default=[phase.batch_size for phase in PHASES], **each,
        help="each phase's images a step")
    add("--lr", type=number(above=True), default=0.4, help="peak of the learning rate; all of it scales")
    add = parser.add_argument_group("method").add_argument
    add("--beta", type=number(), default=1.0, help="λ of the paper; 1: plain Fast AT, others: App. D")
    add("--eps", type=number(0, 1), default=2 / 255, help="ℓ∞ radius of the attacks, pixels in [0, 1]")
    add("--alpha", type=number(above=True), default=1.25,
        help="step of FGSM in units of ε; smaller, such as 1.0, helps against catastrophic overfitting")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-size", type=integer(), default=5000, metavar="N", help="validation images to test each epoch")
    add("--test-size", type=integer(), metavar="N", help="validation images in metrics.json; by default all")
    add("--restarts", type=integer(), metavar="N",
        help="restarts of the last test's PGD-50, the worst counts; tests a finished run again; by default 1")
    parser.set_defaults(may_change=["workers", "restarts"])  # and the run is the same
    args, device = common.start(parser, argv)
    args.name = (f"fast-{Path(args.data_dir).resolve().name}-wrn50-{args.width:g}-eps{255 * args.eps:g}"
                 f"-beta{args.beta:g}-seed{args.seed}")
    train, val = load(args)
    sizes = zip(phase_ends(args.epochs), args.short_sides, args.crops, args.batch_sizes)
    phases = [Phase(*values) for values in sizes]
    model = WideResNet50(args.width, len(train.classes)).to(device, memory_format=torch.channels_last)
    optimizer = common.sgd(model, args.lr, weight_decay=1e-4, decay_norms=False)  # each step sets the rate
    single_step = Attack(eps=args.eps, step_size=args.alpha * args.eps, steps=1)  # FGSM
    monitor, report = evaluation_attack(10, args.eps), evaluation_attack(50, args.eps, args.restarts or 1)
    run = common.Run(args, train, model=model, optimizer=optimizer)
    example = torch.zeros(phases[0].batch_size, 3, phases[0].crop, phases[0].crop, dtype=torch.uint8)
    common.set_execution(args, example.to(device), model)

    def validation(phase, n):  # in batches as in training: compiled code is there already
        order = shuffled(len(val))[:n].split(phase.batch_size // WORLD)
        return batches(val, phase, order, args, device)

    for epoch in run.epochs():
        phase = next(phase for phase in phases if epoch <= phase.end)
        if epoch - 1 in phase_ends(args.epochs):
            torch.compiler.reset()  # makes room: compiled code is for one shape, and few are kept
        steps = len(train) // phase.batch_size
        order = common.shared_order(len(train), "cpu")[:steps * phase.batch_size].view(steps, -1)
        stream = batches(train, phase, order[:, RANK::WORLD], args, device, (args.seed, epoch))
        model.train()  # for the attack, too: see above
        for step, (x, y) in enumerate(stream, 1):
            lr = args.lr * schedule((epoch - 1 + step / steps) / args.epochs, args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x_adv, lipschitz = fgsm(model, x, y, single_step)
            loss, parts = fast_at_loss(model, x, x_adv, y, args.beta)
            optimizer.zero_grad()
            loss.backward()
            common.synchronize(model)  # averages over torchrun's processes
            optimizer.step()
            run.record(len(x), **parts, lipschitz=lipschitz.mean())
        metrics = common.evaluate(model, validation(phase, args.eval_size), monitor)
        best = max((line["robust_accuracy"] for line in run.log), default=0)
        run.end_epoch(lr=lr, beta=args.beta, **metrics)
        now, chance = metrics["robust_accuracy"], 1 / len(train.classes)
        if now < best / 2 and best > 1.5 * chance:
            common.warn(f"robust accuracy fell from {100 * best:.2f} to {100 * now:.2f} % in epoch {epoch}: "
                        "catastrophic overfitting (Wong et al. 2020)? A smaller --alpha or --lr may help")

    def test():
        say(f"testing with {report.title()}")
        metrics = common.evaluate(model, validation(phases[-1], args.test_size), report)
        top5 = top5_accuracy(model, validation(phases[-1], args.test_size))
        few = validation(phases[-1], min(1000, args.test_size or 1000))
        lipschitz = common.local_lipschitzness(model, few, report) if report.eps else None
        return {**metrics, "natural_top5_accuracy": top5, "local_lipschitzness": lipschitz,
                "precision": args.precision}

    torch.compiler.reset()  # room again: attacks in float32 come
    run.finish(test, report if args.restarts else None)


if __name__ == "__main__":
    common.launch(main)

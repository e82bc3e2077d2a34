"""Time our training loops beside public releases, in turns; run by hand, one network per call.

    python tests/benchmark.py --rival ../TRADES         # TRADES, WideResNet-34-10, as `auto` executes it
    python tests/benchmark.py --rival ../TRADES --depth 10 --width 1 --executions auto fp32 bf16 fp32-compiled
    python tests/benchmark.py --rival ../A-temp-project --method at
    python tests/benchmark.py --method fast --width 2 --crop 224 --batch-size 224

Rivals are checkouts from GitHub: yaodongyu/TRADES or, for TRADES and AT, the paper's own code,
tabrisweapon/A-temp-project. AWP and Fast AT are timed alone.

Ours is the training script's main, unchanged, with a `Recorder` in the place of the run folder: it makes
batches of random images and trains on them as in a run, but evaluates and writes nothing. (Fast AT has
one random batch on the device: reading is not timed.) A rival is its release's loss function in float32, on
one batch that lies on the device, and on the release's WideResNet or our DenseNet. It has the settings that
PyTorch begins with: on CUDA TF32 and no search for the fastest convolutions.

Each participant is a process. A round is a turn of each, forwards and backwards alternately; a turn is
--block steps between two waits for the device. s/step is the median of the rounds. "A / this" says how many
times as long A took as this row in the same round: median (lowest-highest). "of best" is arithmetic per
second, as a share of that of a large matrix product in the row's precision: the convolutions and matrix
products of a forward pass, counted, times PASSES. GB: a process's peak CUDA memory.
"""
import importlib
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from common import UserError  # noqa: E402

# What a step costs with K attack steps, in forward passes; a backward pass counts 1 to the input, else 2.
PASSES = {"trades": lambda k: 1 + 2 * k + 6,    # clean probabilities, attack, an update with x and x̂
          "at": lambda k: 2 * k + 6,
          "awp": lambda k: 1 + 2 * k + 6 + 6,   # the weights' perturbation costs as much as an update
          "fast": lambda k: 2 + 3}              # FGSM, an update with x̂ alone
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SIZE = 32  # pixels: CIFAR's


def clock(device):
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device, precision):
    """FLOP/s of a large matrix product, the best of ten."""
    size, times = 8192 if device.type == "cuda" else 2048, []
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, DTYPES[precision]))
    for _ in range(10):
        begin = clock(device)
        a @ b
        times.append(clock(device) - begin)
    torch.cuda.empty_cache()  # leaves the memory to the others
    return 2 * size ** 3 / min(times)


def name_of(device):
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else None
    return found[1] if found else platform.machine()


# ---------------------------------------------------------------------------- in the process of a participant


class Turns:
    """Counts a participant's steps; after a block of them it answers, and waits until it is asked again."""

    def __init__(self, pipe, device, block):
        self.pipe, self.device, self.block, self.cuda = pipe, device, block, device.type == "cuda"
        self.lead = 1 if self.cuda else 0  # steps before the clock starts: they take back the memory

    def ready(self, **facts):
        self.pipe.send(facts)
        self.wait()

    def wait(self):
        torch.cuda.empty_cache()  # leaves the memory to the others
        self.pipe.recv()  # raises EOFError when the benchmark is over
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.steps, self.began = 0, clock(self.device)

    def step(self):
        self.steps += 1
        if self.steps == self.lead:
            self.began = clock(self.device)
        if self.steps == self.lead + self.block:
            seconds = (clock(self.device) - self.began) / self.block
            self.pipe.send((seconds, torch.cuda.max_memory_allocated() if self.cuda else 0))
            self.wait()


class Recorder:
    """Takes the place of common.Run: epochs without end, of which each step counts."""

    def __init__(self, turns, args, data, /, model, **parts):
        self.turns, self.args, self.model = turns, args, model
        self.size = args.crops[0] if hasattr(args, "crops") else data.x_train.shape[2]

    def epochs(self):
        with FlopCounterMode(display=False) as counter, common.attack_mode(self.model), torch.no_grad():
            image = torch.zeros(1, 3, self.size, self.size, device=self.turns.device)
            self.model.forward(image)  # never compiled
        self.turns.ready(precision=self.args.precision, flops=counter.get_total_flops())
        while True:
            yield self.args.epochs - 1  # AWP acts, and nothing is evaluated

    def record(self, images, **scalars):
        self.turns.step()

    def end_epoch(self, **values):
        pass

    def finish(self, test, attack=None):
        pass


def random_images():
    """Takes the place of common.synthetic, whose images are smaller."""
    x = np.random.default_rng(0).integers(0, 256, (1280, SIZE, SIZE, 3), np.uint8)
    return [x, np.arange(len(x)) % 10] * 2


class RandomImages:
    """Takes the place of Fast AT's folder of images."""

    classes, hash = range(1000), ""

    def __len__(self):
        return 10 ** 6


def one_batch(images, phase, order, args, device, seed=()):
    """Takes the place of Fast AT's batches: the same random one again and again, on the device."""
    n, size = phase.batch_size, phase.crop
    crops = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, device=device)
    y = torch.arange(n, device=device) % len(images.classes)
    while True:
        yield common.to_float(crops.permute(0, 3, 1, 2)), y


def ours(turns, method, argv):
    """Take part with a training script's own main."""
    script = importlib.import_module("train_fast_imagenet" if method == "fast" else f"train_{method}")
    common.Run, common.synthetic = partial(Recorder, turns), random_images
    if method == "fast":
        script.load, script.batches = lambda args: (RandomImages(), RandomImages()), one_batch
    script.main(argv)


def rival(turns, args):
    """Take part with the training step of the release at args.rival."""
    device, path, n = turns.device, args.rival, args.batch_size
    if device.type == "cpu":  # the releases call .cuda() throughout
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    sys.path.insert(0, str(path))
    if args.arch == "wrn":
        network_class = importlib.import_module("models.wideresnet").WideResNet
        model = network_class(depth=args.depth, num_classes=10, widen_factor=args.width).to(device)
    else:
        model = common.NETWORKS[args.arch](args.depth, args.width, 10).to(device)
    x, y = torch.rand(n, 3, SIZE, SIZE, device=device), torch.arange(n, device=device) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=2e-4)
    is_paper = (path / "attacks").is_dir()
    module, function = ("pgd", "madry_loss") if args.method == "at" else ("trades", "trades_loss")
    loss_of = getattr(importlib.import_module(f"attacks.{module}" if is_paper else module), function)
    turns.ready()
    while True:
        optimizer.zero_grad()
        loss = loss_of(model=model, x_natural=x, y=y, optimizer=optimizer, perturb_steps=args.steps)
        (loss[0] if is_paper else loss).backward()
        optimizer.step()
        turns.step()


def take_part(pipe, device, block, participant, arguments):
    """What a process runs. What the participant prints is dropped; an error is one line."""
    def main(argv):
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device.index or 0)
            participant(Turns(pipe, device, block), *arguments)
        except (EOFError, ConnectionError):  # the benchmark is over
            pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, and that ends this
    warnings.simplefilter("ignore")  # the releases call what PyTorch has since deprecated
    sys.stdout = open(os.devnull, "w")
    common.launch(main)


# ------------------------------------------------------------------------------------------------ measurement


class Side:
    """A participant: its process, and what that answers."""

    def __init__(self, name, args, device, participant, *arguments):
        self.name, self.seconds, self.peaks = name, [], []  # per step, in each round; bytes
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, theirs = context.Pipe()
        everything = theirs, device, args.block, participant, arguments
        self.process = context.Process(target=take_part, args=everything, daemon=True)
        self.process.start()
        theirs.close()
        self.facts = self.answer()  # before another one starts: `auto` measures meanwhile

    def answer(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
        if self.process.exitcode == 2:  # it has said why
            sys.exit(2)
        raise UserError(f"{self.name}: its process ended with status {self.process.exitcode}")

    def turn(self, counts):
        self.pipe.send("go")
        seconds, peak = self.answer()
        if counts:
            self.seconds.append(seconds)
            self.peaks.append(peak)

    def row(self, others, batch_size, passes, rates):
        """Cells of the table, the ratio to each of `others` among them; passes: forward passes in a step."""
        seconds, peak, share = median(self.seconds), max(self.peaks), ""
        if self.facts:  # ours
            rate = self.facts["flops"] * batch_size * passes / seconds
            share = f"{100 * rate / rates[self.facts['precision']]:.1f} %"
        yield from (self.name, f"{seconds:.4g}", f"{batch_size / seconds:.4g}", share)
        yield f"{peak / 1e9:.2f}" if peak else ""
        for other in others:
            ratios = [theirs / own for theirs, own in zip(other.seconds, self.seconds)]
            yield f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if other is not self else "1"


def show_table(table):
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))


def parse(argv):
    parser = common.Parser(__doc__)
    add, integer = parser.add_argument, common.integer
    hows = [a + b for a in ("auto", "fp32", "bf16") for b in ("", "-compiled", "-eager")]
    add("--method", choices=PASSES, default="trades", help="whose training script")
    add("--arch", choices=common.NETWORKS, default="wrn", help="Fast AT: a WideResNet-50, whatever this says")
    add("--depth", type=integer(), default=34, help="layers, 6n + 4; Fast AT: 50")
    add("--width", type=integer(), help="widening factor or growth rate (None: 10), or Fast AT's k (None: 1)")
    add("--executions", nargs="+", choices=hows, metavar="E", default=["auto"],
        help="auto, fp32, bf16; followed by -compiled, -eager or, for the script's own choice, nothing")
    add("--batch-size", type=integer(), default=128, help="images a step")
    add("--crop", type=integer(), default=128, help="Fast AT's images, in pixels")
    add("--steps", type=integer(), default=10, help="attack steps; Fast AT: 1")
    add("--block", type=integer(), metavar="N", help="steps between two waits; None: 1 on a CPU, 10 on CUDA")
    add("--warmup", type=integer(2), default=3, help="rounds before, not timed")
    add("--rounds", type=integer(), default=7, help="rounds that count")
    add("--rival", type=Path, metavar="DIR", help="a checkout of a public release")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    device = common.pick_device(args.device)
    args.block = args.block or (10 if device.type == "cuda" else 1)
    args.width = args.width or (1 if args.method == "fast" else 10)
    files = {"trades": ["trades.py", "attacks/trades.py"], "at": ["attacks/pgd.py"]}
    if args.rival and not any((args.rival / file).exists() for file in files.get(args.method, [])):
        raise UserError(f"--rival {args.rival} holds no training step for --method {args.method}")
    return args, device


def script_arguments(args, device, execution):
    """The training script's argv, for which no file is read."""
    precision, _, how = execution.partition("-")
    argv = ["--width", args.width, "--device", device, "--precision", precision, "--out", os.devnull,
            "--compile", {"": "auto", "compiled": "on", "eager": "off"}[how]]
    if args.method == "fast":
        argv += [os.devnull, "--crops", *[args.crop] * 3, "--batch-sizes", *[args.batch_size] * 3]
    else:
        argv += ["--dataset", "synthetic", "--data-dir", os.devnull, "--arch", args.arch,
                 "--depth", args.depth, "--batch-size", args.batch_size, "--steps", args.steps,
                 "--eval-every", 10 ** 6]
    return [str(item) for item in argv]


def main(argv):
    args, device = parse(argv)
    network = f"wrn-50-{args.width}" if args.method == "fast" else f"{args.arch}-{args.depth}-{args.width}"
    print(f"{name_of(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    beside = f" beside {args.rival.resolve().name}" if args.rival else ""
    print(f"{args.method}, {network}, batch {args.batch_size}{beside}")
    sides = []
    for execution in args.executions:
        side = Side(execution, args, device, ours, args.method, script_arguments(args, device, execution))
        side.name = execution.replace("auto", f"auto={side.facts['precision']}")
        sides.append(side)
    rates = {name: matrix_rate(device, name) for name in {side.facts["precision"] for side in sides}}
    print("matrix products, TFLOP/s:", ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items()))
    if args.rival:
        sides.append(Side("rival", args, device, rival, args))
    for number in range(args.warmup + args.rounds):
        common.show(f"round {number + 1} of {args.warmup + args.rounds}; {args.warmup} to warm up")
        for side in reversed(sides) if number % 2 else sides:
            side.turn(number >= args.warmup)
    others = [sides[0], sides[-1]] if args.rival else sides[:1] if len(sides) > 1 else []
    heads = ["", "s/step", "images/s", "of best", "GB", *(f"{other.name} / this" for other in others)]
    cost = args.batch_size, PASSES[args.method](args.steps)
    common.show("")
    show_table([heads, *(list(side.row(others, *cost, rates)) for side in sides)])


if __name__ == "__main__":
    common.launch(main)

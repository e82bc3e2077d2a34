"""Time the training step of each method, alone or against a public release; run by hand.

    python tests/benchmark.py                                              # TRADES, WRN-34-10, as `auto` executes it
    python tests/benchmark.py --networks wrn-34-1 densenet-40-12 --methods trades at awp --executions auto fp32-off
    python tests/benchmark.py --rival ../TRADES                            # a checkout of yaodongyu/TRADES beside ours
    python tests/benchmark.py --methods awp --rival ../AWP                 # ... of csdongxian/AWP
    python tests/benchmark.py --methods trades at --rival ../A-temp-project  # ... of the paper's code, tabrisweapon

Ours is the loop of the training script itself, fed through a stopwatch in place of its run folder. A rival's step is its
own code, loaded from the checkout, in float32 (with TF32 convolutions on a GPU, PyTorch's default); after each step of
ours comes one of the rival's, on the same network, batch and number of attack steps, and the ratio is the median over
these pairs. `passes` counts arithmetic in units of one forward pass; the share of peak is that arithmetic over the
measured rate of a large bfloat16 matrix product on the same device. "stream+log" is the share of an epoch that making
batches, noting losses, logging and writing checkpoints takes; "monitor" the seconds of an evaluation of 1,000 images.
Batches are random pixels: speed does not depend on them.
"""
import argparse
import ast
import contextlib
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device):
    wait(device)
    return time.perf_counter()


def matrix_peak(device, size, repeats=10):
    """FLOP/s of a size³ bfloat16 matrix product, the best of several."""
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    times = []
    for _ in range(repeats):
        begin = clock(device)
        a @ b
        times.append(clock(device) - begin)
    return 2 * size ** 3 / min(times)


class Arithmetic(TorchDispatchMode):
    """Adds up the FLOPs of the convolutions and matrix products run inside, forward and backward."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def as_released(device):
    """PyTorch's own settings for convolutions, TF32 among them, which the releases leave as they are."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True)


class Memory:
    """The peak of a party's own CUDA memory in GB: what the other party holds meanwhile does not count."""

    def __init__(self, device, models, optimizer):
        self.device, self.models, self.optimizer = device, models, optimizer

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            tensors = [t for model in self.models for p in model.parameters() for t in (p, p.grad)]
            tensors += [buffer for model in self.models for buffer in model.buffers()]
            tensors += [t for state in self.optimizer.state.values() for t in state.values()]
            self.held = sum(t.nbytes for t in tensors if torch.is_tensor(t))

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.peak = (self.held + torch.cuda.max_memory_allocated(self.device) - self.before) / 1e9


class Stopwatch(common.Run):
    """Takes the place of a run folder: times `repeats` steps of the script's own loop, and a rival's between them."""

    repeats, warmup, rival = 7, 3, None

    def __init__(self, args, model, optimizer):
        self.args, self.model, self.optimizer, self.device = args, model, optimizer, next(model.parameters()).device
        type(self).last = self
        self.steps, self.streams, self.records, self.rivals = [], [], [], []
        parts = [model] * (2 if args.method == "awp" else 1)  # its perturbation counts as another model
        self.memory = Memory(self.device, parts, optimizer)
        self.recorded, self.settings, self.folder, self.epoch, self.log = (), vars(args), Path(args.data_dir), 0, []
        self.began = time.perf_counter()

    def epochs(self):
        return [self.args.epochs]  # the last one: AWP's warm-up is over

    def watch(self, stream, size):
        self.history, stream = [], iter(stream)
        compiled, self.model._compiled_call_impl = self.model._compiled_call_impl, None
        x, y = next(stream)
        with Arithmetic() as forward, torch.no_grad():
            self.model(x)
        with Arithmetic() as whole:  # one step, not compiled, to count its arithmetic
            yield x, y
        self.model._compiled_call_impl = compiled
        self.flops, self.passes = whole.flops, whole.flops / forward.flops
        for step in range(self.warmup + self.repeats):
            with self.memory:
                begin = clock(self.device)
                x, y = next(stream)
                ready = clock(self.device)
                yield x, y
                end = clock(self.device)
            if step >= self.warmup:
                self.streams.append(ready - begin)
                self.steps.append(end - begin)
            if self.rival:
                with self.rival.memory, as_released(self.device):
                    begin = clock(self.device)
                    self.rival.step(x.contiguous(), y)
                    end = clock(self.device)
                if step >= self.warmup:
                    self.rivals.append(end - begin)

    def record(self, *means):
        begin = time.perf_counter()  # no waiting for the device: on a GPU this is the host's share
        super().record(*means)
        self.records.append(time.perf_counter() - begin)

    def end_epoch(self, lr, data):
        """The monitor is timed the second time: compiled code is made in the first."""
        for _ in range(2):
            begin = clock(self.device)
            metrics = common.evaluate(self.model, data.x_test[:1000], data.y_test[:1000], eps=self.args.eps,
                                      batch_size=self.args.batch_size, **common.MONITOR_ATTACK)
            self.monitor = (clock(self.device) - begin) * 1000 / metrics["n"]
        begin = clock(self.device)
        self.images, self.train_seconds = self.args.batch_size * self.repeats, sum(self.steps)
        self.means = torch.stack(self.history).mean(0).tolist()
        self.save_epoch(lr, metrics)
        self.save = clock(self.device) - begin

    def finish(self, data):
        pass


class Rival:
    """A public release's training step on one of its networks, or on our DenseNet where it has none."""

    def __init__(self, path, method, network, classes, device, attack_steps, eps, step_size, beta):
        if device.type == "cpu":  # the releases call .cuda() throughout
            torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
        folder = path / "trades_AWP" if (path / "trades_AWP").is_dir() else path
        is_paper = (path / "attacks").is_dir()
        if method not in (("awp",) if folder != path else ("trades", "at") if is_paper else ("trades",)):
            raise common.UserError(f"--rival {path} has no training step for --methods {method}")
        sys.path.insert(0, str(folder))
        arch, depth, width = network

        def build():
            if arch == "densenet":
                return common.build_model(arch, depth, width, classes).to(device)
            network_class = importlib.import_module("models.wideresnet").WideResNet
            return network_class(depth=depth, num_classes=classes, widen_factor=width).to(device)
        self.model = build()
        models = [self.model]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.001, momentum=0.9, weight_decay=2e-4)
        if folder == path:
            name, function = ("attacks.pgd", "madry_loss") if method == "at" else ("trades", "trades_loss")
            loss_of = getattr(importlib.import_module("attacks.trades" if is_paper and method == "trades" else name), function)

            def step(x, y):
                self.optimizer.zero_grad()
                loss = loss_of(model=self.model, x_natural=x, y=y, optimizer=self.optimizer, step_size=step_size,
                               epsilon=eps, perturb_steps=attack_steps, beta=beta)
                (loss[0] if is_paper else loss).backward()
                self.optimizer.step()
            self.step = step
        else:
            models.append(build())
            self.step = self._awp_step(folder, models[1], device, attack_steps, eps, step_size, beta)
        sys.path.remove(str(folder))
        self.memory = Memory(device, models, self.optimizer)

    def _awp_step(self, folder, proxy, device, attack_steps, eps, step_size, beta):
        """AWP's script trains when imported, so its functions are taken out of it and run as they are."""
        adversary = importlib.import_module("utils_awp").TradesAWP(
            model=self.model, proxy=proxy, proxy_optim=torch.optim.SGD(proxy.parameters(), lr=0.1), gamma=0.005)
        source = ast.parse((folder / "train_trades_cifar.py").read_text())
        source.body = [node for node in source.body if isinstance(node, ast.FunctionDef)]

        class Quiet:  # its progress bar and meters
            avg = val = elapsed_td = eta_td = 0

            def __init__(self, *args, **kwargs):
                pass

            def update(self, *args):
                pass
            next = finish = update
        names = {"torch": torch, "F": F, "optim": torch.optim, "Variable": torch.autograd.Variable, "time": time,
                 "device": device, "epsilon": eps, "step_size": step_size, "Bar": Quiet, "AverageMeter": Quiet,
                 "args": types.SimpleNamespace(num_steps=attack_steps, norm="l_inf", awp_warmup=0, beta=beta),
                 "accuracy": lambda *args, **kwargs: (torch.zeros(1), torch.zeros(1))}
        exec(compile(source, "train_trades_cifar.py", "exec"), names)
        return lambda x, y: names["train"](self.model, [(x, y)], self.optimizer, 1, adversary)


def measure(method, network, execution, args, device, peak):
    arch, depth, width = network
    precision, _, compiled = execution.partition("-")
    script = importlib.import_module(f"train_{method}")
    defaults = common.training_parser("", method)
    eps, step_size, beta = (defaults.get_default(name) for name in ("eps", "step_size", "beta"))
    Stopwatch.repeats, Stopwatch.warmup, Stopwatch.rival, Stopwatch.last = args.repeats, args.warmup, None, None
    gc.collect()  # the last measurement's networks
    if args.rival:
        Stopwatch.rival = Rival(args.rival, method, network, 10, device, args.steps, eps, step_size, beta)
    argv = ["--dataset", "noise", "--data-dir", args.folder, "--arch", arch, "--depth", depth, "--width", width,
            "--batch-size", args.batch_size, "--steps", args.steps, "--device", device, "--precision", precision,
            "--compile", compiled or "auto"]
    script.main([str(item) for item in argv])
    watch = Stopwatch.last
    median = statistics.median(watch.steps)
    result = {"method": method, "network": "-".join(map(str, network)), "execution": execution,
              "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
              f"cpu, {torch.get_num_threads()} threads", "torch": torch.__version__, "batch_size": args.batch_size,
              "seconds_per_step": median, "images_per_second": args.batch_size / median,
              "spread": [min(watch.steps), max(watch.steps)],
              "stream_and_log_share": (statistics.median(watch.streams) + statistics.median(watch.records)
                                       + watch.save * args.batch_size / 50000) / median,
              "minutes_per_50000_images": 50000 / args.batch_size * median / 60, "monitor_seconds": watch.monitor,
              "passes": round(watch.passes, 2), "share_of_peak": watch.flops / median / peak}
    if device.type == "cuda":
        result["peak_memory_gb"] = watch.memory.peak
    if watch.rival:
        result["rival"] = args.rival.name
        result["rival_seconds_per_step"] = statistics.median(watch.rivals)
        result["ratio"] = statistics.median(rival / ours for rival, ours in zip(watch.rivals, watch.steps))
        if device.type == "cuda":
            result["rival_peak_memory_gb"] = watch.rival.memory.peak
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=("trades", "at", "awp"), default=["trades"])
    parser.add_argument("--networks", nargs="+", default=["wrn-34-10"], metavar="ARCH-DEPTH-WIDTH")
    parser.add_argument("--executions", nargs="+", default=["auto"], metavar="PRECISION[-COMPILE]",
                        help="such as auto, bf16-on, bf16-off, fp32-off")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="attack steps")
    parser.add_argument("--repeats", type=int, default=7, help="steps timed, of which the median counts")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, not timed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rival", type=Path, help="a checkout of a public release: TRADES or AWP")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    peak = matrix_peak(device, 8192 if device.type == "cuda" else 2048)
    print(f"bfloat16 matrix peak measured: {peak / 1e12:.3g} TFLOP/s")
    common.Run = Stopwatch
    results = []
    with tempfile.TemporaryDirectory() as args.folder:
        n = args.batch_size * (1 + args.warmup + args.repeats)
        images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        np.savez(Path(args.folder) / "noise.npz", x_train=images, y_train=np.arange(n) % 10,
                 x_test=images[:1000], y_test=np.arange(min(n, 1000)) % 10)
        for method in args.methods:
            for network in args.networks:
                arch, depth, width = network.split("-")
                for execution in args.executions:
                    results.append(measure(method, (arch, int(depth), int(width)), execution, args, device, peak))
                    if args.json:
                        args.json.write_text(json.dumps(results, indent=1))
    rows = [["method", "network", "execution", "s/step", "images/s", "stream+log", "min/epoch", "monitor s", "passes",
             "of peak", "GB", "rival s/step", "rival GB", "ratio"]]
    for r in results:
        rows.append([r["method"], r["network"], r["execution"], f"{r['seconds_per_step']:.4f}",
                     f"{r['images_per_second']:.0f}", f"{100 * r['stream_and_log_share']:.1f} %",
                     f"{r['minutes_per_50000_images']:.2f}", f"{r['monitor_seconds']:.1f}", str(r["passes"]),
                     f"{100 * r['share_of_peak']:.0f} %",
                     *(f"{r[key]:.{digits}f}" if key in r else "" for key, digits in (
                         ("peak_memory_gb", 1), ("rival_seconds_per_step", 4), ("rival_peak_memory_gb", 1), ("ratio", 2)))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


if __name__ == "__main__":
    common.launch(lambda argv: main())

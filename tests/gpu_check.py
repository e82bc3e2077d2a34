"""Does this GPU compute what it should, and how fast? By hand, about ten minutes; a line for each check.

    python tests/gpu_check.py                     # on a GPU; prints a table to paste into a report
    python tests/gpu_check.py --dry               # all of it tiny, on a CPU: tries out this file alone

A check's docstring says what must hold. The exit status is 0 if all have passed.
"""
import contextlib
import copy
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common  # noqa: E402  (before PyTorch: it says how threads wait)
import benchmark  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from common import Attack, UserError, clean_probabilities, cross_entropy_to, kl_to, pgd  # noqa: E402
from train_trades import trades_loss  # noqa: E402

EXECUTIONS = {f"{precision} {name}": Namespace(precision=precision, compile=compile)  # "bf16 compiled", ...
              for precision in ("fp32", "bf16") for name, compile in (("eager", "off"), ("compiled", "on"))}
FEW = ("--quick --train-size 64 --epochs 8 --steps 1 --step-size 0.031 --eval-every 99 --eval-size 8 "
       "--test-size 8 --precision fp32 --compile off").split()  # 8 epochs of 2 steps, evaluated at the end


class Here(Namespace):
    """`device`, `folder` of runs and logs, `dry` (all tiny), `until` (as time.time() tells it)."""

    def start(self, name, script, *argv):
        """A script of the repository as a process. What it prints goes to NAME.log."""
        command = [sys.executable, str(ROOT / script), *map(str, argv), "--device", str(self.device)]
        with open(self.folder / f"{name}.log", "a") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log,
                                    env={**os.environ, "TORCH_LOGS": "recompiles,graph_breaks"})

    def end(self, name, process):
        """The lines that the process printed. It must end well, and have compiled all it wanted to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(self.until - time.time(), 1))
        process.kill()  # does nothing if it has ended
        lines = (self.folder / f"{name}.log").read_text().strip().splitlines()
        assert process.wait() == 0, f"{name} ended with status {process.returncode}: {lines[-1:]}"
        assert not (bad := [line for line in lines if "Graph break" in line or "_limit" in line]), bad
        return lines

    def executed(self, model, how):
        """A copy of the network on the device, executed as a script would."""
        model = copy.deepcopy(model).to(self.device, memory_format=torch.channels_last)
        common.set_execution(copy.copy(EXECUTIONS[how]), torch.zeros(1, device=self.device), model)
        return model

    def problem(self, arch="wrn", depth=10, width=1):
        """A network with seasoned BatchNorm statistics; images, images near by, labels. On the CPU."""
        torch.manual_seed(0)
        n, size = (4, 8) if self.dry else (64, 32)
        model, x = common.NETWORKS[arch](depth, width, 10).train(), torch.rand(n, 3, size, size)
        model(torch.rand(n, 3, size, size))
        return model, x, (x + 0.03 * torch.randn_like(x).sign()).clamp(0, 1), torch.randint(0, 10, (n,))


def scripts(here):
    """--quick of every script, Fast AT on a folder of images, theory_check.py run to their end, and learn."""
    tiny = [*FEW, "--epochs", 2] if here.dry else []
    theory = here.start("theory", "theory_check.py", *(["--widths", 8, 16, "--seeds", 2] if here.dry else []))
    runs = {name: here.start(name, f"train_{name}.py", "--quick", "--compile", "auto", *tiny,
                             "--out", here.folder / name) for name in ("trades", "at", "awp")}
    x, y, x_val, y_val = common.synthetic(240, 120)
    for split, images, labels in ("train", x, y), ("val", x_val, y_val):
        for i, label in enumerate(labels):
            (folder := here.folder / "images" / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(folder / f"{i}.png")
    sizes = "--crops 32 32 32 --batch-sizes 16 16 16 --epochs 3 --eval-size 16 --test-size 16 --workers 0 "
    sizes += "--width 1/16 --precision fp32 --train-size 16" if here.dry else "--width 1"
    argv = [here.folder / "images", "--out", here.folder / "fast", *sizes.split()]
    runs["fast"] = here.start("fast", "train_fast_imagenet.py", *argv)
    found = [here.end("theory", theory)[-1]]
    for name, process in runs.items():  # side by side: they wait for the compiler
        here.end(name, process)
        metrics = common.read_json(here.folder / name / "metrics.json")["last"]
        found += [f"{name} {common.describe(metrics)}"]
        assert here.dry or name == "fast" or metrics["robust_accuracy"] > 0.25, found[-1]
    return "; ".join(found)


def gradients(here):
    """Gradients and BatchNorm's statistics of every execution are those of float64 on the CPU."""
    found = []
    for arch, *size in [("wrn", 10, 1)] if here.dry else [("wrn", 10, 2), ("densenet", 22, 12)]:
        network, x, near, y = here.problem(arch, *size)
        exact = gradients_of(copy.deepcopy(network).double(), x.double(), near.double(), y)
        for how in EXECUTIONS:
            own = gradients_of(here.executed(network, how), *(part.to(here.device) for part in (x, near, y)))
            errors = [((a - b).norm(dim=1) / b.norm(dim=1)).median().item() for a, b in zip(own, exact)]
            signs = (own[0].sign() == exact[0].sign()).double().mean().item()
            found.append(f"{arch} {how}: {errors[0]:.0e}, of weights {errors[1]:.0e}, statistics "
                         f"{errors[2]:.0e}, {100 * signs:.2f} % of signs agree")
            *limits, least = (2e-5, 2e-2, 1e-5, 0.999) if "fp32" in how else (0.3, 0.4, 0.02, 0.9)
            assert signs > least and all(e < limit for e, limit in zip(errors, limits)), f"far: {found[-1]}"
    return "; ".join(found)


def gradients_of(model, x, near, y):
    """An attack's gradient [N, pixels], that of all weights [1, ...], BatchNorm's statistics after it."""
    with common.attack_mode(model), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        to_images, = torch.autograd.grad(cross_entropy_to(y)(model(leaf)), leaf)
    to_weights = torch.autograd.grad(trades_loss(model, x, near, y, 6.0)[0], list(model.parameters()))
    flat = [torch.cat([part.reshape(1, -1) for part in parts], 1) for parts in (to_weights, model.buffers())]
    return [part.detach().cpu().double() for part in (to_images.flatten(1), *flat)]


def attacks(here):
    """x̂ stays in the ball and in [0, 1], and every execution reaches the KL of fp32 eager, but for 3 %."""
    (network, x, *_), kl = here.problem(), {}
    x, attack = x.to(here.device), Attack("kl", step_size=0.007, steps=10, start="gaussian")
    for how in EXECUTIONS:
        model = here.executed(network, how)
        torch.manual_seed(0)
        x_adv, _ = pgd(model, x, kl_to(clean_probabilities(model, x)), attack)
        away, outside = (x_adv - x).abs().max().item(), (x_adv - x_adv.clamp(0, 1)).any().item()
        assert away < attack.eps + 1e-6 and not outside, f"{how}: x̂ is {away:.4f} away from x"
        p = common.logits_of(model, x).softmax(1)
        kl[how] = kl_to(p)(common.logits_of(model, x_adv)).item() / len(x)
    found = ", ".join(f"{how} {value:.4g}" for how, value in kl.items())
    assert min(kl.values()) >= 0.97 * kl["fp32 eager"], f"a weaker attack: KL {found}"
    return f"KL {found}"


def resume(here):
    """A run that is killed and goes on differs from a whole one at most 10 times as much as two of these."""
    command = ["train_trades.py", *FEW, "--out"]
    runs = {name: here.start(name, *command, here.folder / name) for name in ("killed", "whole", "again")}
    log, killed = here.folder / "killed" / "log.jsonl", runs["killed"]
    while not log.exists() and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    done = log.read_text().count("\n") if killed.wait() < 0 else 0  # (below 0: the kill came first)
    assert done, f"the run to be killed ended: {(here.folder / 'killed.log').read_text()[-200:]}"
    runs["killed"] = here.start("killed", *command, here.folder / "killed")
    lines = {name: here.end(name, process) for name, process in runs.items()}
    assert any(f": {done} of 8 epochs done" in line for line in lines["killed"]), "it began anew"
    whole, *others = (torch.cat([value.double().flatten() for value in common.read_checkpoint(
        here.folder / name / "last.pt")["model"].values()]) for name in ("whole", "again", "killed"))
    noise, differs = (((other - whole).norm() / whole.norm()).item() for other in others)
    found = f"killed after epoch {done} of 8, weights differ by {differs:.1e}; two whole runs by {noise:.1e}"
    assert differs <= 10 * noise + 1e-6, found
    return found


def restarts(here):
    """Three restarts of PGD and CW: bf16 compiled finds what eval.py finds in fp32, within 1.5 points."""
    run, file, found = here.folder / "trades", here.folder / "eval.json", []
    if not run.exists():  # `scripts` has not made it
        here.end("trades", here.start("trades", "train_trades.py", "--quick", *FEW * here.dry, "--out", run))
    small = ["--steps", 1, "--eval-size", 20] * here.dry
    here.end("eval", here.start("eval", "eval.py", run, "--checkpoint", "last", "--attack", "pgd", "cw",
                                "--restarts", 3, "--lipschitz-size", 8, *small, "--json", file))
    network = common.NETWORKS["wrn"](10, 1, 10)
    common.load_weights(network, common.read_checkpoint(run / "last.pt"), "last.pt")
    model = here.executed(network, "fp32 compiled" if here.dry else "bf16 compiled")
    x, y = common.load_data("synthetic", os.devnull, here.device).test(20 if here.dry else None)
    for row in common.read_json(file)[:2]:  # the third is of both
        attack = Attack(**row["evaluation"]["attack"])
        own = common.evaluate(model, common.in_order(x, y, 128), attack)
        found.append(f"{attack.title()}: robust " + ", in fp32 eager ".join(
            f"{100 * part['robust_accuracy']:.2f} %" for part in (own, row["results"])))
        away = [abs(own[name] - row["results"][name]) for name in common.METRICS[:2]]
        assert away[0] < 0.001 and away[1] <= 0.015, found[-1]
    return "; ".join(found)


class Watch(Namespace):
    """Takes the place of benchmark.py's Turns: two steps that compile, one that must not wait, 20 timed."""

    def ready(self, **facts):
        self.facts, self.times, self.steps = facts, [benchmark.clock(self.device)], 0

    def step(self):
        self.steps += 1
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if self.steps == 2 else "default")
        self.times += [benchmark.clock(self.device)] if self.steps in (2, 3, 23) else []
        if self.steps == 23:
            raise StopIteration


def speed(here, width=10):
    """A step of train_trades.py on WRN-34 never waits for the device, and compiles few graphs, unbroken."""
    depth, width, n, steps = (10, 1, 2, 1) if here.dry else (34, width, 128, 10)
    argv = ["--dataset", "synthetic", "--out", os.devnull, "--depth", depth, "--width", width, "--batch-size",
            n, "--steps", steps, "--device", here.device, *(["--precision", "fp32"] if here.dry else [])]
    with contextlib.suppress(StopIteration):
        benchmark.ours(watch := Watch(device=here.device), "trades", [*map(str, argv)])
    (start, compiled, began, ended), precision = watch.times, watch.facts["precision"]
    seconds, memory = (ended - began) / 20, torch.cuda.max_memory_allocated()
    flops = watch.facts["flops"] * n * benchmark.PASSES["trades"](steps)
    share = flops / seconds / benchmark.matrix_rate(here.device, precision)
    graphs = len(torch._dynamo.eval_frame._debug_get_cache_entry_list(common.Network.forward.__code__))
    broken = sum(torch._dynamo.utils.counters["graph_break"].values())
    found = (f"{precision}, {n / seconds:.4g} images/s, {100 * share:.1f} % of best, {memory / 1e9:.2f} GB, "
             f"{compiled - start:.0f} s to compile, {graphs} graphs, {broken} breaks")
    assert not broken and graphs <= 8, found
    return found


CHECKS = {"scripts": scripts, "gradients": gradients, "attacks": attacks, "resume": resume,
          "restarts": restarts, "speed": speed, "thin": lambda here: speed(here, width=1)}


def main(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"of {', '.join(CHECKS)} (None: all)")
    add("--minutes", type=common.number(above=True), default=10, help="no check begins later")
    add("--dry", action="store_true", help="everything tiny, in fp32, on a CPU")
    args = parser.parse_args(argv)
    here = Here(**vars(args), device=common.pick_device("cpu" if args.dry else "cuda"),
                folder=Path(tempfile.mkdtemp(prefix="gpu-check-")), until=time.time() + 60 * args.minutes)
    if args.dry:  # the compiler's front end alone: its back end takes a minute
        compile = torch.nn.Module.compile
        torch.nn.Module.compile = lambda model, **how: compile(model, **how, backend="eager")
    rows = [f"{benchmark.name_of(here.device)}, PyTorch {torch.__version__}", "",
            "| check | | seconds | found |", "|---|---|---:|---|"]
    for name in args.only or CHECKS:
        began, passed, found = time.time(), "FAILED", "no time left"
        try:
            if began < here.until:
                found, passed = CHECKS[name](here), "passed"
        except Exception as error:  # one that breaks stops no other
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        rows.append(f"| {name} | {passed} | {time.time() - began:.0f} | {found} |")
        common.say(rows[-1])
    print("", *rows, sep="\n")
    if any("| FAILED |" in row for row in rows):
        raise UserError(f"not all passed; what the scripts printed is in {here.folder}")
    shutil.rmtree(here.folder)


if __name__ == "__main__":
    common.launch(main)

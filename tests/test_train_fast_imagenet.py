"""Fast AT on ImageFolder trees: phases, FGSM, input pipeline, validation, guard, a run killed and resumed."""
import copy
import json
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import train_fast_imagenet as fast
from common import Attack, UserError

SCRIPT = Path(fast.__file__)
SMALL = ["--width", "1/64", "--epochs", "3", "--short-sides", "20", "20", "0", "--crops", "12", "16", "16",
         "--batch-sizes", "8", "6", "9", "--lr", "0.02", "--eval-size", "5", "--test-size", "2",
         "--device", "cpu", "--precision", "fp32"]
CPU = torch.device("cpu")
FGSM = Attack(eps=2 / 255, step_size=2.5 / 255, steps=1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny tensors gain nothing from threads, and sums must be taken in the same order in every process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(seed, size=(28, 20)):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.BICUBIC)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Two classes of JPEG files: 18 to train on, 6 to validate."""
    root = tmp_path_factory.mktemp("tree")
    for split, n in (("train", 9), ("val", 3)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(n):
                picture((n, i, len(label) + (label == "dog"))).save(root / split / label / f"{i}.JPEG")
    return root


@pytest.fixture
def own_tree(tree, tmp_path):
    """A copy of `tree` that a test may spoil."""
    return Path(shutil.copytree(tree, tmp_path / "own"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])
    return path


def images(root, split="train", **settings):
    return fast.Images(Namespace(**{"data_dir": str(root), "workers": 0, "on_bad_image": "fail", **settings}),
                       split, CPU)


def phase(short_side=20, crop=16, batch_size=4):
    return fast.Phase(1, short_side, crop, batch_size)


def small_model(seed=0):
    """A WideResNet-50-1/64 whose BatchNorm statistics are settled."""
    torch.manual_seed(seed)
    model = fast.WideResNet50(1 / 64, 2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # averages over all batches
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(32, 3, 16, 16))
    return model.eval()


# ----------------------------------------------------------------------------------------- network and phases


@pytest.mark.parametrize("width, parameters", [(1, 25_557_032), (2, 68_883_240)])
def test_parameter_count(width, parameters):
    with torch.device("meta"):
        model = fast.WideResNet50(width, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_network_is_torchvisions_on_normalized_pixels():
    model = small_model()
    published = torchvision.models.resnet50(width_per_group=1, num_classes=2).eval()
    published.load_state_dict(model.state_dict())
    x = torch.rand(4, 3, 40, 40)
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(model(x), published(normalize(x)))


def test_learning_rate_at_its_corners():
    assert [(p.end, p.short_side, p.crop, p.batch_size) for p in fast.PHASES] == [
        (6, 160, 128, 512), (12, 352, 224, 224), (15, 0, 288, 128)]
    corners = [(0, 0), (0.5, 0.2), (1, 0.4), (3.5, 0.22), (6, 0.04), (9, 0.022), (12, 0.004), (15, 0.0004)]
    for epoch, rate in corners:
        assert 0.4 * fast.schedule(epoch / 15, 15) == pytest.approx(rate)


@pytest.mark.parametrize("epochs, ends", [(3, [1, 2, 3]), (4, [2, 3, 4]), (30, [12, 24, 30])])
def test_epochs_stretch_the_phases(epochs, ends):
    assert fast.phase_ends(epochs) == ends
    rates = [fast.schedule(epoch / epochs, epochs) for epoch in (0, ends[0] / 6, *ends)]
    assert rates == pytest.approx([0, 1, 0.1, 0.01, 0.001])  # the top, a sixth into the first phase


# ----------------------------------------------------------------------------------------------------- method


@pytest.mark.parametrize("training, alpha", [(True, 1.25), (False, 1.25), (True, 0.5)])
def test_fgsm_is_the_formula_in_float64(training, alpha):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Tanh(),
                                torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)).train(training)
    exact, eps = copy.deepcopy(model).double(), 2 / 255
    x, y = torch.rand(6, 3, 8, 8), torch.randint(0, 5, (6,))
    x[0], x[1] = x[0].round(), 1  # black and white pixels, from where a step leads out of [0, 1]
    torch.manual_seed(1)
    x_adv, norms = fast.fgsm(model, x, y, Attack(eps=eps, step_size=alpha * eps, steps=1))

    torch.manual_seed(1)
    start = (x + eps * (2 * torch.rand(x.shape) - 1)).double().clip(0, 1).requires_grad_()
    loss = -torch.log_softmax(exact(start), 1)[range(6), y].sum()
    loss.backward()
    low, high = np.maximum(x.double().numpy() - eps, 0), np.minimum(x.double().numpy() + eps, 1)
    expected = np.clip(start.detach().numpy() + alpha * eps * np.sign(start.grad.numpy()), low, high)
    clear = start.grad.abs().numpy() > 1e-5 * start.grad.abs().max().item()  # float32 knows these signs
    assert clear.mean() > 0.99
    np.testing.assert_allclose(x_adv.numpy()[clear], expected[clear], atol=1e-6)
    np.testing.assert_allclose(norms, start.grad.abs().sum((1, 2, 3)), rtol=1e-4)
    assert (x_adv - x).abs().max() <= eps + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (x_adv != x).float().mean() > 0.5


def test_beta_1_is_plain_fast_at_and_others_the_clipped_regularization():
    model, calls = small_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    x, x_adv, y = torch.rand(6, 3, 16, 16), torch.rand(6, 3, 16, 16), torch.arange(6) % 2
    natural, adversarial = (-torch.log_softmax(model(z), 1)[range(6), y] for z in (x, x_adv))
    assert (adversarial < natural).any() and (adversarial > natural).any()  # both sides of the clipping
    calls.clear()
    loss, parts = fast.fast_at_loss(model, x, x_adv, y, beta=1)
    assert len(calls) == 1
    torch.testing.assert_close((loss, parts), (adversarial.mean(), {"adversarial_risk": adversarial.mean()}))
    loss, parts = fast.fast_at_loss(model, x, x_adv, y, beta=2.5)
    natural_risk, rise = natural.mean(), torch.where(adversarial > natural, adversarial - natural, 0).mean()
    torch.testing.assert_close(parts, {"natural_risk": natural_risk, "robust_regularization": rise})
    torch.testing.assert_close(loss, natural_risk + 2.5 * rise)


def test_fgsm_leaves_the_weights_trainable_and_without_gradients():
    model = small_model()
    fast.fgsm(model, torch.rand(4, 3, 16, 16), torch.arange(4) % 2, FGSM)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------- data


def test_crops_depend_on_seed_epoch_and_number_alone(tree):
    order = np.random.default_rng(0).permutation(18)

    def crops(workers, seed, order=order, size=4):
        found = images(tree, workers=workers).batches(phase(batch_size=size), order, seed)
        return [torch.cat(part)[:len(order)] for part in list(zip(*found))[:2]]

    state = torch.get_rng_state()
    x, y = crops(0, (1, 1))
    assert torch.equal(torch.get_rng_state(), state)  # the attack's random numbers are left alone
    assert x.shape == (18, 3, 16, 16) and 0 <= x.min() < x.max() <= 1 and x.max() > 0.5
    assert y.tolist() == [int(i >= 9) for i in order]
    for other in (crops(2, (1, 1)), crops(0, (1, 1), order[::-1].copy(), 5)[::1]):
        assert torch.equal(other[0].flatten(1).sort(0).values, x.flatten(1).sort(0).values)
    assert torch.equal(crops(2, (1, 1))[0], x)
    assert not torch.equal(crops(0, (1, 2))[0], x) and not torch.equal(crops(0, (2, 1))[0], x)


@pytest.mark.parametrize("size", [(28, 20), (5, 3), (16, 16), (300, 7), (90, 160)])
@pytest.mark.parametrize("short_side", [20, 0])
@pytest.mark.parametrize("train", [True, False])
def test_images_of_any_size_are_cropped(size, short_side, train):
    assert fast.crop_image(picture(0, size), phase(short_side), train).size == (16, 16)


def test_validation_takes_the_middle():
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[2:18, 7:23] = picture(0, (16, 16))
    crop = fast.crop_image(Image.fromarray(pixels), phase(short_side=0), train=False)
    np.testing.assert_array_equal(crop, pixels[2:18, 7:23])


def test_odd_formats_are_read(own_tree):
    folder = own_tree / "train" / "cat"
    picture(1).convert("L").save(folder / "0.JPEG")
    picture(1).convert("CMYK").save(folder / "1.JPEG")
    picture(1).save(folder / "2.JPEG", format="PNG")
    picture(1).save(folder / "3.JPEG", quality=95)
    (x, _, n), = images(own_tree).batches(phase(short_side=0), np.arange(4))
    assert n == 4 and torch.equal(x[0, 0], x[0, 1])
    for other in (1, 2):
        assert (255 * (x[other] - x[3])).abs().mean() < 12


def test_a_large_jpeg_is_decoded_small(tmp_path, own_tree):
    picture(2, (640, 480)).save(own_tree / "train" / "cat" / "0.JPEG", quality=95)
    (x, _, _), = images(own_tree).batches(phase(short_side=60, crop=48), np.arange(1))
    with Image.open(own_tree / "train" / "cat" / "0.JPEG") as image:
        whole = np.asarray(fast.crop_image(image.convert("RGB"), phase(short_side=60, crop=48), train=False))
    assert np.abs(255 * x[0].permute(1, 2, 0).numpy() - whole).mean() < 3


# ------------------------------------------------------------------------------------------------- validation


def test_the_last_partial_batch_counts(tree):
    model, val = small_model(), images(tree, "val")
    x = torch.cat([x[:n] for x, _, n in val.batches(phase(batch_size=6), np.arange(6))])
    predictions = model(x).argmax(1)
    still = Attack(eps=0.0, steps=1)
    for batch_size in (4, 5, 6, 100):
        metrics = fast.validate(model, val, phase(batch_size=batch_size), None, still, still)
        natural = (predictions == torch.tensor([0, 0, 0, 1, 1, 1])).double().mean().item()
        assert metrics["n"] == 6
        assert metrics["natural_accuracy"] == metrics["fgsm_accuracy"] == pytest.approx(natural)
        assert metrics["perturbation_stability"] == 1 and metrics["natural_top5_accuracy"] == 1
    assert fast.validate(model, val, phase(), 5, still, still)["n"] == 5


def test_the_worst_of_several_restarts_counts(tree):
    model, val = small_model(), images(tree, "val")

    def run(restarts):
        attack = Attack(eps=60 / 255, step_size=1 / 255, steps=1, restarts=restarts)
        metrics = fast.validate(model, val, phase(batch_size=6), None, attack, FGSM)
        assert metrics["attack"] == asdict(attack)
        return metrics

    one, ten = run(1), run(10)
    assert ten["natural_accuracy"] == one["natural_accuracy"]
    assert ten["perturbation_stability"] < one["perturbation_stability"] or ten["perturbation_stability"] == 0
    for metrics in (one, ten):
        natural, robust, stability = (metrics[name] for name in common.METRICS)
        assert robust <= min(natural, stability)


def entry(epoch, robust, single):
    return {"epoch": epoch, "robust_accuracy": robust, "fgsm_accuracy": single}


def test_guard_against_catastrophic_overfitting():
    log = [entry(1, 0.20, 0.25), entry(2, 0.30, 0.36)]
    warning = fast.catastrophic_overfitting(log, entry(3, 0.02, 0.80))
    for words in ("catastrophic overfitting", "epoch 2", "30.00 %", "2.00 %", "36.00 %", "80.00 %"):
        assert words in warning
    log.append(entry(3, 0.02, 0.80))
    assert fast.catastrophic_overfitting(log, entry(4, 0.0, 0.85))           # said again as long as it lasts
    assert not fast.catastrophic_overfitting(log, entry(4, 0.29, 0.40))      # recovered
    assert not fast.catastrophic_overfitting(log[:2], entry(3, 0.02, 0.03))  # both fell: it diverged
    assert not fast.catastrophic_overfitting(log[:2], entry(3, 0.25, 0.80))  # PGD fell a little
    assert not fast.catastrophic_overfitting([entry(1, 0.004, 0.005)], entry(2, 0.001, 0.006))  # noise
    assert not fast.catastrophic_overfitting([], entry(1, 0.0, 0.9))


# ------------------------------------------------------------------------------------------------------- runs


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def short_test(monkeypatch):
    """The last test of a run with few steps: PGD-50 takes its time."""
    assert fast.MONITOR == Attack(step_size=1 / 255, steps=10)
    assert fast.REPORT == Attack(step_size=1 / 255, steps=50)
    monkeypatch.setattr(fast, "REPORT", replace(fast.REPORT, steps=2))


def test_killed_in_another_phase_it_resumes_to_the_same_weights(tree, tmp_path, short_test):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fast.main([str(tree), *SMALL, "--workers", "0", "--out", str(whole)])
    command = [str(tree), *SMALL, "--workers", "2", "--out", str(cut)]
    process = subprocess.Popen([sys.executable, SCRIPT, *command], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 1/3"):  # the first phase is over
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and len(read_log(cut)) < 3
    fast.main(command)

    a, b = (common.read_checkpoint(folder / "last.pt") for folder in (whole, cut))
    assert a["epoch"] == b["epoch"] == 3
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    same = [{key: value for key, value in e.items() if key not in ("seconds", "images_per_second")}
            for run in (whole, cut) for e in read_log(run)]
    assert {"adversarial_risk", "lipschitz"} <= {*same[0]} and same[0]["beta"] == 1
    assert same[:3] == same[3:] and [e["lr"] for e in same[:3]] == pytest.approx([0.002, 0.0002, 0.00002])
    metrics = common.read_json(cut / "metrics.json")
    attack = Attack(eps=2 / 255, step_size=1 / 255, steps=2)
    assert metrics == common.read_json(whole / "metrics.json") and metrics["last"]["attack"] == asdict(attack)
    assert {*common.METRICS, "n", "local_lipschitzness", "natural_top5_accuracy"} <= {*metrics["best"]}

    decay, none = b["optimizer"]["param_groups"]
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in fast.WideResNet50(1 / 64, 2).modules())
    assert (decay["weight_decay"], none["weight_decay"], len(none["params"])) == (1e-4, 0, 2 * norms)

    fast.main([*command, "--restarts", "2"])  # tests the finished run again
    fast.main(command)  # and this leaves alone what that found
    assert common.read_json(cut / "metrics.json")["last"]["attack"] == asdict(replace(attack, restarts=2))
    with pytest.raises(UserError, match="--width 0.015625 there, 0.03125 here"):
        fast.main([*command, "--width", "1/32"])


def test_training_and_the_fgsm_metric_use_alpha_and_beta(tree, tmp_path, short_test, monkeypatch):
    attacks, modes = {"fgsm": [], "pgd": []}, []

    def spy(name):
        function = getattr(fast, name)

        def called(model, x, *rest):
            attacks[name].append(rest[-1])
            modes.append((name, model.training))
            return function(model, x, *rest)
        monkeypatch.setattr(fast, name, called)

    spy("fgsm")
    spy("pgd")
    fast.main([str(tree), *SMALL, "--workers", "0", "--out", str(tmp_path), "--eps", "4/255",
               "--alpha", "0.5", "--beta", "2"])
    single_step = Attack(eps=4 / 255, step_size=2 / 255, steps=1)
    assert {*attacks["fgsm"]} == {*attacks["pgd"]} == {single_step}
    assert {*modes} == {("fgsm", True), ("pgd", True)}  # pgd itself takes the model to eval mode and back
    assert len(attacks["fgsm"]) == 2 + 3 + 2  # steps: 18 images in batches of 8, 6 and 9
    for entry in read_log(tmp_path):
        assert {"natural_risk", "robust_regularization", "lipschitz"} <= {*entry} and entry["beta"] == 2


def test_what_auto_precision_measured_is_kept(tree, tmp_path, short_test, monkeypatch):
    command = [str(tree), *SMALL, "--precision", "auto", "--workers", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(common, "measure_precisions", lambda *_: {"fp32": 1.0, "bf16": 2.0})
    fast.main(command)
    monkeypatch.setattr(common, "measure_precisions", lambda *_: {"fp32": 2.0, "bf16": 1.0})
    fast.main(command)
    assert common.read_json(tmp_path / "args.json")["precision"] == "fp32"
    assert common.read_json(tmp_path / "metrics.json")["last"]["precision"] == "fp32"
    with pytest.raises(UserError, match="--precision fp32 there, bf16 here"):
        fast.main([*command, "--precision", "bf16"])


def test_unreadable_images_are_fatal_or_skipped_and_counted(own_tree, tmp_path, capsys, short_test):
    broken, empty = truncate(own_tree / "train" / "dog" / "4.JPEG"), own_tree / "val" / "cat" / "1.JPEG"
    empty.write_bytes(b"")
    command = [str(own_tree), *SMALL, "--workers", "2", "--out", str(tmp_path / "run"), "--eval-size", "6"]
    with pytest.raises(UserError, match=f"{broken} cannot be read .*truncated.*--on-bad-image skip"):
        fast.main([*command, "--batch-sizes", "18", "18", "18"])
    fast.main([*command, "--batch-sizes", "18", "18", "18", "--on-bad-image", "skip"])  # the same run
    assert [(e["skipped_images"], e["n"]) for e in read_log(tmp_path / "run")] == [(2, 5)] * 3
    printed = capsys.readouterr().out
    assert printed.count(f"skipped {broken}") == printed.count(f"skipped {empty}") == 1


def no_class_folders(root):
    for label in ("cat", "dog"):
        shutil.rmtree(root / "train" / label)


@pytest.mark.parametrize("spoil, message", [
    (lambda root: shutil.rmtree(root / "val"), "val: no such folder; DIR must hold"),
    (no_class_folders, "any class folder"),
    (lambda root: [path.unlink() for path in root.glob("train/cat/*")], "no valid file for the classes cat"),
    (lambda root: (root / "val/cat").rename(root / "val/cow"), "only one of them has cat/"),
    (lambda root: [path.write_bytes(b"x") for path in root.glob("train/*/*")], "not one of these images"),
])
def test_unusable_folders_are_user_errors(own_tree, tmp_path, spoil, message):
    spoil(own_tree)
    command = [str(own_tree), *SMALL, "--workers", "0", "--on-bad-image", "skip"]
    with pytest.raises(UserError, match=message):
        fast.main([*command, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("arguments, message", [
    ([], "required: DIR"), (["DIR", "--eps", "2"], "at most 1"), (["DIR", "--epochs", "2"], "at least 3"),
    (["DIR", "--crops", "16"], "expected 3"), (["DIR"], "DIR/train: no such folder"),
    (["DIR", "--alpha", "0"], "above 0")])
def test_bad_arguments_are_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        fast.main(arguments)


def test_too_few_training_images(tree, tmp_path):
    with pytest.raises(UserError, match="--train-size 19: .* has 18"):
        fast.main([str(tree), *SMALL, "--train-size", "19", "--out", str(tmp_path)])


def test_an_error_is_one_line_and_status_2(tmp_path):
    result = subprocess.run([sys.executable, SCRIPT, tmp_path / "none"], capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "none/train: no such folder" in result.stderr

"""Fast AT on ImageFolder trees: phases, FGSM, input pipeline, validation, the guard, and a run killed and resumed."""
import copy
import json
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import train_fast_imagenet as fast
from common import UserError

SCRIPT = Path(fast.__file__)
SMALL = ["--width", "1/64", "--epochs", "3", "--short-sides", "20", "20", "0", "--crops", "12", "16", "16",
         "--batch-sizes", "8", "6", "9", "--lr", "0.02", "--eval-size", "5", "--test-size", "2",
         "--device", "cpu", "--precision", "fp32"]
CPU = torch.device("cpu")


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
    return fast.Images(Namespace(**{"data_dir": str(root), "workers": 0, "decode": "cpu", "on_bad_image": "fail",
                                    **settings}), split, CPU)


def phase(short_side=20, crop=16, batch_size=4):
    return fast.Phase(0, 1, short_side, crop, batch_size, ((0, 0), (1, 1)))


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


# ------------------------------------------------------------------------------------------------ network and phases


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
    rows = [(p.short_side, p.crop, p.batch_size) for p in fast.PHASES]
    one, two, three = fast.scaled_phases(15, *zip(*rows), 0.4)
    assert [(p.start, p.end, p.short_side, p.crop, p.batch_size) for p in (one, two, three)] == [
        (0, 6, 160, 128, 512), (6, 12, 352, 224, 224), (12, 15, 0, 288, 128)]
    corners = [(one, 0, 0), (one, 0.5, 0.2), (one, 1, 0.4), (one, 3.5, 0.22), (one, 6, 0.04), (two, 6, 0.04),
               (two, 9, 0.022), (two, 12, 0.004), (three, 12, 0.004), (three, 15, 0.0004)]
    for p, epoch, rate in corners:
        assert fast.learning_rate(p, epoch) == pytest.approx(rate)


@pytest.mark.parametrize("epochs, ends", [(3, [1, 2, 3]), (4, [2, 3, 4]), (30, [12, 24, 30])])
def test_epochs_stretch_the_phases(epochs, ends):
    phases = fast.scaled_phases(epochs, [1] * 3, [1] * 3, [1] * 3, 0.1)
    assert [p.end for p in phases] == ends and [p.start for p in phases] == [0, *ends[:2]]
    for p, rates in zip(phases, [(0, 0.01), (0.01, 0.001), (0.001, 0.0001)]):  # a quarter of the table's
        assert [fast.learning_rate(p, epoch) for epoch in (p.start, p.end)] == pytest.approx(rates)
    assert fast.learning_rate(phases[0], ends[0] / 6) == pytest.approx(0.1)  # the top, a sixth into the first phase


# ------------------------------------------------------------------------------------------------------------ method


@pytest.mark.parametrize("training", [True, False])
def test_fgsm_is_the_formula_in_float64(training):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Tanh(), torch.nn.Flatten(),
                                torch.nn.Linear(8 * 36, 5)).train(training)
    exact, eps = copy.deepcopy(model).double(), 2 / 255
    x, y = torch.rand(6, 3, 8, 8), torch.randint(0, 5, (6,))
    x[0], x[1] = x[0].round(), 1  # black and white pixels, from where a step leads out of [0, 1]
    torch.manual_seed(1)
    x_adv, norms = fast.fgsm(model, x, y, eps)

    torch.manual_seed(1)
    start = (x + eps * (2 * torch.rand(x.shape) - 1)).double().clip(0, 1).requires_grad_()
    loss = -torch.log_softmax(exact(start), 1)[range(6), y].sum()
    loss.backward()
    low, high = np.maximum(x.double().numpy() - eps, 0), np.minimum(x.double().numpy() + eps, 1)
    expected = np.clip(start.detach().numpy() + 1.25 * eps * np.sign(start.grad.numpy()), low, high)
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
    assert len(calls) == 1 and len(parts) == 1
    torch.testing.assert_close(loss, adversarial.mean())
    loss, parts = fast.fast_at_loss(model, x, x_adv, y, beta=2.5)
    regularization = torch.where(adversarial > natural, adversarial - natural, 0).mean()
    torch.testing.assert_close(parts, (natural.mean(), regularization))
    torch.testing.assert_close(loss, natural.mean() + 2.5 * regularization)


def test_a_step_moves_the_weights_and_leaves_them_trainable():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast.train_step(model, optimizer, torch.rand(4, 3, 16, 16), torch.arange(4) % 2, eps=2 / 255, beta=1)
    assert all(p.requires_grad and p.grad is not None and not torch.equal(p, before[name])
               for name, p in model.named_parameters() if name.endswith("conv1.weight"))


# --------------------------------------------------------------------------------------------------------------- data


def test_crops_depend_on_seed_epoch_and_number_alone(tree):
    order = np.random.default_rng(0).permutation(18)

    def crops(workers, seed, order=order, size=4):
        found = [(x, y) for x, y, n in images(tree, workers=workers).batches(phase(batch_size=size), order, seed)]
        return torch.cat([x for x, _ in found])[:len(order)], torch.cat([y for _, y in found])[:len(order)]

    state = torch.get_rng_state()
    x, y = crops(0, (1, 1))
    assert torch.equal(torch.get_rng_state(), state)  # the attack's random numbers are left alone
    assert x.shape == (18, 3, 16, 16) and x.dtype == torch.uint8 and y.tolist() == [int(i >= 9) for i in order]
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
        assert (x[other].int() - x[3].int()).abs().float().mean() < 12


def test_a_large_jpeg_is_decoded_small(tmp_path, own_tree):
    picture(2, (640, 480)).save(own_tree / "train" / "cat" / "0.JPEG", quality=95)
    (x, _, _), = images(own_tree).batches(phase(short_side=60, crop=48), np.arange(1))
    with Image.open(own_tree / "train" / "cat" / "0.JPEG") as image:
        whole = np.asarray(fast.crop_image(image.convert("RGB"), phase(short_side=60, crop=48), train=False))
    assert np.abs(x[0].permute(1, 2, 0).numpy().astype(int) - whole).mean() < 3


@pytest.mark.filterwarnings("ignore:The image decoding")  # torchvision 0.29 recommends TorchCodec
def test_decoding_on_the_device_gives_the_same_crops_and_falls_back(own_tree):
    """The device's path, on the CPU device here: torchvision's decoder in place of Pillow's."""
    encoded = images(own_tree, decode="gpu", on_bad_image="skip")
    order, p = np.arange(4), phase(short_side=0)
    (x, y, _), = images(own_tree).batches(p, order, (1, 1))
    (x_device, y_device, _), = encoded.batches(p, order, (1, 1))
    assert (x.int() - x_device.int()).abs().float().mean() < 3 and torch.equal(y, y_device)
    picture(1).save(own_tree / "train" / "cat" / "2.JPEG", format="PNG")  # what its decoder refuses
    (own_tree / "train" / "cat" / "3.JPEG").write_bytes(b"")
    (_, _, n), = encoded.batches(p, order, (1, 1))
    assert n == 3 and encoded.skipped == 1


# --------------------------------------------------------------------------------------------------------- validation


def test_the_last_partial_batch_counts(tree):
    model, val = small_model(), images(tree, "val")
    x = torch.cat([x[:n] for x, _, n in val.batches(phase(batch_size=6), np.arange(6))])
    predictions = model(x / 255).argmax(1)
    settings = {"eps": 0.0, "step_size": 1 / 255, "steps": 1}
    for batch_size in (4, 5, 6, 100):
        metrics = fast.validate(model, val, phase(batch_size=batch_size), None, **settings)
        natural = (predictions == torch.tensor([0, 0, 0, 1, 1, 1])).double().mean().item()
        assert metrics["n"] == 6 and metrics["natural_accuracy"] == metrics["fgsm_accuracy"] == pytest.approx(natural)
        assert metrics["perturbation_stability"] == 1 and metrics["natural_top5_accuracy"] == 1
    assert fast.validate(model, val, phase(), 5, **settings)["n"] == 5


def test_the_worst_of_several_restarts_counts(tree):
    model, val = small_model(), images(tree, "val")

    def run(restarts):
        return fast.validate(model, val, phase(batch_size=6), None, 60 / 255, step_size=1 / 255, steps=1,
                             restarts=restarts)

    one, ten = run(1), run(10)
    assert ten["natural_accuracy"] == one["natural_accuracy"]
    assert ten["perturbation_stability"] < one["perturbation_stability"] or ten["perturbation_stability"] == 0
    for metrics in (one, ten):
        assert metrics["robust_accuracy"] <= min(metrics["natural_accuracy"], metrics["perturbation_stability"])


def entry(epoch, robust, single):
    return {"epoch": epoch, "robust_accuracy": robust, "fgsm_accuracy": single}


def test_guard_against_catastrophic_overfitting():
    log = [entry(1, 0.20, 0.25), entry(2, 0.30, 0.36)]
    warning = fast.catastrophic_overfitting(log, entry(3, 0.02, 0.80))
    for words in ("catastrophic overfitting", "epoch 2", "30.00 %", "2.00 %", "36.00 %", "80.00 %"):
        assert words in warning
    log.append(entry(3, 0.02, 0.80))
    assert fast.catastrophic_overfitting(log, entry(4, 0.0, 0.85))              # said again as long as it lasts
    assert not fast.catastrophic_overfitting(log, entry(4, 0.29, 0.40))         # recovered
    assert not fast.catastrophic_overfitting(log[:2], entry(3, 0.02, 0.03))     # both fell: it diverged, no overfitting
    assert not fast.catastrophic_overfitting(log[:2], entry(3, 0.25, 0.80))     # PGD fell a little
    assert not fast.catastrophic_overfitting([entry(1, 0.004, 0.005)], entry(2, 0.001, 0.006))  # noise
    assert not fast.catastrophic_overfitting([], entry(1, 0.0, 0.9))


# --------------------------------------------------------------------------------------------------------------- runs


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def short_test(monkeypatch):
    """The last test of a run with few steps: PGD-50 takes its time."""
    assert fast.REPORT_ATTACK == {"step_size": 1 / 255, "steps": 50}
    monkeypatch.setattr(fast, "REPORT_ATTACK", {"step_size": 1 / 255, "steps": 2})


def test_killed_in_another_phase_it_resumes_to_the_same_weights(tree, tmp_path, short_test):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fast.main([str(tree), *SMALL, "--workers", "0", "--out", str(whole)])
    command = [str(tree), *SMALL, "--workers", "2", "--out", str(cut)]
    process = subprocess.Popen([sys.executable, SCRIPT, *command], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 1/3  lr"):  # the first phase is over
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and len(read_log(cut)) < 3
    fast.main(command)

    a, b = (common.read_checkpoint(folder / "last.pt") for folder in (whole, cut))
    assert a["epoch"] == b["epoch"] == 3 and all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    same = [{key: value for key, value in e.items() if key not in ("seconds", "images_per_second")}
            for run in (whole, cut) for e in read_log(run)]
    assert same[:3] == same[3:] and [e["lr"] for e in same[:3]] == pytest.approx([0.002, 0.0002, 0.00002])
    metrics = json.loads((cut / "metrics.json").read_text())
    assert metrics == json.loads((whole / "metrics.json").read_text()) and metrics["attack"]["restarts"] == 1
    assert {"n", "natural_accuracy", "robust_accuracy", "perturbation_stability", "local_lipschitzness"} <= {*metrics}

    decay, none = b["optimizer"]["param_groups"]
    norms = sum(2 for module in fast.WideResNet50(1 / 64, 2).modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert (decay["weight_decay"], none["weight_decay"], len(none["params"])) == (1e-4, 0, norms)

    fast.main([*command, "--restarts", "2"])  # tests the finished run again
    assert json.loads((cut / "metrics.json").read_text())["attack"]["restarts"] == 2
    with pytest.raises(UserError, match="--width 0.015625 there, 0.03125 here"):
        fast.main([*command, "--width", "1/32"])


def test_unreadable_images_are_named_and_fatal_or_skipped_and_counted(own_tree, tmp_path, capsys, short_test):
    broken, empty = truncate(own_tree / "train" / "dog" / "4.JPEG"), own_tree / "val" / "cat" / "1.JPEG"
    empty.write_bytes(b"")
    command = [str(own_tree), *SMALL, "--workers", "2", "--out", str(tmp_path / "run"), "--eval-size", "6"]
    with pytest.raises(UserError, match=f"{broken} cannot be read .*truncated.*--on-bad-image skip"):
        fast.main([*command, "--batch-sizes", "18", "18", "18"])
    fast.main([*command, "--batch-sizes", "18", "18", "18", "--on-bad-image", "skip"])  # the same run, resumed
    assert [(e["skipped_images"], e["n"]) for e in read_log(tmp_path / "run")] == [(2, 5)] * 3
    printed = capsys.readouterr().out
    assert printed.count(f"skipped {broken}") == printed.count(f"skipped {empty}") == 1


def test_benchmark_measures_every_phase_and_leaves_no_run(tree, tmp_path, capsys):
    fast.main([str(tree), *SMALL, "--workers", "1", "--out", str(tmp_path / "run"), "--benchmark", "2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("crop")]
    assert len(lines) == 3 and all("input pipeline" in line and "training" in line for line in lines)
    assert not (tmp_path / "run").exists()


def no_class_folders(root):
    for label in ("cat", "dog"):
        shutil.rmtree(root / "train" / label)


@pytest.mark.parametrize("spoil, message", [
    (lambda root: shutil.rmtree(root / "val"), "val: no such folder; DIR must hold"),
    (no_class_folders, "any class folder"),
    (lambda root: [path.unlink() for path in (root / "train" / "cat").iterdir()], "no valid file for the classes cat"),
    (lambda root: (root / "val" / "cat").rename(root / "val" / "cow"), "different classes; only one of them has cat/"),
    (lambda root: [path.write_bytes(b"x") for path in (root / "train").glob("*/*")], "not one of these images"),
])
def test_unusable_folders_are_user_errors(own_tree, tmp_path, spoil, message):
    spoil(own_tree)
    with pytest.raises(UserError, match=message):
        fast.main([str(own_tree), *SMALL, "--workers", "0", "--on-bad-image", "skip", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("arguments, message", [
    ([], "required: DIR"), (["DIR", "--eps", "2"], "at most 1"), (["DIR", "--epochs", "2"], "at least 3"),
    (["DIR", "--crops", "16"], "expected 3"), (["DIR"], "DIR/train: no such folder"),
    (["DIR", "--decode", "gpu", "--device", "cpu"], "needs a CUDA device")])
def test_bad_arguments_are_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        fast.main(arguments)


def test_too_few_training_images(tree, tmp_path):
    with pytest.raises(UserError, match="--train-size 19: .* has 18"):
        fast.main([str(tree), *SMALL, "--train-size", "19", "--out", str(tmp_path)])


def test_an_error_is_one_line_and_status_2(tmp_path):
    result = subprocess.run([sys.executable, SCRIPT, tmp_path / "none"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "none/train: no such folder" in result.stderr

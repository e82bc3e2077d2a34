"""Fast AT on ImageFolder trees: phases, FGSM, crops, odd images, validation, a run killed and resumed."""
import copy
import os
import runpy
import shutil
import signal
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import log_of, started
from PIL import Image

import common
import train_fast_imagenet as fast
from common import Attack, UserError

SMALL = ["--width", "1/64", "--epochs", "3", "--short-sides", "20", "20", "0", "--crops", "12", "16", "16",
         "--batch-sizes", "8", "6", "9", "--lr", "0.02", "--eval-size", "5", "--test-size", "2",
         "--device", "cpu", "--precision", "fp32"]


def picture(seed, size=(28, 20)):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.BICUBIC)


@pytest.fixture
def tree(tmp_path):
    """Two classes of JPEG files: 18 to train on, 6 to validate."""
    for split, n in (("train", 9), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / "tree" / split / label).mkdir(parents=True)
            for i in range(n):
                path = tmp_path / "tree" / split / label / f"{i}.JPEG"
                picture((n, i, len(label) + (label == "dog"))).save(path)
    return tmp_path / "tree"


@pytest.fixture
def short_test(monkeypatch):
    """The last test of a run as PGD-2, for PGD-50 takes its time."""
    attack, steps = fast.evaluation_attack, {10: 10, 50: 2}
    monkeypatch.setattr(fast, "evaluation_attack", lambda n, *rest: attack(steps[n], *rest))


def phase(short_side=20, crop=16):
    return fast.Phase(1, short_side, crop, 4)


def crops(root, phase, order, workers=0, seed=(), size=4):
    """(x, y) of the images numbered in `order`, from batches of `size`."""
    order, args = torch.tensor(order).split(size), Namespace(workers=workers)
    stream = fast.batches(fast.Folders(root), phase, order, args, torch.device("cpu"), seed)
    return [torch.cat(parts) for parts in zip(*stream)]


def crop_of(image, folder, phase, seed=(), name="0.png", **settings):
    """The crop [crop, crop, 3] of levels that an image file gives."""
    (folder / "class").mkdir(parents=True, exist_ok=True)
    image.save(folder / "class" / name, **settings)
    x, _ = crops(folder, phase, [0], seed=seed)
    return (255 * x[0]).round().int().permute(1, 2, 0).numpy()


def small_model(classes=2):
    """A WideResNet-50-1/64 whose BatchNorm statistics are settled."""
    torch.manual_seed(0)
    model = fast.WideResNet50(1 / 64, classes)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # averages over all batches
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(32, 3, 16, 16))
    return model.eval()


# ----------------------------------------------------------------------------------------- network and phases

def test_network_is_torchvisions_on_normalized_pixels():
    model = small_model()
    published = torchvision.models.resnet50(width_per_group=1, num_classes=2).eval()
    published.load_state_dict(model.state_dict())
    x = torch.rand(4, 3, 40, 40)
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(model(x), published(normalize(x)))
    with torch.device("meta"):
        parameters = [sum(p.numel() for p in fast.WideResNet50(width, 1000).parameters()) for width in (1, 2)]
    assert parameters == [25_557_032, 68_883_240]


def test_learning_rate_at_its_corners():
    assert [(p.end, p.short_side, p.crop, p.batch_size) for p in fast.PHASES] == [
        (6, 160, 128, 512), (12, 352, 224, 224), (15, 0, 288, 128)]
    corners = [(0, 0), (0.5, 0.2), (1, 0.4), (3.5, 0.22), (6, 0.04), (9, 0.022), (12, 0.004), (15, 0.0004)]
    for epoch, rate in corners:
        assert 0.4 * fast.schedule(epoch / 15, 15) == pytest.approx(rate)
    assert [fast.phase_ends(epochs) for epochs in (3, 4, 30)] == [[1, 2, 3], [2, 3, 4], [12, 24, 30]]
    rates = [fast.schedule(epoch / 4, 4) for epoch in (0, 1 / 3, 2, 3, 4)]  # of phases that are stretched
    assert rates == pytest.approx([0, 1, 0.1, 0.01, 0.001])
    with pytest.raises(UserError, match="at least 3"):
        fast.main(["DIR", "--epochs", "2"])


# ----------------------------------------------------------------------------------------- method and metrics

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
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

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


def test_beta_1_is_plain_fast_at_and_others_the_clipped_regularization():
    model, calls = small_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(6, 3, 16, 16), torch.zeros(6, dtype=int)
    x_adv = x.flip(0)  # where one loss rises, another falls: both sides of the clipping
    natural, adversarial = (-torch.log_softmax(model(z), 1)[range(6), y] for z in (x, x_adv))
    calls.clear()
    loss, parts = fast.fast_at_loss(model, x, x_adv, y, beta=1)
    assert len(calls) == 1
    torch.testing.assert_close((loss, parts), (adversarial.mean(), {"adversarial_risk": adversarial.mean()}))
    loss, parts = fast.fast_at_loss(model, x, x_adv, y, beta=2.5)
    natural_risk, rise = natural.mean(), torch.where(adversarial > natural, adversarial - natural, 0).mean()
    torch.testing.assert_close(parts, {"natural_risk": natural_risk, "robust_regularization": rise})
    torch.testing.assert_close(loss, natural_risk + 2.5 * rise)


def test_evaluation_attacks_reach_across_their_balls():
    for levels, step in ((2, 1), (4, 1), (8, 2), (16, 4), (0.5, 0.5)):
        attack = fast.evaluation_attack(10, levels / 255)
        assert attack == Attack(eps=levels / 255, step_size=attack.step_size, steps=10)
        assert 255 * attack.step_size == pytest.approx(step)


def test_top5_accuracy_counts_every_image_once_and_compiles_nothing():
    model, compiled = torch.nn.Flatten(), []
    model.compile(backend=lambda graph, example: compiled.append(1) or graph)
    x, y = torch.arange(9.0).expand(14, 9).clone()[:, :, None, None], torch.arange(14) % 9  # y: 4 is sixth
    for size in (4, 14):
        assert fast.top5_accuracy(model, zip(x.split(size), y.split(size))) == 6 / 14 and not compiled
    assert fast.top5_accuracy(model, zip(x[:, :3].split(4), (y % 3).split(4))) == 1  # of three classes


# ------------------------------------------------------------------------------------------------------- data

def test_crops_follow_from_seed_epoch_and_image_alone(tree):
    """Not from the process that reads it (--workers), nor from the images before it (torchrun's shares)."""
    order, train = np.random.default_rng(0).permutation(18), tree / "train"
    torch.manual_seed(5)
    x, y = crops(train, phase(), order, seed=(1, 1))
    after = torch.rand(1)
    assert x.shape == (18, 3, 16, 16) and 0 <= x.min() < 0.5 < x.max() <= 1
    assert y.tolist() == [int(i >= 9) for i in order]
    for workers in (1, 2):
        torch.manual_seed(5)
        assert torch.equal(crops(train, phase(), order, workers, seed=(1, 1))[0], x)
        assert torch.rand(1) == after  # what an attack starts from
    assert torch.equal(crops(train, phase(), order[1::2], seed=(1, 1))[0], x[1::2])
    for seed in (1, 2), (2, 1):
        assert (crops(train, phase(), order, seed=seed)[0] != x).flatten(1).any(1).all()
    shutil.copy(train / "cat" / "0.JPEG", train / "cat" / "1.JPEG")
    assert not torch.equal(*crops(train, phase(), [0, 1], seed=(1, 1))[0])


@pytest.mark.parametrize("size", [(28, 20), (5, 3), (16, 16), (300, 7), (90, 160)])
@pytest.mark.parametrize("short_side", [20, 10, 0])
@pytest.mark.parametrize("seed", [(1, 1), ()])
def test_images_of_any_size_fill_the_crop(tmp_path, size, short_side, seed):
    crop = crop_of(Image.new("RGB", size, "white"), tmp_path, phase(short_side), seed)
    assert crop.shape == (16, 16, 3) and crop.min() == 255


def test_training_crops_are_parts_mirrored_half_the_time(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 6, np.uint8), (40, 1)))
    draws = [crop_of(ramp, tmp_path, phase(0), (1, epoch))[0, :, 0] for epoch in range(40)]
    rises = np.array([row[-1] - row[0] for row in draws])
    assert 10 < (rises < 0).sum() < 30 and np.abs(rises).min() < 120 < 180 < np.abs(rises).max()


def test_validation_takes_the_middle(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[2:18, 7:23] = picture(0, (16, 16))
    np.testing.assert_array_equal(crop_of(Image.fromarray(pixels), tmp_path, phase(0)), pixels[2:18, 7:23])


def test_a_large_jpeg_is_decoded_small(tmp_path, monkeypatch):
    image = picture(2, (640, 480))
    image.save(tmp_path / "0.JPEG", quality=95)
    monkeypatch.setattr(fast.v2.functional, "resize", lambda image, size: image)
    sizes = [fast.read(tmp_path / "0.JPEG", side, 0).size for side in (60, 61, 0)]
    assert sizes == [(80, 60), (160, 120), (640, 480)]


@pytest.mark.parametrize("convert, name, error", [
    (lambda color, gray: gray, "0.png", 0),
    (lambda color, gray: Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), "0.png", None),
    (lambda color, gray: Image.fromarray(np.asarray(gray) / np.float32(255)), "0.tiff", None),
    (lambda color, gray: Image.merge("LA", [gray, gray]), "0.png", 0),
    (lambda color, gray: Image.merge("RGBA", [*color.split(), gray]), "0.png", 0),
    (lambda color, gray: color.convert("CMYK"), "0.jpg", 6),
    (lambda color, gray: color.convert("CMYK"), "0.tiff", 1),
    (lambda color, gray: color.convert("P", palette=Image.Palette.ADAPTIVE), "0.png", 8),
])
@pytest.mark.filterwarnings("error")
def test_images_of_other_kinds_keep_their_values_or_are_refused(tmp_path, convert, name, error):
    color = picture(3, (16, 16))
    gray = color.convert("L")
    image = convert(color, gray)
    settings = {"transparency": bytes(range(256))} if image.mode == "P" else {}
    if error is None:
        with pytest.raises(UserError, match=f"{name} cannot be read: its mode .* has no known range"):
            crop_of(image, tmp_path, phase(0), name=name)
        return
    crop = crop_of(image, tmp_path, phase(0), name=name, **settings)
    wanted = np.asarray((gray if image.mode in ("L", "LA") else color).convert("RGB")).astype(int)
    assert np.abs(crop - wanted).mean() <= error and np.ptp(wanted) > 50


# ------------------------------------------------------------------------------------------------------- runs

def train_until_killed(command, share):
    """Train, and be killed in the midst of a step once a share of the run is done."""
    schedule = fast.schedule
    fast.schedule = lambda done, epochs: (os.kill(os.getpid(), signal.SIGKILL) if done > share else
                                          schedule(done, epochs))
    fast.main(command)


def test_killed_in_another_phase_it_resumes_to_the_same_weights(tree, tmp_path, short_test, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fast.main([str(tree), *SMALL, "--workers", "0", "--out", str(whole)])
    command = [str(tree), *SMALL, "--workers", "0", "--out", str(cut)]
    process = started(train_until_killed, command, 0.5)  # the first phase is over then
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(log_of(cut)) == 1
    fast.main([*command, "--workers", "1"])  # which changes nothing

    a, b = (common.read_checkpoint(folder / "last.pt") for folder in (whole, cut))
    assert a["epoch"] == b["epoch"] == 3
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    same = [{key: value for key, value in e.items() if key not in ("seconds", "images_per_second")}
            for run in (whole, cut) for e in log_of(run)]
    assert {"adversarial_risk", "lipschitz"} <= {*same[0]} and same[0]["beta"] == 1
    assert same[:3] == same[3:] and [e["lr"] for e in same[:3]] == pytest.approx([0.002, 0.0002, 0.00002])
    metrics, attack = common.read_json(cut / "metrics.json"), fast.evaluation_attack(50, 2 / 255)
    assert metrics == common.read_json(whole / "metrics.json") and metrics["last"]["attack"] == asdict(attack)
    assert {*common.METRICS, "n", "local_lipschitzness", "natural_top5_accuracy"} <= {*metrics["best"]}

    decay, none = b["optimizer"]["param_groups"]
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in fast.WideResNet50(1 / 64, 2).modules())
    assert (decay["weight_decay"], none["weight_decay"], len(none["params"])) == (1e-4, 0, 2 * norms)

    fast.main([*command, "--restarts", "2"])  # tests the finished run again
    capsys.readouterr()
    fast.main(command)  # and this leaves alone what that found
    assert "last.pt, epoch 3, PGD-2×2, ε = 2/255, step 1/255: natural" in capsys.readouterr().out
    assert common.read_json(cut / "metrics.json")["last"]["attack"] == asdict(replace(attack, restarts=2))
    (tree / "train" / "dog" / "8.JPEG").rename(tree / "train" / "dog" / "9.JPEG")
    with pytest.raises(UserError, match=r"width 0.015625 there, 0.03125 here; data \w+ there, \w+ here"):
        fast.main([*command, "--width", "1/32"])


def test_settings_are_used_and_a_collapse_is_told(tree, tmp_path, short_test, monkeypatch, capsys):
    steps, labels, fgsm, accuracies = [], [], fast.fgsm, iter([0.8, 0.5, 0.3, 0, 0])  # of three epochs, tests

    def noted(model, x, y, attack):
        steps.append((attack, model.training, tuple(x.shape)))
        labels.extend(y.tolist())
        return fgsm(model, x, y, attack)

    monkeypatch.setattr(fast, "fgsm", noted)
    monkeypatch.setattr(common, "evaluate", lambda *_: {"robust_accuracy": next(accuracies)})
    monkeypatch.chdir(tmp_path)
    (tree / "train" / ".cache").mkdir()  # hidden folders are no classes
    fast.main([str(tree), *SMALL, "--workers", "0", "--eps", "4/255", "--alpha", "0.5", "--beta", "2",
               "--eval-size", "1", "--test-size", "1"])
    attack = Attack(eps=4 / 255, step_size=2 / 255, steps=1)
    shapes = [(8, 3, 12, 12)] * 2 + [(6, 3, 16, 16)] * 3 + [(9, 3, 16, 16)] * 2  # 18 images an epoch
    assert steps == [(attack, True, shape) for shape in shapes]
    assert sum(labels[16:34]) == sum(labels[34:]) == 9 and labels[16:34] != labels[34:]  # every image, anew
    run, = Path("runs").iterdir()
    assert capsys.readouterr().err.count("robust accuracy fell from 80.00 to 30.00 % in epoch 3") == 1
    assert run.name[:-7] == "fast-tree-wrn50-0.015625-eps4-beta2-seed1"
    assert {"natural_risk", "robust_regularization", "lipschitz"} <= {*log_of(run)[0]}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_that_names_it(tree, workers):
    broken = tree / "train" / "dog" / "4.JPEG"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(UserError) as error:  # that of a worker comes with its traceback
        crops(tree / "train", phase(), range(18), workers, seed=(1, 1))
    assert str(error.value).startswith(f"{broken} cannot be read: image file is truncated")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("spoil, message", [
    (lambda root: shutil.rmtree(root / "val"), "No such file .*/val'; DIR must hold"),
    (lambda root: [path.rename(root / f"val/.{path.name}") for path in root.glob("val/*")], "DIR must hold"),
    (lambda root: [path.unlink() for path in root.glob("train/cat/*")], "no valid file for the classes cat"),
    (lambda root: (root / "val/cat").rename(root / "val/cow"), "only one of train/ and val/ has cat, cow$"),
    (lambda root: (root / "val/cat").rename(root / "val/images").with_name("val_annotations.txt").touch(),
     "has cat, images; sort val/ into a folder per class, as .*val_annotations.txt says"),
    (lambda root: shutil.rmtree(root) or root.touch(), "Not a directory: .*; DIR must hold"),
    (lambda root: [path.unlink() for path in root.glob("train/*/[1-9].JPEG")], "2 training images.* here 9"),
])
def test_unusable_folders_are_user_errors(tree, spoil, message):
    spoil(tree)
    with pytest.raises(UserError, match=message):
        fast.main([str(tree), *SMALL])


def test_files_that_are_no_images_are_counted_and_hidden_ones_are_not(tree, capsys):
    cat = tree / "train" / "cat"
    for old, new in (0, "0.jfif"), (1, "1.heic"), (2, "2.JPEG.part"), (3, "._3.JPEG"):
        (cat / f"{old}.JPEG").rename(cat / new)
    (tree / "train" / ".DS_Store").touch()
    x, y = crops(tree / "train", phase(), range(15))
    assert len(x) == 15 == len(fast.Folders(tree / "train")) and y.sum() == 9  # dogs
    said = capsys.readouterr().err
    assert f"{tree / 'train'}: 15 of 17 files are read" in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                 "workers are out of shared memory."), OSError(30, "Read-only file system")])
def test_workers_without_memory_are_one_line(tree, monkeypatch, error):
    def fail(_):
        raise error
    monkeypatch.setattr(fast, "DataLoader", lambda *args, **settings: map(fail, [0]))
    with pytest.raises(UserError, match="or --workers 0, which needs none$"):
        crops(tree / "train", phase(), range(4), workers=2)
    with pytest.raises(type(error)):  # of something else
        crops(tree / "train", phase(), range(4))


def test_a_torchvision_of_another_torch_is_one_line(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("operator torchvision::nms does not exist")
    broken = type("", (), {"__getattr__": fail})()
    monkeypatch.setitem(sys.modules, "torchvision.datasets.folder", broken)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(fast.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1 and "torchvision::nms does not exist" in said

"""tests/gpu_check.py: its checks pass tiny on a CPU, and each fails when what it checks is broken."""
import tempfile
import time
from types import SimpleNamespace

import pytest
import torch

import benchmark
import common
import gpu_check


@pytest.fixture
def here(tmp_path, monkeypatch):
    """As --dry makes it: compiled by the compiler's front end alone."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda model, **how: compile(model, **how, backend="eager"))
    return gpu_check.Here(device=torch.device("cpu"), dry=True, until=time.time() + 600, folder=tmp_path)


def test_a_table_of_what_passed(monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "compile", torch.nn.Module.compile)  # replaced, and put back
    monkeypatch.setattr(common, "Run", common.Run)
    monkeypatch.setattr(common, "synthetic", common.synthetic)
    gpu_check.main(["--dry", "--only", "gradients", "attacks", "speed"])
    table = capsys.readouterr().out.split("\n| check |")[1].splitlines()[2:]
    assert [row.split(" | ")[:2] for row in table] == [
        ["| gradients", "passed"], ["| attacks", "passed"], ["| speed", "passed"]]


def test_the_benchmark_trains_on_images_as_large_as_it_counts(monkeypatch):
    """A quarter of the pixels once made steps four times as fast as they were."""
    monkeypatch.setattr(common, "Run", common.Run)
    monkeypatch.setattr(common, "synthetic", common.synthetic)
    crop_flip, shapes, facts = common.crop_flip, set(), {}
    monkeypatch.setattr(common, "crop_flip", lambda x, *where: shapes.add(x.shape) or crop_flip(x, *where))
    turns = SimpleNamespace(device=torch.device("cpu"), ready=facts.update, step=lambda: next(iter([])))
    args = SimpleNamespace(method="trades", width=1, arch="wrn", depth=10, batch_size=8, steps=1)
    with pytest.raises(StopIteration):
        benchmark.ours(turns, "trades", benchmark.script_arguments(args, "cpu", "fp32-eager"))
    assert shapes == {(8, 3, 32, 32)}
    maps = {32: (3 + 16 + 16) * 16 * 9, 16: (16 + 32) * 32 * 9 + 16 * 32, 8: (32 + 64) * 64 * 9 + 32 * 64}
    assert facts["flops"] == 2 * (sum(size ** 2 * weights for size, weights in maps.items()) + 64 * 10)


def test_a_check_that_fails_or_comes_too_late_fails_all(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.nn.Module, "compile", torch.nn.Module.compile)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(gpu_check.CHECKS, "speed", lambda here: 1 / 0)
    monkeypatch.setitem(gpu_check.CHECKS, "thin", lambda here: setattr(here, "until", 0) or "fine")
    with pytest.raises(common.UserError, match="not all passed"):
        gpu_check.main(["--dry", "--only", "speed", "thin", "attacks"])
    printed = capsys.readouterr().out
    assert "| speed | FAILED | 0 | ZeroDivisionError: division by zero |" in printed
    assert "| thin | passed | 0 | fine |" in printed and "| attacks | FAILED | 0 | no time left |" in printed


def test_gradients_see_a_compiled_graph_with_other_batchnorm_statistics(here, monkeypatch):
    def compile(model, **_):
        def call(x):
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_var = module.running_var * 1.001
            return model.forward(x)
        model._compiled_call_impl = call
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    with pytest.raises(AssertionError, match="wrn fp32 compiled"):
        gpu_check.gradients(here)


def test_gradients_see_weights_that_were_rounded_in_fp32(here, monkeypatch):
    def rounded(args, images, model):
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    monkeypatch.setattr(common, "set_execution", rounded)
    with pytest.raises(AssertionError, match="wrn fp32 eager"):
        gpu_check.gradients(here)


def test_attacks_see_one_without_its_projection_and_one_that_stops_early(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(common, "project", lambda x_adv, *_: x_adv)
        with pytest.raises(AssertionError, match="fp32 eager: x̂ is 0.0[4-9]"):
            gpu_check.attacks(here)
    whole, runs = common.pgd, []

    def early(model, x, loss, attack):  # in all executions but the first
        runs.append(attack)
        short = common.Attack("kl", steps=2, step_size=0.007)
        return whole(model, x, loss, attack if len(runs) == 1 else short)
    monkeypatch.setattr(gpu_check, "pgd", early)
    with pytest.raises(AssertionError, match="a weaker attack"):
        gpu_check.attacks(here)


FORGETFUL = f"""
import sys
sys.path.insert(0, {str(gpu_check.ROOT)!r})
import common, torch, train_trades
torch.optim.SGD.load_state_dict = lambda *_: None
common.launch(train_trades.main)
"""


def test_resume_sees_one_that_forgets_the_optimizer(here, monkeypatch, tmp_path):
    (tmp_path / "train_trades.py").write_text(FORGETFUL)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    match = r"killed after epoch \d of 8, weights differ.*two whole runs by 0"
    with pytest.raises(AssertionError, match=match):
        gpu_check.resume(here)

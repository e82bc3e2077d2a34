"""Puts the repository's root on the path, so that the tests run from anywhere and need no installation.

Tests run on the CPU even where there is a GPU: several compare two runs to the last bit, which only a CPU promises.
"""
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before PyTorch is imported; processes that a test starts inherit it

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


@pytest.fixture
def check_resume(monkeypatch, tmp_path):
    """check_resume(main, arguments, flag, value, message): a run stopped after an epoch ends with the very weights of one
    that was not, and is not resumed with `flag` changed to `value`, an error that says `message`."""
    def check(main, arguments, flag, value, message):
        end_epoch = common.Run.end_epoch

        def stop(run, lr, data):
            end_epoch(run, lr, data)
            raise KeyboardInterrupt

        whole, stopped = ([*arguments, "--out", str(tmp_path / name)] for name in ("whole", "stopped"))
        main(whole)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common.Run, "end_epoch", stop)
            main(stopped)
        assert common.read_checkpoint(tmp_path / "stopped" / "last.pt")["epoch"] == 1
        main(stopped)
        expected, resumed = (common.read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "stopped"))
        assert resumed["epoch"] == expected["epoch"] > 1
        assert all(torch.equal(expected["model"][key], resumed["model"][key]) for key in expected["model"])
        with pytest.raises(common.UserError, match=message):
            main([*stopped, flag, value])
    return check

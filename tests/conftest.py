import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on two threads, which wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a script starts in the background

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import aspo  # noqa: E402

PROBLEM = {"problem": "1+2", "answer": "3", "messages": None, "row": {}}


@pytest.fixture
def tiny():
    """An untrained tiny model in eval mode and its tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = aspo.tiny_model()
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def shared():
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder beside the checkout")
    return folder


def policy_of(model, tokenizer, /, **knobs) -> "aspo.Policy":
    """A policy with the knobs of a small run on sums; every construction probes the model."""
    cfg = aspo.Config(**(dict(model="tiny", data="arithmetic", max_new_tokens=40) | knobs))
    return aspo.Policy(model, tokenizer, cfg, [PROBLEM])


def error_of(capsys, *arguments) -> str:
    """The one line that bad input gets, with exit status 2."""
    capsys.readouterr()
    assert aspo.main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error

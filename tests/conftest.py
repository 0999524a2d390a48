import os
import signal
import sys
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on two threads, which wait for each other

# Started in the background of a script, or under nohup, these would be ignored by all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

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
    """A policy with the knobs of a small run on sums; every construction probes the engine."""
    cfg = aspo.Config(**(dict(model="tiny", data="arithmetic", max_new_tokens=40) | knobs))
    return aspo.Policy(model, tokenizer, cfg, [PROBLEM])


def logits_at_once(cuda: bool) -> int:
    """How many by_rows computes at once: it asks a tensor for so many rows of one."""
    asked = []
    x = types.SimpleNamespace(is_cuda=cuda, split=lambda rows: asked.append(rows) or ())
    aspo.by_rows(None, x, x, logits_per_row=1)
    return asked[0]


def set_logits_at_once(monkeypatch, n: int):
    """Another number, on the CPU."""
    usual, by_rows = logits_at_once(cuda=False), aspo.by_rows
    monkeypatch.setattr(aspo, "by_rows", lambda work, x, targets, *args, logits_per_row=None: by_rows(
        work, x, targets, *args, logits_per_row=usual * (logits_per_row or x[0].numel()) // n))

"""More than one process, on a CPU with gloo: the same update, metrics over all, resuming with another number, a death."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from kill import FLAGS, lines

import aspo

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(processes, *arguments):
    command = [*LAUNCH, str(processes)] if processes > 1 else [sys.executable]
    result = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=ENV, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_the_update_does_not_depend_on_the_number_of_processes(tmp_path):
    found = {}
    for name, processes, extra in (("one", 1, []), ("two", 2, []), ("sharded", 2, ["fsdp"])):
        launch(processes, ROOT / "tests/processes.py", tmp_path / f"{name}.pt", *extra)
        found[name] = torch.load(tmp_path / f"{name}.pt")
    torch.manual_seed(0)
    initial = {name: p.detach().clone() for name, p in aspo.tiny_model()[0].named_parameters()}
    for name in ("two", "sharded"):
        assert found[name]["tokens"] == found["one"]["tokens"]
        assert found[name]["norms"] == pytest.approx(found["one"]["norms"], rel=1e-5)
        moved, other = (torch.cat([(found[which]["weights"][key] - weight).flatten() for key, weight in initial.items()])
                        for which in ("one", name))
        assert (moved - other).norm() < 1e-5 * moved.norm()


def test_a_run_moves_between_numbers_of_processes(tmp_path):
    run, script = tmp_path / "run", ROOT / "aspo.py"
    result = launch(2, script, "--steps", 2, "--out", run, *FLAGS)
    assert result.stdout.count("held-out accuracy before RL") == 1  # rank 0 alone speaks
    launch(1, script, "--resume", run, "--steps", 4)
    launch(2, script, "--resume", run, "--steps", 6, "--fsdp", "True")
    metrics = lines(run)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(m["tokens"] == pytest.approx(16 * m["response_length"]) for m in metrics)  # 4 prompts x 4, over all processes
    assert all(m["grad_norm"] > 0 for m in metrics)
    model, _, state = aspo.load_checkpoint(aspo.parse(["--resume", str(run)]))
    assert state["step"] == 6 and state["position"] == 24 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([*LAUNCH, "2", str(ROOT / "aspo.py"), "--steps", "5000", "--out", str(run), *FLAGS],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)
    while not (run / "checkpoint").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = [p for p in Path("/proc").glob("[0-9]*") if str(run) in (p / "cmdline").read_text()]
    os.kill(next(int(p.name) for p in workers if "\0RANK=1\0" in (p / "environ").read_text()), signal.SIGKILL)
    error = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "process 0 lost contact" in error and "--resume" in error
    _, _, state = aspo.load_checkpoint(aspo.parse(["--resume", str(run)]))
    assert state["step"] > 0


def test_bad_input_for_several_processes():
    with pytest.raises(aspo.UserError, match="torchrun"):
        aspo.check(aspo.Config(fsdp=True))

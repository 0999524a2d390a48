"""Nothing is lost and nothing runs in silence: kills, signals, streams and disks that fail, damaged or foreign files,
broken models, gradients that are not finite, too little memory."""
import errno
import io
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from kill import FLAGS, kill_and_compare, lines, same
from processes import ENV, Process, run as run_script
from safetensors.torch import load_file, save_file

import aspo
from aspo import Broken, Config, Policy, Sample, UserError

KEEP = """
import re, shutil
real = shutil.rmtree
shutil.rmtree = lambda path, *rest: None if re.fullmatch("checkpoint-[0-9]+", path.name) else real(path, *rest)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 6 steps with every checkpoint, and which the tests copy."""
    run = tmp_path_factory.mktemp("faults") / "run"
    run_script("--steps", 6, "--out", run, *FLAGS, before=KEEP)
    kept = sorted(path.name for path in run.glob("checkpoint*"))
    assert kept == ["checkpoint", *(f"checkpoint-{i}" for i in range(1, 6))]
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def back_to(run, step):
    """As if the run had been killed right after the checkpoint of this step."""
    shutil.rmtree(run / "checkpoint")
    for folder in run.glob("checkpoint-*"):
        if int(folder.name[11:]) > step:
            shutil.rmtree(folder)
    (run / f"checkpoint-{step}").rename(run / "checkpoint")


def resume(run, *flags, **options):
    return run_script("--resume", run, *flags, **options)


@pytest.fixture
def quiet_signals(monkeypatch):
    """Leaves the test runner's own signal handlers in place."""
    monkeypatch.setattr(aspo.Run, "listen", lambda run: None)


@pytest.fixture
def refused(quiet_signals, capsys):
    """main(arguments) exits with this status and one line that holds the given words."""
    def check(arguments, *words, status=2):
        capsys.readouterr()
        assert aspo.main(list(map(str, arguments))) == status
        check_line(capsys.readouterr().err, *words)
    return check


def check_line(stderr, *words):
    line = [text for text in stderr.splitlines() if text.startswith("error:")]
    assert len(line) == 1 and all(word in line[0] for word in words) and "Traceback" not in stderr, stderr


def wait_for(condition, process):
    for _ in range(20_000):
        if condition():
            return
        assert process.poll() is None, process.err
        time.sleep(0.01)
    raise AssertionError("it did not come")  # rather than wait for ever


def has_lines(run):
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()


# --------------------------------------------------------------------------------------------------- kills and going on


def test_killed_runs_end_as_if_never_stopped(tmp_path):
    hits = kill_and_compare(3, tmp_path, steps=15)
    assert sum(hits.values()) > 0


def test_resume_from_any_step(run, finished):
    back_to(run, 2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "torn')
    assert "resumed after step 2" in resume(run).out
    same(run, finished)


def test_killed_between_the_renames_of_a_save(run, finished):
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint.tmp").mkdir()
    assert "resumed after step 5" in resume(run).out
    same(run, finished)


def test_a_finished_run_goes_on_with_more_steps(run, refused):
    refused(["--resume", run], "--steps")
    resume(run, "--steps", "7", "--eval_every", "0", "--micro_tokens", "512")
    assert [row["step"] for row in lines(run)] == [*range(1, 8)]


def test_more_steps_are_remembered_by_a_killed_run(run):
    process = Process("--resume", run, "--steps", 400)
    wait_for(lambda: len(lines_so_far(run)) > 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((run / "config.json").read_text())["steps"] == 400
    assert aspo.parse(["--resume", str(run)]).steps == 400


def lines_so_far(run):
    return (run / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("flags", [["--lr", "0.5"], ["--loss", "grpo"], ["--seed", "3"], ["--group_size", "8"]])
def test_flags_that_alter_the_run_are_refused_by_name(run, flags, refused):
    before = (run / "metrics.jsonl").read_bytes()
    refused(["--resume", run, "--steps", "9", *flags], flags[0], flags[1])
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_is_no_run_is_not_resumed(run, tmp_path, refused):
    refused(["--resume", tmp_path / "nothing"], "config.json")
    refused(["--resume", ""], "--resume ''")
    refused(["--resume", run / "checkpoint"], f"is a checkpoint; type --resume {run}")
    (run / "config.json").write_text("[]")
    refused(["--resume", run], "config.json")


def test_a_run_without_a_checkpoint_says_so_and_keeps_its_logs(run, finished):
    for folder in run.glob("checkpoint*"):
        shutil.rmtree(folder)
    assert "no checkpoint" in resume(run).out
    same(run, finished)
    kept = {path.name.split(".json")[0]: path for path in run.glob("*.jsonl.*")}
    assert len(kept) == 2
    assert all(path.read_bytes() == (finished / f"{name}.jsonl").read_bytes() for name, path in kept.items())


# ----------------------------------------------------------------------------------------- checkpoints that are damaged


def test_a_truncated_checkpoint_gives_way_to_an_earlier_one(run, finished):
    for folder, name in (("checkpoint", "trainer.pt"), ("checkpoint-5", "model.safetensors")):
        path = run / folder / name
        path.write_bytes(path.read_bytes()[:1000])
    out = resume(run).out
    assert "resumed after step 4" in out and out.count("cannot go on from") == 2
    same(run, finished)


def spoil_state(change):
    def spoil(folder):
        state = torch.load(folder / "trainer.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "trainer.pt")
    return spoil


def another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


def nan_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


SPOILED = {  # what happens to the newest checkpoint, and a word that tells of it
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "no chat template": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat template has changed"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "a weight is NaN": (nan_weight, "not finite, first in model.norm.weight"),
    "the settings are missing": (spoil_state(lambda state: state.pop("config")), "'config'"),
    "the optimizer is missing": (spoil_state(lambda state: state.pop("optimizer")), "'optimizer'"),
    "state of another kind": (lambda folder: torch.save([1, 2], folder / "trainer.pt"), "trainer.pt"),
    "another model": (another_model, "cannot load"),
    "a pickle that would run code": (lambda folder: torch.save(print, folder / "trainer.pt"), "weights_only"),
    "json too deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "cannot load"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_checkpoint_gives_way_to_the_one_before(case, run, refused, capsys, quiet_signals):
    spoil, word = SPOILED[case]
    spoil(run / "checkpoint")
    for step in range(1, 5):
        shutil.rmtree(run / f"checkpoint-{step}")
    assert aspo.main(["--resume", str(run), "--steps", "7", "--eval_every", "0"]) == 0
    said = [text for text in capsys.readouterr().out.splitlines() if "going on from step 5" in text]
    assert len(said) == 1 and f"cannot go on from {run / 'checkpoint'}: " in said[0] and word in said[0]


def test_no_checkpoint_is_good(run, refused):
    shutil.copytree(run, copied := run.parent / "copied")
    for folder in copied.glob("checkpoint*"):
        (folder / "trainer.pt").write_bytes(b"")
    refused(["--resume", copied, "--steps", "9"], "cannot go on from", "checkpoint-1")
    same(copied, run)  # nothing was touched
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"lr": 0.5}))
    refused(["--resume", run, "--steps", "9"], "belongs to another run", "--lr")


def test_logs_shorter_than_the_checkpoint_knows(run, refused):
    (run / "metrics.jsonl").write_text("")
    refused(["--resume", run, "--steps", "9"], "shorter")


@pytest.mark.parametrize("change, word", [({"lr": None}, "--lr"), ({"lr": "1"}, "--lr"), ({"knob": 1}, "knob"),
                                          ("[" * 100_000, "config.json"), ('{"lr": ', "config.json"),
                                          ("{}\0", "config.json")], ids=lambda change: str(change)[:20])
def test_settings_that_cannot_be_read(run, refused, change, word):
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(change if isinstance(change, str) else json.dumps(saved | change))
    refused(["--resume", run, "--steps", "9"], word)


def test_names_that_only_look_like_checkpoints(run, finished):
    back_to(run, 5)
    for name in ("checkpoint-²", "checkpoint-x", "checkpoint-"):
        (run / name).mkdir()
    assert "resumed after step 5" in resume(run).out
    same(run, finished)


def test_a_checkpoint_that_is_a_link(run, finished, tmp_path):
    back_to(run, 4)
    shutil.copytree(run / "checkpoint", tmp_path / "elsewhere")
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint").symlink_to(tmp_path / "elsewhere")
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert "resumed after step 4" in resume(run).out
    same(run, finished)
    assert (tmp_path / "elsewhere" / "trainer.pt").exists()


@pytest.mark.parametrize("what", ["data", "model"])
def test_problems_and_the_initial_model_are_the_same_when_a_run_goes_on(what, finished, tmp_path, refused):
    """The KL is to the initial model, and the order of problems depends on all of them."""
    model, data = shutil.copytree(finished / "checkpoint-1", tmp_path / "model"), tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{a}+{b}+1+2", "answer": a + b + 3}) + "\n"
                            for a in range(1, 6) for b in range(1, 6)))
    flags = ["--model", model, "--data", data, "--instruction", "", "--kl_coef", "0.1", "--out", tmp_path / "run"]
    assert aspo.main([*map(str, flags), *FLAGS[2:], "--steps", "1"]) == 0
    if what == "data":
        data.write_text(data.read_text().replace("1+1+1+2", "1+1+1+3"))
    else:
        shutil.copy(finished / "checkpoint" / "model.safetensors", model)
    refused(["--resume", tmp_path / "run", "--steps", "2"], f"--{what} ", "has changed")


# -------------------------------------------------------------------------------------------------- signals and streams


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_a_resume_ends_the_same(tmp_path, finished, number):
    run = tmp_path / "run"
    process = Process("--steps", 6, "--out", run, *FLAGS, "--save_every", 0)
    wait_for(lambda: has_lines(run), process)
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert "stopping after this step" in process.err and "Traceback" not in process.err
    done = len(lines(run))
    assert 0 < done < 6 and (run / "checkpoint" / "trainer.pt").exists() and f"--resume {run}" in process.out
    resume(run)
    same(run, finished)


def test_a_second_signal_leaves_at_once(run):
    slow = "import time, torch\ntorch.optim.AdamW.step = lambda *_: time.sleep(600)"
    process = Process("--resume", run, "--steps", 500, before=slow)
    wait_for(lambda: "resumed" in process.out, process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping after this step" in process.err, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT  # the step alone would take an hour


def test_ctrl_c_in_the_warm_up_ends_at_once(tmp_path):
    told = """
import random
real = random.Random.choices
random.Random.choices = lambda *args, **options: print("warm", flush=True) or real(*args, **options)
"""
    process = Process("--out", tmp_path / "run", *FLAGS, "--sft_steps", 10**6, before=told)
    wait_for(lambda: "warm" in process.out, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and not process.err and not (tmp_path / "run").exists()


def test_two_runs_in_one_folder(run, finished):
    """Also nohup, where a closed terminal must not end the run, with a disk full of its output and no stderr."""
    back_to(run, 2)
    first = Process("--resume", run, stdout="/dev/full", stderr="closed",
                    before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    wait_for(lambda: len(lines_so_far(run)) == 3, first)
    first.send_signal(signal.SIGSTOP)
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    second = resume(run, status=2)
    check_line(second.err, str(run), "is running")
    assert before == {path: path.read_bytes() for path in run.glob("*.json*")}
    first.send_signal(signal.SIGCONT)
    first.send_signal(signal.SIGHUP)
    assert first.wait() == 0
    same(run, finished)


def test_output_is_not_the_run(run, finished):
    """`| head -1` and `2>&-`, then ASCII."""
    back_to(run, 4)
    reader, writer = os.pipe()
    process = Process("--resume", run, stdout=f"/proc/{os.getpid()}/fd/{writer}", stderr="closed")
    assert os.read(reader, 5) == b"model"
    os.close(reader)
    os.close(writer)
    assert process.wait() == 0
    same(run, finished)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"model": "ü\u2028"}))
    process = resume(run, "--steps", "7", status=2, env={"PYTHONIOENCODING": "ascii"})
    check_line(process.err, "belongs to another run: its --model is tiny")
    odd = run.parent / "läuft"
    process = run_script("--out", odd, "--steps", 1, *FLAGS, env={"PYTHONIOENCODING": "ascii"})
    assert "l?uft" in process.out and lines(odd)


def test_a_terminal_that_is_closed(tmp_path, finished):
    """A window that is shut: the terminal is gone, and the signal says so. On a terminal there are bars."""
    run, (master, slave) = tmp_path / "run", pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "aspo.py"), "--steps", "6", "--out", str(run), *FLAGS], env=ENV,
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))  # which makes it the controlling terminal
    os.close(slave)
    seen = b""
    while b"step 2/6" not in seen:
        seen += os.read(master, 1000)
    os.close(master)
    assert process.wait(120) == 128 + signal.SIGHUP
    assert b"warm-up" in seen and b"sampling" in seen
    assert 2 <= len(lines(run)) < 6
    resume(run)
    same(run, finished)


# ------------------------------------------------------------------------------------------------ disks and permissions


def limit_files(size):
    """What a full disk looks like to a program: writing fails half-way."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


@pytest.mark.parametrize("kind", ["checkpoint", "log", "device"])
def test_a_full_disk_keeps_the_last_checkpoint(kind, run, finished):
    back_to(run, 3)
    if kind == "checkpoint":
        words, before = "cannot save step 4", limit_files((run / "checkpoint" / "trainer.pt").stat().st_size // 2)
    elif kind == "log":  # room for 3 steps and a part of the fourth
        logged = [text for text in (run / "samples.jsonl").read_text().splitlines(True) if json.loads(text)["step"] < 4]
        words, before = "cannot write step 4 to", limit_files(len("".join(logged)) + 300)
    else:
        words = f"cannot save step 4 in {run}/checkpoint.tmp: [Errno {errno.EIO}] {os.strerror(errno.EIO)}"
        before = f"import os\ndef fsync(fd): raise OSError({errno.EIO}, {os.strerror(errno.EIO)!r})\nos.fsync = fsync"
    check_line(resume(run, status=2, before=before).err, words, "of step 3", f"--resume {run}")
    assert not (run / "checkpoint.tmp").exists()
    resume(run)
    same(run, finished)


def test_a_full_disk_keeps_the_settings(run, tmp_path):
    before = (run / "config.json").read_text()
    check_line(resume(run, "--steps", 9, status=2, before=limit_files(600)).err, f"cannot write in --out {run}")
    assert (run / "config.json").read_text() == before
    new = tmp_path / "new"
    check_line(run_script("--out", new, *FLAGS, status=2, before=limit_files(600)).err, f"cannot write in --out {new}")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path, refused):
    tmp_path.chmod(0o500)
    refused(["--out", tmp_path / "run"], "cannot write")


def test_a_run_folder_that_cannot_be_made(tmp_path, refused):
    (tmp_path / "file").write_text("")
    refused(["--out", tmp_path / "file" / "run", *FLAGS], "cannot write")


def test_a_group_may_read_what_its_umask_lets_it(run):
    back_to(run, 5)
    resume(run, before="import os; os.umask(0o002)")
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (run / "checkpoint").iterdir()}
    assert set(modes.values()) == {"0o664"} and "model.safetensors" in modes, modes


# ----------------------------------------------------------------------------------------------- models that are broken


@pytest.fixture
def learned(finished, tmp_path):
    """A tiny model that has learned a little, as a folder."""
    return shutil.copytree(finished / "checkpoint", tmp_path / "model")


def test_a_learning_rate_that_breaks_the_model(tmp_path):
    out = tmp_path / "run"
    process = run_script("--steps", 6, "--out", out, *FLAGS, "--lr", "1e30", status=1)
    check_line(process.err, "an update has broken the model", "lower --lr")
    assert not (out / "checkpoint").exists() and len(lines(out)) <= 2
    assert "max_new_tokens" not in process.out


@pytest.mark.parametrize("damage", ["NaN", "noise", "one answer"])
def test_a_broken_model_does_not_replace_the_last_good_checkpoint(damage, run, refused, monkeypatch):
    back_to(run, 3)
    spoil_state(lambda state: state.update(before=0.5))(run / "checkpoint")  # it could add once
    real = Policy.optimizer_step

    @torch.no_grad()
    def step(policy):
        norm = real(policy)
        weight = policy.model.model.norm.weight
        weight.copy_({"NaN": weight * math.nan, "noise": weight * 0, "one answer": weight * 1e6}[damage])
        return norm

    monkeypatch.setattr(Policy, "optimizer_step", step)
    refused(["--resume", run], "broken the model", "the checkpoint of step 3 is good", status=1)
    assert torch.load(run / "checkpoint" / "trainer.pt", weights_only=True)["step"] == 3
    assert [row["step"] for row in lines(run)] in ([1, 2, 3], [1, 2, 3, 4]) and lines(run, "samples.jsonl")
    copied = shutil.copytree(run, run.parent / "copied")  # this process still holds the other folder
    resume(copied)
    assert len(lines(copied)) == 6


def test_a_model_that_never_knew_anything_is_not_saved_as_nan(tmp_path, refused, monkeypatch):
    """Accuracy 0 from the start says nothing, NaN does."""
    real = Policy.optimizer_step

    @torch.no_grad()
    def step(policy):
        policy.model.model.norm.weight.mul_(math.nan)
        return real(policy)

    monkeypatch.setattr(Policy, "optimizer_step", step)
    monkeypatch.setattr(aspo, "right_answer", lambda response, problem: 0.0)
    monkeypatch.setattr(aspo, "is_uniform", lambda group: False)
    monkeypatch.setattr(aspo, "group_advantages", lambda rewards, divide: torch.ones_like(rewards))
    refused(["--out", tmp_path / "run", "--steps", "3", *FLAGS, "--sft_steps", "0"], "broken the model", status=1)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_weights_that_are_not_finite_are_named(learned, refused, tmp_path):
    nan_weight(learned)
    flags = ["--model", learned, "--data", "arithmetic", "--out", tmp_path / "run"]
    refused(flags, f"--model {learned}", "not finite, first in model.norm.weight")
    assert not (tmp_path / "run").exists()


def test_code_that_a_model_brings_is_not_run(learned, refused, tmp_path, monkeypatch):
    """As `yes | python aspo.py`: nobody is asked, either."""
    marker = tmp_path / "it ran"
    (learned / "own.py").write_text(f"open({str(marker)!r}, 'w')\n"
                                    "from transformers import Qwen2Config as Own, Qwen2ForCausalLM as Net\n")
    config = json.loads((learned / "config.json").read_text())
    (learned / "config.json").write_text(json.dumps(
        config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Net"}}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    refused(["--model", learned, "--data", "arithmetic", "--out", tmp_path / "run"], f"cannot load --model {learned}")
    assert not marker.exists() and not (tmp_path / "run").exists()


def test_a_model_of_a_known_kind_does_not_run_its_own_code(learned, tmp_path, monkeypatch, quiet_signals):
    marker = tmp_path / "it ran"
    (learned / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((learned / "config.json").read_text())
    (learned / "config.json").write_text(json.dumps(
        config | {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Net"}}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    aspo.main(["--model", str(learned), "--data", "arithmetic", "--out", str(tmp_path / "run"), "--steps", "1", *FLAGS])
    assert not marker.exists()


def test_stop_tokens_of_any_kind(learned, refused, tmp_path, quiet_signals):
    path = learned / "generation_config.json"
    for eos in ([1, None, "x"], "x", None, [-1, 1], 1.5):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
        out = tmp_path / f"run{eos}".replace("/", "")
        status = aspo.main(["--model", str(learned), "--data", "arithmetic", "--out", str(out), "--steps", "1", *FLAGS])
        assert status in (0, 2) and out.exists() == (status == 0)


def test_a_seed_of_any_size(tmp_path, quiet_signals):
    for seed in (2**32, 2**64):
        assert aspo.main(["--seed", str(seed), "--steps", "1", "--out", str(tmp_path / str(seed)), *FLAGS]) == 0


# -------------------------------------------------------------------------------------------- inside one optimiser step


def make_policy(tiny, **settings):
    """A policy of the tiny model with plain gradient descent: Adam would hide what a gradient's size is."""
    common = dict(minibatch=1, epochs=1, group_size=4, prompts=2, instruction="", max_new_tokens=16)
    torch.manual_seed(0)
    policy = Policy(*tiny, Config(**common | settings), [aspo.make_problem({"problem": "1+2", "answer": "3"})])
    policy.optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    policy.schedule = torch.optim.lr_scheduler.ConstantLR(policy.optimizer, 1.0)
    return policy


def rollout(tokenizer, groups=2):
    torch.manual_seed(1)
    samples = []
    for g in range(groups):
        for k in range(4):
            response = torch.randint(4, 18, (5 + 3 * k,)).tolist() + [tokenizer.eos_token_id]
            samples.append(Sample("1+2", "3", tokenizer("1+2=").input_ids, response, advantage=(-1.0) ** k * (1 + g),
                                  sampler_logp=torch.zeros(len(response))))
    return samples


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


def test_a_gradient_that_is_not_finite_skips_the_step(tiny):
    policy, samples = make_policy(tiny), rollout(tiny[1])
    before = weights(policy)
    samples[0].advantage = math.inf
    _, norms = aspo.update(policy, samples, policy.cfg)
    assert not math.isfinite(norms[0]) and math.isfinite(norms[1])
    after = weights(policy)
    assert after.isfinite().all() and (after != before).any()  # the second mini-batch made its step
    samples[4].advantage = math.nan
    _, norms = aspo.update(policy, samples, policy.cfg)
    assert not any(map(math.isfinite, norms)) and weights(policy).equal(after)


def test_many_skipped_steps_end_the_run_with_a_good_checkpoint(tmp_path, monkeypatch, quiet_signals):
    monkeypatch.setattr(aspo, "group_advantages", lambda rewards, divide: torch.full_like(rewards, math.nan))
    out = tmp_path / "run"
    with pytest.raises(Broken, match="1[0-9] optimiser steps"):
        aspo.train(aspo.parse(["--out", str(out), "--steps", "20", *FLAGS]))
    metrics = lines(out)
    assert sum(m["skipped_steps"] for m in metrics) >= aspo.MAX_SKIPPED > sum(m["skipped_steps"] for m in metrics[:-1])
    assert all(m["grad_norm"] == 0 for m in metrics)
    state = torch.load(out / "checkpoint" / "trainer.pt", weights_only=True)
    assert state["step"] == metrics[-1]["step"]
    assert all(x.isfinite().all() for x in load_file(out / "checkpoint" / "model.safetensors").values())


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(tiny):
    """fp16's loss scaling is only logic, and runs on a CPU: 2^127 overflows until it has been halved enough."""
    policy = make_policy(tiny, epochs=10)
    policy.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    before = weights(policy)
    _, norms = aspo.update(policy, rollout(tiny[1]), policy.cfg)
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert 0 < skipped < len(norms) and policy.scaler.get_scale() == 2.0 ** (127 - skipped)
    assert weights(policy).isfinite().all() and (weights(policy) != before).any()


def test_a_scaled_step_is_the_plain_one(tiny):
    model, tokenizer = tiny
    start, results = {name: p.clone() for name, p in model.state_dict().items()}, []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model.load_state_dict(start)
        policy = make_policy(tiny, grad_clip=0.1)
        policy.scaler = scaler or policy.scaler
        results.append((aspo.update(policy, rollout(tokenizer), policy.cfg)[1], weights(policy)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5) and results[0][0][0] > 0.1
    torch.testing.assert_close(results[0][1], results[1][1])


# -------------------------------------------------------------------------------------------------------- out of memory


ERRORS = {"CUDA": torch.OutOfMemoryError("CUDA out of memory"), "Python": MemoryError(),
          "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
          "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
          "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")}


@pytest.mark.parametrize("name", ERRORS)
def test_out_of_memory_where_smaller_batches_are_no_cure(name, capsys):
    """Such as at the optimiser's first step, which makes its moments."""
    def fail(argv):
        raise ERRORS[name]

    assert aspo.main([], fail) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory") and error.count("\n") == 1 and "--gradient_checkpointing" in error


def test_a_model_that_nobody_uses_is_gone_at_once():
    """Without the garbage collector: two that eval.py compares might not fit into memory together."""
    parts = aspo.tiny_model()
    policy = make_policy(parts)
    policy.generate([[5, 6]])
    model = weakref.ref(policy.model)
    del policy, parts
    assert model() is None


@pytest.mark.parametrize("engine, name", [("fast", "CUDA"), ("plain", "cuBLAS"), ("fast", "Python"), ("fast", "CPU"),
                                          ("fast", "Windows")])
def test_out_of_memory_in_an_update_halves_the_micro_batch(engine, name, tiny, monkeypatch, capsys):
    model, tokenizer = tiny
    start, results, seen = {key: p.clone() for key, p in model.state_dict().items()}, [], []

    def limited(policy, samples):
        logp = real(policy, samples)
        seen.append(sum(len(s.response) for s in samples))
        if seen[-1] > 18 and (policy.calls > 1 or len(samples) > 2):
            raise ERRORS[name]
        policy.calls += 1
        return logp

    real = Policy.token_logp
    for forward in (real, limited):
        model.load_state_dict(start)
        policy = make_policy(tiny, epochs=2, micro_tokens=100, engine=engine)
        policy.calls = 0
        monkeypatch.setattr(Policy, "token_logp", forward)
        aspo.update(policy, rollout(tokenizer), policy.cfg)
        monkeypatch.setattr(Policy, "token_logp", real)
        results.append(weights(policy))
    assert policy.micro_tokens < 100 and max(seen) > 18 and policy.cfg.micro_tokens == 100
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    halvings = round(math.log2(100 / policy.micro_tokens) + 0.4)
    assert capsys.readouterr().out.count("out of memory") == halvings  # each said once


def test_a_gradient_that_was_half_done_is_begun_anew(tiny, monkeypatch):
    """Memory runs out behind the backward pass of a first micro-batch."""
    model, tokenizer = tiny
    start, real, results, passes = {key: p.clone() for key, p in model.state_dict().items()}, Policy.token_logp, [], []

    def limited(policy, samples):
        passes.append(1) if torch.is_grad_enabled() else None
        if fails and len(passes) == 2:
            raise ERRORS["CUDA"]
        return real(policy, samples)

    monkeypatch.setattr(Policy, "token_logp", limited)
    for fails in (False, True):
        model.load_state_dict(start)
        passes.clear()
        policy = make_policy(tiny, micro_tokens=30)
        aspo.update(policy, rollout(tokenizer), policy.cfg)
        results.append(weights(policy))
    assert policy.micro_tokens < 30 and len(passes) > 4
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_out_of_memory_in_an_update_that_nothing_can_help(tiny, monkeypatch):
    policy = make_policy(tiny, micro_tokens=100)
    monkeypatch.setattr(Policy, "token_logp", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match="out of memory with --micro_tokens"):
        aspo.update(policy, rollout(tiny[1]), policy.cfg)


def test_another_runtime_error_is_not_taken_for_too_little_memory(tiny, monkeypatch):
    policy = make_policy(tiny)
    monkeypatch.setattr(Policy, "token_logp", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        aspo.update(policy, rollout(tiny[1]), policy.cfg)
    assert policy.micro_tokens == policy.cfg.micro_tokens


@pytest.mark.parametrize("engine, name", [("fast", "CUDA"), ("plain", "CPU"), ("fast", "Python")])
def test_out_of_memory_in_sampling_samples_fewer_rows(engine, name, tiny, monkeypatch):
    problems = [aspo.make_problem({"problem": f"{i}+1", "answer": "0"}) for i in range(5)]
    policy, rows = make_policy(tiny, sample_rows=32, max_new_tokens=4, engine=engine), []
    real = policy.engine.generate

    def limited(policy, prompts):
        rows.append(len(prompts))
        if rows[-1] > limit:
            raise ERRORS[name]
        return real(policy, prompts)

    policy.engine = policy.engine._replace(generate=limited)
    for limit, largest in ((9, 8), (3, 2)):  # below the group size of 4 a group is sampled in shares
        policy.sample_rows = 32
        samples = aspo.roll_out(policy, problems, 4, policy.cfg)
        assert [s.problem for s in samples] == [row["problem"] for row in problems for _ in range(4)]
        assert all(s.prompt == policy.encode(aspo.make_problem({"problem": s.problem, "answer": "0"})) for s in samples)
        assert policy.sample_rows == largest and max(r for r in rows if r <= limit) == largest
    limit = 0
    with pytest.raises(UserError, match="out of memory with --sample_rows 1"):
        aspo.roll_out(policy, problems, 4, policy.cfg)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_the_allocator_of_the_cpu_fails(tmp_path):
    """As under `ulimit -v`, with 150 MiB more than the libraries take."""
    limit = """
import resource
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (150 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
"""
    flags = ("--steps 1 --sft_steps 20 --prompts 32 --group_size 16 --minibatch 32 --max_new_tokens 100 "
             "--eval_problems 8 --overlong_buffer 99 --sample_rows 512 --micro_tokens 100000").split()
    process = run_script("--out", tmp_path / "run", *flags, before=limit)
    assert "out of memory: --micro_tokens is " in process.out and process.err == ""
    assert lines(tmp_path / "run")[0]["grad_norm"] > 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_over_200_steps(tmp_path):
    run = tmp_path / "run"
    process, marks = Process("--steps", 210, "--out", run, *FLAGS, "--save_every", 20), []
    for step in (50, 200):
        wait_for(lambda: has_lines(run) and len(lines_so_far(run)) >= step, process)
        marks.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
    assert process.wait() == 0
    assert marks[1] / marks[0] < 1.05

"""Nothing is lost and nothing runs in silence: kills, signals, exceptions, damaged folders, broken models, too little
memory."""
import json
import os
import re
import shutil
import signal
import threading

import pytest
import torch
from conftest import error_of, made_up_samples, sgd_policy
from kill import FLAGS, has_lines, kill_and_compare, lines, newest, same
from processes import Process, run as run_script

import aspo
from aspo import UserError

KEEP = """
import re, shutil
real = shutil.rmtree
shutil.rmtree = lambda path, *rest, **more: re.fullmatch("checkpoint-[0-9]+", path.name) or real(path, *rest, **more)
"""
STEPS = 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with every checkpoint, which the tests copy."""
    run = tmp_path_factory.mktemp("faults") / "run"
    run_script("--steps", STEPS, "--out", run, *FLAGS, before=KEEP)
    assert len(list(run.glob("checkpoint-*"))) == STEPS
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def back_to(run, step):
    """As if the run had been killed after the save of this step; 0: before the first."""
    for folder in run.glob("checkpoint-*"):
        if int(folder.name[11:]) > step:
            shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------------- kills and going on

def test_killed_runs_end_as_if_never_stopped(tmp_path):
    hits = kill_and_compare(3, tmp_path, steps=12)
    assert sum(hits.values()) > 0
    assert {path.name for path in (tmp_path / "whole").glob("checkpoint*")} == {"checkpoint-11", "checkpoint-12"}


def test_resume_drops_what_was_logged_later_and_ends_the_same(run, finished):
    """Also a line that a kill has torn, and folders that only look like checkpoints."""
    back_to(run, 3)
    (run / "unfinished").mkdir()
    (run / "checkpoint-x").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "torn')
    assert aspo.main(["--resume", str(run)]) == 0
    (run / "checkpoint-x").rmdir()
    same(run, finished)


def test_a_finished_run_goes_on_with_more_steps_and_says_what_else_was_typed(run, capsys):
    assert "--steps" in error_of(capsys, "--resume", run)
    assert aspo.main(["--resume", str(run), "--steps", str(STEPS + 1), "--lr", "0.001", "--eval_every", "0"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"--lr\b.*2e-05.*0.001", said) and "--loss" not in said.partition("model ")[0]
    assert [row["step"] for row in lines(run)] == [*range(1, STEPS + 2)]
    assert lines(run)[-1]["lr"] == pytest.approx(0.001) and "heldout_accuracy" in lines(run)[-1]
    assert aspo.parse(["--resume", str(run)]).lr == 0.001  # it is remembered


DAMAGE = {
    "state cut off": lambda folder: (folder / "trainer.pt").write_bytes((folder / "trainer.pt").read_bytes()[:1000]),
    "a pickle that would run code": lambda folder: torch.save(print, folder / "trainer.pt"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(case, run, capsys):
    DAMAGE[case](newest(run))
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    assert str(newest(run)) in error_of(capsys, "--resume", run, "--steps", 9)
    assert before == {path: path.read_bytes() for path in run.glob("*.json*")}


@pytest.mark.parametrize("change", ["[]", '{"lr": ', {"lr": "fast"}, {"steps": None}], ids=str)
def test_settings_that_cannot_be_read_are_one_line(change, run, capsys):
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(change if isinstance(change, str) else json.dumps(saved | change))
    error_of(capsys, "--resume", run, *(["--steps", 9] if "steps" not in change else []))


# ---------------------------------------------------------------------------------------- signals, exceptions, the lock

def test_a_signal_saves_and_a_resume_ends_the_same(tmp_path, finished):
    run, number = tmp_path / "run", signal.SIGINT
    process = Process("--steps", STEPS, "--out", run, *FLAGS, "--save_every", 0)
    assert process.wait_for(lambda: has_lines(run))
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert "stopping after this step" in process.err and "Traceback" not in process.err
    assert 0 < len(lines(run)) < STEPS and f"--resume {run}" in process.out
    assert aspo.main(["--resume", str(run)]) == 0
    same(run, finished)


def test_ctrl_c_in_the_warm_up_ends_at_once_and_the_folder_can_be_taken_again(tmp_path):
    run, told = tmp_path / "run", """
import random
real = random.Random.choices
random.Random.choices = lambda *args, **options: print("warm", flush=True) or real(*args, **options)
"""
    process = Process("--out", run, *FLAGS, "--sft_steps", 10**6, before=told)
    assert process.wait_for(lambda: "warm" in process.out)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and not process.err
    assert aspo.main(["--out", str(run), *FLAGS, "--steps", "1", "--sft_steps", "1"]) == 0


NUMBERS = (signal.SIGINT, signal.SIGTERM)


def fails_in_step(happen, step, prompts_per_step=16):
    """A reward that does something in the middle of a step, and else pays for length."""
    calls = []

    def reward(response, row):
        calls.append(response)
        if len(calls) == 8 * 2 + (step - 1) * prompts_per_step + 3:  # after the evaluation at the start
            happen()
        return len(response) / 10
    return reward


def press(times, number=signal.SIGINT):
    for _ in range(times):
        os.kill(os.getpid(), number)


def fail():
    raise RuntimeError("the step fails")


@pytest.mark.parametrize("happen, raised", [
    (lambda: press(2), KeyboardInterrupt),
    (lambda: press(1, signal.SIGTERM), SystemExit), (fail, RuntimeError)],
    ids=["Ctrl-C twice", "SIGTERM", "an exception"])
def test_in_a_notebook_lock_and_signals_are_given_back(happen, raised, tmp_path):
    """In one Python process: the same folder is resumed, and Ctrl-C is Python's own again."""
    cfg = aspo.parse(["--out", str(tmp_path / "run"), "--steps", "3", *FLAGS])
    before = list(map(signal.getsignal, NUMBERS))
    with pytest.raises(raised):
        aspo.train(cfg, reward=fails_in_step(happen, 2))
    assert list(map(signal.getsignal, NUMBERS)) == before
    assert len(lines(tmp_path / "run")) == (2 if raised is SystemExit else 1)
    with pytest.raises(KeyboardInterrupt):
        press(1)
    again = aspo.parse(["--resume", cfg.out])
    assert aspo.train(again, reward=fails_in_step(lambda: None, 1))["step"] == 3
    assert list(map(signal.getsignal, NUMBERS)) == before


def test_ctrl_c_while_a_thread_trains_is_the_main_threads(tmp_path):
    """It trains on, without handlers."""
    cfg = aspo.parse(["--out", str(tmp_path / "run"), "--steps", "2", *FLAGS])
    inside, go_on, results = threading.Event(), threading.Event(), []

    def reward(response, row):
        inside.set()
        assert go_on.wait(120)
        return 1.0

    thread = threading.Thread(target=lambda: results.append(aspo.train(cfg, reward=reward)))
    thread.start()
    assert inside.wait(120)
    with pytest.raises(KeyboardInterrupt):
        press(1)
    go_on.set()
    thread.join()
    assert results[0]["step"] == 2


def test_two_programs_in_one_folder(run, finished):
    """Resumed from the very start, too: there was no checkpoint yet."""
    back_to(run, 0)
    first = Process("--resume", run)
    assert first.wait_for(lambda: "a prompt" in first.out)
    first.send_signal(signal.SIGSTOP)
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    second = run_script("--resume", run, status=2)
    assert str(run) in second.err and "in use" in second.err and second.err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in run.glob("*.json*")}
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    same(run, finished)


# ----------------------------------------------------------------------------------------------- models that are broken

def test_a_learning_rate_that_breaks_the_model_ends_the_run(tmp_path, capsys):
    """In one line; no number that is not finite gets into the log."""
    out = tmp_path / "run"
    error = error_of(capsys, "--steps", 6, "--out", out, *FLAGS, "--lr", "1e30", "--save_every", 0)
    assert "lower --lr" in error and "step" in error
    assert len(lines(out)) < 6 and not any(out.glob("checkpoint-*"))


# -------------------------------------------------------------------------------------------------------- out of memory

ERRORS = {"CUDA": torch.OutOfMemoryError("CUDA out of memory"),
          "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
          "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")}
SHORT = dict(minibatch=1, epochs=2, prompts=2, micro_tokens=100, lr=0.1)


@pytest.mark.parametrize("name", ERRORS)
def test_out_of_memory_in_an_update_halves_the_micro_batch(name, tiny, monkeypatch, capsys):
    """It runs out behind the backward pass of a first micro-batch, too: the gradient is begun anew."""
    real, results, seen, passes = aspo.token_logp, [], [], []

    def limited(policy, model, samples):
        seen.append(len(samples) * max(len(s.prompt + s.response) for s in samples))
        passes.append(torch.is_grad_enabled())
        if seen[-1] > 50 or (passes[-1] and sum(passes) == 2):
            raise ERRORS[name]
        return real(policy, model, samples)

    for forward in (real, limited):
        policy = sgd_policy(tiny, **SHORT)
        monkeypatch.setattr(aspo, "token_logp", forward)
        aspo.update(policy, made_up_samples(tiny[1], groups=2), policy.cfg)
        monkeypatch.setattr(aspo, "token_logp", real)
        results.append(torch.cat([p.detach().flatten().clone() for p in policy.model.parameters()]))
    assert policy.micro_tokens == 25 and max(seen) > 50 and policy.cfg.micro_tokens == 100
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().out.count("out of memory") == 2  # each halving is said once


def test_errors_that_smaller_batches_do_not_cure(tiny, monkeypatch):
    policy = sgd_policy(tiny, **SHORT)
    for error, kind, words in ((ERRORS["CUDA"], UserError, "out of memory with --micro_tokens"),
                               (RuntimeError("shapes differ"), RuntimeError, "shapes differ")):
        def fail(*args):
            raise error

        monkeypatch.setattr(aspo, "token_logp", fail)
        with pytest.raises(kind, match=words):
            aspo.update(policy, made_up_samples(tiny[1], groups=2), policy.cfg)


def test_out_of_memory_in_sampling_samples_fewer_rows(tiny, monkeypatch):
    problems = [aspo.make_problem({"problem": f"{i}+1", "answer": "0"}) for i in range(5)]
    policy, rows, real = sgd_policy(tiny, sample_rows=32, max_new_tokens=4), [], aspo.generate

    def limited(policy, prompts):
        rows.append(len(prompts))
        if rows[-1] > limit:
            raise ERRORS["CPU"]
        return real(policy, prompts)

    monkeypatch.setattr(aspo, "generate", limited)
    for limit, largest in ((9, 8), (3, 2)):  # below the group size of 4 a group is sampled in shares
        policy.sample_rows = 32
        samples = aspo.roll_out(policy, problems, 4, policy.cfg)
        assert [s.problem for s in samples] == [row["problem"] for row in problems for _ in range(4)]
        assert policy.sample_rows == largest and max(r for r in rows if r <= limit) == largest
    limit = 0
    with pytest.raises(UserError, match="out of memory with --sample_rows 1"):
        aspo.roll_out(policy, problems, 4, policy.cfg)

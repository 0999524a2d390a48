"""Nothing is lost: kills, signals, full disks, damaged checkpoints, gradients that are not finite, too little memory."""
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from kill import FLAGS, kill_and_compare, lines, same, start

import aspo
from aspo import Config, Sample, UserError


def resume(run, *flags):
    """With as many threads as `start` uses: sums of another number of parts differ in the last bit on some processors."""
    return subprocess.run([sys.executable, str(ROOT / "aspo.py"), "--resume", str(run), *flags], capture_output=True, text=True,
                          timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 6 steps that kept every checkpoint, and which the tests copy."""
    run = tmp_path_factory.mktemp("faults") / "run"
    process = start("--steps", 6, "--out", run, *FLAGS, "--keep", 9)
    assert process.wait(240) == 0, process.stderr.read()
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


@pytest.fixture
def refused(monkeypatch, capsys):
    """main(arguments) exits with status 2 and one line that holds the given words."""
    monkeypatch.setattr(aspo, "Stop", lambda: None)  # leaves the test runner's own signal handlers in place

    def check(arguments, *words):
        assert aspo.main(list(map(str, arguments))) == 2
        check_line(capsys.readouterr().err, *words)
    return check


def check_line(stderr, *words):
    line = [text for text in stderr.splitlines() if text.startswith("error:")]
    assert len(line) == 1 and all(word in line[0] for word in words) and "Traceback" not in stderr, stderr


def test_killed_runs_end_as_if_never_stopped(tmp_path):
    hits = kill_and_compare(3, tmp_path, steps=15)
    assert sum(hits.values()) > 0


def test_resume_from_any_step(run, finished):
    back_to(run, 2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "torn')
    result = resume(run)
    assert result.returncode == 0 and "resumed after step 2" in result.stdout, result.stderr
    same(run, finished)


def test_killed_between_the_renames_of_a_save(run, finished):
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint.tmp").mkdir()
    result = resume(run)
    assert result.returncode == 0 and "resumed after step 5" in result.stdout, result.stderr
    same(run, finished)


def test_a_finished_run_goes_on_with_more_steps(run, refused):
    refused(["--resume", run], "--steps")
    result = resume(run, "--steps", "7", "--eval_every", "0", "--micro_tokens", "512")
    assert result.returncode == 0 and [row["step"] for row in lines(run)] == [*range(1, 8)], result.stderr


@pytest.mark.parametrize("flags", [["--lr", "0.5"], ["--loss", "grpo"], ["--seed", "3"], ["--group_size", "8"]])
def test_flags_that_alter_the_run_are_refused_by_name(run, flags, refused):
    before = (run / "metrics.jsonl").read_bytes()
    refused(["--resume", run, "--steps", "9", *flags], flags[0], flags[1])
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_truncated_checkpoint_gives_way_to_an_earlier_one(run, finished):
    for folder, name in (("checkpoint", "trainer.pt"), ("checkpoint-5", "model.safetensors")):
        path = run / folder / name
        path.write_bytes(path.read_bytes()[:1000])
    result = resume(run)
    assert result.returncode == 0 and "resumed after step 4" in result.stdout, result.stderr
    assert result.stdout.count("cannot read") == 2
    same(run, finished)


def test_a_foreign_or_missing_checkpoint(run, tmp_path, refused):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"lr": 0.5}))
    refused(["--resume", run, "--steps", "9"], "belongs to another run", "--lr")
    refused(["--resume", tmp_path / "nothing"], "config.json")
    (run / "config.json").write_text("[]")
    refused(["--resume", run], "config.json")


def test_logs_shorter_than_the_checkpoint_knows(run, refused):
    (run / "metrics.jsonl").write_text("")
    refused(["--resume", run, "--steps", "9"], "shorter")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_resume_ends_the_same(tmp_path, finished, number):
    run = tmp_path / "run"
    process = start("--steps", 6, "--out", run, *FLAGS, "--save_every", 0)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number and "stopping after this step" in error and "Traceback" not in error
    done = len(lines(run))
    assert 0 < done < 6 and (run / "checkpoint" / "trainer.pt").exists()
    assert resume(run).returncode == 0
    same(run, finished)


def test_a_second_signal_leaves_at_once(tmp_path):
    process = start("--steps", 500, "--out", tmp_path / "run", *FLAGS, "--sft_steps", 100000)
    while not (tmp_path / "run" / "config.json").exists():
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(20) == -signal.SIGINT  # the warm-up alone would take an hour


def test_a_full_disk_keeps_the_last_checkpoint(run, finished):
    """A limit on the size of files is what a full disk looks like to the program: writing fails half-way."""
    back_to(run, 3)
    biggest = (run / "checkpoint" / "trainer.pt").stat().st_size
    code = (f"import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({biggest // 2}, {biggest // 2}));"
            f"import aspo; sys.exit(aspo.main(['--resume', {str(run)!r}]))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2
    check_line(result.stderr, "cannot save step 4", "of step 3", "--resume")
    assert not (run / "checkpoint.tmp").exists()
    assert resume(run).returncode == 0
    same(run, finished)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path, refused):
    tmp_path.chmod(0o500)
    refused(["--out", tmp_path / "run"], "cannot write")


def test_a_run_folder_that_cannot_be_made(tmp_path, refused):
    (tmp_path / "file").write_text("")
    refused(["--out", tmp_path / "file" / "run"], "cannot write")


# ------------------------------------------------------------------------------------------- inside one optimiser step


def rollout(tokenizer, groups=2):
    torch.manual_seed(1)
    samples = []
    for g in range(groups):
        for k in range(4):
            response = torch.randint(4, 18, (5 + 3 * k,)).tolist() + [tokenizer.eos_token_id]
            samples.append(Sample("1+2", "3", tokenizer("1+2=").input_ids, response, "", 0.0, False, 0.0,
                                  advantage=(-1.0) ** k * (1 + g)))
    return samples


def one_update(model, tokenizer, samples, cfg, scaler=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return aspo.update(model, None, optimizer, scheduler, scaler, samples, cfg, contextlib.nullcontext)


def test_a_gradient_that_is_not_finite_skips_the_step(tiny):
    model, tokenizer = tiny
    before = {name: p.clone() for name, p in model.named_parameters()}
    samples = rollout(tokenizer)
    samples[0].advantage = math.inf
    _, norms = one_update(model, tokenizer, samples, Config(minibatch=1, epochs=1, group_size=4, prompts=2))
    assert not math.isfinite(norms[0]) and math.isfinite(norms[1])
    assert all(p.isfinite().all() for p in model.parameters())
    assert any((p != before[name]).any() for name, p in model.named_parameters())  # the second mini-batch made its step
    samples[4].advantage = math.nan
    before = {name: p.clone() for name, p in model.named_parameters()}
    _, norms = one_update(model, tokenizer, samples, Config(minibatch=1, epochs=1, group_size=4, prompts=2))
    assert not any(map(math.isfinite, norms)) and all(p.equal(before[name]) for name, p in model.named_parameters())


def test_many_skipped_steps_end_the_run_with_a_good_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aspo, "group_advantages", lambda rewards, divide: torch.full_like(rewards, math.nan))
    arguments = ["--out", str(tmp_path / "run"), "--steps", "20", *FLAGS]
    with pytest.raises(UserError, match="10 optimiser steps|1[0-9] optimiser steps"):
        aspo.train(aspo.parse(arguments))
    metrics = lines(tmp_path / "run")
    assert sum(m["skipped_steps"] for m in metrics) >= aspo.MAX_SKIPPED > sum(m["skipped_steps"] for m in metrics[:-1])
    assert all(m["grad_norm"] == 0 for m in metrics)
    model, _, state = aspo.load_checkpoint(aspo.parse(["--resume", str(tmp_path / "run")]))
    assert state["step"] == metrics[-1]["step"] and all(p.isfinite().all() for p in model.parameters())


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(tiny):
    """fp16's loss scaling is only logic, and runs on a CPU: a scale of 2^127 overflows until it has been halved enough."""
    model, tokenizer = tiny
    plain = {name: p.clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    cfg = Config(minibatch=1, epochs=10, group_size=4, prompts=2)
    _, norms = one_update(model, tokenizer, rollout(tokenizer), cfg, scaler)
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert 0 < skipped < len(norms) and scaler.get_scale() == 2.0 ** (127 - skipped)
    assert all(p.isfinite().all() for p in model.parameters())
    assert any((p != plain[name]).any() for name, p in model.named_parameters())


def test_a_scaled_step_is_the_plain_one(tiny):
    model, tokenizer = tiny
    start_weights = {name: p.clone() for name, p in model.state_dict().items()}
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model.load_state_dict(start_weights)
        one_update(model, tokenizer, rollout(tokenizer), Config(minibatch=1, epochs=1, group_size=4, prompts=2), scaler)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results)


def test_out_of_memory_in_an_update_halves_the_micro_batch(tiny, monkeypatch, capsys):
    model, tokenizer = tiny
    start_weights = {name: p.clone() for name, p in model.state_dict().items()}
    real, results, seen = aspo.token_logp, [], []

    def limited(model, packed, *rest):
        seen.append(packed.tokens.numel())
        if seen[-1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, packed, *rest)

    for forward in (real, limited):
        monkeypatch.setattr(aspo, "token_logp", forward)
        model.load_state_dict(start_weights)
        cfg = Config(minibatch=1, epochs=2, group_size=4, prompts=2, micro_tokens=100)
        one_update(model, tokenizer, rollout(tokenizer), cfg)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert cfg.micro_tokens == 25 and max(seen) > 30
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().out.count("out of GPU memory") == 2  # 100 -> 50 -> 25, each said once


def test_out_of_memory_in_sampling_samples_smaller_chunks(tiny, monkeypatch):
    model, tokenizer = tiny
    real, rows = aspo.sample, []

    def limited(model, prompts, group_size, **options):
        rows.append(len(prompts) * group_size)
        if rows[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, prompts, group_size, **options)

    monkeypatch.setattr(aspo, "sample", limited)
    problems = [{"problem": f"{i}+1", "answer": "0"} for i in range(5)]
    for limit, largest in ((9, 8), (3, 2)):  # below the group size of 4 a group is sampled in shares
        cfg = Config(sample_rows=32, max_new_tokens=4, instruction="")
        samples = aspo.roll_out(model, tokenizer, problems, 4, cfg)
        assert [s.problem for s in samples] == [row["problem"] for row in problems for _ in range(4)]
        assert all(s.prompt == aspo.encode(tokenizer, s.problem, cfg) for s in samples)
        assert cfg.sample_rows == largest and max(r for r in rows if r <= limit) == largest
    limit = 0
    with pytest.raises(UserError, match="out of GPU memory"):
        aspo.roll_out(model, tokenizer, problems, 4, Config(max_new_tokens=4, instruction=""))


def test_the_rehearsal_meets_the_longest_batches_and_changes_nothing(tmp_path, monkeypatch):
    sizes = []
    real = aspo.token_logp
    monkeypatch.setattr(aspo, "token_logp", lambda model, packed, *rest: sizes.append(packed.tokens.numel()) or real(model, packed, *rest))
    flags = ["--steps", "2", *FLAGS]
    for name, extra in (("plain", []), ("rehearsed", ["--rehearse", "True", "--micro_tokens", "200"])):
        sizes.clear()
        aspo.train(aspo.parse(["--out", str(tmp_path / name), *flags, *extra]))
    prompt = len("1+2+3+4=")
    assert prompt + (200 - prompt) // 16 * 15 in sizes
    assert [m["reward"] for m in lines(tmp_path / "plain")] == [m["reward"] for m in lines(tmp_path / "rehearsed")]


def test_memory_does_not_grow_over_200_steps(tmp_path):
    code = f"""
import aspo, resource, sys
marks, real = [], aspo.summary
def note(m, steps):
    if m["step"] in (50, 200):
        marks.append(int(open("/proc/self/statm").read().split()[1]))
    return real(m, steps)
aspo.summary = note
aspo.train(aspo.parse({["--out", str(tmp_path / "run"), "--steps", "200", *FLAGS, "--save_every", "20"]}))
print("growth", marks[1] / marks[0])
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from /proc")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("growth")[1]) < 1.05

"""The table of experiment.py on made-up runs, whose numbers are known; and that it starts only what is missing."""
import json
import subprocess

import experiment
import pytest
import torch

STEPS, K = 20, 16


def row(step: int, entropy: float, reward: float, **more) -> dict:
    weights = {f"weight_{sign}_{kind}": 1.0 for sign in ("pos", "neg") for kind in ("low", "high")}
    return {"step": step, "reward": reward, "entropy": entropy, "response_length": 8.0, "repetition": 0.0,
            "ratio_pos": 1.0, "ratio_neg": None, "approx_kl": 0.01} | weights | more


def make_run(out, loss: str, seed: int, *, lr="1e-5", entropy=0.5, heldout=(0.2, 0.9, 0.8), done=STEPS, samples=True):
    """Reward climbs by .05 a step from .05 to 1, entropy is `entropy` at first and half of it from step 11 on."""
    folder = out / f"{loss}-lr{lr}-s{seed}"
    (folder / "checkpoint").mkdir(parents=True)
    config = {"steps": STEPS, "eval_problems": 2, "loss": loss, "temperature": 0.8}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [row(step, entropy if step <= 10 else entropy / 2, step / 20) for step in range(1, STEPS + 1)]
    for step, value in zip((5, 10, 20), heldout):
        rows[step - 1]["heldout_accuracy"] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    torch.save({"step": done}, folder / "checkpoint" / "trainer.pt")
    # The first problem: four right in two wordings. The second: none right.
    found = [{"problem": "a", "response": f"is {i % 2}", "correct": i < 4} for i in range(K)]
    found += [{"problem": "b", "response": "no", "correct": False} for _ in range(K)]
    if samples:
        (folder / "eval").mkdir()
        (folder / "eval" / "heldout.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return folder


@pytest.fixture
def out(tmp_path):
    for seed, (grpo, aspo) in enumerate([(0.4, 0.5), (0.2, 0.6), (0.6, 0.7)]):
        make_run(tmp_path, "grpo", seed, entropy=grpo)
        make_run(tmp_path, "aspo", seed, entropy=aspo)
    make_run(tmp_path, "no-is", 0)
    make_run(tmp_path, "no-is", 1, done=10)  # was killed between the last line of the log and the last save
    make_run(tmp_path, "grpo", 0, lr="3e-5", samples=False)
    (tmp_path / "notes-lr-s").mkdir()
    return tmp_path


def cells(text: str, key: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {key}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_table_has_means_intervals_and_differences_by_seed(out, capsys):
    assert experiment.main(["--out", str(out), "--table"]) == 0
    text = capsys.readouterr().out
    one, other = text.split("learning rate 3e-5")
    assert "| grpo (3) | aspo (3) | no-is (1) | aspo minus grpo, by seed (3) |" in one
    assert "| grpo (1) |" in other and "minus" not in other
    # Of .4 .2 .6 and .5 .6 .7, halved: 4.303 x standard deviation / sqrt(3); the differences are .05 .2 .05.
    assert cells(one, "entropy (nats), last 5") == ["0.200 ± 0.248", "0.300 ± 0.124", "0.250", "0.100 ± 0.215"]
    assert cells(one, "held-out accuracy, last")[:3] == ["0.800 ± 0.000", "0.800 ± 0.000", "0.800"]
    assert cells(one, "held-out accuracy, best")[0] == "0.900 ± 0.000"
    assert cells(one, "reward, last 5")[0] == "0.900 ± 0.000"  # .8 .85 .9 .95 1
    assert cells(one, "entropy at step 10")[2] == "0.500"
    assert cells(one, "entropy when reward passes 0.90")[2] == "0.250"
    assert cells(one, "ratio, A < 0") == ["", "", "", ""]
    assert cells(one, "avg@16")[2] == "0.125" and cells(one, "pass@16")[2] == "0.500"
    assert cells(one, "different right responses of 16")[2] == "1.000"  # two wordings, and none
    assert cells(other, "avg@16") == [""]  # not evaluated yet
    assert (out / "curves.png").stat().st_size > 10_000


def test_equal_reward_is_one_that_every_run_reaches():
    climbs = [row(n, 0.0, n / 20) for n in range(1, 21)]
    stays = [row(n, 0.0, 0.42) for n in range(1, 21)]
    assert experiment.common_reward([climbs, stays]) == pytest.approx(0.4)
    assert experiment.common_reward([climbs]) == pytest.approx(0.9)
    rising = [row(n, n / 100, n / 20) for n in range(1, 21)]
    found = experiment.summary([*rising[:-1], rising[-1] | {"heldout_accuracy": 0.5}], [], 0.4)
    # The mean over five steps is .4 at steps 6 to 10, whose mean entropy is .08.
    assert found["entropy when reward passes 0.40"] == pytest.approx(0.08)


def test_only_what_is_missing_is_run(out, monkeypatch, capsys):
    """Finished runs are left alone, an interrupted one is resumed, and only what has no samples is sampled."""
    calls = []

    def call(script, *flags):
        calls.append([script, *map(str, flags)])
        return "error: in use" if "grpo-lr1e-5-s3" in str(flags) else ""

    monkeypatch.setattr(experiment, "call", call)
    monkeypatch.setattr(experiment, "write_heldout", lambda out, flags: None)
    monkeypatch.setattr(experiment, "report", lambda out: None)
    model = ["--model", "DIR", "--out", str(out), "--jobs", "1", "--epochs", "4"]
    assert experiment.main([*model, "--losses", "grpo", "no-is", "--seeds", "2"]) == 0
    assert [c[:3] for c in calls] == [["aspo.py", "--resume", str(out / "no-is-lr1e-5-s1")]]
    calls.clear()
    (out / "grpo-lr3e-5-s0" / "checkpoint-10").mkdir()
    assert experiment.main([*model, "--losses", "grpo", "--seeds", "1", "--lr", "3e-5"]) == 0
    assert [c[0] for c in calls] == ["eval.py"] and "0.8" in calls[0] and str(out / "heldout.jsonl") in calls[0]
    assert not (out / "grpo-lr3e-5-s0" / "checkpoint-10").exists() and (out / "grpo-lr3e-5-s0" / "checkpoint").exists()
    calls.clear()
    assert experiment.main([*model, "--losses", "grpo", "--seeds", "1", "--first_seed", "3"]) == 1
    assert "in use" in capsys.readouterr().err
    assert calls[0][0] == "aspo.py" and "--resume" not in calls[0]
    for flag, value in {"--data": "sums", "--loss": "grpo", "--lr": "1e-5", "--seed": "3", "--steps": "40",
                        "--epochs": "4", "--out": str(out / "grpo-lr1e-5-s3")}.items():
        assert calls[0][len(calls[0]) - calls[0][::-1].index(flag)] == value


def test_responses_are_read_at_three_stages(out, capsys):
    samples = [{"step": step, "problem": f"p{step}", "gold": "1", "response": f"r{step}-{i}", "reward": float(step > 5)}
               for step in range(1, 10) for i in range(4)]
    (out / "aspo-lr1e-5-s0" / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    assert experiment.main(["--out", str(out), "--read", "3"]) == 0
    text = capsys.readouterr().out
    assert [line.split("'")[-2] for line in text.splitlines() if "'" in line] == [
        "r1-0", "r1-1", "r1-2", "r4-0", "r4-1", "r4-2", "r9-1", "r9-2", "r9-3"]
    assert "mean reward 0.00" in text and "mean reward 1.00" in text


def test_held_out_problems_are_those_of_the_runs(tmp_path):
    flags = ["--model", "DIR", "--data", "sums", *experiment.REAL]
    rows = experiment.read_lines(experiment.write_heldout(tmp_path, flags))
    train, heldout = experiment.aspo.load_problems(experiment.aspo.parse(flags))
    assert len(rows) == 60 and [r["problem"] for r in rows] == [p["problem"] for p in heldout]
    assert not {r["problem"] for r in rows} & {p["problem"] for p in train}


def test_a_failed_program_is_told_by_its_last_line(monkeypatch):
    done = subprocess.CompletedProcess([], 2, "", "x\nerror: y\n")
    monkeypatch.setattr(experiment.subprocess, "run", lambda *_, **__: done)
    assert experiment.call("aspo.py") == "error: y"

"""The tables of experiment.py on made-up runs, whose numbers are known; its rule; and runs of two rollouts."""
import dataclasses
import json

import experiment
import pytest
import torch
from conftest import aspo, make_model


@pytest.mark.parametrize("text, expected", [
    ("3+6+2=9+2=11\n#### 11", "right by steps"),
    ("4+7=11\n#### 11", "right by steps"),  # two additions at once
    ("11\n#### 11", "right by steps"),
    ("3+6+3=9+2=11\n#### 11", "right, decorated"),
    ("5+6=11\n#### 11", "right, decorated"),  # of the right sum, but not from 3+1+5+2
    ("9\n#### 9", "right, decorated"),  # one was left out
    ("3+6+2=+\n#### 11", "right, decorated"),
    ("3+1+5+2=11\n#### 11", "repeats the question"),
])
def test_kinds(text, expected):
    sample = aspo.Sample("3+1+5+2", "11", [], [], text, correct=1.0)
    assert experiment.kind(sample) == expected
    assert experiment.kind(dataclasses.replace(sample, truncated=True)) == "cut off"
    if "right" in expected:
        assert experiment.kind(dataclasses.replace(sample, correct=0.0)) == "wrong"


def write(out, loss, seed, point=8, rate=4e-4, avg=0.5, entropy=0.4, heldout=(0.6, 0.7)):
    """Reward climbs by .1 from .11, entropy is halved from rollout 6 on."""
    rows = [{"reward": i / 10 + 0.01, "entropy": entropy / (1 + (i > 5)), "ratio_pos": 1.1} for i in range(1, 11)]
    for i, value in zip((4, 9), heldout):
        rows[i]["heldout_accuracy"] = value
    result = {"before": 0.3, "avg": avg, "pass": 0.9, "kinds": {"right by steps": 1, "right, decorated": 3, "wrong": 2},
              "rows": rows, "responses": [["1+1", "2", f"2 of {loss}", "right, decorated"]]}
    (out / f"{point}-{loss}-lr{rate:g}-s{seed}.json").write_text(json.dumps(result))


@pytest.fixture
def out(tmp_path):
    for seed, (a, b) in enumerate([(0.4, 0.5), (0.5, 0.5), (0.6, 0.8)]):
        write(tmp_path, "grpo", seed, avg=a)
        write(tmp_path, "aspo", seed, avg=b, entropy=0.2, heldout=[(0.6, 0.45), (0.6, 0.35), (0.4, 0.25)][seed])
        write(tmp_path, "no-is", seed)
        write(tmp_path, "grpo", seed, point=1, rate=8e-4)
        for loss in experiment.LOSSES:
            write(tmp_path, loss, seed, point=64, rate=1e-4)
    write(tmp_path, "grpo", 3)  # the others of this seed are not finished
    write(tmp_path, "grpo", 0, rate=8e-4, avg=0.0)  # a rate that was not chosen
    (tmp_path / "8-grpo-lr0.0004-s100-first12.json").write_text("{}")
    (tmp_path / "rates.json").write_text(json.dumps({"1": 8e-4, "8": 4e-4, "64": 1e-4}))
    return tmp_path


def test_tables_and_picture(out, capsys):
    experiment.main(["table", "--out", str(out)])
    short, one, eight, _ = capsys.readouterr().out.split(" optimiser steps per rollout")
    # .4 .5 .6 and the differences .1 0 .2: standard deviation .1, times 4.303 / sqrt(3).
    assert ("| 8 (0.0004; 3) | 0.500 ± 0.248 | +0.100 ± 0.248 | +0.000 ± 0.248 | 0.200 ± 0.000 | -0.100 ± 0.000 | "
            "+0.000 ± 0.000 | []; [1, 2]; [] |") in short
    assert "| above 1 together | 0.500 ± 0.124 | +0.050 ± 0.124 |" in short  # half of those at 8, as at 64 all are .5
    assert "| avg@16 | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.000 | +0.000" in one  # GRPO's runs, for all
    lines = {line.split(" | ")[0]: line.split(" | ")[1:] for line in eight.splitlines()}
    assert lines["| held-out accuracy, best"][1] == "0.533 ± 0.287"  # .6 .6 .4
    # Rollouts 2 to 6 are the first five above .4: four of entropy .4, one of .2.
    assert lines["| entropy when reward passes 0.4"][0] == "0.360 ± 0.000"
    assert lines["| of the right ones, right by steps"][0] == "0.250 ± 0.000"
    assert lines["| weight_pos"][0] == "" and lines["| ratio_pos"][0] == "1.100 ± 0.000"
    assert lines["| responses: right, decorated"][0] == "0.500 ± 0.000"
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    experiment.main(["read", "--out", str(out), "--points", "8"])
    text = capsys.readouterr().out
    assert text.count("2 of aspo") == 3 and "1 steps" not in text


@pytest.mark.parametrize("kl, expected", [
    (0.01, 8e-4),  # at a rate of 1e-3; .0016 at the start, 4e-4; .0064; .026 is too much
    (0.4, 2e-4),  # .064 is too much; .016
])
def test_the_rule_for_rates(monkeypatch, kl, expected):
    def run(out, point, loss, seed, rate, rollouts):
        assert (loss, seed, rollouts) == ("grpo", 100, 12)
        return {"rows": [{"approx_kl": 2 * kl * (rate / 1e-3)**2}, {"approx_kl": 0.0}]}

    monkeypatch.setattr(experiment, "run", run)
    assert experiment.rate_of(None, 8) == pytest.approx(expected)


@pytest.fixture
def short(monkeypatch):
    """Two rollouts of a model that can nothing, and is paid for an even number of characters."""
    for name, value in dict(steps=2, prompts=4, eval_problems=4, eval_every=1, sft_steps=1).items():
        monkeypatch.setitem(experiment.SETTINGS, name, value)
    monkeypatch.setattr(experiment, "POINTS", {1: (4, 1), 4: (2, 2)})
    monkeypatch.setattr(aspo, "right_answer", lambda response, problem: 1.0 - len(response) % 2)


def test_runs(tmp_path, short, monkeypatch):
    """Losses begin alike, are the same with one step, part with several; what is finished is not run again."""
    one, same = (experiment.run(tmp_path, 1, loss, 0, 3e-3) for loss in ("grpo", "aspo"))
    for row in one["rows"] + same["rows"]:
        del row["sample_seconds"], row["update_seconds"]
    assert all(same[key] == one[key] for key in ("rows", "before", "avg", "responses"))
    assert one["rows"][0]["weight_pos"] == one["rows"][0]["ratio_neg_low"] == 1
    four, other = (experiment.run(tmp_path, 4, loss, 0, 3e-3) for loss in ("grpo", "aspo"))
    (a, a_last), (b, b_last) = four["rows"], other["rows"]
    assert a["reward"] == b["reward"] and a["weight_pos_low"] != b["weight_pos_low"]
    assert a_last["entropy"] != b_last["entropy"] and a["ratio_pos_low"] != 1
    assert sum(four["kinds"].values()) == 4 * 16 and len(four["responses"]) == 4
    assert not any(path.is_dir() for path in tmp_path.glob("*-lr*"))
    monkeypatch.setattr(aspo, "train", None)
    assert experiment.run(tmp_path, 4, "aspo", 0, 3e-3) == other


def test_a_pretrained_model(tmp_path, monkeypatch):
    """It starts from its own weights, on sums, at its own rate, in as many optimiser steps as the point says."""
    for name in ("SETTINGS", "POINTS"):
        monkeypatch.setattr(experiment, name, dict(getattr(experiment, name)))
    model = make_model(tmp_path / "model", "{{ messages[-1].content }}")
    experiment.use(str(model))
    monkeypatch.setattr(experiment, "SETTINGS", experiment.SETTINGS | dict(steps=1, max_new_tokens=190, eval_problems=2))
    monkeypatch.setattr(aspo, "right_answer", lambda response, problem: 1.0 - len(response) % 2)
    monkeypatch.setattr(experiment, "update_metrics", lambda stats, norms, cfg, usual=experiment.update_metrics:
                        usual(stats, norms, cfg) | {"steps": len(norms), "rate": cfg.lr})
    found = experiment.run(tmp_path, 8, "aspo", 0, experiment.rate_of(tmp_path, 8))
    assert (found["rows"][0]["steps"], found["rows"][0]["rate"]) == (8, 1e-5)
    assert found["responses"][0][0].startswith("What is ") and list(experiment.POINTS) == [8, 32]


def test_ratios_by_probability():
    stats = [{"advantage": torch.tensor([1.0, 1, 1, -1]), "log_ratio": torch.tensor([0.5, 1, 3, 2]).log(),
              "old_prob": torch.tensor([0.1, 0.4, 0.5, 0.9])}]
    found = experiment.update_metrics(stats, usual=lambda _: {"x": 1})
    assert found == {"x": 1, "ratio_pos_low": 0.75, "ratio_pos_high": pytest.approx(3), "ratio_neg_low": None,
                     "ratio_neg_high": pytest.approx(2)}

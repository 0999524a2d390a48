"""The real script: whole runs as a subprocess, data loading, and what it says to bad input."""
import copy
import json
import subprocess
import sys
import types

import datasets
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import aspo
from aspo import METRICS, Config, UserError

SMALL = ["--steps", "3", "--sft_steps", "30", "--prompts", "8", "--minibatch", "4", "--group_size", "4", "--eval_problems", "8",
         "--eval_every", "2", "--max_new_tokens", "16", "--log_samples_every", "2"]


def run(*args, cwd=ROOT):
    result = subprocess.run([sys.executable, str(ROOT / "aspo.py"), *args], cwd=cwd, capture_output=True, timeout=240)
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()  # text=True would turn \r into \n
    return result


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    result = run("--out", str(out), *SMALL)
    assert result.returncode == 0, result.stderr
    return out, result


def test_run_folder(finished):
    out, _ = finished
    metrics = rows(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        expected = set(METRICS) - {"kl_ref"} - ({"heldout_accuracy"} if m["step"] == 1 else set())
        assert set(m) == expected
        assert 0 <= m["accuracy"] <= 1 and m["entropy"] > 0 and m["tokens"] == 32 * m["response_length"]
        assert m["reward"] == m["accuracy"] and 1 <= m["response_length"] <= 16
    samples = rows(out / "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 2}
    assert set(samples[0]) == {"step", "problem", "prompt", "response", "gold", "reward", "advantage"}
    assert json.loads((out / "config.json").read_text())["loss"] == "aspo"
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint", "config.json", "metrics.jsonl", "samples.jsonl"]


def test_checkpoint_loads_and_generates(finished):
    out, _ = finished
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    assert tokenizer.decode(tokenizer("3+1\n#### 4").input_ids) == "3+1\n#### 4"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1+2+3+4"}], tokenize=False, add_generation_prompt=True)
    assert text == "1+2+3+4="
    assert model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False).shape[1] > 8


def test_screen_tells_what_happens(finished):
    out, result = finished
    for words in ("0.3 M parameters", "cpu", "float32", "617 problems", "up to 512 tokens a step", "2 mini-batches x 2 epochs",
                  "step 3/3", "entropy", "ratio A>0", "cut off", "tokens/s", "held-out accuracy", str(out), "next: python aspo.py"):
        assert words in result.stdout, words
    for bar in ("warm-up", "sampling", "updating"):
        assert bar in result.stderr, bar
    assert "\n" not in result.stderr.strip()  # bars redraw their line
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr


def test_same_seed_same_metrics(finished, tmp_path):
    out, _ = finished
    assert run("--out", str(tmp_path / "two"), *SMALL).returncode == 0
    drop_times = lambda path: [{k: v for k, v in m.items() if "seconds" not in k} for m in rows(path / "metrics.jsonl")]
    assert drop_times(out) == drop_times(tmp_path / "two")
    assert (out / "samples.jsonl").read_text() == (tmp_path / "two" / "samples.jsonl").read_text()


def test_a_local_model_a_jsonl_file_and_every_option(finished, tmp_path, capsys):
    """A finished run is a model folder like any other; the options all at once, with the KL's reference model."""
    out, _ = finished
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{a}+{b}+1+2", "answer": a + b + 3}) + "\n" for a in range(1, 6) for b in range(1, 6)))
    code = aspo.main(["--model", str(out / "checkpoint"), "--data", str(data), "--instruction", "", "--out", str(tmp_path / "r"),
                      "--loss", "grpo", "--kl_coef", "0.01", "--entropy_clip", "--loss_agg", "sequence", "--max_refills", "1",
                      "--overlong_buffer", "4", "--mask_truncated", "--drop_uniform_groups", "--gradient_checkpointing",
                      "--micro_tokens", "100", "--sample_rows", "8", "--lr", "1e-4", "--temperature", "0.9",
                      *SMALL[:2], *SMALL[4:]])
    assert code == 0
    metrics = rows(tmp_path / "r" / "metrics.jsonl")
    assert metrics[0]["kl_ref"] < metrics[-1]["kl_ref"]
    assert "20 problems to train on, 5 held out" in capsys.readouterr().out


def test_reference_model_only_for_kl(tmp_path, monkeypatch):
    copies = []
    monkeypatch.setattr(aspo, "copy", types.SimpleNamespace(deepcopy=lambda model: copies.append(1) or copy.deepcopy(model)))
    assert aspo.main([*SMALL, "--steps", "1", "--out", str(tmp_path / "a")]) == 0 and not copies
    assert aspo.main([*SMALL, "--steps", "1", "--out", str(tmp_path / "b"), "--kl_coef", "0.1"]) == 0 and copies


@pytest.mark.parametrize("loss", [loss for loss in aspo.WEIGHTS if loss not in ("aspo", "grpo")])
def test_every_loss_runs(loss, tmp_path):
    assert aspo.main([*SMALL, "--steps", "1", "--sft_steps", "5", "--loss", loss, "--out", str(tmp_path / "run")]) == 0
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["grad_norm"] >= 0


def test_warnings_are_said_once_in_plain_words(tmp_path, capsys):
    assert aspo.main([*SMALL, "--sft_steps", "0", "--max_new_tokens", "4", "--epochs", "1", "--minibatch", "8",
                      "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for words in ("raise --max_new_tokens", "every response was wrong", "one optimiser step per rollout"):
        assert printed.count(words) == 1, words


# ------------------------------------------------------------------------------------------------------- bad input


def bad_data(tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    return ["--model", "tiny", "--data", str(path)]


GOOD = '{"problem": "1+2", "answer": "3"}\n'
BAD = {
    "unknown loss": (["--loss", "ppo"], "choose from"),
    "unknown flag": (["--los", "grpo"], "--los"),
    "not a number": (["--lr", "fast"], "--lr"),
    "group of one": (["--group_size", "1"], "--group_size must be at least 2"),
    "negative size": (["--prompts", "-4"], "--prompts must be positive"),
    "zero tokens": (["--max_new_tokens", "0"], "--max_new_tokens must be positive"),
    "not a number at all": (["--lr", "nan"], "--lr must be positive"),
    "negative share": (["--sft_slip", "-0.1"], "--sft_slip must not be negative"),
    "more than all": (["--sft_slip", "1.5"], "--sft_slip is a share"),
    "uneven mini-batches": (["--prompts", "10", "--minibatch", "4"], "must divide"),
    "unknown device": (["--device", "gpu"], "--device gpu"),
    "missing model": (["--model", "./no/such/model"], "--model ./no/such/model"),
    "missing data": (["--data", "no.jsonl"], "no.jsonl"),
    "empty data": (lambda p: bad_data(p, "\n\n"), "holds no problems"),
    "line is not JSON": (lambda p: bad_data(p, GOOD + "nonsense\n"), "line 2"),
    "line is no object": (lambda p: bad_data(p, GOOD + "3\n"), "line 2"),
    "answer missing": (lambda p: bad_data(p, GOOD + GOOD + '{"problem": "1"}\n'), "line 3"),
    "answer empty": (lambda p: bad_data(p, '{"problem": "1", "answer": " "}\n'), "line 1"),
    "answer is a list": (lambda p: bad_data(p, '{"problem": "1", "answer": [1]}\n'), "line 1"),
    "one problem only": (lambda p: bad_data(p, GOOD), "nothing to train on"),
    "prompt too long": (lambda p: bad_data(p, GOOD + json.dumps({"problem": "1+" * 200 + "1", "answer": "201"})), "context of 256"),
    "characters unknown": (lambda p: bad_data(p, GOOD + '{"problem": "one", "answer": "1"}'), "tiny model reads only"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_nothing_is_written(case, tmp_path, capsys):
    args, words = BAD[case]
    args = args(tmp_path) if callable(args) else args
    assert aspo.main([*args, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_touched(finished):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    result = run("--out", str(out), *SMALL)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "exists" in result.stderr and "--out" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_hub_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route\nmore")))
    assert aspo.main(["--data", "gsm8k", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "openai/gsm8k" in error and "no route" in error and len(error.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------ data


HUB = {  # made-up rows with the real columns
    "gsm8k": dict(question="2 and 2?", answer="It is 2+2=<<2+2=4>>4.\n#### 4"),
    "svamp": dict(ID="c", Body="I have 2.", Question="And 2 more?", Equation="( 2.0 + 2.0 )", Answer="4", Type="Addition"),
    "math": dict(problem="2 and 2?", level="Level 1", type="Algebra", solution="Adding, \\boxed{4}."),
    "someone/else": dict(prompt="2 and 2?", final_answer=["4"]),
}


@pytest.mark.parametrize("name", HUB)
def test_hub_columns(name, monkeypatch):
    asked = []
    row = HUB[name]
    other = {k: (v[:-1] + ["5"] if isinstance(v, list) else v.replace("2", "3")) for k, v in row.items()}

    def load(*args, **kwargs):
        asked.append(args)
        return datasets.DatasetDict(train=datasets.Dataset.from_list([row]), test=datasets.Dataset.from_list([other]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, heldout = aspo.load_problems(Config(data=name))
    assert "/" in asked[0][0]
    assert [r["answer"] for r in train] == ["4"] and train[0]["problem"].endswith(("2 and 2?", "And 2 more?"))
    assert "3" in heldout[0]["problem"]


def test_shared_data_splits_without_overlap(shared):
    train, heldout = aspo.load_problems(Config(data=str(shared / "data" / "svamp.jsonl"), eval_problems=50))
    assert len(heldout) == 50 and not {r["problem"] for r in heldout} & {r["problem"] for r in train}
    again = aspo.load_problems(Config(data=str(shared / "data" / "svamp.jsonl"), eval_problems=50, seed=7))
    assert again[1] == heldout


def test_arithmetic_holds_out_problems():
    train, heldout = aspo.load_problems(Config(data="arithmetic", eval_problems=128))
    assert len(train) + len(heldout) == 625 and len(heldout) == 125
    assert all(str(sum(map(int, r["problem"].split("+")))) == r["answer"] for r in train)


def test_presets_and_flags():
    cfg = aspo.parse(["--model", "qwen-0.5b"])
    assert cfg.data == "gsm8k" and cfg.gradient_checkpointing and "\\boxed" in cfg.instruction and cfg.out == "runs/qwen-0.5b-aspo-s0"
    assert aspo.parse(["--model", "qwen-0.5b", "--gradient_checkpointing", "false"]).gradient_checkpointing is False
    assert aspo.parse(["--lr", "0.5"]).lr == 0.5 and aspo.parse([]).data == "arithmetic" and aspo.parse([]).instruction == ""
    assert set(aspo.PRESETS) == {"tiny", "smollm2-135m", "qwen-0.5b", "qwen3-0.6b", "qwen-1.5b", "qwen-math-1.5b", "r1-1.5b"}
    assert all(name in Config.__dataclass_fields__["loss"].metadata["help"] for name in aspo.WEIGHTS)


def test_help_lists_every_knob():
    result = run("--help")
    assert result.returncode == 0
    for name in Config.__dataclass_fields__:
        assert f"--{name}" in result.stdout


def test_importing_has_no_side_effects(tmp_path):
    code = "import aspo, torch; from aspo import WEIGHTS, policy_loss, group_advantages, Config; print(sorted(WEIGHTS))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""},
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "aspo" in result.stdout and not list(tmp_path.iterdir())

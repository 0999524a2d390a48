"""The real script: whole runs, what is in their folder, what they say, and what they answer to bad input."""
import copy
import json
import subprocess
import sys
import types

import datasets
import pytest
import torch
from conftest import ROOT
from kill import lines
from processes import run
from transformers import AutoModelForCausalLM, AutoTokenizer

import aspo
from aspo import Config, UserError

SMALL = ("--steps 3 --sft_steps 30 --prompts 8 --minibatch 4 --group_size 4 --eval_problems 8 --eval_every 2 "
         "--max_new_tokens 16 --lr 1e-4").split()
KEYS = {"step", "reward", "reward_std", "accuracy", "entropy", "response_length", "truncated", "repetition",
        "uniform_groups", "tokens", "grad_norm", "skipped_steps", "approx_kl", "sampler_mismatch", "lr",
        "sample_seconds", "update_seconds",
        *(f"{name}_{sign}" for sign in ("pos", "neg") for name in ("ratio", "weight", "clip_frac", "dual_clip_frac")),
        "weight_pos_low", "weight_pos_high", "weight_neg_low", "weight_neg_high"}
OF_SIGNS = {key for key in KEYS if "_pos" in key or "_neg" in key}


@pytest.fixture(autouse=True)
def quiet_signals(monkeypatch):
    """Leaves the test runner's own signal handlers in place."""
    monkeypatch.setattr(aspo.Run, "listen", lambda run: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    return out, run("--out", out, *SMALL)


def test_run_folder(finished):
    out, _ = finished
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert set(m) == KEYS | ({"heldout_accuracy"} if m["step"] > 1 else set())
        assert 0 <= m["accuracy"] <= 1 and m["entropy"] > 0 and m["tokens"] == 32 * m["response_length"]
        assert m["reward"] == m["accuracy"] and 1 <= m["response_length"] <= 16 and 0 <= m["truncated"] <= 1
        assert m["sample_seconds"] > 0 and m["update_seconds"] > 0
    samples = lines(out, "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 2, 3} and len(samples) == 3 * 4 * 4  # four groups a step
    assert set(samples[0]) == {"step", "problem", "prompt", "response", "gold", "reward", "advantage"}
    config = json.loads((out / "config.json").read_text())
    assert config["loss"] == "aspo" and config["steps"] == 3 and set(config) == set(Config.__dataclass_fields__)
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint", "config.json", "metrics.jsonl", "samples.jsonl"]


def test_metrics_of_a_step_without_a_signal_are_null(tmp_path, monkeypatch):
    """Every group uniform: the keys are there, as always."""
    monkeypatch.setattr(aspo, "right_answer", lambda response, problem: 0.0)
    monkeypatch.setattr(aspo, "math_reward", lambda response, gold: 0.0)
    out = tmp_path / "run"
    assert aspo.main([*SMALL, "--steps", "1", "--sft_steps", "5", "--out", str(out)]) == 0
    row, = lines(out)
    assert set(row) == {key for key in KEYS if "seconds" not in key} | {"heldout_accuracy"}
    assert {key for key, value in row.items() if value is None} == OF_SIGNS | {"approx_kl", "sampler_mismatch"}
    assert row["grad_norm"] == 0 and row["uniform_groups"] == 8 and row["skipped_steps"] == 0


def test_checkpoint_loads_and_generates(finished):
    out, _ = finished
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    assert tokenizer.decode(tokenizer("3+1\n#### 4").input_ids) == "3+1\n#### 4"
    chat = [{"role": "user", "content": "1+2+3+4"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "1+2+3+4="
    assert model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False).shape[1] > 8


def test_screen_tells_what_happens(finished):
    out, process = finished
    for words in ("0.3 M parameters", "cpu", "float32", "engine fast", "617 problems", "up to 512 tokens a step",
                  "2 mini-batches x 2 epochs", "a prompt '", "the answer is", "a response ", "step 3/3", "entropy",
                  "ratio A>0", "cut off", "tokens/s", "held-out accuracy", str(out), "next: "):
        assert words in process.out, words
    assert process.err == ""  # bars are for terminals


def test_same_seed_same_metrics(finished, tmp_path):
    out, _ = finished
    run("--out", tmp_path / "two", *SMALL)
    assert lines(out) == lines(tmp_path / "two")
    assert (out / "samples.jsonl").read_text() == (tmp_path / "two" / "samples.jsonl").read_text()
    assert aspo.main([*SMALL, "--steps", "1", "--seed", "1", "--out", str(tmp_path / "three")]) == 0
    assert lines(tmp_path / "three", "samples.jsonl")[0] != lines(out, "samples.jsonl")[0]


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_a_local_model_a_jsonl_file_and_every_option(engine, finished, tmp_path, capsys):
    """A finished run is a model folder like any other; the options all at once, with the KL's reference model."""
    out, _ = finished
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{a}+{b}+1+2", "answer": a + b + 3}) + "\n"
                            for a in range(1, 6) for b in range(1, 6)))
    options = ("--loss grpo --kl_coef 0.01 --entropy_clip --loss_agg sequence --max_refills 1 --overlong_buffer 4 "
               "--mask_truncated --gradient_checkpointing --tis_cap 2 --micro_tokens 100 --sample_rows 8 "
               f"--temperature 0.9 --engine {engine}").split()
    assert aspo.main(["--model", str(out / "checkpoint"), "--data", str(data), "--instruction", "",
                      "--out", str(tmp_path / "r"), *options, *SMALL]) == 0
    metrics = lines(tmp_path / "r")
    assert metrics[0]["kl_ref"] < metrics[-1]["kl_ref"] and metrics[-1]["sampler_mismatch"] < 1e-4
    said = capsys.readouterr().out
    assert "20 problems to train on, 5 held out" in said and f"engine {engine}" in said


def test_reference_model_only_for_kl(tmp_path, monkeypatch):
    copies = []
    counted = types.SimpleNamespace(deepcopy=lambda model: copies.append(1) or copy.deepcopy(model))
    monkeypatch.setattr(aspo, "copy", counted)
    one = [*SMALL, "--steps", "1", "--sft_steps", "5"]
    assert aspo.main([*one, "--out", str(tmp_path / "a")]) == 0 and not copies
    assert aspo.main([*one, "--out", str(tmp_path / "b"), "--kl_coef", "0.1"]) == 0 and copies
    assert "kl_ref" in lines(tmp_path / "b")[0] and "kl_ref" not in lines(tmp_path / "a")[0]


@pytest.mark.parametrize("loss", [loss for loss in aspo.WEIGHTS if loss not in ("aspo", "grpo")])
def test_every_loss_runs(loss, tmp_path):
    assert aspo.main([*SMALL, "--steps", "1", "--sft_steps", "5", "--loss", loss, "--out", str(tmp_path / "run")]) == 0
    assert lines(tmp_path / "run")[0]["grad_norm"] >= 0


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
    "negative size": (["--prompts", "-4"], "--prompts must be at least 1"),
    "zero tokens": (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
    "not a number at all": (["--lr", "nan"], "--lr must be at least 0"),
    "negative penalty": (["--kl_coef", "-0.1"], "--kl_coef must be at least 0"),
    "infinite": (["--grad_clip", "inf"], "--grad_clip must be at least 0, got inf"),
    "unknown engine": (["--engine", "slow"], "choose from auto, fast, plain"),
    "unknown mean": (["--loss_agg", "median"], "choose from token, sequence, constant"),
    "neither true nor false": (["--mask_truncated", "maybe"], "--mask_truncated"),
    "a penalty from the start": (["--overlong_buffer", "40"], "smaller than --max_new_tokens 40"),
    "uneven mini-batches": (["--prompts", "10", "--minibatch", "4"], "must divide"),
    "unknown device": (["--device", "gpu"], "--device gpu"),
    "missing model": (["--model", "./no/such/model", "--data", "arithmetic"], "--model ./no/such/model"),
    "missing data": (["--data", "no.jsonl"], "no.jsonl"),
    "empty data": (lambda p: bad_data(p, "\n\n"), "holds no problems"),
    "line is not JSON": (lambda p: bad_data(p, GOOD + "nonsense\n"), "line 2"),
    "line is no object": (lambda p: bad_data(p, GOOD + "3\n"), "line 2"),
    "answer missing": (lambda p: bad_data(p, GOOD + GOOD + '{"problem": "1"}\n'), "line 3"),
    "answer empty": (lambda p: bad_data(p, '{"problem": "1", "answer": " "}\n'), "line 1"),
    "one problem only": (lambda p: bad_data(p, GOOD), "nothing to train on"),
    "prompt too long": (lambda p: bad_data(p, GOOD + json.dumps({"problem": "1+" * 200 + "1", "answer": "201"})),
                        "context of 256"),
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


GONE = ["cuda_graphs", "drop_uniform_groups", "fsdp", "rehearse", "sft_slip", "keep", "log_samples_every"]


@pytest.mark.parametrize("flag", GONE)
def test_flags_that_went_are_refused_as_any_other(flag, tmp_path, capsys):
    assert aspo.main([f"--{flag}", "1", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error == f"error: unrecognized arguments: --{flag} 1; see python aspo.py --help\n"


def test_an_existing_run_is_not_touched(finished):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    process = run("--out", out, *SMALL, status=2)
    assert "exists" in process.err and f"--resume {out}" in process.err and "--out" in process.err
    assert len(process.err.strip().splitlines()) == 1 and not process.out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_hub_without_a_network(tmp_path, capsys, monkeypatch):
    def load(*args, **options):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert aspo.main(["--data", "gsm8k", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "openai/gsm8k" in error and "no route" in error and len(error.strip().splitlines()) == 1


def test_presets_and_flags():
    cfg = aspo.parse(["--model", "qwen-0.5b"])
    assert cfg.data == "gsm8k" and cfg.gradient_checkpointing
    assert "\\boxed" in cfg.instruction and cfg.out == "runs/qwen-0.5b-aspo-s0"
    assert aspo.parse(["--model", "qwen-0.5b", "--gradient_checkpointing", "false"]).gradient_checkpointing is False
    assert aspo.parse(["--lr", "0.5"]).lr == 0.5
    assert aspo.parse([]).data == "arithmetic" and aspo.parse([]).instruction == ""
    assert set(aspo.PRESETS) == {
        "tiny", "smollm2-135m", "qwen-0.5b", "qwen3-0.6b", "qwen-1.5b", "qwen-math-1.5b", "r1-1.5b"}
    assert aspo.parse(["--lr", "0.5"]).max_new_tokens == 40 and aspo.parse(["--model", "x/y"]).max_new_tokens == 512
    assert aspo.parse(["--loss", "gspo"]).eps_low == 3e-4
    assert aspo.parse(["--loss", "gspo", "--eps_low", "0.1"]).eps_low == 0.1
    assert aspo.parse(["--mask_truncated"]).mask_truncated is True


def test_help_lists_every_knob_with_what_it_does():
    text = run("--help").out
    for name in Config.__dataclass_fields__:
        assert f"--{name} " in text
    assert all(name in text for name in aspo.WEIGHTS)
    assert "AdamW learning rate" in text and "arXiv" not in text.split("options:")[0]


def test_importing_has_no_side_effects(tmp_path):
    """No file, no group of processes, no changed threads, signals, streams or random state; and the public names."""
    code = """
import random, signal, sys, torch
state, streams = torch.random.get_rng_state(), (sys.stdout, sys.stderr)
handlers = [signal.getsignal(n) for n in range(1, 32)]
python, threads = random.getstate(), torch.get_num_threads()
import aspo
from aspo import Config, WEIGHTS, policy_loss, group_advantages, ratio, unclipped, Sample, train, parse, main
from aspo import load_model, tiny_model, read_jsonl, load_problems, UserError
assert state.equal(torch.random.get_rng_state()) and handlers == [signal.getsignal(n) for n in range(1, 32)]
assert streams == (sys.stdout, sys.stderr) and not torch.distributed.is_initialized()
assert python == random.getstate() and threads == torch.get_num_threads() and torch.is_grad_enabled()
assert torch.get_default_dtype() == torch.float32 and "datasets" not in sys.modules
print(sorted(WEIGHTS))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""},
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "aspo" in result.stdout and not result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_train_is_a_function_that_returns_the_last_metrics(tmp_path, capsys):
    """In a program of one's own: settings without a command line, errors as exceptions, and a run goes on from it."""
    cfg = Config(out=str(tmp_path / "run"), data="arithmetic", steps=1, sft_steps=5, prompts=2, minibatch=2,
                 group_size=2, max_new_tokens=8, eval_problems=2)
    metrics = aspo.train(cfg)
    assert metrics["step"] == 1 and metrics["heldout_accuracy"] is not None
    assert metrics["reward"] == lines(tmp_path / "run")[0]["reward"]
    with pytest.raises(UserError, match="exists"):
        aspo.train(cfg)
    again = aspo.train(aspo.parse(["--resume", cfg.out, "--steps", "2"]))
    assert again["step"] == 2 and torch.get_default_dtype() == torch.float32

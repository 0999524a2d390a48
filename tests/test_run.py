"""The real script: whole runs, what is in their folder, what they say, how they are called, and bad input."""
import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import error_of
from kill import lines
from processes import run

import aspo
from aspo import Config, UserError

SMALL = ("--steps 3 --sft_steps 2 --prompts 8 --minibatch 4 --group_size 4 --eval_problems 4 --eval_every 2 "
         "--max_new_tokens 16 --lr 1e-4").split()
ONE = [*SMALL, "--steps", "1"]
LEAST = dict(data="arithmetic", instruction="", steps=1, sft_steps=1, prompts=2, minibatch=1, group_size=2,
             max_new_tokens=8, eval_problems=2)
KEYS = {"step", "reward", "reward_std", "accuracy", "entropy", "response_length", "truncated", "repetition",
        "uniform_groups", "tokens", "grad_norm", "skipped_steps", "approx_kl", "sampler_mismatch", "lr",
        "sample_seconds", "update_seconds", "weight_pos_low", "weight_pos_high", "weight_neg_low", "weight_neg_high",
        *(f"{name}_{sign}" for sign in ("pos", "neg") for name in ("ratio", "weight", "clip_frac"))}

KNOBS = [knob.name for knob in dataclasses.fields(Config) if knob.name != "untyped"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    return out, run("--out", out, *SMALL)


def test_run_folder(finished):
    out, _ = finished
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert set(m) >= KEYS and ("heldout_accuracy" in m) == (m["step"] > 1)
        assert 0 <= m["accuracy"] <= 1 and m["entropy"] > 0 and m["tokens"] == 32 * m["response_length"]
        assert m["reward"] == m["accuracy"] and 1 <= m["response_length"] <= 16 and 0 <= m["truncated"] <= 1
    samples = lines(out, "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 2, 3} and len(samples) == 3 * 4 * 4  # four groups a step
    assert set(samples[0]) >= {"step", "problem", "prompt", "response", "gold", "reward", "advantage"}
    config = json.loads((out / "config.json").read_text())
    assert config["loss"] == "aspo" and config["steps"] == 3 and set(config) >= set(KNOBS)
    names = {p.name for p in out.iterdir() if not p.name.startswith(".")}
    assert names == {"checkpoint-3", "config.json", "metrics.jsonl", "samples.jsonl"}


def test_screen_tells_what_happens(finished):
    out, process = finished
    for words in ("0.3 M parameters", "cpu", "float32", "500 problems", "4 optimiser steps", "a prompt '",
                  "the answer is", "step 3/3", "entropy", "ratio A>0", "cut off", "tokens/s", "held-out accuracy",
                  "a response ", str(out)):
        assert words in process.out, words
    assert process.err == ""  # bars are for terminals


def test_same_seed_same_run_and_another_seed_another(finished, tmp_path):
    out, _ = finished
    run("--out", tmp_path / "two", *SMALL)
    assert lines(out) == lines(tmp_path / "two")
    assert (out / "samples.jsonl").read_text() == (tmp_path / "two" / "samples.jsonl").read_text()
    assert aspo.main([*SMALL, "--steps", "1", "--seed", str(2**64), "--out", str(tmp_path / "three")]) == 0
    assert lines(tmp_path / "three", "samples.jsonl")[0] != lines(out, "samples.jsonl")[0]


def test_a_local_model_a_jsonl_file_and_every_option(finished, tmp_path, capsys):
    """A checkpoint is a model folder like any other; the options all at once."""
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{a}+{b}+1+2", "answer": a + b + 3}) + "\n"
                            for a in range(1, 6) for b in range(1, 6)))
    options = ("--loss grpo --kl_coef 0.01 --entropy_clip --loss_agg sequence --max_refills 1 --overlong_buffer 4 "
               "--gradient_checkpointing --tis_cap 2 --micro_tokens 100 --sample_rows 8 "
               "--temperature 0.9 --instruction").split()
    assert aspo.main(["--model", str(finished[0] / "checkpoint-3"), "--data", str(data), *options, "", *SMALL,
                      "--out", str(tmp_path / "r")]) == 0
    metrics = lines(tmp_path / "r")
    assert metrics[0]["kl_ref"] < metrics[-1]["kl_ref"] and metrics[-1]["sampler_mismatch"] < 1e-4
    assert "20 problems, and 4 held out" in capsys.readouterr().out


def test_the_reference_model_is_the_initial_one_and_only_there_for_the_kl(tmp_path, monkeypatch):
    """After a resume too."""
    made, real = [], aspo.initial_model
    monkeypatch.setattr(aspo, "initial_model", lambda *args: made.append(real(*args)) or made[-1])
    assert aspo.main([*ONE, "--out", str(tmp_path / "a")]) == 0 and len(made) == 1
    assert aspo.main([*ONE, "--out", str(tmp_path / "b"), "--kl_coef", "0.1"]) == 0
    assert aspo.main(["--resume", str(tmp_path / "b"), "--steps", "2"]) == 0
    assert "kl_ref" in lines(tmp_path / "b")[0] and "kl_ref" not in lines(tmp_path / "a")[0]
    (_, trained, reference, again) = (torch.cat([p.flatten() for p in model.parameters()]) for model, _ in made)
    assert reference.equal(again) and not trained.equal(again)


def test_presets_and_flags():
    cfg = aspo.parse(["--model", "qwen-0.5b"])
    assert cfg.data == "gsm8k" and cfg.gradient_checkpointing
    assert "\\boxed" in cfg.instruction and cfg.out == "runs/qwen-0.5b-aspo-s0"
    assert aspo.parse(["--model", "qwen-0.5b", "--gradient_checkpointing", "false"]).gradient_checkpointing is False
    assert aspo.parse([]).data == "arithmetic" and aspo.parse([]).instruction == ""
    assert aspo.parse(["--lr", "0.5"]).max_new_tokens == 40 and aspo.parse(["--model", "x/y"]).max_new_tokens == 512
    assert aspo.parse(["--loss", "gspo"]).eps_low == 3e-4
    assert aspo.parse(["--loss", "gspo", "--eps_low", "0.1"]).eps_low == 0.1
    assert aspo.parse(["--entropy_clip"]).entropy_clip is True


def test_settings_from_python_are_those_of_the_command_line():
    """However they are made: the method's and the preset's defaults, and the folder's name."""
    def assigned(**values):
        cfg = Config()
        for name, value in values.items():
            setattr(cfg, name, value)
        return cfg

    for values in ({}, {"loss": "dr-grpo"}, {"model": "qwen-0.5b"}, {"loss": "gspo", "eps_low": 0.1}, {"seed": 3},
                   {"model": "qwen-math-1.5b", "data": "math", "loss": "dapo"}):
        flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        expected = public(aspo.parse(flags))
        for cfg in (Config(**values), dataclasses.replace(Config(), **values), assigned(**values)):
            assert public(cfg) == expected, values
    cfg = Config(lr=0.5)
    for loss in ("dr-grpo", "gspo", "grpo"):  # a sweep: what was typed stays, what the last method changed does not
        cfg = dataclasses.replace(cfg, loss=loss)
        assert public(cfg) == public(Config(lr=0.5, loss=loss)) and cfg.out == f"runs/tiny-{loss}-s0"
    assert public(copy.deepcopy(cfg)) == public(cfg)


def public(cfg):
    """The settings that have a flag."""
    return {name: getattr(cfg, name) for name in KNOBS}


def test_help_lists_every_knob_with_what_it_does():
    text = run("--help").out
    assert len(KNOBS) > 35 and all(f"--{name} " in text for name in KNOBS)
    assert all(name in text for name in aspo.WEIGHTS) and "AdamW learning rate" in text


def test_train_is_a_function_that_returns_the_last_metrics(tmp_path):
    """Errors are exceptions, and a run goes on from it."""
    cfg = Config(out=str(tmp_path / "run"), **LEAST)
    metrics = aspo.train(cfg)
    assert metrics["step"] == 1 and metrics["heldout_accuracy"] is not None
    assert metrics["reward"] == lines(tmp_path / "run")[0]["reward"]
    with pytest.raises(UserError, match="--resume"):
        aspo.train(cfg)
    assert aspo.train(aspo.parse(["--resume", cfg.out, "--steps", "2"]))["step"] == 2
    assert aspo.train(Config(resume=cfg.out, steps=3))["step"] == 3
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


def test_an_optimizer_whose_state_holds_numbers_is_saved(tmp_path, monkeypatch):
    """transformers' Adafactor counts steps in an int."""
    real = aspo.Policy.place

    def place(self, learning):
        real(self, learning)
        self.optimizer = transformers.Adafactor(self.model.parameters(), lr=1e-4, relative_step=False)

    monkeypatch.setattr(aspo.Policy, "place", place)
    cfg = aspo.parse([*ONE, "--out", str(tmp_path / "run")])
    aspo.train(cfg)
    assert aspo.train(aspo.parse(["--resume", cfg.out, "--steps", "2"]))["step"] == 2


def test_a_config_with_a_field_of_its_own_and_a_run_without_it(tmp_path, capsys):
    """A fork's new knob: older runs go on with its default, and runs of a fork go on here, both said aloud."""
    @dataclasses.dataclass
    class Own(Config):
        knob: float = 0.5

    out = tmp_path / "run"
    assert Own(knob=1.0, loss="gspo").knob == 1.0
    aspo.train(Own(out=str(out), knob=2.0, **LEAST))
    saved = json.loads((out / "config.json").read_text())
    assert saved["knob"] == 2.0
    del saved["eps_high"]
    (out / "config.json").write_text(json.dumps(saved))
    capsys.readouterr()
    assert aspo.main(["--resume", str(out), "--steps", "2"]) == 0
    said = "".join(capsys.readouterr())
    assert "knob" in said and "eps_high" in said
    assert aspo.train(Own(resume=str(out), steps=3))["step"] == 3


def test_samples_that_the_screen_cannot_show(tmp_path):
    """`python script.py > log` where the console is cp1252."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import aspo
tiny = aspo.Policy.decode
aspo.Policy.decode = lambda self, ids: tiny(self, ids) + "\\u2713 \\u65e5"
problems = [{{"problem": f"{{a}}+{{b}}", "answer": "\\u2713"}} for a in range(3) for b in range(3)]
aspo.BUILT_IN["arithmetic"] = problems
aspo.train(aspo.Config(out={str(tmp_path / "run")!r}, **{LEAST!r}))
""")
    run(script=script, env={"PYTHONIOENCODING": "cp1252"})
    assert "\u2713" in lines(tmp_path / "run", "samples.jsonl")[0]["response"]


def test_importing_has_no_side_effects(tmp_path, monkeypatch):
    """No file, no group of processes, no changed threads, signals, streams or random state."""
    script = tmp_path / "script.py"
    script.write_text("""
import random, signal, sys, torch
state, streams = torch.random.get_rng_state(), (sys.stdout, sys.stderr)
handlers = [signal.getsignal(n) for n in range(1, 32)]
python, threads = random.getstate(), torch.get_num_threads()
import aspo
assert state.equal(torch.random.get_rng_state()) and handlers == [signal.getsignal(n) for n in range(1, 32)]
assert streams == (sys.stdout, sys.stderr) and not torch.distributed.is_initialized()
assert python == random.getstate() and threads == torch.get_num_threads() and torch.is_grad_enabled()
assert torch.get_default_dtype() == torch.float32 and "datasets" not in sys.modules
""")
    monkeypatch.chdir(tmp_path)
    process = run(script=script)
    assert not process.out and not process.err and list(tmp_path.iterdir()) == [script]


BAD = {
    "unknown loss": (["--loss", "ppo"], "choose from"),
    "unknown flag": (["--los", "grpo"], "--los"),
    "not a number": (["--lr", "fast"], "--lr"),
    "group of one": (["--group_size", "1"], "--group_size 1: expected at least 2"),
    "not a number at all": (["--lr", "nan"], "--lr nan: expected at least 0"),
    "neither true nor false": (["--thinking", "maybe"], "--thinking"),
    "uneven mini-batches": (["--prompts", "10", "--minibatch", "4"], "must divide"),
    "mps": (["--device", "mps"], "--device 'mps'"),
    "missing model": (["--model", "./no/such/model", "--data", "arithmetic"], "./no/such/model"),
    "words for the tiny model": (["--data", "sums"], "tiny model reads only"),
    "missing data": (["--data", "no.jsonl"], "no.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_nothing_is_written(case, tmp_path, capsys):
    args, words = BAD[case]
    assert words in error_of(capsys, *args, "--sft_steps", 1, "--steps", 1, "--out", tmp_path / "run")
    assert not any((tmp_path / "run").glob("[!.]*"))


@pytest.mark.parametrize("folder", ["nothing", "", "a file/run"])
def test_what_is_no_run_is_not_resumed_and_what_is_no_folder_not_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    assert "run" in error_of(capsys, "--resume", folder and tmp_path / folder, *ONE)
    if "/" in folder:
        assert str(tmp_path / folder) in error_of(capsys, *ONE, "--out", tmp_path / folder)
    assert not Path("runs/tiny-aspo-s0").exists()

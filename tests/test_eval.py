"""The evaluator: its measures against enumeration, its readers on made-up rows, and the real script, killed and resumed."""
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time

import datasets
import pytest
from conftest import ROOT

import aspo
import eval as evaluation
from aspo import UserError
from eval import BENCHES, interval, load_bench, majority, pass_at, scores


# --------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (4, 1), (5, 3), (6, 0), (6, 6), (7, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c):
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for k in (0, n + 1):
        with pytest.raises(ValueError, match="pass@"):
            pass_at(n, c, k)


@pytest.mark.parametrize("answers, correct, expected", [
    (["1/2", "0.5", "3", "3", r"\frac{2}{4}"], [1, 1, 0, 0, 1], 1),  # equal answers vote together
    (["3", "3", "1/2"], [0, 0, 1], 0),
    (["1", "2"], [1, 0], 1 / 2), (["1", "2", "3"], [0, 0, 1], 1 / 3),  # a tie is drawn
    ([None, None, None, "7"], [0, 0, 0, 1], 1),  # no answer is no vote
    ([None, None], [0, 0], 0), ([], [], 0),
    (["not readable (", "not readable (", "5"], [0, 0, 1], 0)])
def test_majority_by_hand(answers, correct, expected):
    assert majority(answers, correct) == pytest.approx(expected)


def test_interval_against_all_resamples():
    """Of three problems there are 27 equally likely resamples; the percentiles of their means are known exactly."""
    values = [0.0, 0.25, 1.0]
    means = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    low, high = interval(values, resamples=100_000)
    # all three 0.0: 1/27 = 3.7 % of the resamples, more than 2.5 %; the same at the upper end
    assert low == pytest.approx(means[0]) and high == pytest.approx(means[-1])


def test_interval_of_many_problems_is_the_normal_one_and_repeats_do_not_shrink_it():
    rng = random.Random(0)
    values = [float(rng.random() < 0.3) for _ in range(2000)]
    mean = sum(values) / 2000
    half = 1.96 * math.sqrt(mean * (1 - mean) / 2000)
    assert interval(values) == pytest.approx((mean - half, mean + half), abs=0.002)
    assert interval([0.4] * 30) == (0.4, 0.4)
    # 16 samples that agree are one problem's evidence: thirty problems stay thirty
    rows = [{"correct": bool(v), "extracted": "1", "truncated": False, "tokens": 1, "repetition": 0.0} for v in values[:30] for _ in range(16)]
    low, high = scores(rows, 16)["avg@16"]["interval"]
    assert (low, high) == pytest.approx(interval(values[:30])) and high - low > 0.2


def test_scores_by_hand():
    row = lambda correct, extracted, tokens: {"correct": correct, "extracted": extracted, "truncated": tokens == 9, "tokens": tokens, "repetition": 0.5}
    rows = [row(True, "1", 3), row(False, "2", 9), row(False, "2.0", 3), row(False, None, 9),  # problem 1: one right of four
            row(True, "5", 3), row(True, "5", 3), row(True, "10/2", 3), row(False, "6", 3)]
    found = scores(rows, 4)
    value = lambda name: found[name]["value"]
    assert (value("avg@4"), value("pass@1"), value("maj@4")) == pytest.approx((0.5, 0.5, 0.5))
    assert value("pass@2") == pytest.approx((3 / 6 + 1) / 2) and value("pass@4") == 1
    assert (found["problems"], found["samples"], found["truncated"], found["response_length"]) == (2, 8, 0.25, 4.5)
    assert list(scores(rows[:6], 3)) >= ["problems"] and "pass@3" in scores(rows[:6], 3) and "pass@2" in scores(rows[:6], 3)


# ------------------------------------------------------------------------------------------------------- benchmarks

ROWS = {  # made-up rows with the columns of the hub sets
    "gsm8k": ({"question": "Q", "answer": "We add.\n#### 1,234"}, "Q", "1,234"),
    "math500": ({"problem": "P", "solution": "s", "answer": r"\frac{1}{2}", "subject": "a", "level": 1, "unique_id": "u"}, "P", r"\frac{1}{2}"),
    "aime24": ({"id": 1, "problem": "P", "solution": "s", "answer": "025", "url": "", "year": "2024"}, "P", "025"),
    "aime25": ({"problem": "P", "answer": "70", "id": "1"}, "P", "70"),
    "amc23": ({"question": "Q", "answer": 27.0, "id": 0, "url": ""}, "Q", "27.0"),
    "minerva": ({"question": r"Earlier: \boxed{9}. Q", "answer": "4.5e33"}, r"Earlier: \boxed{9}. Q", "4.5e33"),
    "olympiad": ({"question": "Q", "final_answer": ["$2$", "$3$"], "is_multiple_answer": True, "unit": None}, "Q", "$2$, $3$"),
    "svamp": ({"ID": "c", "Body": "Ann has 2.", "Question": "How many?", "Equation": "", "Answer": "2.0", "Type": ""}, "Ann has 2. How many?", "2.0"),
}


@pytest.mark.parametrize("name", BENCHES)
def test_hub_sets(name, monkeypatch):
    row, problem, answer = ROWS[name]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list([row]))
    assert load_bench(name) == [{"problem": problem, "answer": answer}]
    assert asked == [((BENCHES[name][0], BENCHES[name][1]), {"split": BENCHES[name][2]})]


def test_traps_of_the_sets_are_right_answers():
    for given, name in (("25", "aime24"), ("27", "amc23"), ("4.5 \\times 10^{33}", "minerva"), ("3, 2", "olympiad"), ("2", "svamp"), ("1234", "gsm8k")):
        assert aspo.math_reward(rf"\boxed{{{given}}}", ROWS[name][2])
    assert not aspo.math_reward("I give up", ROWS["minerva"][2])


def test_bad_benches(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"question": "Q", "answer": "no marker ####"}]))
    with pytest.raises(UserError, match="1 of 1 problems have no answer"):
        load_bench("gsm8k")
    with pytest.raises(UserError, match="cannot load --bench math500"):  # the columns are others
        load_bench("math500")
    with pytest.raises(UserError, match="arithmetic, gsm8k"):
        load_bench("gsm9k")
    with pytest.raises(UserError, match="cannot read"):
        load_bench(str(tmp_path / "no.jsonl"))


# ------------------------------------------------------------------------------------------------------- the script


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *map(str, arguments)], capture_output=True, text=True, timeout=240)


def main(capsys, *arguments):
    """In this process: (status, what it printed, the error line)."""
    status = evaluation.main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return status, printed.out, "\n".join(line for line in printed.err.splitlines() if line.startswith("error:"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of the tiny model."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    aspo.train(aspo.parse(["--out", str(folder), *"--steps 2 --sft_steps 60 --prompts 4 --minibatch 2 --group_size 4 --max_new_tokens 24 "
                           "--eval_problems 8 --eval_every 1".split()]))
    return folder


def test_killed_and_resumed_is_the_same(trained, tmp_path):
    arguments = [trained, "--k", "4", "--sample_rows", "8", "--max_new_tokens", "24"]
    assert run(*arguments, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *map(str, arguments), "--out", str(tmp_path / "broken")],
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path = tmp_path / "broken" / "arithmetic.jsonl"
    while not path.exists() or path.read_text().count("\n") < 60:
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 60 <= path.read_text().count("\n") < 500
    with path.open("a") as file:
        file.write('{"problem": "1+')  # a line that the kill has torn
    result = run(*arguments, "--out", tmp_path / "broken")
    assert result.returncode == 0, result.stderr
    for name in ("arithmetic.jsonl", "results.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 500 and len({row["response"] for row in rows}) > 50
    assert set(rows[0]) == {"problem", "response", "extracted", "gold", "correct", "truncated", "tokens", "repetition"}
    again = run(*arguments, "--out", tmp_path / "broken")  # finished already: only reported
    assert again.stdout == result.stdout and "avg@4" in again.stdout


def test_report_and_settings(trained, tmp_path, capsys):
    status, out, _ = main(capsys, trained, "--limit", "6", "--out", tmp_path / "a")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert status == 0 and results["settings"]["temperature"] == 0 and results["settings"]["top_p"] == 1
    assert results["settings"]["weights"] and results["benchmarks"]["arithmetic"]["problems"] == 6 and "avg@1" in out
    status, out, _ = main(capsys, trained, "--limit", "6", "--k", "3", "--out", tmp_path / "b")
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert (results["settings"]["temperature"], results["settings"]["top_p"]) == (0.8, 0.95)
    assert {"pass@1", "pass@2", "pass@3", "maj@3", "avg@3"} <= set(results["benchmarks"]["arithmetic"])


def test_greedy_evaluation_scores_what_the_model_says(trained, tmp_path, capsys):
    """Against model.generate on the same chat prompts."""
    main(capsys, trained, "--limit", "5", "--out", tmp_path / "a")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (c.from_pretrained(trained / "checkpoint") for c in (AutoModelForCausalLM, AutoTokenizer))
    for line in (tmp_path / "a" / "arithmetic.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["problem"] + "=", return_tensors="pt").input_ids
        text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1]:], skip_special_tokens=True)
        assert row["response"] == text and row["correct"] == bool(aspo.math_reward(text, row["gold"]))


def test_paired_comparison(trained, tmp_path, capsys):
    status, out, _ = main(capsys, trained, "--model", trained, "--k", "2", "--limit", "10", "--out", tmp_path / "both")
    assert status == 0 and "on the same 10 problems: +0.000, 95 % interval +0.000 to +0.000" in out


def test_bad_input_changes_nothing(trained, tmp_path, capsys):
    assert main(capsys, trained, "--limit", "4", "--out", tmp_path / "a")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "nogold.jsonl").write_text('{"problem": "2+2"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    out = ("--out", tmp_path / "new")
    for arguments, words in (
            ([trained, "--bench", "gsm9k", *out], "no benchmark"), ([trained, "--bench", "", *out], "no benchmark"),
            ([trained, "--bench", tmp_path / "empty.jsonl", *out], "no problems"), ([trained, "--bench", tmp_path / "nogold.jsonl", *out], "line 1"),
            ([trained, "--k", "0", *out], "--k"), ([trained, "--k", "x", *out], "--k"), ([trained, "--limit", "0", *out], "--limit"), ([trained, "--top_p", "0", *out], "--top_p"),
            ([trained, "--k", "2", "--temperature", "0", *out], "--temperature"), ([trained, "--nonsense", *out], "--nonsense"),
            ([trained, "--device", "abacus", *out], "--device abacus"),
            ([tmp_path / "folder", *out], "cannot load"), ([], "MODEL_OR_RUN"),
            ([trained, "--limit", "4", "--k", "2", "--out", tmp_path / "a"], "k 1, not 2"),
            ([trained, "--limit", "4", "--out", tmp_path / "file" / "x"], "cannot write"),
            (["compare", tmp_path / "folder"], "no run folder"), (["compare"], "runs"), (["weights", "--out", tmp_path / "x.nope"], "cannot write"),
            (["weights", "--out", tmp_path / "no" / "x.png"], "cannot write")):
        status, _, error = main(capsys, *arguments)
        assert status == 2 and words in error and error.count("\n") == 0, (arguments, error)
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_other_problems_in_the_file_are_refused(trained, tmp_path, capsys):
    for text in ("1+1+1+1", "2+2+2+2"):
        (tmp_path / "set.jsonl").write_text(json.dumps({"problem": text, "answer": "4"}) + "\n")
        status, _, error = main(capsys, trained, "--bench", tmp_path / "set.jsonl", "--out", tmp_path / "out")
    assert status == 2 and "other problems" in error
    assert json.loads((tmp_path / "out" / "set.jsonl").read_text())["problem"] == "1+1+1+1"


def test_pictures_and_table(trained, tmp_path, capsys):
    status, out, _ = main(capsys, "compare", trained, trained, "--out", tmp_path / "curves.png")
    assert status == 0 and "| aspo | 2 |" in out
    status, _, _ = main(capsys, "weights", "--out", tmp_path / "weights.png")
    for name in ("curves.png", "weights.png"):
        data = (tmp_path / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20_000


def test_weight_curves_show_the_methods():
    """The golden points of the paper's table: the flip at r < 1, the drop beyond the clip range, the caps."""
    ratios, curves = evaluation.weight_curves(1.0)
    at = lambda label, r: curves[label][(ratios - r).abs().argmin()].item()
    assert at("aspo", 0.5) == pytest.approx(2, abs=0.01) and at("grpo, dr-grpo", 0.5) == pytest.approx(0.5, abs=0.01)
    assert at("aspo", 0.2) == 3 and at("aspo", 1.3) == at("grpo, dr-grpo", 1.3) == 0 and at("dapo", 1.25) == pytest.approx(1.25, abs=0.01)
    ratios, curves = evaluation.weight_curves(-1.0)
    assert set(curves) == {"aspo", "grpo, dapo, dr-grpo", "no-is", "cispo", "gspo"}
    assert at("aspo", 5) == 3 and at("grpo, dapo, dr-grpo", 5) == 0 and at("aspo", 0.5) == 0


def test_half_width_is_students():
    assert evaluation.half_width([1.0, 3.0]) == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-3)
    assert evaluation.half_width([1.0]) == 0

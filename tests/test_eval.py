"""The evaluator: measures against enumeration, benchmarks of made-up rows, a short run of the tiny model."""
import io
import itertools
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, aspo
from processes import Process
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
from eval import BENCHES, interval, load_bench, majority, pass_at, scores


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (4, 1), (5, 3), (6, 6), (7, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("answers, correct, expected", [
    (["1/2", "0.5", "3", "3", r"\frac{2}{4}"], [1, 1, 0, 0, 1], 1),  # equal answers vote together
    (["1", "2", "3"], [0, 0, 1], 1 / 3), (["(", "(", "5"], [0, 0, 1], 0),  # a tie is drawn
    ([None, None, None, "7"], [0, 0, 0, 1], 1), ([None, None], [0, 0], 0),  # no answer is no vote
    (["5", "5", "7"], [0, 1, 0], 1 / 2)])  # the first was cut off
def test_majority_by_hand(answers, correct, expected):
    assert majority(answers, correct) == pytest.approx(expected)


def test_interval_against_all_resamples():
    """Three problems have 27 equally likely resamples: all are 0.0 in 3.7 % of them, more than 2.5 %."""
    assert interval([0.0, 0.25, 1.0]) == pytest.approx((0, 1))
    values = [1.0] * 600 + [0.0] * 1400  # many problems: the normal one, 1.96 * sqrt(.3 * .7 / 2000)
    assert interval(values) == pytest.approx((0.3 - 0.0201, 0.3 + 0.0201), abs=0.002)


def row_of(correct, extracted, tokens=1):
    return {"correct": correct, "extracted": extracted, "truncated": False, "tokens": tokens, "repetition": 0.5}


def test_scores_by_hand():
    rows = [row_of(True, "1"), row_of(False, "2", 5), row_of(False, "2.0"), row_of(False, None),
            row_of(True, "5"), row_of(True, "5"), row_of(True, "10/2"), row_of(False, "6")]
    found = scores(rows, 4)
    value = lambda name: found[name]["value"]
    assert (value("avg@4"), value("pass@1"), value("maj@4")) == pytest.approx((0.5, 0.5, 0.5))
    assert value("pass@2") == pytest.approx((3 / 6 + 1) / 2) and value("pass@4") == 1
    assert (found["problems"], found["samples"], found["tokens"]) == (2, 8, 1.5)
    assert {"pass@1", "pass@2", "pass@3"} <= set(scores(rows[:6], 3))
    rows = [row_of(value, "1") for value in [1, 0, 0, 1, 0] for _ in range(16)]  # the evidence of five
    assert scores(rows, 16)["avg@16"]["interval"] == pytest.approx(interval([1, 0, 0, 1, 0]))
    # a reward of one's own is averaged, and right above a half
    found = scores([row_of(c, "1") for c in (0.5, 0.51, 2.0, -1.0)], 4)
    assert found["avg@4"]["value"] == pytest.approx(2.01 / 4) and found["pass@1"]["value"] == 1 / 2


ROWS = {  # made-up rows with the columns of the hub sets
    "gsm8k": ({"question": "Q", "answer": "We add.\n#### 1,234"}, "Q", "1,234"),
    "math500": ({"problem": "P", "solution": "s", "answer": r"\frac{1}{2}"}, "P", r"\frac{1}{2}"),
    "aime24": ({"id": 1, "problem": "P", "solution": "s", "answer": "025"}, "P", "025"),
    "aime25": ({"problem": "P", "answer": "70"}, "P", "70"),
    "amc23": ({"question": "Q", "answer": 27.0, "id": 0}, "Q", "27.0"),
    "minerva": ({"question": r"\boxed{9}? Q", "answer": "4.5e33"}, r"\boxed{9}? Q", "4.5e33"),
    "olympiad": ({"question": "Q", "final_answer": ["$2$", "$3$"], "unit": None}, "Q", "$2$, $3$"),
    "svamp": ({"Body": "B", "Question": "Q", "Answer": "2.0"}, "B Q", "2.0"),
}


@pytest.mark.parametrize("name", BENCHES)
def test_hub_sets(name, monkeypatch):
    row, problem, answer = ROWS[name]
    hub = {BENCHES[name]: datasets.Dataset.from_list([row])}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, part, split: hub[path, part, split])
    [found] = load_bench(name)
    assert (found["problem"], found["answer"], found["row"]) == (problem, answer, row)


@pytest.mark.parametrize("name, words", [
    ("math500", "--bench math500.*found the columns text, label"), ("aime24", "cannot load --bench aime24"),
    ("gsm9k", "no benchmark.*gsm8k"), ("no.jsonl", "cannot read")])
def test_bad_benches(name, words, monkeypatch):
    hub = {"HuggingFaceH4/MATH-500": [{"text": "Q", "label": "7"}]}  # nothing else: as without a network
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *args, **options: hub[path])
    with pytest.raises(aspo.UserError, match=words):
        load_bench(name)


def main(capsys, *arguments):
    """In this process: (status, what it printed, the error line)."""
    status = evaluation.main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return status, printed.out, "\n".join(line for line in printed.err.splitlines() if line.startswith("error:"))


def results_of(out):
    return list(json.loads((out / "results.json").read_text()).values())


def samples_of(out):
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of the tiny model, with two checkpoints."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    aspo.train(aspo.parse(["--out", str(folder), *(
        "--steps 2 --sft_steps 60 --prompts 8 --minibatch 4 --group_size 4 --max_new_tokens 24 "
        "--eval_problems 8 --eval_every 0 --save_every 1").split()]))
    return folder


def variant(trained, folder, **settings):
    """A copy of the run, as if it had other settings."""
    shutil.copytree(trained, folder)
    (folder / "config.json").write_text(json.dumps(aspo.read_config(trained) | settings))
    return folder


def test_killed_and_resumed_is_the_same(trained, tmp_path, capsys):
    """The real script, killed at work; a second one beside it is refused and changes nothing."""
    arguments = [trained, *"--bench arithmetic --limit 12 --k 4 --sample_rows 8 --out".split()]
    broken = tmp_path / "broken"
    assert main(capsys, *arguments, tmp_path / "whole")[0] == 0
    process = Process(*arguments, broken, script=ROOT / "eval.py")
    while not (found := list(broken.glob("*.jsonl"))) or found[0].read_bytes().count(b"\n") < 16:
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    before = contents(broken)
    status, _, error = main(capsys, *arguments, broken)
    assert status == 2 and "in use" in error and contents(broken) == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert found[0].read_bytes().count(b"\n") < 48
    found[0].write_bytes(found[0].read_bytes()[:-20])  # torn in the last line of a chunk
    assert main(capsys, *arguments, broken)[0] == 0
    assert contents(broken) == contents(tmp_path / "whole")
    [rows] = samples_of(broken)
    assert len(rows) == 48 and len({row["response"] for row in rows}) > 20


def test_a_run_and_its_checkpoints(trained, tmp_path, capsys, monkeypatch):
    """Its own held-out problems, instruction and limit."""
    for name in (trained, trained / "checkpoint-1"):
        status, out, _ = main(capsys, name, "--out", tmp_path / "a")
        assert status == 0 and "instruction '', max_new_tokens 24, thinking False" in out
    newest, older = results_of(tmp_path / "a")
    assert (newest["model"], older["model"]) == (f"{trained}/checkpoint-2", f"{trained}/checkpoint-1")
    assert newest["tokens"] != older["tokens"] and newest["problems"] == 8 and newest["temperature"] == 0
    heldout = aspo.load_problems(aspo.Config(**aspo.read_config(trained)))[1]
    for rows in samples_of(tmp_path / "a"):
        assert [row["problem"] for row in rows] == [problem["problem"] for problem in heldout]
    before = contents(tmp_path / "a")
    monkeypatch.setattr(aspo, "roll_out", None)  # what is finished is only reported
    monkeypatch.chdir(trained)
    assert main(capsys, ".", "--out", tmp_path / "a")[0] == 0 and contents(tmp_path / "a") == before


def test_figures_stand_side_by_side(trained, tmp_path, capsys, monkeypatch):
    """Of other settings, of two models of one base name, and of other weights in the same folder."""
    monkeypatch.chdir(tmp_path)
    run = variant(trained, tmp_path / "run")
    for more in ("", "--k 4", "--k 4 --temperature 0.5", "--seed 1", "--max_new_tokens 9", "--limit 3", ""):
        assert main(capsys, run, *more.split())[0] == 0
    found = results_of(run / "eval")
    assert [x["k"] for x in found] == [1, 4, 4, 1, 1, 1] and found[1]["top_p"] == 0.95
    assert [x["temperature"] for x in found[:3]] == [0, 0.8, 0.5] and {"avg@4", "maj@4"} <= set(found[1])
    small = "--limit", 2, "--max_new_tokens", 9
    for name, step in (("A", 1), ("B", 2)):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / name / "final")
        assert main(capsys, f"{name}/final", *small)[0] == 0
    assert [x.name for x in sorted((tmp_path / "runs").iterdir())] == ["eval-A-final", "eval-B-final"]
    shutil.copytree(tmp_path / "A", tmp_path / "B", dirs_exist_ok=True)
    assert main(capsys, "B/final", *small)[0] == 0
    assert len(samples_of(tmp_path / "runs" / "eval-B-final")) == 2


def test_a_model_beside_a_run_gets_what_the_run_was_given(trained, tmp_path, capsys):
    """In either order, with a benchmark too; what is typed wins; two runs that differ are refused."""
    run = variant(trained, tmp_path / "run", instruction="0+")
    base = shutil.copytree(trained / "checkpoint-1", tmp_path / "base")
    flags = "--out", tmp_path / "out"
    for names, bench in (((run, base), []), ((base, run), "--bench sums --limit 3".split())):
        status, out, _ = main(capsys, names[0], "--model", names[1], *bench, *flags)
        assert status == 0 and out.count("instruction '0+', max_new_tokens 24, thinking False, ") == 2
        assert f"{names[1]} minus {names[0]} on the same {3 if bench else 8} problems" in out
    (tmp_path / "out").rename(tmp_path / "done")
    status, _, error = main(capsys, run, "--model", trained, *flags)
    assert status == 2 and "type --instruction" in error and not (tmp_path / "out").exists()
    status, out, _ = main(capsys, run, "--model", trained, "--instruction", "", *flags)
    assert status == 0 and out.count("instruction ''") == 2 and "+0.000, 95 % interval +0.000 to" in out


def test_rewards(trained, tmp_path, capsys):
    """Floats are in the file, and what is cut off never counts. A script's reward has to be typed."""
    (tmp_path / "own.py").write_text("def f(response, row):\n    return row['worth']\n")
    bench, run = tmp_path / "set.jsonl", variant(trained, tmp_path / "run", reward="f of a script")
    aspo.append(bench, [{"question": f"{n}+1", "answer": f"{n + 1}", "worth": n / 4} for n in range(4)])
    arguments = [run, "--bench", f" {bench} ", "--max_new_tokens", 40, "--out", tmp_path / "a"]
    status, _, error = main(capsys, *arguments)
    assert status == 2 and "f of a script" in error and "--reward" in error and "\n" not in error
    assert main(capsys, *arguments, "--reward", f"{tmp_path / 'own.py'}:f")[0] == 0
    [rows] = samples_of(tmp_path / "a")
    worth = [0.0 if row["truncated"] else (int(row["gold"]) - 1) / 4 for row in rows]
    assert [row["correct"] for row in rows] == worth and max(worth) == 0.75
    status, _, error = main(capsys, run, "--model", trained)
    assert status == 2 and "type --reward" in error


def test_settings_that_a_script_or_another_version_has(trained, tmp_path, capsys):
    """A loss of one's own is not needed; unknown and missing settings take defaults, said aloud."""
    @aspo.dataclass
    class Mine(aspo.Config):
        gamma: float = 0.5

    run = variant(trained, tmp_path / "run")
    saved = vars(Mine(loss="mine", max_new_tokens=24))
    del saved["thinking"]
    (run / "config.json").write_text(json.dumps(saved))
    for name in (run, run / "checkpoint-1"):
        status, out, error = main(capsys, name, "--limit", 2)
        assert (status, error) == (0, "") and "setting gamma" in out and "setting thinking" in out


def test_greedy_is_what_the_model_says(trained, tmp_path, capsys):
    """Against model.generate; special tokens stay in the text, but for the last one."""
    folder = shutil.copytree(trained / "checkpoint-2", tmp_path / "model")
    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": ["#"]})
    tokenizer.save_pretrained(folder)
    flags = "--instruction", "", "--max_new_tokens", 24, "--limit", 10, "--out"
    assert main(capsys, folder, *flags, tmp_path / "a")[0] == 0
    [rows] = samples_of(tmp_path / "a")
    assert len(rows) == 10 and sum("####" in row["response"] for row in rows) > 5
    for row in rows:
        ids = tokenizer(row["problem"] + "=", return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1]:].tolist()
        ended = tokenizer.eos_token_id in new
        assert row["response"] == tokenizer.decode(new[:-1] if ended else new)
        assert row["truncated"] == (not ended)
        assert row["correct"] is bool(ended and aspo.math_reward(row["response"], row["gold"]))
    assert main(capsys, folder, *"--k 2 --temperature 1 --top_p 0.001".split(), *flags, tmp_path / "b")[0] == 0
    [drawn] = samples_of(tmp_path / "b")
    assert drawn[::2] == drawn[1::2] == rows


@pytest.mark.parametrize("arguments, words", [
    ("RUN --bench ,", "no benchmark"), ("RUN --bench sums,sums", "one name"), ("RUN --limit 0", "--limit"),
    ("RUN --top_p 0", "--top_p"), ("RUN --k 2 --temperature 0", "--k 1"), ("RUN --seed -1", "--seed"),
    ("RUN --device abacus", "--device"), ("RUN --reward no.py:f", "no.py:f"), (".", "cannot load"),
    ("", "MODEL_OR_RUN"), ("RUN --limit 2 --out file/x", "cannot write"),
    ("compare .", "no run folder"), ("weights --out x.nope", "cannot write"),
    ("torchrun RUN", "without torchrun")])
def test_bad_input_is_one_line(arguments, words, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    if arguments.startswith("torchrun"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    status, _, error = main(capsys, *arguments.replace("RUN", str(trained)).replace("torchrun", "").split())
    assert status == 2 and words in error and error.count("\n") == 0 and not Path("runs").exists()


def test_compare(tmp_path, monkeypatch):
    """Rows by what differs, each run once, whole lines alone; on a terminal that knows few letters."""
    monkeypatch.chdir(tmp_path)
    for name, accuracies, settings in (
            ("a", (0.5, 0.25), {}), ("b", (0.75, 0.5), {"seed": 1, "sample_rows": 9}),
            ("c", (1, 1), {"lr": 0.5}), ("d", (1, 1), {"mine": "\u03c9"}),
            ("e", (1, 1), {"loss": "gspo", **aspo.METHOD_CHANGES["gspo"]})):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(vars(aspo.Config(out=name)) | settings))
        aspo.append(Path(name, "metrics.jsonl"), [
            {"step": n, "heldout_accuracy": x, "reward": x, "ratio_pos": None}
            for n, x in enumerate(accuracies, 1)])
    with Path("a", "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert evaluation.main(["compare", str(tmp_path / "b"), *"b a ./a/ c/../a c d e --out curves".split()]) == 0
    out = stdout.buffer.getvalue().decode("cp1252")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[:2] for row in rows] == [
        ["| aspo, lr 0.0004, mine None", "2"], ["| aspo, lr 0.5, mine None", "1"],
        ["| aspo, lr 0.0004, mine '?'", "1"], ["| gspo, lr 0.0004, mine None", "1"]]
    # of two values the half width is 12.706 * their distance / 2
    assert rows[0][2:7] == ["0.375 \u00b1 1.588", "0.625 \u00b1 1.588", "0.500 \u00b1 1.588", "", ""]
    assert "picture in curves.png" in out and Path("curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_weight_curves_show_the_methods(tmp_path, capsys):
    for advantage, weight in ((1.0, 2), (-1.0, 0)):  # the flip at r < 1
        ratios, curves = evaluation.weight_curves(advantage)
        assert set(curves) == set(aspo.WEIGHTS)
        assert curves["aspo"][(ratios - 0.5).abs().argmin()] == pytest.approx(weight, abs=0.01)
    status, out, _ = main(capsys, "weights", "--out", path := tmp_path / "w.svg")
    assert status == 0 and f"picture in {path}" in out and path.stat().st_size > 20_000

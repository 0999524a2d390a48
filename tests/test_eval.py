"""The evaluator: measures against enumeration, readers on made-up rows, the real script killed and resumed."""
import io
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    (["not readable (", "not readable (", "5"], [0, 0, 1], 0),
    # of one answer, the share of right responses: one was cut off; one repeats the question, first or last
    (["5", "5", "7"], [0, 1, 0], 1 / 2),
    (["2+3", "5", "5", "7"], [0, 1, 1, 0], 2 / 3), (["5", "2+3", "2+3", "7"], [1, 0, 0, 0], 1 / 3)])
def test_majority_by_hand(answers, correct, expected):
    assert majority(answers, correct) == pytest.approx(expected)


def row_of(correct, extracted, tokens=1):
    """A sample; those of 9 tokens were cut off."""
    return {"correct": correct, "extracted": extracted, "truncated": tokens == 9, "tokens": tokens, "repetition": 0.5}


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
    rows = [row_of(bool(value), "1") for value in values[:30] for _ in range(16)]
    low, high = scores(rows, 16)["avg@16"]["interval"]
    assert (low, high) == pytest.approx(interval(values[:30])) and high - low > 0.2


def test_scores_by_hand():
    row = row_of
    rows = [row(True, "1", 3), row(False, "2", 9), row(False, "2.0", 3), row(False, None, 9),  # one right of four
            row(True, "5", 3), row(True, "5", 3), row(True, "10/2", 3), row(False, "6", 3)]
    found = scores(rows, 4)
    value = lambda name: found[name]["value"]
    assert (value("avg@4"), value("pass@1"), value("maj@4")) == pytest.approx((0.5, 0.5, 0.5))
    assert value("pass@2") == pytest.approx((3 / 6 + 1) / 2) and value("pass@4") == 1
    assert (found["problems"], found["samples"], found["truncated"], found["response_length"]) == (2, 8, 0.25, 4.5)
    found = scores(rows[:6], 3)
    assert {"problems", "pass@1", "pass@2", "pass@3"} <= set(found) and "pass@4" not in found


def test_a_reward_of_ones_own_is_averaged_and_right_above_a_half():
    rows = [row_of(c, a) for c, a in (
        (0.5, "1"), (0.51, "2"), (2.0, "2"), (-1.0, "1"), (0.5, "3"), (0.25, "3"), (0.0, None), (0.25, "4"))]
    found = scores(rows, 4)
    value = lambda name: found[name]["value"]
    assert value("avg@4") == pytest.approx((2.01 / 4 + 1 / 4) / 2)
    assert (value("pass@1"), value("pass@4")) == pytest.approx((1 / 4, 1 / 2))
    assert value("maj@4") == pytest.approx(1 / 4)  # 1 and 2 are drawn, then 3 leads


# ------------------------------------------------------------------------------------------------------- benchmarks

ROWS = {  # made-up rows with the columns of the hub sets
    "gsm8k": ({"question": "Q", "answer": "We add.\n#### 1,234"}, "Q", "1,234"),
    "math500": ({"problem": "P", "solution": "s", "answer": r"\frac{1}{2}", "subject": "a"}, "P", r"\frac{1}{2}"),
    "aime24": ({"id": 1, "problem": "P", "solution": "s", "answer": "025", "url": "", "year": "2024"}, "P", "025"),
    "aime25": ({"problem": "P", "answer": "70", "id": "1"}, "P", "70"),
    "amc23": ({"question": "Q", "answer": 27.0, "id": 0, "url": ""}, "Q", "27.0"),
    "minerva": ({"question": r"Earlier: \boxed{9}. Q", "answer": "4.5e33"}, r"Earlier: \boxed{9}. Q", "4.5e33"),
    "olympiad": ({"question": "Q", "final_answer": ["$2$", "$3$"], "is_multiple_answer": True, "unit": None},
                 "Q", "$2$, $3$"),
    "svamp": ({"ID": "c", "Body": "Ann has 2.", "Question": "How many?", "Equation": "", "Answer": "2.0", "Type": ""},
              "Ann has 2. How many?", "2.0"),
}


@pytest.fixture
def hub(monkeypatch):
    """A list of rows that the hub has, for any set; hub.asked is what was asked for."""
    class Rows(list):
        asked = []

    rows = Rows()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: (
        rows.asked.append((args, options)) or datasets.Dataset.from_list(rows)))
    return rows


@pytest.mark.parametrize("name", BENCHES)
def test_hub_sets(name, hub):
    row, problem, answer = ROWS[name]
    hub.append(row)
    [found] = load_bench(name)
    assert (found["problem"], found["answer"], found["row"]) == (problem, answer, row)
    assert hub.asked == [((BENCHES[name][0], BENCHES[name][1]), {"split": BENCHES[name][2]})]


def test_traps_of_the_sets_are_right_answers():
    for given, name in (("25", "aime24"), ("27", "amc23"), ("4.5 \\times 10^{33}", "minerva"), ("3, 2", "olympiad"),
                        ("2", "svamp"), ("1234", "gsm8k")):
        assert aspo.math_reward(rf"\boxed{{{given}}}", ROWS[name][2])
    assert not aspo.math_reward("I give up", ROWS["minerva"][2])


@pytest.mark.parametrize("gold", [
    "17", "-3", "3.50", "1,080", r"\frac{14}{3}", r"\left( 3, \frac{\pi}{2} \right)", "p - q", r"\text{Evelyn}",
    "4.5e33", r"6 - 5i", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "x^2 + 1", r"\$36", r"90^\circ", "(C)", "even",
    "11111_2", "1, -2"])
def test_a_bare_answer_of_a_hub_set_stays_what_it_is(gold, hub):
    hub.append({"problem": "P", "answer": gold, "solution": r"\boxed{other}"})
    assert load_bench("math500")[0]["answer"] == gold


def test_equal_problems_of_a_hub_set_all_count(hub):
    hub += [{"problem": "P", "answer": "1"}] * 3
    assert len(load_bench("math500")) == 3


def test_bad_benches(hub, monkeypatch, tmp_path):
    hub += [{"question": "Q", "answer": "It is 7.\n#### 7"}, {"question": "R", "answer": "no marker ####"},
            {"question": "S", "answer": None}]
    with pytest.raises(UserError, match="cannot load --bench gsm8k .*: 2 of 3 problems have no answer"):
        load_bench("gsm8k")
    hub[:] = [{"text": "Q", "label": "7"}]
    with pytest.raises(UserError, match="cannot load --bench math500.*1 of 1.*found the columns text, label"):
        load_bench("math500")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(UserError, match="cannot load --bench math500"):  # no network, for one
        load_bench("math500")
    with pytest.raises(UserError, match="--bench.* arithmetic, sums, gsm8k"):
        load_bench("gsm9k")
    with pytest.raises(UserError, match="cannot read"):
        load_bench(str(tmp_path / "no.jsonl"))


# ------------------------------------------------------------------------------------------------------- the script


def main(capsys, *arguments):
    """In this process: (status, what it printed, the error line)."""
    status = evaluation.main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return status, printed.out, "\n".join(line for line in printed.err.splitlines() if line.startswith("error:"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of the tiny model, with two checkpoints."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    aspo.train(aspo.parse(["--out", str(folder), *(
        "--steps 2 --sft_steps 60 --prompts 8 --minibatch 4 --group_size 4 --max_new_tokens 24 --eval_problems 8 "
        "--eval_every 1 --save_every 1").split()]))
    return folder


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """An evaluation that nothing disturbed: its arguments and folder."""
    arguments = [str(trained), *"--bench arithmetic --limit 60 --k 4 --sample_rows 8".split()]
    out = tmp_path_factory.mktemp("eval") / "whole"
    assert evaluation.main([*arguments, "--out", str(out)]) == 0
    return arguments, out


def test_killed_and_resumed_is_the_same(whole, tmp_path, capsys):
    """The real script, killed at work; a second one beside it is refused and changes nothing."""
    arguments, out = whole
    process = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *arguments, "--out", str(tmp_path / "broken")],
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path = tmp_path / "broken" / "arithmetic.jsonl"
    while not path.exists() or path.read_text().count("\n") < 80:
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    before = contents(tmp_path / "broken")
    status, _, error = main(capsys, *arguments, "--out", tmp_path / "broken")
    assert status == 2 and "in use" in error and "is running" in error and error.count("\n") == 0
    assert contents(tmp_path / "broken") == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 80 <= path.read_text().count("\n") < 240
    with path.open("a") as file:
        file.write('{"problem": "1+')  # a line that the kill has torn
    assert main(capsys, *arguments, "--out", tmp_path / "broken")[0] == 0
    assert contents(tmp_path / "broken") == contents(out)
    rows = lines(path)
    assert len(rows) == 240 and len({row["response"] for row in rows}) > 50
    assert set(rows[0]) == {"problem", "response", "extracted", "gold", "correct", "truncated", "tokens", "repetition"}


def test_finished_already_is_only_reported(whole, monkeypatch, capsys):
    arguments, out = whole
    before = contents(out)
    monkeypatch.setattr(aspo, "roll_out", None)
    status, printed, _ = main(capsys, *arguments, "--out", out)
    assert status == 0 and "avg@4" in printed and contents(out) == before


def first_lines(data, n):
    return b"".join(data.splitlines(keepends=True)[:n])


def nearly_done(whole, folder):
    """The evaluation as it stood when 30 of its 240 samples were missing."""
    arguments, out = whole
    folder.mkdir()
    results = json.loads((out / "results.json").read_text()) | {"benchmarks": {}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "arithmetic.jsonl").write_bytes(first_lines((out / "arithmetic.jsonl").read_bytes(), 210))
    return [*arguments, "--out", folder]


@pytest.mark.parametrize("damage, kept", [
    (lambda data: data, 240), (lambda data: data[:-1], 232),  # the end of the last line; a chunk is 8 samples
    (lambda data: data + b'{"problem": ', 240), (lambda data: b"", 0), (lambda data: data[:50], 0),
    (lambda data: first_lines(data, 1), 0), (lambda data: first_lines(data, 17), 16),
    (lambda data: first_lines(data, 40) + bytes(300) + b"\n" + data[3000:], 40)])  # after a power cut
def test_whole_chunks_of_a_damaged_file_are_kept(whole, damage, kept, tmp_path):
    data, path = (whole[1] / "arithmetic.jsonl").read_bytes(), tmp_path / "a.jsonl"
    problems = random.Random(0).sample(load_bench("arithmetic"), 125)[:60]
    path.write_bytes(damage(data))
    rows = evaluation.finished(path, problems, 4, 2)
    assert path.read_bytes() == first_lines(data, kept)
    assert rows == [json.loads(line) for line in data.splitlines()[:kept]]
    assert evaluation.finished(tmp_path / "new.jsonl", problems, 4, 2) == []


def test_torn_results_are_one_line(whole, tmp_path, capsys):
    arguments, out = whole
    shutil.copytree(out, tmp_path / "a")
    for text in ("", '{"settings": {"mod', "[]", '{"benchmarks": {}}', "null"):
        (tmp_path / "a" / "results.json").write_text(text)
        before = contents(tmp_path / "a")
        status, _, error = main(capsys, *arguments, "--out", tmp_path / "a")
        assert status == 2 and "results.json" in error and "--out" in error and error.count("\n") == 0, text
        assert contents(tmp_path / "a") == before


def test_a_full_disk_is_one_line_and_goes_on(whole, tmp_path, capsys):
    arguments = nearly_done(whole, tmp_path / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / "a" / "arithmetic.jsonl").stat().st_size + 1000  # enough for a part of a chunk
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        status, _, error = main(capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "cannot write" in error and str(tmp_path / "a") in error and error.count("\n") == 0
    assert (tmp_path / "a" / "arithmetic.jsonl").stat().st_size == room
    assert main(capsys, *arguments)[0] == 0
    assert contents(tmp_path / "a") == contents(whole[1])


def test_ctrl_c_is_one_line_and_goes_on(whole, tmp_path, capsys, monkeypatch):
    arguments = nearly_done(whole, tmp_path / "a")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a training in this process has set its own
    with monkeypatch.context() as patch:
        calls, roll_out = itertools.count(), aspo.roll_out
        patch.setattr(aspo, "roll_out", lambda *a: os.kill(os.getpid(), signal.SIGINT) if next(calls) else roll_out(*a))
        status = evaluation.main(list(map(str, arguments)))
    signal.signal(signal.SIGINT, before)
    printed = "".join(capsys.readouterr())
    assert status == 130 and printed.strip().count("\n") == 0 and "goes on" in printed
    assert main(capsys, *arguments)[0] == 0
    assert contents(tmp_path / "a") == contents(whole[1])


def test_weights_replaced_while_it_loads(trained, tmp_path, capsys, monkeypatch):
    """The label is of the weights that were sampled from, and another label than the new ones get."""
    labels = []
    for name, replace in (("first", False), ("replaced", True), ("after", False)):
        folder = tmp_path / "model"
        if name != "after":
            shutil.copytree(trained / "checkpoint", folder, dirs_exist_ok=True)
        load_model = aspo.load_model

        def load(cfg):
            loaded = load_model(cfg)
            if replace:
                model = AutoModelForCausalLM.from_pretrained(folder)
                next(model.parameters()).data += 1
                model.save_pretrained(folder)
            return loaded

        with monkeypatch.context() as patch:
            patch.setattr(aspo, "load_model", load)
            assert main(capsys, folder, "--limit", "2", "--max_new_tokens", 24, "--out", tmp_path / name)[0] == 0
        labels.append(json.loads((tmp_path / name / "results.json").read_text())["settings"]["weights"])
    assert labels[0] == labels[1] != labels[2]
    status, _, error = main(capsys, folder, "--limit", "2", "--max_new_tokens", 24, "--out", tmp_path / "first")
    assert status == 2 and "weights" in error


def test_output_that_fails_or_knows_ascii_alone(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert evaluation.main([str(trained), "--limit", "2", "--out", str(tmp_path / "a")]) == 0
    assert len(lines(tmp_path / "a" / "arithmetic.jsonl")) == 2
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert evaluation.main(["compare", str(trained), str(trained)]) == 0
    ascii_only.flush()
    assert b"| aspo | 2 |" in ascii_only.buffer.getvalue()


def test_a_run_and_its_checkpoints(trained, tmp_path, capsys):
    """Its own held-out problems, instruction and limits, whether its folder or a checkpoint in it is named."""
    newest, older = trained / "checkpoint", trained / "checkpoint-1"
    found = {}
    for name, model in (("run", trained), ("newest", newest), ("older", older)):
        assert main(capsys, model, "--out", tmp_path / name)[0] == 0
        found[name] = json.loads((tmp_path / name / "results.json").read_text())["settings"]
    heldout = aspo.load_problems(aspo.Config(**aspo.read_config(trained)))[1]
    rows = lines(tmp_path / "run" / "arithmetic.jsonl")
    assert [row["problem"] for row in rows] == [problem["problem"] for problem in heldout] and len(rows) == 8
    assert lines(tmp_path / "newest" / "arithmetic.jsonl") == rows
    assert found["newest"] | {"model": 0} == found["run"] | {"model": 0}
    assert found["run"]["max_new_tokens"] == 24 and found["run"]["instruction"] == ""
    assert found["older"]["weights"] != found["run"]["weights"]
    assert found["older"] | {"model": 0, "weights": 0} == found["run"] | {"model": 0, "weights": 0}


def test_where_results_go(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    of = lambda name: evaluation.config_of(name, evaluation.evaluation_arguments([name])).out
    assert of(str(trained)) == of(".") == str(trained / "eval")
    assert of("checkpoint-1") == str(trained / "eval-checkpoint-1") and of("tiny") == "runs/eval-tiny"
    monkeypatch.chdir(trained / "checkpoint-1")
    assert of(".") == str(trained / "eval-checkpoint-1")


def test_typed_settings_win(trained):
    def of(*typed):
        return evaluation.config_of(str(trained), evaluation.evaluation_arguments([str(trained), *typed]))

    assert of().thinking is False and of("--thinking").thinking is True and of("--thinking", "false").thinking is False
    typed = {"max_new_tokens": 5, "instruction": "Be brief.", "seed": 3, "sample_rows": 7, "engine": "plain",
             "temperature": 0.5}
    cfg = of(*(word for name, value in typed.items() for word in (f"--{name}", str(value))))
    assert {name: getattr(cfg, name) for name in typed} == typed
    assert of("--k", "2").temperature == 0.8 and of().temperature == 0 and of("--temperature", "0").temperature == 0


def test_the_plain_engine_says_the_same(trained, tmp_path, capsys):
    for engine in ("fast", "plain"):
        assert main(capsys, trained, "--engine", engine, "--out", tmp_path / engine)[0] == 0
        assert json.loads((tmp_path / engine / "results.json").read_text())["settings"]["engine"] == engine
    assert lines(tmp_path / "fast" / "arithmetic.jsonl") == lines(tmp_path / "plain" / "arithmetic.jsonl")


def test_a_runs_own_reward(trained, tmp_path, capsys):
    """Its floats are in the file; what is cut off never counts; the row is handed on as it was read."""
    (tmp_path / "own.py").write_text("def f(response, row):\n    return row['worth'] + 0.0 * len(response)\n")
    aspo.append(tmp_path / "set.jsonl", [
        {"question": f"{n}+1", "answer": str(n + 1), "worth": n / 4} for n in range(4)])
    shutil.copytree(trained, tmp_path / "run")
    settings = aspo.read_config(trained) | {"reward": f"{tmp_path / 'own.py'}:f"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    benches = f" {tmp_path / 'set.jsonl'} , arithmetic"
    status, _, error = main(capsys, tmp_path / "run", "--bench", benches, "--limit", 4, "--max_new_tokens", 40,
                            "--out", tmp_path / "a")
    assert status == 2 and "the reward f failed" in error and "worth" in error  # arithmetic has no such column
    rows = lines(tmp_path / "a" / "set.jsonl")
    assert [row["correct"] for row in rows] == [0.0 if row["truncated"] else (int(row["gold"]) - 1) / 4 for row in rows]
    assert sorted(map(str, (row["correct"] for row in rows)))[-1] == "0.75"
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert found["settings"]["reward"] == settings["reward"]
    assert found["benchmarks"]["set"]["avg@1"]["value"] == pytest.approx(sum(row["correct"] for row in rows) / 4)
    assert found["benchmarks"]["set"]["pass@1"]["value"] == 1 / 4
    status, _, error = main(capsys, tmp_path / "run", "--model", trained, "--out", tmp_path / "b")
    assert status == 2 and "different rewards" in error and not (tmp_path / "b").exists()


def test_what_is_cut_off_is_never_right(trained, tmp_path, capsys):
    (tmp_path / "own.py").write_text("def f(response, row):\n    return 1\n")
    assert main(capsys, trained, "--reward", f"{tmp_path / 'own.py'}:f", "--max_new_tokens", 2, "--k", 2,
                "--out", tmp_path / "a")[0] == 0
    found = json.loads((tmp_path / "a" / "results.json").read_text())["benchmarks"]["arithmetic"]
    assert found["truncated"] == 1 and {found[name]["value"] for name in ("avg@2", "pass@1", "pass@2", "maj@2")} == {0}


def test_the_end_of_turn_of_a_chat_template_ends_a_response(trained, tmp_path, capsys):
    """With "#" as the special token behind an answer, the model's "3+2=5\\n#### 5" ends before the first one."""
    texts = {}
    answer = "{% if messages|length > 1 %}{{ messages[1]['content'] }}#{% endif %}"
    for name, ending in (("usual", ""), ("turns", answer)):
        shutil.copytree(trained / "checkpoint", tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        if ending:
            tokenizer.add_special_tokens({"additional_special_tokens": ["#"]})
        tokenizer.chat_template = "{{ messages[0]['content'] }}=" + ending
        tokenizer.save_pretrained(tmp_path / name)
        assert main(capsys, tmp_path / name, "--limit", 10, "--instruction", "", "--max_new_tokens", 40,
                    "--out", tmp_path / f"{name}-out")[0] == 0
        texts[name] = [row["response"] for row in lines(tmp_path / f"{name}-out" / "arithmetic.jsonl")]
    assert sum("####" in text for text in texts["usual"]) > 5
    assert texts["turns"] == [text.split("#")[0] for text in texts["usual"]]


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
    model, tokenizer = (c.from_pretrained(trained / "checkpoint") for c in (AutoModelForCausalLM, AutoTokenizer))
    rows = lines(tmp_path / "a" / "arithmetic.jsonl")
    assert len(rows) == 5
    for row in rows:
        ids = tokenizer(row["problem"] + "=", return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1]:]
        text, ended = tokenizer.decode(new, skip_special_tokens=True), tokenizer.eos_token_id in new
        assert row["response"] == text and row["truncated"] == (not ended)
        assert row["correct"] is bool(ended and aspo.math_reward(text, row["gold"]))


def test_the_smallest_top_p_is_greedy(trained, tmp_path, capsys):
    assert main(capsys, trained, "--k", 2, "--temperature", 1, "--top_p", 0.001, "--out", tmp_path / "a")[0] == 0
    assert main(capsys, trained, "--out", tmp_path / "b")[0] == 0
    drawn, greedy = (lines(tmp_path / name / "arithmetic.jsonl") for name in "ab")
    assert drawn[::2] == drawn[1::2] == greedy


def test_paired_comparison(trained, tmp_path, capsys):
    status, out, _ = main(capsys, trained, "--model", trained, "--bench", "arithmetic", "--k", "2", "--limit", "10",
                          "--out", tmp_path / "both")
    assert status == 0 and "on the same 10 problems: +0.000, 95 % interval +0.000 to +0.000" in out


def test_bad_input_changes_nothing(trained, tmp_path, capsys):
    assert main(capsys, trained, "--limit", "4", "--out", tmp_path / "a")[0] == 0
    before = contents(tmp_path / "a")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "nogold.jsonl").write_text('{"problem": "2+2"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    out = ("--out", tmp_path / "new")
    for arguments, words in (
            ([trained, "--bench", "gsm9k", *out], "no benchmark"), ([trained, "--bench", "", *out], "no benchmark"),
            ([trained, "--bench", tmp_path / "empty.jsonl", *out], "no problems"),
            ([trained, "--bench", tmp_path / "nogold.jsonl", *out], "line 1"), ([trained, "--k", "0", *out], "--k"),
            ([trained, "--k", "x", *out], "--k"), ([trained, "--limit", "0", *out], "--limit"),
            ([trained, "--top_p", "0", *out], "--top_p"),
            ([trained, "--k", "2", "--temperature", "0", *out], "--temperature"),
            ([trained, "--nonsense", *out], "--nonsense"), ([trained, "--device", "abacus", *out], "--device abacus"),
            ([trained, "--engine", "steam", *out], "--engine"),
            ([trained, "--thinking", "maybe", *out], "--thinking"),
            ([trained, "--max_new_tokens", "0", *out], "--max_new_tokens"),
            ([trained, "--sample_rows", "0", *out], "--sample_rows"), ([trained, "--seed", "-1", *out], "--seed"),
            ([trained, "--temperature", "nan", *out], "--temperature"),
            ([trained, "--max_new_tokens", "999", *out], "--max_new_tokens 999"),
            ([trained, "--bench", "arithmetic,arithmetic", *out], "two of one name"),
            ([trained, "--reward", "no.py:f", *out], "--reward no.py:f"),
            ([tmp_path / "folder", *out], "cannot load"), ([], "MODEL_OR_RUN"),
            ([trained, "--limit", "4", "--k", "2", "--out", tmp_path / "a"], "k 1, not 2"),
            ([trained, "--limit", "4", "--out", tmp_path / "file" / "x"], "cannot write"),
            (["compare", tmp_path / "folder"], "no run folder"), (["compare"], "runs"),
            (["weights", "--out", tmp_path / "x.nope"], "cannot write"),
            (["weights", "--out", tmp_path / "no" / "x.png"], "cannot write")):
        status, _, error = main(capsys, *arguments)
        assert status == 2 and words in error and error.count("\n") == 0, (arguments, error)
    assert not (tmp_path / "new").exists()
    assert contents(tmp_path / "a") == before


def test_other_problems_in_the_file_are_refused(trained, tmp_path, capsys):
    for text in ("1+1+1+1", "2+2+2+2"):
        (tmp_path / "set.jsonl").write_text(json.dumps({"problem": text, "answer": "4"}) + "\n")
        status, _, error = main(capsys, trained, "--bench", tmp_path / "set.jsonl", "--out", tmp_path / "out")
    assert status == 2 and "other problems" in error
    assert json.loads((tmp_path / "out" / "set.jsonl").read_text())["problem"] == "1+1+1+1"
    # a file of problems in the results folder is not taken for samples
    (tmp_path / "out" / "new.jsonl").write_text('{"problem": "2+2", "answer": "4"}\n')
    status, _, error = main(capsys, trained, "--bench", tmp_path / "out" / "new.jsonl", "--out", tmp_path / "out")
    assert status == 2 and "new.jsonl" in error
    assert (tmp_path / "out" / "new.jsonl").read_text() == '{"problem": "2+2", "answer": "4"}\n'


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
    assert at("aspo", 0.2) == 3 and at("aspo", 1.3) == at("grpo, dr-grpo", 1.3) == 0
    assert at("dapo", 1.25) == pytest.approx(1.25, abs=0.01)
    ratios, curves = evaluation.weight_curves(-1.0)
    assert set(curves) == {"aspo", "grpo, dapo, dr-grpo", "no-is", "cispo", "gspo"}
    assert at("gspo", 0.99) == 0 and at("gspo", 1.5) == pytest.approx(1.5, abs=0.01)
    assert at("cispo", 5) == pytest.approx(1.2) and at("no-is", 5) == 1
    assert at("aspo", 5) == 3 and at("grpo, dapo, dr-grpo", 5) == 0 and at("aspo", 0.5) == 0


def test_half_width_is_students():
    assert evaluation.half_width([1.0, 3.0]) == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-3)
    assert evaluation.half_width([1.0]) == 0

"""Problems, prompts, models and rewards of one's own: files of every kind, hub sets made up in memory."""
import functools
import io
import json
import re
import shutil
import sys

import datasets
import pyarrow
import pytest
from conftest import error_of, make_model
from kill import lines
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import aspo
from aspo import Config


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(folder, content, name="data.jsonl"):
    (folder / name).write_bytes(content)
    return str(folder / name)


def pairs(problems):
    return [(p["problem"], p["answer"]) for p in problems]


def chat(*texts):
    """A user's words, or a system's and a user's."""
    return [{"role": role, "content": text} for role, text in zip(("system", "user")[-len(texts):], texts)]


BOM, SEPARATORS = b"\xef\xbb\xbf", "one\u2028two\u2029three\u0085four"
ROWS = {  # a row, the problem and the answer in it
    "gsm8k": ({"question": "6 and 7?", "answer": "6+7=<<6+7=13>>13\n#### 13"}, "6 and 7?", "13"),
    "#### in a line of text": ({"problem": "a", "answer": "We get it. #### -4"}, "a", "-4"),
    "math": ({"problem": "a", "solution": "Not \\boxed{3}: it is $\\boxed{\\frac{1}{2}}$."}, "a", "\\frac{1}{2}"),
    "math-500": ({"problem": "a", "solution": "It is \\boxed{07}.", "answer": "7"}, "a", "7"),
    "svamp": ({"ID": "c", "Body": "I have 2.", "Question": "And 2 more?", "Answer": "4"}, "I have 2. And 2 more?", "4"),
    "alpaca": ({"instruction": "Add them.", "input": "2 and 2", "answer": 4}, "Add them. 2 and 2", "4"),
    "trl, a bare answer in solution": ({"prompt": chat("1 and 1?"), "solution": "2"}, "1 and 1?", "2"),
    "a chat as JSON text": ({"prompt": json.dumps(chat("Be brief.", "1 and 1?")), "answer": 2},
                            "Be brief.\n1 and 1?", "2"),
    "zero": ({"problem": "a", "answer": 0}, "a", "0"),
    "an answer that is a name": ({"problem": "Grandmother?", "answer": "Nan"}, "Grandmother?", "Nan"),
    "empty columns beside it": ({"problem": "a", "final_answer": [], "solution": None, "answer": "7"}, "a", "7"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_as_they_lie_around(name):
    row, problem, answer = ROWS[name]
    found = aspo.make_problem(row)
    assert (found["problem"], found["answer"]) == (problem, answer) and found["row"] == row
    assert found["messages"] == (None if "prompt" not in row else chat(*problem.split("\n")))


FILES = {  # name of the file: bytes, the problems and answers in it
    "byte-order mark.jsonl": (BOM + jsonl({"problem": "a", "answer": 1}), [("a", "1")]),
    "separators inside a string.jsonl": (
        json.dumps({"problem": SEPARATORS, "answer": 1}, ensure_ascii=False).encode(), [(SEPARATORS, "1")]),
    "line ends of Windows, empty lines.jsonl": (
        b'\r\n{"problem": "a", "answer": 1}\r\n\r\n{"problem": "b", "answer": 2}', [("a", "1"), ("b", "2")]),
    "array.json": (
        b'[\n  {"problem": "a", "answer": 1},\n  {"problem": "b",\n   "answer": 2}\n]\n', [("a", "1"), ("b", "2")]),
    "quoted lines.csv": (
        BOM + b'problem,answer\r\n"one,\ntwo ""three""",3\r\nfour,"1,000"\r\n',
        [('one,\ntwo "three"', "3"), ("four", "1,000")]),
}


@pytest.mark.parametrize("name", FILES)
def test_files_as_they_lie_around(name, tmp_path):
    content, expected = FILES[name]
    assert pairs(aspo.read_file(put(tmp_path, content, name))) == expected


def test_parquet_of_verl(tmp_path):
    """A list of structs, and a struct."""
    rows = [{"prompt": chat("Be brief.", f"{i} and 7?"), "reward_model": {"style": "rule", "ground_truth": str(i + 7)},
             "extra_info": {"index": i, "split": "train"}} for i in range(2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "verl.parquet")
    problems = aspo.read_file(tmp_path / "verl.parquet")
    assert pairs(problems) == [("Be brief.\n0 and 7?", "7"), ("Be brief.\n1 and 7?", "8")]
    assert [p["messages"] for p in problems] == [row["prompt"] for row in rows] and problems[1]["row"] == rows[1]


ONE = ["--steps", "1", "--sft_steps", "1"]
GOOD = b'{"problem": "1+2", "answer": 3}\n'
BAD_ROWS = {  # bytes, words of the one line
    "unknown columns": (b'{"task": "1", "label": "2"}', ["row 1", "task, label", "question", "final_answer"]),
    "no answer": (GOOD + GOOD + b'{"problem": "1", "answer": null}', ["row 3", "problem", "ground_truth"]),
    "NaN": (GOOD + b'{"problem": "1", "answer": NaN}', ["row 2", "ground_truth"]),
    "choices": (b'{"question": "1", "choices": ["2", "3"], "answer": 1}', ["row 1", "choices"]),
    "pandas' to_json": (b'{"problem": {"0": "1+2", "1": "2+2"}, "answer": {"0": 3, "1": 4}}', ["row 1", "problem"]),
    "no JSON": (GOOD + b"nonsense\n", ["row 2"]),
    "messages without content": (b'{"prompt": [{"role": "user"}], "answer": 1}', ["row 1", "content"]),
    "no UTF-8": (b"\xff\xfe{", ["data.jsonl", "utf-8"]),
    "nothing": (b"\n\n", ["no problem"]),
    "one problem": (GOOD, ["no problem to train on"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_in_one_line(case, tmp_path, capsys):
    content, words = BAD_ROWS[case]
    error = error_of(capsys, "--data", put(tmp_path, content), *ONE, "--out", tmp_path / "run")
    assert all(word in error for word in words) and "data.jsonl" in error, error
    assert not (tmp_path / "run").exists()


def hub(monkeypatch, **splits):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}))


def test_heldout_problems_of_the_hub_are_never_trained_on(monkeypatch):
    rows = [{"problem": f"{i}?", "answer": 1} for i in range(30)]
    hub(monkeypatch, train=rows[:20] + rows[:5], test=rows[15:])
    train, heldout = aspo.load_problems(Config(data="some/set"))
    assert {p["problem"] for p in train} == {f"{i}?" for i in range(15)} and len(train) == len(heldout) == 15


def test_hub_without_a_network(monkeypatch, tmp_path, capsys):
    def load(*args):
        raise ConnectionError(f"no route to {args[0]}\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "no route to openai/gsm8k more" in error_of(capsys, "--data", "gsm8k", "--out", tmp_path / "run")


def test_copies_are_merged_before_the_split_and_evaluation_does_not_move_it(tmp_path):
    """60 problems ten times each; what differs by outer spaces is the same."""
    rows = [{"problem": " " * (k % 3) + f"{i}+1" + "\n" * (k % 2), "answer": i + 1}
            for i in range(60) for k in range(10)]
    data = put(tmp_path, jsonl(*rows))
    train, heldout = aspo.load_problems(Config(data=data))
    assert (len(train), len(heldout)) == (48, 12) and len({p["problem"] for p in train + heldout}) == 60
    fewer = aspo.load_problems(Config(data=data, eval_problems=3, seed=7))
    assert fewer == (train, heldout[:3])


def test_built_in_problems():
    train, heldout = aspo.load_problems(Config(data="arithmetic", eval_problems=128))
    assert len(train) + len(heldout) == 625 and len(heldout) == 125
    assert all(str(sum(map(int, p["problem"].split("+")))) == p["answer"] for p in train)
    for p in sum(aspo.load_problems(Config(data="sums")), []):
        a, b = re.fullmatch(r"What is (\d+) \+ (\d+)\?", p["problem"]).groups()
        assert p["answer"] == str(int(a) + int(b))


CHATML = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), CHATML)


def options(model, data, out, **more):
    """Of a run that takes a second."""
    options = dict(model=model, data=data, out=out, steps=1, prompts=2, minibatch=1, group_size=2, max_new_tokens=8,
                   eval_problems=1, eval_samples=1, lr_warmup=0) | more
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


VERL = jsonl(*({"prompt": chat("Be brief.", f"{i} and 7?"), "reward_model": {"ground_truth": str(i + 7)}}
               for i in range(5)))
TURN = "<|system|>Be brief.<eos><|user|>6 and 7?<eos><|assistant|>"


def test_messages_go_through_the_chat_template(model):
    """System message and all; a chat brings an instruction of its own, and gets no other."""
    def prompt(row, template=CHATML, **knobs):
        cfg = Config(model=str(model), data="d.jsonl", max_new_tokens=8, **knobs)
        network, tokenizer = aspo.load_model(cfg.model)
        tokenizer.chat_template = template
        problem = aspo.make_problem(row)
        return tokenizer.decode(aspo.Policy(network, tokenizer, cfg, [problem], learning=False).encode(problem))

    row = {"prompt": chat("Be brief.", "6 and 7?"), "answer": "13"}
    assert prompt(row) == TURN and row["prompt"] == chat("Be brief.", "6 and 7?")  # the row stays as it was read
    begun = {"prompt": [*row["prompt"], {"role": "assistant", "content": "It is"}], "answer": "13"}
    assert prompt(begun) == TURN + "It is"  # an assistant's turn is continued
    plain = {"problem": "6 and 7?", "answer": 13}
    assert prompt(plain, instruction="") == "<|user|>6 and 7?<eos><|assistant|>"
    assert "\\boxed{}" in prompt(plain)
    assert prompt(row, None, instruction="") == "Question: Be brief.\n6 and 7?\nAnswer:"


def test_a_chat_template_that_refuses_is_one_line(tmp_path, capsys):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system\nhere') }}{% endif %}"
    error = error_of(capsys, *options(make_model(tmp_path / "m", template), put(tmp_path, VERL), tmp_path / "run"))
    assert "chat template" in error


def test_a_template_that_prints_the_time_does_not_keep_a_run_from_going_on(tmp_path):
    """Llama 3.2 prints today's date."""
    folder = make_model(tmp_path / "m", "{{ strftime_now('%H:%M:%S.%f') }}" + CHATML)
    assert aspo.main(options(folder, put(tmp_path, VERL), tmp_path / "run")) == 0
    assert aspo.main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 0


SPOILED = {  # what happens to a model's folder, words of the one line
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], ""),
    "torn weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), ""),
    "a weight is NaN": (lambda folder: change_weight(folder, float("nan")), "nan"),
}


def change_weight(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("case", SPOILED)
def test_a_model_that_cannot_be_used_and_then_the_same_command_again(case, model, tmp_path, capsys):
    """A failed start leaves nothing that the next one stumbles over."""
    (spoil, words), folder = SPOILED[case], shutil.copytree(model, tmp_path / "m")
    spoil(folder)
    command = options(folder, put(tmp_path, VERL), tmp_path / "run")
    error = error_of(capsys, *command)
    assert str(folder) in error and words in error, error
    shutil.copytree(model, folder, dirs_exist_ok=True)
    assert aspo.main(command) == 0


def test_code_that_a_model_brings_is_not_run(model, tmp_path, capsys, monkeypatch):
    """As `yes | python aspo.py`: nobody is asked, either."""
    marker, folder = tmp_path / "it ran", shutil.copytree(model, tmp_path / "m")
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n"
                                   "from transformers import Qwen2Config as Own, Qwen2ForCausalLM as Net\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(
        config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Net"}}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    error_of(capsys, *options(folder, put(tmp_path, VERL), tmp_path / "run"))
    assert not marker.exists()


REWARDS = """
import pickle
import beside

def evens(response, row):
    again = pickle.loads(pickle.dumps(evens))  # as a pool of processes does
    return float(len(response) % 2 == 0) + row["extra"]["bonus"] if again is evens else 0.0

def gives(value):
    return lambda response, row: value

nothing, nan, infinite, text = gives(None), gives(float("nan")), gives(-float("inf")), gives("much")
"""
OWN_ROWS = jsonl(*({"question": f"{i}?", "answer": f"so\n#### {i}", "extra": {"bonus": 10}} for i in range(5)))


@pytest.fixture
def workplace(model, tmp_path, monkeypatch):
    """(folder, options of a run there)"""
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "mine.py").write_text(REWARDS)
    (tmp_path / "beside.py").write_text("")
    yield tmp_path, lambda **more: options(model, put(tmp_path, OWN_ROWS), tmp_path / "run", **more)
    for name in ("mine", "beside"):
        sys.modules.pop(name, None)


def test_a_reward_from_a_file_is_remembered(workplace):
    """The same one in training, in held-out accuracy and after --resume; it is a module as any other."""
    folder, knobs = workplace
    assert aspo.main(knobs(reward=f"{folder}/mine.py:evens")) == 0
    assert aspo.main(["--resume", str(folder / "run"), "--steps", "2"]) == 0
    for sample in lines(folder / "run", "samples.jsonl"):
        cut = sample["reward"] == 0.0  # what is truncated scores at most 0
        assert cut or sample["reward"] == 10 + (len(sample["response"]) % 2 == 0)
    assert [m["step"] for m in lines(folder / "run")] == [1, 2]


def test_a_reward_of_the_caller_sees_the_row_as_it_was_read(workplace):
    """In held-out accuracy too."""
    folder, knobs = workplace
    seen = []
    metrics = aspo.train(aspo.parse(knobs(max_new_tokens=16)), reward=lambda response, row: seen.append(row) or -2.5)
    different = {json.dumps(row) for row in seen}
    assert len(different) == 3 and different <= set(OWN_ROWS.decode().splitlines())  # two prompts, a held-out one
    assert len(seen) == 4 + 2 * 1  # a rollout and two evaluations
    assert metrics["reward"] == metrics["heldout_accuracy"] == -2.5  # truncated or not: it is below 0


def test_a_run_with_a_reward_of_a_script_says_so_and_goes_on_with_it(workplace, capsys):
    """A partial or an object has no name; from the command line it would go on with the checker."""
    folder, knobs = workplace
    reward = functools.partial(lambda value, response, row: value, -1.0)
    aspo.train(aspo.parse(knobs()), reward=reward)
    assert json.loads((folder / "run" / "config.json").read_text())["reward"]
    more = ["--resume", str(folder / "run"), "--steps", "2"]
    assert "reward" in error_of(capsys, *more)
    assert aspo.train(aspo.parse(more), reward=reward)["heldout_accuracy"] == -1.0


@pytest.mark.parametrize("name, reason", [("nothing", "None"), ("nan", "nan"), ("infinite", "-inf"), ("text", "much")])
def test_a_reward_that_is_no_number_ends_the_run_with_one_line(name, reason, workplace, capsys, monkeypatch):
    folder, knobs = workplace
    monkeypatch.setattr(aspo.Policy, "decode", lambda self, ids: "the very\nresponse")
    error = error_of(capsys, *knobs(reward=f"{folder}/mine.py:{name}"))
    assert all(word in error for word in ("reward", reason, "?'", "the very\\nresponse"))


@pytest.mark.parametrize("reward, reason", [("mine.py", "FILE.py:NAME"), ("mine.py:no_such", "no_such"),
                                            ("none.py:evens", "none.py")])
def test_a_reward_that_is_not_there(reward, reason, workplace, capsys, monkeypatch):
    folder, knobs = workplace
    monkeypatch.chdir(folder)
    error = error_of(capsys, *knobs(reward=reward))
    assert reward in error and reason in error

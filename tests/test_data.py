"""Problems, prompts and rewards of one's own: files byte by byte, hub sets made up in memory, hostile programs."""
import contextlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
import torch
import transformers
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import aspo
from aspo import Config, UserError


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


def error_of(capsys, *args):
    """The one line that bad input gets."""
    assert aspo.main([str(arg) for arg in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    return error


# ----------------------------------------------------------------------------------------------------------- files

BOM, SEPARATORS = b"\xef\xbb\xbf", "one\u2028two\u2029three\u0085four"
FILES = {  # name of the file: bytes, the problems and answers in it
    "gsm8k.jsonl": (jsonl({"question": "6 and 7?", "answer": "6+7=<<6+7=13>>13\n#### 13"}), [("6 and 7?", "13")]),
    "its answers elsewhere.jsonl": (
        jsonl({"problem": "a", "answer": "6+7=13\n#### 13"}, {"problem": "b", "answer": "much\n\n####1,234 \n"}),
        [("a", "13"), ("b", "1,234")]),
    "math.jsonl": (
        jsonl({"problem": "Half?", "level": "Level 1", "solution": "Not \\boxed{3}: it is $\\boxed{\\frac{1}{2}}$."}),
        [("Half?", "\\frac{1}{2}")]),
    "math-500.jsonl": (jsonl({"problem": "a", "solution": "It is \\boxed{07}.", "answer": "7"}), [("a", "7")]),
    "verl.jsonl": (
        jsonl({"data_source": "x", "prompt": chat("Be brief.", "6 and 7?"), "ability": "math",
               "reward_model": {"style": "rule", "ground_truth": "13"}, "extra_info": {"index": 0}}),
        [("Be brief.\n6 and 7?", "13")]),
    "zero.jsonl": (
        jsonl({"problem": "a", "answer": 0}, {"problem": "b", "answer": 0.0}, {"problem": "c", "answer": "0"}),
        [("a", "0"), ("b", "0.0"), ("c", "0")]),
    "several answers.jsonl": (
        jsonl({"problem": "a", "final_answer": ["3", "-3"]}, {"problem": "b", "answer": [1, 2, 3]}),
        [("a", "3, -3"), ("b", "1, 2, 3")]),
    "a list of one.jsonl": (
        jsonl({"problem": "a", "final_answer": ["7"]}, {"problem": "b", "answer": [0]}), [("a", "7"), ("b", "0")]),
    "empty columns beside it.jsonl": (
        jsonl({"problem": "a", "final_answer": [], "answer": None, "target": "7"}), [("a", "7")]),
    "byte-order mark.jsonl": (BOM + jsonl({"problem": "a", "answer": 1}), [("a", "1")]),
    "separators inside a string.jsonl": (
        json.dumps({"problem": SEPARATORS, "answer": 1}, ensure_ascii=False).encode(), [(SEPARATORS, "1")]),
    "line ends of Windows, empty lines.jsonl": (
        b'\r\n{"problem": "a", "answer": 1}\r\n\r\n{"problem": "b", "answer": 2}', [("a", "1"), ("b", "2")]),
    "a return between two columns.jsonl": (b'{"problem": "a",\r"answer": 1}\n', [("a", "1")]),
    "array.json": (
        b'[\n  {"problem": "a", "answer": 1},\n  {"problem": "b",\n   "answer": 2}\n]\n', [("a", "1"), ("b", "2")]),
    "array behind a mark.jsonl": (BOM + b'\n [{"question": "a", "answer": "x\\n#### 1"}]', [("a", "1")]),
    "quoted lines.csv": (
        b'problem,answer\r\n"one,\ntwo ""three""",3\r\nfour,"1,000"\r\n',
        [('one,\ntwo "three"', "3"), ("four", "1,000")]),
    "old Mac.csv": (b'problem,answer\r"one\rtwo",3\rfour,5\r', [("one\ntwo", "3"), ("four", "5")]),
    "spreadsheet.csv": (
        BOM + 'id,question,answer\n1,"a\n\nb\u2028c","6+7=13\n#### 13"\n'.encode(), [("a\n\nb\u2028c", "13")]),
}


@pytest.mark.parametrize("name", FILES)
def test_files_as_they_lie_around(name, tmp_path):
    content, expected = FILES[name]
    assert pairs(aspo.read_jsonl(put(tmp_path, content, name))) == expected


def test_parquet(tmp_path):
    """Plain columns of numbers, and those of verl: a list of structs, and a struct."""
    parquet.write_table(pyarrow.table({"question": ["a", "b"], "answer": [0, 7]}), tmp_path / "plain.parquet")
    assert pairs(aspo.read_jsonl(tmp_path / "plain.parquet")) == [("a", "0"), ("b", "7")]
    rows = [{"prompt": chat("Be brief.", f"{i} and 7?"), "reward_model": {"style": "rule", "ground_truth": str(i + 7)},
             "extra_info": {"index": i, "split": "train"}} for i in range(2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "verl.parquet")
    problems = aspo.read_jsonl(tmp_path / "verl.parquet")
    assert pairs(problems) == [("Be brief.\n0 and 7?", "7"), ("Be brief.\n1 and 7?", "8")]
    assert [p["messages"] for p in problems] == [row["prompt"] for row in rows] and problems[1]["row"] == rows[1]


GOOD = b'{"problem": "1+2", "answer": 3}\n'
BAD_ROWS = {  # bytes, words of the one line
    "half of a surrogate pair": (GOOD + b'{"problem": "1+\\ud800", "answer": 3}', ["line 2", "ud800"]),
    "the other half, in an answer": (GOOD + b'{"problem": "1", "answer": "\\udc00"}', ["line 2", "udc00"]),
    "one in a chat": (GOOD + b'{"prompt": [{"role": "user", "content": "\\udfff"}], "answer": 1}', ["line 2", "udfff"]),
    "NaN": (GOOD + b'{"problem": "1", "answer": NaN}', ["line 2", "nan"]),
    "Infinity": (GOOD + GOOD + b'{"problem": "1", "answer": Infinity}', ["line 3", "inf"]),
    "-Infinity": (b'{"problem": "1", "answer": -Infinity}', ["line 1", "-inf"]),
    "one too large": (b'{"problem": "1", "answer": 1e999}', ["line 1", "inf"]),
    "NaN as a word": (GOOD + b'{"problem": "1", "answer": "NaN"}', ["line 2", "NaN"]),
    "infinity as a word": (GOOD + b'{"problem": "1", "answer": " infinity "}', ["line 2", "infinity"]),
    "NaN among others": (GOOD + b'{"problem": "1", "answer": [3, NaN]}', ["line 2", "nan"]),
    "NaN first": (GOOD + b'{"problem": "1", "answer": [NaN, 3]}', ["line 2", "nan"]),
    "NaN behind ####": (GOOD + b'{"problem": "1", "answer": "so\\n#### NaN"}', ["line 2", "NaN"]),
    "NaN in an array": (b'[{"problem": "1", "answer": 1}, {"problem": "2", "answer": NaN}]', ["row 2", "nan"]),
    "unknown columns": (b'{"task": "1", "label": "2"}', ["line 1", "task, label", "question", "final_answer"]),
    "no answer": (GOOD + b'{"problem": "1", "answer": null}', ["line 2", "problem, answer", "ground_truth"]),
    "an empty answer": (GOOD + b'{"problem": "1", "answer": " "}', ["line 2", "empty"]),
    "a solution without its answer": (b'{"problem": "1", "solution": "It is clear."}', ["line 1", "boxed"]),
    "no JSON": (GOOD + b"nonsense\n", ["line 2"]),
    "no object": (GOOD + b"3\n", ["line 2"]),
    "an array of texts": (b'["1+2"]', ["row 1"]),
    "messages without content": (b'{"prompt": [{"role": "user"}], "answer": 1}', ["line 1", "content"]),
    "no UTF-8": (b"\xff\xfe{", ["data.jsonl", "utf-8"]),
    "nothing": (b"\n\n", ["holds no problems", "answer"]),
    "an empty array": (b"[]", ["holds no problems", "answer"]),
    "one problem": (GOOD, ["nothing to train on"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_in_one_line(case, tmp_path, capsys):
    content, words = BAD_ROWS[case]
    error = error_of(capsys, "--data", put(tmp_path, content), "--out", tmp_path / "run")
    assert all(word in error for word in words) and "data.jsonl" in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, content", [
    ("d.csv", b"problem,answer\n1,2\n3,nan\n"), ("d.csv", b"problem,answer\n1,2\n3\n"),
    ("d.json", b'[{"problem": "1", "answer": 2}, {"problem": "3"}]')])
def test_a_bad_row_of_a_table_has_a_number_too(name, content, tmp_path):
    with pytest.raises(UserError, match=f"{name}, row 2: "):
        aspo.read_jsonl(put(tmp_path, content, name))


def test_parquet_with_nan_names_the_row(tmp_path):
    parquet.write_table(pyarrow.table({"problem": ["a", "b"], "answer": [1.0, float("nan")]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="row 2.*nan"):
        aspo.read_jsonl(tmp_path / "d.parquet")


# --------------------------------------------------------------------------------------------------------- the hub


def hub(monkeypatch, asked=None, **splits):
    def load(*args, **kwargs):
        (asked if asked is not None else []).append(args)
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)


HUB = {  # made-up rows with the real columns
    "gsm8k": (dict(question="2 and 2?", answer="It is 2+2=<<2+2=4>>4.\n#### 4"), "2 and 2?", "4"),
    "svamp": (dict(ID="c", Body="I have 2.", Question="And 2 more?", Equation="( 2.0 + 2.0 )", Answer="4"),
              "I have 2. And 2 more?", "4"),
    "math": (dict(problem="2 and 2?", level="Level 1", solution="Adding, \\boxed{4}."), "2 and 2?", "4"),
    "one/answer": (dict(prompt="2 and 2?", final_answer=["4"]), "2 and 2?", "4"),
    "two/answers": (dict(question="Roots of 2?", final_answer=["3", "-3"]), "Roots of 2?", "3, -3"),
    "a/zero": (dict(problem="2 less 2?", answer=0), "2 less 2?", "0"),
    "for/verl": (dict(data_source="x", prompt=chat("Be brief.", "2 and 2?"), ability="math", extra_info={"index": "7"},
                      reward_model={"style": "rule", "ground_truth": "4"}), "Be brief.\n2 and 2?", "4"),
    "processed/verl": (dict(prompt="2 and 2?", solution="4", source_prompt=chat("Solve. 2 and 2?"),
                            reward_model={"ground_truth": "4", "style": "rule"}), "2 and 2?", "4"),
}


@pytest.mark.parametrize("name", HUB)
def test_hub_columns(name, monkeypatch):
    asked, (row, problem, answer) = [], HUB[name]
    other = json.loads(json.dumps(row).replace("2", "8"))  # a held-out problem
    hub(monkeypatch, asked, train=[row], test=[other])
    train, heldout = aspo.load_problems(Config(data=name))
    assert "/" in asked[0][0] and pairs(train) == [(problem, answer)]
    assert [p["problem"] for p in heldout] == [problem.replace("2", "8")]


def test_hub_rows_that_are_none_are_left_out_and_said(monkeypatch, capsys):
    rows = [{"problem": str(i), "answer": answer} for i, answer in enumerate(["3", "nan", "", "4", "5"])]
    hub(monkeypatch, train=rows)
    train, heldout = aspo.load_problems(Config(data="some/set"))
    assert sorted(pairs(train + heldout)) == [("0", "3"), ("3", "4"), ("4", "5")]
    assert "left out; the first is train, row 2" in capsys.readouterr().out


def test_hub_with_unknown_columns(monkeypatch, tmp_path, capsys):
    hub(monkeypatch, train=[{"task": "1", "label": "2"}])
    error = error_of(capsys, "--data", "some/set", "--out", tmp_path / "run")
    for words in ("some/set", "found the columns task, label", "looked for", "question", "final_answer"):
        assert words in error


def test_hub_without_a_train_split(monkeypatch, tmp_path, capsys):
    hub(monkeypatch, dev=[{"problem": "1", "answer": "2"}])
    error = error_of(capsys, "--data", "some/set", "--out", tmp_path / "run")
    assert "some/set" in error and "train" in error


def test_hub_without_a_network(monkeypatch, tmp_path, capsys):
    def load(*args, **kwargs):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    error = error_of(capsys, "--data", "gsm8k", "--out", tmp_path / "run")
    assert "openai/gsm8k" in error and "no route" in error


def test_the_hub_client_gives_up_soon(monkeypatch):
    """Its own pauses between tries are 23 s together, and a model asks twice."""
    pauses = []
    assert aspo.main(["--help"]) == 0
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(Exception):
        huggingface_hub.utils.http_backoff("GET", "http://127.0.0.1:9/")  # nothing listens there
    assert 1 <= len(pauses) and sum(pauses) <= 4


# ---------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("order", ["copies side by side", "one round after another"])
def test_copies_are_merged_before_the_split_and_it_is_said(order, tmp_path, capsys):
    """60 problems ten times each; what differs by outer spaces is the same."""
    rows = [{"problem": " " * (k % 3) + f"{i}+1" + "\n" * (k % 2), "answer": i + 1}
            for i in range(60) for k in range(10)]
    if order != "copies side by side":
        rows = [row for k in range(10) for row in rows[k::10]]
    train, heldout = aspo.load_problems(Config(data=put(tmp_path, jsonl(*rows))))
    assert (len(train), len(heldout)) == (48, 12)
    assert {p["problem"] for p in train + heldout} == {f"{i}+1" for i in range(60)}
    said = capsys.readouterr().out
    assert "600 rows" in said and "60 different problems" in said


def test_copies_in_a_chat_and_nothing_said_without_any(tmp_path, capsys):
    rows = [{"prompt": chat("Be brief.", f"{i // 2}?" + " " * (i % 2)), "answer": 1} for i in range(8)]
    rows += [{"prompt": chat("Think.", "0?"), "answer": 1}]  # another problem: the system says something else
    train, heldout = aspo.load_problems(Config(data=put(tmp_path, jsonl(*rows))))
    assert len(train) + len(heldout) == 5 and "9 rows" in capsys.readouterr().out
    aspo.load_problems(Config(data=put(tmp_path, jsonl(*rows[::2]))))
    assert "different problems" not in capsys.readouterr().out


def test_heldout_problems_of_the_hub_are_never_trained_on(monkeypatch):
    rows = [{"problem": f"{i}?", "answer": 1} for i in range(30)]
    hub(monkeypatch, train=rows[:20] + rows[:5], test=rows[15:])
    train, heldout = aspo.load_problems(Config(data="some/set"))
    assert {p["problem"] for p in train} == {f"{i}?" for i in range(15)} and len(train) == len(heldout) == 15


def test_shared_data_splits_without_overlap(shared):
    data = str(shared / "data" / "svamp.jsonl")
    train, heldout = aspo.load_problems(Config(data=data, eval_problems=50))
    assert len(heldout) == 50 and not {p["problem"] for p in heldout} & {p["problem"] for p in train}
    assert aspo.load_problems(Config(data=data, eval_problems=50, seed=7))[1] == heldout


def test_arithmetic_holds_out_problems():
    train, heldout = aspo.load_problems(Config(data="arithmetic", eval_problems=128))
    assert len(train) + len(heldout) == 625 and len(heldout) == 125
    assert all(str(sum(map(int, p["problem"].split("+")))) == p["answer"] for p in train)


def test_sums_in_words():
    train, heldout = aspo.load_problems(Config(data="sums"))
    assert len(train) + len(heldout) == 361
    for p in train + heldout:
        a, b = re.fullmatch(r"What is (\d+) \+ (\d+)\?", p["problem"]).groups()
        assert p["answer"] == str(int(a) + int(b))


def test_reading_is_said_before_it_begins(tmp_path, monkeypatch):
    """A million rows take a minute."""
    events = []
    monkeypatch.setattr(aspo, "say", events.append)
    monkeypatch.setattr(Path, "read_bytes", lambda path: events.append("read") or GOOD)
    monkeypatch.setattr(Path, "read_text", lambda path, *args: events.append("read") or GOOD.decode())
    monkeypatch.setattr(aspo, "make_problem", lambda row: events.append("a row") or {"problem": "1", "answer": "1"})
    aspo.read_jsonl(tmp_path / "data.jsonl")
    assert "reading" in events[0] and "data.jsonl" in events[0] and events[1:] == ["read", "a row"]


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_on_a_terminal_only(terminal, tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    aspo.read_jsonl(put(tmp_path, GOOD))
    assert ("reading" in screen.getvalue()) is terminal


# --------------------------------------------------------------------------------------------------------- prompts

CHATML = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def make_model(folder, template=CHATML):
    """A chat model with a token per byte, untrained, and all that belongs into its folder."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_ = Tokenizer(models.BPE(vocabulary, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_, pad_token="<pad>", eos_token="<eos>", chat_template=template)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, eos_token_id=1, pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def options(model, data, out, **more):
    """Of a run that takes a second."""
    options = dict(model=model, data=data, out=out, steps=1, prompts=2, minibatch=1, group_size=2, max_new_tokens=8,
                   eval_problems=1, eval_samples=1, lr_warmup=0) | more
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


VERL = jsonl(*({"prompt": chat("Be brief.", f"{i} and 7?"), "reward_model": {"ground_truth": str(i + 7)}}
               for i in range(5)))


def test_messages_go_through_the_chat_template(model, tmp_path):
    """System message and all; a chat brings an instruction of its own, and gets no other."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def prompt(row, **knobs):
        cfg = Config(model=str(model), data="d.jsonl", **knobs)
        policy = types.SimpleNamespace(cfg=cfg, tokenizer=tokenizer, eos_ids=[1])
        return tokenizer.decode(aspo.Policy.encode(policy, aspo.make_problem(row)))

    row = {"prompt": chat("Be brief.", "6 and 7?"), "reward_model": {"ground_truth": "13"}}
    assert prompt(row) == "<|system|>Be brief.<eos><|user|>6 and 7?<eos><|assistant|>"
    assert row["prompt"] == chat("Be brief.", "6 and 7?")  # the row stays as it was read
    plain = {"problem": "6 and 7?", "answer": 13}
    assert prompt(plain, instruction="") == "<|user|>6 and 7?<eos><|assistant|>"
    assert "\\boxed{}" in prompt(plain)
    tokenizer.chat_template = None
    assert prompt(row, instruction="") == "Question: Be brief.\n6 and 7?\nAnswer:"


def test_a_run_shows_a_prompt_its_answer_and_a_response(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(aspo.Policy, "decode", lambda self, ids: "It is \\boxed{12}.")
    assert aspo.main(options(model, put(tmp_path, VERL), tmp_path / "run")) == 0
    said = capsys.readouterr().out
    prompt = re.search(r"a prompt '<\|system\|>Be brief\.<eos><\|user\|>(\d) and 7\?<eos><\|assistant\|>'", said)
    assert f"the answer is '{int(prompt[1]) + 7}'" in said  # the gold of that very problem
    response = re.search(r"a response 'It is \\\\boxed\{12\}\.'\nwith the answer '12' for '(\d+)': reward (\d)", said)
    assert response[2] == str(int(response[1] == "12"))
    order = [said.index(words) for words in ("a prompt", "held-out accuracy before", "a response", "step 1/1")]
    assert order == sorted(order)


@pytest.mark.parametrize("template, words", [
    ("{% for m in messages %}{{ m['content'] }}", "chat template"),  # a loop without an end
    ("{{ messages[0]['content'].strop() }}", "chat template"),
    ("{{ messages[0]['content'] }}"
     "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system\nhere') }}{% endif %}", "Be brief"),
])
def test_a_broken_chat_template_is_one_line(template, words, tmp_path, capsys):
    error = error_of(capsys, *options(make_model(tmp_path / "m", template), put(tmp_path, VERL), tmp_path / "run"))
    assert words in error and "chat template" in error and not (tmp_path / "run").exists()


UNREADABLE = "The owl, who was tired, would {} go out again on that long night"


def test_golds_that_the_checker_cannot_read_are_warned_of(model, tmp_path, capsys):
    """In most rows: before the first step, with one of them, and not if the reward is another one."""
    def said(n_unreadable, **more):
        rows = [{"problem": f"{i}?", "answer": UNREADABLE.format(i) if i < n_unreadable else i} for i in range(10)]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        cfg = aspo.parse(options(model, put(tmp_path, jsonl(*rows)), tmp_path / "run"))
        aspo.open_run(cfg, **more)  # all that happens before the first step
        return capsys.readouterr().out

    warning = said(10)
    assert "warning: the checker cannot read" in warning and "The owl" in warning
    assert "cannot read" not in said(0) and "cannot read" not in said(2)
    assert "cannot read" not in said(10, reward=lambda response, row: 1.0)


# --------------------------------------------------------------------------------------------------------- rewards

REWARDS = """
def evens(response, row):
    return float(len(response) % 2 == 0) + row["extra"]["bonus"]

def fails(response, row):
    raise ValueError("no\\nsuch thing")

def gives(value):
    return lambda response, row: value

nothing, nan, infinite, text = gives(None), gives(float("nan")), gives(-float("inf")), gives("much")

def leaves(response, row):
    raise SystemExit
"""
ROWS = jsonl(*({"question": f"{i}?", "answer": f"so\n#### {i}", "extra": {"bonus": 10}} for i in range(5)))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def workplace(model, tmp_path, monkeypatch):
    """(folder, options of a run there)"""
    monkeypatch.setattr(aspo, "fcntl", None)  # a run's lock lives as long as the process, and would keep out --resume
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path, lambda **more: options(model, put(tmp_path, ROWS), tmp_path / "run", **more)


def test_a_reward_from_a_file_is_remembered(workplace):
    """The same one in training, in held-out accuracy and after --resume."""
    folder, knobs = workplace
    assert aspo.main(knobs(reward=f"{folder}/mine.py:evens")) == 0
    assert aspo.main(["--resume", str(folder / "run"), "--steps", "2"]) == 0
    for sample in lines(folder / "run" / "samples.jsonl"):
        cut = sample["reward"] == 0.0  # what is truncated scores at most 0
        assert cut or sample["reward"] == 10 + (len(sample["response"]) % 2 == 0)
    metrics = lines(folder / "run" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    assert json.loads((folder / "run" / "config.json").read_text())["reward"].endswith("mine.py:evens")


def test_a_reward_of_the_caller_sees_the_row_as_it_was_read(workplace):
    folder, knobs = workplace
    seen = []

    def reward(response, row):
        seen.append(row)
        return -2.5

    metrics = aspo.train(aspo.parse(knobs(max_new_tokens=16)), reward=reward)
    different = {json.dumps(row) for row in seen}
    assert len(different) == 3 and different <= set(ROWS.decode().splitlines())  # two prompts and a held-out one
    assert len(seen) == 4 + 2 * 1  # a rollout and two evaluations
    assert metrics["reward"] == metrics["heldout_accuracy"] == -2.5  # truncated or not: it is below 0


def test_heldout_accuracy_uses_the_same_reward(workplace):
    folder, knobs = workplace
    assert aspo.train(aspo.parse(knobs()), reward=lambda response, row: -3)["heldout_accuracy"] == -3


def test_signals_are_the_callers_again_after_training(workplace):
    folder, knobs = workplace
    numbers, during = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM), []
    before = list(map(signal.getsignal, numbers))
    aspo.train(aspo.parse(knobs()), reward=lambda response, row: during.append(signal.getsignal(2)) or 1.0)
    assert before[1] not in during[1:-1] and list(map(signal.getsignal, numbers)) == before


def test_going_on_with_another_reward_is_refused(workplace, capsys):
    folder, knobs = workplace
    aspo.train(aspo.parse(knobs()), reward=lambda response, row: 1.0)
    error = error_of(capsys, "--resume", folder / "run", "--steps", 2)  # would be the checker, which nobody asked for
    assert "reward" in error
    cfg = aspo.parse(["--resume", str(folder / "run"), "--steps", "2"])
    assert aspo.train(cfg, reward=lambda response, row: 1.0)["step"] == 2
    error = error_of(capsys, "--resume", folder / "run", "--steps", 3, "--reward", f"{folder}/mine.py:evens")
    assert "--reward" in error


@pytest.mark.parametrize("name, reason", [("fails", "no such thing"), ("nothing", "NoneType"), ("nan", "nan"),
                                          ("infinite", "-inf"), ("text", "much"), ("leaves", "SystemExit")])
def test_a_reward_that_fails_ends_the_run_with_one_line(name, reason, workplace, capsys, monkeypatch):
    folder, knobs = workplace
    monkeypatch.setattr(aspo.Policy, "decode", lambda self, ids: "the very\nresponse")
    error = error_of(capsys, *knobs(reward=f"{folder}/mine.py:{name}"))
    for words in ("reward", reason, "?'", "the very\\nresponse"):
        assert words in error, words
    assert name in error or "<lambda>" in error


@pytest.mark.parametrize("reward, reason", [("mine.py", "FILE.py:NAME"), ("mine.py:no_such", "no_such"),
                                            ("none.py:evens", "none.py"), ("broken.py:f", "FILE.py:NAME"),
                                            ("leaves.py:f", "FILE.py:NAME")])
def test_a_reward_that_is_not_there(reward, reason, workplace, capsys, monkeypatch):
    folder, knobs = workplace
    monkeypatch.chdir(folder)
    Path("broken.py").write_text("def f(response, row:\n")
    Path("leaves.py").write_text("import sys\nsys.exit()\n")
    error = error_of(capsys, *knobs(reward=reward))
    assert f"--reward {reward}" in error and reason in error and not (folder / "run").exists()


def test_after_a_failure_the_last_checkpoint_is_good(workplace, capsys):
    folder, knobs = workplace
    state = "calls = []\ndef f(response, row):\n    calls.append(1)\n    return 0.0 if len(calls) < 6 else {}\n"
    (folder / "mine.py").write_text(state.format("float('nan')"))
    error_of(capsys, *knobs(reward=f"{folder}/mine.py:f", steps=3, save_every=1, eval_every=0))
    assert [m["step"] for m in lines(folder / "run" / "metrics.jsonl")] == [1]
    (folder / "mine.py").write_text(state.format("1.0"))
    assert aspo.main(["--resume", str(folder / "run")]) == 0
    assert [m["step"] for m in lines(folder / "run" / "metrics.jsonl")] == [1, 2, 3]


# -------------------------------------------------------------------------------------------------------- programs
# An example to copy: a reward that runs the Python function in a response. What it does not protect from:
# - Cunning. It stops what models stumble into, not an attacker: code inside Python can get around the audit hook, and
#   then remove files by name or signal processes of its user (started by root, it is nobody in an empty root folder).
#   Let it run as a user of its own, in a container without network and secrets, which a bug of the kernel still opens.
# - Answers learned by heart: a program may return constants for the examples it was shown. Keep some out of the prompt.
# - A busy machine, on which a right program is too slow and scores 0. Limits are Linux's: elsewhere the run ends.

RUNNER = """
import bisect, collections, copy, functools, heapq, itertools, json, math, operator, os, random, re, resource, string
import sys, typing
secret, program, name, inputs = json.load(sys.stdin)
if os.geteuid() == 0:  # limits do not bind root: see nothing but the empty folder, as nobody
    os.chroot("."), os.setgroups([]), os.setgid(65534), os.setuid(65534)
# Seconds, bytes of memory and of output; no file can be opened, no thread or process begun. What is imported works.
for what, most in dict(CPU=1, AS=2**29, FSIZE=2**20, CORE=0, NOFILE=0, NPROC=0).items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
for module in os, sys.modules["posix"]:
    del module.mknod, module.mkfifo  # make files without opening them, unseen by the hook
forbidden = {"open", "os", "signal", "socket", "subprocess", "resource", "ctypes", "shutil"}  # os.remove, os.kill, ...
sys.addaudithook(lambda event, args: os._exit(1) if event.split(".")[0] in forbidden else None)
print(secret, flush=True)
space = {"__name__": "program"}
exec(program, space)
print(secret + json.dumps([space[name](*arguments) for arguments in inputs]), flush=True)
"""
SECONDS = 5  # a limit for what takes no CPU time, such as sleep


def passes(response: str, row: dict) -> float:
    """1 if the Python function in the response gives what the row's examples expect, else 0."""
    program = (re.findall(r"```(?:python)?\n(.*?)```", response, re.S) or [response])[-1]
    inputs, expected = zip(*row["examples"])  # what is expected never leaves this process
    secret = secrets.token_hex()  # marks the result: anything may be printed
    told = json.dumps([secret, program, row["function"], inputs])
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as out:  # a file has a limit, a pipe has none
        child = subprocess.Popen([sys.executable, "-I", "-c", RUNNER], stdin=subprocess.PIPE, stdout=out,
                                 stderr=subprocess.DEVNULL, cwd=empty, env={}, start_new_session=True)
        try:
            child.communicate(told.encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            child.kill()
            child.wait()
        out.seek(0)
        _, *parts = out.read().decode(errors="replace").split(secret)
    if not parts:
        raise RuntimeError("the sandbox did not start")
    try:
        return float(len(parts) == 2 and json.loads(parts[1]) == list(expected))
    except (ValueError, RecursionError):  # it found the secret and wrote what it liked
        return 0.0


ADD = {"problem": "Write add(a, b).", "answer": "a + b", "function": "add",
       "examples": [[[2, 3], 5], [["x", "y"], "xy"]]}
RIGHT = "def add(a, b):\n    return a + b\n"
GOOD_PROGRAMS = {
    "in a fence": f"The last block counts.\n```python\nadd = None\n```\n```python\n{RIGHT}```\nDone.",
    "bare": RIGHT,
    "with modules": f"import collections, functools, math, re\nfrom typing import List\n{RIGHT}",
    "that prints": f"print('[5]')\n{RIGHT}",
}


def goes_on(attempt):
    """A program that is right if only it gets over its attempt."""
    return f"import os\ntry:\n    {attempt}\nexcept OSError:\n    pass\n{RIGHT}"


PRINTED = json.dumps([expected for _, expected in ADD["examples"]])
HOSTILE = {
    "wrong": "def add(a, b):\n    return 5\n",
    "no program": "I would rather not.",
    "endless loop": "def add(a, b):\n    while True: pass\n",
    "endless sleep": f"import time\ntime.sleep(1000)\n{RIGHT}",
    "fork bomb": f"import os\nwhile True: os.fork()\n{RIGHT}",
    "threads": f"import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n{RIGHT}",
    "a program of its own": f"import subprocess\nsubprocess.Popen(['sleep', '99'])\n{RIGHT}",
    "huge memory": f"hoard = [bytearray(2**28) for _ in range(64)]\n{RIGHT}",
    "a huge number": "def add(a, b):\n    return 10 ** 10 ** 9\n",
    "endless output": "def add(a, b):\n    while True: print('x' * 10_000)\n",
    "a file here": goes_on("open('left', 'w').write('x')"),
    "a file there": goes_on("open('PLACE/left', 'w').write('x')"),
    "a folder": goes_on("os.mkdir('PLACE/left')"),
    "a node": goes_on("os.mknod('PLACE/left')"),
    "a pipe": goes_on("os.mkfifo('PLACE/left')"),
    "a link": goes_on("os.symlink('x', 'PLACE/left')"),
    "reads": goes_on("open('PLACE/answers').read()"),
    "reads in place of stdin": goes_on("os.close(0), os.open('PLACE/answers', 0)"),
    "reads the trainer": goes_on("os.open(f'/proc/{os.getppid()}/environ', 0)"),
    "removes": goes_on("os.remove('PLACE/answers')"),
    "empties": goes_on("os.truncate('PLACE/answers', 0)"),
    "the network": f"import socket\nsocket.create_connection(('127.0.0.1', 9))\n{RIGHT}",
    "kills the trainer": goes_on("os.kill(os.getppid(), 15)"),
    "prints what is expected": f"print('{PRINTED}')\nimport sys\nsys.exit()\n",
    "writes what is expected": f"import os\nfor n in range(9):\n    try: os.write(n, b'{PRINTED}')\n"
                               "    except OSError: pass\nos._exit(0)\n",
    "leaves": f"import os\nos._exit(0)\n{RIGHT}",
    "raises what nothing catches": f"raise BaseException\n{RIGHT}",
    "raises the limits": f"import resource\nfor n in (resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):\n"
                         f"    resource.setrlimit(n, (-1, -1))\n{RIGHT}",
    "a result without an end": "import json\njson.dumps = lambda x: '[' * 100_000\n" + RIGHT,
    "a result that equals everything": "class All:\n    def __eq__(self, other): return True\n"
                                       "def add(a, b):\n    return All()\n",
}


@pytest.mark.parametrize("program", GOOD_PROGRAMS.values(), ids=GOOD_PROGRAMS)
def test_right_programs_score_1(program):
    assert passes(program, ADD) == 1.0


def at_work_in(folder):
    """Processes that were started there, and those that these have started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            found += [process.name] if os.readlink(process / "cwd").startswith(str(folder)) else []
    return found


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_programs_score_0_and_leave_nothing_behind(program, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setitem(globals(), "SECONDS", 3)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "answers").write_text(PRINTED)
    for folder in (tmp_path, tmp_path / "temporary"):
        folder.chmod(0o777)  # what any user may write in
    assert passes(program.replace("PLACE", str(tmp_path)), ADD) == 0.0
    assert not at_work_in(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["answers", "temporary"]
    assert (tmp_path / "answers").read_text() == PRINTED


def test_limits_hold_without_the_audit_hook(monkeypatch):
    """The wall behind the doorman; a limit that root could raise again would be none."""
    monkeypatch.setitem(globals(), "RUNNER", re.sub(r"sys\.addaudithook.*", "", RUNNER))
    attempts = {
        "fork": "import os\nos.fork()", "thread": "import threading\nthreading.Thread(target=print).start()",
        "open": "import os\nos.dup(1)", "close and open": "import os\nos.close(0)\nos.dup(1)",
        "raise": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))", "memory": "bytearray(2**30)"}
    assert passes(RIGHT, ADD) == 1.0
    for name, attempt in attempts.items():
        assert passes(f"{attempt}\n{RIGHT}", ADD) == 0.0, name
    assert passes(goes_on("os.fork(), os._exit(0)"), ADD) == 1.0  # refused


def test_a_sandbox_that_does_not_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setitem(globals(), "RUNNER", "import resource\nresource.no_such_thing\n")
    with pytest.raises(RuntimeError, match="did not start"):
        passes(RIGHT, ADD)


def test_programs_are_trained_on(model, tmp_path, monkeypatch):
    """Through the same door as any reward: right, wrong and hostile responses of one rollout."""
    texts = [RIGHT, HOSTILE["wrong"], HOSTILE["reads"], GOOD_PROGRAMS["in a fence"]]
    monkeypatch.setattr(aspo, "stop_tokens", lambda *args: list(range(258)))  # nothing is cut off
    monkeypatch.setattr(aspo.Policy, "decode", lambda self, ids, texts=iter(texts * 9): next(texts))
    rows = [ADD | {"problem": f"{i}: write add(a, b)."} for i in range(5)]
    cfg = aspo.parse(options(model, put(tmp_path, jsonl(*rows)), tmp_path / "run", eval_samples=4))
    metrics = aspo.train(cfg, reward=passes)
    assert metrics["reward"] == metrics["heldout_accuracy"] == 0.5 and metrics["uniform_groups"] == 0


# -------------------------------------------------------------------------------------------------------- messages

LACKS = {  # what is deleted from a model's folder, or put there; words of the one line
    "everything": ("*", {}, ["config.json"]),
    "the config": ("config.json", {}, ["config.json"]),
    "the tokenizer": ("tokenizer*", {}, ["it has no tokenizer"]),
    "the tokenizer but for its config": ("tokenizer.json", {}, ["it has no tokenizer"]),
    "the weights": ("*.safetensors", {}, ["it has no weights"]),
    "the base model": ("*", {"adapter_config.json": "{}", "adapter_model.safetensors": "", "tokenizer.json": "{}"},
                       ["adapter", "base"]),
}


@pytest.mark.parametrize("what", LACKS)
def test_what_a_folder_lacks_to_be_a_model(what, model, tmp_path, capsys):
    pattern, files, words = LACKS[what]
    folder = shutil.copytree(model, tmp_path / "m")
    for path in folder.glob(pattern):
        path.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
    error = error_of(capsys, *options(folder, put(tmp_path, VERL), tmp_path / "run"))
    assert f"--model {folder}" in error and all(word in error.partition("qwen-0.5b")[0] for word in words), error


def test_resume_with_a_checkpoint_says_what_to_type(tmp_path, capsys):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    for name in ("trainer.pt", "config.json"):
        (tmp_path / "run" / "checkpoint" / name).write_text("{}")
    assert f"type --resume {tmp_path / 'run'}\n" in error_of(capsys, "--resume", tmp_path / "run" / "checkpoint")


def test_a_model_in_this_folder_gives_the_run_a_name(tmp_path, monkeypatch):
    (tmp_path / "mymodel").mkdir()
    monkeypatch.chdir(tmp_path / "mymodel")
    for model in (".", "./", str(tmp_path / "mymodel")):
        assert aspo.parse(["--model", model, "--data", "d.jsonl"]).out == "runs/mymodel-aspo-s0"
    assert aspo.parse(["--model", "org/mymodel"]).out == "runs/mymodel-aspo-s0"

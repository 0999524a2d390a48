"""What the README says of the code is what the code says, and its examples run."""
import math
import re

import memory
import torch
from conftest import ROOT

import aspo

README = (ROOT / "README.md").read_text()
SHORT = ["--steps", "2", "--sft_steps", "40", "--prompts", "8", "--minibatch", "4", "--eval_problems", "8"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def run_example(code: str, out: str, monkeypatch, tmp_path):
    """As written, with a shorter run."""
    assert f'"--out", "{out}"' in code
    short = ", ".join(f'"{word}"' for word in ["--out", out, *SHORT])
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace(f'"--out", "{out}"', short), "README", "exec"), {"__name__": "__main__"})
    assert (tmp_path / out / "checkpoint" / "config.json").exists()


def test_the_memory_table_is_the_formulas():
    assert memory.presets_table() in README


def test_the_aliases_are_all_there():
    assert ", ".join(f"`{name}`" for name in aspo.PRESETS if name != "tiny") in README


def test_code_shown_is_the_code():
    source = re.sub(r' {4}""".*?"""\n', "", (ROOT / "aspo.py").read_text(), flags=re.S)
    for function in blocks("python")[0].split("\n\n"):
        assert function.strip() in source


def test_your_own_weight(tmp_path, monkeypatch):
    monkeypatch.setitem(aspo.WEIGHTS, "sqrt", None)  # removed again after the test
    run_example(blocks("python")[1], "runs/sqrt", monkeypatch, tmp_path)
    w = aspo.WEIGHTS["sqrt"](torch.tensor([[1.0, 0.25, 1.3]]), torch.ones(1, 1), (0.2, 0.2), 3.0)
    torch.testing.assert_close(w, torch.tensor([[1.0, 0.5, 0.0]]))


def test_your_own_reward(tmp_path, monkeypatch):
    code = blocks("python")[2]
    run_example(code, "runs/brief", monkeypatch, tmp_path)
    metrics = (tmp_path / "runs/brief/metrics.jsonl").read_text()
    assert float(re.search(r'"reward": ([-.\de]+)', metrics)[1]) < 0.9  # the length has its price
    (tmp_path / "brief.py").write_text(code)
    reward = aspo.open_reward(aspo.Config(reward="brief.py:brief"), None)
    problem = aspo.make_problem({"problem": "1+1", "answer": 2})
    assert math.isclose(reward("#### 2", problem), 0.94) and math.isclose(reward("#### 3", problem), -0.06)


def test_commands_are_tested_or_marked():
    """Every command line says which of its parts needs a GPU or a hub, or is one whose like the tests run."""
    for line in "\n".join(blocks("sh")).splitlines():
        if not line or line.startswith("pip install") or re.search(r"# .*(GPU|hub|minutes|hour)", line):
            continue
        command = line.split("#")[0].split()
        assert command[0] == "python", line
        script = next(word for word in command if word.endswith(".py"))
        assert (ROOT / script).exists(), line
        flags = {word for word in command if word.startswith("--")}
        if script == "aspo.py" and "--resume" not in flags:
            aspo.parse(command[command.index(script) + 1:])
        assert all(flag in (ROOT / script).read_text() or flag[2:] in aspo.Config.__dataclass_fields__
                   for flag in flags), line


def test_every_metric_that_the_readme_names_is_one():
    names = re.findall(r"`(\w+)`", README[README.index("## Eight numbers"):README.index("## Evaluate")])
    source = (ROOT / "aspo.py").read_text()
    for name in set(names) - {"metrics", "jsonl", "rollout_metrics", "update_metrics"}:
        stem = re.sub("_(pos|neg)", "_{sign}", name)
        assert f'"{name}"' in source or f'"{stem}"' in source, name

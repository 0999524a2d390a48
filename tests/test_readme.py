"""What the README says of the code is what the code says. To refresh its tables: python tests/test_readme.py"""
import dataclasses
import math
import re

import memory
import torch
from conftest import ROOT

import aspo


def metrics_table() -> str:
    rows = [f"| `{name}` | {formula} | {healthy} |" for name, (formula, healthy) in aspo.METRICS.items()]
    return "\n".join(["| metric | formula | healthy |", "|---|---|---|", *rows])


def flags_table() -> str:
    cfg = aspo.parse([])
    rows = []
    for field in dataclasses.fields(cfg):
        text = field.metadata["help"].replace("%%", "%").replace("<", "&lt;").replace("|", "\\|")
        if choices := field.metadata.get("choices"):
            text += f" ({', '.join(choices)})"
        value = getattr(cfg, field.name)
        rows.append(f"| `--{field.name}` | {'' if value == '' else f'`{value}`'} | {text} |")
    return "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows])


def aliases() -> str:
    return ", ".join(f"`{name}`" for name in aspo.PRESETS if name != "tiny")


def table_in(section: str, text: str) -> tuple[int, int]:
    """Start and end of the first table under a heading."""
    return re.compile(r"^\|.*(\n\|.*)*", re.M).search(text, text.index(f"\n## {section}\n")).span()


TABLES = {"Metrics": metrics_table, "Flags": flags_table, "Train a real model": memory.presets_table,
          "What a step costs": memory.largest_table}


def test_tables_agree_with_the_code():
    text = (ROOT / "README.md").read_text()
    for section, table in TABLES.items():
        start, end = table_in(section, text)
        assert text[start:end] == table()
    assert aliases() in text


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_code_shown_is_the_code():
    source = re.sub(r'    """.*?"""\n', "", (ROOT / "aspo.py").read_text())
    for function in blocks("python")[0].split("\n\n"):
        assert function.strip() in source


def test_your_own_loss(tmp_path, monkeypatch):
    """The worked example, with its run made shorter."""
    code = blocks("python")[1]
    assert '"--out", "runs/sqrt"' in code
    short = '"--out", "runs/sqrt", "--steps", "2", "--sft_steps", "40", "--prompts", "8", "--minibatch", "4", "--eval_problems", "8"'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(aspo.WEIGHTS, "sqrt", None)  # removed again after the test
    exec(compile(code.replace('"--out", "runs/sqrt"', short), "README", "exec"), {})
    assert (tmp_path / "runs" / "sqrt" / "checkpoint" / "config.json").exists()
    w = aspo.WEIGHTS["sqrt"](torch.tensor([[0.0, math.log(0.25)]]), torch.ones(1, 1), torch.ones(1, 2), aspo.Config())
    torch.testing.assert_close(w, torch.tensor([[1.0, 0.5]]))


def test_commands_are_tested_or_marked():
    """Every command line says which of its parts needs a GPU or a hub, or is one whose like the tests run."""
    for line in "\n".join(blocks("sh")).splitlines():
        if not line or line.startswith("pip install") or re.search(r"# .*(GPU|hub|minutes|hour)", line):
            continue
        command = line.split("#")[0].split()
        assert command[0] in ("python", "torchrun"), line
        script = next(word for word in command if word.endswith(".py"))
        assert (ROOT / script).exists(), line
        if script == "aspo.py":
            arguments = command[command.index(script) + 1:]
            if "--resume" not in arguments:
                aspo.parse([word for word in arguments if word != "..."])
        elif script == "eval.py":
            flags = {word for word in command if word.startswith("--")}
            assert all(flag in (ROOT / "eval.py").read_text() for flag in flags), line


if __name__ == "__main__":
    path = ROOT / "README.md"
    text = path.read_text()
    for section, table in TABLES.items():
        start, end = table_in(section, text)
        text = text[:start] + table() + text[end:]
    path.write_text(text)

"""What the README says of the files is so. The forks themselves run in test_forks.py."""
import re
import shlex

import pytest
from conftest import ROOT

import aspo

README = (ROOT / "README.md").read_text()
FORKS = {path.name: path.read_text() for path in (ROOT / "tests" / "forks").glob("*.py")}
CODE = (ROOT / "aspo.py").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def test_sizes():  # to within a percent, so that not every edit is one here too
    said = re.findall(r"`(\w+\.py)` (?:has )?([\d,]+)(?: lines)? \(([\d.]+) KB\)", README)
    assert [name for name, *_ in said] == ["aspo.py", "reward.py", "eval.py"]
    for name, lines, kb in said:
        found = (ROOT / name).read_bytes().count(b"\n"), (ROOT / name).stat().st_size / 1000
        assert (int(lines.replace(",", "")), float(kb)) == pytest.approx(found, rel=0.01), (name, found)
    method = CODE[:CODE.index("= PART TWO: ")].count("\n")
    assert int(re.search(r"the first (\d+) are the method", README)[1]) == pytest.approx(method, rel=0.01), method


def test_code_shown_is_the_code():
    methods, brief = blocks("python")
    source = re.sub(r' {4}""".*?"""\n', "", CODE, flags=re.S)
    for function in re.sub(r" *# .*\n", "", methods).split("\n\n"):
        assert function.strip() in source
    assert brief in FORKS["brief.py"]


def test_aliases_and_their_memory():
    named = dict(re.findall(r"`(\w[\w.-]+)`(?: (\d+))?[,.]", section("A real model on a GPU")))
    assert list(named) == list(aspo.PRESETS)[1:]
    import gpu
    rows = dict(re.findall(r"^\| `([\w.-]+)` .* (\d+) \| \d+ GB \|$", gpu.table(), re.M))
    assert rows == {name: gib for name, gib in named.items() if gib}


def test_methods():
    rows = re.findall(r"^\| `(.+?)` \| (.*?) \| (.*?) \| \d{4}\.\d{5} \|$", section("Methods"), re.M)
    assert {loss for loss, *_ in rows} == set(aspo.WEIGHTS)
    for loss, good, bad in rows:
        cfg = aspo.Config(loss=loss)
        assert "as `grpo`" in good or f"{1 + cfg.eps_high:.5g}" in good, loss
        assert "as `grpo`" in bad or loss == "cispo" or f"{1 - cfg.eps_low:.5g}" in bad, loss
        assert cfg.dual_clip == 3 and cfg.divide_by_std == ("std" not in good), loss


def test_commands():
    first, second, *commands = [line for line in "".join(blocks("sh")).splitlines() if line]
    assert (first, second) == tuple(f"pip install -r requirements.txt && python {x}" for x in ("aspo.py", "-m pytest"))
    for line in commands:
        words = shlex.split(line.split("  #")[0])
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[script]).exists(), line
        if words[script] == "aspo.py" and "--resume" not in words:
            aspo.parse(words[script + 1:])
    for path in re.findall(r"assets/\w+\.\w+|tests/[\w/]+\.py", README):
        assert (ROOT / path).exists(), path


def test_names():
    tools = "".join((ROOT / path).read_text() for path in ("eval.py", "tests/gpu.py", "tests/experiment.py"))
    for flag in set(re.findall(r"--(\w[\w-]*)", README)) - {"help", "nproc-per-node", "shutdown-timeout"}:
        assert hasattr(aspo.Config(), flag) or f'"--{flag}"' in tools, flag
    for name in set(re.findall(r"`([a-z]+(?:_[a-z]+)*)`", README)) - {"pi_old", "w", "r", "row"}:
        assert hasattr(aspo, name) or f'"{name}"' in CODE, name
    for words in re.findall(r'\*\*"(.*)"', README):
        assert words in CODE, words


def test_fork_map():
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", section("Fork map"), re.M)[1:]
    assert sorted(re.findall(r"`(\w+\.py)`", "".join(files for *_, files in rows)) + ["brief.py", "in_order.py"]) == sorted(FORKS)
    for _, places, files in rows:
        text = "".join(FORKS[name] for name in re.findall(r"\w+\.py", files))
        for place in re.findall(r"`([A-Z]?\w+(?:\.\w+)?)`", places):
            assert re.search(rf"^aspo\.{place}\b(\[.*\])?( = |, )", text, re.M), place
    for name, text in FORKS.items():
        assert len(re.findall(r'^(?!"""|#|import |from )\s*\S', text, re.M)) <= 12, name

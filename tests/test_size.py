"""Minimal is the first promise, and the README says the numbers. Whoever is over a limit takes something out."""
import ast
import io
import tokenize
from collections import Counter

from conftest import ROOT


def tokens(text: str) -> Counter:
    """How many Python tokens of the code each line has; comments and docstrings do not weigh."""
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    documented = {n.body[0].lineno for n in nodes if ast.get_docstring(n) is not None}
    free = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found, inside = Counter(), 0
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[t.type]
        inside -= name == "FSTRING_END"
        if t.type not in free and t.start[0] not in documented and not inside:  # before Python 3.12 it was one token
            found.update(range(t.start[0], t.end[0] + 1 - (name == "FSTRING_END")))
        inside += name == "FSTRING_START"
    return found


# bytes, tokens, lines of more than 25 tokens, lines
LIMITS = {"aspo.py": (79_000, 11_500, 25, 1_600), "reward.py": (27_000, 4_900, 20), "eval.py": (20_000,)}


def test_weight():
    for name, limits in LIMITS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        found = tokens(text)
        weight = len(text.encode()), found.total(), sum(n > 25 for n in found.values()), text.count("\n")
        assert all(size <= most for size, most in zip(weight, limits)), (name, weight)
        assert max(map(len, text.splitlines())) <= 100, name
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        assert max(sum(f.lineno <= line <= f.end_lineno for line in found) for f in functions) <= 40, name
    tests = b"".join(path.read_bytes() for path in (ROOT / "tests").rglob("*.py"))
    assert len(tests) <= 250_000 and tests.count(b"\n") <= 4_500, (len(tests), tests.count(b"\n"))
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 10_000 and readme.count(b"\n") <= 150, (len(readme), readme.count(b"\n"))

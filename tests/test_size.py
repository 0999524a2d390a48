"""Minimal is the first promise, and the README says the numbers. Whoever is over a limit takes something out."""
import ast
import io
import tokenize

from conftest import ROOT


def tokens(text: str) -> int:
    """Python tokens of the code, on each of their lines; comments and docstrings do not weigh."""
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    documented = {n.body[0].lineno for n in nodes if ast.get_docstring(n) is not None}
    free = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found, inside = 0, 0
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[t.type]
        inside -= name == "FSTRING_END"
        if t.type not in free and t.start[0] not in documented and not inside:  # before Python 3.12 it was one token
            found += t.end[0] - t.start[0] + 1 - (name == "FSTRING_END")
        inside += name == "FSTRING_START"
    return found


# bytes, tokens, lines
LIMITS = {"aspo.py": (79_000, 11_500, 1_600), "reward.py": (27_000, 4_900), "eval.py": (20_000,)}


def test_weight():
    for name, limits in LIMITS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        weight = len(text.encode()), tokens(text), text.count("\n")
        assert all(found <= most for found, most in zip(weight, limits)), (name, weight)
        assert max(map(len, text.splitlines())) <= 100, name
    tests = b"".join(path.read_bytes() for path in (ROOT / "tests").glob("*.py"))
    assert len(tests) <= 250_000 and tests.count(b"\n") <= 4_500, (len(tests), tests.count(b"\n"))
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 10_000 and readme.count(b"\n") <= 150, (len(readme), readme.count(b"\n"))

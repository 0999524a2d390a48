"""What the README says of the code is what the code says. To refresh its tables: python tests/test_readme.py"""
import dataclasses
import re

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


TABLES = {"Metrics": metrics_table, "Flags": flags_table}


def test_tables_agree_with_the_code():
    text = (ROOT / "README.md").read_text()
    for section, table in TABLES.items():
        start, end = table_in(section, text)
        assert text[start:end] == table()
    assert aliases() in text


def test_code_shown_is_the_code():
    shown = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    source = re.sub(r'    """.*?"""\n', "", (ROOT / "aspo.py").read_text())
    for function in shown.split("\n\n"):
        assert function.strip() in source


if __name__ == "__main__":
    path = ROOT / "README.md"
    text = path.read_text()
    for section, table in TABLES.items():
        start, end = table_in(section, text)
        text = text[:start] + table() + text[end:]
    path.write_text(text)

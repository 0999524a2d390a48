"""A small answer checker: is the final answer of a response the gold answer?"""
import re
from fractions import Fraction


def extract_answer(response: str) -> str | None:
    """The last well-formed \\boxed{...} after any </think>, else the text of a final "#### ..." line, else None."""
    text = response.rpartition("</think>")[2]
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + 7:end].strip()
        start = text.rfind("\\boxed{", 0, start)
    line = text.rstrip().rpartition("\n")[2]
    return line[4:].strip() if line.startswith("####") else None


def is_equal(given: str, gold: str) -> bool:
    """Equal as exact numbers (integers, decimals, a/b, thousands commas), else as text without spaces."""
    given, gold = (re.sub(r"\s|\\[,!;]|(?<=\d),(?=\d{3}\b)|^\$|\$$", "", text) for text in (given, gold))
    number = re.compile(r"[-+]?\d{1,400}(\.\d{1,400})?(/\d{1,400})?")
    if number.fullmatch(given) and number.fullmatch(gold):
        try:
            return _fraction(given) == _fraction(gold)
        except ZeroDivisionError:
            return False
    return given == gold != ""


def _fraction(text: str) -> Fraction:
    numerator, _, denominator = text.partition("/")
    return Fraction(numerator) / Fraction(denominator or 1)


def math_reward(response: str, gold: str) -> float:
    """1.0 if the response's final answer equals gold, else 0.0. Never raises."""
    answer = extract_answer(response)
    return float(answer is not None and is_equal(answer, gold))

r"""Is a response's final answer the gold answer? A small and safe checker for mathematics.

    math_reward("... so \\boxed{\\frac{2}{4}}.", "0.5") == 1.0

The answer is the last \boxed{}, else a final "#### 42", else what follows "the answer is" at the end. It is read by a
tokenizer and a recursive-descent parser into a tree of tuples, in which rational arithmetic is done at once and exactly;
two trees that differ are compared by their values at random complex points (Schwartz-Zippel), so that polynomials and
identities need no simplification. Nothing that a model wrote is ever executed, and the work is bounded before it is
begun: text, depth, digits and exponents.
"""
import functools
import math
import random
import re
import unicodedata
from fractions import Fraction

from mpmath.ctx_mp import MPContext

LONGEST = 600  # characters of an answer that is read as mathematics; a longer one must be the gold text itself
TAIL = 100_000  # characters of a response in which its answer is looked for
TOKENS = 200
DEPTH = 40
BITS = 20_000  # of an exact number; what would be larger is not computed

# ------------------------------------------------------------------------------------------------------- extraction

_END_OF_TURN = re.compile(r"<\|(?:im_end|eot_id|endoftext|end_of_text)\|>|</s>|<｜end▁of▁sentence｜>")
_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_ANSWER_IS = re.compile(r"(?:answer|result)\**\s*(?:is|=|:)\**:?\**\s*", re.I)


def _braced(text: str, start: int) -> int | None:
    """Where the group that opens at start closes; None if it never does, or only after far too much."""
    depth = 0
    for brace in _BRACE.finditer(text, start, start + 20 * LONGEST):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end() - 1
    return None


def _last_box(text: str) -> str | None:
    """Content of the last well-formed box; one inside another belongs to the outer one."""
    positions, at = [], len(text)
    while len(positions) < 16 and (at := text.rfind("box", 0, at)) > 0:
        if found := _BOX.match(text, text.rfind("\\", max(0, at - 2), at)):
            positions.append(found)
    answer, end = None, -1
    for found in reversed(positions):
        if found.start() < end:
            continue
        if text.startswith("{", found.end()):
            if (close := _braced(text, found.end())) is not None:
                answer, end = text[found.end() + 1:close], close
        elif short := re.compile(r"[\w.]{1,40}").match(text, found.end()):  # \boxed 5
            answer, end = short[0], short.end()
    return answer


def extract_answer(response: str) -> str | None:
    """The final answer as text: the last well-formed box, else a final "#### ...", else "the answer is ..." at the end.

    Only what follows the last </think> counts, up to the end of the turn. None if there is no answer.
    """
    text = response[-TAIL:].rpartition("</think>")[2]
    if end := _END_OF_TURN.search(text):
        text = text[:end.start()]
    if (answer := _last_box(text)) is not None:
        return answer.strip()
    tail = text[-2 * LONGEST:].strip()
    line = tail.rpartition("\n")[2].strip()
    if line.startswith("####"):
        return line.lstrip("#").strip()
    tail = re.sub(r"\s*I hope (?:it|this) is correct\.?$", "", line)
    if phrases := list(_ANSWER_IS.finditer(tail)):
        answer = re.split(r"(?<=[^\d\s])[.!]\s|(?<=\d)[.!]\s+(?=[A-Z])", tail[phrases[-1].end():])[0]  # one sentence
        return answer.strip("* ").rstrip(".") or None
    return None


# ------------------------------------------------------------------------------------------------------ normal text

_SUPER = {ord(c): n for c, n in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")}
_SUB = {ord(c): n for c, n in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789")}
_SIGNS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "﹣": "-", "－": "-", "‐": "-", "‑": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*",
    "÷": "/", "∕": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "√": r"\sqrt ",
    "∛": r"\cbrt ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "θ": r"\theta ", "′": "'", "€": " ", "£": " ", "¥": " ", "⟨": r"\langle ",
    "⟩": r"\rangle ", "…": "...", "´": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " "})
_SPACING = re.compile(r"(?<!\\)\\(?:[;:>, ()]|(?:quad|qquad|displaystyle|textstyle|limits|left|right|[bB]igg?[lrm]?|middle)(?![a-zA-Z]))|~")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\ |~|,\\,|,\\ | )(?=\d{3}(?!\d))")  # 1{,}000 and 1\,000
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.S)


def _ascii(text: str) -> str:
    """Unicode digits, signs and fractions as ASCII or LaTeX; invisible characters dropped."""
    if text.isascii():
        return text
    text = re.sub(f"[{''.join(map(chr, _SUPER))}]+", lambda m: f"^{{{m[0].translate(_SUPER)}}}", text)
    text = re.sub(f"[{''.join(map(chr, _SUB))}]+", lambda m: f"_{{{m[0].translate(_SUB)}}}", text)
    out = []
    for c in text.translate(_SIGNS):
        if c.isascii() or unicodedata.category(c) == "Cf":
            out.append(c * c.isascii())
        elif (digit := unicodedata.decimal(c, None)) is not None:
            out.append(str(digit))
        elif unicodedata.category(c) == "No" and (value := unicodedata.numeric(c, None)) is not None and value < 1:
            f = Fraction(value).limit_denominator(10)
            out.append(rf"\frac{{{f.numerator}}}{{{f.denominator}}}")
        else:
            out.append(unicodedata.normalize("NFKC", c))
    return "".join(out)


def _clean(text: str) -> str:
    """The answer without what carries no meaning: dollar signs, spacing, \\left, closing punctuation."""
    text = _ascii(text).strip()
    while box := _BOXED.fullmatch(text):
        text = box[1].strip()
    text = text.replace("\\!", "").replace("\\$", r"\dollar ").replace("$", " ")
    text = re.sub(r"\\(?:left|right)\s*\.", " ", _THOUSANDS.sub(",", text))
    text = re.sub(r"^\\\[(.*)\\\]$", r"\1", _SPACING.sub(" ", text).strip())
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{\s*([\d.,]+)\s*([a-zA-Z .]*)\}", r"\1 \\text{\2}", text).replace(r"\text{}", "")
    text = re.sub(r"\\text\s*\{([^{}]*\b(?:and|or)\b[^{}]*)\}", r" \1 ", text)
    text = re.sub(r"^(?:\\text\s*\{)?all real(?: number)?s\}?$", r"\\mathbb{R}", text, flags=re.I)
    return re.sub(r"(?<![.,;:])[.,;:]$", "", re.sub(r"\s+", " ", text).strip()).strip()


_WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)|mbox|operatorname)\*?\s*\{([^{}]*)\}")


def _words(text: str) -> str:
    """For comparing as text: no wrappers, braces, quotes, case or spaces."""
    return re.sub(r"(?<!\d)\s|\s(?!\d)|[{}\"'`]|(?<!\.)\.$", "", _WRAPPER.sub(r"\1", text)).casefold()


# ------------------------------------------------------------------------------------------------------------ trees
# A number is a Fraction. Everything else is a tuple: ("var", name), ("const", "pi"), ("inf", 1), ("+", a, b), ("*", a, b),
# ("/", a, b), ("^", a, b), ("root", n, a), (function, a), ("log", base, a), ("binom", n, k), ("pm", sign), ("deg", a),
# ("pct", a), ("text", words), and the structures ("seq", open, close, items), ("list", items), ("set", items),
# ("union", items), ("matrix", rows), ("=", sides), ("<", strict, difference).


class _Unreadable(ValueError):
    pass


def _exact(*numbers) -> bool:
    return all(isinstance(n, Fraction) for n in numbers)


def _bounded(n: Fraction) -> Fraction:
    if n.numerator.bit_length() + n.denominator.bit_length() > BITS:
        raise _Unreadable("a number too large")
    return n


_STRUCTURES = {"seq", "list", "set", "union", "matrix", "=", "<", "text"}


def _scalar(*nodes) -> None:
    if any(isinstance(n, tuple) and n[0] in _STRUCTURES for n in nodes):
        raise _Unreadable("arithmetic on a structure")


def _add(a, b):
    _scalar(a, b)
    return _bounded(a + b) if _exact(a, b) else ("+", a, b)


def _mul(a, b):
    _scalar(a, b)
    if a == -1 and isinstance(b, tuple) and b[0] == "inf":
        return ("inf", -b[1])
    return _bounded(a * b) if _exact(a, b) else ("*", a, b)


def _div(a, b):
    _scalar(a, b)
    if b == 0:
        raise _Unreadable("division by zero")
    return _bounded(a / b) if _exact(a, b) else ("/", a, b)


def _pow(a, b):
    _scalar(a, b)
    if _exact(a, b) and b.denominator == 1:
        if a == 0 and b <= 0:
            raise _Unreadable("a power of zero")
        if abs(b) * (a.numerator.bit_length() + a.denominator.bit_length()) <= BITS or a in (0, 1, -1):
            return a ** int(b % 2 if a == -1 else 1 if a in (0, 1) else b)
    return ("^", a, b)


def _root(n, a):
    _scalar(n, a)
    if _exact(n, a) and n.denominator == 1 and 1 < n < 100 and (a >= 0 or n % 2):
        n, sign = int(n), -1 if a < 0 else 1
        top, bottom = (_integer_root(abs(x), n) for x in (a.numerator, a.denominator))
        if top is not None and bottom is not None:
            return Fraction(sign * top, bottom)
    return ("root", n if isinstance(n, tuple) else Fraction(n), a)


def _integer_root(x: int, n: int) -> int | None:
    if n == 2:
        r = math.isqrt(x)
    elif x.bit_length() < 1000:
        r = round(x ** (1 / n)) if x.bit_length() < 50 else 0
        if not r:
            low, high = 0, 1 << (x.bit_length() // n + 1)
            while low < high:
                mid = (low + high + 1) // 2
                low, high = (mid, high) if mid ** n <= x else (low, mid - 1)
            r = low
    else:
        return None
    return r if r ** n == x else None


def _factorial(a):
    _scalar(a)
    if _exact(a):
        if a.denominator != 1 or a < 0:
            raise _Unreadable("factorial of what is no natural number")
        if a <= 2500:
            return Fraction(math.factorial(int(a)))
    return ("!", a)


def _binomial(n, k):
    _scalar(n, k)
    if _exact(n, k) and n.denominator == k.denominator == 1 and 0 <= k <= n <= 2500:
        return Fraction(math.comb(int(n), int(k)))
    return ("binom", n, k)


def _floor(a, up: bool):
    _scalar(a)
    return Fraction(math.ceil(a) if up else math.floor(a)) if _exact(a) else ("ceil" if up else "floor", a)


# ----------------------------------------------------------------------------------------------------------- parser

_REPEATING = r"\d*\.\d*\\(?:overline|bar|dot)\s*(?:\{\d+\}|\d)|\d*\.\d*\(\d+\)|\d*\.\d+(?:\.\.\.|\\[lc]?dots(?![a-zA-Z]))"
_TOKENS = {thousands: re.compile(
    rf"\s*(?:(?P<rep>{_REPEATING})|(?P<base>\d[0-9A-F]*_(?:\d+|\{{\d+\}}))"
    rf"|(?P<num>{thousands}\d+(?:\.\d+|\.(?![.\d]))?(?:[eE][+-]?\d+(?![\d.]))?|\.\d+)|(?P<text>{_WRAPPER.pattern.replace('(', '(?:', 0)})"
    r"|(?P<cmd>\\(?:[a-zA-Z]+|.))|(?P<word>[^\W\d_]+)|(?P<op>\*\*|<=|>=|!=|==|\S))", re.S)
    for thousands in (r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|", "")}
_RELATIONS = {"=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=",
              r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", r"\lt": "<", r"\gt": ">", r"\ne": "!=", r"\neq": "!=", "!=": "!=",
              r"\in": "in", r"\equiv": "="}
_FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp", "arcsin", "arccos", "arctan",
              "arccot", "arcsec", "arccsc", "asin", "acos", "atan", "ln", "lg", "log", "sqrt", "cbrt", "abs", "floor", "ceil")
_GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
             "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar".split())
_NUMBER_WORDS = {word: Fraction(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty".split())}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNITS = {name: unit for names in (
    "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre", "meter metre", "ft foot feet", "inch inches in",
    "yd yard", "mile mi", "kg kilogram", "gram", "mg milligram", "lb lbs pound", "oz ounce", "second sec", "minute min",
    "hour hr hrs", "day", "week", "month", "year yr", "dollar usd", "cent", "liter litre", "ml milliliter", "mph", "kmh", "percent",
    "degree deg", "square sq", "cubic", "unit", "rad radian", "people", "way", "hz", "mol", "kj", "kw", "pa", "per")
    for unit in [names.split()[0]] for word in names.split() for name in (word, word + "s")}
# words that say something about the number before them, and so are no unit
_HEDGES = set("is isnt not no if for some maybe perhaps possibly about approximately approx almost around roughly nearly at least most "
              "more less than when where unless wrong incorrect false but except over under to from between any other else "
              "something guess think probably likely unsure solution root modulo mod".split()) | set(_NUMBER_WORDS)
_CLOSE = {"(": ")", "[": "]", r"\{": r"\}", r"\lbrace": r"\rbrace", r"\langle": r"\rangle"}
_INF, _NINF = ("inf", 1), ("inf", -1)


def _repeating(text: str) -> Fraction:
    """0.1\\overline{6}, 0.1(6) and 0.1666... are 1/6."""
    whole, _, rest = text.partition(".")
    if len(text) > 80:
        raise _Unreadable("a decimal too long")
    if dots := re.fullmatch(r"(\d+)(?:\.\.\.|\\[lc]?dots)", rest):
        tail = re.fullmatch(r"(\d*?)(?:(\d)\2{2,}|(\d{2,}?)\3+)", dots[1])
        if not tail:
            raise _Unreadable("an unfinished decimal")
        fixed, block = tail[1], tail[2] or tail[3]
    else:
        fixed, block = re.fullmatch(r"(\d*)\D+(\d+)\D*", rest).groups()
    nines = 10 ** len(fixed) * (10 ** len(block) - 1)
    return Fraction(int(whole or 0)) + Fraction(int(fixed + block) - int(fixed or 0), nines)


class _Parser:
    def __init__(self, text: str, thousands: bool):
        self.tokens, self.i, self.depth, self.units, self.bars = [], 0, 0, [], 0
        pattern, at = list(_TOKENS.values())[not thousands], 0
        while at < len(text):
            token = pattern.match(text, at)
            if not token:
                break
            self.tokens.append((token.lastgroup, token[token.lastgroup], token.start(token.lastgroup) > at))
            at = token.end()
        if len(self.tokens) > TOKENS:
            raise _Unreadable("too long")

    # tokens: (kind, text, whether a space stands before it)
    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.i + ahead][1] if self.i + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.i + ahead][0] if self.i + ahead < len(self.tokens) else "end"

    def next(self) -> str:
        self.i += 1
        return self.tokens[self.i - 1][1] if self.i <= len(self.tokens) else ""

    def accept(self, *texts: str) -> bool:
        if self.kind() != "end" and self.peek() in texts:
            self.i += 1
            return True
        return False

    def expect(self, *texts: str) -> None:
        if not self.accept(*texts):
            raise _Unreadable(f"expected {texts[0]}")

    def word(self) -> str:
        """The word at this place, from bare letters or \\text{}, in lower case."""
        if self.kind() == "text":
            return _WRAPPER.fullmatch(self.peek())[1].strip().casefold()
        return self.peek().casefold() if self.kind() == "word" else ""

    def answer(self):
        node = self.list()
        if self.kind() != "end":
            raise _Unreadable("something is left over")
        return node

    def list(self):
        self.depth += 1
        if self.depth > DEPTH:
            raise _Unreadable("nested too deeply")
        items = [self.relation()]
        while self.separator():
            while self.separator():
                pass
            items.append(self.relation())
        self.depth -= 1
        return items[0] if len(items) == 1 else ("list", tuple(items))

    def separator(self) -> bool:
        if self.peek() in (",", ";", r"\vee", r"\lor") or self.word() in ("and", "or"):
            self.i += 1
            return True
        return False

    def relation(self):
        sides, relations = [self.expression()], []
        while self.peek() in _RELATIONS and self.kind() in ("op", "cmd"):
            relations.append(_RELATIONS[self.next()])
            sides.append(self.expression())
        if not relations:
            return sides[0]
        if relations == ["in"]:
            return sides[1]
        if set(relations) == {"="}:
            return ("=", tuple(sides))
        return _interval(sides, relations)

    def expression(self):
        node = None
        while True:
            text = self.peek()
            sign = {"+": Fraction(1), "-": Fraction(-1), r"\pm": ("pm", 1), r"\mp": ("pm", -1)}.get(text)
            if sign is not None and self.kind() in ("op", "cmd"):
                self.i += 1
                term = _mul(sign, self.term()) if sign != 1 else self.term()
                if text == "+" and self.peek(-1) == "":
                    raise _Unreadable
                node = term if node is None else _add(node, term)
            elif node is None:
                node = self.term()
            elif text in (r"\cup", r"\cap", r"\setminus") or self.word() == "u" and isinstance(node, tuple) and node[0] == "seq":
                if text in (r"\cap", r"\setminus"):
                    raise _Unreadable("a set operation")
                self.i += 1
                node = _union(node, self.term())
            else:
                return node

    def term(self):
        node = self.factor()
        while True:
            if self.accept("*", r"\cdot", r"\times", r"\ast"):
                node = _mul(node, self.signed(self.factor))
            elif self.accept("/", r"\div"):
                node = _div(node, self.signed(self.factor))
            elif self.unit(node):
                if self.units[-1:] and isinstance(self.units[-1], int):
                    node = _mul(node, Fraction(self.units.pop()))
            elif self.accept(":"):
                node = ("seq", ":", ":", (node, self.factor()))
            elif self.starts_factor():
                node = _mul(node, self.factor())
            else:
                return node

    def signed(self, parse):
        if self.accept("-"):
            return _mul(Fraction(-1), self.signed(parse))
        return self.signed(parse) if self.accept("+") else parse()

    def unit(self, value) -> bool:
        """Take a unit, or a word such as million, that follows a value."""
        if self.accept(r"\dollar"):
            self.units.append("dollar")
            return True
        word = self.word()
        if not word or word in ("and", "or") or self.kind() == "word" and word in _FUNCTIONS + ("pi", "infty", "infinity"):
            return False
        names = re.findall(r"[a-z]+", word)
        if self.kind() == "word" and not (word in _UNITS or word in _SCALES or len(word) > 3):
            return False
        if self.kind() == "text" and not names and word:
            return False
        if _HEDGES.intersection(names):
            raise _Unreadable("a remark instead of a unit")
        self.i += 1
        if word in _SCALES:
            self.units.append(_SCALES[word])
            return True
        if word in ("degree", "degrees"):
            self.units.append("degree")
            return True
        self.units += [_UNITS.get(name, name) for name in names]
        while self.peek() == "^" and self.kind(1) in ("num", "op"):
            self.i += 1
            self.units.append(f"^{self.argument()}")
        if self.peek() == "/" and (self.kind(1) == "text" or self.kind(1) == "word"):
            self.i += 1
            if not self.unit(value) and self.kind() == "word":
                self.units.append(self.next())
        return True

    def starts_factor(self) -> bool:
        kind, text = self.kind(), self.peek()
        if kind == "num":
            return self.tokens[self.i - 1][0] not in ("num", "rep", "base")
        if kind == "word":
            return self.word() not in ("and", "or")
        if kind == "cmd":
            return text[1:] in _FUNCTIONS or text[1:] in _GREEK or text in (
                r"\frac", r"\pi", r"\infty", r"\binom", r"\langle", r"\lfloor", r"\lceil", r"\vec", r"\mathbf", r"\boxed", r"\{", r"\lvert")
        return kind == "op" and (text in "([{" or text == "|" and not self.bars)

    def factor(self):
        node = self.base()
        while True:
            if self.peek() in ("^", "**"):
                self.i += 1
                if self.accept(r"\circ") or self.peek() == "{" and self.peek(1) == r"\circ" and self.peek(2) == "}":
                    self.i += 3 * (self.peek() == "{")
                    node = ("deg", node)
                else:
                    node = _pow(node, self.argument())
            elif self.accept("!"):
                node = _factorial(node)
            elif self.accept("%", r"\%"):
                node = ("pct", node)
            elif self.accept(r"\degree"):
                node = ("deg", node)
            elif self.word() in ("degrees", "degree", "percent", "deg") and isinstance(node, Fraction):
                node = ("pct" if self.word() == "percent" else "deg", node)
                self.i += 1
            elif self.accept("'"):
                if not isinstance(node, tuple) or node[0] != "var":
                    raise _Unreadable("a prime")
                node = ("var", node[1] + "'")
            else:
                return node

    def argument(self):
        """An exponent or the like: a group, or one factor, with its sign; 2^3^2 is 2^(3^2)."""
        self.depth += 1
        if self.depth > DEPTH:
            raise _Unreadable("nested too deeply")
        if self.accept("-"):
            node = _mul(Fraction(-1), self.argument())
        elif self.accept("+"):
            node = self.argument()
        else:
            node = self.group() if self.peek() == "{" else self.base()
            if self.peek() in ("^", "**"):
                self.i += 1
                node = _pow(node, self.argument())
        self.depth -= 1
        return node

    def digit_argument(self):
        """TeX takes one digit: \\frac12 is 1/2."""
        if self.kind() == "num" and len(self.peek()) > 1 and self.peek().isdigit():
            kind, text, space = self.tokens[self.i]
            self.tokens[self.i:self.i + 1] = [(kind, text[0], space), (kind, text[1:], False)]
        if self.kind() == "num":
            return Fraction(self.next())
        return self.group() if self.peek() == "{" else self.base()

    def group(self):
        self.expect("{")
        node = self.list()
        self.expect("}")
        return node

    def base(self):
        self.depth += 1
        if self.depth > DEPTH:
            raise _Unreadable("nested too deeply")
        node = self._base()
        self.depth -= 1
        return node

    def _base(self):
        kind, text = self.kind(), self.peek()
        if kind == "num":
            return self.number()
        if kind == "rep":
            return _bounded(_repeating(self.next()))
        if kind == "base":
            digits, _, base = self.next().partition("_")
            base = int(base.strip("{}")[:4])
            if not 2 <= base <= 36 or any(int(c, 16) >= base for c in digits):
                raise _Unreadable("digits beyond their base")
            return _bounded(Fraction(int(digits, base)))
        if kind == "text":
            word = self.word()
            self.i += 1
            if word in _NUMBER_WORDS:
                return _NUMBER_WORDS[word]
            inner = _WRAPPER.fullmatch(text)[1].strip()
            if text.startswith(r"\mathbb"):
                return ("seq", "(", ")", (_NINF, _INF)) if inner == "R" else ("text", inner)
            if len(inner) == 1 and inner.isalpha():
                return self.variable(inner) if inner not in "ei" else ("const", inner)
            return ("text", _words(inner)) if inner else self.base()
        if kind == "word":
            return self.letters()
        if kind == "cmd":
            return self.command()
        if text in ("(", "["):
            return self.bracket()
        if text == "{":
            return self.group()
        if self.accept("|"):
            return self.absolute("|")
        raise _Unreadable(f"unexpected {text[:20]!r}")

    def number(self) -> Fraction:
        text = self.next().replace(",", "")
        if len(text) > BITS // 4 or "e" in text.lower() and len(text.lower().partition("e")[2]) > 5:
            raise _Unreadable("a number too long")
        mantissa, _, exponent = text.lower().partition("e")
        if abs(int(exponent or 0)) > BITS // 4:
            raise _Unreadable("a number too large")
        number = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
        if text.isdigit():  # a mixed number
            if self.peek() == r"\frac" and self.kind(-1) == "num":
                start, rest = self.i, list(self.tokens)
                self.i += 1
                top, bottom = self.digit_argument(), self.digit_argument()
                if _exact(top, bottom) and top.denominator == bottom.denominator == 1 and 0 < top < bottom:
                    return number + top / bottom
                self.i, self.tokens = start, rest
            elif (self.kind() == self.kind(2) == "num" and self.tokens[self.i][2] and self.peek(1) == "/"
                  and self.peek().isdigit() and self.peek(2).isdigit() and int(self.peek()[:9]) < int(self.peek(2)[:9])):
                self.i += 3
                return number + Fraction(int(self.peek(-3)), int(self.peek(-1)))
        return number

    def variable(self, name: str):
        if self.accept("_"):
            if self.accept("{"):
                while self.kind() != "end" and self.peek() != "}":
                    name += "_" + self.next()
                self.expect("}")
            else:
                name += "_" + self.next()
        return ("var", name)

    def letters(self):
        """A function, a constant, one variable, or a product of letters; a long word is none of them."""
        word = self.next()
        low = word.lower()
        if low in _FUNCTIONS:
            return self.function(low)
        if low in ("pi", "infty", "infinity", "inf"):
            return ("const", "pi") if low == "pi" else _INF
        if low in _NUMBER_WORDS:
            return _NUMBER_WORDS[low]
        if word in _GREEK:
            return self.variable(word)
        tail = next((t for t in ("pi", "sqrt") if word.endswith(t) and len(word) <= len(t) + 2), "")
        if len(word) > 3 and not tail:
            raise _Unreadable("a word")
        letters = [("const", c) if c in "ei" else ("var", c) for c in word[:len(word) - len(tail)]]
        if tail == "pi":
            letters.append(("const", "pi"))
        elif tail:
            letters.append(self.function(tail))
        elif letters[-1][0] == "var":
            letters[-1] = self.variable(word[-1])
            if self.peek() in ("^", "**") and len(letters) > 1:  # in ab^2 only b is squared
                self.i += 1
                letters[-1] = _pow(letters[-1], self.argument())
        return functools.reduce(_mul, letters)

    def command(self):
        text = self.next()
        name = text[1:]
        if name == "frac":
            return _div(self.digit_argument(), self.digit_argument())
        if name in ("binom", "dbinom", "tbinom"):
            return _binomial(self.digit_argument(), self.digit_argument())
        if name in _FUNCTIONS:
            return self.function(name)
        if name == "pi":
            return ("const", "pi")
        if name == "infty":
            return _INF
        if name in _GREEK:
            return self.variable(name)
        if name in ("emptyset", "varnothing"):
            return ("set", ())
        if text in (r"\{", r"\lbrace", r"\langle"):
            self.i -= 1
            return self.bracket()
        if name in ("lvert", "vert", "|"):
            return self.absolute(r"\rvert" if name == "lvert" else text)
        if name in ("lfloor", "lceil"):
            node = self.list()
            self.expect(r"\rfloor" if name == "lfloor" else r"\rceil")
            return _floor(node, name == "lceil")
        if name in ("boxed", "fbox", "vec", "mathbf", "mathrm", "mathit", "boldsymbol", "hat", "text", "textbf", "bold"):
            return self.group() if self.peek() == "{" else self.base()
        if name == "dollar":
            self.units.append("dollar")
            return self.base()
        if name == "begin":
            return self.matrix()
        if name in ("angle", "triangle") and self.kind() == "word":
            return ("text", name + self.next())
        raise _Unreadable(f"unknown command {text[:20]}")

    def function(self, name: str):
        name = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}.get(name, name)
        if name in ("sqrt", "cbrt"):
            n = Fraction(3 if name == "cbrt" else 2)
            if self.accept("["):
                n = self.list()
                self.expect("]")
            return _root(n, self.digit_argument() if self.kind() != "num" else self.number())
        base = power = None
        if self.accept("_"):
            base = self.digit_argument()
        if self.peek() == "^":
            self.i += 1
            power = self.argument()
        if self.peek() in ("(", "{", "["):
            argument = self.base()
        else:  # sin 2x, but not the cos of sin x cos x
            argument = self.signed(self.factor)
            while self.starts_factor() and self.peek().lstrip("\\") not in _FUNCTIONS:
                argument = _mul(argument, self.factor())
        _scalar(argument)
        if name in ("abs", "floor", "ceil"):
            return _floor(argument, name == "ceil") if name != "abs" else _absolute(argument)
        if name in ("log", "ln", "lg"):
            base = ("const", "e") if name == "ln" or base is None and name == "log" else base or Fraction(10)
            node = _log(base, argument)
        else:
            if power == -1 and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
                return ("arc" + name, argument)
            node = ("^", ("const", "e"), argument) if name == "exp" else (name, argument)
        return node if power is None else _pow(node, power)

    def absolute(self, closing: str):
        self.bars += 1
        node = self.list()
        self.expect(closing)
        self.bars -= 1
        _scalar(node)
        return _absolute(node)

    def bracket(self):
        opening, bars, self.bars = self.next(), self.bars, 0
        if self.accept(_CLOSE[opening]):
            self.bars = bars
            if opening in (r"\{", r"\lbrace"):
                return ("set", ())
            raise _Unreadable("nothing in brackets")
        node = self.list()
        closing, self.bars = self.next(), bars
        items = node[1] if isinstance(node, tuple) and node[0] == "list" else (node,)
        if opening in (r"\{", r"\lbrace"):
            if closing != _CLOSE[opening]:
                raise _Unreadable("an open brace")
            return ("set", items)
        if opening == r"\langle":
            if closing != r"\rangle":
                raise _Unreadable("an open angle")
            return ("seq", "(", ")", items)
        if closing not in (")", "]"):
            raise _Unreadable("an open bracket")
        if len(items) == 1:
            if closing != _CLOSE[opening]:
                raise _Unreadable("brackets of two kinds")
            return node
        if all(isinstance(row, tuple) and row[0] == "seq" and row[1] == "[" for row in items) and opening == "[":
            return ("matrix", tuple(row[3] for row in items))
        return _bracketed(opening, closing, items)

    def matrix(self):
        self.expect("{")
        name = self.next()
        self.expect("}")
        if name not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix"):
            raise _Unreadable("an environment")
        if name == "array":
            self.expect("{")
            while self.next() not in ("}", ""):
                pass
        rows = [[]]
        while not self.accept(r"\end"):
            if self.accept(r"\\"):
                rows.append([])
            elif not self.accept("&", r"\hline"):
                rows[-1].append(self.relation())
        self.group_name(name)
        rows = tuple(tuple(row) for row in rows if row)
        if not rows or len(set(map(len, rows))) > 1:
            raise _Unreadable("rows of different length")
        return ("matrix", rows)

    def group_name(self, name: str) -> None:
        self.expect("{")
        self.expect(name)
        self.expect("}")


def _union(a, b):
    if _kind(a) in ("set", "list") and _kind(b) in ("set", "list"):
        return ("set", tuple(dict.fromkeys(a[1] + b[1])))
    parts = [node[1] if _kind(node) == "union" else (node,) for node in (a, b)]
    return ("union", parts[0] + parts[1])


def _absolute(a):
    return abs(a) if _exact(a) else ("abs", a)


def _log(base, a):
    _scalar(base, a)
    if a == 0 or base in (0, 1):
        raise _Unreadable("a logarithm that does not exist")
    return ("log", base, a)


def _bracketed(opening: str, closing: str, items: tuple):
    """Infinite ends are open, however they are written."""
    if len(items) == 2:
        opening = "(" if items[0] == _NINF else opening
        closing = ")" if items[1] == _INF else closing
    return ("seq", opening, closing, items)


def _interval(sides: list, relations: list):
    """x > 3 and 1 < x <= 2 are intervals; another inequality is kept as 0 < difference."""
    if any(r.startswith(">") for r in relations):
        if any(r.startswith("<") for r in relations):
            raise _Unreadable("an inequality in two directions")
        sides, relations = sides[::-1], [r.replace(">", "<") for r in relations[::-1]]
    is_name = lambda node: isinstance(node, tuple) and node[0] == "var"
    if relations == ["!="] and is_name(sides[0]):
        return ("union", (("seq", "(", ")", (_NINF, sides[1])), ("seq", "(", ")", (sides[1], _INF))))
    if not all(r in ("<", "<=") for r in relations):
        raise _Unreadable("a mixed chain")
    if len(sides) == 2 and is_name(sides[0]) and not _variables(sides[1]):
        return _bracketed("(", ")" if relations[0] == "<" else "]", (_NINF, sides[1]))
    if len(sides) == 2 and is_name(sides[1]) and not _variables(sides[0]):
        return _bracketed("(" if relations[0] == "<" else "[", ")", (sides[0], _INF))
    if len(sides) == 3 and is_name(sides[1]):
        return _bracketed("(" if relations[0] == "<" else "[", ")" if relations[1] == "<" else "]", (sides[0], sides[2]))
    if len(sides) == 2:
        return ("<", relations[0] == "<", _add(sides[1], _mul(Fraction(-1), sides[0])))
    raise _Unreadable("a chain of inequalities")


def _walk(node):
    """Every node of a tree."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, tuple):
            stack += [child for child in node if isinstance(child, (tuple, Fraction))]


def _variables(node) -> set[str]:
    return {n[1] for n in _walk(node) if isinstance(n, tuple) and n[:1] == ("var",)}


# ----------------------------------------------------------------------------------------------------------- values

_mp = MPContext()
_COSTLY = {"^", "root", "log", "!", "binom", "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "arcsin",
           "arccos", "arctan", "arccot", "arcsec", "arccsc"}
_MP_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc"}


def _value(node, point: int):
    """An mpmath number: the node with every variable at its random number of this point."""
    if isinstance(node, Fraction):
        return _mp.mpf(node.numerator) / node.denominator
    name, *children = node
    if name == "var":
        rng = random.Random(f"{children[0]} {point}")
        return _mp.mpc(rng.uniform(0.6, 2.4), rng.uniform(0.1, 0.9))
    if name == "const":
        return {"pi": +_mp.pi, "e": +_mp.e, "i": _mp.j}[children[0]]
    if name not in _COSTLY and name not in ("+", "*", "/", "abs", "deg", "pct", "floor", "ceil"):
        raise _Unreadable("no number")
    a, *b = (_value(child, point) for child in children)
    b = b[0] if b else None
    if name == "+":
        total, size = a + b, abs(a) + abs(b)
        return _mp.zero if abs(total) < size * _mp.mpf(2) ** (-_mp.prec // 2) else total  # a cancellation leaves noise
    if name == "*":
        return a * b
    if name == "/":
        return a / b
    if name == "^":
        if a == 0 or abs(b) > 10**6 or abs(b * _mp.log(a)) > 10**6:
            raise _Unreadable("a power too large")
        return a ** b
    if name == "root":
        n, a = a, b
        odd = n.imag == 0 and int(n.real) == n.real and int(n.real) % 2
        return -((-a) ** (1 / n)) if odd and a.imag == 0 and a.real < 0 else a ** (1 / n) if a != 0 else a
    if name == "log":
        return _mp.log(b) / _mp.log(a)
    if name in ("!", "binom"):
        if _mp.prec > 600 or abs(a) > 300 or b is not None and abs(b) > 300:
            raise _Unreadable("a factorial too large")
        return _mp.gamma(a + 1) if name == "!" else _mp.binomial(a, b)
    if name == "abs":
        return abs(a)
    if name == "deg":
        return a * _mp.pi / 180
    if name == "pct":
        return a / 100
    if name in ("floor", "ceil"):
        if a.imag:
            raise _Unreadable("rounding a complex number")
        return getattr(_mp, name)(a)
    if abs(a) > 10**4:
        raise _Unreadable("an argument too large")
    return getattr(_mp, _MP_NAMES.get(name, name))(a)


@functools.lru_cache(maxsize=256)
def _values(node, prec: int) -> tuple:
    _mp.prec = prec
    return tuple(_value(node, point) for point in range(3 if _variables(node) else 1))


def _precision(*nodes) -> int:
    """Twice the bits of the longest exact number, so that numbers which differ in its last bit differ by far."""
    sizes = [_size(node) for node in nodes]
    bits, costly = max(b for b, _ in sizes), sum(c for _, c in sizes)
    prec = 2 * (80 + bits)
    if bits > 2000 or costly * (prec / 160) ** 1.3 > 100:
        raise _Unreadable("too costly to compare")
    return prec


@functools.lru_cache(maxsize=256)
def _size(node) -> tuple[int, int]:
    """Bits of the longest number in a tree, and how many costly functions it has."""
    bits, costly, count = 0, 0, 0
    for n in _walk(node):
        count += 1
        if isinstance(n, Fraction):
            bits = max(bits, n.numerator.bit_length() + n.denominator.bit_length())
        elif n and n[0] in _COSTLY:
            costly += 10 if n[0] in ("!", "binom") else 1
    if count > 300:
        raise _Unreadable("too long to compare")
    return bits, costly


def _close(a, b) -> bool:
    return abs(a - b) <= max(abs(a), abs(b)) * _mp.mpf(2) ** (-_mp.prec // 2)


def _same_number(a, b) -> bool:
    if a == b or _exact(a, b):
        return a == b
    if any(isinstance(n, tuple) and n[0] == "inf" for tree in (a, b) for n in _walk(tree)):
        return False
    prec = _precision(a, b)
    xs, ys = _values(a, prec), _values(b, prec)
    _mp.prec = prec
    if len(xs) != len(ys):  # only one has variables, and they may cancel
        xs, ys = (v * 3 if len(v) == 1 else v for v in (xs, ys))
    return all(map(_close, xs, ys))


def _proportional(a, b, positive: bool) -> bool:
    """a = c b for one constant c (> 0), as for the two sides of an equation brought together."""
    prec = _precision(a, b)
    xs, ys = _values(a, prec), _values(b, prec)
    _mp.prec = prec
    if len(xs) != len(ys) or any(v == 0 for v in xs + ys):
        return False
    ratios = [x / y for x, y in zip(xs, ys)]
    c = ratios[0]
    return len(ratios) > 1 and all(_close(r, c) for r in ratios) and (
        not positive or c.real > 0 and abs(c.imag) < abs(c) * _mp.mpf(2) ** (-prec // 2))


# --------------------------------------------------------------------------------------------------------- equality


def _is_name(node) -> bool:
    """x, or a word, or f(x) and AB, which the parser reads as products; xy is none, or xy = 5 would be 5."""
    if not isinstance(node, tuple):
        return False
    if node[0] == "*" and isinstance(node[1], tuple):
        first = node[1][1] if node[1][0] == "^" and node[1][2] == -1 else node[1]  # f^{-1}(x)
        return first[0] == "var" and (first[1][0] in "fghpq" or first[1][0].isupper()) and _is_name(node[2])
    return node[0] in ("var", "text")


def _unnamed(node):
    """The value of "x = 5", and of "x = 10/2 = 5"; other equations stay."""
    if isinstance(node, tuple) and node[0] == "=":
        sides = node[1][1:] if _is_name(node[1][0]) else node[1]
        if len(node[1]) == 2 and _is_name(node[1][0]) or len(sides) > 1 and all(_equal(sides[0], s) for s in sides[1:]):
            return sides[-1]
    return node


def _kind(node) -> str:
    return node[0] if isinstance(node, tuple) and node[0] in _STRUCTURES else ""


def _signed(node, sign: int):
    """The tree with every \\pm read as this sign, and every \\mp as the other."""
    if not isinstance(node, tuple):
        return node
    return Fraction(sign * node[1]) if node[:1] == ("pm",) else tuple(_signed(child, sign) for child in node)


def _items(node) -> list:
    """A list's or set's items; one with \\pm is two."""
    items = node[1] if _kind(node) in ("list", "set") else (node,)
    return [_signed(item, sign) for item in items
            for sign in ((1, -1) if any(isinstance(n, tuple) and n[:1] == ("pm",) for n in _walk(item)) else (1,))]


def _match(xs: list, ys: list, same) -> bool:
    """Equal as multisets."""
    if len(xs) != len(ys) or len(xs) > 30:
        return False
    ys = list(ys)
    for x in xs:
        found = next((i for i, y in enumerate(ys) if same(x, y)), None)
        if found is None:
            return False
        del ys[found]
    return True


def _equal(a, b) -> bool:
    if a == b:
        return True
    if (_kind(a) == "=") != (_kind(b) == "="):
        a, b = _unnamed(a), _unnamed(b)
        if (_kind(a) == "=") != (_kind(b) == "="):
            return False
    for assigned, point in ((a, b), (b, a)):  # x = 1, y = 2 is the point (1, 2)
        if _kind(assigned) == "list" and _kind(point) == "seq" and all(_kind(item) == "=" for item in assigned[1]):
            return point[1:3] == ("(", ")") and len(assigned[1]) == len(point[3]) and all(
                _equal(_unnamed(x), y) for x, y in zip(assigned[1], point[3]))
    xs, ys = _items(a), _items(b)
    if len(xs) > 1 or len(ys) > 1 or "set" in (_kind(a), _kind(b)):
        if len(xs) == len(ys) or not all(_kind(x) in ("seq", "union") for x in xs + ys):
            return _match(xs, ys, lambda x, y: _equal(_unnamed(x), _unnamed(y)))
    parts = [node[1] if _kind(node) in ("union", "list") else (node,) for node in (a, b)]
    if max(map(len, parts)) > 1 and all(_kind(p) == "seq" for part in parts for p in part):
        return _match(*parts, _equal)
    kinds = _kind(a), _kind(b)
    if "matrix" in kinds and "seq" in kinds:  # a vector
        vector, row = (a, b) if kinds[0] == "matrix" else (b, a)
        flat = [x for line in vector[1] for x in line]
        return 1 in (len(vector[1]), len(vector[1][0])) and len(flat) == len(row[3]) and all(map(_equal, flat, row[3]))
    if kinds[0] != kinds[1]:
        return False
    if kinds[0] == "seq":
        return a[1:3] == b[1:3] and len(a[3]) == len(b[3]) and all(map(_equal, a[3], b[3]))
    if kinds[0] == "matrix":
        return list(map(len, a[1])) == list(map(len, b[1])) and all(_equal(x, y) for r, s in zip(a[1], b[1]) for x, y in zip(r, s))
    if kinds[0] == "=":
        if len(a[1]) != 2 or len(b[1]) != 2:
            return False
        (left, right), (other, value) = a[1], b[1]
        if _is_name(left) and left == other:
            return _equal(right, value)
        if _kind(right) or _kind(value) or _kind(left) or _kind(other):
            return False
        minus = Fraction(-1)
        return _proportional(_add(left, _mul(minus, right)), _add(other, _mul(minus, value)), False)
    if kinds[0] == "<":
        return a[1] == b[1] and _proportional(a[2], b[2], True)
    if kinds[0]:
        return False
    tops = [n[0] if isinstance(n, tuple) else "" for n in (a, b)]
    for unit in ("deg", "pct"):  # 30 degrees are pi/6, and 30 when the other side leaves the unit out
        if tops.count(unit) == 1:
            x, y = (a, b) if tops[0] == unit else (b, a)
            return _same_number(x, y) or _same_number(x[1], y)
    return _same_number(a, b)


@functools.lru_cache(maxsize=256)
def _parse(text: str, thousands: bool):
    """(tree, units), or None if it cannot be read."""
    try:
        parser = _Parser(text, thousands)
        return parser.answer(), tuple(parser.units)
    except (_Unreadable, ZeroDivisionError, OverflowError, AttributeError, IndexError, RecursionError):
        return None


_CHOICE = re.compile(r"\(?([A-Z])(?:\)|\.|:)(?:\s+([^()]*))?|([A-Z])")
_LETTERS = re.compile(r"[^\W\d_]+(?:[ -][^\W\d_]+)*")
_BUILDER = re.compile(r"\\\{\s*[a-z](?:\s*\\in\s*\\mathbb\s*\{R\})?\s*(?:\\mid|\||:)(.*)\\\}", re.S)
_METRIC = re.compile(r"(?<=[\d}) ])(?:[mgsLhNJWVK]|cm|mm|km)(?:/ ?[a-z]{1,3})?(?:\^ ?\{?[23]\}?)?$")


def is_equal(given: str, gold: str) -> bool:
    """Whether two answers are mathematically the same. Never raises; what cannot be read equals only the same text."""
    if len(given) > LONGEST or len(gold) > LONGEST:
        return given.strip() == gold.strip()
    given, gold = _clean(given), _clean(gold)
    if not all(re.search(r"\w|\\\{", text) for text in (given, gold)):
        return False
    words = [_words(text) for text in (given, gold)]
    if words[0] == words[1] and re.search(r"\w", words[0]):
        return True
    plain = [_WRAPPER.sub(lambda m: m[1].strip(), text).strip() for text in (given, gold)]
    choices = [_CHOICE.fullmatch(text) for text in plain]
    if all(choices):
        letters = [c[1] or c[3] for c in choices]
        return letters[0] == letters[1] and not (choices[0][2] and choices[1][2])
    if all(_LETTERS.fullmatch(text) and len(text) > 1 for text in plain) and not any(p.lower() in _NUMBER_WORDS for p in plain):
        return False  # two different words
    if builder := [_BUILDER.fullmatch(text) for text in (given, gold)]:
        given, gold = (b[1] if b else text for b, text in zip(builder, (given, gold)))
    try:
        if _readings_agree(given, gold):
            return True
        bare, other = (_METRIC.sub("", text) for text in (given, gold))  # m could be a variable, but not beside a number
        return (bare != given and not re.search("[a-zA-Z]", gold) and _readings_agree(bare, gold)
                or other != gold and not re.search("[a-zA-Z]", given) and _readings_agree(given, other))
    except (_Unreadable, ZeroDivisionError, OverflowError, ValueError, TypeError, RecursionError, MemoryError):
        return False


def _readings_agree(given: str, gold: str) -> bool:
    """With commas between thousands, or between items."""
    for thousands in (True, False) if "," in given + gold else (True,):
        (x, y) = _parse(given, thousands), _parse(gold, thousands)
        if x and y and (not x[1] or not y[1] or x[1] == y[1]) and _equal(x[0], y[0]):
            return True
    return False


def math_reward(response: str, gold: str) -> float:
    """1.0 if the response's final answer equals gold, else 0.0. Never raises, whatever the two strings are."""
    answer = extract_answer(response)
    return float(answer is not None and is_equal(answer, gold))

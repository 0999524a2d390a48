r"""Is a response's final answer the gold answer? A small and safe checker for mathematics.

    math_reward("... so \\boxed{\\frac{2}{4}}.", "0.5") == 1.0

The answer is the last \boxed{}, else a final "#### 42", else what follows "the answer is" at the end. It is read by a
tokenizer and a recursive-descent parser into a tree of tuples, in which rational arithmetic is done at once and exactly.
Two trees that differ are compared by their values at random points (Schwartz-Zippel), so that polynomials and identities
need no simplification: exactly in a finite field where only + - * / and integer powers occur, else with mpmath. Nothing
that a model wrote is ever executed, and the work is bounded before it is begun: text, depth, digits and exponents.
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
WORK = 60  # for one comparison, in units of about 0.15 ms
PRIME = 2**255 - 19  # 1 modulo 4, so that it has a square root of -1

# ------------------------------------------------------------------------------------------------------- extraction

_END_OF_TURN = re.compile(r"<\|(?:im_end|eot_id|endoftext|end_of_text)\|>|</s>|<｜end▁of▁sentence｜>")
_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*(?:\{|([\w.]{1,40}))")  # \boxed 5 is allowed
_BRACE = re.compile(r"\\.|[{}]", re.S)
_ANSWER_IS = re.compile(r"(?:answer|result)\**\s*(?:is|=|:)[*:\s]*", re.I)
_SENTENCE_END = re.compile(r"(?<=[^\d\s])[.!]\s|(?<=\d)[.!]\s+(?=[A-Z])")


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
    boxes, at, tries = [], len(text), 0
    while len(boxes) < 16 and tries < 1000 and (at := text.rfind("box", 0, at)) > 0:
        boxes += filter(None, [_BOX.match(text, text.rfind("\\", max(0, at - 2), at))])
        tries += 1
    answer, end = None, -1
    for box in reversed(boxes):
        if box.start() > end and box[1]:
            answer, end = box[1], box.end()
        elif box.start() > end and (close := _braced(text, box.end() - 1)) is not None:
            answer, end = text[box.end():close], close
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
    line = text[-2 * LONGEST:].strip().rpartition("\n")[2].strip()
    if line.startswith("####"):
        return line.lstrip("#").strip()
    line = re.sub(r"\s*I hope (?:it|this) is correct\.?$", "", line)
    if phrases := list(_ANSWER_IS.finditer(line)):
        return _SENTENCE_END.split(line[phrases[-1].end():])[0].strip("* ").removesuffix(".").strip("* ") or None
    return None


# ------------------------------------------------------------------------------------------------------ normal text

_GREEK = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega "
          "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega").split()
_SIGNS = {**{letter: f"\\{name} " for letter, name in zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", _GREEK)},
          **dict(zip("−–—‒‐‑×·⋅∙∗÷∕⁄′⟨⟩€£¥", "------*****///'()   ")), "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
          "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"\degree ", "√": r"\sqrt ",
          "∛": r"\cbrt ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"}
_RAISED = [(re.compile(f"[{signs}]+"), mark, str.maketrans(signs, plain)) for signs, mark, plain in (
    ("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "^", "0123456789+-()n"), ("₀₁₂₃₄₅₆₇₈₉", "_", "0123456789"))]


def _ascii(text: str) -> str:
    """Unicode digits, signs, letters and fractions as ASCII or LaTeX; invisible characters dropped."""
    if text.isascii():
        return text
    for run, mark, plain in _RAISED:
        text = run.sub(lambda m: f"{mark}{{{m[0].translate(plain)}}}", text)
    text = re.sub("(?<=\\d)(?=[¼½¾⅐-⅞])", " ", text.translate(str.maketrans(_SIGNS)))
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans(_SIGNS))
    text = re.sub(r"\d", lambda m: str(int(m[0])), text)
    return "".join(c for c in text if c.isascii() or unicodedata.category(c) not in ("Cf", "Mn"))


_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)|mbox|operatorname|underline)\*?\s*\{([^{}]*)\}")
_TEXT_NUMBER = re.compile(r"\\(?:text(?:bf|it)?|math(?:rm|bf|it)|underline|mbox)\s*\{\s*(-?[\d.,]*\d[\d.,/]*)\s*([a-zA-Z .]*)\}")
_CLEAN = [(re.compile(pattern), new) for pattern, new in (
    (r"\\!\s*|\\(?:left|right)\s*\.|\\(?:left|right|middle|[bB]igg?[lrm]?|limits|displaystyle|textstyle)(?![a-zA-Z])", ""),
    (r"\\\$", r"\\dollar "), (r"\$", " "),
    (r"(?<=\d)(?: ?\{,\} ?|\\[, ]|~|,\\[, ]| )(?=\d{3}(?!\d))", ","),  # 1{,}000 and 1\,000
    (r"(?<!\\)\\(?:[;:>, ()\[\]]|q?quad)|~", " "), (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"), (r"\\mathbb ?\{? ?R ?\}?", r"\\reals "),
    (r"\\mathbb ?\{? ?([A-Z]) ?\}?", r"\\text{the set \1}"), (r"(?<=[\])}]) ?[uU] ?(?=[\[({\\])", r"\\cup "),
    (r"\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})", r"\\degree "),
    (r"\\begin ?(?:\{array\} ?\{[^{}]*\}|\{?(?:[pbB]|small)?matrix\}?)", r"\\begin "), (r"\\hline(?![a-zA-Z])", ""),
    (r"\\end ?(?:\{array\}|\{?(?:[pbB]|small)?matrix\}?)", r"\\end "),
    (r"(?<![a-zA-Z\\])([a-zA-Z])(?=(?:pi|sqrt)(?![a-zA-Z]))", r"\1 "),
    (r"\\(?:text|mathrm) ?\{([eij])\}", r"\1"), (r"\\text ?\{([^{}]*(?:\band\b|\bor\b|,)[^{}]*|[^{}a-zA-Z]*)\}", r" \1 "),
    (r'^[ "`]+|[ "`]+$', ""), (r"(?<![.,;:])[.,;:]$", ""),
    (r"^(?:\\text ?\{)?[aA]ll real(?: numbers?|s)?\}?$", r"\\reals"), (r"(?<=\d) ?x ?(?=10 ?\^)", "*"), (r" +", " "))]


@functools.lru_cache(maxsize=1024)
def _clean(text: str) -> str:
    """The answer without what carries no meaning: dollar signs, spacing, \\left, closing punctuation."""
    text = re.sub(r"\s+", " ", _ascii(text)).strip()
    while box := _BOXED.fullmatch(text):
        text = box[1].strip()
    while _TEXT_NUMBER.search(text):  # \text{5 cm} is 5 \text{cm}
        text = _TEXT_NUMBER.sub(r"\1 \\text{\2}", text).replace(r"\text{}", "")
    for pattern, new in _CLEAN:
        text = pattern.sub(new, text)
    return text.strip()


# ------------------------------------------------------------------------------------------------------------ trees
# A number is a Fraction. Everything else is a tuple: ("var", name), ("const", "pi"), ("inf", 1), ("pm", sign), an operation
# ("+", a, b), ("root", n, a), ("sin", a) ..., and the structures ("seq", open, close, items), ("list", items), ("set", items),
# ("matrix", rows), ("=", left, right), ("<", strict, difference), ("text", words).


class _Unreadable(ValueError):
    pass


_STRUCTURES = {"seq", "list", "set", "matrix", "=", "<", "text"}
_INF, _NINF = ("inf", 1), ("inf", -1)


def _kind(node) -> str:
    return node[0] if isinstance(node, tuple) and node[0] in _STRUCTURES else ""


def _exact(*numbers) -> bool:
    return all(isinstance(n, Fraction) for n in numbers)


def _power(a: Fraction, b: Fraction) -> Fraction | None:
    if a == 0 and b <= 0:
        raise _Unreadable("a power of zero")
    if b.denominator == 1 and abs(b) * (a.numerator.bit_length() + a.denominator.bit_length()) <= BITS:
        return a ** int(b)
    return None


def _natural(function):
    """Of natural numbers up to 2500 only; None for what is not computed."""
    return lambda *ns: Fraction(function(*map(int, ns))) if all(n.denominator == 1 and 0 <= n <= 2500 for n in ns) else None


_ARITHMETIC = {"+": Fraction.__add__, "*": Fraction.__mul__, "/": Fraction.__truediv__, "^": _power, "abs": abs,
               "!": _natural(math.factorial), "binom": _natural(math.comb), "gcd": _natural(math.gcd),
               "lcm": _natural(math.lcm), "max": max, "min": min,
               "floor": lambda a: Fraction(math.floor(a)), "ceil": lambda a: Fraction(math.ceil(a))}


def _op(name: str, *args):
    """The operation's result if it is exact, else its tree."""
    if _exact(*args):
        value = _ARITHMETIC[name](*args) if name in _ARITHMETIC else None
        if value is not None and value.numerator.bit_length() + value.denominator.bit_length() > BITS:
            raise _Unreadable("a number too large")
        if value is not None:
            return value
    kinds = [_kind(a) for a in args]
    if name == "+" and kinds == ["matrix"] * 2 and _shape(args[0]) == _shape(args[1]):
        return ("matrix", tuple(tuple(_op("+", x, y) for x, y in zip(*rows)) for rows in zip(args[0][1], args[1][1])))
    if name == "*" and sorted(kinds) == ["", "matrix"]:
        factor, matrix = args[::-1] if kinds[0] else args
        return ("matrix", tuple(tuple(_op("*", factor, x) for x in row) for row in matrix[1]))
    if any(kinds):
        raise _Unreadable("arithmetic on a structure")
    if name == "/" and args[1] == 0 or name == "log" and (args[1] == 0 or args[0] in (0, 1)):
        raise _Unreadable("no value")
    if name == "*" and args[0] == -1 and args[1] in (_INF, _NINF):
        return ("inf", -args[1][1])
    return (name, *args)


def _negative(node):
    return _op("*", Fraction(-1), node)


def _shape(matrix) -> list[int]:
    return [len(row) for row in matrix[1]]


def _walk(node):
    """Every node of a tree."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, tuple):
            stack += [child for child in node if isinstance(child, (tuple, Fraction))]


def _has(node, name: str) -> bool:
    return any(isinstance(n, tuple) and n[:1] == (name,) for n in _walk(node))


# ----------------------------------------------------------------------------------------------------------- parser

_REPEATING = r"\d*\.\d*\\(?:overline|bar|dot)\s*(?:\{\d+\}|\d)|\d*\.\d*\(\d+\)|\d*\.\d+(?:\.\.\.|\\[lc]?dots(?![a-zA-Z]))"
_TOKEN = re.compile(
    rf" ?(?:(?P<rep>{_REPEATING})|(?P<base>\d[0-9A-F]*_(?:\d+|\{{\d+\}}))"
    r"|(?P<num>\d+(?:\.\d+|\.(?![.\d]))?(?:[eE][+-]?\d+(?![\d.]))?|\.\d+)"
    rf"|{_WRAPPER.pattern.replace('([', '(?P<text>[')}|(?P<word>(?:and|or)(?![a-z])|\\?[^\W\d_]+)|(?P<op>\*\*|[<>!=]=|\\?.))")
_ALIASES = {alias: token for token, aliases in {
    "*": r"\cdot \times \ast", "/": r"\div", "^": "**", "=": r"== \equiv", "<": r"\lt", ">": r"\gt", "<=": r"\le \leq \leqslant",
    ">=": r"\ge \geq \geqslant", "!=": r"\ne \neq", "∈": r"\in", ",": r"and or \vee \lor", "|": r"\lvert \rvert \vert \|",
    "%": r"\% percent pct percentage", "°": r"\degree degree degrees deg", r"\{": r"\lbrace", r"\}": r"\rbrace", "$": r"\dollar",
    r"\binom": r"\dbinom \tbinom", "(": r"\langle", ")": r"\rangle",
    "": r"\vec \mathbf \mathrm \mathit \boldsymbol \hat \text \textbf \bold \boxed \fbox \angle \triangle"}.items()
    for alias in aliases.split()}
_ARC = {prefix + name: "a" + name for name in ("sin", "cos", "tan", "cot", "sec", "csc") for prefix in ("arc", "a")}
_FUNCTIONS = {*_ARC, "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp", "ln", "lg", "log", "sqrt",
              "cbrt", "abs", "floor", "ceil", "gcd", "lcm", "max", "min"}
_NUMBER_WORDS = {word: Fraction(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty".split())}
_CONSTANTS = {"pi": ("const", "pi"), **dict.fromkeys(("infty", "infinity", "inf"), _INF), "emptyset": ("set", ()),
              "varnothing": ("set", ()), "reals": ("seq", "(", ")", (_NINF, _INF)), **_NUMBER_WORDS}
_LETTER_NAMES = {*_GREEK, "varepsilon", "vartheta", "varphi", "ell", "hbar"} - {"pi"}
_COMMANDS = _FUNCTIONS | _LETTER_NAMES | _CONSTANTS.keys() - _NUMBER_WORDS.keys() | {
    "frac", "binom", "lfloor", "lceil", "begin"}
_MARKS = {"rfloor", "rceil", "end", "cup", "pm", "mp"}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNITS = {name: names.split()[0] for names in (
    "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre", "meter metre", "ft foot feet",
    "inch inches in", "yd yard", "mile mi", "kg kilogram", "gram", "mg milligram", "lb pound", "oz ounce", "second sec",
    "minute min", "hour hr", "day", "week", "month", "year yr", "dollar usd", "cent", "liter litre", "ml milliliter", "mph",
    "^2 square sq", "^3 cubic", "unit", "radian rad", "people", "way", "hz", "mol", "kj", "kw", "pa", "per", "am", "pm")
    for word in names.split() for name in (word, word + "s")}
# words that say something about the number before them, and so are no unit
_HEDGES = set("is isnt not no if for some maybe perhaps possibly probably about approximately approx almost around roughly "
              "nearly at least most more less than when where unless wrong incorrect false but except over under to from "
              "between any other else something guess think likely unsure solution root modulo mod".split()) | {*_NUMBER_WORDS}
_CLOSE = {"(": ")", "[": "]", r"\{": r"\}"}


def _decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if abs(int(exponent or 0)) > BITS // 4:
        raise _Unreadable("a number too long")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _repeating(text: str) -> Fraction:
    """0.1\\overline{6}, 0.1(6) and 0.1666... are 1/6."""
    whole, _, rest = text.partition(".")
    if dots := re.fullmatch(r"(\d+)(?:\.\.\.|\\[lc]?dots)", rest):
        found = re.fullmatch(r"(\d*?)(?:(\d)\2{2,}|(\d{2,}?)\3+)", dots[1])
    else:
        found = re.fullmatch(r"(\d*)\D+(\d+)()\D*", rest)
    if not found or len(text) > 80:
        raise _Unreadable("an unfinished decimal")
    fixed, block = found[1], found[2] or found[3]
    nines = 10 ** len(fixed) * (10 ** len(block) - 1)
    return int(whole or 0) + Fraction(int(fixed + block) - int(fixed or 0), nines)


def _tokens(text: str) -> list:
    """(kind, text, whether a space stands before it); \\pi and pi are one, and so are other names for one thing."""
    tokens = []
    for found in _TOKEN.finditer(text):
        kind, token = found.lastgroup, found[found.lastgroup].strip()
        token = _ALIASES.get(token.casefold() if kind == "text" else token, '"' + token if kind == "text" else token)
        if token[1:] in _COMMANDS and token[0] == "\\":
            token = token[1:]
        elif token[:1] == "\\" and token[1:].isalpha() and token[1:] not in _MARKS:
            raise _Unreadable("an unknown command")
        if token:
            kind = "op" if kind in ("word", "text") and not (token[0].isalnum() or token[0] == '"') else kind
            tokens.append((kind, token, found[0][0] == " "))
    if len(tokens) > TOKENS:
        raise _Unreadable("too long")
    return tokens + [("end", "", False)] * 4


class _Parser:
    def __init__(self, text: str):
        self.tokens, self.i, self.depth, self.bars, self.units = _tokens(text), 0, 0, 0, []

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.i + ahead][1]

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.i + ahead][0]

    def next(self) -> str:
        if self.kind() == "end":
            raise _Unreadable("it ends too early")
        self.i += 1
        return self.peek(-1)

    def accept(self, *texts: str) -> bool:
        found = self.peek() in texts
        self.i += found
        return found

    def expect(self, *texts: str) -> None:
        if not all(map(self.accept, texts)):
            raise _Unreadable(f"expected {texts[0]}")

    # from the loosest to the tightest: lists, relations, sums, products, powers, the things themselves

    def answer(self):
        node = self.list()
        if self.kind() != "end":
            raise _Unreadable("something is left over")
        return node

    def list(self):
        groups = [[self.relation()]]
        while self.accept(",", ";"):
            if self.peek(-1) == ";":
                groups.append([])
            while self.accept(",", ";"):
                pass
            groups[-1].append(self.relation())
        if len(groups) > 1 and max(map(len, groups)) > 1:  # p=5, q=2; p=7, q=2
            return ("list", tuple(("list", tuple(group)) for group in groups))
        items = tuple(item for group in groups for item in group)
        return items[0] if len(items) == 1 else ("list", items)

    def relation(self):
        sides, relations = [self.sum()], []
        while self.accept("=", "<", ">", "<=", ">=", "!=", "∈"):
            relations.append(self.peek(-1))
            sides.append(self.sum())
        if set(relations) == {"="}:
            return _chain(sides)
        return sides[-1] if relations in ([], ["∈"]) else _interval(sides, relations)

    def sum(self):
        node = None
        while True:
            if self.accept("+", "-", r"\pm", r"\mp"):
                sign = {"+": Fraction(1), "-": Fraction(-1), r"\pm": ("pm", 1), r"\mp": ("pm", -1)}[self.peek(-1)]
                term = self.product()
                term = term if sign == 1 else _op("*", sign, term)
                node = term if node is None else _op("+", node, term)
            elif node is None:
                node = self.product()
            elif self.accept(r"\cup"):
                parts = [part[1] if _kind(part) in ("set", "list") else (part,) for part in (node, self.product())]
                node = ("set", tuple(dict.fromkeys(parts[0] + parts[1])))
            else:
                return node

    def product(self):
        node = self.factor()
        while True:
            if self.accept("*", "/"):
                name, sign = self.peek(-1), Fraction(-1 if self.accept("-") else 1)
                node = _op(name, node, _op("*", sign, self.factor()) if sign == -1 else self.factor())
            elif (scale := self.unit()) is not None:
                node = node if scale == 1 else _op("*", node, Fraction(scale))
            elif self.peek() == ":":  # a ratio, or a time
                parts = [node]
                while self.accept(":"):
                    parts.append(self.factor())
                last = parts[-1] if parts[-1] != 0 else Fraction(1)
                node = ("seq", ":", ":", (*(_op("/", part, last) for part in parts), Fraction(parts[-1] == 0)))
            elif self.starts_factor():
                node = _op("*", node, self.factor())
            else:
                return node

    def unit(self) -> int | None:
        """Take a unit that follows a value; what a word such as million multiplies it by; None if there is none."""
        if self.accept("$"):
            self.units.append("dollar")
            return 1
        kind, word = self.kind(), self.peek().casefold()
        if kind not in ("word", "text") or kind == "word" and (word in _COMMANDS or len(word) <= 3 and word not in _UNITS):
            return None
        names = re.findall(r"[a-z]+", word)
        if not 0 < len(names) <= 6 or re.search(r"[\d(?,]", word) or _HEDGES.intersection(names):
            raise _Unreadable("a remark instead of a unit")
        self.i += 1
        if names[0] in _SCALES and len(names) == 1:
            return _SCALES[names[0]]
        self.units += [_UNITS.get(name, name) for name in names]
        if self.accept("^"):
            self.units.append(f"^{self.argument()}")
        if self.accept("/") and self.unit() is None:
            self.units.append(self.next())
        return 1

    def starts_factor(self) -> bool:
        kind, text, space = self.tokens[self.i]
        if kind == "num":  # x 5, but neither x5 nor 5 5
            return self.kind(-1) not in ("num", "rep", "base") and (self.kind(-1) != "word" or space)
        return kind == "word" or text == "{" or text in _CLOSE or text == "|" and not self.bars

    def factor(self):
        node = self.base()
        while True:
            if self.accept("^"):
                node = _op("^", node, self.argument())
            elif self.accept("!"):
                node = _op("!", node)
            elif self.accept("%"):
                node = _op("pct", node)
            elif self.accept("°"):
                node = _op("deg", node)
                if self.peek() in ("C", "F"):
                    self.units.append(self.next())
            elif self.peek() == "'" and isinstance(node, tuple) and node[0] == "var":
                node = ("var", node[1] + self.next())
            else:
                return node

    def argument(self):
        """An exponent or the like: a group, or one factor, with its sign; 2^3^2 is 2^(3^2)."""
        if self.accept("-"):
            return _negative(self.argument())
        self.accept("+")
        node = self.base()
        return _op("^", node, self.argument()) if self.accept("^") else node

    def digit_argument(self):
        """TeX takes one digit: \\frac12 is 1/2."""
        kind, text, space = self.tokens[self.i]
        if kind == "num" and text.isdigit():
            self.tokens[self.i:self.i + 1] = [(kind, text[0], space)] + [(kind, text[1:], False)] * (len(text) > 1)
            return Fraction(self.next())
        return self.base()

    def base(self):
        self.depth += 1
        if self.depth > DEPTH:
            raise _Unreadable("nested too deeply")
        node = self.atom()
        self.depth -= 1
        return node

    def atom(self):
        kind, text = self.kind(), self.next()
        if kind == "num":
            return self.number(text)
        if kind == "rep":
            return _repeating(text)
        if kind == "base":
            digits, _, base = text.partition("_")
            return Fraction(int(digits, int(base.strip("{}")[:4]) or 1))
        if kind == "word":
            return self.word(text)
        if kind == "text":
            inner = text[1:]
            if inner.casefold() in _CONSTANTS or inner.casefold() in _FUNCTIONS or len(inner) == 1 and inner.isalpha():
                return self.word(inner)
            return ("text", inner.casefold())
        if text in _CLOSE:
            return self.bracket(text)
        if text == "{":
            node = self.list()
            self.expect("}")
            return node
        if text == "|":
            self.bars += 1
            node = self.list()
            self.expect("|")
            self.bars -= 1
            return _op("abs", node)
        if text == "$":
            self.units.append("dollar")
            return self.base()
        raise _Unreadable(f"unexpected {text[:20]!r}")

    def number(self, text: str):
        number = _decimal(text)
        if not text.isdigit():
            return number
        if self.peek(-2) not in ("^", "_"):  # perhaps a mixed number
            if self.peek() == "frac":
                part = self.base()
                return number + part if _exact(part) and 0 < part < 1 else _op("*", number, part)
            if self.tokens[self.i][2] and (self.kind(), self.peek(1), self.kind(2)) == ("num", "/", "num"):
                part = _decimal(self.next()) / _decimal(self.next() and self.next())
                if 0 < part < 1:
                    return number + part
                raise _Unreadable("two numbers")
        return number

    def variable(self, name: str):
        if self.accept("_"):
            name += "_" + self.next()
            if self.peek(-1) == "{":
                while not self.accept("}"):
                    name += self.next()
        return ("var", name.replace("{", ""))

    def word(self, word: str):
        """A constant, a function, a variable, or a product of letters; a long word is none of them."""
        low = word.lower()
        if low in _CONSTANTS:
            return _CONSTANTS[low]
        if low in _FUNCTIONS:
            return self.function(low)
        if word in _LETTER_NAMES:
            return self.variable(word)
        if word in ("frac", "binom"):
            return _op("/" if word == "frac" else "binom", self.digit_argument(), self.digit_argument())
        if word in ("lfloor", "lceil"):
            node = self.list()
            self.expect("\\r" + word[1:])
            return _op(word[1:], node)
        if word == "begin":
            return self.matrix()
        if len(word) > 3 or word in _HEDGES:
            raise _Unreadable("a word")
        letters = [("const", c) if c in "ei" else ("var", c) for c in word]
        if letters[-1][0] == "var":
            letters[-1] = self.variable(word[-1])
        if len(letters) > 1 and self.accept("^"):  # in ab^2 only b is squared
            letters[-1] = _op("^", letters[-1], self.argument())
        return functools.reduce(functools.partial(_op, "*"), letters)

    def function(self, name: str):
        if name in ("sqrt", "cbrt"):
            n = Fraction(3 if name == "cbrt" else 2)
            if self.accept("["):
                n = self.list()
                self.expect("]")
            return _op("root", n, self.base())
        base = self.digit_argument() if self.accept("_") else None
        power = self.argument() if self.accept("^") else None
        if self.peek() in ("(", "{", "["):
            argument = self.base()
        else:  # sin 2x, but not the cos of sin x cos x
            argument = _negative(self.factor()) if self.accept("-") else self.factor()
            while self.starts_factor() and self.peek() not in _FUNCTIONS:
                argument = _op("*", argument, self.factor())
        if name in ("gcd", "lcm", "max", "min"):
            return _op(name, *(argument[3] if _kind(argument) == "seq" else (argument,)))
        if name in ("log", "ln", "lg"):
            node = _op("log", base or (Fraction(10) if name == "lg" else ("const", "e")), argument)
        elif name == "exp":
            node = _op("^", ("const", "e"), argument)
        elif power == -1 and "arc" + name in _ARC:
            return _op("a" + name, argument)
        else:
            node = _op(_ARC.get(name, name), argument)
        return node if power is None else _op("^", node, power)

    def bracket(self, opening: str):
        if opening == r"\{" and self.accept(r"\}"):
            return ("set", ())
        node, closing = self.list(), self.next()
        items = node[1] if _kind(node) == "list" else (node,)
        if closing != _CLOSE[opening] and (opening + closing not in ("(]", "[)") or len(items) == 1):
            raise _Unreadable("brackets of two kinds")
        if opening == r"\{":
            return ("set", tuple(dict.fromkeys(items)))
        if len(items) == 1:
            return node
        if opening == "[" and all(_kind(row) == "seq" and row[1] == "[" for row in items):
            return ("matrix", tuple(row[3] for row in items))
        return _bracketed(opening, closing, items)

    def matrix(self):
        rows = [[]]
        while not self.accept(r"\end"):
            if self.accept(r"\\"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.relation())
        rows = tuple(tuple(row) for row in rows if row)
        if len(set(map(len, rows))) != 1:
            raise _Unreadable("rows of different length")
        return ("matrix", rows)


def _bracketed(opening: str, closing: str, items: tuple):
    """Infinite ends are open, however they are written."""
    return ("seq", "(" if items[0] == _NINF else opening, ")" if items[-1] == _INF else closing, items)


def _is_name(node) -> bool:
    """x, a word, f(x), AB, |AB|, AB/CD or (x, y), most of which the parser reads as products; not xy, or xy = 5 would be 5."""
    if not isinstance(node, tuple):
        return False
    if node[0] == "seq":
        return all(map(_is_name, node[3])) if node[1] == "(" else all(map(_capitals, node[3][:-1]))
    if node[0] == "*":  # f(x) and f^{-1}(x)
        first = node[1][1] if isinstance(node[1], tuple) and node[1][0] == "^" and node[1][2] == -1 else node[1]
        if isinstance(first, tuple) and first[0] == "var" and (first[1][0] in "fghpq" or first[1][0].isupper()):
            return _exact(node[2]) or node[2][0] == "var"
    return node[0] in ("var", "text") or _capitals(node)


def _capitals(node) -> bool:
    return all(isinstance(n, tuple) and (n[0] in ("*", "/", "abs") or n[0] == "var" and n[1][0].isupper()) for n in _walk(node))


def _chain(sides: list):
    """x = 10/2 = 5 is x = 5, and 10/2 = 5 is 5; sides that are not all the same are no answer."""
    values = sides[:]
    while len(values) > 1 and _is_name(values[0]):
        values.pop(0)
    if len(values) == len(sides) == 2 and not _equal(*sides):
        return ("=", *sides)
    if not all(_equal(values[-1], value) for value in values[:-1]):
        raise _Unreadable("a false chain")
    return ("=", sides[0], values[-1]) if len(values) < len(sides) else values[-1]


def _interval(sides: list, relations: list):
    """x > 3 and 1 < x <= 2 are intervals; another inequality is kept as 0 < difference."""
    names = [_is_name(side) for side in sides]
    for i, side in enumerate(sides):
        if isinstance(side, tuple) and side[:2] == ("*", -1) and _is_name(side[2]):  # -x > -1 is x < 1
            names[i], sides = True, [_negative(s) if s != side else side[2] for s in sides]
            relations = [r.translate({60: 62, 62: 60}) for r in relations]
            break
    if relations == ["!="] and names[0]:
        return ("set", (("seq", "(", ")", (_NINF, sides[1])), ("seq", "(", ")", (sides[1], _INF))))
    if all(r[0] == ">" for r in relations):
        sides, names, relations = sides[::-1], names[::-1], [r.replace(">", "<") for r in relations[::-1]]
    if not all(r[0] == "<" for r in relations):
        raise _Unreadable("a mixed chain")
    if len(sides) == 2 and names[0] != names[1] and not _has(sides[names[0]], "var"):
        sides, relations = ([_NINF] + sides, ["<"] + relations) if names[0] else (sides + [_INF], relations + ["<"])
        names = [False, True, False]
    if names == [False, True, False]:
        return _bracketed("(" if relations[0] == "<" else "[", ")" if relations[1] == "<" else "]", (sides[0], sides[2]))
    if len(sides) != 2:
        raise _Unreadable("a chain of inequalities")
    return ("<", relations[0] == "<", _op("+", sides[1], _negative(sides[0])))


# ----------------------------------------------------------------------------------------------------------- values

_mp = MPContext()
_COSTS = {**dict.fromkeys(("+", "*", "/", "deg", "pct", "floor", "ceil", "var", "const"), 0.1), "abs": 0.3, "!": 5, "binom": 5}


def _sum(a, b):
    total, size = a + b, abs(a) + abs(b)
    return _mp.zero if abs(total) < size * _mp.mpf(2) ** (-_mp.prec // 2) else total  # a cancellation leaves noise


def _real_root(n, a):
    odd = not n.imag and not a.imag and a.real < 0 and int(n.real) == n.real and int(n.real) % 2
    return a if a == 0 else -((-a) ** (1 / n)) if odd else a ** (1 / n)


def _bounded_power(a, b):
    if a == 0 or abs(b) > 10**6 or abs(b * _mp.log(a)) > 10**6:
        raise _Unreadable("a power too large")
    return a ** b


_VALUES = {"+": _sum, "*": lambda a, b: a * b, "/": lambda a, b: a / b, "^": _bounded_power, "root": _real_root, "abs": abs,
           "log": lambda base, a: _mp.log(a) / _mp.log(base), "!": lambda a: _mp.gamma(a + 1), "pct": lambda a: a / 100,
           "deg": lambda a: a * _mp.pi / 180, "binom": lambda n, k: _mp.binomial(n, k)}
_LIMITS = {**dict.fromkeys(_FUNCTIONS | set(_ARC.values()), lambda a: abs(a) <= 10**4),
           **dict.fromkeys(("!", "binom"), lambda a: _mp.prec <= 600 and abs(a) <= 300),
           **dict.fromkeys(("floor", "ceil"), lambda a: not a.imag and abs(a) <= 10**9)}


@functools.lru_cache(maxsize=1024)
def _point(name: str, point: int) -> tuple:
    """A variable's values at a random point: in the field, and as a complex number."""
    rng = random.Random(f"{name} {point}")
    return rng.randrange(PRIME), complex(rng.uniform(0.6, 2.4), rng.uniform(0.1, 0.9))


def _residue(node, point: int = 0) -> int | None:
    """The value modulo PRIME of a tree of + * / and integer powers; None for other trees."""
    if isinstance(node, Fraction):
        return node.numerator * (1 if node.denominator == 1 else pow(node.denominator, -1, PRIME)) % PRIME
    name, *children = node
    if name == "var" or node == ("const", "pi"):  # pi is transcendental
        return _point(children[0], point)[0]
    if node == ("const", "i"):
        return pow(2, PRIME // 4, PRIME)
    if name not in ("+", "*", "/", "^", "pct"):
        return None
    a, b = _residue(children[0], point), children[1] if len(children) > 1 else Fraction(100)
    if name == "^":
        return pow(a, int(b), PRIME) if a is not None and _exact(b) and b.denominator == 1 else None
    if a is None or (b := _residue(b, point)) is None:
        return None
    return (a + b if name == "+" else a * b if name == "*" else a * pow(b, -1, PRIME)) % PRIME


def _value(node, point: int):
    """An mpmath number: the node with every variable at its random number of this point."""
    if isinstance(node, Fraction):
        return _mp.mpf(node.numerator) / node.denominator
    name, *children = node
    if name == "var":
        return _mp.mpc(_point(children[0], point)[1])
    if name == "const":
        return {"pi": +_mp.pi, "e": +_mp.e, "i": _mp.j}[children[0]]
    if not all(isinstance(child, (tuple, Fraction)) for child in children):
        raise _Unreadable("no number")
    args = [_value(child, point) for child in children]
    if name in _LIMITS and not all(map(_LIMITS[name], args)):
        raise _Unreadable("too large, or no value")
    return _VALUES[name](*args) if name in _VALUES else getattr(_mp, name)(*args)


def _spend(work: float) -> None:
    _mp.spent += work
    if _mp.spent > WORK:
        raise _Unreadable("too costly to compare")


@functools.lru_cache(maxsize=256)
def _values(node, points: int, prec: int) -> list:
    cost = sum(0.2 if n[0] == "^" and _exact(n[2]) and n[2].denominator == 1 else _COSTS.get(n[0], 1)
               for n in _walk(node) if isinstance(n, tuple))
    _spend(cost * points * (prec / 160) ** 1.3)
    _mp.prec = prec
    return [_value(node, point) for point in range(points)]


def _pairs(a, b) -> list:
    """The values of two trees at a few points, with enough bits that numbers which differ in their last bit differ by far."""
    numbers = [n for n in _walk((a, b)) if isinstance(n, Fraction)]
    bits = max((n.numerator.bit_length() + n.denominator.bit_length() for n in numbers), default=0)
    if bits > 2000:
        raise _Unreadable("too long to compare")
    points, prec = 3 if _has((a, b), "var") else 1, 2 * (80 + bits - bits % -32)
    pairs = list(zip(_values(a, points, prec), _values(b, points, prec)))
    _mp.prec = prec
    return pairs


def _close(a, b) -> bool:
    return abs(a - b) <= max(abs(a), abs(b)) * _mp.mpf(2) ** (-_mp.prec // 2)


def _same_number(a, b) -> bool:
    if a == b or _exact(a, b):
        return a == b
    if _has((a, b), "inf"):
        return False
    _spend(0.2)
    residues = _residue(a), _residue(b)
    if None not in residues:
        return residues[0] == residues[1]
    return all(_close(x, y) for x, y in _pairs(a, b))


def _proportional(a, b, positive: bool) -> bool:
    """a = c b for one constant c (> 0), as for the two sides of an equation brought together."""
    residues = [] if positive else [_residue(node, point) for point in range(2) for node in (a, b)]
    if residues and not {0, None}.intersection(residues):
        return _has((a, b), "var") and (residues[0] * residues[3] - residues[1] * residues[2]) % PRIME == 0
    pairs = _pairs(a, b)
    if len(pairs) == 1 or any(0 in pair for pair in pairs):
        return False
    ratios = [x / y for x, y in pairs]
    c = ratios[0]
    return all(_close(r, c) for r in ratios) and (not positive or c.real > 0 and _close(c, c.real))


# --------------------------------------------------------------------------------------------------------- equality


def _unnamed(node):
    """The value of "x = 5"; other equations stay."""
    return node[2] if _kind(node) == "=" and _is_name(node[1]) else node


def _signed(node, sign: int):
    """The tree with every \\pm read as this sign, and every \\mp as the other."""
    if not isinstance(node, tuple):
        return node
    return Fraction(sign * node[1]) if node[:1] == ("pm",) else tuple(_signed(child, sign) for child in node)


def _items(node) -> list:
    """The items of what is unordered; one with \\pm is two."""
    items = node[1] if _kind(node) in ("list", "set") else (node,)
    return [_signed(item, sign) for item in items for sign in ((1, -1) if _has(item, "pm") else (1,))]


def _match(xs: list, ys: list) -> bool:
    """Equal as multisets; names of the solutions count where both sides give the same two or more."""
    if len(xs) != len(ys) or len(xs) > 30:
        return False
    names = [{item[1] for item in items if _kind(item) == "="} for items in (xs, ys)]
    if names[0] != names[1] or len(names[0]) < 2:
        xs, ys = map(_unnamed, xs), list(map(_unnamed, ys))
    for x in xs:
        found = next((i for i, y in enumerate(ys) if _equal(x, y)), None)
        if found is None:
            return False
        del ys[found]
    return True


def _equal(a, b) -> bool:
    if a == b:
        return True
    kinds = _kind(a), _kind(b)
    if kinds.count("=") == 1:
        x, y = _unnamed(a), _unnamed(b)
        return (x, y) != (a, b) and _equal(x, y)
    for assigned, point in ((a, b), (b, a)):  # x = 1, y = 2 is the point (1, 2)
        if _kind(assigned) == "list" and _kind(point) == "seq" and all(_kind(item) == "=" for item in assigned[1]):
            return point[1:3] == ("(", ")") and len({item[1] for item in assigned[1]}) == len(point[3]) and all(
                _equal(_unnamed(x), y) for x, y in zip(assigned[1], point[3]))
    xs, ys = _items(a), _items(b)
    if len(xs) != 1 or len(ys) != 1 or {"set", "list"}.intersection(kinds):
        return _match(xs, ys)
    if sorted(kinds) == ["matrix", "seq"]:  # a vector
        vector, row = (a, b) if kinds[0] == "matrix" else (b, a)
        flat = [x for line in vector[1] for x in line]
        return 1 in (len(vector[1]), len(vector[1][0])) and len(flat) == len(row[3]) and all(map(_equal, flat, row[3]))
    if kinds[0] != kinds[1] or kinds[0] == "text":
        return False
    if kinds[0] == "seq":
        return a[1:3] == b[1:3] and len(a[3]) == len(b[3]) and all(map(_equal, a[3], b[3]))
    if kinds[0] == "matrix":
        return _shape(a) == _shape(b) and all(_equal(x, y) for rows in zip(a[1], b[1]) for x, y in zip(*rows))
    if kinds[0] == "=":
        if _is_name(a[1]) and a[1] == b[1]:
            return _equal(a[2], b[2])
        return _proportional(*(_op("+", node[1], _negative(node[2])) for node in (a, b)), False)
    if kinds[0] == "<":
        return a[1] == b[1] and _proportional(a[2], b[2], True)
    tops = [n[0] if isinstance(n, tuple) else "" for n in (a, b)]
    for unit in ("deg", "pct"):  # 30 degrees are pi/6, and 30 when the other side leaves the unit out
        if tops.count(unit) == 1:
            x, y = (a, b) if tops[0] == unit else (b, a)
            return _same_number(x, y) or _same_number(x[1], y)
    return _same_number(a, b)


_NUMBER = re.compile(r"(-?)(?:\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+(?:\.[0-9]+)?)(?:/([0-9]+))?)")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?!\d)")
_BUILDER = re.compile(r"\\\{ ?[a-z](?: ?\\in ?\\reals)? ?(?:\\mid|\||:)(.*)\\\}")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|\.|:)(?: +([^()]*))?|([A-Ja-e])")
_LETTERS = re.compile(r"[^\W\d_]+(?:[ -][^\W\d_]+)*")
_METRIC = re.compile(r"(?<=[\d}) ])(?:[mgsLhNJWVK]|cm|mm|km)(?:/ ?[a-z]{1,3})?(?:\^ ?\{?[23]\}?)?$")
_FAILURES = (ValueError, ArithmeticError, TypeError, AttributeError, IndexError, RecursionError, MemoryError)


def _plain(text: str) -> str:
    """For comparing as text: no wrappers nor spaces, except between digits; words in lower case."""
    text = re.sub(r"(?<![\d,;]) | (?!\d)|(?<!\.)\.$", "", _WRAPPER.sub(r"\1", text))
    return text.casefold() if re.search(r"[^\W\d_]{3}|(?i:no|am|pm)", text) and not re.search(r"[-+*/^=_\\]", text) else text


@functools.lru_cache(maxsize=256)
def _parse(text: str):
    """(tree, units), or None if it cannot be read."""
    _mp.spent = 0
    try:
        parser = _Parser(text)
        return parser.answer(), parser.units
    except _FAILURES:
        return None


def _readings_agree(given: str, gold: str) -> bool:
    """With commas between thousands, or between items."""
    readings = {tuple(_THOUSANDS.sub(lambda m: m[0].replace(",", ""), text) for text in (given, gold)): 0, (given, gold): 0}
    for x, y in (map(_parse, pair) for pair in readings):
        _mp.spent = 0
        if x and y and (not x[1] or not y[1] or sorted(x[1]) == sorted(y[1])) and _equal(x[0], y[0]):
            return True
    return False


def _same(given: str, gold: str) -> bool:
    given, gold = _clean(given), _clean(gold)
    if not all(re.search(r"\w|\\\{", text) for text in (given, gold)):
        return False
    if _plain(given) == _plain(gold):
        return True
    words = [_WRAPPER.sub(lambda m: m[1].strip(), text).strip() for text in (given, gold)]
    choices = [_CHOICE.fullmatch(text) for text in words]
    if all(choices):
        letters = [(c[1] or c[3]).upper() for c in choices]
        return letters[0] == letters[1] and not (choices[0][2] and choices[1][2])
    given, gold = (c[2] if c and c[2] else text for c, text in zip(choices, (given, gold)))  # (B) 12 is 12
    if all(_LETTERS.fullmatch(text) and len(text) > 1 and not re.search(r"\b(?:and|or)\b", text) for text in words) and not (
            _NUMBER_WORDS.keys() & {text.lower() for text in words}):
        return False  # two different words
    given, gold = (b[1] if (b := _BUILDER.fullmatch(text)) else text for text in (given, gold))
    if _readings_agree(given, gold):
        return True
    bare, other = (_METRIC.sub("", text) for text in (given, gold))  # m could be a variable, but not beside a number
    return (bare != given and not re.search("[a-zA-Z]", gold) and _readings_agree(bare, gold)
            or other != gold and not re.search("[a-zA-Z]", given) and _readings_agree(given, other))


# Work left undone is no answer: a model that is paid for "25 * 5" learns to repeat the question.
_NUMERAL = r"(?:\d[\d,]*(?:\.\d*)?|\.\d+)"
_FRACTION = rf"\\frac ?(?:\{{ ?-?(\d+) ?\}}|(\d)) ?(?:\{{ ?-?(\d+) ?\}}|(\d+))|(\d+) ?/ ?-?(\d+)"
_POWER_OF_TEN = r"10 ?(?:\^|\*\*) ?\{? ?[-+]?\d+ ?\}?"
_SCIENTIFIC = rf"{_NUMERAL} ?(?:\\times|\\cdot|\*) ?\(?{_POWER_OF_TEN}\)?|{_POWER_OF_TEN}|{_NUMERAL}[eE][-+]?\d+"
_FINISHED = re.compile(
    rf"{_SCIENTIFIC}|(?:{_NUMERAL} ?)?(?:{_FRACTION})|{_REPEATING}|{_NUMERAL}")
_UNFINISHED = re.compile(r"\d|[+*!|]|(?<=.)-|\^(?! ?\{?[23])|\\(?:sqrt|binom|times|cdot|div|[lr]vert)|sqrt|_")


def _is_number(text: str) -> bool:
    """Whether an answer is one number that is worked out: 7.0, 1/2, 2\\frac12, 1.5\\times10^3, -5\\text{ cm}; not 18+8 or 4/6."""
    text = re.split(r"=|\\approx", _clean(text))[-1].strip().lstrip("([{+-").strip()
    found = _FINISHED.search(text)
    if not found:
        return not _UNFINISHED.search(text)  # a word, such as twelve
    parts = [int(part) for part in found.groups() if part]
    if len(parts) == 2 and (parts[1] < 2 or math.gcd(*parts) > 1):
        return False
    rest = re.sub(r"(?<=[a-zA-Z}]) ?\^ ?\{?[23]\}?", "", text[:found.start()] + " # " + text[found.end():])
    return not _UNFINISHED.search(rest)


def is_equal(given: str, gold: str) -> bool:
    """Whether two answers are mathematically the same, and work that the gold answer has done is not left undone.

    Never raises; what cannot be read equals only the same text.
    """
    given, gold = given.strip(), gold.strip()
    if given == gold:
        return bool(re.search(r"\w|\\\{", gold))
    if len(given) > LONGEST or len(gold) > LONGEST:
        return False
    numbers = _NUMBER.fullmatch(given), _NUMBER.fullmatch(gold)
    try:
        if all(numbers):  # as most answers are
            x, y = (Fraction(n[2] or n[4]) / int(n[3] or n[5] or 1) for n in numbers)
            same = x == y and (numbers[0][1] == numbers[1][1] or x == 0)
        else:
            same = _same(given, gold)
        return same and (_is_number(given) or not _NUMBER.fullmatch(_THOUSANDS.sub(lambda m: m[0].replace(",", ""), _clean(gold))))
    except _FAILURES:
        return False


def math_reward(response: str, gold: str) -> float:
    """1.0 if the response's final answer equals gold, else 0.0. Never raises, whatever the two strings are."""
    answer = extract_answer(response)
    return float(answer is not None and is_equal(answer, gold))


def is_readable(answer: str) -> bool:
    """Whether an answer can be read as mathematics, a word or a choice."""
    text = _clean(answer)
    return bool(_parse(text) or _LETTERS.fullmatch(text) or _CHOICE.fullmatch(text))

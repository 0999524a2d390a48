r"""Is a response's final answer the gold answer? A small, safe checker for mathematics.

    math_reward("... so \\boxed{\\frac{2}{4}}.", "\\frac{2}{4}") == 1.0

1. `extract_answer` finds the answer: the last box, <answer> tag, "####" or "the answer is".
2. `clean` takes off what carries no meaning, and `split` makes tokens of the rest.
3. `Reader` computes while it reads. A variable is a random number, several times: so x(x+1) and
   x^2+x are the same without algebra (Schwartz-Zippel).
4. `equal` compares: lists in any order, tuples in order.
5. Where the gold answer is a plain number, work left undone (18+8 for 26) is no answer: a model
   that is paid for it learns to repeat the question.

Nothing that a model wrote is executed, and all work is bounded.
"""

import math
import operator
import random
import re
import threading
import unicodedata

from mpmath.ctx_mp import MPContext

LONGEST = 600  # characters of an answer
TAIL = 100_000  # characters of a response
LAST_LINES = 5  # where no box is
WORK = 8000  # of one comparison

# ---- extraction

END_OF_TURN = re.compile(  # or the next question
    r"<\|(?:im_end|end|endoftext|eot_id)\|>|</s>|<｜end|\n\n(?:Question|Human|User):")
BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
NOTHING = re.compile(r"[\s.$~{}]*(?:\\(?:text|q?quad|[lc]?dots)[\s{}]*)?")
ENUMERATION = re.compile(  # between two boxes: ", ", " and $y = "
    r"[\s$\\()]*(?:,|(?:, ?)?(?:and|or))[\s$\\()]*(?:[a-z](?: ?=|\))[\s$\\(]*)?")
HEADING = re.compile(  # "Final answer" over the answer, or "#### 42"
    r"^[#*_ ]*(?:final )?answer[*_: ]*\n|(?<!\S)#### *(?!Step|Solution)", re.I | re.M)
ANSWER_IS = re.compile(
    r"\b(?:answer|result)(?: (?:to|for) [\w ]{1,40}?)?\**\s*(?:is\b|[=:：])"
    r"(?!\W*(?:correct|right|clear|unclear|helpful))[*:：\s]*(?:(?:\\\[|\$\$)\s*)?", re.I)
WITHDRAWN = re.compile(  # behind a box
    r"\b(?:wait|actually|mistake|sorry)\b|^[*_#> ]*(?:final )?answer\**:", re.I | re.M)
SENTENCE_END = re.compile(r"[.!]+(?:\s+(?!\d)|$)|,? (?:since|because|which)\b|\n")


def group_end(text: str, start: int) -> int:
    """Where the group open at start closes; start if it does not."""
    depth = 1
    for at, sign in enumerate(text[start:start + 10 * LONGEST], start):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return at
    return start


def last_box(text: str) -> tuple[str | None, str]:
    """The last box that is not empty, all of an enumeration; and the text behind."""
    answer, end = None, 0
    for box in list(BOX.finditer(text))[-16:]:
        box_end = group_end(text, box.end())
        content = text[box.end():box_end]
        if box.start() < end or NOTHING.fullmatch(content):
            continue  # nested, or empty
        together = answer and ENUMERATION.fullmatch(text[end + 1:box.start()])
        answer, end = f"{answer}, {content}" if together else content, box_end
    return answer, text[end:]


def last_phrase(text: str) -> str | None:
    """What follows "####" or "the answer is" in the last lines."""
    lines = [line.strip("` ") for line in text[-4 * LONGEST:].splitlines()]
    text = "\n".join([line for line in lines if line][-LAST_LINES:])
    phrases = ANSWER_IS.split(HEADING.sub("Answer: ", text))
    if len(phrases) == 1:
        return None
    return SENTENCE_END.split(phrases[-1], maxsplit=1)[0].strip("*_ ") or None


def extract_answer(response: str) -> str | None:
    """The final answer as text, or None. Never raises."""
    text = END_OF_TURN.split(response, maxsplit=1)[0]
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None  # it still thinks
    text = text[-TAIL:]
    tagged = text.rpartition("</answer>")[0].rpartition("<answer>")[2]
    answer, behind = last_box(text)
    if answer and WITHDRAWN.search(behind):
        answer = last_phrase(behind) or answer
    answer = answer or tagged.strip() or None
    return last_phrase(answer or text) or answer


# ---- text


def pairs(text: str) -> dict:
    """A dictionary of words and what they stand for."""
    words = text.split()
    return dict(zip(words[::2], words[1::2]))


SIGNS = pairs(r"""
α \alpha~ β \beta~ θ \theta~ λ \lambda~ π \pi~ φ \phi~ √ \sqrt~ ∞ \infty~ ∪ \cup~ ∈ \in~
∅ \emptyset~ ° \degree~ ± \pm~ ≤ <= ≥ >= ≠ \ne~ ≈ \approx~ − - – - ‒ - × * · * ÷ / ⁄ /
€ \$ £ \$""")  # ~ is a space
WORDING = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|it)|mbox|operatorname)\*? ?"
                     r"\{((?:[^{}]|\{[^{}]*\})*)\}")
MEANINGLESS = ("left|right|middle|[bB]igg?[lr]?|displaystyle|boxed|bf|mathbf|boldsymbol|"
               "underline|angle|triangle|vec|hat")
SCALES = pairs("hundred e2 thousand e3 million e6 billion e9 trillion e12")
CLEAN = [(re.compile(pattern), new) for pattern, new in (
    (rf"\\(?:{MEANINGLESS})(?![a-zA-Z])|\\!|\\(?:text)?color ?\{{\w+\}}", ""),
    (r"(?<!\\)(?: |\$|\\[,;:> ()\[\]]|\\q?quad(?![a-z])|\b~)+", " "),  # spaces and $
    (r"\.\.\.|\\[lc]?dots(?![a-z])", r"\\dots "),
    (r"\{([^{}]*?) ?\\over(?![a-z]) ?([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"^ *([-+]?)(?:\\\$|USD) *(.*)", r'\1\2 "dollar'),  # \$5 is 5 dollars
    (r"(?<=\d)\{,\}(?=\d)(?!\d{3}\b)", "."),  # 3{,}14
    (r"\{([,:])\}", r"\1"),  # 1{,}000
    (r"(?<=\d) +(?=\d{3}(?!\d))", ","),  # 1 000
    (r"(?<![\d.,(\[])(?<!\\\{)\d{1,3}(?:,\d{3})+(?!\d)", lambda found: found[0].replace(",", "")),
    (r"(\.\d*)\\(?:overline|bar|dot) ?\{?(\d+)\}?", r"\1(\2)"),  # 0.1\overline{6}
    (r"(\.\d{0,9}?)(\d{1,9}?)\2+ *\\dots", r"\1(\2)"),  # 0.1666...
    (r"\\(?:nice|[dtcsx])frac", r"\\frac"),
    (r"\\frac ?(\d)", r"\\frac{\1}"),  # \frac12
    (r"\\frac ?\{(-?\d+)\} ?(?:\{(-?\d+)\}|(\d))", r" {\1/\2\3}"),
    (r"(?<![\w.^\\])(\d+) +(\{\d+/\d+\}|\d+/\d+)", r"{\1\\mixed \2}"),  # 3 1/2
    (r"\\sqrt ?\[([^][]*)\]", r"\\root{\1}"),  # \sqrt[3]{2}
    (r"(_|mod) ?\{(\w+)\}", r"\1\2"),  # x_{1}
    (r"\\(sin|cos|tan) ?\^ ?\{-1\}", r"\\arc\1"),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})", r"\\degree "),
    (r"\\begin ?\{(?:[pb]?matrix|array)\}(?: ?\{[lcr|]*\})?", r"\\begin ["),
    (r"(?:\\\\ *)?\\end ?\{(?:[pb]?matrix|array)\}", r"]\\end "),
    (r"\\\\", "],["),
    (r"(?<=\d) ?x ?(?=10 ?\^)", "*"),  # 3x10^8
    (r'(?<=.)[, (]+(?:"where|"for)? *[a-z] ?\\in ?\\mathbb[^=<>\d]*$', ""),  # k \in \mathbb{Z}
    (r'[, ]*"(?:where|for)\b[^=<>\d]*"(?:any|all|integer|constant|real)[^=<>\d]*$', ""),
    (r'^ *"?[aA]ll "?reals?(?: "?numbers)? *$|\\mathbb ?(?:R|\{R\})', r"\\reals "),
    (r"^ *\\\{ *[a-z] *(?:\\in *\\reals)? *(?:\\mid|\||:)(.*)\\\} *$", r"\1"),  # \{x | x > 3\}
    (r"^ *\| ?([a-z]) ?\| *(<=?|\\leq?(?:slant)?) *(.*)", r"-(\3)\2 \1\2 \3"),  # |x| < 3
    (r"^ *(?:[a-z] *\\in *\\reals[, ]*)?[a-z] *\\neq? *(.*)", r"\\reals\\setminus\\{\1\\}"),
    (r"(^ *|\\(?:in|cup) *)\]", r"\1("),  # ]2, 5[
    (r"\[(?= *(?:$|\\cup))", ")"),
    (r"^ *[a-df-hj-z]? ?\\approx *(?=[-\d]*\.\d)", ""),  # x \approx 3.14
    (r'^ *[\\"](?:gcd|lcm|int|sum|lim|binom)(?![a-z])[^=]*=', ""),  # \gcd(12, 18) = 6
    (r"^((?:[^=a-zA-Z]|\\[a-z]+)+)= *([a-df-hj-zA-Z]) *$", r"\2=\1"),  # 5 = x
    (r'^ *(?:"[^\W\d_]+ ?)+: *', ""),  # Total: 42
    (rf'(?<=\d) ?"?({"|".join(SCALES)})\b', lambda scale: SCALES[scale[1]] + " "),
    (r"^[ *]+|[ *]+$|(?<![.,;:])[.,;:]$", ""))]


def to_ascii(text: str) -> str:
    """x² as x^{2}, 3½ as 3 1/2, π as a command, − as -."""
    text = re.sub("[¹²³⁰⁴-⁻ⁿ]+", r"^{\g<0>}", text)
    text = unicodedata.normalize("NFKC", re.sub("(?<=\\d)(?=[¼½¾⅐-⅞])", " ", text))
    return "".join(SIGNS.get(sign, sign) for sign in text if sign not in "\u200b\ufe0f")


def clean(text: str) -> str:
    r"""The text without what carries no meaning, in one way of writing.

    A word is marked, so that no letter is a variable: \text{ sq cm} is "sq "cm.
    """
    text = " ".join(re.sub('["`“”]', "", to_ascii(text)).split())
    text = WORDING.sub(lambda words: re.sub(r"[^\W\d_]+", r'"\g<0>', words[1]), text)
    for pattern, new in CLEAN:
        if pattern.search(text):
            text = pattern.sub(new, text)
    return text.strip()


ALIASES = pairs(r"""
cdot * times * div / ** ^ lt < gt > le <= leq <= leqslant <= ge >= geq >= geqslant >= == = \in =
; , & , and , or , lvert | rvert | vert | \% % percent % degree ° degrees ° langle (
rangle ) infinity infty inf infty varnothing emptyset backslash \setminus
zero 0 one 1 two 2 three 3 four 4 five 5 six 6 seven 7 eight 8 nine 9 ten 10 eleven 11 twelve 12""")
UNITS = pairs("""centimeter cm kilometer km meter m metre m inch in inche in foot ft
feet ft mile mi kilogram kg gram g pound lb liter l hour hr minute min second sec mph mph
square ^2 sq ^2 cubic ^3 am am pm pm per per""")
FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan exp ln log".split()
KNOWN = {*FUNCTION_NAMES, *ALIASES, *(
    "alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi varphi psi omega "
    "pi frac sqrt root infty emptyset reals").split()}
HEDGES = {*SCALES, *"""not no if for or so maybe think probably about approximately almost nearly
roughly least most more less than when where unless wrong incorrect but except over under to from
is between any other else mod times dozen th st nd rd""".split()}
TOKEN = re.compile(r"""
    \d[\dA-F]*_\d+  # 1011_2
    | \d*\.\d*\(\d+\)  # 0.1(6)
    | (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?  # 42, .5, 6.02e23
    | [\\"]?[^\W\d_]+(?:_(?:\d+|[a-zA-Z]+))?'*  # x, x_1, f', cm, "cm, \pi
    | \*\*|[<>=]=|\\?[^ ]  # any other sign""", re.X)


def split(text: str) -> str:
    r"""Tokens and spaces: \pi and pi are pi, xy is x y, cm is the word "cm.

    3 \pm 1 is the list 3 + 1, 3 - 1.
    """
    tokens = []
    for token in TOKEN.findall(text):
        name = token.lstrip('\\"')
        alias = ALIASES.get(token) or ALIASES.get(name.lower())
        if alias or name.partition("_")[0] in KNOWN:
            tokens.append(alias or name)
        elif token.isalpha() and (token[3:] or token[1:] and token.lower() in UNITS.values()):
            tokens.append('"' + token)
        else:
            tokens += token if token.isalpha() else [token]
    spend(25 * len(tokens))
    text = " ".join(tokens)
    if r"\pm" in text:
        return text.replace(r"\pm", "+") + " , " + text.replace(r"\pm", "-")
    return text


UNIT = re.compile(r'((?:.* = )?[^"=]+?) (".*|[mgslhLNJWVKCF]\b.*)')


def split_unit(text: str) -> tuple[str, set]:
    """A number and its unit: 5 "cm ^ 2 as 5 and {"cm", "^2"}."""
    found = UNIT.fullmatch(text)
    if not found or found[2][0] != '"' and not is_plain(found[1]):
        return text, set()
    unit = re.sub("[ {}]", "", found[2]).lower()
    names = re.findall(r"[a-z]+|\^\d", unit)
    is_unit = re.fullmatch(r'(?:["./*]|[^\W\d_]|\^-?\d)+', unit)
    if not is_unit or HEDGES.intersection(names) or found[1][-1] == ",":
        return text, set()
    singular = [name.removesuffix("s") or "sec" for name in names]
    return found[1], {UNITS.get(name, name) for name in singular}


# ---- values

mp = MPContext()
mp.prec = 800
CLOSE, NOISE, APART = mp.mpf(2) ** -450, 600, 250
POINTS = [(0.95, 0.99), (10, 40), (-0.9, -0.1), (-40, -10), *[(-3, 3)] * 4]
LOCK = threading.Lock()  # for mpmath and `spent`
spent = 0  # of WORK
Unreadable = ValueError
NoValue = ArithmeticError  # none real at this point


def spend(work: int):
    """Count work: no comparison takes long."""
    global spent
    spent += work
    if spent > WORK:
        raise Unreadable


def tag(value) -> str:
    """What a value is: "" for one of mpmath's numbers. All else is a tuple of a tag and values:
    "list", "set", "vector" (of numbers or rows), "()", "[)" and so on (points, intervals),
    "<>" (1 < x < 2), "named" (x = 1, y = 2), ":" (a ratio), "text",
    "=" (name or None, right, left).
    """
    return value[0] if isinstance(value, tuple) else ""


def items_of(value) -> tuple:
    """The items of a list or set; a number is one item."""
    return value[1:] if tag(value) in ("list", "set") else (value,)


def add(x, y):
    """The sum: zero if all but noise cancels, no value if too many digits are lost."""
    result, (low, high) = x + y, sorted((mp.mag(x), mp.mag(y)))
    if x and y and high - low > APART:
        raise NoValue
    return mp.zero if mp.mag(result) < high - NOISE else result


def multiply(x, y):
    """The product; of a number and a point by items."""
    if tag(y) in ("()", "vector"):
        return (y[0], *(multiply(x, item) for item in y[1:]))
    return x * y


def power(x, y):
    """The power, if a variable cannot have made the base negative."""
    spend(25)
    if not (mp.isint(x) or mp.isint(y) or x.imag) and x.real < 0:
        raise NoValue
    if x and abs(y * mp.log(x)) > 10**5:
        raise Unreadable
    return x ** y


def root(n, x):
    """The n-th root of x: -2 for n = 3 and x = -8."""
    if n % 2 == 1 and not x.imag and x.real < 0:
        return -power(-x, 1 / n)
    return power(x, 1 / n)


def factorial(x):
    """x!, also between integers."""
    spend(150)
    if abs(x) > 2100:
        raise Unreadable
    return mp.factorial(x)


def function_of(name: str, x):
    """sin(x) and the like, where they are real and quick."""
    spend(25)
    lowest = 0 if name in ("ln", "log") else -10**4
    if not lowest < x < 10**4:
        raise NoValue
    return getattr(mp, name.replace("arc", "a"))(x)


def without(space, points):
    r"""\mathbb{R} \setminus \{2\} as what lies between the points."""
    if space != CONSTANTS["reals"]:
        raise Unreadable
    ends = [-mp.inf, *sorted(items_of(points)), mp.inf]
    return ("set", *(("()", *interval) for interval in zip(ends, ends[1:])))


# ---- reader

CONSTANTS = {
    "pi": +mp.pi, "e": +mp.e, "i": mp.j,
    "infty": mp.inf, "emptyset": ("set",), "reals": ("()", -mp.inf, mp.inf)}
COMMANDS = {"frac": operator.truediv, "root": root}
RELATIONS = r"= < > <= >= \approx".split()
CLOSING = pairs(r"( ) [ ] { } \{ \} | | \begin \end")
AFTER = {
    "!": factorial, "%": lambda x: x / 100,
    "°": lambda x: x * mp.pi / 180}
BETWEEN = {
    "+": (1, add), r"\mixed": (1, add), r"\setminus": (1, without),
    "-": (1, lambda x, y: add(x, -y)),
    r"\cup": (1, lambda x, y: ("set", *items_of(x), *items_of(y))),
    "*": (2, multiply), "/": (2, operator.truediv), "^": (3, power),
    ":": (2, lambda x, y: (":", x / y))}
NAME = re.compile(r"""
    [a-zA-Z]+(?:_\w+)?'*  # x, theta, x_1
    | "[^\W\d_]+(?:\ "[^\W\d_]+)*  # Area, total cost
    | (?:m\ )?[A-Z][A-W\ +]* | \|\ [A-Z]\ [A-Z]\ \|  # the segment AB, AB + BC, |AB|
    | [fghpqA-Z]'*(?:\ \^\ \{\ -\ 1\ \})?\ \(\ \w(?:\ ,\ \w)*\ \)  # f(x), P(A)
    | \(\ \w(?:\ ,\ \w)+\ \)  # (x, y) = (2, 3)
    | [a-w](?:\ \+\ [a-w])+  # m + n""", re.X)


class Reader:
    """Recursive descent over one answer, from lists down to letters."""

    def __init__(self, text: str, point: int):
        self.tokens, self.i = [*text.split(), ""], 0
        self.point, self.bars, self.varies = point, 0, False
        self.value = self.list()
        if self.peek:
            raise Unreadable

    @property
    def peek(self):
        return self.tokens[self.i]

    def next(self):
        self.i += 1
        return self.tokens[self.i - 1]

    def accept(self, token):
        """Whether this token is next; if so, go on."""
        found = self.peek == token
        self.i += found
        return found

    def list(self):
        """1, 2 and 3; x = 1, y = 2 goes by the names."""
        items = [self.relation()]
        while self.accept(","):
            if self.peek != ",":
                items.append(self.relation())
        if len(items) == 1:
            return items[0]
        names = {item[1] for item in items if tag(item) == "="}
        if all(re.match("[xz]_", name) for name in names):  # roots of one equation
            items = map(unnamed, items)
        elif len(names) == len(items):
            return ("named", *sorted(items, key=lambda item: item[1]))
        return ("list", *items)

    def relation(self):
        """x = 5 or 1 < x < 2"""
        sides, names, signs = [], [], []
        while True:
            start = self.i
            sides.append(self.expression())
            source = " ".join(self.tokens[start:self.i])
            names.append(NAME.fullmatch(source) and source)
            if self.peek not in RELATIONS:
                break
            signs.append(self.next())
        if signs[-1:] == [r"\approx"] and abs(sides[-2] / sides[-1] - 1) < 0.015:
            del sides[-1], signs[-1]  # \sqrt2 \approx 1.41
        if not signs:
            return sides[0]
        if set(signs) == {"="}:
            return chain(sides, names[0])
        return inequality(sides, names, signs)

    def expression(self, least: int = 1):
        """Of operations that bind at least so tightly: 1 sums, 2 products, 3 powers."""
        if self.accept("-"):
            value = multiply(mp.mpf(-1), self.expression(max(least, 2)))
        else:
            self.i += least == 1 and self.peek == "+"
            value = self.atom()
        while True:
            if self.peek in AFTER and least < 4:
                value = AFTER[self.next()](value)
                continue
            level, operation = BETWEEN.get(self.peek, (2 * self.starts_factor(), multiply))
            if level < least:
                return value
            self.i += self.peek in BETWEEN
            value = operation(value, self.expression(level + (level < 3)))

    def starts_factor(self):
        """A letter or a bracket does; a number does not: x5 could be anything."""
        token = self.peek
        return token[:1].isalpha() or token in CLOSING and not (token == "|" and self.bars)

    def atom(self):
        """A number, a bracket or a word."""
        token = self.next()
        if re.match(r"\.?\d", token):
            digits, _, again = token.rstrip(")").partition("(")  # 0.1(6) has 300 digits
            return ("text", token) if "_" in token else mp.mpf(digits + (300 * again)[:300])
        if token in CLOSING:
            return self.bracket(token)
        if token[:1] == '"':
            while self.peek[:1] == '"':
                token += " " + self.next()
            if len(token) > 2:
                return ("text", token.lower())
            token = token[1]  # of \text{A}
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token in COMMANDS:
            return COMMANDS[token](self.atom(), self.atom())
        if token == "sqrt":
            return root(2, self.atom())
        if not token[:1].isalpha():
            raise Unreadable
        name, _, base = token.partition("_")
        return self.function(name, base) if name in FUNCTION_NAMES else self.variable(token)

    def variable(self, name):
        """A random number, the same for a name and point."""
        self.varies = True
        return mp.mpf(random.Random(f"{name} {self.point}").uniform(*POINTS[self.point]))

    def function(self, name, base):
        r"""\sin 2x, \sin^2 x, \log_2 x"""
        exponent = self.expression(3) if self.accept("^") else None
        bracket = self.peek in CLOSING
        x = self.expression(3)
        while not bracket and self.starts_factor() and self.peek not in FUNCTION_NAMES:
            x = multiply(x, self.expression(3))  # sin 2x, but not the cos of sin x cos x
        value = function_of(name, x)
        if base:
            value /= function_of("ln", mp.mpf(base) if base.isdigit() else self.variable(base))
        return power(value, exponent) if exponent else value

    def bracket(self, opening):
        """A group, a set, a point, an interval or |x|."""
        if opening == r"\{" and self.accept(r"\}"):
            return ("set",)
        self.bars += opening == "|"
        value, closing = self.list(), self.next()
        self.bars -= opening == "|"
        ends, items = opening + closing, items_of(value)
        if ends == r"\begin\end" or ends == "[]" and all(tag(row) == "[]" for row in items):
            return ("vector", *(("vector", *row[1:]) if tag(row) else row for row in items))
        if tag(value) == "list" and ends in ("()", "[]", "(]", "[)"):
            return (ends, *items)
        if closing != CLOSING[opening]:
            raise Unreadable
        if opening == r"\{":
            return ("set", *distinct(items))
        return abs(value) if opening == "|" else value


def chain(sides, name):
    """x = 10/2 = 5 is x = 5, and 10/2 = 5 is 5; sides that differ are an equation."""
    if all(equal(side, sides[-1]) for side in sides[bool(name):]):
        return ("=", name, sides[-1], sides[0]) if name else sides[-1]
    if name or len(sides) > 2:
        raise Unreadable
    return ("=", None, sides[1], sides[0])


def inequality(sides, names, signs):
    """1 < x <= 2 and x > 3 as intervals."""
    if {sign[0] for sign in signs} not in ({"<"}, {">"}):
        raise Unreadable
    if signs[0][0] == ">":
        sides, names, signs = sides[::-1], names[::-1], signs[::-1]
    if len(sides) == 2 and any(names):
        at = 0 if names[0] else 2  # of the infinite end
        sides.insert(at, (at - 1) * mp.inf)
        signs.insert(at // 2, "<")
    low, _, high = sides
    ends = "(["["=" in signs[0]] + ")]"["=" in signs[1]]
    return ("<>" if ends == "()" else ends, low, high)


# ---- equality

ALIKE = {"() <>", "() vector", "() named", "list named"}  # pairs of tags


def unnamed(value):
    """5 of x = 5."""
    return value[2] if tag(value) == "=" and value[1] else value


def distinct(items) -> list:
    """The items, each once."""
    return [x for i, x in enumerate(items) if not any(equal(x, y) for y in items[:i])]


def equal(a, b) -> bool:
    """Whether two values are the same: lists and sets in any order, all else item by item."""
    spend(2)
    if tag(a) == tag(b) == "=":
        if a[1] and a[1] == b[1] and equal(a[2], b[2]):
            return True
        ratio = 60 * add(a[3], -a[2]) / add(b[3], -b[2])  # 120 of 2y = 4x and y = 2x
        return ratio != 0 and equal(ratio, mp.nint(ratio))
    a, b = unnamed(a), unnamed(b)
    tags = {tag(a), tag(b)}
    pair = " ".join(sorted(tags))
    if "text" in tags:
        return a == b
    if pair == "":
        return a == b or abs(a - b) < max(abs(a), abs(b)) * CLOSE
    if tags & {"set", "list"} and pair != "list named":
        left = list(items_of(b))
        for x in items_of(a):
            found = [y for y in left if equal(x, y)]
            if not found:
                return False
            left.remove(found[0])
        return not left
    alike = len(tags) == 1 or pair in ALIKE or pair == "[] vector" and len(a) > 3
    if not alike or len(a) != len(b):
        return False
    return all(map(equal, a[1:], b[1:]))


PLAIN = re.compile(r"""(?:[-+]\ )?(?:
    (?:\d+\ \\mixed\ )?(\d+)\ /\ (?:-\ )?(\d+)  # 1/2, 3 1/2
    | (?:[\d.]+\ \*\ )?10\ \^\ (?:[-+]\ )?\d+  # 1.5 * 10^3
    | [\d.][^ _]*)  # 42, 7.0""", re.X)
CHOICE = re.compile(r"\(?([A-Ja-e])(?:[).:](?: +([^()]*))?)?")
WORDS = re.compile(  # no list or product: xy is yx, but on is not no
    r"(?!.*\b(?:and|or)\b|[b-df-hj-np-tv-z]{2,3}$)(?:[aA] )?[^\W\d_]{2,}(?: [^\W\d_]+)*\.?")


def is_plain(text: str) -> bool:
    r"""Whether the last side is a number without work to do: 7.0, 1/2, 2\frac12, 1.5 * 10^3;
    not 18+8, 4/6 or 7/1.
    """
    last_side = text.partition(r" \approx")[0].rpartition("= ")[2]
    bare = " ".join(token for token in last_side.split() if token not in "(){}")
    found = PLAIN.fullmatch(bare.strip(r"[]\{} %°"))
    parts = [int(part) for part in found.groups() if part] if found else []
    return bool(found) and (not parts or parts[1] > 1 and math.gcd(*parts) == 1)


def equal_everywhere(x: str, y: str) -> bool:
    """Whether two values are the same at all points where both are real."""
    compared = False
    for point in range(len(POINTS)):
        try:
            a, b = Reader(x, point), Reader(y, point)
            if not equal(a.value, b.value):
                return False
            if not a.varies and not b.varies:
                return True
            compared = True
        except NoValue:
            continue
    return compared


def values_agree(given: str, gold: str) -> bool:
    """Whether two values are the same; a unit, % or degree may stand on one side only."""
    (x, unit), (y, gold_unit) = split_unit(given), split_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    if is_plain(y) and not re.search("[=^°]", y) and not is_plain(x):
        return False
    if equal_everywhere(x, y):
        return True
    bare = [re.sub(r" [%°](?= ?(?:[,)\]\\]|$))", "", text) for text in (x, y)]
    return (bare[0] == x) != (bare[1] == y) and equal_everywhere(*bare)


def same(given: str, gold: str) -> bool:
    """Whether two cleaned answers are the same text, choice, words or value."""
    texts = [text.replace('"', "").rstrip(".") for text in (given, gold)]
    bare = {re.sub(r"(?<!\d) | (?!\d)", "", text) for text in texts}
    if len(bare) == 1:
        return bare != {""}
    choice, gold_choice = map(CHOICE.fullmatch, texts)
    if choice and gold_choice:
        return choice[1].upper() == gold_choice[1].upper() and not (choice[2] and gold_choice[2])
    if texts[1] not in KNOWN and WORDS.fullmatch(texts[1]):
        words = {re.sub("^(?:an?|the) ", "", text.lower()) for text in texts}
        return len(words) == 1
    if re.fullmatch(r"\d+(?:-\d+)+", gold):  # a date or a score
        return False
    if choice and choice[2]:
        given = choice[2]  # (B) 12 is 12
    if gold_choice and gold_choice[2]:
        gold = gold_choice[2]
    return values_agree(split(given), split(gold))


def readable(text: str) -> bool:
    """Whether a cleaned answer is a value, choice or a few words."""
    words = text.replace('"', "")
    if CHOICE.fullmatch(words) or words not in KNOWN and WORDS.fullmatch(words):
        return len(words.split()) < 5
    value = split_unit(split(text))[0]
    return equal_everywhere(value, value)


def guarded(function, *texts: str) -> bool:
    """False for an error; one at a time, each with so much work."""
    global spent
    if max(map(len, texts)) > LONGEST:
        return False
    with LOCK:
        spent = 0
        try:
            return function(*map(clean, texts))
        except Exception:
            return False


def is_equal(given: str, gold: str) -> bool:
    """Whether two answers are the same as mathematics or text. Never raises."""
    return given.strip() == gold.strip() != "" or guarded(same, given, gold)


def is_readable(answer: str) -> bool:
    """Whether an answer is mathematics or a few words."""
    return guarded(readable, answer)


def math_reward(response: str, gold: str) -> float:
    """1.0 if the response's final answer equals gold, else 0.0. Never raises."""
    answer = extract_answer(response)
    return float(answer is not None and is_equal(answer, gold))

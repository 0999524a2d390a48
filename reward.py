r"""Is a response's final answer the gold answer? A small, safe checker for mathematics.

    math_reward("... so \\boxed{\\frac{2}{4}}.", "\\frac{2}{4}") == 1.0

1. `extract_answer` finds the answer: the last box, <answer> tag, "####" or "the answer is".
2. `clean` takes off what carries no meaning; answers of the same text are equal.
3. `Reader` computes while it reads, by recursive descent: rational numbers exactly, others with 800
   bits, a variable as a few random numbers that depend on its name. So x(x+1) and x^2+x come out
   the same without algebra (Schwartz-Zippel).
4. `equal` compares: numbers point by point, lists in any order, tuples in order.
5. Where the gold answer is a plain number, work left undone (18+8 for 26) is no answer: a model
   that is paid for it learns to repeat the question.

Nothing that a model wrote is executed, and all work is bounded.
"""

import functools
import itertools
import math
import random
import re
import threading
import unicodedata
from fractions import Fraction

from mpmath.ctx_mp import MPContext

LONGEST = 600  # characters of an answer
TAIL = 100_000  # characters of a response
LAST_LINES = 5  # of a response without a box
TOKENS = 200  # of an answer
BITS = 20_000  # of an exact number
WORK = 5000  # of one reading, some 1.5 us each

# ---- extraction

END_OF_TURN = re.compile(
    r"<\|(?:im_end|eot_id|endoftext)\|>|</s>|<｜end▁of▁sentence｜>")
THOUGHT = re.compile(r"<(/?)think>", re.I)
TAG = re.compile(r"</?answer>", re.I)
BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*"
                 r"(?:\{|([-+]?\d+(?:[.,/]\d+)*|(?!a |I )[a-zA-Z](?![a-zA-Z])))")  # \boxed 5
NOTHING = re.compile(r"(?:[\s$~{}.]|\\[,;:!> ]|\\(?:[lc]?dots|q?quad|text)(?![a-zA-Z]))*")
HEADING = re.compile(r"^[#*_ ]*(?:the )?(?:final )?answer[*_: ]*\n", re.I | re.M)
HASHES = re.compile(r"^#### *(?!Step|Solution)(.+)", re.M)
ANSWER_IS = re.compile(
    r"\b(?:answer|result)(?: (?:to|for) [\w ]{1,40}?)?\**\s*(?:is\b|=|:)"
    r"(?![*:\s]*(?:correct|right|clear|unclear|helpful))[*:\s]*(not\b|n't|wrong|here\b|below\b)?",
    re.I)
SENTENCE_END = re.compile(
    r"(?<=[^\d\s])[.!]\s|(?<=\d)[.!](?:\s+(?=[A-Z])|$)|,? (?:since|because)\b|\n")


def braced(text: str, start: int) -> str | None:
    """What the group open at start holds; None if it does not close soon."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:start + 10 * LONGEST], re.S):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start:start + brace.start()]
    return None


def last_box(text: str) -> str | None:
    """The last well-formed box that is not empty; of nested ones the outer."""
    answer, end = None, -1
    for box in list(BOX.finditer(text))[-16:]:
        content = box[1] or braced(text, box.end())
        if content and box.start() >= end and not (
                NOTHING.fullmatch(content) or text.startswith("}{", box.end() + len(content))):
            answer, end = content.strip(), box.end() + (0 if box[1] else len(content))
    return answer


def last_phrase(text: str) -> str | None:
    """What follows "####" or "the answer is", in the last few lines."""
    lines = [line.strip() for line in text[-4 * LONGEST:].splitlines()]
    text = HEADING.sub("Answer: ", "\n".join([line for line in lines if line][-LAST_LINES:]))
    if marked := HASHES.findall(text):
        text = "Answer: " + marked[-1]
    phrases = list(ANSWER_IS.finditer(text))
    if not phrases or phrases[-1][1]:
        return None
    sentence = SENTENCE_END.split(text[phrases[-1].end():], maxsplit=1)[0]
    return sentence.strip("*_ ").removesuffix(".").strip("*_ ") or None


def extract_answer(response: str) -> str | None:
    """The final answer as text, or None. Never raises."""
    text = END_OF_TURN.split(response, maxsplit=1)[0]
    if thoughts := list(THOUGHT.finditer(text)):
        if not thoughts[-1][1]:
            return None  # it still thinks
        text = text[thoughts[-1].end():]
    text = text[-TAIL:]
    if box := last_box(text):
        return box
    tags = [""] * 2 + TAG.split(text)
    if len(tags) > 4:
        return last_phrase(tags[-2]) or tags[-2].strip() or None
    return last_phrase(text)


# ---- text

GREEK = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma "
         "tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega").split()
NAMES = GREEK + (
    "infty le ge ne approx pm mp cup in emptyset degree sqrt root{3} reals dots $").split()
SIGNS = str.maketrans({sign: f"\\{name} " for sign, name in zip(
    "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ∞≤≥≠≈±∓∪∈∅°√∛ℝ…€", NAMES)}
    | dict(zip("−–—‒‐‑×·⋅∙∗÷∕⁄′⟨⟩£¥\ufe0f", "------*****///'()   ")))
WRAPPER = re.compile(r"\\text\{([^{}]*)\}")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALE = re.compile(rf"(?<=\d) ?(\\text\{{)? ?({'|'.join(SCALES)})\b")
CLEAN = [  # what the text has to contain, pattern, replacement
    (key[0] if key else re.match(r"(?:\\\\[a-z]*)?", pattern)[0][1:], re.compile(pattern), new)
    for pattern, new, *key in (
    (r"\\(?:text(?!col|sty)[a-z]*|math(?:rm|tt)|mbox|operatorname|underline)\*? ?\{", r"\\text{"),
    (r"\\(?:math(?:bf|it|sf|cal)|overline(?= ?\{[A-Z]+\} ?=)) ?\{([^{}]*)\}", r"\1"),
    (r"(?<=[{(\[]) | (?=[})\]])|\\(?:left|right) ?\.|\\(?:left|right|middle|[bB]igg?[lrm]?|"
     r"[a-z]+style|hline|vec|hat|bold[a-z]*|triangle|angle)(?![a-zA-Z])|\\! ?"
     r"|\bm ?(?=\\angle)|\\(?:text)?color(?:box)? ?(?:\{[^{}]*\}|[a-z]+)"
     r"|\\[hv]?(?:phantom|space) ?\{[^{}]*\}", ""),
    (r"\\text\{(-?[\d.,]*\d[\d.,/]*) ?([a-zA-Z .]*)\}", r"\1 \\text{\2}"),  # \text{5 cm}
    (r"(?<!\\)(?:\$|\\(?:[;:>()\[\]]|q?quad))", " "),
    (r"^ *(?:[a-df-hj-z] ?)?\\approx *(?=(?:\\\$)?-?\d*\.\d)", ""),
    (r"^ *(-?)\\\$(.*)", r"\1\2\\text{dollar}"),
    (r"(?<=\d)(?: ?\{,\} ?|\\[, ]|~|,\\[, !]| )(?=\d{3}(?!\d))", ","),  # 1{,}000
    (r"(?<!\\)\\[, $]|(?<=\S)~", " "), (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"([_^]) ?\{(\w)\}(?!\w)", r"\1\2", "{"), (r"\\sqrt ?\[([^][]*)\]", r"\\root{\1}"),
    (r"\\frac ?(\d)", r"\\frac{\1}"), (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),  # \frac12
    (r"(?<![\d.^_])(\d+) (\d+) ?/ ?(\d+)", r"\1\\frac{\2}{\3}", "/"),  # 3 1/2
    (r"(?<![\d.^_])(\d+) ?(?=\\frac ?\{\d+\} ?\{\d+\})", r"\1\\mixed", r"\frac"),
    (r"\\mathbb ?\{?R\}?", r"\\reals "), (r"\\reals *-(?= ?\\\{)", r"\\reals\\setminus"),
    (r"(?<=[\])}]) ?[uU] ?(?=[\[({\\])", r"\\cup "),
    (r"\^ ?(?:\\circ(?![a-zA-Z])|\{\\circ\})", r"\\degree "),
    (r"(?<=\d) ?(?:\\text\{)?deg(?:rees?)?\b\}?", r"\\degree ", "deg"),
    (r"(?<=\d) ?(?:\\text\{)?percent\b\}?", r"\\%", "p"),
    (r"\\degree *(?:\\text\{)?([CF])\b\}?", r"\\text{\1}"),
    (r"\\(begin|end) ?(?:\{array\}(?: ?\{[^{}]*\})?|\{?(?:[pbB]|small)?matrix\}?)", r"\\\1 "),
    (r"\.\.\.|\\[lc]?dots(?![a-zA-Z])", r"\\dots "),
    (r"\\[pb]?mod ?(?:\{(\w+)\}|(\w))", r"\\mod \1\2"),
    (r"\\text\{([^{}]*(?:\band\b|\bor\b|,)[^{}]*|[^{}a-zA-Z]*|[eij])\}", r" \1 "),
    (r'^[ "`]+|[ "`]+$|(?<![.,;:])[.,;:]$', ""), (r"(?<=\d) ?x ?(?=10 ?\^)", "*", "x"),
    (r"^(?:\\text\{)?[aA]ll reals?(?: numbers)?\}?$", r"\\reals"),
    (r"^\\\{[a-z](?: ?\\in ?\\reals)? ?(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # {x | x>3}
    (r"^\|(\w)\| ?(<|\\leq?\w*) ?(.*)", r"-(\3)\2 \1\2 \3"),
    (r"^(?:\w ?\\in ?\\reals[, ]*)?[a-z] ?\\neq? ?(.*)", r"\\reals\\setminus\\{\1\\}"),
    (r"^\w ?\\equiv(?=.*\\mod)", ""),
    (r",? ?(?:\\text\{)?(?:[, ]{0,3}\b(?:where|with|for (?:a[ln]\w?|every|each|some|int\w+|"
     r"const\w+))\b|[, ]{0,3}[,(] *(?=[a-zA-Z] ?(?:\\in\b|an int)))(?=.*(?<![a-zA-Z\\])"
     r"(?:[b-zA-Z]|a(?! ?[a-zA-Z]))(?![a-zA-Z]))[^=<>\d]*$", "", " "),
    (r"^((?:[^=a-zA-Z]|\\(?:frac|sqrt|pi))+?) ?= ?([a-df-hj-zA-Z])$", r"\2=\1", "="),
    (r" +", " "))]


def to_ascii(text: str) -> str:
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", r"^{\g<0>}", text)
    text = re.sub("(?<=\\d)(?=[¼½¾⅐-⅞])", " ", text.translate(SIGNS))
    text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


@functools.lru_cache(maxsize=1024)
def clean(text: str) -> str:
    text = " ".join((text if text.isascii() else to_ascii(text)).split())
    while box := re.fullmatch(r"[$ ]*\\f?box(?:ed)? ?\{(.*)\}[$ ]*", text):
        text = box[1].strip()
    for start, pattern, new in CLEAN:
        if start in text:
            text = pattern.sub(new, text)
    text = SCALE.sub(lambda scale: f"e{SCALES[scale[2]]} {scale[1] or ''}", text)
    return text.replace(r"\text{}", "").strip()


UNITS = {unit: names.split()[0] for names in (
    "cm centimeter", "mm millimeter", "km kilometer", "m meter", "ft foot feet", "mph", "per",
    "in inch inche", "mi mile", "yd yard", "kg kilogram", "g gram", "mg milligram", "lb pound",
    "oz", "ml milliliter", "yr year", "s sec second", "min minute", "h hr hour", "l liter", "am",
    "pm", "rad radian", "^2 square sq", "^3 cubic") for unit in names.split()}
WORD = r"\\text\{[^{}]*\}|(?<![a-zA-Z\\])[a-zA-Z]+(?![a-zA-Z])\.?"
UNIT = re.compile(rf"(?<=[\d}})\]!%|a-z]) ?(\\text\{{[^{{}}]*\}}|(?<![a-z] )(?:{WORD}))"
                  rf"(?:{WORD}|/|\^ ?\{{?-?\d\}}?|\\cdot|\*| )*$")
HEDGES = set(
    "is not no if for some maybe perhaps possibly probably about approximately approx almost "
    "around roughly nearly at least most more less than when where unless wrong incorrect false "
    "but except over under to from between any other else something guess think likely unsure "
    "solution modulo mod plus minus times dozen".split())


def split_unit(text: str) -> tuple[str, set]:
    r"""5 \text{ cm}^2 as "5" and {"cm", "^2"}. Raises Unreadable for a remark such as "or so"."""
    found = UNIT.search(text)
    number = text[:found.start()].strip() if found else ""
    if not re.search(r"[\d\\]", number):
        return text, set()
    names = re.findall(r"[a-z]+|\^\d", re.sub(r"\\text|[{}]| (?=\^)", "", found[0].casefold()))
    if HEDGES.intersection(names) or re.search(
            r"\\text\{(?:[^{}]*[(?\d]|(?:st|nd|rd|th)\b)", found[0]):
        raise Unreadable
    names = [re.sub("tre$", "ter", name.removesuffix("s") or name) for name in names]
    first = found[1].rstrip(".")
    if len(first) == 1:
        known = first in "mgslhLNJWVKCF" and PLAIN.fullmatch(number)
    else:
        known = not first.isalpha() or names[0] in UNITS or (
            len(first) > 3 and first not in COMMANDS)
    return (number, {UNITS.get(name, name) for name in names}) if known else (text, set())


# ---- values
# A number is a Fraction, or a list: mpmath's numbers at one point (a constant) or at all points,
# None where it has no real value. All else is a tuple of a tag and values: "list", "set", "()",
# "[)" and so on for points and intervals, "<>" for 1 < x < 2, "vector", "matrix" and its "row"s,
# ":" for a ratio; ("text", words); ("=", name, right side, left side).

Unreadable = ValueError
mp = MPContext()
mp.prec = 800
CLOSE, NOISE, APART = mp.mpf(2) ** -450, 600, 250
POINTS = ((0.95, 0.99), (10, 40), (-0.9, -0.1), (-40, -10))
LOCK = threading.Lock()  # for mpmath and `spent`
spent = 0  # of WORK


@functools.lru_cache(maxsize=1024)
def variable(name: str) -> list:
    rng, code = random.Random(name), sum(map(ord, name))
    mixed = [rng.uniform(1.1, 3) * (-1) ** (code >> bit) for bit in range(4)]
    return [mp.mpf(x) for x in [rng.uniform(*ends) for ends in POINTS] + mixed]


def is_exact(*numbers):
    return all(isinstance(number, Fraction) for number in numbers)


def tag(value):
    return value[0] if isinstance(value, tuple) else ""


def spend(work):
    global spent
    spent += work
    if spent > WORK:
        raise Unreadable


def apply(function, cost, *numbers):
    if any(map(tag, numbers)):
        raise Unreadable
    columns = [[mp.convert(bounded(n, 400))] if is_exact(n) else n
               for n in numbers]
    points = max(map(len, columns))
    spend(cost * points)
    rows = zip(*(column * (points // len(column)) for column in columns))
    return [None if any(x is None for x in row) else function(*row) for row in rows]


def bounded(number, bits=BITS):
    if number.numerator.bit_length() + number.denominator.bit_length() > bits:
        raise Unreadable
    return number


def total(x, y):
    result, (low, high) = x + y, sorted((mp.mag(x), mp.mag(y)))
    if x and y and high - low > APART:
        return None
    return mp.zero if mp.mag(result) < high - NOISE else result


def add(a, b):
    return bounded(a + b) if is_exact(a, b) else apply(total, 4, a, b)


def multiply(a, b):
    if tag(b) in ("matrix", "row", "()", "vector"):
        return (b[0], *(multiply(a, x) for x in b[1:]))
    return bounded(a * b) if is_exact(a, b) else apply(lambda x, y: x * y, 1, a, b)


def negative(a):
    return multiply(Fraction(-1), a)


def positive(a):
    """Roots and logarithms of variables are taken where they are real."""
    many = isinstance(a, list) and len(a) > 1
    return [x if x is None or x.imag or x.real >= 0 else None for x in a] if many else a


def power(a, b):
    if is_exact(b) and b % 1 == 0:
        n = int(b)
        if is_exact(a) and abs(n) * (a.numerator * a.denominator).bit_length() <= BITS:
            return a ** n
        if abs(n) < 10**6:
            return apply(lambda x: x ** n, 3, a)
    return apply(raised, 25, positive(a), b)


def raised(x, y):
    too_large = y.real <= 0 if x == 0 else abs(y * mp.log(x)) > 10**5
    return None if too_large else x ** y


def divide(a, b):
    return multiply(power(b, Fraction(-1)), a)


def root(n, a):
    """The cube root of -8 is -2."""
    if is_exact(n) and n % 2 == 1:
        odd = mp.one / int(n)
        return apply(lambda x: mp.sign(x) * abs(x) ** odd, 25, a)
    return power(a, divide(Fraction(1), n))


def factorial(n):
    if is_exact(n) and n % 1 == 0 and 0 <= n <= 2080:
        return Fraction(math.factorial(int(n)))
    return apply(lambda x: mp.gamma(x + 1) if abs(x) < 50 and not x.imag else None, 90, n)


# ---- reader

INF, NINF = [mp.inf], [-mp.inf]
REALS = ("()", NINF, INF)
FUNCTIONS = {name: getattr(mp, name.replace("arc", "a")) for name in (
    "sin cos tan cot sec csc arcsin arccos arctan exp ln log").split()}
NUMBER_WORDS = {word: Fraction(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}
CONSTANTS = {"pi": [+mp.pi], "e": [+mp.e], "i": [mp.j], "infty": INF, "emptyset": ("set",),
             "reals": REALS, **NUMBER_WORDS}
LETTERS = {*GREEK, "varepsilon", "varphi", "ell"} - {"pi"}
COMMANDS = LETTERS | FUNCTIONS.keys() | CONSTANTS.keys() | {"sqrt", "root", "frac", "begin"}
REPEATING = (r"(\d*)\.(\d{0,20}?)(?:(?:\\(?:overline|bar|dot) ?\{?|\()(\d+)[})]?"
             r"|(?P<again>\d{1,20}?)(?P=again)+ ?\\dots)")
NUMERAL = r"\d+(?:\.\d+|\.(?![.\d]))?(?:[eE][+-]?\d+)?|\.\d+"
TOKEN = re.compile(rf" ?({REPEATING}|\d[0-9A-F]*_(?:\d+|\{{\d+\}})|{NUMERAL}"
                   r"|\\text\{[^{}]*\}|(?:and|or)(?![a-z])|\\?[^\W\d_]+(?:_(?:\{[^{}]*\}|\w))?'*"
                   r"|\*\*|[<>!=]=|\\?[^ ])")
ALIASES = {alias: token for row in r"""
* \cdot \times
/ \div
^ **
= == \equiv
< \lt
> \gt
<= \le \leq \leqslant \leqq
>= \ge \geq \geqslant \geqq
∈ \in
, ; and or
| \lvert \rvert \vert \|
% \%
° \degree
\{ \lbrace
\} \rbrace
( \langle
) \rangle
\setminus \backslash
infty infinity inf
emptyset \varnothing
""".split("\n") for token, *aliases in [row.split() or [""]] for alias in aliases}
OPENING = {"(", "[", "{", r"\{"}
RELATIONS = {"=", "<", ">", "<=", ">=", "∈"}

LETTER = rf"(?:[a-zA-Z]|{'|'.join(sorted(LETTERS, key=len, reverse=True))})(?:_\{{?\w+\}}?)?'*"
NAME = re.compile(  # AB = 5 or f(x) = x^2; not xy, or xy = 5 would be 5
    rf"\\text.*|{LETTER}|[A-Z]{{2,4}}|\|[A-Z]{{2}}\||[A-Z]{{2}}/[A-Z]{{2}}|[a-zA-Z]{{4,}}"
    rf"|[fghpqA-Z](?:\^\{{-1\}})?'*\([\w,]+\)|\({LETTER}(?:,{LETTER})+\)")


def split_tokens(text: str) -> list[str]:
    """xy are two tokens, \\pi and pi the same."""
    tokens = []
    for token in TOKEN.finditer(text):
        token = ALIASES.get(token[1], token[1])
        name = re.match(r"\\?([^\W\d_]*)", token)[1]
        if name in COMMANDS:
            token = token.removeprefix("\\")
        product = name == token not in COMMANDS and (
            len(name) < 4 and name.lower() not in HEDGES | CONSTANTS.keys()
            or re.fullmatch("[abcdwxyz]+", name))
        tokens += name if product else [token]
    if len(tokens) > TOKENS:
        raise Unreadable
    return tokens + [""]


def words(text):
    return ("text", re.sub(r"^(?:an?|the) |\.$", "", text.casefold()))


def items_of(value):
    return value[1:] if tag(value) in ("list", "set") else (value,)


def sequence(opening, items, closing):
    return (("(" if items[0] == NINF else opening) + (")" if items[1] == INF else closing), *items)


def without(space, points):
    r"""\mathbb{R}\setminus\{2\} as what lies between the points."""
    if space != REALS or tag(points) != "set":
        raise Unreadable
    ends = [NINF, *sorted(points[1:], key=lambda end: add(end, [mp.zero])[0]), INF]
    return ("set", *(sequence("(", pair, ")") for pair in zip(ends, ends[1:])))


AFTER = {"!": factorial, "%": lambda a: multiply(a, Fraction(1, 100)),
         "°": lambda a: multiply(a, [mp.pi / 180])}
BETWEEN = {
    "+": (1, add), "-": (1, lambda a, b: add(a, negative(b))), r"\setminus": (1, without),
    r"\cup": (1, lambda a, b: tag(a) and tag(b) and ("set", *items_of(a), *items_of(b))),
    "*": (2, multiply), "/": (2, divide), ":": (2, lambda a, b: (":", divide(a, b))),
    "^": (3, power), r"\mixed": (4, add)}


class Reader:
    """Recursive descent over one answer, from lists down to letters."""

    def __init__(self, text: str):
        self.tokens, self.i, self.bars = split_tokens(text), 0, 0
        self.value = self.list()
        if self.peek:
            raise Unreadable

    @property
    def peek(self):
        return self.tokens[self.i]

    def next(self):
        token = self.peek
        self.i += token != ""
        return token

    def accept(self, token):
        found = self.peek == token
        self.i += found
        return found

    def list(self):
        items = [self.relation()]
        while self.accept(","):
            if self.peek != ",":
                items.append(self.relation())
        return items[0] if len(items) == 1 else ("list", *items)

    def relation(self):
        sides, sources, signs = [], [], []
        while True:
            start = self.i
            sides.append(self.expression())
            sources.append("".join(self.tokens[start:self.i]))
            if self.peek not in RELATIONS:
                break
            signs.append(self.next())
        if not signs or signs == ["∈"]:
            return sides[-1]
        return chain(sides, sources) if set(signs) == {"="} else inequality(sides, sources, signs)

    def expression(self, least: int = 1):
        """Of operations that bind at least so tightly: 1 sums, 2 products, 3 powers."""
        if self.accept("-"):
            value = negative(self.expression(max(least, 2)))
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
        token = self.peek  # a number does not: x5 or 5 5 could be anything
        return token[:1].isalpha() or token in OPENING or token == "|" and not self.bars

    def atom(self):
        token = self.next()
        if re.match(r"\.?\d", token):
            return self.number(token)
        if token[:5] == r"\text":
            word = token[6:-1].strip()
            return self.word(word) if len(word) == 1 else NUMBER_WORDS.get(word, words(word))
        if token[:1].isalpha():
            return self.word(token)
        if token in OPENING:
            return self.bracket(token)
        if token == "|":
            self.bars += 1
            value = self.list()
            if self.next() != "|":
                raise Unreadable
            self.bars -= 1
            return apply(abs, 1, value)
        if token == r"\dots":
            return ("text", token)
        raise Unreadable

    def number(self, token):
        if "_" in token or token[:2] == "00":  # not yet converted
            return ("text", re.sub("[{}]", "", token))
        if found := re.fullmatch(REPEATING, token):  # 0.1\overline{6}, 0.1(6), 0.1666...
            whole, fixed, block, again = found.groups()
            nines = 10 ** len(fixed) * (10 ** len(block or again) - 1)
            return Fraction(f"{whole or 0}.{fixed or 0}") + Fraction(int(block or again), nines)
        if abs(int(token.lower().partition("e")[2] or 0)) > BITS // 4:
            raise Unreadable
        return Fraction(token)

    def word(self, word):
        low = word.lower()
        if word in CONSTANTS or low in NUMBER_WORDS:
            return CONSTANTS[low]
        if word == "frac":
            return divide(self.atom(), self.atom())
        if word in ("sqrt", "root"):
            return root(Fraction(2) if word == "sqrt" else self.atom(), self.atom())
        if word == "begin":
            return self.matrix()
        name, _, index = low.partition("_")
        if name in FUNCTIONS:
            return self.function(name, index.strip("{}"))
        if word.isalpha() and len(word) > 1 and word not in LETTERS:
            return words(word)
        return variable(re.sub("[{}]", "", word))

    def function(self, name, base):
        exponent = self.expression(3) if self.accept("^") else None
        bracket = self.peek in OPENING
        x = self.expression(3)
        while not bracket and self.starts_factor() and self.peek not in FUNCTIONS:
            x = multiply(x, self.expression(3))  # sin 2x, but not the cos of sin x cos x
        if exponent == -1 and "arc" + name in FUNCTIONS:
            name, exponent = "arc" + name, None
        x = positive(x) if name in ("ln", "log") else x
        value = apply(lambda y: FUNCTIONS[name](y) if abs(y) < 10**4 and (
            y or name[0] != "l") else None, 25, x)
        if base:
            value = divide(value, apply(mp.log, 10, Reader(base).value))
        return value if exponent is None else power(value, exponent)

    def bracket(self, opening):
        if self.accept(r"\}"):
            return ("set",)
        value = self.list()
        items, ends = items_of(value), opening + self.next()
        if ends == "{}":
            return value
        if ends == r"\{\}":
            return ("set", *items)
        if ends not in ("()", "[]", "(]", "[)")[:2 * len(items)]:
            raise Unreadable
        if len(items) == 1:
            return items[0]
        return sequence(ends[0], items, ends[1])

    def matrix(self):
        rows = [[]]
        while not self.accept(r"\end"):
            if self.accept(r"\\"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.relation())
        rows = [row for row in rows if row]
        if len(rows[0]) == 1:  # a vector
            return ("vector", *(row[0] for row in rows))
        return ("matrix", *(("row", *row) for row in rows))


def chain(sides, sources):
    """x = 10/2 = 5 is x = 5, and 10/2 = 5 is 5; sides that differ are no answer."""
    names = list(itertools.takewhile(NAME.fullmatch, sources[:-1]))
    name = names[0] if names else ""
    if all(equal(sides[-1], side) for side in sides[len(names):-1]):
        return ("=", name, sides[-1], sides[0]) if name else sides[-1]
    if name or len(sides) > 2:
        raise Unreadable
    return ("=", "", sides[1], sides[0])


def inequality(sides, sources, signs):
    if signs[0][0] == ">":
        sides, sources = sides[::-1], sources[::-1]
        signs = [sign.replace(">", "<") for sign in signs[::-1]]
    named = [bool(NAME.fullmatch(source)) for source in sources]
    at = 1 if len(sides) > 2 else named.index(True)
    if not named[at]:
        raise Unreadable
    low, left = (sides[at - 1], signs[at - 1]) if at else (NINF, "<")
    high, right = (sides[at + 1], signs[at]) if at + 1 < len(sides) else (INF, "<")
    ends = {"<": "()", "<=": "[]"}
    interval = sequence(ends[left][0], (low, high), ends[right][1])
    return ("<>" if interval[0] == "()" else interval[0], low, high)


# ---- equality


def close(x, y):
    return x == y or abs(x - y) < max(abs(x), abs(y)) * CLOSE


def unnamed(value):
    return value[2] if tag(value) == "=" and value[1] else value


def distinct(value):
    """The items of a list; those of a set once."""
    items = items_of(value)
    return [x for i, x in enumerate(items)
            if tag(value) != "set" or not any(equal(x, y) for y in items[:i])]


def match(xs, ys):
    """Lists: in any order, unless dots stand in them or the items have names."""
    if len(xs) != len(ys):
        return False
    named = [len({x[1] for x in items if tag(x) == "="}) > 1 for items in (xs, ys)]
    if not all(named):
        xs, ys = (list(map(unnamed, items)) for items in (xs, ys))
        if any(named) or ("text", r"\dots") in xs:
            return all(map(equal, xs, ys))
    left = list(ys)
    for x in xs:
        found = next((i for i, y in enumerate(left) if equal(x, y)), None)
        if found is None:
            return False
        del left[found]
    return True


def equal(a, b):
    spend(1)
    if (tag(a), tag(b)).count("=") == 1:
        a, b = unnamed(a), unnamed(b)
    tags = tag(a), tag(b)
    if is_exact(a, b):
        return a == b
    if tags == ("", ""):
        same = [at for at in apply(close, 1, a, b) if at is not None]
        return bool(same) and all(same)
    if sorted(tags) == ["()", "list"]:  # x = 1, y = 2 is the point (1, 2)
        names = {x[1] for x in max(a, b, key=tag)[1:] if tag(x) == "="}
        return len(names) == len(a) - 1 and match(a[1:], b[1:])
    if "set" in tags or "list" in tags:
        return match(distinct(a), distinct(b))
    if tags == ("=", "="):
        if a[1] and a[1] == b[1] and equal(a[2], b[2]):
            return True
        zeros = [add(left, negative(right)) for _, _, right, left in (a, b)]
        ratios = [ratio for ratio in divide(*zeros) if ratio is not None]
        return len(ratios) > 1 and all(ratio and close(ratio, ratios[0]) for ratio in ratios)
    if tags[0] == "text":
        return a == b
    alike = tags[0] == tags[1] or {*tags} in (
        {"()", "<>"}, {"()", "vector"}, {"[]" if len(a) > 3 else "()", "vector"})
    return alike and len(a) == len(b) and all(map(equal, a[1:], b[1:]))


SCALED = re.compile(r"(?<=[\w)}]) ?(?:\\?%|\\degree) ?(?=$|[,)\]]|\\\})")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")
FRACTION = r"\\frac ?\{-?(\d+)\} ?\{-?(\d+)\}|(\d+) ?/ ?-?(\d+)"
PLAIN = re.compile(rf"[({{]*[-+]?(?:\d+\.?\d*|\.\d+|{FRACTION})[)}}]*")
FINISHED = re.compile(  # a number that is worked out
    rf"(?:[({{\[]|\\\{{)*[-+]? ?[({{\[]{{0,9}}(?:(?:\d+\\mixed)?(?:{FRACTION})"
    rf"|(?:(?:{NUMERAL}) ?(?:\\times|\\cdot|\*) ?)?\(?10 ?(?:\^|\*\*) ?\{{?[-+]?\d+\}}?"
    rf"|{REPEATING}|{NUMERAL}|(?:\\text\{{)?[a-z ]+)(?:[)}}\]% ]|\\\}}|\\%|\\degree)*", re.I)
CHOICE = re.compile(r"\(?([A-Ja-e])(?:[).:](?: +([^()]*))?)?")
WORDS = re.compile(r"(?!.*\b(?:and|or)\b)(?:[aA] )?[^\W\d_]{2,}(?: [^\W\d_]+)*")
PRODUCT = re.compile(
    r"(?i)[abcdwxyz]+|[^\Waeiou\d_]{2,3}|a[^\Waeiou\d_]|[^\Waeiou\d_]a")


@functools.lru_cache(maxsize=256)
def read(text: str):
    global spent
    spent = 0
    known = text.lower() in COMMANDS or text in ALIASES or PRODUCT.fullmatch(text)
    if WORDS.fullmatch(text) and not known:
        return words(text)
    plus, minus = text.replace(r"\pm", "+"), text.replace(r"\pm", "-")
    try:
        value = Reader(plus.replace(r"\mp", "-")).value
        if plus == minus:
            return value
        return ("set", *items_of(value), *items_of(Reader(minus.replace(r"\mp", "+")).value))
    except Exception:
        return None


def exact(text: str) -> str:
    r"""2\sqrt2 of 2\sqrt2 \approx 2.83. Raises unless the decimal is its rounding."""
    left, *right = text.split(r"\approx")
    for side in right:
        decimal = split_unit(side.strip())[0]
        gap = add(unnamed(read(split_unit(left.strip())[0])), -Fraction(decimal))
        if apply(abs, 1, gap)[0] > 0.5 * 10 ** -len(decimal.split(".")[1]):
            raise Unreadable
    return left.strip()


def is_finished(text: str) -> bool:
    """7.0, 1/2, 2\\frac12, 1.5\\times10^3, or 26 behind 18+8 =."""
    found = FINISHED.fullmatch(text.rpartition("=")[2].strip())
    parts = [int(part) for part in found.groups()[:4] if part] if found else []
    return bool(found) and (not parts or parts[1] > 1 and math.gcd(*parts) == 1)


def values_agree(given: str, gold: str) -> bool:
    """With commas between thousands or items; without % where one side has none."""
    global spent
    joined = tuple(THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
                   for text in (given, gold))
    for texts in {joined: 0, (given, gold): 0}:
        (x, unit), (y, gold_unit) = map(split_unit, texts)
        if unit and gold_unit and unit != gold_unit or PLAIN.fullmatch(y) and not is_finished(x):
            continue
        bare = [SCALED.sub("", text) for text in (x, y)]
        for pair in [(x, y)] + [bare] * ((bare[0] == x) != (bare[1] == y)):
            values = list(map(read, pair))
            spent = 0
            if None not in values and equal(*values):
                return True
    return False


def same(given: str, gold: str) -> bool:
    texts = [WRAPPER.sub(r"\1", text).strip() for text in (given, gold)]
    bare = [re.sub(r"(?<![\d,;]) | (?!\d)|\.$", "", text) for text in texts]
    if bare[0] == bare[1]:
        return bare[0] != ""
    choices = list(map(CHOICE.fullmatch, texts))
    if all(choices):
        (letter, content), (gold_letter, gold_content) = (choice.groups() for choice in choices)
        return letter.upper() == gold_letter.upper() and not (content and gold_content)
    return values_agree(*(exact(choice[2] if choice and choice[2] else text)  # (B) 12 is 12
                          for choice, text in zip(choices, (given, gold))))


def is_equal(given: str, gold: str) -> bool:
    """Whether two answers are the same, as mathematics or as text. Never raises."""
    given, gold = given.strip(), gold.strip()
    if given == gold:
        return not NOTHING.fullmatch(gold)
    if max(len(given), len(gold)) > LONGEST:
        return False
    try:
        with LOCK:
            return same(clean(given), clean(gold))
    except Exception:
        return False


def is_readable(answer: str) -> bool:
    """Whether an answer can be read, as mathematics or a few words. Never raises."""
    try:
        with LOCK:
            text = clean(answer[:LONGEST + 1])
            value = read(split_unit(text)[0])
            short = value and (tag(value) != "text" or len(value[1].split()) < 5)
            return bool(short or CHOICE.fullmatch(text))
    except Exception:
        return False


def math_reward(response: str, gold: str) -> float:
    """1.0 if the response's final answer equals gold, else 0.0. Never raises."""
    answer = extract_answer(response)
    return float(answer is not None and is_equal(answer, gold))

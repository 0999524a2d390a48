"""The answer checker: labelled cases by kind, extraction, hostile text, threads, and the shared examples.

Labels follow one policy. Equal values are right, whatever their form; a unit, %, degree sign or name may stand on one
side only; lists and sets go in any order, points, vectors and matrices in order; where the gold is a plain number, work
left undone is wrong; more than was asked, a hedge or a rounded value is wrong. Debatable, and decided:
- 5 \\approx 5.1 behind an exact value is its rounding, if it is within 1.5 %;
- x_1, x_2 (and z_1, ...) are the roots of one equation, in any order; a_1, a_2 are not;
- a score or date as gold (3-1, 2023-10-12) is text and no subtraction;
- 3{,}14 has a decimal comma, 0,5 is a list; (1,000, 2) is a triple, as (100,200) is a pair;
- of "#### 42" and "the answer is 41" the last one counts, and behind a box what withdraws it.
"""
import ast
import json
import string
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import clean, extract_answer, is_equal, is_readable, math_reward

EQUAL = r"""
# numbers
042 ~ 42   -0 ~ 0   +7 ~ 7   .5 ~ \frac12   5. ~ 5   2.50 ~ 5/2   9007199254740993 ~ 9007199254740993.0
two ~ 2   \text{twelve} ~ 12   1e-3 ~ 0.001   6.02\cdot10^{23} ~ 602\times 10^{21}   3x10^8 ~ 3\times10^8
6.5 x 10^{-3} ~ 0.0065   10^{-400} ~ \frac{1}{10^{400}}
# thousands and decimal commas
1,000 ~ 1000   1{,}234{,}567 ~ 1234567   1\,000 ~ 1000   1,\!000,\!000 ~ 10^6   12 345 ~ 12345
(100,200) ~ (100, 200)   3{,}14 ~ 3.14   5{,}40 ~ 5.40
# fractions
\dfrac12 ~ \tfrac{1}{2}   \frac1{72} ~ 1/72   \frac{1}3 ~ 1/3   -\frac{1}{2} ~ \frac{-1}{2}
\frac{1}{-2} ~ -0.5   -(5/8) ~ -\frac58   3 1/2 ~ 3.5   -2\frac{1}{3} ~ -7/3   \sfrac{7}{8} ~ 7/8
\nicefrac{3}{4} ~ 0.75   {7 \over 8} ~ 7/8   {x+1 \over 2} ~ \frac{x+1}{2}
# repeating decimals
0.\overline{3} ~ 1/3   0.1\overline{6} ~ 1/6   0.(142857) ~ 1/7   0.333... ~ \frac13   0.1212\ldots ~ 4/33
0.\bar{9} ~ 1
# roots and constants
\sqrt{8} ~ 2\sqrt2   \frac{1}{\sqrt3} ~ \frac{\sqrt{3}}{3}   \sqrt[3]{54} ~ 3\sqrt[3]{2}
\sqrt[3]{-2} ~ -\sqrt[3]{2}   sqrt(2)/2 ~ \frac{\sqrt{2}}{2}   \sqrt{3+2\sqrt2} ~ 1+\sqrt2   2pi ~ \pi+\pi
\tan^{-1} 1 ~ \frac{\pi}{4}   (1+i)^2 ~ 2i   \frac{1+i\sqrt3}{2} ~ e^{i\pi/3}   e^2 ~ \exp(2)
30^\circ ~ \frac{\pi}{6}
# expressions
x^2-1 ~ (x-1)(x+1)   \frac{x^2-1}{x-1} ~ x+1   \frac{n(n+1)}{2} ~ \frac{n^2+n}{2}   x_1+x_{2} ~ x_2 + x_1
x^{-1} ~ 1/x   -(x-y) ~ y-x   xy ~ yx   \alpha\beta ~ \beta \alpha   \ln x^2 ~ 2\ln x   \log_3 27x ~ 3+\log_3 x
\sin 2x ~ 2\sin x\cos x   \sec^2 x ~ 1+\tan^2 x   n! ~ n\cdot(n-1)!   e^{x+y} ~ e^x e^y
|x-1| ~ \left|1-x\right|   \sqrt{x^2} ~ |x|   \sqrt[3]{x^3} ~ x   \frac{1}{2}x ~ 1/2x
# units
5\text{ cm} ~ 5   25\text{ m}^2 ~ 25   9.8\,\text{m/s}^2 ~ 9.8   12\text{ inches} ~ 12 in
5 metres ~ 5\text{ m}   16 square centimeters ~ 16\text{ cm}^2   9 cubic feet ~ 9\text{ ft}^3
10 s ~ 10 seconds   1,000.99m² ~ 1000.99   \text{6 units} ~ 6   60 miles per hour ~ 60   7:30 pm ~ 7:30 PM
# money, per cent, degrees, scales
\$5.00 ~ 5   -\$3 ~ -3   5 dollars ~ \$5   USD 18 ~ 18   35\% ~ 0.35   28 percent ~ 28\%   33\frac13\% ~ 1/3
90^{\circ} ~ 90   25 °C ~ 25   (30^\circ, 60^\circ) ~ (30,60)   5 million ~ 5000000   3 hundred ~ 300
# names
x=5 ~ 5   5 = x ~ 5   \frac12 = k ~ 0.5   AB = 5 ~ 5   |AB| = 5 ~ 5   AB + BC = 12 ~ 12   m+n=17 ~ 17
m\angle C=50^\circ ~ 50   f^{-1}(x)=x-1 ~ x-1   \text{total cost} = 12 ~ 12   \text{Total: } 42 ~ 42
x = \frac{1}{2} = 0.5 ~ 0.5   x \in [1,2] ~ [1,2]   (x,y)=(2,5) ~ (2,5)
# equations
y=2x+3 ~ y-2x-3=0   2y = 4x + 6 ~ y=2x+3   3x-5=y ~ y=3x-5   x^2+y^2=1 ~ y^2 = 1-x^2   y<2x+1 ~ 2x+1>y
# lists and sets
1, 2 and 3 ~ 3,2,1   1;2 ~ 2,1   \{1,2\} ~ 2, 1   \{1,1,2\} ~ \{2,1\}   3\pm\sqrt2 ~ 3-\sqrt{2}, 3+\sqrt{2}
x=1 or x=-2 ~ \{-2,1\}   \{\} ~ \varnothing   \{1\}\cup\{2\} ~ \{1,2\}   (1,2),(3,4) ~ (3,4), (1,2)
1, 3, \ldots, n ~ 1,3,\dots,n   C, A ~ A and C   x=1, y=2 ~ (1,2)   x=1, y=2 ~ y=2, x=1   x=1, y=2 ~ 1, 2
x_1=5, x_2=-3 ~ x_1=-3, x_2=5   x_1=5, x_2=-3 ~ -3, 5
# points, vectors and matrices
(0.5,1) ~ \left( \frac12 , 1 \right)   (2;4) ~ (2,4)   \langle 1,2,3\rangle ~ (1,2,3)
\begin{pmatrix}1\\2\end{pmatrix} ~ (1,2)   \begin{pmatrix}1\\2\\3\end{pmatrix} ~ [1,2,3]
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{bmatrix} 1 & 2 \\ 3 & 4 \\ \end{bmatrix}
\left(\begin{array}{cc}1&2\\3&4\end{array}\right) ~ \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{bmatrix}1&2\\3&4\end{bmatrix} ~ [[1,2],[3,4]]
\frac13\begin{pmatrix}1&0\\0&1\end{pmatrix} ~ \begin{pmatrix}1/3&0\\0&1/3\end{pmatrix}   6:4 ~ 3:2
# intervals
[4,\infty) ~ x \ge 4   3\geqslant x>1 ~ (1,3]   x<1 \text{ or } x>2 ~ (2,\infty)\cup(-\infty,1)   ]2,5] ~ (2,5]
]-\infty,1[\cup]2,\infty[ ~ (-\infty,1)\cup(2,\infty)   x \ne 3 ~ (-\infty,3)\cup(3,\infty)
x \in \mathbb{R}, x \neq 2 ~ \mathbb{R}\setminus\{2\}   x \neq 1, 3 ~ (-\infty,1)\cup(1,3)\cup(3,\infty)
(-\infty,\infty)\setminus\{-1,1\} ~ \mathbb R \backslash \{1,-1\}   \{x \mid x > 3\} ~ (3,\infty)
\{x\in\mathbb{R} : 2\le x<5\} ~ [2,5)   |x|<3 ~ (-3,3)   |y| \leq 4 ~ -4 \le y \le 4
\text{all real numbers} ~ \mathbb{R}
# words and choices
\text{east} ~ East   \text{a circle} ~ the circle   \mathrm{No solution.} ~ no solution   \text{(B)} ~ B
D ~ (D) Alina   \textbf{(C)}\ 5 ~ c   (B) 12 ~ 12   \text{June 20} ~ June 20   2023-10-12 ~ 2023-10-12
204_5 ~ 204_{5}   x\equiv 5 \pmod{7} ~ x \equiv 5\pmod 7
# notes
2k\pi, \quad k \in \mathbb{Z} ~ 2k\pi   3k \text{ where } k \in \mathbb{Z} ~ 3k
2n \text{ where } n \text{ is an integer} ~ 2n   x^2+c, \text{ for any constant } c ~ x^2+c
\sqrt2 \approx 1.414 ~ \sqrt2   \frac{1}{3} \approx 0.33 ~ 1/3   x \approx 2.35 ~ 2.35
# wrappers
$5$ ~ 5   \( 5 \) ~ 5   **42** ~ 42   `42` ~ 42   “42” ~ 42   \boxed{42} ~ 42   {\color{red}{6}} ~ 6
\displaystyle\mathbf{42}. ~ 42   \bf 42 ~ 42   ((((5)))) ~ 5
# Unicode
−5 ~ -5   ٤٢ ~ 42   ４２ ~ 42   x²−4 ~ (x-2)(x+2)   10⁻³ ~ 0.001   3½ ~ 3.5   2√3 ~ \sqrt{12}
π/2 ~ \frac{\pi}{2}   x≤5 ~ (-\infty,5]   （1，2） ~ (1,2)   3×10⁴ ~ 30000   ±3 ~ 3,-3
"""
DIFFERENT = r"""
# numbers
42 ~ 43   -5 ~ 5   17.5 ~ 17   9007199254740993 ~ 9007199254740992   1.9999 ~ 2   10^{-400} ~ 0
\frac{1}{2^{99}} ~ \frac{1}{2^{98}}   1.000 ~ 1000   1234 ~ 12,34   12 5 ~ 125   1371/2 ~ 137\frac12
3.2 ~ 3.2\times 10^5   0.1 + 0.2 ~ 0.30000000000000004   3{,}14 ~ 314   0,5 ~ 0.5
# fractions
0.33 ~ 1/3   0.\overline{27} ~ 0.27   \frac{1}{3} ~ 0.3   \frac{x+1}{2} ~ x+1/2   3\frac12 ~ 31/2
1/0 ~ 1/0 + 1
# roots and constants
\sqrt[3]{4} ~ \sqrt{4}   \sqrt[3]{-8} ~ 2   \sqrt[4]{-16} ~ -2
\sqrt2 ~ 1.41421356237309504880168872420969807856967   \pi ~ 22/7   e^{\pi\sqrt{163}} ~ 262537412640768744
6i-1 ~ 6-i   2i ~ 2   \log_2 8 ~ \log_3 8   30 ~ \frac{\pi}{6}
# expressions
x^2+1 ~ (x+1)^2   x_1 ~ x_2   ab^2 ~ (ab)^2   \sqrt{x^2} ~ x   x5 ~ 5x   2x+c ~ 2x+C   x ~ x + 10^{-100}
x^{2025}-1 ~ x^{2025}-2
# remarks
5 \text{ or so} ~ 5   5 approximately ~ 5   5\text{ if }x>0 ~ 5   5\text{ i think} ~ 5   \text{not }5 ~ 5
5^{\text{th}} ~ 5   5 dozen ~ 5   5? ~ 5   ~5 ~ 5   5n \text{ for some integer } n ~ 5
# units
5 cm ~ 5 m   5 m ~ 5 feet   4 cm^2 ~ 4 cm^3   3 hours ~ 3 minutes   5\text{ cents} ~ \$5   12\text{ ft}^2 ~ 144
3:30\text{ AM} ~ 3:30 pm   5k ~ 5   5 million ~ 5   one hundred ~ 1   53% ~ 35%   35 ~ 0.35
# names
xy=5 ~ 5   x+y=5 ~ 5   2x+1=7 ~ 7   x = 3 = 4 = 5 ~ 5   y=7 ~ x=7   f(x)=x ~ g(x)=x   5=i ~ 5   5=x+1 ~ 5
5 \ne 6 ~ 5   5 \approx 6 ~ 5   \sqrt5 \approx 3.5 ~ \sqrt5   \frac{22}{7} \approx 3.14 ~ \pi
# equations
y=2x+3 ~ y=3x+2   y<2x+1 ~ y\le 2x+1   y=y ~ y=x
# lists and sets
5 or 6 ~ 5   1,1,2 ~ 1,2,2   1,1,2 ~ \{1,2\}   \pm 3 ~ 3   \emptyset ~ 0   1,2 ~ (2,1)   3\pm\sqrt2 ~ 3+\sqrt2
x=2,y=1 ~ x=1,y=2   a_1=1, a_2=2 ~ a_1=2, a_2=1   \{1,2,\ldots,10\} ~ \{1,2,\ldots,11\}
# points, vectors and matrices
(2,1) ~ (1,2)   1.2 ~ (1,2)   (1,2) ~ [1,2]   [1,2,3] ~ [2,1,3]   1<x<2 ~ \begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ~ [1,2]   \begin{pmatrix}1&2\end{pmatrix} ~ \begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}1&3\\2&4\end{pmatrix} ~ [[1,2],[3,4]]   3:2 ~ 2:3
# intervals
[0,9) ~ (0,9)   ]2,5] ~ [2,5]   [2,5[ ~ [2,5]   x>4 ~ x \ge 4   |x|<3 ~ [-3,3]
x \ne 3 ~ (-\infty,2)\cup(2,\infty)   x \ne 5 ~ 5   (1,2) ~ (1,2)\cup(3,4)   \infty ~ -\infty
\mathbb{R} ~ \mathbb{Z}
# words, choices, dates and scores
no ~ on   add ~ dad   even ~ odd   (A) (B) ~ A   A or B ~ A   (B) 12 ~ (C)   (B) 12 ~ 13
2023-10-12 ~ 2023-12-10   4-2 ~ 3-1   101_2 ~ 101_3   101_2 ~ 5
# struck out and spoilt
\cancel{5} ~ 5   5̸ ~ 5   (5 ~ 5   5.0.0 ~ 5   x² ~ x2   1+\sq\degree rt2 ~ 1+\sqrt2   x-y%=1 ~ x-y=1   nan ~ 5
"""
UNFINISHED = r"""18 + 8 ~ 26
25 * 5 ~ 125
(3)(4) ~ 12
100/4 ~ 25
\frac{2}{4} ~ 1/2
2+\frac12 ~ 5/2
7/1 ~ 7
--7 ~ 7
2^{10} ~ 1024
5! ~ 120
\sqrt{49} ~ 7
|-3| ~ 3
\log_{10} 1000 ~ 3
\sin 30^\circ ~ 1/2
10^{2+1} ~ 1000"""
SPELLINGS = r"""α \alpha β \beta θ \theta λ \lambda φ \phi ∞ \infty infinity \infty inf \infty ∅ \emptyset x≥1 x\ge1 x≠1 x\ne1
x∈(1,2) (1,2) {1}∪{2} {1}\cup{2} 5° 5^\circ 2–x 2-x 2‒x 2-x 2·x 2x x÷2 x/2 x\div2 x/2 x**2 x^2 x\lt2 x<2 x\gt2 x>2 x\leqslant2 x\le2
x\geq2 x\ge2 x==2 x=2 |x| \lvert{x}\rvert |x| \vert{x}\vert €5 \$5 £5 5dollars \pi≈3.14 \pi 5degrees 5° zero 0 one 1 three 3 four 4
five 5 six 6 seven 7 eight 8 nine 9 ten 10 eleven 11 5thousand 5000 5billion 5e9 5trillion 5e12 5km 5kilometers 5m 5meters
5in 5inches 5ft 5foot 5mi 5miles 5kg 5kilograms 5g 5grams 5lb 5pounds 5L 5liters 5hr 5hours 5min 5minutes 5am 5 5mph 5"""
HEDGES = """not no if for or so maybe think probably about approximately almost nearly roughly least most more less than when
where unless wrong incorrect but except over under to from is between any other else mod times dozen th st nd rd"""


def cases(table: str) -> list:
    """(answer, gold) of each pair, under its kind; three blanks stand between pairs."""
    kind, rows = "", []
    for line in table.strip().splitlines():
        if line.startswith("# "):
            kind = line[2:]
        else:
            rows += [pytest.param(*pair.rsplit(" ~ ", 1), id=f"{kind}: {pair}") for pair in line.split("   ")]
    return rows


def texts(table: str) -> list[str]:
    return [text for row in cases(table) for text in row.values]


@pytest.mark.parametrize("a, b", cases(EQUAL))
def test_equal(a, b):
    assert is_equal(a, b) and is_equal(b, a)
    assert math_reward(rf"So it is $\boxed{{{a}}}$.", b) == 1.0


@pytest.mark.parametrize("a, b", cases(DIFFERENT))
def test_different(a, b):
    assert not is_equal(a, b) and not is_equal(b, a)


@pytest.mark.parametrize("a, b", list(zip(SPELLINGS.split()[::2], SPELLINGS.split()[1::2])))
def test_spellings(a, b):
    assert is_equal(a, b)


@pytest.mark.parametrize("word", HEDGES.split())
def test_a_number_with_a_remark_is_no_answer(word):
    assert not is_equal(rf"5\text{{ {word}}}", "5")


@pytest.mark.parametrize("work, number", cases(UNFINISHED))
def test_work_left_undone_is_no_answer_for_a_plain_number(work, number):
    assert not is_equal(work, number) and is_equal(number, work) and is_equal(work, work)
    assert is_equal(f"{work} = {number}", number) and is_equal(f"x = {work} = {number}", number)
    assert not is_equal(f"{work} = {number}1", number + "1") and not is_equal(f"x = {work}", number)
    assert not is_equal(work, number + r"\text{ cm}")


RESPONSES = [  # response, gold, whether it is right
    (r"\boxed{41}, no: \boxed{42}", "42", 1), (r"\boxed{41}, no: \boxed{42}", "41", 0), (r"\boxed{\boxed{5}}", "5", 1),
    (r"\boxed{\boxed{5}\text{ or }6}", "5", 0), (r"\fbox{6}", "6", 1), ("\\boxed\n{6}", "6", 1), (r"\boxed{6", "6", 0),
    (r"\boxed{5}}", "5", 1), (r"\boxed{}", "", 0), (r"\boxed{12}, written in \boxed{} as asked", "12", 1),
    (r"\boxed{5} \boxed{\quad}", "5", 1), (r"\boxed{7} (see \boxed{...})", "7", 1), (r"\boxed{1}" * 99, "1", 1),
    # several boxes
    (r"The roots are \boxed{2} and \boxed{-3}.", "-3, 2", 1), (r"The roots are \boxed{2} and \boxed{-3}.", "2", 0),
    (r"\(\boxed{3}\), \(\boxed{5}\), and \(\boxed{8}\)", "3, 5, 8", 1), (r"(a) \boxed{12}, (b) \boxed{-4}", "12, -4", 1),
    (r"$x = \boxed{3}$ and $y = \boxed{5}$", "x=3, y=5", 1), (r"either \boxed{12} or \boxed{15}", "15", 0),
    (r"It is \boxed{1}. To sum up: \boxed{1}.", "1", 1),
    # behind a box
    (r"\boxed{42}. Wait, 6*8=48. The answer is 48.", "48", 1), (r"\boxed{42}. Wait, 6*8=48. The answer is 48.", "42", 0),
    (r"\boxed{42}. Wait, let me check: 6*7=42. Yes.", "42", 1), ("\\boxed{E > kT} holds.\n\n**Answer: D**", "D", 1),
    (r"\boxed{42}. The answer is in simplest form.", "42", 1), ("\\boxed{42}\n\nThe answer is 42.", "42", 1),
    # thoughts, tags, turns
    (r"<think>\boxed{42}", "42", 0), (r"<think>\boxed{42}</think> I do not know.", "42", 0),
    (r"<think>a</think>\boxed{42}", "42", 1), (r"hm</think> \boxed{42}", "42", 1), ("<think>#### 1</think>\n#### 2", "2", 1),
    (r"<think>\boxed{42}</think>b<think>", "42", 0), ("<answer> 42 </answer>\nDone.", "42", 1),
    ("<answer>41</answer><answer>42</answer>", "42", 1), (r"<answer>\boxed{42}</answer>", "42", 1),
    ("<answer>The answer is 42.</answer>", "42", 1), (r"\boxed{6}<|im_end|>\boxed{7}", "6", 1), (r"\boxed{6}</s>", "6", 1),
    ("#### 42\n\nQuestion: What is 2+2?\nAnswer: 4\n#### 4", "4", 0),
    # "####"
    ("3+6=9\n#### 9", "9", 1), ("####42", "42", 1), ("#### **72**", "72", 1), ("#### -$1,234.50", "-1234.5", 1),
    ("#### 42 apples\nThank you!", "42", 1), ("#### 6*7", "42", 0), ("#### 5\n#### 6", "6", 1), ("We get it. #### -4", "-4", 1),
    ("The answer is 41.\n#### 42", "42", 1), ("#### Step 3: add\nThe answer is 7.", "7", 1),
    # a heading or a sentence
    ("**Final Answer**\n\n42", "42", 1), ("### Final Answer\n42", "42", 1), ("Answer:\n```\n42\n```", "42", 1),
    ("**Answer:** 42\n\nHope this helps!", "42", 1), ("The answer is：42", "42", 1), ("ANSWER: 42", "42", 1),
    ("The answer is **42**.", "42", 1), ("The answer is 3.5.", "3.5", 1), ("The answer is 1,234.", "1234", 1),
    ("The answer is:\n\\[\n\\frac{3}{4}\n\\]", "3/4", 1), ("The answer is\n\n$$42$$", "42", 1), ("My final answer is 42!", "42", 1),
    ("The answer is 42, which is even.", "42", 1), ("The answer is 42. (We used 6*7.)", "42", 1), ("The answer is x = 42.", "42", 1),
    ("The answer is 5. Wait, the answer is 6.", "6", 1), ("The answer cannot be 42, so the answer is 43.", "43", 1),
    ("The answer is 25 * 5.", "125", 0), ("The answer is 25 * 5 = 125.", "125", 1), ("The answer is not 5.", "5", 0),
    ("The answer isn't 42.", "42", 0), ("The answer is probably 42.", "42", 0), ("The answer is 5 or 6.", "5", 0),
    ("The answer is between 41 and 43.", "42", 0), ("The answer is wrong.", "5", 0), ("Hence 42.", "42", 0), ("42", "42", 0), ("", "5", 0),
    (r"\boxed{The answer is 42}", "42", 1), (r"\boxed{**42**}", "42", 1), (r"\boxed{\gcd(12,18) = 6}", "6", 1)]


@pytest.mark.parametrize("response, gold, right", RESPONSES)
def test_responses(response, gold, right):
    assert math_reward(response, gold) == right


@pytest.mark.parametrize("response, answer", [
    (r"First \boxed{1}, so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), ("#### 1,234", "1,234"),
    ("the final answer is: $\\frac{2}{5}$. I hope it is correct.", "$\\frac{2}{5}$"), ("We get it. #### -4", "-4"),
    (r"\boxed{1} then \boxed{2", "1"), ("I do not know", None), ("", None), (r"\boxed{", None), ("a" * 10**6, None)])
def test_what_is_extracted(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize("answer, readable", [
    ("0", True), ("infinity", True), ("Nan", True), (r"\frac12", True), ("(1,2)", True), (r"\ln(x-1)", True), ("east", True),
    ("(D) Alina", True), (r"\text{no solution}", True), (r"x \ge 4", True), ("5 cm", True), ("2023-10-12", True),
    ("", False), ("  ", False), ("1/0", False), ("x" * 700, False), (r"\frac{1}{", False),
    ("We prove by induction that the sum of the first n odd numbers is a square.", False)])
def test_readable(answer, readable):
    assert is_readable(answer) is readable


polynomial = st.lists(st.integers(-9, 9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(st.integers(-10**6, 10**6), st.integers(2, 10**4), st.integers(2, 99))
def test_fractions_count_in_lowest_terms(p, q, k):
    p, q = Fraction(p * q + 1, q).as_integer_ratio()  # p q + 1 and q have no common factor
    for write in ("{}/{}", r"\frac{{{}}}{{{}}}", r"\left(\dfrac {{{}}} {{{}}}\right)"):
        reduced, other = write.format(p, q), write.format(p * k, q * k)
        assert is_equal(reduced, f"{p}/{q}") and is_equal(reduced, f"{p}/{q}\\text{{ cm}}")
        assert not is_equal(reduced, f"{p + 1}/{q}") and not is_equal(other, f"{p}/{q}")


@settings(deadline=None, max_examples=30)
@given(polynomial, st.integers(-9, 9))
def test_polynomials_expand(coefficients, root):
    """sum c_k x^k times (x - root), multiplied out by hand."""
    expanded = [0] * (len(coefficients) + 1)
    for k, c in enumerate(coefficients):
        expanded[k + 1] += c
        expanded[k] -= root * c
    write = lambda cs: "+".join(f"({c})x^{{{k}}}" for k, c in enumerate(cs))
    factored = f"({write(coefficients)})(x-({root}))"
    assert is_equal(factored, write(expanded))
    expanded[0] += 1
    assert not is_equal(factored, write(expanded))


HOSTILE = [
    "", " ", "\\", "{", "}" * 999, "{" * 5000, "(" * 5000, "(" * 190 + "1" + ")" * 190, r"\frac" * 120, "|" * 500,
    r"\sqrt{" * 100 + "2" + "}" * 100, "9" * 10**6, "9^" * 200 + "9", "2**2**2**2**2**2", "9^{9^{9^{9}}}", "(10^9)!",
    "((((9!)!)!)!)", r"\frac{1}{3^{3^{3^{3}}}}", "1e999999999", "x" * 10**6, "\ud800", "\0", r"\boxed{" * 10**5,
    "1" + "+1" * 10**5, r"\begin{pmatrix}" * 40, "_" * 100, "0.(" + "1" * 500 + ")", "0." + "12" * 290 + "...",
    "0." + "1" * 590, "__import__('os').system('true')", "{0.__class__}", "%s%n" * 100, r"\log_{0}{0}", r"\frac{0}{0}",
    "0^0", "0^{-1}", r"\sqrt[0]{5}", r"\tan(\pi/2)", r"\log 0", r"\infty-\infty", r"\pm" * 190, r"\approx" * 80,
    ",".join("x" * 300), ",".join(map(str, range(150))), r"\{" + ",".join(map(str, range(150))) + r"\}",
    r"\sin" * 140 + "x", "x^" * 280 + "x", "5" + "!" * 50, "+".join(["x!"] * 150), "１" * 500, "½" * 200, "\u202e5",
    "²" * 300, r"\boxed{1}" * 20000, r"\boxed{1}" + "\n" * 10**5, r"\boxed{1}" + "*" * 10**5,
    r"\boxed{1}" + "\n" * 10**5 + r"\boxed{2}", r"\boxed{1}," + " " * 10**5 + r"x\boxed{2}", "α" * 600, "]" * 599,
    "((x+1)^{999}+1)^{999}" * 5, r"\text{1 " * 60 + "}" * 60, "=".join([r"\sqrt{2}+\sqrt{3}"] * 9), "<".join("x" * 200),
    "1/" * 99 + "3", "A B C D E " * 18 + "= 5", "f" + "(x)" * 48 + "=5", r"\{" * 30 + "1,1" + r"\}" * 30,
    ", x \\in \\mathbb{R}" * 30, "1 " * 290, "1,000" * 110, "where " * 90, "{" * 60 + r"\over" * 60, "5" + "$" * 580 + "x"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_no_number_and_no_error(text):
    started = time.process_time()
    for response in (text, rf"\boxed{{{text}}}", f"#### {text}", f"The answer is {text}"):
        assert math_reward(response, "7") == 0.0
        assert math_reward(response, text) in (0.0, 1.0)
    assert not is_equal("7", text) and not is_equal(text, "x+1") and is_readable(text) in (False, True)
    assert "  " not in clean(text[:600])  # on many blanks some of its patterns take cubic time
    assert time.process_time() - started < 10  # it took less than half a second; this is for what hangs


def test_verdicts_are_the_same_from_any_thread():
    """The work of one comparison is counted in one place, which threads must not share: these need most of it."""
    write = lambda k, ns: "+".join(rf"\sin({n}x)" for n in ns) + f"+{k}x"
    heavy = [(write(k, range(1, 11)), write(k, range(10, 0, -1))) for k in range(2, 8)]
    pairs = [row.values for table in (EQUAL, DIFFERENT) for row in cases(table)][::8] + heavy
    expected = [is_equal(*pair) for pair in pairs]
    assert all(expected[-len(heavy):]) and not all(expected)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(lambda _: [is_equal(*pair) for pair in pairs], range(8)):
                assert found == expected
    finally:
        sys.setswitchinterval(interval)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60), st.text(alphabet=string.printable, max_size=60))
def test_no_pair_of_strings_raises(a, b):
    assert math_reward(a, b) in (0.0, 1.0) and math_reward(rf"\boxed{{{b}}}", a) in (0.0, 1.0)


def test_nothing_in_the_checker_could_run_text():
    """No eval and the like, and only imports that offer none; getattr takes the name of a known function."""
    tree = ast.parse((ROOT / "reward.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "open", "__import__", "globals", "mpmathify", "sympify"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"math", "operator", "random", "re", "threading", "unicodedata"}


def verdicts(path) -> list:
    """(row, whether the verdict is the label) of each."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row, (math_reward(row["response"], row["gold"]) > 0.5) == row["expected"]) for row in rows]


def test_the_shared_examples(shared):
    """Those whose label is policy, and those without a box, are counted apart."""
    wrong = [row for row, right in verdicts(shared / "grader" / "examples.jsonl") if not right]
    apart = [row for row in wrong if {"contested", "unboxed"} & set(row["flags"])]
    assert wrong == apart and len(apart) <= 3


def test_the_shared_strings(shared):
    path = shared / "grader" / "strings.jsonl"
    if not path.exists():
        pytest.skip("no strings.jsonl in ../shared/grader")
    wrong = [row["id"] for row, right in verdicts(path) if not right]
    accepted = [row["id"] for row, right in verdicts(path) if not right and not row["expected"]]
    assert len(wrong) <= 20 and len(accepted) <= 2, wrong

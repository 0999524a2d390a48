"""The answer checker: labelled cases of our own by kind, laws that must hold, hostile text, and the shared examples."""
import ast
import json
import random
import re
import string
from fractions import Fraction

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import extract_answer, is_equal, math_reward

RIGHT = {  # kind -> pairs that are equal
    "numbers": [("42", "42"), ("042", "42"), ("-0", "0"), ("+7", "7"), ("1,000", "1000"), ("1{,}000", "1000"), (r"1\,000", "1000"),
                (r"1,\!000,\!000", "10^6"), ("1 000 000", "1000000"), ("10^3", "1,000"), ("1e3", "1000"), ("2.50", "5/2"),
                (".5", r"\frac12"), ("5.", "5"), ("$5$", "5"), (r"\(5\)", "5"), (r"\[ 5 \]", "5"), (r"12\,345.6", "12345.6"),
                (r"3 \times 10^{-2}", "0.03"), (r"6.02\cdot10^{23}", r"602\times 10^{21}"), 
                ("1_000".replace("_", ","), "1000"), ("9007199254740993", "9007199254740993.0"), (r"\text{twelve}", "12"),
                ("two", "2"), 
                ("10^{-400}", r"\frac{1}{10^{400}}")],
    "fractions": [("1/2", "0.5"), (r"\dfrac12", r"\tfrac{1}{2}"), (r"\frac1{72}", "1/72"),
                  (r"\frac{1}3", "1/3"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{-2}", "-0.5"), ("3 1/2", "3.5"),
                  (r"3\frac12", "7/2"), (r"-2\frac{1}{3}", "-7/3"), ("½", "0.5"), ("3½", "3.5"), 
                  ("((1/2))", "0.5"), (r"0.\overline{3}", "1/3"), (r"0.1\overline{6}", "1/6"),
                  ("0.(3)", "1/3"), ("0.333...", r"\frac13"), (r"0.\bar{9}", "1"), (r"0.142857142857\ldots", "1/7"),
                  (r"\frac{100}{3}\%", "1/3")],
    "roots and constants": [(r"\sqrt{8}", r"2\sqrt2"), (r"\frac{1}{\sqrt3}", r"\frac{\sqrt{3}}{3}"), 
                            (r"\sqrt[3]{54}", r"3\sqrt[3]{2}"), ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"), ("√2", "2^{1/2}"), ("2√3", r"\sqrt{12}"),
                            (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), ("2pi", r"2\pi"), ("2π", r"\pi+\pi"), (r"\pi r^2", "r^2*pi"),
                            
                            (r"\tan^{-1} 1", r"\frac{\pi}{4}"),
                            (r"\arcsin 1", r"\pi/2"), (r"(1+i)^2", "2i"), (r"\frac{1}{i}", "-i"),
                            (r"3+4i", "4i+3"), (r"i\sqrt{3}", r"\sqrt3 i"), (r"\sqrt{-3}", r"i\sqrt{3}"), ("e^2", "exp(2)"),
                            ("30^\\circ", r"\frac{\pi}{6}"), ("30 degrees", r"\pi/6"), ("30°", "30")],
    "expressions": [("x^2-1", "(x-1)(x+1)"), ("(x+1)^2", "x^2+2x+1"), (r"\frac{x^2-1}{x-1}", "x+1"), ("2(x+3)", "6+2x"),
                    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"), (r"\frac{a+b}{2}", "(a+b)/2"), ("x_1+x_2", "x_2 + x_1"),
                    ("a_{n}", "a_n"), (r"2\pi r", r"r \cdot 2 \cdot \pi"), ("4x^{3}y", "4 y x^3"), (r"\frac{x}{2}", "0.5x"),
                    ("-(x-y)", "y-x"), (r"\alpha\beta", r"\beta \alpha"), ("x^{-1}", "1/x"), (r"\ln x^2", r"2\ln x"),
                    (r"\sin 2x", r"2\sin x\cos x"), (r"2^{n+1}", r"2\cdot 2^n"), (r"n!", r"n\cdot(n-1)!"), ("x'", "x'"), ("ab^2", "b^2 a"),
                    (r"e^{x+y}", "e^x e^y"), (r"|x-1|", r"\left|1-x\right|")],
    "units": [("5 cm", "5"), (r"5\text{ cm}", "5"), ("5", r"5 \text{ cm}^2"), (r"12\text{ inches}", "12 in"), (r"\$5.00", "5"),
              ("5 dollars", r"\$5"), ("35%", "0.35"), (r"35\%", "35%"), ("28 percent", r"28\%"), ("5 million", "5000000"),
              (r"3\text{ hours}", "3"), ("7 m/s", "7"), (r"25\text{ m}^2", "25"), ("60 miles per hour", "60"), (r"90^{\circ}", "90"),
              (r"45\degree", r"\frac{\pi}{4}"), ("1,000.99m²", "1000.99"), ("€20", "20"), (r"\text{5}", "5"), (r"\mathrm{7}\ \mathrm{cm}", "7"),
              (r"10\,\text{kg}", "10 kilograms"), (r"2.5\text{ million}", "2500000")],
    "names": [("AB = 5", "5"), ("x=5", "5"), ("5", "x = 5"), ("y=2x+3", "2x+3"), ("f(x)=x^2", "x^2"), (r"x = \frac{1}{2} = 0.5", "0.5"),
              (r"\theta = \frac{\pi}{3}", r"\pi/3"), (r"x \in [1,2]", "[1,2]"), (r"S=\{1,2\}", r"\{2,1\}"), ("a_1 = 3", "3"),
              (r"\text{Area} = 12", "12"), (r"x=\pm 3", "3,-3")],
    "equations": [("y=2x+3", "y-2x-3=0"), ("2y = 4x + 6", "y=2x+3"), ("x^2+y^2=1", "y^2 = 1-x^2"), ("x-2y+z-1=0", "2y = x+z-1"),
                  ("x=7", "2x=14"), ("y = 2x+3", "y=3+2x"), ("f(x)=x^2-1", "f(x)=(x-1)(x+1)"), ("y<2x+1", "2x+1>y")],
    "lists": [("1,2", "2,1"), ("1, 2 and 3", "3,2,1"), (r"\{1,2\}", "2, 1"), (r"3\pm\sqrt2", r"3-\sqrt{2}, 3+\sqrt{2}"), (r"\pm 3", "3, -3"),
              ("1 or 2", "2,1"), ("x=1 or x=2", "1,2"), (r"6\text{ and }8", "8, 6"), (r"\emptyset", r"\varnothing"), (r"\{\}", r"\emptyset"),
              ("1/2, 0.25", "1/4; 1/2"), (r"x=1, x=-2", r"\{-2,1\}"), ("100,200,300", "300, 200, 100"), (r"1\pm 2i", "1+2i, 1-2i"),
              ("1,2,3", r"\left\{1,2,3\right\}")],
    "tuples and matrices": [("(1,2)", "( 1 , 2 )"), (r"\left(3,\frac{\pi}{2}\right)", "(3,pi/2)"), ("(0.5,1)", r"(\frac12, 1)"),
                            ("(1,000, 2)", "(1000, 2)"), (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
                            (r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 0.5 \\ 3 \\ \end{pmatrix}"), ("[[1,2],[3,4]]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
                            (r"\langle 1,2,3\rangle", "(1,2,3)"), ("(1,2),(3,4)", "(3,4), (1,2)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
                            ("(x+1, y)", "(1+x, y)"), ("3:2", "3 : 2")],
    "intervals": [("[4,\\infty)", r"x \ge 4"), (r"4 \le x < \infty", r"[4,\infty)"), (r"(-\infty,3)", "x<3"), (r"3 > x", r"(-\infty, 3)"),
                  (r"1<x\le 3", "(1,3]"), (r"3\ge x>1", "(1,3]"), (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)"),
                  (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)"), (r"x \ne 3", r"(-\infty,3)\cup(3,\infty)"), (r"\mathbb{R}", r"(-\infty,\infty)"),
                  (r"\{x \mid x > 3\}", r"(3,\infty)"), ("[0.5, 1)", r"[\frac12, 1)"), (r"(-\infty, 2]", r"x \leq 2"), ("(0, +∞)", "x>0")],
    "text": [(r"\text{east}", "East"), (r"\mathrm{odd}", r"\text{odd}"), ("(A)", "A"), (r"\text{(B)}", "B"), (r"\text{B}", "(B)"), ("D", "(D) Alina"),
             ("Monday", r"\text{Monday}"), (r"\textbf{(C)}", "C"), (r"\text{no solution}", "No solution."), (r"\text{yes}", "Yes"),
             (r"\text{Monday, Tuesday}", "monday, tuesday"), ("A", "A.")],
    "bases": [("204_5", "204_{5}")],
    "unicode": [("−5", "-5"), ("٤٢", "42"), ("４２", "42"), ("x²", "x^2"), ("4\u200b2", "42"), ("x≥3", r"[3,\infty)"),
                ("{1,2}∪{3}", r"\{1,2\}\cup\{3\}".replace(r"\{", "{").replace(r"\}", "}")), ("10⁻³", "0.001"), ("θ", r"\theta")],
    "assorted": [
        ("\\text{Evelyn}", "Evelyn"), ("p - q", "-q+p"), ("\\frac 59", "5/9"), ("4210_5", "4210_{5}"), ("\\text{June 20}", "June 20"),
        ("\\$36", "36"), ("15\\mbox{ cm}^2", "15"), ("0.\\overline{1331}", "\\frac{1331}{9999}"), ("3R^2", "3 R^{2}"),
        ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}, 1-\\sqrt{19}"), ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"),
        ("\\frac{1 \\pm \\sqrt{5}}{2}", "\\frac{1+\\sqrt5}{2},\\frac{1-\\sqrt5}{2}"), ("8n^2 + 4n + 1", "4n(2n+1)+1"), ("12,\\!345", "12345"),
        ("-3 < x < 5", "(-3,5)"), ("(-\\infty, 2) \\cup (3, \\infty)", "x<2 \\text{ or } x>3"), ("2k+2", "2(k+1)"), ("\\dfrac{9}{4}", "2.25"),
        ("x=3", "3"), ("\\{3\\}", "3"), ("3.0", "3"), ("\\sqrt{51}", "\\sqrt{51.0}"), ("5\\sqrt[4]{2}", "5 * 2^(1/4)"),
        ("\\left(\\frac{3}{5},\\frac{8}{3}\\right]", "(3/5, 8/3]"), ("\\left( -\\infty, \\frac12\\right)", "(-inf, 0.5)"),
        ("\\frac{3}{4}\\pi", "0.75\\pi"), ("10\\%", "0.1"), ("32{,}348", "32348"), ("\\text{(D)}", "D"), ("D)", "D"), ("D.", "D"),
        ("\\textbf{(D)}\\ 5", "D"), ("(D) 5", "D"), ("6\\text{ units}", "6"), ("\\text{6 units}", "6"), ("6 square units", "6"),
        ("6\\text{ sq. units}", "6"), ("$6$ cm", "6"), ("5^\\circ", "5 degrees"), ("\\$1.50", "1.5"), ("1.5 dollars", "\\$1.50"),
        ("$1,234.50", "1234.5"), ("\\frac{\\pi}{3}\\text{ radians}", "\\pi/3"), ("x \\in (1,3)", "1<x<3"), ("(1,3)", "1 < x < 3"),
        ("2 \\frac{1}{2}", "2.5"), ("2\\tfrac12", "5/2"), ("2 1/2", "5/2"), ("-1\\frac{1}{2}", "-3/2"), ("\\frac{-3}{4}", "-\\frac34"),
        ("-\\frac{3}{4}", "\\frac{3}{-4}"), 
        ("i", "\\sqrt{-1}"), ("2-3i", "-3i+2"), ("\\frac{1+i}{2}", "0.5+0.5i"), ("e^{i\\pi/2}", "i"),
        ("\\cos(\\pi/3) + i\\sin(\\pi/3)", "\\frac12 + \\frac{\\sqrt3}{2}i"), ("1+i\\sqrt{3}", "2e^{i\\pi/3}"), ("a^2+2ab+b^2", "(a+b)^2"),
        ("\\frac{1}{x}+\\frac{1}{y}", "\\frac{x+y}{xy}"), ("x(x+1)", "x^2+x"), ("3x-7", "-7+3x"), ("\\frac{x+3}{2}", "\\frac{x}{2}+\\frac32"),
        ("(x-2)(x^2+2x+4)", "x^3-8"), ("\\sqrt{x}\\sqrt{y}", "\\sqrt{xy}"), ("x^{1/2}", "\\sqrt x"), ("\\cot x", "\\frac{\\cos x}{\\sin x}"),
        ("\\sec^2 x", "1+\\tan^2 x"), ("\\sin(2x)", "2 \\sin x \\cos x"), 
        ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}", "\\begin{pmatrix}-\\frac13\\\\\\frac23\\\\\\frac53\\end{pmatrix}"),
        ("\\begin{bmatrix}1\\\\2\\end{bmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("\\left(\\begin{array}{cc}1&2\\\\3&4\\end{array}\\right)", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
        ("[1,2,3]", "\\begin{pmatrix}1\\\\2\\\\3\\end{pmatrix}"), ("\\{1, 2, 3\\}", "{1,2,3}"), ("1, 2, 3", "\\{3,2,1\\}"),
        ("\\{x : x > 3\\}", "(3,\\infty)"), ("1;2", "1,2"), ("-1 and 1", "\\pm 1"), ("x=-1, x=1", "\\pm1"), ("x = \\pm 1", "-1, 1"),
        ("x_1=2, x_2=3", "2,3"), ("(2,3)", "x=2, y=3"), ("x=2,y=3", "(2,3)"), ("a=1, b=2, c=3", "(1,2,3)"), ("6.02e23", "6.02 \\times 10^{23}"),
        ("1.5×10^3", "1500"), ("1.5*10**3", "1500"), ("3\\times10^{8}\\text{ m/s}", "3*10^8"), ("4.5E-3", "0.0045"),
        ("1.6 \\cdot 10^{-19}\\ \\text{C}", "1.6e-19"), ("½", "1/2"), ("x²+1", "x^2+1"), ("√3/2", "\\frac{\\sqrt{3}}{2}"), ("3⁄4", "3/4"),
        ("２５", "25"), ("π/2", "\\frac{\\pi}{2}"), ("（1，2）", "(1,2)"), ("x≤5", "(-\\infty,5]"), ("－3", "-3"),
        ("１／２", "1/2"), ("\\text{no real solutions}", "no real solutions"), ("\\text{None}", "none"), ("True", "\\text{true}"),
        ("\\text{Thursday}", "Thursday"), ("\\mathrm{E}", "E"), ("\\mathbf{B}", "B"), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
        ("\\sqrt{12}", "2\\sqrt{3}"), ("3^{1/2}", "\\sqrt{3}"), ("\\sqrt{\\frac{1}{2}}", "\\frac{\\sqrt2}{2}"),
        ("\\frac{2\\sqrt{3}}{2}", "\\sqrt 3"), ("0.5", "50\\%"), ("50%", "1/2"), ("50 \\%", "50 percent"), ("12.5%", "\\frac{1}{8}"),
        ("7:30", "7:30"), ("7:30 pm", "7:30 PM"), ("\\text{7:30 p.m.}", "7:30 p.m."), ("1:2", "1 : 2"),
        ("\\frac{1}{2004!}", "1/2004!"), 
        ("f(x) = 2x", "2x"), ("y = x^2", "x^2"), ("f^{-1}(x)=x-1", "x-1"), ("P(x)=x^2", "x^2"), ("\\angle ABC = 30^\\circ", "30"),
        ("m = 5", "5"), ("\\boxed{7}", "7"), ("n \\ge 3", "[3,\\infty)"), ("k=2n+1", "2n+1"), ("\\frac{a}{b+c}", "a/(b+c)"),
        ("1/(x+1)", "\\frac{1}{x+1}"), ("\\tfrac{1}{2}x^2", "0.5x^2"), ("x^2/2", "\\frac12x^2"), ("2\\sin\\theta", "2 sin(theta)"),
        ("\\theta", "theta"), ("\\lambda^2", "lambda^2"), ("3 \\text{ and } -3", "\\pm 3"), ("5 \\text{ or } -5", "-5,5"),
        ("\\frac{5}{2} \\text{ cm}", "2.5"), ("100\\text{ km/h}", "100"), ("12 \\text{ years old}", "12"), ("5000", "5 thousand"),
        ("-\\infty", "-\\infty"), ("+\\infty", "\\infty"), ("\\mathbb{R}", "(-\\infty, \\infty)"), ("(-\\infty,\\infty)", "all real numbers"),
        ("A, C", "C, A"), ("\\text{A, C}", "A,C"), ("A,B", "A and B"), ("\\text{A and C}", "A, C"), ("3x+4y=12", "4y = 12-3x"),
        ("x^2 + y^2 = 25", "x^2+y^2-25=0"), ("(x-1)^2+(y-2)^2=9", "x^2-2x+y^2-4y-4=0"), ("y-3=2(x-1)", "y=2x+1"),
        ("\\lfloor x \\rfloor", "\\lfloor x\\rfloor"), ("|x|", "\\lvert x \\rvert"), ("\\overline{AB}", "\\overline{AB}"),
        ("\\triangle ABC", "\\triangle ABC"), ("2013^{2014}", "2013^{2014}")],
    "near hits": [
        ("3i+2", "2+3i"), ("1\\pm i", "1+i, 1-i"), ("3:45", "3\\text{:}45"), 
        ("8:6", "4:3"), ("35_{6}", "35_6"), ("\\frac{157}{50}", "3.14"), ("\\frac{3}{10}", "0.3"),
        ("3x-4", "y=3x-4"), ("2+2=4", "4"), ("2", "x = y = 2"), ("\\frac37", "\\frac{3}{7}"), ("{1 \\over 3}", "\\frac{1}{3}"),
        ("17.0", "17"), ("10^6", "1000000"), ("1,000,000", "1000000"), ("\\underline{144}", "144"),
        ("\\mathbf{42}.", "42"), ("1<x<5", "(1,5)"), ("1\\le x\\le 5", "[1,5]"), ("x\\neq 2", "(-\\infty,2)\\cup(2,\\infty)"),
        ("[1,2],[3,4]", "[1,2]\\cup[3,4]"), ("\\mathbb R", "(-\\infty,\\infty)"),
        ("\\{x\\in\\mathbb{R}\\mid 2\\le x<5\\}", "[2,5)"), ("(2,-1)", "\\begin{pmatrix}2\\\\-1\\end{pmatrix}"),
        ("\\langle 2,-1\\rangle", "\\begin{pmatrix}2\\\\-1\\end{pmatrix}"),
        ("2\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}2&4\\\\6&8\\end{pmatrix}"),
        ("\\begin{pmatrix}1/2&1/2\\\\1/2&-1/2\\end{pmatrix}", "\\frac{1}{2}\\begin{pmatrix}1&1\\\\1&-1\\end{pmatrix}"),
        ("2.75", "2\\frac{3}{4}"), ("\\frac{16}{3}", "5 1/3"), ("0.125", "12\\frac{1}{2}\\%"), ("22/7", "3\\frac{1}{7}"),
        ("12.5", "\\$12.50"), ("\\$3\\text{ million}", "3000000"), ("17\\text{ students}", "17"), ("9\\text{ units}^2", "9"),
        ("4.5\\text{ lbs}", "4.5"), ("36\\text{ sq. in.}", "36"), ("\\frac{x}{2}", "1/2x"),
        ("y=4x", "4x"), ("a", "A"), ("0.45", "45%"), ("\\frac{1}{3}", "33\\frac{1}{3}\\%"), ("0.5", "0.5\\%"),
        ("-1+2\\pi", "2\\pi-1"), ("\\pi*\\pi", "\\pi^2"), ("10^2\\pi", "100\\pi"), ("2+3x+x^2", "x^2+3x+2"), ("x*x", "x^2"),
        ("xx", "x^2"), ("\\frac{1}{x^2}", "x^{-2}"), ("x^{3/2}", "x\\sqrt{x}"), ("\\sqrt{5+2\\sqrt6}", "\\sqrt{2}+\\sqrt{3}"),
        ("5.6*10^-4", "0.00056"), ("3×10⁸", "3\\times10^8"), ("3x10^8", "3\\times10^8"), ("\\{1,3,5\\}", "1,3,5"),
        ("1 and 3", "\\{1,3\\}"), ("\\pm2", "2,-2"), ("x=\\pm 2", "2,-2"), ("\\{1,2\\}", "\\{1,1,2\\}"), ("1234", "1,234"),
        ("2 \\text{ and }\\ 3", "2, 3"), ("2sqrt(3)", "2\\sqrt{3}"), ("1+\\sqrt3", "\\sqrt{4+2\\sqrt3}"),
        ("\\sqrt3", "\\sqrt[4]{9}"), ("12", "(B) 12"), ("True", "true"), ("Carla", "\\text{Carla}"), ("C and A", "A and C"),
        ("(2,5)", "(x,y)=(2,5)"), ("5⁄2", "5/2"), ("¾", "\\frac34"), ("90°", "90^\\circ"), ("−7", "-7"), ("‒7", "-7"),
        ("α+1", "\\alpha+1"), ("10⁻³", "10^{-3}"), ("𝟓", "5"), ("5️", "5"), ("-4i+3", "3-4i"), ("9/4", "2.25"),
        ("\\frac16", "0.1\\overline{6}"), ("-0.5", "x=-\\frac12"), ("(x-2)^2=0", "x^2-4x+4=0"), ("n=7", "7"),
        ("(x+2)/3", "\\frac{x+2}{3}"), ("3\\frac17", "\\frac{22}{7}"), ("-2\\frac13", "-7/3"), ("0.01", "1/100"), 
        ("eleven", "11"), 
        ("(-12)", "-12"), ("\\displaystyle 5", "5"), ("4\\ge x", "(-\\infty,4]"),
        ("\\begin{pmatrix} 1 & 0\\\\ 0 & 1\\\\ \\end{pmatrix}", "\\begin{bmatrix}1&0\\\\0&1\\end{bmatrix}"),
        ("\\frac13\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}", "\\begin{pmatrix}1/3&0\\\\0&1/3\\end{pmatrix}"),
        ("-13/4", "-3 1/4"), ("12", "12 inches"), ("3.5\\text{ hours}", "3.5"),
        ("144\\text{ cubic centimeters}", "144\\text{ cm}^3"), ("π·9", "9\\pi"), ("9\\cdot3^k", "3^{k+2}"),
        ("\\ln a-\\ln b", "\\ln\\frac{a}{b}"), ("(2a)^2", "4a^2"), ("p-q", "p - q"), ("7.5E-4", "7.5\\times 10^{-4}"),
        ("b,a", "\\{a,b\\}"), ("x=-1\\text{ and }x=3", "-1,3"), ("2+\\sqrt{3}, 2-\\sqrt{3}", "2\\pm\\sqrt3"),
        ("B, A", "\\text{A, B}"), ("\\sqrt{\\frac23}", "\\frac{\\sqrt6}{3}"), ("(3,-2)", "(a,b)=(3,-2)"),
        ("(1,2,3)", "(x,y,z)=(1,2,3)"), ("⅜", "3/8"), ("x³", "x^3"), ("β", "\\beta")],
}
WRONG = {
    "numbers": [("42", "43"), ("17.5", "17"), ("9007199254740993", "9007199254740992"), ("1000050", "1000000"), ("1.9999", "2"), ("-5", "5"),
                ("10^{-400}", "0"), (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), ("2^{2025}", "3^{2025}"), ("1234", "1,235"), ("5 million", "5"),
                ("1.000", "1000"), ("12 5", "125"), ("1371/2", r"137\frac12"), ("5-", "5"), ("--", "0"), ("3.2", r"3.2\times 10^5"),
                (r"\frac{1}{2003!}", r"\frac{1}{2004!}"), ("e", "2.718281828459045"), ("5 5", "5"), ("100", "10"), ("0.5.5", "0.5")],
    "fractions": [("0.33", "1/3"), ("0.3333333333", r"\frac13"), (r"\frac{1}{3}", "0.3"), ("2/3", "3/2"), (r"\frac{x+1}{2}", "x+1/2"), ("3 1/2", "3/2"),
                  (r"3\frac12", "31/2"), (r"-2\frac13", "-5/3"), ("1/0", "1/0 + 1"), ("0.(3)", "0.3")],
    "roots and constants": [(r"\sqrt[3]{4}", r"\sqrt{4}"), (r"\sqrt{2}", "1.414"), (r"\sqrt2", "1.41421356237309504880168872420969807856967"),
                            (r"\pi", "3.14159265358979"), (r"\pi", "22/7"), ("6\\pi", r"12\pi"), (r"\pi + 10^{-100}", r"\pi"), (r"e^{\pi\sqrt{163}}", "262537412640768744"),
                            ("6i-1", "6-i"), ("i", "1"), ("2i", "2"), (r"\log_2 8", r"\log_3 8"), (r"\sin 30", "1/2"), ("30", r"\frac{\pi}{6}"), (r"\sqrt{-3}", r"\sqrt3"),
                            (r"\arcsin 1", "90.1"), ("-i", "i")],
    "expressions": [("x+1", "x-1"), ("x^2", "2x"), ("x^2+1", "(x+1)^2"), ("xy", "x+y"), (r"\pi r^2", r"2\pi r"), ("x_1", "x_2"), ("x", "y"), (r"\frac{x}{0}", "x"),
                    (r"\sin x", r"\cos x"), ("|x|", "x"), (r"\sqrt{x^2}", "-x"), ("ab^2", "(ab)^2"), ("2^n", "n^2"), ("5", "x"), ("x - x + 4", "5")],
    "remarks": [(r"5\text{ is wrong}", "5"), (r"5\text{ (maybe)}", "5"), (r"5 \text{ or so}", "5"), ("5 approximately", "5"), (r"5\text{ if }x>0", "5"),
                (r"\text{not }5", "5"), (r"5 \text{ or six}", "5"), (r"5\text{ is not the answer}", "5"), (r"5\text{ mod }7", "5")],
    "units": [(r"12\text{ ft}^2", "144"), ("5 cm", "6"), ("5 cm", "5 m"), ("53%", "35%"), ("35", "0.35"), ("5 million", "5 billion"),
              (r"5\text{ cents}", r"\$5"), ("3 hours", "3 minutes"), ("5%", "0.5"), ("27.5\\%", "27.78\\%")],
    "names": [("xy=5", "5"), ("ab = 5", "5"), ("x=-7", "x=7"), ("y=7", "x=7"), ("x = 3 = 4 = 5", "5"), ("2x+1=7", "7"), ("2x=10", "5"), ("x+5", "5"), ("x > 5", "5"), (r"5 \ne 6", "5"),
              (r"x \ne 5", "5"), ("f(x)=x", "g(x)=x"), (r"x\approx 5", "5")],
    "equations": [("y=2x+3", "y=3x+2"), ("x^2+y^2=1", "x^2+y^2=2"), ("y<2x+1", r"y\le 2x+1"), ("y<2x+1", "y>2x+1"), ("0=0", "1=1"), ("x=1", "x=1, x=2")],
    "lists": [("5", "-3, 5"), ("5 or 6", "5"), ("5, 6, 7", "5, 6"), ("1,1,2", "1,2,2"), (r"\pm 3", "3"), ("3,3", "3"), (r"3\pm\sqrt2", r"3+\sqrt2"), (r"\emptyset", "0"),
              (r"\{0\}", r"\emptyset"), ("1, 2", "1, 3"), ("1,2", "(2,1)"), (r"k\text{ for some }k", "5"), ("{5, 6}", "5"), ("all numbers", "5"), ("1,2,3,4,5", "5")],
    "tuples and matrices": [("(2,1)", "(1,2)"), ("(1,2,3)", "(1,2)"), ("1.2", "(1,2)"), ("123", "(1,2,3)"), ("(1,2)", "[1,2]"), (r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
                            (r"\begin{pmatrix}1\\2\\3\end{pmatrix}", "3"), (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("3:2", "2:3"), ("(1,2)", "1"), ("(5)", "6"), ("3:2", "1.5")],
    "intervals": [("[0,9)", "(0,9)"), ("(0,9)", "(0,9]"), ("x>4", r"x \ge 4"), (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)\cup(3,\infty)"), (r"(2,\infty)", r"(-\infty,2)"), ("x<3", "x>3"), ("(1,2)", r"(1,2)\cup(3,4)"),
                  (r"\infty", r"-\infty"), (r"\infty", "5"), (r"\mathbb{R}", r"\mathbb{Z}")],
    "text": [(r"\text{E}", "d"), ("east", "seat"), ("no", "on"), ("A", "B"), ("(A)", "(B)"), ("yes", "no"), ("AB", "A"), ("(A) (B)", "A"), ("A or B", "A"), ("even", "odd"), ("true", "false"), ("none", "5")],
    "bases": [("1112122_3", "1112112_3"), ("102_2", "102_2 + 1"), ("101_2", "101_3"), ("101_2", "101")],
    "unicode": [("−5", "5"), ("x²", "x2"), ("x²", "x^3"), ("٤٢", "24")],
    "assorted": [
        ("3", "-3"), ("5\\text{ or }6", "5"), ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("2x+1=7", "7"), ("3.14", "\\pi"), ("0.333", "1/3"),
        ("0.67", "2/3"), ("1.41", "\\sqrt2"), ("x>3", "x<3"), ("1/3", "0.3"), ("7", "7.1"), ("100", "10"), ("\\frac12", "\\frac13"), ("x^2", "x^3"),
        ("sin x", "cos x"), ("A", "B"), ("50", "50.5"), ("5%", "0.5"), ("2\\pi", "\\pi"), ("1,2,3", "1,2"), ("1", "1,2"), ("5", "5,5"),
        ("\\{1,2\\}", "(2,1)"), ("x=5,6", "5"), ("5\\pm 1", "5"), ("no", "yes"), ("", "5"), ("?", "5"), ("5?6", "5"), ("1e400", "1e401"),
        ("0", "10^{-500}"), ("\\infty", "10^{1000}"), ("\\text{five or six}", "5"), ("not 5", "5"), ("5 is wrong", "5"), ("approximately 5", "5"),
        ("\\approx 5", "5"), ("around 5", "5"), ("5 or so", "5"), ("5...", "5"), ("5+", "5"), ("≥5", "5"), ("at least 5", "5"), ("<5", "5"),
        ("5 to 6", "5"), ("5-6", "5"), ("5/", "5"), ("5,", "6"), ("2\\text{ dozen}", "2"), ("3\\text{ thousand}", "3"), ("5k", "5"), ("5x", "5"),
        ("5i", "5"), ("5e", "5"), ("5\\pi", "5"), ("5^2", "5"), ("5!", "5"), ("55", "5"), ("\\sqrt5", "5"), ("\\ln 5", "5"), ("|5|+1", "5"),
        ("5 \\mod 7", "5"), ("5 \\pmod 7", "5"), ("5\\text{ if }x>0", "5"), ("5 \\text{ and } 6", "5"), ("\\text{True}", "\\text{False}"),
        ("11", "1 1"), ("1 1", "11"), ("3/2", "2/3"), ("12", "1,2"), ("(12)", "(1,2)"), ("1.000.000", "1000000"), ("x^2+x", "x(x-1)"),
        ("\\frac{x}{y}", "\\frac{y}{x}"), ("a-b", "b-a"), ("2^x", "x^2"), ("\\log_2 x", "\\log_3 x"), ("0.1 + 0.2", "0.30000000000000004"),
        ("\\sqrt{2}\\sqrt{3}", "\\sqrt{5}"), ("8 \\frac{1}{2}", "4"), ("x=1", "x=2"), ("y=x", "x=1"), ("\\text{Monday}", "\\text{Tuesday}"),
        ("(0,0)", "0"), ("i^2", "1"), ("\\{\\}", "0"), ("30^\\circ", "\\frac{\\pi}{3}"), ("30", "\\frac{\\pi}{6}"), ("\\frac{\\pi}{6}^\\circ", "30"),
        ("5 \\text{ m}", "5 \\text{ km}"), ("5\\text{ kg}", "5\\text{ g}"), ("\\$5", "5\\text{ cents}")],
    "near misses": [
        ("(1+i\\sqrt{3})^3", "8"), ("3:54", "3:45"), ("2013^{2012}+1", "2013^{2012}-1"), ("3:4", "4:3"),
        ("0.\\overline{27}", "0.27"), ("x+y=5", "5"), ("9x^2+4y^2=36", "\\frac{x^2}{9}+\\frac{y^2}{4}=1"),
        ("\\frac 137", "\\frac{13}{7}"), ("1/x+1", "\\frac{1}{x+1}"), ("5, 7", "5"),
        ("5\\ (\\text{or }7)", "5"), ("[5,7]", "5"), ("x\\in\\mathbb{R}", "5"), ("4<x<6", "5"), ("\\neq 5", "5"),
        ("\\text{5 is incorrect; 7}", "5"), ("5\\text{ if correct}", "5"), ("5 \\lor 7", "5"), ("A or B", "B"),
        ("5 \\vee 6", "5"), ("5-ish", "5"), ("2^{11}", "1024"), ("[-3,4)", "(-3,4]"), ("[1,4]", "[1,2]\\cup[3,4]"),
        ("[0,2]", "[0,1)\\cup(1,2]"), ("(5", "5"), (":5", "5"), ("5_", "5"), ("5&", "5"),
        ("\\begin{pmatrix}1&2&3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
        ("\\begin{pmatrix}0\\\\0.5\\end{pmatrix}", "\\begin{pmatrix}1/2\\\\0\\end{pmatrix}"), ("5 m", "5\\text{ km}"),
        ("5000", "5\\text{ km}"), ("\\frac{\\pi}{3}", "120^\\circ"), ("3\\text{ million}", "3"), ("15000", "\\$1{,}500"),
        ("\\sqrt{3x}", "\\sqrt{3}x"), ("2^3x", "2^{3x}"), ("\\frac{1}{\\sin x}", "\\sin^{-1}x"),
        ("\\frac{1}{2x}", "\\frac{1}{2}x"), ("a1", "a_1"), ("a_2", "a_1"), ("e^2x", "e^{2x}"), ("x", "x!"), ("(2,3)", "[2,3]"),
        ("55", "5S"), ("x", "X"), ("33.3\\%", "33\\frac{1}{3}\\%"), ("0.785", "\\frac{\\pi}{4}"), ("x5", "5x"),
        ("2x+c", "2x+C"), ("|x-3|", "x-3"), ("7", "7t"), ("0", "10^{-20}"), ("1", "1.0000001"), ("30,000,000", "3\\times10^8"),
        ("9.1e-31", "9.11e-31"), ("x=2,y=1", "x=1,y=2"), ("\\sqrt{2}", "\\sqrt[3]{2}"), ("y=2x", "y^2=4x"),
        ("\\pi", "\\frac{22}{7}"), ("1.5", "\\frac{2}{\\frac{3}{4}}"), ("8\\text{?}", "8"), ("8 or 8", "8"), ("8x", "8"),
        ("8:1", "8"), ("eight or nine", "8"), ("2^5", "64"), ("46", "64"), ("25,00", "2,500"), ("100-2", "99"),
        ("\\lfloor 4.2\\rfloor", "5"), ("-1<x<1", "(-\\infty,-1)\\cup(1,\\infty)"), ("x\\ne-3", "(-\\infty,3)\\cup(3,\\infty)"),
        ("5", "\\begin{pmatrix}5\\end{pmatrix}"), ("41/5", "4\\frac{1}{5}"), ("101/2", "10\\frac{1}{2}"), ("54", "\\$45"),
        ("450", "\\$4.50"), ("144\\text{ cm}^2", "144\\text{ cm}^3"), ("\\sqrt{2x}", "\\sqrt2x"),
        ("\\frac{a}{bc}", "\\frac{a}{b}c"), ("a_1", "a_{10}"), ("x", "x'"), ("f(x)", "f'(x)"), ("n", "n!"), ("1.2", "1,2"),
        ("o", "0"), ("x^2-5x-6", "x^2-5x+6"), ("a^2+b^2", "(a+b)^2"), ("\\frac{\\ln a}{\\ln b}", "\\ln\\frac{a}{b}"),
        ("2\\cos x-1", "\\cos 2x"), ("2a^2", "4a^2"), ("(x-1)^{49}(x^2+1)", "(x-1)^{50}(x+1)"),
        ("2013^{2012}+6", "2013^{2012}+5"), ("3", "-1,3"), ("p=7,q=3", "p=3,q=7"), ("June", "\\text{July}"),
        ("irrational", "rational"), ("decreasing", "increasing"), ("[0,5]", "(0,5)"), ("α", "\\beta"), ("2¹¹", "2^{10}")],
}
UNFINISHED = [  # the same number, but no answer where the gold is a plain number; fine the other way round
    ("2^{10}", "1024"), ("2**10", "1024"), ("5!", "120"), (r"\binom{5}{2}", "10"), (r"\lfloor 3.7 \rfloor", "3"), ("|-3|", "3"),
    (r"\left| 2-5 \right|", "3"), (r"\lvert -4\rvert", "4"), (r"\frac{2}{4}", "1/2"), (r"\frac{\frac12}{3}", "1/6"),
    (r"\frac{3}{4}\cdot 2", "1.5"), (r"\sqrt[3]{-8}", "-2"), (r"e^{i\pi}", "-1"), (r"\ln e^2", "2"), (r"\log_2 8", "3"),
    (r"\log_{10} 1000", "3"), (r"\sin 30^\circ", "1/2"), (r"\cos\frac{\pi}{3}", "0.5"), (r"\sin^2 x + \cos^2 x", "1"), ("∛8", "2"),
    ("2·3", "6"), ("6÷4", "3/2"), ("1 – 2", "-1"), ("1/2 + 1/3", "5/6"), ("3^{-2}", "1/9"), ("2\\cdot 3^4", "162"), ("10!", "3628800"),
    ("\\dbinom{7}{3}", "35"), ("\\log_2(8)", "3"), ("\\ln(1/e)", "-1"), ("5−3", "2"), ("2^{100}", "1267650600228229401496703205376"),
    ("2^{2^3}", "256"), ("(2^2)^3", "64"), ("-2^2", "-4"), ("(-2)^2", "4"), ("7+0i", "7"), ("3!\\cdot 2^5", "192"), ("6^2", "36"),
    ("{10 \\choose 4}", "210"), ("\\log_3 9", "2"), ("25 * 5", "125"), ("18 + 8", "26"), (r"12\times 3", "36"), ("(3)(4)", "12"),
    ("100/4", "25"), (r"\frac{100}{4}", "25"), (r"2+\frac12", "5/2"), ("4/6", "2/3"), (r"\frac46", r"\frac23"), ("2^5", "32"),
    (r"\sqrt{49}", "7"), ("7/1", "7"), ("8-1", "7"), ("-(-7)", "7"), ("10^{2+1}", "1000"), (r"10\cdot 10", "100"), ("50/100", "0.5"),
    (r"\frac{2.5}{3}", r"\frac56")]
cases = lambda table: [pytest.param(*pair, id=f"{kind}: {pair[0]} | {pair[1]}") for kind, pairs in table.items() for pair in pairs]


@pytest.mark.parametrize("a, b", cases(RIGHT))
def test_equal(a, b):
    assert is_equal(a, b) and is_equal(b, a)


@pytest.mark.parametrize("a, b", cases(WRONG))
def test_different(a, b):
    assert not is_equal(a, b) and not is_equal(b, a)


@pytest.mark.parametrize("work, number", UNFINISHED)
def test_work_left_undone_is_no_answer_for_a_plain_number(work, number):
    assert not is_equal(work, number) and is_equal(number, work) and is_equal(work, work)
    assert is_equal(f"{work} = {number}", number) and not is_equal(f"{work} = {number}1", number + "1")


@pytest.mark.parametrize("response, answer", [
    (r"First \boxed{1}, so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{5}}", "5"), (r"\boxed\n{6}".replace(r"\n", "\n"), "6"), (r"\boxed {7}", "7"), (r"\boxed 8", "8"),
    (r"\fbox{9}", "9"), (r"\boxed{1} then \boxed{2", "1"), (r"<think>\boxed{1}</think> \boxed{2}", "2"), ("<think>#### 1</think>\n#### 2", "2"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    ("3+6=9\n#### 9", "9"), ("#### 1,234", "1,234"), ("The answer is 42.", "42"), ("the final answer is: $\\frac{2}{5}$. I hope it is correct.", "$\\frac{2}{5}$"), ("**Answer:** 12", "12"),
    ("So the answer is 3.5.", "3.5"), ("The answer is 2+2=4. The answer is 4.", "4"), ("I do not know", None), ("", None), (r"\boxed{", None), ("The answer is here.\nBut 5 is a number.", None),
    (r"\boxed{5}<|im_end|>\n<|im_start|>user \boxed{7}", "5"), (r"\boxed{}", None), ("#### 5\n#### 6", "6"), (r"\boxed{a} \text{boxed}", "a"),
    ("The answer is **1234**.", "1234"), ("**Answer:** $x = 4$", "$x = 4$"), (r"\boxed{3}, and a box of 4", "3"), (r"\boxed{1}" * 99, "1")])
def test_reading_order(response, answer):
    assert extract_answer(response) == answer


def test_nested_boxes_are_one():
    assert math_reward(r"\boxed{\boxed{5}}", "5") and not math_reward(r"\boxed{\boxed{5}\text{ or }6}", "5")


ANSWERS = sorted({text for table in (RIGHT, WRONG) for pairs in table.values() for pair in pairs for text in pair})
polynomial = st.lists(st.integers(-9, 9), min_size=1, max_size=4)


@pytest.mark.parametrize("text", [a for pairs in RIGHT.values() for pair in pairs for a in pair])
def test_what_can_be_read_equals_itself_however_it_is_written(text):
    original = text
    assert is_equal(text, text)
    assert is_equal(f"  {text} ", text) and is_equal(f"${text}$", text)
    assert is_equal(text, r"\boxed{" + text + "}")
    for old, new in ((r"\frac", r"\dfrac"), (r"\left", ""), (r"\right", ""), ("+", " + "), ("=", " = "), ("^", " ^ ")):
        text = text.replace(old, new)
    assert is_equal(text, original)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS))
def test_symmetry(a, b):
    assert is_equal(a, b) == is_equal(b, a)


@settings(deadline=None)
@given(st.integers(-10**6, 10**6), st.integers(2, 10**4), st.integers(2, 99))
def test_fractions_count_in_lowest_terms(p, q, k):
    p, q = Fraction(p * q + 1, q).as_integer_ratio()  # p q + 1 and q have no common factor
    write = lambda p, q: (f"{p}/{q}", rf"\frac{{{p}}}{{{q}}}", rf"\left(\dfrac {{{p}}} {{{q}}}\right)")
    for reduced, other in zip(write(p, q), write(p * k, q * k)):
        assert is_equal(reduced, f"{p}/{q}") and is_equal(reduced, f"{p * k}/{q * k}")
        assert not is_equal(reduced, f"{p + 1}/{q}") and not is_equal(other, f"{p}/{q}")


@settings(deadline=None)
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


HOSTILE = ["", " ", "\\", "{", "}" * 999, "{" * 5000, "(" * 5000, r"\frac" * 300, r"\sqrt{" * 400 + "2" + "}" * 400, "9" * 10**6, "9^" * 300 + "9", "2**2**2**2**2**2",
           "9^{9^{9^{9}}}", "(10^9)!", "((((9!)!)!)!)", r"10^{10^{10}}", r"\frac{1}{3^{3^{3^{3}}}}", "1e999999999", "x" * 10**6, "\ud800", "\0", r"\boxed{" * 10**5, "1" + "+1" * 10**5, "|" * 999,
           r"\begin{pmatrix}" * 50, r"\begin{array}{", "_" * 100, "0.(" + "1" * 900 + ")", "0." + "12" * 450 + "...", "__import__('os').system('true')", "{0.__class__}", "%s%n" * 100,
           r"\log_{0}{0}", r"\frac{0}{0}", "0^0", "0^{-1}", r"\sqrt[0]{5}", r"\binom{10^9}{5*10^8}", r"\tan(\pi/2)", r"\log 0", "nan", "inf", r"\infty-\infty", r"\pm" * 200,
           ",".join("x" * 300), ",".join(map(str, range(400))), r"\sin" * 200 + "x", "x^" * 100 + "x", "!" * 100, "5" + "!" * 50, r"\{" * 100, "１" * 500, "½" * 200, "\u202e5", "²" * 300,
           r"\boxed{1}" * 20000, "box" * 40000, r"\box" * 30000, "|x" * 90, "x^" * 90 + "x", "((x+1)^{999}+1)^{999}" * 5, "x!" * 9, "α" * 600,
           r"\text{1 " * 60 + "}" * 60, "=".join([r"\sqrt{2}+\sqrt{3}"] * 9), "1e4999*" * 19 + "1", "1/" * 99 + "3", "3 1/2e9999999999", "3½E22222222222",
           "A B C D E " * 18 + "= 5", "f" + "(x)" * 48 + "=5", ",".join(rf"\sqrt{{{n}}}" for n in range(2, 30)), r"\{" * 30 + "1,1" + r"\}" * 30]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_no_number_and_no_error(text):
    for response in (text, rf"\boxed{{{text}}}", f"#### {text}", f"The answer is {text}"):
        assert math_reward(response, "7") == 0.0
        assert math_reward(response, text) in (0.0, 1.0)
    assert not is_equal("7", text) and not is_equal(text, "x+1")


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=60), st.text(alphabet=string.printable, max_size=60))
def test_no_pair_of_strings_raises(a, b):
    assert math_reward(a, b) in (0.0, 1.0) and math_reward(rf"\boxed{{{b}}}", a) in (0.0, 1.0)


def test_nothing_in_the_checker_could_run_text():
    """No eval and the like, and only imports that offer none; mpmath's numbers are made from integers, never from text."""
    tree = ast.parse((ROOT / "reward.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "open", "__import__", "globals", "mpmathify", "sympify"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"functools", "itertools", "math", "random", "re", "threading", "unicodedata"}


def test_random_state_is_left_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    is_equal("x^2-1", "(x-1)(x+1)")
    assert random.random() == expected


def test_the_shared_examples(shared):
    """Those whose label is policy, and those without a box, are counted apart."""
    wrong, apart = [], []
    for line in (shared / "grader" / "examples.jsonl").read_text().splitlines():
        row = json.loads(line)
        if (math_reward(row["response"], row["gold"]) > 0.5) != row["expected"]:
            (apart if {"contested", "unboxed"} & set(row["flags"]) else wrong).append(row["id"])
    assert not wrong and len(apart) <= 4

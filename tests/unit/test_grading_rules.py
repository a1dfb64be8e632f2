"""One rule for each kind of answer: spellings of one value that are equal, and near misses that are not."""

from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsc_mcore.grading.answers import grade, is_correct
from rlsc_mcore.grading.numbers import read_number
from rlsc_mcore.grading.symbolic import comparers

# gold -> spellings of it that are right | answers that are wrong
CASES: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "scientific notation": {
        "4.5e33": (
            [
                *[r"4.5\times 10^{33}", r"4.5\cdot10^{33}", r"4.5*10^33", r"4.5 \times 10^{33}\text{ erg/s}", "4.5E33", "4.5e+33"],
                *["4.5 x 10^33", "4.5 × 10³³", r"45\times 10^{32}", "4.5*10**33", r"4.50 \times 10^{33} \mathrm{~erg} / \mathrm{s}"],
                *[r"$4.5 \times 10^{33}$", r"L = 4.5\times 10^{33}", r"\approx 4.5\times 10^{33}"],
            ],
            [r"4.5\times 10^{32}", r"-4.5\times 10^{33}", r"4.5\times 10^{-33}", "4.5", r"4.5 e \cdot 33", r"4.6\times 10^{33}"],
        ),
        "1e-3": (["10^{-3}", "0.001", r"\frac{1}{1000}", r"1\times10^{-3}", "1e-03", ".001"], ["1e3", "10^{-2}", "0.0011"]),
        "8.7e8": ([r"8.70\times 10^{8}", "8.7*10^8", "870,000,000", r"870\,000\,000", r"8.7\cdot 10^8 \text{ K}"], [r"8.7\times 10^9"]),
        r"1.6\times 10^{-19}": (["1.6e-19", r"16\cdot 10^{-20}"], [r"9.1\times 10^{-31}", r"1.6\times 10^{-18}", "0"]),
        r"6.6\times 10^{-34}": ([r"6.60\times 10^{-34}"], [r"6.6\times 10^{-33}", r"6.7\times 10^{-34}"]),
        "1500": (["1.5 x 10^3", r"1.5 \times 10^3", r"1.5\times10^{3}"], ["1.5 x 10^2"]),
        "6.02e23": ([r"6.02\times 10^{23}"], [r"6.02\times 10^{22}"]),
    },
    "tiny numbers": {
        r"\frac{1}{20!}": ([r"\frac{1}{2432902008176640000}"], [r"\frac{1}{21!}", "0"]),
        r"\frac{1}{2^{99}}": (["2^{-99}", r"\left(\frac12\right)^{99}"], [r"\frac{1}{2^{98}}", "0"]),
        r"\frac{1}{2004!}": ([r"\frac{2005}{2005!}"], [r"\frac{1}{2006!}"]),
        r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}": ([r"\frac16+\frac{1}{3\cdot 2^{2006}}"], [r"\frac{1}{3 \cdot 2^{2006}}"]),
        r"10^{-7}\pi": ([r"\frac{\pi}{10^7}"], [r"10^{-8}\pi", "0"]),
    },
    "upright letters": {
        r"2\mathrm{e}": (["2e", r"e\cdot 2"], ["2", "e", r"2\mathrm{i}"]),
        r"2\mathrm{i}": (["2i", r"\sqrt{-4}"], ["2", "i"]),
        "2+3i": ([r"2+3\mathrm{i}", r"2+3\text{i}", "3i+2"], ["2+3", "2-3i", "5"]),
        "e^2": ([r"\mathrm{e}^2", r"\mathrm{e}^{2}", r"\exp(2)"], ["2", r"\mathrm{e}^3"]),
        r"1 - \frac{1}{\mathrm{e}}": ([r"1-e^{-1}", r"\frac{e-1}{e}"], [r"1 + \frac{1}{\mathrm{e}}", "1"]),
    },
    "numbers that are misread": {
        "-1./3": ([r"-\frac{1}{3}", "-1/3", r"\frac{-1}{3}"], ["-1", "1/3", "-0.33"]),
        "-3./2": (["-1.5", r"-\frac32"], ["-3", "1.5"]),
        r"0.\overline{3}": ([r"\frac{1}{3}", "1/3", r"0.\bar{3}", r"0.\dot{3}", r"0.3\overline{3}", "0.333...", "0.(3)"], ["0", "0.3", "0.33"]),
        r"0.1\overline{6}": ([r"\frac16", r"0.1\dot6", r"0.1666\ldots"], ["0.16", r"0.\overline{16}"]),
        r"0.\overline{142857}": ([r"\frac17", r"0.\dot{1}4285\dot{7}"], ["0.142857"]),
        "1010_2": (["1010_{2}", "(1010)_2", r"1010_{\text{two}}", r"1010_{\mathrm{two}}", r"1010\text{ base }2"], ["1010_{3}", "1010", "10", "1011_2"]),
        "4210_{5}": (["4210_5", r"4210_{\text{five}}"], ["4210_6", "4210", "4201_5"]),
        "1": (["1.0", "+1"], ["1_{2}", "1_2"]),
        "137 \\frac{1}{2}": (["137.5", "275/2", r"137\frac12", "137 1/2"], ["137", r"\frac{137}{2}", "68.5"]),
        r"-3\frac{1}{2}": (["-3.5", r"-\frac72"], ["-2.5", "3.5", r"-\frac32"]),
        "0.5": ([r"\frac12", ".5", "50\\%", "1/2", "0.50", "½"], ["5", "0.05"]),
    },
    "thousands": {
        r"11,\! 111,\! 111,\! 100": (["11111111100", "11,111,111,100", r"11{,}111{,}111{,}100", r"11\,111\,111\,100"], ["11,111,111,101", "11"]),
        r"18,\! 720": (["18,720", "18720", r"18\,720", "18 720"], ["18", "720", "18.72"]),
        "1 000": (["1000", "1,000"], ["0", "1", "000"]),
        "1234": (["1 234", "1’234", "1'234", r"1\,234", "1{,}234", "1\u202f234", "1,234"], ["1.234", "12 34"]),
        "1234567": (["1 234 567", "1,234,567", "1’234’567"], ["1 234 576"]),
        r"\$32,\!348": (["32348", "$32,348", r"\$32{,}348", "32,348 dollars"], ["32,349"]),
    },
    "letter case": {
        "3R^2": ([r"3 R^{2}", r"3\cdot R^2", r"R^2\cdot 3"], ["3r^2", "3R", "3R^3"]),
        r"\pi r^2": ([r"r^2\pi", r"\pi r^{2}"], [r"\pi R^2"]),
        "A": (["(A)", r"\text{A}"], ["a", "B"]),
        "a": (["(a)"], ["A", "b"]),
        "E_{1}": (["E_1", r"E_{\text{1}}"], ["e_1", "E_2", "E"]),
    },
    "percent": {
        "62.5": (["62.5%", r"62.5\%", "62.5 percent", r"62.5\text{ percent}", "62.50%"], ["62.4%", "6.25%"]),
        "62.5%": (["62.5", "0.625", r"\frac{5}{8}", r"62.5\%", r"62\frac12\%"], ["625", "62.6", "6.25"]),
        "12.5": ([r"12.5\%", "12.5%"], ["0.125", "1.25"]),
        r"12.5\%": (["12.5", "0.125"], ["125", "1.25%"]),
        "0.5": ([r"0.5\%", "50%"], [r"5\%"]),
        r"28\%": (["28", "28%", "0.28", "28 percent", "28 per cent"], ["2.8", "2.8%", "29%"]),
        r"8 \%": (["8%", "8", "0.08"], ["80", "0.8"]),
        "50": (["50 percent", "50%"], ["500%", "0.5"]),
    },
    "units": {
        r"15\mbox{ cm}^2": (["15", "15 cm^2", r"15\text{ cm}^{2}", r"15\,\mathrm{cm}^2", "15 square centimeters", "15cm^2"], ["15 cm^3", "15 m^2", "225", "15^2"]),
        "5": (["5 m/s", r"5\text{ m/s}", r"5 \frac{\text{m}}{\text{s}}", "5 apples", r"5\mathrm{~m}", "5 kg", "€5", r"\$5", "5cm", "5 m"], ["5x", "6 m/s", "5m^2n"]),
        "15": (["15 cm^2", "15 square units", r"15\text{ units}"], ["15x", "14 cm^2"]),
        "64": (["$64/day", r"\$64", "64 dollars per day", r"64^\circ", r"64^{\circ}", "64°", "64 degrees"], ["65 degrees", "64x"]),
        r"5.4 \text{ cents}": (["5.4", r"5.4\text{ cents}", r"0.054\text{ dollars}"], [r"5.4\text{ dollars}", "54"]),
        r"864 \mbox{ inches}^2": (["864", r"864\text{ in}^2", "864 square inches", r"6\text{ ft}^2"], [r"864\text{ in}^3", "865"]),
        r"\frac{270}7\text{ degrees}": ([r"\frac{270}{7}", r"\frac{270}{7}^\circ", "270/7"], ["38.57", r"\frac{27}{7}"]),
        r"\text{12 cm}": (["12", "12 cm", r"12\text{ cm}", r"\text{120 mm}"], ["12 m", "13"]),
        r"1.5\text{ m}": (["150 cm", "1.5", r"1.5\text{ meters}", r"150\text{ cm}"], ["1.5 cm", "15 m", "1.5 kg"]),
        r"10\sqrt{3}\text{ cm}": ([r"10\sqrt3", r"10\sqrt{3}\,\mathrm{cm}", r"\sqrt{300}\text{ cm}"], [r"10\text{ cm}", r"10\sqrt3\text{ cm}^2"]),
        r"5\text{ apples}": (["5", "5 apples", "5 apple", "5 red apples"], ["5 dollars", "6 apples"]),
        r"90^\circ": (["90", "90°", r"90\text{ degrees}", r"90^{\circ}", r"90\degree"], ["91", r"\frac{\pi}{2}", "90 rad"]),
        "540": ([r"\boldsymbol{540}", r"\mathbf{540}", r"\textbf{540}", r"\color{red}{540}", r"{\color{red}540}", r"\textcolor{red}{540}"], [r"\boldsymbol{541}"]),
    },
    "words": {
        r"\text{June 20}": (["June 20", "june 20", r"\text{June 20.}", r"\text{June } 20"], ["June 21", "20", "July 20"]),
        "no": (["No", "NO", r"\text{no}", "no."], ["on", "yes", "n"]),
        "on": (["ON"], ["no"]),
        "IV": (["iv", r"\text{IV}"], ["VI", "vi", "4i"]),
        "Yes": (["yes", "YES", r"\text{Yes}", r"\textbf{Yes.}"], ["no", "sey"]),
        "BA": ([r"\text{BA}", "BA"], ["AB", "ba", "B"]),
        r"\text{Evelyn}": (["Evelyn", "evelyn", r"\mathrm{Evelyn}"], ["nylevE", "Eve"]),
        r"\text{even}": (["even", "Even"], ["odd", "neve"]),
        "xy": (["yx", r"x\cdot y", "x y"], ["xyz", "x+y"]),
        "abc": (["bca", r"a\cdot b\cdot c"], ["abd", "ab"]),
        r"\text{(C)}": (["C", "(C)", r"\text{C}", r"\textbf{(C)}"], ["D", "c", "(D)"]),
        r"\text{ellipse}": (["an ellipse", "Ellipse"], ["circle"]),
    },
    "ellipses": {
        r"1, 2, \ldots, n": ([r"1,2,\dots,n", r"1, 2, \cdots, n", "1, 2, ..., n"], [r"1, 3, 5, \ldots, 2n-1", "1, 2, n", r"1,2,\ldots,n+1"]),
        r"1+2+\cdots+n": ([r"1 + 2 + \ldots + n"], [r"1+3+\cdots+n", r"1\cdot2\cdots n"]),
    },
    "intervals": {
        r"(2,\infty)": (["(2,∞)", r"(2, +\infty)", "x>2", r"\{x : x>2\}", r"x \in (2,\infty)", r"2<x", r"]2,\infty["], [r"[2,\infty)", r"(3,\infty)", r"(-\infty,2)", "x<2", r"x\ge 2", "2"]),
        r"[5,\infty)": ([r"x \geq 5", "x≥5", r"x\ge5", r"\{x \mid x \ge 5\}"], ["x>5", r"(5,\infty)", r"x \leq 5"]),
        r"(-\infty, 2) \cup (3, \infty)": ([r"(3,\infty)\cup(-\infty,2)", r"x<2\text{ or }x>3", "x < 2 or x > 3"], [r"(-\infty,2]\cup(3,\infty)", "(2,3)", r"(-\infty,3)"]),
        r"x \in [-2,7]": (["[-2,7]", r"-2\le x\le 7", r"[-2, 7]"], ["(-2,7)", "[-2,7)", "[-2,8]", "[7,-2]"]),
        r"(-\infty, 0) \cup\{1\}": ([r"\{1\}\cup(-\infty,0)"], [r"(-\infty,0)", r"(-\infty,1]"]),
        r"(0,9) \cup (9,36)": ([r"(9,36)\cup(0,9)"], ["(0,36)", r"(0,9]\cup(9,36)"]),
        r"(-\infty,\infty)": ([r"\mathbb{R}", "ℝ", r"\text{all real numbers}", r"x \in \mathbb{R}"], [r"(0,\infty)", r"\mathbb{Z}"]),
        r"(-\infty,0)\cup(0,\infty)": ([r"\mathbb{R}\setminus\{0\}", r"x\ne0", "x≠0"], [r"\mathbb{R}", r"(0,\infty)"]),
        "(1,3)": ([r"(1,2)\cup[2,3)", r"\left(1,3\right)"], [r"(1,2)\cup(2,3)", "(1,3]", "(3,1)", "[1,3]"]),
        r"\left( \frac{3}{5}, \frac{8}{3} \right]": (["(0.6, 8/3]", r"(\frac35,\frac83]"], ["(0.6, 2.6667]", r"[\frac35,\frac83]"]),
        r"[-\infty, 3)": ([], [r"(-\infty, 3]"]),
    },
    "sets and lists": {
        r"\{1\pm\sqrt{5},-2\}": ([r"\{-2,1+\sqrt5,1-\sqrt5\}", r"1+\sqrt5, 1-\sqrt5, -2"], [r"\{1+\sqrt5,-2\}", r"\{1\pm\sqrt5,2\}"]),
        r"1 \pm \sqrt{19}": ([r"1+\sqrt{19}, 1-\sqrt{19}", r"1-\sqrt{19}\text{ and }1+\sqrt{19}", "1±√19"], [r"1+\sqrt{19}", r"1\pm\sqrt{18}", r"-1\pm\sqrt{19}"]),
        "1,-2": (["-2, 1", r"\{1,-2\}", r"x=1, x=-2", r"x = 1 \text{ or } x = -2", "1 and -2", "1; -2"], ["1", "-1,2", "1,2", "1,-2,3", "(1,-2)"]),
        "5": (["5", r"\{5\}"], ["5,5", "5 or 6", r"5\text{ and }6", "{5,6}"]),
        "3, 5, 7": (["7,5,3", r"\{3,5,7\}"], ["3,5", "3,5,8", "357", "3,5,7,7"]),
        r"\{100,200\}": ([r"\{200,100\}", r"\{200, 100\}"], ["100200", r"\{100\}"]),
        "x=1, y=2": (["x=1,y=2", "y=2, x=1"], ["x=2, y=1", "2, 1"]),
        r"(1,8,19), (2,7,13), (4,5,7)": (["(4,5,7),(1,8,19),(2,7,13)"], ["(1,8,19), (2,7,13)", "(1,19,8), (2,7,13), (4,5,7)"]),
        r"\{1,2\}": ([r"\{2,1\}", r"\{1,2,2\}", "1,2"], [r"\{1\}", r"\{1,3\}", "(1,2)", "[1,2]"]),
        r"\emptyset": ([r"\varnothing", "∅"], ["0"]),
    },
    "tuples and matrices": {
        "(2,4)": (["(2, 4)", r"\left(2,4\right)", "(2.0, 8/2)", r"\langle 2,4\rangle", "(x,y)=(2,4)"], ["(4,2)", "[2,4]", "(2,4,0)", "2,4", r"\{2,4\}"]),
        r"\left( 3, \frac{\pi}{2} \right)": ([r"(3,\frac{\pi}{2})", r"(3, \pi/2)", r"(3,0.5\pi)"], [r"(\frac{\pi}{2},3)", r"(3,\pi)", "(3, 1.5708)"]),
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}": (
            [r"\begin{pmatrix}-\frac13\\\frac23\\\frac53\end{pmatrix}", r"\begin{bmatrix} -1/3 \\ 2/3 \\ 5/3 \end{bmatrix}", r"\left(\begin{array}{c}-1/3\\2/3\\5/3\end{array}\right)"],
            [r"\begin{pmatrix} -1/3 \\ 5/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -1/3 & 2/3 & 5/3 \end{pmatrix}"],
        ),
        r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}": ([r"\begin{bmatrix}-1&0\\0&-1\end{bmatrix}"], [r"\begin{pmatrix}0&-1\\-1&0\end{pmatrix}", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}"]),
        r"(10,000, 5)": (["(10000, 5)"], ["(10, 5)"]),
    },
    "equations": {
        "y = 2x + 3": (["y=2x+3", "2x+3", "2x-y+3=0", "y-3=2x", "f(x)=2x+3"][:4], ["y=2x-3", "x=2y+3", "y=3x+2", "2x"]),
        "5x - 7y + 11z + 4 = 0": (["-5x+7y-11z-4=0", "10x-14y+22z+8=0", "5x-7y+11z=-4"], ["5x-7y+11z-4=0", "5x-7y+11z+4"]),
        "x=5": (["5", "x = 5.0", "5=x", r"x=\frac{10}{2}=5"], ["x=6", "y=5", "2x=5", "x+5"]),
        "4": (["k=4", "f(2)=4", "AB=4", r"\text{Area}=4", r"x = 2+2 = 4"], ["x^2+y^2=4", "2x=4", "x=5"]),
        "f(x)=2 x": (["2x", "f(x)=2x", "f(x) = x + x"], ["f(x)=x", "f(x)=3x", "g(x)=2x"]),
        r"m_{\max }=n^{2}-n-1": (["n^2-n-1", "m=n^2-n-1", r"m_{\text{max}} = n^2-n-1"], ["m=n^2-n", "n^2-n+1"]),
        "MR=SRMC": (["SRMC = MR", r"\text{MR}=\text{SRMC}"], ["MR=SRAC", "SRMC"]),
        r"x^2+y^2=4": (["4=x^2+y^2", r"\frac{x^2}{4}+\frac{y^2}{4}=1"], ["x^2+y^2=2", "x^2-y^2=4", "4"]),
        r"k \geqslant 2": ([r"k\ge2", r"2\le k", r"k \in [2,\infty)"], ["k>2", r"k\le 2", r"k\ge3"]),
    },
    "expressions": {
        r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}": ([r"\frac{1}{3} E_{1} + \frac{2}{3} E_{2}", r"\frac{E_1+2E_2}{3}", r"\frac{2E_2}{3}+\frac{E_1}{3}"], [r"\frac{1}{3} E_{2}+\frac{2}{3} E_{1}", r"\frac13 E_1"]),
        r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}": ([r"\hbar\omega\left(v+\frac12\right)-\frac{e^2E_0^2}{2m\omega^2}"], [r"\hbar\omega(v+1/2)+\frac{E_0^2e^2}{2m\omega^2}"]),
        r"\lambda_{\text {red}} / \sqrt{2}": ([r"\frac{\lambda_{\text{red}}}{\sqrt2}", r"\frac{\lambda_{red}}{\sqrt{2}}", r"\frac{\sqrt2\lambda_{\mathrm{red}}}{2}"], [r"\frac{\lambda}{\sqrt2}", r"\lambda_{red}\sqrt2"]),
        r"y^{\prime}+r y-r x(t)=0": ([r"y'+ry-rx(t)=0", r"y' + r y = r x(t)"], [r"y+ry-rx(t)=0"]),
        "x+2n+1": (["1+2n+x"], ["x+1", "x+n+1"]),
        r"\sqrt{2}": ([r"\sqrt2", r"\frac{2}{\sqrt2}", "2^{1/2}", "√2", "sqrt(2)"], ["1.41421356", "1.4142135623730951", r"\sqrt{3}"]),
        r"\frac{1}{3}": (["1/3", r"\frac{2}{6}", r"0.\overline{3}"], ["0.33333333", "0.3333333333333333"]),
        r"\frac{100!}{2^{50}}": ([r"100!\cdot 2^{-50}"], [r"\frac{100!}{2^{51}}", r"\frac{99!}{2^{50}}"]),
        r"\binom{2n}{n}": ([r"\frac{(2n)!}{n!^2}", r"\frac{(2n)!}{n!n!}", r"{2n \choose n}"][:2], [r"\binom{n}{2}"]),
        r"\cot x": ([r"\frac{\cos x}{\sin x}", r"\frac{1}{\tan x}"], [r"\tan x"]),
        r"\sin^2 x": ([r"1-\cos^2x", r"(\sin x)^2"], [r"\sin x^2", r"\cos^2 x"]),
        r"\frac{\log 2}{\log 2-\log 3}": ([r"\frac{\ln 2}{\ln(2/3)}"], [r"\frac{\log 2}{\log 3-\log 2}"]),
        r"\frac{d^{2} v_{o}}{d t^{2}}+\frac{v_{o}}{L C}=\frac{v_{i}}{L C}": ([r"\frac{v_i-v_o}{LC}=\frac{d^2v_o}{dt^2}"], [r"\frac{v_{o}}{t^{2}}+\frac{v_{o}}{L C}=\frac{v_{i}}{L C}"]),
        r"\left\lfloor\log _{2} n\right\rfloor+1": ([r"1+\lfloor\log_2 n\rfloor"], [r"\lceil\log_2 n\rceil+1", r"\lfloor\log_2 n\rfloor"]),
        "np.arcsin(10/13)": ([r"\arcsin(10/13)", r"\sin^{-1}\left(\frac{10}{13}\right)", r"\arcsin\frac{10}{13}"], [r"\arccos(10/13)"]),
        r"\frac{1}{2a}(\exp{a*t} - \exp{-a*t})": ([r"\frac{e^{at}-e^{-at}}{2a}", r"\frac{\sinh(at)}{a}"], [r"\frac{e^{at}+e^{-at}}{2a}"]),
        "3:4": (["3 : 4", r"3\colon4", "a:b=3:4"], ["4:3", "34", "3:4:5"]),
        "1:2:3": (["1 : 2 : 3", r"a:b:c=1:2:3"], ["1:3:2", "1:2"]),
        r"\text{11:30 a.m.}": (["11:30 am", "11:30 AM", "11:30 a.m."], ["11:30 pm", "11:31 am"]),
        r"\ln(ab)": ([r"\ln a + \ln b", r"\log(ba)"], [r"\ln a\ln b"]),
        "x^{2/3}": ([r"\sqrt[3]{x^2}"], [r"\sqrt{x^3}"]),
        "12": ([r"|S| = 12", r"\#S = 12", r"\text{The answer is }12", r"\text{Total: }12", r"12 \frac{km}{h}", r"\sum_{k=1}^{3} 2k", r"\gcd(24,36)"][:6], ["f(12)=3", r"\sum_{k=1}^{3} k", "24/3", r"\log_2 12"]),
        r"\frac{1}{\sqrt{6}}": ([r"\frac{NO}{BO}=\frac{1}{\sqrt{6}}", "1/√6", r"\frac{\sqrt6}{6}"], [r"\frac{x}{y}=\frac{1}{\sqrt6}", r"\frac16"]),
        "(11,7), (7,11)": (["(11,7)or(7,11)", r"(7,11)\text{ and }(11,7)"], ["(11,7)"]),
        r"\sqrt{x^2}": (["|x|"], ["x"]),
    },
}  # fmt: skip

RIGHT = [
    (kind, gold, answer)
    for kind, golds in CASES.items()
    for gold, (right, _) in golds.items()
    for answer in [gold, *right]
]
WRONG = [
    (kind, gold, answer)
    for kind, golds in CASES.items()
    for gold, (_, wrong) in golds.items()
    for answer in wrong
]


@pytest.fixture(scope="module", autouse=True)
def workers_end_with_the_module() -> Iterator[None]:
    yield
    for comparer in comparers:
        comparer.close()


@pytest.mark.parametrize(("kind", "gold", "answer"), RIGHT)
def test_equal_spellings(kind: str, gold: str, answer: str) -> None:
    assert is_correct(answer, gold)
    assert grade(f"Therefore $\\boxed{{{answer}}}$.", gold).strict


@pytest.mark.parametrize(("kind", "gold", "answer"), WRONG)
def test_different_answers(kind: str, gold: str, answer: str) -> None:
    assert not is_correct(answer, gold)


RESPONSES = [
    # (response, gold, extracted, strict, lenient)
    (r"$\boxed{(2, 2)}$ and $\boxed{(6, 2)}$", "(2, 2), (6, 2)", "(2, 2), (6, 2)", True, True),
    (r"So $x = \boxed{3}$ or $x = \boxed{-1}$.", r"\{-1, 3\}", "3, -1", True, True),
    (r"First $\boxed{3}$. Then, after more work, $\boxed{-1}$.", "3, -1", "-1", False, False),
    (r"$\boxed{3}$ and $\boxed{4}$", "4", "4", True, True),
    (r"$\boxed{3}$ and $\boxed{4}$", "3, 5", "4", False, False),
    (r"= \boxed \frac12", r"\frac12", r"\frac12", True, True),
    (r"$\boxed x+1$", "x+1", "x+1", True, True),
    (r"so $\boxed 42$.", "42", "42", True, True),
    (r"$$\boxed \frac{1}{2}$$", "1/2", r"\frac{1}{2}", True, True),
    (r"\boxed \sqrt{2}.", r"\sqrt2", r"\sqrt{2}", True, True),
    (r"\boxed is what I was asked for, 42", "42", "42", False, True),
    (r"Therefore, the answer is $\frac{1}{2}$.", "0.5", r"\frac{1}{2}", False, True),
    ("The final answer is: 12,345 dollars.", "12345", "12,345 dollars", False, True),
    ("Thus the answer is 4.5 x 10^33 erg/s.", "4.5e33", "4.5 x 10^33 erg/s", False, True),
    ("The answer is 5. Let me check 3 more times.", "5", "5", False, True),
    ("**The answer is 7**", "7", "7", False, True),
    ("So it is 10 000", "10000", "10 000", False, True),
    (r"\boxed{5}, so the answer is 7", "7", "5", False, False),
]


@pytest.mark.parametrize(("response", "gold", "extracted", "strict", "lenient"), RESPONSES)
def test_what_counts_as_the_answer(
    response: str, gold: str, extracted: str, strict: bool, lenient: bool
) -> None:
    result = grade(response, gold)
    assert (result.extracted, result.strict, result.lenient) == (extracted, strict, lenient)


def spellings(value: Fraction) -> list[str]:
    """Spell a rational number whose denominator has no prime factors but 2 and 5."""
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    scaled = int(value * 10**digits)
    sign, size = ("-" if scaled < 0 else ""), str(abs(scaled)).rjust(digits + 1, "0")
    decimal = sign + (size[: len(size) - digits] + "." + size[len(size) - digits :] if digits else size)
    whole, _, rest = decimal.partition(".")
    grouped = f"{int(whole.lstrip('-')):,}" + ("." + rest if rest else "")
    tops = (value.numerator, value.denominator)
    return [
        decimal,
        sign + grouped,
        sign + grouped.replace(",", "{,}"),
        sign + grouped.replace(",", r"\,"),
        sign + grouped.replace(",", r",\!"),
        decimal + ("0" if rest else ".0"),
        f"{tops[0]}/{tops[1]}",
        rf"\frac{{{tops[0]}}}{{{tops[1]}}}",
        rf"\dfrac{{{3 * tops[0]}}}{{{3 * tops[1]}}}",
        rf"{sign}\frac{{{abs(tops[0])}}}{{{tops[1]}}}",
        rf"{scaled}\times 10^{{{-digits}}}",
        rf"{scaled} \cdot 10^{{{-digits}}}\text{{ kg}}",
        f"{scaled}e{-digits}",
        rf"{value * 100}\%" if (value * 100).denominator == 1 else rf"\frac{{{tops[0]}}}{{{tops[1]}}}",
        rf"\text{{{decimal}}}",
        rf"$x = {decimal}$",
        decimal + " m/s",
    ]


DECIMALS = st.builds(
    lambda digits, places: Fraction(digits, 10**places), st.integers(-(10**7), 10**7), st.integers(0, 5)
)


@settings(deadline=None, max_examples=60)
@given(DECIMALS, DECIMALS)
def test_numbers_are_equal_in_every_notation_and_to_no_other_number(value: Fraction, other: Fraction) -> None:
    golds = [spellings(value)[index] for index in (0, 7, 10)]
    for gold in golds:
        for spelling in spellings(value):
            assert is_correct(spelling, gold), (spelling, gold)
        if other not in (value, 100 * value, value / 100):
            for spelling in spellings(other):
                assert not is_correct(spelling, gold), (spelling, gold)


@given(st.integers(0, 999), st.integers(0, 3), st.integers(1, 6), st.data())
def test_repeating_decimals(whole: int, fixed_length: int, block_length: int, data: st.DataObject) -> None:
    fixed = data.draw(st.text("0123456789", min_size=fixed_length, max_size=fixed_length))
    block = data.draw(st.text("0123456789", min_size=block_length, max_size=block_length))
    shown = read_number(f"{whole}.{fixed}\\overline{{{block}}}")
    # Long division, digit by digit, must give the digits back.
    assert shown is not None
    rest, digits = shown - int(shown), ""
    if set(block) != {"9"}:  # 0.999... is 1
        assert int(shown) == whole
        for _ in range(fixed_length + 3 * block_length):
            rest *= 10
            digits += str(int(rest))
            rest -= int(rest)
        assert digits == fixed + 3 * block


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-9, 9).filter(bool), st.sampled_from(["x", "y^2", "x y", r"\sqrt{2}", r"\pi", "R_1", "r_1", "e^{x}"])), min_size=2, max_size=5, unique_by=lambda term: term[1]), st.randoms())  # fmt: skip
def test_sums_are_equal_in_every_order_and_different_with_another_coefficient(
    terms: list[tuple[int, str]], stream: object
) -> None:
    def text(row: list[tuple[int, str]]) -> str:
        return " + ".join(f"{coefficient}{factor}" for coefficient, factor in row).replace("+ -", "- ")

    gold = text(terms)
    assert is_correct(text(terms[::-1]), gold)
    assert is_correct(
        rf"\frac{{{text([(3 * coefficient, factor) for coefficient, factor in terms])}}}{{3}}", gold
    )
    for position, (coefficient, factor) in enumerate(terms):
        changed = [*terms[:position], (coefficient + 1, factor), *terms[position + 1 :]]
        assert not is_correct(text([term for term in changed if term[0]]), gold)

"""Read a number in any notation as an exact rational."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 5000
_MAX_CHARACTERS = 400

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_TEN_POWER = r"10 ?\^ ?(?:\{ ?(?P<braced>[-+]? ?[0-9]{1,5}) ?\}|\( ?(?P<round>[-+]? ?[0-9]{1,5}) ?\)|(?P<bare>[-+]?[0-9]{1,5}))"
_SCIENTIFIC = re.compile(
    rf"(?P<mantissa>{_DECIMAL}) ?(?:(?:\\times|\\cdot|\*|[xX]) ?{_TEN_POWER}|(?:[eE]|\\text\{{E\}}) ?(?P<exponent>[-+]?[0-9]{{1,5}}))"
)
_POWER_OF_TEN = re.compile(_TEN_POWER)
_PLAIN = re.compile(_DECIMAL)
_MIXED = re.compile(
    rf"(?P<whole>{_INTEGER}) ?(?:\\frac\{{(?P<top>[0-9]+)\}}\{{(?P<bottom>[0-9]+)\}}|(?<= )(?P<over>[0-9]+) ?/ ?(?P<under>[0-9]+))"
)
_REPEATING = re.compile(
    rf"(?P<whole>{_INTEGER})?\.(?P<fixed>[0-9]*)(?:\\(?:overline|bar|dot) ?\{{?(?P<block>[0-9]+)\}}?|\((?P<round>[0-9]+)\))"
)
_DOTTED = re.compile(
    rf"(?P<whole>{_INTEGER})?\.(?P<fixed>[0-9]*)\\dot ?\{{?(?P<first>[0-9])\}}?(?P<middle>[0-9]*)\\dot ?\{{?(?P<last>[0-9])\}}?"
)
_ELLIPSIS = re.compile(
    rf"(?P<whole>{_INTEGER})?\.(?P<fixed>[0-9]*?)(?:(?P<digit>[0-9])(?P=digit){{2,}}|(?P<block>[0-9]{{2,}}?)(?P=block)+) ?\\ldots ?"
)
_BASE = re.compile(
    r"\(? ?(?P<digits>[0-9A-Z]+(?:\.[0-9A-Z]+)?) ?\)? ?(?:_ ?(?:\{ ?(?:\\text\{)?(?P<braced>[0-9]{1,2}|[a-z]+)\}? ?\}?|(?P<bare>[0-9]))|"
    r"(?:\\text\{ ?base|base) ?\}? ?\{?(?P<worded>[0-9]{1,2}|[a-z]+)\}?\}?)"
)
_BASE_NAMES = {
    name: base
    for base, name in enumerate(
        [
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
        ],
        2,
    )
}


@dataclass(frozen=True)
class BaseNumber:
    """Digits and their base; two are equal only if both digits and base are the same."""

    digits: str
    base: int


def read_number(text: str) -> Fraction | None:
    """Return the value of a normalized text if it is one number, else None.

    Formats: decimal, with thousands separators, fraction, mixed, scientific, repeating. A text with a unit or
    a percent sign gives None.
    """
    if not text or len(text) > _MAX_CHARACTERS or not any(character.isdigit() for character in text):
        return None
    negative = False
    while text[:1] in ("-", "+") and len(text) > 1:
        negative ^= text[0] == "-"
        text = text[1:].lstrip()
    value = _read_unsigned(text)
    if value is None:
        return None
    return -value if negative else value


def read_base_number(text: str) -> BaseNumber | None:
    """Return digits and base of `1010_2`, `1010_{2}`, `(1010)_{\\text{two}}` or `1010 base 2`, else None."""
    match = _BASE.fullmatch(text)
    if match is None or not match["digits"][0].isdigit():
        return None
    name = match["braced"] or match["bare"] or match["worded"]
    base = int(name) if name.isdigit() else _BASE_NAMES.get(name, 0)
    digits = match["digits"].lstrip("0") or "0"
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits.replace(".", "")):
        return None
    return BaseNumber(digits, base)


def _read_unsigned(text: str) -> Fraction | None:
    if _PLAIN.fullmatch(text):
        return _decimal(text)
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = match["braced"] or match["round"] or match["bare"] or match["exponent"]
        return _scaled(_decimal(match["mantissa"]), exponent)
    if match := _POWER_OF_TEN.fullmatch(text):
        return _scaled(Fraction(1), match["braced"] or match["round"] or match["bare"])
    if match := _MIXED.fullmatch(text):
        top, bottom = int(match["top"] or match["over"]), int(match["bottom"] or match["under"])
        return _decimal(match["whole"]) + Fraction(top, bottom) if 0 <= top < bottom else None
    if match := _DOTTED.fullmatch(text):
        return _repeating(match["whole"], match["fixed"], match["first"] + match["middle"] + match["last"])
    if match := _REPEATING.fullmatch(text):
        return _repeating(match["whole"], match["fixed"], match["block"] or match["round"])
    if match := _ELLIPSIS.fullmatch(text):
        return _repeating(match["whole"], match["fixed"], match["digit"] or match["block"])
    return _read_quotient(text)


def _read_quotient(text: str) -> Fraction | None:
    if text.startswith("\\frac{") and text.endswith("}"):
        top, separator, bottom = text[6:-1].partition("}{")
    else:
        top, separator, bottom = text.partition("/")
    if not separator or (any(character in top + bottom for character in "{}/") and "^" not in top + bottom):
        return None
    numerator, denominator = read_number(top.strip()), read_number(bottom.strip())
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def _decimal(text: str) -> Fraction:
    plain = text.replace(",", "").replace(" ", "")
    return Fraction(plain + "0" if plain.endswith(".") else plain)


def _scaled(mantissa: Fraction, exponent: str) -> Fraction | None:
    power = int(exponent.replace(" ", ""))
    return mantissa * Fraction(10) ** power if abs(power) <= MAX_EXPONENT else None


def _repeating(whole: str | None, fixed: str, block: str) -> Fraction:
    integer = _decimal(whole) if whole else Fraction(0)
    fraction = Fraction(int(fixed or "0")) + Fraction(int(block), 10 ** len(block) - 1)
    return integer + fraction / Fraction(10) ** len(fixed)

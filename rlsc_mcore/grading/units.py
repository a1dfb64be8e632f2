"""Split the unit from the end of an answer and compare units.

A unit on one side only is ignored. Two known units of the same dimension are converted exactly. If a unit is
unknown, the two agree if the words of one are a subset of the words of the other.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Dimension = tuple[tuple[str, int], ...]  # base unit and exponent, sorted


@dataclass(frozen=True)
class Unit:
    """The unit of an answer."""

    factor: Fraction = Fraction(1)  # size of a known unit in base units
    dimension: Dimension | None = None  # None: the unit is unknown
    words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Measure:
    """An answer, split into the text without unit, the unit, and whether it has a percent sign."""

    core: str
    unit: Unit | None = None
    percent: bool = False


def _known_units() -> dict[str, tuple[Fraction, dict[str, int]]]:
    units: dict[str, tuple[Fraction, dict[str, int]]] = {}

    def add(names: str, factor: str | Fraction, **dimension: int) -> None:
        units.update(dict.fromkeys(names.split(), (Fraction(factor), dimension)))

    prefixes = {"": 0, "k": 3, "c": -2, "m": -3, "n": -9, "M": 6, "G": 9, "\u03bc": -6}
    long_prefixes = {
        "": 0,
        "kilo": 3,
        "centi": -2,
        "milli": -3,
        "nano": -9,
        "mega": 6,
        "giga": 9,
        "micro": -6,
    }
    metric = (
        ("m", ("meter", "metre"), "1", {"m": 1}),
        ("g", ("gram",), "1/1000", {"kg": 1}),
        ("s", (), "1", {"s": 1}),
        ("Hz", ("hertz",), "1", {"s": -1}),
        ("N", ("newton",), "1", {"kg": 1, "m": 1, "s": -2}),
        ("J", ("joule",), "1", {"kg": 1, "m": 2, "s": -2}),
        ("W", ("watt",), "1", {"kg": 1, "m": 2, "s": -3}),
        ("Pa", ("pascal",), "1", {"kg": 1, "m": -1, "s": -2}),
        ("A", ("amp", "ampere"), "1", {"A": 1}),
        ("V", ("volt",), "1", {"kg": 1, "m": 2, "s": -3, "A": -1}),
        ("eV", (), "1", {"eV": 1}),
        ("K", ("kelvin",), "1", {"K": 1}),
        ("mol", ("mole",), "1", {"mol": 1}),
        ("L", ("liter", "litre"), "1/1000", {"m": 3}),
    )
    for symbol, names, factor, dimension in metric:
        for prefix, power in prefixes.items():
            units[prefix + symbol] = (Fraction(factor) * Fraction(10) ** power, dimension)
        for name in names:
            for prefix, power in long_prefixes.items():
                for plural in ("", "s"):
                    units[prefix + name + plural] = (Fraction(factor) * Fraction(10) ** power, dimension)
    add("sec second seconds", "1", s=1)
    add("min mins minute minutes", "60", s=1)
    add("h hr hrs hour hours", "3600", s=1)
    add("day days", "86400", s=1)
    add("week weeks", "604800", s=1)
    add("in inch inches", "0.0254", m=1)
    add("ft foot feet", "0.3048", m=1)
    add("yd yard yards", "0.9144", m=1)
    add("mi mile miles", "1609.344", m=1)
    add("mph", "0.44704", m=1, s=-1)
    add("kph kmh", Fraction(5, 18), m=1, s=-1)
    add("lb lbs pound pounds", "0.45359237", kg=1)
    add("erg ergs", "1e-7", kg=1, m=2, s=-2)
    add("dyn dyne dynes", "1e-5", kg=1, m=1, s=-2)
    add("\u00c5 angstrom angstroms", "1e-10", m=1)
    add("pc parsec parsecs", "1", parsec=1)
    add("year years yr yrs", "1", year=1)
    add("month months", "1", month=1)
    add("ohm ohms \u03a9", "1", kg=1, m=2, s=-3, A=-2)
    add("degree degrees deg", "1", degree=1)
    add("rad rads radian radians", "1", rad=1)
    add("dollar dollars USD", "1", dollar=1)
    add("cent cents", "0.01", dollar=1)
    add("unit units", "1")
    return units


KNOWN = _known_units()
_NOT_UNITS = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|pi|half|halves|thirds?|quarters?|squared|cubed|factorial"
    r"|plus|minus|times|over|mod|base|sqrt|log|ln|sin|cos|tan|and|or|to|if|for|where|when|not|no|is|are|the other|either|both|only"
    r"|AM|PM|am|pm)\b"
)
_SYMBOLS = "|".join(sorted(map(re.escape, KNOWN), key=len, reverse=True))
_POWER = r"(?:\s*\^\s*(?:\{\s*[-+]?[0-9]\s*\}|[-+]?[0-9]))?"
_ATOM = r"(?:\\text\{[^{}]*[A-Za-z\u00c5][^{}]*\}|\\mu\s*(?:\\text\{[A-Za-z]+\}|[A-Za-z]+)|\\Omega|\\(?:degree|circ)(?![A-Za-z])\s*[CF]?)"
_JOIN = r"(?:\s|/|\\cdot(?![A-Za-z])|\*|\.|-)*"
_TEXT_UNIT = re.compile(
    rf"(?P<unit>(?:/|per)?\s*{_ATOM}{_POWER}(?:{_JOIN}(?:{_ATOM}|(?<=[/\s])(?:{_SYMBOLS})(?![A-Za-z])){_POWER})*)$"
)
_SYMBOL = rf"(?:{_SYMBOLS})(?![A-Za-z]){_POWER}"
_PLAIN_UNIT = re.compile(
    rf"(?<=[0-9)\}}\s])(?P<unit>\s*/?\s*(?:(?:sq(?:uare)?|cu(?:bic)?)\.?\s+)?{_SYMBOL}(?:(?:\s*/\s*|\s+|\s*\\cdot\s*|\*|\s+per\s+)\(?{_SYMBOL}\)?)*)$"
)
_WORD_UNIT = re.compile(
    r"(?<=[0-9}])\s+(?P<unit>[A-Za-z]{2,}(?:[ /-][A-Za-z]+)*)$|(?<=[0-9])\s*/\s*(?P<per>[A-Za-z]{2,})$"
)
_NUMBER_END = re.compile(
    r"[-+]?[0-9][0-9.,]*|.*[0-9.]\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^.*|\\frac\{[-+]?[0-9]+\}\{[0-9]+\}|[-+]?[0-9]+/[0-9]+"
)
_UNIT_QUOTIENT = re.compile(r"(?<=[0-9]) ?\\frac\{([A-Za-z]+)\}\{([A-Za-z]+)\}$")
_PERCENT = re.compile(r"(?:%|\\text\{\s*(?:%|percent|per cent)\s*\}|\s+per ?cent)\s*$")
_ENDS_OPEN = re.compile(
    r"(?:[-+*/^_=<>(\[{,;|]|\\(?:cdot|times|div|frac|sqrt|in|le|ge|ne|cup|cap|to|setminus|mid|overline))\s*$"
)


def split_measure(text: str) -> Measure:
    """Split the percent sign or the unit from the end of a normalized answer."""
    percent = False
    quotient = _UNIT_QUOTIENT.search(text)
    if quotient is not None and quotient[1] in KNOWN and quotient[2] in KNOWN:
        text = text[: quotient.start()] + f" {quotient[1]}/{quotient[2]}"
    stripped = _PERCENT.sub("", text).rstrip()
    if stripped != text and stripped:
        return Measure(stripped, None, True)
    for pattern in (_TEXT_UNIT, _PLAIN_UNIT, _WORD_UNIT):
        match = pattern.search(text)
        if match is None:
            continue
        core = text[: match.start()].rstrip()
        unit_text = match["unit"] if pattern is not _WORD_UNIT else match["unit"] or "per " + match["per"]
        if not core or _ENDS_OPEN.search(core) or _NOT_UNITS.search(unit_text):
            continue
        if pattern is _PLAIN_UNIT and not _may_follow(
            core, unit_text, text[match.start() - 1 : match.start() + 1]
        ):
            continue
        if pattern is _WORD_UNIT and not _NUMBER_END.fullmatch(core):
            continue
        return Measure(core, read_unit(unit_text), percent)
    return Measure(text, None, percent)


def same_unit(first: Unit | None, second: Unit | None) -> Fraction | None:
    """Return the factor that converts a value from the first unit to the second; None if the units differ."""
    if first is None or second is None or first == second:
        return Fraction(1)
    if not first.words or not second.words or first.dimension == () or second.dimension == ():
        return Fraction(1)
    if first.dimension is not None and second.dimension is not None:
        return first.factor / second.factor if first.dimension == second.dimension else None
    if first.words <= second.words or second.words <= first.words:
        return Fraction(1)
    return None


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit:
    """Parse a unit such as `\\text{ cm}^2`, `m/s` or `apples per day`."""
    text = re.sub(r"\\mu\s*", "\u03bc", text).replace("\\Omega", "\u03a9").replace("\\AA", "\u00c5")
    text = re.sub(r"\\(?:degree|circ)(?![A-Za-z])", " degree ", text)
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("\\cdot", " ").replace("*", " ").strip()
    words = frozenset(
        _singular(word)
        for word in re.findall(r"[A-Za-z\u00c5\u03bc\u03a9]+|[-+]?[0-9]+", plain.casefold())
        if word != "per"
    )
    dimension: dict[str, int] = {}
    factor = Fraction(1)
    sign, power_next = 1, 1
    for slash, word, power in re.findall(
        r"(/|\bper\b)?\s*([A-Za-z\u00c5\u03bc\u03a9]+)?\s*(?:\^\s*\{?\s*([-+]?[0-9])\s*\}?)?", plain
    ):
        if slash:
            sign = -1
        if not word:
            continue
        if word.casefold() in ("square", "sq", "cubic", "cu"):
            power_next = 2 if word.casefold().startswith("sq") else 3
            continue
        known = KNOWN.get(word) or KNOWN.get(word.casefold())
        if known is None:
            return Unit(words=words)
        exponent = sign * (int(power) if power else power_next)
        power_next = 1
        factor *= known[0] ** exponent
        for base, base_power in known[1].items():
            dimension[base] = dimension.get(base, 0) + base_power * exponent
    return Unit(factor, tuple(sorted((base, power) for base, power in dimension.items() if power)), words)


def _may_follow(core: str, unit: str, border: str) -> bool:
    """Return whether the letters after `core` are a unit and not a variable.

    They are in `5 m` and `5cm`; they are not in `5m` and `x cm`.
    """
    letters = re.findall(r"[A-Za-z]+", unit)
    if not re.search(r"[0-9)}]\s*$", core):
        return False
    glued = not unit.startswith((" ", "/")) and " " not in border
    return not (glued and len(letters[0]) == 1) and not (
        len(letters) == 1 and len(letters[0]) == 1 and not _NUMBER_END.fullmatch(core)
    )


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word

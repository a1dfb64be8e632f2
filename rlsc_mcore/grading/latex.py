"""Normalize LaTeX and plain text: rewrite different spellings of the same expression to one spelling."""

import re
from collections.abc import Callable

MAX_CHARACTERS = 20_000  # a longer text is no answer and is returned unchanged

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–‑－", "-"),
        **dict.fromkeys("\xa0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff"),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        "×": "\\times ",
        "✕": "\\times ",
        "·": "\\cdot ",
        "⋅": "\\cdot ",
        "∙": "\\cdot ",
        "∗": "*",
        "÷": "\\div ",
        "∕": "/",
        "⁄": "/",
        "∞": "\\infty ",
        "≤": "\\le ",
        "≥": "\\ge ",
        "≠": "\\ne ",
        "°": "\\degree ",
        "º": "\\degree ",
        "±": "\\pm ",
        "∓": "\\mp ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∈": "\\in ",
        "ℝ": "\\R ",
        "∅": "\\emptyset ",
        "∖": "\\setminus ",
        "≈": "\\approx ",
        "′": "'",
        "’": "'",
        "‘": "'",
        "…": "\\ldots ",
        "⋯": "\\ldots ",
        "“": '"',
        "”": '"',
        "，": ",",
        "％": "%",
        "＝": "=",
        "½": "\\frac{1}{2}",
        "⅓": "\\frac{1}{3}",
        "⅔": "\\frac{2}{3}",
        "¼": "\\frac{1}{4}",
        "¾": "\\frac{3}{4}",
        "π": "\\pi ",
        "α": "\\alpha ",
        "β": "\\beta ",
        "γ": "\\gamma ",
        "δ": "\\delta ",
        "θ": "\\theta ",
        "λ": "\\lambda ",
        "μ": "\\mu ",
        "µ": "\\mu ",
        "ρ": "\\rho ",
        "σ": "\\sigma ",
        "τ": "\\tau ",
        "φ": "\\phi ",
        "ω": "\\omega ",
        "ħ": "\\hbar ",
        "ε": "\\epsilon ",
        "η": "\\eta ",
        "κ": "\\kappa ",
        "ν": "\\nu ",
        "ξ": "\\xi ",
        "ψ": "\\psi ",
        "ζ": "\\zeta ",
        "χ": "\\chi ",
        "Δ": "\\Delta ",
        "Γ": "\\Gamma ",
        "Ω": "\\Omega ",
        "Σ": "\\Sigma ",
        "Φ": "\\Phi ",
        "Ψ": "\\Psi ",
        "Λ": "\\Lambda ",
        "⟨": "\\langle ",
        "⟩": "\\rangle ",
        "⌊": "\\lfloor ",
        "⌋": "\\rfloor ",
        "⌈": "\\lceil ",
        "⌉": "\\rceil ",
    }
)
_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"
_RAISED = re.compile(f"([{_SUPERSCRIPTS}]+)|([{_SUBSCRIPTS}]+)")
_LOWERED = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, "0123456789+-n0123456789")
_ROOT_SIGN = re.compile(r"√\s*(?=[({])|√\s*(?P<argument>[0-9]+(?:\.[0-9]+)?|[A-Za-z])")

_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")
_SIZING = re.compile(r"\\(?:left|right)\s*\.|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*")
_INVISIBLE = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|strut|mathstrut|mathbf|boldsymbol|bm|pmb|mathit|mathsf|mathtt"
    r"|mathnormal|mathop|ensuremath|underline|boxed|fbox|bf|it|sf|tt)(?![A-Za-z])\s*"
    r"|\\(?:text)?color(?:\s*\[[^\]]*\])?\s*\{[^{}]*\}|\\(?:hspace|vspace|phantom)\*?\s*\{[^{}]*\}"
)
_GROUP_COMMA = re.compile(
    r"(?<=[0-9])\s*(?:\{,\}|,\s*\\!|\\!\s*,|,\s*\\[,;:])\s*(?:\\!\s*)*(?=[0-9]{3}(?![0-9]))"
)
_GROUP_SPACE = re.compile(
    r"(?<=[0-9])\s*(?:\\[,;: !]|~|\{\s*\})\s*(?=[0-9]{3}(?![0-9]))|(?<=[0-9])'(?=[0-9]{3}(?![0-9]))"
)
_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|thinspace|enspace|medspace|space)(?![A-Za-z])")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt|up|md)?|mathrm|mbox|hbox|operatorname\*?|rm)(?![A-Za-z])\s*\{\s*([^{}]*?)\s*\}"
)
_FRACTION = re.compile(r"\\[dtc]?frac(?![A-Za-z])")
_FRACTION_ARGUMENTS = re.compile(r"\\frac\s*(\{[^{}]*\}|[0-9A-Za-z])\s*(\{[^{}]*\}|[0-9A-Za-z])")
_OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
_ROOT_ARGUMENT = re.compile(r"\\sqrt\s*([0-9]+|[A-Za-z])")
_DEGREE = re.compile(
    r"(?:\{\s*\})?\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))|\\degrees?(?![A-Za-z])"
)
_PRIME = re.compile(r"\^\s*\{?\s*((?:\\prime\s*)+)\}?")
_COMMANDS = {
    **dict.fromkeys(("leq", "leqslant", "leqq"), "le"),
    **dict.fromkeys(("geq", "geqslant", "geqq"), "ge"),
    "neq": "ne",
    "varnothing": "emptyset",
    "backslash": "setminus",
    "bigcup": "cup",
    "bigcap": "cap",
    "colon": ":",
    **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb", "dotsm", "hdots", "ldots"), "ldots"),
    "lbrace": "{",
    "rbrace": "}",
    "lbrack": "[",
    "rbrack": "]",
    "lparen": "(",
    "rparen": ")",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "lt": "<",
    "gt": ">",
    "lor": "\\text{or}",
    "vee": "\\text{or}",
    "land": "\\text{and}",
    "wedge": "\\text{and}",
    "pounds": "",
    "euro": "",
    "textdollar": "",
    "infinity": "infty",
    "Reals": "R",
    "reals": "R",
    "asin": "arcsin",
    "varepsilon": "epsilon",
    "varphi": "phi",
    "vartheta": "theta",
    "tg": "tan",
    "ctg": "cot",
    "arctg": "arctan",
    "approxeq": "approx",
    "sim": "approx",
    "simeq": "approx",
}
_PLAIN = {"{": "\\{", "}": "\\}"}  # replacements above that need a backslash
_COMMAND = re.compile(r"\\(" + "|".join(sorted(_COMMANDS, key=len, reverse=True)) + r")(?![A-Za-z])")
_BLACKBOARD = re.compile(r"\\mathbb\s*\{?\s*([A-Z])\s*\}?")
_WORD_COMMAND = re.compile(
    r"(?<![A-Za-z\\])(?:np\.|math\.|sp\.)?(arcsin|arccos|arctan|asin|acos|atan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt"
    r"|pi|infinity|infty|inf|theta|alpha|beta|gamma|lambda|omega|sigma)(?![A-Za-z])"
)
_WORD_COMMANDS = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "infinity": "infty", "inf": "infty"}
_ALL_REALS = re.compile(r"\\text\{\s*(?:the set of )?all reals?(?: numbers)?\s*\}|all reals?(?: numbers)?")
_UPRIGHT_LETTER = re.compile(r"\\text\{([ei])\}")
_TEXT_FUNCTION = re.compile(
    r"\\text\{(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|lg)\}"
)
_TEXT_NUMBER = re.compile(r"\\text\{([-+]?[0-9][0-9.,/ %]*|\([A-Za-z]\)|[\s.,;:]*)\}")
_TEXT_CONJUNCTION = re.compile(r"\\text\{,?\s*(and|or)\s*\}")
_TEXT_PART = re.compile(r"(\\text\{[^{}]*\})")
_COMPACT = re.compile(r"\s+(?![0-9A-Za-z])|(?<![0-9A-Za-z])\s+")
_UNIT_FRACTION = re.compile(
    r"\\frac\{(\\text\{[^{}]*\}(?: ?\^ ?\{?[0-9]\}?)?)\}\{(\\text\{[^{}]*\}(?: ?\^ ?\{?[0-9]\}?)?)\}"
)
_REVERSED_BRACKETS = re.compile(r"([\[\]])([^\[\](),]*,[^\[\](),]*)([\[\]])")
_OUTER_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def normalize(text: str) -> str:
    """Return the text without delimiters, sizes, fonts and spacing, with one spelling of every command.

    Text commands become `\\text{...}`, fractions `\\frac`, degrees `\\degree`, percent signs `%`. Currency
    signs and unambiguous thousands separators are removed.
    """
    if len(text) > MAX_CHARACTERS:
        return text
    text = text.strip()
    for opening, closing in _OUTER_DELIMITERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    if not text.isascii():
        text = _ROOT_SIGN.sub(
            lambda match: "\\sqrt" + (f"{{{match['argument']}}}" if match["argument"] else ""), text
        )
        text = _RAISED.sub(
            lambda match: ("^" if match[1] else "_") + "{" + match[0].translate(_LOWERED) + "}", text
        )
        text = re.sub("[€£¥₹]", "", text).translate(_CHARACTERS)
    text = (
        text.replace("*{10}", "*10")
        .replace("**", "^")
        .replace("<=", "\\le ")
        .replace(">=", "\\ge ")
        .replace("!=", "\\ne ")
    )
    text = text.replace("...", "\\ldots ")
    if "all real" in text:
        text = _ALL_REALS.sub(r"\\R ", text)
    if any(character in text for character in "\\${~'"):
        text = _normalize_commands(text)
    text = _outside_text(
        text, _WORD_COMMAND, lambda match: "\\" + _WORD_COMMANDS.get(match[1], match[1]) + " "
    )
    text = re.sub(r"\\sqrt (?=[({\[])", r"\\sqrt", text)
    if "[" in text and "]" in text:  # ]1,2[ is the open interval (1,2)
        text = _REVERSED_BRACKETS.sub(_in_round_brackets, text)
    text = " ".join(text.split()).strip(" ;").rstrip(". ,:\\")
    return unwrap(text)


def compact(text: str) -> str:
    """Return the text without white space, except between two words or numbers."""
    return _COMPACT.sub("", text)


def unwrap(text: str) -> str:
    """Remove braces around the whole text."""
    while len(text) > 2 and text[0] == "{" and text[-1] == "}" and matching(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def plain_text(text: str) -> str:
    """Return the text with each `\\text{...}` replaced by its content."""
    if "\\text" not in text:
        return text
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).split()).rstrip(".")


def matching(text: str, start: int) -> int:
    """Return the position of the bracket that closes the one at `start`, or -1; the kinds may differ."""
    depth = 0
    for position in range(start, len(text)):
        character = text[position]
        if character in "({[":
            depth += 1
        elif character in ")}]":
            depth -= 1
            if depth == 0:
                return position
    return -1


def _normalize_commands(text: str) -> str:
    text = _GROUP_SPACE.sub("", _GROUP_COMMA.sub("", text)).replace("\\!", "").replace("{,}", ",")
    text = _SIZING.sub("", text)
    text = _SPACE.sub(" ", text).replace("\\$", "").replace("$", "").replace("\\%", "%").replace("\\&", "&")
    text = _DELIMITER.sub("", text)
    text = _INVISIBLE.sub("", text)
    text = _TEXT.sub(r"\\text{\1}", text)
    text = _TEXT_NUMBER.sub(r"\1", _TEXT_CONJUNCTION.sub(r" \\text{\1} ", text))
    text = _TEXT_FUNCTION.sub(r"\\\1 ", _UPRIGHT_LETTER.sub(r"\1", text))
    text = _DEGREE.sub(r" \\degree ", text)
    text = _PRIME.sub(lambda match: "'" * match[1].count("\\prime"), text)
    text = _BLACKBOARD.sub(r"\\\1 ", text)
    text = _COMMAND.sub(_replace_command, text)
    text = _FRACTION.sub(r"\\frac", text)
    for _ in range(3):
        text = _OVER.sub(lambda match: f"\\frac{{{match[1].strip()}}}{{{match[2].strip()}}}", text)
        text = _FRACTION_ARGUMENTS.sub(lambda match: "\\frac" + _braced(match[1]) + _braced(match[2]), text)
    text = _UNIT_FRACTION.sub(r"\1/\2", text)
    return _ROOT_ARGUMENT.sub(r"\\sqrt{\1}", text)


def _replace_command(match: re.Match[str]) -> str:
    replacement = _COMMANDS[match[1]]
    if replacement in _PLAIN:
        return _PLAIN[replacement]
    return replacement if not replacement.isalpha() else f"\\{replacement} "


def _in_round_brackets(match: re.Match[str]) -> str:
    return {"]": "(", "[": "["}[match[1]] + match[2] + {"[": ")", "]": "]"}[match[3]]


def _braced(argument: str) -> str:
    return "{" + argument.strip("{}").strip() + "}"


def _outside_text(text: str, pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str]) -> str:
    if "\\text" not in text:
        return pattern.sub(replace, text)
    return "".join(
        part if part.startswith("\\text{") else pattern.sub(replace, part) for part in _TEXT_PART.split(text)
    )

r"""Convert model output to safe HTML: LaTeX becomes MathML, other text is escaped.

The converter's output is not trusted. Only known MathML elements and attributes are written, and every text
is escaped here. A formula that cannot be converted, or is too long, is shown as LaTeX source.
"""

import re
from html import escape, unescape
from typing import Any

LONGEST_FORMULA = 1500
DEEPEST_FORMULA = 60

_FORMULA = re.compile(
    r"\$\$(?P<display>.+?)\$\$|(?<!\\)\$(?P<inline>[^$\n]{1,1500}?)(?<!\\)\$|\\\((?P<paren>.+?)\\\)|\\\[(?P<bracket>.+?)\\\]",
    re.DOTALL,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ELEMENTS = frozenset(
    """math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd mstyle mpadded
    mphantom""".split()  # noqa: SIM905
)
_ATTRIBUTES = frozenset(
    """stretchy fence separator accent accentunder linethickness columnalign rowalign mathvariant lspace rspace width minsize
    maxsize""".split()  # noqa: SIM905
)
_SAFE_VALUE = re.compile(r"[A-Za-z0-9.%+ -]{0,40}")


def render_text(text: str) -> str:
    """Return safe HTML: formulas in $, $$, \\( \\) or \\[ \\] and every \\boxed{...} as MathML, the rest
    escaped."""
    parts = []
    position = 0
    for match in _FORMULA.finditer(text):
        parts.append(_render_plain(text[position : match.start()]))
        formula = next(value for value in match.groupdict().values() if value is not None)
        is_display = match["display"] is not None or match["bracket"] is not None
        parts.append(_formula(formula, match[0], display=is_display))
        position = match.end()
    parts.append(_render_plain(text[position:]))
    return "".join(parts)


def _render_plain(text: str) -> str:
    """Escape text outside formulas and render its boxes, which small models write without math delimiters."""
    parts = []
    position = 0
    for match in _BOX.finditer(text):
        if match.start() < position:
            continue
        stop = _closing_brace(text, match.end())
        if stop is None:
            continue
        parts.append(escape(text[position : match.start()]))
        parts.append(
            f'<span class="boxed">{_formula(text[match.end() : stop], text[match.start() : stop + 1], display=False)}</span>'
        )
        position = stop + 1
    parts.append(escape(text[position:]))
    return "".join(parts)


def _formula(tex: str, source: str, *, display: bool) -> str:
    markup = to_mathml(tex)
    if markup is None:
        return f'<code class="tex">{escape(source)}</code>'
    kind = ' display="block"' if display else ""
    return f'<span class="formula"><math{kind}>{markup}</math><code class="tex source">{escape(source)}</code></span>'


def to_mathml(tex: str) -> str | None:
    """Return the content of <math> for a formula; None if it is too long, too deep or cannot be converted."""
    if len(tex) > LONGEST_FORMULA or _depth(tex) > DEEPEST_FORMULA:
        return None
    from latex2mathml.converter import convert_to_element

    try:
        return "".join(_safe(child) for child in convert_to_element(tex))
    except Exception:  # models write invalid LaTeX; the page shows the source
        return None


def _safe(node: Any) -> str:
    content = escape(unescape(node.text or ""), quote=False) + "".join(_safe(child) for child in node)
    tail = escape(unescape(node.tail or ""), quote=False)
    if node.tag == "menclose":  # browsers do not render menclose; use a row with a CSS frame
        return f'<mrow class="boxed">{content}</mrow>{tail}'
    if node.tag not in _ELEMENTS:
        return f"<mrow>{content}</mrow>{tail}"
    kept = [
        (name, value)
        for name, value in node.attrib.items()
        if name in _ATTRIBUTES and _SAFE_VALUE.fullmatch(value)
    ]
    return f"<{node.tag}{''.join(f' {name}={chr(34)}{escape(value)}{chr(34)}' for name, value in kept)}>{content}</{node.tag}>{tail}"


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for position in range(start, min(len(text), start + LONGEST_FORMULA)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return position
    return None


def _depth(tex: str) -> int:
    depth = deepest = 0
    for character in tex:
        depth += (character in "{[(") - (character in "}])")
        deepest = max(deepest, depth)
    return deepest + tex.count("\\left") + tex.count("\\begin")

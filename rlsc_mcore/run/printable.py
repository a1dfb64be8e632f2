"""Escape control characters and hide secrets in text before it is printed. Imports no torch."""

import re
import unicodedata

# Names of keys with secret values, as in NAME=value and "name": "value"; and passwords in URLs.
_SECRET_NAME = r"(?:[A-Za-z0-9_.\-]*[_.\-](?:JWT|KEY|SECRET|TOKEN|PASS|PASSWORD|PASSWD|CREDENTIALS?)|API_?KEY|SECRET|PASSWORD|PASSWD)"
_ASSIGNMENT = re.compile(rf"(?i)\b({_SECRET_NAME})((?:\"|')?\s*[=:]\s*(?:\"|')?)([^\s\"',;]+)")
_ADDRESS = re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://)([^/\s@:]+):([^/\s@]+)@")
_WELL_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|eyJ[\w\-]+\.[\w\-]+\.[\w\-]+)"
)
HIDDEN = "***"


def printable(text: object) -> str:
    r"""Return `text` on one line with control characters as escapes (`\x1b`); other text is unchanged.

    Escaped are C0 and C1 controls, DEL, characters that change the writing direction, and lone surrogates.
    """
    return "".join(_escape(character) for character in " ".join(str(text).splitlines()))


def without_secrets(text: str) -> str:
    """Return `text` with the values of keys, tokens and passwords replaced by `***`."""
    text = _ADDRESS.sub(rf"\1\2:{HIDDEN}@", text)
    text = _ASSIGNMENT.sub(rf"\1\2{HIDDEN}", text)
    return _WELL_KNOWN.sub(HIDDEN, text)


def _escape(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Cc", "Cs", "Zl", "Zp") or (
        category == "Cf" and unicodedata.bidirectional(character) != "BN"
    ):
        return (
            character.encode("unicode_escape").decode("ascii")
            if category != "Cs"
            else f"\\u{ord(character):04x}"
        )
    return character

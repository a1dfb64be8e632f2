"""Find the tokens of a response that hold the content of its last box."""

from collections.abc import Callable, Sequence

from rlsc_mcore.grading.extraction import find_boxes

_FIRST_WINDOW = 32  # tokens; answers end in their box


def box_tokens(response_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> range:
    """Return the positions of the tokens that hold any character of the last box's content; empty without a
    box.

    `decode` turns token ids into the text that is graded. Only ends of the response are decoded: windows that
    grow until they hold the whole box, then halves of that window.
    """
    size = _FIRST_WINDOW
    while True:
        first = max(0, len(response_ids) - size)
        text = decode(response_ids[first:])
        boxes = find_boxes(text)
        if boxes or not first:
            break
        size *= 4
    if not boxes:
        return range(0)
    position, content = boxes[-1]
    begin = text.index(content, position)
    end = begin + len(content)

    def characters_before(token: int) -> int:
        # Tokens may split a character: the bytes of its end alone decode to replacement characters.
        return len(text) - len(decode(response_ids[token:]).lstrip("\ufffd"))

    start = _first(first, len(response_ids), lambda token: characters_before(token + 1) > begin)
    return range(start, _first(start, len(response_ids), lambda token: characters_before(token) >= end))


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the first of the positions [low, high) from which on a monotonic property holds; `high` if
    none."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low

"""Draw the data flow of a step as SVG, for light and for dark pages."""

import itertools

BOXES = (  # title, what happens there, module
    ("questions", "prompts from a template", "data/questions.py"),
    ("rollouts", "G answers each, vLLM", "rollout/sampling.py"),
    ("packed batches", "merged, balanced over ranks", "data/packing.py"),
    ("log-probs", "Megatron, fused head", "model/build.py, ops/"),
    ("weights", "confidence + alpha", "algorithm/rlsc.py"),
    ("update", "backward, clip, AdamW", "training/step.py"),
    ("hot swap", "engine takes new weights", "weight_sync/swap.py"),
)
THEMES = {
    "light": {
        "text": "#1f2328",
        "dim": "#59636e",
        "line": "#8c959f",
        "box": "#f6f8fa",
        "engine": "#ddf4ff",
        "trainer": "#dafbe1",
    },
    "dark": {
        "text": "#f0f6fc",
        "dim": "#9198a1",
        "line": "#656c76",
        "box": "#151b23",
        "engine": "#0c2d6b",
        "trainer": "#033a16",
    },
}
ENGINE, TRAINER = ("rollouts", "hot swap"), ("log-probs", "weights", "update")
WIDTH, BOX_WIDTH, BOX_HEIGHT, GAP, TOP = 1000, 208, 74, 40, 14


def data_flow(theme: str) -> str:
    """Return the picture for `light` or `dark`."""
    colour = THEMES[theme]
    places = [(20 + i * (BOX_WIDTH + GAP), TOP) for i in range(4)]
    places += [(20 + i * (BOX_WIDTH + GAP), TOP + BOX_HEIGHT + 66) for i in (3, 2, 1)]
    height = places[-1][1] + BOX_HEIGHT + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif">',
        "<title>Data flow of a step: questions, rollouts, packed batches, log-probs, weights, update, hot "
        "swap, rollouts</title>",
        f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{colour["line"]}"/></marker></defs>',
    ]
    for (title, text, module), (x, y) in zip(BOXES, places, strict=True):
        fill = (
            colour["engine"] if title in ENGINE else colour["trainer"] if title in TRAINER else colour["box"]
        )
        middle = x + BOX_WIDTH / 2
        parts += [
            f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" fill="{fill}" stroke="{colour["line"]}"/>',
            _text(middle, y + 24, 16, colour["text"], title, "bold"),
            _text(middle, y + 43, 13, colour["text"], text),
            _text(middle, y + 62, 12, colour["dim"], module),
        ]
    half = BOX_HEIGHT / 2
    for (x1, y1), (x2, y2) in itertools.pairwise(places):
        if y1 == y2:
            start, end = (x1 + BOX_WIDTH, x2) if x2 > x1 else (x1, x2 + BOX_WIDTH)
            parts.append(_arrow(start, y1 + half, end, y2 + half, colour["line"]))
        else:
            parts.append(_arrow(x1 + BOX_WIDTH / 2, y1 + BOX_HEIGHT, x2 + BOX_WIDTH / 2, y2, colour["line"]))
    x, y = places[-1]
    back = x + BOX_WIDTH / 2
    parts.append(_arrow(back, y, back, TOP + BOX_HEIGHT, colour["line"]))
    parts.append(_text(back + 10, y - 28, 13, colour["dim"], "next step", anchor="start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(
    x: float, y: float, size: int, fill: str, text: str, weight: str = "normal", anchor: str = "middle"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{text}</text>'


def _arrow(x1: float, y1: float, x2: float, y2: float, stroke: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}" stroke-width="2" marker-end="url(#head)"/>'

"""The picture of the README: a sharded base below, replicated trainables above, one reduction per optimizer step.

python docs/pictures/overview.py        writes docs/pictures/overview.svg
"""

from pathlib import Path

RANKS = 4
WIDTH, GAP, LEFT = 190, 20, 30
BASE, TRAIN, INK, SOFT, PAPER = "#2f6f9f", "#c8642b", "#1c2733", "#5b6b7a", "#ffffff"
FONT = 'font-family="Inter, Helvetica, Arial, sans-serif"'


def box(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0) -> str:
    """A filled rectangle with round corners."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" fill-opacity="{opacity}"/>'


def text(
    x: float, y: float, words: str, size: int = 14, fill: str = INK, anchor: str = "middle", bold: bool = False
) -> str:
    """One line of text."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight} {FONT}>{words}</text>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    """A line with a head at both ends."""
    ends = f'marker-start="url(#{color[1:]})" marker-end="url(#{color[1:]})"'
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="3" {ends}/>'


def head(color: str) -> str:
    """The arrow head of a color."""
    shape = f'<path d="M0,0 L8,4 L0,8 z" fill="{color}"/>'
    return (
        f'<marker id="{color[1:]}" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto-start-reverse" '
        f'markerUnits="userSpaceOnUse">{shape}</marker>'
    )


def picture() -> str:
    """The whole drawing as SVG."""
    whole = RANKS * WIDTH + (RANKS - 1) * GAP
    total, middle = whole + 2 * LEFT, LEFT + whole / 2
    parts = [box(0, 0, total, 400, PAPER)]
    parts.append(
        text(middle, 32, "Trainables: replicated on every rank, one flat float32 buffer", 16, TRAIN, bold=True)
    )
    for rank in range(RANKS):
        x = LEFT + rank * (WIDTH + GAP)
        center = x + WIDTH / 2
        parts.append(box(x, 48, WIDTH, 320, SOFT, 0.08))
        parts += [box(x + 12, 62, WIDTH - 24, 46, TRAIN, 0.92), text(center, 90, "adapters", 15, PAPER, bold=True)]
        if rank:
            parts.append(arrow(x - GAP - 10, 85, x + 10, 85, TRAIN))
        # The base: each rank holds one of the quarters and sees the others only while a layer is computed.
        for piece in range(RANKS):
            own = piece == rank
            y = 196 + piece * 34
            parts.append(box(x + 12, y, WIDTH - 24, 28, BASE, 0.95 if own else 0.12))
            if own:
                parts.append(text(center, y + 19, f"1/{RANKS} of the base", 13, PAPER, bold=True))
        parts.append(text(center, 360, f"rank {rank}", 13, SOFT))
    parts.append(text(middle, 132, "one reduction of gradients per optimizer step, nothing per micro-batch", 14, TRAIN))
    parts.append(text(middle, 180, "Base: frozen, 4 bits per weight, sharded as packed bytes", 16, BASE, bold=True))
    parts.append(text(middle, 388, "layer by layer the missing parts are gathered, used and dropped", 14, BASE))
    markers = f"<defs>{head(TRAIN)}{head(BASE)}</defs>"
    size = f'width="{total}" height="400" viewBox="0 0 {total} 400"'
    label = "A sharded frozen base below, replicated adapters above, one reduction of their gradients per step"
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">\n{markers}\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    (Path(__file__).parent / "overview.svg").write_text(picture(), encoding="utf-8")

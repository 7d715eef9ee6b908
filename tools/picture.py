"""The picture at the top of README.md: the answers to one question as LEAF and GRPO see them.

    python -m tools.picture RUN --step 100 --row 8

writes picture-light.svg and picture-dark.svg beside this file, or into --out, from what a run kept of
a validation row in samples.jsonl. Credit is raw, as on the page of tools.report: before LEAF's z-score, before
GRPO's division by the std. Full colour is the largest of both.
"""

import argparse
from html import escape
from pathlib import Path

from tools.report import configuration, drawn
from upkeep.errors import UserError, command, errors_of_writing
from upkeep.files import read_lines

SIZE = 27  # of the letters: 12 px where a phone shows the picture 358 px wide
LETTER = 0.57 * SIZE  # wider than a sans-serif font's letters on average: words fit their cells
LINE, BESIDE, CUT = 50, 18, 18  # a line; what a cell has beside its word; the band of a cut
THEMES = {  # paper, ink, quiet ink, cell, praise, blame: the page's colours
    "light": ("#ffffff", "#16181d", "#5a6270", "#eceef2", "#4696e6", "#f59628"),
    "dark": ("#0d1117", "#eceef2", "#a3abb8", "#262a31", "#2369be", "#a55200"),
}


def picture(tree: dict, colours: tuple) -> str:
    """The SVG of a row, as tools.report.drawn describes it, less its last token, EOS."""
    paper, ink, quiet, cell, praise, blame = colours
    lines, cuts = tree["lines"], tree["boundaries"]
    words = [[piece.strip() for piece in line["pieces"][:-1]] for line in lines]
    columns = range(max(map(len, words)))
    left = [0.0]  # of each column, in front of its cut; and where the last one ends
    for t in columns:
        letters = max(len(pieces[t]) for pieces in words if t < len(pieces))
        left.append(left[-1] + CUT * (t in cuts) + letters * LETTER + BESIDE)
    width = left[-1] + 8 * LETTER
    of_grpo = []  # a block for each line
    for i, (line, pieces) in enumerate(zip(lines, words)):
        block = {"line": i, "lines": 1, "start": 0, "end": len(pieces)}
        of_grpo.append(block | {"raw": line["reward"] - tree["root"]})
    largest = max(abs(block["raw"]) for block in tree["blocks"] + of_grpo) or 1.0
    shapes = []

    def text(x, y, words, more=""):
        shapes.append(f'<text x="{x:.0f}" y="{y + 34:.0f}" {more}>{escape(words)}</text>')

    def box(x, y, width, height, share):
        place = f'x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}"'
        colour = praise if share > 0 else blame
        shapes.append(f'<rect {place} fill="{cell}"/>')
        shapes.append(f'<rect {place} fill="{colour}" fill-opacity="{abs(share):.3f}"/>')

    text(170, 0, "blame", f'fill="{quiet}"')
    for n in range(-4, 5):
        box(262 + 24 * (n + 4), 13, 24, 24, n / 4)
    text(490, 0, "praise", f'fill="{quiet}"')
    text(width, 0, "reward", f'fill="{quiet}" text-anchor="end"')
    y = 0
    for rule, blocks in (("LEAF", tree["blocks"]), ("GRPO", of_grpo)):
        text(0, y, rule, 'font-weight="700"')
        y += LINE
        for block in blocks:
            pieces = words[block["line"]]
            start, end = block["start"], min(block["end"], len(pieces))
            if start == end:  # the end of the answer alone
                continue
            top = y + LINE * block["line"]
            height = LINE * block["lines"]
            x = left[start] + CUT * (start in cuts)
            box(x, top, left[end] - x - 2, height - 5, block["raw"] / largest)
            for t in range(start, end) if rule == "LEAF" else ():
                x = left[t] + CUT * (t in cuts) + BESIDE / 2
                text(x, top + (height - LINE) / 2, pieces[t])
        for t in cuts if rule == "LEAF" else ():
            place = f"M{left[t] + CUT / 2 - 1:.0f} {y}v{LINE * len(lines) - 5}"
            dashes = f'stroke="{quiet}" stroke-width="3" stroke-dasharray="7 5"'
            shapes.append(f'<path d="{place}" {dashes}/>')
        for i, line in enumerate(lines):
            many = len(line["members"])
            times = f"{many} × " if many > 1 else ""
            text(width, y + LINE * i, f"{times}{line['reward']:.2f}", 'text-anchor="end"')
        y += LINE * len(lines) + 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {width + 16:.0f} {y}" '
        f'font-family="system-ui, sans-serif" font-size="{SIZE}" fill="{ink}">'
    )
    background = f'<rect x="-8" width="{width + 16:.0f}" height="{y}" fill="{paper}"/>'
    return "\n".join((head, background, *shapes, "</svg>\n"))


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m tools.picture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", type=int, default=0, help="of a validation (default: 0)")
    parser.add_argument("--row", type=int, default=0, help="of those kept (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for them")
    args = parser.parse_args(argv)
    cfg = configuration(args.run, {})
    kept = {line["step"]: line["rows"] for line in read_lines(args.run / "samples.jsonl")}
    if args.step not in kept or not 0 <= args.row < len(kept[args.step]):
        raise UserError(f"{args.run} kept no row {args.row} at step {args.step}: {list(kept)}")
    tree = drawn(cfg, kept[args.step][args.row], "")
    for name, colours in THEMES.items():
        out = args.out / f"picture-{name}.svg"
        with errors_of_writing(out):
            out.write_text(picture(tree, colours), encoding="utf-8")
        print(out)


if __name__ == "__main__":
    command(main)

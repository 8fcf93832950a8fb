"""Draws or previews `shapes` sets.

python -m dyhead.data.shapes shapes_train shapes_val              draws sets now, not on first use
python -m dyhead.data.shapes shapes_hard_val --preview out.png    writes a sheet of their first images, with boxes
"""

import argparse

from PIL import Image, ImageDraw

from dyhead.data.catalog import datasets_root
from dyhead.data.shapes.cache import prepare
from dyhead.data.shapes.drawing import draw
from dyhead.data.shapes.specification import SPECS


def contact_sheet(names: list[str], columns: int = 4, cell: int = 240) -> Image.Image:
    """The first images of some sets with their boxes: one set per row, each image within `cell` pixels."""
    sheet = Image.new("RGB", (columns * cell, len(names) * cell), "white")
    for row, spec in enumerate(SPECS[name] for name in names):
        for column in range(columns):
            image, annotations = draw(spec, column)
            scale = (cell - 4) / max(image.shape[:2])
            small = Image.fromarray(image).resize([round(n * scale) for n in image.shape[1::-1]])
            pen = ImageDraw.Draw(small)
            for a in annotations:
                x, y, width, height = (n * scale for n in a["bbox"])
                pen.rectangle((x - 1, y - 1, x + width, y + height), outline="white")
                name = spec.classes[a["category_id"] - 1]
                if pen.textlength(name) + 4 < width:  # in a smaller box it would hide the object
                    pen.text((x + 3, y + 1), name, "white", stroke_width=1, stroke_fill="black")
            sheet.paste(small, (column * cell + 2, row * cell + 2))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(prog="python -m dyhead.data.shapes", description="Draws the shapes datasets.")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=SPECS, help=", ".join(SPECS))
    parser.add_argument("--root", help="datasets folder (default: $DETECTRON2_DATASETS, or datasets)")
    parser.add_argument("--preview", metavar="FILE", help="only write a sheet of their first images")
    options = parser.parse_args(arguments)
    if options.preview:
        contact_sheet(options.names).save(options.preview)
        print(options.preview)
        return
    for name in options.names:
        print(*prepare(name, options.root or datasets_root()))


if __name__ == "__main__":
    main()

"""Draw the fixed prompts, unselected, as one sheet: ``python benchmarks/contact_sheet.py OUT.jpg``.

Picture i has seed i; nothing is drawn twice or left out. Needs the runtime only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from PIL import Image

from litapp import TextToImage
from litapp.images import contact_sheet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def fixed_prompts() -> list[str]:
    """The sheet's 64 prompts in order."""
    groups = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text())
    return [prompt for group in groups.values() for prompt in group]


def main() -> None:
    """Draw, report the seconds per picture and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the sheet, a JPEG")
    parser.add_argument("--model", default="lit-scenes-1k")
    parser.add_argument("--res", type=int, default=1024)
    parser.add_argument("--cell", type=int, default=384, help="pixels per picture on the sheet")
    parser.add_argument("--pictures", type=Path, help="also save every picture here, full size")
    arguments = parser.parse_args()
    prompts = fixed_prompts()
    model = TextToImage.load(arguments.model)
    images: list[Image.Image] = []
    seconds: list[float] = []
    for seed, prompt in enumerate(prompts):
        picture = model(prompt, width=arguments.res, height=arguments.res, seed=seed)
        images.append(picture.image)
        seconds.append(sum(picture.seconds.values()))
        print(f"{seed:2d}  {seconds[-1]:5.2f} s  {prompt}", flush=True)
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            picture.save(arguments.pictures / f"{seed:02d}.png")
    contact_sheet(images, columns=8, cell=arguments.cell).save(arguments.output, quality=88)
    print(f"{len(images)} pictures, median {statistics.median(seconds):.2f} s each")


if __name__ == "__main__":
    main()

"""Many guided steps above, the model's own few below: ``python benchmarks/few_steps.py OUT.jpg``.

Every eighth of the contact sheet's prompts, with its seed; nothing is drawn twice or left out.
Needs the runtime only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from contact_sheet import fixed_prompts

from litapp import TextToImage
from litapp.images import contact_sheet


def main() -> None:
    """Draw both rows and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the sheet, a JPEG")
    parser.add_argument("--model", default="lit-scenes-1k")
    parser.add_argument("--steps", type=int, default=20, help="of the row above")
    parser.add_argument("--guidance", type=float, default=1.5, help="of the row above")
    parser.add_argument("--cell", type=int, default=256, help="pixels per picture on the sheet")
    arguments = parser.parse_args()
    model = TextToImage.load(arguments.model)
    chosen = list(enumerate(fixed_prompts()))[::8]
    many = {"steps": arguments.steps, "guidance": arguments.guidance}
    images = [
        model(prompt, seed=seed, **options).image
        for options in (many, {})
        for seed, prompt in chosen
    ]
    contact_sheet(images, columns=len(chosen), cell=arguments.cell).save(
        arguments.output, quality=88
    )
    print("\n".join(f"{seed:2d}  {prompt}" for seed, prompt in chosen))


if __name__ == "__main__":
    main()

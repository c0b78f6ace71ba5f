"""Sample grids for fixed prompts while a transformer trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from tokenizers import Tokenizer
from torch import Tensor, nn

from litapp.images import contact_sheet, save_png, to_image
from litapp.models.text_encoder import TextEncoder, encode_texts
from litapp.training.codec import KLCodec, SceneCodec

# The app's samplers in the library that training has.
SOLVERS = {"dpmsolver++": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}


@dataclass(frozen=True)
class SampleConfig:
    """The ``[samples]`` table: what to draw while training."""

    prompts: list[str] = field(default_factory=list)
    steps: int = 20
    guidance: float = 3.0
    solver: str = "dpmsolver++"
    seed: int = 0
    thumbnail: int = 256

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}: use one of {', '.join(SOLVERS)}")


class Sampler:
    """Draws the fixed prompts with classifier-free guidance (arXiv 2207.12598)."""

    def __init__(
        self,
        config: SampleConfig,
        scheduler: DDPMScheduler,
        codec: SceneCodec | KLCodec,
        tokenizer: Tokenizer,
        encoder: TextEncoder,
        text_length: int,
    ) -> None:
        self.config, self.codec = config, codec
        self.scheduler = SOLVERS[config.solver].from_config(
            scheduler.config, variance_type=None, timestep_spacing="trailing"
        )
        self.texts = encode_texts(
            tokenizer, encoder, [*config.prompts, *[""] * len(config.prompts)], text_length
        )

    @torch.no_grad()
    def latents(self, model: nn.Module) -> Tensor:
        """(P, C, h, w) normalised latents, one per prompt, at the model's own size."""
        count, side = len(self.config.prompts), model.config.sample_size
        generator = torch.Generator().manual_seed(self.config.seed)
        x = torch.randn(count, model.config.in_channels, side, side, generator=generator)
        x = x.to(model.device)
        texts = {name: value.to(x.device) for name, value in self.texts.items()}
        self.scheduler.set_timesteps(self.config.steps)
        for t in self.scheduler.timesteps:
            out = model(
                torch.cat([x, x]),
                timestep=t.to(x.device).expand(2 * count),
                encoder_hidden_states=texts["states"],
                encoder_attention_mask=texts["mask"],
                pooled_projections=texts["pooled"],
                return_dict=False,
            )[0]
            wanted, empty = out[:, : x.shape[1]].chunk(2)
            v = empty + self.config.guidance * (wanted - empty)
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        return x.cpu()

    @torch.no_grad()
    def grid(self, model: nn.Module, path: Path) -> None:
        """Save all prompts' pictures as one sheet; nothing to do without prompts."""
        if not self.config.prompts:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        images = []
        for latents in self.latents(model).split(1):
            pixels = self.codec.decode(latents)[0]
            images.append(to_image(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())))
        save_png(contact_sheet(images, columns=8, cell=self.config.thumbnail), path)

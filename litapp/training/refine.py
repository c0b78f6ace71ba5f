"""``litapp train-vae`` with a ``[predictions]`` table: the decoder learns to draw from predictions.

A transformer's latents are not an encoder's: what it is unsure of is averaged, and tokens do not
quite meet at their edges. Here the folding's decoder sees such latents beside the cells that they
stand for. All else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from litapp.errors import LitappError
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import encode_texts, load_text_encoder
from litapp.training.autoencoder import save_model
from litapp.training.codec import fold_cells
from litapp.training.fold import cell_pool
from litapp.training.loop import LoopConfig, train
from litapp.training.losses import Diffusion
from litapp.training.recipe import from_table


@dataclass(frozen=True)
class PredictionConfig:
    """The ``[predictions]`` table.

    Attributes:
        model: a training run's ``model`` folder with ``transformer`` and ``scheduler``.
        share: of the latents that are predicted; the others are the encoder's own.
        first: range of the timesteps to which true latents are noised before prediction.
        last: timestep of the prediction that the decoder sees, as the app's sampler ends.
        steps: DDIM steps from one to the other, two at least.
    """

    model: str
    share: float = 0.75
    first: tuple[int, int] = (150, 700)
    last: int = 49
    steps: int = 4
    text_length: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.last < self.first[0] < self.first[1]:
            raise ValueError("last and first must rise: last < first[0] < first[1]")
        if self.steps < 2:
            raise ValueError("steps must be 2 at least")


class Predictor:
    """Latents as a transformer draws them, for scenes whose true latents are known."""

    def __init__(self, config: PredictionConfig) -> None:
        folder = Path(config.model)
        try:
            self.transformer = LiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
            self.diffusion = Diffusion(DDPMScheduler.from_pretrained(folder / "scheduler"))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise LitappError(f"[predictions]: cannot load {folder}: {reason}") from error
        self.config = config
        self.tokenizer, self.encoder = load_text_encoder()

    @torch.no_grad()
    def __call__(self, x0: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        """Noise normalised latents and take the noise away again, in DDIM steps (arXiv 2010.02502).

        Args:
            x0: (B, C, h, w).

        Returns:
            (B, C, h, w), of which ``share`` of the samples are predicted and the others ``x0``.
        """
        text = encode_texts(self.tokenizer, self.encoder, captions, self.config.text_length)
        first = torch.randint(*self.config.first, (len(x0),), generator=generator)
        noise, predicted = torch.randn(x0.shape, generator=generator), x0
        for left in range(self.config.steps - 1, -1, -1):
            t = self.config.last + (first - self.config.last) * left // (self.config.steps - 1)
            x = self.diffusion.add_noise(predicted, noise, t)
            out = self.transformer(
                x,
                timestep=t,
                encoder_hidden_states=text["states"],
                encoder_attention_mask=text["mask"],
                pooled_projections=text["pooled"],
                return_dict=False,
            )[0]
            prediction = out.float().chunk(2, dim=1)[0]
            predicted = self.diffusion.predicted_start(prediction, x, t)
            noise = self.diffusion.predicted_noise(prediction, x, t)
        chosen = torch.rand(len(x0), 1, 1, 1, generator=generator) < self.config.share
        return torch.where(chosen, predicted, x0)


class _Unfold(nn.Module):
    """The folding's decoder alone, on normalised latents."""

    def __init__(self, autoencoder: SceneAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.folding.decode(self.autoencoder.denormalise(latents))


def main(tables: dict, autoencoder: SceneAutoencoder, output: Path, resume: bool) -> None:
    """Run a recipe with tables ``[art] [[data]] [predictions] [loop]``; writes ``output/model``.

    Raises:
        LitappError: an autoencoder without folding, or a folder that cannot be used.
    """
    config = from_table(PredictionConfig, tables["predictions"], "predictions")
    loop = from_table(LoopConfig, tables["loop"], "loop")
    if autoencoder.folding is None:
        raise LitappError(
            "[predictions] needs an autoencoder that folds: run a [fold] recipe first"
        )
    predictor = Predictor(config)
    pool = cell_pool(tables, autoencoder)
    autoencoder.requires_grad_(False)
    autoencoder.folding.requires_grad_(True).encoder.requires_grad_(False)

    def batches(step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(loop.seed * 1_000_003 + step)
            group, chosen = pool.choose(loop.batch_size, generator)
            yield pool.latents[group][chosen].float(), torch.tensor(group), chosen
            step += 1

    def loss_function(model: nn.Module, batch: tuple, generator: torch.Generator):
        cells, group, chosen = batch  # what tensors tell can be shared out to processes
        captions = [pool.captions[group][index] for index in chosen.tolist()]
        latents = predictor(fold_cells(autoencoder, cells), captions, generator)
        loss = F.mse_loss(model(latents), cells)
        return loss, {"share": loss.item() / cells.var().item()}

    train(_Unfold(autoencoder), loss_function, batches, loop, output, resume)
    save_model(autoencoder, output)

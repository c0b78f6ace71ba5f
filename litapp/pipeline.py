"""From a prompt to a picture: encode the text, denoise the latents, decode the pixels."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litapp import __version__
from litapp.bundle import Bundle, load
from litapp.canvas import CanvasPlan, cover, fit, plan_canvas, plan_picture
from litapp.engines import Network, check_device
from litapp.errors import EXIT_USAGE, Cancelled, LitappError
from litapp.images import save_png, snap_alpha, to_image
from litapp.manifest import ENCODER
from litapp.memory import DECODE_BUDGET, cells_at_once, reads_ahead
from litapp.networks import OUTPUTS, Networks, Runner
from litapp.preview import preview_image
from litapp.request import Request
from litapp.samplers import SAMPLERS, NoiseSchedule, Step
from litapp.text import PromptTokenizer
from litapp.tiles import decode_tiles, plan_tiles

__all__ = ["DEFAULT_MODEL", "CanvasPlan", "Picture", "TextToImage", "plan_canvas"]

DEFAULT_MODEL = "lit-scenes-1k"
DEFAULT_STRENGTH = 0.35
# In the order of their turns.
AHEAD = ("text_encoder", "transformer", "vae_decoder")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        image: RGBA, or RGB where every pixel is opaque.
        parameters: what drew it: all that is needed to draw it again.
        seconds: wall-clock seconds of ``encode``, ``denoise`` and ``decode``.
    """

    image: Image.Image
    parameters: dict[str, Any]
    seconds: dict[str, float]

    def save(self, path: str | Path, *, metadata: bool = True) -> Path:
        """Write a PNG, whole or not at all; raises LitappError where it cannot."""
        save_png(self.image, Path(path), self.parameters if metadata else None)
        return Path(path)


class TextToImage:
    """Draws pictures with one bundle; make it with :meth:`load`.

    Args:
        bundle: a model.
        device: ``auto``, ``cpu``, ``openvino``, ``cuda``, ``directml`` or ``coreml``.
        resident: keep each network after its first use, until :meth:`unload`. A single picture
            needs less memory without.
        decode_budget: bytes that decoding may take beside its weights; above, the picture is
            decoded in tiles. It does not follow the memory that is free: a tile rounds otherwise.

    Attributes:
        on_prepare: called with a component's name before its network is prepared for this computer,
            which Core ML does the first time and may take a minute.

    Raises:
        LitappError: the device is not there, the bundle is a part of a model, or it asks for a
            sampler or a noise schedule that this version does not have.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "auto",
        *,
        resident: bool = False,
        decode_budget: int = DECODE_BUDGET,
    ) -> None:
        if bundle.manifest.partial:
            raise LitappError(
                f"model {bundle.manifest.name} holds only {', '.join(bundle.manifest.components)}:"
                " parts of a model do not draw"
            )
        check_device(bundle.component("transformer"), device)
        if bundle.manifest.sampler not in SAMPLERS:
            raise LitappError(
                f"model {bundle.manifest.name} asks for the unknown sampler"
                f" {bundle.manifest.sampler!r}; run: pip install --upgrade litapp"
            )
        self.bundle = bundle
        self.device = device
        self.decode_budget = decode_budget
        self.on_prepare: Callable[[str], None] | None = None
        self._resident = resident
        self._networks = Networks(bundle, device, self._prepare)
        # What another thread has allocated, the C library gives back only in part: networks that
        # are kept, and dropped to free memory, are read by the thread that asks.
        self._ahead = reads_ahead(bundle) and not resident
        self._schedule = NoiseSchedule.from_config(bundle.scheduler_config)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        device: str = "auto",
        *,
        resident: bool = False,
    ) -> TextToImage:
        """Find a bundle, check its files and be ready; networks are read when they are needed."""
        return cls(load(name_or_path), device, resident=resident)

    @cached_property
    def _tokenize(self) -> PromptTokenizer:
        return PromptTokenizer(self.bundle.tokenizer, self.bundle.manifest.max_length)

    def prefetch(self) -> None:
        """Begin to read the networks in another thread, unless they are kept or too large."""
        if self._ahead:
            for component in AHEAD:
                self._networks.ahead(component)

    def unload(self) -> None:
        """Let go of the networks that are kept; the next picture reads them again."""
        self._networks.release()

    def request(
        self,
        prompt: str,
        *,
        width: int = 1024,
        height: int = 1024,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        negative_prompt: str = "",
        strength: float = 1.0,
    ) -> Request:
        """Check what is asked for and fill in the bundle's defaults, without drawing.

        Raises:
            LitappError: a value is out of its range, see :class:`litapp.request.Request`.
        """
        return Request(
            prompt=prompt,
            width=width,
            height=height,
            steps=self.bundle.manifest.steps if steps is None else steps,
            guidance=self.bundle.manifest.guidance if guidance is None else guidance,
            seed=seed,
            negative_prompt=negative_prompt,
            strength=strength,
        )

    def strength_from(self, picture: bool, strength: float | None) -> float:
        """How much to draw anew: all of it, or what is asked for where a picture is given.

        Raises:
            LitappError: a strength without a picture, or a picture that the bundle cannot read.
        """
        if not picture:
            if strength is not None:
                raise LitappError("strength needs a picture to start from", EXIT_USAGE)
            return 1.0
        if ENCODER not in self.bundle.manifest.components:
            raise LitappError(
                f"model {self.bundle.manifest.name} cannot start from a picture: it has no"
                f" {ENCODER}; export it again",
                EXIT_USAGE,
            )
        return DEFAULT_STRENGTH if strength is None else strength

    def __call__(
        self,
        prompt: str,
        *,
        width: int = 1024,
        height: int = 1024,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        negative_prompt: str = "",
        init: Image.Image | None = None,
        strength: float | None = None,
        on_step: Callable[[Step], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Picture:
        """Draw one picture. The same arguments give the same pixels on the same engine.

        Args:
            prompt, width, height, steps, guidance, seed, negative_prompt: as for :meth:`request`.
            init: a picture to start from instead of noise (SDEdit, arXiv 2108.01073): it is cut to
                the shape asked for, and noised as far as ``strength`` says.
            strength: with ``init``, the share of the steps that are drawn, 0.35 if not given.
            on_step: called after each denoising step.
            should_stop: asked before each phase, after each step and before each tile.

        Raises:
            LitappError: an argument is out of range, the bundle cannot read pictures, or a network
                failed or returned NaN.
            Cancelled: ``should_stop`` said so.
        """
        request = self.request(
            prompt,
            width=width,
            height=height,
            steps=steps,
            guidance=guidance,
            seed=seed,
            negative_prompt=negative_prompt,
            strength=self.strength_from(init is not None, strength),
        )
        manifest = self.bundle.manifest
        plan = plan_picture(manifest, width, height)
        seconds: dict[str, float] = {}

        with self._phase("encode", seconds, should_stop, "text_encoder"):
            text = self._encode(request)
        with self._phase("denoise", seconds, should_stop, ENCODER, "transformer"):
            start = None if init is None else self._latents(init, plan)
            latents = self._denoise(text, request, plan, start, on_step, should_stop)
        with self._phase("decode", seconds, should_stop, "vae_decoder"):
            image = to_image(fit(self._decode(latents, should_stop), plan))
        parameters = self._parameters(request)
        if init is not None:
            digest = hashlib.sha256(init.convert("RGBA").tobytes()).hexdigest()
            parameters |= {"strength": request.strength, "init": digest}
        return Picture(image, parameters, seconds)

    def preview(self, step: Step, width: int, height: int) -> Image.Image | None:
        """A small blurred picture of what a step sees, or None where the bundle has no ``preview``.

        Args:
            step: a step of a picture of ``width`` x ``height`` pixels.
        """
        manifest = self.bundle.manifest
        if manifest.preview is None:
            return None
        plan = plan_picture(manifest, width, height)
        return preview_image(step.x0[0], manifest.preview, plan)

    def _latents(self, init: Image.Image, plan: CanvasPlan) -> Floats:
        """(1, C, h, w) normalised latents of a picture."""
        manifest = self.bundle.manifest
        sample = cover(init, plan).transpose(2, 0, 1)[None]
        width, height = (side // manifest.reduction for side in plan.canvas)
        encode = self._runner(ENCODER)
        (latents,) = encode(
            (1, manifest.channels, height, width), sample=np.ascontiguousarray(sample)
        )
        return latents

    def _network(self, component: str, *outputs: str) -> Network:
        """A network that returns ``outputs``; those that come after it are read meanwhile."""
        if self._ahead and component in AHEAD:
            for later in AHEAD[AHEAD.index(component) :]:
                self._networks.ahead(later)
        return self._networks.get(component)

    def _prepare(self, component: str) -> None:
        if self.on_prepare:
            self.on_prepare(component)

    def _runner(self, component: str) -> Runner:
        network = self._network(component, *OUTPUTS[component])
        return Runner(component, network, self._networks.spare)

    @contextmanager
    def _phase(
        self,
        name: str,
        seconds: dict[str, float],
        should_stop: Callable[[], bool] | None,
        *components: str,
    ) -> Iterator[None]:
        """Time a phase, and let its networks go where they are not kept."""
        start = time.perf_counter()
        try:
            if should_stop and should_stop():
                raise Cancelled
            yield
        except BaseException:
            if not self._resident:
                self._networks.release()
            raise
        if not self._resident:
            self._networks.release(*components)
        seconds[name] = time.perf_counter() - start

    def _encode(self, request: Request) -> dict[str, NDArray[Any]]:
        """The transformer's text inputs, for the prompt and, where guided, the negative prompt."""
        prompts = [request.prompt]
        if request.guidance != 1:
            prompts.append(request.negative_prompt)
        ids, mask = self._tokenize(prompts)
        encode = self._runner("text_encoder")
        shapes = ((*ids.shape, -1), (len(ids), -1))[: 1 + self.bundle.manifest.pooled]
        states, *pooled = encode(*shapes, input_ids=ids, attention_mask=mask)
        text = {
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
        }
        for vector in pooled:
            text["pooled_projections"] = vector
        return text

    def _denoise(
        self,
        text: dict[str, NDArray[Any]],
        request: Request,
        plan: CanvasPlan,
        start: Floats | None,
        on_step: Callable[[Step], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> Floats:
        """Latents (1, C, h, w) from noise, with classifier-free guidance (arXiv 2207.12598).

        Args:
            start: latents to noise and start from, or None for noise alone.
        """
        manifest = self.bundle.manifest
        network = self._runner("transformer")
        batch = len(text["encoder_attention_mask"])

        def model(x: NDArray[Any], t: int) -> NDArray[Any]:
            channels, height, width = x.shape[1:]
            (output,) = network(
                (batch, 2 * channels, height, width),
                hidden_states=np.repeat(x, batch, axis=0),
                timestep=np.full(batch, t, dtype=np.float32),
                **text,
            )
            if batch == 1:
                return output
            wanted, unwanted = output[:1], output[1:]
            # The variance is the prompt's own: only the mean is guided.
            guided = unwanted + np.float32(request.guidance) * (wanted - unwanted)
            return np.concatenate([guided[:, :channels], wanted[:, channels:]], axis=1)

        def after_step(step: Step) -> None:
            if on_step:
                on_step(step)
            if should_stop and should_stop():
                raise Cancelled

        width, height = (side // manifest.reduction for side in plan.canvas)
        rng = np.random.Generator(np.random.PCG64(request.seed))
        noise = rng.standard_normal((1, manifest.channels, height, width), dtype=np.float32)
        timesteps = self._schedule.timesteps(request.steps, request.strength)
        if start is not None:
            alpha, sigma = self._schedule.alpha_sigma(timesteps[0])
            noise = np.float32(alpha) * start + np.float32(sigma) * noise
        return SAMPLERS[manifest.sampler](
            model,
            noise,
            self._schedule,
            timesteps,
            rng=rng,
            clip_x0=manifest.clip_x0,
            callback=after_step,
        )

    def _decode(self, latents: Floats, should_stop: Callable[[], bool] | None) -> Floats:
        """Premultiplied RGBA (H, W, 4) in [0, 1], in tiles where the budget asks for them."""
        manifest = self.bundle.manifest
        most = cells_at_once(manifest, self.decode_budget)
        tiles = plan_tiles(*latents.shape[2:], manifest.halo, most)
        decode = self._runner("vae_decoder")

        def piece(cells: Floats) -> Floats:
            if should_stop and should_stop():
                raise Cancelled
            height, width = (side * manifest.reduction for side in cells.shape[2:])
            (sample,) = decode((1, 4, height, width), latent_sample=cells)
            return sample

        return snap_alpha(decode_tiles(piece, latents, tiles)[0].transpose(1, 2, 0))

    def _parameters(self, request: Request) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "steps": request.steps,
            "guidance": request.guidance,
            "width": request.width,
            "height": request.height,
            "sampler": manifest.sampler,
            "model": manifest.name,
            "model_digest": self.bundle.digest,
            "version": __version__,
        }

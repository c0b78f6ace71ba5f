"""What a picture may be asked for: limits, defaults and the checks of both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from litapp.errors import EXIT_USAGE, LitappError

__all__ = ["MAX_PROMPT", "MAX_SIDE", "MIN_SIDE", "SIDE_MULTIPLE", "Request"]

MIN_SIDE, MAX_SIDE, SIDE_MULTIPLE = 64, 4096, 32
MAX_PROMPT = 2000
MAX_STEPS = 1000
MAX_GUIDANCE = 30.0
MAX_SEED = 2**63 - 1
# Letters of base64 that a server takes for a picture to start from; it reads 64 MB in all.
MAX_GIVEN = 60_000_000


@dataclass(frozen=True)
class Request:
    """One picture to draw; made only of values that can be drawn.

    Attributes:
        prompt: 1 to 2,000 characters, not only white space.
        width, height: pixels, multiples of 32 from 64 to 4096.
        steps: 1 to 1000 denoising steps.
        guidance: 1 (the prompt alone) to 30.
        seed: 0 to 2^63 - 1.
        strength: above 0 to 1, how much of a picture to start from is drawn anew.

    Raises:
        LitappError: a value is out of its range; the message names the range.
    """

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    negative_prompt: str = ""
    strength: float = 1.0

    @property
    def drawn_steps(self) -> int:
        """The steps that ``strength`` leaves, the last ones: at least one."""
        return math.ceil(self.strength * self.steps)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise _refusal("the prompt is empty; say what to draw")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            _check_text(name, text)
        for name, side in (("width", self.width), ("height", self.height)):
            if not (_is_int(side) and MIN_SIDE <= side <= MAX_SIDE) or side % SIDE_MULTIPLE:
                raise _refusal(
                    f"{name} must be a multiple of {SIDE_MULTIPLE} from {MIN_SIDE} to {MAX_SIDE}"
                    f" pixels, not {side}"
                )
        if not (_is_int(self.steps) and 1 <= self.steps <= MAX_STEPS):
            raise _refusal(f"steps must be from 1 to {MAX_STEPS}, not {self.steps}")
        if not (_is_number(self.guidance) and 1 <= self.guidance <= MAX_GUIDANCE):
            raise _refusal(f"guidance must be from 1 to {MAX_GUIDANCE:g}, not {self.guidance}")
        if not (_is_int(self.seed) and 0 <= self.seed <= MAX_SEED):
            raise _refusal(f"seed must be from 0 to {MAX_SEED}, not {self.seed}")
        if not (_is_number(self.strength) and 0 < self.strength <= 1):
            raise _refusal(f"strength must be above 0 and at most 1, not {self.strength}")


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise _refusal(f"the {name} must be text")
    if len(text) > MAX_PROMPT:
        raise _refusal(
            f"the {name} has {len(text):,} characters; the limit is {MAX_PROMPT:,}, shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refusal(f"the {name} is not valid Unicode text") from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _refusal(message: str) -> LitappError:
    return LitappError(message, EXIT_USAGE)

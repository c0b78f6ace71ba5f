"""What the JSON API takes and gives."""

from __future__ import annotations

import base64
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from litapp.history import Entry
from litapp.jobs import MAX_COUNT, Job
from litapp.request import (
    MAX_GIVEN,
    MAX_GUIDANCE,
    MAX_PROMPT,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
)

__all__ = ["Generate", "JobState", "Jobs", "Model", "Picture", "Pictures", "Problem"]


class Generate(BaseModel):
    """A job to queue. What is left out takes the model's default."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, description="What to draw.")
    negative_prompt: str = Field("", max_length=MAX_PROMPT, description="What not to draw.")
    width: int = Field(1024, ge=MIN_SIDE, le=MAX_SIDE, multiple_of=32, description="Pixels.")
    height: int = Field(1024, ge=MIN_SIDE, le=MAX_SIDE, multiple_of=32, description="Pixels.")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="Denoising steps.")
    guidance: float | None = Field(
        None, ge=1, le=MAX_GUIDANCE, description="How closely to follow the prompt."
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Random where left out.")
    count: int = Field(1, ge=1, le=MAX_COUNT, description="Pictures; their seeds count up.")
    init: str | None = Field(
        None, pattern="^[0-9a-f]{16}$", description="Id of a picture in the history to start from."
    )
    init_image: str | None = Field(
        None,
        max_length=MAX_GIVEN,
        description="Instead of init: a PNG of up to 64 megapixels, in base64.",
        json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"},
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="With init or init_image: how much of it is drawn anew."
    )


class Picture(BaseModel):
    """A picture in the history."""

    id: str
    created: float = Field(description="Seconds since 1970.")
    file: str = Field(description="The file's name.")
    url: str = Field(description="The PNG.")
    thumbnail_url: str
    parameters: dict[str, Any]

    @classmethod
    def of(cls, entry: Entry) -> Picture:
        url = f"/api/v1/pictures/{entry.id}"
        return cls(
            id=entry.id,
            created=entry.created,
            file=entry.path.name,
            url=f"{url}/image.png",
            thumbnail_url=f"{url}/thumbnail.webp",
            parameters=entry.parameters,
        )


class Pictures(BaseModel):
    """A page of the history; ``total`` counts all that match."""

    pictures: list[Picture]
    total: int


class JobState(BaseModel):
    """A job as it is now."""

    id: str
    state: Literal["queued", "running", "done", "cancelled", "failed"]
    prompt: str
    negative_prompt: str
    width: int
    height: int
    guidance: float
    seed: int
    count: int
    init: str = Field(
        description="Id of the picture it starts from; empty for none, or for one that was given."
    )
    strength: float
    step: int = Field(description="Finished steps of the picture being drawn.")
    steps: int
    eta_seconds: float | None = Field(description="Until the job is done; null if not known.")
    preparing: str = Field(
        description="The network being prepared for this computer, the first time; else empty."
    )
    preview: str | None = Field(description="A data: URL of the picture being drawn.")
    pictures: list[str] = Field(description="Ids of finished pictures, in order.")
    error: str = Field(description="Why it failed; empty otherwise.")

    @classmethod
    def of(cls, job: Job) -> JobState:
        request, preview = job.request, job.preview
        return cls(
            id=job.id,
            state=job.state,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            guidance=request.guidance,
            seed=request.seed,
            count=job.count,
            init=job.init,
            strength=request.strength,
            step=job.step,
            steps=request.drawn_steps,
            eta_seconds=job.eta,
            preparing=job.preparing,
            preview=preview and f"data:image/webp;base64,{base64.b64encode(preview).decode()}",
            pictures=list(job.pictures),
            error=job.error,
        )


class Jobs(BaseModel):
    """All jobs the server remembers, in the order they were asked for."""

    jobs: list[JobState]


class Model(BaseModel):
    """The model that draws, and its defaults."""

    name: str
    description: str
    digest: str = Field(description="SHA-256 of the model's manifest.")
    steps: int
    guidance: float
    native: int = Field(description="Pixels of the long side it was trained at.")
    previews: bool
    variations: bool = Field(description="Whether it can start from a picture.")
    version: str = Field(description="Of litapp.")


class Problem(BaseModel):
    """Why a request was refused, in one line."""

    detail: str

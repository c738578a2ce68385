"""What the API takes and gives. Its limits stand here, where the description of the API shows them.

Images travel as PNG in base64, with seed, class and sampler in the PNG's metadata.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "MOST_BYTES",
    "MOST_IMAGES",
    "MOST_PIXELS",
    "MOST_STEPS",
    "Between",
    "Frames",
    "Images",
    "Limits",
    "Noising",
    "Overview",
    "Picture",
    "Pictures",
    "Problem",
    "Reconstruction",
    "RunInfo",
    "Sample",
    "Sampling",
    "Training",
]

MOST_IMAGES = 64
MOST_STEPS = 50
MOST_BYTES = 8 * 2**20
"""Of an upload."""
MOST_PIXELS = 16_000_000
"""Of an upload, whose file may be small all the same."""
MOST_SEED = 2**53 - 2 * MOST_IMAGES
"""JavaScript counts no further."""

Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Label = Annotated[str, Field(min_length=1, max_length=200)]
RunNumber = Annotated[int, Field(ge=0, le=1, description="0: the run that is served; 1: the other one.")]


# --- requests ---------------------------------------------------------------------------------------------------------


class Query(BaseModel):
    """The parameters of a request; a wrong name is refused, since what it was meant to change would not change."""

    model_config = ConfigDict(extra="forbid")

    run: RunNumber = 0


class Sampling(Query):
    """How to get from noise to images. What is left out is as the run has it."""

    steps: int | None = Field(None, ge=1, le=MOST_STEPS, description="Steps of the solver.")
    guidance: float | None = Field(
        None, ge=0, le=20, allow_inf_nan=False, description="Weight of classifier-free guidance; 1 is none."
    )
    solver: str | None = Field(None, max_length=100, description="One of the run's `solvers`.")


class Images(Sampling):
    """Images of seeds in a row."""

    n: int = Field(1, ge=1, le=MOST_IMAGES, description="Number of images.")
    seed: Seed = Field(0, description="Of the first image; image k has seed + k.")
    labels: list[Label] = Field(
        [],
        max_length=MOST_IMAGES,
        description="A class for all images, or one for each: its name, its number where classes have no names, or "
        "`none`. Default: (seed + k) mod the number of classes.",
    )


class Between(Sampling):
    """Images between those of two seeds, of one class."""

    seed: Seed = Field(0, description="Of the first image.")
    other: Seed = Field(1, description="Of the last image.")
    n: int = Field(9, ge=2, le=MOST_IMAGES, description="Number of images, with those of both seeds.")
    label: Label | None = Field(None, description="Class: name, number or `none`. Default: that of the first seed.")


class Noising(Query):
    """How the latents of an uploaded image are noised, and denoised again."""

    t: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="Time: 0 is noise, 1 is data.")
    seed: Seed = Field(0, description="Of the noise.")
    steps: int = Field(20, ge=1, le=MOST_STEPS, description="Steps from t to 1 (Euler).")
    label: Label | None = Field(None, description="Class that the denoiser is told: name or number. Default: none.")


# --- answers ----------------------------------------------------------------------------------------------------------


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="One sentence: what is wrong, and what to do.")


class Limits(BaseModel):
    """What a request may ask for."""

    images: int = MOST_IMAGES
    steps: int = MOST_STEPS
    upload_bytes: int = MOST_BYTES
    upload_pixels: int = MOST_PIXELS
    waiting: int = Field(description="Requests that may wait for the network; more get 429 and Retry-After.")


class RunInfo(BaseModel):
    """A run, or a saved network, and where it stands now."""

    name: str
    image_size: tuple[int, int] = Field(description="Height and width.")
    channels: int
    classes: int = Field(description="Number of classes; 0 is unconditional.")
    class_names: list[str] = Field(description="Empty where classes have numbers only.")
    model: str | None = Field(description="Changes with the published network; null before there is one.")
    one_step: bool = Field(description="Whether it is a one-step generator.")
    steps: int = Field(description="Its own number of steps.")
    guidance: float
    solver: str
    solvers: list[str] = Field(description="Those that work with it.")
    jumps: list[str] = Field(description="Those of them that sample with the one-step generator, which is not guided.")
    trains: bool = Field(description="Whether it is a run's folder, with a log and pictures.")
    images: int = Field(description="Images seen in training, by the log.")
    length: int = Field(description="Images of the whole run; 0 if unknown.")
    pictures: int = Field(description="Pictures that training has written.")
    written: float | None = Field(description="Seconds since the last line of the log.")


class Overview(BaseModel):
    """What is served."""

    onefold: str = Field(description="Version.")
    limits: Limits
    runs: list[RunInfo]


class Picture(BaseModel):
    """One image."""

    png: str = Field(description="PNG, base64.")
    seed: int
    label: int | None = Field(description="Number of the class; null if the network has none.")
    name: str = Field(description="Name of the class.")


class Frames(BaseModel):
    """What all images of an answer have in common."""

    model: str = Field(description="Of which network they are; see `RunInfo`.")
    steps: int
    guidance: float
    solver: str
    seconds: float = Field(description="Time of computing, without waiting for a turn.")


class Pictures(Frames):
    """Images, in order."""

    images: list[Picture]


class Reconstruction(BaseModel):
    """An uploaded image in the network's size, and what becomes of it. All images are PNG, base64."""

    original: str = Field(description="Cropped at the centre and resized to the network's size.")
    reconstruction: str = Field(description="Encoded and decoded.")
    noised: str = Field(description="Its latents noised to time t, decoded.")
    denoised: str = Field(description="One call of the denoiser: the mean of all that it might have been.")
    resampled: str = Field(description="The denoiser's ODE from t to 1: one of all that it might have been.")
    psnr: float = Field(description="Of the reconstruction, dB.")
    seconds: float


class Sample(BaseModel):
    """A picture that training has written."""

    name: str
    images: int = Field(description="Images seen by then.")


class Training(BaseModel):
    """A run's log and pictures."""

    images: list[int] = Field(description="Images seen, for each line of the log; of a long log, some hundred lines.")
    series: dict[str, list[float | None]] = Field(description="Each number of the log at these lines.")
    alarm: str | None = Field(description="What the last measurement found wrong.")
    samples: list[Sample] = Field(description="Pictures of samples, oldest first.")
    reconstructions: list[Sample] = Field(description="Pictures of test images above their reconstructions.")

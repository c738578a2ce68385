"""What all networks have in common: configuration, roles, sampling and files.

    encode:   image                     →  latents          z
    denoise:  noised latents, t, class  →  clean latents    ẑ  ≈ E[z | z_t, t, y]
    generate: the same                  →  clean latents    a sample; what a one-step generator is trained for
    decode:   latents                   →  image            x̂

`one_network.py` has all of them in one trunk: `OneFold`. `three_networks.py` has the baseline with one trunk per role,
and `pixel_network.py` an ordinary diffusion model whose latents are the pixels. Each registers itself under the name of
its architecture, and so does a network of your own:

    @register("mine")
    class Mine(Network): ...

    onefold.train(onefold.recipe("digits", network={"architecture": "mine"}))

Such a network defines `encode`, `denoise`, `decode` and `role_flops`, as well as `features` for a perceptual loss,
`denoising_parts` for conversion to a one-step generator, and perhaps a `jump` with `generate_with`, so that denoising
keeps its meaning then. Everything else has a default.

Conventions: images (B, C, H, W) in [−1, 1]; latents (B, N, D), one token for each of the N = (H/p)·(W/p) patches;
t in [0, 1] with 0 noise and 1 data; label K means "no class".
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn

from onefold import sampling, settings
from onefold.errors import UserError, reason
from onefold.files import read_tensors, write_tensors, write_whole
from onefold.networks import inputs
from onefold.networks.backbone import Backbone
from onefold.networks.config import NETWORKS, NetworkConfig, architectures, register
from onefold.networks.jump import Jump
from onefold.networks.source import check_fits, is_run, locate, packaged, upload
from onefold.networks.trunk import Trunk, trunk_flops
from onefold.pixels import to_uint8

__all__ = ["NETWORKS", "Network", "NetworkConfig", "RoleFlops", "architectures", "build", "forward_flops"]
__all__ += ["parameter_shares", "register"]


class RoleFlops(NamedTuple):
    """Forward operations of each role per image; a product of (m × k) by (k × n) matrices counts as 2·m·k·n."""

    encode: float
    denoise: float
    decode: float

    def sample(self, evaluations: int) -> float:
        """Operations of one sample: `evaluations` of the denoiser, and decoding."""
        return evaluations * self.denoise + self.decode


def forward_flops(config: NetworkConfig, depth: int | None = None) -> float:
    """Operations of one image's pass through a trunk with its modulation, one entrance and one exit.

    The trunk has `depth` blocks; default: `config.depth`.
    """
    ends = 2 * config.tokens * config.width * (config.patch**2 * config.channels + config.latent_channels)
    return trunk_flops(config.tokens, config.width, depth or config.depth) + ends


class Network(nn.Module):
    """The roles, which a subclass defines, and what follows from them."""

    phases: ClassVar[tuple[str, ...]] = ("self_distillation",)
    """The default phases of its training, in order."""
    jump: Jump
    """What generating has of its own; a network without it denoises instead."""
    learns_codec: ClassVar[bool] = True
    """Whether encoding and decoding have weights to be learned …"""
    shares_codec: ClassVar[bool] = False
    """… and whether training the denoiser changes them."""
    adopted: ClassVar[bool] = False
    """Whether it is made of what comes from elsewhere, so that its name alone does not describe one."""
    calls: ClassVar[tuple[str, ...]] = ("encode", "denoise", "decode", "generate_with", "features")
    """Methods other than `forward` by which it is called: if its weights are sharded, they are gathered for these."""
    paints: ClassVar[bool] = False
    """Whether generating can have an exit to pixels; see `generate_with_image`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.sampler = sampling.Sampler()
        """The default sampler, as set in training; a one-step generator's has one step."""

    # --- properties of an architecture, given a configuration ---

    @classmethod
    def implied(cls, config: NetworkConfig) -> dict[str, int]:
        """Settings of `config` that follow from others, by name; they override the given ones."""
        return {}

    @classmethod
    def check(cls, config: NetworkConfig) -> None:
        """Reject a configuration that such a network cannot have, with a UserError that names the setting."""

    @classmethod
    def has_jump(cls) -> bool:
        """Whether a `jump` can change its matrices by rank, so that it learns to generate beside fixed weights."""
        return cls.generate_with is not Network.generate_with

    @classmethod
    def role_flops(cls, config: NetworkConfig) -> RoleFlops:
        """Operations of encoding, denoising and decoding one image."""
        raise NotImplementedError

    # --- the roles ---

    def encode(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Latents of images in [−1, 1], normalised according to `config.latent_norm`."""
        raise NotImplementedError

    def denoise(
        self, z_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Clean latents ẑ predicted from noised latents at times t in [0, 1], given labels y (None: no class)."""
        raise NotImplementedError

    def generate(
        self,
        z_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None = None,
        r: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """The clean latents x̂ at which a jump from t to r aims: z_r = z_t + (r − t)/(1 − t) · (x̂ − z_t).

        One step is a jump from noise to r = 1, G(ε, y) = generate((1 − t₀)·ε, t₀, y). A network that has not been
        trained for it denoises here, and so does one without a `jump`.

        Args:
            z_t: Latents to start from, such as noise times 1 − t.
            t: Times of departure, in [0, 1].
            y: Labels; None: no class.
            r: Times of arrival, from t to 1. Default: 1.
        """
        return self.generate_with(self.jump, z_t, t, y, r) if hasattr(self, "jump") else self.denoise(z_t, t, y)

    def generate_with(
        self,
        jump: Jump,
        z_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None = None,
        r: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """As `generate`, with another generator's `jump` on top of this network's weights; one run needs it."""
        raise NotImplementedError

    def generate_with_image(
        self,
        jump: Jump,
        exit: nn.Module,
        z_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B C H W"]]:
        """(generate_with(jump, z_t, t, y), image by an exit from the same pass, with a gradient in the exit alone)."""
        raise NotImplementedError

    def generate_image(
        self,
        z_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None = None,
        r: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Approximately decode(generate(z_t, t, y)), in one pass of the trunk instead of two; not clamped.

        Raises:
            UserError: a network without an exit for it.
        """
        if not self.config.jump_exit:
            cure = "choose another, or train one with `onefold train … --one-step`"
            raise UserError(f"solver: 'one_pass' needs an exit to pixels, and this network has none; {cure}")
        return self.generate_with_image(self.jump, self.get_submodule("jump_exit"), z_t, t, y)[1]

    def decode(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """Images decoded from latents; in [−1, 1] up to the network's error (not clamped)."""
        raise NotImplementedError

    # --- input checks, for the first line of each role ---

    def check_images(self, x: Tensor) -> None:
        """Raises a UserError unless x is a batch of float images (B, C, H, W) in [−1, 1] of the network's size."""
        inputs.check_images(self, x, self.config.channels, self.config.image_size)

    def check_latents(self, z: Tensor) -> None:
        """Raises a UserError unless z is a batch of float latents (B, N, D) of the network's size."""
        inputs.check_latents(self, z, self.config.tokens, self.config.latent_channels)

    def check_noised(self, z_t: Tensor, t: Tensor, y: Tensor | None) -> None:
        """Raises a UserError unless z_t is such a batch, t holds times (B,) in [0, 1], and y is labels (B,) or None."""
        sizes = self.config.tokens, self.config.latent_channels
        inputs.check_noised(self, z_t, t, y, sizes, self.config.classes)

    def decode_and_denoise(
        self, z: Tensor, z_t: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Float[Tensor, "A C H W"], Float[Tensor, "B N D"]]:
        """(decode(z), denoise(z_t, t, y))."""
        return self.decode(z), self.denoise(z_t, t, y)

    def features(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The encoder's hidden tokens after each block: a perceptual space that needs no other network."""
        raise NotImplementedError

    @property
    def shared_parts(self) -> tuple[nn.Module, ...]:
        """The parts that serve all three roles."""
        return ()

    def normalise(self, mean: Float[Tensor, " D"], std: Float[Tensor, " D"]) -> None:
        """From now on, subtract `mean` from each channel of the latents and divide it by `std`.

        Raises:
            UserError: encoder and denoiser share weights, so the latents would change while the denoiser learns.
        """
        raise UserError(f"{type(self).__name__}: its encoder cannot be frozen, for the denoiser shares its weights")

    def denoising_parts(self) -> dict[str, nn.Module]:
        """The parts of a `Backbone` with the same denoiser, by the backbone's names."""
        raise NotImplementedError

    def backbone(self, blocks: int | None = None) -> nn.Module:
        """A copy of the part that reads noised latents, with all or its first `blocks` blocks, as a `Backbone`.

        Raises:
            UserError: more blocks than the network has.
        """
        config, parts = self.config, self.denoising_parts()
        deepest = len(parts["trunk"].blocks)  # type: ignore[arg-type]
        depth = deepest if blocks is None else blocks
        if not 1 <= depth <= deepest:
            raise UserError(f"blocks: {depth} is not within 1 to {deepest}, the blocks of the network")
        sizes = (config.latent_channels, config.width, depth, config.heads, config.grid, config.classes)
        return Backbone(*sizes).to(self.device).copy_from(**parts)

    @property
    def denoising_trunk(self) -> Trunk:
        """The trunk that reads noised latents."""
        trunk = self.denoising_parts()["trunk"]
        assert isinstance(trunk, Trunk)
        return trunk

    @property
    def trunks(self) -> list[Trunk]:
        """All trunks, whose blocks hold nearly all parameters and compute."""
        return [part for part in self.modules() if isinstance(part, Trunk)]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # --- patches ---

    def patchify(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N P"]:
        """Cut images into patches in row-major order, one row of p²·C values each."""
        p = self.config.patch
        return x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B C H W"]:
        """The inverse of `patchify`."""
        (rows, columns), p = self.config.grid, self.config.patch
        blocks = patches.unflatten(1, (rows, columns)).unflatten(3, (-1, p, p))
        return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _clean(self, out: Tensor, z_t: Tensor, t: Tensor) -> Float[Tensor, "B N D"]:
        """ẑ from the output of the denoising exit."""
        out = out.float()
        return out if self.config.output == "clean" else z_t + (1 - t[:, None, None]) * out

    # --- sampling ---

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: sampling.Labels | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        solver: str | None = None,
        shift: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        batch: int = 256,
    ) -> UInt8[np.ndarray, "n H W C"]:
        """Generate `n` images; image k is drawn only from the seed `seed + k`, whatever `n` and `batch` are.

        Options that are not given come from `self.sampler`.

        Args:
            n: Number of images.
            labels: For each image the name of a class (`config.class_names`), or its number 0…K−1, or K for "no class":
                a list, array or tensor. Default: (seed + k) mod K.
            steps: Intervals of the solver's time grid; 1 is one-step generation, the default of a one-step generator.
            guidance: Weight of classifier-free guidance; 1 is unguided and costs half.
            seed: Seed of the first image.
            solver: A name in `sampling.SOLVERS`.
            shift: Warps the time grid; see `sampling.Sampler`.
            guidance_interval: Times within which guidance acts; see `sampling.Sampler`.
            batch: Images per call of the network.

        Raises:
            UserError: an invalid count, label, seed or option.
        """
        wanted = {"steps": steps, "solver": solver, "guidance": guidance, "shift": shift}
        sampler = self.sampler.with_options(**wanted, guidance_interval=guidance_interval)
        y = sampling.resolve_labels(n, labels, seed, self.config.classes, self.config.class_names)
        n, seed = int(n), int(seed)
        return self.pictures(self.sample_latents(range(seed, seed + n), y, sampler, batch=batch))

    @torch.no_grad()
    def pictures(self, sampled: Iterable[Float[Tensor, "B ..."]]) -> UInt8[np.ndarray, "n H W C"]:
        """Decode latents, given batch by batch, into images; those that are images already are not."""
        images = (z if z.ndim == 4 else self.decode(z) for z in sampled)
        return torch.cat([to_uint8(x).permute(0, 2, 3, 1).cpu() for x in images]).numpy()

    def jump_of(self, sampler: sampling.Sampler) -> sampling.Jump:
        """What samples in one step: to latents, or for a sampler of one pass to images."""
        return self.generate_image if sampler.paints else self.generate

    def sample_latents(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
        sampler: sampling.Sampler,
        *,
        batch: int = 256,
    ) -> Iterator[Float[Tensor, "B ..."]]:
        """Clean latents for `seeds` and `labels`, batch by batch (see `sampling.generate`).

        A sampler of one pass has none: with it, these are images (B, C, H, W), which `pictures` takes too.
        """
        return sampling.generate(
            self.denoise,
            (self.config.tokens, self.config.latent_channels),
            seeds,
            labels,
            sampler,
            null_label=self.config.classes,
            batch=batch,
            device=self.device,
            jump=self.jump_of(sampler),
        )

    # --- files ---

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `sampler.json` and `model.safetensors` (float32) into `folder`."""
        self.save_config(Path(folder))
        write_tensors(self.state_dict(), Path(folder) / "model.safetensors")

    def save_config(self, folder: Path) -> None:
        """Write all but the weights."""
        write_whole(folder / "config.json", settings.to_json(self.config))
        write_whole(folder / "sampler.json", settings.to_json(self.sampler))

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload what `save_pretrained` writes to a repository "owner/name" on the hub; returns its address.

        The repository is made if it is missing. `onefold export RUN --to hub` also writes a model card.

        Raises:
            UserError: no connection, no token, or a name that the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), repository, private=private)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Load a network from its folder, a run's folder, or a repository "owner/name" on the Hugging Face hub.

        "digits" is the network that comes with the package, where there is no folder of that name.
        `Network.from_pretrained` loads any registered architecture; a subclass's loads only its own.

        Raises:
            UserError: no such folder, or files that do not hold such a network.
        """
        folder = locate(source)
        if not (folder / "config.json").is_file():
            cure = "give the folder of a run or of a saved network"
            if str(source) in packaged():
                cure += f"; to sample with the network {source} of the package, go where there is no such folder"
            raise UserError(f"{source}: no config.json there; {cure}")
        if is_run(folder / "config.json"):
            raise UserError(f"{source}: no model yet; a run has one after its first checkpoint")
        config, path = settings.from_file(NetworkConfig, folder / "config.json"), folder / "model.safetensors"
        try:
            tensors = read_tensors(path)[0]
            check_fits(config, tensors)
            network = build(config)
            network.load_state_dict(tensors)
        except (OSError, SafetensorError, RuntimeError, MemoryError, ArithmeticError, ValueError, KeyError) as error:
            if isinstance(error, UserError):  # which knows what it is instead
                raise
            cure = "copy or download it whole, or give another run"
            raise UserError(f"{path}: does not hold this network ({reason(error)}); {cure}") from error
        if (folder / "sampler.json").is_file():  # a network saved by hand may lack it
            network.sampler = settings.from_file(sampling.Sampler, folder / "sampler.json")
        if not isinstance(network, cls):
            other = f"{type(network).__name__}, not {cls.__name__}"
            raise UserError(f"{source}: holds {other}; load it with {type(network).__name__}.from_pretrained")
        return network.eval()


def build(config: NetworkConfig) -> Network:
    """The network of a configuration, with random weights."""
    return config.kind(config)


def parameter_shares(network: Network) -> dict[str, float]:
    """Number of parameters, and the fraction of them that serves all three roles (`Network.shared_parts`)."""
    total = sum(p.numel() for p in network.parameters())
    shared = sum(p.numel() for part in network.shared_parts for p in part.parameters())
    return {"parameters": total, "shared": shared, "share": shared / total}

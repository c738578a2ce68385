"""A custom objective: self-distillation with a penalty on how much mirroring an image changes its latents."""

from torch import Tensor

import onefold
from onefold.networks import Network
from onefold.objectives.losses import Losses
from onefold.objectives.self_distillation import DenoisingDraws
from onefold.training.latent_diffusion import SelfDistillationPhase
from onefold.training.phases import register


@register("mirror_invariant")
class MirrorInvariant(SelfDistillationPhase):
    """Adds 0.1 · ‖mean over tokens of E(x) − that of E(mirrored x)‖²."""

    def loss(self, network: Network, target: Network, x: Tensor, y: Tensor, draws: DenoisingDraws) -> Losses:
        losses = super().loss(network, target, x, y, draws)
        difference = network.encode(x).mean(1) - network.encode(x.flip(3)).mean(1)
        share = draws.span.share  # of the batch: the losses of its parts add up to its own
        error = share * difference.square().mean()
        return Losses(losses.total + 0.1 * error, {**losses.parts, "mirror": error.detach()})


def main(out: str = "runs/mirror-invariant", images: int = 12_800) -> onefold.Run:
    """Train with it: a run is a list of phases, and this is its only one."""
    return onefold.train(onefold.recipe("digits", phases=("mirror_invariant",), training={"images": images}), out)


if __name__ == "__main__":
    main()

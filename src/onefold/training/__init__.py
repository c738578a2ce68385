"""Training: from a configuration to a run. The phases that there are register themselves here."""

from onefold.training import latent_diffusion, one_step

__all__ = ["latent_diffusion", "one_step"]

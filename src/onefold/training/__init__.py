"""Training: from a configuration to a run. The built-in phases register themselves here."""

from onefold.training import latent_diffusion, one_run, one_step

__all__ = ["latent_diffusion", "one_run", "one_step"]

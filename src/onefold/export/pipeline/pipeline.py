"""Sampling with a network of onefold in diffusers: in one step, where it is a one-step generator, or in many.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe(class_labels=[3, 4], generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)]).images

A copy of this file lies in each exported folder. Needs torch and diffusers.
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class OneFoldPipeline(DiffusionPipeline):
    """The path is z_t = t·z + (1 − t)·noise, and the network predicts z."""

    def __init__(self, network, num_inference_steps=50, guidance_scale=1.0, start=0.0, jumps=False, shift=1.0):
        super().__init__()
        self.register_modules(network=network)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            start=start,
            jumps=jumps,
            shift=shift,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        batch_size=1,
        num_inference_steps=None,
        guidance_scale=None,
        generator=None,
        output_type="pil",
        return_dict=True,
    ):
        """Generate images.

        Args:
            class_labels: A class for each image, by number or name; one alone is that of all. Default: no class.
            batch_size: Number of images, where there is no list of labels.
            num_inference_steps: 1 of a one-step generator is one step, all else are Euler steps. Default: its own.
            guidance_scale: Weight of classifier-free guidance with many steps; 1 is none.
            generator: One for all images, in turn, or a list of one for each: image k is that of onefold's seed k.
            output_type: "pil", "np" (n, H, W, C) in [0, 1], or "pt" (n, C, H, W) in [0, 1].
            return_dict: An `ImagePipelineOutput`, or else a tuple.
        """
        net = self.network
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        none = net.config.classes
        labels = none if class_labels is None else class_labels
        labels = labels if isinstance(labels, (list, tuple)) else [labels] * batch_size
        names = list(net.config.class_names)
        y = torch.tensor([names.index(v) if isinstance(v, str) else int(v) for v in labels], device=net.device)
        generators = generator if isinstance(generator, list) else [generator] * len(labels)
        shape = net.grid[0] * net.grid[1], net.config.latent_channels
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device if g else "cpu") for g in generators])
        z = noise.to(net.device, net.dtype)
        if steps == 1 and self.config.jumps:
            z = net.generate((1 - self.config.start) * z, torch.full_like(z[:, 0, 0], self.config.start), y)
        else:
            t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            t = (self.config.shift * t / (1 + (self.config.shift - 1) * t)).float().tolist()
            for now, then in zip(self.progress_bar(t[:-1]), t[1:], strict=True):
                at = torch.full_like(z[:, 0, 0], now)
                z_hat = net.denoise(z, at, y)
                if guidance != 1:
                    free = net.denoise(z, at, torch.full_like(y, none))
                    z_hat = free + guidance * (z_hat - free)
                z = z_hat if then == 1 else z + (then - now) / (1 - now) * (z_hat - z)
        images = (net.decode(z).float().clamp(-1, 1) + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

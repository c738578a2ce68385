"""Input checks with helpful errors: they name images, latents, times and labels of the wrong kind.

Shapes and types are always checked, which costs microseconds and never waits for a device. Values are checked only on
the CPU and only by a network that is ready for use (`eval()`, as when loaded), never in training.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from onefold.errors import UserError

__all__ = ["check_images", "check_latents", "check_noised"]

FARTHEST = 8.0
"""Largest magnitude of an image's values: an untrained decoder may leave [−1, 1], but not this far; 0…255 does."""
SPAN = 0.1
"""Values that come this close to 0 and to 1 without going beyond look like a range of [0, 1]."""
AWAY = "onefold.to_tensor(images)"


def check_images(network: nn.Module, x: Any, channels: int, size: tuple[int, int]) -> None:
    """Reject anything but a batch of images of this size: float (B, C, H, W) in [−1, 1].

    Raises:
        UserError: naming what was given and how to convert it.
    """
    if torch.compiler.is_compiling():
        return
    wanted = f"(B, {channels}, {size[0]}, {size[1]})"
    if not isinstance(x, Tensor):
        raise UserError(f"x: {type(x).__name__} where a float tensor {wanted} in [-1, 1] belongs; use {AWAY}")
    shape, single, last = tuple(x.shape), (channels, *size), (*size, channels)
    if shape[1:] != single:
        if shape == single:
            cure = "put a single image into a batch, x[None]"
        elif shape == last:
            cure = "put a single image into a batch, channels first, x.permute(2, 0, 1)[None]"
        elif shape == size or (shape[1:] == size and channels == 1):
            cure = f"grey images have one channel, x[{'None, None' if len(shape) == 2 else ':, None'}]"
        elif shape[1:] == last and x.dtype == torch.uint8:
            cure = f"use {AWAY}"
        elif shape[1:] == last:
            cure = "put the channels first, x.permute(0, 3, 1, 2)"
        else:
            cure = f"the network takes images of {size[0]}×{size[1]} (height × width) with {_channels(channels)}"
        raise UserError(f"x: shape {shape} is not {wanted}; {cure}")
    if x.dtype == torch.uint8:
        raise UserError("x: uint8 where floats in [-1, 1] belong; scale it, x.float() / 127.5 - 1")
    _check_type(network, "x", x)
    if x.device.type != "cpu" or network.training or x.numel() == 0:
        return
    low, high = (value.item() for value in x.detach().aminmax())
    if not max(-low, high) <= FARTHEST:  # NaN too
        cure = "scale it, x / 127.5 - 1" if low >= 0 and high <= 255 else "look for where they come from"
        raise UserError(f"x: values from {low:.3g} to {high:.3g}, not in [-1, 1]; {cure}")
    if low >= 0 and high <= 1:
        cure = "scale it, 2 * x - 1"
        scaled = _is_scaled_to_one(x.detach())
        if scaled:
            raise UserError(f"x: values from {low:.3g} to {high:.3g} are uint8 / 255, not in [-1, 1]; {cure}")
        if scaled is None and low < SPAN and high > 1 - SPAN:  # images that are bright everywhere may be valid
            doubt = f"x: values from {low:.3g} to {high:.3g} look like [0, 1], not [-1, 1]; if they are, {cure}"
            warnings.warn(doubt, stacklevel=4)


def check_latents(network: nn.Module, z: Any, tokens: int, numbers: int, name: str = "z") -> None:
    """Reject anything but a batch of latents of this size: float (B, N, D).

    Raises:
        UserError: naming what was given and what is expected.
    """
    if torch.compiler.is_compiling():
        return
    wanted = f"(B, {tokens}, {numbers})"
    if not isinstance(z, Tensor):
        raise UserError(f"{name}: {type(z).__name__} where a float tensor {wanted} belongs; use torch.from_numpy")
    if tuple(z.shape[1:]) != (tokens, numbers):
        cure = "put single latents into a batch, z[None]" if tuple(z.shape) == (tokens, numbers) else ""
        cure = cure or f"this network has {tokens} tokens of {numbers} numbers for an image"
        raise UserError(f"{name}: shape {tuple(z.shape)} is not {wanted}; {cure}")
    _check_type(network, name, z)


def check_noised(network: nn.Module, z_t: Any, t: Any, y: Any, sizes: tuple[int, int], classes: int) -> None:
    """Reject anything but a denoiser's inputs: latents (B, N, D), times (B,) in [0, 1], labels (B,) or None.

    Raises:
        UserError: naming what was given and what is expected.
    """
    if torch.compiler.is_compiling():
        return
    check_latents(network, z_t, *sizes, name="z_t")
    count = len(z_t)
    if not isinstance(t, Tensor) or t.shape != (count,):
        found = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise UserError(f"t: {found} where a time for each image belongs; use torch.full(({count},), t)")
    if y is not None and (not isinstance(y, Tensor) or y.shape != (count,)):
        found = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise UserError(f"y: {found} where a label for each image belongs, {count} in all; use torch.tensor([…])")
    if y is not None and y.dtype not in (torch.int64, torch.int32):
        raise UserError(f"y: {_name(y.dtype)}, not int64; labels are integers, y.long()")
    _check_device(network, "t", t)
    if z_t.device.type != "cpu" or network.training or count == 0:
        return
    low, high = (value.item() for value in t.detach().aminmax())
    if not 0 <= low <= high <= 1:
        raise UserError(f"t: times from {low:.3g} to {high:.3g}, not in [0, 1]; 0 is noise and 1 is data")
    if y is not None and not 0 <= int(y.min()) <= int(y.max()) <= classes:
        known = f"0 to {classes - 1}, or {classes} for no class" if classes else "no classes: leave y out"
        raise UserError(f"y: labels from {int(y.min())} to {int(y.max())}; this network knows {known}")


def _check_type(network: nn.Module, name: str, x: Tensor) -> None:
    """Require floats on the weights' device and, unless autocast converts them, of the weights' type."""
    if not x.is_floating_point():
        raise UserError(f"{name}: {_name(x.dtype)} where floats belong; convert it, {name}.float()")
    weights = _check_device(network, name, x)
    if x.dtype != weights and not torch.is_autocast_enabled(x.device.type):
        raise UserError(f"{name}: {_name(x.dtype)}, but the network is {_name(weights)}; convert one of them")


def _check_device(network: nn.Module, name: str, x: Tensor) -> torch.dtype:
    weights = next(network.parameters())
    if x.device != weights.device:
        raise UserError(f"{name}: on {x.device}, but the network is on {weights.device}; move it, {name}.to(device)")
    return weights.dtype


def _is_scaled_to_one(x: Tensor) -> bool | None:
    """Whether values in [0, 1] are uint8 / 255, i.e. k/255; for uint8 scaled to [−1, 1], k is odd. None: unclear."""
    steps = x.float() * 255
    whole = steps.round()
    exact, varied = ((steps - whole).abs() < 1e-3).all(), whole.amax() > whole.amin()
    return bool((whole % 2 == 0).any()) if bool(exact & varied) else None


def _channels(channels: int) -> str:
    return {1: "1 channel (grey)", 3: "3 channels (RGB)"}.get(channels, f"{channels} channels")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

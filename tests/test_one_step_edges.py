"""One step at its edges: settings that teach nothing, critics that are too sure, few images, what was made before."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers_one_step import begun, digits, one_step
from onefold import estimate as estimates
from onefold import settings
from onefold.data import open_dataset
from onefold.errors import UserError
from onefold.networks import RatioNet
from onefold.networks.jump import Jump
from onefold.networks.trunk import Trunk
from onefold.objectives.density_ratio import DensityRatio, NoiseDraws, ratio_loss
from onefold.recipes import recipe
from onefold.training import one_step_monitor
from onefold.training.one_step_monitor import OneStepMonitor
from onefold.training.phases import Part, phases_of
from onefold.training.run import Run, load_run
from onefold.training.state import TrainingState

# --- of the losses ----------------------------------------------------------------------------------------------------


def gradient_at(logit: float, options: DensityRatio) -> Tensor:
    """At 8 samples of one value at t = 1, of a ratio with slope 1."""
    fake, ratio = torch.zeros(8, 1, requires_grad=True), nn.Linear(1, 1)
    with torch.no_grad():
        ratio.weight.fill_(1.0)
        ratio.bias.fill_(logit)
    draws = NoiseDraws(torch.ones(8), torch.zeros(8, 1), torch.ones(8, 1))
    loss, _ = ratio_loss(lambda x, t, y: ratio(x).squeeze(1), torch.zeros(8, 1), fake, None, draws, options)
    loss.backward()
    assert fake.grad is not None
    return fake.grad


def test_a_penalty_over_the_whole_batch_is_refused():
    with pytest.raises(UserError, match=r"^ratio.penalty_share: 1"):
        DensityRatio(penalty_share=1.0)


def test_a_ratio_loss_with_its_defaults_teaches():
    assert gradient_at(0.0, DensityRatio()).abs().max() > 0


def test_reverse_kl_teaches_samples_that_the_critic_is_very_sure_of():
    """Its weight is 1 wherever they are; so far from the data, it is what has a gradient at all."""
    options = DensityRatio(divergence="reverse_kl", penalty=0.0)
    torch.testing.assert_close(gradient_at(-20.0, options), gradient_at(-5.0, options), rtol=1e-3, atol=0)


def test_a_guided_teacher_without_classes_is_refused_before_training():
    with pytest.raises(UserError, match="guidance"):
        phases_of(one_step(network__classes=0, onestep__method="score", onestep__score__guidance=2.0))


# --- of what was made before ------------------------------------------------------------------------------------------


def test_a_run_without_one_step_is_read_whatever_its_settings_were_called(tmp_path: Path):
    described = json.loads(settings.to_json(recipe("digits")))
    described["onestep"] |= {"codec_share": 0.25, "codec_weight": 1.0, "selection": 1000}
    (tmp_path / "config.json").write_text(json.dumps({"onefold": "0.1.0", "config": described}), encoding="utf-8")
    assert load_run(tmp_path).config == recipe("digits")
    described["phases"] = ["one_step"]
    (tmp_path / "config.json").write_text(json.dumps({"onefold": "0.1.0", "config": described}), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_run(tmp_path)
    told = str(error.value)
    assert told.startswith(f"{tmp_path / 'config.json'}: onestep: unknown setting 'codec_share'")
    assert told.endswith(
        f"a one-step run of an earlier version: {tmp_path / 'model'} can still be sampled; for more, convert the run "
        "that it came from again"
    )


def written(folder: Path, *phases: str, **changes: Any) -> Path:
    """The configuration of a run, with settings of its own in sections of that."""
    described = json.loads(settings.to_json(recipe("digits")))
    described["phases"] = list(phases)
    for name, value in changes.items():
        section, setting = name.split("__")
        described[section][setting] = value
    (folder / "config.json").write_text(json.dumps({"onefold": "0.1.0", "config": described}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("phases", [("self_distillation",), ("autoencoder", "diffusion")])
def test_settings_of_one_step_that_are_still_known_are_kept(phases: tuple[str, ...], tmp_path: Path):
    """A run is read as it was written first; only where that fails, and one step has no part in it, without these."""
    config = load_run(written(tmp_path, *phases, onestep__measured=77)).config
    assert (config.onestep.measured, config.phases) == (77, phases)
    config = load_run(written(tmp_path, *phases, onestep__measured=77, onestep__codec_share=0.5)).config
    assert config == recipe("digits").with_changes({"phases": phases})


def test_settings_of_other_sections_are_never_dropped(tmp_path: Path):
    for changes in ({"training__bogus": 1}, {"training__bogus": 1, "onestep__codec_share": 0.5}):
        with pytest.raises(UserError, match="bogus"):
            load_run(written(tmp_path, "self_distillation", **changes))


def test_a_run_whose_phases_include_one_s_own_is_not_read_without_its_settings(tmp_path: Path):
    """Which may read those of one step."""
    with pytest.raises(UserError) as error:
        load_run(written(tmp_path, "self_distillation", "my_own", onestep__codec_share=0.5))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("described", [[], {"config": []}, {"config": {}}, {"config": {"phases": None}}, "text"])
def test_what_is_no_configuration_is_one_line(described: Any, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        load_run(tmp_path)


# --- of weights that earlier ones lack --------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [(), ("vector",), ("arrival",), ("vector", "arrival")])
def test_a_module_is_filled_with_zeros_only_if_all_of_it_is_missing(missing: tuple[str, ...]):
    """A part of it that is missing is a damaged file."""
    holder = nn.ModuleDict({"jump": Jump(Trunk(8, 1, 2, 2, 2)), "other": nn.Linear(2, 2)})
    with torch.no_grad():
        for p in holder.parameters():
            p.normal_()
    given = {name: value.clone() for name, value in holder.state_dict().items()}
    for name in missing:
        del given[f"jump.{name}"]
    other = nn.ModuleDict({"jump": Jump(Trunk(8, 1, 2, 2, 2)), "other": nn.Linear(2, 2)})
    if len(missing) == 1:
        with pytest.raises(RuntimeError, match=rf"jump\.{missing[0]}"):
            other.load_state_dict(given)
        return
    with torch.no_grad():
        other.get_parameter("jump.vector").fill_(5.0)
    other.load_state_dict(given)
    expected = (
        holder.state_dict() if not missing else {n: v * (n[:4] != "jump") for n, v in holder.state_dict().items()}
    )
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_an_earlier_ratio_network_is_read(tmp_path: Path):
    ratio = RatioNet.of(begun(one_step()).network)
    ratio.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if not name.startswith("scale.")}, path)
    found = RatioNet.from_pretrained(tmp_path)
    assert torch.equal(found.scale(torch.rand(3)), torch.ones(3))


# --- of measurements and pictures -------------------------------------------------------------------------------------


def flat(images: Tensor) -> Tensor:
    return images.flatten(1).double()


def test_five_images_are_enough_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 255, (5, 8, 8, 1), dtype=np.uint8))
    data, config = open_dataset(str(tmp_path / "images.npz")), one_step(network__classes=0, onestep__selects=False)
    extractor = SimpleNamespace(features=flat, sha256="", classes=0)

    def extractor_for(*arguments: Any) -> SimpleNamespace:
        return extractor

    monkeypatch.setattr(one_step_monitor, "extractor_for", extractor_for)
    OneStepMonitor(Run(tmp_path, config), data, data, torch.device("cpu"), print, warmup=0)


def test_a_further_pass_is_that_of_the_parts_that_have_a_turn(monkeypatch: pytest.MonkeyPatch):
    config, seen = one_step(onestep__critic_warmup=0), list[str]()
    state, (x, y) = begun(config), digits()
    honest = estimates.accumulate

    def accumulate(state: TrainingState, part: Part, *rest: Any) -> dict[str, Tensor]:
        seen.append("+".join(trained.name for trained in part.trains))
        return honest(state, part, *rest)

    monkeypatch.setattr(estimates, "accumulate", accumulate)
    estimates._passes(state, phases_of(config)[0], x, y, config, begin=0)
    assert seen == ["critic+network"]

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

import onefold
from data_images import noise
from onefold import settings
from onefold.data import open_dataset
from onefold.errors import UserError
from onefold.networks.one_network import OneFold
from onefold.recipes import RECIPES, recipe
from onefold.training.config import Config, TrainingConfig
from onefold.training.prepare import fit_to_data


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_whole_configuration(name: str):
    config = recipe(name)
    assert config.recipe == name
    assert settings.from_json(Config, settings.to_json(config), name) == config
    assert config == recipe(name), "a recipe has no randomness"
    with torch.device("meta"):
        OneFold(config.network)
    training = config.training
    assert training.warmup < training.images
    assert training.log_every <= training.sample_every <= training.images
    assert training.checkpoint_every <= training.images
    assert max(training.ema_half_lives) < training.images
    assert RECIPES[name].__doc__


def test_the_package_offers_recipes():
    assert onefold.recipe("digits") == recipe("digits")
    with pytest.raises(FrozenInstanceError):
        onefold.recipe("digits").training.batch = 3  # type: ignore[misc]


def test_the_recipe_of_the_embedded_digits_fits_them():
    config = recipe("digits")
    fitted = fit_to_data(config, open_dataset(config.data.source))
    objective = replace(config.objective, flip=False)
    assert fitted == replace(config, phases=("self_distillation",), objective=objective), "which is written down"


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_by_group_and_by_dotted_name_are_the_same():
    by_group = recipe("digits", training={"batch": 32, "seed": 7}, network={"depth": 6})
    by_name = recipe("digits", **{"training.batch": 32, "training.seed": 7, "network.depth": 6})
    assert by_group == by_name
    assert (by_group.training.batch, by_group.training.seed, by_group.network.depth) == (32, 7, 6)
    assert by_group.training.learning_rate == recipe("digits").training.learning_rate


def test_overrides_reach_every_depth_and_kind():
    config = recipe(
        "digits",
        objective={"time.kind": "logit_normal", "draws": 3},
        training={"betas": [0.8, 0.9], "ema_half_lives": (10, 20, 30), "learning_rate": 1, "micro_batch": None},
        data={"test": None},
    )
    assert config.objective.time.kind == "logit_normal"
    assert config.training.betas == (0.8, 0.9)
    assert config.training.ema_half_lives == (10, 20, 30)
    assert config.training.learning_rate == 1.0
    assert config.data.test is None


def test_a_whole_group_can_be_given():
    training = TrainingConfig(images=5, batch=1)
    assert recipe("digits", training=training) == replace(recipe("digits"), training=training)


def test_overrides_make_a_new_configuration():
    config = recipe("digits")
    changed = config.with_changes({"training.batch": 3})
    assert (config.training.batch, changed.training.batch) == (64, 3)


def test_settings_that_depend_on_each_other_may_come_in_any_order():
    wide = {"network.width": 96, "network.heads": 6}
    assert recipe("digits", **wide) == recipe("digits", **dict(reversed(wide.items())))
    images = {"network.image_size": (9, 9), "network.patch": 3}
    assert recipe("digits", **images) == recipe("digits", **dict(reversed(images.items())))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"bogus": 1}, "bogus"),
        ({"training": {"bogus": 1}}, "training.bogus"),
        ({"training.bogus": 1}, "training.bogus"),
        ({"training.batch.more": 1}, "training.batch.more"),
        ({"training.batch": "64"}, "training.batch"),
        ({"training.batch": 6.5}, "training.batch"),
        ({"training.batch": True}, "training.batch"),
        ({"training.batch": None}, "training.batch"),
        ({"training.optimizer": "sgd"}, "training.optimizer"),
        ({"training.betas": [0.9]}, "training.betas"),
        ({"training": {"batch": 0}}, "training.batch"),
        ({"training": {"seed": -1}}, "training.seed"),
        ({"training": {"learning_rate": 0.0}}, "training.learning_rate"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"training": {"betas": (2.0, 2.0)}}, "training.betas"),
        ({"training": {"warmup": -1}}, "training.warmup"),
        ({"training": {"decay": 2.0}}, "training.decay"),
        ({"training": {"weight_decay": -1.0}}, "training.weight_decay"),
        ({"training": {"ema_ramp": -1.0}}, "training.ema_ramp"),
        ({"training": {"ema_half_lives": ()}}, "training.ema_half_lives"),
        ({"training": {"micro_batch": 65}}, "training.micro_batch"),
        ({"network": {"width": 30}}, "network"),
        ({"network": {"classes": -1}}, "network.classes"),
        ({"objective": {"label_dropout": 1.5}}, "objective.label_dropout"),
        ({"objective": {"time.std": -1.0}}, "std"),
        ({"data": {"holdout": 1.0}}, "data.holdout"),
        ({"data": {"workers": -1}}, "data.workers"),
        ({"sampler": {"steps": 0}}, "steps"),
        ({"sampler": {"guidance_interval": (0.5, 0.2)}}, "guidance_interval"),
    ],
    ids=str,
)
def test_overrides_that_make_no_sense_are_refused(overrides: dict[str, object], named: str):
    with pytest.raises(UserError) as caught:
        recipe("digits", **overrides)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(UserError, match=r"'cifar'.*digits, fashion, cifar10, imagenet256-s"):
        recipe("cifar")


# --- fitted to data ---------------------------------------------------------------------------------------------------


def test_a_network_takes_size_channels_and_classes_from_the_data(tmp_path):
    np.savez(tmp_path / "images.npz", images=noise(9, 6, 10, 3), labels=np.arange(9) % 4)
    config = fit_to_data(recipe("digits"), open_dataset(tmp_path / "images.npz"))
    network = config.network
    assert (network.image_size, network.channels, network.classes) == ((6, 10), 3, 4)
    assert network == replace(recipe("digits").network, image_size=(6, 10), channels=3, classes=4)
    digits = recipe("digits")
    same = replace(digits, phases=("self_distillation",), objective=replace(digits.objective, flip=False))
    assert replace(config, network=same.network) == same, "nothing else changes"


def test_an_unconditional_network_stays_so(tmp_path):
    np.savez(tmp_path / "images.npz", images=noise(9, 8, 8, 1), labels=np.arange(9) % 4)
    assert (
        fit_to_data(recipe("digits", network={"classes": 0}), open_dataset(tmp_path / "images.npz")).network.classes
        == 0
    )


def test_data_without_classes_make_it_unconditional(tmp_path):
    np.savez(tmp_path / "images.npz", images=noise(9, 8, 8, 1))
    assert fit_to_data(recipe("digits"), open_dataset(tmp_path / "images.npz")).network.classes == 0


def test_a_patch_that_does_not_divide_the_images_is_refused(tmp_path):
    np.savez(tmp_path / "images.npz", images=noise(9, 9, 9, 1))
    with pytest.raises(UserError, match="9×9 is not divisible by patch 2"):
        fit_to_data(recipe("digits"), open_dataset(tmp_path / "images.npz"))

"""Settings: what is written is read back, and what does not fit is refused with the key's name."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from onefold.errors import UserError
from onefold.networks import NetworkConfig
from onefold.objectives.self_distillation import SelfDistillation
from onefold.paths import TimeDistribution
from onefold.sampling import SOLVERS, Sampler
from onefold.schedule import Schedule
from onefold.settings import from_json, override, to_json
from onefold.training.config import Config, DataConfig, TrainingConfig

# --- round trips, over settings that differ from the defaults in every field ---

share, positive, rate = st.floats(0, 1), st.integers(1, 10**7), st.floats(1e-6, 10)


def literals(kind: type, name: str) -> st.SearchStrategy[str]:
    return st.sampled_from(typing.get_args(typing.get_type_hints(kind)[name]))


@st.composite
def networks(draw: st.DrawFn) -> NetworkConfig:
    patch, heads = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    size = st.integers(1, 32).map(lambda k: k * patch)
    return NetworkConfig(
        image_size=(draw(size), draw(size)),
        channels=draw(positive),
        classes=draw(st.integers(0, 1000)),
        patch=patch,
        latent_channels=draw(positive),
        width=heads * 4 * draw(st.integers(1, 32)),
        depth=draw(positive),
        heads=heads,
        latent_norm=draw(literals(NetworkConfig, "latent_norm")),
        output=draw(literals(NetworkConfig, "output")),
    )


objectives = st.builds(
    SelfDistillation,
    target=literals(SelfDistillation, "target"),
    loss=literals(SelfDistillation, "loss"),
    through=st.booleans(),
    draws=positive,
    time=st.builds(TimeDistribution, literals(TimeDistribution, "kind"), mean=st.floats(-3, 3), std=rate, shift=rate),
    weighting=literals(SelfDistillation, "weighting"),
    reconstruction=literals(SelfDistillation, "reconstruction"),
    reconstruction_weight=rate,
    denoising_weight=rate,
    perceptual_weight=rate,
    decoder_noise=share,
    decoder_noise_from=share,
    label_dropout=share,
    flip=st.booleans(),
)
data = st.builds(
    DataConfig,
    source=st.text(),
    test=st.none() | st.text(),
    holdout=st.floats(0.01, 0.99),
    unreadable=literals(DataConfig, "unreadable"),
    workers=positive,
)
trainings = st.builds(
    TrainingConfig,
    images=positive,
    batch=st.integers(64, 4096),
    micro_batch=st.none() | st.integers(1, 64),
    optimizer=literals(TrainingConfig, "optimizer"),
    learning_rate=rate,
    muon_rate=rate,
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    weight_decay=share,
    warmup=positive,
    decay=share,
    decay_shape=literals(TrainingConfig, "decay_shape"),
    final_rate=share,
    clip=rate,
    ema_half_lives=st.lists(positive, min_size=1, max_size=3).map(tuple),
    ema_ramp=rate,
    precision=literals(TrainingConfig, "precision"),
    compile=literals(TrainingConfig, "compile"),
    device=st.sampled_from(["auto", "cpu", "cuda:1"]),
    seed=st.integers(0, 2**63 - 1),
    log_every=positive,
    sample_every=positive,
    checkpoint_every=positive,
    keep_last=positive,
    keep_every=st.integers(0, 10**7),
)


@st.composite
def samplers(draw: Any) -> Sampler:
    solver = draw(st.sampled_from(sorted(SOLVERS.keys() - {"one_pass"})))  # which no configuration has
    return Sampler(
        steps=draw(positive),
        solver=solver,
        guidance=1.0 if Sampler(1, solver).jumps else draw(rate),
        guidance_interval=draw(st.tuples(share, share).map(lambda pair: (min(pair), max(pair)))),
        shift=draw(rate),
        start=draw(st.floats(0, 1, exclude_max=True)),
    )


configs = st.builds(
    Config,
    recipe=st.text(),
    network=networks(),
    objective=objectives,
    data=data,
    training=trainings,
    sampler=samplers(),
)


@hypothesis_settings(max_examples=60)
@given(configs)
def test_a_configuration_is_read_back_as_it_was(config: Config):
    text = to_json(config)
    found = from_json(Config, text, "config.json")
    assert found == config
    assert hash(found) == hash(config)  # lists have become tuples again
    assert to_json(found) == text


@given(configs)
@hypothesis_settings(max_examples=10)
def test_what_is_written_is_complete_and_strict(config: Config):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    def check(kind: Any, value: dict[str, Any]) -> None:
        assert list(value) == [f.name for f in dataclasses.fields(kind)]
        for name, hint in typing.get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                check(hint, value[name])

    assert "größe" in to_json(Config(recipe="größe"))
    text = to_json(config)
    assert text.endswith("}\n")
    check(Config, json.loads(text, parse_constant=refuse))


def test_defaults_fill_what_is_left_out():
    assert from_json(Config, "{}", "here") == Config()
    found = from_json(Config, '{"training": {"batch": 8}, "objective": {"time": {"shift": 2}}}', "here")
    assert found.training == TrainingConfig(batch=8)
    assert found.objective.time == TimeDistribution(shift=2.0)
    assert isinstance(found.objective.time.shift, float)


# --- what is refused ---


@dataclass(frozen=True)
class Inner:
    a: int
    b: float = 1.0


@dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["x", "y"] = "x"
    pair: tuple[int, int] = (1, 2)
    many: tuple[float, ...] = ()
    maybe: int | None = None
    name: str = ""
    flag: bool = False
    second: Inner = field(default_factory=lambda: Inner(2))


REFUSED = [
    ("{", "not readable as JSON"),
    ("", "not readable as JSON"),
    ('{"inner": {"a": 1, "a": 2}}', "not readable as JSON"),
    ('{"inner": {"a": 1, "b": NaN}}', "not readable as JSON"),
    ('{"inner": {"a": 1, "b": -Infinity}}', "not readable as JSON"),
    ('{"inner": {"a": 1, "b": 1e999}}', "inner: b: inf is not a finite number"),
    ("[]", "[] is not a group of settings"),
    ("{}", "setting 'inner' is missing"),
    ('{"inner": {}}', "inner: setting 'a' is missing"),
    ('{"inner": 3}', "inner: 3 is not a group of settings"),
    ('{"inner": null}', "inner: None is not a group of settings"),
    ('{"inner": {"a": 1, "c": 2}}', "inner: unknown setting 'c'; Inner has a, b"),
    ('{"inner": {"a": 1}, "Kind": "x"}', "unknown setting 'Kind'; Outer has inner, kind"),
    ('{"inner": {"a": 1.5}}', "inner: a: 1.5 is not a whole number"),
    ('{"inner": {"a": 1.0}}', "inner: a: 1.0 is not a whole number; write 1"),
    ('{"inner": {"a": true}}', "inner: a: True is not a whole number"),
    ('{"inner": {"a": "1"}}', "inner: a: '1' is not a whole number"),
    ('{"inner": {"a": 1, "b": true}}', "inner: b: True is not a number"),
    ('{"inner": {"a": 1, "b": null}}', "inner: b: None is not a number"),
    ('{"inner": {"a": 1}, "kind": "z"}', "kind: 'z' is not one of 'x', 'y'"),
    ('{"inner": {"a": 1}, "kind": ["x"]}', "kind: ['x'] is not one of 'x', 'y'"),
    ('{"inner": {"a": 1}, "pair": [1]}', "pair: [1] is not a list of 2 values"),
    ('{"inner": {"a": 1}, "pair": 12}', "pair: 12 is not a list of 2 values"),
    ('{"inner": {"a": 1}, "pair": "12"}', "pair: '12' is not a list of 2 values"),
    ('{"inner": {"a": 1}, "pair": [1, 2.5]}', "pair: 2.5 is not a whole number"),
    ('{"inner": {"a": 1}, "many": [1, "2"]}', "many: '2' is not a number"),
    ('{"inner": {"a": 1}, "maybe": "no"}', "maybe: 'no' is not a whole number"),
    ('{"inner": {"a": 1}, "name": 3}', "name: 3 is not text"),
    ('{"inner": {"a": 1}, "flag": 1}', "flag: 1 is not true or false"),
    ('{"inner": {"a": 1}, "second": {"a": 1, "x\\ny": 0}}', "second: unknown setting 'x\\ny'"),
]


@pytest.mark.parametrize(("text", "complaint"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(text: str, complaint: str):
    with pytest.raises(UserError) as error:
        from_json(Outer, text, "run/config.json")
    assert str(error.value).startswith(f"run/config.json: {complaint}")
    assert "\n" not in str(error.value)


def test_optional_and_variadic_values():
    found = from_json(Outer, '{"inner": {"a": 1, "b": 2}, "maybe": 3, "many": [1, 2.5], "pair": [3, 4]}', "here")
    assert found == Outer(Inner(1, 2.0), maybe=3, many=(1.0, 2.5), pair=(3, 4))
    assert from_json(Outer, '{"inner": {"a": 1}, "maybe": null}', "here").maybe is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"training": {"bacth": 8}}', "training: unknown setting 'bacth'; TrainingConfig has images, optimizer"),
        ('{"training": {"batch": "8"}}', "training: batch: '8' is not a whole number"),
        ('{"objective": {"time": {"kind": "beta"}}}', "objective: time: kind: 'beta' is not one of 'uniform'"),
    ],
)
def test_a_configuration_names_the_key(text: str, complaint: str):
    with pytest.raises(UserError) as error:
        from_json(Config, text, "config.json")
    assert str(error.value).startswith(f"config.json: {complaint}")


# --- changes ---


def test_changes_reach_every_depth_and_nothing_else():
    config = Config().with_changes(
        {"training.batch": 8, "objective.time.shift": 2, "data.test": "test.zip", "network.image_size": [16, 8]}
    )
    assert config == dataclasses.replace(
        Config(),
        training=TrainingConfig(batch=8),
        objective=SelfDistillation(time=TimeDistribution(shift=2.0)),
        data=DataConfig(test="test.zip"),
        network=NetworkConfig(image_size=(16, 8)),
    )
    assert Config() == Config().with_changes({})


def test_a_group_may_be_changed_as_a_whole():
    training = TrainingConfig(batch=8)
    assert override(Config(), {"training": training}).training is training
    assert override(Config(), {"training": training, "training.seed": 3}).training == TrainingConfig(batch=8, seed=3)
    schedule = Schedule(images=96)
    own = override(Config(), {"onestep.schedule": schedule})  # a group that need not be there
    assert own.onestep.schedule is schedule
    assert override(own, {"onestep.schedule": None}) == Config()
    assert from_json(Config, to_json(own), "config.json") == own
    with pytest.raises(UserError, match=r"^onestep\.schedule: .* is not a group of settings"):
        override(Config(), {"onestep.schedule": SelfDistillation()})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"training.bacth": 8}, "training.bacth: no such setting; training has images, optimizer"),
        ({"objective.tim": 1}, "objective.tim: no such setting; objective has target, loss, through, draws, time.…, "),
        ({"trainin.batch": 8}, "trainin.batch: no such setting; there are recipe, network.…, phases"),
        ({"training.batch.size": 8}, "training.batch.size: batch is a single value and has no part 'size'"),
        ({"training.batch": "8"}, "training.batch: '8' is not a whole number"),
        ({"training.batch": True}, "training.batch: True is not a whole number"),
        ({"training.batch": 0}, "training.batch: 0 is not positive"),
        ({"objective.target": "teacher"}, "objective.target: 'teacher' is not one of 'ema'"),
        ({"objective.time": 3}, "objective.time: 3 is not a group of settings"),
        ({"training": NetworkConfig()}, "training: NetworkConfig("),
        ({"training.seed": NetworkConfig()}, "training.seed: NetworkConfig("),
        ({"": 3}, ": no such setting"),
    ],
)
def test_changes_that_do_not_fit_are_refused_in_one_line(changes: dict[str, Any], complaint: str):
    with pytest.raises(UserError) as error:
        override(Config(), changes)
    assert str(error.value).startswith(complaint)
    assert "\n" not in str(error.value)


# --- the limits that the configuration itself knows ---


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"training.images": 0}, "training.images: 0 is not positive; give at least 1"),
        ({"training.keep_last": 0}, "training.keep_last: 0 is not positive"),
        ({"training.micro_batch": 65}, "training.micro_batch: 65 is not between 1 and the batch, 64"),
        ({"training.micro_batch": 0}, "training.micro_batch: 0 is not between"),
        ({"training.ema_half_lives": []}, "training.ema_half_lives: give at least one"),
        ({"training.ema_half_lives": [4000, 0]}, "training.ema_half_lives: give at least one"),
        ({"training.learning_rate": 0}, "training.learning_rate: 0.0 is not positive"),
        ({"training.clip": float("nan")}, "training.clip: nan is not"),
        ({"training.seed": -1}, "training.seed: -1 is out of range"),
        ({"training.seed": 2**63}, "training.seed: 9223372036854775808 is out of range"),
        ({"training.warmup": -100}, "training.warmup: -100 is not"),
        ({"training.decay": -0.5}, "training.decay: -0.5 is not"),
        ({"training.decay": 1.5}, "training.decay: 1.5 is not"),
        ({"training.final_rate": -1}, "training.final_rate: -1.0 is not"),
        ({"training.weight_decay": -1}, "training.weight_decay: -1.0 is not"),
        ({"training.betas": [0.9, 1.0]}, "training.betas: (0.9, 1.0) must both be below 1"),
        ({"training.betas": [-0.1, 0.9]}, "training.betas: -0.1 is not"),
        ({"training.ema_ramp": -1}, "training.ema_ramp: -1.0 is not"),
        ({"training.keep_every": -1}, "training.keep_every: -1 is not"),
        ({"objective.denoising_weight": -1}, "objective.denoising_weight: -1.0 is not"),
        ({"objective.time.shift": 0}, "objective.time.shift: 0.0 is not"),
        ({"objective.time.std": -1}, "objective.time.std: -1.0 is not"),
        ({"objective.time.mean": float("inf")}, "objective.time.mean: inf is not a finite number"),
        ({"data.workers": -1}, "data.workers: -1 is not"),
        ({"data.holdout": 1.0}, "data.holdout: 1.0 is not between 0 and 1"),
        ({"data.holdout": 0}, "data.holdout: 0.0 is not between 0 and 1"),
    ],
)
def test_limits_are_named(changes: dict[str, Any], complaint: str):
    with pytest.raises(UserError) as error:
        override(Config(), changes)
    assert str(error.value).startswith(complaint)
    assert "\n" not in str(error.value)


MISSPELT = [
    (SelfDistillation, "target"),
    (SelfDistillation, "loss"),
    (SelfDistillation, "weighting"),
    (SelfDistillation, "reconstruction"),
    (TimeDistribution, "kind"),
    (TrainingConfig, "optimizer"),
    (TrainingConfig, "decay_shape"),
    (NetworkConfig, "latent_norm"),
    (NetworkConfig, "output"),
    (Sampler, "solver"),
]


@pytest.mark.parametrize(("kind", "name"), MISSPELT)
def test_misspelt_choices_are_refused_in_python_too(kind: type, name: str):
    with pytest.raises(UserError, match=name):
        kind(**{name: "misspelt"})

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import onefold
from data_images import encode, noise, write_folder, write_zip
from helpers_runs import differing, log, newest, tiny
from onefold import settings
from onefold.data import open_dataset, read_all
from onefold.errors import UserError
from onefold.pictures import grids
from onefold.sampling import Sampler
from onefold.training import loop
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config, DataConfig
from onefold.training.datasets import open_data, split
from onefold.training.loop import train
from onefold.training.run import Run, load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(), tmp_path_factory.mktemp("run") / "new" / "run", quiet=True)


def of(source: Path, **changes: object) -> Config:
    """Two steps on some data; a checkpoint and pictures at the end."""
    return tiny(data__source=str(source), data__test=None, training__images=32, **changes)


class Seen:
    """Every batch that a training step gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[torch.Tensor] = []
        self.labels: list[int] = []
        honest = loop.training_step

        def step(state, x, y, config):
            self.images.append(((x + 1) * 127.5).round().to(torch.uint8))
            self.labels += y.tolist()
            return honest(state, x, y, config)

        monkeypatch.setattr(loop, "training_step", step)

    @property
    def contents(self) -> set[bytes]:
        return {image.numpy().tobytes() for part in self.images for image in part}


def contents(data: onefold.data.Dataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in read_all(data)[0]}


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_the_contract_says(run: Run):
    found = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    parts = {"network.safetensors", "average-0.safetensors", "average-1.safetensors", "optimizer.safetensors"}
    kept = {
        f"checkpoints/{images:09d}/{name}"
        for images in (144, 160)
        for name in parts | {"state.json", "checksums.json", "COMPLETE"}
    }
    pictures = {f"samples/{n:09d}{kind}.png" for n in (16, 160) for kind in ("", "-reconstructions")}
    model = {"model/config.json", "model/sampler.json", "model/model.safetensors"}
    assert found == kept | pictures | {"config.json", "data.json", "log.jsonl"} | model


def test_config_json_holds_the_whole_configuration(run: Run):
    described = json.loads((run.folder / "config.json").read_text())
    assert described.keys() == {"onefold", "commit", "config", "extensions"}
    assert described["extensions"] == []
    assert described["onefold"] == onefold.__version__
    assert described["commit"] is None or len(described["commit"]) == 40
    assert described["config"] == json.loads(settings.to_json(run.config))
    assert load_run(run.folder).config == run.config


def test_automatic_choices_are_written_down(tmp_path: Path):
    run = train(tiny(training__images=16, training__precision="auto"), tmp_path / "run", quiet=True)
    training = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["training"]
    assert training["precision"] in ("float32", "bfloat16")
    assert run.config.training.precision == training["precision"]


def test_the_model_is_the_last_average_of_the_newest_checkpoint(run: Run):
    tensors = newest(run.folder)
    model = {name.split()[-1]: value for name, value in tensors.items() if " model.safetensors" in name}
    last = {name.split()[-1]: value for name, value in tensors.items() if " average-1.safetensors" in name}
    network = {name.split()[-1]: value for name, value in tensors.items() if " network.safetensors" in name}
    assert differing(model, last) == []
    assert differing(model, network) != []
    assert differing(dict(run.network.state_dict()), model) == []
    assert not run.network.training


def test_a_run_without_a_checkpoint_has_no_network(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": json.loads(settings.to_json(tiny()))}))
    fresh = load_run(tmp_path / "run")
    assert fresh.history == []
    with pytest.raises(UserError, match="no model yet"):
        _ = fresh.network


def test_pictures_name_their_seeds_and_labels(run: Run):
    with Image.open(run.folder / "samples" / "000000160.png") as image:
        assert image.text == {"seeds": "0…49", "labels": "(seed + k) mod 10", "steps": "2", "guidance": "1.0"}
    with Image.open(run.folder / "samples" / "000000160-reconstructions.png") as image:
        assert image.size == (10 * 49 + 1, 6 * 49 + 1), "three rows of test images, each above its own"


def test_pictures_keep_to_the_guidance_interval(run: Run, tmp_path: Path):
    """Of the times 0 and ½ of two steps, the one interval holds both and the other none."""
    pictures: list[bytes] = []
    for sampler in (Sampler(2), Sampler(2, guidance=4, guidance_interval=(0.1, 0.4)), Sampler(2, guidance=4)):
        run.network.sampler = sampler
        grids.sample_grid(run.network, tmp_path / "grid.png", count=4)
        with Image.open(tmp_path / "grid.png") as image:
            pictures.append(image.tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_quiet_it_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    train(tiny(training__images=16), tmp_path / "run", quiet=True)
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_it_says_what_it_trains_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    train(tiny(training__images=16), tmp_path / "run")
    start = "digits: 1,437 images to train on, 360 to test on, from digits:test; 10 classes: 0 (147), 1 ("
    assert start in capfd.readouterr().out


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_log_line_has_losses_norms_speed_and_memory(run: Run):
    expected = {"images", "reconstruction", "denoising", "gradient_norm", "images_per_second", "peak_memory"}
    for line in run.history:
        assert line.keys() - {"health"} == expected | {"rate_factor", "skipped"}
        assert all(np.isfinite(line[name]) for name in expected)
        assert line["images_per_second"] > 0
        assert line["peak_memory"] > 1e7
    assert [line["images"] for line in run.history] == [32, 64, 96, 128, 160]
    assert [line["rate_factor"] for line in run.history] == pytest.approx([1, 1, 0.8, 0.4, 0])


def test_a_log_line_has_the_means_of_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    values, honest = [], loop.training_step
    monkeypatch.setattr(loop, "training_step", lambda *args: values.append(honest(*args)) or values[-1])
    run = train(tiny(training__log_every=48), tmp_path / "run", quiet=True)
    assert [line["images"] for line in run.history] == [48, 96, 144, 160]
    for line, steps in zip(run.history, (values[:3], values[3:6], values[6:9], values[9:]), strict=True):
        for name in ("reconstruction", "denoising", "gradient_norm"):
            assert line[name] == pytest.approx(float(np.mean([step[name].item() for step in steps])), rel=1e-5)


def test_intervals_are_met_by_a_batch_that_does_not_divide_them(tmp_path: Path):
    """A batch of 24: due at the first step at or beyond each multiple; the run ends at or beyond its length."""
    config = tiny(training__batch=24, training__log_every=40, training__checkpoint_every=60, training__keep_last=9)
    run = train(config, tmp_path / "run", quiet=True)
    assert [line["images"] for line in run.history] == [48, 96, 120, 168]
    assert [int(path.name) for path in checkpoints(run.folder)] == [72, 120, 168]


def test_pictures_are_made_at_their_interval(tmp_path: Path):
    run = train(tiny(training__images=48, training__sample_every=32), tmp_path / "run", quiet=True)
    assert sorted(path.name for path in (run.folder / "samples").glob("?????????.png")) == [
        "000000016.png",  # the step that ends the first tenth
        "000000032.png",
        "000000048.png",
    ]


# --- what a run is a function of --------------------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_configuration(run: Run, tmp_path: Path):
    again = train(run.config, tmp_path / "again", quiet=True)
    assert differing(newest(run.folder), newest(again.folder)) == []
    assert log(run.folder) == log(again.folder)
    for name in ("000000160.png", "000000160-reconstructions.png"):
        assert (run.folder / "samples" / name).read_bytes() == (again.folder / "samples" / name).read_bytes()


def test_another_seed_is_another_run(run: Run, tmp_path: Path):
    other = train(run.config.with_changes({"training.seed": 1}), tmp_path / "other", quiet=True)
    assert log(run.folder)[-1]["reconstruction"] != log(other.folder)[-1]["reconstruction"]


@pytest.mark.parametrize("change", [{"training.log_every": 80}, {"training.sample_every": 80}, {"data.workers": 0}])
def test_what_is_told_and_how_it_is_read_changes_nothing(run: Run, tmp_path: Path, change: dict[str, object]):
    other = train(run.config.with_changes(change), tmp_path / "other", quiet=True)
    assert differing(newest(run.folder), newest(other.folder)) == []


# --- data -------------------------------------------------------------------------------------------------------------


def labelled_folder(folder: Path) -> Path:
    return write_folder(
        folder, {f"{c}/{k}.png": encode(noise(4, 6, 3, seed=50 * ord(c) + k)) for c in "abc" for k in range(16)}
    )


def test_a_folder_with_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = Seen(monkeypatch)
    run = train(of(labelled_folder(tmp_path / "images")), tmp_path / "run", quiet=True)
    network = run.config.network
    assert (network.image_size, network.channels, network.classes) == ((4, 6), 3, 3)
    assert set(seen.labels) == {0, 1, 2}
    assert run.network.sample(4, steps=1).shape == (4, 4, 6, 3)
    with pytest.raises(UserError, match="labels"):
        run.network.sample(1, labels=[4])


def test_classes_can_be_ignored(tmp_path: Path):
    run = train(of(labelled_folder(tmp_path / "images"), network__classes=0), tmp_path / "run", quiet=True)
    assert run.config.network.classes == 0
    with Image.open(tmp_path / "run" / "samples" / "000000032.png") as image:
        assert image.text["labels"] == "none"


def test_a_flat_zip_of_grey_images(tmp_path: Path):
    source = write_zip(tmp_path / "grey.zip", {f"{k}.png": encode(noise(8, 4, seed=k)) for k in range(40)})
    network = train(of(source), tmp_path / "run", quiet=True).config.network
    assert (network.image_size, network.channels, network.classes) == ((8, 4), 1, 0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("labels", [None, ["dog", "cat"] * 20])
def test_arrays_of_one_to_four_channels(tmp_path: Path, channels: int, labels: list[str] | None):
    arrays = {"images": noise(40, 6, 4, channels)} | ({} if labels is None else {"labels": np.array(labels)})
    np.savez(tmp_path / "images.npz", **arrays)
    run = train(of(tmp_path / "images.npz"), tmp_path / "run", quiet=True)
    network = run.config.network
    assert (network.image_size, network.channels, network.classes) == ((6, 4), channels, 0 if labels is None else 2)
    assert run.network.sample(3, steps=1).shape == (3, 6, 4, channels)


def test_training_never_sees_what_is_set_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.savez(tmp_path / "images.npz", images=noise(40, 4, 4, 1))
    seen = Seen(monkeypatch)
    config = of(tmp_path / "images.npz", data__holdout=0.2).with_changes({"training.images": 320})
    run = train(config, tmp_path / "run", quiet=True)
    training, test = open_data(run.config.data)
    assert (len(training), len(test)) == (32, 8)
    assert contents(training) | contents(test) == contents(open_dataset(tmp_path / "images.npz"))
    assert seen.contents == contents(training)
    assert not seen.contents & contents(test)


def test_the_cut_is_the_same_for_every_seed(tmp_path: Path):
    np.savez(tmp_path / "images.npz", images=noise(40, 4, 4, 1))
    one, two = (open_data(of(tmp_path / "images.npz", training__seed=seed).data)[1] for seed in (0, 1))
    assert one.digest() == two.digest()


def test_test_images_are_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = Seen(monkeypatch)
    train(tiny(training__images=1600, training__batch=160), tmp_path / "run", quiet=True)
    assert seen.contents <= contents(open_dataset("digits"))
    assert len(seen.contents & contents(open_dataset("digits:test"))) == 0


@pytest.mark.parametrize(
    "test",
    [
        {"images": noise(10, 4, 8, 1), "labels": np.arange(10) % 2},
        {"images": noise(10, 4, 4, 3), "labels": np.arange(10) % 2},
        {"images": noise(10, 4, 4, 1), "labels": np.arange(10) % 3},
        {"images": noise(10, 4, 4, 1)},
    ],
    ids=["size", "channels", "classes", "unlabelled"],
)
def test_unlike_test_images_are_refused(tmp_path: Path, test: dict[str, np.ndarray]):
    np.savez(tmp_path / "train.npz", images=noise(40, 4, 4, 1), labels=np.arange(40) % 2)
    np.savez(tmp_path / "test.npz", **test)
    config = of(tmp_path / "train.npz").with_changes({"data.test": str(tmp_path / "test.npz")})
    with pytest.raises(UserError, match=r"test\.npz.*train\.npz") as caught:
        train(config, tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing is made before the data are known to fit"


def test_images_that_patches_do_not_fill_are_refused(tmp_path: Path):
    np.savez(tmp_path / "images.npz", images=noise(40, 7, 9, 1))
    with pytest.raises(UserError, match="7×9 is not divisible by patch 2"):
        train(of(tmp_path / "images.npz"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_classes_of_the_test_images_have_the_same_names(tmp_path: Path):
    """Numbers are no names: which of them is which class nobody knows, unless an object counts its classes so."""
    train, test = (
        write_folder(
            tmp_path / name, {f"{c}/{k}.png": encode(noise(4, 4, 3, seed=k)) for c in classes for k in range(3)}
        )
        for name, classes in (("a", "xy"), ("b", "xz"))
    )
    with pytest.raises(UserError, match=r"b: has 1 class that .*a lacks \(z; there: x, y\); name its classes alike"):
        open_data(DataConfig(str(train), test=str(test)))
    np.savez(tmp_path / "c.npz", images=noise(6, 4, 4, 3), labels=np.arange(6) % 2)
    with pytest.raises(UserError, match=r"c\.npz: has 2 classes that .*a lacks \(0, 1; there: x, y\)"):
        open_data(DataConfig(str(train), test=str(tmp_path / "c.npz")))

    class Counted:
        image_shape, classes = (4, 4, 3), 2

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int):
            return noise(4, 4, 3, seed=index), index % 2

    _, counted = split(str(train), Counted(), DataConfig())
    assert (counted.class_names, counted.labels.tolist()) == (("x", "y"), [0, 1] * 3)


def test_unreadable_images_are_refused_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = labelled_folder(tmp_path / "images")
    (source / "b" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3\.png"):
        train(of(source), tmp_path / "refused", quiet=True)
    run = train(of(source, data__unreadable="skip"), tmp_path / "run", quiet=True)
    training, test = open_data(run.config.data)
    assert len(training) + len(test) == 47


def test_data_that_changed_are_refused_on_resume(tmp_path: Path):
    np.savez(tmp_path / "images.npz", images=noise(40, 4, 4, 1))
    train(of(tmp_path / "images.npz"), tmp_path / "run", quiet=True)
    np.savez(tmp_path / "images.npz", images=noise(40, 4, 8, 1))
    with pytest.raises(UserError, match=r"images\.npz") as caught:
        train(None, tmp_path / "run", resume=True, quiet=True)
    assert "\n" not in str(caught.value)


def test_data_too_large_for_memory_are_decoded_by_threads(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onefold.data.loader.IN_MEMORY", 0)
    other = train(run.config.with_changes({"data.workers": 3}), tmp_path / "other", quiet=True)
    assert differing(newest(run.folder), newest(other.folder)) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("onefold-data")]


# --- folders that cannot be used --------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(run: Run):
    before = newest(run.folder)
    with pytest.raises(UserError, match=r"holds a run already.*--resume"):
        train(tiny(), run.folder, quiet=True)
    assert differing(before, newest(run.folder)) == []


def test_other_files_are_not_mixed_with_a_run(tmp_path: Path):
    (tmp_path / "holiday.txt").write_text("photos")
    with pytest.raises(UserError, match="not an empty folder"):
        train(tiny(), tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


def test_an_empty_folder_is_taken(tmp_path: Path):
    assert train(tiny(training__images=16), tmp_path, quiet=True).folder == tmp_path


def test_a_single_process_says_that_it_shards_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tiny(training__images=16), tmp_path / "run", engine="fsdp")
    assert "engine fsdp: a single process holds every weight itself; torchrun starts several" in capsys.readouterr().err
    train(tiny(training__images=16), tmp_path / "quiet", engine="fsdp", quiet=True)
    assert capsys.readouterr().err == ""


def test_nothing_to_train_is_an_error():
    with pytest.raises(UserError, match="nothing to train"):
        train(None)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1, 2]", b'"config"', b"{", b'{"config": {}}\xff', b'{"config": {"bogus": 1}}', b'{"config": 3}'],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_resume_of_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="not a run"):
        train(None, tmp_path / "missing", resume=True)


def test_a_run_killed_within_a_log_line_can_be_read(run: Run, tmp_path: Path):
    (tmp_path / "config.json").write_text((run.folder / "config.json").read_text())
    (tmp_path / "log.jsonl").write_text((run.folder / "log.jsonl").read_text()[:-40])
    assert len(load_run(tmp_path).history) == len(run.history) - 1

"""Records: whole files, plain numbers, and no comparison of what is unlike."""

import json
from dataclasses import replace

import pytest

from onefold.errors import UserError
from onefold.metrics import Protocol, Record, Subject, protocol_differences

PROTOCOL = Protocol(
    data="digits",
    data_sha256="ab",
    split="test",
    extractor="digits",
    extractor_sha256="cd",
    resize="none",
    real_images=360,
    generated_images=1000,
    few_images=False,
    steps=50,
)
SUBJECT = Subject(
    model_sha256="12", training_seed=0, images_seen=640, checkpoint=320, training_commit="34", commit=None
)


def record(protocol: Protocol = PROTOCOL, subject: Subject = SUBJECT) -> Record:
    numbers = {"kid": 0.002, "reconstruction": {"psnr": 31.5, "ssim": 1}}
    return Record.of(protocol, subject, frechet_distance=1.25, **numbers)


def test_comes_back_from_a_file(tmp_path):
    path = tmp_path / "evaluation" / "test.json"
    record().write(path)
    assert Record.read(path) == record()
    assert json.loads(path.read_text())["protocol"]["real_images"] == 360
    assert json.loads(path.read_text())["subject"]["checkpoint"] == 320
    assert [p.name for p in path.parent.iterdir()] == ["test.json"]


def test_numbers_have_dotted_names():
    assert record().numbers() == {
        "frechet_distance": 1.25,
        "kid": 0.002,
        "reconstruction.psnr": 31.5,
        "reconstruction.ssim": 1,
    }


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    record().write(path)

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        Record.of(PROTOCOL, SUBJECT, kid=9.0).write(path)
    assert Record.read(path) == record()
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_like_records_compare_and_unlike_ones_name_their_differences():
    assert protocol_differences(record(), record()) == []
    other = record(replace(PROTOCOL, extractor_sha256="ef", steps=1))
    assert protocol_differences(record(), other) == ["extractor_sha256", "steps"]
    assert protocol_differences(record(), other, free={"steps"}) == ["extractor_sha256"]


def test_another_model_measured_alike_is_no_difference_of_protocol():
    others = {"model_sha256": "56", "training_seed": 1, "images_seen": 1280, "commit": "78"}
    assert protocol_differences(record(), record(subject=replace(SUBJECT, **others))) == []
    chosen = record(replace(PROTOCOL, selection="the best of ten"))
    assert protocol_differences(record(), chosen) == ["selection"], "for choosing is part of how one measures"


def test_a_field_that_only_one_record_has_differs():
    newer = record()
    newer["protocol"]["crop"] = None
    assert protocol_differences(record(), newer) == protocol_differences(newer, record()) == ["crop"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
def test_a_bad_number_leaves_no_file(tmp_path, bad):
    with pytest.raises(UserError) as error:
        Record.of(PROTOCOL, SUBJECT, latent={"std": bad}).write(tmp_path / "r.json")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_number_is_named(tmp_path):
    with pytest.raises(UserError, match=r"latent\.std is not a finite number"):
        Record.of(PROTOCOL, SUBJECT, latent={"std": float("nan")}).write(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("text", "cause"), [(None, "no such"), ("{", "no JSON"), ("[]", "no protocol"), ("{}", "no protocol")]
)
def test_wrong_files_are_one_line(tmp_path, text, cause):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=cause):
        Record.read(tmp_path / "r.json")

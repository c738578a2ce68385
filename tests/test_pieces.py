"""Pieces: rows of tensors in several files, read by any number of ranks and joined without being loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onefold.training import pieces
from onefold.training.engine import Ranks
from onefold.training.pieces import Pieces, write_piece

WHOLE = {
    "a.weight": torch.arange(35.0).view(7, 5),
    "a.bias": torch.tensor([1.5], dtype=torch.bfloat16),
    "b.count": torch.tensor(3),
    "b.levels": torch.arange(4),
    "b.none": torch.empty(0, 3),
}
DIVIDED = {"a.weight", "a.bias"}


def written(folder: Path, count: int) -> Pieces:
    """The rows of two tensors by so many ranks, the others by the first."""
    for k in range(count):
        rows = {name: value.chunk(count) if name in DIVIDED else [value] for name, value in WHOLE.items()}
        own = {name: each[k].contiguous() for name, each in rows.items() if k < len(each)}
        write_piece(own, folder, "network", k, count)
    return Pieces(folder, "network", count)


def test_one_file_has_the_plain_name(tmp_path: Path):
    written(tmp_path, 1)
    assert load_file(tmp_path / "network.safetensors").keys() == WHOLE.keys()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_any_number_of_files_has_the_same_tensors(tmp_path: Path, count: int):
    found = written(tmp_path, count)
    assert found.shapes == {name: tuple(value.shape) for name, value in WHOLE.items()}
    for name, value in WHOLE.items():
        assert found.whole(name).dtype == value.dtype
        assert torch.equal(found.whole(name), value)


@pytest.mark.parametrize(("count", "readers"), [(1, 3), (2, 3), (3, 2), (4, 8)])
def test_other_ranks_read_their_rows(tmp_path: Path, count: int, readers: int):
    found, weight = written(tmp_path, count), WHOLE["a.weight"]
    for k in range(readers):
        start, stop = Ranks(k, readers).span(len(weight))
        assert torch.equal(found.rows("a.weight", start, stop), weight[start:stop])


def test_joined_files_are_a_safetensors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "AT_ONCE", 12)
    found = written(tmp_path, 3)
    found.join(tmp_path / "all.safetensors")
    found.join(tmp_path / "a.safetensors", "a.")
    whole, part = load_file(tmp_path / "all.safetensors"), load_file(tmp_path / "a.safetensors")
    assert whole.keys() == WHOLE.keys()
    assert all(torch.equal(whole[name], value) for name, value in WHOLE.items())
    assert part.keys() == {"weight", "bias"}
    assert torch.equal(part["weight"], WHOLE["a.weight"])


def test_what_is_no_such_file_is_an_error(tmp_path: Path):
    written(tmp_path, 2)
    with pytest.raises(OSError, match="network-1-of-3"):
        Pieces(tmp_path, "network", 3)
    (tmp_path / "network-2-of-2.safetensors").write_bytes(b"other words")
    with pytest.raises(ValueError, match="is no safetensors file"):
        Pieces(tmp_path, "network", 2)

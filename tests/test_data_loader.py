import gc
import threading
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_images import cut, noise, png, write_zip
from onefold.data import Dataset, Loader, indices, open_dataset, read_all
from onefold.data.listing import Unreadable
from onefold.data.parallel import map_indices, map_ordered
from onefold.errors import UserError


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("onefold-data")]


@pytest.fixture(autouse=True)
def _no_threads_are_left():
    yield
    gc.collect()
    assert threads() == []


@pytest.fixture
def ds(tmp_path: Path) -> Dataset:
    files = {f"{c}/{k}.png": png(seed=10 * ord(c) + k) for c in "ab" for k in range(10)}
    return open_dataset(write_zip(tmp_path / "set.zip", files))


WAYS = [
    {"in_memory": None},
    {"in_memory": True, "workers": 3},
    {"in_memory": False},
    {"in_memory": False, "workers": 1},
    {"in_memory": False, "workers": 4},
]


@pytest.mark.parametrize("way", WAYS)
def test_batches_follow_the_order(ds: Dataset, way: dict):
    with Loader(ds, batch=6, seed=3, **way) as loader:
        for k, (x, y) in enumerate(islice(loader, 10)):
            chosen = indices(20, 3, 6 * k, 6)
            assert (x.dtype, y.dtype, x.shape, y.shape) == (torch.uint8, torch.int64, (6, 3, 6, 5), (6,))
            assert y.tolist() == ds.labels[chosen].tolist()
            for image, index in zip(x, chosen, strict=True):
                assert np.array_equal(image.numpy().transpose(1, 2, 0), ds[int(index)][0])
            assert loader.seen == 6 * (k + 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 7, 33])
def test_resuming_goes_on_where_it_stopped(ds: Dataset, way: dict, batch: int):
    with Loader(ds, batch=5, seed=1, **way) as loader:
        for _ in range(3):
            next(loader)
        seen = loader.seen
    with Loader(ds, batch=batch, seed=1, start=seen, **way) as loader:
        assert loader.seen == seen == 15
        x, y = next(loader)
        assert loader.seen == 15 + batch
    images, labels = read_all(ds)
    chosen = torch.from_numpy(indices(20, 1, 15, batch))
    assert torch.equal(x, images[chosen])
    assert torch.equal(y, labels[chosen])


def test_read_all(ds: Dataset):
    told = []
    x, y = read_all(ds, progress=lambda done, total: told.append((done, total)))
    assert (x.dtype, x.shape, y.dtype) == (torch.uint8, (20, 3, 6, 5), torch.int64)
    assert y.tolist() == ds.labels.tolist()
    assert all(np.array_equal(x[k].numpy().transpose(1, 2, 0), ds[k][0]) for k in range(20))
    assert told[-1] == (20, 20)
    some, labels = read_all(ds, [19, 0, 19])
    assert torch.equal(some, x[[19, 0, 19]])
    assert labels.tolist() == [1, 0, 1]
    none, _ = read_all(ds, [])
    assert none.shape == (0, 3, 6, 5)


def test_large_sets_are_not_read_at_once(ds: Dataset, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr("onefold.data.loader.read_all", lambda *_, **__: calls.append(1) or read_all(ds))
    monkeypatch.setattr("onefold.data.loader.IN_MEMORY", 20 * 6 * 5 * 3)
    Loader(ds, batch=2, seed=0)
    assert calls == [1]
    monkeypatch.setattr("onefold.data.loader.IN_MEMORY", 20 * 6 * 5 * 3 - 1)
    Loader(ds, batch=2, seed=0)
    assert calls == [1]


@pytest.fixture
def broken(tmp_path: Path) -> Dataset:
    files = {f"{k}.png": png(30, 30, seed=k) for k in range(8)}
    files["5.png"] = cut(files["5.png"])
    return open_dataset(write_zip(tmp_path / "broken.zip", files))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_unreadable_image_surfaces_where_it_would_have_been(broken: Dataset, workers: int):
    place = indices(8, 0, 0, 8).tolist().index(5)
    with Loader(broken, batch=1, seed=0, in_memory=False, workers=workers) as loader:
        for _ in range(place):
            next(loader)
        with pytest.raises(Unreadable, match=r"broken\.zip: 5\.png cannot be read"):
            next(loader)


def test_an_unreadable_image_is_named_when_reading_into_memory(broken: Dataset):
    with pytest.raises(Unreadable, match=r"5\.png cannot be read"):
        Loader(broken, batch=2, seed=0)


def test_closing_ends_the_threads(ds: Dataset):
    loader = Loader(ds, batch=2, seed=0, in_memory=False, workers=3)
    next(loader)
    assert threads()
    loader.close()
    assert threads() == []
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_dropping_ends_the_threads(ds: Dataset):
    loader = Loader(ds, batch=2, seed=0, in_memory=False, workers=3)
    next(loader)
    assert threads()
    del loader
    gc.collect()
    assert threads() == []


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"start": -1}, {"workers": -1}])
def test_numbers_out_of_range(ds: Dataset, wrong: dict):
    with pytest.raises(UserError, match="batch must be at least 1"):
        Loader(ds, **({"batch": 1, "seed": 0} | wrong))


def test_many_channels(tmp_path: Path):
    images = noise(5, 4, 3, 7)
    np.savez(tmp_path / "set.npz", images=images)
    x, y = next(Loader(open_dataset(tmp_path / "set.npz"), batch=5, seed=0))
    assert np.array_equal(x.numpy(), images[indices(5, 0, 0, 5)].transpose(0, 3, 1, 2))
    assert y.tolist() == [0] * 5


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_ordered_keeps_the_order_and_does_not_run_far_ahead(workers: int):
    taken = []

    def items():
        for k in count():
            taken.append(k)
            yield k

    results = map_ordered(lambda k: k * k, items(), workers=workers)
    assert list(islice(results, 50)) == [k * k for k in range(50)]
    assert len(taken) <= 50 + 2 * workers
    results.close()
    assert list(map_ordered(lambda k: -k, range(7), workers=workers)) == [0, -1, -2, -3, -4, -5, -6]


def test_each_tells_its_progress():
    told = []
    assert list(map_indices(lambda k: k + 1, range(100), lambda *pair: told.append(pair))) == list(range(1, 101))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (100, 100)
    assert len(told) > 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", [0, 5, 47])
def test_restarting_goes_on_as_a_fresh_loader_there(ds: Dataset, way: dict, start: int):
    with Loader(ds, batch=6, seed=3, **way) as loader, Loader(ds, batch=6, seed=3, start=start) as fresh:
        for _ in range(4):
            next(loader)
        loader.restart(start)
        assert loader.seen == start
        for (x, y), (fresh_x, fresh_y) in zip(islice(loader, 5), fresh, strict=False):
            assert torch.equal(x, fresh_x)
            assert torch.equal(y, fresh_y)
        assert loader.seen == start + 30


def test_restarting_keeps_what_is_in_memory(ds: Dataset, monkeypatch: pytest.MonkeyPatch):
    with Loader(ds, batch=6, seed=3, in_memory=True) as loader:
        monkeypatch.setattr(type(ds), "__getitem__", lambda *_: pytest.fail("read again"))
        loader.restart(12)
        assert torch.equal(next(loader)[1], torch.from_numpy(ds.labels[indices(20, 3, 12, 6)]))


def test_restarting_leaves_no_threads_behind(ds: Dataset):
    loader = Loader(ds, batch=2, seed=0, in_memory=False, workers=3)
    for _ in range(5):
        loader.restart(0)
        next(loader)
        assert 0 < len(threads()) <= 3
    loader.close()
    assert threads() == []
    loader.restart(4)
    assert threads() == []  # they begin with the first batch
    next(loader)
    del loader
    gc.collect()
    assert threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_restarting_after_an_error(broken: Dataset, workers: int):
    place = indices(8, 0, 0, 8).tolist().index(5)
    with Loader(broken, batch=1, seed=0, start=place, in_memory=False, workers=workers) as loader:
        with pytest.raises(Unreadable):
            next(loader)
        loader.restart(place + 1)
        assert next(loader)[0].shape == (1, 3, 30, 30)


def test_restarting_before_the_beginning(ds: Dataset):
    with Loader(ds, batch=2, seed=0) as loader, pytest.raises(UserError, match="start -1: an image position"):
        loader.restart(-1)

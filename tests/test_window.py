"""What a log line is the mean of, added up on the device."""

import json
import math

import pytest
import torch

from onefold.training.log import Window
from onefold.training.progress import in_words

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(False), torch.tensor(True)


def window(*steps: tuple[dict[str, float], torch.Tensor]) -> Window:
    made = Window()
    for values, skipped in steps:
        made.begin()
        made.add({name: torch.tensor(value) for name, value in values.items()}, skipped=skipped)
        made.end(16)
    return made


def means(of: Window) -> dict[str, float | None]:
    found = of.means()
    speed = found.pop("images_per_second")
    assert speed is None or speed > 0
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, 7.0])
def test_skipped_steps_do_not_enter(value: float):
    steps = [({"a": 1.0}, GOOD), ({"a": value}, BAD), ({"a": 2.0}, GOOD)]
    assert means(window(*steps)) == {"a": 1.5}
    assert means(window(*reversed(steps))) == {"a": 1.5}


def test_a_value_of_which_every_step_was_skipped_is_not_there():
    seen = window(({"a": 1.0, "b": math.nan}, BAD), ({"a": 3.0}, GOOD))
    assert means(seen) == {"a": 3.0}
    assert seen.to_json() == {"a": [3.0, 1]}
    assert means(window(({"a": math.nan}, BAD))) == {}
    assert means(Window()) == {}
    assert Window().means() == {"images_per_second": None}


def test_values_of_some_steps_have_their_own_count():
    seen = window(({"critic": 1.0}, GOOD), ({"critic": 2.0, "slope": 5.0}, GOOD), ({"critic": 6.0}, GOOD))
    assert means(seen) == {"critic": 3.0, "slope": 5.0}
    assert seen.to_json() == {"critic": [9.0, 3], "slope": [5.0, 1]}


def test_there_and_back_to_the_bit():
    steps = [({"a": 0.1 * k, "b": 1 / (k + 1)}, BAD if k == 3 else GOOD) for k in range(7)]
    whole = window(*steps)
    cut = Window.from_json(json.loads(json.dumps(window(*steps[:4]).to_json())), CPU)
    assert all(isinstance(count, int) for _, count in cut.to_json().values())
    for values, skipped in steps[4:]:
        cut.add({name: torch.tensor(value) for name, value in values.items()}, skipped=skipped)
    assert cut.to_json() == whole.to_json()
    assert means(cut) == means(whole)
    assert Window.from_json({}, CPU).to_json() == {}


def test_the_speed_counts_skipped_steps_too():
    seen = window(({"a": 1.0}, GOOD), ({"a": 1.0}, BAD))
    assert seen.images == 32
    assert seen.means()["images_per_second"] == seen.images / seen.seconds


def test_in_words():
    assert in_words({"a": 1.0, "b": 0.0, "images_per_second": 3.0}) == "a 1.0000  b 0.0000"
    assert in_words({"images_per_second": None}) == ""

"""Batches: functions of (seed, epoch, number) alone, every new image once an epoch, replayed ones in equal use."""

import time
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.feed import Feed, _epoch


def images(count, first=0):
    """Each tells its own number."""
    numbers = np.arange(first, first + count, dtype=np.uint16)
    return np.ascontiguousarray(np.broadcast_to(numbers[:, None, None, None], (count, 2, 2, 1))).view(np.uint8).reshape(count, 2, 2, 2)


def numbers(batch):
    return batch.reshape(len(batch), -1)[:, :2].copy().view(np.uint16)[:, 0]


def epoch(feed, number):
    """The numbers of the images in an epoch's whole batches, in order."""
    first = number * feed.epoch_batches
    return np.concatenate([numbers(feed.batch(i)) for i in range(first, first + feed.epoch_batches)])


sizes = st.integers(1, 60)
ratios = st.one_of(st.none(), st.floats(0.01, 0.9))


@st.composite
def feeds(draw):
    n, m, ratio, seed = draw(sizes), draw(st.integers(0, 40)), draw(ratios), draw(st.integers(0, 2**40))
    new, old = images(n), images(m, 1000) if m else None
    whole = Feed(new, 1, seed, old, ratio if m else None)
    return Feed(new, draw(st.integers(1, whole.epoch_size)), seed, old, ratio if m else None)


@given(feeds())
def test_an_epoch_holds_every_new_image_once_and_replayed_ones_in_equal_use(feed):
    used = np.zeros(0 if feed.replay is None else len(feed.replay), int)
    for e in range(5):
        places = feed._epoch(e)
        assert len(places) == feed.epoch_size
        assert sorted(places[places < len(feed.images)]) == list(range(len(feed.images)))
        used += np.bincount(places[places >= len(feed.images)] - len(feed.images), minlength=len(used))
        assert used.sum() == (e + 1) * feed.replayed
        assert not len(used) or np.ptp(used) <= 1
        # Its batches are the epoch cut into pieces, less what does not fill one.
        cut = np.concatenate([feed.places(e * feed.epoch_batches + i) for i in range(feed.epoch_batches)])
        assert cut.tolist() == places[: feed.epoch_batches * feed.batch_size].tolist()
    assert len(feed.images) + feed.replayed - feed.epoch_batches * feed.batch_size < feed.batch_size


@given(sizes, st.integers(1, 40), st.floats(0.01, 0.9))
def test_the_ratio_is_met_to_half_an_image_an_epoch(n, m, ratio):
    feed = Feed(images(n), 1, 0, images(m, 1000), ratio)
    # r = k/(n + k) asks for k = n r/(1 − r) replayed images, and at least one.
    wanted = n * ratio / (1 - ratio)
    assert feed.replayed == 1 or abs(feed.replayed - wanted) <= 0.5 + 1e-9
    assert feed.replayed >= 1


def test_by_default_replayed_images_are_seen_as_often_as_new_ones():
    """The effective set of the paper."""
    feed = Feed(images(250), 10, 0, images(50, 1000))
    assert (feed.replayed, feed.epoch_size, feed.epoch_batches) == (50, 300, 30)
    assert sorted(epoch(feed, 3)) == [*range(250), *range(1000, 1050)]


@given(feeds(), st.data())
def test_a_batch_depends_on_its_number_and_the_seed_alone(feed, data):
    """Whatever was asked for before, and in whichever object."""
    wanted = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    expected = [Feed(feed.images, feed.batch_size, feed.seed, feed.replay, feed.replay_ratio).batch(i) for i in sorted(wanted)]
    _epoch.cache_clear()
    for i, batch in zip(sorted(wanted, reverse=True), expected[::-1], strict=True):
        np.testing.assert_array_equal(feed.batch(i), batch)


def test_batches_hold_the_images_that_their_places_say():
    feed = Feed(images(7), 4, 5, images(3, 1000), 0.4)
    for i in range(9):
        places = feed.places(i)
        assert numbers(feed.batch(i)).tolist() == [p if p < 7 else 1000 + p - 7 for p in places]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [tuple(epoch(Feed(images(30), 5, seed), e)) for seed in range(3) for e in range(3)]
    assert len(set(orders)) == 9
    # Buffers too, where only a part of them fits into an epoch.
    parts = [frozenset(epoch(Feed(images(9), 1, seed, images(30, 1000), 0.5), e)) for seed in range(3) for e in range(3)]
    assert len(set(parts)) == 9


def test_orders_are_uniform():
    """How often image i is the first of an epoch, over 1,000 epochs: χ² of 9 degrees of freedom; above 39 in one of 100,000."""
    first = [Feed(images(10), 10, 1).places(e)[0] for e in range(1000)]
    counts = np.bincount(first, minlength=10)
    assert np.sum((counts - 100) ** 2 / 100) < 39


class Watched(np.memmap):
    """A mapped file that notes which of its fifty rows are asked for."""

    rows: ClassVar[list] = []

    def __getitem__(self, index):
        if len(self) == 50:
            self.rows.append(index)
        return super().__getitem__(index)


def test_of_a_mapped_file_only_the_rows_of_a_batch_are_read(tmp_path):
    images(50).tofile(tmp_path / "images")
    mapped = Watched(tmp_path / "images", np.uint8, "r", shape=(50, 2, 2, 2))
    feed = Feed(mapped, 8, 3)
    Watched.rows.clear()
    batch = feed.batch(4)
    (asked,) = Watched.rows
    assert asked.tolist() == feed.places(4).tolist()
    np.testing.assert_array_equal(batch, Feed(images(50), 8, 3).batch(4))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_batches_keep_the_dtype(dtype):
    assert Feed(images(5).astype(dtype), 2, 0, images(5).astype(dtype)).batch(0).dtype == dtype


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": images(0)}, r"batch_size = 5 is out of range: need 1 ≤ batch_size ≤ 0"),
        ({"seed": -1}, r"seed = -1 must be at least 0"),
        ({"batch_size": 0}, r"batch_size = 0 is out of range: need 1 ≤ batch_size ≤ 20"),
        ({"batch_size": 21}, r"batch_size = 21 is out of range: need 1 ≤ batch_size ≤ 20"),
        ({"replay_ratio": 0.5}, r"replay_ratio = 0.5 needs a replay buffer"),
        ({"replay": images(3), "replay_ratio": 0}, r"replay_ratio = 0 is out of range: need 0 < replay_ratio < 1"),
        ({"replay": images(3), "replay_ratio": 1.0}, r"replay_ratio = 1.0 is out of range"),
        ({"replay": images(3), "replay_ratio": float("nan")}, r"replay_ratio = nan is out of range"),
        ({"replay": images(0)}, r"the replay buffer is empty"),
        ({"replay": images(3)[:, :1]}, r"replayed images are uint8 \(1, 2, 2\), new ones uint8 \(2, 2, 2\): they must"),
        ({"replay": images(3).astype(np.float32)}, r"replayed images are float32 \(2, 2, 2\), new ones uint8"),
    ],
)
def test_what_gives_no_batch_is_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Feed(**{"images": images(20), "batch_size": 5} | change)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_feeding_costs_little():
    """A batch of 128 CIFAR images of 50,000 against 0.1 s, a fast accelerator's training step of the paper's network; 2 % of it."""
    feed = Feed(np.zeros((50_000, 32, 32, 3), np.uint8), 128)
    feed.batch(0)
    seconds = []
    for i in range(1, 2 * feed.epoch_batches):
        start = time.perf_counter()
        feed.batch(i)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 0.02 * 0.1
    assert np.mean(seconds) < 0.02 * 0.1  # with the order of a new epoch


def test_trees_of_arrays_are_fed_row_by_row(unchecked):
    """As if each array were alone."""
    trees = [{"a": images(n, first), "b": (np.arange(n, dtype=np.float32) + first,), "c": None} for n, first in ((40, 0), (9, 1000))]
    feed = Feed(trees[0], 7, 3, trees[1], 0.3)
    assert (feed.new, feed.replayed) == (40, 17)
    alone = Feed(images(40), 7, 3, images(9, 1000), 0.3)
    for number in (0, 5, 31):
        batch = feed.batch(number)
        np.testing.assert_array_equal(batch["a"], alone.batch(number))
        np.testing.assert_array_equal(batch["b"][0], numbers(batch["a"]))
        assert batch["c"] is None
        assert {"a": batch["a"].dtype, "b": batch["b"][0].dtype} == {"a": np.uint8, "b": np.float32}
    with pytest.raises(ValueError, match=r"replayed images are uint8 \(2, 2, 2\), float64 \(\), new ones uint8 .*: they must be alike"):
        Feed(trees[0], 7, 3, {**trees[1], "b": (trees[1]["b"][0].astype(float),)})

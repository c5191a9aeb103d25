from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.order import BLOCK, WINDOW, EpochOrder


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    samples=st.integers(1, 700),
    batch=st.integers(1, 64),
    seed=st.integers(0, 2**40),
    epoch=st.integers(-40, 1000),
)
def test_an_epoch_shows_every_image_once_up_to_its_ragged_end(samples, batch, seed, epoch):
    if samples < batch:
        with pytest.raises(DataError, match=rf"batch.global is {batch}, .* {samples} samples; \w+"):
            EpochOrder(samples, batch, seed)
        return
    order = EpochOrder(samples, batch, seed)
    assert order.steps == samples // batch
    steps = range(epoch * order.steps, (epoch + 1) * order.steps)
    shown = [order.lane(lane, step) for step in steps for lane in range(batch)]
    assert len(shown) == len(set(shown)) == order.steps * batch
    assert samples - len(shown) < batch
    assert 0 <= min(shown) <= max(shown) < samples


def epoch_of(order: EpochOrder, epoch: int) -> list[list[int]]:
    """The positions of each lane."""
    steps = range(epoch * order.steps, (epoch + 1) * order.steps)
    return [[order.lane(lane, step) for step in steps] for lane in range(order.global_batch)]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [str(epoch_of(EpochOrder(200, 8, seed), e)) for seed in range(4) for e in range(-3, 4)]
    assert len(set(orders)) == 28
    assert str(epoch_of(EpochOrder(200, 8, 3), 3)) == orders[-1]  # and they are functions


def test_no_image_is_dropped_for_ever():
    order = EpochOrder(20, 16, 0)
    shown = {i for epoch in range(60) for lane in epoch_of(order, epoch) for i in lane}
    assert shown == set(range(20))


def test_lanes_read_neighbours_one_after_the_other():
    lanes = epoch_of(EpochOrder(4096, 16, 0), 0)
    steps = [b - a for lane in lanes for a, b in itertools.pairwise(lane)]
    assert steps.count(1) / len(steps) > 1 - 1.5 / BLOCK


def test_blocks_begin_elsewhere_each_epoch():
    """Else the same eight pictures would always meet."""
    order = EpochOrder(4096, 16, 0)
    starts = set()
    for epoch in range(8):
        pairs = [pair for lane in epoch_of(order, epoch) for pair in itertools.pairwise(lane)]
        here = {b % BLOCK for a, b in pairs if b != a + 1}
        assert len(here) <= 2  # the first block begins with the data
        starts |= here
    assert len(starts) > 3


def test_a_window_over_two_epochs_deals_each_once(monkeypatch):
    """Dealing 118,287 images takes as long as decoding ten: not for every lane of a resume."""
    order = EpochOrder(118_287, 64, 0)
    dealt: list[object] = []
    generator = np.random.default_rng

    def count(seed: object) -> np.random.Generator:
        dealt.append(seed)
        return generator(seed)

    monkeypatch.setattr(np.random, "default_rng", count)
    for lane in range(64):
        for step in range(order.steps - WINDOW, order.steps + 1):
            order.lane(lane, step)
    assert len(dealt) == 2


def test_few_bytes_a_sample_stay():
    order = EpochOrder(118_287, 128, 0)
    for step in range(3 * order.steps):
        order.lane(step % 128, step)
    assert sum(a.nbytes for a in order._dealt.values()) < 4.2 * 118_287


def test_the_order_of_a_small_set_is_as_it_was_first_dealt():
    """The order is part of what a checkpoint relies on."""
    order = EpochOrder(20, 4, 0)
    assert [order.lane(lane, step) for step in range(2) for lane in range(4)] == [
        4,
        9,
        2,
        15,
        5,
        10,
        3,
        16,
    ]

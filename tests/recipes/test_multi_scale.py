"""Multi-scale training: the frame of each step, what scaling does, and runs that agree on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.recipes.config import AugmentSection, DataSection, Recipe
from convnext_yolo.recipes.multi_scale import frame_at, largest_frame, rescale

from .conftest import TinyRun
from .forkserver import ForkServer
from .short_runs import losses, saved, train

SIDES_PX = st.integers(2, 40).map(lambda n: 32 * n)
FRAMES_PX = st.tuples(SIDES_PX, SIDES_PX)


def recipe(seed: int, image_px: tuple[int, int], reach: float) -> Recipe:
    return Recipe(
        seed=seed, data=DataSection(image_px=image_px), augment=AugmentSection(multi_scale=reach)
    )


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    step=st.integers(0, 10**7),
    image_px=FRAMES_PX,
    reach=st.floats(0, 0.9),
)
def test_a_frame_is_within_reach_and_in_whole_strides(
    seed: int, step: int, image_px: tuple[int, int], reach: float
) -> None:
    options = recipe(seed, image_px, reach)
    frame = frame_at(options, step)
    for side, wanted, largest in zip(frame, image_px, largest_frame(options), strict=True):
        assert side % 32 == 0 and 64 <= side <= largest
        # to the nearest stride: half of one beyond the reach at most
        assert max(64, wanted * (1 - reach) - 16) <= side <= wanted * (1 + reach) + 16
    assert frame == frame_at(recipe(seed, image_px, reach), step)  # nothing is remembered


@settings(deadline=None)
@given(seed=st.integers(0, 100), step=st.integers(0, 100), image_px=FRAMES_PX)
def test_without_it_every_frame_is_the_recipes(
    seed: int, step: int, image_px: tuple[int, int]
) -> None:
    options = recipe(seed, image_px, 0.0)
    assert frame_at(options, step) == image_px == largest_frame(options)


def test_all_frames_come_and_no_step_or_seed_tells_another() -> None:
    options = recipe(0, (640, 640), 0.5)
    frames = [frame_at(options, step) for step in range(2000)]
    assert set(frames) == {(side, side) for side in range(320, 961, 32)}
    # Even but for the ends, which are half as likely: 2,000 draws over 20 strides.
    assert all(60 < frames.count((side, side)) < 140 for side in range(352, 929, 32))
    assert frames[::-1] == [frame_at(options, step) for step in reversed(range(2000))]
    other = recipe(1, (640, 640), 0.5)
    assert sum(frame_at(other, step) == frame for step, frame in enumerate(frames)) < 200


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    before_px=st.tuples(st.sampled_from((64, 96, 128)), st.sampled_from((64, 96, 128))),
    after_px=st.tuples(st.sampled_from((64, 96, 160)), st.sampled_from((64, 96, 160))),
)
def test_pictures_and_boxes_scale_together(
    seed: int, before_px: tuple[int, int], after_px: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, *before_px), generator=generator, dtype=torch.uint8)
    boxes = torch.rand(5, 4, generator=generator) * 64
    kept = images.clone(), boxes.clone()
    found, scaled = rescale(images, boxes, after_px)
    assert images.equal(kept[0]) and boxes.equal(kept[1])  # the loader's own
    if before_px == after_px:
        assert found is images and scaled is boxes
        return
    assert found.shape == (2, 3, *after_px) and found.dtype == torch.float32
    assert float(found.min()) >= -1e-6 and float(found.max()) <= 1 + 1e-6
    (height, width), (before_height, before_width) = after_px, before_px
    for box, now in zip(boxes.double().tolist(), scaled.tolist(), strict=True):
        factors = (width / before_width, height / before_height) * 2
        assert now == pytest.approx([c * f for c, f in zip(box, factors, strict=True)], rel=1e-6)


@pytest.mark.parametrize("after_px", [(32, 160), (96, 96), (160, 64)])
def test_an_object_stays_in_its_box(after_px: tuple[int, int]) -> None:
    """A white rectangle's own box, scaled, is where the white is in the scaled picture."""
    images = torch.zeros(1, 3, 64, 128, dtype=torch.uint8)
    images[:, :, 16:48, 32:96] = 255
    found, boxes = rescale(images, torch.tensor([[32.0, 16, 96, 48]]), after_px)
    x1, y1, x2, y2 = boxes[0].tolist()
    assert float(found[0].sum() / 3) == pytest.approx((x2 - x1) * (y2 - y1), rel=0.02)
    bright = (found[0, 0] > 0.5).nonzero()
    rows, columns = bright[:, 0].tolist(), bright[:, 1].tolist()
    edges = (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
    assert edges == pytest.approx((x1, y1, x2, y2), abs=1)


def test_no_objects_are_no_trouble() -> None:
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert rescale(images, torch.zeros(0, 4), (96, 96))[1].shape == (0, 4)


@pytest.mark.process
def test_runs_agree_on_the_frames_and_resume(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    """Two ranks as one, and a resume as the run that went through."""
    sections = {
        "augment": {"multi_scale": 0.5},
        "schedule": {"epochs": 5 / 9, "warmup_epochs": 0.3},
        "checkpoint": {"every_steps": 3},
    }
    one, two = tiny_run("scaled-one", **sections), tiny_run("scaled-two", **sections)
    train(fork_server, one, 1)
    train(fork_server, two, 2)
    for found, want in zip(losses(two.folder), losses(one.folder), strict=True):
        assert found == pytest.approx(want, abs=1e-4)
    options = ["--run", str(one.folder.with_name("fixed")), "--schedule.epochs", "0.1"]
    train(fork_server, one, 1, *options, "--augment.multi_scale", "0")
    assert losses(one.folder.with_name("fixed")) != losses(one.folder)[:1]

    middle, again = saved(two.folder, 1), two.folder.with_name("again")
    assert middle.step == 3
    train(fork_server, two, 2, "--run", str(again), "--resume", str(middle.path))
    assert losses(again) == losses(two.folder)[3:]
    ours, theirs = saved(again).tensors, saved(two.folder).tensors
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)

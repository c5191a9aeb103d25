"""The way from shards through a detector to COCO's numbers, on one process and on several."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from convnext_yolo.data_prep.formats import Category
from convnext_yolo.data_prep.reader import Sample
from convnext_yolo.recipes.coco import METRICS
from convnext_yolo.recipes.evaluate import EvalSettings, Evaluation, evaluate, open_data

SETTINGS = EvalSettings(frame_px=(96, 128), batch=2, workers=0, confidence=0.1, iou=0.6)


class Painted:
    """Black pictures of many shapes, in each a red rectangle; a crowd box in every other one."""

    classes = (Category(4, "thing"),)

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def decode(self, position: int) -> Sample:
        height, width = ((96, 128), (48, 64), (192, 100), (80, 128))[position % 4]
        box = [8, 8 + 4 * (position % 3), 48, 40]
        image = np.zeros((height, width, 3), np.uint8)
        image[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
        boxes = np.array([box, [0, 0, width, height]], np.float32)[: 1 + position % 2]
        crowd = np.array([False, True])[: 1 + position % 2]
        labels = np.zeros(len(boxes), np.int64)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        return Sample(image, boxes, labels, crowd, area, image_id=100 - position)


class FindsRed:
    """A detector that is never wrong: one box a picture, round what is red."""

    head = None

    def __call__(self, images: torch.Tensor) -> Any:
        assert images.shape[1:] == (3, 96, 128)
        found = []
        for image in images:
            rows, columns = (image[0] > 127).nonzero(as_tuple=True)
            corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            found.append(torch.stack(corners).float())
        return SimpleNamespace(levels=torch.stack(found))

    def decode(self, raw: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return raw.levels[:, None], torch.full((len(raw.levels), 1, 1), 0.9)


def count_targets(head: None, levels: torch.Tensor, targets: Any) -> dict[str, torch.Tensor]:
    """A loss: the mean of the numbers of targets."""
    return {"box": torch.tensor(len(targets.label) / len(levels))}


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate remembers its processes for ever."""
    from accelerate import PartialState

    before = dict(PartialState._shared_state)
    PartialState._shared_state.clear()
    yield
    PartialState._shared_state.clear()
    PartialState._shared_state.update(before)


def run(count: int) -> Evaluation | None:
    return evaluate(
        FindsRed(),  # type: ignore[arg-type]
        Painted(count),
        SETTINGS,
        torch.device("cpu"),
        count_targets,  # type: ignore[arg-type]
    )


def test_a_perfect_detector_scores_one() -> None:
    outcome = run(7)
    assert outcome is not None
    assert {*METRICS, "per_class"} == set(outcome.results)
    # Only small and medium ones are there.
    assert [outcome.results[name] for name in METRICS] == pytest.approx(
        [1] * 5 + [-1] + [1] * 5 + [-1]
    )
    assert outcome.results["per_class"]["thing"] == {
        "AP": pytest.approx(1),
        "AP50": pytest.approx(1),
    }
    assert outcome.losses == {"box": pytest.approx(1)}  # one a picture: the crowd is no target


def ranks_of(world: int, count: int, folder: Path) -> list[Evaluation | None]:
    """What every rank's `evaluate` returns."""
    from accelerate import PartialState

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def rank_main(rank: int) -> None:
        PartialState._shared_state.clear()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # accelerate wants to see them
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        outcome: Any = "failed"
        try:
            outcome = run(count)
            dist.destroy_process_group()
        finally:
            queue.put((rank, outcome))

    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    outcomes = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [outcomes[rank] for rank in range(world)]


@pytest.mark.process
@pytest.mark.parametrize(("world", "count"), [(2, 7), (3, 2)])  # 3, 2: a rank without a picture
def test_processes_share_the_pictures_and_change_nothing(
    world: int, count: int, tmp_path: Path
) -> None:
    alone = run(count)
    first, *others = ranks_of(world, count, tmp_path)
    assert alone is not None
    assert first is not None
    assert first.results == alone.results
    assert first.losses == pytest.approx(alone.losses)
    assert others == [None] * (world - 1)


def test_data_is_shards_or_a_json_with_its_pictures(tmp_path: Path) -> None:
    from convnext_yolo.data_prep.errors import DataError

    for path in (tmp_path / "instances.json", tmp_path / "absent"):
        with pytest.raises(DataError, match=str(path)):
            open_data(path, None)

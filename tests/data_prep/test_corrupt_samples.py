"""A corrupt sample costs nobody a batch."""

from __future__ import annotations

import numpy as np
import pytest

from convnext_yolo.data_prep.errors import CorruptSampleError, DataError
from convnext_yolo.data_prep.loader import training_batches
from convnext_yolo.data_prep.reader import Sample, ShardReader

from .streams import SAMPLES, STEPS, global_batches, sha256, stream_of

process = pytest.mark.process
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on few cores


class Holed(ShardReader):
    """Some of its samples can't be used."""

    bad: frozenset[int] = frozenset({3, 17, 18, 19, 56})

    def decode(self, position: int, out: np.ndarray | None = None) -> Sample:
        if position in self.bad:
            raise CorruptSampleError("s.tar", f"{3 * position:012d}", "is broken")
        return super().decode(position, out)


@process
@pytest.mark.parametrize(
    ("world", "workers", "start"), [(8, 0, 0), (1, 3, 0), (4, 1, 0), (2, 0, 3)]
)
def test_corrupt_samples_are_replaced_in_the_same_way_by_everybody(
    noise_shards, world, workers, start
):
    expected = global_batches(noise_shards, 1, 0, 0, 2 * STEPS, reader=Holed)
    steps = global_batches(noise_shards, world, workers, start, 2 * STEPS - start, reader=Holed)
    assert [sha256(s) for s in steps] == [sha256(s) for s in expected[start:]]


def test_a_corrupt_sample_is_replaced_by_the_next_good_one_and_told(noise_shards):
    whole = global_batches(noise_shards, 1, 0, 0, STEPS)
    holed = global_batches(noise_shards, 1, 0, 0, STEPS, reader=Holed)
    substitutes = {3: 4, 17: 20, 18: 20, 19: 20, 56: 0}
    seen = set()
    for one, two in zip(whole, holed, strict=True):
        for a, b in zip(one, two, strict=True):
            wanted = [3 * substitutes.get(i // 3, i // 3) for i in a.image_ids]
            assert list(b.image_ids) == wanted
            seen |= {corrupt.key for corrupt in b.corrupt}
            assert all(corrupt.reason == "is broken" for corrupt in b.corrupt)
    told = {int(key) // 3 for key in seen}
    assert told <= set(Holed.bad) and len(told) >= 4  # all but those of the ragged end


def test_samples_that_are_all_corrupt_end_in_a_sentence(noise_shards):
    class Hopeless(Holed):
        bad = frozenset(range(SAMPLES))

    with pytest.raises(DataError, match=r"samples in a row can't be used: s\.tar"):
        next(training_batches(stream_of(Hopeless(noise_shards)), 0))

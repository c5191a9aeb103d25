"""The order of an epoch, dealt to the lanes.

G global batch, S steps an epoch.
"""

import numpy as np

from .errors import DataError

BLOCK = 8  # neighbouring samples that a lane reads one after the other
WINDOW = 8  # steps back from which a lane's mosaics take their pictures


class EpochOrder:
    """Which sample each lane yields at each step: a pure function of size, seed and epoch."""

    def __init__(self, samples: int, global_batch: int, seed: int):
        if samples < global_batch:
            raise DataError(
                f"batch.global is {global_batch}, but the training shards hold {samples} samples; "
                "take a global batch of at most that"
            )
        self.samples, self.global_batch, self.seed = samples, global_batch, seed
        self.steps = samples // global_batch
        self._dealt: dict[int, np.ndarray] = {}  # the last columns of each epoch: [G, ≤ S]

    def lane(self, lane: int, step: int) -> int:
        """The position of the sample that lane `lane` yields at global step `step`.

        Steps below zero are those of epochs before the first: they fill the first windows.
        """
        epoch, within = divmod(step, self.steps)
        from_end = within - self.steps
        if epoch not in self._dealt or -from_end > self._dealt[epoch].shape[1]:
            self._remember(epoch)
        return int(self._dealt[epoch][lane, from_end])

    def _remember(self, epoch: int) -> None:
        """Deals an epoch, and forgets of others what no window reaches: 4 bytes a sample stay."""
        self._dealt[epoch] = self._deal(epoch)
        for other in list(self._dealt):
            if other != epoch:
                self._dealt[other] = self._dealt[other][:, -WINDOW:].copy()
            if other < epoch - WINDOW:
                del self._dealt[other]

    def _deal(self, epoch: int) -> np.ndarray:
        """`[G, S]` positions, int32."""
        # Seeds must not be negative. Epochs are, down to where the first windows begin.
        rng = np.random.default_rng((self.seed, (epoch + 1) % 2**32))
        # Blocks start at another offset each epoch, so neighbours are not always the same.
        edges = np.arange(rng.integers(BLOCK), self.samples, BLOCK, dtype=np.int32)
        starts = np.append(np.int32(0), edges)
        lengths = np.diff(starts, append=np.int32(self.samples))
        blocks = rng.permutation(len(starts))
        starts, lengths = starts[blocks], lengths[blocks]
        # Within each block its start, then one more each.
        before = np.cumsum(lengths, dtype=np.int32) - lengths
        order = np.repeat(starts - before, lengths) + np.arange(self.samples, dtype=np.int32)
        used = self.global_batch * self.steps
        return order[:used].reshape(self.global_batch, self.steps)

"""Memory of one GPU by ZeRO stage: formulas, and where each term comes from.

ZeRO (Rajbhandari et al., 2020, section 5) divides among n ranks the optimizer's state (stage 1),
the gradients too (2), the parameters too (3). With P parameters in 32 bits and AdamW's two moments
a rank then holds 16 P bytes at stage 0 and, in the limit, 8 P, 4 P and 0 at stages 1 to 3. What
DeepSpeed 0.19.8 does under a recipe differs in details that weigh much for a detector, and the
formulas here follow its code (`runtime/zero/stage_1_and_2.py`, `stage3.py`). Weights are fp32
whatever the precision, as autocast wants them.

| bytes of a rank  | stage 0 | stages 1 and 2           | stage 3                           |
|------------------|---------|--------------------------|-----------------------------------|
| weights          | 4 P     | 4 A                      | 4 S, and 4 P gathered where n > 1 |
| master copy      |         | 4 A/n                    | 4 S                               |
| AdamW's moments  | 8 P     | 8 A/n                    | 8 S                               |
| gradients        | 4 P     | 1: 4 P; 2: 8 O, or       | 4 S + 4 Sg                        |
|                  |         | 4 O + 4 Ag/n unaccumulated |                                 |
| buckets          | 4 P     | 4 B for each width, and copies | B in each width, and copies |
| averaged weights | 4 P     | 4 P                      | 4 S                               |

A is P with each of the optimizer's groups rounded up to a multiple of 2 n; S the sum over
parameters of their nth part, rounded up; Ag and Sg those of the largest group; O the parameters
that the fullest rank owns a part of, as a rank keeps the gradients of those whole; B
`reduce_bucket_size`, by default 5e8 *numbers*, allocated whole however small the model is.
DeepSpeed copies the masters even where the weights are fp32 themselves. Under `torch_autocast`, at
stages 1 and 2, there is one bucket for the gradients that travel in 16 bits and one for the others;
what is reduced or gathered passes through flat copies.

Exact: weights, masters, moments, average. The peak within a step, to some percent: gradients and
buckets (tests/recipes/test_plan.py holds all of them against what ranks hold). Estimated:
activations (`plan_model`). The sum is an upper bound: not all peaks fall together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .plan_model import FP32_BYTES, ModelFacts, Weight

MASTER_BYTES = FP32_BYTES
BUCKET_LIMIT_STAGE_0 = 500_000_000  # numbers: deepspeed.runtime.engine.MEMORY_OPT_ALLREDUCE_SIZE


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's configuration the formulas need; its defaults are DeepSpeed's own.

    Attributes:
        stage: 0 to 3.
        bucket: numbers that are reduced at a time.
        prefetch: numbers that stage 3 gathers ahead of need.
        persistence: parameters of up to so many numbers stay whole on every rank at stage 3.
        reuse: stage 3 keeps a parameter that is needed again within so many numbers.
        overlap: whether reduction overlaps with the backward pass, by a second bucket.
        is_autocast_16: whether layers of autocast are communicated in 16 bits.
    """

    stage: int
    bucket: int
    prefetch: int
    persistence: int
    reuse: int
    overlap: bool
    is_autocast_16: bool

    def comm_bytes(self, weight: Weight) -> int:
        """Bytes of one number of a parameter or of its gradient on the way between ranks."""
        return 2 if self.is_autocast_16 and weight.is_autocast and self.stage else FP32_BYTES

    def sizes_by_bytes(self, weights: Sequence[Weight]) -> dict[int, int]:
        """How many numbers travel in each width."""
        sizes: dict[int, int] = {}
        for weight in weights:
            width = self.comm_bytes(weight)
            sizes[width] = sizes.get(width, 0) + weight.numel
        return sizes


def zero_options(config: Mapping[str, Any]) -> Zero:
    """Reads the configuration that a recipe makes for DeepSpeed."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    autocast = config.get("torch_autocast", {})
    return Zero(
        stage=int(zero.stage),
        bucket=int(zero.reduce_bucket_size),
        prefetch=int(zero.prefetch_bucket_size),
        persistence=int(zero.param_persistence_threshold),
        reuse=int(zero.max_reuse_distance),
        overlap=bool(zero.overlap_comm),
        is_autocast_16=autocast.get("enabled", False)
        and autocast.get("lower_precision_safe_modules") != [],
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the fullest of all."""

    weights: int
    masters: int
    moments: int
    gradients: int
    buckets: int
    average: int
    evaluation: int  # the whole detector that evaluates the averaged weights
    activations: int

    @property
    def total(self) -> int:
        """An upper bound of the peak."""
        return sum(asdict(self).values())


def memory(facts: ModelFacts, zero: Zero, world: int, accumulation: int, moments: int) -> Memory:
    """What one of `world` ranks holds.

    Args:
        facts: of the detector.
        zero: DeepSpeed's stage and sizes.
        world: ranks.
        accumulation: micro-batches that a rank adds up in a step.
        moments: tensors that the optimizer keeps for a parameter.
    """
    parts = {0: _unsharded, 1: _sharded_states, 2: _sharded_states, 3: _sharded_weights}
    weights, masters, states, gradients, buckets, averaged = parts[zero.stage](
        facts, zero, world, accumulation
    )
    frozen = shards(facts.frozen, world if zero.stage == 3 else 1)
    return Memory(
        weights=(weights + frozen) * FP32_BYTES + facts.buffer_bytes,
        masters=masters * MASTER_BYTES,
        moments=moments * states * FP32_BYTES,
        gradients=gradients * FP32_BYTES,
        buckets=buckets,
        average=(averaged + frozen) * FP32_BYTES + facts.average_bytes,
        evaluation=facts.parameters * FP32_BYTES + facts.buffer_bytes,
        activations=facts.activation_bytes + (accumulation - 1) * facts.image_bytes,
    )


# Numbers of: weights, masters, one moment, gradients; bytes of buckets; numbers averaged.
Parts = tuple[int, int, int, int, int, int]


def _unsharded(facts: ModelFacts, zero: Zero, world: int, accumulation: int) -> Parts:
    size = facts.trained
    flat = min(size, BUCKET_LIMIT_STAGE_0) * FP32_BYTES
    return size, 0, size, size, flat, size


def _sharded_states(facts: ModelFacts, zero: Zero, world: int, accumulation: int) -> Parts:
    padded = sum(padded_group(group, world) for group in facts.groups)
    own = padded // world
    # Before the optimizer steps, a group's part is flattened beside the gradients that it is of.
    owned = max_owned(facts.groups, world)
    flat = max(padded_group(group, world) for group in facts.groups) // world
    if zero.stage == 1:
        gradients = max(facts.trained, owned + flat)
    elif accumulation == 1:
        gradients = owned + flat
    else:  # those added up so far, and those of the micro-batch just done
        gradients = 2 * owned
    sizes = zero.sizes_by_bytes(facts.weights)
    buffers = len(sizes) * zero.bucket * FP32_BYTES * (2 if zero.overlap else 1)
    copies = 0
    for width, size in sizes.items():  # the parts of several ranks are flattened, then narrowed
        wide = FP32_BYTES if world > 1 else 0
        narrow = width if width < FP32_BYTES else 0
        copies = max(copies, min(size, zero.bucket) * (wide + narrow))
    return padded, own, own, gradients, buffers + copies, facts.trained


def _sharded_weights(facts: ModelFacts, zero: Zero, world: int, accumulation: int) -> Parts:
    own = shards(facts.weights, world)
    largest = max(shards(group, world) for group in facts.groups)
    # Needed again in the backward pass, which is nearer than `reuse`: kept from forward on.
    gathered = facts.parameters if world > 1 else 0
    sizes = zero.sizes_by_bytes(facts.weights)
    buffers = sum(zero.bucket * width for width in sizes)
    # What is scattered, and at another time what is gathered, goes through a flat copy.
    copies = max(min(size, zero.bucket) * width for width, size in sizes.items())
    if world > 1:
        every = [*facts.weights, *facts.frozen]
        large = [weight for weight in every if weight.numel > zero.persistence]
        ahead = zero.sizes_by_bytes(large).items()
        copies = max(copies, sum(min(size, zero.prefetch) * width for width, size in ahead))
    return own + gathered, own, own, own + largest, buffers + copies, own


def padded_group(group: Sequence[Weight], world: int) -> int:
    """A group's numbers, rounded up so that each rank's part begins at an even one."""
    return math.ceil(sum(weight.numel for weight in group) / (2 * world)) * 2 * world


def shards(weights: Sequence[Weight], world: int) -> int:
    """Numbers of a rank's shards at stage 3, where each parameter is split by itself."""
    return sum(-(-weight.numel // world) for weight in weights)


def max_owned(groups: Sequence[Sequence[Weight]], world: int) -> int:
    """Numbers of all parameters that a rank's parts of the groups reach into; the most of any."""
    owned = [0] * world
    for group in groups:
        part, start = padded_group(group, world) // world, 0
        for weight in group:
            end = start + weight.numel
            for rank in range(start // part, (end - 1) // part + 1):
                owned[rank] += weight.numel
            start = end
    return max(owned)

"""Bytes between ranks in one global step, by ZeRO stage: formulas, and where they come from.

A collective over a tensor of M bytes makes each of n ranks send, by the ring algorithm (Patarin and
Yuan, 2009; it is bandwidth-optimal), 2 (n-1)/n M for an all-reduce and (n-1)/n M for either half
of it, a reduce-scatter or an all-gather. ZeRO's paper (section 7) so counts 2 P numbers a step at
stages 0 to 2 and 3 P at stage 3. DeepSpeed 0.19.8 differs; in a step of `a` micro-batches a rank:

- stage 0: one all-reduce of the gradients, after the last micro-batch;
- stage 1: the same, not a reduce-scatter, and an all-gather of the weights in fp32: 3 P;
- stage 2: `a` such all-reduces, one after each micro-batch, and that all-gather;
- stage 3: `a` reduce-scatters of the gradients, `a` all-gathers of the parameters above
  `persistence`, which stay from the forward pass to the backward, and one of the smaller ones, in
  fp32 and one by one.

Gradients travel in 16 bits at stages 1 and 2 where DeepSpeed's `torch_autocast` is on, for linear
and convolutional layers; at stages 0 and 3 always in 32 (see `engine`). BatchNorm's statistics,
where a model has it, are one all-reduce of ours. Norms of gradients, losses and flags are messages
of some bytes: they count as messages only.

The bytes are exact (tests/recipes/test_plan.py counts those of real ranks). Of the first step at
stage 3, before DeepSpeed knows the order of layers, they are not; of evaluation and checkpoints
neither. The number of messages is exact at stages 0 to 2 but where buckets overflow.
"""

import math
from dataclasses import dataclass

from .plan_memory import BUCKET_LIMIT_STAGE_0, Zero, padded_group, shards
from .plan_model import FP32_BYTES, ModelFacts


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step.

    Attributes:
        kind: all_reduce, reduce_scatter or all_gather.
        payload_bytes: of the whole tensors, summed.
        messages: how many there are.
    """

    kind: str
    payload_bytes: int
    messages: int

    def sent_bytes(self, world: int) -> float:
        """What each of `world` ranks sends, and receives as well."""
        share = (world - 1) / world
        return self.payload_bytes * share * (2 if self.kind == "all_reduce" else 1)


def traffic(facts: ModelFacts, zero: Zero, world: int, accumulation: int) -> list[Collective]:
    """The collectives of one global step of `world` ranks."""
    result = _own(facts)
    if zero.stage == 0:
        messages = math.ceil(facts.trained / BUCKET_LIMIT_STAGE_0)
        result.append(Collective("all_reduce", facts.trained * FP32_BYTES, messages))
    elif zero.stage < 3:
        turns = accumulation if zero.stage == 2 else 1
        result.append(_reduction("all_reduce", facts, zero, 1, turns))
        result += [*_norms(facts), *_updated_groups(facts, world)]
    else:
        result.append(_reduction("reduce_scatter", facts, zero, world, accumulation))
        result += [*_norms(facts), *_gathers(facts, zero, world, accumulation)]
    return result


def sent_bytes(collectives: list[Collective], world: int) -> float:
    """What each rank sends in a step."""
    return sum(collective.sent_bytes(world) for collective in collectives)


def _own(facts: ModelFacts) -> list[Collective]:
    """BatchNorm's statistics, and one reduction for losses and flags."""
    messages = [Collective("all_reduce", 0, 1)]
    if facts.statistics:
        messages.append(Collective("all_reduce", facts.statistics * FP32_BYTES, 1))
    return messages


def _reduction(kind: str, facts: ModelFacts, zero: Zero, divisor: int, turns: int) -> Collective:
    """Gradients, each parameter's padded to a multiple of `divisor`, bucket by bucket."""
    payload = sum(
        -(-weight.numel // divisor) * divisor * zero.comm_bytes(weight) for weight in facts.weights
    )
    sizes = zero.sizes_by_bytes(facts.weights)
    messages = sum(math.ceil(size / zero.bucket) for size in sizes.values())
    return Collective(kind, payload * turns, messages * turns)


def _norms(facts: ModelFacts) -> list[Collective]:
    return [Collective("all_reduce", 0, len(facts.groups))]


def _updated_groups(facts: ModelFacts, world: int) -> list[Collective]:
    """Every rank's part of each group of weights, to all others."""
    if world == 1:
        return []
    payload = sum(padded_group(group, world) for group in facts.groups) * FP32_BYTES
    return [Collective("all_gather", payload, len(facts.groups))]


def _gathers(facts: ModelFacts, zero: Zero, world: int, accumulation: int) -> list[Collective]:
    """Stage 3's parameters, frozen ones included, on their way to the layers."""
    if world == 1:
        return []
    every = [*facts.weights, *facts.frozen]
    small = [weight for weight in every if weight.numel <= zero.persistence]
    large = [weight for weight in every if weight.numel > zero.persistence]
    # Forward and backward pass see every parameter; beyond `reuse` it is dropped in between.
    uses = accumulation * (1 if facts.parameters <= zero.reuse else 2)
    wide = sum(-(-w.numel // world) * world * zero.comm_bytes(w) for w in large)
    calls = sum(
        math.ceil(size / max(zero.prefetch, 1)) for size in zero.sizes_by_bytes(large).values()
    )
    kept = shards(small, world) * world * FP32_BYTES
    return [
        Collective("all_gather", wide * uses, calls * uses),
        Collective("all_gather", kept, len(small)),  # one by one
    ]

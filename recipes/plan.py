"""What a recipe costs on a cluster, before anybody queues for it: memory, bytes, seconds.

Memory and bytes between ranks follow from what DeepSpeed does (`plan_memory`, `plan_traffic`) and
are checked against real ranks. Time is an estimate, from three figures that the user gives and one
that nobody knows beforehand, the share of its peak that a GPU reaches:

    step = compute + communication
    compute = pictures of a rank x passes x FLOPs of a forward pass / (peak x share)
    communication = sum over collectives of bytes sent / bandwidth + messages x hops x latency

A forward and a backward pass cost three forward passes, four where activations are computed again.
Bytes sent are the ring algorithm's. Its slowest link counts: within a node the GPUs' own, beyond it
the node's network, through which the ring passes once. Hops are log2 of the ranks, twice for an
all-reduce, as trees need for small messages (alpha-beta model: Thakur, Rabenseifner and Gropp,
Optimization of collective communication operations in MPICH, 2005).

Efficiency is the time of one GPU over n times the time of n, the global batch being the same. Not
in the estimate: reading data (assumed to keep up), the optimizer's own time, waiting for the
slowest rank, and overlap: nothing is hidden behind computation, as DeepSpeed does it at stages 0 to
2; at stage 3 it hides a part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..data_prep.stream import BatchPlan
from .config import Recipe
from .engine import deepspeed_config
from .optim import moment_names
from .plan_memory import Memory, Zero, memory, zero_options
from .plan_model import ModelFacts, model_facts
from .plan_traffic import Collective, sent_bytes, traffic
from .shares import fitting_globals, fitting_micro
from .utilization import PASSES

STAGES = (0, 1, 2, 3)
LATENCY_S = 10e-6  # of a hop: a guess between NVLink's and a network's
# Keys of deepspeed.options that the formulas know.
KNOWN_ZERO = (
    "reduce_bucket_size",
    "overlap_comm",
    *("prefetch_bucket_size", "stage3_prefetch_bucket_size"),
    *("param_persistence_threshold", "stage3_param_persistence_threshold"),
    *("max_reuse_distance", "stage3_max_reuse_distance"),
)


@dataclass(frozen=True)
class Hardware:
    """The cluster.

    Attributes:
        gpu_tflops: peak of a GPU in the recipe's precision, 10¹² operations a second.
        mfu: the share of it that training reaches; the console of a run says what it was.
        network_gbit: of one node to the others, all its adapters together, 10⁹ bits a second.
        link_gbit: of one GPU to the others in its node, one way.
        gpus_per_node: GPUs of a node.
    """

    gpu_tflops: float
    mfu: float
    network_gbit: float
    link_gbit: float
    gpus_per_node: int

    def bytes_per_s(self, world: int) -> float:
        """Bandwidth of a ring through so many GPUs."""
        gbit = self.link_gbit if world <= self.gpus_per_node else self.network_gbit
        return gbit * 1e9 / 8


@dataclass(frozen=True)
class Share:
    """One rank's part of a global step, at a ZeRO stage and a number of GPUs."""

    gpus: int
    stage: int
    accumulation: int
    memory: Memory
    sent_bytes: float
    compute_s: float
    communication_s: float
    step_s: float
    images_per_s: float
    efficiency: float


@dataclass(frozen=True)
class Plan:
    """The costs of a recipe.

    Attributes:
        shares: by number of GPUs and stage, where the batch divides.
        refused: numbers of GPUs that do not share the batch equally, with what they would need.
        notes: what a reader should know of this recipe's figures.
    """

    recipe: Recipe
    facts: ModelFacts
    hardware: Hardware
    shares: tuple[Share, ...]
    refused: dict[int, str]
    notes: tuple[str, ...]

    def share(self, gpus: int, stage: int) -> Share:
        """Of a number of GPUs and a stage that are in the plan."""
        return next(s for s in self.shares if (s.gpus, s.stage) == (gpus, stage))

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        shares = [
            {**asdict(share), "memory": {**asdict(share.memory), "total": share.memory.total}}
            for share in self.shares
        ]
        batch, facts = self.recipe.batch, self.facts
        return {
            "batch": {"global": batch.global_size, "micro": batch.micro},
            "stage": self.recipe.deepspeed.stage,
            "precision": self.recipe.deepspeed.precision,
            "hardware": asdict(self.hardware),
            "parameters": facts.parameters,
            "trained_parameters": facts.trained,
            "forward_gflops": round(facts.gflops, 3),
            "bytes_are": "computed; activations estimated",
            "times_are": "estimated",
            "shares": shares,
            "refused": {str(gpus): needs for gpus, needs in self.refused.items()},
            "notes": list(self.notes),
        }


def make_plan(recipe: Recipe, gpus: Sequence[int], hardware: Hardware) -> Plan:
    """Computes a recipe's costs for some numbers of GPUs, at every ZeRO stage.

    Raises:
        RecipeError, BackboneError: no such model, or options that contradict the recipe.
    """
    facts = model_facts(recipe)
    shares: list[Share] = []
    refused: dict[int, str] = {}
    configs = {stage: zero_options(_config(recipe, stage)) for stage in STAGES}
    for world in gpus:
        if needs := _needs(recipe, world):
            refused[world] = needs
            continue
        shares += [_share(recipe, facts, configs[stage], hardware, world) for stage in STAGES]
    notes = _notes(recipe, facts, configs[recipe.deepspeed.stage])
    return Plan(recipe, facts, hardware, tuple(shares), refused, tuple(notes))


def _config(recipe: Recipe, stage: int) -> Mapping[str, Any]:
    options = recipe.deepspeed.model_copy(update={"stage": stage})
    batch = BatchPlan(recipe.batch.global_size, recipe.batch.micro, 0, 1)
    return deepspeed_config(recipe.model_copy(update={"deepspeed": options}), batch)


def _share(recipe: Recipe, facts: ModelFacts, zero: Zero, hardware: Hardware, world: int) -> Share:
    batch = recipe.batch
    accumulation = batch.global_size // batch.micro // world
    collectives = traffic(facts, zero, world, accumulation)
    compute_s = _compute_s(recipe, facts, hardware, world)
    communication_s = _communication_s(collectives, hardware, world)
    alone_s = _compute_s(recipe, facts, hardware, 1)
    step_s = compute_s + communication_s
    moments = len(moment_names(recipe.optimizer.name))
    return Share(
        gpus=world,
        stage=zero.stage,
        accumulation=accumulation,
        memory=memory(facts, zero, world, accumulation, moments),
        sent_bytes=sent_bytes(collectives, world),
        compute_s=compute_s,
        communication_s=communication_s,
        step_s=step_s,
        images_per_s=batch.global_size / step_s,
        efficiency=alone_s / (world * step_s),
    )


def _compute_s(recipe: Recipe, facts: ModelFacts, hardware: Hardware, world: int) -> float:
    passes = PASSES + (1 if recipe.deepspeed.activation_checkpointing else 0)
    gflop = recipe.batch.global_size / world * passes * facts.gflops
    return gflop / (hardware.gpu_tflops * 1e3 * hardware.mfu)


def _communication_s(collectives: list[Collective], hardware: Hardware, world: int) -> float:
    if world == 1:
        return 0.0
    hops = sum(c.messages * (2 if c.kind == "all_reduce" else 1) for c in collectives)
    latency_s = hops * math.ceil(math.log2(world)) * LATENCY_S
    return sent_bytes(collectives, world) / hardware.bytes_per_s(world) + latency_s


def _needs(recipe: Recipe, world: int) -> str:
    """What would let so many GPUs share the batch equally; nothing, where they do."""
    total, micro = recipe.batch.global_size, recipe.batch.micro
    if total // micro % world == 0:
        return ""
    ways = [f"--batch.global {fitting_globals(total, micro, world)[-1]}"]
    if fitting := fitting_micro(total, micro, world):
        ways.append(f"--batch.micro {fitting}")
    return " or ".join(ways)


def _notes(recipe: Recipe, facts: ModelFacts, zero: Zero) -> list[str]:
    notes = []
    options = recipe.deepspeed.options
    unknown = [key for key in options if key != "zero_optimization"]
    unknown += [
        f"zero_optimization.{key}"
        for key in options.get("zero_optimization", {})
        if key not in KNOWN_ZERO
    ]
    if unknown:
        keys = ", ".join(f"deepspeed.options.{key}" for key in unknown)
        notes.append(f"{keys}: not in the formulas; the figures are those without")
    largest = max(zero.sizes_by_bytes(facts.weights).values())
    if zero.stage and zero.bucket > 2 * largest:
        notes.append(
            f"DeepSpeed's buckets are of {zero.bucket:,} numbers and allocated whole; the largest "
            f"reduction is of {largest:,}: --deepspeed.options "
            f"'{{zero_optimization: {{reduce_bucket_size: {largest}}}}}' saves the rest"
        )
    if recipe.batch.find_micro:
        notes.append("batch.find_micro may find another micro-batch than this plan's")
    return notes

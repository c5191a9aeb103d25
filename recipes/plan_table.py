"""A plan as tables for the console."""

from dataclasses import asdict, fields

from .plan import STAGES, Plan, Share
from .plan_memory import Memory
from .plan_model import COCO_CLASSES

PARTS = [field.name for field in fields(Memory)]


def format_plan(plan: Plan) -> str:
    """Memory by stage on the most GPUs that share the batch, then time by number of GPUs."""
    recipe, facts, hardware = plan.recipe, plan.facts, plan.hardware
    batch, options = recipe.batch, recipe.deepspeed
    height, width = recipe.data.image_px
    lines = [
        f"{recipe.model.name}: {facts.parameters:,} parameters, {facts.gflops:.1f} GFLOPs forward "
        f"at {height}x{width} px ({COCO_CLASSES} classes); global batch {batch.global_size}, "
        f"micro-batch {batch.micro}, {options.precision}, {recipe.optimizer.name}",
    ]
    if plan.shares:
        lines += ["", *_memory_table(plan, max(share.gpus for share in plan.shares))]
    lines += ["", *_time_table(plan)]
    lines += [
        "",
        f"bytes are computed and checked against real ranks; activations and times are estimated, "
        f"from {hardware.gpu_tflops:g} TFLOP/s x {hardware.mfu:g} a GPU, {hardware.network_gbit:g} "
        f"Gbit/s a node, {hardware.link_gbit:g} Gbit/s between its {hardware.gpus_per_node} GPUs",
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _memory_table(plan: Plan, gpus: int) -> list[str]:
    head = " ".join(f"{name:>11}" for name in [*PARTS, "total"])
    lines = [f"MiB of one of {gpus} GPUs", f"{'ZeRO':>4} {head}"]
    for stage in STAGES:
        held = plan.share(gpus, stage).memory
        sizes = [*asdict(held).values(), held.total]
        mark = " *" if stage == plan.recipe.deepspeed.stage else ""
        lines.append(f"{stage:>4} " + " ".join(f"{n / 2**20:>11,.1f}" for n in sizes) + mark)
    return [
        *lines,
        "* the recipe's stage; the total is an upper bound, without CUDA's own half GiB",
    ]


def _time_table(plan: Plan) -> list[str]:
    stage = plan.recipe.deepspeed.stage
    lines = [
        f"ZeRO-{stage}, the same global batch on more GPUs",
        f"{'GPUs':>5} {'accumulation':>12} {'MiB a GPU':>10} {'MiB sent':>9} {'compute ms':>10} "
        f"{'network ms':>10} {'step ms':>8} {'images/s':>9} {'efficiency':>10}",
    ]
    rows = {share.gpus: _time_row(share) for share in plan.shares if share.stage == stage}
    rows |= {gpus: f"{gpus:>5} {'-':>12} needs {needs}" for gpus, needs in plan.refused.items()}
    return lines + [rows[gpus] for gpus in sorted(rows)]


def _time_row(share: Share) -> str:
    return (
        f"{share.gpus:>5} {share.accumulation:>12} {share.memory.total / 2**20:>10,.0f} "
        f"{share.sent_bytes / 2**20:>9,.1f} {share.compute_s * 1e3:>10,.1f} "
        f"{share.communication_s * 1e3:>10,.1f} {share.step_s * 1e3:>8,.1f} "
        f"{share.images_per_s:>9,.0f} {share.efficiency:>10.2f}"
    )

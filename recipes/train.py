"""The training loop: from a recipe to checkpoints, metrics and a final evaluation.

One loop over global steps, whose body is a screen. Everything random in a step is keyed by (seed,
step, micro-batch), so the position is one integer and neither a resume nor another world size
changes what is computed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ..data_prep.batch import Batch
from ..model.assign import Targets
from .between_steps import close, evaluate_now, note_corrupt, publish, record, save
from .config import Recipe
from .distributed import joined_world
from .engine import commit_batch_statistics
from .guard import MicroBatch
from .heartbeat import START, heartbeat
from .multi_scale import frame_at, rescale
from .optim import set_hyperparameters, warmup_share
from .preemption import StopRequest
from .run import Run
from .run_lock import sole_writer


def train(recipe: Recipe, resume: str = "auto", above: Mapping[int, int] | None = None) -> int:
    """Runs a recipe to its end, or to the signal that ends it earlier.

    Args:
        recipe: the whole configuration.
        resume: "auto" (the newest checkpoint that verifies, if any), "never", or a checkpoint.
        above: `launchers_above()` when the process began; their end is a request to stop.

    Returns:
        The exit code: 0, or the recipe's own for a run that was asked to stop.

    Raises:
        RecipeError, RunBusyError, DataError, CheckpointError, BackboneError, TrainingError: in one
            sentence.
    """
    heartbeat().beat(START)
    with (
        joined_world() as world,
        StopRequest(above) as stop,
        sole_writer(Path(recipe.run), lambda: stop.asked),
    ):
        stopped = train_to_end(Run(recipe, world, resume, stop))
    return recipe.checkpoint.stop_exit_code if stopped else 0


def train_to_end(run: Run) -> bool:
    """Steps to the end, evaluates and saves on the way; returns whether a request cut it short."""
    run.say_what_starts()
    heartbeat().beat("loading")
    batches, stopped = run.batches(), False
    every = run.recipe.evaluation.every_epochs
    if run.step and run.is_due(every) and run.evaluated_step != run.step:
        stopped = not evaluate_now(run)  # it was broken off
        if not stopped:
            save(run)
    elif run.step >= run.total_steps:
        run.say(f"the run is finished at step {run.step}; nothing to do")
    while run.step < run.total_steps and not stopped:
        outcome = train_step(run, batches)
        stopped = outcome.stop_asked
        if run.meter.is_due(run.step):
            record(run, outcome.losses)
        if outcome.is_written:
            publish(run)
        if not stopped and run.is_due(every):
            publish(run)  # its loader forks processes: no thread of ours may hold a lock then
            stopped = not evaluate_now(run)
            run.meter.restart()
        if run.is_checkpoint_due():
            save(run)
    if run.saved_step != run.step:
        save(run, last=True)
    publish(run, last=True)
    if stopped:
        why = f" ({run.stop.reason})" if run.stop.reason else ""
        run.say(f"stopped by a signal{why}; step {run.step} is saved, `--resume auto` goes on")
    close(run, stopped)
    return stopped


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know after a step."""

    losses: dict[str, float]  # means over the global batch
    stop_asked: bool  # of any rank
    is_written: bool  # the pending checkpoint, by all ranks


def train_step(run: Run, batches: Iterator[Batch]) -> StepOutcome:
    """One global step: the whole of what training is."""
    engine, plan, recipe, step = run.engine, run.plan, run.recipe, run.step
    warmed_up = warmup_share(step, run.steps_per_epoch, recipe.schedule)
    set_hyperparameters(engine.optimizer, run.lr(step), warmed_up, recipe.optimizer)
    run.model.train()
    names = run.criterion.names
    sums = torch.zeros(len(names), device=run.world.device)
    seen: list[Batch] = []  # on the host, for the guard
    with run.meter.step(step + 1) as clock:
        for turn in range(plan.accumulation):
            with clock.phase("data"):
                seen.append(next(batches))
                batch = to_device(run, seen[-1], step, turn)
            with clock.phase("forward"):
                losses = forward(run, batch)
                loss = torch.stack(list(losses.values())).sum()
            with clock.phase("backward"):
                engine.backward(run.loss_scale.scaled(loss * run.loss_factor))
            with clock.phase("optimizer"):
                engine.step()  # moves the weights after the last micro-batch
            sums += torch.stack([losses[name].detach() for name in names])
        run.step += 1
        applied = bool(engine.was_step_applied())
        explained = run.loss_scale.update(applied)
        again = (to_device(run, batch, step, turn) for turn, batch in enumerate(seen))
        if warning := run.guard.check(run.step, applied or explained, again):
            run.say(f"warning: {warning}")
        commit_batch_statistics(run.model, plan, applied)
        if applied:
            run.ema.update(run.step)
        with clock.phase("communication"):
            # One reduction tells every rank the losses, whether any met a corrupt sample or was
            # asked to stop, and whether all have written the pending checkpoint: such things
            # reach ranks at different steps, and all must act on them at the same one.
            corrupt = [entry for batch in seen for entry in batch.corrupt]
            flags = sums.new_tensor([len(corrupt), run.stop.asked, run.writer.is_written])
            totals = torch.cat((sums, flags))
            dist.all_reduce(totals)
            *means, met, asked, written = totals.tolist()
    if met:
        note_corrupt(run, corrupt)
    count = plan.accumulation * plan.world_size
    mean_losses = {name: total / count for name, total in zip(names, means, strict=True)}
    return StepOutcome(mean_losses, asked > 0, written == plan.world_size)


def to_device(run: Run, batch: Batch, step: int, turn: int) -> MicroBatch:
    """A micro-batch on the device, in the step's frame."""
    device = run.world.device
    images = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    images, boxes_xyxy = rescale(images, batch.boxes_xyxy, frame_at(run.recipe, step))
    targets = Targets(batch.image_index, batch.labels, boxes_xyxy).to(device)
    # Stochastic depth draws by position, not by what happened before.
    key = np.random.SeedSequence((run.recipe.seed, step, run.plan.lanes(turn).start))
    seed = key.generate_state(1, np.uint64)[0].item()
    return MicroBatch(images, targets, batch.image_ids, seed)


def forward(run: Run, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """The losses of a micro-batch by name."""
    torch.manual_seed(batch.seed)
    raw = run.engine(batch.images)
    losses: dict[str, torch.Tensor] = run.criterion(run.model.head, raw.levels, batch.targets)
    return losses

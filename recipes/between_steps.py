"""What a run does between two steps: evaluate, save, publish, record.

All ranks call these in the same order; a collective in one of them is met by all.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..data_prep.batch import Corrupt
from . import state
from .build import architecture, eval_settings
from .checkpoint import CheckpointError
from .evaluate import Evaluation, EvaluationStopped, evaluate
from .export import exported_weights
from .heartbeat import heartbeat
from .native import save_native
from .optim import group_rates
from .prediction_pictures import save_predictions
from .run import Run
from .tracker_ids import forget_ids
from .tracking import pictures_path


def evaluate_now(run: Run) -> bool:
    """COCO metrics and losses of the averaged weights on the validation shards.

    Returns:
        Whether it was done: a request to stop, on any rank, breaks it off on all.
    """
    started = time.monotonic()
    run.eval_model.load_state_dict(run.ema.gather())
    settings = eval_settings(run.recipe)
    try:
        outcome = evaluate(
            run.eval_model,
            run.val_reader,
            settings,
            run.world.device,
            run.criterion,
            stop_asked=lambda: run.stop.asked,
        )
    except EvaluationStopped:
        return False
    metrics: list[Any] = [outcome and _numbers(outcome)]
    dist.broadcast_object_list(metrics)
    run.metrics, run.evaluated_step = metrics[0], run.step
    if run.tracker and outcome:
        run.quarantine.note(outcome.corrupt)
        record = {"kind": "val", "step": run.step, "epoch": run.epoch}
        run.tracker.log(record | outcome.losses | run.metrics)
        run.say(
            f"epoch {run.epoch:g}: AP {run.metrics['AP']:.4f}, "
            f"AP50 {run.metrics['AP50']:.4f} on {len(run.val_reader)} pictures in "
            f"{time.monotonic() - started:.1f} s"
        )
        path = pictures_path(run.folder, run.step)
        count = run.recipe.tracking.pictures
        pictures = save_predictions(path, run.eval_model, run.val_reader, settings, count)
        run.tracker.log_evaluation(run.step, outcome.results["per_class"], pictures)
    return True


def save(run: Run, last: bool = False) -> None:
    """Begins a checkpoint of this step on all ranks; `publish` ends it.

    Raises:
        CheckpointError: it is synchronous, can't be written, and is the `last`.
    """
    publish(run)
    heartbeat().beat("checkpoint")
    run.best_ap = max(run.best_ap, run.metrics.get("AP", -1.0))
    run_state: dict[str, Any] = {
        "steps_per_epoch": run.steps_per_epoch,
        "optimizer_steps": state.optimizer_steps(run.engine),
        "skipped_steps": run.skipped_steps,
        "loss_scale": run.loss_scale.state(),
        "tracker_ids": run.tracker.run_ids if run.tracker else {},
        "recipe": run.recipe.model_dump(mode="json", by_alias=True),
        "architecture": architecture(run.recipe, len(run.classes)),
        "classes": run.classes,
        "data_fingerprint": run.fingerprint,
        "metrics": run.metrics,
        "evaluated_step": run.evaluated_step,
        "best_ap": run.best_ap,
    }

    def write_native(folder: Path) -> list[Path]:
        return save_native(run.engine, folder, run.step, run_state)

    run.writer.begin(
        run.step,
        run.entries,
        run_state,
        write_native if run.recipe.checkpoint.native else None,
    )
    run.saved_step = run.step
    if not run.recipe.checkpoint.asynchronous:
        publish(run, last)


def publish(run: Run, last: bool = False) -> None:
    """Waits for the checkpoint that is being written, if any, and makes it count.

    Raises:
        CheckpointError: it can't be written, and is the `last`. Else training goes on: the
            checkpoints before it are as good as they were.
    """
    if not run.writer.is_pending:
        return
    heartbeat().beat("publishing")
    try:
        run.writer.finish()
        if run.world.is_main:
            forget_ids(run.folder)
    except CheckpointError as error:
        run.saved_step = -1
        if last:
            raise
        run.say(f"warning: {error}; training goes on")


def record(run: Run, losses: dict[str, float]) -> None:
    """Logs what the last steps were like; all ranks call it."""
    heartbeat().beat("record")
    norm = run.engine.get_global_grad_norm()
    record = {
        "kind": "train",
        "step": run.step,
        "epoch": run.epoch,
        **{name: _finite(loss) for name, loss in losses.items()},
        "lr": run.lr(run.step - 1),
        "lr_groups": group_rates(run.engine.optimizer),
        "gradient_norm": None if norm is None else _finite(float(norm)),
        "loss_scale": run.loss_scale.scale,
        "skipped_steps": run.skipped_steps,
        **run.meter.read(),
    }
    if run.tracker:
        run.tracker.log(record)
        run.meter.say(record, run.criterion.names)


def close(run: Run, stopped: bool) -> None:
    """Ends the trackers; those of a run that came to its end may take the final weights."""
    if not run.tracker:
        return
    try:
        if run.recipe.tracking.log_weights and not stopped:
            run.tracker.log_weights(exported_weights(run.folder))
    except (OSError, CheckpointError) as error:  # the run itself is complete
        run.say(f"warning: the final weights can't be handed to the trackers ({error})")
    finally:
        run.tracker.close(lambda: stopped or run.stop.asked)


def note_corrupt(run: Run, corrupt: list[Corrupt]) -> None:
    """Writes down the corrupt samples that any rank has met; ends the run at too many."""
    parts: list[list[Corrupt]] = [[] for _ in range(run.world.size)]
    dist.all_gather_object(parts, corrupt)
    for entry in run.quarantine.add(entry for part in parts for entry in part):
        run.say(f"{entry.shard}: sample {entry.key} {entry.reason}; another takes its place")


def _numbers(outcome: Evaluation) -> dict[str, float]:
    return {name: value for name, value in outcome.results.items() if name != "per_class"}


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None

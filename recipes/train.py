"""The training run: from a recipe to checkpoints, metrics and a final evaluation.

The story is linear: set up, resume, then one loop over global steps, whose body is a screen.
Everything random in a step is keyed by (seed, step, micro-batch), so the position is one integer
and neither a resume nor another world size changes what is computed.
"""

import copy
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..data_prep.batch import Batch, Corrupt
from ..data_prep.loader import training_batches
from ..data_prep.quarantine import Quarantine
from ..data_prep.stream import BatchPlan
from ..model.assign import Targets
from ..model.detector import Detector, build_criterion, build_detector, without_pretrained
from ..model.weights import begin_from
from . import state
from .build import architecture, eval_settings
from .checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from .config import Recipe
from .data import open_shards, training_stream
from .distributed import World, start_world, stop_world
from .ema import Ema
from .engine import batch_plan, build_engine, commit_batch_statistics
from .evaluate import Evaluation, evaluate
from .meter import Meter
from .native import save_native
from .optim import lr_factor, set_hyperparameters, total_steps, warmup_share
from .tracking import Tracker


def train(recipe: Recipe, resume: str = "auto") -> None:
    """Runs a recipe to its end, or to the signal that ends it earlier.

    Args:
        recipe: the whole configuration.
        resume: "auto" (the newest checkpoint that verifies, if any), "never", or a checkpoint.

    Raises:
        RecipeError, DataError, CheckpointError, BackboneError: a mistake, in one sentence.
    """
    world = start_world()
    try:
        Run(recipe, world, resume).train()
    finally:
        stop_world()


class Run:
    """Everything that a run holds while it trains."""

    def __init__(self, recipe: Recipe, world: World, resume: str):
        self.recipe, self.world = recipe, world
        self.folder = Path(recipe.run)
        self.plan: BatchPlan = batch_plan(recipe, world)
        reader, self.val_reader = open_shards(recipe)
        self.classes = [{"id": c.id, "name": c.name} for c in reader.classes]
        checkpoint = find_checkpoint(self.folder / "checkpoints", resume)
        self.step = checkpoint.step if checkpoint else 0
        self.fingerprint = reader.manifest.fingerprint
        if checkpoint:
            state.check_data(checkpoint, self.fingerprint, recipe.data.train)
        self.changes = state.recipe_changes(recipe, checkpoint) if checkpoint else []
        # What the last evaluation said goes with every checkpoint after it.
        self.metrics: dict[str, float] = checkpoint.state["metrics"] if checkpoint else {}

        torch.manual_seed(recipe.seed)  # the initial weights, the same on every rank
        design = architecture(recipe, len(self.classes))
        if checkpoint or recipe.model.weights:  # these replace the backbone's: nothing to fetch
            design = without_pretrained(design)
        model = build_detector(design)
        self.eval_model: Detector = copy.deepcopy(model).eval().to(world.device)
        self.fresh: list[str] = []
        if checkpoint:
            state.load_model(model, checkpoint)
        elif recipe.model.weights:
            names = [str(entry["name"]) for entry in self.classes]
            self.fresh = begin_from(model, Path(recipe.model.weights), names)
        self.engine = build_engine(recipe, model, self.plan)
        self.model: Detector = self.engine.module
        self.ema = Ema(self.model, recipe.ema)
        if checkpoint:
            state.load_optimizer(self.engine, recipe.optimizer.name, checkpoint)
            self.ema.load(checkpoint.section("ema"))
        else:
            state.create_optimizer_state(self.engine, recipe.optimizer.name, 0)
        self.criterion = build_criterion(self.model, recipe.model.loss.model_dump())
        self.loss_factor = recipe.batch.global_size if self.criterion.sums_over_pictures else 1

        self.stream = training_stream(recipe, reader, self.plan, self.step)
        self.steps_per_epoch = self.stream.order.steps
        self.total_steps = total_steps(self.steps_per_epoch, recipe.schedule)
        limit = recipe.data.corrupt_limit
        self.quarantine = Quarantine(
            self.folder, reader.source.where(0), len(reader), limit, world.is_main
        )
        self.tracker = self._start_tracker(checkpoint) if world.is_main else None
        self.stop_asked = False

    def train(self) -> None:
        """Steps until the end or a signal; evaluates and saves on the way."""
        self._say_what_starts()
        if self.step >= self.total_steps:
            self._say(f"the run is finished at step {self.step}; nothing to do")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask_to_stop)
        batches = training_batches(self.stream, self.recipe.data.workers, self.world.device)
        meter = Meter(self.plan.global_batch, self.total_steps, self.recipe.tracking.log_every)
        saved = self.step
        while self.step < self.total_steps:
            losses, stop = self.train_step(batches, meter)
            if meter.is_due(self.step):
                self._record(losses, meter)
            if self._is_due(self.recipe.evaluation.every_epochs):
                self.evaluate()
                meter.restart()
            if stop or self._is_checkpoint_due():
                saved = self.save()
                meter.restart()
            if stop:
                self._say(
                    f"stopped by a signal; step {self.step} is saved, `--resume auto` goes on"
                )
                break
        if saved < self.step:
            self.save()
        if self.tracker:
            self.tracker.close()

    def train_step(self, batches: Iterator[Batch], meter: Meter) -> tuple[dict[str, float], bool]:
        """One global step: the whole of what training is.

        Returns:
            The losses, means over the global batch, and whether a signal asked any rank to stop.
        """
        engine, plan = self.engine, self.plan
        warmed_up = warmup_share(self.step, self.steps_per_epoch, self.recipe.schedule)
        set_hyperparameters(engine.optimizer, self._lr(self.step), warmed_up, self.recipe.optimizer)
        self.model.train()
        names = self.criterion.names
        sums = torch.zeros(len(names) + 2, device=self.world.device)
        corrupt: list[Corrupt] = []
        for turn in range(plan.accumulation):
            with meter.waiting():
                batch = next(batches)
            corrupt += batch.corrupt
            images = batch.images.to(self.world.device, non_blocking=True).permute(0, 3, 1, 2)
            targets = Targets(batch.image_index, batch.labels, batch.boxes_xyxy)
            # Stochastic depth draws by position, not by what happened before.
            seed = (self.recipe.seed, self.step, plan.lanes(turn).start)
            torch.manual_seed(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0].item())
            raw = engine(images)
            losses = self.criterion(self.model.head, raw.levels, targets.to(self.world.device))
            loss: Tensor = sum(losses.values())
            engine.backward(loss * self.loss_factor)
            engine.step()
            sums[:-2] += torch.stack([losses[name].detach() for name in names])
        commit_batch_statistics(self.model, plan)
        self.step += 1
        self.ema.update(self.step)
        # One reduction tells every rank the losses, whether any met a corrupt sample and whether
        # any was asked to stop: a signal reaches ranks at different steps, and all must save the
        # same one.
        sums[-2], sums[-1] = len(corrupt), self.stop_asked
        dist.all_reduce(sums)
        values = (sums / (plan.accumulation * plan.world_size)).tolist()
        if values[-2]:
            self._quarantine(corrupt)
        return dict(zip(names, values[:-2], strict=True)), values[-1] > 0

    def _quarantine(self, corrupt: list[Corrupt]) -> None:
        """Writes down the corrupt samples that any rank has met; ends the run at too many."""
        parts: list[list[Corrupt]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(parts, corrupt)
        for entry in self.quarantine.add(entry for part in parts for entry in part):
            self._say(f"{entry.shard}: sample {entry.key} {entry.reason}; another takes its place")

    def evaluate(self) -> None:
        """COCO metrics and losses of the averaged weights on the validation shards."""
        started = time.monotonic()
        self.eval_model.load_state_dict(self.ema.gather())
        outcome: Evaluation | None = evaluate(
            self.eval_model,
            self.val_reader,
            eval_settings(self.recipe),
            self.world.device,
            self.criterion,
        )
        if self.tracker and outcome:
            self.quarantine.note(outcome.corrupt)
            self.metrics = {k: v for k, v in outcome.results.items() if k != "per_class"}
            self.tracker.log(
                {"kind": "val", "step": self.step, "epoch": self.epoch}
                | outcome.losses
                | self.metrics
            )
            self._say(
                f"epoch {self.epoch:g}: AP {self.metrics['AP']:.4f}, "
                f"AP50 {self.metrics['AP50']:.4f} on {len(self.val_reader)} pictures in "
                f"{time.monotonic() - started:.1f} s"
            )

    def save(self) -> int:
        """Publishes a checkpoint of this step on all ranks."""
        run_state: dict[str, Any] = {
            "finished": self.step == self.total_steps,
            "optimizer_steps": state.optimizer_steps(self.engine),
            "tracker_id": self.tracker.run_id if self.tracker else None,
            "recipe": self.recipe.model_dump(mode="json", by_alias=True),
            "architecture": architecture(self.recipe, len(self.classes)),
            "classes": self.classes,
            "data_fingerprint": self.fingerprint,
            "metrics": self.metrics,
        }
        tensors = state.entries(self.engine, self.ema, self.recipe.optimizer.name)
        keep = self.recipe.checkpoint.keep
        save_checkpoint(self.folder / "checkpoints", self.step, tensors, run_state, keep)
        if self.recipe.checkpoint.native:
            save_native(self.engine, self.folder / "native", self.step, run_state, keep)
        return self.step

    def _record(self, losses: dict[str, float], meter: Meter) -> None:
        """Logs what the last steps were like."""
        norm = self.engine.get_global_grad_norm()
        record = {
            "kind": "train",
            "step": self.step,
            "epoch": self.epoch,
            **losses,
            "lr": self._lr(self.step - 1),
            "gradient_norm": None if norm is None else float(norm),
            "skipped_steps": self.engine.skipped_steps,
            **meter.read(),
        }
        if self.tracker:
            self.tracker.log(record)
            meter.say(record, self.criterion.names)

    def _lr(self, step: int) -> float:
        schedule = self.recipe.schedule
        return self.recipe.optimizer.lr * lr_factor(step, self.steps_per_epoch, schedule)

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return round(self.step / self.steps_per_epoch, 3)

    def _is_due(self, every_epochs: float) -> bool:
        every = max(1, round(every_epochs * self.steps_per_epoch))
        return self.step % every == 0 or self.step == self.total_steps

    def _is_checkpoint_due(self) -> bool:
        options = self.recipe.checkpoint
        if options.every_steps:
            return self.step % options.every_steps == 0
        return self._is_due(options.every_epochs)

    def _start_tracker(self, checkpoint: Checkpoint | None) -> Tracker:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        run_id = checkpoint.state["tracker_id"] if checkpoint else None
        return Tracker(self.recipe, self.folder, self.step, run_id)

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        self.stop_asked = True  # nothing more: a collective inside a signal handler deadlocks

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def _say_what_starts(self) -> None:
        parameters = sum(p.numel() for p in self.eval_model.parameters())
        kind = "resuming at" if self.step else "from"
        self._say(
            f"training {self.recipe.model.name} detector, {parameters:,} parameters, on "
            f"{len(self.stream.reader)} pictures of {len(self.classes)} classes: {kind} step "
            f"{self.step} of {self.total_steps} ({self.steps_per_epoch} an epoch), "
            f"{self.world.size} {self.world.device.type} process(es), ZeRO-"
            f"{self.recipe.deepspeed.stage}, global batch {self.plan.global_batch} = micro-batch "
            f"{self.plan.micro_batch} x {self.plan.accumulation} x {self.world.size}"
        )
        if self.recipe.model.weights and not self.step:
            new = (
                f", but {len(self.fresh)} tensors that depend on the classes" if self.fresh else ""
            )
            self._say(f"begins with the weights of {self.recipe.model.weights}{new}")
        for change in self.changes:
            self._say(f"the recipe has changed since the checkpoint: {change}")

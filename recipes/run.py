"""Everything that a run holds while it trains.

Setting up goes from the recipe to the first batch in one line; where a checkpoint is gone on from,
each part takes from it what it needs: the model before DeepSpeed wraps it, moments and average
afterwards, the stream by the number of steps alone.
"""

import copy
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..data_prep.batch import Batch
from ..data_prep.loader import training_batches
from ..data_prep.quarantine import Quarantine
from ..model.detector import Detector, build_criterion, build_detector, without_pretrained
from ..model.weights import begin_from
from . import state
from .build import architecture
from .checkpoint import Checkpoint, find_checkpoint, published
from .checkpoint_writer import CheckpointWriter, Entry
from .config import Recipe
from .data import open_shards, training_stream
from .distributed import World
from .ema import Ema
from .engine import batch_plan, build_engine
from .files import write_whole
from .guard import Guard, TrainingError
from .meter import Meter
from .micro_batch import find_micro_batch
from .optim import lr_factor, total_steps
from .precision import LossScale
from .preemption import StopRequest
from .resume import check_data, recipe_changes, with_found_micro_batch
from .tracker_ids import keep_ids, kept_ids
from .tracking import Tracker
from .utilization import Utilization


class Run:
    """A run of one recipe, at a step.

    Args:
        recipe: the whole configuration.
        world: the processes.
        resume: "auto" (the newest checkpoint that verifies, if any), "never", or a checkpoint.
        stop: says whether this process was asked to stop.
    """

    def __init__(self, recipe: Recipe, world: World, resume: str, stop: StopRequest):
        self.world, self.stop, self.folder = world, stop, Path(recipe.run)
        reader, self.val_reader = open_shards(recipe)
        self.classes = [{"id": c.id, "name": c.name} for c in reader.classes]
        self.fingerprint = reader.manifest.fingerprint
        checkpoint = find_checkpoint(self.folder / "checkpoints", resume)
        if checkpoint:
            check_data(checkpoint, self.fingerprint, recipe.data.train)
            recipe = with_found_micro_batch(recipe, checkpoint)
        self.changes = recipe_changes(recipe, checkpoint) if checkpoint else []
        searches = recipe.batch.find_micro and not checkpoint
        if not searches:
            batch_plan(recipe, world)  # sizes that do not divide are told before the work begins

        model, self.fresh = self._build_model(recipe, checkpoint)
        criterion = build_criterion(model, recipe.model.loss.model_dump())
        if searches:
            micro = find_micro_batch(recipe, model, criterion, world)
            batch = recipe.batch.model_copy(update={"micro": micro})
            recipe = recipe.model_copy(update={"batch": batch})
            self.say(f"the largest micro-batch that fits is {micro}")
        self.recipe, self.plan = recipe, batch_plan(recipe, world)
        start_step = checkpoint.step if checkpoint else 0
        self.stream = training_stream(recipe, reader, self.plan, start_step)
        self.steps_per_epoch = self.stream.order.steps
        self.total_steps = total_steps(self.steps_per_epoch, recipe.schedule)

        self.eval_model: Detector = copy.deepcopy(model).eval().to(world.device)
        self.engine = build_engine(recipe, model, self.plan)
        self.model: Detector = self.engine.module
        self.criterion = criterion
        self.loss_factor = recipe.batch.global_size if criterion.sums_over_pictures else 1
        self.ema = Ema(self.model, recipe.ema)
        self.loss_scale = LossScale(self.engine, recipe.deepspeed.precision == "fp16")
        self._take_over(checkpoint)

        options = recipe.deepspeed.precision, recipe.optimizer.skip_limit
        self.guard = Guard(self.engine, criterion, *options)
        limit = recipe.data.corrupt_limit
        self.quarantine = Quarantine(
            self.folder, reader.source.where(0), len(reader), limit, world.is_main
        )
        keep = recipe.checkpoint.keep, recipe.checkpoint.keep_best
        self.writer = CheckpointWriter(self.folder / "checkpoints", *keep)
        self.tracker = self._start_tracker(checkpoint) if world.is_main else None
        utilization = Utilization(
            self.eval_model, recipe.data.image_px, world.device, recipe.deepspeed.precision
        )
        every = recipe.tracking.log_every
        self.meter = Meter(world, self.plan.global_batch, self.total_steps, every, utilization)

    def _build_model(
        self, recipe: Recipe, checkpoint: Checkpoint | None
    ) -> tuple[Detector, list[str]]:
        """The plain detector with its weights, and the tensors that `model.weights` had not."""
        torch.manual_seed(recipe.seed)  # the initial weights, the same on every rank
        design = architecture(recipe, len(self.classes))
        if checkpoint or recipe.model.weights:  # these replace the backbone's: nothing to fetch
            design = without_pretrained(design)
        model = build_detector(design)
        fresh: list[str] = []
        if checkpoint:
            state.load_model(model, checkpoint)
        elif recipe.model.weights:
            names = [str(entry["name"]) for entry in self.classes]
            fresh = begin_from(model, Path(recipe.model.weights), names)
        return model, fresh

    def _take_over(self, checkpoint: Checkpoint | None) -> None:
        """Where the run stands: as the checkpoint says, or at the very beginning."""
        held: dict[str, Any] = checkpoint.state if checkpoint else {}
        self.step = self.saved_step = checkpoint.step if checkpoint else 0
        # What the last evaluation said goes with every checkpoint after it.
        self.metrics: dict[str, float] = held.get("metrics", {})
        self.evaluated_step: int = held.get("evaluated_step", 0)
        self.best_ap: float = held.get("best_ap", -1.0)
        self.skipped_before: int = held.get("skipped_steps", 0)
        if checkpoint:
            state.load_optimizer(self.engine, self.recipe.optimizer.name, checkpoint)
            self.ema.load(checkpoint.section("ema"))
            self.loss_scale.load(held["loss_scale"])
        else:
            state.create_optimizer_state(self.engine, self.recipe.optimizer.name, 0)

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """What a checkpoint holds of this rank: always the same tensors, changed in place."""
        return state.entries(self.engine, self.ema, self.recipe.optimizer.name)

    def batches(self) -> Iterator[Batch]:
        """The micro-batches of this rank from where the run stands."""
        return training_batches(self.stream, self.recipe.data.workers, self.world.device)

    def lr(self, step: int) -> float:
        """The learning rate of a step, before any group's scale."""
        schedule = self.recipe.schedule
        return self.recipe.optimizer.lr * lr_factor(step, self.steps_per_epoch, schedule)

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return round(self.step / self.steps_per_epoch, 3)

    @property
    def skipped_steps(self) -> int:
        """Steps of the whole run whose gradients were no numbers."""
        return self.skipped_before + int(self.engine.skipped_steps)

    @property
    def is_best(self) -> bool:
        """Whether this step has the highest AP so far."""
        return self.evaluated_step == self.step and self.metrics.get("AP", -1.0) > self.best_ap

    def is_due(self, every_epochs: float) -> bool:
        """Whether something that happens every so often is due after this step."""
        every = max(1, round(every_epochs * self.steps_per_epoch))
        return self.step % every == 0 or self.step == self.total_steps

    def is_checkpoint_due(self) -> bool:
        """Whether this step is to be saved."""
        options = self.recipe.checkpoint
        if options.keep_best and self.is_best:
            return True
        if options.every_steps:
            return self.step % options.every_steps == 0
        return self.is_due(options.every_epochs)

    def say(self, text: str) -> None:
        """Prints a line, on the main rank."""
        if self.world.is_main:
            print(text, flush=True)

    def say_what_starts(self) -> None:
        """The sizes of everything, and what has changed since the checkpoint."""
        parameters = sum(p.numel() for p in self.eval_model.parameters())
        kind = "resuming at" if self.step else "from"
        self.say(
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
            self.say(f"begins with the weights of {self.recipe.model.weights}{new}")
        for change in self.changes:
            self.say(f"the recipe has changed since the checkpoint: {change}")

    def _start_tracker(self, checkpoint: Checkpoint | None) -> Tracker:
        text = self.recipe.to_yaml()
        course = hashlib.sha256(f"{self.fingerprint}\n{text}".encode()).hexdigest()
        try:
            run_ids = self._tracker_ids(checkpoint) if checkpoint else kept_ids(self.folder, course)
            if checkpoint:  # before what trackers and metrics.jsonl hold of the steps to come goes
                self.writer.retention.leave(self.step)
            write_whole(self.folder / "recipe.yaml", text)
            tracker = Tracker(self.recipe, self.folder, self.step, run_ids)
            if not checkpoint:  # killed before its first one, it gives the same numbers once more
                keep_ids(self.folder, course, tracker.run_ids)
            return tracker
        except OSError as error:
            raise TrainingError(
                f"run: {self.folder} can't be written to ({error.strerror}); make room there, or "
                "choose another --run"
            ) from None

    def _tracker_ids(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Its trackers' ids, unless they hold another course of the steps to come.

        They would keep that. So it is where another run's checkpoint was given, or an earlier one
        of this run under a recipe that has changed: else the steps that are repeated give the same
        numbers again.
        """
        folder = self.folder / "checkpoints"
        is_here = checkpoint.path.resolve().parent == folder.resolve()
        is_newest = is_here and published(folder)[0].name == checkpoint.path.name
        goes_on = is_newest or (is_here and not self.changes)
        return dict(checkpoint.state["tracker_ids"]) if goes_on else {}

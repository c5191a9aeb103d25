"""The recipe: every setting of a run and its default. This is the one place of each default.

(The `model` section and its defaults are in `config_model`.)
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from ..data_prep.cache import CacheOptions
from .config_model import (
    BelowOne,
    ConvNeXtYOLOSection,
    Count,
    Fraction,
    ModelSection,
    NotNegative,
    Positive,
    Section,
)


class RecipeError(Exception):
    """A recipe that can't be run. The text is one sentence."""

    exit_code = 2


class DataSection(Section):
    """Where the shards are, and the frame that pictures are scaled into."""

    train: str = "shards/train"  # a folder, or its URL: https://, s3://, gs://
    val: str = "shards/val"
    # Of a URL's shards: where what is fetched is kept, for all processes of a machine; how much of
    # it; and how long a host may stay away before the run ends. ~ is the home folder.
    cache: str = CacheOptions.folder
    cache_gib: Positive = CacheOptions.gib
    patience_s: NotNegative = CacheOptions.patience_s
    image_px: tuple[int, int] = (640, 640)  # height, width: multiples of 32
    workers: Annotated[int, Field(ge=0)] = 4  # loader processes a rank; 0: the rank itself
    corrupt_limit: Fraction = 0.01  # share of the training samples; beyond it the run ends

    @field_validator("image_px")
    @classmethod
    def _frame(cls, image_px: tuple[int, int]) -> tuple[int, int]:
        if any(side < 64 or side % 32 for side in image_px):
            raise ValueError("height and width must be multiples of 32, at least 64")
        return image_px


class BatchSection(Section):
    """The batch that an optimizer step sees, and the part of it that a device holds at once.

    Both are fixed by the recipe: another world size changes the accumulation, never these.
    """

    global_size: Count = Field(64, alias="global")
    micro: Count = 16
    find_micro: bool = False  # search the largest micro-batch that fits, once, before step 0

    @model_validator(mode="after")
    def _whole_parts(self) -> "BatchSection":
        if self.global_size % self.micro:
            raise ValueError(
                f"global {self.global_size} is not a multiple of micro {self.micro}; change one"
            )
        return self


class AugmentSection(Section):
    """Training augmentation: YOLOv5's "low" strengths."""

    mosaic: Fraction = 1.0
    scale: BelowOne = 0.5
    translate: Fraction = 0.1
    flip_left_right: Fraction = 0.5
    flip_up_down: Fraction = 0.0
    hue: Fraction = 0.015
    saturation: Fraction = 0.7
    value: Fraction = 0.4
    weak_epochs: NotNegative = 0  # the last epochs go without mosaic
    # Workers only decode, and the training device does the rest: where cores are few for the GPUs.
    on_device: bool = False
    # Frames larger and smaller by up to this share, in whole strides, drawn for each global step.
    multi_scale: BelowOne = 0.0


class OptimizerSection(Section):
    """The optimizer and its groups."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.05  # on weights only: no norm, bias or layer scale
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)  # AdamW
    momentum: BelowOne = 0.937  # SGD, Nesterov
    warmup_momentum: BelowOne = 0.8  # SGD: where the warm-up begins
    warmup_bias_lr: NotNegative = 0.1  # SGD: what the biases begin the warm-up with
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # lr of a backbone layer by depth
    clip: NotNegative = 10.0  # largest norm of the global gradient; 0: no limit
    freeze: tuple[str, ...] = ()  # parameters that stay: names, or what they begin with
    skip_limit: Count = 20  # steps in a row skipped for NaN or Inf; then the run ends


class ScheduleSection(Section):
    """Learning rate over steps: linear warm-up, then a decay to `final` of the peak."""

    epochs: Positive = 50
    warmup_epochs: NotNegative = 3
    decay: Literal["linear", "cosine", "flat_cosine"] = "cosine"
    final: Fraction = 0.01


class EmaSection(Section):
    """Moving average of the weights: decay·(1 - e^(-step / ramp_steps))."""

    decay: Fraction = 0.9999
    ramp_steps: Positive = 2000


class DeepSpeedSection(Section):
    """DeepSpeed's part. Its whole configuration is made from the recipe."""

    stage: Literal[0, 1, 2, 3] = 1
    # Weights are fp32 throughout; bf16 and fp16 are what autocast computes in.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False  # torch.compile: minutes at the start, fewer afterwards
    activation_checkpointing: bool = False  # of the backbone: less memory, a third more compute
    options: dict[str, Any] = {}  # further keys of DeepSpeed's configuration


class CheckpointSection(Section):
    """When to save, and how many to keep."""

    every_epochs: Positive = 1
    every_steps: Annotated[int, Field(ge=0)] = 0  # instead of epochs, where not 0
    keep: Count = 2  # the newest ones
    keep_best: bool = True  # and the one with the highest AP
    asynchronous: bool = True  # the loop waits only for the copy to host memory
    # After a signal and the checkpoint that answers it: 0, or what makes the scheduler start the
    # job again (Grid Engine: 99).
    stop_exit_code: Annotated[int, Field(ge=0, le=255)] = 0
    native: bool = False  # DeepSpeed's own format too, beside ours, for exchange


class EvalSection(Section):
    """Evaluation during training and at its end, on the EMA weights."""

    every_epochs: Positive = 5
    batch: Count = 16  # a rank
    confidence: Fraction = 0.001
    iou: Fraction = 0.65


class TrackingSection(Section):
    """What is shown beside metrics.jsonl, which is always written."""

    wandb: Literal["offline", "online", "off"] = "offline"
    comet: Literal["off", "offline", "online"] = "off"
    tensorboard: bool = False
    project: str = "convnext-yolo"
    log_every: Count = 10  # steps
    log_weights: bool = False  # the final weights go to the trackers as an artifact
    pictures: Annotated[int, Field(ge=0)] = 4  # validation pictures drawn at each evaluation

    @field_validator("wandb", "comet", mode="before")
    @classmethod
    def _off(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # YAML takes a bare off for false


class Recipe(Section):
    """One run."""

    run: str = "runs/train"  # the folder of everything that the run writes
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelSection = ConvNeXtYOLOSection()
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()  # type: ignore[call-arg]
    augment: AugmentSection = AugmentSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: EmaSection = EmaSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvalSection = EvalSection()
    tracking: TrackingSection = TrackingSection()

    def to_yaml(self) -> str:
        """The complete recipe, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)

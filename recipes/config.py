"""The recipe: every setting of a run and its default. This is the one place of each default."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from ..data_prep.cache import CacheOptions

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Anchors = tuple[tuple[Positive, Positive], ...]  # of one level: width, height in pixels

# YOLOv5's anchors for COCO at 640 px, by level.
COCO_ANCHORS: tuple[Anchors, Anchors, Anchors] = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)


class RecipeError(Exception):
    """A recipe that can't be run. The text is one sentence."""

    exit_code = 2


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, and so are infinities."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class BackboneSection(Section):
    """The trunk, by timm's name."""

    name: str = "convnext_tiny"
    options: dict[str, Any] = {}  # timm's arguments: depths, dims, drop_path_rate, ...
    pretrained: bool = False  # timm's weights, from its hub
    weights: str | None = None  # or from a local safetensors file with timm's names


class AnchorLoss(Section):
    """Gains of the anchor head's losses: YOLOv5's for small models."""

    box: NotNegative = 0.05
    obj: NotNegative = 1.0
    cls: NotNegative = 0.5


class AlignedLoss(Section):
    """Gains of the anchor-free head's losses: YOLOv8's."""

    box: NotNegative = 7.5
    cls: NotNegative = 0.5
    dfl: NotNegative = 1.5


class DetectorSection(Section):
    """What every detector has."""

    weights: str | None = None  # begin from a whole detector: a file of `export` or `import`


class ConvNeXtYOLOSection(DetectorSection):
    """Ours: a norm on each tapped stage, large-kernel neck, anchor-free decoupled head."""

    name: Literal["convnext_yolo"] = "convnext_yolo"
    backbone: BackboneSection = BackboneSection()
    neck_channels: tuple[Count, Count, Count] = (96, 192, 384)
    neck_repeats: Count = 1
    head_channels: Count = 96
    head_convs: Count = 2
    distance_bins: Annotated[int, Field(ge=2)] = 16
    loss: AlignedLoss = AlignedLoss()


class AnchorSection(DetectorSection):
    """What the detectors with anchors have."""

    anchors: tuple[Anchors, Anchors, Anchors] = COCO_ANCHORS
    loss: AnchorLoss = AnchorLoss()

    @field_validator("anchors")
    @classmethod
    def _equally_many(cls, anchors: tuple[Anchors, ...]) -> Any:
        if len({len(level) for level in anchors} | {0}) != 2:
            raise ValueError("each of the three levels needs equally many anchors, at least one")
        return anchors


class SeedSection(AnchorSection):
    """The study's: a ConvNeXt in the place of YOLOv5's backbone."""

    name: Literal["seed_convnext_yolo"]
    backbone: BackboneSection = BackboneSection()
    adapter_channels: tuple[Count, Count, Count] = (128, 256, 512)
    neck_channels: tuple[Count, Count, Count] = (64, 128, 256)
    neck_repeats: Count = 1


class YOLOv5Section(AnchorSection):
    """YOLOv5 v6; n, s, m, l are depth .33, .33, .67, 1 and width .25, .5, .75, 1."""

    name: Literal["yolov5"]
    depth: Positive = 0.33
    width: Positive = 0.5


DETECTORS: dict[str, type[DetectorSection]] = {
    "convnext_yolo": ConvNeXtYOLOSection,
    "seed_convnext_yolo": SeedSection,
    "yolov5": YOLOv5Section,
}


def detector_name(model: Any) -> Any:
    """Which detector a `model` section is about; ours, where it does not say."""
    if isinstance(model, dict):
        return model.get("name", "convnext_yolo")
    return getattr(model, "name", "convnext_yolo")


ModelSection = Annotated[
    Annotated[ConvNeXtYOLOSection, Tag("convnext_yolo")]
    | Annotated[SeedSection, Tag("seed_convnext_yolo")]
    | Annotated[YOLOv5Section, Tag("yolov5")],
    Discriminator(
        detector_name,
        custom_error_type="unknown_detector",
        custom_error_message=f"is not a detector; known here: {', '.join(DETECTORS)}",
    ),
]


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
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: torch autocast, fp32 weights
    options: dict[str, Any] = {}  # further keys of DeepSpeed's configuration


class CheckpointSection(Section):
    """When to save, and how many to keep."""

    every_epochs: Positive = 1
    every_steps: Annotated[int, Field(ge=0)] = 0  # instead of epochs, where not 0
    keep: Count = 2
    native: bool = False  # DeepSpeed's own format too, beside ours, for exchange


class EvalSection(Section):
    """Evaluation during training and at its end, on the EMA weights."""

    every_epochs: Positive = 5
    batch: Count = 16  # a rank
    confidence: Fraction = 0.001
    iou: Fraction = 0.65


class TrackingSection(Section):
    """Weights & Biases, beside metrics.jsonl which is always written."""

    wandb: Literal["offline", "online", "off"] = "offline"
    project: str = "convnext-yolo"
    log_every: Count = 10  # steps

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, wandb: Any) -> Any:
        return "off" if wandb is False else wandb  # YAML takes a bare off for false


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

"""The recipe's `model` section: the detectors and their arguments, each with its default."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

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

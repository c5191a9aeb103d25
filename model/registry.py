"""The hand-off of the feature maps P3-P5 from backbone to neck."""

from torch import Tensor


class FeatureRegistry:
    """Holds the feature maps of one forward pass until the neck takes them.

    A registry is made at the start of a forward pass, belongs to it and is empty at its end. It
    is never an attribute of a module, so replicas, deepcopy, pickle, compilation, activation
    checkpointing and ZeRO-3 have nothing of it to share, copy or partition. (A module-level
    registry keyed by addresses breaks under each of these.)
    """

    def __init__(self) -> None:
        self._features: dict[str, Tensor] = {}

    def put(self, name: str, feature: Tensor) -> None:
        """Stores a feature map `[B, channels, H, W]` under a name such as "P3", once."""
        if name in self._features:
            raise KeyError(f"{name} was already handed over in this forward pass")
        self._features[name] = feature

    def take(self, name: str) -> Tensor:
        """Hands a feature map over and forgets it."""
        if name not in self._features:
            raise KeyError(
                f"nobody put {name}; waiting here: {sorted(self._features) or 'nothing'}"
            )
        return self._features.pop(name)

    def assert_empty(self) -> None:
        """Raises where a feature map was put but never taken: a neck that ignores a level."""
        if self._features:
            raise RuntimeError(f"never taken from the registry: {sorted(self._features)}")

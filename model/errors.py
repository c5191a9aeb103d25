"""The mistakes a user can make with weights and pictures."""


class WeightsError(Exception):
    """A weights file that can't be used: missing, foreign, damaged. The text is one sentence."""

    exit_code = 2


class BackboneError(Exception):
    """A backbone that can't be built: unknown to timm, wrong strides, weights out of reach."""

    exit_code = 2

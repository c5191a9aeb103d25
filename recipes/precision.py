"""fp16: autocast inside the engine's forward pass, and the loss scale that keeps gradients alive.

bf16 goes through DeepSpeed's `torch_autocast`. Its fp16 twin scales the loss but clips before it
unscales, so fp16 is done here: gradients below 6e-8 vanish in 16 bits, the loss is multiplied by a
scale S, and the gradients are divided by S in fp32 before they are clipped (Micikevicius et al.,
Mixed Precision Training, 2018). Inf or NaN in them means that S is too large: the step is skipped
and S halved; after GROW_AFTER good steps S doubles.
"""

from typing import Any

import torch
from torch import Tensor, nn

START, SMALLEST, LARGEST = 2.0**16, 1.0, 2.0**24
GROW_AFTER = 2000  # good steps in a row


class LossScale:
    """The loss scale of a run: fixed at 1 but for fp16.

    Args:
        engine: DeepSpeed's.
        dynamic: whether it moves.
    """

    def __init__(self, engine: Any, dynamic: bool):
        self.engine, self.dynamic = engine, dynamic
        self.scale, self.good_steps = (START if dynamic else 1.0), 0
        self._tell()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to give to `engine.backward`, which itself scales at stages 1 to 3."""
        return loss * self.scale if self.engine.zero_optimization_stage() == 0 else loss

    def update(self, applied: bool) -> bool:
        """Follows a step.

        Args:
            applied: whether it moved the weights, which it does not where a gradient is no number.

        Returns:
            Whether a skipped step is explained by the scale, which is smaller now.
        """
        if not self.dynamic:
            return False
        explained = not applied and self.scale > SMALLEST
        self.good_steps = self.good_steps + 1 if applied else 0
        if not applied:
            self.scale = max(SMALLEST, self.scale / 2)
        elif self.good_steps == GROW_AFTER:
            self.scale, self.good_steps = min(LARGEST, self.scale * 2), 0
        self._tell()
        return explained

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"dynamic": self.dynamic, "scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        """From a checkpoint, of a run in another precision too."""
        if self.dynamic and state["dynamic"]:
            self.scale, self.good_steps = state["scale"], int(state["good_steps"])
            self._tell()

    def _tell(self) -> None:
        if self.dynamic:
            self.engine.optimizer.custom_loss_scaler = True
            self.engine.optimizer.external_loss_scale = self.scale


def autocast_fp16(module: nn.Module, device_type: str) -> None:
    """Makes a module compute in fp16 wherever autocast finds that safe.

    By hooks: DeepSpeed switches off what is on outside of its forward pass.
    """
    casts: list[torch.autocast] = []

    def enter(*_: Any) -> None:
        casts.append(torch.autocast(device_type, torch.float16))
        casts[-1].__enter__()

    def leave(*_: Any) -> None:
        casts.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)

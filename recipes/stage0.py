"""The optimizers of stage 0, where DeepSpeed steps whatever it was given.

At stages 1 to 3 its own optimizer unscales, measures and clips the gradients and skips a step whose
gradients are no numbers. These do the same, and tell it by the same attributes, so that
`engine.get_global_grad_norm`, `was_step_applied` and `skipped_steps` hold at every stage.
"""

from typing import Any

import torch


class _CheckedStep:
    """Goes before a torch optimizer in the order of bases."""

    clip = 0.0  # largest norm of the gradient; 0: no limit
    external_loss_scale = 1.0
    overflow = False
    _global_grad_norm: torch.Tensor | None = None  # of the last step, before clipping

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        groups: list[dict[str, Any]] = self.param_groups  # type: ignore[attr-defined]
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / self.external_loss_scale
        self._global_grad_norm = norm
        self.overflow = not bool(norm.isfinite())
        if not self.overflow:
            excess = max(1.0, (float(norm) + 1e-6) / self.clip) if self.clip else 1.0
            torch._foreach_div_(gradients, excess * self.external_loss_scale)
            super().step()  # type: ignore[misc]


class CheckedAdamW(_CheckedStep, torch.optim.AdamW):  # type: ignore[misc]
    """AdamW (Loshchilov and Hutter, 2019)."""


class CheckedSGD(_CheckedStep, torch.optim.SGD):  # type: ignore[misc]
    """SGD with momentum."""

"""What a checkpoint of a run holds, and how it goes back into model, optimizer and average.

Parameters are loaded into the plain model before DeepSpeed wraps it, whatever the stage; moments
afterwards, into whichever shards this stage and world size give each rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import Checkpoint, CheckpointError
from .checkpoint_writer import Entry
from .ema import Ema, shard_of
from .optim import moment_names


def entries(engine: Any, ema: Ema, optimizer: str) -> list[Entry]:
    """All that this rank holds of the run, by name: whole tensors, and pieces of split ones."""
    model = engine.module
    held = model.state_dict(keep_vars=True)
    result: list[Entry] = []
    for name, tensor in held.items():
        # Weights are fp32 throughout (bf16 is autocast's), so the model's own are the master's.
        local = tensor.ds_tensor.data if hasattr(tensor, "ds_tensor") else tensor
        result += _entry(f"model/{name}", tensor, partial(_same, local))
    for name, parameter in model.named_parameters():
        for key in moment_names(optimizer) if parameter.requires_grad else ():
            result += _moment_entry(engine, f"{key}/{name}", parameter, key)
    for name, average in ema.shadow.items():
        result += _entry(f"ema/{name}", held[name], partial(_same, average))
    return result


def _entry(name: str, tensor: Any, get: Callable[[], Tensor]) -> list[Entry]:
    """A tensor, or at stage 3 the shard of it that this rank holds, without the padding."""
    if not hasattr(tensor, "ds_tensor"):
        return [Entry(name, tensor.nbytes, get)]
    size = tensor.ds_tensor.numel()
    start = size * dist.get_rank()
    count = min(size, tensor.ds_numel - start)
    if count <= 0:
        return []
    size_bytes = count * tensor.element_size()
    return [Entry(name, size_bytes, partial(_first, get, count), start, tuple(tensor.ds_shape))]


def _moment_entry(engine: Any, name: str, parameter: Any, key: str) -> list[Entry]:
    from deepspeed.utils import safe_get_local_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 0:
        moment = _torch_optimizer(engine).state[parameter][key]
        return [Entry(name, moment.nbytes, partial(_same, moment))]
    if stage == 3:
        return _entry(name, parameter, partial(safe_get_local_optimizer_state, parameter, key))
    mapping = parameter._hp_mapping  # None: nothing of it is this rank's
    if mapping is None:
        return []
    where = mapping.lp_fragment_address
    fragment = mapping.get_hp_fragment(key)
    get = partial(_same, fragment)
    return [Entry(name, fragment.nbytes, get, where.start, tuple(parameter.shape))]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _first(get: Callable[[], Tensor], count: int) -> Tensor:
    return get().view(-1)[:count]


def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Fills a plain model, before DeepSpeed wraps it.

    Raises:
        CheckpointError: the recipe's model is another one.
    """
    try:
        model.load_state_dict(checkpoint.section("model"))
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: holds another model than the recipe builds ({detail}); "
            "resume with the recipe.yaml of the run, or train into another run folder"
        ) from None


def load_optimizer(engine: Any, optimizer: str, checkpoint: Checkpoint) -> None:
    """Puts the moments and the optimizer's own step count back."""
    create_optimizer_state(engine, optimizer, checkpoint.state["optimizer_steps"])
    for key in moment_names(optimizer):
        moments = checkpoint.section(key)
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                _set_moment(engine, parameter, key, moments[name])


def optimizer_steps(engine: Any) -> int:
    """How many updates the optimizer has made: skipped steps do not count."""
    return int(engine.global_steps - engine.skipped_steps)


def create_optimizer_state(engine: Any, optimizer: str, steps: int) -> None:
    """Makes the optimizer's state, all zeros, before its first step.

    torch makes it at the first step, which is too late for a resume; and DeepSpeed, which links
    parameters to it then, does so after its first *group* has stepped and misses all others.
    """
    inner = _torch_optimizer(engine)
    for tensor in _flat_parameters(engine):
        inner.state[tensor] = {key: torch.zeros_like(tensor) for key in moment_names(optimizer)}
        if optimizer == "adamw":
            inner.state[tensor]["step"] = torch.tensor(float(steps))
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    engine.global_steps = steps


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """DeepSpeed wraps the optimizer at stages 1 to 3; at stage 0 it is the recipe's own."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _flat_parameters(engine: Any) -> list[Tensor]:
    """The tensors that the optimizer really steps: shards at stages 1 to 3."""
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        return list(wrapper.single_partition_of_fp32_groups)
    if stage == 3:
        return list(wrapper.fp32_partitioned_groups_flat)
    return [p for group in _torch_optimizer(engine).param_groups for p in group["params"]]


def _set_moment(engine: Any, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(engine.device)
    stage = engine.zero_optimization_stage()
    if stage == 0:
        _torch_optimizer(engine).state[parameter][key].copy_(value)
    elif stage == 3:
        # The whole-tensor call fails where the size does not divide by the ranks.
        shard = shard_of(value, parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        safe_set_local_optimizer_state(parameter, shard, key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)

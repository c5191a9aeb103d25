"""The largest micro-batch that fits: searched once, before step 0, then fixed in the recipe.

Each rank tries alone, with a copy of the model that no other rank has a part in: a rank that runs
out of memory inside a collective would leave the others waiting for it.
"""

import copy

import torch
import torch.distributed as dist

from ..model.assign import Targets
from ..model.detector import Criterion, Detector
from .config import Recipe, RecipeError
from .distributed import World
from .multi_scale import largest_frame

OBJECTS = 32  # in each picture that is tried: a crowded mosaic
# What a lack of memory is called by libraries that take their own: oneDNN, cuBLAS, cuDNN, CUDA.
LACKS = (
    "could not create a primitive",
    "could not create a memory object",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def find_micro_batch(recipe: Recipe, model: Detector, criterion: Criterion, world: World) -> int:
    """The largest divisor of a rank's share of the global batch that every rank can train.

    Args:
        recipe: of the run; its `batch.micro` is not looked at.
        model: before DeepSpeed has it; stays as it is.
        criterion: of the run.
        world: who shares the global batch.

    Raises:
        RecipeError: the global batch can't be shared, or not even one picture fits.
    """
    from accelerate.utils import find_executable_batch_size

    share, rest = divmod(recipe.batch.global_size, world.size)
    if rest:
        raise RecipeError(
            f"batch.global = {recipe.batch.global_size} can't be shared equally by {world.size} "
            "processes; change it or their number"
        )
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    smaller = iter([*sizes[1:], 0])

    @find_executable_batch_size(
        starting_batch_size=share, reduce_batch_size_fn=lambda: next(smaller)
    )
    def search(size: int) -> int:
        try:
            _try(size, recipe, model, criterion, world.device)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or any(lack in str(error) for lack in LACKS):
                raise RuntimeError(f"{error}: out of memory.") from None  # accelerate's word for it
            raise
        return size

    try:
        found = int(search())
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        found = 0
    if world.device.type == "cuda":
        # What the tries have left in torch's cache NCCL could not have; nor was it the run's peak.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    least = torch.tensor(found, device=world.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    if not least:
        raise RecipeError(
            "batch.find_micro: not even one picture fits into the device's memory; take a smaller "
            "model or data.image_px, or deepspeed.activation_checkpointing"
        )
    return int(least)


def _try(
    size: int, recipe: Recipe, model: Detector, criterion: Criterion, device: torch.device
) -> None:
    """Two steps' worth of forward and backward passes, beside what the optimizer will hold."""
    trial = copy.deepcopy(model).to(device).train()
    if recipe.deepspeed.activation_checkpointing:
        trial.backbone.checkpoint_activations()
    parameters = sum(p.numel() for p in trial.parameters())
    # Two moments, the average, the model that is evaluated, and flat copies of weights and
    # gradients: what stage 1 holds alone.
    ballast = torch.empty(6 * parameters, device=device).fill_(0)
    height, width = largest_frame(recipe)
    images = torch.zeros(size, 3, height, width, dtype=torch.uint8, device=device)
    corner = torch.rand(size * OBJECTS, 2, device=device) * torch.tensor(
        [width / 2, height / 2], device=device
    )
    targets = Targets(
        torch.arange(size, device=device).repeat_interleave(OBJECTS),
        torch.zeros(size * OBJECTS, dtype=torch.int64, device=device),
        torch.cat((corner, corner + torch.tensor([width / 4, height / 4], device=device)), dim=1),
    )
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    kind = kinds.get(recipe.deepspeed.precision)
    for _ in range(2):
        with torch.autocast(device.type, kind, enabled=kind is not None):
            raw = trial(images)
        losses = criterion(trial.head, raw.levels, targets)
        torch.stack(list(losses.values())).sum().backward()
    del ballast

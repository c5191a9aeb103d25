"""What the doctor knows: facts without a judgement, as they travel from a host in one JSON object.

Fields have defaults, and unknown ones are dropped: a host with another version of the package must
still be able to say so.
"""

from typing import Any

from pydantic import BaseModel

PROTOCOL = 2  # of questions and answers; raised when old and new can't understand each other


class Gpu(BaseModel):
    """One GPU, as the driver tells of it."""

    index: int
    uuid: str = ""
    name: str = ""
    total_mib: float = 0
    used_mib: float = 0
    capability: float = 0  # compute capability, 8.0 for an A100
    mode: str = ""  # compute mode


class Shards(BaseModel):
    """A folder or URL of shards, as it was read from one host."""

    location: str
    error: str = ""  # a sentence: it can't be used at all
    fingerprint: str = ""
    classes: list[str] = []
    samples: int = 0
    shards: int = 0
    bytes: int = 0  # of all shards
    missing: list[str] = []  # sentences about shards that are absent or of another size
    damaged: list[str] = []  # sentences about what was read of a few
    read: str = ""  # sha256 of what was read of a few


class RunFolder(BaseModel):
    """The run's folder, or the nearest folder above it that exists."""

    place: str
    error: str = ""  # it can't be written
    free_bytes: int = 0
    checkpoints: int = 0
    has_token: bool | None = None  # whether the first host's file is seen; None: not looked
    resume_error: str = ""  # a sentence: --resume finds nothing to go on from


class CacheFolder(BaseModel):
    """Where chunks of shards at URLs are kept, or the nearest folder above it that exists."""

    place: str
    error: str = ""  # it can't be written
    free_bytes: int = 0
    used_bytes: int = 0  # by chunks that are there already


class HostFacts(BaseModel):
    """Everything that one host says of itself."""

    machine: str = ""  # equal for two names of one machine
    address: str = ""  # that the host's own name has for the host itself
    interfaces: list[str] = []
    versions: dict[str, str] = {}
    sources: str = ""  # sha256 of the package's modules
    recipe: dict[str, Any] = {}
    recipe_error: str = ""
    train: Shards | None = None
    val: Shards | None = None
    missing_files: list[str] = []  # that the recipe names
    gpus: list[Gpu] = []
    gpu_error: str = ""  # the driver does not answer
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    accelerator: str = ""  # DS_ACCELERATOR
    torch_gpus: int | None = None  # that torch can use; None: not asked
    run: RunFolder | None = None
    cache: CacheFolder | None = None  # None: no shards lie at a URL
    shm_free_bytes: int = 0
    cores: int = 0
    port_range: tuple[int, int] = (32768, 60999)  # from which the kernel takes ports
    has_compiler: bool = True
    trackers: list[str] = []  # sentences: what a tracker lacks here


class RecipeFacts(BaseModel):
    """What follows from a recipe once its detector is built of shapes."""

    parameters: int = 0
    checkpoint_bytes: int = 0
    gradient_bytes: int = 0
    shm_bytes: int = 0  # of a rank's loader
    error: str = ""  # a sentence: the recipe contradicts itself
    ignored: list[str] = []  # keys of deepspeed.options that DeepSpeed never looks at


class Meeting(BaseModel):
    """How an all-reduce over all hosts went, as one host saw it."""

    error: str = ""
    backend: str = ""
    nccl: str = ""
    size_bytes: int = 0
    seconds: float = 0  # of one all-reduce of that size
    latency_s: float = 0  # of one of a few bytes
    wrong: bool = False  # the sum was not the sum

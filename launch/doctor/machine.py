"""What can be wrong with one host by itself: its facts in, findings out."""

from dataclasses import replace

from ...recipes.config import Recipe
from .facts import Gpu, HostFacts, RecipeFacts, Shards
from .findings import Finding, error, from_sentence, several, warning

MIB, GIB = 2**20, 2**30
NEEDED = ("torch", "torchvision", "deepspeed", "timm")
CROWDED, TOUCHED_MIB = 0.25, 1024  # of a GPU's memory, used by others
SKEW_S, SKEW_TOO_FAR_S = 5.0, 240.0  # S3 refuses requests from 15 min, Kerberos from 5


def check_host(host: str, facts: HostFacts, slots: int, recipe: Recipe) -> list[Finding]:
    """Everything about one host but its disk and memory (`check_room`).

    Args:
        host: its name.
        facts: of it.
        slots: its ranks.
        recipe: what they run.
    """
    found = [
        error(
            host,
            f"{package} is not installed",
            "the training needs it",
            "pip install 'convnext-yolo[train]' there",
        )
        for package in NEEDED
        if package not in facts.versions
    ]
    found += _gpus(host, facts, slots, recipe)
    found += _files(host, facts, recipe)
    found += _cache(host, facts, recipe)
    if slots > facts.cores and not facts.gpus:
        found.append(
            warning(
                host,
                f"{slots} slots, but {facts.cores} core(s)",
                "ranks take turns on them",
                f"give it slots={facts.cores}",
            )
        )
    if recipe.deepspeed.compile and not facts.has_compiler:
        what = "deepspeed.compile is on, but there is no C compiler"
        mend = "install gcc there, or set deepspeed.compile to false"
        found.append(error(host, what, "torch.compile calls one", mend))
    return found


def check_shared(host: str, facts: HostFacts, recipe: Recipe) -> list[Finding]:
    """What the hosts of a job share with this one, which only submits it."""
    elsewhere = " (or, if only the job's hosts have it, add --no-doctor)"
    return [replace(f, mend=f.mend + elsewhere) for f in _files(host, facts, recipe)]


def check_trackers(host: str, facts: HostFacts) -> list[Finding]:
    """Trackers that would not work on the first host, whose rank 0 speaks to them."""
    found = []
    for sentence in facts.trackers:
        what, _, mend = sentence.rpartition("; ")
        found.append(warning(host, what, "metrics.jsonl alone would have the curves", mend))
    return found


def check_skew(host: str, skew_s: float, doubt_s: float) -> list[Finding]:
    """A clock that is off, against this machine's; `doubt_s` is what the question itself took."""
    off_s = abs(skew_s) - doubt_s
    if off_s < SKEW_S:
        return []
    severity = error if off_s > SKEW_TOO_FAR_S else warning
    direction = "ahead of" if skew_s > 0 else "behind"
    return [
        severity(
            host,
            f"its clock is {abs(skew_s):.0f} s {direction} this machine's",
            "logs of hosts can't be put in order; S3, TLS and Kerberos refuse clocks far off",
            "switch on NTP there (timedatectl set-ntp true)",
        )
    ]


def check_room(
    host: str, facts: HostFacts, slots: int, recipe: Recipe, needs: RecipeFacts
) -> list[Finding]:
    """Disk for checkpoints, and /dev/shm for the loaders."""
    found = check_disk(host, facts, recipe, needs)
    wanted = needs.shm_bytes * slots
    if wanted > facts.shm_free_bytes:
        found.append(
            error(
                host,
                f"/dev/shm has {_size(facts.shm_free_bytes)} free, the loaders of {slots} rank(s) "
                f"take {_size(wanted)}",
                "a rank would end with a bus error or a sentence about shared memory",
                "give it more (of Docker: --shm-size, of Kubernetes: an emptyDir of Memory), or "
                "set data.workers to 0",
            )
        )
    return found


def check_disk(host: str, facts: HostFacts, recipe: Recipe, needs: RecipeFacts) -> list[Finding]:
    """Disk for checkpoints."""
    found = []
    run, kept = facts.run, recipe.checkpoint
    if run and not run.error:
        copies = kept.keep + kept.keep_best + 1 - run.checkpoints  # one more is being written
        each = needs.checkpoint_bytes * (2 if kept.native else 1)
        wanted = each * max(1, copies)
        if wanted > run.free_bytes:
            found.append(
                error(
                    host,
                    f"run: {run.place} has {_size(run.free_bytes)} free, its checkpoints will take "
                    f"{_size(wanted)} ({max(1, copies)} of {_size(each)})",
                    "a checkpoint that can't be written is lost, and with it the steps since",
                    "make room, set run to another disk, or lower checkpoint.keep",
                )
            )
    return found


def _cache(host: str, facts: HostFacts, recipe: Recipe) -> list[Finding]:
    """Disk for what is fetched of shards at URLs: their size or the bound, less what is there."""
    cache = facts.cache
    if not cache:
        return []
    read = [shards for shards in (facts.train, facts.val) if shards and "://" in shards.location]
    mend = "set data.cache to a folder on a disk of the host's own with room"
    if cache.error:
        if any("the cache folder" in shards.error for shards in read):
            return []  # told already
        what = f"data.cache: {cache.place} can't be written ({cache.error})"
        return [error(host, what, "every rank would end at once", mend)]
    wanted = recipe.data.cache_gib * GIB
    if read and all(shards.bytes for shards in read):
        wanted = min(wanted, sum(shards.bytes for shards in read))
    wanted -= cache.used_bytes
    if wanted <= cache.free_bytes:
        return []
    what = (
        f"data.cache: {cache.place} has {_size(cache.free_bytes)} free, {_size(wanted)} are still "
        "to come there"
    )
    why = "what it can't keep is fetched again in every epoch, and a full disk may stop others"
    return [warning(host, what, why, f"make room, {mend}, or lower data.cache_gib")]


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def _gpus(host: str, facts: HostFacts, slots: int, recipe: Recipe) -> list[Finding]:
    if facts.gpu_error:
        what = f"the GPU driver does not answer: {facts.gpu_error}"
        mend = "mend the driver (nvidia-smi), or leave the host out"
        return [error(host, what, "its ranks would run on the CPU or not at all", mend)]
    if not facts.gpus:
        if recipe.deepspeed.precision == "fp16":
            what = "deepspeed.precision = fp16, but it has no GPU"
            mend = "set deepspeed.precision to bf16 or fp32"
            return [error(host, what, "CPUs don't train in fp16", mend)]
        return []
    usable = facts.torch_gpus or 0
    if not usable and facts.visible != "":
        what = f"it has {len(facts.gpus)} GPU(s), but torch {facts.versions.get('torch')} sees none"
        mend = "update the driver, or install the torch build that goes with it"
        return [error(host, what, "its ranks would run on the CPU", mend)]
    found = []
    if slots > usable:
        hidden = f" (CUDA_VISIBLE_DEVICES={facts.visible})" if facts.visible is not None else ""
        found.append(
            error(
                host,
                f"{slots} slots, but {usable} GPU(s){hidden}",
                "a rank without a GPU of its own ends at once",
                f"give it slots={usable}",
            )
        )
    return found + _busy(host, facts, slots) + _precision(host, facts, recipe)


def _busy(host: str, facts: HostFacts, slots: int) -> list[Finding]:
    found = []
    for gpu in _chosen(facts)[:slots]:
        if gpu.mode == "Prohibited":
            what = f"GPU {gpu.index} is in compute mode Prohibited"
            mend = f"nvidia-smi -i {gpu.index} -c DEFAULT"
            found.append(error(host, what, "no process may use it", mend))
        elif gpu.used_mib > TOUCHED_MIB:
            severity = error if gpu.used_mib > CROWDED * gpu.total_mib else warning
            what = f"GPU {gpu.index} is in use: {gpu.used_mib:.0f} of {gpu.total_mib:.0f} MiB"
            mend = "end what runs there (nvidia-smi shows it), or leave the GPU out"
            found.append(severity(host, what, "the run may lack memory, and shares its time", mend))
    return found


def _chosen(facts: HostFacts) -> list[Gpu]:
    """The GPUs that ranks may see, in their order."""
    if facts.visible is None:
        return facts.gpus
    words = [word.strip() for word in facts.visible.split(",")]
    names = {str(gpu.index): gpu for gpu in facts.gpus} | {gpu.uuid: gpu for gpu in facts.gpus}
    return [names[word] for word in words if word in names]


def _precision(host: str, facts: HostFacts, recipe: Recipe) -> list[Finding]:
    old = [gpu for gpu in facts.gpus if 0 < gpu.capability < 8]
    if recipe.deepspeed.precision != "bf16" or not old:
        return []
    what = f"deepspeed.precision = bf16, but {old[0].name} has none in hardware"
    mend = "set deepspeed.precision to fp16"
    return [warning(host, what, "it is emulated, slower than fp32", mend)]


def _files(host: str, facts: HostFacts, recipe: Recipe) -> list[Finding]:
    found = [
        error(
            host,
            f"{file} is not there",
            "the model begins with these weights",
            "copy the file there, or keep it on a file system that all hosts share",
        )
        for file in facts.missing_files
    ]
    for split in ("train", "val"):
        shards: Shards | None = getattr(facts, split)
        if shards:
            found += _shards(host, f"data.{split} = {shards.location}", shards)
    if facts.run and facts.run.resume_error:
        found.append(from_sentence(host, facts.run.resume_error, "every rank would end at once"))
    if facts.run and facts.run.error:
        what = f"run: {facts.run.place} can't be written ({facts.run.error})"
        mend = "set run to a folder that this user may write"
        found.append(error(host, what, "nothing of the run would be kept", mend))
    return found


def _shards(host: str, where: str, shards: Shards) -> list[Finding]:
    if shards.error:
        why = "every rank reads all shards"
        sentence = shards.error.removeprefix(f"{shards.location}: ")
        return [from_sentence(host, f"{where}: {sentence}", why)]
    found = []
    if shards.missing:
        names = f"{_without_mend(shards.missing[0])} ({len(shards.missing)} such shard(s))"
        mend = "copy or make the shards again; `convnext-yolo verify` tells of all"
        found.append(error(host, f"{where}: {names}", "the run ends when it comes to them", mend))
    if shards.damaged:
        names = several([_without_mend(sentence) for sentence in shards.damaged], 1)
        why = "such samples are replaced by others, and beyond data.corrupt_limit the run ends"
        mend = "copy or make the shards again; `convnext-yolo verify` tells of all"
        found.append(error(host, f"{where}: {names}", why, mend))
    return found


def _without_mend(sentence: str) -> str:
    return sentence.rpartition("; ")[0] or sentence

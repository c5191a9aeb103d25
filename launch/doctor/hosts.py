"""What differs between hosts and must not: facts of all in, findings out."""

from collections import Counter
from collections.abc import Mapping

from .facts import HostFacts, Shards
from .findings import Finding, error, several, warning
from .host import differing_key

AllFacts = Mapping[str, HostFacts]

# package: (severity, what another version does to a run)
_VERSIONS = {
    "python": "what one pickles for the other, and its libraries, differ",
    "torch": "collectives between versions hang, or crash",
    "torchvision": "what the libraries compute may differ",
    "deepspeed": "ranks would divide state and gradients differently, and hang",
    "nccl": "NCCL ends with an error, or hangs",
    "timm": "the same name may be another network",
    "numpy": "random draws may differ between versions",
    "convnext-yolo": "ranks would compute different things and wait for each other",
}
_SAME = "install the same on all, best from one constraints.txt"


def compare_hosts(facts: AllFacts) -> list[Finding]:
    """Every difference between hosts, named at the host that differs from most others."""
    found = []
    for package, why in _VERSIONS.items():
        found += _versions(facts, package, why)
    found += _sources(facts)
    found += _machines(facts)
    found += _gpus(facts)
    for split in ("train", "val"):
        found += _shards(facts, split)
    found += _run_folders(facts)
    return found


def compare_recipes(here: Mapping[str, object], facts: AllFacts) -> list[Finding]:
    """Recipes that hosts read differently than this machine does."""
    found = []
    for host, its in facts.items():
        if its.recipe_error:
            what = f"the recipe can't be read there: {its.recipe_error}"
            why = "its ranks would end at once"
        elif key := differing_key(here, its.recipe):
            what = f"its recipe is another: {key}"
            why = "its ranks would train something else than the others"
        else:
            continue
        mend = "copy the recipe's files there, or keep them on a file system that all hosts share"
        found.append(error(host, what, why, mend))
    return found


def _odd_ones(values: Mapping[str, object]) -> tuple[object, list[str], list[str]]:
    """The most frequent value (of equals the first host's), who has it, and who has not."""
    if not values:
        return None, [], []
    common = Counter(values.values()).most_common(1)[0][0]
    return (
        common,
        [host for host, value in values.items() if value == common],
        [host for host, value in values.items() if value != common],
    )


def _versions(facts: AllFacts, package: str, why: str) -> list[Finding]:
    versions = {h: its.versions[package] for h, its in facts.items() if package in its.versions}
    common, like, unlike = _odd_ones(versions)
    found = []
    for host in unlike:
        theirs = f"{package} is {versions[host]}, but {common} on {several(like)}"
        severity = error
        if package == "python":
            minor = versions[host].rpartition(".")[0] != str(common).rpartition(".")[0]
            severity = error if minor else warning
        if package in ("numpy", "torchvision"):
            severity = warning
        found.append(severity(host, theirs, why, _SAME))
    return found


def _sources(facts: AllFacts) -> list[Finding]:
    _, like, unlike = _odd_ones({host: its.sources for host, its in facts.items()})
    return [
        error(
            host,
            f"convnext-yolo has other modules there than on {several(like)}",
            _VERSIONS["convnext-yolo"],
            "bring all checkouts to one commit, or install one wheel on all",
        )
        for host in unlike
        # another version says as much by itself
        if facts[host].versions.get("convnext-yolo") == facts[like[0]].versions.get("convnext-yolo")
    ]


def _machines(facts: AllFacts) -> list[Finding]:
    first: dict[str, str] = {}
    found = []
    for host, its in facts.items():
        other = first.setdefault(its.machine, host)
        if other != host:
            severity = error if its.gpus else warning
            why = "their ranks would take the same GPUs and ports"
            mend = "give the machine one line with all its slots"
            found.append(severity(host, f"is the same machine as {other}", why, mend))
    return found


def _gpus(facts: AllFacts) -> list[Finding]:
    with_gpus = [host for host, its in facts.items() if its.gpus]
    without = [host for host in facts if host not in with_gpus]
    if with_gpus and without:
        what = f"has no GPU, but {several(with_gpus)} has"
        why = "ranks with and without can't talk to each other"
        mend = "leave the host out, or mend its driver (nvidia-smi)"
        return [error(host, what, why, mend) for host in without]
    models = {host: its.gpus[0].name for host, its in facts.items() if its.gpus}
    common, like, unlike = _odd_ones(models)
    return [
        warning(
            host,
            f"its GPUs are {models[host]}, those of {several(like)} {common}",
            "all wait for the slowest one in every step",
            "use hosts of one kind, if speed matters",
        )
        for host in unlike
    ]


def _shards(facts: AllFacts, split: str) -> list[Finding]:
    read: dict[str, Shards] = {}
    for host, its in facts.items():
        shards: Shards | None = getattr(its, split)
        if shards and shards.fingerprint:
            read[host] = shards
    mend = "copy the shards there again, or read them from one place"
    _, like, unlike = _odd_ones({host: shards.fingerprint for host, shards in read.items()})
    found = [
        error(
            host,
            f"data.{split} = {read[host].location} is another data set than on {several(like)}",
            "its ranks would train on other pictures",
            mend,
        )
        for host in unlike
    ]
    bytes_ = {host: read[host].read for host in like if read[host].read and not read[host].damaged}
    _, like, unlike = _odd_ones(bytes_)
    return found + [
        error(
            host,
            f"data.{split} = {read[host].location} has other samples than on {several(like)}, "
            "though its manifest is the same",
            "its ranks would train on other pictures",
            mend,
        )
        for host in unlike
    ]


def _run_folders(facts: AllFacts) -> list[Finding]:
    found = []
    for host, its in facts.items():
        if its.run and its.run.has_token is False:
            what = f"run: {its.run.place} does not show what the first host writes there"
            why = "checkpoints are written by all ranks together, and would lack this host's parts"
            mend = "set run to a folder on a file system that all hosts share"
            found.append(error(host, what, why, mend))
    return found

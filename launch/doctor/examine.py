"""The doctor: every reason why a run would fail, before anything of it starts.

This machine reads the hostfile, the recipe and the environment; a probe on each host tells what it
is like there, all at the same time; then the hosts try to meet as ranks do. Judgements are pure
functions from facts to findings (`recipe`, `environment`, `hosts`, `machine`, `network`); only
gathering facts needs hosts. Nothing is changed: a file in the run's folder, by which hosts see
whether they share it, is gone again afterwards, and so is every process.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from ...recipes.config import Recipe, RecipeError
from ...recipes.load import load_recipe, recipe_path
from ..hostfile import read_hostfile
from ..job import LaunchError, fitting, given_environment, rank_environment
from ..launchers import deepspeed_env
from ..slurm_job import job_hosts
from .environment import (
    check_accelerator,
    check_environment_files,
    check_interfaces,
    environment_files,
)
from .facts import RecipeFacts
from .findings import Finding, error, from_sentence, merged
from .hosts import compare_hosts, compare_recipes
from .interview import Interview, Open, open_session
from .machine import check_disk, check_host, check_room, check_shared, check_trackers
from .network import check_own_names
from .recipe import (
    check_batch,
    check_classes,
    check_ignored,
    check_options,
    check_resume,
    check_samples,
)
from .setup import HERE, Examination, Say, Setup


def say_to_stderr(line: str) -> None:
    """Progress, for who waits; what is found goes to standard output."""
    print(f"doctor: {line}", file=sys.stderr, flush=True)


def examine(setup: Setup, say: Say = say_to_stderr, start: Open = open_session) -> list[Finding]:
    """Everything that speaks against starting this set-up; `exit_code` says whether to go on.

    Args:
        setup: what is to be run.
        say: is told what takes longer.
        start: starts a probe on a host.
    """
    return examine_all(setup, say, start).findings


def examine_all(setup: Setup, say: Say = say_to_stderr, start: Open = open_session) -> Examination:
    """The same, with the facts."""
    found = _examine(setup, say, start)
    found.findings = merged(found.findings)
    return found


def _examine(setup: Setup, say: Say, start: Open) -> Examination:
    found = Examination()
    hosts = _hosts(setup, found)
    recipe = _recipe(setup, found)
    found.findings += _environment(setup)
    environment = _rank_environment(setup, found)
    if recipe:
        found.findings += check_options(recipe)
    if hosts is None:
        return found  # nobody knows where the run would be
    found.hosts = hosts
    configs = [str(recipe_path(name).absolute()) for name in setup.configs]
    with Interview(hosts, setup, environment, configs, say, start) as interview:
        if recipe:
            interview.ask_about_recipe(configs, setup.world_size or sum(hosts.values()))
        interview.ask_for_facts(found, recipe)
        interview.look_at_master(found)
        _judge_hosts(setup, recipe, environment, found)
        unnamed = check_own_names(found.facts, environment)
        found.findings += unnamed
        if len(found.facts) == len(hosts):
            interview.try_to_meet(found, _master(setup, hosts), is_worth_it=not unnamed)
        if found.meeting is None and len(hosts) > 1:
            found.notes.append("no all-reduce was tried: the errors come first")
        if recipe:
            found.needs = interview.recipe_facts(found)
    if recipe and found.needs:
        _judge_needs(setup, recipe, found.needs, found)
    return found


def _master(setup: Setup, hosts: Mapping[str, int]) -> str:
    return setup.master_address or next(iter(hosts)).rpartition("@")[2]


def _hosts(setup: Setup, found: Examination) -> dict[str, int] | None:
    """The hosts and their slots; this machine's are 0 where they follow from its GPUs.

    Raises:
        LaunchError: the Slurm job that they are those of is none.
    """
    if setup.slurm:
        return job_hosts()
    if setup.hostfile is None:
        return {HERE: setup.processes or 0}
    try:
        hosts = read_hostfile(setup.hostfile)
    except LaunchError as mistake:
        why = "no launcher would know the hosts"
        mend = "write lines of `host slots=N`"
        found.findings.append(from_sentence("hostfile", str(mistake), why, mend))
        return None
    names = [host.rpartition("@")[2] for host in hosts]
    if len(names) > 1:
        for name in names:
            if name == "localhost" or name.startswith("127."):
                what = f"{name} is among {len(names)} hosts"
                why = "on every host that is the host itself, and the ranks never meet"
                mend = "write the name by which the other hosts know it"
                found.findings.append(error(f"hostfile {setup.hostfile}", what, why, mend))
    for program in ("ssh", "pdsh"):
        if not shutil.which(program):
            why = "the deepspeed launcher starts its ranks with it"
            mend = f"install {program}, or start each host by hand (launch deepspeed --no-ssh)"
            found.findings.append(error(HERE, f"{program} is not installed", why, mend))
    return hosts


def _recipe(setup: Setup, found: Examination) -> Recipe | None:
    try:
        return load_recipe([recipe_path(name) for name in setup.configs], setup.options)
    except RecipeError as mistake:
        found.findings.append(from_sentence("recipe", str(mistake), "the recipe can't be run"))
        return None


def _environment(setup: Setup) -> list[Finding]:
    if setup.hostfile is None:  # nothing is handed on
        return []
    files = environment_files(os.environ, Path.home(), Path.cwd())
    return check_environment_files(
        files, os.environ, [word.partition("=")[0] for word in setup.env]
    )


def _rank_environment(setup: Setup, found: Examination) -> dict[str, str]:
    """What ranks are given: on other hosts all they need, here what is beside our environment."""
    given = []
    for word in setup.env:
        try:
            given_environment([word], os.environ)
            given.append(word)
        except LaunchError as mistake:
            found.findings.append(from_sentence("--env", str(mistake), "the ranks would lack it"))
    if setup.hostfile is None:
        return given_environment(given, os.environ)
    try:
        files = deepspeed_env(os.environ)
    except LaunchError:  # of which `_environment` has told
        files = {}
    return rank_environment(given, {**files, **os.environ})


def _judge_hosts(
    setup: Setup, recipe: Recipe | None, environment: Mapping[str, str], found: Examination
) -> None:
    """Every host by itself, and all of them together."""
    findings, facts = found.findings, found.facts
    for host, its in facts.items():
        if setup.elsewhere:
            findings += check_shared(host, its, recipe) if recipe else []
            continue
        if setup.hostfile is None:
            environment = {**os.environ, **environment}
            if not (setup.processes or setup.slurm):
                gpus = its.torch_gpus or 0
                found.hosts[host] = fitting(recipe, gpus) if gpus and recipe else 1
        if recipe:
            findings += check_host(host, its, found.hosts[host], recipe)
        findings += check_interfaces(host, environment, its.interfaces)
        findings += check_accelerator(host, its.accelerator, len(its.gpus))
    findings += compare_hosts(facts)
    if not recipe:
        return
    if setup.is_far:
        findings += compare_recipes(recipe.model_dump(mode="json", by_alias=True), facts)
    world_size = setup.world_size or sum(found.hosts.values())
    what = f"hostfile {setup.hostfile}" if setup.hostfile else f"{world_size} processes"
    findings += check_batch(recipe, world_size, what)
    first = next(iter(facts.values()), None)
    if first:
        findings += [] if setup.elsewhere else check_trackers(next(iter(facts)), first)
        read = {"train": first.train, "val": first.val}
        counts = {name: (s.samples, s.shards) for name, s in read.items() if s}
        findings += check_samples(recipe, world_size, counts)
        if first.train and first.val:
            findings += check_classes(recipe, first.train.classes, first.val.classes)
        checkpoints = first.run.checkpoints if first.run else 0
        findings += check_resume(setup.resume, checkpoints, recipe.run)


def _judge_needs(setup: Setup, recipe: Recipe, needs: RecipeFacts, found: Examination) -> None:
    """What follows from the sizes of the model."""
    if needs.error and not any("deepspeed.options" in f.where for f in found.findings):
        found.findings.append(from_sentence("recipe", needs.error, "every rank would refuse it"))
    found.findings += check_ignored(needs.ignored)
    for host, its in found.facts.items():
        if setup.elsewhere:
            found.findings += check_disk(host, its, recipe, needs)
        else:
            found.findings += check_room(host, its, found.hosts[host], recipe, needs)

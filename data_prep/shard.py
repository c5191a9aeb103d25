"""A checked data set to WebDataset tars: the same input gives the same bytes, or nothing.

The shards are written into a partial folder and published whole (see `publish`, and `upload` for
URLs), so that an output is complete whenever it has a manifest. A run that was ended goes on with
the shards that it had not finished (see `journal`). Images are dealt to shards before they are
checked: a refused one leaves its shard a sample smaller, and all others where they are.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from .errors import DataError, RefusedError
from .findings import Report
from .journal import Journal
from .manifest import VERSION, Manifest
from .parallel import write_all
from .publish import MEND, LocalOutput
from .records import DetectionDataset, ImageRecord
from .remote import is_url
from .tar_writer import Job, Written
from .upload import RemoteOutput


def shard_dataset(
    dataset: DetectionDataset,
    output: Path | str,
    samples_per_shard: int = 512,
    workers: int = 1,
    progress: bool = True,
    scratch: Path | None = None,
) -> tuple[Manifest, Report]:
    """Write a data set as shards, their manifest and a report; if they are there, do nothing.

    Every image is decoded, and must be whole and of the annotated size; else it is left out and
    reported or, where the data set was read strictly, refused. With several workers the calling
    script needs the usual `if __name__ == "__main__":` guard, because worker processes import it.

    Args:
        dataset: what `read_dataset` gives.
        output: the folder to make, or its URL; it must not exist, be empty, or hold just these
            shards.
        samples_per_shard: how many images are dealt to a tar.
        workers: processes; their number doesn't change the bytes.
        progress: show a bar, and what was done, on stderr.
        scratch: where shards for a URL are written first; None: the machine's temporary folder.

    Raises:
        DataError: no image can be used; strict, and one can't; the output holds something else, or
            can't be written. Shards that are done stay in the working folder for the next run.
    """
    url = str(output)
    target = RemoteOutput(url, scratch) if is_url(url) else LocalOutput(Path(output))
    for name, value in (("samples_per_shard", samples_per_shard), ("workers", workers)):
        if value < 1:
            raise DataError(f"{name} is {value}; give at least 1.")
    if not dataset.images:
        raise DataError(f"{target.name}: the data set has no images, so there is nothing to shard.")
    stats = [_stat(record) for record in dataset.images]
    fingerprint = _fingerprint(dataset, stats, samples_per_shard)
    try:
        if existing := _existing(target, fingerprint, dataset):
            if progress:
                samples = existing[0].samples
                print(f"{target.name}: holds these {samples} samples already.", file=sys.stderr)
            return existing
        with target.working() as folder:
            jobs = _jobs(dataset, stats, samples_per_shard, folder)
            done = _write_missing(target, folder, jobs, workers, progress)
            manifest, report = _conclude(
                dataset, fingerprint, [done[job.path.name] for job in jobs]
            )
            report.save(folder)
            manifest.save(folder)
            target.commit(folder)
    except OSError as error:
        raise DataError(
            f"{target.name}: the shards can't be written ({error.strerror or error}); "
            "make room there or give another output, and start again to go on from here."
        ) from error
    return manifest, report


def _existing(
    target: LocalOutput | RemoteOutput, fingerprint: str, data: DetectionDataset
) -> tuple[Manifest, Report] | None:
    """An output that needs no work, if there is one; DataError if it isn't this one."""
    manifest = target.existing()
    if manifest is None:
        return None
    if manifest.fingerprint != fingerprint:
        raise DataError(
            f"{target.name}: holds shards of another input or with other settings; {MEND}."
        )
    target.check(manifest, data.images)
    report = target.report()
    if data.findings.strict and (refused := report.refused()):
        raise DataError(refused[0])
    return manifest, report


def _write_missing(
    target: LocalOutput | RemoteOutput, folder: Path, jobs: list[Job], workers: int, progress: bool
) -> dict[str, Written]:
    """Every shard by name: those that the journal has, and the others, written now."""
    from tqdm import tqdm

    journal = Journal(folder)
    done: dict[str, Written] = {}
    for job in jobs:
        written = journal.get(job)
        if written and written.entry and target.has(folder, written.entry):
            if job.strict and written.refused:
                raise RefusedError(*written.refused[0])
            done[job.path.name] = written
    target.prepare(folder, {job.path.name for job in jobs}, done)
    if done and progress:
        print(f"{target.name}: goes on after {len(done)} of {len(jobs)} shards.", file=sys.stderr)
    missing = [job for job in jobs if job.path.name not in done]

    def take(job: Job, written: Written) -> None:
        if written.entry is not None:
            target.take(folder, written.entry)
        journal.add(job, written)
        done[job.path.name] = written

    total = sum(len(job.records) for job in jobs)
    left = sum(len(job.records) for job in missing)
    with tqdm(
        total=total, initial=total - left, desc="shard", unit="img", delay=1, disable=not progress
    ) as bar:
        write_all(missing, workers, bar.update, take)
    return done


def _conclude(
    dataset: DetectionDataset, fingerprint: str, shards: list[Written]
) -> tuple[Manifest, Report]:
    """The manifest and the report of shards that are all done."""
    findings = dataset.findings.copy()
    for shard in shards:
        for kind, sentence in shard.refused:
            findings.add(kind, sentence)
    annotations = sum(len(record.labels) for record in dataset.images)
    findings.images = max(findings.images, len(dataset.images))
    findings.annotations = max(findings.annotations, annotations)
    entries = tuple(shard.entry for shard in shards if shard.entry is not None)
    if not entries:
        _, sentence = shards[0].refused[0]
        raise DataError(f"none of the {findings.images} images can be used; the first: {sentence}")
    boxes = sum(shard.boxes for shard in shards)
    manifest = Manifest(dataset.categories, boxes, fingerprint, entries)
    return manifest, Report.of(findings, manifest.samples, boxes)


# --- what decides the shards ---------------------------------------------------------------------


def _stat(record: ImageRecord) -> tuple[int, int, int]:
    """Size in bytes, and two times in ns; -1 for a file that isn't there, which its check tells."""
    try:
        stat = record.path.stat()
    except OSError:
        return -1, -1, -1
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _facts(record: ImageRecord, *more: int) -> bytes:
    facts = (record.id, record.file_name, record.width, record.height, record.annotation_ids)
    arrays = (record.boxes_xyxy, record.labels, record.crowd, record.area)
    return repr((*facts, *more)).encode() + b"".join(array.tobytes() for array in arrays)


def _fingerprint(
    dataset: DetectionDataset, stats: list[tuple[int, int, int]], samples_per_shard: int
) -> str:
    """sha256 over everything that decides the shards but the images' bytes, which take too long.

    `LocalOutput.check` makes up for the difference.
    """
    digest = hashlib.sha256(repr((VERSION, samples_per_shard, dataset.categories)).encode())
    for record, (size, _, _) in zip(dataset.images, stats, strict=True):
        digest.update(_facts(record, size))
    return digest.hexdigest()


def _jobs(
    dataset: DetectionDataset,
    stats: list[tuple[int, int, int]],
    samples_per_shard: int,
    folder: Path,
) -> list[Job]:
    jobs = []
    for index, start in enumerate(range(0, len(dataset.images), samples_per_shard)):
        records = dataset.images[start : start + samples_per_shard]
        digest = hashlib.sha256(repr((VERSION, dataset.categories)).encode())
        # Times too: an unfinished output is made from images that nobody has compared yet.
        for record, stat in zip(records, stats[start : start + samples_per_shard], strict=True):
            digest.update(_facts(record, *stat))
        path = folder / f"shard-{index:06d}.tar"
        jobs.append(Job(path, records, digest.hexdigest(), dataset.findings.strict))
    return jobs

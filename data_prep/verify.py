"""`verify`: reads shards again and says what is not as their manifest has it."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np

from .manifest import MANIFEST_NAME, Manifest, ShardEntry
from .samples import check_sample, read_samples

_PROBLEMS_PER_SHARD = 5  # one shifted byte makes every sample of a shard wrong


def verify(folder: Path, progress: bool = True) -> list[str]:
    """Hash and read every shard again and compare with the manifest.

    Returns:
        One sentence per problem; empty if all is well.

    Raises:
        DataError: there is no manifest to compare with (see `Manifest.load`).
    """
    from tqdm import tqdm

    folder = Path(folder)
    manifest = Manifest.load(folder)
    names = {entry.name for entry in manifest.shards}
    problems = [
        f"{path}: the manifest doesn't list this shard; remove it or make the shards again."
        for path in sorted(folder.glob("*.tar"))
        if path.name not in names
    ]
    ids = np.concatenate([entry.image_ids for entry in manifest.shards])
    if len(np.unique(ids)) != len(ids):
        problems.append(f"{folder}: an image is in two samples; make the shards again.")
    boxes = 0
    bar = tqdm(total=manifest.bytes, unit="B", unit_scale=True, delay=1, disable=not progress)
    with bar:
        for entry in manifest.shards:
            found, boxes_read = _verify_shard(folder / entry.name, entry, len(manifest.classes))
            more = len(found) - _PROBLEMS_PER_SHARD
            problems += found[:_PROBLEMS_PER_SHARD]
            if more > 0:
                problems.append(f"{folder / entry.name}: {more} more problems like these.")
            boxes += boxes_read
            bar.update(entry.bytes)
    if not problems and boxes != manifest.boxes:
        problems.append(
            f"{folder / MANIFEST_NAME}: boxes is {manifest.boxes} but the shards hold {boxes}; "
            "make the shards again."
        )
    return problems


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verify_shard(path: Path, entry: ShardEntry, class_count: int) -> tuple[list[str], int]:
    """All that is wrong with one shard, and how many boxes it holds."""
    again = "fetch or make the shard again"
    try:
        size, digest = path.stat().st_size, _sha256(path)
    except FileNotFoundError:
        return [f"{path}: the shard is missing; {again}."], 0
    except OSError as error:
        return [f"{path}: can't be read ({error.strerror}); make it readable."], 0
    problems = []
    if size != entry.bytes:
        problems.append(f"{path}: has {size} bytes, the manifest says {entry.bytes}; {again}.")
    if digest != entry.sha256:
        problems.append(
            f"{path}: sha256 is {digest[:12]}…, the manifest says {entry.sha256[:12]}…; {again}."
        )
    expected = zip(entry.keys, entry.offsets.tolist(), entry.sizes.tolist(), strict=True)
    count = boxes = 0
    try:
        for key, offset, members in read_samples(path):
            count += 1
            key_listed, offset_listed, (width, height) = next(expected, ("", 0, (0, 0)))
            if (key, offset) != (key_listed, offset_listed):
                listed = f"{key_listed} at {offset_listed}" if key_listed else "nothing more"
                problems.append(
                    f"{path}: holds {key} at byte {offset}, the manifest says {listed}; {again}."
                )
                continue
            problem, boxes_here = check_sample(members, int(key), (width, height), class_count)
            if problem:
                problems.append(f"{path}: sample {key} {problem}; {again}.")
            boxes += boxes_here
    except (tarfile.TarError, OSError, ValueError) as error:
        problems.append(f"{path}: the tar is broken after {count} samples ({error}); {again}.")
    if count != entry.samples:
        problems.append(
            f"{path}: {count} samples can be read, the manifest says {entry.samples}; {again}."
        )
    return problems, boxes

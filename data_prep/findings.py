"""What the checks of a data set found: counted by kind, with examples, and where it is written.

Without `strict`, an image or annotation that can't be right is repaired where only one repair
makes sense, else refused, which is to say left out; `report.json` beside the shards tells of
both. With it, the first one stops everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DataError

REPORT_NAME = "report.json"
FORMAT = "convnext-yolo-shard-report"
VERSION = 1
EXAMPLES = 10  # of each kind in the report


class Kind(NamedTuple):
    """One kind of finding."""

    outcome: str  # repaired | refused
    what: str  # for the summary, after a number
    stops_strict: bool = True


# An annotation of COCO itself may be a hair too wide or have no area: strict lets those two pass.
KINDS = {
    "image_entry": Kind("refused", "images whose entry is broken"),
    "image_missing": Kind("refused", "images whose file is missing or can't be read"),
    "image_damaged": Kind("refused", "images that can't be decoded"),
    "image_format": Kind("refused", "images that are not JPEG, PNG, WebP or BMP"),
    "image_animated": Kind("refused", "animations"),
    "image_too_large": Kind("refused", "images with too many pixels"),
    "image_size": Kind("refused", "images of another size than annotated"),
    "image_turned": Kind("refused", "images annotated as EXIF turns them, not as stored"),
    "label_file": Kind("refused", "images whose file of annotations is broken"),
    "image_name": Kind("repaired", "images named wrongly, found by the name of the annotations"),
    "size_missing": Kind("repaired", "images without annotated size, taken from the file"),
    "annotation_entry": Kind("refused", "annotations whose entry is broken"),
    "annotation_id": Kind("repaired", "annotation ids missing or given twice, numbered anew"),
    "unknown_image": Kind("refused", "annotations of an image that is not listed"),
    "unknown_category": Kind("refused", "annotations of an unknown category"),
    "box_values": Kind("refused", "boxes that are not four finite numbers"),
    "box_negative": Kind("refused", "boxes with a negative side"),
    "box_empty": Kind("refused", "boxes without area", stops_strict=False),
    "box_outside": Kind("refused", "boxes with nothing inside the image"),
    "box_clipped": Kind("repaired", "boxes over the border by more than 1 px, clipped"),
    "box_rounded": Kind("repaired", "boxes over the border by up to 1 px, clipped", False),
    "area": Kind("repaired", "areas that are no number from 0 up, taken from the box"),
}


@dataclass
class Case:
    """All findings of one kind."""

    count: int = 0
    examples: list[str] = field(default_factory=list)  # the first few sentences


class Findings:
    """Collects findings; the order in which kinds are first met does not matter.

    Args:
        strict: stop with the first finding that matters.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.cases: dict[str, Case] = {}
        self.images = self.annotations = 0  # how many the input has, refused ones included

    def add(self, kind: str, sentence: str) -> None:
        """One finding. Raises its sentence as a DataError where it stops."""
        self.add_all(kind, [sentence], lambda text: text)

    def add_all(self, kind: str, found: Iterable[Any], sentence: Callable[[Any], str]) -> None:
        """Several findings of a kind; sentences are made of the first few only.

        Raises:
            DataError: the first one's sentence, with the number of the others.
        """
        found = list(found)
        if not found:
            return
        if self.strict and KINDS[kind].stops_strict:
            text = sentence(found[0])
            others = f" (and {len(found) - 1} more like it)." if len(found) > 1 else "."
            raise DataError(text.removesuffix(".") + others)
        case = self.cases.setdefault(kind, Case())
        room = EXAMPLES - len(case.examples)
        case.examples += [sentence(one) for one in found[:room]]
        case.count += len(found)

    def count(self, kind: str) -> int:
        """How many of a kind there are."""
        return self.cases[kind].count if kind in self.cases else 0

    def copy(self) -> Findings:
        """An independent copy, so that writing a data set twice counts nothing twice."""
        other = Findings(self.strict)
        other.images, other.annotations = self.images, self.annotations
        for kind, case in self.cases.items():
            other.cases[kind] = Case(case.count, list(case.examples))
        return other


@dataclass(frozen=True)
class Report:
    """The contents of `report.json`."""

    document: dict[str, Any]

    @staticmethod
    def of(findings: Findings, images: int, annotations: int) -> Report:
        """The report of a finished output with so many images and annotations in its shards."""
        problems = [
            {
                "kind": kind,
                "outcome": KINDS[kind].outcome,
                "what": KINDS[kind].what,
                "count": findings.cases[kind].count,
                "examples": findings.cases[kind].examples,
            }
            for kind in KINDS
            if kind in findings.cases
        ]
        head = {
            "format": FORMAT,
            "version": VERSION,
            "images": {"given": findings.images, "kept": images},
            "annotations": {"given": findings.annotations, "kept": annotations},
        }
        return Report({**head, "problems": problems})

    @staticmethod
    def load(folder: Path) -> Report:
        """Read the report of an output; an empty one where it has none or a broken one."""
        try:
            document = json.loads((folder / REPORT_NAME).read_bytes())
            if document["format"] == FORMAT and document["version"] == VERSION:
                return Report(document)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return Report({"problems": []})

    def save(self, folder: Path) -> None:
        """Write `report.json`; the same findings give the same bytes."""
        text = json.dumps(self.document, indent=1, ensure_ascii=True)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="ascii")

    def refused(self) -> list[str]:
        """The examples of what strict would have refused."""
        return [
            sentence
            for problem in self.document["problems"]
            if problem["kind"] not in KINDS or KINDS[problem["kind"]].stops_strict
            for sentence in problem["examples"]
        ]

    def summary(self) -> list[str]:
        """A line for each kind of problem: outcome, number, what, the first example."""
        return [
            f"{problem['outcome']}: {problem['count']} {problem['what']}; "
            f"the first: {problem['examples'][0]}"
            for problem in self.document["problems"]
        ]

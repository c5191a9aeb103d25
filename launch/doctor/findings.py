"""What the doctor finds: one line each, with what, where, why it matters and the mend."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One reason why a run would fail ("error") or go worse than it could ("warning").

    Attributes:
        severity: an error must be mended before the start.
        where: a host, "here" for the machine that asks, or a file.
        what: what was found, with its value.
        why: what it would do to the run.
        mend: what to do about it.
    """

    severity: Literal["error", "warning"]
    where: str
    what: str
    why: str
    mend: str

    def __str__(self) -> str:
        parts = (" ".join(part.split()) for part in (self.what, self.why, self.mend))
        return f"{self.severity:8}{self.where}: {'; '.join(parts)}"


def error(where: str, what: str, why: str, mend: str) -> Finding:
    """A finding that a run would fail of."""
    return Finding("error", where, what, why, mend)


def warning(where: str, what: str, why: str, mend: str) -> Finding:
    """A finding that a run would survive."""
    return Finding("warning", where, what, why, mend)


def from_sentence(where: str, sentence: str, why: str, mend: str = "mend it there") -> Finding:
    """The error of an exception's sentence, `what; mend` as in all of this package.

    Args:
        where: the place.
        sentence: of the exception.
        why: it matters.
        mend: where the sentence has none.
    """
    what, _, its_mend = sentence.rpartition("; ")
    mend = its_mend.rstrip(".") if what else mend
    return error(where, (what or sentence).removeprefix(f"{where} "), why, mend)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """The same found in several places is one finding."""
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        places.setdefault(replace(finding, where=""), []).append(finding.where)
    return [
        replace(finding, where=several(list(dict.fromkeys(where))))
        for finding, where in places.items()
    ]


def exit_code(findings: Iterable[Finding]) -> int:
    """0: the run may go on, there are warnings at most. 1: there is an error."""
    return int(any(finding.severity == "error" for finding in findings))


def format_findings(findings: Sequence[Finding], hosts: int = 1) -> str:
    """The findings, errors first, and a line that says whether to go on."""
    ordered = sorted(findings, key=lambda finding: finding.severity != "error")
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = len(findings) - errors
    where = "this machine" if hosts == 1 else f"{hosts} hosts"
    if errors:
        last = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}: mend the errors first"
    elif warnings:
        last = f"no error, {_count(warnings, 'warning')}: the run may start"
    else:
        last = f"nothing found on {where}: the run may start"
    return "\n".join([*map(str, ordered), last])


def several(names: Sequence[str], limit: int = 3) -> str:
    """A few names, and how many more."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

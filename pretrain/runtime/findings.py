"""Findings of checks on hosts: one a rank and check, and one line a check that names whom it concerns."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
ORDER: tuple[Status, ...] = ("ok", "warn", "fail")

#: Names of hosts or ranks that one line lists.
LISTED = 8


@dataclass(frozen=True)
class Finding:
    """Result of one check on one rank: `value` is what was measured, `advice` what to do about it."""

    check: str
    status: Status
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Line:
    """A check over all ranks: its worst status, whom that concerns ("" = nobody), what was found, what to do."""

    check: str
    status: Status
    where: str
    value: str
    advice: str

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.check}: {where}{self.value}{advice}"


def attempt(check: str, examine: Callable[[], Finding], advice: str) -> Finding:
    """Run `examine` for its finding; an error is one as well, since a doctor must get to the end."""
    try:
        return examine()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Finding(check, "fail", f"{type(error).__name__}: {first}", advice)


def merge(findings: list[list[Finding]], hosts: list[str]) -> list[Line]:
    """Merge what all ranks found (in rank order, on the host of each) into one line for each check and status.

    Where all is well, one line tells the first rank's value; ranks with anything else are named with theirs.
    """
    checks: dict[str, dict[Status, list[tuple[int, Finding]]]] = {}
    for rank, found in enumerate(findings):
        for finding in found:
            checks.setdefault(finding.check, defaultdict(list))[finding.status].append((rank, finding))
    lines = []
    for check, by_status in checks.items():
        for status in ORDER:
            if status == "ok" and len(by_status) > 1 or status not in by_status:
                continue
            alike: dict[str, list[tuple[int, Finding]]] = defaultdict(list)
            for rank, finding in by_status[status]:
                alike[finding.value if status != "ok" else ""].append((rank, finding))
            for group in alike.values():
                first = group[0][1]
                where = "" if status == "ok" else names((rank for rank, _ in group), hosts)
                lines.append(Line(check, status, where, first.value, first.advice))
    return lines


def names(ranks: Iterable[int], hosts: list[str]) -> str:
    """Name ranks by host: `host n1 (ranks 0, 1), host n2 (rank 5)`."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        by_host[hosts[rank]].append(rank)
    words = [
        f"host {host} (rank{'s' if len(on) > 1 else ''} {', '.join(map(str, on[:LISTED]))})"
        for host, on in by_host.items()
    ]
    more = f" and {len(words) - LISTED} more hosts" if len(words) > LISTED else ""
    return ", ".join(words[:LISTED]) + more


def odd_ones(values: list[str]) -> tuple[str, list[int]]:
    """Find what most ranks have (the first of equals), and the ranks that have something else."""
    # dict.fromkeys keeps the ranks' order; a set's differs between processes, and so would the winner of a tie.
    usual = max(dict.fromkeys(values), key=values.count)
    return usual, [rank for rank, value in enumerate(values) if value != usual]

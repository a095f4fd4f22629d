"""All checks together. Codes of violations are listed with the checks that find them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.faults.checker import attribution, ledger, streams
from tests.faults.checker.evidence import Evidence


@dataclass(frozen=True)
class Violation:
    invariant: str
    code: str
    job: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.invariant} {self.code} {self.job}: {self.detail}"


@dataclass
class Verdict:
    """``invalid`` says why the run proves nothing, whatever it shows."""

    jobs: int = 0
    tokens: int = 0
    faults: int = 0
    cut_streams: int = 0
    """Jobs with tokens of two attempts or more."""
    stalls_s: list[float] = field(default_factory=list)
    """Per stream that was cut: the longest pause that one of its live readers saw."""
    violations: list[Violation] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.violations and not self.invalid

    @property
    def codes(self) -> set[str]:
        return {violation.code for violation in self.violations}

    def found(self, invariant: str, code: str, job: str, detail: str = "") -> None:
        self.violations.append(Violation(invariant, code, job, detail))

    def summary(self) -> str:
        codes = ", ".join(f"{n} {code}" for code, n in Counter(v.code for v in self.violations).items()) or "none"
        return (
            f"{self.jobs} jobs, {self.tokens} tokens, {self.faults} faults, {self.cut_streams} streams cut; "
            f"violations: {codes}{'; INVALID' if self.invalid else ''}"
        )


def check(
    evidence: Evidence, *, in_flight_tokens: int = 400, is_over: bool = True, may_run_plain: bool = False
) -> Verdict:
    """``in_flight_tokens``: what one attempt may have made that never got out, when it was cut. ``is_over``: every
    accepted job must have ended. ``may_run_plain``: engines did not salt, so nothing can be attributed."""
    verdict = Verdict()
    verdict.jobs = sum(1 for _ in evidence.of_kind("accepted"))
    verdict.faults = sum(1 for _ in evidence.of_kind("fault"))
    logs = ledger.check(evidence, verdict, is_over=is_over)
    streams.check(evidence, verdict, logs)
    attribution.check(evidence, verdict, logs, in_flight_tokens=in_flight_tokens, is_plain=may_run_plain)
    if any(fault["cuts"] for fault in evidence.of_kind("fault")) and not verdict.cut_streams:
        verdict.invalid.append("no fault landed in the middle of a stream")
    if not verdict.jobs:
        verdict.invalid.append("nothing was submitted")
    return verdict

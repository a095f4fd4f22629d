"""Judges a fault run offline, from what was written down while it ran. Shares no code with the product.

    verdict = check(Evidence.load(folder))         or: python -m tests.faults.checker FOLDER

A folder holds ``history-*.jsonl`` (what clients submitted, read and did to the fleet), ``record-*.jsonl`` (what the
scripted engines made, in salted mode) and ``dump.json`` (Redis' data, by a plain client, after the run).
"""

from tests.faults.checker.evidence import Evidence
from tests.faults.checker.verdict import Verdict, Violation, check

__all__ = ["Evidence", "Verdict", "Violation", "check"]

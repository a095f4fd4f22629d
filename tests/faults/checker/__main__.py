"""``python -m tests.faults.checker FOLDER…``: a line a violation; ends 1 if there is any, 2 if a run proves nothing."""

import sys
from pathlib import Path

from tests.faults.checker import Evidence, check

status = 0
for folder in sys.argv[1:]:
    verdict = check(Evidence.load(Path(folder)))
    print(f"{folder}: {verdict.summary()}")
    for violation in verdict.violations:
        print(f"  {violation}")
    for reason in verdict.invalid:
        print(f"  INVALID: {reason}")
    status = 1 if verdict.violations else max(status, 2 if verdict.invalid else 0)
sys.exit(status)

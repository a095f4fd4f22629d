"""``python -m bench``: every benchmark, one after the other; ``python -m bench overhead`` one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    found = sorted(
        p.stem for p in Path(__file__).parent.glob("*.py") if "__main__" in p.read_text() and p.stem[0] != "_"
    )
    wanted = sys.argv[1:] or [name for name in found if name not in ("chaos", "mutants")]
    worst = 0
    for name in wanted:
        if name not in found:
            print(f"There is no benchmark {name!r}: {', '.join(found)}", file=sys.stderr)
            return 2
        print(f"\n== {name}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode)
    return worst


if __name__ == "__main__":
    raise SystemExit(main())

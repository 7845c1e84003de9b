"""Writes OUT/summary.json of `fashion.sh` in the demo's form and prints it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from lavic.launch.demo import summarise, table

out = Path(sys.argv[1])
seconds: Counter[str] = Counter()
for line in (out / "seconds.tsv").read_text().splitlines():
    name, value = line.split("\t")
    seconds[name] += int(value)
summary = summarise(out, {**seconds, "total": seconds.total()})
(out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
print(table(summary))

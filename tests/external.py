"""Files that are not part of the project: their tests run with `make test-external LAVIC_TEST_DATA=FOLDER`.

FOLDER/cases/crawl, cases/train         small inputs from bug reports
       data/reddit_amazon/all_beauty    conversations of the authors' released data
       data/fashion                     the Fashion Product Images set
       tools/fashion_catalog.py         what converts that into a catalogue; see docs/benchmarks.md
"""

from __future__ import annotations

import os
from pathlib import Path

EXTERNAL = Path(os.environ.get("LAVIC_TEST_DATA", "LAVIC_TEST_DATA is not set")).absolute()

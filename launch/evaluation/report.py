"""`report.html`: the results as a page."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lavic import __version__
from lavic.evaluation.chat import chat_section
from lavic.evaluation.report import findings, sections
from lavic.evaluation.report.blocks import Report
from lavic.evaluation.report.gallery import gallery as gallery_section
from lavic.evaluation.report.page import write_report

if TYPE_CHECKING:
    from lavic.launch.evaluation.arm_rankings import Rankings
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.launch.evaluation.setup.evaluation_setup import EvaluationSetup

FILE = "report.html"
FINDINGS = (findings.controls, findings.order_bias, findings.calibration, findings.groups)
"""Sections that not every evaluation has."""


def write_page(
    chosen: EvaluateSettings,
    setup: EvaluationSetup,
    rankings: Rankings,
    results: Mapping[str, Any],
) -> None:
    """Writes the report of an evaluation."""
    test_set, main = setup.test_sets[0], setup.main
    by_arm = rankings[test_set.name]
    gallery = None
    if setup.store is not None:
        gallery = gallery_section(
            test_set,
            by_arm.get(main, ()),
            title=setup.store.title,
            photo=setup.photo,
            others={setup.labels[arm]["label"]: ranked for arm, ranked in by_arm.items() if arm != main},
            count=chosen.gallery,
            seed=chosen.seed,
        )
    parts = [
        sections.summary(results, *setup.training.numbers),
        *(sections.test_set_section(name, results) for name in results["sets"]),
        *filter(None, (part(results) for part in FINDINGS)),
        *([chat_section(results["chat"])] if "chat" in results else []),
        *setup.training.sections,
        *([gallery] if gallery else []),
        sections.method(results),
    ]
    facts = {
        **({"Base model": setup.info.base, "Bundle": str(chosen.bundle)} if setup.info else {}),
        **({"Item store": f"{chosen.store} ({len(setup.store):,} items)"} if setup.store else {}),
        "Conversations": ", ".join(str(test_set.file) for test_set in setup.test_sets),
        "Created": f"{time.strftime('%Y-%m-%d %H:%M')}, lavic {__version__}",
    }
    lead = "Baselines without a model rank the candidate lists of held-out conversations."
    if setup.arms:
        lead = (
            "The tuned model, its controls and baselines rank the candidate lists of held-out conversations. Each "
            "control lacks one of the model's inputs: if a control scores as high, the model does not use that input."
        )
    warning = findings.first_line(results)
    report = Report(title=chosen.title, lead=lead, warning=warning, facts=facts, sections=tuple(parts))
    write_report(report, chosen.out / FILE)

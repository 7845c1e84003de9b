"""An evaluation as text for a terminal: what it would rank, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavic.launch.evaluate import EvaluateSettings
    from lavic.launch.evaluation.setup import Contest


def outline(chosen: EvaluateSettings, contest: Contest) -> str:
    """What an evaluation would rank, as text."""
    models = len({(arm.bundle, arm.language) for arm in contest.arms})
    lines = [
        f"base model  {contest.info.base}",
        f"item store  {chosen.store}, {len(contest.store):,} items",
        f"arms        {', '.join(contest.labels)}; {models} loads of the model, one after the other",
    ]
    for trial in contest.trials:
        lists = [len(listed) for listed in trial.lists]
        size = f"{min(lists)} to {max(lists)}" if min(lists) < max(lists) else f"{lists[0]}"
        lines.append(f"{trial.name:<12}{len(trial):,} conversations, {size} candidates each{_left_out(trial.left_out)}")
    rankings = sum(len(trial) for trial in contest.trials) * len(contest.arms)
    return "\n".join([*lines, f"rankings    {rankings:,} by a model; results would be written to {chosen.out}"])


def _left_out(counts: Mapping[str, int]) -> str:
    return "".join(f"; left out: {count:,} {kind.replace('_', ' ')}" for kind, count in counts.items())


def table(results: Mapping[str, Any]) -> str:
    """The hit rates, and two metrics of the whole ranking, as text."""
    lines = []
    width = max(len(arm) for arm in results["arms"])
    for name, trial in results["sets"].items():
        lines.append(
            f"\n{name}: {trial['conversations']} conversations, {trial['clusters']} groups, "
            f"ceiling {trial['ceiling']['value']:.3f}{_left_out(trial['left_out'])}"
        )
        lines.append(f"  {'arm':<{width}}  HitRatio@1  [{results['settings']['level']:.0%} interval]     MRR  NDCG@10")
        for arm, of in trial["arms"].items():
            one, rest = of["hit_rate"], (of["mrr"]["value"], of["ndcg_at_10"]["value"])
            interval = f"[{one['low']:.3f}, {one['high']:.3f}]"
            lines.append(f"  {arm:<{width}}  {one['value']:>10.3f}  {interval:<16}  {rest[0]:>7.3f}  {rest[1]:>7.3f}")
        for arm, of in trial.get("none", {}).items():
            said = [f"{of[key]:.3f}" if of[key] is not None else "-" for key in ("said_none_without", "said_none_with")]
            lines.append(
                f'  {arm:<{width}}  "none of these" said of {said[0]} of {of["lists_without"]} lists without a target, '
                f"{said[1]} of {of['lists_with']} with one"
            )
    if results["settings"]["decode"] == "generate":
        lines.append("\n--decode generate names one item and leaves no ranking behind it: MRR and NDCG count that one")
    return "\n".join(lines).lstrip("\n")

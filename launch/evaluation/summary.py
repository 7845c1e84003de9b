"""Text for the terminal: what an evaluation would rank, and its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavic.launch.evaluation.settings import EvaluateSettings
    from lavic.launch.evaluation.setup.evaluation_setup import EvaluationSetup


def dry_run_text(chosen: EvaluateSettings, setup: EvaluationSetup) -> str:
    """What an evaluation would rank."""
    models = len({arm.weights for arm in setup.arms})
    lines = []
    if setup.info is not None and setup.store is not None:
        lines += [f"base model  {setup.info.base}", f"item store  {chosen.store}, {len(setup.store):,} items"]
    if "chat" in setup.names:
        questions = sum(bool(candidates) for test_set in setup.test_sets for candidates in test_set.lists)
        lines.append(f"chat model  {chosen.chat.model}, at most {questions:,} questions")
    if setup.texts:
        all_candidates = {item for test_set in setup.test_sets for item in test_set.items}
        lines.append(f"catalogue   texts of {len(setup.texts):,} of the {len(all_candidates):,} candidates")
    lines.append(
        f"arms        {', '.join(setup.names)}" + f"; {models} models, loaded one after the other" * (models > 0)
    )
    for test_set in setup.test_sets:
        lists = [len(candidates) for candidates in test_set.lists]
        size = f"{min(lists)} to {max(lists)}" if min(lists) < max(lists) else f"{lists[0]}"
        left_out = _left_out(test_set.left_out)
        lines.append(f"{test_set.name:<12}{len(test_set):,} conversations, {size} candidates each{left_out}")
    rankings = sum(len(test_set) for test_set in setup.test_sets) * len(setup.arms) * chosen.orders
    return "\n".join([*lines, f"rankings    {rankings:,} by a model; results would be written to {chosen.out}"])


def _chat_line(chat: Mapping[str, Any]) -> str:
    """What the chat model answered, and what that took."""
    usage, cached = chat["usage"], chat["usage"]["cached"]
    parts = []
    for name, counts in chat["sets"].items():
        answer_counts = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts["answers"].items())
        parts.append(
            f"{name}: {answer_counts}, HitRatio@1 by the released rule {counts['released_rule']['hit_rate']:.3f}"
        )
    tokens = f"{usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens"
    cost = "" if usage["cost"] is None else f", cost {usage['cost']:.4g}"
    return (
        f"{chat['model']}: {'; '.join(parts)}; {usage['requests']:,} answers took {tokens}{cost}, "
        f"{cached['requests']:,} were kept from before"
    )


def _left_out(counts: Mapping[str, int]) -> str:
    return "".join(f"; left out: {count:,} {kind.replace('_', ' ')}" for kind, count in counts.items())


def results_table(results: Mapping[str, Any]) -> str:
    """Hit rates with intervals, MRR and NDCG of every test set."""
    lines = []
    width = max(len(arm) for arm in results["labels"])
    for name, test_set in results["sets"].items():
        lines.append(
            f"\n{name}: {test_set['conversations']} conversations, {test_set['clusters']} clusters, "
            f"upper bound {test_set['ceiling']['row']['value']:.3f} (micro {test_set['ceiling']['micro']['value']:.3f})"
            f"{_left_out(test_set['left_out'])}"
        )
        lines.append(f"  {'arm':<{width}}  HitRatio@1  [{results['settings']['level']:.0%} interval]     MRR  NDCG@10")
        for arm, metrics in test_set["arms"].items():
            hits, mrr, ndcg = metrics["hit_rate"], metrics["mrr"]["value"], metrics["ndcg_at_10"]["value"]
            interval = f"[{hits['low']:.3f}, {hits['high']:.3f}]"
            lines.append(f"  {arm:<{width}}  {hits['value']:>10.3f}  {interval:<16}  {mrr:>7.3f}  {ndcg:>7.3f}")
        for arm, counts in test_set.get("none", {}).items():
            absent, present = (
                f"{counts[key]:.3f}" if counts[key] is not None else "-"
                for key in ("said_none_without", "said_none_with")
            )
            lines.append(
                f'  {arm:<{width}}  answers "none of these" for {absent} of {counts["lists_without"]} lists without a '
                f"target and {present} of {counts['lists_with']} with one"
            )
        for arm, count in test_set.get("missing", {}).items():
            lines.append(f"  {arm:<{width}}  has no ranking for {count:,} conversations, which count as misses")
    if chat := results.get("chat"):
        lines += ["", _chat_line(chat)]
    if results["base"] and results["settings"]["decode"] == "generate":
        lines.append(
            "\n--decode generate gives one item and no ranking of the others: MRR and NDCG count that one item"
        )
    return "\n".join(lines).lstrip("\n")

"""Trains a retriever's head on cached features, in one process: the base model takes no part, and a step needs every
negative of its batch in one place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lavic.errors import DataError
from lavic.model.two_tower.head import TwoTowerHead
from lavic.train.retrieval.losses import contrastive_loss
from lavic.train.retrieval.pairs import Pairs
from lavic.train.retrieval.settings import HeadSettings

CUTOFFS = (1, 10, 50, 100)
"""Ranks at which recall is measured."""
SELECT_AT = 10
"""The cutoff whose recall chooses how long to train."""
_LARGEST_SCALE = 100.0
"""Upper bound of one over the temperature, as in CLIP."""
_QUERIES = 256
"""Conversations that are compared with all items at a time."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of the training conversations and of all items."""

    queries: torch.Tensor
    """[conversations, width]"""
    items: torch.Tensor
    """[items, width]"""


@dataclass(frozen=True, kw_only=True)
class TrainedHead:
    """A head with its validation."""

    head: TwoTowerHead
    step: int
    """Steps that it was trained for."""
    recall: dict[int, float]
    """Share of the validation targets among the first k items, by k; empty without validation."""


class HeadTrainer:
    """Trains heads with the same settings on parts of the same pairs.

    Args:
        features: Of training conversations and all items.
        log: Called with a step and numbers, after each epoch.
        stop: Called after each step; True ends the training.
    """

    def __init__(
        self,
        settings: HeadSettings,
        features: Features,
        *,
        device: torch.device | str = "cpu",
        log: Callable[..., None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings, self.features, self.device = settings, features, torch.device(device)
        self._log, self._stop = log or (lambda step, **numbers: None), stop

    def train(
        self,
        pairs: Pairs,
        *,
        seed: str = "",
        validate: Callable[[TwoTowerHead], dict[int, float]] | None = None,
        total_steps: int | None = None,
        last_step: int | None = None,
    ) -> TrainedHead | None:
        """Trains one head.

        Args:
            pairs: To learn.
            seed: Added to the settings' seed, so that the heads of a run differ.
            validate: Recall of a head by cutoff, measured after each epoch; the best one by recall@10 is kept.
            total_steps: Of the schedule of the learning rate; by default those of the settings' epochs.
            last_step: Stop there and keep that head, for one that is not validated.

        Returns:
            The head, on the CPU; None after a request to stop.

        Raises:
            DataError: The loss is not finite.
        """
        settings = self.settings
        schedule_steps = total_steps or settings.total_steps(len(pairs))
        epoch_steps = max(1, -(-len(pairs) // settings.batch_size))
        best: TrainedHead | None = None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(_seed(f"{settings.seed}/{seed}"))
            head = self._new_head(pairs).to(self.device)
            optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
            order = torch.Generator().manual_seed(_seed(f"{settings.seed}/{seed}/order"))
            sample_queue = torch.empty(0, dtype=torch.long)
            loss_sum, loss_count = torch.zeros((), device=self.device), 0
            for step in range(1, (last_step or schedule_steps) + 1):
                while len(sample_queue) < min(settings.batch_size, len(pairs)):
                    sample_queue = torch.cat([sample_queue, torch.randperm(len(pairs), generator=order)])
                batch, sample_queue = sample_queue[: settings.batch_size], sample_queue[settings.batch_size :]
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate(step, schedule_steps)
                loss = self._loss(head.train(), pairs, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum, loss_count = loss_sum + loss.detach(), loss_count + 1
                if self._stop():
                    return None
                if step % epoch_steps and step != (last_step or schedule_steps):
                    continue
                if not torch.isfinite(loss_sum):
                    raise DataError(f"the loss is not finite after {step} steps: lower --head.lr ({settings.lr:g})")
                numbers = {"loss": float(loss_sum) / loss_count, "lr": settings.learning_rate(step, schedule_steps)}
                loss_sum, loss_count = torch.zeros((), device=self.device), 0
                recall = validate(head.eval()) if validate else {}
                self._log(step, **numbers, **{f"recall_{cutoff}": value for cutoff, value in recall.items()})
                if best is None or not recall or recall[SELECT_AT] > best.recall[SELECT_AT]:
                    best = TrainedHead(head=self._copy(head), step=step, recall=recall)
        return best

    def _new_head(self, pairs: Pairs) -> TwoTowerHead:
        """A head with fresh weights that standardizes the features of some pairs."""
        settings, features = self.settings, self.features
        head = TwoTowerHead(
            features.queries.shape[1],
            features.items.shape[1],
            dim=settings.dim,
            hidden=settings.hidden,
            dropout=settings.dropout,
            temperature=settings.temperature,
        )
        head.query.standardize(features.queries[pairs.query.unique()])
        head.item.standardize(features.items)
        return head

    def _copy(self, head: TwoTowerHead) -> TwoTowerHead:
        settings, features = self.settings, self.features
        copy = TwoTowerHead(
            features.queries.shape[1], features.items.shape[1], dim=settings.dim, hidden=settings.hidden
        )
        copy.load_state_dict({name: value.detach().cpu().clone() for name, value in head.state_dict().items()})
        return copy.requires_grad_(False).eval()

    def _loss(self, head: TwoTowerHead, pairs: Pairs, batch: torch.Tensor) -> torch.Tensor:
        queries = head.query(self.features.queries[pairs.query[batch]].to(self.device))
        items = head.item(self.features.items[pairs.item[batch]].to(self.device))
        scale = head.log_scale.exp().clamp(max=_LARGEST_SCALE)
        right = pairs.right_answers(batch).to(self.device)
        return contrastive_loss(queries, items, scale, right, symmetric=self.settings.symmetric)


@torch.inference_mode()
def recall_at(
    head: TwoTowerHead, queries: torch.Tensor, items: torch.Tensor, pairs: Pairs, cutoffs: tuple[int, ...] = CUTOFFS
) -> dict[int, float]:
    """The share of targets among the first k items of all, by k.

    An item with the same score as the target counts as before it by half: a constant head is at chance.

    Args:
        pairs: Conversations and targets; a conversation's other targets are not counted as wrong.
        cutoffs: The numbers k.
    """
    device = head.log_scale.device
    vectors = torch.cat([head.item(part.to(device)) for part in items.split(8192)])
    answers = head.query(queries.to(device))
    hits = torch.zeros(len(cutoffs), dtype=torch.float64)
    for start in range(0, len(pairs), _QUERIES):
        query, item = pairs.query[start : start + _QUERIES], pairs.item[start : start + _QUERIES]
        scores = answers[query.to(device)] @ vectors.T
        target_scores = scores.gather(1, item.to(device)[:, None])
        num_ahead = (~(scores <= target_scores)).sum(1).double()  # also those that are no number
        num_ahead += ((scores == target_scores).sum(1).double() - 1) / 2
        for row, number in enumerate(query.tolist()):
            other_targets = torch.tensor(
                sorted(pairs.targets[number] - {int(item[row])}), device=device, dtype=torch.long
            )
            num_ahead[row] -= (scores[row, other_targets] > target_scores[row]).sum()
        hits += torch.stack([(num_ahead < cutoff).sum().double().cpu() for cutoff in cutoffs])
    return {cutoff: float(value) / len(pairs) for cutoff, value in zip(cutoffs, hits, strict=True)}


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")

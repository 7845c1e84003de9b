"""Features of conversations and items, and the head on top of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lavic.data.schema import Conversation, Turn
from lavic.errors import DataError
from lavic.model.item_store import ItemStore
from lavic.model.loading import Backbone
from lavic.model.two_tower.features import FeatureExtractor
from lavic.model.two_tower.folds import FINAL, fold_of, submission_hashes
from lavic.model.two_tower.head import TwoTowerHead, load_head, read_metadata, save_head
from lavic.model.visual_tokens import project
from tests.model.test_item_store import make_store


def conversation(*texts: str) -> Conversation:
    turns = tuple(Turn("comment" if place else "seeker", text) for place, text in enumerate(texts))
    return Conversation(id="c", turns=turns)


def test_a_long_conversation_keeps_its_last_turn_and_the_start_of_its_request(backbone: Backbone) -> None:
    extractor = FeatureExtractor(backbone, max_length=30)
    first, other = (
        conversation("I want a red shirt", *["dotted mug"] * 40, last) for last in ("blue mug", "striped shirt")
    )
    ids = [extractor.query_ids(c) for c in (first, other)]
    assert [len(row) for row in ids] == [30, 30]
    text = backbone.tokenizer.decode(ids[0])
    assert "I want a red" in text and "blue mug" in text
    difference = (extractor.queries([first]) - extractor.queries([other])).abs()
    assert difference[:, : extractor.width].max() > 1e-3  # the mean state
    assert difference[:, extractor.width :].max() > 1e-3  # the last state

    alone = conversation("shirt " * 50 + "blue mug")  # one turn that is longer than the limit
    assert len(extractor.query_ids(alone)) == 30 and "blue mug" in backbone.tokenizer.decode(extractor.query_ids(alone))
    assert len(extractor.query_ids(conversation())) > 0


def test_features_do_not_depend_on_what_shares_a_batch(backbone: Backbone) -> None:
    rows = [conversation("red shirt"), conversation("blue dotted mug " * 9), conversation("red shirt"), conversation()]
    together = FeatureExtractor(backbone).queries(rows)
    alone = torch.cat([FeatureExtractor(backbone, tokens_per_batch=1).queries([row]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(together[0], together[2])


def test_an_item_is_its_title_and_the_mean_of_its_tokens(tmp_path: Path, backbone: Backbone) -> None:
    make_store(tmp_path / "store", backbone)
    store = ItemStore.open(tmp_path / "store")
    extractor = FeatureExtractor(backbone)
    features = extractor.items(store, ["I3", "I0"])
    assert features.shape == (2, extractor.item_width)
    expected = project(backbone.model, store.tokens(["I0"])).mean(0)
    torch.testing.assert_close(features[1, extractor.width :], expected)
    titles_only = FeatureExtractor(backbone, tokens="none").items(store, ["I3", "I0"])
    assert torch.equal(titles_only, features[:, : extractor.width])
    with pytest.raises(DataError, match="not in the item store"):
        extractor.items(store, ["I0", "X"])
    assert extractor.items(store, []).shape == (0, extractor.item_width)


def test_hidden_states_that_are_not_finite_are_refused(backbone: Backbone) -> None:
    with torch.no_grad():
        backbone.model.model.language_model.norm.weight[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        FeatureExtractor(backbone).queries([conversation("red shirt")])


def test_a_head_comes_back_as_saved(tmp_path: Path) -> None:
    sizes = {"query_features": 6, "item_features": 4, "dim": 3, "hidden": 5}
    torch.manual_seed(0)
    head = TwoTowerHead(**sizes, dropout=0.5)
    head.query.standardize(torch.randn(20, 6) * 100 + 7)
    save_head(head, tmp_path / "head.safetensors", {"made_by": "x"})
    loaded = load_head(tmp_path / "head.safetensors", **sizes)
    features = torch.randn(2, 6)
    assert torch.equal(loaded.query(features), head.eval().query(features))
    torch.testing.assert_close(loaded.query(features).norm(dim=-1), torch.ones(2))
    assert read_metadata(tmp_path / "head.safetensors") == {"made_by": "x"}
    with pytest.raises(DataError, match="not the head of a retriever"):
        load_head(tmp_path / "head.safetensors", **sizes | {"dim": 4})
    content = (tmp_path / "head.safetensors").read_bytes()
    (tmp_path / "head.safetensors").write_bytes(content[: len(content) // 2])
    assert read_metadata(tmp_path / "head.safetensors") == {}
    with pytest.raises(DataError, match="not the head of a retriever"):
        load_head(tmp_path / "head.safetensors", **sizes)
    with torch.no_grad():
        head.item.layers[0].weight[0, 0] = torch.inf
    save_head(head, tmp_path / "head.safetensors", {})
    with pytest.raises(DataError, match=r"item\.layers\.0\.weight has numbers that are not finite"):
        load_head(tmp_path / "head.safetensors", **sizes)


def test_rows_of_one_request_share_a_fold_and_others_have_none() -> None:
    trained = [conversation(f"request {number}", "a comment") for number in range(200)]
    hashes = submission_hashes([*trained, trained[0]])
    assert hashes.dtype == np.uint64 and len(hashes) == 200
    folds = [fold_of(row, hashes, 4) for row in trained]
    assert set(folds) == {0, 1, 2, 3} and min(folds.count(fold) for fold in range(4)) > 20
    assert fold_of(conversation("request 7", "another comment"), hashes, 4) == folds[7]
    assert fold_of(conversation("a new request"), hashes, 4) == FINAL
    assert fold_of(trained[0], hashes, 0) == FINAL

"""The DeepSpeed configuration for ZeRO-2, a user's JSON, and its memory footprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavic.errors import ConfigError
from lavic.train.deepspeed.config import BUCKET_SIZE, Zero2Footprint, read_deepspeed_config, zero2_config


def test_the_default_configuration_is_zero_2() -> None:
    config = zero2_config(micro_batch=4, accumulation=2, clip=1.0, bf16=True)
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"
    assert "bf16" not in zero2_config(micro_batch=4, accumulation=2, clip=1.0, bf16=False)


def test_a_users_json_may_add_but_not_override() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    config = zero2_config(micro_batch=1, accumulation=1, clip=0.0, bf16=False, extra=extra)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] is True
    with pytest.raises(ConfigError, match=r"sets gradient_clipping: remove it and use loop.max_grad_norm"):
        zero2_config(micro_batch=1, accumulation=1, clip=1.0, bf16=False, extra={"gradient_clipping": 2})
    with pytest.raises(ConfigError, match="stage 3"):
        zero2_config(micro_batch=1, accumulation=1, clip=1.0, bf16=False, extra={"zero_optimization": {"stage": 3}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
            "zero_optimization.offload_optimizer: remove",
        ),
        ('{"zero_optimization": {"offload_param": {"device": "nvme"}}}', "zero_optimization.offload_param: remove"),
        ('{"zero_optimization": {"stage": 3}}', "ZeRO stage 3"),
        ('{"zero_optimization": true}', "an object is expected"),
        ('{"bf16": {"enabled": true}}', "sets bf16: remove it"),
        ('{"torch_autocast": {"enabled": true}}', "sets torch_autocast: remove it"),
        ('{"data_types": {"grad_accum_dtype": "bf16"}}', "sets data_types: remove it"),
        ('{"communication_data_type": "bf16"}', "sets communication_data_type: remove it"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_an_unusable_json_is_refused_with_its_file_name(tmp_path, text, message):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"--deepspeed .*ds\.json: ") as raised:
        read_deepspeed_config(file)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_offload_device_none_is_accepted(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"offload_optimizer": {"device": "none"}}}')
    assert read_deepspeed_config(tmp_path / "ds.json")


def test_read_deepspeed_config_of_none_list_and_missing_file(tmp_path: Path) -> None:
    assert read_deepspeed_config(None) == {}
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "good.json").write_text(json.dumps({"a": 1}))
    assert read_deepspeed_config(tmp_path / "good.json") == {"a": 1}
    with pytest.raises(ConfigError, match="not a JSON object"):
        read_deepspeed_config(tmp_path / "list.json")
    with pytest.raises(ConfigError, match=r"missing.json"):
        read_deepspeed_config(tmp_path / "missing.json")


def test_zero2_footprint_shards_gradients_and_optimizer_state() -> None:
    one_rank, eight_ranks = (Zero2Footprint.of(frozen=1000, trained=800, ranks=ranks) for ranks in (1, 8))
    assert one_rank.weights == eight_ranks.weights == 2 * 1800
    assert (one_rank.optimizer, eight_ranks.optimizer) == (12 * 800, 12 * 100)
    buffers = 2 * (800 + BUCKET_SIZE) + (2 + 4) * 800
    assert (one_rank.gradients, eight_ranks.gradients) == (buffers + 4 * 800, buffers + 4 * 100)
    assert (one_rank.traffic, eight_ranks.traffic) == (0, (2 * 4 + 2) * 800 * 7 // 8)
    three_micro_steps = Zero2Footprint.of(frozen=1000, trained=800, ranks=8, micro_steps=3)
    assert three_micro_steps.traffic == (3 * 2 * 4 + 2) * 800 * 7 // 8, "ZeRO-2 reduces gradients after each micro-step"
    assert one_rank.checkpoint == eight_ranks.checkpoint == 12 * 800
    assert Zero2Footprint.of(frozen=0, trained=9, ranks=8).optimizer == 12 * 2, (
        "every rank is counted with the largest part"
    )

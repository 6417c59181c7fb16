"""A configuration is honoured as written or refused with everything that is wrong, by path."""

from __future__ import annotations

import copy
import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zerostack.auto import Surroundings
from zerostack.config import read
from zerostack.errors import ConfigError
from zerostack.key_table import TABLE
from zerostack.keys import Key, Policy
from zerostack.resolve import effective, leaves
from zerostack.schema import OPTIMIZERS, SCHEDULERS, Config

VALID = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100}},
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": 5e7,
        "offload_param": {"device": "none", "pin_memory": True},
        "zenflow": None,
        "zeropp_loco_param": None,
    },
    "tensorboard": {"enabled": False, "output_path": "x", "job_name": "y"},
    "data_efficiency": {"enabled": False, "data_sampling": {"curriculum_learning": {"enabled": False}}},
    "timers": {"throughput": {"enabled": False}},
}


def resolve(raw, **around):
    return effective(raw, Surroundings(**{"world": 2, **around}))


def dictionaries(node, path=()):
    """Paths of every object in a configuration."""
    found = [path]
    for name, value in node.items():
        if isinstance(value, dict):
            found += dictionaries(value, (*path, name))
    return found


def at(node, path):
    for name in path:
        node = node[name]
    return node


def test_a_valid_configuration_resolves():
    result = resolve(VALID)
    assert (result.batch.train, result.batch.micro, result.batch.accumulation) == (32, 4, 4)
    assert result.config.zero_optimization.reduce_bucket_size == 50_000_000
    assert result.sources["zero_optimization.stage"] == "file"
    assert result.sources["seed"] == "default"
    assert result.sources["zero_optimization.stage3_prefetch_bucket_size"] == "default: zero-core decides"
    assert result.sources["gradient_accumulation_steps"].startswith("derived: train_batch_size 32 / (")
    assert set(result.findings.switched_off) == {
        "tensorboard",
        "data_efficiency",
    }


@given(
    where=st.sampled_from(dictionaries(VALID)),
    name=st.text(string.ascii_lowercase + "_", min_size=1, max_size=12),
)
def test_an_unknown_key_at_any_depth_is_named_by_its_path(where, name):
    raw = copy.deepcopy(VALID)
    section = at(raw, where)
    if name in section or name in TABLE.children(".".join(where)) or _inside(where, name):
        return
    section[name] = 1
    with pytest.raises(ConfigError, match=rf"{'.'.join((*where, name))}: unknown key"):
        resolve(raw)


@given(data=st.data())
def test_a_misspelt_key_at_any_depth_is_told_its_nearest_name(data):
    raw = copy.deepcopy(VALID)
    where = data.draw(st.sampled_from(dictionaries(VALID)))
    section = at(raw, where)
    key = data.draw(st.sampled_from(sorted(section)))
    cut = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from("qxz"))
    misspelt = key[:cut] + letter + key[cut + 1 :]
    if misspelt == key or len(key) < 5:
        return
    section[misspelt] = section.pop(key)
    with pytest.raises(ConfigError) as error:
        resolve(raw)
    assert f"{'.'.join((*where, misspelt))}: unknown key" in str(error.value)
    assert repr(key) in str(error.value)


def _inside(where, name):
    for depth in range(1, len(where) + 1):
        row = TABLE.get(".".join(where[:depth]))
        if isinstance(row, Key) and row.inside is not None:
            node = row.inside
            for step in where[depth:]:
                node = node.get(step, {})
            return name in node
    return False


def test_every_error_of_a_configuration_is_reported_at_once():
    raw = {
        "zero_optimisation": {},
        "tensor_parallel": {"tp_size": 2},
        "optimizer": {"params": {"learning_rate": 1}},
    }
    with pytest.raises(ConfigError) as error:
        resolve(raw)
    message = str(error.value)
    assert "3 problems" in message
    assert "zero_optimisation: unknown key; did you mean 'zero_optimization'?" in message
    assert (
        "tensor_parallel: known DeepSpeed key; this version of zerostack cannot honour it: needs package"
        in message
    )
    assert "optimizer.params.learning_rate: unknown key" in message


def test_a_known_key_in_the_wrong_place_is_told_where_it_belongs():
    with pytest.raises(ConfigError, match=r"stage: unknown key; it belongs at zero_optimization\.stage"):
        resolve({"train_batch_size": 2, "stage": 3})


REFUSED = [row for row in TABLE if row.policy is Policy.REFUSED]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.path)
def test_a_key_that_cannot_be_honoured_is_refused_with_its_reason(row):
    asking = "on" if not row.inside else {next(iter(row.inside)): "on"}
    with pytest.raises(ConfigError, match="cannot honour it: " + re.escape(row.note)):
        TABLE.check(nested(row.path, asking))


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.path)
def test_switched_off_it_is_accepted_and_listed(row):
    off = [*row.off] if row.inside is None else [None, False, {}, *row.off]
    assert off, f"{row.path} has no way to be switched off"
    for value in off:
        kept, findings = TABLE.check(nested(row.path, value))
        assert row.path in findings.switched_off
        assert not has(kept, row.path)


def nested(path, value):
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def has(node, path):
    for name in path.split("."):
        if name not in node:
            return False
        node = node[name]
    return True


def test_documented_defaults_of_a_refused_section_are_off_and_others_are_not():
    TABLE.check({"tensor_parallel": {"autotp_size": 0, "tp_size": 1}})
    TABLE.check({"aio": {"block_size": 1024}})
    with pytest.raises(ConfigError, match="tensor_parallel"):
        TABLE.check({"tensor_parallel": {"tp_size": 2}})


def test_the_table_and_the_typed_fields_are_the_same_keys():
    typed = {path for path, _ in leaves(Config())} - {"optimizer", "scheduler"}
    for section, kinds in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        typed.add(f"{section}.type")
        typed |= {f"{section}.params.{name}" for kind in kinds.values() for name in kind.model_fields}
    assert typed == {row.path for row in TABLE if row.policy is not Policy.REFUSED}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train_batch_size": "8"}, "train_batch_size: expected a whole number, got '8'"),
        ({"train_batch_size": 0}, "train_batch_size: expected at least 1, got 0"),
        ({"train_batch_size": 8.5}, "train_batch_size: expected a whole number, got 8.5"),
        (
            {"optimizer": {"type": "SGD", "params": {"nesterov": True}}},
            "optimizer.params.nesterov: needs a momentum",
        ),
        (
            {"fp16": {"enabled": True, "min_loss_scale": 1e9}},
            "fp16.min_loss_scale: expected at most the first scale",
        ),
        ({"fp16": {"initial_scale_power": 2000}}, "fp16.initial_scale_power: expected at most 64, got 2000"),
        ({"gradient_clipping": True}, "gradient_clipping: expected a number, got True"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": 1}, "zero_optimization: expected an object"),
        (
            {"zero_optimization": {"zero_hpz_partition_size": True}},
            "zero_hpz_partition_size: expected a whole number, got True",
        ),
        (
            {"zero_optimization": {"zeropp_loco_param": {"err_beta": 1.0}}},
            "zeropp_loco_param.err_beta: expected less than 1.0, got 1.0",
        ),
        ({"bf16": {"enabled": 1}}, "bf16.enabled: expected true or false, got 1"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type: expected one of Adam, .* whole_tensors=True"),
        (
            {"optimizer": {"type": "OneBitAdam", "params": {"lr": -1}}},
            "params.lr: expected at least 0.0, got -1",
        ),
        ({"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.9]}}}, "only the names of SGD"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.params.cycle_min_lr: a value is required"),
        ({"scheduler": {"type": "Cosine"}}, "scheduler.type: expected one of LRRangeTest"),
        ({"communication_data_type": "int8"}, "communication_data_type: expected 'fp32', "),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "must be given together"),
        ({"fp32_allreduce": True, "communication_data_type": "bf16"}, "contradict"),
        (
            {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}},
            '"AdamW" with adam_w_mode false',
        ),
    ],
)
def test_wrong_values_say_what_was_expected(raw, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"train_batch_size": 8, **raw})


@pytest.mark.parametrize("on", [True, False])
def test_zero_switched_on_by_a_bool_is_stage_one(on):
    found = resolve({"train_batch_size": 8, "zero_optimization": on})
    assert found.config.zero_optimization.stage == int(on)
    told = next(source for path, _, source in found.rows() if path == "zero_optimization.stage")
    assert told == f"file: {str(on).lower()}, an older spelling of {int(on)}"


def test_json_errors_carry_line_and_column(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{\n  "train_batch_size": 8,\n}')
    with pytest.raises(ConfigError, match=r"ds\.json:[23]:\d+: not valid JSON: .*comma before a closing"):
        read(path)
    path.write_text('{"train_batch_size": 8 // eight\n}')
    with pytest.raises(ConfigError, match=r"ds\.json:1:24: .*JSON has no comments"):
        read(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        read(path)
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "absent.json")


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 1, "stage": 3}}')
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage is given twice"):
        read(path)
    path.write_text(json.dumps(VALID))
    assert read(path) == VALID

"""--print_config: every field with its value and its comment."""

from fastslm_jax import config as config_lib
from fastslm_jax import config_comments


def test_every_field_has_its_comment():
    config = config_lib.full_size()
    join = {"min_seconds": 4.0, "max_seconds": 9.0}
    config.data.train.mine = config_lib.source("m.jsonl", ("asr",), join=join)
    config.eval.sets.test = "test.jsonl"
    lines = config_comments.describe(config)
    fields = {line.split(" = ")[0]: line for line in lines}
    assert fields["steps"] == "steps = 10000  # of the whole run"
    assert fields["optimizer.b1"] == "optimizer.b1 = 0.9  # decay rate of the first moment"
    assert fields["data.train.mine.path"] == (
        "data.train.mine.path = 'm.jsonl'  # a manifest or an imported folder"
    )
    # A field without a comment has that of its group.
    assert fields["mesh.fsdp"] == "mesh.fsdp = 1  # axis sizes; -1: inferred"
    assert [line for line in lines if "  # " not in line] == []


def test_changed_values_are_shown():
    config = config_lib.full_size()
    config.steps = 7
    assert "steps = 7  # of the whole run" in config_comments.describe(config)

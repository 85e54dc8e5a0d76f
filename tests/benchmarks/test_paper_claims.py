"""The page of claims: sizes from the model's shapes, verdicts from results, "not run" otherwise."""

import json
import pathlib

import jax
import paper_claims
import pytest
import token_rate_costs
from full_size_model import full_size

from fastslm_jax.errors import UserError


@pytest.fixture(scope="module")
def full():
    return full_size(jax.devices()[0])


def record(suite: str, variant: str, wer: float, ten_minutes: float | None = None) -> dict:
    found = {"suite": suite, "variant": variant, "seed": 0, "scores": {"test": {"wer": wer}}}
    return found | ({"wer_by_minutes": {"10": ten_minutes}} if ten_minutes is not None else {})


def test_five_minutes_are_500_tokens_as_wide_as_the_language_model(full):
    assert paper_claims.speech_shape(full, minutes=5) == (500, 2560)


def test_the_stages_of_the_hfq_former(full):
    shapes = paper_claims.stage_shapes(full)
    assert shapes["stage1_tokens"] == shapes["stage3_tokens"] == (80, 1280)
    assert shapes["semantic_tokens"] == (50, 1280)
    assert shapes["recovery q"] == (50, 20, 64)
    assert shapes["recovery k"] == (1500 + 750 + 375, 20, 64)


def test_the_decoder_costs_by_hand(full):
    """Qwen3-4B: 36 layers, 8 key-value heads of 128; width 2560, 4096 wide queries."""
    found = token_rate_costs.decoder_costs(full, rate=25, minutes=10)
    assert found["tokens"] == 15_000
    assert found["cache_gib"] * 2**30 == 2 * 36 * 15_000 * 8 * 128 * 2
    weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
    attention = 2 * 15_000 * 15_001 * 4096
    expected = 36 * (2 * 15_000 * weights + attention)
    assert found["flops"] == pytest.approx(expected, rel=0.02)  # and LoRA, 1 %
    assert found["flops"] > expected


def test_each_rate_has_an_adapter(full):
    kinds = [token_rate_costs.adapter_of(full, rate) for rate in token_rate_costs.TOKEN_RATES]
    assert [type(kind).__name__ for kind in kinds] == ["HFQFormer", "Stack", "Stack", "Stack"]
    assert [kind.compression_size for kind in kinds] == [50, 375, 750, 1500]


def test_numbers_have_three_digits():
    values = (0.06867, 4.12, 123.4, 3051.7)
    assert [*map(paper_claims.number, values)] == ["0.0687", "4.12", "123", "3,050"]


def test_without_results_nothing_is_claimed():
    assert {check.verdict for check in paper_claims.experiment_checks([])} == {"not run"}
    assert paper_claims.loss_check(pathlib.Path("nowhere")).verdict == "not run"


def test_differences_within_the_spread_are_equal():
    assert paper_claims.compare([5.0, 7.0], [6.5, 7.5]) == "equal within the spread"
    assert paper_claims.compare([5.0, 5.2], [6.5, 7.5]) == "lower"
    assert paper_claims.compare([9.0, 9.2], [6.5, 7.5]) == "higher"
    assert paper_claims.compare([9.0], [6.5]) == "one seed only"


def test_verdicts_from_results():
    results = [
        *(record("stages", "stages 1 and 2", 5, wer) for wer in (20.0, 22.0)),
        *(record("stages", "stages 1 and 2, no detail recovery", 5, wer) for wer in (40.0, 44.0)),
        *(record("tokens", count, wer) for count in ("25", "50", "100") for wer in (5.0, 5.4)),
        *(record("grouping", name, wer) for name in ("random", "semantic") for wer in (7.0, 8.0)),
    ]
    recovery, tokens, grouping = paper_claims.experiment_checks(results)
    assert recovery.verdict == "with: lower"
    assert recovery.figure == "stages 1 and 2: 21.0 ± 1.4 % with, 42.0 ± 2.8 % without"
    assert tokens.verdict == "not run"  # 200 is missing; the figure shows what there is
    assert tokens.figure == "25: 5.2 ± 0.3 %; 50: 5.2 ± 0.3 %; 100: 5.2 ± 0.3 %"
    assert grouping.verdict == "semantic against random: equal within the spread"


def test_the_loss_must_fall_from_quarter_to_quarter(tmp_path):
    losses = {1: [4, 3, 2, 1], 2: [1, 1.5, 0.5, 0.4], 3: [2, 1, 0.5, 0.4]}
    for stage, values in losses.items():
        (tmp_path / f"stage{stage}").mkdir()
        lines = "".join(json.dumps({"step": 1, "loss": loss}) + "\n" for loss in values)
        (tmp_path / f"stage{stage}/metrics.jsonl").write_text(lines)
    check = paper_claims.loss_check(tmp_path)
    assert check.verdict == "does not hold"
    assert "stage 2: 1.00 → 1.50 → 0.50 → 0.40" in check.figure


def test_a_file_without_results_is_refused(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(record("tokens", "25", 5)) + '\n{"suite": "tokens"}\n')
    with pytest.raises(UserError, match=r"line 2 is not a result of python -m fastslm_jax.ablate"):
        paper_claims.read_results([str(file)])

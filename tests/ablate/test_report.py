"""Tables and pictures of experiments."""

import pytest

from fastslm_jax.ablate import report


def record(variant: str, seed: int, wer: float, **fields) -> dict:
    return {
        "variant": variant,
        "seed": seed,
        "parameters": {"adapter": 643392},
        "flops_per_audio_second": 323_087_104,
        "steps": 840,
        "seconds": 300,
        "scores": {"test": {"wer": wer}},
        **fields,
    }


def test_mean_and_standard_deviation():
    assert report.mean_and_deviation([10.0, 12.0, 14.0]) == pytest.approx((12.0, 2.0))
    assert report.mean_and_deviation([10.0]) == (10.0, 0.0)


def test_a_table_has_a_line_for_each_variant(tmp_path):
    records = [record("a", 0, 10.0), record("b", 0, 5.0), record("a", 1, 12.0)]
    report.write(tmp_path, "Which?", records)
    assert (tmp_path / "results.md").read_text() == (
        "Which?\n\n"
        "|  | seeds | adapter parameters | MFLOP/s of audio | steps | minutes | WER, test |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| a | 2 | 643,392 | 323 | 840 | 5.0 ± 0.0 | 11.0 ± 1.4 |\n"
        "| b | 1 | 643,392 | 323 | 840 | 5.0 | 5.0 |\n"
    )
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_strengths_and_probes(tmp_path):
    by_length = [
        record("stage 1", seed, 9.0, wer_by_minutes={"0.5": 5.0 + seed, ">10": 90.0})
        for seed in (0, 1)
    ]
    by_strength = [
        record(variant, 0, wer, model="demo_model")
        for variant, wer in (("clean", 2.0), ("snr_db 10", 5.0), ("pitch -3", 4.0))
    ]
    probes = [
        record("demo_model: speaker", 0, 0, features=features)
        | {"scores": {"test": {"accuracy": accuracy}}}
        for features, accuracy in (("encoder", 0.75), ("tokens", 0.5))
    ]
    expected = {
        "lengths": (by_length, "| 5.5 ± 0.7 | 90.0 ± 0.0 |"),
        "strengths": (by_strength, "| snr_db 10 | 1 | 5.0 |"),
        "probes": (probes, "| demo_model: speaker | 1 | 75.0 | 50.0 |"),
    }
    for name, (records, line) in expected.items():
        (tmp_path / name).mkdir()
        report.write(tmp_path / name, "Which?", records)
        assert line in (tmp_path / name / "results.md").read_text()
        assert (tmp_path / name / "results.png").read_bytes().startswith(b"\x89PNG")
    assert report.headline(probes[0]) == "accuracy, encoder 75.0 %"

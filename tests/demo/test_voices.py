"""Training and held-out voices."""

from fastslm_jax.demo import voices


def test_held_out_voices_are_not_in_training():
    train, held_out = voices.voices()
    assert (len(train), len(held_out)) == (96, 12)
    assert len({voice.speaker for voice in train + held_out}) == len(train) + len(held_out)
    assert not {voice.name for voice in train} & {voice.name for voice in held_out}
    assert all(150 <= voice.rate <= 195 for voice in train + held_out)

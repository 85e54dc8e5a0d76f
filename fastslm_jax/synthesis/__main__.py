"""Speech for training from sentences: several synthesizers, augmented, with clips without speech.

    python -m fastslm_jax.synthesis --sentences=prompts.txt,wordnet.txt --out=corpus \
        --engines=espeak,flite:slt,flite:rms --count=10000 --exclude=test.jsonl

writes FLAC files at 16 kHz, train.jsonl, dev.jsonl and summary.json into the folder. Sentences of
dev are not in train. The files depend on the flags and the seed only, not on --workers. Interrupt
at any time; rerunning resumes, also with a larger --count. docs/synthesis.md lists the engines.
"""

import dataclasses
import os
from collections.abc import Sequence

from absl import flags

from fastslm_jax import cli
from fastslm_jax.data.contamination import read_texts
from fastslm_jax.errors import UserError
from fastslm_jax.synthesis import corpus, engines, sentences
from fastslm_jax.synthesis.augment import Channel
from fastslm_jax.synthesis.manner import Manner

FLAGS = flags.FLAGS
MANNER = {  # field of Manner: (lowest, highest, description)
    "hesitations": (0.0, 1.0, 'Probability of "um" or "uh" before a word.'),
    "repetitions": (0.0, 1.0, "Probability that a word is said twice."),
    "restarts": (0.0, 1.0, "Probability that a sentence is broken off and begun again."),
    "rate": (0.4, 2.5, "Factor of the speaking rate."),
    "pitch": (-12.0, 12.0, "Semitones by which voices are higher."),
    "snr_db": (-20.0, 100.0, "Level of speech above noise in every clip, in dB (default: none)."),
    "reverb_seconds": (0.0, 10.0, "Reverberation time of every clip."),
}


def define_flags() -> None:
    flags.DEFINE_list(
        "sentences",
        None,
        "Text files with one sentence per line, separated by commas.",
        required=True,
    )
    flags.DEFINE_string("out", None, "Output folder.", required=True)
    flags.DEFINE_list(
        "engines",
        ["espeak"],
        "ENGINE (all its voices) or ENGINE:VOICE, separated by commas; each gets the same share "
        f"of the clips. Engines: {', '.join(engines.ENGINES)}.",
    )
    flags.DEFINE_integer("count", 1000, "Number of clips.", lower_bound=1)
    flags.DEFINE_list(
        "exclude",
        [],
        "Manifests, imported folders or text files: sentences that are equal to one of theirs, or "
        "share four words in a row, are left out.",
    )
    defaults = corpus.Recipe((), ())
    _define_share("no_speech", defaults.no_speech, "Share of clips without speech.")
    _define_share("dev", defaults.dev, "Share of the sentences that are in dev.jsonl.")
    for name, value in dataclasses.asdict(Channel()).items():
        _define_share(name, value, f"Probability of {name} augmentation in a clip.")
    for name, (low, high, description) in MANNER.items():
        flags.DEFINE_float(name, getattr(Manner(), name), description, low, high)
    flags.DEFINE_float(
        "max_seconds", defaults.max_seconds, "Longer clips are left out.", lower_bound=1.0
    )
    flags.DEFINE_integer("seed", defaults.seed, "Seed of all random draws.")
    flags.DEFINE_integer("workers", os.cpu_count(), "Number of processes.", lower_bound=1)


def _define_share(name: str, default: float, description: str) -> None:
    flags.DEFINE_float(name, default, description, lower_bound=0.0, upper_bound=1.0)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a flag, --name=value")
    voices = tuple(engines.parse(spec) for spec in FLAGS.engines)
    if not voices:
        raise UserError("--engines: name at least one engine")
    excluded = [text for path in FLAGS.exclude for text in read_texts(path)]
    kept, dropped = sentences.read(FLAGS.sentences, excluded)
    reasons = "".join(f"; left out: {count} {reason}" for reason, count in dropped.most_common())
    print(f"{len(kept)} sentences{reasons}", flush=True)
    channel = Channel(
        **{field.name: FLAGS[field.name].value for field in dataclasses.fields(Channel)}
    )
    recipe = corpus.Recipe(
        tuple(kept),
        voices,
        FLAGS.seed,
        FLAGS.no_speech,
        FLAGS.dev,
        channel,
        FLAGS.max_seconds,
        Manner(**{name: FLAGS[name].value for name in MANNER}),
    )
    summary = corpus.build(recipe, FLAGS.out, FLAGS.count, FLAGS.workers)
    by_engine = ", ".join(f"{name} {count}" for name, count in summary["engines"].items())
    print(
        f"{FLAGS.out}: {summary['clips']} clips, {summary['hours']} h, {summary['sentences']} "
        f"sentences, {summary['words']} words, vocabulary {summary['vocabulary']}, "
        f"{summary['no_speech']} without speech; {by_engine}; train {summary['train']}, dev "
        f"{summary['dev']}; left out {FLAGS.count - summary['clips']}"
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)

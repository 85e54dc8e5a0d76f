"""A test set of long recordings, joined from the clips of a manifest, for WER by length.

    python benchmarks/long_recordings.py --manifest=DIR/test.jsonl --out=DIR/long
        [--minutes=5,15,30,60,90] [--count=2]

Writes OUT/long.jsonl and a FLAC file per recording. Each recording has clips in random order with
0.2 to 0.6 s of silence between them, and ends before the clip that would make it longer than its
minutes. Clips are repeated if the manifest has less audio than the recordings need. `eval.py` then
reports WER, coverage and repetitions by length (docs/eval.md).
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import soundfile
from absl import flags

from fastslm_jax import cli, outputs
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import longform, manifest
from fastslm_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("manifest", None, "Manifest or imported folder with transcribed clips.")
flags.DEFINE_string("out", None, "Folder for the recordings and their manifest.")
flags.DEFINE_list("minutes", ["5", "15", "30", "60", "90"], "Greatest length of each recording.")
flags.DEFINE_integer("count", 2, "Recordings of each length.", 1)
flags.DEFINE_integer("seed", 0, "Seed of the order and of the gaps.")
REQUIRED = ("manifest", "out")


def joined(
    clips: list[manifest.Utterance], minutes: float, count: int, rng: np.random.Generator
) -> list[longform.Example]:
    """The first `count` recordings of at most `minutes` from the clips, repeated if necessary."""
    seconds = 60 * minutes
    longest = max(clip.seconds for clip in clips)
    if longest > seconds:
        raise UserError(f"--minutes={minutes:g}: a clip of {FLAGS.manifest} has {longest:.0f} s")
    total = sum(clip.seconds for clip in clips)
    repeats = int(np.ceil(count * (seconds + longest) / total)) + 1
    plan = longform.LongForm(seconds, seconds)
    return longform.joined_examples(0, clips * repeats, plan, rng)[:count]


def main(_: list[str]) -> None:
    out = outputs.check_folder(FLAGS.out, "--out")
    try:
        lengths = [float(minutes) for minutes in FLAGS.minutes]
    except ValueError:
        lengths = []
    if not lengths or not all(0 < minutes < float("inf") for minutes in lengths):
        raise UserError(f"--minutes={','.join(FLAGS.minutes)}: use numbers above 0")
    clips = [
        clip
        for clip in manifest.read_manifest(FLAGS.manifest)
        if clip.task == "asr" and not clip.no_speech
    ]
    if not clips:
        raise UserError(f"--manifest={FLAGS.manifest}: has no transcribed clips")
    if len(languages := sorted({clip.lang for clip in clips})) > 1:
        raise UserError(f"--manifest={FLAGS.manifest}: has several languages ({languages})")
    rng, lines = np.random.default_rng(FLAGS.seed), []
    for minutes in lengths:
        for number, example in enumerate(joined(clips, minutes, FLAGS.count, rng)):
            used = [clips[clip % len(clips)] for clip in example.clips]
            parts = []
            for gap, clip in zip(example.gaps, used, strict=True):
                parts += [np.zeros(gap, np.int16), manifest.read_clip(clip)]
            samples, name = np.concatenate(parts), f"{minutes:g}min-{number}"
            soundfile.write(out / f"{name}.flac", samples, SAMPLE_RATE)
            lines.append(
                {
                    "audio_filepath": f"{name}.flac",
                    "duration": len(samples) / SAMPLE_RATE,
                    "text": " ".join(clip.text for clip in used),
                    "lang": languages[0],
                    "id": name,
                }
            )
            print(f"{name}: {len(samples) / SAMPLE_RATE:.1f} s of {len(used)} clips", flush=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    outputs.write_text(out / "long.jsonl", text)


if __name__ == "__main__":
    cli.run(main, REQUIRED)

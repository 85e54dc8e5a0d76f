"""A synthetic speech corpus on disk: `sentences` spoken by espeak-ng voices, as FLAC files and JSON-lines manifests.

    python -m fastslm_jax.demo.corpus --out=runs/corpus

The default corpus is 12 500 clips, 13 hours, 0.9 GB; it takes about 90 seconds on two free cores.

DIR/train.jsonl, dev.jsonl, test.jsonl, test_unseen_voices.jsonl and test_long.jsonl hold one example a line; `audio_filepath`
is relative to DIR. Sentences are disjoint between the splits; `test_unseen_voices` is spoken by (accent, variant) pairs that
training never hears; `test_long` joins sentences of one voice into recordings of one to three minutes, with the `segments` that
tell where each one lies. DIR/train_transcripts.jsonl asks for the words of train's notes and questions, on the same audio.

Every item is a pure function of (seed, set, task, index), whoever builds it: any number of workers writes the same bytes, and a
run that was killed goes on where it stopped. Manifests are written last.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import soundfile
import soxr
import tqdm
from absl import app, flags

from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo import espeak, sentences

Row = dict[str, object]  # a line of a manifest

SAMPLE_RATE = 16_000
TRANSCRIPTS = "train_transcripts.jsonl"
SETS = ("train", "dev", "test", "test_unseen_voices", "test_long")
DEFAULT_COUNTS: Mapping[str, Mapping[str, int]] = {
    "train": {"asr": 6000, "ast": 1500, "ssum": 1200, "sqqa": 3200},
    "dev": {"asr": 100, "ast": 100, "ssum": 100, "sqqa": 100},
    "test": {"asr": 200, "ast": 100, "ssum": 100, "sqqa": 300},
    "test_unseen_voices": {"asr": 200},
    "test_long": {"asr": 12},
}
MAX_SECONDS = {
    "asr": 5.6,
    "ast": 5.6,
    "ssum": 11.5,
    "sqqa": 5.9,
}  # one window of the demo; summaries two
LONG_SECONDS = (67.0, 180.0)  # upper ends of the recordings; a sentence less, so 60 to 180 s
VERSION = 2  # of the audio recipe: raise it when the same seed gives other samples


@dataclasses.dataclass(frozen=True)
class Voice:
    """An espeak-ng voice ("en-us+f3") with its speaking rate (words a minute) and pitch (0 to 99)."""

    name: str
    rate: int
    pitch: int

    @property
    def speaker(self) -> str:
        return f"{self.name}-r{self.rate}-p{self.pitch}"


ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")


@functools.cache
def voices() -> tuple[tuple[Voice, ...], tuple[Voice, ...]]:
    """(96 training voices, 12 held-out voices): no (accent, variant) pair is in both; each variant is held out once."""
    train, held_out = [], []
    for a, accent in enumerate(ACCENTS):
        for v, variant in enumerate(VARIANTS):
            held = a == (3 * v + 1) % len(ACCENTS)
            for take in range(1 if held else 2):
                k = 5 * a + 7 * v + 4 * take
                voice = Voice(
                    f"{accent}+{variant}",
                    rate=150 + 5 * (k % 10),
                    pitch=(30, 38, 46, 54, 62, 70)[(k + take) % 6],
                )
                (held_out if held else train).append(voice)
    return tuple(train), tuple(held_out)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Probabilities, per utterance. Hesitations are spoken ("um") but not transcribed."""

    noise: float = 0.18  # white or pink, 15 to 30 dB below the speech
    reverb: float = 0.15  # an exponentially decaying tail, 0.15 to 0.4 s to -60 dB
    hesitation: float = 0.03
    pause: float = 0.03


CLEAN = Augmentation(0.0, 0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Item:
    """One audio file to build. `target_seconds` is set for a long recording only."""

    seed: int
    set: str
    task: str
    index: int
    augmentation: Augmentation = CLEAN
    target_seconds: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.set}-{self.task}-{self.index:06d}"

    @property
    def path(self) -> str:
        return f"{self.set.split('_')[0]}/{self.key}.flac"

    def rng(self) -> random.Random:
        return random.Random(f"{self.seed}/{self.key}")


# Signals: float64 arrays [samples] at 16 kHz.


Starts = list[tuple[int, float]]  # (character of the text, second of the speech) of words


def _speak(text: str, voice: Voice) -> tuple[np.ndarray, Starts]:
    """Speech without the silence around it, peak 1, and where its words start."""
    samples, rate, words = espeak.synthesize_words(text, voice.name, voice.rate, voice.pitch)
    speech = soxr.resample(samples / 32768.0, rate, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(speech) > 0.01 * np.abs(speech).max())
    speech = speech[loud[0] : loud[-1] + 1]
    starts = [(character, sample / rate - loud[0] / SAMPLE_RATE) for character, sample in words]
    return speech / np.abs(speech).max(), starts


def _speak_within(text: str, voice: Voice, seconds: float) -> tuple[np.ndarray, Starts]:
    """Speaks faster, in steps, until the speech lasts no longer than `seconds`."""
    while True:
        speech, starts = _speak(text, voice)
        if len(speech) <= seconds * SAMPLE_RATE:
            return speech, starts
        voice = dataclasses.replace(voice, rate=voice.rate + 10)


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE))


def _hesitate(text: str, rng: random.Random, augmentation: Augmentation) -> str:
    """ "call anna at five" -> "call um anna at five" or "call anna , at five" (a pause), with their probabilities."""
    words = text.split()
    for probability, inserted in (
        (augmentation.hesitation, ("uh", "um")),
        (augmentation.pause, (",",)),
    ):
        draw, place, what = rng.random(), rng.randrange(1, len(words)), rng.choice(inserted)
        if draw < probability:
            words.insert(place, what)
    return " ".join(words)


def _reverberate(
    signal: np.ndarray, seconds: float, direct_db: float, noise: np.random.Generator
) -> np.ndarray:
    """Adds a tail that decays by 60 dB in `seconds` and whose energy is `direct_db` below the direct sound; keeps the length."""
    n = round(seconds * SAMPLE_RATE)
    tail = noise.standard_normal(n) * 10.0 ** (-3.0 * np.arange(n) / n)
    tail[: round(0.005 * SAMPLE_RATE)] = (
        0.0  # the first reflection comes 5 ms after the direct sound
    )
    tail *= 10.0 ** (-direct_db / 20) / np.linalg.norm(tail)
    tail[0] = 1.0
    size = 1 << (len(signal) + n - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(tail, size), size)[: len(signal)]


def _noise(length: int, pink: bool, noise: np.random.Generator) -> np.ndarray:
    """White or pink (1/f power) noise of unit power."""
    size = 1 << (length - 1).bit_length()  # a power of two: the FFT of a prime length is slow
    white = noise.standard_normal(size)
    if not pink:
        return white[:length]
    spectrum = np.fft.rfft(white)
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1.0))
    spectrum[0] = 0.0
    coloured = np.fft.irfft(spectrum, size)[:length]
    return coloured / coloured.std()


def _augment(signal: np.ndarray, rng: random.Random, augmentation: Augmentation) -> np.ndarray:
    noise = np.random.default_rng(rng.getrandbits(64))
    if rng.random() < augmentation.reverb:
        signal = _reverberate(signal, rng.uniform(0.15, 0.4), rng.uniform(3.0, 12.0), noise)
    if rng.random() < augmentation.noise:
        snr_db = rng.uniform(15.0, 30.0)
        level = np.sqrt(np.mean(signal**2)) * 10.0 ** (-snr_db / 20)
        signal = signal + level * _noise(len(signal), rng.random() < 0.5, noise)
    return signal


def _to_int16(signal: np.ndarray, peak_db: float) -> np.ndarray:
    return np.round(signal * (32767 * 10.0 ** (peak_db / 20) / np.abs(signal).max())).astype(
        np.int16
    )


# Items: what is said, and the file.


def _example(item: Item) -> sentences.SpokenExample:
    split = item.set.split("_")[0]
    return sentences.example(item.task, item.rng(), split)


def _voice(item: Item) -> Voice:
    train, held_out = voices()
    if item.set == "test_long":  # as many different voices as there are recordings
        return train[(37 * item.index + 11) % len(train)]
    return random.Random(f"voice/{item.seed}/{item.key}").choice(
        held_out if item.set == "test_unseen_voices" else train
    )


def _spoken(item: Item, rng: random.Random) -> tuple[np.ndarray, str, Starts, float]:
    """A short item before noise and reverberation: samples, the text with hesitations, starts of its words, the peak in dB."""
    before, after, peak_db = (
        rng.uniform(0.05, 0.1),
        rng.uniform(0.05, 0.1),
        rng.uniform(-20.0, -3.0),
    )
    text = _hesitate(_example(item).text, rng, item.augmentation)
    speech, starts = _speak_within(text, _voice(item), MAX_SECONDS[item.task] - before - after)
    signal = np.concatenate([_silence(before), speech, _silence(after)])
    return (
        signal,
        text,
        [(character, max(0.0, before + second)) for character, second in starts],
        peak_db,
    )


def render(item: Item) -> np.ndarray:
    """The int16 samples of a short item."""
    rng = random.Random(f"audio/{item.seed}/{item.key}")
    signal, _, _, peak_db = _spoken(item, rng)
    return _to_int16(_augment(signal, rng, item.augmentation), peak_db)


def word_times(item: Item) -> list[tuple[str, float, float]]:
    """(word, start, end) of what a short item says, in seconds; hesitations are words too. Words that the voice draws together
    share their time by their letters.
    """
    signal, text, starts, _ = _spoken(item, random.Random(f"audio/{item.seed}/{item.key}"))
    starts = [
        (0, starts[0][1] if starts else 0.0),
        *starts[1:],
        (len(text), len(signal) / SAMPLE_RATE),
    ]
    times = []
    for (character, start), (next_character, end) in itertools.pairwise(starts):
        words = text[character:next_character].replace(",", " ").split()
        letters = sum(map(len, words))
        for word in words:
            times.append((word, start, start + (end - start) * len(word) / letters))
            start, letters = times[-1][2], letters - len(word)
    return times


def render_long(item: Item) -> tuple[np.ndarray, list[Row]]:
    """Sentences of one voice with gaps of 0.2 to 0.6 s up to the target: (int16 samples, segments)."""
    rng, voice, split = item.rng(), _voice(item), item.set.split("_")[0]
    parts, segments = [_silence(rng.uniform(0.05, 0.1))], []
    seconds = len(parts[0]) / SAMPLE_RATE
    while True:
        text = sentences.example("asr", rng, split).text
        (speech, _), gap = (
            _speak_within(text, voice, MAX_SECONDS["asr"]),
            _silence(rng.uniform(0.2, 0.6)),
        )
        spoken, pause = len(speech) / SAMPLE_RATE, len(gap) / SAMPLE_RATE
        if seconds + spoken + pause > item.target_seconds:
            break
        segments.append(
            {"start": round(seconds, 3), "end": round(seconds + spoken, 3), "text": text}
        )
        parts += [speech, gap]
        seconds += spoken + pause
    return _to_int16(
        _augment(np.concatenate(parts), rng, item.augmentation), rng.uniform(-20.0, -3.0)
    ), segments


def _write_flac(path: pathlib.Path, samples: np.ndarray) -> None:
    """Whole or not at all: a killed run leaves a temporary name, which the next run overwrites."""
    temporary = path.with_name(f".{path.name}.tmp")
    soundfile.write(temporary, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    os.replace(temporary, path)


def _row(item: Item, example: sentences.SpokenExample, frames: int) -> Row:
    return {
        "id": f"{item.set}-{example.task}-{item.index:06d}",
        "audio_filepath": item.path,
        "duration": frames / SAMPLE_RATE,
        "text": example.text,
        "task": example.task,
        "prompt": example.prompt,
        "answer": example.answer,
        "lang": example.lang,
        "speaker": _voice(item).speaker,
        "recording": item.key,
    }


def build_item(item: Item, out: pathlib.Path) -> Row:
    """Writes the item's file unless it is there; returns its manifest line."""
    path = out / item.path
    if item.target_seconds:
        samples, segments = render_long(item)
        _write_flac(path, samples)
        text = " ".join(str(segment["text"]) for segment in segments)
        example = sentences.SpokenExample("asr", text, TASKS["asr"].instruction, text)
        return {**_row(item, example, len(samples)), "segments": segments}
    if path.exists():
        frames = soundfile.info(path).frames
    else:
        samples = render(item)
        _write_flac(path, samples)
        frames = len(samples)
    return _row(item, _example(item), frames)


# The corpus.


def _merged(counts: Mapping[str, Mapping[str, int]] | None) -> dict[str, dict[str, int]]:
    """The default counts with `counts` over them; a set or task that does not exist is an error."""
    merged = {name: dict(tasks) for name, tasks in DEFAULT_COUNTS.items()}
    for name, tasks in (counts or {}).items():
        for task, count in tasks.items():
            if task not in merged.get(name, {}):
                raise ValueError(
                    f"no examples of task {task!r} in set {name!r}: the sets are "
                    + "; ".join(f"{n}: {', '.join(t)}" for n, t in DEFAULT_COUNTS.items())
                )
            if count < 0:
                raise ValueError(
                    f"the number of {name} {task} examples must be 0 or more, not {count}"
                )
            merged[name][task] = count
    return merged


def _items(
    seed: int,
    counts: Mapping[str, Mapping[str, int]],
    train: Augmentation,
    evaluation: Augmentation,
) -> list[Item]:
    """The audio files. The first translations share the audio of the transcriptions; only further ones are spoken."""
    items = []
    for name, tasks in counts.items():
        for task, count in tasks.items():
            first = min(tasks["asr"], count) if task == "ast" else 0
            for index in range(first, count):
                low, high = LONG_SECONDS
                target = (
                    0.0
                    if name != "test_long"
                    else high
                    if count == 1
                    else low + (high - low) * index / (count - 1)
                )
                items.append(
                    Item(seed, name, task, index, train if name == "train" else evaluation, target)
                )
    return items


def _shared_translations(
    seed: int, name: str, counts: Mapping[str, int], rows: Sequence[Row]
) -> list[Row]:
    """Translation lines over the audio of transcription lines: the same sentence is drawn, with its Korean."""
    shared = []
    for index in range(min(counts.get("ast", 0), counts["asr"])):
        drawn = sentences.example("ast", Item(seed, name, "asr", index).rng(), name)
        asr = rows[index]
        if drawn.text != asr["text"]:
            raise AssertionError(
                f"{asr['id']}: {asr['text']!r} is not the sentence translated, {drawn.text!r}"
            )
        shared.append(
            {
                **asr,
                "id": f"{name}-ast-{index:06d}",
                "task": "ast",
                "prompt": drawn.prompt,
                "answer": drawn.answer,
                "lang": drawn.lang,
            }
        )
    return shared


def _settings(
    seed: int,
    counts: Mapping[str, Mapping[str, int]],
    train: Augmentation,
    evaluation: Augmentation,
) -> dict[str, object]:
    """What the corpus is a function of, with a hash of the text generator and the voices."""
    drawn = [dataclasses.astuple(example) for example in sentences.text_examples("train", 0, 200)]
    recipe = hashlib.sha256(
        json.dumps([drawn, [v.speaker for group in voices() for v in group]]).encode()
    ).hexdigest()[:16]
    return {
        "version": VERSION,
        "recipe": recipe,
        "seed": seed,
        "counts": counts,
        "train": dataclasses.asdict(train),
        "evaluation": dataclasses.asdict(evaluation),
    }


def _write_text(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _claim(out: pathlib.Path, settings: Mapping[str, object]) -> None:
    """Records the settings in an empty folder; a folder with other settings is an error."""
    path = out / "settings.json"
    if path.exists():
        existing = json.loads(path.read_text(encoding="utf-8"))
        if existing != settings:
            different = [key for key in settings if existing.get(key) != settings[key]]
            raise ValueError(
                f"{out} holds a corpus with other settings ({', '.join(different)}): delete it or choose another --out"
            )
        return
    for folder in sentences.SPLITS:
        (out / folder).mkdir(parents=True, exist_ok=True)
    _write_text(path, json.dumps(settings, indent=1) + "\n")


def _is_complete(out: pathlib.Path, items: Sequence[Item]) -> bool:
    present = {
        f"{folder}/{name}"
        for folder in sentences.SPLITS
        if (out / folder).is_dir()
        for name in os.listdir(out / folder)
    }
    manifests = [out / TRANSCRIPTS, *(out / f"{name}.jsonl" for name in SETS)]
    return all(manifest.exists() for manifest in manifests) and all(
        item.path in present for item in items
    )


def _built(items: Sequence[Item], out: pathlib.Path, workers: int) -> Iterable[Row]:
    build = functools.partial(build_item, out=out)
    if workers == 1:
        yield from map(build, items)
        return
    with multiprocessing.get_context("spawn").Pool(
        workers
    ) as pool:  # processes: espeak-ng is not thread-safe
        yield from pool.imap(build, items, chunksize=16)


def build_corpus(
    out: str | os.PathLike[str],
    seed: int = 0,
    counts: Mapping[str, Mapping[str, int]] | None = None,
    workers: int = 2,
    train: Augmentation = Augmentation(),
    evaluation: Augmentation = CLEAN,
) -> None:
    """Builds the corpus in `out`, goes on with it, or finds it complete.

    Args:
      out: the folder.
      seed: of everything drawn.
      counts: {set: {task: examples}} over `DEFAULT_COUNTS`.
      workers: processes; the files do not depend on it.
      train: augmentation of the training set.
      evaluation: augmentation of all other sets.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}")
    out, counts = pathlib.Path(out), _merged(counts)
    items = _items(seed, counts, train, evaluation)
    _claim(out, _settings(seed, counts, train, evaluation))
    if _is_complete(out, items):
        print(f"{out}: complete, {len(items)} audio files")
        return
    espeak.check()
    rows: dict[str, dict[str, list[Row]]] = {
        name: {task: [] for task in tasks} for name, tasks in counts.items()
    }
    # Long recordings first: they take seconds each, and would keep one worker busy at the end.
    order = sorted(items, key=lambda item: -item.target_seconds)
    progress = tqdm.tqdm(
        _built(order, out, workers), total=len(items), unit="clip", desc=str(out), disable=None
    )
    for item, row in zip(order, progress, strict=True):
        rows[item.set][item.task].append(row)
    for name, tasks in rows.items():
        if "ast" in tasks:
            tasks["ast"] = (
                _shared_translations(seed, name, counts[name], tasks["asr"]) + tasks["ast"]
            )
        lines = [
            row for task in tasks.values() for row in sorted(task, key=lambda row: str(row["id"]))
        ]
        _write_manifest(out / f"{name}.jsonl", lines)
    spoken = [
        row
        for task in ("ssum", "sqqa")
        for row in sorted(rows["train"].get(task, ()), key=lambda row: str(row["id"]))
    ]
    _write_manifest(out / TRANSCRIPTS, [_transcription(row) for row in spoken])


def _transcription(row: Row) -> Row:
    """The line that asks for the words of another task's audio."""
    prompt = TASKS["asr"].instruction
    return {
        **row,
        "id": f"{row['id']}-asr",
        "task": "asr",
        "prompt": prompt,
        "answer": row["text"],
        "lang": "en",
    }


def _write_manifest(path: pathlib.Path, lines: Sequence[Row]) -> None:
    _write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))
    print(
        f"{path}: {len(lines)} examples, {sum(float(row['duration']) for row in lines) / 3600:.2f} h"
    )


def _define_flags() -> None:
    # Defined on use, not on import: other programs import this module and have flags of the same names.
    flags.DEFINE_string("out", None, "Folder of the corpus.", required=True)
    flags.DEFINE_integer("seed", 0, "Seed of everything drawn.")
    flags.DEFINE_integer("workers", 2, "Processes.", lower_bound=1)
    flags.DEFINE_integer(
        "utterances",
        DEFAULT_COUNTS["train"]["asr"],
        "Transcription examples in train.",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "dev", DEFAULT_COUNTS["dev"]["asr"], "Examples of each task in dev.", lower_bound=0
    )
    for name, task in (
        ("train", "ast"),
        ("train", "ssum"),
        ("train", "sqqa"),
        ("test", "asr"),
        ("test", "ast"),
        ("test", "ssum"),
        ("test", "sqqa"),
    ):
        flags.DEFINE_integer(
            f"{name}_{task}",
            DEFAULT_COUNTS[name][task],
            f"Examples of task {task} in {name}.",
            lower_bound=0,
        )
    for name in ("test_unseen_voices", "test_long"):
        flags.DEFINE_integer(
            name, DEFAULT_COUNTS[name]["asr"], f"Recordings in {name}.", lower_bound=0
        )
    for prefix, default in (("train", Augmentation()), ("eval", CLEAN)):
        for field in dataclasses.fields(Augmentation):
            flags.DEFINE_float(
                f"{prefix}_{field.name}",
                getattr(default, field.name),
                f"Probability of {field.name} in an utterance.",
                lower_bound=0.0,
                upper_bound=1.0,
            )


def _fail(error: Exception) -> None:
    print(f"synthetic: {error}".replace("\n", " "), file=sys.stderr)
    sys.exit(2)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1:
            raise flags.Error(
                f"unexpected argument {rest[1]!r}: every setting is a flag, --name=value"
            )
        return rest
    except flags.Error as error:
        _fail(error)


def main(_: Sequence[str]) -> None:
    values = flags.FLAGS
    counts = {
        "train": {"asr": values.utterances}
        | {task: values[f"train_{task}"].value for task in ("ast", "ssum", "sqqa")},
        "dev": dict.fromkeys(TASKS, values.dev),
        "test": {task: values[f"test_{task}"].value for task in TASKS},
        "test_unseen_voices": {"asr": values.test_unseen_voices},
        "test_long": {"asr": values.test_long},
    }
    fields = [field.name for field in dataclasses.fields(Augmentation)]
    train, evaluation = (
        Augmentation(*(values[f"{prefix}_{name}"].value for name in fields))
        for prefix in ("train", "eval")
    )
    try:
        build_corpus(values.out, values.seed, counts, values.workers, train, evaluation)
    except (ValueError, OSError, espeak.EspeakError) as error:
        _fail(error)


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=_parse)

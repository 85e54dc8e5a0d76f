"""A corpus of synthetic speech from sentences and voices: FLAC files and two manifests.

Every clip is a pure function of (recipe, index), whichever process renders it.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import random
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import soundfile

from fastslm_jax import cli, outputs, schema
from fastslm_jax.audio import SAMPLE_RATE, resample
from fastslm_jax.data.contamination import words
from fastslm_jax.errors import UserError
from fastslm_jax.synthesis import augment, no_speech
from fastslm_jax.synthesis.engines import EngineError, Voice
from fastslm_jax.synthesis.manner import Manner

VERSION = 1  # of the recipe: increment it when the same settings give different samples
SPLITS = ("train", "dev")
_MAX_FAILED = 0.02  # share of the clips that may fail
_CHUNK = 16  # clips that a worker gets at a time

Row = dict[str, object]  # a line of a manifest


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines the clips.

    Attributes:
        sentences: what is spoken; all are used about equally often.
        voices: groups are drawn with equal probability, then a voice of the group.
        seed: seed of all random draws.
        no_speech: share of clips without speech.
        dev: share of the sentences whose clips are in dev.jsonl.
        channel: augmentation.
        max_seconds: longer clips are left out.
        manner: how the sentences are spoken and recorded.
    """

    sentences: tuple[str, ...]
    voices: tuple[tuple[Voice, ...], ...]
    seed: int = 0
    no_speech: float = 0.05
    dev: float = 0.02
    channel: augment.Channel = augment.Channel()
    max_seconds: float = 30.0
    manner: Manner = Manner()

    def settings(self) -> dict[str, object]:
        """As JSON, with a hash of the sentences."""
        fields = dataclasses.asdict(self)
        if self.manner == Manner():  # corpora may be older than this field
            del fields["manner"]
        text = "\n".join(self.sentences)
        fields["sentences"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return json.loads(json.dumps({"version": VERSION, **fields}))


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip before it is rendered. Without a voice, it has no speech but a sound of `kind`."""

    recipe: Recipe
    index: int
    text: str = ""
    voice: Voice | None = None
    speed: float = 1.0
    kind: str = ""

    @property
    def name(self) -> str:
        return f"{self.recipe.seed}-{self.index:07d}"

    @property
    def path(self) -> str:
        """Relative to the folder of the corpus."""
        return f"audio/{self.index // 1000:04d}/{self.name}.flac"

    @property
    def split(self) -> str:
        """train or dev. A sentence is always in the same one."""
        key = " ".join(words(self.text)) or f"no speech/{self.name}"
        part = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
        return "dev" if part < self.recipe.dev else "train"

    def row(self, num_samples: int) -> Row:
        """The line of the manifest."""
        row = {
            "id": self.name,
            "audio_filepath": self.path,
            "duration": num_samples / SAMPLE_RATE,
            "text": self.text,
            "lang": "en",
            "speaker": self.voice.speaker if self.voice else f"no-speech-{self.kind}",
            "recording": self.name,
        }
        return row if self.voice else row | {"no_speech": True}

    def render(self) -> np.ndarray:
        """int16 samples [n] at 16 kHz.

        Raises:
            UserError: the engine cannot speak the text, or speaks too long.
        """
        rng = random.Random(f"audio/{self.recipe.seed}/{self.index}")
        if not self.voice:
            return augment.send(no_speech.draw(self.kind, rng), rng, self.recipe.channel, None)
        manner, manner_rng = self.recipe.manner, random.Random(f"manner/{self.name}")
        text = manner.say(self.text, manner_rng)
        # Spoken slower, for a higher voice of the same rate.
        samples, rate = self.voice.speak(text, self.speed * manner.rate / manner.pitch_factor)
        samples = samples.astype(np.float64)
        if manner.pitch:
            samples = augment.change_pitch(samples, manner.pitch_factor, rate)
        speech = resample(samples, rate)
        loud = np.flatnonzero(np.abs(speech) > 0.01 * np.abs(speech).max())
        speech = speech[loud[0] : loud[-1] + 1] / np.abs(speech).max()
        silences = [np.zeros(round(rng.uniform(0.05, 0.5) * SAMPLE_RATE)) for _ in range(2)]
        peak_db = rng.uniform(-25.0, -1.0)
        signal = np.concatenate([silences[0], speech, silences[1]])
        signal = manner.record(signal, manner_rng)
        samples = augment.send(signal, rng, self.recipe.channel, peak_db)
        if len(samples) > self.recipe.max_seconds * SAMPLE_RATE:
            raise EngineError(f"longer than {self.recipe.max_seconds:g} s")
        return samples


@functools.lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def plan(recipe: Recipe, index: int) -> Clip:
    """The clip of an index. Every pass over the sentences has a new order."""
    rng = random.Random(f"clip/{recipe.seed}/{index}")
    if rng.random() < recipe.no_speech:
        return Clip(recipe, index, kind=rng.choice(list(no_speech.KINDS)))
    epoch, at = divmod(index, len(recipe.sentences))
    text = recipe.sentences[_order(recipe.seed, epoch, len(recipe.sentences))[at]]
    voice = rng.choice(rng.choice(recipe.voices))
    return Clip(recipe, index, text, voice, speed=rng.uniform(0.85, 1.2))


def _build_clip(recipe: Recipe, out: pathlib.Path, index: int) -> tuple[str, Row] | str:
    """Writes a clip unless its file exists.

    Returns:
        The split and the line of the manifest, or why the clip is left out.
    """
    clip = plan(recipe, index)
    path = out / clip.path
    if path.exists():  # complete, since it got its name last
        return clip.split, clip.row(soundfile.info(path).frames)
    try:
        samples = clip.render()
    except UserError as error:
        return str(error)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    soundfile.write(temporary, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    os.replace(temporary, path)
    return clip.split, clip.row(len(samples))


_job: tuple[Recipe, pathlib.Path]  # of a worker process


def _start_worker(recipe: Recipe, out: pathlib.Path) -> None:
    global _job
    _job = recipe, out

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _build_clip_in_worker(index: int) -> tuple[str, Row] | str:
    return _build_clip(*_job, index)


def _build_all(
    recipe: Recipe, out: pathlib.Path, count: int, workers: int
) -> Iterator[tuple[str, Row] | str]:
    if workers == 1:
        yield from map(functools.partial(_build_clip, recipe, out), range(count))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (recipe, out)) as pool:
        yield from pool.imap(_build_clip_in_worker, range(count), _CHUNK)


def _claim(out: pathlib.Path, recipe: Recipe) -> None:
    """Records the settings in a new folder; a corpus with other settings is an error."""
    path, settings = out / "settings.json", recipe.settings()
    if path.exists():
        try:
            existing = schema.parse_json(path.read_bytes())
            keys = [*settings, *(existing.keys() - settings.keys())]
            changed = [key for key in keys if existing.get(key) != settings.get(key)]
        except (ValueError, AttributeError):
            raise UserError(f"{path}: is damaged; remove {out}") from None
        if changed:
            raise UserError(
                f"{out}: has a corpus with a different {', '.join(changed)}; choose another --out "
                "or remove the folder"
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: contains other files; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    outputs.write_text(path, json.dumps(settings, indent=1) + "\n")


def _try_voices(recipe: Recipe) -> None:
    """Synthesizes one word with every group: a missing engine fails before any work."""
    for group in recipe.voices:
        for voice in group if len(group) < 10 else group[:1]:
            voice.speak("hello")


def summarize(rows: Iterable[Row], failed: Iterable[str]) -> dict[str, object]:
    """Hours, clips, sentences, words, vocabulary, and clips of each engine and voice."""
    rows = list(rows)
    spoken = [words(str(row["text"])) for row in rows if row["text"]]
    speakers = collections.Counter(str(row["speaker"]) for row in rows)
    engines = collections.Counter(
        str(row["speaker"]).partition("-")[0] for row in rows if "no_speech" not in row
    )
    return {
        "clips": len(rows),
        "hours": round(sum(float(row["duration"]) for row in rows) / 3600, 2),
        "sentences": len(set(spoken)),
        "words": sum(map(len, spoken)),
        "vocabulary": len({word for sentence in spoken for word in sentence}),
        "no_speech": len(rows) - sum(engines.values()),
        "engines": dict(engines.most_common()),
        "speakers": dict(speakers.most_common()),
        "left_out": dict(collections.Counter(failed).most_common(20)),
    }


def build(recipe: Recipe, out: str | os.PathLike, count: int, workers: int = 1) -> dict:
    """Builds the corpus, or resumes an interrupted build. A larger count adds clips.

    Args:
        recipe: what determines the clips.
        out: output folder.
        count: number of clips.
        workers: number of processes; the files do not depend on it.

    Returns:
        The summary, which is also in OUT/summary.json.

    Raises:
        UserError: the folder has a corpus with other settings, an engine does not work, or more
            than 2 % of the clips failed.
    """
    out = pathlib.Path(out)
    _claim(out, recipe)
    _try_voices(recipe)
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    failed: list[str] = []
    built = _build_all(recipe, out, count, workers)
    for result in cli.Bar(built, str(out), count, unit="clip"):
        if isinstance(result, str):
            failed.append(result)
        else:
            rows[result[0]].append(result[1])
    too_long = f"longer than {recipe.max_seconds:g} s"
    errors = [reason for reason in failed if reason != too_long]
    if len(errors) > _MAX_FAILED * count or len(failed) == count:
        raise UserError(
            f"{out}: {len(failed)} of {count} clips could not be made (first: {failed[0]})"
        )
    for split, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        outputs.write_text(out / f"{split}.jsonl", text)
    summary = summarize([row for split in SPLITS for row in rows[split]], failed)
    summary |= {split: len(rows[split]) for split in SPLITS}
    outputs.write_text(
        out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    )
    return summary

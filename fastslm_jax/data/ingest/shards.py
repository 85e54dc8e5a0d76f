"""Imports a corpus: decoded, resampled, checked, and written as shards with an index (see `data.store`).

    python -m fastslm_jax.data.ingest jsonl:corpus/train.jsonl --out=imported/train [--tokenizer=assets/demo_llm] [--workers=8]

SOURCE is jsonl:FILE, librispeech:FOLDER, tfds:NAME/CONFIG[:SPLIT] or hf:NAME/CONFIG[:SPLIT] (docs/data.md).

A shard is a pure function of (source, settings, its number): any number of processes, here or in a Beam pipeline (--runner),
writes the same bytes, and a run that was killed goes on with the shards that it lacks. Bad data never stops a run half-way: every
line that cannot be used stands in rejected.jsonl, and too many of them fail the import at its end.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator

from absl import flags
from tqdm import tqdm

from fastslm_jax.audio import SAMPLE_RATE, WindowSpec
from fastslm_jax.data import prompts
from fastslm_jax.data.ingest import sources, store
from fastslm_jax.data.ingest.decoding import Rejected
from fastslm_jax.errors import UserError

FLAGS = flags.FLAGS
VERSION = 1  # of the transform: raise it when the same source gives other shards


@dataclasses.dataclass(frozen=True)
class Settings:
    """What shards depend on beside the source."""

    shard_clips: int = 512
    window_seconds: float = 30.0
    tokenizer: str = ""  # a folder or name; empty: text tokens are not counted
    duration_tolerance: float = 0.1  # seconds
    min_chars_per_second: float = 0.2
    max_chars_per_second: float = 40.0

    @property
    def window(self) -> WindowSpec:
        return WindowSpec(frames=round(100 * self.window_seconds))


@dataclasses.dataclass(frozen=True)
class ImportJob:
    """All that a process needs to make a shard."""

    source: sources.CorpusSource
    settings: Settings
    out: pathlib.Path

    def num_shards(self) -> int:
        return -(-len(self.source) // self.settings.shard_clips)

    def shard(self, number: int) -> pathlib.Path:
        return self.out / f"shard-{number:05d}.array_record"

    def part(self, number: int) -> pathlib.Path:
        """Index lines and rejections of a shard; written after it, so it says that the shard is done."""
        return self.out / "parts" / f"{number:05d}.json"


# ------------------------------------------------------------------------------------------------------------- one shard


@functools.cache
def _encoder(tokenizer: str) -> prompts.PromptTokenizer | None:
    if not tokenizer:
        return None
    from fastslm_jax.weights import pretrained

    return prompts.PromptTokenizer(
        prompts.load_tokenizer(pretrained.resolve(tokenizer, weights=False))
    )


def _check_text(text: str, answer: str, task: str, seconds: float, settings: Settings) -> None:
    if not answer.strip() or (task == "asr" and not text.strip()):
        raise Rejected("empty_text", "the text is empty")
    rate = len(text.strip()) / seconds
    if text.strip() and not settings.min_chars_per_second <= rate <= settings.max_chars_per_second:
        raise Rejected(
            "text_rate",
            f"{rate:.2f} characters of text a second, possible are {settings.min_chars_per_second} to "
            f"{settings.max_chars_per_second}",
        )


def clip(entry: sources.Entry, settings: Settings) -> tuple[dict, bytes]:
    """An entry → its index line (without its place) and its record.

    Raises:
        Rejected: it cannot be used.
    """
    u, samples = entry.utterance, entry.samples(settings.duration_tolerance)
    seconds = len(samples) / SAMPLE_RATE
    _check_text(u.text, u.answer, u.task, seconds, settings)
    encoder = _encoder(settings.tokenizer)
    line = {
        "id": u.id,
        "offset": u.offset,
        "seconds": seconds,
        "windows": settings.window.count(len(samples)),
        "text_tokens": encoder.answer_length(u.answer) if encoder else None,
        "joined_tokens": encoder.answer_length(f" {u.answer}") if encoder else None,
        "task": u.task,
        "lang": u.lang,
        "speaker": u.speaker,
        "recording": u.recording,
        "text": u.text,
        "prompt": u.instruction,
        "answer": u.answer,
        "segments": [dataclasses.asdict(segment) for segment in u.segments],
    }
    return line, store.encode({key: line[key] for key in ("id", "task", "text", "answer")}, samples)


def make_shard(job: ImportJob, number: int) -> None:
    """Writes a shard, then its part. Nothing is written where no entry can be used but the part that says so."""
    lines, rejected, shard = [], [], job.shard(number)

    def records() -> Iterator[bytes]:
        first = number * job.settings.shard_clips
        for at in range(first, min(first + job.settings.shard_clips, len(job.source))):
            known = {"at": at, "id": ""}
            try:
                entry = job.source.entry(at)
                known |= {"id": entry.utterance.id, "audio": os.path.basename(entry.utterance.path)}
                line, record = clip(entry, job.settings)
            except Rejected as rejection:
                rejected.append(known | {"kind": rejection.kind, "reason": rejection.reason})
                continue
            except UserError:
                raise
            except (
                OSError,
                ValueError,
                OverflowError,
                RuntimeError,
            ) as error:  # no permission, an offset of 1e308, …
                rejected.append(
                    known | {"kind": "unreadable", "reason": f"{type(error).__name__}: {error}"}
                )
                continue
            lines.append({"at": at, **line, "shard": shard.name, "record": len(lines)})
            yield record

    store.write_shard(shard, records())
    store.write_text(
        job.part(number), [json.dumps({"clips": lines, "rejected": rejected}, ensure_ascii=False)]
    )


# -------------------------------------------------------------------------------------------------------------- all shards

_job: ImportJob  # of a worker process


def _start_worker(job: ImportJob) -> None:
    global _job
    _job = job

    def end_with_parent():  # a killed import leaves nobody behind who writes beside the next one
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _make(number: int) -> int:
    make_shard(_job, number)
    return number


def run_processes(job: ImportJob, numbers: Iterable[int], workers: int) -> Iterator[int]:
    """Makes shards, in this process or in several; yields their numbers as they are done."""
    if workers == 1:
        for number in numbers:
            make_shard(job, number)
            yield number
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job,)) as pool:
        done = (
            future.result()
            for future in concurrent.futures.as_completed([pool.submit(_make, n) for n in numbers])
        )
        yield from done


def _claim(job: ImportJob, spec: str) -> dict:
    """Records the settings in an empty folder; a folder with others is an error. Returns them."""
    encoder = _encoder(job.settings.tokenizer)
    settings = {
        "version": VERSION,
        "source": spec.partition(":")[0],
        "fingerprint": job.source.fingerprint(),
    }
    settings |= dataclasses.asdict(job.settings) | {
        "tokenizer": encoder.fingerprint() if encoder else None
    }
    path = job.out / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise UserError(
                f"{job.out}: holds an import with another {', '.join(changed)}; name another --out, or remove it"
            )
    elif job.out.is_dir() and any(job.out.iterdir()):
        raise UserError(f"{job.out}: holds other files; name another --out")
    (job.out / "parts").mkdir(parents=True, exist_ok=True)
    for stale in [*job.out.glob("*.tmp"), *job.out.glob("parts/*.tmp")]:
        stale.unlink()
    store.write_text(path, [json.dumps(settings, indent=1) + "\n"])
    return settings


def _merge(job: ImportJob, settings: dict) -> dict:
    """Parts → index.jsonl and rejected.jsonl. Returns what dataset.json is to say."""
    seen: dict[str, int] = {}
    rejections: list[dict] = []
    shards, seconds, windows = set(), 0.0, 0

    def index() -> Iterator[str]:
        nonlocal seconds, windows
        for number in range(job.num_shards()):
            part = json.loads(job.part(number).read_text(encoding="utf-8"))
            rejected = part["rejected"]
            for line in part["clips"]:
                at = line.pop("at")
                if line["id"] in seen:
                    file, first = job.source.place(seen[line["id"]])
                    reason = f"the id is that of {file}:{first}"
                    rejected.append(
                        {"at": at, "id": line["id"], "kind": "duplicate_id", "reason": reason}
                    )
                    continue
                seen[line["id"]] = at
                shards.add(line["shard"])
                seconds, windows = seconds + line["seconds"], windows + line["windows"]
                yield json.dumps(line, ensure_ascii=False) + "\n"
            rejections.extend(sorted(rejected, key=lambda line: line["at"]))

    store.write_text(job.out / store.INDEX, index())
    lines = [
        dict(zip(("file", "line"), job.source.place(line.pop("at")), strict=True)) | line
        for line in rejections
    ]
    store.write_text(
        job.out / store.REJECTED, [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    )
    kinds = dict(collections.Counter(line["kind"] for line in rejections).most_common())
    totals = {
        "clips": len(seen),
        "seconds": round(seconds, 3),
        "windows": windows,
        "rejected": kinds,
        "shards": sorted(shards),
    }
    return settings | totals


def _summary(out: pathlib.Path, dataset: dict) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in dataset["rejected"].items())
    rejected = sum(dataset["rejected"].values())
    text = f"{out}: {dataset['clips']} clips, {dataset['seconds'] / 3600:.2f} h, {len(dataset['shards'])} shards"
    return text + (
        f"; {rejected} rejected ({kinds}), see {out / store.REJECTED}"
        if rejected
        else "; none rejected"
    )


def import_corpus(
    spec: str,
    out: str | os.PathLike,
    settings: Settings = Settings(),
    *,
    max_reject_fraction: float = 0.01,
    run: Callable[[ImportJob, Iterable[int]], Iterable[int]] = functools.partial(
        run_processes, workers=1
    ),
    data_dir: str | None = None,
    lang: str = "",
) -> dict:
    """Imports a source into the folder `out`, or goes on with it. Returns dataset.json.

    Args:
        max_reject_fraction: of the source's entries.
        run: makes the shards of the given numbers, and yields a number when its shard is done.
        data_dir: where TensorFlow Datasets lie.
        lang: language of a tfds or hf data set; "": what its rows say, or English.

    Raises:
        UserError: the source or the folder cannot be used, or too many entries were rejected.
    """
    source, out = sources.open_source(spec, data_dir, lang), pathlib.Path(out)
    job = ImportJob(source, settings, out)
    if not len(source):
        raise UserError(f"{spec}: holds no entries")
    claimed = _claim(job, spec)
    if (out / store.DATASET).exists():
        return store.description(out)
    todo = [number for number in range(job.num_shards()) if not job.part(number).exists()]
    done = job.num_shards() - len(todo)
    size = settings.shard_clips
    with tqdm(
        total=len(source),
        initial=min(done * size, len(source)),
        unit="clip",
        desc=str(out),
        mininterval=1,
    ) as bar:
        for number in run(job, todo):
            bar.update(min(size, len(source) - number * size))
    dataset = _merge(job, claimed)
    rejected = sum(dataset["rejected"].values())
    if rejected > max_reject_fraction * len(source) or not dataset["clips"]:
        for number in range(
            job.num_shards()
        ):  # what is mended is read again when the same command is run again
            if json.loads(job.part(number).read_text(encoding="utf-8"))["rejected"]:
                job.part(number).unlink()
        raise UserError(
            f"{_summary(out, dataset)}: that is {rejected / len(source):.1%} of {len(source)}, allowed is "
            f"{max_reject_fraction:.1%}; mend them or raise --max_reject_fraction, and run again"
        )
    store.write_text(out / store.DATASET, [json.dumps(dataset, indent=1) + "\n"])
    shutil.rmtree(out / "parts")
    return dataset


def define_flags() -> None:
    default = Settings()
    flags.DEFINE_string("out", None, "Folder of the import.", required=True)
    flags.DEFINE_integer("workers", os.cpu_count(), "Processes.", lower_bound=1)
    flags.DEFINE_float(
        "max_reject_fraction",
        0.01,
        "Above this fraction of rejected entries the import fails.",
        0.0,
        1.0,
    )
    flags.DEFINE_string(
        "tokenizer", "", "Language model's folder or name: text tokens are counted in the index."
    )
    flags.DEFINE_float(
        "window_seconds", default.window_seconds, "Length of the encoder's window.", lower_bound=1.0
    )
    flags.DEFINE_integer(
        "shard_clips", default.shard_clips, "Entries of the source to a shard.", lower_bound=1
    )
    flags.DEFINE_float(
        "duration_tolerance",
        default.duration_tolerance,
        "Seconds that a file may differ.",
        lower_bound=0.0,
    )
    flags.DEFINE_float(
        "min_chars_per_second",
        default.min_chars_per_second,
        "Text rate below which a clip is rejected.",
    )
    flags.DEFINE_float(
        "max_chars_per_second",
        default.max_chars_per_second,
        "Text rate above which a clip is rejected.",
    )
    flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets lie (default: its own).")
    flags.DEFINE_string(
        "lang",
        "",
        "Language of a tfds: or hf: data set (en, ko, …); by default what its rows say, or en.",
    )
    flags.DEFINE_string(
        "runner",
        "",
        "Runs as an Apache Beam pipeline: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner.",
    )
    flags.DEFINE_multi_string(
        "beam_option",
        [],
        "An option of the pipeline, for example --beam_option=--region=europe-west4.",
    )


def main(argv) -> None:
    if len(argv) != 2:
        raise UserError(
            "one SOURCE is needed: jsonl:FILE, librispeech:FOLDER, tfds:NAME/CONFIG[:SPLIT] or hf:NAME[:SPLIT]"
        )
    settings = Settings(
        **{field.name: FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    )
    run = functools.partial(run_processes, workers=FLAGS.workers)
    if FLAGS.runner:
        from fastslm_jax.data.ingest import beam

        run = functools.partial(beam.run, runner=FLAGS.runner, options=FLAGS.beam_option)
    dataset = import_corpus(
        argv[1], FLAGS.out, settings, max_reject_fraction=FLAGS.max_reject_fraction, run=run, data_dir=FLAGS.data_dir,
        lang=FLAGS.lang,
    )  # fmt: skip
    print(_summary(pathlib.Path(FLAGS.out), dataset))

"""Import of a whole corpus: all shards, the merged index, and the list of rejected clips.

An interrupted import resumes with the missing shards. Bad data never interrupts an import: every
rejected clip is listed in rejected.jsonl, and too many of them fail the import at the end.
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
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from fastslm_jax import schema
from fastslm_jax.data import languages
from fastslm_jax.data.ingest import sources, store
from fastslm_jax.data.ingest.shards import VERSION, ImportJob, Settings, make_shard
from fastslm_jax.data.manifest import Segment, do_not_cover
from fastslm_jax.errors import UserError

_job: ImportJob  # of a worker process


def _start_worker(job: ImportJob) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the import, which ends its workers

    def exit_with_parent() -> None:
        # Workers of a killed import must not write next to those of the resumed one.
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _make_shard_in_worker(number: int) -> int:
    make_shard(_job, number)
    return number


def run_processes(job: ImportJob, numbers: Iterable[int], workers: int) -> Iterator[int]:
    """Writes shards in this process or in worker processes.

    Yields:
        The number of every shard when it is finished.
    """
    if workers == 1:
        for number in numbers:
            make_shard(job, number)
            yield number
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job,)) as pool:
        futures = [pool.submit(_make_shard_in_worker, number) for number in numbers]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()


class _Settings(schema.Schema):
    """settings.json: every value is compared with those of the command."""


class _Part(schema.Schema):
    """The index lines and rejections of a shard."""

    clips: list[dict]
    rejected: list[dict]


def _claim_folder(job: ImportJob, spec: str) -> dict:
    """Creates the folder, or checks that it has an import with the same settings.

    Returns:
        The settings as JSON.
    """
    tokenizer = job.settings.prompt_tokenizer()
    settings = {
        "version": VERSION,
        "source": spec.partition(":")[0],
        "fingerprint": job.source.fingerprint(),
        **dataclasses.asdict(job.settings),
        "tokenizer": tokenizer.fingerprint() if tokenizer else None,
    }
    path = job.out / "settings.json"
    if path.exists():
        previous = store.read_json(path, _Settings)
        changed = [key for key in settings if previous.get(key) != settings[key]]
        if changed:
            raise UserError(
                f"{job.out}: contains an import with a different {', '.join(changed)}; choose "
                "another --out, or remove the folder"
            )
    elif job.out.is_dir() and any(job.out.iterdir()):
        raise UserError(f"{job.out}: contains other files; choose another --out")
    (job.out / "parts").mkdir(parents=True, exist_ok=True)
    for stale in [*job.out.glob("*.tmp"), *job.out.glob("parts/*.tmp")]:
        stale.unlink()
    with store.atomic_writer(path) as file:
        file.write(json.dumps(settings, indent=1) + "\n")
    return settings


def _read_part(job: ImportJob, number: int) -> dict:
    return store.read_json(job.part(number), _Part)


def _write_index(job: ImportJob) -> tuple[dict, list[dict]]:
    """Merges the parts into index.jsonl.

    Returns:
        Totals of the accepted clips, and all rejections in the source's order.
    """
    first_use: dict[str, int] = {}  # id → entry
    rejections: list[dict] = []
    shards, seconds, windows, uncovered = set(), 0.0, 0, 0
    with store.atomic_writer(job.out / store.INDEX) as file:
        for number in range(job.num_shards()):
            part = _read_part(job, number)
            rejected = part["rejected"]
            for line in part["clips"]:
                at, name = line.pop("at"), line["id"]
                if name in first_use:
                    reason = "the id is already used at {}:{}".format(
                        *job.source.place(first_use[name])
                    )
                    rejected.append(
                        {"at": at, "id": name, "kind": "duplicate_id", "reason": reason}
                    )
                    continue
                first_use[name] = at
                shards.add(line["shard"])
                seconds, windows = seconds + line["seconds"], windows + line["windows"]
                segments = [Segment(**segment) for segment in line["segments"]]
                uncovered += do_not_cover(line["text"], line["seconds"], segments)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            rejections += sorted(rejected, key=lambda line: line["at"])
    totals = {
        "clips": len(first_use),
        "seconds": round(seconds, 3),
        "windows": windows,
        "rejected": dict(collections.Counter(line["kind"] for line in rejections).most_common()),
        "uncovered": uncovered,
        "shards": sorted(shards),
        "index_sha256": store.checksum(job.out / store.INDEX),
    }
    return totals, rejections


def _write_rejections(job: ImportJob, rejections: list[dict]) -> None:
    with store.atomic_writer(job.out / store.REJECTED) as out:
        for rejection in rejections:
            file, line = job.source.place(rejection.pop("at"))
            rejection = {"file": file, "line": line} | rejection
            out.write(json.dumps(rejection, ensure_ascii=False) + "\n")


def summary(out: str | os.PathLike, dataset: dict) -> str:
    """One line about a finished import, from the content of its dataset.json."""
    out = pathlib.Path(out)
    kinds = ", ".join(f"{count} {kind}" for kind, count in dataset["rejected"].items())
    text = (
        f"{out}: {dataset['clips']} clips, {dataset['seconds'] / 3600:.2f} h, "
        f"{len(dataset['shards'])} shards; "
    )
    if count := dataset.get("uncovered"):
        text += f"{count} have segments that do not cover them; "
    if not kinds:
        return text + "none rejected"
    return (
        text + f"{sum(dataset['rejected'].values())} rejected ({kinds}), see {out / store.REJECTED}"
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
    """Imports a source into a folder, or resumes an import.

    Args:
        spec: the source; see `sources.open_source`.
        out: the folder.
        settings: settings of the shards.
        max_reject_fraction: largest accepted fraction of rejected entries.
        run: writes the shards with the given numbers and yields the number of every finished one.
        data_dir: folder of TensorFlow Datasets (None: its default).
        lang: language of a tfds or hf dataset ("": the row's own field, or English).

    Returns:
        The content of dataset.json.

    Raises:
        UserError: the source or the folder cannot be used, or too many entries were rejected.
    """
    try:
        lang = languages.parse(lang) if lang else ""
    except ValueError as error:
        raise UserError(f"--lang={lang}: {error}") from None
    source, out = sources.open_source(spec, data_dir, lang), pathlib.Path(out)
    job = ImportJob(source, settings, out)
    if not len(source):
        raise UserError(f"{spec}: has no entries")
    claimed = _claim_folder(job, spec)
    if (out / store.DATASET).exists():
        return store.description(out)
    todo = [number for number in range(job.num_shards()) if not job.part(number).exists()]
    size = settings.shard_clips
    done = min((job.num_shards() - len(todo)) * size, len(source))
    with tqdm(total=len(source), initial=done, unit="clip", desc=str(out), mininterval=1) as bar:
        for number in run(job, todo):
            bar.update(min(size, len(source) - number * size))
    totals, rejections = _write_index(job)
    _write_rejections(job, rejections)
    dataset = claimed | totals
    if len(rejections) > max_reject_fraction * len(source) or not dataset["clips"]:
        for number in range(job.num_shards()):  # convert these again when the command is repeated
            if _read_part(job, number)["rejected"]:
                job.part(number).unlink()
        raise UserError(
            f"{summary(out, dataset)}: {len(rejections) / len(source):.1%} of {len(source)} "
            f"entries, more than the allowed {max_reject_fraction:.1%}; fix them or raise "
            "--max_reject_fraction, and run the same command again"
        )
    with store.atomic_writer(out / store.DATASET) as file:
        file.write(json.dumps(dataset, indent=1) + "\n")
    shutil.rmtree(out / "parts")
    return dataset

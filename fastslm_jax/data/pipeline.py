"""The feed: a global row number in, the row's arrays out; batches of rows through Grain.

`Rows` knows, for every row number from 0 to infinity, which examples stand in it: a pure function of (manifests, seed). The
position in the data is therefore one integer, on any number of processes and workers.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from fastslm_jax import audio
from fastslm_jax.data import longform, packing
from fastslm_jax.data.manifest import Utterance, read_clip, read_manifest
from fastslm_jax.data.prompts import PromptEncoder
from fastslm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """A manifest (some tasks of it) with its share of the mixture; `join` makes long-form recordings of its clips."""

    path: str
    tasks: tuple[str, ...] = ()
    weight: float = 1.0
    join: longform.LongForm | None = None


class Rows:
    """Random access to packed rows.

    Args:
        sources: what to mix. An epoch has as many examples as all sources together, each source its share by weight; a source's
            examples go on in the next epoch where they stopped, and begin anew, in another order, when all were seen.
        shape: slots of a row.
        spec: how audio is cut.
        tokens_per_window: speech tokens of a window.
        encoder: prompts and answers to ids.
        seed: of everything drawn.
    """

    def __init__(
        self, sources: Sequence[Source], shape: packing.RowShape, spec: audio.WindowSpec, tokens_per_window: int,
        encoder: PromptEncoder, seed: int,
    ):  # fmt: skip
        self.sources, self.shape, self.spec = tuple(sources), shape, spec
        self.tokens_per_window, self.encoder, self.seed = tokens_per_window, encoder, seed
        self.indices = [read_manifest(os.path.expanduser(source.path), source.tasks) for source in sources]
        for source, index in zip(sources, self.indices, strict=True):
            tasks = sorted({utterance.task for utterance in index})
            if source.join and len(tasks) > 1:
                raise UserError(
                    f"{source.path}: clips of {', '.join(tasks)} cannot be joined; name one of them in the source's tasks"
                )
        self._answer_lengths = [[len(encoder.answer_ids(u.answer)) for u in index] for index in self.indices]
        self._epochs: dict[int, tuple[list[longform.Example], list[list[int]]]] = {}

    # ---- the plan

    def _passes(self, source: int, number: int) -> list[longform.Example]:
        """Every clip of a source once: pass `number` over it."""
        rng = np.random.default_rng((self.seed, source, number))
        join = self.sources[source].join
        if join is None:
            return longform.single_examples(source, len(self.indices[source]), rng)
        return longform.joined_examples(source, self.indices[source], join, rng)

    def _examples(self, epoch: int) -> list[longform.Example]:
        """The examples of an epoch in the order in which they are packed."""
        first = [self._passes(source, 0) for source in range(len(self.sources))]
        total, total_weight = sum(len(examples) for examples in first), sum(source.weight for source in self.sources)
        drawn = []
        for number, source in enumerate(self.sources):
            share = max(1, round(total * source.weight / total_weight))
            start, stream, passed = epoch * share, [], 0
            while len(stream) < start + share:  # passes differ in length when clips are joined
                stream += first[number] if passed == 0 else self._passes(number, passed)
                passed += 1
            drawn += stream[start : start + share]
        order = np.random.default_rng((self.seed, epoch, 7)).permutation(len(drawn))
        return [drawn[i] for i in order]

    def size(self, example: longform.Example) -> packing.Size:
        """What an example takes of a row, from metadata alone."""
        index = self.indices[example.source]
        utterance = index[example.clips[0]]
        samples = sum(index[clip].num_samples for clip in example.clips) + sum(example.gaps)
        windows = self.spec.count(samples)
        if len(example.clips) == 1:
            labels = self._answer_lengths[example.source][example.clips[0]]
        else:
            labels = len(self.encoder.answer_ids(self.answer(example)))
        prompt = len(self.encoder.prompt_ids(utterance.task, utterance.instruction)) - 1
        return packing.Size(windows, prompt + windows * self.tokens_per_window + labels, labels)

    def _epoch(self, epoch: int) -> tuple[list[longform.Example], list[list[int]]]:
        if epoch not in self._epochs:  # threads that read may plan an epoch twice: it is the same plan
            examples = self._examples(epoch)
            sizes = [self.size(example) for example in examples]
            for example, size in zip(examples, sizes, strict=True):
                if not size.fits(self.shape):
                    first = self.indices[example.source][example.clips[0]]
                    raise packing.PackingError(
                        f"{first.id} ({len(example.clips)} clips) takes {size.windows} windows, {size.tokens} tokens and "
                        f"{size.labels} labels; a row has {self.shape.windows}, {self.shape.tokens} and {self.shape.labels}: "
                        "raise config.data.row"
                    )
            rows = packing.pack(sizes, self.shape)
            order = np.random.default_rng((self.seed, epoch, 8)).permutation(len(rows))
            self._epochs[epoch] = (examples, [rows[i] for i in order])
        return self._epochs[epoch]

    def examples(self, row: int) -> list[longform.Example]:
        """The examples of a global row number."""
        epoch = 0
        while row >= len(self._epoch(epoch)[1]):
            row -= len(self._epoch(epoch)[1])
            epoch += 1
        examples, rows = self._epoch(epoch)
        return [examples[i] for i in rows[row]]

    # ---- the row

    def utterances(self, example: longform.Example) -> list[Utterance]:
        return [self.indices[example.source][clip] for clip in example.clips]

    def answer(self, example: longform.Example) -> str:
        return " ".join(utterance.answer for utterance in self.utterances(example))

    def samples(self, example: longform.Example) -> np.ndarray:
        """The example's recording, int16."""
        pieces = []
        for utterance, gap in zip(self.utterances(example), example.gaps, strict=True):
            pieces += [np.zeros(gap, np.int16), read_clip(utterance)]
        return np.concatenate(pieces)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        parts = []
        for example in self.examples(row):
            utterance, samples = self.utterances(example)[0], self.samples(example)
            num_speech = self.spec.count(len(samples)) * self.tokens_per_window
            parts.append((self.encoder.encode(utterance.task, utterance.instruction, self.answer(example), num_speech), samples))
        return packing.assemble(parts, self.shape, self.spec, self.tokens_per_window)


class _Batches:
    """Grain's random-access source: item `step` is this process's part of the global batch of that step."""

    def __init__(self, rows: Rows, global_rows: int, process_index: int, process_count: int):
        self.rows, self.global_rows = rows, global_rows
        self.local_rows = global_rows // process_count
        self.first = process_index * self.local_rows

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        start = int(step) * self.global_rows + self.first
        rows = [self.rows[start + i] for i in range(self.local_rows)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(
    rows: Rows,
    global_rows: int,
    *,
    start_row: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of this process, from a global row on.

    Args:
        global_rows: rows of a batch over all processes.
        workers: worker processes (0: threads of this one).
        prefetch: batches made ahead.
    """
    if global_rows % process_count or start_row % global_rows:
        raise ValueError(f"{global_rows} rows a batch from row {start_row} do not divide over {process_count} processes")
    dataset = grain.MapDataset.source(_Batches(rows, global_rows, process_index, process_count))[start_row // global_rows :]
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0 if workers else 2, prefetch_buffer_size=prefetch))
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch))
    return iter(dataset)

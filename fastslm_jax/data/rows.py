"""The feed: a global row number in, the row's arrays out; batches of rows through Grain.

`PackedRows` knows, for every row number from 0 to infinity, which examples stand in it: a pure function of (manifests, seed). The
position in the data is therefore one integer, on any number of processes and workers.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import numpy as np

from fastslm_jax import audio
from fastslm_jax.data import longform, packing, semantic
from fastslm_jax.data.manifest import Segment, Utterance, counted_by, read_clip, read_manifest
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.errors import UserError

_KEPT_EPOCHS = (
    2  # plans in memory: rows near an epoch's end are asked for together with the next one's
)


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """A manifest or imported folder (some tasks of it) with its share of the mixture; `join`: recordings made of its clips."""

    path: str
    tasks: tuple[str, ...] = ()
    weight: float = 1.0
    join: longform.LongForm | None = None


class PackedRows:
    """Random access to packed rows.

    Args:
        sources: what to mix. An epoch has as many examples as all sources together, each source its share by weight; a source's
            examples go on in the next epoch where they stopped, and begin anew, in another order, when all were seen.
        shape: slots of a row.
        spec: how audio is cut.
        tokens_per_window: speech tokens of a window.
        encoder: prompts and answers to ids.
        seed: of everything drawn.

    Raises:
        PackingError: a clip that alone takes more than a row, and has no segments at which to split it.
    """

    def __init__(
        self, sources: Sequence[MixtureSource], shape: packing.RowShape, spec: audio.WindowSpec, tokens_per_window: int,
        encoder: PromptTokenizer, seed: int,
    ):  # fmt: skip
        self.sources, self.shape, self.spec = tuple(sources), shape, spec
        self.tokens_per_window, self.encoder, self.seed = tokens_per_window, encoder, seed
        self.indices = [self._read(source) for source in sources]
        # Of all clips, one source after another: samples, tokens of the prompt, of the answer alone and after another answer.
        clips = [utterance for index in self.indices for utterance in index]
        self._first_clip = np.cumsum([0] + [len(index) for index in self.indices])
        self._samples = np.array([utterance.num_samples for utterance in clips], np.int64)
        self._prompts = np.array(
            [len(encoder.prompt_ids(u.task, u.instruction)) for u in clips], np.int64
        )
        self._answers = self._answer_tokens(clips, "text_tokens", "")
        self._joined = (
            self._answer_tokens(clips, "joined_tokens", " ")
            if any(s.join for s in sources)
            else self._answers
        )
        self._check(clips)
        self._vectors = [
            semantic.vectors([utterance.text for utterance in index])
            if s.join and s.join.grouping == "semantic"
            else None
            for s, index in zip(self.sources, self.indices, strict=True)
        ]
        self._pass_lengths: list[list[int]] = [
            [] for _ in sources
        ]  # examples of every pass that was made
        self._last_pass: dict[int, tuple[int, list[longform.Example]]] = {}
        self._epoch_lengths: list[int] = []  # rows of every epoch that was planned
        self._epochs: dict[
            int, tuple[list[longform.Example], list[list[int]]]
        ] = {}  # the plans in use, _KEPT_EPOCHS at most
        self._lock = threading.Lock()

    def __getstate__(self):
        return {
            name: value for name, value in self.__dict__.items() if name != "_lock"
        }  # a worker makes its own

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def _read(self, source: MixtureSource) -> list[Utterance]:
        """The source's clips. Those longer than a row are split at their segments' boundaries; one without is an error."""
        path = os.path.expanduser(source.path)
        index = read_manifest(path, source.tasks)
        tasks = sorted({utterance.task for utterance in index})
        if source.join and len(tasks) > 1:
            raise UserError(
                f"{source.path}: clips of {', '.join(tasks)} cannot be joined; name one of them in the source's tasks"
            )
        if counted_by(path) != self.encoder.fingerprint():
            index = [
                dataclasses.replace(u, text_tokens=None, joined_tokens=None) if u.text_tokens else u
                for u in index
            ]

        def fits(u: Utterance) -> bool:
            prompt = len(self.encoder.prompt_ids(u.task, u.instruction))
            return self._size(u.num_samples, prompt, self.encoder.answer_length(u.answer)).fits(
                self.shape
            )

        short = []
        for utterance in index:  # only what has segments can be split; what is too large without is named when it is packed
            is_long = bool(utterance.segments) and not fits(utterance)
            short += (is_long and longform.split(utterance, fits)) or [utterance]
        return short

    def _answer_tokens(self, clips: Sequence[Utterance], name: str, before: str) -> np.ndarray:
        """Tokens of every answer, as an import counted them, or counted now."""
        known = [getattr(utterance, name) for utterance in clips]
        unknown = [i for i, count in enumerate(known) if count is None]
        for i, count in zip(
            unknown,
            self.encoder.answer_lengths([before + clips[i].answer for i in unknown]),
            strict=True,
        ):
            known[i] = count
        return np.array(known, np.int64)

    def _check(self, clips: Sequence[Utterance]) -> None:
        """Every clip must fit a row before training starts, not when an epoch comes to it."""
        alone = [
            longform.Example(source, (clip,))
            for source, index in enumerate(self.indices)
            for clip in range(len(index))
        ]
        sizes = self.sizes(alone)
        too_large = np.flatnonzero((sizes > dataclasses.astuple(self.shape)).any(axis=1))
        if len(too_large):
            windows, tokens, labels = sizes[too_large[0]].tolist()
            raise packing.PackingError(
                f"{clips[too_large[0]].id} takes {windows} windows, {tokens} tokens and {labels} labels; a row has "
                f"{self.shape.windows}, {self.shape.tokens} and {self.shape.labels} ({len(too_large)} of {len(clips)} clips fit "
                "no row): raise config.data.row"
            )

    # ---- the plan

    def _pass(self, source: int, number: int) -> list[longform.Example]:
        """Every clip of a source once: pass `number` over it. The last one is kept: the next epoch goes on in it."""
        if self._last_pass.get(source, (None,))[0] != number:
            self._last_pass[source] = (number, self._make_pass(source, number))
        return self._last_pass[source][1]

    def _make_pass(self, source: int, number: int) -> list[longform.Example]:
        rng, join = np.random.default_rng((self.seed, source, number)), self.sources[source].join
        if join is None:
            return longform.single_examples(source, len(self.indices[source]), rng)
        clips = slice(self._first_clip[source], self._first_clip[source + 1])
        prompts, tokens = (
            self._prompts[clips].tolist(),
            np.maximum(self._answers[clips], self._joined[clips]).tolist(),
        )

        def takes(first: int, samples: int, tokens: int) -> bool:
            return self._size(samples, prompts[first], tokens).fits(self.shape)

        return longform.joined_examples(
            source,
            self.indices[source],
            join,
            rng,
            tokens=tokens,
            takes=takes,
            vectors=self._vectors[source],
        )

    def _size(self, samples: int, prompt: int, answer: int) -> packing.Size:
        windows = self.spec.count(
            samples
        )  # the prompt's <|AUDIO|> gives way to the speech tokens; the answer has an end
        return packing.Size(
            windows, prompt - 1 + windows * self.tokens_per_window + answer + 1, answer + 1
        )

    def _draw(self, source: int, start: int, count: int) -> list[longform.Example]:
        """Examples `start` to `start + count` of a source's endless passes. Passes differ in length when clips are joined."""
        drawn, number, lengths = [], 0, self._pass_lengths[source]
        while len(drawn) < count:
            if number < len(lengths) and start >= lengths[number]:
                start -= lengths[number]  # a pass that lies behind: its length is known
            else:
                examples = self._pass(source, number)
                if number == len(lengths):
                    lengths.append(len(examples))
                drawn += examples[start : start + count - len(drawn)]
                start = max(0, start - len(examples))
            number += 1
        return drawn

    def _examples(self, epoch: int) -> list[longform.Example]:
        """The examples of an epoch in the order in which they are packed."""
        for source, lengths in enumerate(self._pass_lengths):
            if not lengths:
                lengths.append(len(self._pass(source, 0)))
        total, total_weight = (
            sum(lengths[0] for lengths in self._pass_lengths),
            sum(source.weight for source in self.sources),
        )
        drawn = []
        for number, source in enumerate(self.sources):
            share = max(1, round(total * source.weight / total_weight))
            drawn += self._draw(number, epoch * share, share)
        order = np.random.default_rng((self.seed, epoch, 7)).permutation(len(drawn))
        return [drawn[i] for i in order.tolist()]

    def sizes(self, examples: Sequence[longform.Example]) -> np.ndarray:
        """What examples take of a row, from metadata alone: int64 [examples, 3], windows, tokens and labels."""
        first = self._first_clip.tolist()
        clips = np.array(
            [first[example.source] + clip for example in examples for clip in example.clips],
            np.int64,
        )
        starts = np.cumsum([0] + [len(example.clips) for example in examples])[:-1]
        gaps = np.array([sum(example.gaps) for example in examples], np.int64)
        samples = np.add.reduceat(self._samples[clips], starts) + gaps
        heads = clips[starts]
        labels = (
            np.add.reduceat(self._joined[clips], starts)
            - self._joined[heads]
            + self._answers[heads]
            + 1
        )
        windows = self.spec.count(samples)
        return np.stack(
            [windows, self._prompts[heads] - 1 + windows * self.tokens_per_window + labels, labels],
            axis=1,
        )

    def _plan(self, epoch: int) -> tuple[list[longform.Example], list[list[int]]]:
        examples = self._examples(epoch)
        rows = packing.pack(self.sizes(examples), self.shape)
        order = np.random.default_rng((self.seed, epoch, 8)).permutation(len(rows))
        return examples, [rows[i] for i in order]

    def plan(self, epoch: int) -> tuple[list[longform.Example], list[list[int]]]:
        """An epoch's examples, and its rows as the numbers of theirs. Only the plans last used are kept."""
        with self._lock:
            plan = self._epochs.pop(epoch, None) or self._plan(epoch)
            self._epochs[epoch] = plan  # the newest at the end
            if epoch == len(self._epoch_lengths):
                self._epoch_lengths.append(len(plan[1]))
            while len(self._epochs) > _KEPT_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            return plan

    def examples(self, row: int) -> list[longform.Example]:
        """The examples of a global row number."""
        epoch = 0
        while True:
            if epoch == len(self._epoch_lengths):
                self.plan(epoch)
            if row < self._epoch_lengths[epoch]:
                break
            row, epoch = row - self._epoch_lengths[epoch], epoch + 1
        examples, rows = self.plan(epoch)
        return [examples[i] for i in rows[row]]

    # ---- the row

    def utterances(self, example: longform.Example) -> list[Utterance]:
        return [self.indices[example.source][clip] for clip in example.clips]

    def answer(self, example: longform.Example) -> str:
        return " ".join(utterance.answer for utterance in self.utterances(example))

    def segments(self, example: longform.Example) -> list[Segment]:
        """What is said when in the example's recording, in seconds: its clips' segments, or one for a clip that has none."""
        segments, at = [], 0
        for utterance, gap in zip(self.utterances(example), example.gaps, strict=True):
            start = (at + gap) / audio.SAMPLE_RATE
            known = utterance.segments or (Segment(0.0, utterance.seconds, utterance.text),)
            segments += [Segment(start + s.start, start + s.end, s.text) for s in known]
            at += gap + utterance.num_samples
        return segments

    def samples(self, example: longform.Example) -> np.ndarray:
        """The example's recording, int16."""
        pieces = []
        for utterance, gap in zip(self.utterances(example), example.gaps, strict=True):
            pieces += [np.zeros(gap, np.int16), read_clip(utterance)]
        return np.concatenate(pieces)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        parts = []
        for example in self.examples(row):
            utterances, samples = self.utterances(example), self.samples(example)
            num_speech, answers = (
                self.spec.count(len(samples)) * self.tokens_per_window,
                [u.answer for u in utterances],
            )
            encoded = self.encoder.encode(
                utterances[0].task, utterances[0].instruction, answers, num_speech
            )
            parts.append((encoded, samples))
        return packing.assemble(parts, self.shape, self.spec, self.tokens_per_window)


class _Batches:
    """Grain's random-access source: item `step` is this process's part of the global batch of that step."""

    def __init__(self, rows: PackedRows, global_rows: int, process_index: int, process_count: int):
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
    rows: PackedRows,
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
        raise ValueError(
            f"{global_rows} rows a batch from row {start_row} do not divide over {process_count} processes"
        )
    dataset = grain.MapDataset.source(_Batches(rows, global_rows, process_index, process_count))[
        start_row // global_rows :
    ]
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=0 if workers else 2, prefetch_buffer_size=prefetch)
    )
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        )
    return iter(dataset)


def ahead(batches: Iterable[dict], put: Callable[[dict], dict]) -> Iterator[tuple[dict, dict]]:
    """(batch, what `put` makes of it: arrays on the devices), put one batch early: the copy runs beside the step before."""
    batches = iter(batches)
    batch = next(batches)
    ready = batch, put(batch)
    for batch in batches:
        following = batch, put(batch)
        yield ready
        ready = following
    yield ready

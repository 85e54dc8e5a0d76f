"""Packed training rows: a row number in, the row's arrays out.

`PackedRows` assigns examples to every row number, from 0 without end. The assignment is a pure
function of (sources, row shape, seed). The position in the data is therefore one integer, the same
on any number of processes and workers.
"""

import dataclasses
import os
import threading
from collections.abc import Sequence

import numpy as np

from fastslm_jax import audio
from fastslm_jax.data import longform, packing, prompts, semantic
from fastslm_jax.data.manifest import (
    Segment,
    Utterance,
    read_clip,
    read_manifest,
    tokenizer_fingerprint,
)
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.errors import UserError

# Epoch plans kept in memory. Rows near the end of an epoch are requested together with rows of the
# next one.
_CACHED_EPOCHS = 2

# An epoch's examples, and its rows as indices into those examples.
EpochPlan = tuple[list[longform.Example], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """One data source of a mixture.

    Attributes:
        path: a manifest or an imported folder.
        tasks: the tasks to use (empty: all).
        weight: relative share of the mixture.
        join: how to join clips into long recordings (None: every clip is one example).
    """

    path: str
    tasks: tuple[str, ...] = ()
    weight: float = 1.0
    join: longform.LongForm | None = None


class PackedRows:
    """Random access to packed rows.

    An epoch has as many examples as all sources together, divided among the sources by weight. A
    source continues in the next epoch where it stopped, and reshuffles when all its examples have
    been used.

    Args:
        sources: the mixture.
        shape: window, token and label slots of a row.
        spec: how recordings are cut into windows.
        tokens_per_window: speech tokens per window.
        prompt_tokenizer: converts prompts and answers to ids.
        seed: seed of all random choices.

    Raises:
        PackingError: a clip does not fit in a row and cannot be split at its segments.
        UserError: a source joins clips of different tasks.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        shape: packing.RowShape,
        spec: audio.WindowSpec,
        tokens_per_window: int,
        prompt_tokenizer: PromptTokenizer,
        seed: int,
    ) -> None:
        self.sources, self.shape, self.spec = tuple(sources), shape, spec
        self.tokens_per_window, self.seed = tokens_per_window, seed
        self.prompt_tokenizer = prompt_tokenizer
        self.indices = [self._read(source) for source in sources]
        # Per clip, over all sources: samples, prompt tokens, and answer tokens, both for an answer
        # that starts an example and for one that follows another answer.
        clips = [utterance for index in self.indices for utterance in index]
        self._first_clip = np.cumsum([0] + [len(index) for index in self.indices])
        self._samples = np.array([utterance.num_samples for utterance in clips], np.int64)
        self._prompt_tokens = np.array([self._prompt_length(u) for u in clips], np.int64)
        self._first_tokens = self._answer_lengths(clips, "text_tokens")
        self._joined_tokens = self._first_tokens
        if any(source.join for source in sources):
            self._joined_tokens = self._answer_lengths(clips, "joined_tokens")
        self._check_fit(clips)
        self._text_vectors = [
            semantic.tf_idf([utterance.text for utterance in index])
            if source.join and source.join.grouping == "semantic"
            else None
            for source, index in zip(self.sources, self.indices, strict=True)
        ]
        # Per source: the number of examples of every pass so far, and (number, examples) of the
        # latest pass.
        self._pass_lengths: list[list[int]] = [[] for _ in sources]
        self._latest_pass: dict[int, tuple[int, list[longform.Example]]] = {}
        # The number of rows of every epoch so far, and the cached plans, least recent first.
        self._epoch_lengths: list[int] = []
        self._plans: dict[int, EpochPlan] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:  # a lock cannot be pickled: every worker creates its own
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    # ---- The index

    def _read(self, source: MixtureSource) -> list[Utterance]:
        """Returns a source's clips; those longer than a row are split at their segments."""
        path = os.path.expanduser(source.path)
        index = read_manifest(path, source.tasks)
        tasks = sorted({utterance.task for utterance in index})
        if source.join and len(tasks) > 1:
            raise UserError(
                f"{source.path}: clips of {', '.join(tasks)} cannot be joined; name one of them in "
                "the source's tasks"
            )
        if tokenizer_fingerprint(path) != self.prompt_tokenizer.fingerprint():
            index = [
                dataclasses.replace(u, text_tokens=None, joined_tokens=None) if u.text_tokens else u
                for u in index
            ]

        def fits(u: Utterance) -> bool:
            answer_tokens = self.prompt_tokenizer.answer_length(u.answer)
            return self._fits(u.num_samples, self._prompt_length(u), answer_tokens)

        clips = []
        for utterance in index:  # clips without segments are checked later, without tokenizing here
            needs_split = bool(utterance.segments) and not fits(utterance)
            clips += (needs_split and longform.split(utterance, fits)) or [utterance]
        return clips

    def _prompt_length(self, utterance: Utterance) -> int:
        return len(self.prompt_tokenizer.prompt_ids(utterance.task, utterance.prompt))

    def _answer_lengths(self, clips: Sequence[Utterance], field: str) -> np.ndarray:
        """Tokens of every answer: the counts stored by the import, or counted now if missing."""
        written = prompts.joined if field == "joined_tokens" else str
        lengths = [getattr(utterance, field) for utterance in clips]
        unknown = [i for i, length in enumerate(lengths) if length is None]
        counted = self.prompt_tokenizer.answer_lengths([written(clips[i].answer) for i in unknown])
        for i, length in zip(unknown, counted, strict=True):
            lengths[i] = length
        return np.array(lengths, np.int64)

    def _check_fit(self, clips: Sequence[Utterance]) -> None:
        """Raises before training starts if a clip does not fit in a row."""
        single = [
            longform.Example(source, (clip,))
            for source, index in enumerate(self.indices)
            for clip in range(len(index))
        ]
        sizes = self.sizes(single)
        too_large = np.flatnonzero((sizes > dataclasses.astuple(self.shape)).any(axis=1))
        if len(too_large):
            windows, tokens, labels = sizes[too_large[0]].tolist()
            raise packing.PackingError(
                f"{clips[too_large[0]].id} takes {windows} windows, {tokens} tokens and {labels} "
                f"labels; a row has {self.shape.windows}, {self.shape.tokens} and "
                f"{self.shape.labels} ({len(too_large)} of {len(clips)} clips do not fit): raise "
                "config.data.row"
            )

    # ---- The plan: row number → examples

    def _pass(self, source: int, number: int) -> list[longform.Example]:
        """Examples of pass `number` over a source, in which every clip occurs once.

        The latest pass is cached: the next epoch continues in it.
        """
        if self._latest_pass.get(source, (None,))[0] != number:
            self._latest_pass[source] = (number, self._make_pass(source, number))
        return self._latest_pass[source][1]

    def _make_pass(self, source: int, number: int) -> list[longform.Example]:
        rng, join = np.random.default_rng((self.seed, source, number)), self.sources[source].join
        if join is None:
            return longform.single_examples(source, len(self.indices[source]), rng)
        clips = slice(self._first_clip[source], self._first_clip[source + 1])
        prompt_tokens = self._prompt_tokens[clips].tolist()
        # The larger of the two counts bounds an answer at either position.
        tokens = np.maximum(self._first_tokens[clips], self._joined_tokens[clips]).tolist()

        def fits(first: int, samples: int, tokens: int) -> bool:
            return self._fits(samples, prompt_tokens[first], tokens)

        return longform.joined_examples(
            source,
            self.indices[source],
            join,
            rng,
            tokens=tokens,
            fits=fits,
            vectors=self._text_vectors[source],
        )

    def _fits(self, samples: int, prompt_tokens: int, answer_tokens: int) -> bool:
        """Whether an example of this size fits in an empty row."""
        windows, labels = self.spec.count(samples), answer_tokens + 1  # the end-of-turn token
        tokens = prompt_tokens - 1 + windows * self.tokens_per_window + labels  # -1: <|AUDIO|>
        shape = self.shape
        return windows <= shape.windows and tokens <= shape.tokens and labels <= shape.labels

    def _draw(self, source: int, start: int, count: int) -> list[longform.Example]:
        """Examples `start` to `start + count` of a source's concatenated passes."""
        drawn, number, lengths = [], 0, self._pass_lengths[source]
        while len(drawn) < count:
            if number < len(lengths) and start >= lengths[number]:
                start -= lengths[number]  # skip a pass; with joined clips, lengths differ
            else:
                examples = self._pass(source, number)
                if number == len(lengths):
                    lengths.append(len(examples))
                drawn += examples[start : start + count - len(drawn)]
                start = max(0, start - len(examples))
            number += 1
        return drawn

    def _epoch_examples(self, epoch: int) -> list[longform.Example]:
        """The examples of an epoch, in the order in which they are packed."""
        for source, lengths in enumerate(self._pass_lengths):
            if not lengths:
                lengths.append(len(self._pass(source, 0)))
        total = sum(lengths[0] for lengths in self._pass_lengths)
        total_weight = sum(source.weight for source in self.sources)
        drawn = []
        for number, source in enumerate(self.sources):
            share = max(1, round(total * source.weight / total_weight))
            drawn += self._draw(number, epoch * share, share)
        order = np.random.default_rng((self.seed, epoch, 7)).permutation(len(drawn))
        return [drawn[i] for i in order.tolist()]

    def sizes(self, examples: Sequence[longform.Example]) -> np.ndarray:
        """Slots that examples take, from metadata: [examples, 3] windows, tokens, labels."""
        first_clip = self._first_clip.tolist()
        clips = np.array(
            [first_clip[example.source] + clip for example in examples for clip in example.clips],
            np.int64,
        )
        starts = np.cumsum([0] + [len(example.clips) for example in examples])[:-1]
        gaps = np.array([sum(example.gaps) for example in examples], np.int64)
        windows = self.spec.count(np.add.reduceat(self._samples[clips], starts) + gaps)
        first = clips[starts]
        # The first answer of an example that is not empty has no space before it.
        answers = np.cumsum(self._first_tokens[clips] > 0)
        earlier = np.repeat(
            answers[starts] - (self._first_tokens[first] > 0), np.diff([*starts, len(clips)])
        )
        answer_tokens = np.where(
            answers - earlier <= 1, self._first_tokens[clips], self._joined_tokens[clips]
        )
        labels = np.add.reduceat(answer_tokens, starts) + 1  # the end-of-turn token
        # The prompt's <|AUDIO|> is replaced by the speech tokens.
        tokens = self._prompt_tokens[first] - 1 + windows * self.tokens_per_window + labels
        return np.stack([windows, tokens, labels], axis=1)

    def _make_plan(self, epoch: int) -> EpochPlan:
        examples = self._epoch_examples(epoch)
        rows = packing.pack(self.sizes(examples), self.shape)
        order = np.random.default_rng((self.seed, epoch, 8)).permutation(len(rows))
        return examples, [rows[i] for i in order]

    def plan(self, epoch: int) -> EpochPlan:
        """An epoch's examples, and its rows as indices into those examples."""
        with self._lock:
            plan = self._plans.pop(epoch, None) or self._make_plan(epoch)
            self._plans[epoch] = plan
            if epoch == len(self._epoch_lengths):
                self._epoch_lengths.append(len(plan[1]))
            while len(self._plans) > _CACHED_EPOCHS:
                del self._plans[next(iter(self._plans))]
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

    # ---- The arrays: examples → row

    def utterances(self, example: longform.Example) -> list[Utterance]:
        """The clips of an example."""
        return [self.indices[example.source][clip] for clip in example.clips]

    def answer(self, example: longform.Example) -> str:
        """The text that the model learns to generate for an example."""
        return " ".join(u.answer for u in self.utterances(example) if u.answer)

    def segments(self, example: longform.Example) -> list[Segment]:
        """Timed transcript of an example's recording; a clip without segments is one segment."""
        segments, position = [], 0
        for utterance, gap in zip(self.utterances(example), example.gaps, strict=True):
            start = (position + gap) / audio.SAMPLE_RATE
            known = utterance.segments or (Segment(0.0, utterance.seconds, utterance.text),)
            segments += [Segment(start + s.start, start + s.end, s.text) for s in known]
            position += gap + utterance.num_samples
        return segments

    def samples(self, example: longform.Example) -> np.ndarray:
        """An example's recording: int16 [n] at 16 kHz."""
        pieces = []
        for utterance, gap in zip(self.utterances(example), example.gaps, strict=True):
            pieces += [np.zeros(gap, np.int16), read_clip(utterance)]
        return np.concatenate(pieces)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The arrays of a global row number; see `packing.assemble`."""
        parts = []
        for example in self.examples(row):
            utterances, samples = self.utterances(example), self.samples(example)
            first, answers = utterances[0], [utterance.answer for utterance in utterances]
            num_speech = self.spec.count(len(samples)) * self.tokens_per_window
            encoded = self.prompt_tokenizer.encode(first.task, first.prompt, answers, num_speech)
            parts.append((encoded, samples))
        return packing.assemble(parts, self.shape, self.spec, self.tokens_per_window)

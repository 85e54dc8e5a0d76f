"""The Python interface: `fastslm_jax.load(checkpoint)` → `Model`.

model = fastslm_jax.load("runs/stage3")
model.transcribe("talk.wav").text
model.transcribe(samples, 44_100, task="ssum")     # an array and its sample rate
model.transcribe(["a.wav", "b.flac"])              # a list: decoded in batches
for result in model.transcribe("talk.wav", stream=True):
    print(result.text)                             # grows
model.answer("Where is Vienna?").text              # without audio: the language model alone
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Literal, overload

import numpy as np

from fastslm_jax import audio as audio_files
from fastslm_jax.audio import SAMPLE_RATE, AudioError
from fastslm_jax.data.tasks import TASKS, with_context
from fastslm_jax.errors import UserError
from fastslm_jax.inference import load as loading
from fastslm_jax.inference import long_form
from fastslm_jax.inference.generator import Answer, Generator, Request
from fastslm_jax.inference.long_form import Recording, Result
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.training.checkpoint import Checkpoints

Audio = str | os.PathLike[str] | np.ndarray
DEFAULT_TOKENS = 256  # budget of answers to text prompts


def load(
    checkpoint: str | os.PathLike[str],
    step: int | str | None = None,
    whisper: str | None = None,
    llm: str | None = None,
    kv_cache: str | None = None,
    sampling: SamplingParams = SamplingParams(),
    other_bases: bool = False,
) -> "Model":
    """Loads a trained or imported model on all devices.

    Args:
        checkpoint: its working directory.
        step: of the checkpoint, or "best" by its dev scores (default: the newest).
        whisper, llm: folders or hub ids of the pretrained models (default: the config's).
        kv_cache: type of the key-value cache: float32, bfloat16 or int8 (default: the model's).
        sampling: default: greedy.
        other_bases: accept pretrained weights that the checkpoint was not trained on, such as the
            same model in another precision; a warning names them.

    Raises:
        UserError: there is no such checkpoint or pretrained model, or they do not fit together.
    """
    checkpoints = Checkpoints(checkpoint, read_only=True)
    step = loading.find_step(checkpoints, checkpoint, step)
    config = loading.saved_config(checkpoints, checkpoint, step, whisper, llm)
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    generator = loading.load(
        config, checkpoints, step, other_bases, cache_dtype=kv_cache, sampling=sampling
    )
    window = generator.model.window.seconds
    return Model(generator, long_form.trained_seconds(config.data.train, window))


def file_recording(path: str | os.PathLike[str], task: str, prompt: str | None) -> Recording:
    """The recording in a file, which is decoded when it is needed.

    Raises:
        AudioError: it is missing, unreadable, empty or truncated.
    """
    return Recording(
        audio_files.probe(path),
        functools.partial(audio_files.read_audio, path),
        task=task,
        instruction=prompt,
    )


def to_samples(array: np.ndarray, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Mono samples [n], float in [-1, 1] or int16 → int16 at 16 kHz.

    Raises:
        AudioError: the array or the rate cannot be audio.
    """
    if not isinstance(sample_rate, int | np.integer) or sample_rate < 1:
        raise AudioError(f"sample_rate={sample_rate!r}: must be a positive whole number")
    if array.ndim != 1 or not array.size:
        raise AudioError(
            f"an array of shape {list(array.shape)}: audio must be [samples], at least one, mono "
            "(average the channels first)"
        )
    if array.dtype == np.int16:
        if sample_rate == SAMPLE_RATE:
            return array
        array = array.astype(np.float32) / 32_768
    if not np.issubdtype(array.dtype, np.floating):
        raise AudioError(f"an array of {array.dtype}: use float in [-1, 1] or int16")
    return audio_files.to_int16(
        audio_files.resample(array.astype(np.float32), int(sample_rate)), "an array"
    )


class Model:
    """A model that transcribes, translates, summarizes and answers.

    Attributes:
        generator: for requests that need more control.
        trained_seconds: length of the longest recordings in its training. Longer ones are
            transcribed in segments.
    """

    def __init__(self, generator: Generator, trained_seconds: float):
        self.generator, self.trained_seconds = generator, trained_seconds

    @overload
    def transcribe(
        self,
        audio: Audio,
        sample_rate: int = ...,
        *,
        stream: Literal[False] = ...,
        **options: object,
    ) -> Result: ...
    @overload
    def transcribe(
        self,
        audio: Sequence[Audio],
        sample_rate: int = ...,
        *,
        stream: Literal[False] = ...,
        **options: object,
    ) -> list[Result]: ...
    @overload
    def transcribe(
        self, audio: Audio, sample_rate: int = ..., *, stream: Literal[True], **options: object
    ) -> Iterator[Result]: ...

    def transcribe(
        self,
        audio: Audio | Sequence[Audio],
        sample_rate: int = SAMPLE_RATE,
        *,
        task: str = "asr",
        prompt: str | None = None,
        context: str | Sequence[str] = "",
        stream: bool = False,
        span: str | float = "auto",
        max_new_tokens: int | None = None,
        batch_size: int = 8,
    ) -> Result | list[Result] | Iterator[Result]:
        """Transcribes audio of any length, or does another task with it.

        Args:
            audio: a file, or samples [n] (float in [-1, 1] or int16); or a list of these.
            sample_rate: of arrays; files have their own.
            task: asr, ast (translation), ssum (summary) or sqqa (spoken question).
            prompt: an instruction that replaces the task's.
            context: phrases that may occur in the audio, or a text about it.
            stream: yield results that grow every few tokens; the last has a stop_reason.
            span: length of the segments of long recordings: seconds, "none", or "auto".
            max_new_tokens: token budget of each segment (default: grows with its length).
            batch_size: segments that are decoded at the same time.

        Returns:
            A result with text, segments (start, end, text), seconds, covered_seconds and
            stop_reason; for a list, a list of results.

        Raises:
            UserError: the audio cannot be read, or an option is wrong.
            CapacityError: a recording does not fit the model or the memory.
        """
        is_list = not isinstance(audio, str | os.PathLike | np.ndarray)
        if is_list and stream:
            raise UserError("stream=True takes one recording, not a list")
        given = audio if is_list else [audio]
        if not isinstance(given, Sequence):
            raise UserError(f"audio is a {type(audio).__name__}: give a file, an array, or a list")
        if task not in TASKS:
            raise UserError(f"task={task!r}: must be one of {', '.join(sorted(TASKS))}")
        context = context if isinstance(context, str) else ", ".join(context)
        prompt = with_context(task, prompt, context.strip())
        recordings = [
            self.recording(one, sample_rate, task, prompt, max_new_tokens, span) for one in given
        ]
        options = {"batch_size": batch_size, "in_order": True}
        if stream:
            found = long_form.stream(self.generator, recordings, partial=True, **options)
            return (result for _, result in found)
        results = dict(long_form.stream(self.generator, recordings, **options))
        return [results[i] for i in range(len(given))] if is_list else results[0]

    def recording(
        self,
        audio: Audio,
        sample_rate: int,
        task: str,
        prompt: str | None,
        max_new_tokens: int | None = None,
        span: str | float = "auto",
    ) -> Recording:
        """A recording with its segment length; see `transcribe`."""
        if isinstance(audio, str | os.PathLike):
            recording = file_recording(audio, task, prompt)
        elif isinstance(audio, np.ndarray):
            samples = to_samples(audio, sample_rate)
            recording = Recording(len(samples) / SAMPLE_RATE, lambda: samples, task, prompt)
        else:
            raise UserError(f"audio is a {type(audio).__name__}: give a file or a NumPy array")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        recording = dataclasses.replace(recording, max_new_tokens=max_new_tokens)
        return long_form.with_segments(
            self.generator.capacity, recording, self.trained_seconds, str(span)
        )

    @overload
    def answer(self, prompt: str, max_new_tokens: int = ...) -> Answer: ...
    @overload
    def answer(self, prompt: Sequence[str], max_new_tokens: int = ...) -> list[Answer]: ...

    def answer(
        self, prompt: str | Sequence[str], max_new_tokens: int = DEFAULT_TOKENS
    ) -> Answer | list[Answer]:
        """Answers a text prompt without audio: the language model alone, LoRA off.

        Raises:
            UserError: the prompt is empty or has the placeholder of audio.
            CapacityError: it does not fit the model's context.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not all(isinstance(one, str) and one.strip() for one in prompts):
            raise UserError("answer: a prompt must be a text that is not empty")
        requests = [Request(None, None, one, max_new_tokens) for one in prompts]
        answers = self.generator.answer(requests)
        return answers[0] if isinstance(prompt, str) else answers

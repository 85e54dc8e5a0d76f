"""Flags of the transcribe command, apart from it: help should not wait for its imports."""

import functools

from absl import flags

from fastslm_jax import cli
from fastslm_jax.data.tasks import TASKS


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    string, integer, number, enum = (
        functools.partial(define, flag_values=flag_values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_enum,
        )
    )
    string("checkpoint", None, "Working directory of a trained or imported model.", required=True)
    cli.define_step("step", "Checkpoint to use", flag_values)
    cli.define_bases(flag_values)
    enum("task", "asr", sorted(TASKS), "What to do with the audio.")
    string("prompt", None, "An instruction that replaces the task's default.")
    string(
        "context",
        "",
        "Phrases that may occur in the audio, separated by commas, or a text about it.",
    )
    enum(
        "format",
        "text",
        ["text", "json", "jsonl", "srt", "vtt"],
        "Text, one JSON object per line, or subtitles.",
    )
    string(
        "out",
        None,
        "Folder for one NAME.txt, .json, .srt or .vtt per file (default: standard output).",
    )
    string(
        "span",
        "auto",
        "Length of the segments that long recordings are cut into: seconds, none, or auto.",
    )
    integer(
        "running_prompt",
        0,
        "Words of the transcript so far to quote in the next segment's prompt.",
        lower_bound=0,
    )
    integer(
        "max_new_tokens",
        None,
        "Token budget of each segment (default: grows with its length).",
        lower_bound=1,
    )
    integer("batch_size", 8, "Segments per batch; fewer if the context is long.", lower_bound=1)
    enum(
        "kv_cache",
        None,
        ["float32", "bfloat16", "int8"],
        "Type of the key-value cache (default: the model's).",
    )
    number("temperature", 0.0, "Sampling temperature; 0 is greedy.")
    integer("top_k", 0, "Sample only from the k most likely tokens (0: all).")
    number("top_p", 1.0, "Sample only from the most likely tokens with this total probability.")
    number("repetition_penalty", 1.0, "Values above 1 make tokens less likely to be repeated.")
    integer("seed", 0, "Seed of the sampling.")
    flags.DEFINE_bool(
        "stream",
        None,
        "Print text as it is generated (default: for one file, as text, to a terminal).",
        flag_values=flag_values,
    )

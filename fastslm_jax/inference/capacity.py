"""Limits of a model and its memory: positions, cache lengths, YaRN, rows of a batch."""

import dataclasses

import jax.numpy as jnp

from fastslm_jax import memory
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.models.fastslm import FastSLM

PREFILL_CHUNK = 32  # prompt tokens per row when several rows are prefilled together
YARN_FACTORS = (2.0, 4.0)
USABLE = 0.9  # share of the free memory that a key-value cache may take


def bucketed_length(positions: int) -> int:
    """The cache length for a number of positions, rounded up so that few programs are compiled.

    256, 512, 1024, … 8192, then steps of an eighth of the power of two below.
    """
    power = max(256, 1 << (positions - 1).bit_length())
    if power <= 8192:
        return power
    return -(-positions // (power // 16)) * (power // 16)


def rows_for(batch_size: int, cache_length: int) -> int:
    """Rows of a batch: halved each time the cache length doubles beyond 1024."""
    return max(1, min(batch_size, batch_size * 1024 // cache_length))


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The limits of a generator.

    Attributes:
        cache_dtype: of the key-value cache.
        native_positions: positions that the language model was trained for; YaRN extends them up
            to four times. None: unlimited.
        row_shards: devices that the rows of a batch are sharded over.
    """

    model: FastSLM
    prompt_tokenizer: PromptTokenizer
    cache_dtype: jnp.dtype
    native_positions: int | None = None
    row_shards: int = 1

    @property
    def max_positions(self) -> int | None:
        """The longest context of the model, YaRN included; None: unlimited."""
        if self.native_positions is None or self.model.llm.rope.factor != 1:
            return self.native_positions
        return int(self.native_positions * YARN_FACTORS[-1])

    def positions(
        self,
        num_samples: int | None,
        task: str | None,
        instruction: str | None,
        max_new_tokens: int,
    ) -> int:
        """Cache positions of a request, prompt and answer; num_samples is None without audio."""
        prompt = len(self.prompt_tokenizer.prompt_ids(task, instruction))
        if num_samples is not None:  # speech tokens replace one placeholder
            windows = self.model.window.count(num_samples)
            prompt += windows * self.model.tokens_per_window - 1
        # The last chunk of a prefill may write up to a chunk beyond the prompt.
        return prompt + max(max_new_tokens, PREFILL_CHUNK)

    def yarn_factor(self, positions: int) -> float:
        """The YaRN scaling factor for this context length (1 if none is needed)."""
        native = self.native_positions
        if native is None or positions <= native or self.model.llm.rope.factor != 1:
            return 1.0
        return next(factor for factor in YARN_FACTORS if positions <= factor * native)

    def cache_bytes(self, rows: int, cache_length: int) -> int:
        """Bytes of a key-value cache, over all devices."""
        llm = self.model.llm
        return memory.kv_cache_bytes(
            layers=llm.num_layers,
            rows=rows,
            length=cache_length,
            kv_heads=llm.num_kv_heads,
            head_dim=llm.head_dim,
            dtype=self.cache_dtype,
        )

    def check(self, positions: int, rows: int = 1) -> None:
        """Rejects a request before any work starts.

        Raises:
            memory.CapacityError: the context is too long for the model, or its cache too large.
        """
        most = self.max_positions
        if most is not None and positions > most:
            minutes = most / self.model.tokens_per_window * self.model.window.seconds / 60
            raise memory.CapacityError(
                f"{positions} positions (speech, prompt and answer) are needed but the language "
                f"model supports {most}, or {minutes:.3g} minutes of speech: "
                "lower --max_new_tokens"
            )
        shards = self.row_shards if rows % self.row_shards == 0 else 1
        free = memory.free_bytes()
        memory.check(
            f"a context of {positions} positions",
            {"key-value cache": self.cache_bytes(rows, bucketed_length(positions)) / shards},
            None if free is None else USABLE * free,
            lambda: "use --kv_cache=int8, or lower --max_new_tokens",
        )

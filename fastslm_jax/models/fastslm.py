"""FastSLM (arXiv 2601.06199): Whisper encoder → adapter (HFQ-Former) → decoder with LoRA.

The model is a set of pure functions over one parameter dict:
params = {"encoder": {...}, "hfq_former": {...}, "llm": {...}}; other adapters' are in "adapter".
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fastslm_jax import audio
from fastslm_jax.models import log_mel
from fastslm_jax.models.adapters import Adapter
from fastslm_jax.models.decoder import Decoder
from fastslm_jax.models.whisper import WhisperEncoder


@dataclasses.dataclass(frozen=True)
class FastSLM:
    """The three modules, and how they are applied.

    window_batch: largest number of windows of a row that are encoded at a time (0: all), to bound
        memory. Groups have equal size: with 30 windows, a window_batch of 8 gives groups of 6.
        The adapter runs in the same groups and is rematerialized in the backward pass, unless
        the decoder's remat is "none".
    audio_padding: see `audio.WindowSpec`.
    query_init: "normal" (the authors' small random queries) or "temporal" (see the module
        `query_init`).
    """

    encoder: WhisperEncoder
    adapter: Adapter
    llm: Decoder
    window_batch: int = 0
    audio_padding: str = "released"
    query_init: str = "normal"

    @property
    def window(self) -> audio.WindowSpec:
        return audio.WindowSpec(frames=2 * self.encoder.max_positions, padding=self.audio_padding)

    @property
    def tokens_per_window(self) -> int:
        return self.adapter.compression_size

    def init(self, rng: jax.Array) -> dict:
        """Random parameters."""
        encoder_rng, adapter_rng, llm_rng = jax.random.split(rng, 3)
        mel = jnp.zeros((1, self.window.frames, self.encoder.num_mels))
        features = jnp.zeros((1, self.encoder.max_positions, self.encoder.width))
        embeddings = jnp.zeros((1, 2, self.llm.width))
        llm = self.llm.init(llm_rng, embeddings, jnp.zeros((1, 2), jnp.int32))
        adapter = self.adapter.init(adapter_rng, features)["params"]
        if self.query_init == "temporal":
            adapter = self.adapter.temporal_init(adapter, adapter_rng)
        encoder = self.encoder.init(encoder_rng, mel)["params"]
        return {"encoder": encoder, self.adapter.GROUP: adapter, "llm": llm["params"]}

    def speech_tokens(
        self,
        params: dict,
        windows: jax.Array,
        valid_frames: jax.Array,
        recording: jax.Array,
        augment: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Audio windows [rows, windows, samples] → speech tokens.

        Speech tokens are [rows, windows · tokens_per_window, llm width]. See `log_mel.log_mel` for
        the arguments. Groups of windows are mapped over the second axis, so sharded rows stay on
        their devices.

        augment: what to do to the log-mel windows [rows, windows, frames, mels], in training.
        """
        mel = log_mel.log_mel(windows, valid_frames, recording, self.encoder.num_mels)
        if augment is not None:
            mel = augment(mel)
        return self.speech_tokens_from_mel(params, mel)

    def speech_tokens_from_mel(self, params: dict, mel: jax.Array) -> jax.Array:
        """mel [rows, windows, frames, mels] → [rows, windows · tokens_per_window, llm width]."""
        rows, count = mel.shape[:2]
        group = largest_divisor(count, self.window_batch or count)

        def encode(windows: jax.Array) -> jax.Array:
            """[rows, group, frames, mels] → [rows, group, t, d]."""
            windows = windows.reshape(-1, *windows.shape[2:])
            features = self.encoder.apply({"params": params["encoder"]}, windows)
            return features.reshape(rows, group, *features.shape[1:])

        def compress(features: jax.Array) -> jax.Array:
            """[rows, group, t, d] → [rows, group · tokens_per_window, llm width]."""
            features = features.reshape(-1, *features.shape[2:])
            tokens = self.adapter.apply({"params": params[self.adapter.GROUP]}, features)
            return tokens.reshape(rows, -1, tokens.shape[-1])

        if group == count:
            return compress(encode(mel))
        # Two loops: the frozen encoder's features are saved, and the backward pass reruns only the
        # adapter.
        chunks = jnp.moveaxis(mel.reshape(rows, count // group, group, *mel.shape[2:]), 1, 0)
        features = jax.lax.map(encode, chunks)
        if self.llm.remat == "none":
            features = jnp.moveaxis(features, 0, 1)
            return compress(features.reshape(rows, count, *features.shape[3:]))
        tokens = jax.lax.map(jax.checkpoint(compress, prevent_cse=False), features)
        return jnp.moveaxis(tokens, 0, 1).reshape(rows, count * self.tokens_per_window, -1)

    def splice(
        self, params: dict, tokens: jax.Array, speech_slot: jax.Array, speech: jax.Array | None
    ) -> jax.Array:
        """Token embeddings [rows, length, d], replaced by speech tokens where speech_slot ≥ 0.

        The gather stays within a row, so it needs no communication when rows are sharded.

        Args:
            tokens: [rows, length].
            speech_slot: [rows, length], index into the row's speech tokens, or -1 for text.
            speech: [rows, speech tokens, d]; None without audio.
        """
        embeddings = self.llm.apply({"params": params["llm"]}, tokens, method="embed")
        if speech is None:
            return embeddings
        gathered = jnp.take_along_axis(speech, jnp.maximum(speech_slot, 0)[:, :, None], axis=1)
        gathered = gathered.astype(embeddings.dtype)
        return jnp.where(speech_slot[:, :, None] >= 0, gathered, embeddings)

    def hidden(
        self,
        params: dict,
        batch: dict,
        dropout_rng: jax.Array | None = None,
        augment: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Hidden states [rows, length, d] of a batch of packed rows (see `data.packing`).

        Args:
            dropout_rng: enables LoRA dropout.
            augment: see `speech_tokens`.
        """
        speech = self.speech_tokens(
            params, batch["audio"], batch["window_frames"], batch["window_recording"], augment
        )
        embeddings = self.splice(params, batch["tokens"], batch["speech_slot"], speech)
        llm = self.llm if dropout_rng is None else self.llm.clone(deterministic=False)
        hidden, _ = llm.apply(
            {"params": params["llm"]},
            embeddings,
            batch["position_ids"],
            batch["segment_ids"],
            batch["lora_gate"],
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )
        return hidden

    def logits(self, params: dict, hidden: jax.Array) -> jax.Array:
        """hidden [..., d] → float32 logits [..., vocabulary]."""
        return self.llm.apply({"params": params["llm"]}, hidden, method="logits")


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)

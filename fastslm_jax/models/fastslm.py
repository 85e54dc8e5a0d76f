"""FastSLM: Whisper encoder → HFQ-Former → Qwen3 with LoRA, joined by pure functions over one plain parameter dict.

params = {"encoder": {...}, "hfq_former": {...}, "llm": {...}}
"""

import dataclasses

import jax
import jax.numpy as jnp

from fastslm_jax import audio
from fastslm_jax.models import log_mel
from fastslm_jax.models.hfq_former import HFQFormer
from fastslm_jax.models.query_init import temporal_query_init
from fastslm_jax.models.qwen3 import Qwen3
from fastslm_jax.models.whisper import WhisperEncoder


@dataclasses.dataclass(frozen=True)
class FastSLM:
    """The three modules and how windows run through them.

    window_batch: windows of a row that go through the encoder at a time, at most (0: all), which bounds its memory. Groups are
        equal: of 30 windows, a window_batch of 8 takes 6 at a time. The HFQ-Former goes in the same groups, and runs again in the
        backward pass, unless the decoder's remat is "none".
    query_init: "normal" (small random queries, as the authors) or "temporal" (see `query_init`).
    """

    encoder: WhisperEncoder
    hfq_former: HFQFormer
    llm: Qwen3
    window_batch: int = 0
    audio_padding: str = "released"
    query_init: str = "normal"

    @property
    def window(self) -> audio.WindowSpec:
        return audio.WindowSpec(frames=2 * self.encoder.max_positions, padding=self.audio_padding)

    @property
    def tokens_per_window(self) -> int:
        return self.hfq_former.compression_size

    def init(self, rng: jax.Array) -> dict:
        """Random parameters; use under `jax.eval_shape` for their shapes."""
        encoder_rng, hfq_rng, llm_rng = jax.random.split(rng, 3)
        mel = jnp.zeros((1, self.window.frames, self.encoder.num_mels))
        features = jnp.zeros((1, self.encoder.max_positions, self.encoder.width))
        embeddings = jnp.zeros((1, 2, self.llm.width))
        llm = self.llm.init(llm_rng, embeddings, jnp.zeros((1, 2), jnp.int32))
        hfq_former = self.hfq_former.init(hfq_rng, features)["params"]
        return {
            "encoder": self.encoder.init(encoder_rng, mel)["params"],
            "hfq_former": temporal_query_init(hfq_former, hfq_rng)
            if self.query_init == "temporal"
            else hfq_former,
            "llm": llm["params"],
        }

    def speech_tokens(
        self, params: dict, windows: jax.Array, valid_frames: jax.Array, recording: jax.Array
    ) -> jax.Array:
        """Cut windows [rows, windows, samples] → speech tokens [rows, windows · tokens_per_window, llm width].

        See `log_mel.log_mel` for the arguments. Windows are mapped over the second axis, so rows stay on their devices.
        """
        mel = log_mel.log_mel(windows, valid_frames, recording, self.encoder.num_mels)
        return self.speech_tokens_from_mel(params, mel)

    def speech_tokens_from_mel(self, params: dict, mel: jax.Array) -> jax.Array:
        """mel [rows, windows, frames, mels] → [rows, windows · tokens_per_window, llm width]."""
        rows, count = mel.shape[:2]
        group = largest_divisor(count, self.window_batch or count)

        def encode(windows):  # [rows, group, frames, mels] → [rows, group, t, d]
            features = self.encoder.apply(
                {"params": params["encoder"]}, windows.reshape(-1, *windows.shape[2:])
            )
            return features.reshape(rows, group, *features.shape[1:])

        def compress(features):  # [rows, group, t, d] → [rows, group · tokens, llm width]
            tokens = self.hfq_former.apply(
                {"params": params["hfq_former"]}, features.reshape(-1, *features.shape[2:])
            )
            return tokens.reshape(rows, -1, tokens.shape[-1])

        if group == count:
            return compress(encode(mel))
        # Two maps: features of a frozen encoder are kept, so that a backward pass runs the HFQ-Former only.
        chunks = jnp.moveaxis(mel.reshape(rows, count // group, group, *mel.shape[2:]), 1, 0)
        features = jax.lax.map(encode, chunks)
        if (
            self.llm.remat == "none"
        ):  # nothing is computed again: activations of all windows are kept
            features = jnp.moveaxis(features, 0, 1)
            return compress(features.reshape(rows, count, *features.shape[3:]))
        tokens = jax.lax.map(jax.checkpoint(compress, prevent_cse=False), features)
        return jnp.moveaxis(tokens, 0, 1).reshape(rows, count * self.tokens_per_window, -1)

    def splice(
        self, params: dict, tokens: jax.Array, speech_slot: jax.Array, speech: jax.Array | None
    ) -> jax.Array:
        """Token embeddings [rows, length, d], with speech[row, slot] wherever speech_slot ≥ 0.

        A gather inside the row: nothing crosses devices when rows are sharded.
        """
        embeddings = self.llm.apply({"params": params["llm"]}, tokens, method="embed")
        if speech is None:
            return embeddings
        gathered = jnp.take_along_axis(speech, jnp.maximum(speech_slot, 0)[:, :, None], axis=1)
        return jnp.where(
            speech_slot[:, :, None] >= 0, gathered.astype(embeddings.dtype), embeddings
        )

    def hidden(self, params: dict, batch: dict, dropout_rng: jax.Array | None = None) -> jax.Array:
        """A batch of packed rows (see `data.packing`) → hidden states [rows, length, d]. LoRA dropout acts if it has a key."""
        speech = self.speech_tokens(
            params, batch["audio"], batch["window_frames"], batch["window_recording"]
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
    """The largest divisor of a number that is at most `limit`."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)

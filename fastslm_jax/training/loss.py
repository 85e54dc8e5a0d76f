"""Next-token cross-entropy over label positions, in chunks, so that [tokens, vocabulary] logits never exist whole."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def label_loss(
    logits_fn: Callable[[jax.Array], jax.Array], hidden: jax.Array, labels: jax.Array, loss_mask: jax.Array, label_slots: int,
    chunk: int = 512,
) -> dict[str, jax.Array]:  # fmt: skip
    """Sums over the labels of a batch.

    Args:
        logits_fn: hidden [..., d] → logits [..., v].
        hidden: [rows, length, d]; labels, loss_mask: [rows, length].
        label_slots: the most labels that a row can have (the packing plan holds to it).
        chunk: labels of a row whose logits exist at a time.

    Returns:
        loss (sum of cross-entropies), labels (their number) and correct (those predicted right), scalars.
    """
    chunk = min(chunk, label_slots)
    slots = -(-label_slots // chunk) * chunk
    positions = jax.vmap(lambda row: jnp.nonzero(row, size=slots, fill_value=0)[0])(loss_mask)
    counts = jnp.sum(loss_mask > 0, axis=1)
    weights = (jnp.arange(slots) < counts[:, None]).astype(jnp.float32)

    @jax.checkpoint
    def one_chunk(sums, part):
        at, weight = part  # [rows, chunk]
        state = jnp.take_along_axis(hidden, at[:, :, None], axis=1)
        target = jnp.take_along_axis(labels, at, axis=1)
        logits = logits_fn(state)
        picked = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[:, :, 0]
        losses = (jax.nn.logsumexp(logits, axis=-1) - picked) * weight
        correct = (jnp.argmax(logits, axis=-1) == target) * weight
        return (sums[0] + jnp.sum(losses), sums[1] + jnp.sum(correct)), None

    def chunks(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk), 1, 0)

    (loss, correct), _ = jax.lax.scan(
        one_chunk, (jnp.float32(0), jnp.float32(0)), (chunks(positions), chunks(weights))
    )
    return {"loss": loss, "labels": jnp.sum(weights), "correct": correct}

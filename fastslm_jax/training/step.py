"""The train step: a pure function of (state, frozen parameters, batch).

Gradients and optimizer state exist for the trained parameters only.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastslm_jax import sharding
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.spec_augment import SpecAugment
from fastslm_jax.training import optim


@flax.struct.dataclass
class TrainState:
    """What a step updates.

    Attributes:
        step: steps taken, including skipped ones.
        skipped: consecutive steps so far whose loss or gradients were not finite.
        trained: {path: array} of the trained parameters.
        opt_state: the optimizer's state.
    """

    step: jax.Array
    skipped: jax.Array
    trained: dict[str, jax.Array]
    opt_state: optax.OptState

    @classmethod
    def create(
        cls, trained: dict[str, jax.Array], optimizer: optax.GradientTransformation
    ) -> "TrainState":
        return cls(jnp.int32(0), jnp.int32(0), trained, optimizer.init(trained))


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Settings of a train step.

    Attributes:
        label_slots: the maximum number of labels in a row.
        loss_chunk: labels of a row whose logits are computed at a time.
        accumulate: micro-batches that a batch is split into (gradient accumulation).
        input_token_noise: fraction of answer tokens to replace (see `with_token_noise`).
        spec_augment: masks of the log-mel windows.
        seed: seed of dropout, token noise and masks; the step number is folded in.
    """

    label_slots: int
    loss_chunk: int = 512
    accumulate: int = 1
    input_token_noise: float = 0.0
    spec_augment: SpecAugment = SpecAugment()
    seed: int = 0


def train_step(
    state: TrainState,
    frozen: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    model: FastSLM,
    optimizer: optax.GradientTransformation,
    settings: StepConfig,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step on the mean loss per label of the whole batch.

    A step whose loss or gradients are not finite leaves parameters and optimizer state unchanged.

    Args:
        frozen: {path: array} of the parameters that are not trained.
        batch: arrays [rows, ...] (see `data.packing.assemble`).
        mesh: mesh of the arrays; None for one device.

    Returns:
        The next state, and the metrics loss (per label), accuracy, labels, grad_norm, update_norm
        and skipped.
    """
    key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
    dropout_rng, noise_rng = jax.random.split(key)
    if settings.input_token_noise:
        batch = with_token_noise(batch, noise_rng, settings.input_token_noise, settings.label_slots)
    total_labels = jnp.maximum(1.0, jnp.sum(batch["loss_mask"] > 0))

    def loss_fn(
        trained: dict[str, jax.Array], rows: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = batch_loss(
            model,
            optim.merge(trained, frozen),
            rows,
            label_slots=settings.label_slots,
            loss_chunk=settings.loss_chunk,
            dropout_rng=rng,
            spec_augment=settings.spec_augment,
            mesh=mesh,
        )
        return sums["loss"] / total_labels, sums

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if settings.accumulate == 1:
        (_, sums), gradients = grad_fn(state.trained, batch, dropout_rng)
    else:
        sums, gradients = _accumulate(
            grad_fn, state.trained, batch, dropout_rng, settings.accumulate
        )

    grad_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
    is_finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)

    def select(new: optax.Params, old: optax.Params) -> optax.Params:
        return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)

    new_state = TrainState(
        step=state.step + 1,
        skipped=jnp.where(is_finite, 0, state.skipped + 1),
        trained=select(optax.apply_updates(state.trained, updates), state.trained),
        opt_state=select(opt_state, state.opt_state),
    )
    metrics = {
        "loss": sums["loss"] / total_labels,
        "accuracy": sums["correct"] / total_labels,
        "labels": sums["labels"],
        "grad_norm": grad_norm,
        "update_norm": optax.tree.norm(updates),
        "skipped": new_state.skipped,
    }
    return new_state, metrics


def _accumulate(
    grad_fn: Callable,
    trained: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    rng: jax.Array,
    count: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Sums of the loss terms and of the gradients over `count` micro-batches."""
    # Micro-batch i takes every count-th row, starting at i: each device has an equal share of it.
    micro_batches = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch
    )

    def body(
        carry: tuple[dict, dict], xs: tuple[jax.Array, dict]
    ) -> tuple[tuple[dict, dict], None]:
        index, rows = xs
        (_, sums), gradients = grad_fn(trained, rows, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, carry, (sums, gradients)), None

    zero = {"loss": jnp.float32(0), "labels": jnp.float32(0), "correct": jnp.float32(0)}
    init = (zero, jax.tree.map(jnp.zeros_like, trained))
    (sums, gradients), _ = jax.lax.scan(body, init, (jnp.arange(count), micro_batches))
    return sums, gradients


def with_token_noise(
    batch: dict[str, jax.Array], rng: jax.Array, fraction: float, label_slots: int
) -> dict[str, jax.Array]:
    """Replaces a fraction of the answer tokens that the decoder reads; the labels stay the same.

    A replacement is drawn from the answers of the same row. Training on wrong inputs reduces
    exposure bias: in a long transcript the decoder learns to recover from its own mistakes.
    """
    tokens, is_label = batch["tokens"], batch["loss_mask"] > 0
    chosen, drawn = jax.random.uniform(rng, (2, *tokens.shape))
    positions = _label_positions(is_label, label_slots)
    index = (drawn * jnp.sum(is_label, axis=1, keepdims=True)).astype(jnp.int32)
    others = jnp.take_along_axis(
        batch["labels"], jnp.take_along_axis(positions, index, axis=1), axis=1
    )
    # A label is the token that the decoder reads one position later.
    is_answer = jnp.pad(is_label, ((0, 0), (1, 0)))[:, :-1]
    return {**batch, "tokens": jnp.where(is_answer & (chosen < fraction), others, tokens)}


def batch_loss(
    model: FastSLM,
    params: dict,
    batch: dict[str, jax.Array],
    *,
    label_slots: int,
    loss_chunk: int = 512,
    dropout_rng: jax.Array | None = None,
    spec_augment: SpecAugment = SpecAugment(),
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
    """Runs the model on a batch and returns the sums of `label_loss`.

    dropout_rng: enables LoRA dropout and `spec_augment`.
    """
    augment = None
    if dropout_rng is not None and spec_augment.is_on:
        augment = functools.partial(spec_augment, rng=jax.random.fold_in(dropout_rng, 1))
    with sharding.activations_on(mesh):
        hidden = model.hidden(params, batch, dropout_rng, augment)
    head = params if mesh is None or mesh.size == 1 else _gather_head(model, params, mesh)
    return label_loss(
        lambda state: model.logits(head, state),
        hidden,
        batch["labels"],
        batch["loss_mask"],
        label_slots,
        loss_chunk,
    )


def _gather_head(model: FastSLM, params: dict, mesh: Mesh) -> dict:
    """Gathers the output embedding over fsdp once, instead of once per chunk of the loss."""
    name = "embed_tokens" if model.llm.tied_embeddings else "lm_head"
    gathered = jax.lax.with_sharding_constraint(
        params["llm"][name], NamedSharding(mesh, PartitionSpec("tensor", None))
    )
    return {**params, "llm": {**params["llm"], name: gathered}}


def label_loss(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    labels: jax.Array,
    loss_mask: jax.Array,
    label_slots: int,
    chunk: int = 512,
) -> dict[str, jax.Array]:
    """Next-token cross-entropy in chunks: never materializes all logits at once.

    Args:
        logits_fn: hidden [..., d] → logits [..., v].
        hidden: [rows, length, d].
        labels, loss_mask: [rows, length].
        label_slots: the maximum number of labels in a row (packing ensures it).
        chunk: labels of a row whose logits are computed at a time.

    Returns:
        Scalars: loss (sum of cross-entropies), labels (their number) and correct (labels that are
        the most likely token).
    """
    chunk = min(chunk, label_slots)
    slots = -(-label_slots // chunk) * chunk
    positions = _label_positions(loss_mask, slots)
    counts = jnp.sum(loss_mask > 0, axis=1)
    weights = (jnp.arange(slots) < counts[:, None]).astype(jnp.float32)
    states = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
    targets = jnp.take_along_axis(labels, positions, axis=1)

    def chunks(x: jax.Array) -> jax.Array:  # [rows, slots, …] → [chunks, rows, chunk, …]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    states = chunks(states)
    # Explicit arguments for what logits_fn closes over, so that it can be differentiated.
    closed, constants = jax.closure_convert(logits_fn, states[0])
    loss, correct = _chunk_sums(closed, states, constants, chunks(targets), chunks(weights))
    return {"loss": loss, "labels": jnp.sum(weights), "correct": correct}


def _chunk_sum(
    logits_fn: Callable[..., jax.Array],
    state: jax.Array,
    constants: list[jax.Array],
    target: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of the cross-entropies and of the correct labels of one chunk."""
    logits = logits_fn(state, *constants)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    losses = (jax.nn.logsumexp(logits, axis=-1) - picked) * weight
    correct = (jnp.argmax(logits, axis=-1) == target) * weight
    return jnp.sum(losses), jnp.sum(correct)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_sums(
    logits_fn: Callable[..., jax.Array],
    states: jax.Array,
    constants: list[jax.Array],
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sums of `_chunk_sum` over chunks: states [chunks, rows, chunk, d].

    Its forward pass also computes the gradients, while it has the logits of a chunk: nothing is
    computed twice, and no logits are kept.
    """

    def body(
        sums: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        state, target, weight = xs
        found = _chunk_sum(logits_fn, state, constants, target, weight)
        return jax.tree.map(jnp.add, sums, found), None

    zeros = (jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(body, zeros, (states, targets, weights))[0]


def _chunk_sums_forward(
    logits_fn: Callable[..., jax.Array],
    states: jax.Array,
    constants: list[jax.Array],
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, list[jax.Array]]]:
    grad_fn = jax.value_and_grad(_chunk_sum, argnums=(1, 2), has_aux=True)

    def body(sums: tuple, xs: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        state, target, weight = xs
        found, (d_state, d_constants) = grad_fn(logits_fn, state, constants, target, weight)
        return jax.tree.map(jnp.add, sums, (found, d_constants)), d_state

    zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, constants))
    (sums, d_constants), d_states = jax.lax.scan(body, zeros, (states, targets, weights))
    return sums, (d_states, d_constants)


def _chunk_sums_backward(
    _: Callable[..., jax.Array],
    gradients: tuple[jax.Array, list[jax.Array]],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, list[jax.Array], None, None]:
    d_states, d_constants = jax.tree.map(lambda x: (x * cotangents[0]).astype(x.dtype), gradients)
    return d_states, d_constants, None, None


_chunk_sums.defvjp(_chunk_sums_forward, _chunk_sums_backward)


def _label_positions(loss_mask: jax.Array, slots: int) -> jax.Array:
    """Positions of each row's labels, padded with 0: [rows, length] → [rows, slots]."""
    return jax.vmap(lambda row: jnp.nonzero(row, size=slots, fill_value=0)[0])(loss_mask)

"""The train step: a pure function of (state, frozen parameters, batch). Gradients exist for trained parameters only."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastslm_jax import sharding
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.training import optim
from fastslm_jax.training.loss import label_loss


@flax.struct.dataclass
class TrainState:
    """step counts batches seen; skipped counts batches in a row whose loss or gradients were not finite."""

    step: jax.Array
    skipped: jax.Array
    trained: dict[str, jax.Array]
    opt_state: optax.OptState

    @classmethod
    def create(
        cls, trained: dict[str, jax.Array], optimizer: optax.GradientTransformation
    ) -> "TrainState":
        return cls(jnp.int32(0), jnp.int32(0), trained, optimizer.init(trained))


def batch_loss(
    model: FastSLM, params: dict, batch: dict, *, label_slots: int, loss_chunk: int = 512, dropout_rng: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:  # fmt: skip
    """Sums of loss, labels and correct predictions over a batch of rows that lie on a mesh (None: on one device)."""
    with sharding.activations_on(mesh):
        hidden = model.hidden(params, batch, dropout_rng)
    head = params if mesh is None or mesh.size == 1 else _with_whole_head(model, params, mesh)
    return label_loss(
        lambda state: model.logits(head, state),
        hidden,
        batch["labels"],
        batch["loss_mask"],
        label_slots,
        loss_chunk,
    )


def _with_whole_head(model: FastSLM, params: dict, mesh: Mesh) -> dict:
    """The output embedding gathered over fsdp once, not once for every chunk of the loss."""
    name = "embed_tokens" if model.llm.tied_embeddings else "lm_head"
    whole = jax.lax.with_sharding_constraint(
        params["llm"][name], NamedSharding(mesh, PartitionSpec("tensor", None))
    )
    return {**params, "llm": {**params["llm"], name: whole}}


def with_token_noise(batch: dict, rng: jax.Array, share: float, label_slots: int) -> dict:
    """The same labels, but a share of the answers' tokens that the decoder reads are others of the row's answers.

    A model that generates reads its own mistakes; one that has only read what is right does not find its place again in a long
    transcript (exposure bias).
    """
    tokens, is_label = batch["tokens"], batch["loss_mask"] > 0
    chosen, drawn = jax.random.uniform(rng, (2, *tokens.shape))
    positions = jax.vmap(lambda row: jnp.nonzero(row, size=label_slots, fill_value=0)[0])(is_label)
    index = (drawn * jnp.sum(is_label, axis=1, keepdims=True)).astype(jnp.int32)
    others = jnp.take_along_axis(
        batch["labels"], jnp.take_along_axis(positions, index, axis=1), axis=1
    )
    is_answer = jnp.pad(is_label, ((0, 0), (1, 0)))[
        :, :-1
    ]  # a label is the token that is read next
    return {**batch, "tokens": jnp.where(is_answer & (chosen < share), others, tokens)}


def train_step(
    state: TrainState,
    frozen: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    model: FastSLM,
    optimizer: optax.GradientTransformation,
    seed: int,
    label_slots: int,
    loss_chunk: int = 512,
    accumulate: int = 1,
    input_token_noise: float = 0.0,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step on the mean loss per label of the whole batch.

    Args:
        batch: arrays [rows, ...] (see `data.packing.assemble`).
        seed: with the step it gives the key of dropout and of replaced tokens.
        accumulate: micro-batches that the rows are run in; the gradient is that of the whole batch.
        input_token_noise: share of the answers' tokens that are read wrongly (see `with_token_noise`).
        mesh: what the arrays lie on (None: one device).

    Returns:
        the next state and metrics: loss (per label), accuracy, labels, grad_norm, update_norm, skipped.
    """
    total_labels = jnp.maximum(1.0, jnp.sum(batch["loss_mask"] > 0))
    rng, replacement_rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    if input_token_noise:
        batch = with_token_noise(batch, replacement_rng, input_token_noise, label_slots)

    def micro_loss(trained, micro_batch, rng):
        params = optim.merge(trained, frozen)
        sums = batch_loss(
            model,
            params,
            micro_batch,
            label_slots=label_slots,
            loss_chunk=loss_chunk,
            dropout_rng=rng,
            mesh=mesh,
        )
        return sums["loss"] / total_labels, sums

    grad_fn = jax.value_and_grad(micro_loss, has_aux=True)
    if accumulate == 1:
        (_, sums), gradients = grad_fn(state.trained, batch, rng)
    else:
        # Rows are dealt out in turn, so that every device has its share of each micro-batch.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
        )

        def body(carry, part):
            index, micro_batch = part
            (_, sums), gradients = grad_fn(
                state.trained, micro_batch, jax.random.fold_in(rng, index)
            )
            return jax.tree.map(jnp.add, carry, (sums, gradients)), None

        zero = {"loss": jnp.float32(0), "labels": jnp.float32(0), "correct": jnp.float32(0)}
        start = (zero, jax.tree.map(jnp.zeros_like, state.trained))
        (sums, gradients), _ = jax.lax.scan(body, start, (jnp.arange(accumulate), micro))

    grad_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
    is_finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)

    def keep(new, old):
        return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)

    new_state = TrainState(
        step=state.step + 1,
        skipped=jnp.where(is_finite, 0, state.skipped + 1),
        trained=keep(optax.apply_updates(state.trained, updates), state.trained),
        opt_state=keep(opt_state, state.opt_state),
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

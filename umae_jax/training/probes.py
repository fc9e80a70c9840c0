"""Probes of frozen features: what a nearest-neighbour vote or a linear layer makes of an encoder's averaged maps."""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.data.on_device import normalize
from umae_jax.data.pipeline import Batch, EvalLoader, abstract_batch
from umae_jax.data.sources import Source
from umae_jax.errors import require
from umae_jax.training.sharding import batch_sharding, replicated
from umae_jax.training.step import Params

PROBES = ("knn", "linear")
BLOCK = 1024  # queries whose neighbours are looked for at once
LINEAR_STEPS = 100  # of L-BFGS
# On half the squared weights; the linear probe chooses one, of equals the strongest.
PENALTIES = tuple(10.0**power for power in range(0, -7, -1))
HELD_OUT = 0.2  # of the training features, to choose by


class Labelled(NamedTuple):
    """Features of labelled images, on the host.

    Attributes:
        features: float32 [N, C].
        labels: int32 [N].
        unreadable: images that are left out, as they could not be read.
    """

    features: np.ndarray
    labels: np.ndarray
    unreadable: int = 0


class ReadFeatures(Protocol):
    """Reads the features of a source's images, or of so many of them drawn by the seed."""

    def __call__(self, params: Params, source: Source, key: str, images: int | None = None) -> Labelled:
        """`key` is that of the configuration, for error messages."""
        ...


def make_reader(
    config: ConfigDict,
    graph: nnx.GraphDef,
    params: Params,
    mesh: Mesh,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> ReadFeatures:
    """Compile the reading of features: a function of a model's parameters, a source, its key, and how many to read.

    A feature is the mean over the map of one stage, `config.probe.stage`, of the encoder on the whole image.

    Args:
        config: of the model.
        graph: of it, whatever it was trained for.
        params: its parameters, or their shapes with their shardings.
        mesh: the devices.
        batch_size: global.
        check: called after each batch; may raise to break off.
    """
    sharding = batch_sharding(mesh)

    def average(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        encoder = nnx.merge(graph, params).encoder
        images = normalize(batch.image, config.data.mean, config.data.std)
        stage = encoder(encoder.embed(images)).maps[config.probe.stage]
        return stage.astype(jnp.float32).mean((1, 2)), batch.label

    # Every process gets all of them.
    jitted = jax.jit(average, out_shardings=replicated(mesh))
    compiled = jitted.lower(params, abstract_batch(config, batch_size, sharding)).compile()

    named: set[str] = set()

    def read(params: Params, source: Source, key: str, images: int | None = None) -> Labelled:
        batches = EvalLoader.of(config, source, key, sharding, batch_size=batch_size, images=images, named=named)
        read = []
        for batch in batches:
            read.append(jax.device_get(compiled(params, batch)))
            check()
        features, labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
        there = labels >= 0
        require(bool(there.any()), f"{key}: none of its images can be read; repair them or name another source")
        asked = len(source) if images is None else min(images, len(source))
        return Labelled(features[there], labels[there], asked - int(there.sum()))

    return read


@functools.partial(jax.jit, static_argnames=("classes", "neighbors", "temperature"))
def _vote(
    bank: jax.Array, labels: jax.Array, queries: jax.Array, *, classes: int, neighbors: int, temperature: float
) -> jax.Array:
    """The class that a query's nearest neighbours vote for: bank [N, C], labels [N], queries [Q, C] -> int32 [Q]."""
    similarity = jnp.einsum("qc,nc->qn", queries, bank, precision=jax.lax.Precision.HIGHEST)
    nearest, places = jax.lax.top_k(similarity, neighbors)  # [Q, k]
    votes = jnp.exp((nearest - nearest[:, :1]) / temperature)[..., None] * jax.nn.one_hot(labels[places], classes)
    return votes.sum(1).argmax(-1)


def knn_accuracy(
    training: Labelled, validation: Labelled, *, classes: int, neighbors: int, temperature: float
) -> float:
    """The share of validation features whose class their nearest training features vote for.

    Nearness is cosine similarity s, and a neighbour's vote weighs as exp(s / temperature).
    """

    def unit(features: np.ndarray) -> jax.Array:
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        return jnp.asarray(features / np.maximum(lengths, 1e-12))

    bank, labels, queries = unit(training.features), jnp.asarray(training.labels), unit(validation.features)
    options = {"classes": classes, "neighbors": min(neighbors, len(bank)), "temperature": temperature}
    blocks = [
        _vote(bank, labels, jnp.pad(block, ((0, BLOCK - len(block)), (0, 0))), **options)
        for start in range(0, len(queries), BLOCK)
        if len(block := queries[start : start + BLOCK])
    ]
    votes = np.concatenate(jax.device_get(blocks))[: len(queries)]
    return float((votes == validation.labels).mean())


class _Linear(NamedTuple):
    kernel: jax.Array  # [C, classes]
    bias: jax.Array  # [classes]

    def __call__(self, features: jax.Array) -> jax.Array:
        return jnp.matmul(features, self.kernel, precision=jax.lax.Precision.HIGHEST) + self.bias[None]


@functools.partial(jax.jit, static_argnames="classes")
def _fit(features: jax.Array, labels: jax.Array, penalty: jax.Array, *, classes: int) -> _Linear:
    """Logistic regression by L-BFGS on all of features [N, C] and labels [N] at once."""

    def loss(layer: _Linear) -> jax.Array:
        entropy = optax.softmax_cross_entropy_with_integer_labels(layer(features), labels).mean()
        return entropy + penalty / 2 * jnp.sum(layer.kernel**2)

    solver = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(loss)

    def update(carry: tuple[_Linear, optax.OptState], _: None) -> tuple[tuple[_Linear, optax.OptState], None]:
        layer, state = carry
        value, gradient = value_and_gradient(layer, state=state)
        change, state = solver.update(gradient, state, layer, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(layer, change), state), None

    layer = _Linear(jnp.zeros((features.shape[1], classes)), jnp.zeros(classes))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Optax mixes both
        (layer, _), _ = jax.lax.scan(update, (layer, solver.init(layer)), length=LINEAR_STEPS)
    return layer


def linear_accuracy(training: Labelled, validation: Labelled, *, classes: int, seed: int) -> tuple[float, float]:
    """The share of validation features that logistic regression on the training features classifies rightly.

    The penalty on the weights is the one of PENALTIES that does best on a part of the training features that it was
    not fitted to; then all of them are fitted.

    Returns:
        The accuracy, and the penalty.
    """
    mean, std = training.features.mean(0), training.features.std(0) + 1e-6
    features, labels = jnp.asarray((training.features - mean) / std), jnp.asarray(training.labels)
    queries = jnp.asarray((validation.features - mean) / std)
    order = np.random.default_rng(seed).permutation(len(features))
    held_out, rest = np.split(order, [max(1, int(HELD_OUT * len(order)))])
    require(len(rest) > 0, "probe.images: one image is too few to fit a linear probe; take more")

    def accuracy(layer: _Linear, features: jax.Array, labels: np.ndarray) -> float:
        return float((np.asarray(layer(features).argmax(1)) == labels).mean())

    def on_held_out(penalty: float) -> float:
        layer = _fit(features[rest], labels[rest], jnp.float32(penalty), classes=classes)
        return accuracy(layer, features[held_out], training.labels[held_out])

    best = max(PENALTIES, key=on_held_out)
    return accuracy(_fit(features, labels, jnp.float32(best), classes=classes), queries, validation.labels), best

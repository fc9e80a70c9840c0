"""Probes of frozen features: how well a nearest-neighbour vote or a linear layer classifies an encoder's mean maps."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax import cli
from umae_jax.data.pipeline import EvalLoader, abstract_batch, readers
from umae_jax.data.sources import Source
from umae_jax.data.transforms import LoadWhole
from umae_jax.errors import require
from umae_jax.tasks import labelled
from umae_jax.training.metrics import duration
from umae_jax.training.sharding import batch_sharding, replicated
from umae_jax.training.task import Batch, Params, Prediction
from umae_jax.weights.stored_run import StoredRun

PROBES = ("knn", "linear")
BLOCK = 1024  # queries per search for neighbours
LINEAR_STEPS = 100  # of L-BFGS
# On half the squared weights; the linear probe chooses one, among equals the strongest.
PENALTIES = tuple(10.0**power for power in range(0, -7, -1))
HELD_OUT = 0.2  # fraction of the training features to choose by


class Labelled(NamedTuple):
    """Features of labelled images, on the host.

    Attributes:
        features: float32 [N, C].
        labels: int32 [N].
        unreadable: number of images left out because they could not be read.
    """

    features: np.ndarray
    labels: np.ndarray
    unreadable: int = 0


class ReadFeatures(Protocol):
    """Reads the features of all images of a source, or of a number of them drawn by the seed."""

    def __call__(self, params: Params, source: Source, key: str, images: int | None = None) -> Labelled:
        """Read them; `key` names the source in error messages."""
        ...


def make_reader(
    config: ConfigDict,
    graph: nnx.GraphDef,
    params: Params,
    mesh: Mesh,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> ReadFeatures:
    """Compile the reading of features.

    A feature is the mean over the map of one stage, `config.probe.stage`, of the encoder on the whole image.

    Args:
        config: of the model.
        graph: of the model, whatever its task.
        params: its parameters, or their shapes with their shardings.
        mesh: the devices.
        batch_size: global.
        check: called after each batch; may raise to break off.
    """
    sharding = batch_sharding(mesh)

    def mean_map(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        encoder = nnx.merge(graph, params).encoder
        stage = encoder(encoder.embed(batch["image"])).maps[config.probe.stage]
        return stage.astype(jnp.float32).mean((1, 2)), batch["label"], batch["valid"]

    arrays = {
        "image": jax.ShapeDtypeStruct((*config.image_size, config.model.channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct((), jnp.int32),
        "valid": jax.ShapeDtypeStruct((), jnp.bool_),
    }
    # Every process gets all features.
    jitted = jax.jit(mean_map, out_shardings=replicated(mesh))
    compiled = jitted.lower(params, abstract_batch(arrays, batch_size, sharding)).compile()
    named: set[str] = set()

    def read(params: Params, source: Source, key: str, images: int | None = None) -> Labelled:
        load = LoadWhole(
            source,
            config.image_size,
            config.model.channels,
            config.validation.crop,
            labels=(len(source.classes), key),
        )
        loader = EvalLoader(
            len(source),
            load,
            batch_size=batch_size,
            sharding=sharding,
            images=images,
            seed=config.seed,
            named=named,
            readers=readers(config),
        )
        parts = []
        for batch in loader:
            parts.append(jax.device_get(compiled(params, batch)))
            check()
        features, labels, valid = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        require(bool(valid.any()), f"{key}: none of its images can be read; repair them or name another source")
        asked = len(source) if images is None else min(images, len(source))
        return Labelled(features[valid], labels[valid], asked - int(valid.sum()))

    return read


@functools.partial(jax.jit, static_argnames=("classes", "neighbors", "temperature"))
def _vote(
    bank: jax.Array, labels: jax.Array, queries: jax.Array, *, classes: int, neighbors: int, temperature: float
) -> jax.Array:
    """Return each query's class by its nearest neighbours: bank [N, C], labels [N], queries [Q, C] -> int32 [Q]."""
    similarity = jnp.einsum("qc,nc->qn", queries, bank, precision=jax.lax.Precision.HIGHEST)
    nearest, places = jax.lax.top_k(similarity, neighbors)  # [Q, k]
    votes = jnp.exp((nearest - nearest[:, :1]) / temperature)[..., None] * jax.nn.one_hot(labels[places], classes)
    return votes.sum(1).argmax(-1)


def knn_accuracy(
    training: Labelled, validation: Labelled, *, classes: int, neighbors: int, temperature: float
) -> float:
    """Return the fraction of validation features whose class their nearest training features vote for.

    The similarity is the cosine s; a neighbour's vote has weight exp(s / temperature).
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
    """Fit logistic regression to features [N, C] and labels [N] by full-batch L-BFGS."""

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
    """Return the accuracy of logistic regression, fitted to the training features, on the validation features.

    The penalty on the weights is the one of PENALTIES with the best accuracy on held-out training features; the layer
    is then fitted to all of them.

    Returns:
        Accuracy and penalty.
    """
    mean, std = training.features.mean(0), training.features.std(0) + 1e-6
    features, labels = jnp.asarray((training.features - mean) / std), jnp.asarray(training.labels)
    queries = jnp.asarray((validation.features - mean) / std)
    order = np.random.default_rng(seed).permutation(len(features))
    held_out, rest = np.split(order, [max(1, int(HELD_OUT * len(order)))])
    require(len(rest) > 0, "probe.images: one image is too few to fit a linear probe; use more")

    def accuracy(layer: _Linear, features: jax.Array, labels: np.ndarray) -> float:
        return float((np.asarray(layer(features).argmax(1)) == labels).mean())

    def on_held_out(penalty: float) -> float:
        layer = _fit(features[rest], labels[rest], jnp.float32(penalty), classes=classes)
        return accuracy(layer, features[held_out], training.labels[held_out])

    best = max(PENALTIES, key=on_held_out)
    return accuracy(_fit(features, labels, jnp.float32(best), classes=classes), queries, validation.labels), best


def probe_run(run: StoredRun, probe: str, mesh: Mesh, batch_size: int) -> Prediction:
    """Probe the features of one stage of a stored run, `config.probe.stage`.

    Args:
        run: of any task.
        probe: "knn" or "linear".
        mesh: the devices.
        batch_size: global.

    Returns:
        A line for people, and the values by name.

    Raises:
        UserError: if training or validation images are missing or have no labels.
    """
    config = run.config
    source = labelled.open_training(config)
    keys = ("--source", "--validation")
    validation = labelled.open_matching_validation(config, source, keys)
    require(validation is not None, "--validation is missing; write --validation with folder:PATH or tfds:NAME")
    assert validation is not None
    read = make_reader(config, run.graph, run.params, mesh, batch_size)
    start = time.monotonic()
    training = read(run.params, source, keys[0], config.probe.images)
    queries = read(run.params, validation, keys[1])
    count, width = training.features.shape
    cli.say(f"read {count + len(queries.labels):,} features of width {width} in {duration(time.monotonic() - start)}")
    options: dict[str, float]
    if probe == "knn":
        options = {"neighbors": config.probe.neighbors, "temperature": config.probe.temperature}
        top1 = knn_accuracy(training, queries, classes=len(source.classes), **options)  # type: ignore[arg-type]
    else:
        top1, penalty = linear_accuracy(training, queries, classes=len(source.classes), seed=config.seed)
        options = {"penalty": penalty}
    settings = ", ".join(f"{key} {value:g}" for key, value in options.items())
    unreadable = training.unreadable + queries.unreadable
    images = {"training_images": count, "images": len(queries.labels), "unreadable": unreadable}
    line = f"{probe} top-1 {top1:.2%} of {images['images']:,} images, from {count:,} ({settings})"
    line += f"; {unreadable} unreadable images do not count" if unreadable else ""
    return line, {"step": run.step, "probe": probe, "stage": config.probe.stage, **options, **images, "top1": top1}

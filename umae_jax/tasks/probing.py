"""Probes of frozen features: kNN and linear classification of spatially averaged feature maps."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax import console
from umae_jax.data.sources import Source
from umae_jax.errors import UserError, require
from umae_jax.tasks import labelled
from umae_jax.training.sharding import replicated
from umae_jax.training.task import Batch, Params, Prediction
from umae_jax.weights.stored_run import StoredRun

PROBES = ("knn", "linear")
BLOCK = 1024  # queries that search for neighbours at once
LINEAR_STEPS = 100  # of L-BFGS
PENALTIES = tuple(10.0**power for power in range(0, -7, -1))  # on half the squared weights of the linear probe
HELD_OUT = 0.2  # fraction of the training features that select the penalty


class Labelled(NamedTuple):
    """Features of labelled images, on the host."""

    features: np.ndarray  # float32 [N, C]
    labels: np.ndarray  # int32 [N]
    unreadable: int = 0  # number of images without a feature because they could not be read


class FeatureReader:
    """Reads the features of images: the spatial mean of the encoder's map of one stage, `config.probe.stage`.

    Args:
        config, graph: of a model of any task.
        params: its parameters, or their shapes with shardings.
        mesh: the devices.
        batch_size: global.
        check: called after each batch; may raise to stop the probe.
    """

    def __init__(
        self,
        config: ConfigDict,
        graph: nnx.GraphDef,
        params: Params,
        mesh: Mesh,
        batch_size: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        def mean_map(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
            encoder = nnx.merge(graph, params).encoder
            stage = encoder(encoder.embed(batch["image"])).maps[config.probe.stage]
            return stage.astype(jnp.float32).mean((1, 2)), batch["label"], batch["valid"]

        jitted = jax.jit(mean_map, out_shardings=replicated(mesh))  # every process gets all features
        self._mean_map = jitted.lower(params, labelled.abstract_eval_batch(config, mesh, batch_size)).compile()
        self._config, self._mesh, self._batch_size, self._check = config, mesh, batch_size, check
        self._named: set[str] = set()

    def __call__(self, params: Params, source: Source, key: str, images: int | None = None) -> Labelled:
        """Read the features of all images of a source, or of `images` of them, sampled with the seed.

        Raises:
            UserError: naming the source by its key or flag, if none of its images can be read.
        """
        parts = []
        arguments = (self._mesh, self._batch_size, images, self._named)
        for batch in labelled.eval_loader(self._config, source, key, *arguments):
            parts.append(jax.device_get(self._mean_map(params, batch)))
            self._check()
        features, labels, valid = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        require(bool(valid.any()), f"{key}: none of its images can be read; repair them or name another source")
        count = len(source) if images is None else min(images, len(source))
        return Labelled(features[valid], labels[valid], count - int(valid.sum()))


@functools.partial(jax.jit, static_argnames=("classes", "neighbors", "temperature"))
def _vote(
    bank: jax.Array, labels: jax.Array, queries: jax.Array, *, classes: int, neighbors: int, temperature: float
) -> jax.Array:
    """Return each query's class by its nearest neighbours: bank [N, C], labels [N], queries [Q, C] -> int32 [Q]."""

    def vote(query: jax.Array) -> jax.Array:
        similarity = jnp.matmul(bank, query, precision=jax.lax.Precision.HIGHEST)
        nearest, indices = jax.lax.top_k(similarity, neighbors)  # [k]
        votes = jnp.exp((nearest - nearest[:1]) / temperature)[:, None] * jax.nn.one_hot(labels[indices], classes)
        return votes.sum(0).argmax()

    return jax.lax.map(vote, queries, batch_size=BLOCK)


def knn_accuracy(
    training: Labelled, validation: Labelled, *, classes: int, neighbors: int, temperature: float
) -> float:
    """Return the kNN accuracy on the validation features.

    Each of the nearest training features votes with weight exp(s / temperature), where s is the cosine similarity.
    """

    def unit(features: np.ndarray) -> jax.Array:
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        return jnp.asarray(features / np.maximum(lengths, 1e-12))

    bank, labels, queries = unit(training.features), jnp.asarray(training.labels), unit(validation.features)
    options = {"classes": classes, "neighbors": min(neighbors, len(bank)), "temperature": temperature}
    return float((np.asarray(_vote(bank, labels, queries, **options)) == validation.labels).mean())


class _Linear(NamedTuple):
    kernel: jax.Array  # [C, classes]
    bias: jax.Array  # [classes]

    def __call__(self, features: jax.Array) -> jax.Array:
        return jnp.matmul(features, self.kernel, precision=jax.lax.Precision.HIGHEST) + self.bias[None]


@functools.partial(jax.jit, static_argnames="classes")
def _fit(features: jax.Array, labels: jax.Array, penalty: jax.Array, *, classes: int) -> _Linear:
    """Fit logistic regression on features [N, C] and labels [N] by full-batch L-BFGS."""

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
    """Return the accuracy of logistic regression on the validation features, and its penalty on the weights.

    The penalty is the one of PENALTIES with the best accuracy on held-out training features, the strongest in a tie.
    The layer is then refitted on all training features.
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
    """Probe the features of a stored run of any task.

    Args:
        run: from `read_run`; `config.probe` holds the settings.
        probe: one of PROBES.
        mesh: the devices.
        batch_size: global.

    Raises:
        UserError: if training or validation images are missing or have no labels.
    """
    config = run.config
    keys = ("--source", "--validation")
    source, validation = labelled.open_both(config, keys)
    if validation is None:
        raise UserError("--validation is missing; write --validation with folder:PATH or tfds:NAME")
    read = FeatureReader(config, run.graph, run.params, mesh, batch_size)
    start = time.monotonic()
    training = read(run.params, source, keys[0], config.probe.images)
    queries = read(run.params, validation, keys[1])
    count, width = training.features.shape
    images, unreadable = len(queries.labels), training.unreadable + queries.unreadable
    console.say(f"read {count + images:,} features of width {width} in {console.duration(time.monotonic() - start)}")
    options: dict[str, Any]
    if probe == "knn":
        options = {"neighbors": config.probe.neighbors, "temperature": config.probe.temperature}
        top1 = knn_accuracy(training, queries, classes=len(source.classes), **options)
    else:
        top1, penalty = linear_accuracy(training, queries, classes=len(source.classes), seed=config.seed)
        options = {"penalty": penalty}
    settings = ", ".join(f"{key} {value:g}" for key, value in options.items())
    line = f"{probe} top-1 {top1:.2%} of {images:,} images, from {count:,} ({settings})"
    line += f"; {unreadable} unreadable images do not count" if unreadable else ""
    values = {"training_images": count, "images": images, "unreadable": unreadable, "top1": top1}
    return line, {"step": run.step, "probe": probe, "stage": config.probe.stage, **options, **values}

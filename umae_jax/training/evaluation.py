"""Accuracy on every image of a source, each counted once, whatever the devices and the batch size.

In bfloat16 another batch size may round logits otherwise, so that an image whose best two classes are all but equal may
change sides; in float32 that is as good as never.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.data.on_device import normalize
from umae_jax.data.pipeline import Batch, EvalLoader, abstract_batch
from umae_jax.data.sources import Source, open_source
from umae_jax.errors import UserError, listing, require
from umae_jax.training.sharding import batch_sharding, replicated
from umae_jax.training.step import Params


class Accuracy(NamedTuple):
    """How many images were classified rightly.

    Attributes:
        images: that could be read; the others do not count.
        top1, top5: the share of them whose class is the likeliest, or among the five likeliest.
        unreadable: how many could not be read.
    """

    images: int
    top1: float
    top5: float
    unreadable: int


def rank_of(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """How many classes come before the right one: labels int32 [B], logits [B, classes] -> int32 [B].

    Of equal logits the lower class comes first. What is not a number never counts in the right class's favour.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)  # [B, 1]
    classes = jnp.arange(logits.shape[1])[None]
    behind = (logits < own) | ((logits == own) & (classes > labels[:, None]))
    return logits.shape[1] - 1 - behind.sum(1, dtype=jnp.int32)


def make_evaluator(
    config: ConfigDict,
    graph: nnx.GraphDef,
    params: Params,
    source: Source,
    mesh: Mesh,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> Callable[[Params], Accuracy]:
    """Compile a classifier's evaluation: a function of its parameters.

    Args:
        config: of the classifier.
        graph: of it.
        params: its parameters, or their shapes with their shardings.
        source: what to classify.
        mesh: the devices.
        batch_size: global.
        check: called before each batch; may raise to break off.
    """
    sharding = batch_sharding(mesh)
    named: set[str] = set()
    begin = jax.jit(lambda: jnp.zeros(3, jnp.int32), out_shardings=replicated(mesh))

    def count(totals: jax.Array, params: Params, batch: Batch) -> jax.Array:
        images = normalize(batch.image, config.data.mean, config.data.std)
        rank = rank_of(jnp.maximum(batch.label, 0), nnx.merge(graph, params)(images))
        there = batch.label >= 0
        return totals + jnp.stack([there.sum(), (there & (rank < 1)).sum(), (there & (rank < 5)).sum()])

    totals = jax.ShapeDtypeStruct((3,), jnp.int32, sharding=replicated(mesh))
    jitted = jax.jit(count, donate_argnums=0, out_shardings=replicated(mesh))
    compiled = jitted.lower(totals, params, abstract_batch(config, batch_size, sharding)).compile()

    def evaluate(params: Params) -> Accuracy:
        totals = begin()
        for batch in EvalLoader.of(config, source, "validation.source", sharding, batch_size=batch_size, named=named):
            check()
            totals = compiled(totals, params, batch)
        images, top1, top5 = (int(total) for total in jax.device_get(totals))
        require(images > 0, "validation.source: none of its images can be read; repair them or name another source")
        return Accuracy(images, top1 / images, top5 / images, len(source) - images)

    return evaluate


def open_validation(
    config: ConfigDict, training: Source, *, keys: tuple[str, str] = ("data.source", "validation.source")
) -> Source | None:
    """The images that accuracy is measured on, if the configuration names some.

    Args:
        config: whose `validation` names them.
        training: the images to train on, or a probe.
        keys: what the user named the two with, for error messages.

    Raises:
        UserError: if these or the training data have no labels, or other classes.
    """
    if config.validation.source is None:
        return None
    check_classes(training, keys[0])
    source = open_labelled_validation(config, keys[1])
    if source.classes != training.classes:
        ours, theirs = set(training.classes), set(source.classes)
        more, less = sorted(theirs - ours), sorted(ours - theirs)
        only = [f"{listing(names)} only in {key}" for names, key in ((more, "it"), (less, keys[0])) if names]
        raise UserError(
            f"{keys[1]}: its classes are not those of {keys[0]} ({'; '.join(only) or 'another order'}); "
            "name the same folders, or labels, in both"
        )
    return source


def open_labelled_validation(config: ConfigDict, key: str) -> Source:
    """The images that `config.validation` names; `key` is what the user named them with, for error messages.

    Raises:
        UserError: if there are none, or they have no labels.
    """
    where = config.validation
    source = open_source(where.source, split=where.split, data_dir=config.data.data_dir, key="validation")
    check_classes(source, key)
    return source


def check_classes(source: Source, key: str) -> None:
    """Check that a source has labels of at least two classes.

    Raises:
        UserError: if not.
    """
    require(
        bool(source.classes),
        f"{key}: its images have no labels; put those of each class into a subfolder of their own, named after it "
        "(none beside these), or name a TFDS data set with labels",
    )
    require(len(source.classes) > 1, f"{key}: there is one class alone, {source.classes[0]}; two at least are needed")

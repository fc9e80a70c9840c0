"""Accuracy of a classifier on labelled images, also per class."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.data.sources import Source
from umae_jax.errors import printable, require
from umae_jax.tasks import labelled
from umae_jax.training.sharding import replicated
from umae_jax.training.task import Batch, Params

MAX_ROWS = 20  # of the table of classes


class Accuracy(NamedTuple):
    """Accuracy on a data set."""

    images: int  # number of readable images; unreadable ones do not count
    top1: float  # fraction whose class has the highest logit
    top5: float  # fraction whose class is among the five highest logits
    unreadable: int  # number of unreadable images


class Results(NamedTuple):
    """Predictions for the readable images of a source, each int32 [N]."""

    labels: np.ndarray
    predicted: np.ndarray  # class with the highest logit
    ranks: np.ndarray  # number of classes ranked above the true one
    unreadable: int  # number of unreadable images

    @property
    def accuracy(self) -> Accuracy:
        """Accuracy over all classes."""
        images = len(self.ranks)
        top1, top5 = (int((self.ranks < k).sum()) / images for k in (1, 5))
        return Accuracy(images, top1, top5, self.unreadable)

    def per_class(self, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return number of images and top-1 of each class that has images, by its name."""
        images = np.bincount(self.labels, minlength=len(classes)).tolist()
        correct = np.bincount(self.labels[self.ranks < 1], minlength=len(classes)).tolist()
        rows = zip(classes, images, correct, strict=True)
        return {name: {"images": count, "top1": hits / count} for name, count, hits in rows if count}

    def table(self, classes: Sequence[str]) -> str:
        """Return top-1 per class, with the class that it is most often taken for; if there are many, the worst ones."""
        measured = self.per_class(classes)
        shown = sorted(measured, key=lambda name: measured[name]["top1"]) if len(measured) > MAX_ROWS else [*measured]
        rows = [("class", "images", "top-1", "most often taken for")]
        rows += [(printable(name), *self._cells(classes, name, **measured[name])) for name in shown[:MAX_ROWS]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"  {a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
        if len(measured) > MAX_ROWS:
            lines.append(f"  and {len(measured) - MAX_ROWS:,} more classes, which are better")
        return "\n".join(lines)

    def _cells(self, classes: Sequence[str], name: str, *, images: int, top1: float) -> tuple[str, str, str]:
        """Return the cells of a row of the table."""
        wrong = self.predicted[(self.labels == classes.index(name)) & (self.ranks > 0)]
        counts = np.bincount(wrong, minlength=1)
        other = f"{printable(classes[int(counts.argmax())])} ({counts.max():,})" if len(wrong) else ""
        return f"{images:,}", f"{top1:.2%}", other


def rank_of(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Count the classes ranked above the true one: labels int32 [B], logits [B, classes] -> int32 [B].

    Among equal logits the lower class ranks first. A NaN never improves the rank of the true class.
    """
    true = jnp.take_along_axis(logits, labels[:, None], axis=1)  # [B, 1]
    classes = jnp.arange(logits.shape[1])[None]
    behind = (logits < true) | ((logits == true) & (classes > labels[:, None]))
    return logits.shape[1] - 1 - behind.sum(1, dtype=jnp.int32)


def make_evaluator(
    config: ConfigDict,
    graph: nnx.GraphDef,
    params: Params,
    source: Source,
    mesh: Mesh,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
    key: str = "validation.source",
) -> Callable[[Params], Results]:
    """Compile the evaluation of a classifier on every image of a source, each counted once.

    In bfloat16 the logits, and so the order of two nearly equal classes, can depend on the batch size.

    Args:
        config, graph: of the classifier.
        params: its parameters, or their shapes with shardings.
        source: labelled images.
        mesh: the devices.
        batch_size: global.
        check: called before each batch; may raise to stop the evaluation.
        key: the configuration key or flag that names the source, for error messages.
    """
    loader = labelled.eval_loader(config, source, key, mesh, batch_size, None, set())

    def rank(params: Params, batch: Batch) -> dict[str, jax.Array]:
        labels = jnp.maximum(batch["label"], 0)
        logits = nnx.merge(graph, params)(batch["image"])
        predicted = logits.argmax(1).astype(jnp.int32)
        return {"labels": labels, "predicted": predicted, "ranks": rank_of(labels, logits), "valid": batch["valid"]}

    jitted = jax.jit(rank, out_shardings=replicated(mesh))  # every process gets all results
    compiled = jitted.lower(params, labelled.abstract_eval_batch(config, mesh, batch_size)).compile()

    def evaluate(params: Params) -> Results:
        batches = []
        for batch in loader:
            check()
            batches.append(compiled(params, batch))
        columns = jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(batches))
        valid = columns.pop("valid")
        require(bool(valid.any()), f"{key}: none of its images can be read; repair them or name another source")
        return Results(
            **{name: column[valid] for name, column in columns.items()}, unreadable=len(source) - valid.sum().item()
        )

    return evaluate

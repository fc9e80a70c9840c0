"""What fine-tuning adds to a run: class names, the loss on augmented images, and a pre-trained encoder's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.data.on_device import mix, normalize, random_erase, random_flip, sample_keys, smooth_targets
from umae_jax.data.pipeline import Batch
from umae_jax.data.sources import Source
from umae_jax.errors import UserError, require
from umae_jax.models.positions_table import PositionTable, resize_positions
from umae_jax.training.evaluation import check_classes
from umae_jax.training.step import LossFunction, Params


def name_classes(config: ConfigDict, source: Source) -> None:
    """Write the classes of the training data into the configuration.

    Raises:
        UserError: if there are none, or as many as it names are not there.
    """
    check_classes(source, "data.source")
    classes = len(source.classes)
    require(
        config.model.classes in (None, classes),
        f"model.classes is {config.model.classes}, but {config.data.source} has {classes} classes; "
        f"write --config.model.classes={classes}",
    )
    config.model.classes = classes
    config.data.class_names = tuple(source.classes)


def make_loss(config: ConfigDict, graph: nnx.GraphDef) -> LossFunction:
    """The loss of parameters on a batch: flip, normalise, erase, mix and drop paths by each sample's own key.

    Args:
        graph: of a `Classifier`.
    """
    augment = config.augment

    def loss(params: Params, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, params)
        split = jax.vmap(lambda key: jax.random.split(key, 4))
        flip, erase, mixing, drop = split(sample_keys(config.seed, batch.sample_index)).swapaxes(0, 1)
        images = normalize(random_flip(batch.image, flip), config.data.mean, config.data.std)
        if augment.erase:
            images = random_erase(images, erase, augment.erase)
        targets = smooth_targets(batch.label, config.model.classes, augment.label_smoothing)
        images, targets = mix(images, targets, mixing, mixup=augment.mixup, cutmix=augment.cutmix)
        return optax.softmax_cross_entropy(model(images, drop), targets).mean()

    return loss


def adapt_pretrained(
    config: ConfigDict, wanted: nnx.State, pretrained: ConfigDict, encoder: nnx.State, name: str
) -> Params:
    """The encoder of another model as a part of a classifier's parameters, {"encoder": ...}, on the host.

    Position tables are resized where images have another size than in pre-training.

    Args:
        config: of the classifier.
        wanted: its own encoder, in shapes; what it has not, such as a last norm, is left out.
        pretrained: configuration of the model that the encoder is from.
        encoder: the encoder's parameters.
        name: where it is from, for the error message.

    Raises:
        UserError: naming the sizes that differ.
    """
    keys = ["encoder", "channels", "patch", "widths", "depths", "heads", "mlp_ratios"]
    keys += ["position_width"] if config.model.encoder == "swin" else []
    differing = [
        f"model.{key} is {pretrained.model[key]} there, {config.model[key]} here"
        for key in keys
        if pretrained.model[key] != config.model[key]
    ]
    if differing:
        raise UserError(
            f"init: {name} holds an encoder of other sizes ({'; '.join(differing)}); "
            "choose a configuration of its sizes, or set these keys"
        )
    variables = dict(nnx.to_flat_state(encoder))
    table = ("positions", "table")
    side = config.model.patch
    grids = [(image[0] // side, image[1] // side) for image in (pretrained.image_size, config.image_size)]
    if config.model.encoder != "swin":
        leading = config.model.encoder == "vit"
        fixed = PositionTable(config.model.widths[0], grids[0], class_token=leading).fixed()
        found = jnp.asarray(variables[table][...] if table in variables else fixed)
        resized = resize_positions(found, *grids, leading=int(leading))
        variables[table] = nnx.Param(np.asarray(resized))
    chosen = {path: variables[path] for path, _ in nnx.to_flat_state(wanted)}
    return nnx.State({"encoder": nnx.from_flat_state(chosen)})

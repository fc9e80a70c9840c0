"""Labelled images for training, validation and probes."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.console import say
from umae_jax.data.pipeline import EvalLoader, abstract_batch, readers
from umae_jax.data.sources import Source, open_source
from umae_jax.data.transforms import LoadCentralCrop
from umae_jax.errors import UserError, listing, require
from umae_jax.tasks.splitting import split
from umae_jax.training.sharding import batch_sharding


def open_training(config: ConfigDict) -> Source:
    """Open the images that `config.data` names, and print their summary.

    Raises:
        UserError: if there are none.
    """
    data = config.data
    source = open_source(data.source, split=data.split, data_dir=data.data_dir, max_pixels=data.max_pixels)
    say_summary(source)
    return source


def open_validation(config: ConfigDict, key: str = "validation.source") -> Source:
    """Open the labelled images that `config.validation` names, and print their summary.

    Raises:
        UserError: if there are none, or they have no labels; it names `key`, the key or flag that selects them.
    """
    named, data = config.validation, config.data
    source = open_source(
        named.source, split=named.split, data_dir=data.data_dir, key="validation", max_pixels=data.max_pixels
    )
    say_summary(source)
    check_labelled(source, key)
    return source


def open_matching_validation(
    config: ConfigDict, training: Source, keys: tuple[str, str] = ("data.source", "validation.source")
) -> Source | None:
    """Open the validation images, whose classes must be those of the training images; None if the source is not set.

    Raises:
        UserError: if either has no labels, or the classes differ; it names `keys`, the keys or flags of the two.
    """
    if config.validation.source is None:
        return None
    check_labelled(training, keys[0])
    source = open_validation(config, keys[1])
    if source.classes != training.classes:
        ours, theirs = set(training.classes), set(source.classes)
        extra, missing = sorted(theirs - ours), sorted(ours - theirs)
        only = [f"{listing(names)} only in {key}" for names, key in ((extra, "it"), (missing, keys[0])) if names]
        raise UserError(
            f"{keys[1]}: its classes differ from those of {keys[0]} ({'; '.join(only) or 'another order'}); "
            "use the same folders, or labels, in both"
        )
    return source


def say_summary(source: Source) -> None:
    """Print the number of images and classes, and what was left out."""
    if summary := getattr(source, "summary", ""):  # sources of other packages may lack it
        say(summary)


def fraction_of(config: ConfigDict) -> float:
    """Return the part of the training images that validates: 0 if validation images are named, or without the key."""
    return 0.0 if config.validation.source is not None else config.validation.get("fraction", 0.0)


def open_both(
    config: ConfigDict, keys: tuple[str, str] = ("data.source", "validation.source")
) -> tuple[Source, Source | None]:
    """Open training and validation images; without a validation source, hold out `validation.fraction` of the former.

    Raises:
        UserError: see `open_matching_validation`.
    """
    source = open_training(config)
    fraction = fraction_of(config)
    if fraction == 0:
        return source, open_matching_validation(config, source, keys)
    check_labelled(source, keys[0])
    training, validation = split(source, fraction, config.seed)
    return training, validation if len(validation) else None


def check_labelled(source: Source, key: str) -> None:
    """Check that a source has labels of at least two classes.

    Raises:
        UserError: naming the key.
    """
    require(
        bool(source.classes),
        f"{key}: its images have no labels; put the images of each class into a subfolder named after it "
        "(and none beside these), or name a TFDS data set with labels",
    )
    require(len(source.classes) > 1, f"{key}: there is only one class, {source.classes[0]}; at least two are needed")


def sample_arrays(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of a labelled sample's arrays: image uint8 [H, W, C] and label int32 []."""
    image = (*config.image_size, config.model.channels)
    return {"image": jax.ShapeDtypeStruct(image, jnp.uint8), "label": jax.ShapeDtypeStruct((), jnp.int32)}


def eval_loader(
    config: ConfigDict, source: Source, key: str, mesh: Mesh, batch_size: int, images: int | None, named: set[str]
) -> EvalLoader:
    """Load the central crop and label of every image, or of `images` of them; see `EvalLoader`."""
    labels = (len(source.classes), key)
    return EvalLoader(
        len(source),
        LoadCentralCrop(source, config.image_size, config.model.channels, config.validation.crop, labels),
        batch_size=batch_size,
        sharding=batch_sharding(mesh),
        images=images,
        seed=config.seed,
        named=named,
        readers=readers(config),
    )


def abstract_eval_batch(config: ConfigDict, mesh: Mesh, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, dtype and sharding of the arrays of a batch of `eval_loader`."""
    arrays = sample_arrays(config) | {"valid": jax.ShapeDtypeStruct((), jnp.bool_)}
    return abstract_batch(arrays, batch_size, batch_sharding(mesh))

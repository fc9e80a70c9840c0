"""The first parameters of a detector: those of a pre-trained encoder, or of another detector."""

from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from umae_jax import console
from umae_jax.config import CONFIG_FILE, read_config
from umae_jax.errors import UserError, listing, naming
from umae_jax.features import read_encoder
from umae_jax.files import AnyPath, locate
from umae_jax.tasks.initialization import adapt_pretrained, describe_loaded
from umae_jax.training.task import Params
from umae_jax.weights.huggingface import resolve_weights
from umae_jax.weights.stored_run import read_run


def initial_params(config: ConfigDict, abstract: Params) -> Params | None:
    """Return the parameters that `init` names, on the host; None without `init`.

    The heads of a detector are taken where their shapes agree: all but those of the classes, if these differ.

    Args:
        config: of the new detector.
        abstract: its parameters, in shapes.

    Raises:
        UserError: if there are no such weights, or the encoder has other sizes.
    """
    if config.init is None:
        console.say("init is not set: training from scratch")
        return None
    path = resolve_weights(locate(config.init, "init"))
    if path.is_dir() and (path / CONFIG_FILE).is_file() and read_config(path / CONFIG_FILE).model.method == "detector":
        return _from_detector(config, abstract, path)
    pretrained = read_encoder(config.init, "init")
    encoder = adapt_pretrained(config, abstract["backbone"]["encoder"], pretrained.config, pretrained.params)
    rest = nnx.State({name: part for name, part in abstract["backbone"].items() if name != "encoder"})
    shapes = nnx.State({"encoder": abstract["backbone"]["encoder"], **rest})
    for line in describe_loaded(config, shapes, pretrained, encoder):
        console.say(line)
    return nnx.State({"backbone": encoder})


def _from_detector(config: ConfigDict, abstract: Params, path: AnyPath) -> Params:
    """Return all parameters of a detector's run that fit."""
    with naming("init"):
        run = read_run(path)
    theirs = dict(nnx.to_flat_state(jax.device_get(run.params)))
    loaded: dict[Any, Any] = {}
    new = []
    for keys, variable in nnx.to_flat_state(abstract):
        if keys in theirs and theirs[keys].shape == variable.shape:
            loaded[keys] = theirs[keys]
        else:
            new.append(".".join(map(str, keys[:-1])))
    missing = [name for name in new if name.startswith("backbone.encoder")]
    if missing:
        raise UserError(
            f"init: {config.init} holds a detector whose encoder has other sizes ({listing(missing)}); choose a "
            "configuration of its sizes"
        )
    console.say(
        f"init: loaded {len(loaded):,} tensors of the detector in {path}, step {run.step:,}; new: "
        f"{listing(list(dict.fromkeys(new))) or 'nothing'}"
    )
    return nnx.from_flat_state(list(loaded.items()))

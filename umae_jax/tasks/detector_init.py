"""The first parameters of a detector: those of a pre-trained encoder, or of another detector."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from umae_jax import console
from umae_jax.detection.mmdet import fit_tensors, is_detector, remove_prefix
from umae_jax.errors import listing, naming, require
from umae_jax.features import PretrainedParams, read_encoder
from umae_jax.files import AnyPath, locate
from umae_jax.tasks.initialization import adapt_pretrained, describe_loaded, modules_of
from umae_jax.training.task import Params
from umae_jax.weights.encoder_file import encoder_of
from umae_jax.weights.files import read_weights
from umae_jax.weights.huggingface import resolve_weights
from umae_jax.weights.stored_run import read_run

_ENCODER = ("backbone", "encoder")


class _Pretrained(NamedTuple):
    """The content of a run or a weight file."""

    encoder: PretrainedParams | None
    others: dict[Any, Any]  # flat parameters of a detector that fit, beside its encoder
    unused: list[str]  # names of tensors that do not fit


def initial_params(config: ConfigDict, abstract: Params) -> Params | None:
    """Return the parameters that `init` names, on the host; None without `init`.

    Those of a detector are taken where their shapes agree: all but those of the classes, if these differ. A detector of
    another program may have a backbone that is no encoder of ours; its other parts are taken.

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
    pretrained = _read_run(path, abstract) if path.is_dir() else _read_file(config, path, abstract)
    loaded = dict(pretrained.others)
    if pretrained.encoder is not None:
        encoder = adapt_pretrained(
            config, abstract["backbone"]["encoder"], pretrained.encoder.config, pretrained.encoder.params
        )
        loaded |= {("backbone", *keys): variable for keys, variable in nnx.to_flat_state(encoder)}
        part = nnx.from_flat_state([(keys[1:], value) for keys, value in loaded.items() if keys[0] == "backbone"])
        for line in describe_loaded(config, abstract["backbone"], pretrained.encoder, part):
            console.say(line)
    if pretrained.others:
        new = [keys for keys, _ in nnx.to_flat_state(abstract) if keys not in loaded and keys[0] != "backbone"]
        console.say(
            f"init: loaded {len(pretrained.others):,} tensors of a detector beside its encoder; new: "
            f"{listing(modules_of(new)) or 'nothing'}"
            + (f"; not used: {listing(pretrained.unused)}" if pretrained.unused else "")
        )
    return nnx.from_flat_state(list(loaded.items()))


def _read_run(path: AnyPath, abstract: Params) -> _Pretrained:
    """Return the encoder of a run and, of a detector, all that fits."""
    with naming("init"):
        run = read_run(path)
    params = jax.device_get(run.params)
    shapes = {keys: variable.shape for keys, variable in nnx.to_flat_state(abstract)}
    others, unused = {}, []
    for keys, variable in nnx.to_flat_state(params) if "backbone" in params else ():
        if keys[:2] == _ENCODER:
            continue
        if shapes.get(keys) == variable.shape:
            others[keys] = variable
        else:
            unused.append(keys)
    encoder = PretrainedParams(run.config, encoder_of(params), path, run.step)
    return _Pretrained(encoder, others, modules_of(unused))


def _read_file(config: ConfigDict, path: AnyPath, abstract: Params) -> _Pretrained:
    """Return the encoder of a weight file and, of a detector with mmdet's names, all that fits."""
    with naming("init"):
        tensors = read_weights(path).tensors
    if not is_detector(tensors):
        return _Pretrained(read_encoder(config.init, "init"), {}, [])
    tensors = remove_prefix(tensors)
    broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    require(not broken, f"init: {path} holds values that are not finite ({listing(broken)}); choose another file")
    fitting = fit_tensors(abstract, tensors)
    encoder = None
    if any(name.startswith("pyramid.") for name in tensors):  # only our own files have norms of the maps
        encoder = read_encoder(config.init, "init")
    else:
        console.say("init: the file's backbone is no encoder of this project, so the encoder is new")
    unused = [name for name in tensors if any(problem.startswith(f"{name} is") for problem in fitting.problems)]
    return _Pretrained(encoder, fitting.params, [*unused, *fitting.unexpected])

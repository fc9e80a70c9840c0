"""The encoder of a run in one file, for `load_encoder`."""

from flax import nnx
from ml_collections import ConfigDict

from umae_jax.weights.exchange import metadata_of, without_paths
from umae_jax.weights.files import Weights, encode_weights
from umae_jax.weights.names import NOT_ENCODER, to_reference

ENCODER_FILE = "encoder.safetensors"  # in a run's directory


def encoder_of(params: nnx.State) -> nnx.State:
    """Return the encoder's part of a model's parameters."""
    return params["encoder"] if "encoder" in params else params["backbone"]["encoder"]


def encode_encoder(config: ConfigDict, encoder: nnx.State, step: int) -> bytes:
    """Encode the parameters of an encoder as a .safetensors file, with the names of the reference.

    Args:
        config: of the whole model.
        encoder: parameters, on the host.
        step: of the run, for the metadata.
    """
    config = without_paths(config)
    tensors = to_reference(config, nnx.State({"encoder": encoder}))
    tensors = {name: array for name, array in tensors.items() if not name.startswith(NOT_ENCODER)}
    return encode_weights(".safetensors", Weights(tensors, metadata_of(config, step)))

"""Compare the speed of training steps, or measure the data loader.

    python -m umae_jax.benchmark --config configs/pretrain_swin_tiny.py [--against FILE ...] [--peer NAME ...]
    python -m umae_jax.benchmark --config configs/pretrain_swin_tiny.py --config.data.source=folder:PATH --loader

Contenders take turns, so other load on the machine affects all alike. Steps are timed on one batch that stays on the
devices, which lies in the largest canvas of a detector. Peers are steps in PyTorch (pip install "umae_jax[peers]").
"""

import importlib.util
import json
import os

from absl import flags
from ml_collections import config_flags

from umae_jax import cli, console
from umae_jax.errors import require

PEERS = ("torch_um_mae", "hf_vit_mae", "hf_swin_simmim")

_CONFIG = cli.define_config()
_AGAINST = flags.DEFINE_multi_string("against", [], "Further configurations, run in the dtype of --config.")
_PEER = flags.DEFINE_multi_string("peer", [], f"PyTorch steps at the sizes of --config: {', '.join(PEERS)}.")
_BATCH = flags.DEFINE_integer("batch", None, "Images per device and step; 8 on CPUs, else 128.", lower_bound=1)
_LOADER = flags.DEFINE_boolean("loader", False, "Measure the data loader instead, alone and with the step.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each contender.", lower_bound=1)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Images per turn of --loader.", lower_bound=1)
_PARTS = flags.DEFINE_boolean("parts", False, "Also profile the JAX steps by part of the model.")
_JSON = flags.DEFINE_boolean("json", False, "Print JSON instead of tables.")


def main() -> None:
    """Measure steps or the loader."""
    config = cli.read_config(_CONFIG)

    import jax

    from umae_jax.benchmarking import command

    if _PARTS.value and importlib.util.find_spec("libtpu") is not None and jax.default_backend() != "tpu":
        platforms = "cpu" if jax.default_backend() == "cpu" else "cuda,cpu"
        require(
            bool(os.environ.get("JAX_PLATFORMS")),
            "--parts: libtpu is installed and its profiler crashes without a TPU; set the environment variable "
            f"JAX_PLATFORMS={platforms}",
        )
    if _LOADER.value:
        result, lines = command.measure_loader(config, _BATCH.value, _NUM_IMAGES.value, _ROUNDS.value)
    else:
        name = config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])
        configs = [(name, config), *((other, command.read_other(other)) for other in _AGAINST.value)]
        result, lines = command.time_steps(configs, _PEER.value, _BATCH.value, _ROUNDS.value, parts=_PARTS.value)
    console.result(json.dumps(result) if _JSON.value else lines)


if __name__ == "__main__":
    cli.run(main)

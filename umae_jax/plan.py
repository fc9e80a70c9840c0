"""Plan a run without its hardware: memory, speed, and the cost of the whole schedule.

    python -m umae_jax.plan --config configs/pretrain_swin_large.py --topology v5e:16x16 [--topology v6e:16x16 ...]

compiles the real training step for each TPU slice with the TPU compiler, on any x86-64 machine with Linux
(pip install "umae_jax[plan]"). Without --topology it compiles for the local devices.

    python -m umae_jax.plan --config CONFIG --topology v5e:2x2 --topology v5e:4x4 --growth FOLDER

instead shows how the cost of a step grows: with image size, depth and batch on the first slice, and with the number of
chips.
"""

from absl import flags

from umae_jax import cli
from umae_jax.config import check
from umae_jax.errors import require
from umae_jax.planning.hardware import GPUS, parse_topology

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_multi_string("topology", [], "TPU slice such as v5e:16x16, or a local GPU such as h100.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", None, "Images per epoch, if the data are elsewhere.", lower_bound=1)
_LARGEST = flags.DEFINE_boolean("largest", True, "Search for the largest batch that fits; needs several compilations.")
_PARTS = flags.DEFINE_boolean("parts", False, "Print cycles, FLOPs and bytes by part of the model.")
_GROWTH = flags.DEFINE_string("growth", None, "Instead show how the cost grows: folder for growth.json and growth.png.")
_JSON = flags.DEFINE_boolean("json", False, "Print JSON instead of tables.")


def main() -> None:
    """Plan for the topologies of the command line."""
    config = cli.read_config(_CONFIG)
    for name in _TOPOLOGY.value:
        if name.lower() not in GPUS:
            parse_topology(name)  # reject a wrong name before compiling

    from umae_jax.planning import command  # import JAX
    from umae_jax.planning.targets import find_target, local_target

    num_images = command.resolve_num_images(config, _NUM_IMAGES.value)
    targets = [find_target(name) for name in _TOPOLOGY.value] or [local_target()]
    if _GROWTH.value:
        message = "--growth writes growth.json, parts included; omit --json and --parts"
        require(not (_PARTS.value or _JSON.value), message)
        command.print_growth(config, targets, _GROWTH.value)
        return
    for target in targets:
        check(config, len(target.devices))
    options = {"search": _LARGEST.value, "parts": _PARTS.value, "as_json": _JSON.value}
    command.print_plans(config, targets, num_images, **options)


if __name__ == "__main__":
    cli.run(main)

"""Check processes, devices, data and directory before you start a run.

    python -m umae_jax.doctor [--config FILE] [--workdir DIR]
        [--coordinator_address HOST:PORT --num_processes N --process_id I]

Start it as you would start the run, in every process. Process 0 prints the findings. If one is WRONG, the exit status
is 2.
"""

from absl import flags

from umae_jax import cli, console
from umae_jax.cluster_flags import ClusterFlags
from umae_jax.errors import require
from umae_jax.files import locate

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory that the run would write to.")
_CLUSTER = ClusterFlags()


def main() -> None:
    """Inspect all processes, and print the findings."""
    from umae_jax import diagnosis  # imports JAX

    workdir = locate(_WORKDIR.value, "--workdir") if _WORKDIR.value else None
    cli.join(_CLUSTER, _CONFIG.value, workdir)
    findings = diagnosis.diagnose(_CONFIG.value, workdir)
    console.result("\n".join(f"{'ok   ' if ok else 'WRONG'}  {line}" for ok, line in findings))
    require(all(ok for ok, _ in findings), "fix what is marked WRONG above")


if __name__ == "__main__":
    cli.run(main)

import re

import jax
import pytest

import umae_jax
from tests import commands, golden, small
from tests.runs import store
from umae_jax.config import default_config
from umae_jax.model_table import stored_counts
from umae_jax.models.counts import count
from umae_jax.tasks import make_task
from umae_jax.training.sharding import make_mesh
from umae_jax.training.state import abstract_run
from umae_jax.weights.exchange import export_weights

SMALLEST = ("swin_tiny", "pvt_tiny", "vit_small")


def methods_of(size):
    """Return the methods whose images have one size."""
    return [method for method in umae_jax.list_models()[size] if method != "detector"]


def size_of(tree):
    return sum(array.size for array in jax.tree.leaves(tree))


def test_the_command_lists_a_size_with_its_methods():
    output, _ = commands.run("models", "vit_small", devices=1)
    lines = [line.split() for line in output.splitlines() if line.startswith("vit_small")]
    assert [line[1] for line in lines] == ["um_mae", "mae", "simmim", "classifier"]
    parameters, tokens, work = zip(*(line[-3:] for line in lines), strict=True)
    assert parameters[3] == "22,050,664"
    assert tokens == ("50", "50", "197", "197")
    # Twice the multiplications of its linear layers and attention, known to be 4.6 billion at this size.
    assert 9.0 < float(work[3]) < 10.0
    assert float(work[0]) < 0.6 * float(work[2])


def test_every_model_has_stored_counts():
    models = [(size, method) for size in umae_jax.list_models() for method in methods_of(size)]
    assert list(stored_counts()) == models


@pytest.mark.parametrize("size", SMALLEST)
def test_stored_counts_are_those_of_the_models(size):
    for method in methods_of(size):
        stored, counted = stored_counts()[size, method], count(size, method)
        assert stored[:2] == counted[:2]
        assert stored.flops == pytest.approx(counted.flops, rel=0.01)  # XLA may count other operations differently


@pytest.mark.parametrize("size", sorted(umae_jax.list_models().keys() - set(SMALLEST)))
def test_a_run_counts_the_same_parameters(size):
    config = default_config(size)
    config.data.source = "photos"
    assert size_of(abstract_run(make_task(config), make_mesh()).state.params) == stored_counts()[size, "um_mae"][0]


@pytest.mark.parametrize("kind", small.KINDS)
def test_a_model_card_counts_the_same_parameters(kind, tmp_path):
    config = golden.config_of(kind)
    params = small.random_model(config)[1]
    store(tmp_path / "run", config, params)
    export_weights(tmp_path / "run", tmp_path / "model.safetensors")
    assert f"| parameters | {size_of(params):,} |" in (tmp_path / "README.md").read_text()


def test_the_table_of_the_documentation_is_up_to_date():
    page = (commands.ROOT / "docs" / "pretraining.md").read_text()
    for size in umae_jax.list_models():
        counts = [stored_counts()[size, method] for method in ("um_mae", "simmim", "classifier")]
        cells = [f"{count.parameters / 1e6:.1f} M, {count.flops / 1e9:.2f}" for count in counts]
        assert f"| `{size}` | {' | '.join(cells)} |\n" in page


def test_an_unknown_size_is_named():
    _, errors = commands.run("models", "resnet", status=2)
    assert re.match(r"error: there is no size resnet; choose swin_tiny, ", errors)

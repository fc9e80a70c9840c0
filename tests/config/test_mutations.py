"""Any values of the right types give a traced training step, or one sentence; most of them fit no model."""

import jax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from umae_jax.config import COMMON, ENCODERS, METHODS, check, default_config, flat, methods_of, steps_of_epochs
from umae_jax.errors import UserError
from umae_jax.planning.assembly import build
from umae_jax.training.run import durations
from umae_jax.training.sharding import make_mesh

MAX_SENTENCE = 500  # characters
SIZES = {
    "swin_tiny": {"window": 8, "position_width": 4},
    "pvt_tiny": {"sr_ratios": (2, 1)},
    "vit_small": {},
}
STAGES = {"patch": 4, "widths": (8, 16), "depths": (1, 1), "heads": (1, 2), "mlp_ratios": (2, 2)}
DECODER = {"decoder_factor": 1, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, "classes": 4}
MODELS = [(size, method) for size in SIZES for method in methods_of(size)]

SMALL = st.integers(-2, 8)
INTEGERS = SMALL | st.sampled_from((9, 12, 16, 24, 32, 64, 96, 1000, 4096, 2**16, 2**31, 2**32, 10**30, -(10**9)))
FLOATS = st.floats() | st.sampled_from((0.0, 0.5, 1.0, 1e-8, 1 - 2**-53, 1e9, 1e300))
STRINGS = st.text() | st.sampled_from(("", "x" * 5000, "a\nb", "a\0b", "é", "folder:", "none", *ENCODERS, *METHODS))


def small_config(size, method):
    """Return a configuration whose step is traced in a moment."""
    config = default_config(size, method)
    config.image_size, config.batch_size, config.dtype, config.total_steps = (32, 32), 16, "float32", 4
    stages = 1 if size == "vit_small" else 2
    values = {key: value[:stages] if isinstance(value, tuple) else value for key, value in STAGES.items()}
    values |= SIZES[size] | {key: value for key, value in DECODER.items() if key in config.model}
    config.model.update(values)
    return config


def values_of(key, old, accepted):
    """Return a strategy for values of a key's type."""
    integers = INTEGERS.filter(lambda value: not 3 < value <= 128) if "depth" in key else INTEGERS  # tracing is slow
    items = FLOATS if key.startswith("data.") else integers
    few = st.lists(items, max_size=5) | st.lists(SMALL.filter(lambda value: value < 4), min_size=6, max_size=5000)
    one = st.tuples(st.integers(0, 7), items)
    changed = one.map(lambda pair: [pair[1] if place == pair[0] else item for place, item in enumerate(old)])
    tuples = st.one_of(few, changed).map(tuple) if isinstance(old, tuple) else st.nothing()
    strategy = {bool: st.booleans(), int: integers, float: FLOATS, str: STRINGS, tuple: tuples}[accepted.type]
    return st.none() | strategy if accepted.optional else strategy


@st.composite
def mutations(draw):
    """Draw a model and 1 to 4 changes of its configuration, half of them of the model's sizes."""
    size, method = draw(st.sampled_from(MODELS))
    config = small_config(size, method)
    values = flat(config)
    keys = {**COMMON, **ENCODERS[config.model.encoder].keys, **METHODS[method].keys}
    sizes = [key for key in values if key.startswith("model.") or key in ("image_size", "batch_size")]
    names = draw(st.lists(st.sampled_from(sizes) | st.sampled_from(list(values)), min_size=1, max_size=4, unique=True))
    return size, method, {name: draw(values_of(name, values[name], keys[name].check)) for name in names}


def trace(config):
    """Trace the training step of a configuration that passes the check."""
    check(config)
    durations(config, 1000)
    steps_of_epochs(config.validation.every_epochs, 1000, config.batch_size)
    built = build(config, make_mesh(config.mesh.fsdp))
    with jax.set_mesh(built.mesh):
        return jax.eval_shape(built.step, built.run.state, built.batch)


@pytest.mark.parametrize(("size", "method"), [("swin_tiny", "um_mae"), ("pvt_tiny", "simmim"), ("vit_small", "mae")])
def test_the_small_configurations_are_traced(size, method):
    assert trace(small_config(size, method))[1]["loss"].shape == ()


def mutated(size, **changes):
    """Return an argument of the test below: changes of `model` of a um_mae."""
    return size, "um_mae", {f"model.{key}": value for key, value in changes.items()}


@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(mutations())
@example(mutated("vit_small", widths=()))
@example(mutated("pvt_tiny", widths=()))
@example(mutated("pvt_tiny", depths=(10**30, 1)))
@example(mutated("vit_small", depths=(10**6,)))
@example(mutated("vit_small", decoder_depth=10**6))
@example(mutated("swin_tiny", heads=(1,) * 5000))
@example(mutated("swin_tiny", encoder="x" * 5000))
@example(("swin_tiny", "um_mae", {"total_steps": None, "total_epochs": 1e308}))
@example(("swin_tiny", "um_mae", {"validation.every_epochs": 1e308}))
def test_any_values_are_traced_or_one_sentence(case):
    size, method, changes = case
    config = small_config(size, method)
    config.update_from_flattened_dict(changes)
    try:
        trace(config)
    except UserError as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert len(sentence) < MAX_SENTENCE
        assert any(key.rpartition(".")[2] in sentence for key in flat(config))

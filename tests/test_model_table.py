from tests import commands
from umae_jax.model_table import describe


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


def test_the_work_is_counted_from_the_model_that_runs():
    row = describe("pvt_tiny", "um_mae")
    assert row[:5] == ("pvt_tiny", "um_mae", "256 x 256", "18,980,672", "1,024")


def test_an_unknown_size_is_named():
    _, errors = commands.run("models", "resnet", status=2)
    assert "resnet" in errors
    assert "swin_tiny, " in errors

import pytest

from tests import tiny, tiny_classifier
from tests.images import write_folder
from umae_jax.data.sources import open_source
from umae_jax.errors import UserError
from umae_jax.tasks.labelled import fraction_of, open_both, open_matching_validation


@pytest.mark.parametrize(
    ("training", "validation", "message"),
    [
        ((), ("a", "b"), r"^data.source.* no labels"),
        (("a", "b"), (), r"^validation.source.* no labels"),
        (("a",), ("a",), r"^data.source.* one class, a"),
        (("a", "b"), ("a", "c"), r"^validation.source.*\(c only in it; b only in data.source\)"),
        (("a", "b", "c"), ("a", "b"), r"^validation.source.*\(c only in data.source\)"),
    ],
)
def test_classes_that_do_not_match_are_rejected(tmp_path, training, validation, message):
    config = tiny_classifier.get_config()
    config.validation.source = f"folder:{write_folder(tmp_path / 'validation', 4, validation)}"
    source = open_source(f"folder:{write_folder(tmp_path / 'training', 4, training)}")
    with pytest.raises(UserError, match=message) as error:
        open_matching_validation(config, source)
    assert "\n" not in str(error.value)


def test_validation_is_none_without_a_source(tmp_path):
    source = open_source(f"folder:{write_folder(tmp_path, 4)}")
    assert open_matching_validation(tiny_classifier.get_config(), source) is None


def test_a_validation_source_takes_precedence_over_the_fraction(tmp_path):
    config = tiny_classifier.get_config()
    config.data.source = f"folder:{write_folder(tmp_path / 'training', 30, ('a', 'b', 'c'))}"
    config.validation.fraction = 0.2
    training, validation = open_both(config)
    assert (len(training), len(validation)) == (24, 6)
    config.validation.source = f"folder:{write_folder(tmp_path / 'validation', 9, ('a', 'b', 'c'))}"
    training, validation = open_both(config)
    assert (len(training), len(validation)) == (30, 9)


def test_pretraining_holds_out_no_images():
    assert fraction_of(tiny.get_config()) == 0

from pathlib import Path

import pytest

from tests import tiny, tiny_classifier
from umae_jax.errors import UserError
from umae_jax.planning.assembly import assemble
from umae_jax.training.sharding import make_mesh
from umae_jax.training.trainer import check_same_model, durations

DIR = Path("DIR")


def classifier(*names):
    config = tiny_classifier.get_config()
    config.model.classes, config.data.class_names = len(names), names
    return config


def test_a_classifier_of_other_classes_is_refused_by_naming_them():
    with pytest.raises(
        UserError, match=r"DIR holds a classifier of other classes \(dog is emu here, none is owl here\)"
    ):
        check_same_model(classifier("cat", "dog"), classifier("cat", "emu", "owl"), DIR)


def test_class_names_that_were_not_told_are_no_others():
    unknown = classifier("cat", "dog")
    unknown.data.class_names = ()
    check_same_model(unknown, classifier("cat", "dog"), DIR)


def test_another_method_says_it_all():
    with pytest.raises(UserError, match=r"another model \(model.method is um_mae there, classifier here\); choose"):
        check_same_model(tiny.get_config(), tiny_classifier.get_config().copy_and_resolve_references(), DIR)


def test_what_has_changed_is_said(capsys):
    before, after = classifier("cat", "dog"), classifier("cat", "dog")
    before.init, after.init = "one", "other"
    after.optimizer.weight_decay = 0.1
    check_same_model(before, after, DIR)
    told = capsys.readouterr().err
    assert "init has changed, and is not read again" in told
    assert "continuing with optimizer.weight_decay = 0.1 (was 0.05)" in told


def test_the_number_of_classes_is_no_matter_of_pretraining():
    """Which earlier versions wrote."""
    before = tiny.get_config()
    before.model.classes = 1000
    check_same_model(before, tiny.get_config(), DIR)


def test_a_warm_up_longer_than_the_run_is_cut(capsys):
    config = tiny.get_config()
    config.optimizer.warmup_steps = 100
    assert durations(config, 50) == (12, 12)
    assert "the warm-up of 100 steps is cut to the 12 of the run" in capsys.readouterr().err


def test_a_kernel_that_the_devices_cannot_run_is_refused():
    config = tiny.get_config()
    config.fused_attention = True
    with pytest.raises(UserError, match="fused_attention: the kernel is written for TPUs, not for cpu devices; leave"):
        assemble(config, make_mesh())

import pytest

import umae_jax
from umae_jax.errors import UserError, naming, printable, require, shorten
from umae_jax.features import read_encoder
from umae_jax.tasks.evaluation import open_run
from umae_jax.tasks.importing import import_weights
from umae_jax.weights.exchange import export_weights


def test_long_values_are_shortened():
    assert len(shorten("a" * 5000)) == 60
    assert shorten((1,) * 5000) == "(1, 1, 1, 1, 1, 1, 1, 1, ...)"
    assert len(shorten(10**300)) < 80
    assert shorten(0.25) == "0.25"


def test_other_errors_are_not_renamed():
    with pytest.raises(ValueError, match=r"^plain$"), naming("--flag"):
        raise ValueError("plain")
    with pytest.raises(UserError, match=r"^--flag: wrong$"), naming("--flag"):
        require(False, "wrong")


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda folder, file: umae_jax.load_encoder(folder / "nowhere"), "path"),
        (lambda folder, file: umae_jax.load_encoder(folder), "path"),
        (lambda folder, file: read_encoder(file, "init"), "init"),
        (lambda folder, file: export_weights(folder, folder / "x.safetensors"), "DIR"),
        (lambda folder, file: import_weights(file, folder / "run"), "FILE"),
        (lambda folder, file: open_run(folder), "--workdir"),
        (lambda folder, file: umae_jax.pretrain("nowhere", folder), "config"),
        (lambda folder, file: umae_jax.default_config("swin_enormous"), "size"),
        (lambda folder, file: umae_jax.default_config("swin_tiny", "mae"), "method"),
    ],
)
def test_a_message_begins_with_the_argument_flag_or_key(call, key, tmp_path):
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match=f"^{key}: "):
        call(tmp_path, file)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain name.jpg", "plain name.jpg"),
        ("\u00e4\u3000\u732b\U0001f408.jpg", "\u00e4\u3000\u732b\U0001f408.jpg"),
        (b"\xff\xfe.jpg".decode(errors="surrogateescape"), r"\xff\xfe.jpg"),
        ("a\nb\tc\x1b[31m\u2028", r"a\nb\tc\x1b[31m\u2028"),
        ("\ud83d", r"\ud83d"),
    ],
)
def test_names_are_escaped_where_they_are_no_text(name, expected):
    assert printable(name) == expected
    printable(name).encode()

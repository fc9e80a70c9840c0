import pytest

from umae_jax.errors import printable


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

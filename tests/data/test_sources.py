import pickle

import pytest
from PIL import Image

from tests.images import picture, write_folder
from umae_jax.data.prepare import write_data_set
from umae_jax.data.sources import NO_LABEL, open_source
from umae_jax.errors import UserError


def test_photos_are_bundled():
    source = open_source("photos")
    assert len(source) >= 12
    assert source[0].data
    assert source[0].label == NO_LABEL


def test_a_folder_is_searched_for_images_at_any_depth(tmp_path):
    write_folder(tmp_path, 3)
    write_folder(tmp_path / "deep" / "deeper", 2)
    Image.fromarray(picture()).save(tmp_path / "UPPER.PNG")
    Image.fromarray(picture()).save(tmp_path / "web.webp")
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == 7
    assert source.classes == ()
    assert all(source[place].label == NO_LABEL for place in range(7))


def test_subfolders_are_classes(tmp_path):
    write_folder(tmp_path, 6, classes=("cat", "ant"))
    source = pickle.loads(pickle.dumps(open_source(f"folder:{tmp_path}")))
    assert source.classes == ("ant", "cat")
    assert [source[place].label for place in range(6)] == [0, 0, 0, 1, 1, 1]


def test_cyclic_links_are_followed_once(tmp_path):
    write_folder(tmp_path / "images", 2)
    (tmp_path / "images" / "back").symlink_to(tmp_path / "images")
    assert len(open_source(f"folder:{tmp_path}")) == 2


def test_a_missing_split_is_named(tmp_path):
    write_data_set(open_source(f"folder:{write_folder(tmp_path / 'a', 2)}"), "small", str(tmp_path))
    with pytest.raises(UserError, match=r"data.split.*test.*train"):
        open_source("tfds:small", split="test", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet", "data.source: .*'imagenet'"),
        ("folder:", "data.source: .*'folder:'"),
        ("folder:/no/such/place", "/no/such/place"),
        ("tfds:no_such_data_set", "data.source: .*no_such_data_set"),
        ("tfds:Not-A-Name", "data.source: .*Not-A-Name"),
        ("tfds:/", "data.source: .* / in"),
    ],
)
def test_a_missing_source_raises_one_sentence(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        open_source(name, data_dir=str(tmp_path))


def test_a_folder_without_images_raises_one_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(UserError, match=rf"{tmp_path}.*\.jpg"):
        open_source(f"folder:{tmp_path}")

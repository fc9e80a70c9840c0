import pickle

import pytest
from PIL import Image

from tests.images import picture, write_folder
from umae_jax.data.prepare import write_data_set
from umae_jax.data.sources import NO_LABEL, open_source
from umae_jax.errors import UserError


def test_photos_come_along():
    source = open_source("photos")
    assert len(source) >= 12
    assert source[0].data
    assert source[0].label == NO_LABEL


def test_a_folder_is_read_in_place_whatever_its_depth(tmp_path):
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


def test_links_that_lead_back_are_followed_once(tmp_path):
    write_folder(tmp_path / "images", 2)
    (tmp_path / "images" / "back").symlink_to(tmp_path / "images")
    assert len(open_source(f"folder:{tmp_path}")) == 2


@pytest.mark.parametrize("classes", [(), ("ant", "cat")])
def test_a_folder_written_as_a_tfds_data_set_reads_the_same(tmp_path, classes):
    folder = open_source(f"folder:{write_folder(tmp_path / 'images', 6, classes)}")
    written = write_data_set(folder, "my_images", str(tmp_path / "tfds"))
    for name in ("tfds:my_images", f"tfds:{written}"):
        source = open_source(name, data_dir=str(tmp_path / "tfds"))
        assert source.classes == classes
        assert {(record.data, record.label) for record in (source[place] for place in range(6))} == {
            (record.data, record.label) for record in (folder[place] for place in range(6))
        }
        assert source[0].name.endswith(".jpg")


def test_tfds_names_a_split_that_is_missing(tmp_path):
    write_data_set(open_source(f"folder:{write_folder(tmp_path / 'a', 2)}"), "small", str(tmp_path))
    with pytest.raises(UserError, match="no split test; choose train"):
        open_source("tfds:small", split="test", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="exists already"):
        write_data_set(open_source("photos"), "small", str(tmp_path))
    with pytest.raises(UserError, match="--split: 'a/b' will not do"):
        write_data_set(open_source("photos"), "another", str(tmp_path), split="a/b")
    with pytest.raises(UserError, match="--name: 'Not good' will not do"):
        write_data_set(open_source("photos"), "Not good", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet", "unknown source 'imagenet'; write photos, folder:PATH or tfds:NAME"),
        ("folder:", "unknown source"),
        ("folder:/no/such/place", "no folder /no/such/place"),
        ("tfds:no_such_data_set", "no prepared data set no_such_data_set"),
        ("tfds:Not-A-Name", "no prepared data set Not-A-Name"),
        ("tfds:/", "no prepared data set /"),
    ],
)
def test_a_source_that_is_not_there_is_told_in_one_sentence(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        open_source(name, data_dir=str(tmp_path))


def test_an_empty_folder_is_told_in_one_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(UserError, match=r"no image in .* expected files ending in \.jpg"):
        open_source(f"folder:{tmp_path}")

import pytest

from tests.images import write_folder
from umae_jax.data.prepare import write_data_set
from umae_jax.data.sources import open_source
from umae_jax.errors import UserError


def records(source):
    return {(record.data, record.label) for record in map(source.__getitem__, range(len(source)))}


@pytest.mark.parametrize("classes", [(), ("ant", "cat")])
def test_a_data_set_written_from_a_folder_has_the_same_records(tmp_path, classes):
    folder = open_source(f"folder:{write_folder(tmp_path / 'images', 6, classes)}")
    written = write_data_set(folder, "my_images", str(tmp_path / "tfds"))
    assert written[1:] == (6, 0)
    for name in ("tfds:my_images", f"tfds:{written.folder}"):
        source = open_source(name, data_dir=str(tmp_path / "tfds"))
        assert source.classes == classes
        assert records(source) == records(folder)
        assert source[0].name.endswith(".jpg")


def test_unreadable_files_are_named_counted_and_left_out(tmp_path, capsys):
    broken = write_folder(tmp_path / "images", 3) / "broken.jpg"
    broken.symlink_to(tmp_path / "missing.jpg")
    folder = open_source(f"folder:{tmp_path / 'images'}")
    written = write_data_set(folder, "my_images", str(tmp_path))
    assert written[1:] == (3, 1)
    assert capsys.readouterr().err.count(str(broken)) == 1
    assert len(open_source("tfds:my_images", data_dir=str(tmp_path))) == 3


def test_at_least_one_image_must_be_readable(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").symlink_to(tmp_path / "missing.jpg")
    with pytest.raises(UserError, match="--source: none"):
        write_data_set(open_source(f"folder:{tmp_path / 'images'}"), "my_images", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("Not good", "train", "--name: 'Not good'"),
        ("another", "a/b", "--split: 'a/b'"),
        ("taken", "train", "--name: .*taken"),
    ],
)
def test_invalid_names_raise(tmp_path, name, split, message):
    (tmp_path / "taken" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        write_data_set(open_source("photos"), name, str(tmp_path), split=split)

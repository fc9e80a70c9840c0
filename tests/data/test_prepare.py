import os

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


def test_a_file_that_vanishes_does_not_stop_the_others(tmp_path, capsys):
    images = write_folder(tmp_path / "images", 4)
    folder = open_source(f"folder:{images}")
    (images / "001.jpg").unlink()
    (images / "002.jpg").unlink()
    (images / "002.jpg").mkdir()
    assert write_data_set(folder, "my_images", str(tmp_path))[1:] == (2, 2)
    errors = capsys.readouterr().err
    assert errors.count("001.jpg (No such file or directory)") == errors.count("002.jpg (Is a directory)") == 1


def test_names_that_are_no_text_are_escaped(tmp_path, capsys):
    images = write_folder(tmp_path / "images", 4, ("ant", os.fsdecode(b"b\xff")))
    data = next((images / "ant").iterdir()).read_bytes()
    (images / "ant" / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(data)
    (images / "ant" / "two\nlines.jpg").write_bytes(data)
    (images / "ant" / os.fsdecode(b"\xfd.jpg")).symlink_to("/nowhere")
    folder = open_source(f"folder:{images}")
    assert folder.classes == ("ant", r"b\xff")
    assert write_data_set(folder, "my_images", str(tmp_path))[1:] == (6, 1)
    assert r"ant/\xfd.jpg (No such file" in capsys.readouterr().err
    source = open_source("tfds:my_images", data_dir=str(tmp_path))
    assert source.classes == folder.classes
    names = {source[index].name.split(" ", 2)[2] for index in range(6)}
    assert {r"\xff\xfe.jpg", r"two\nlines.jpg"} < names


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

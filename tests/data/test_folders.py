import json
import os
import socket

import pytest
from PIL import Image

from tests.images import picture, write_folder
from umae_jax.config import CONFIG_FILE
from umae_jax.data import folders
from umae_jax.data.folders import find_images
from umae_jax.data.formats import EXCLUDED, formats, suffixes
from umae_jax.data.sources import open_folder
from umae_jax.errors import UserError
from umae_jax.startup import CACHE_FOLDER
from umae_jax.tasks.pretraining import PICTURES
from umae_jax.training.metrics import METRICS_FILE
from umae_jax.weights.stored_run import FOLDER, OLD_BEST

CLASSES = ("cat", "cup", "rock")


def write_run(folder):
    """Write what a run's directory holds, with a picture."""
    (folder / FOLDER / "7").mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps({}))
    write_folder(folder / PICTURES, 1)


@pytest.mark.parametrize(
    "name",
    [
        *(".ipynb_checkpoints/000.jpg", ".cache/deep/000.jpg", "cat/.thumbnails/000.jpg", "__MACOSX/cat/000.jpg"),
        *("cat/._000.jpg", "._cat.jpg", ".hidden.png", "cat/@eaDir/000.jpg", "$RECYCLE.BIN/000.jpg", "Thumbs.db"),
        *("lost+found/000.jpg", "System Volume Information/000.jpg", "cat/desktop.ini", "#recycle/000.jpg"),
    ],
)
def test_hidden_and_system_files_are_no_data(tmp_path, name):
    write_folder(tmp_path, 6, CLASSES)
    expected = open_folder(str(tmp_path))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"\0\5\26\7" + bytes(4092))
    source = open_folder(str(tmp_path))
    assert source.classes == CLASSES
    assert source.digest == expected.digest
    assert source.labels.tolist() == expected.labels.tolist()
    place = next(part for part in source.summary.split("first ")[1:])
    assert name.startswith(place.rstrip(")").rstrip("/"))
    assert "1 hidden or system" in source.summary


def test_the_given_folder_may_be_hidden(tmp_path):
    assert len(open_folder(str(write_folder(tmp_path / ".cache" / "@eaDir", 3)))) == 3


def test_pipes_sockets_and_devices_are_no_data(tmp_path, monkeypatch):
    write_folder(tmp_path, 6, CLASSES)
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    (tmp_path / "cat" / "zero.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        source = open_folder(str(tmp_path))
    assert len(source) == 6
    assert source.classes == CLASSES
    assert "3 special (pipe, socket or device) (first cat/pipe.jpg)" in source.summary


@pytest.mark.parametrize("place", ["run", "cat/run", "deep/er/run"])
def test_a_run_below_the_images_is_no_data(tmp_path, place):
    write_folder(tmp_path, 6, CLASSES)
    write_run(tmp_path / place)
    source = open_folder(str(tmp_path))
    assert len(source) == 6
    assert source.classes == CLASSES
    assert f"1 written by a run (first {place}/)" in source.summary


def test_a_run_that_has_only_begun_is_no_data(tmp_path):
    write_folder(tmp_path, 2)
    write_folder(tmp_path / "run" / PICTURES, 1)
    (tmp_path / "run" / CONFIG_FILE).write_text("{}")
    assert len(open_folder(str(tmp_path))) == 2


def test_a_run_in_the_folder_of_the_images_is_no_data(tmp_path):
    write_folder(tmp_path, 6, CLASSES)
    write_run(tmp_path)
    source = open_folder(str(tmp_path))
    assert len(source) == 6
    assert source.classes == CLASSES


def test_the_names_of_a_run_are_known():
    assert folders.RUN_CONFIG == CONFIG_FILE
    assert {FOLDER, OLD_BEST, PICTURES, CACHE_FOLDER} <= folders.RUN_FOLDERS
    assert {METRICS_FILE} == folders.RUN_FILES


def test_a_configuration_beside_images_makes_no_run(tmp_path):
    write_folder(tmp_path / "cat", 2)
    (tmp_path / "cat" / CONFIG_FILE).write_text("{}")
    assert len(open_folder(str(tmp_path))) == 2


def test_every_format_that_pillow_reads_by_itself_is_read(tmp_path):
    image = Image.fromarray(picture())
    for suffix in ("bmp", "tif", "TIFF", "gif", "jfif", "jp2", "tga", "ppm", "avif", "webp", "ico"):
        image.save(tmp_path / f"image.{suffix}")
    assert len(open_folder(str(tmp_path))) == 11
    assert not {"eps", "ps", "pdf", "mpg", "mpeg", "wmf", "emf", "h5", "flc", "txt", ""} & suffixes()
    assert not set(EXCLUDED) & set(formats())


def test_files_left_out_are_counted_and_named(tmp_path):
    write_folder(tmp_path, 6, CLASSES)
    for name in ("cat/a.heic", "cat/b.txt", "README.md", "dog/c.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert open_folder(str(tmp_path)).summary == (
        f"data.source: 6 images of 3 classes (there are none in the subfolders dog) in {tmp_path}; "
        "left out: 4 of other types (first README.md)"
    )


def test_a_visible_image_beside_the_classes_is_named(tmp_path):
    write_folder(tmp_path, 6, CLASSES)
    Image.fromarray(picture()).save(tmp_path / "stray.png")
    source = open_folder(str(tmp_path))
    assert source.classes == ()
    assert "7 images without labels (because stray.png lies beside the subfolders)" in source.summary


def test_links_to_nothing_are_left_to_the_reader(tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / "nothing.jpg").symlink_to("/nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert find_images(tmp_path).images == ["000.jpg", "001.jpg", "loop.jpg", "nothing.jpg"]


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, 6, CLASSES)
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("cup/"):
            raise PermissionError
        return scan(path)

    monkeypatch.setattr("os.scandir", scandir)
    source = open_folder(str(tmp_path))
    assert source.classes == ("cat", "rock")
    assert "1 that cannot be listed (first cup/)" in source.summary


def test_only_left_out_files_are_an_error_that_names_one(tmp_path):
    (tmp_path / "._000.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"\.jpg.*1 hidden or system \(first \._000\.jpg\)"):
        open_folder(str(tmp_path))


def test_a_bucket_follows_the_same_rule(tmp_path, monkeypatch):
    write_folder(tmp_path, 6, CLASSES)
    for name in (".git/a.jpg", ".git/b.jpg", "cat/._a.jpg", "__MACOSX/cat/a.jpg", "cat/a.txt", "dog/a.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    write_run(tmp_path / "cat" / "run")
    local = find_images(tmp_path)
    files = [str(path) for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / "cat" / "run" / FOLDER / "7" / "state").write_bytes(b"")
    files.append(str(tmp_path / "cat" / "run" / FOLDER / "7" / "state"))
    monkeypatch.setattr(folders, "in_bucket", lambda _: True)
    monkeypatch.setattr(folders, "files_in_bucket", lambda _: files)
    remote = find_images(tmp_path)
    assert remote.images == local.images
    assert remote.left_out == local.left_out
    assert remote.subfolders == local.subfolders

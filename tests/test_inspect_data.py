import json

import pytest
from PIL import Image

from tests import annotated_images, commands
from tests.annotated_images import annotation, coco, disc
from umae_jax import inspection
from umae_jax.data.annotations import open_annotated
from umae_jax.errors import UserError


def test_the_command_describes_a_source_and_draws_it(tmp_path):
    content = coco()
    name = annotated_images.write(tmp_path, content, "val")
    content["annotations"].append(annotation(99, 10, 3, disc(50, 50, 10)) | {"iscrowd": 1})
    content["images"].append({"id": 77, "file_name": "gone.png", "height": 40, "width": 50})
    (tmp_path / "annotations_val.json").write_text(json.dumps(content))
    output, errors = commands.run(
        "inspect_data", "--source", name, "--split=val", f"--output={tmp_path / 'sheet.png'}", devices=1
    )
    assert errors == ""
    lines = output.splitlines()
    assert "4 images with 12 objects of 2 classes (masks and boxes)" in lines[0]
    assert lines[1].split() == ["class", "id", "objects", "images"]
    assert [line.split() for line in lines[2:4]] == [["disc", "3", "8", "4"], ["box", "7", "4", "4"]]
    rest = "\n".join(lines[4:])
    for line in (
        "boxes per image: min 3, median 3, max 3",
        "small 75.0%, medium 25.0%, large 0.0%",
        "width 90 to 130, height 90 to 120 pixels; 1 portrait, 3 landscape",
        "masks: yes",
        "crowd regions, which only evaluation uses: 1",
        "images that can train: 4 of 4",
        "left out: 1 images that do not exist (first gone.png)",
    ):
        assert line in rest
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000


def test_a_wrong_source_is_one_sentence():
    _, errors = commands.run("inspect_data", "--source=coco:/nowhere", status=2)
    assert errors.startswith("error: --source: there is no folder /nowhere; write coco:FOLDER")


def test_images_that_cannot_be_read_are_named(tmp_path, capsys):
    source = open_annotated(annotated_images.write(tmp_path, coco()))
    (tmp_path / "images" / "1.png").write_bytes(b"nothing")
    assert inspection.draw(source).any()
    assert capsys.readouterr().err.count("1.png") == 1
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="--source: none of"):
        inspection.draw(source)


def test_a_source_without_objects_cannot_train(tmp_path):
    content = coco()
    content["annotations"] = []
    source = open_annotated(annotated_images.write(tmp_path, content))
    lines = []
    with pytest.raises(UserError, match="none of its 4 images can train"):
        lines.extend(inspection.describe(source))

from tests.commands import pretrain
from tests.images import write_folder


def test_a_run_says_what_it_reads_and_a_resume_what_has_changed(tmp_path):
    images = write_folder(tmp_path / "images", 20)
    (images / "._000.jpg").write_bytes(b"")

    def train(steps):
        """Train in a directory among the images."""
        return pretrain(images / "run", f"--config.data.source=folder:{images}", f"--config.total_steps={steps}")[1]

    errors = train(2)
    assert f"data.source: 20 images in {images}; left out: 1 hidden or system (first ._000.jpg)\n" in errors
    errors = train(3)
    assert "1 written by a run (first run/)" in errors
    assert "checkpoint was written" not in errors
    (images / "000.jpg").rename(images / "new.jpg")
    assert "as many images as when the checkpoint was written, but with other names" in train(4)
    write_folder(images / "more", 4)
    assert "24 images, but 20 when the checkpoint was written" in train(5)

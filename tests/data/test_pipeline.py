import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.images import write_folder
from umae_jax.config import default_config
from umae_jax.data import loader
from umae_jax.data.pipeline import EvalLoader, TrainLoader, readers
from umae_jax.data.sources import NO_LABEL, open_source
from umae_jax.data.transforms import load_whole
from umae_jax.errors import UserError
from umae_jax.training.sharding import batch_sharding, make_mesh


def open_loader(folder, **changes):
    options = {"batch_size": 8, "seed": 1, "size": (16, 24), "area": 0.2, "threads": 2, **changes}
    return TrainLoader(open_source(f"folder:{folder}"), sharding=batch_sharding(make_mesh()), **options)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", 12)


def test_batches_are_uint8_and_spread_over_all_devices(folder):
    (batch,) = take(open_loader(folder), 1)
    assert batch.image.shape == (8, 16, 24, 3)
    assert batch.image.dtype == np.uint8
    assert len(batch.image.sharding.device_set) == jax.device_count() == 8


def test_a_stream_continues_where_it_was_left_in_mid_epoch(folder):
    whole = take(open_loader(folder), 6)
    rest = take(open_loader(folder, first_sample=24), 3)
    for ours, theirs in zip(rest, whole[3:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_reads_the_rows_that_its_devices_hold(folder, monkeypatch, processes):
    """A batch is in order whatever processes read it: neighbours, which may be mixed with each other, stay so."""
    whole = take(open_loader(folder, first_sample=8), 3)
    parts = []

    class Held:
        """A sharding that gives every so many-th row to a process, from the last to the first, each to two devices."""

        def __init__(self, process):
            self.process = process

        def addressable_devices_indices_map(self, shape):
            rows = [*range(self.process, shape[0], processes)]
            return {device: (slice(row, row + 1),) for device, row in enumerate([*rows, *rows[::-1]])}

    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda _, array: array)
    for process in range(processes):
        loader = TrainLoader(
            open_source(f"folder:{folder}"),
            batch_size=8,
            seed=1,
            size=(16, 24),
            area=0.2,
            threads=2,
            first_sample=8,
            sharding=Held(process),
        )
        parts.append(take(loader, 3))
    for number, batch in enumerate(whole):
        for process, part in enumerate(parts):
            for ours, theirs in zip(part[number], batch, strict=True):
                np.testing.assert_array_equal(ours, theirs[process::processes])


def test_samples_do_not_depend_on_threads_workers_or_batch_size(folder):
    few = take(open_loader(folder, threads=1), 4)
    for changes, count in (({"threads": 5}, 4), ({"workers": 2, "threads": 1}, 4), ({"batch_size": 16}, 2)):
        other = take(open_loader(folder, **changes), count)
        for field in ("image", "sample_index"):
            ours, theirs = (np.concatenate([getattr(batch, field) for batch in stream]) for stream in (few, other))
            np.testing.assert_array_equal(ours, theirs)


def test_every_epoch_sees_every_image_once_in_another_order(tmp_path):
    classes = tuple(f"class{number:02}" for number in range(16))
    folder = write_folder(tmp_path, 16, classes)  # one image a class: labels name them
    labels = np.concatenate([batch.label for batch in take(open_loader(folder), 4)])
    first, second = labels[:16].tolist(), labels[16:].tolist()
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second


def test_a_broken_file_is_skipped_counted_and_named_once(folder, caplog):
    names = sorted(folder.iterdir())
    good = take(open_loader(folder), 6)
    names[3].write_bytes(b"not an image")
    names[7].write_bytes(names[7].read_bytes()[:300])
    with caplog.at_level(logging.WARNING):
        batches = take(open_loader(folder), 6)
    # Both files in each of 4 epochs, and whenever the substitute drawn is broken too.
    assert sum(int((np.asarray(batch.unreadable) > 0).sum()) for batch in batches) == 8
    for name in (names[3], names[7]):
        assert sum(str(name) in record.getMessage() for record in caplog.records) == 1
    # All the other samples stay what they were.
    for ours, theirs in zip(batches, good, strict=True):
        same = np.asarray(ours.unreadable) == 0
        np.testing.assert_array_equal(np.asarray(ours.image)[same], np.asarray(theirs.image)[same])


def test_no_blank_image_stands_in_for_many_broken_neighbours(tmp_path):
    folder = write_folder(tmp_path / "images", 60)
    for path in sorted(folder.iterdir())[10:30]:
        path.write_bytes(b"not an image")
    images = np.concatenate([batch.image for batch in take(open_loader(folder), 15)])
    assert (images.reshape(len(images), -1).max(-1) > 0).all()


def test_a_finite_stream_ends(folder):
    batches = list(open_loader(folder, first_sample=8, last_sample=32))
    assert np.concatenate([batch.sample_index for batch in batches]).tolist() == list(range(8, 32))


def test_mostly_unreadable_data_stops_the_run(folder):
    for path in sorted(folder.iterdir())[:8]:
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"of \d+ reads failed; repair or remove the files, among them .*\.jpg"):
        take(open_loader(folder), 6)


CLASSES = ("ant", "bee")


def one_pass(source, batch_size=8, **changes):
    options = {"key": "data.source", "classes": 2, "size": (16, 24), "threads": 2, **changes}
    return EvalLoader(source, batch_size=batch_size, sharding=batch_sharding(make_mesh()), **options)


def gather(batches):
    return [np.concatenate(arrays) for arrays in zip(*map(jax.device_get, batches), strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_pass_gives_every_image_once_whole_and_in_order(tmp_path, workers):
    source = open_source(f"folder:{write_folder(tmp_path, 13, CLASSES)}")
    images, _, labels, unreadable = gather(one_pass(source, workers=workers))
    assert images.shape == (16, 16, 24, 3)
    assert labels.tolist() == [source[place].label for place in range(13)] + [NO_LABEL] * 3
    assert not unreadable.any()
    assert not images[13:].any()
    for place in range(13):
        np.testing.assert_array_equal(images[place], load_whole(source[place].data, (16, 24), 3))


def test_one_pass_leaves_out_what_cannot_be_read_and_names_it(tmp_path):
    source = open_source(f"folder:{write_folder(tmp_path, 8, CLASSES)}")
    (tmp_path / "bee" / "001.jpg").write_bytes(b"")
    batches = one_pass(source)
    _, _, labels, unreadable = gather(batches)
    assert (labels == NO_LABEL).sum() == unreadable.sum() == 1
    assert batches.named == {str(tmp_path / "bee" / "001.jpg")}


def test_one_pass_takes_some_images_of_all_classes(tmp_path):
    source = open_source(f"folder:{write_folder(tmp_path, 40, CLASSES)}")
    _, _, labels, _ = gather(one_pass(source, images=24))
    assert len(labels) == 24
    assert 4 <= (labels == 0).sum() <= 20
    _, _, again, _ = gather(one_pass(source, images=24, batch_size=24))
    np.testing.assert_array_equal(labels, again)
    assert len(gather(one_pass(source, images=100))[2]) == 40


class Labelled:
    """A source with labels of one's choice."""

    classes = CLASSES

    def __init__(self, folder, labels):
        self.source, self.labels = open_source(f"folder:{folder}"), labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.source[index]._replace(label=self.labels[index])


@pytest.mark.parametrize(
    ("label", "message"), [(NO_LABEL, "an image has no label, labels must lie in 0..1"), (2, "has the label 2, labels")]
)
def test_labels_that_are_missing_or_out_of_range_are_told(folder, label, message):
    source = Labelled(folder, [0, 1, label, 0, 1, 0, 1, 0])
    with pytest.raises(UserError, match=f"data.source: .*{message}"):
        gather(one_pass(source))
    loader = TrainLoader(
        source,
        batch_size=8,
        seed=1,
        size=(16, 24),
        area=0.2,
        threads=2,
        classes=2,
        sharding=batch_sharding(make_mesh()),
    )
    with pytest.raises(UserError, match=f"data.source: .*{message}"):
        next(loader)
    loader.close()


@pytest.mark.parametrize(
    ("cores", "threads", "workers", "expected"),
    [
        (2, None, None, (4, 0)),
        (8, None, None, (16, 0)),
        (16, None, None, (16, 2)),
        (112, None, None, (16, 14)),
        (112, 16, 0, (16, 0)),  # what runs before this was chosen have in their files
        (112, 4, None, (4, 0)),
        (112, None, 0, (224, 0)),
        (8, None, 4, (4, 4)),
    ],
)
def test_readers_are_chosen_by_the_cores_unless_the_configuration_says(monkeypatch, cores, threads, workers, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr("os.path.isdir", lambda _: False)
    config = default_config()
    config.data.update(threads=threads, workers=workers)
    assert readers(config) == expected


def test_workers_are_no_more_than_shared_memory_holds(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(112)), raising=False)
    monkeypatch.setattr(loader, "SHARED_MEMORY", str(tmp_path))
    chunk = 16 * 256 * 256 * 3
    for free, workers in ((64 * 2**20, 5), (4 * chunk - 1, 0), (2**40, 14)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert readers(default_config()).workers == workers

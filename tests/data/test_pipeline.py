import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.images import central_pixels, write_folder
from umae_jax.config import default_config
from umae_jax.data import pipeline
from umae_jax.data.pipeline import EvalLoader, Groups, Readers, Sample, TrainLoader, abstract_batch, readers
from umae_jax.data.sources import NO_LABEL, open_source
from umae_jax.data.transforms import LoadCentralCrop, LoadCrop
from umae_jax.errors import UserError
from umae_jax.training.sharding import batch_sharding, make_mesh

SIZE = (16, 24)
CLASSES = ("ant", "bee")
THREADS = Readers(threads=2, workers=0)


def open_train(folder, *, labels=None, **changes):
    source = open_source(f"folder:{folder}")
    load = LoadCrop(source, 1, SIZE, 3, 0.2, labels=labels)
    options = {"batch_size": 8, "seed": 1, "readers": THREADS, "sharding": batch_sharding(make_mesh()), **changes}
    return TrainLoader(len(source), load, **options)


def open_eval(folder, *, batch_size=8, **changes):
    source = open_source(f"folder:{folder}")
    load = LoadCentralCrop(source, SIZE, 3, labels=(2, "validation.source"))
    options = {"readers": THREADS, "sharding": batch_sharding(make_mesh()), **changes}
    return EvalLoader(len(source), load, batch_size=batch_size, **options)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def concatenate(batches):
    batches = [jax.device_get(batch) for batch in batches]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", 12)


def test_batches_have_the_abstract_shapes_on_all_devices(tmp_path):
    loader = open_train(write_folder(tmp_path, 12, CLASSES), labels=(2, "data.source"))
    (batch,) = take(loader, 1)
    arrays = {
        "image": jax.ShapeDtypeStruct((*SIZE, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((), np.int32),
        "sample_index": jax.ShapeDtypeStruct((), np.uint32),
    }
    expected = abstract_batch(arrays, 8, batch_sharding(make_mesh()))
    assert {name: (array.shape, array.dtype, array.sharding) for name, array in batch.items()} == {
        name: (array.shape, array.dtype, array.sharding) for name, array in expected.items()
    }
    assert len(batch["image"].sharding.device_set) == jax.device_count() == 8


def test_a_stream_resumes_in_mid_epoch(folder):
    whole = take(open_train(folder), 6)
    resumed = take(open_train(folder, first_sample=24), 3)
    for batch, expected in zip(resumed, whole[3:], strict=True):
        assert_equal(batch, expected)


class PartialSharding:
    """A sharding that gives this process every `processes`-th row, each on two devices, not in ascending order."""

    def __init__(self, process, processes):
        self.process, self.processes = process, processes

    def addressable_devices_indices_map(self, shape):
        rows = [*range(self.process, shape[0], self.processes)]
        return {device: (slice(row, row + 1),) for device, row in enumerate([*rows, *rows[::-1]])}


@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_reads_the_rows_of_its_devices(folder, monkeypatch, processes):
    whole = take(open_train(folder, first_sample=8), 3)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda _, array: array)
    for process in range(processes):
        part = take(open_train(folder, first_sample=8, sharding=PartialSharding(process, processes)), 3)
        for local, batch in zip(part, whole, strict=True):
            assert_equal(local, {name: array[process::processes] for name, array in batch.items()})


def test_processes_must_share_a_batch_evenly(folder, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for open_loader in (open_train, open_eval):
        with pytest.raises(UserError, match=r"batch_size: 8 .* 3 processes"):
            open_loader(folder, batch_size=8)


def test_samples_do_not_depend_on_threads_workers_or_batch_size(folder):
    expected = concatenate(take(open_train(folder, readers=Readers(1, 0)), 4))
    for changes, count in (({"readers": Readers(5, 0)}, 4), ({"readers": Readers(1, 2)}, 4), ({"batch_size": 16}, 2)):
        assert_equal(concatenate(take(open_train(folder, **changes), count)), expected)


def load_indices(sample_index, record_index):
    return Sample({"record": np.array(record_index, np.int32), "pair": np.array([sample_index, record_index])})


@pytest.mark.parametrize("size", [16, 5])
def test_every_epoch_reads_every_record_once_in_its_own_order(size):
    loader = TrainLoader(
        size, load_indices, batch_size=8, sharding=batch_sharding(make_mesh()), seed=3, readers=THREADS
    )
    batch = concatenate(take(loader, 2 * size))
    np.testing.assert_array_equal(batch["sample_index"], np.arange(16 * size))
    np.testing.assert_array_equal(batch["pair"], np.stack([batch["sample_index"], batch["record"]], axis=1))
    for epoch, records in enumerate(np.split(batch["record"], 16)):
        order = np.arange(size, dtype=np.int32)
        np.random.default_rng((3, epoch, size)).shuffle(order)  # fixed: runs resume in this order after an upgrade
        np.testing.assert_array_equal(records, order)


def test_broken_files_are_skipped_counted_and_named_once(folder, caplog):
    names = sorted(folder.iterdir())
    good = concatenate(take(open_train(folder), 6))
    names[3].write_bytes(b"not an image")
    names[7].write_bytes(names[7].read_bytes()[:300])
    names[8].unlink()
    names[8].symlink_to(folder / "missing")
    loader = open_train(folder)
    skipped = []
    with caplog.at_level(logging.WARNING):
        batches = []
        for _ in range(6):
            batches.append(next(loader))
            skipped.append(loader.skipped_images)
    loader.close()
    changed = (concatenate(batches)["image"] != good["image"]).any((1, 2, 3))
    assert changed.sum() == 12  # three files in four epochs; all other samples are unchanged
    assert skipped == sorted(skipped)
    assert 12 <= skipped[-1] <= 20  # some substitutes are broken, too
    for name in (names[3], names[7], names[8]):
        assert sum(str(name) in record.getMessage() for record in caplog.records) == 1


def test_many_broken_neighbours_are_never_replaced_by_blank_images(tmp_path):
    folder = write_folder(tmp_path / "images", 60)
    for path in sorted(folder.iterdir())[10:30]:
        path.write_bytes(b"not an image")
    images = concatenate(take(open_train(folder), 15))["image"]
    assert images.any((1, 2, 3)).all()


def test_a_finite_stream_ends(folder):
    batches = list(open_train(folder, first_sample=8, last_sample=32))
    assert concatenate(batches)["sample_index"].tolist() == list(range(8, 32))


def test_mostly_unreadable_data_stops_the_run(folder):
    for path in sorted(folder.iterdir())[:8]:
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"data.source: \d+ of \d+ reads failed.*\.jpg"):
        take(open_train(folder), 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_in_a_worker_reach_the_user(tmp_path, workers):
    loader = open_train(
        write_folder(tmp_path, 12, ("ant", "bee", "cat")), labels=(2, "data.source"), readers=Readers(1, workers)
    )
    with pytest.raises(UserError, match=r"data.source.*label 2.*0..1"):
        take(loader, 3)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_record_once_in_order(tmp_path, workers):
    source = open_source(f"folder:{write_folder(tmp_path, 13, CLASSES)}")
    batch = concatenate(open_eval(tmp_path, readers=Readers(2, workers)))
    assert batch["image"].shape == (16, *SIZE, 3)
    assert batch["valid"].tolist() == [True] * 13 + [False] * 3
    assert batch["label"].tolist() == [source[index].label for index in range(13)] + [NO_LABEL] * 3
    assert not batch["image"][13:].any()
    for index in range(13):
        np.testing.assert_array_equal(batch["image"][index], central_pixels(source[index].data, SIZE))


def test_unreadable_records_are_invalid_and_named_once(tmp_path, caplog):
    write_folder(tmp_path, 8, CLASSES)
    (tmp_path / "bee" / "001.jpg").write_bytes(b"")
    named = set()
    loader = open_eval(tmp_path, named=named)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # each iteration is a pass
            batch = concatenate(loader)
            assert batch["valid"].sum() == 7
            assert batch["label"][~batch["valid"]] == [NO_LABEL]
    assert named == {str(tmp_path / "bee" / "001.jpg")}
    assert caplog.text.count("001.jpg") == 1


def test_evaluation_can_draw_a_random_subset_of_the_records(tmp_path):
    write_folder(tmp_path, 40, CLASSES)
    batch = concatenate(open_eval(tmp_path, images=24))
    assert batch["valid"].sum() == 24
    assert 4 <= (batch["label"] == 0).sum() <= 20
    assert_equal(batch, concatenate(open_eval(tmp_path, images=24, batch_size=24)))
    assert len(concatenate(open_eval(tmp_path, images=100))["label"]) == 40


@pytest.mark.parametrize(
    ("cores", "threads", "workers", "expected"),
    [
        (2, None, None, (4, 0)),
        (8, None, None, (16, 0)),
        (16, None, None, (16, 2)),
        (112, None, None, (16, 14)),
        (112, 16, 0, (16, 0)),  # the values in configurations of old runs
        (112, 4, None, (4, 0)),
        (112, None, 0, (224, 0)),
        (8, None, 4, (4, 4)),
    ],
)
def test_readers_depend_on_the_cores_unless_configured(monkeypatch, cores, threads, workers, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr("os.path.isdir", lambda _: False)
    config = default_config()
    config.data.update(threads=threads, workers=workers)
    assert readers(config) == expected


def test_workers_fit_into_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(112)), raising=False)
    monkeypatch.setattr(pipeline, "SHARED_MEMORY", str(tmp_path))
    chunk_bytes = 16 * 256 * 256 * 3
    for free, workers in ((64 * 2**20, 5), (4 * chunk_bytes - 1, 0), (2**40, 14)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert readers(default_config()).workers == workers


def test_a_batch_holds_records_of_one_group_and_an_epoch_all_records():
    def load(sample_index, record_index):
        return Sample({"record": np.array(record_index)})

    groups = Groups(bytes([0, 1, 1, 0, 1] * 5), batch_size=8)  # 10 records and 15 records
    size = groups.samples_per_epoch()
    assert size == 16 + 16
    options = {
        "groups": groups,
        "batch_size": 8,
        "seed": 3,
        "readers": THREADS,
        "sharding": batch_sharding(make_mesh()),
    }
    batches = [np.asarray(batch["record"]) for batch in take(TrainLoader(size, load, **options), 8)]
    numbers = np.frombuffer(groups.of_record, np.uint8)
    assert all(len(np.unique(numbers[records])) == 1 for records in batches)
    epochs = [np.concatenate(batches[:4]), np.concatenate(batches[4:])]
    for records in epochs:
        assert set(records) == set(range(25))
    assert not np.array_equal(*epochs)
    later = take(TrainLoader(size, load, first_sample=24, **options), 2)
    np.testing.assert_array_equal([batch["record"] for batch in later], batches[3:5])

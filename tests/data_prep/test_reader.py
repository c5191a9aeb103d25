from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_yolo.data_prep import source as source_module
from convnext_yolo.data_prep.decode import decode_image
from convnext_yolo.data_prep.errors import CorruptSampleError, DataError
from convnext_yolo.data_prep.reader import (
    FileReader,
    Sample,
    ShardReader,
    any_members,
    own_members,
)

FIELDS = ("image", "boxes_xyxy", "labels", "crowd", "area")


def assert_same(one: Sample, two: Sample) -> None:
    assert one.image_id == two.image_id
    for field in FIELDS:
        a, b = getattr(one, field), getattr(two, field)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), field
        np.testing.assert_array_equal(a, b, err_msg=field)


@pytest.fixture
def shards(coco_files, tmp_path) -> Path:
    coco_files.shard(tmp_path / "shards")
    return tmp_path / "shards"


def sentence(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    """The text is one line and names these."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300, text
    for part in parts:
        assert part in text


def test_shards_and_files_give_the_same_samples(coco_files, shards):
    from_files, from_shards = FileReader(coco_files.read()), ShardReader(shards)
    assert len(from_files) == len(from_shards) == 5
    assert from_files.classes == from_shards.classes
    for position in range(5):
        assert_same(from_files.decode(position), from_shards.decode(position))
    empty = from_shards.decode(0)  # an image without objects
    assert (empty.image_id, empty.boxes_xyxy.shape, empty.labels.shape) == (0, (0, 4), (0,))
    assert from_shards.decode(1).crowd.tolist() == [True]
    assert from_shards.decode(3).area.tolist() == [400.5, pytest.approx(5.3 * 5.4, rel=1e-6)]


def test_pixels_are_rgb_as_stored(coco_files, shards):
    png = ShardReader(shards).decode(4)
    expected = np.array(Image.open(coco_files.image(2)))
    np.testing.assert_array_equal(png.image, expected)


def test_order_of_reading_does_not_matter(shards):
    reader = ShardReader(shards)
    forward = [reader.decode(i) for i in range(5)]
    for position in (4, 0, 3, 3, 1, 2, 0):
        assert_same(reader.decode(position), forward[position])


def test_a_reader_travels_to_other_processes_without_its_files(shards):
    reader = ShardReader(shards)
    first = reader.decode(0)
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy.source.opened.files
    assert_same(copy.decode(0), first)
    assert_same(reader.decode(4), copy.decode(4))


@pytest.mark.process
def test_a_forked_process_opens_its_own_files(coco_files, tmp_path):
    """A file inherited through fork has one position for both: they would read each other's."""
    coco_files.shard(tmp_path / "shards", samples_per_shard=5)
    reader = ShardReader(tmp_path / "shards")
    expected = [reader.decode(i).image_id for i in range(5)]
    (file,) = reader.source.opened.files.values()
    file.seek(0)
    file.read(1)
    before = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(
        target=lambda: queue.put([reader.decode(i).image_id for i in range(5)])
    )
    process.start()
    assert queue.get() == expected
    process.join()
    assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == before


def test_few_files_are_open_however_many_shards(coco_files, tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_OPEN_FILES", 2)
    coco_files.shard(tmp_path / "shards", samples_per_shard=1)
    reader = ShardReader(tmp_path / "shards")
    before = len(os.listdir("/proc/self/fd"))
    expected = [FileReader(coco_files.read()).decode(i) for i in range(5)]
    for position in (0, 1, 2, 3, 4, 0, 2, 2, 4):
        assert_same(reader.decode(position), expected[position])
        assert len(reader.source.opened.files) <= 2
    assert list(reader.source.opened.files) == [2, 4]  # the last ones used
    assert len(os.listdir("/proc/self/fd")) == before + 2


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff\xe0 cut"])
def test_a_corrupt_picture_is_named(coco_files, content):
    with pytest.raises(ValueError, match="can't be decoded"):
        decode_image(content)

    dataset = coco_files.read()
    coco_files.image(0).write_bytes(content)
    with pytest.raises(DataError) as error:
        FileReader(dataset).decode(3)
    sentence(error, str(coco_files.image(0)))


def test_a_missing_picture_is_named(coco_files):
    dataset = coco_files.read()
    coco_files.image(0).unlink()
    with pytest.raises(DataError) as error:
        FileReader(dataset).decode(3)
    sentence(error, str(coco_files.image(0)), "No such file")


def test_a_missing_shard_is_named(shards):
    reader = ShardReader(shards)
    (shards / "shard-000001.tar").unlink()
    reader.decode(0)
    with pytest.raises(DataError) as error:
        reader.decode(2)
    sentence(error, str(shards / "shard-000001.tar"), "No such file", "shard the data again")


def overwrite(path: Path, offset: int, content: bytes) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def member(shard: Path, suffix: str, number: int = 0) -> tarfile.TarInfo:
    with tarfile.open(shard) as tar:
        return [m for m in tar if m.name.endswith(suffix)][number]


@pytest.mark.parametrize("size", [0, 100, 512, 1000, 2600])
def test_a_cut_shard_is_named(shards, size):
    shard = shards / "shard-000001.tar"
    os.truncate(shard, size)
    reader = ShardReader(shards)
    with pytest.raises(DataError) as error:
        reader.decode(3)
    sentence(error, str(shard), "verify")


def test_damage_inside_a_shard_is_named(shards):
    shard = shards / "shard-000000.tar"
    annotations = member(shard, ".json")
    for content in (b"{broken", b"[1234567", b"\xff\xfe\xff"):
        overwrite(shard, annotations.offset_data, content)
        with pytest.raises(DataError) as error:
            ShardReader(shards).decode(0)
        sentence(error, str(shard), "000000000000", "verify")


def test_a_shard_with_other_samples_is_refused(shards):
    """Shards of two data sets in one folder: pictures and manifest would not go together."""
    first = shards / "shard-000000.tar"
    (shards / "shard-000001.tar").replace(first)
    with pytest.raises(DataError) as error:
        ShardReader(shards).decode(0)
    sentence(error, str(first), "000000000000", "verify")


def test_lacking_annotations_are_named(shards):
    shard = shards / "shard-000000.tar"
    annotations = member(shard, ".json")
    content = shard.read_bytes()[annotations.offset_data :][: annotations.size]
    overwrite(shard, annotations.offset_data, content.replace(b'"labels"', b'"lobels"'))
    with pytest.raises(DataError) as error:
        ShardReader(shards).decode(0)
    sentence(error, str(shard), "000000000000", "labels")


def test_an_exif_rotation_turns_nothing(tmp_path, coco_files):
    """Boxes refer to the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    path = coco_files.image(0)
    Image.open(path).save(path, exif=exif, quality=95)
    sample = FileReader(coco_files.read()).decode(3)
    assert sample.image.shape == (32, 48, 3)
    stored = np.array(Image.open(path)).astype(int)
    assert np.abs(sample.image - stored).mean() < 2  # two JPEG decoders
    coco_files.shard(tmp_path / "shards")
    assert_same(ShardReader(tmp_path / "shards").decode(3), sample)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("I;16", "png"), ("L", "jpg")]
)
def test_every_picture_becomes_three_channels_of_bytes(tmp_path, mode, suffix):
    path = tmp_path / f"p.{suffix}"
    Image.new(mode, (9, 7)).save(path)
    image = decode_image(path.read_bytes())
    assert (image.shape, image.dtype) == ((7, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("tar_format", "headers"),
    [(tarfile.USTAR_FORMAT, {}), (tarfile.PAX_FORMAT, {"comment": "x"}), (tarfile.GNU_FORMAT, {})],
)
@pytest.mark.parametrize("names", [("7.jpg", "7.json"), ("7.json", "7.jpg")])
def test_samples_of_other_tar_writers_are_read(tar_format, headers, names):
    """What is not as our writer has it is left to webdataset; both say the same."""
    content = {"7.jpg": b"p" * 700, "7.json": b"{}"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, pax_headers=headers) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content[name])
            member.pax_headers = headers
            tar.addfile(member, io.BytesIO(content[name]))
    expected = (content["7.jpg"], content["7.json"])
    assert any_members(buffer.getvalue(), "7") == expected
    own = own_members(buffer.getvalue(), "7")
    assert own == (None if headers else expected)


@pytest.mark.parametrize("cut", [0, 100, 512, 900, 1536, 2000])
def test_a_sample_cut_short_is_none_of_ours(cut):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, size in (("7.jpg", 700), ("7.json", 20)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"p" * size))
    content = buffer.getvalue()[:cut]
    assert own_members(content, "7") is None
    with pytest.raises(ValueError):
        any_members(content, "7")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"labels":[1,0]', b'"labels":[100]', "different lengths"),
        (b'"labels":[1,0]', b'"labels":[1,9]', "labels outside the 2 classes"),
        (b'"labels":[1,0]', b'"labels":[-1,]', "broken JSON"),
        (b'"height":32', b'"height":31', "annotated as (31, 48)"),
        (b'"boxes":[[1.0', b'"boxes":[[NaN', "not finite"),
        (b'"labels":[1,0]', b'"labels":"abc"', "a"),
    ],
)
def test_well_formed_nonsense_is_corrupt(coco_files, tmp_path, old, new, words):
    coco_files.shard(tmp_path / "shards", samples_per_shard=8)
    shard = tmp_path / "shards" / "shard-000000.tar"
    content = shard.read_bytes()
    assert content.count(old) == 1
    shard.write_bytes(content.replace(old, new.ljust(len(old))))
    with pytest.raises(CorruptSampleError) as error:
        ShardReader(tmp_path / "shards").decode(3)
    assert words in str(error.value)

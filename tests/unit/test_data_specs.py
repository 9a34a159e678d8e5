"""Data set specifications, the decoding of files, and the messages for unusable files."""

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allspark.config import CustomDataConfig, DataConfig
from allspark.data.datasets import DATASETS, cityscapes, spec_for
from allspark.data.datasets.custom import make_spec
from allspark.data.image_io import read_image
from allspark.data.mask_io import read_mask, read_pair
from allspark.data.spec import Sample
from allspark.evaluation.dataset import SegmentationDataset
from allspark.utils.errors import UserError
from helpers import SHARED

CUSTOM = CustomDataConfig(classes=("sky", "road", "car"))


def save(path: Path, array, mode: str | None = None) -> Path:
    image = Image.fromarray(np.asarray(array))
    (image if mode is None else image.convert(mode)).save(path)
    return path


def save_palette(path: Path, indices: np.ndarray) -> Path:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    image.save(path)
    return path


@pytest.mark.parametrize("spec", DATASETS.values(), ids=DATASETS)
def test_spec_is_consistent(spec):
    assert len(spec.palette) == spec.num_classes == len(set(spec.classes))
    assert spec.ignore_index == 255 and spec.num_classes <= 255
    assert spec.eval_mode in ("whole", "center_crop", "sliding_window")
    decoded = np.unique(pickle.loads(pickle.dumps(spec)).decode_mask(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    assert set(range(spec.num_classes)) | {255} <= set(decoded.tolist())


def test_only_a_background_is_black():
    """Black is transparent in pictures."""
    for classes, black in ((("sky", "road"), False), (("motherboard", "car"), False), (("Background", "x"), True)):
        palette = make_spec("mine", CustomDataConfig(classes=classes)).palette
        assert ((0, 0, 0) in palette) == black and len(set(palette)) == 2
    assert (0, 0, 0) in make_spec("mine", CustomDataConfig(classes=("sky", "road"), background=0)).palette


def test_class_counts():
    counts = {"pascal": 21, "cityscapes": 19, "cityscapes_labelids": 19, "coco": 81, "camvid": 11}
    assert {name: DATASETS[name].num_classes for name in counts} == counts
    assert DATASETS["pascal"].palette[15] == (192, 128, 128) and DATASETS["pascal"].classes[15] == "person"
    assert DATASETS["coco"].palette[20] == DATASETS["pascal"].palette[20] == (0, 64, 128)
    assert DATASETS["coco"].classes[80] == "toothbrush" and DATASETS["coco"].classes[13] == "parking meter"
    assert {name for name in counts if DATASETS[name].eval_mode != "whole"} == {"cityscapes", "cityscapes_labelids"}


def test_cityscapes_label_ids(tmp_path):
    spec = DATASETS["cityscapes_labelids"]
    path = save(tmp_path / "a_gtFine_labelIds.png", np.array([[0, 7, 8, 11], [33, 29, 255, 26]], np.uint8))
    assert read_mask(path, spec).tolist() == [[255, 0, 1, 2], [18, 255, 255, 13]]
    assert spec.mask_path("gtFine/a_gtFine_labelTrainIds.png") == "gtFine/a_gtFine_labelIds.png"
    with pytest.raises(UserError, match=r"a_gtFine_labelIds.png.*26 \(1 pixel\).*cityscapes_labelids"):
        read_mask(path, cityscapes.SPEC)


def test_camvid_unlabeled_is_ignored(tmp_path):
    path = save(tmp_path / "m.png", np.array([[0, 10, 11, 255]], np.uint8))
    assert read_mask(path, DATASETS["camvid"]).tolist() == [[0, 10, 255, 255]]
    with pytest.raises(UserError, match=r"m2.png.* 12 \(1 pixel\)"):
        read_mask(save(tmp_path / "m2.png", np.array([[12]], np.uint8)), DATASETS["camvid"])


def test_camvid_real_pixels():
    folder = SHARED / "data" / "camvid" / "labels" / "val"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: no CamVid beside the project")
    counts = np.zeros(256, int)
    paths = sorted(folder.glob("*.png"))
    for path in paths:
        counts += np.bincount(read_mask(path, DATASETS["camvid"]).ravel(), minlength=256)
    assert len(paths) == 101 and counts.sum() == 101 * 360 * 480
    recorded = [1601620, 4531180, 98499, 5053176, 1521751, 2851125, 155724, 537197, 304716, 113531, 387010]
    assert counts[:11].tolist() == recorded and counts[11:255].sum() == 0 and counts[255] == 297271


def test_unknown_dataset_lists_names():
    with pytest.raises(UserError, match=r"'voc'.*pascal.*shapes.*data\.custom"):
        spec_for(DataConfig(dataset="voc", data_root="x", crop_size=65))
    with pytest.raises(UserError, match="camvid"):
        spec_for(DataConfig(dataset="camvid", data_root="x", crop_size=65, custom=CUSTOM))
    assert spec_for(DataConfig(dataset="mine", data_root="x", crop_size=65, custom=CUSTOM)).classes == CUSTOM.classes


@pytest.mark.parametrize(
    ("options", "stored", "decoded"),
    [
        ({}, [0, 2, 255], [0, 2, 255]),
        ({"ignore_index": 9}, [0, 2, 9], [0, 2, 255]),
        ({"value_map": {10: 0, 20: 1, 255: 2}}, [10, 20, 255], [0, 1, 2]),
        ({"value_map": {10: 0, 11: 0, 20: 255}}, [10, 11, 20, 255], [0, 0, 255, 255]),
        ({"ignore_index": 0, "value_map": {1: 0, 2: 1, 3: 2}}, [0, 1, 2, 3], [255, 0, 1, 2]),
    ],
)
def test_custom_values(tmp_path, options, stored, decoded):
    spec = make_spec("mine", CustomDataConfig(classes=CUSTOM.classes, **options))
    assert read_mask(save(tmp_path / "m.png", np.array([stored], np.uint8)), spec).tolist() == [decoded]
    assert spec.ignore_index == 255


@pytest.mark.parametrize(
    ("options", "stored", "named"),
    [
        ({}, 3, r"3 \(1 pixel\)"),
        ({"ignore_index": 9}, 255, r"255 \(1 pixel\)"),
        ({"value_map": {10: 0}}, 0, r"0 \(1 pixel\)"),
    ],
)
def test_custom_illegal_value(tmp_path, options, stored, named):
    spec = make_spec("mine", CustomDataConfig(classes=CUSTOM.classes, **options))
    with pytest.raises(UserError, match=rf"bad.png: illegal mask values {named}.*value_map"):
        read_mask(save(tmp_path / "bad.png", np.array([[stored]], np.uint8)), spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ()}, "classes: 0 classes"),
        ({"classes": tuple(map(str, range(256)))}, "256 classes"),
        ({"classes": tuple(map(str, range(255))), "ignore_index": 0}, "255 classes"),
        ({"classes": ("a", "a")}, "repeated a"),
        ({"palette": ((0, 0, 0),)}, "1 colors for 3"),
        ({"palette": ((0, 0, 0), (0, 0, 1), (0, 0, 256))}, r"\[0, 0, 256\]"),
        ({"ignore_index": 1}, "1 is also the index of class 'road'"),
        ({"ignore_index": 70000}, "ignore_index: 70000"),
        ({"value_map": {70000: 0}}, "stored value 70000"),
        ({"value_map": {1: 3}}, "1: 3 is neither"),
    ],
)
def test_custom_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        make_spec("mine", CustomDataConfig(**{"classes": CUSTOM.classes, **options}))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colored_mask_is_refused(tmp_path, mode):
    path = save(tmp_path / "m.png", np.zeros((4, 4, 3), np.uint8), mode)
    with pytest.raises(UserError, match=rf"m.png.*class indices.*found {mode}"):
        read_mask(path, make_spec("mine", CUSTOM))


def test_integer_masks(tmp_path):
    spec, indices = make_spec("mine", CUSTOM), np.array([[0, 1], [2, 255]])
    assert read_mask(save_palette(tmp_path / "p.png", indices), spec).tolist() == indices.tolist()
    assert read_mask(save(tmp_path / "i16.png", indices.astype(np.uint16)), spec).tolist() == indices.tolist()
    assert read_mask(save(tmp_path / "i32.tif", indices.astype(np.int32)), spec).tolist() == indices.tolist()
    assert read_mask(save(tmp_path / "one.png", np.array([[False, True]])), spec).tolist() == [[0, 1]]
    with pytest.raises(UserError, match=r"big.png.* 1000 \(1 pixel\)"):
        read_mask(save(tmp_path / "big.png", np.array([[0, 1000]], np.uint16)), spec)
    with pytest.raises(UserError, match=r"neg.tif.*-1 \(2 pixels\)"):
        read_mask(save(tmp_path / "neg.tif", np.array([[-1, -1, 0]], np.int32)), spec)


def test_image_modes(tmp_path):
    rng = np.random.default_rng(0)
    rgb, gray = rng.integers(0, 256, (5, 7, 3), np.uint8), rng.integers(0, 256, (5, 7), np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "rgb.png", rgb)), rgb)
    repeated = np.repeat(gray[..., None], 3, 2)
    assert np.array_equal(read_image(save(tmp_path / "l.png", gray)), repeated)
    assert np.array_equal(read_image(save(tmp_path / "i16.png", gray.astype(np.uint16) * 257)), repeated)
    assert read_image(save_palette(tmp_path / "p.png", gray))[0, 0].tolist() == [255 - gray[0, 0], gray[0, 0], 7]
    alpha = np.dstack([rgb, np.where(gray > 99, 255, 0).astype(np.uint8)])
    assert np.array_equal(read_image(save(tmp_path / "rgba.png", alpha)), np.where(repeated > 99, rgb, 255))
    assert read_image(save(tmp_path / "cmyk.jpg", np.full((8, 8, 3), 200, np.uint8), "CMYK")).mean() > 190
    with pytest.raises(UserError, match="f.tif.*floating-point"):
        read_image(save(tmp_path / "f.tif", gray.astype(np.float32)))


def test_exif_orientation(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise to be shown upright
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(rgb, -1))


def test_damaged_files(tmp_path):
    whole = save(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "text.jpg", "empty.png"):
        with pytest.raises(UserError, match=f"{name}: truncated or not an image"):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="gone.png: no such file"):
        read_image(tmp_path / "gone.png")


def test_decompression_bomb(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 16_000, 16_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4))
    with pytest.raises(UserError, match="bomb.png: more than 250 megapixels"):
        read_image(tmp_path / "bomb.png")


def test_pair_size_mismatch(tmp_path):
    image = save(tmp_path / "a.png", np.zeros((6, 8, 3), np.uint8))
    mask = save(tmp_path / "b.png", np.zeros((8, 6), np.uint8))
    with pytest.raises(UserError, match=r"a.png is 8 x 6.*b.png is 6 x 8"):
        read_pair(Sample(image, mask), make_spec("mine", CUSTOM))


def test_evaluation_item(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    sample = Sample(save(tmp_path / "a.png", rgb), save(tmp_path / "b.png", np.full((6, 8), 2, np.uint8)))
    image, mask, name = SegmentationDataset([sample], make_spec("mine", CUSTOM))[0]
    assert np.array_equal(image.numpy().transpose(1, 2, 0), rgb)
    assert mask.shape == (6, 8) and mask.dtype == image.dtype and name == "a"

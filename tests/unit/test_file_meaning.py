"""What image and mask files say they mean: palettes, bits, bands, ranges, orientation, pages; values against numpy."""

import errno
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from allspark.config import CustomDataConfig, DataConfig
from allspark.data.audit import audit
from allspark.data.datasets import ade20k
from allspark.data.datasets.custom import make_spec
from allspark.data.image_io import load_image, read_image
from allspark.data.mask_io import read_mask
from allspark.data.spec import ImageReading, Sample
from allspark.data.splits import Lists
from allspark.data.survey import find_contradictions, inspect_sample
from allspark.prepare.images import decode_indices
from allspark.prepare.masks import read_region
from allspark.utils.errors import UserError
from allspark.utils.retry import retry_transient

RNG = np.random.default_rng(3)
TRUTH = RNG.integers(0, 4, (40, 48)).astype(np.uint8)
PHOTO = RNG.integers(0, 256, (40, 48, 3)).astype(np.uint8)
COLORS = np.array([[7, 0, 0], [250, 50, 50], [50, 250, 50], [9, 9, 250]], np.uint8)


def spec(classes="abcd", **custom):
    return make_spec("mine", CustomDataConfig(classes=tuple(classes), **custom))


def gray_png(path: Path, values: np.ndarray, bits: int) -> Path:
    """A gray PNG of few bits per pixel, which Pillow does not write."""
    rows = (values[..., None] >> np.arange(bits)[::-1] & 1).reshape(len(values), -1).astype(np.uint8)
    raw = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def tiff(path: Path, array: np.ndarray, photometric: int = 1, extra: int | None = None) -> Path:
    """An uncompressed TIFF of any number of bands and type of values."""
    height, width, *bands = array.shape
    tags = {256: width, 257: height, 258: array.dtype.itemsize * 8, 259: 1, 262: photometric, 277: (bands or [1])[0]}
    tags |= {278: height, 279: array.nbytes, 339: {"u": 1, "i": 2, "f": 3}[array.dtype.kind]}
    tags |= {} if extra is None else {338: extra}
    repeated = struct.pack(f"<{tags[277]}H", *[tags[258]] * tags[277])
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4 + len(repeated)
    entries = b""
    for tag, value in sorted(tags.items()):
        if tag == 258 and tags[277] > 2:
            entries += struct.pack("<HHII", tag, 3, tags[277], tags[273] - len(repeated))
        else:
            entries += struct.pack("<HHII", tag, 4, 1, value)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + repeated + array.tobytes())
    return path


def palette_png(path: Path, indices: np.ndarray, palette: np.ndarray) -> Path:
    image = Image.fromarray(indices.astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(path)
    return path


def problems(spec, *pairs):
    """What is wrong with samples of (image, mask) or (image,): of each, else of all together."""
    reports = [inspect_sample("labeled", Sample(*pair), spec) for pair in pairs]
    errors = [str(error) for each in reports for error in (*each.errors, each.illegal) if error]
    return errors or find_contradictions(reports, spec)[0]


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
def test_gray_palette_counts_as_gray(tmp_path, order):
    """As lossless optimizers and GIF writers number the values of each file anew."""
    table = np.array(order, np.uint8)
    indices = np.argsort(table)[TRUTH]
    for path in (tmp_path / "mask.png", tmp_path / "mask.gif"):
        palette_png(path, indices, np.repeat(table[:, None], 3, 1))
        np.testing.assert_array_equal(read_mask(path, spec()), TRUTH)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_hold_stored_values(tmp_path, bits):
    truth = TRUTH % 2**bits
    np.testing.assert_array_equal(read_mask(gray_png(tmp_path / "mask.png", truth, bits), spec()), truth)
    image = read_image(gray_png(tmp_path / "image.png", truth, bits))[..., 0]  # of a photo the largest value is white
    np.testing.assert_array_equal(image, truth.astype(int) * 255 // (2**bits - 1))


def test_masks_of_different_bits(tmp_path, photo):
    one = gray_png(tmp_path / "one.png", TRUTH % 2, 1)
    eight, empty = tmp_path / "eight.png", tmp_path / "empty.png"
    Image.fromarray(TRUTH % 2 * 255).save(eight)
    Image.fromarray(TRUTH * 0).save(empty)
    (found,) = problems(spec("ab"), (photo, one), (photo, eight))
    assert "different bit depths" in found and str(one) in found and str(eight) in found
    assert not problems(spec("ab"), (photo, one), (photo, empty))
    assert not problems(spec("ab", value_map={0: 0, 255: 1}), (photo, eight), (photo, empty))
    four = gray_png(tmp_path / "four.png", TRUTH, 4)
    assert problems(spec(), (photo, one), (photo, four))


def test_colored_palettes(tmp_path, photo):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    palette_png(one, TRUTH, np.vstack([COLORS, [[90, 80, 70]]]))  # an entry that this file does not use
    palette_png(two, TRUTH % 3, COLORS[:3])
    np.testing.assert_array_equal(read_mask(one, spec()), TRUTH)
    assert not problems(spec(), (photo, one), (photo, two))
    # Renumbered by a program that reduces colors
    order = np.array([3, 1, 0, 2])
    palette_png(two, np.argsort(order)[TRUTH], COLORS[order])
    (found,) = problems(spec(), (photo, one), (photo, two))
    assert "index 0 has the color 7,0,0 in the palette of" in found and str(one) in found and str(two) in found
    (found,) = problems(spec(), (photo, two))
    assert "does not have the classes' colors (0 is 9,9,250" in found
    own = {"palette": tuple(map(tuple, COLORS.tolist()))}
    (found,) = problems(spec(**own), (photo, two))
    assert "index 0 of its palette has the color 9,9,250 of class d, but is the index of class a" in found
    with pytest.raises(UserError, match="data.custom.color_map"):
        read_mask(two, spec(**own))
    by_color = spec(color_map={",".join(map(str, color)): index for index, color in enumerate(COLORS.tolist())})
    for path in (one, two):
        np.testing.assert_array_equal(read_mask(path, by_color), TRUTH)


def test_palette_beside_gray(tmp_path, photo):
    """As half of PASCAL's masks: good if the palette has the classes' colors."""
    gray, colored = tmp_path / "gray.png", tmp_path / "colored.png"
    Image.fromarray(TRUTH).save(gray)
    palette_png(colored, TRUTH, np.array(spec().palette + ((1, 2, 3),)))
    assert not problems(spec(), (photo, gray), (photo, colored))
    palette_png(colored, TRUTH, np.vstack([COLORS, [[90, 80, 70]]]))
    (found,) = problems(spec(), (photo, gray), (photo, colored))
    assert str(gray) in found and str(colored) in found


@pytest.mark.parametrize("stored", ["palette", "4 bits", "8 bits"])
def test_gray_masks_of_archives(tmp_path, stored):
    """Gray values count for `prepare` as for training, not the indices of a palette or spread bits."""
    mask, path = (3 + TRUTH).astype(np.uint8), tmp_path / "m.png"
    if stored == "palette":  # as a lossless optimizer writes it
        palette_png(path, TRUTH, np.arange(3, 7).repeat(3).reshape(4, 3))
    else:
        gray_png(path, mask, int(stored[0]))
    np.testing.assert_array_equal(decode_indices(path.read_bytes(), "m.png"), mask)


def test_tiff_palette_of_8_bits(tmp_path):
    """TIFF palettes have 16 bits; the colors of one with 8 would all be black."""
    tifffile = pytest.importorskip("tifffile")
    path, by_color = tmp_path / "m.tif", spec("ab", color_map={"0,0,0": 0, "250,50,50": 1})
    for scale in (1, 257):
        colormap = np.zeros((3, 256), np.uint16)
        colormap[:, 1] = np.array([250, 50, 50]) * scale
        tifffile.imwrite(path, TRUTH % 2, photometric="palette", colormap=colormap)
        if scale == 1:
            for read in (read_image, lambda path: read_mask(path, by_color)):
                with pytest.raises(UserError, match="palette has 8 bits instead of 16"):
                    read(path)
    np.testing.assert_array_equal(read_image(path), np.array([[0, 0, 0], [250, 50, 50]])[TRUTH % 2])
    np.testing.assert_array_equal(read_mask(path, by_color), TRUTH % 2)


def test_refused_masks(tmp_path):
    """Formats that change values, or do not say which of two meanings counts."""
    Image.fromarray(TRUTH).save(tmp_path / "m.jpg")
    Image.fromarray(TRUTH).save(tmp_path / "jpeg.tif", compression="jpeg")
    Image.fromarray(TRUTH).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.fromarray(TRUTH)])
    tiff(tmp_path / "white.tif", TRUTH, photometric=0)
    tiff(tmp_path / "float.tif", TRUTH.astype(np.float32))
    tiff(tmp_path / "long.tif", TRUTH.astype(np.int64))
    cv2.imwrite(str(tmp_path / "deep.png"), COLORS[TRUTH].astype(np.uint16))
    (tmp_path / "m.pgm").write_bytes(b"P5 48 40 15\n" + TRUTH.tobytes())
    told = {
        "m.jpg": "a JPEG mask; JPEG changes values",
        "jpeg.tif": "TIFF with jpeg compression",
        "pages.tif": "several pages",
        "white.tif": "0 is white",
        "float.tif": "floating-point values; save the class indices",
        "long.tif": r"a TIFF of 1 band\(s\) of 64-bit signed integers",
        "deep.png": "16 bits per channel",
        "m.pgm": "largest value is 15",
    }
    for name, words in told.items():
        for each in (spec(), spec(color_map={"0,0,0": 0, "250,50,50": 1})) if name != "m.pgm" else (spec(),):
            if name == "deep.png" and each.colors is None:
                continue
            with pytest.raises(UserError, match=words) as error:
                read_mask(tmp_path / name, each)
            assert str(error.value).startswith(str(tmp_path / name)) and "copy it again" not in str(error.value)


def test_large_ids(tmp_path, photo):
    ids = np.array([0, 1000, 2000, 65535])
    Image.fromarray(ids.astype(np.uint16)[TRUTH]).save(tmp_path / "m.png")
    mapped = spec("abc", value_map={0: 0, 1000: 1, 2000: 2}, ignore_index=65535)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", mapped), np.where(TRUTH == 3, 255, TRUTH))
    (found,) = problems(spec("abc", value_map={0: 0, 1000: 1}), (photo, tmp_path / "m.png"))
    assert "illegal mask values 2000 (" in found and ", 65535 (" in found


@pytest.mark.parametrize(("most", "channels"), [(4095, 1), (4095, 3), (1023, 3), (65535, 1), (65535, 3)])
def test_range_of_16_bit_images(tmp_path, most, channels):
    values = RNG.integers(0, most, (40, 48, channels), endpoint=True).astype(np.uint16)
    values[0, 0] = most
    for name in ("a.png", "a.tif"):
        path = tmp_path / name
        cv2.imwrite(str(path), values[..., ::-1])
        found = load_image(path, ImageReading(image_max=most))
        np.testing.assert_array_equal(
            found.pixels, np.broadcast_to(values.astype(int) * 256 // (most + 1), (40, 48, 3))
        )
        np.testing.assert_array_equal(read_image(path), np.broadcast_to(values >> 8, (40, 48, 3)))
        assert found.peak == most
        told = problems(spec(), (path,))
        assert bool(told) == (most < 2**15) and all(f"such as {most}" in line for line in told)
        assert not problems(spec(image_max=most), (path,))
        Image.fromarray(PHOTO).save(tmp_path / "8.png")
        assert problems(spec(), (path,), (tmp_path / "8.png",))
        cv2.imwrite(str(tmp_path / "full.png"), np.full((40, 48), 65535, np.uint16))
        (found,) = problems(spec(), (path,), (tmp_path / "full.png",)) or [""]
        assert ("differ in their range" in found) == (most < 65535)


def test_bands(tmp_path):
    """A fourth band is not taken for transparency, whatever the file says of it; true transparency is."""
    five = RNG.integers(0, 256, (40, 48, 5)).astype(np.uint8)
    for name, array, extra in (("4", five[..., :4], 0), ("4", five[..., :4], None), ("5", five, 0)):
        with pytest.raises(UserError, match=f"{name} band") as error:
            read_image(tiff(tmp_path / "bands.tif", np.ascontiguousarray(array), photometric=2, extra=extra))
        assert "copy it again" not in str(error.value)
    gray = np.ascontiguousarray(PHOTO[..., 0])
    inverted = read_image(tiff(tmp_path / "inverted.tif", gray, photometric=0))  # 0 is white
    np.testing.assert_array_equal(inverted, 255 - np.repeat(gray[..., None], 3, 2))
    near_infrared = np.ascontiguousarray(five[..., :4])
    Image.fromarray(near_infrared).save(tmp_path / "nir.png")
    for path in (tmp_path / "nir.png", tiff(tmp_path / "nir.tif", near_infrared, photometric=2, extra=2)):
        with pytest.raises(UserError, match="near infrared"):
            read_image(path)
    with pytest.raises(UserError, match="3 band.*32-bit floating"):
        read_image(tiff(tmp_path / "float.tif", PHOTO.astype(np.float32), photometric=2))
    clear = np.dstack([PHOTO, np.where(TRUTH == 0, 0, 255).astype(np.uint8)])
    tiff(tmp_path / "clear.tif", clear, photometric=2, extra=2)
    np.testing.assert_array_equal(read_image(tmp_path / "clear.tif"), np.where(TRUTH[..., None] == 0, 255, PHOTO))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_orientation(tmp_path, suffix):
    """All eight orientations, against numpy; a TIFF is turned by Pillow itself."""
    views = {1: PHOTO, 2: PHOTO[:, ::-1], 3: PHOTO[::-1, ::-1], 4: PHOTO[::-1], 5: PHOTO.swapaxes(0, 1)}
    views |= {6: np.rot90(PHOTO, -1), 7: np.rot90(PHOTO, 2).swapaxes(0, 1), 8: np.rot90(PHOTO)}
    for number, view in views.items():
        path, exif = tmp_path / f"{number}.{suffix}", Image.Exif()
        exif[0x0112] = number
        Image.fromarray(PHOTO).save(path, exif=exif)
        for orientation, truth in ((None, view), ("shown", view), ("stored", PHOTO)):
            found = load_image(path, ImageReading(orientation=orientation))
            assert found.orientation == number
            np.testing.assert_array_equal(found.pixels, truth)


def test_orientation_of_one_of_a_pair(tmp_path):
    image, mask, exif = tmp_path / "i.jpg", tmp_path / "m.png", Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(PHOTO).save(image, exif=exif)
    Image.fromarray(TRUTH).save(mask)
    (found,) = problems(spec(), (image, mask))
    assert str(image) in found and "data.custom.orientation=shown" in found
    assert not problems(spec(orientation="shown"), (image, mask)) + problems(spec(orientation="stored"), (image, mask))
    Image.fromarray(TRUTH).save(mask, exif=exif)  # on both: both are turned
    assert not problems(spec(), (image, mask))
    np.testing.assert_array_equal(read_mask(mask, spec()), TRUTH[::-1, ::-1])
    np.testing.assert_array_equal(read_mask(mask, spec(orientation="stored")), TRUTH)


def test_pages(tmp_path):
    """Smaller copies inside a TIFF are no pages; of an animation no frame is chosen."""
    frames = [Image.fromarray(PHOTO), Image.fromarray(PHOTO[::-1])]
    for name in ("a.tif", "a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match="several pages"):
            read_image(tmp_path / name)
    small = frames[0].resize((24, 20))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    frames[0].save(tmp_path / "b.tif", save_all=True, append_images=[small])
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif"), PHOTO)


def test_masks_of_many_colors(tmp_path, photo):
    """Counting them takes no longer than the pixels do."""
    Image.fromarray(RNG.integers(0, 256, (300, 300, 3)).astype(np.uint8)).save(tmp_path / "m.png")
    (found,) = problems(spec(color_map={"0,0,0": 0}), (photo, tmp_path / "m.png"))
    assert "more than 4096 different colors" in found


class UnreliablePath(type(Path())):
    """A file on a storage whose first reads fail."""

    failures: list[int] = []

    def open(self, *args, **options):
        if self.failures:
            raise OSError(self.failures.pop(), "storage fails", str(self))
        return super().open(*args, **options)


def test_transient_errors_are_retried(photo):
    path = UnreliablePath(photo)
    path.failures[:] = [errno.ESTALE]
    np.testing.assert_array_equal(read_image(path), PHOTO)
    path.failures[:] = [errno.EACCES]
    with pytest.raises(UserError, match=r"cannot be read \(storage fails\)"):
        read_image(path)


def test_retry():
    errors, waits = [errno.EIO, errno.ETIMEDOUT, errno.ESTALE], (0, 0)

    def read():
        if errors:
            raise OSError(errors.pop(), "")
        return "content"

    with pytest.raises(OSError):
        retry_transient(read, waits)
    errors[:] = [errno.EIO, errno.EIO]
    assert retry_transient(read, waits) == "content"
    errors[:] = [errno.ENOENT]
    with pytest.raises(FileNotFoundError):
        retry_transient(read, waits)
    assert not errors


def test_memory_of_large_16_bit_images(tmp_path):
    """Little beside the image and the result: a file of half a megabyte may hold 250 megapixels."""
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((1500, 1500), np.uint16)).save(path)
    tracemalloc.start()
    try:
        read_image(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 1500**2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["png", "gif", "tif"])
@pytest.mark.parametrize("entries", [[0, 0, 0], [0, 0, 0] * 256, [0, 0, 0, 0, 0, 0, 255, 255, 255]])
def test_palette_that_tells_nothing_apart(tmp_path, suffix, entries):
    """As Pillow saves an array as "P": the indices count."""
    image = Image.frombytes("P", TRUTH.shape[::-1], (TRUTH % 2).tobytes())
    image.putpalette(entries)
    image.save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"a.{suffix}", spec()), TRUTH % 2)


def bmp(path: Path, values: np.ndarray, bits: int, palette: list[int]) -> Path:
    """A BMP with few colors in its palette."""
    height, width = values.shape
    packed = (values[..., None] >> np.arange(bits)[::-1] & 1).reshape(height, -1).astype(np.uint8)
    rows = np.packbits(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 32))), 1)[::-1].tobytes()
    colors = b"".join(bytes([gray, gray, gray, 0]) for gray in palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(rows), 0, 0, len(palette), 0)
    start = 14 + len(header) + len(colors)
    path.write_bytes(b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + colors + rows)
    return path


@pytest.mark.parametrize("bits", [4, 8])
def test_bmp_of_two_grays(tmp_path, bits):
    """Pillow would read one bit per pixel."""
    path = bmp(tmp_path / "a.bmp", TRUTH % 2, bits, [0, 255])
    for read in (lambda: read_mask(path, spec()), lambda: read_image(path)):
        with pytest.raises(UserError, match=rf"a.bmp: a BMP with {bits} bits per pixel.*save it as PNG"):
            read()
    one = bmp(tmp_path / "b.bmp", TRUTH % 2, 1, [0, 255])
    assert np.array_equal(read_image(one)[..., 0], TRUTH % 2 * 255)
    full = bmp(tmp_path / "c.bmp", TRUTH, 8, list(range(256)))
    assert np.array_equal(read_mask(full, spec()), TRUTH)


DEEP = PHOTO.astype(np.uint16) * 16  # 12 bits per channel


@pytest.mark.parametrize("tags", [{"planarconfig": "separate"}, {"extratags": [(274, "H", 1, 3, True)]}])
def test_16_bit_tiff_that_is_misread(tmp_path, tags):
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    values = np.moveaxis(DEEP, 2, 0) if "planarconfig" in tags else DEEP
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", **tags)
    with pytest.raises(UserError, match=r"a.tif: a TIFF with 16 bits per channel, stored channel by channel or"):
        read_image(tmp_path / "a.tif", ImageReading(4095))
    tifffile.imwrite(tmp_path / "b.tif", DEEP, photometric="rgb")
    assert np.array_equal(read_image(tmp_path / "b.tif", ImageReading(4095)), PHOTO)


def test_deep_files_that_pillow_reduces(tmp_path):
    height, width = TRUTH.shape
    head = f"P6 {width} {height} 65535\n".encode()
    (tmp_path / "a.ppm").write_bytes(head + DEEP.astype(">u2").tobytes())
    (tmp_path / "a.pgm").write_bytes(f"P5 {width} {height} 4095\n".encode() + DEEP[..., 0].astype(">u2").tobytes())
    for name, white in (("a.ppm", 65535), ("a.pgm", 4095)):
        for channels in (3, 1, 4):
            with pytest.raises(UserError, match=rf"{name}: a PPM whose white is {white}; save it as 16-bit PNG"):
                read_image(tmp_path / name, ImageReading(4095, channels=channels))
    (tmp_path / "b.pgm").write_bytes(f"P5 {width} {height} 65535\n".encode() + DEEP[..., 0].astype(">u2").tobytes())
    assert np.array_equal(read_image(tmp_path / "b.pgm", ImageReading(4095))[..., 0], PHOTO[..., 0])


@pytest.mark.parametrize(("shape", "bits"), [("rgb", 16), ("gray", 12)])
def test_deep_jpeg_2000(tmp_path, shape, bits):
    codecs = pytest.importorskip("imagecodecs", reason="imagecodecs is not installed")
    values = DEEP if shape == "rgb" else DEEP[..., 0].copy()
    content = codecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="jp2", bitspersample=bits)
    (tmp_path / "a.jp2").write_bytes(content)
    with pytest.raises(UserError, match=rf"a.jp2: a JPEG 2000 with {bits} bits per channel; save it as 16-bit PNG"):
        read_image(tmp_path / "a.jp2", ImageReading(4095))
    Image.fromarray(PHOTO).save(tmp_path / "b.jp2", irreversible=False)
    assert np.array_equal(read_image(tmp_path / "b.jp2"), PHOTO)


def test_other_colors_are_no_bands(tmp_path):
    Image.fromarray(PHOTO).convert("CMYK").save(tmp_path / "a.jpg")
    Image.fromarray(PHOTO).convert("CMYK").save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a.jpg: its channels are CMYK, not the bands of data.custom.channels"):
        read_image(tmp_path / "a.jpg", ImageReading(channels=4))
    pytest.importorskip("tifffile", reason="tifffile is not installed")
    with pytest.raises(UserError, match=r"a.tif: its channels are SEPARATED"):
        read_image(tmp_path / "a.tif", ImageReading(channels=4))


def test_image_without_an_opaque_pixel(tmp_path):
    image = Image.fromarray(PHOTO)
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png: every pixel is transparent; if its colors are right, save it as RGB"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ({"color_map": {"0,0,0": 0, "0, 0, 0": 1}}, 'color_map: the color "0,0,0" is given twice'),
        (
            {"ignore_index": 0, "value_map": {0: 0, 1: 0, 2: 1}},
            "value_map: the stored value 0 is ignore_index, and has",
        ),
        (
            {"ignore_index": 0, "color_map": {"0,0,0": 0}},
            "ignore_index: 0 is also the index of class 'a'; leave it at 255",
        ),
    ],
)
def test_maps_with_two_readings(custom, message):
    with pytest.raises(UserError, match=message):
        spec("ab", **custom)
    assert spec("ab", ignore_index=0, value_map={1: 0, 2: 1}).decode_mask(np.arange(3)).tolist() == [255, 0, 1]
    assert spec("ab", value_map={0: 0, 255: 1}).decode_mask(np.array([0, 255])).tolist() == [0, 1]


def test_masks_that_mix_1_and_255(tmp_path):
    """255 is ignored by default: a mask of 0 and 255 beside masks of 0 and 1 may hold the same class."""

    def reports(*foregrounds, **custom):
        samples = []
        for number, foreground in enumerate(foregrounds):
            image, mask = tmp_path / f"{number}.jpg", tmp_path / f"{number}.png"
            Image.fromarray(PHOTO).save(image)
            Image.fromarray((TRUTH % 2 * foreground).astype(np.uint8)).save(mask)
            samples.append(Sample(image, mask))
        data = DataConfig(dataset="mine", data_root=str(tmp_path), crop_size=64, custom=CustomDataConfig(**custom))
        lists = Lists(tuple(samples), (), tuple(samples), hash="", name="x", hashes={})
        return audit(data, make_spec("mine", data.custom), lists).problems

    classes = ("a", "b")
    (problem,) = reports(1, 255, 1, classes=classes)
    assert problem.startswith("1 masks hold only 0 and 255, which is ignored, such as ")
    assert problem.endswith("data.custom.value_map: {0: 0, 1: 1, 255: 255}")
    assert not reports(1, 255, 1, classes=classes, value_map={0: 0, 1: 1, 255: 255})
    assert not reports(1, 255, 1, classes=classes, value_map={0: 0, 1: 1, 255: 1})
    assert not reports(1, 1, classes=classes)
    (problem,) = reports(1, 255, classes=("a", "b", "c"))  # every class, seen here or not
    assert problem.endswith("data.custom.value_map: {0: 0, 1: 1, 2: 2, 255: 255}")
    assert len(reports(1, 255, 9, classes=classes)) == 1  # illegal values have their own message


def test_black_palette_in_every_file(tmp_path):
    """The indices count in all files alike, also in one that shows a single class."""
    for name, values in (("a", TRUTH % 2), ("b", np.ones_like(TRUTH))):
        image = Image.frombytes("P", TRUTH.shape[::-1], values.astype(np.uint8).tobytes())
        image.putpalette([0, 0, 0] * 256)
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", spec()), values)


@pytest.mark.parametrize("gray", [0, 1, 255])
def test_palette_of_one_gray(tmp_path, gray):
    """As tools that drop unused entries write a mask of a single class, beside others with several grays."""
    image = Image.new("P", (5, 4))
    image.putpalette([gray] * 3)
    image.save(tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).max() == 0
    assert np.array_equal(read_mask(tmp_path / "a.png", spec()), np.full((4, 5), gray))
    assert read_region(tmp_path / "a.png").all() == (gray > 0)


def test_pbm_mask(tmp_path):
    (tmp_path / "a.pbm").write_bytes(b"P1\n2 1\n0 1\n")
    with pytest.raises(UserError, match=r"a.pbm: a PBM mask, in which 1 is black; save it as 8-bit PNG"):
        read_mask(tmp_path / "a.pbm", spec())


@pytest.mark.parametrize("kinds", [(4,), (1,), (1, 4), (0,), (1, 0)])
@pytest.mark.parametrize("channels", [3, 4])
def test_pages_of_a_tiff(tmp_path, kinds, channels):
    """Smaller copies (1) and GDAL's internal masks (4) are no pages; a second image is one."""
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    image = np.dstack([PHOTO, PHOTO[..., 0]])[..., :channels]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(image, photometric="rgb", extrasamples=None if channels == 3 else ["unspecified"])
        for kind in kinds:
            page = np.ones((40, 48), bool) if kind == 4 else PHOTO[::2, ::2].copy()
            file.write(page, subfiletype=kind, photometric="mask" if kind == 4 else "rgb")
    if 0 in kinds:
        with pytest.raises(UserError, match="a.tif: has several pages"):
            read_image(tmp_path / "a.tif", ImageReading(channels=channels))
    else:
        assert np.array_equal(read_image(tmp_path / "a.tif", ImageReading(channels=channels)), image)


def test_exif_that_cannot_be_read(tmp_path):
    """Viewers show such a photo as it is stored."""
    Image.fromarray(PHOTO).save(tmp_path / "a.jpg", quality=95, exif=b"Exif\0\0garbage-not-tiff")
    Image.fromarray(TRUTH).save(tmp_path / "a.png", exif=b"Exif\0\0garbage-not-tiff")
    assert read_image(tmp_path / "a.jpg").shape == PHOTO.shape
    assert np.array_equal(read_mask(tmp_path / "a.png", spec()), TRUTH)


def test_bands_of_a_file_with_a_turn(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    four = np.dstack([PHOTO, PHOTO[..., 0]])
    Image.fromarray(four).save(tmp_path / "a.png", exif=exif)
    with pytest.raises(UserError, match="has an orientation tag"):
        read_image(tmp_path / "a.png", ImageReading(channels=4))
    assert np.array_equal(read_image(tmp_path / "a.png", ImageReading(channels=4, orientation="stored")), four)


def test_signed_bytes_are_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 40, 48), 100, np.int8), photometric="minisblack")
    with pytest.raises(UserError, match="a.tif"):
        read_image(tmp_path / "a.tif", ImageReading(channels=4))


def test_transparent_value_of_16_bit_gray(tmp_path):
    deep = PHOTO[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "a.png", transparency=int(deep[3, 5]))
    found = read_image(tmp_path / "a.png")[..., 0]
    assert np.array_equal(found, np.where(deep == deep[3, 5], 255, PHOTO[..., 0]))


def test_ade20k_masks_of_another_tool(tmp_path):
    """Already shifted to 0..149, with 255 for no class: every class would be off by one."""
    Image.fromarray(np.where(TRUTH == 3, 255, TRUTH).astype(np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png: illegal mask values 255 .*official masks: 0 = no class"):
        read_mask(tmp_path / "a.png", ade20k.SPEC)

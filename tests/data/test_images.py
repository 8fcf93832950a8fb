import io
import logging
import multiprocessing
import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dyhead.data import DataError, images, read_image


@pytest.fixture
def colours():
    """An image of 6 x 4 (width x height) with no symmetry."""
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def test_reads_rgb_and_bgr(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, colours)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", "BGR"), colours[:, :, ::-1])
    assert read_image(tmp_path / "a.png", "BGR").flags.c_contiguous
    image[:] = 0  # writable
    with pytest.raises(ValueError, match="format"):
        read_image(tmp_path / "a.png", "L")


def test_other_kinds_of_images_become_rgb(tmp_path, colours):
    grey = colours[:, :, 0]
    three = np.repeat(grey[:, :, None], 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), three)

    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / "grey16.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey16.png"), three)

    Image.fromarray(np.dstack([colours, grey])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), colours)

    Image.fromarray(colours).quantize(24).save(tmp_path / "palette.png")  # 24 pixels: every colour has its place
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), colours)

    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png"), 255 * (three > 100))

    Image.fromarray(colours).convert("CMYK").save(tmp_path / "cmyk.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "cmyk.tif"), colours)


UPRIGHT = [
    (1, lambda a: a),
    (2, lambda a: a[:, ::-1]),
    (3, lambda a: a[::-1, ::-1]),
    (4, lambda a: a[::-1]),
    (5, lambda a: a.transpose(1, 0, 2)),
    (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
    (8, lambda a: np.rot90(a)),
]


@pytest.mark.parametrize(("orientation", "upright"), UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, colours, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    expected = upright(colours)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", size=expected.shape[:2]), expected)
    if orientation > 4:
        with pytest.raises(DataError, match=rf"it is before its EXIF orientation {orientation} is applied"):
            read_image(tmp_path / "a.png", size=(4, 6))


def test_a_size_other_than_annotated_names_both(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: the image is 6 x 4 pixels .*say 6 x 5"):
        read_image(tmp_path / "a.png", size=(5, 6))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_named(tmp_path, suffix, part):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"a\{suffix}: the image cannot be read"):
        read_image(path)


def test_what_is_not_an_image_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    for name in ("a.jpg", "empty.jpg"):
        with pytest.raises(DataError, match=f"{name}: the image cannot be read"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"b\.jpg: the image does not exist"):
        read_image(tmp_path / "b.jpg")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: .*floating point"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize(("orientation", "upright"), UPRIGHT)
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_a_tiff_is_turned_once(tmp_path, colours, orientation, upright, compression):
    grey = np.kron(colours[:, :, :1], np.ones((16, 16, 1), np.uint8))  # flat blocks, which JPEG keeps nearly
    image = Image.fromarray(grey[:, :, 0])
    image.save(tmp_path / "a.tif", compression=compression, tiffinfo={0x0112: orientation})
    expected = upright(np.repeat(grey, 3, axis=2))
    found = read_image(tmp_path / "a.tif", size=expected.shape[:2])
    assert np.abs(found.astype(int) - expected).max() <= (3 if compression == "jpeg" else 0)
    if orientation > 4:
        with pytest.raises(DataError, match=rf"it is before its EXIF orientation {orientation} is applied"):
            read_image(tmp_path / "a.tif", size=grey.shape[:2])


def exif(*tags):
    """An EXIF block, little endian, of (tag, type, count, value or offset) in the given order."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + b"text\0\0\0\0"


@pytest.mark.parametrize(
    "odd",
    [
        (0x011A, 2, 4, 0x20323720),  # the resolution as text
        (0x011A, 5, 1, 0xFFFF0000),  # a value beyond the block's end
        (0x0100, 99, 1, 1),  # an unknown type
        (0x8769, 4, 1, 8),  # a block within that is this block
        (0x9286, 7, 0xFFFFFFFF, 0),  # more than there is
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the tags
def test_the_orientation_is_applied_whatever_else_stands_beside_it(tmp_path, colours, odd, suffix):
    picture = Image.fromarray(np.kron(colours, np.ones((16, 16, 1), np.uint8)))
    options = {"exif": exif((0x0112, 3, 1, 6), odd)}
    picture.save(tmp_path / f"a{suffix}", **options, **({"lossless": True} if suffix == ".webp" else {}))
    picture.save(tmp_path / f"plain{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    plain = read_image(tmp_path / f"plain{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}", size=(96, 64)), np.rot90(plain, -1))


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nothing", exif((0x0112, 2, 4, 54))]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_exif_block_is_no_orientation(tmp_path, colours, block):
    Image.fromarray(colours).save(tmp_path / "a.png", exif=block)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours)


def test_an_orientation_that_a_png_tells_after_its_pixels_is_applied(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:-12] + chunk(b"eXIf", exif((0x0112, 3, 1, 6))[6:]) + whole[-12:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(colours, -1))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.fixture
def dark_warnings(caplog):
    """The messages of the warnings about dark images so far; none has come before."""
    images._warned[0] = 0
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records]
    images._warned[0] = 0


def grey16(path, values, **options):
    Image.fromarray(values.astype(np.uint16)).save(path, **options)


@pytest.fixture
def grey():
    """Values of 8 bits from 0 to 255."""
    return np.append(np.random.default_rng(1).integers(0, 256, 22), [0, 255]).reshape(4, 6)


def test_32_bit_values_up_to_255_stay_as_they_are(tmp_path, grey, dark_warnings):
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "8.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "8.tif")[:, :, 1], grey)
    Image.fromarray((grey * 256 + 5).astype(np.int32)).save(tmp_path / "16.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "16.tif")[:, :, 1], grey)
    for values in (grey * 1000, -grey):
        Image.fromarray(values.astype(np.int32)).save(tmp_path / "more.tif")
        with pytest.raises(DataError, match=r"more\.tif: .*expected 8 or 16 bits per channel, got values from"):
            read_image(tmp_path / "more.tif")
    assert not dark_warnings()


def test_bits_that_a_tiff_says_are_used_are_kept(tmp_path, grey, dark_warnings):
    for bits in (8, 10, 12, 14, 16):
        grey16(tmp_path / "a.tif", (grey << bits - 8) + 1 % 2 ** (bits - 8), tiffinfo={281: 2**bits - 1})
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[:, :, 2], grey)
    grey16(tmp_path / "a.tif", grey << 8, tiffinfo={281: 4095})  # which is not so
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[:, :, 2], grey)
    assert not dark_warnings()


def test_a_tiff_of_12_bits_keeps_its_upper_8(tmp_path, grey, dark_warnings):
    values = grey * 16 + 7
    pairs = values.reshape(-1, 2)  # two values in three bytes
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    tags = [(256, 6), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 4), (279, 36)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(head + packed.astype(np.uint8).tobytes())
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[:, :, 0], grey)
    assert not dark_warnings()


def significant(path, bits):
    """Writes into a PNG how many bits are significant."""
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + chunk(b"sBIT", bytes([bits])) + whole[33:])  # after the header


def test_bits_that_a_png_says_are_used_are_kept(tmp_path, grey, dark_warnings):
    path = tmp_path / "a.png"
    for bits in (8, 10, 12, 14):
        grey16(path, (grey << bits - 8) + 1 % 2 ** (bits - 8))
        significant(path, bits)
        np.testing.assert_array_equal(read_image(path)[:, :, 0], grey)
    # As PNG wants it: scaled to 16 bits, whether bright or dark.
    grey16(path, (grey << 8) + (grey & 0xF0))
    significant(path, 12)
    np.testing.assert_array_equal(read_image(path)[:, :, 0], grey)
    assert not dark_warnings()
    grey16(path, grey << 4)
    significant(path, 12)
    np.testing.assert_array_equal(read_image(path)[:, :, 0], grey >> 4)
    assert len(dark_warnings()) == 1


def test_the_range_of_a_pgm_is_what_it_says(tmp_path, grey, dark_warnings):
    (tmp_path / "a.pgm").write_bytes(b"P5 6 4 1023\n" + (grey * 4).astype(">u2").tobytes())
    found = read_image(tmp_path / "a.pgm")[:, :, 0]
    assert np.abs(found - grey * 4 / 1023 * 255).max() <= 1
    assert not dark_warnings()


def test_images_that_come_out_dark_are_named_once(tmp_path, grey, dark_warnings):
    grey16(tmp_path / "bright.png", np.full((4, 6), 2**14))
    assert read_image(tmp_path / "bright.png").max() == 64
    Image.fromarray(np.full((4, 6, 3), 9, np.uint8)).save(tmp_path / "night.png")
    assert read_image(tmp_path / "night.png").max() == 9
    assert not dark_warnings()
    for name in ("first.png", "second.png"):
        grey16(tmp_path / name, grey * 16)
        np.testing.assert_array_equal(read_image(tmp_path / name)[:, :, 0], grey >> 4)
    (message,) = dark_warnings()
    assert message.startswith(f"{tmp_path / 'first.png'}: ")
    assert "its brightest value becomes 15 of 255" in message


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="workers are not forked here")
def test_worker_processes_name_one_dark_image_among_them(tmp_path, grey, dark_warnings):
    grey16(tmp_path / "a.png", grey)
    worker = multiprocessing.get_context("fork").Process(target=read_image, args=(tmp_path / "a.png",))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    read_image(tmp_path / "a.png")
    assert not dark_warnings()  # the worker's went elsewhere


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_of_16_bits_that_comes_out_dark_is_named(tmp_path, dark_warnings, channels):
    # Pillow writes no such PNG: its rows are a filter's number and the values, the first byte of each the upper one.
    values = np.random.default_rng(0).integers(0, 4096, (4, 6, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 6, 4, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    expected = values[:, :, [0, 0, 0]] if channels == 2 else values[:, :, :3]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected >> 8)
    assert [f"{tmp_path / 'a.png'}: " in message for message in dark_warnings()] == [True]


def test_images_beyond_pillows_limit_are_read_where_their_size_is_known(tmp_path, colours, monkeypatch):
    for suffix in ("png", "tif", "gif"):
        Image.fromarray(colours).save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in ("png", "tif", "gif"):
            assert read_image(tmp_path / f"a.{suffix}", size=(4, 6)).shape == (4, 6, 3)
            with pytest.raises(DataError, match=rf"a\.{suffix}: the image cannot be read \(DecompressionBomb"):
                read_image(tmp_path / f"a.{suffix}")
        path, kinds = tmp_path / "a.png", {"size": (4, 6)}
        threads = [threading.Thread(target=read_image, args=(path,), kwargs=kinds) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert Image.MAX_IMAGE_PIXELS == 2


def test_a_file_that_claims_to_be_huge_is_not_read(tmp_path):
    Image.new("1", (8, 8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    header = struct.pack(">II", 2**31 - 1, 2**31 - 1) + whole[24:29]
    (tmp_path / "a.png").write_bytes(whole[:8] + chunk(b"IHDR", header) + whole[33:])
    with pytest.raises(DataError, match=r"a\.png: the image is 2147483647 x 2147483647 pixels .* say 8 x 8"):
        read_image(tmp_path / "a.png", size=(8, 8))
    with pytest.raises(DataError, match=r"a\.png: the image cannot be read \(DecompressionBombError"):
        read_image(tmp_path / "a.png")


def test_transparency_is_dropped_without_a_word(tmp_path, colours):
    few = Image.fromarray(colours).quantize(24)
    few.save(tmp_path / "bytes.png", transparency=bytes(range(24)))
    few.save(tmp_path / "index.png", transparency=3)
    few.save(tmp_path / "index.gif", transparency=3)
    grey = Image.fromarray(colours[:, :, 0])
    grey.convert("LA").save(tmp_path / "la.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("bytes.png", "index.png", "index.gif"):
            np.testing.assert_array_equal(read_image(tmp_path / name), colours)
        np.testing.assert_array_equal(read_image(tmp_path / "la.png"), colours[:, :, [0, 0, 0]])


def test_the_format_is_the_contents_not_the_names(tmp_path, colours):
    picture = Image.fromarray(np.kron(colours, np.ones((16, 16, 1), np.uint8)))
    for actual, options in (("webp", {"lossless": True}), ("bmp", {}), ("gif", {}), ("mpo", {"quality": 95})):
        content = io.BytesIO()
        picture.save(content, actual, **options)
        for suffix in (".jpg", ".png", ".tif", ".txt", ""):
            (tmp_path / f"a{suffix}").write_bytes(content.getvalue())
            assert read_image(tmp_path / f"a{suffix}").shape == (64, 96, 3)


def test_what_is_not_a_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "pipe.png", tmp_path / "folder.png", "a\0b.png"):
        with pytest.raises(DataError, match=r"\.png: the image cannot be read"):
            read_image(path)

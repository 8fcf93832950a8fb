import numpy as np
import pytest
from PIL import Image

from dyhead.data import DataError, read_image


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


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda a: np.rot90(a)),
    ],
)
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

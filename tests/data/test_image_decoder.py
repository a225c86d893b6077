"""Images of all kinds become upright RGB of 8 bits."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pretrain.data.decoders.crops import Box
from pretrain.data.decoders.image import ImageReader, decode_image
from pretrain.errors import SampleError
from tests.pack.media_files import geotiff_bytes, image_bytes, picture, turned_jpeg

PIXELS = picture()
LOSSLESS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}}


def _close(found: np.ndarray, expected: np.ndarray, levels: float) -> bool:
    return found.shape == expected.shape and float(np.abs(found.astype(int) - expected).max()) <= levels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_exact_formats(kind: str) -> None:
    found = decode_image(image_bytes(PIXELS, kind, **LOSSLESS.get(kind, {})))
    assert found.dtype == np.uint8 and np.array_equal(found, PIXELS[None])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    turns = {1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.transpose(1, 0, 2),
             6: np.rot90(PIXELS, -1), 7: PIXELS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(PIXELS)}  # fmt: skip
    plain = decode_image(image_bytes(PIXELS, "JPEG", quality=95, subsampling=0))[0]
    found = decode_image(turned_jpeg(PIXELS, orientation))[0]
    assert _close(found, turns[orientation], 40)
    assert _close(plain, PIXELS, 40)


def test_transparent_pixels_show_the_background() -> None:
    alpha = np.zeros((23, 37, 1), np.uint8)
    alpha[:, 20:] = 255
    alpha[:, 18:20] = 51  # a fifth
    data = image_bytes(np.concatenate([PIXELS, alpha], axis=-1))
    white, red = decode_image(data)[0], decode_image(data, background=(200, 0, 10))[0]
    assert (white[:, :18] == 255).all() and (red[:, :18] == (200, 0, 10)).all()
    assert np.array_equal(white[:, 20:], PIXELS[:, 20:])
    assert _close(white[:, 18:20], np.round(0.2 * PIXELS[:, 18:20] + 0.8 * 255), 1)
    assert np.array_equal(decode_image(data, background=None)[0], PIXELS)


def test_palette_with_a_transparent_colour() -> None:
    indices = np.arange(23 * 37, dtype=np.uint8).reshape(23, 37) % 7
    image = Image.fromarray(indices, mode="P")
    colours = np.random.default_rng(0).integers(0, 255, (7, 3))
    image.putpalette(colours.astype(np.uint8).ravel().tolist())
    target = io.BytesIO()
    image.save(target, "PNG", transparency=3)
    expected = np.where((indices == 3)[..., None], 255, colours[indices])
    assert np.array_equal(decode_image(target.getvalue())[0], expected)


def test_grey_one_bit_and_sixteen_bits() -> None:
    grey = PIXELS[..., 0]
    assert np.array_equal(decode_image(image_bytes(grey))[0], np.repeat(grey[..., None], 3, -1))
    assert set(np.unique(decode_image(image_bytes(grey, mode="1")))) == {0, 255}
    deep = np.array([[0, 128, 257, 32767, 32768, 65535]], dtype=np.uint16).repeat(3, 0)
    assert decode_image(image_bytes(deep))[0, 0, :, 0].tolist() == [0, 0, 1, 127, 128, 255]
    assert decode_image(image_bytes(deep, "TIFF"))[0, 0, :, 0].tolist() == [0, 0, 1, 127, 128, 255]


@pytest.mark.parametrize("compress", [None, "deflate"])
def test_sixteen_bits_of_colour(compress: str | None) -> None:
    deep = np.random.default_rng(3).integers(0, 65536, (3, 5, 7)).astype(np.uint16)
    options = {"photometric": "RGB"} | ({"compress": compress} if compress else {})
    found = decode_image(geotiff_bytes(deep, interleave="pixel", **options))
    assert np.array_equal(found[0], (deep >> 8).transpose(1, 2, 0))
    with pytest.raises(SampleError, match="decode: a TIFF of 16 bits with a plane for each channel"):
        decode_image(geotiff_bytes(deep, interleave="band", **options))
    with pytest.raises(SampleError, match="open: .*packed with --kind raster"):
        decode_image(geotiff_bytes(np.concatenate([deep, deep[:2]]), interleave="pixel", **options))
    planes = (deep >> 8).astype(np.uint8)
    found = decode_image(geotiff_bytes(planes, interleave="band", **options))
    assert np.array_equal(found[0], planes.transpose(1, 2, 0)), "with 8 bits it reads planes well"


def test_cmyk_and_colour_profiles() -> None:
    data = image_bytes(PIXELS, "JPEG", mode="CMYK", quality=95)
    assert _close(decode_image(data)[0], PIXELS, 60)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode_image(image_bytes(PIXELS, icc_profile=profile))[0], PIXELS)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_animations_give_their_first_picture(kind: str) -> None:
    pages = [Image.fromarray(np.full((9, 11, 3), level, np.uint8)) for level in (40, 200, 90)]
    target = io.BytesIO()
    pages[0].save(
        target, kind, save_all=True, append_images=pages[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert (decode_image(target.getvalue()) == 40).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "open"),
        (image_bytes(picture(200, 100), "JPEG")[:-200], "decode"),
        (image_bytes(picture(200, 100), "PNG")[:700], "decode"),
        (image_bytes(np.zeros((5, 5), np.float32), "TIFF"), "decode"),
        (image_bytes(np.zeros((5, 5), np.int32), "TIFF"), "decode"),
    ],
)
def test_what_is_no_picture(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        decode_image(data)
    assert error.value.reason == reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_they_are_decoded() -> None:
    for size in ((12_000, 12_000), (30_000, 30_000)):
        target = io.BytesIO()
        Image.new("1", size).save(target, "PNG")
        assert len(target.getvalue()) < 200_000
        with pytest.raises(SampleError) as error:
            decode_image(target.getvalue())
        assert error.value.reason == "too_large"
    with pytest.raises(SampleError, match="at most 800"):
        decode_image(image_bytes(PIXELS), max_pixels=800)


def test_an_image_is_a_clip_of_one_frame() -> None:
    with ImageReader(image_bytes(PIXELS)) as reader:
        assert reader.indices_at([-1.0, 0.0, 2.5]).tolist() == [0, 0, 0]
        assert reader.num_frames == 1 and np.array_equal(reader.frames([0, 0]), np.stack([PIXELS, PIXELS]))
        (crop,) = reader.crops([0], lambda width, height: [Box(width - 9, height - 6, 8, 5)])
        assert np.array_equal(crop, PIXELS[None, 17:22, 28:36])
        with pytest.raises(SampleError, match="too_short"):
            reader.frames([1])

"""Small real files of all kinds, as they come: odd sizes, orientations, palettes, bit depths, NaN."""

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image


def picture(width: int = 37, height: int = 23, seed: int = 0) -> np.ndarray[Any, Any]:
    """A smooth coloured picture, uint8 [height, width, 3], that JPEG keeps to a few levels."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [(columns * 5 + seed * 31) % 256, (rows * 9 + 40) % 256, (rows + columns) * 3 % 256]
    smooth = np.stack([np.minimum(plane, 255 - plane) * 2 % 256 for plane in planes], axis=-1)
    return smooth.astype(np.uint8)


def image_bytes(pixels: np.ndarray[Any, Any], kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    """Pixels as an image file of one of Pillow's formats."""
    image = Image.fromarray(pixels)
    target = io.BytesIO()
    (image.convert(mode) if mode else image).save(target, kind, **options)
    return target.getvalue()


def turned_jpeg(pixels: np.ndarray[Any, Any], orientation: int = 6) -> bytes:
    """A JPEG that a viewer turns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image_bytes(pixels, "JPEG", exif=exif, quality=95, subsampling=0)


def wave(seconds: float = 2.0, rate: int = 44100, channels: int = 2) -> np.ndarray[Any, Any]:
    """Tones that differ by channel and rise, float32 [channels, samples]."""
    time = np.arange(round(seconds * rate)) / rate
    tones = [0.5 * np.sin(2 * np.pi * (300 * (one + 1) + 200 * time) * time) for one in range(channels)]
    return np.stack(tones).astype(np.float32)


def sound_bytes(
    samples: np.ndarray[Any, Any], container: str = "wav", codec: str = "pcm_s16le", rate: int = 44100
) -> bytes:
    """Samples, float32 [1 or 2, n], as a sound file."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="stereo" if len(samples) == 2 else "mono")
        write_sound(out, stream, samples, rate)
    return target.getvalue()


def write_sound(out: Any, stream: Any, samples: np.ndarray[Any, Any], rate: int) -> None:
    """Encode samples into an open file."""
    layout = "stereo" if len(samples) == 2 else "mono"
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
    frame.sample_rate, frame.pts = rate, 0
    context = stream.codec_context
    fitted = av.AudioResampler(context.format.name, layout, rate, frame_size=context.frame_size or 1024)
    for piece in [*fitted.resample(frame), *fitted.resample(None)]:
        out.mux(stream.encode(piece))
    out.mux(stream.encode(None))


def video_with_sound(path: Path, samples: np.ndarray[Any, Any], frames: int = 50) -> Path:
    """An mp4 of 25 frames a second whose sound is `samples` at 44.1 kHz."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("aac", rate=44100, layout="stereo" if len(samples) == 2 else "mono")
        sound.codec_context.options = {"aac_pns": "0"}
        for number in range(frames):
            pixels = picture(64, 48, number)
            out.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(video.encode(None))
        write_sound(out, sound, samples, 44100)
    return path


def geotiff_bytes(pixels: np.ndarray[Any, Any], **options: Any) -> bytes:
    """A raster [bands, height, width] as a GeoTIFF."""
    from rasterio.io import MemoryFile
    from rasterio.transform import from_origin

    bands, height, width = pixels.shape
    with MemoryFile() as memory:
        with memory.open(
            **{"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": pixels.dtype.name,
               "crs": "EPSG:32633", "transform": from_origin(500000, 4600000, 30, 30)} | options
        ) as file:  # fmt: skip
            file.write(pixels)
        return bytes(memory.read())


def hdf5_bytes(arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """Arrays as an HDF5 file; names may hold groups."""
    import h5py

    target = io.BytesIO()
    with h5py.File(target, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return target.getvalue()


def array_bytes(array: Any, **options: Any) -> bytes:
    """An array as an npy file."""
    target = io.BytesIO()
    np.save(target, array, **options)
    return target.getvalue()

"""Pictures as bytes and back: npz archives and PNG files of strangers, read without trust."""

import io
import json
import math
import struct
import zipfile
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from burnish.errors import described

Images = Float[Tensor, "batch 3 height width"]


class WireError(ValueError):
    """A body that breaks the form. The message is one line."""


class TooLarge(WireError):
    """More pictures or bytes than the server takes."""


def levels(images: Images) -> UInt8[Tensor, "batch 3 height width"]:
    """0 to 255, rounded as diffusers does; on the CPU, where a quarter of the bytes has to be moved to."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def eight_bits(images: Images) -> np.ndarray:
    """The same as Pillow wants it, [batch, height, width, 3]."""
    return levels(images).permute(0, 2, 3, 1).numpy()


def to_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def from_png(data: bytes, height: int, width: int) -> np.ndarray:
    # Bytes 16 to 24 are the width and height: looked at first, so that Pillow never unpacks more than was announced.
    if len(data) < 24 or struct.unpack(">II", data[16:24]) != (width, height):
        raise WireError(f"request: a file that is no PNG of {width} x {height}")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode != "RGB":
                raise WireError(f"request: a PNG of mode {image.mode}; send RGB")
            return np.asarray(image)
    except WireError:
        raise
    except Exception as error:  # Pillow raises what its reader of chunks raises
        raise WireError(f"request: a PNG that cannot be read ({described(error)})") from error


def from_npz(body: bytes, most_bytes: int) -> dict[str, Any]:
    """A request's map from an npz."""
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            names = sorted(archive.namelist())
            if names != ["head.npy", "images.npy"]:
                raise WireError(f"npz: holds {', '.join(names)[:80] or 'nothing'}; expected head and images")
            if sum(one.file_size for one in archive.infolist()) > 4 * most_bytes:  # float32 has four bytes a number
                raise TooLarge(f"npz: unpacks to more than this server's {most_bytes} bytes of pictures")
            (_, head), (shape, images) = (_array(archive.read(name)) for name in names)
        values = {"encoding": str(images.dtype), "shape": shape, "images": images.tobytes()}
        return {**json.loads(head.tobytes()), **values}
    except WireError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and json each raise their own
        raise WireError(f"not an npz ({described(error)})") from error


def _array(raw: bytes) -> tuple[list[int], np.ndarray]:
    """The shape and the flat numbers of an npy file. numpy's own reader takes memory before it looks for the data."""
    stream = io.BytesIO(raw)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise WireError("npz: an array of another format than npy 1.0")
    shape, fortran, kind = np.lib.format.read_array_header_1_0(stream)
    if fortran or kind not in (np.dtype("uint8"), np.dtype("<f4")):
        raise WireError(f"npz: an array of {kind}{' by columns' * fortran}; expected uint8 or float32, row by row")
    if math.prod(shape) * kind.itemsize != len(raw) - stream.tell():
        raise WireError(f"npz: an array of shape {list(shape)} with {len(raw) - stream.tell()} bytes of data")
    return list(shape), np.frombuffer(raw, kind, offset=stream.tell())

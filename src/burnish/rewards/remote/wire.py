"""What a run and a reward server say to each other: pictures and prompts there, scores back.

A request is one msgpack map, content type application/msgpack:

    version    1
    id         8 to 64 of A-Z a-z 0-9 _ -; a retry keeps it, so that it is not judged twice
    encoding   "float32" or "uint8": `images` is the bytes of the array, little-endian; "png": a list of PNG files
    shape      [batch, 3, height, width]
    images     in [0, 1], or 0 to 255
    prompts    [batch] of text
    metadata   [batch] of maps of JSON's types

An answer is a map of version, id, total [batch], parts {name: [batch]} and missing [batch] of booleans, or nil.
For those without msgpack there is application/x-npz: a request is the array `images` (uint8 or float32) and `head`, the
JSON of version, id, prompts and metadata as uint8; an answer is the arrays total, missing, part/<name>, and head.

Nobody's bytes are ever unpickled, and what a body claims is checked before memory is taken for it.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from burnish.errors import described
from burnish.rewards.remote.arrays import Images, TooLarge, WireError, eight_bits, from_npz, from_png, levels, to_png
from burnish.rewards.scores import Scores

VERSION = 1
MSGPACK, NPZ = "application/msgpack", "application/x-npz"
MOST_ITEMS = 65_536  # in one list or map: an empty map is a byte on the wire and 64 in Python

Encoding = Literal["float32", "uint8", "png"]
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, eq=False)
class Request:
    """`images` are fp32 in [0, 1]."""

    id: str
    images: Images
    prompts: list[str]
    metadata: list[dict[str, Any]]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
    encoding: Encoding
    shape: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=4, max_length=4)]
    images: bytes | list[bytes]
    prompts: list[str]
    metadata: list[dict[str, JsonValue]]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    id: str
    total: list[float]
    parts: dict[str, list[float]]
    missing: list[bool] | None


def plain(metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metadata as JSON would give it back; WireError where it holds what JSON has not."""
    try:
        return json.loads(json.dumps(list(metadata)))
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"metadata cannot be sent ({described(error)}); keep to what JSON has") from error


def dump_request(request: Request, encoding: Encoding = "uint8") -> bytes:
    """A request's body in msgpack."""
    whole = request.images.detach()
    images: bytes | list[bytes]
    match encoding:
        case "float32":
            images = whole.cpu().numpy().astype("<f4").tobytes()
        case "uint8":
            images = levels(whole).numpy().tobytes()
        case "png":
            images = [to_png(one) for one in eight_bits(whole)]
    head = {"version": VERSION, "id": request.id, "encoding": encoding, "shape": list(whole.shape), "images": images}
    try:
        return _packed(head | {"prompts": request.prompts, "metadata": request.metadata})
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"prompts or metadata cannot be sent ({described(error)}); keep to what JSON has") from error


def load_request(body: bytes, kind: str, *, most_pictures: int, most_bytes: int) -> Request:
    """A request from its body of content type `kind`. `most_bytes` holds for what it unpacks to as well."""
    if kind not in (MSGPACK, NPZ):
        raise WireError(f"content type {kind or 'none'}: send {MSGPACK} or {NPZ}")
    told = _checked(_Request, _unpacked(body) if kind == MSGPACK else from_npz(body, most_bytes), "request")
    count, channels, *_ = told.shape
    if count > most_pictures:
        raise TooLarge(f"{count} pictures; this server takes {most_pictures} at once")
    if math.prod(told.shape) > most_bytes:
        raise TooLarge(f"pictures of {math.prod(told.shape)} bytes; this server takes {most_bytes} at once")
    if channels != 3:
        raise WireError(f"request: shape {told.shape} has {channels} channels; send RGB as [batch, 3, height, width]")
    for name, there in (("prompts", len(told.prompts)), ("metadata", len(told.metadata))):
        if there != count:
            raise WireError(f"request: {there} {name} for {count} pictures")
    return Request(told.id, _pictures(told), told.prompts, told.metadata)


def dump_answer(identity: str, scores: Scores, kind: str = MSGPACK) -> bytes:
    """An answer's body, in the form in which it was asked."""
    scores = scores.each(lambda values: values.detach().cpu())
    if kind == NPZ:
        parts = {f"part/{name}": values.numpy() for name, values in scores.parts.items()}
        missing = (
            scores.total.new_zeros(len(scores.total), dtype=torch.bool) if scores.missing is None else scores.missing
        )
        head = np.frombuffer(json.dumps({"version": VERSION, "id": identity}).encode(), np.uint8)
        file = io.BytesIO()
        np.savez(file, head=head, total=scores.total.numpy(), missing=missing.numpy(), **parts)  # pyright: ignore
        return file.getvalue()
    parts = {name: values.tolist() for name, values in scores.parts.items()}
    missing = None if scores.missing is None else scores.missing.tolist()
    told = {"version": VERSION, "id": identity, "total": scores.total.tolist(), "parts": parts, "missing": missing}
    return _packed(told)


def load_answer(body: bytes, identity: str, count: int) -> Scores:
    """The scores of a msgpack answer to request `identity` of `count` pictures, each finite or missing."""
    told = _checked(_Answer, _unpacked(body), "answer")
    if told.id != identity:
        raise WireError(f"answer: to request {told.id!r}; asked {identity!r}")
    return scored(count, told.total, told.parts, told.missing)


def scored(
    count: int, total: Sequence[float], parts: Mapping[str, Sequence[float]], missing: Sequence[bool] | None = None
) -> Scores:
    """Scores of `count` pictures, each finite where it is not missing; else WireError."""
    rows = [("total", total), *parts.items(), *([] if missing is None else [("missing", missing)])]
    for name, values in rows:
        if len(values) != count:
            raise WireError(f"answer: {len(values)} of {name} for {count} pictures")
    gone = None if missing is None else torch.tensor(missing, dtype=torch.bool)
    told = Scores(_numbers(total), {name: _numbers(values) for name, values in parts.items()}, gone)
    for name, values in [("total", told.total), *told.parts.items()]:
        if not (values if gone is None else values[~gone]).isfinite().all():
            raise WireError(f"answer: {name} is not finite")
    return told


def _numbers(values: Sequence[float]) -> Float[Tensor, " batch"]:
    """fp32; what is beyond its range becomes infinite, and so is found."""
    return torch.tensor(values, dtype=torch.float64).float()


def _packed(values: Mapping[str, Any]) -> bytes:
    import msgpack

    return msgpack.packb(values)  # pyright: ignore[reportReturnType]  None is for Packer(autoreset=False)


def _unpacked(body: bytes) -> Any:
    import msgpack

    try:
        return msgpack.unpackb(body, max_array_len=MOST_ITEMS, max_map_len=MOST_ITEMS)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack ({described(error)})") from error


def _pictures(told: _Request) -> Images:
    count, _, height, width = told.shape
    if told.encoding == "png":
        if not isinstance(told.images, list) or len(told.images) != count:
            raise WireError(f"request: encoding png wants images as a list of {count} files")
        array = np.stack([from_png(one, height, width) for one in told.images]).transpose(0, 3, 1, 2)
        return torch.from_numpy(array.astype(np.float32)) / 255
    kind = np.dtype("uint8" if told.encoding == "uint8" else "<f4")
    if not isinstance(told.images, bytes) or len(told.images) != math.prod(told.shape) * kind.itemsize:
        raise WireError(f"request: encoding {told.encoding} and shape {told.shape} do not fit the length of images")
    images = torch.from_numpy(np.frombuffer(told.images, kind).reshape(told.shape).astype(np.float32))
    if told.encoding == "uint8":
        return images / 255
    if not ((images >= 0) & (images <= 1)).all():  # false for nan, too
        raise WireError("request: images must be finite and in [0, 1]")
    return images


def _checked(model: type[M], values: Any, what: str) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(step)[:40] for step in first["loc"])
        raise WireError(f"{what}: {place + ': ' if place else ''}{first['msg']}") from error

"""The protocol of flow_grpo's remote rewards: pickles over HTTP, JPEGs inside.

A request is the pickle of {"images": [JPEG bytes], "meta_datas": [dict], "only_strict": bool, "prompts": [text]},
posted to the server's address itself. Answers:

    GenEval                {"scores", "rewards", "strict_rewards", "group_rewards", "group_strict_rewards"}
    DeQA, UnifiedReward    {"outputs"}

`total` is outputs, or scores; parts `strict_accuracy` (strict_rewards) and `accuracy` (rewards), as in
flow_grpo's log. Units: DeQA in [0.2, 1], GenEval at most 1 (see geneval_rules).
Reference: yifan123/flow_grpo flow_grpo/rewards.py; yifan123/reward-server app_geneval.py, app_deqa.py.
Differs from: the official client unpickles whatever the server sends, which lets the server run any code here. Here an
    answer may hold plain values and arrays of numbers, and nothing is called on its behalf but what rebuilds those.
    All four keys are sent to every server; the official client sends what the one server reads. The groups by task are
    left out: they hold -10 wherever a picture is of another task.
Not run: the official servers, which need mmdet and GPUs.
"""

import io
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from burnish.errors import described
from burnish.rewards.remote.arrays import Images, WireError, eight_bits
from burnish.rewards.remote.wire import plain, scored
from burnish.rewards.scores import Scores

KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}  # numpy's numbers
NUMPY = {"numpy", *(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric"))}


def dump_request(
    images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], *, only_strict: bool = True
) -> bytes:
    """`only_strict`: GenEval's server leaves out the benchmark's own verdict; as flow_grpo does in training."""
    told = {"images": [_jpeg(image) for image in eight_bits(images.detach())], "meta_datas": plain(metadata)}
    return pickle.dumps(told | {"only_strict": only_strict, "prompts": list(prompts)}, protocol=4)  # Python 3.4 on


def load_answer(body: bytes, count: int, *, only_strict: bool = True) -> Scores:
    """The scores of `count` pictures; WireError for an answer of another form, or with anything but plain values."""
    told = loads(body)
    key = next((key for key in ("outputs", "scores") if isinstance(told, dict) and key in told), None)
    if key is None:
        raise WireError(f"answer: a {type(told).__name__} without outputs or scores")
    # With only_strict the server's `rewards` are all 0: not judged.
    names = {"strict_rewards": "strict_accuracy"} | ({} if only_strict else {"rewards": "accuracy"})
    parts = {name: _floats(told[sent], sent) for sent, name in names.items() if sent in told}
    return scored(count, _floats(told[key], key), parts)


def loads(body: bytes) -> Any:
    """A pickle of plain values and numpy's numbers and arrays; WireError for anything else."""
    try:
        for opcode, argument, _ in pickletools.genops(body):
            # Room is made for every memo up to this one. The walk has also found lengths that go beyond the body.
            if opcode.name.endswith("PUT") and int(argument or 0) > len(body):
                raise WireError(f"answer: a pickle with memo {argument}")
        return _Plain(io.BytesIO(body)).load()
    except WireError:
        raise
    except Exception as error:  # broken pickles raise anything, from IndexError to UnicodeDecodeError
        raise WireError(f"answer: not a pickle of plain values ({described(error)})") from error


class _Plain(pickle.Unpickler):
    """Unpickles plain values. numpy's own rebuilders trust the bytes they get, so there are others in their place.

    What stands for a global is a bound method: a pickle can set no attribute of one, nor make an object from it.
    """

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "dtype": self._kind,
            "ndarray": self._nothing,
            "scalar": self._scalar,
            "_reconstruct": self._empty,
            "_frombuffer": self._from_buffer,
        }
        if module not in NUMPY or name not in known:
            raise WireError(f"answer: the pickle asks for {module}.{name}; only plain values and arrays are taken")
        return known[name]

    def _kind(self, code: Any, *_: Any) -> "_Kind":
        return _Kind(code)

    def _nothing(self, *_: Any) -> None:
        raise WireError("answer: the pickle makes an array of its own")

    def _scalar(self, kind: Any, raw: Any) -> Any:
        return _values(kind, raw, (1,))[0]

    def _empty(self, *_: Any) -> "_Array":
        return _Array()

    def _from_buffer(self, raw: Any, kind: Any, shape: Any, *_: Any) -> "_Array":
        array = _Array()
        array.values = _values(kind, raw, shape)
        return array


class _Kind:
    """numpy's dtype of a number."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """numpy's array of numbers, flat."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: list[float] = []

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, _, raw = state
        self.values = _values(kind, raw, shape)


def _values(kind: Any, raw: Any, shape: Any) -> list[float]:
    if not isinstance(kind, _Kind) or kind.code not in KINDS or kind.order not in ("<", ">", "|"):
        raise WireError("answer: an array that is not of numbers")
    if not isinstance(raw, bytes | bytearray) or not isinstance(shape, tuple) or len(shape) > 1:
        raise WireError("answer: an array that is not a row of numbers")
    values = np.frombuffer(raw, np.dtype(kind.code).newbyteorder(kind.order))
    if len(values) != (shape[0] if shape else 1):
        raise WireError(f"answer: an array of shape {shape} with {len(values)} numbers")
    return values.tolist()


def _floats(values: Any, what: str) -> list[float]:
    values = values.values if isinstance(values, _Array) else values
    if not isinstance(values, list) or not all(isinstance(one, int | float) for one in values):
        raise WireError(f"answer: {what} is not a list of numbers")
    try:
        return [float(one) for one in values]
    except OverflowError as error:
        raise WireError(f"answer: {what} holds a number beyond all floats") from error


def _jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG")  # in Pillow's quality, 75, as the official client
    return file.getvalue()

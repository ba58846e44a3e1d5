"""State on disk that survives a kill at any moment: checkpoints, single files, JSON lines.

A checkpoint is a directory, written aside, fsynced and renamed into place:

    step-000100/
      manifest.json         size and sha256 of the other two
      state.json            the tree: everything but tensors
      tensors.safetensors   the tensors, named by their place in the tree

Nothing is pickled, so loading a stranger's checkpoint runs no code. One process writes into a directory; any number
may read it meanwhile. A checkpoint holds more than JSON can say, so the tree marks what JSON lacks with one-key objects
("~tuple", "~tensor", ...); a dict that has such a key itself, or a key that is no string, is stored as pairs.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.errors import UserError

FORMAT = 1
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
logger = logging.getLogger("burnish")


class BrokenCheckpoint(UserError):
    """A checkpoint that is not what was saved. The message names the file and how to go on."""


def save_checkpoint(directory: Path, step: int, state: Mapping[str, Any], *, keep: int = 3) -> Path:
    """Write `state` to `directory/step-<step>` and return that path; then delete all but the `keep` newest up to it.

    `state` nests mappings, lists and tuples of dense tensors (any dtype), numpy arrays and scalars, ints, floats,
    bools, strings and None; keys may be anything hashable among these. All come back bit for bit and with their type,
    except that a mapping comes back as a dict, and a tensor or parameter as a contiguous CPU tensor without grad.

    A checkpoint of the same step is replaced, later ones are left alone. Raises TypeError for a value it cannot store,
    naming its place, and UserError when the disk is full or not writable; what was there before is then intact.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step={step} must be at least 0 and keep={keep} at least 1")
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    target = directory / f"step-{step:06d}"
    aside, replaced = (directory / f".{target.name}.{what}-{os.getpid()}" for what in ("tmp", "old"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        aside.mkdir()
        save_file(_apart(tensors), aside / TENSORS)
        text = json.dumps(tree, ensure_ascii=False, allow_nan=False)
        (aside / STATE).write_bytes(text.encode(errors="surrogatepass"))  # a str may hold half a character
        shutil.copymode(aside / STATE, aside / TENSORS)  # safetensors lets nobody else read it, whatever the umask
        files = {name: _fingerprint(aside / name) for name in (STATE, TENSORS)}
        (aside / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
        for path in (*aside.iterdir(), aside):
            _sync(path)
        if target.exists():  # no call replaces a directory; `_checkpoints` knows of the moment between these two
            target.rename(replaced)
        aside.rename(target)
        _sync(directory)
        _sweep(directory)
        up_to_here = [path for number, path in _checkpoints(directory) if number <= step]
        for path in up_to_here[:-keep]:
            path.rename(aside)  # in one call, so that a half-deleted checkpoint is never taken for one
            shutil.rmtree(aside)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise UserError(
            f"cannot save checkpoint {target}: {_reason(error)}: free space there or make it writable, then resume"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read the state back, tensors on the CPU. Raises BrokenCheckpoint unless every byte is what was saved."""

    def broken(name: str, why: str) -> BrokenCheckpoint:
        return BrokenCheckpoint(f"checkpoint {path / name} {why}: delete {path} and resume from the one before it")

    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        stored = {name: manifest["files"][name] for name in (STATE, TENSORS)}
        version = manifest["format"]
    except OSError as error:
        raise broken(MANIFEST, f"cannot be read ({_reason(error)})") from error
    except (ValueError, KeyError, TypeError) as error:  # not JSON, not UTF-8, or not our JSON
        raise broken(MANIFEST, "is damaged") from error
    if version != FORMAT:
        raise broken(MANIFEST, f"has format {version}, this burnish reads {FORMAT}")
    try:
        for name, fingerprint in stored.items():
            if (found := _fingerprint(path / name)) != fingerprint:
                raise broken(name, f"is damaged ({found['bytes']} bytes, checksum differs)")
        tree = json.loads((path / STATE).read_bytes().decode(errors="surrogatepass"))
        # Copies: what `load_file` gives lies unaligned in the mapped file, and a kernel may round otherwise there.
        return _decode(tree, {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()})
    except OSError as error:
        raise broken(Path(error.filename or TENSORS).name, f"cannot be read ({_reason(error)})") from error


def latest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; None where none was ever saved.

    A broken one is reported in the log and the one before it is used. Raises BrokenCheckpoint when all are broken:
    starting anew in silence would throw the run away.
    """
    last = None
    for _, path in reversed(_checkpoints(directory)):
        try:
            return path, load_checkpoint(path)
        except BrokenCheckpoint as error:
            logger.warning("passed over: %s", error)
            last = error
    if last is not None:
        raise BrokenCheckpoint(f"every checkpoint in {directory} is broken: delete it and train anew") from last
    return None


def rng_state() -> dict[str, Any]:
    """The state of every global random generator: python, numpy, torch on the CPU and on each CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Undo everything drawn since `rng_state()`. Raises UserError when the number of CUDA devices has changed."""
    if len(state["cuda"]) != torch.cuda.device_count():
        raise UserError(
            f"the checkpoint holds the random state of {len(state['cuda'])} CUDA devices, here are "
            f"{torch.cuda.device_count()}: resume with as many (CUDA_VISIBLE_DEVICES)"
        )
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: aside in the same directory, fsynced, renamed. Text is UTF-8.

    Missing directories are made. Raises UserError when the disk is full or not writable; the old file is then intact.
    """
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {_reason(error)}: free space there or make it writable") from error
    finally:
        with contextlib.suppress(OSError):  # most often: it is in its place
            aside.unlink()


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line in one write. NaN and infinity, which JSON lacks, become null. Raises UserError on a full disk."""
    line = json.dumps(_without_nan(row), allow_nan=False).encode() + b"\n"
    try:
        with path.open("ab", buffering=len(line)) as file:
            file.write(line)
    except OSError as error:
        raise UserError(f"cannot write {path}: {_reason(error)}: free space there or make it writable") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file made by `append_jsonl`; a last line torn by a kill is left out.

    Raises UserError where the file cannot be read or another line is damaged.
    """
    return [row for _, row in _rows(path)]


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the rows of later steps and a torn last line, atomically; the kept lines stay as they are, byte for byte.

    Rows without a step are kept; a file that does not exist is left so.
    """
    if path.exists():
        atomic_write(path, b"".join(line + b"\n" for line, row in _rows(path) if row.get("step", step) <= step))


def _rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON or not UTF-8
            row = None
        if isinstance(row, dict):
            rows.append((line, row))
        elif number < len(lines):  # what follows the last newline is empty, or torn
            raise UserError(f"{path}, line {number}: not a JSON object: delete the line")
    return rows


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go to `tensors`. Exact types, as a subclass would come back as its base."""
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return {"~float": struct.pack(">d", value).hex()}
    if kind is list:
        return [_encode(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
    if kind is tuple:
        return {"~tuple": _encode(list(value), where, tensors)}
    if isinstance(value, Mapping):
        items = [(key, _encode(item, f"{where}.{key}", tensors)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("~") for key in value):
            return dict(items)
        return {"~dict": [[_encode(key, f"{where} key", tensors), item] for key, item in items]}
    if isinstance(value, Tensor):
        if value.is_complex():  # safetensors has only one of the complex types
            return {"~complex": _encode(torch.view_as_real(value.detach().resolve_conj()), where, tensors)}
        name = f"{len(tensors)} {where}".encode("ascii", "backslashreplace").decode()
        tensors[name] = value.detach().cpu().contiguous()
        return {"~tensor": name}
    if kind is np.ndarray or isinstance(value, np.generic):
        try:
            tensor = torch.from_numpy(np.array(value))
        except (TypeError, ValueError) as error:  # strings, objects, the other byte order
            raise TypeError(f"{where}: cannot store a numpy value of dtype {value.dtype} in a checkpoint") from error
        return {"~array" if kind is np.ndarray else "~scalar": _encode(tensor, where, tensors)}
    raise TypeError(f"{where}: cannot store a {kind.__module__}.{kind.__qualname__} in a checkpoint")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy all but the first of those that share memory (tied weights, views): safetensors refuses them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    match node:
        case list():
            return [_decode(item, tensors) for item in node]
        case {"~float": digits}:
            return struct.unpack(">d", bytes.fromhex(digits))[0]
        case {"~tuple": items}:
            return tuple(_decode(items, tensors))
        case {"~dict": pairs}:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in pairs}
        case {"~tensor": name}:
            return tensors[name]
        case {"~complex": parts}:
            return torch.view_as_complex(_decode(parts, tensors))
        case {"~array": tensor}:
            return _decode(tensor, tensors).numpy()
        case {"~scalar": tensor}:
            return _decode(tensor, tensors).numpy()[()]
        case dict():
            return {key: _decode(item, tensors) for key, item in node.items()}
    return node


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint, oldest first; one that was about to be replaced counts until it is."""
    found = {}
    for path in sorted(_listing(directory)):  # ".step-..." sorts before "step-...", which then takes its place
        if match := re.fullmatch(r"step-(\d+)|\.step-(\d+)\.old-\d+", path.name):
            found[int(match[1] or match[2])] = path
    return sorted(found.items())


def _sweep(directory: Path) -> None:
    """Clear what a save that was killed left behind."""
    for path in _listing(directory):
        if match := re.fullmatch(r"\.(step-\d+)\.(tmp|old)-\d+", path.name):
            target = directory / match[1]
            if match[2] == "old" and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path)


def _listing(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value

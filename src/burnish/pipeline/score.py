"""Pictures that are there, judged by several rewards: a table, a page to look through, how far the rewards agree."""

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from jaxtyping import Float
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import track
from torch import Tensor

from burnish.checkpoint import atomic_write
from burnish.data import Picture, decode, load_pictures
from burnish.errors import UserError
from burnish.pictures import to_pil
from burnish.pipeline.measure import print_table
from burnish.report import render
from burnish.rewards import Ensemble, PartConfig, RewardConfig, joined, load_judge
from burnish.rewards.calibration import rank_correlation

THUMBNAIL = 160  # pixels of the longer side, on the page
MOST = 1000  # pictures on the page: the best and the worst by the total, where there are more


def score_pictures(
    pictures: str | Path,
    rewards: Sequence[str] = (),
    *,
    config: Path | None = None,
    prompt: str | None = None,
    output: Path = Path("scores"),
    batch_size: int = 16,
    device: str | None = None,
    cache: Path | None = None,
) -> Path:
    """Judge the pictures of a folder or a parquet file; writes scores.parquet and scores.html, returns their folder.

    A picture's prompt is in the folder's `metadata.jsonl` (`file_name`, `prompt`, as `datasets` has it), in a text file
    of its own name, in the parquet's column `prompt` or `caption`, or is `prompt`. `rewards`: names or places of them,
    weights 1; `config`: YAML like a recipe's `reward` section instead. Pictures that cannot be read are counted and
    left out. Raises UserError where there is nothing to judge, or to judge by.
    """
    judge = _judge(rewards, config, batch_size, device, cache)
    found = load_pictures(pictures, prompt)
    console, unread, thumbs, known, told = Console(highlight=False), [], [], [], []
    for batch in _batches(track(found, description="pictures", console=console, transient=True), batch_size, unread):
        pixels = torch.stack([one for _, one in batch])
        told.append(judge.judge(pixels, [one.prompt for one, _ in batch], [one.metadata for one, _ in batch]))
        known += [one for one, _ in batch]
        thumbs += map(_thumbnail, pixels)
    if not known:
        raise UserError(f"{pictures}: no picture could be read: give a folder or a parquet file of pictures")
    scores, prompts = joined(told), [one.prompt for one in known]
    columns = {name: part.tolist() for name, part in scores.parts.items()}
    columns["total"] = judge.settle(scores, prompts).tolist()
    rows = [
        {"picture": one.name, "prompt": one.prompt, **{name: values[place] for name, values in columns.items()}}
        for place, one in enumerate(known)
    ]
    output.mkdir(parents=True, exist_ok=True)
    names = [*judge.rewards, *judge.penalties]
    there = torch.ones(len(known), dtype=torch.bool) if scores.missing is None else ~scores.missing
    agreement = [
        [rank_correlation(scores.parts[one][there], scores.parts[other][there]) for other in names] for one in names
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), output / "scores.parquet")
    atomic_write(output / "scores.html", _page(str(pictures), rows, thumbs, names, agreement, unread))
    _say(console, rows, names, agreement, unread)
    console.print(f"\n{output / 'scores.html'}, the table in scores.parquet")
    return output


def _batches(
    found: Iterable[Picture], size: int, unread: list[str]
) -> Iterator[list[tuple[Picture, Float[Tensor, "3 height width"]]]]:
    """Pictures that follow each other and are of one size, with their pixels; what cannot be read goes to `unread`."""
    batch: list[tuple[Picture, Tensor]] = []
    for one in found:
        try:
            pixels = decode(one.stored)
        except ValueError:
            unread.append(one.name)
            continue
        if batch and (len(batch) == size or batch[0][1].shape != pixels.shape):
            yield batch
            batch = []
        batch.append((one, pixels))
    if batch:
        yield batch


def _judge(
    rewards: Sequence[str], config: Path | None, batch_size: int, device: str | None, cache: Path | None
) -> Ensemble:
    if bool(rewards) == (config is not None):
        raise UserError("name what is to judge: either --reward NAME, as often as you like, or --config FILE")
    if config is None:
        parts = {
            name.rpartition(":")[2]: PartConfig(source=name, batch_size=batch_size, device=device) for name in rewards
        }
        chosen = RewardConfig(parts=parts)
    else:
        try:
            plain = yaml.safe_load(config.read_text("utf-8"))
            chosen = TypeAdapter(RewardConfig).validate_json(json.dumps(plain), strict=True, extra="forbid")
        except OSError as error:
            raise UserError(f"{config}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{config}: is not YAML: {' '.join(str(error).split())}") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{config}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    judge = load_judge(chosen, cache)
    assert isinstance(judge, Ensemble)
    return judge


def _thumbnail(pixels: Tensor) -> str:
    small, stored = to_pil(pixels), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    if max(small.size) * 4 <= THUMBNAIL:  # pictures of a few pixels are shown by whole factors
        factor = THUMBNAIL // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    small.save(stored, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}"


def _page(
    source: str,
    rows: Sequence[Mapping[str, Any]],
    thumbs: Sequence[str],
    names: Sequence[str],
    agreement: Sequence[Sequence[float]],
    unread: Sequence[str],
) -> str:
    missing = [place for place, row in enumerate(rows) if math.isnan(row["total"])]
    order = sorted(set(range(len(rows))) - set(missing), key=lambda place: -rows[place]["total"]) + missing
    shown = order if len(order) <= MOST else [*order[: MOST // 2], *order[-MOST // 2 :]]
    columns = [*names, *(["total"] if len(names) > 1 else [])]
    return render(
        "scores.html.j2",
        title=f"Scores of {source}",
        count=len(rows),
        shown=len(shown),
        unread=list(unread),
        columns=columns,
        names=list(names),
        agreement=[[_number(value) for value in row] for row in agreement],
        rows=[
            {
                "picture": rows[place]["picture"],
                "prompt": rows[place]["prompt"],
                "uri": thumbs[place],
                "values": [_number(rows[place][column]) for column in columns],
            }
            for place in shown
        ],
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _say(
    console: Console,
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    agreement: Sequence[Sequence[float]],
    unread: Sequence[str],
) -> None:
    lines = []
    for name in names:
        values = torch.tensor([row[name] for row in rows if math.isfinite(row[name])]).double()
        spread = [values.mean(), values.std(correction=0), values.min(), values.median(), values.max()]
        lines.append([name, *(f"{value:.4g}" for value in spread)])
    print_table(("reward", "mean", "std", "least", "median", "most"), lines)
    if len(names) > 1:
        console.print("\nrank correlations")
        table = [
            [name, *("-" if math.isnan(v) else f"{v:.2f}" for v in row)]
            for name, row in zip(names, agreement, strict=True)
        ]
        print_table(("", *names), table)
    if unread:
        console.print(f"\ncould not be read, and left out: {len(unread)} of them, {unread[0]} first")

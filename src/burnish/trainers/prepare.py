"""Given rows made ready: read once, checked, encoded once, and from then on found by number."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from burnish.data import Census, Fault, Judgement, LatentStore, Order, Stage, decode, fitted, picture_key, resolve
from burnish.data.judgements import read_judgements
from burnish.data.rows import count_rows
from burnish.denoising import Material
from burnish.denoising.material import beaten
from burnish.errors import UserError
from burnish.policies import Policy
from burnish.rewards import Judge
from burnish.trainers.settings import DataConfig

AT_ONCE = 64  # rows between two commits
COLUMNS = (
    TextColumn("[bold]data"),
    MofNCompleteColumn(),
    BarColumn(bar_width=24),
    TimeElapsedColumn(),
    TextColumn("eta"),
    TimeRemainingColumn(),
)
STRICT = ("label out of range",)  # the columns were misread: no row of them can be trusted


@dataclass(frozen=True, eq=False)
class Prepared:
    """`count` rows of the set `name` in `store`, whose latents have `shape`. `prompts`: the first few."""

    store: LatentStore
    name: str
    count: int
    shape: tuple[int, ...]
    order: Order
    prompts: list[dict[str, Any]]

    def rows(self, numbers: Sequence[int]) -> list[Stage]:
        return self.store.rows(self.name, numbers)

    def latents(self, stages: Sequence[Stage]) -> tuple[Tensor, Tensor | None]:
        """Mean and std [rows, k, *latent] of their pictures."""
        each = len(stages[0].keys)
        mean, std = self.store.latents([key for stage in stages for key in stage.keys], self.shape)
        return mean.unflatten(0, (-1, each)), None if std is None else std.unflatten(0, (-1, each))


def prepare(
    config: DataConfig,
    policy: Policy,
    material: Material,
    judge: Judge | None,
    accelerator: Accelerator,
    *,
    directory: Path,
    seed: int,
) -> Prepared:
    """Read, check and encode what is not in the cache yet; the main process does, the others wait.

    Raises UserError where no row is left, where labels are out of range, and for a cache of another VAE or size.
    """
    size = policy.pixels(config.height, config.width)
    shape = policy.latent_shape(*size)
    path = Path(config.cache) if config.cache else directory / "latents.sqlite"
    name = set_name(config, material)
    if accelerator.is_main_process:
        store = LatentStore(path, {"VAE": fingerprint(policy.pipeline.vae), "size": list(size)})
        if store.census(name) is None:
            with torch.no_grad():
                _Filling(store, config, policy, material, judge, size).fill(name)
    accelerator.wait_for_everyone()
    store = LatentStore(path, {})
    told = store.census(name)
    if told is None:
        raise UserError(f"{path}: the main process could not prepare the data: its own line says why")
    census = Census.from_json(told)
    Console(quiet=not accelerator.is_main_process).print(f"data: {census.sentence()}", highlight=False)
    if not census.kept:
        why = max(census.faults, key=lambda fault: census.faults[fault])
        raise UserError(
            f"{', '.join(config.source)}: no row is left to train on ({census.sentence()}); the first {why}: "
            f"{census.examples[why][0]}"
        )
    groups, share = material.groups(store.first_scores(name))
    prompts = [
        {"prompt": prompt}
        for prompt in dict.fromkeys(row.prompt for row in store.rows(name, range(min(64, census.kept))))
    ]
    return Prepared(store, name, census.kept, shape, Order(groups, seed, share), prompts)


def set_name(config: DataConfig, material: Material) -> str:
    """What the rows of a prepared set depend on, in a word: files with sizes and times, and what is made of them."""
    files = []
    for source in config.source:
        path = resolve(source)
        there = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        stats = [one.stat() for one in there if one.exists()]
        files.append([source, *[[stat.st_size, stat.st_mtime_ns] for stat in stats]])
    told = [files, config.judge and repr(config.judge), config.limit, config.fit, config.height, config.width]
    told += [type(material).__name__, asdict(material)]  # pyright: ignore[reportArgumentType]
    return hashlib.blake2b(json.dumps(told, default=str).encode(), digest_size=12).hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Of a network's weights and settings."""
    digest = hashlib.blake2b(
        json.dumps(dict(getattr(module, "config", {})), sort_keys=True, default=str).encode(), digest_size=12
    )
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class _Filling:
    """Rows on their way into the store: read, checked, decoded, encoded; what is left out is told to the `census`."""

    store: LatentStore
    config: DataConfig
    policy: Policy
    material: Material
    judge: Judge | None
    size: tuple[int, int]
    census: Census = field(default_factory=Census)

    def fill(self, name: str) -> None:
        part, sources = self.store.begin(name), self.config.source
        rows = (row for source in sources for row in read_judgements(source, self.material.forms))
        walk: Iterator[Judgement | Fault] = islice(rows, self.config.limit)
        with Progress(*COLUMNS, transient=True) as bar:
            task = bar.add_task("rows", total=self.total())
            while block := list(islice(walk, AT_ONCE)):
                first = self.census.kept
                self.store.add(part, first, list(self.stages(block)))
                bar.advance(task, len(block))
        self.store.finish(name, self.census.to_json())

    def total(self) -> int | None:
        """How many rows will be read, where that can be said before."""
        counts = [count_rows(source) for source in self.config.source]
        known = [count for count in counts if count is not None]
        return min(sum(known), self.config.limit or sum(known)) if len(known) == len(counts) else self.config.limit

    def stages(self, block: Sequence[Judgement | Fault]) -> Iterator[Stage]:
        """What is trained on of some rows, the latents of its pictures in the store."""
        decoded: dict[bytes, Tensor] = {}
        sound: list[tuple[Judgement, dict[int, bytes]]] = []
        for row in block:
            for one in self.examples(row):
                keyed = one if isinstance(one, Fault) else self.keyed(one, decoded)
                if not isinstance(keyed, Fault):
                    sound.append(keyed)
                elif keyed.why in STRICT:
                    raise UserError(f"{keyed.place}: {keyed.text}")
                else:
                    self.census.leave(keyed)
        self.encode(decoded)
        for row, keys in sound:
            for one in self.judged(row, keys, decoded):
                if isinstance(one, Fault):
                    self.census.leave(one)
                else:
                    self.census.keep()
                    yield Stage(one.place, one.prompt, tuple(keys[id(stored)] for stored in one.pictures), one.scores)

    def examples(self, row: Judgement | Fault) -> Iterator[Judgement | Fault]:
        """What is trained on of a row, where its scores are known; else the row."""
        if isinstance(row, Fault) or self.judge is not None:
            yield row
        else:
            yield from self.material.examples(row)

    def keyed(self, row: Judgement, decoded: dict[bytes, Tensor]) -> tuple[Judgement, dict[int, bytes]] | Fault:
        """The row and the key of each of its pictures, by their identity; those that have no latent yet, or all that a
        judge is to see, are put into `decoded`."""
        try:
            keys = tuple(map(picture_key, row.pictures))
        except OSError as error:
            return Fault(row.place, "corrupt picture", f"{error.filename} cannot be read ({error.strerror})")
        if len(set(keys)) < len(keys):
            return Fault(row.place, "identical pictures", "two of its pictures are one and the same")
        lacking = self.store.lacks(keys) if self.judge is None else set(keys)
        for key, stored in zip(keys, row.pictures, strict=True):
            if key not in lacking or key in decoded:
                continue
            try:
                image = decode(stored)
            except ValueError as error:
                return Fault(row.place, "corrupt picture", f"{error}: drop the row")
            self.census.sizes[image.shape[1], image.shape[2]] += 1
            if self.config.fit == "exact" and image.shape[1:] != self.size:
                raise UserError(
                    f"{row.place}: a picture has {image.shape[2]} x {image.shape[1]} pixels, and data.fit=exact wants "
                    f"{self.size[1]} x {self.size[0]} of all: set data.fit=cut, which scales and cuts, or drop the row"
                )
            decoded[key] = fitted(image, self.size)
        return row, {id(stored): key for stored, key in zip(row.pictures, keys, strict=True)}

    def encode(self, decoded: Mapping[bytes, Tensor]) -> None:
        lacking = self.store.lacks(list(decoded))
        wanted = [key for key in decoded if key in lacking]  # in the rows' order: a set's is another each time
        for start in range(0, len(wanted), self.policy.decode_batch_size):
            keys = wanted[start : start + self.policy.decode_batch_size]
            moments = self.policy.posterior(torch.stack([decoded[key] for key in keys]).to(self.policy.device))
            self.store.put(dict(zip(keys, moments, strict=True)))

    def judged(
        self, row: Judgement, keys: Mapping[int, bytes], decoded: Mapping[bytes, Tensor]
    ) -> Iterator[Judgement | Fault]:
        """What is trained on of a row, by the judge's scores where there is one."""
        if self.judge is None:
            yield row
            return
        images = torch.stack([decoded[keys[id(stored)]] for stored in row.pictures]).to(self.policy.device)
        scores = judged_scores(self.judge, images, row.prompt, by_parts=self.config.ranked_by_parts)
        yield from self.material.examples(replace(row, scores=scores))


def judged_scores(judge: Judge, images: Tensor, prompt: str, *, by_parts: bool) -> tuple[float, ...]:
    """A score for each picture: the reward, or with `by_parts` the share of the others that it beats, as the mean over
    the reward's parts (RankDPO's merit)."""
    prompts: list[str] = [prompt] * len(images)
    lines: list[Mapping[str, Any]] = [{"prompt": prompt}] * len(images)
    scores = judge.judge(images, prompts, lines)
    if by_parts and scores.parts:
        merits = [beaten(part.float()[None])[0] for part in scores.parts.values()]
        return tuple(torch.stack(merits).mean(0).tolist())
    return tuple(judge.settle(scores, prompts).tolist())

"""The model card of a trained adapter: what it is, how good it is, how to use it, how to make it again."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from burnish.checkpoint import atomic_write

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    directory: Path,
    *,
    base_model: str,
    algorithm: str,
    paper: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    signal: str,
    prompt: str,
    picture: Path | None = None,
    call: Mapping[str, Any] | None = None,
) -> Path:
    """Write `README.md` into a run's directory and return its path.

    `algorithm`: its title; `signal`: what it learnt from, in words; `config`: the run's settings, whose `evaluation`
    says with which steps and guidance the accuracy in `metrics` was measured; `prompt`: an example; `picture`: relative
    to `directory`; `call`: what the stock pipeline's call is told, `guidance_scale` unless given. The snippet runs from
    `directory` with stock diffusers. A base model that is no hub id is not named in the metadata: the hub would not
    find it, and a path belongs to one machine only.
    """
    on_hub = HUB_ID.fullmatch(base_model) is not None and not Path(base_model).exists()
    tag, task = (
        algorithm.lower().replace(" ", "-"),
        "text-to-video" if "num_frames" in (call or {}) else "text-to-image",
    )
    example: dict[str, Any] = {"widget": [{"text": prompt, "output": {"url": picture.as_posix()}}]} if picture else {}
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        tags=["diffusers", *(["lora"] if config["lora"] else []), task, "burnish", tag],
        base_model=base_model if on_hub else None,
        **example,
    )
    settings = config["evaluation"]
    name = base_model if on_hub or base_model.startswith("package:") else Path(base_model).name
    recipe = yaml.safe_dump(dict(config), sort_keys=False)
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}, post-trained with {algorithm}",
        f"{'A LoRA for' if config['lora'] else 'All weights of'} `{name}`, trained for {metrics['step']} rounds with "
        f"[{algorithm}]({paper}) on the {signal}.",
        f"![Samples, a row for each prompt]({picture.as_posix()})" if picture else "",
        _results(metrics, settings),
        "## Use",
        "From this folder, with the steps and the guidance of the evaluation:",
        f"```python\n{_snippet(base_model, on_hub, settings, prompt, call, whole=not config['lora'])}```",
        "## Make it again",
        "```sh\nburnish train config.yaml output_dir=runs/again\n```",
        f"<details><summary>config.yaml</summary>\n\n```yaml\n{recipe}```\n\n</details>",
    ]
    path = directory / "README.md"
    atomic_write(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _results(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if "eval/accuracy" not in metrics:
        return ""
    lines = ["| kind | accuracy | 95% interval |", "| --- | ---: | ---: |"]
    prefix = "eval/accuracy/"
    for kind in ["", *(name.removeprefix(prefix) for name in metrics if name.startswith(prefix))]:
        mean, low, high = (
            metrics[f"eval/accuracy{bound}/{kind}".rstrip("/")] for bound in ("", "_low", "_high")
        )  # fmt: skip
        lines.append(f"| {kind or '**mean of the kinds**'} | {100 * mean:.1f}% | {100 * low:.1f}–{100 * high:.1f}% |")
    return (
        f"Held-out accuracy ({settings['steps']} steps, guidance {settings['guidance']:g}, "
        f"pictures of each prompt: {settings['images_per_prompt']}, first seed {settings['seed']}):\n\n"
        + "\n".join(lines)
    )


def _snippet(
    base_model: str,
    on_hub: bool,
    settings: Mapping[str, Any],
    prompt: str,
    call: Mapping[str, Any] | None,
    *,
    whole: bool,
) -> str:
    if whole:
        imports, base = "", '"pipeline"'
    elif on_hub:
        imports, base = "", f'"{base_model}"'
    elif base_model.startswith("package:"):
        imports, base = "from burnish.data import resolve\n", f'resolve("{base_model}")'
    else:  # a folder: config.yaml, beside the card, says where
        imports, base = "import yaml\n", 'yaml.safe_load(open("config.yaml"))["model"]'
    told = {"guidance_scale": settings["guidance"]} if call is None else call
    options = "".join(f"    {name}={value!r},\n" for name, value in told.items())
    save = 'image.save("image.png")\n'
    if "num_frames" in told:
        imports, save = (
            f"from diffusers.utils import export_to_video\n{imports}",
            'export_to_video(image, "clip.mp4")\n',
        )
    return (
        f"import torch\n{imports}from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({base})\n"
        + ("" if whole else 'pipe.load_lora_weights("adapter")\n')
        + "image = pipe(\n"
        f"    {prompt!r},\n"
        f"    num_inference_steps={settings['steps']},\n"
        f"{options}"
        f"    generator=torch.Generator().manual_seed({settings['seed']}),\n"
        f").{'frames' if 'num_frames' in told else 'images'}[0]\n{save}"
    )

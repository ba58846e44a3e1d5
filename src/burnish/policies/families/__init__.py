"""The model families, a file each, and the table that finds one from a pipeline's class."""

import diffusers
from diffusers import DiffusionPipeline

from burnish.policies.families.flux import FluxPolicy
from burnish.policies.families.lumina_2 import Lumina2Policy
from burnish.policies.families.qwen_image import QwenImagePolicy
from burnish.policies.families.sana import SanaPolicy
from burnish.policies.families.stable_diffusion import StableDiffusionPolicy
from burnish.policies.families.stable_diffusion_3 import StableDiffusion3Policy
from burnish.policies.families.stable_diffusion_xl import StableDiffusionXLPolicy
from burnish.policies.families.wan import WanPolicy
from burnish.policies.families.z_image import ZImagePolicy
from burnish.policies.policy import Policy

FAMILIES: dict[type[DiffusionPipeline], type[Policy]] = {
    diffusers.StableDiffusionPipeline: StableDiffusionPolicy,
    diffusers.StableDiffusionXLPipeline: StableDiffusionXLPolicy,
    diffusers.StableDiffusion3Pipeline: StableDiffusion3Policy,
    diffusers.FluxPipeline: FluxPolicy,
    diffusers.SanaPipeline: SanaPolicy,
    diffusers.Lumina2Pipeline: Lumina2Policy,
    diffusers.QwenImagePipeline: QwenImagePolicy,
    diffusers.ZImagePipeline: ZImagePolicy,
    diffusers.WanPipeline: WanPolicy,
}

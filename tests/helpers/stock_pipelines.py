"""Stock pipelines of real configuration classes, with tiny random weights."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from burnish.worlds.shapes import pipelines

FAMILIES = ("sd", "sd-v", "sd3", "sd3-t5", "shapes-flow", "shapes-ddpm")
WIDTH = 32


def autoencoder(channels: int, **config: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def stable_diffusion(prediction: str) -> StableDiffusionPipeline:
    tokenizer = pipelines.build_tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(pipelines.text_config(tokenizer, WIDTH)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_3(t5: bool) -> StableDiffusion3Pipeline:
    tokenizer = pipelines.build_tokenizer()
    encoder, t5_tokenizer = None, None
    if t5:
        pieces = [f"\u2581{word}" for word in ("a", "red", "blue", "circle", "square")]
        t5_tokenizer = T5Tokenizer(
            vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], extra_ids=0
        )
        config = T5Config(vocab_size=len(t5_tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        encoder = T5EncoderModel(config)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
            out_channels=16,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),  # as in SD3.5
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(pipelines.text_config(tokenizer, WIDTH)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(pipelines.text_config(tokenizer, WIDTH)),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=t5_tokenizer,
    )


def shapes_ddpm() -> StableDiffusionPipeline:
    text = CLIPTextModelWithProjection(pipelines.text_config(pipelines.build_tokenizer(), pipelines.TEXT_WIDTHS[0]))
    pipeline = pipelines.build_ddpm(pipelines.build_vae(), text.state_dict())
    smaller = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config({**pipeline.unet.config, **smaller}))
    return pipeline


def build(family: str) -> DiffusionPipeline:
    """The same weights at every call."""
    torch.manual_seed(0)
    made = {
        "sd": lambda: stable_diffusion("epsilon"),
        "sd-v": lambda: stable_diffusion("v_prediction"),
        "sd3": lambda: stable_diffusion_3(t5=False),
        "sd3-t5": lambda: stable_diffusion_3(t5=True),
        "shapes-flow": lambda: pipelines.build_flow(pipelines.build_vae(), layers=2, heads=2),
        "shapes-ddpm": shapes_ddpm,
    }[family]()
    with torch.no_grad():  # random text encoders say nearly the same of every prompt: make the words count
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if (encoder := made.components.get(name)) is not None:
                encoder.get_input_embeddings().weight.mul_(30)
    for component in made.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    made.set_progress_bar_config(disable=True)
    return made

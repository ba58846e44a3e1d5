"""Stock pipelines of real configuration classes, with tiny random weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from burnish.policies import LoraConfig, PipelineConfig, Policy, load_policy
from burnish.worlds.shapes import pipelines

BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": lambda: stable_diffusion("epsilon"),
    "sd-v": lambda: stable_diffusion("v_prediction"),
    "sd-zero-snr": lambda: stable_diffusion("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "sdxl": lambda: stable_diffusion_xl("sdxl"),
    "sdxl-euler": lambda: stable_diffusion_xl("sdxl-euler"),
    "sdxl-turbo": lambda: stable_diffusion_xl("sdxl-turbo"),
    "sdxl-lcm": lambda: stable_diffusion_xl("sdxl-lcm"),
    "sd3": lambda: stable_diffusion_3(with_t5=False),
    "sd3-t5": lambda: stable_diffusion_3(with_t5=True),
    "flux-dev": lambda: flux(guidance=True),
    "flux-schnell": lambda: flux(guidance=False),
    "sana": lambda: sana(),
    "lumina-2": lambda: lumina_2(),
    "qwen-image": lambda: qwen_image(),
    "z-image": lambda: z_image(),
    "wan-2.1": lambda: wan("wan-2.1"),
    "wan-2.2": lambda: wan("wan-2.2"),
    "shapes-flow": lambda: pipelines.build_flow(pipelines.build_vae(), layers=2, heads=2),
    "shapes-ddpm": lambda: shapes_ddpm(),
}
FAMILIES = tuple(BUILDERS)
MAIN = ("sd", "sdxl", "sd3-t5", "flux-dev", "sana", "lumina-2", "qwen-image", "z-image", "wan-2.1")  # one a family
# What a small pipeline has that is not in its files: its class makes it a constant.
ATTRIBUTES = {
    **{family: {"default_sample_size": 8} for family in ("flux-dev", "flux-schnell", "z-image")},
    "lumina-2": {"vae_scale_factor": 2},
    "qwen-image": {
        "default_sample_size": 8,
        "prompt_template_encode": "describe the picture : {} end",
        "prompt_template_encode_start_idx": 4,
    },
    **{family: {"default_size": (16, 32)} for family in ("wan-2.1", "wan-2.2")},
}
OPTIONS = {"wan-2.1": PipelineConfig(frames=5), "wan-2.2": PipelineConfig(frames=5)}
SIDES = {
    "flux-dev": 16,
    "z-image": 16,
    "lumina-2": 64,
    "qwen-image": 32,
    "wan-2.1": 32,
}  # pixels, where the default is large
WIDTH = 32
WORDS = ("a", "red", "blue", "circle", "square", "squares", "two", "cross", "triangle", "of", "photo", "above", "green")


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


def stable_diffusion(prediction: str, **schedule: Any) -> StableDiffusionPipeline:
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
            **schedule,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_3(*, with_t5: bool) -> StableDiffusion3Pipeline:
    tokenizer = pipelines.build_tokenizer()
    encoder, t5_tokenizer = t5() if with_t5 else (None, None)
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


def stable_diffusion_xl(kind: str) -> StableDiffusionXLPipeline:
    tokenizer = pipelines.build_tokenizer()
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler = {
        "sdxl": DDIMScheduler(**schedule, set_alpha_to_one=False, steps_offset=1),
        "sdxl-euler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        "sdxl-turbo": EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        ),
        "sdxl-lcm": LCMScheduler(),
    }[kind]
    return StableDiffusionXLPipeline(
        vae=autoencoder(4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(pipelines.text_config(tokenizer, WIDTH)),
        text_encoder_2=CLIPTextModelWithProjection(pipelines.text_config(tokenizer, WIDTH)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            time_cond_proj_dim=16 if kind == "sdxl-lcm" else None,
        ),
        scheduler=scheduler,
        add_watermarker=False,
    )


def t5(kind: Any = T5EncoderModel, config: Any = T5Config) -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = [f"\u2581{word}" for word in WORDS]
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], extra_ids=0
    )
    sizes = {"d_model": 2 * WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return kind(config(vocab_size=len(tokenizer), **sizes)), tokenizer


def flux(guidance: bool) -> FluxPipeline:
    tokenizer = pipelines.build_tokenizer()
    encoder, pieces = t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(pipelines.text_config(tokenizer, WIDTH)),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=pieces,
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def words(*, chat: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, such as a language model's in everything but its vocabulary."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", *WORDS))}
    told = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    told.pre_tokenizer = Whitespace()
    if bos:
        told.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=told,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template=chat,
        padding_side="right",
    )


LANGUAGE = {
    "hidden_size": 2 * WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}


def gemma() -> tuple[Gemma2Model, PreTrainedTokenizerFast]:
    tokenizer = words()
    return Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **LANGUAGE)), tokenizer


def sana() -> SanaPipeline:
    encoder, tokenizer = gemma()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=2 * WIDTH,
            sample_size=32,
            patch_size=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def lumina_2() -> Lumina2Pipeline:
    encoder, tokenizer = gemma()
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            norm_eps=1e-5,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 32, 32),
            cap_feat_dim=2 * WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=True),
        vae=autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


VIDEO_VAE = {
    "z_dim": 4,
    "base_dim": 8,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 2.0, 0.5, 1.0],
}


def qwen_image() -> QwenImagePipeline:
    tokenizer = words(bos=False)
    language = {name: size for name, size in LANGUAGE.items() if name != "head_dim"}
    language |= {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(**VIDEO_VAE),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=language | {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 1},
                vision_config={
                    "depth": 1,
                    "hidden_size": 8,
                    "intermediate_size": 8,
                    "num_heads": 1,
                    "out_hidden_size": 2 * WIDTH,
                },
                image_token_id=0,
                video_token_id=0,
                vision_start_token_id=0,
                vision_end_token_id=0,
            )
        ),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
    )


CHAT = "{% for message in messages %}user : {{ message['content'] }} end{% endfor %}"


def z_image() -> ZImagePipeline:
    tokenizer = words(chat=CHAT, bos=False)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **LANGUAGE)),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=2 * WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[600, 32, 32],
        ),
    )


def wan(kind: str) -> WanPipeline:
    encoder, tokenizer = t5(UMT5EncoderModel, UMT5Config)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLWan(**VIDEO_VAE, scale_factor_spatial=4, scale_factor_temporal=4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=2 * WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        expand_timesteps=kind == "wan-2.2",
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
    made = BUILDERS[family]()
    for name, value in ATTRIBUTES.get(family, {}).items():
        setattr(made, name, value)
    with torch.no_grad():  # random text encoders say nearly the same of every prompt: make the words count
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if (encoder := made.components.get(name)) is not None:
                encoder.get_input_embeddings().weight.mul_(30)
    for component in made.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    made.set_progress_bar_config(disable=True)
    return made


def load(family: str, lora: LoraConfig | None = None, **options: Any) -> Policy:
    """The policy of a family's pipeline."""
    return load_policy(build(family), lora, options=replace(OPTIONS.get(family, PipelineConfig()), **options))


def stock_call(policy: Policy, prompts: list[str], *, guidance: float, size: Any = (None, None)) -> dict[str, Any]:
    """The arguments of a stock pipeline's call that does what a rollout of `policy` does."""
    high, wide = policy.pixels(*size)
    told = policy.call_options(guidance) | {"height": high, "width": wide}
    if isinstance(told.get("negative_prompt"), str):  # pipelines differ in what they allow beside a list of prompts
        told["negative_prompt"] = [told["negative_prompt"]] * len(prompts)
    if isinstance(policy.pipeline, SanaPipeline):
        told["use_resolution_binning"] = False  # to another size than asked for
    return told

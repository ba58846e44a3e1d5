"""Methods that learn from given pictures and what is said of them."""

from functools import partial

from burnish import objectives
from burnish.algorithms.row import DDPM, FLOW, Algorithm, offline
from burnish.denoising import Noising, Pairs, Rankings, Singles, Thumbs

# Of each row: pictures of a prompt share their noise, and have their own where the method says so.
ALONE = partial(Noising, noise="independent")

GIVEN: dict[str, Algorithm] = {
    "sft": offline(
        title="SFT",
        family="regression",
        objective=objectives.sft,
        material=Singles,
        noising=ALONE,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2006.11239",
        summary="the denoising loss on pictures that were liked; of pairs on the better ones",
        result="SD1.5 on Pick-a-Pic: PickScore below Diffusion-DPO's (DiffusionDPO, supplement)",
    ),
    "sft_weighted": offline(
        title="Reward-weighted SFT",
        family="regression",
        objective=objectives.sft,
        material=partial(Singles, temperature=1.0),  # Flow-RWR: exp(r)
        noising=ALONE,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2501.13918",
        summary="the denoising loss, each picture with the weight exp(score); Flow-RWR on a flow",
        result="a video flow: below Flow-DPO on VideoReward's three scores (table)",
    ),
    "diffusion_dpo": offline(
        title="Diffusion-DPO",
        family="preference",
        objective=objectives.diffusion_dpo,
        material=Pairs,
        noising=Noising,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2311.12908",
        summary="the better picture's denoising error shall fall more, against the base's, than the worse one's",
        result="SDXL on Pick-a-Pic v2: preferred to its base by 70% of people",
    ),
    "flow_dpo": offline(
        title="Flow-DPO",
        family="preference",
        objective=objectives.flow_dpo,
        material=Pairs,
        noising=partial(Noising, time="logit_normal", drop_prompt=0.0),  # flow_grpo scripts/train_sd3_dpo.py
        processes=(FLOW,),
        paper="https://arxiv.org/abs/2501.13918",
        summary="Diffusion-DPO on the velocity of a flow, with times from its training",
        result="a video flow: above supervised fine-tuning and Flow-RWR on VideoReward's three scores (table)",
    ),
    "mapo": offline(
        title="MaPO",
        family="preference",
        objective=objectives.mapo,
        material=Pairs,
        noising=partial(Noising, drop_prompt=0.0),  # mapo-t2i/mapo train.py
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2406.06424",
        summary="the better picture is fitted, and told apart from the worse one, without a reference",
        result="SDXL: above Diffusion-DPO on Pick-a-Pic, 15% less training time",
    ),
    "dspo": offline(
        title="DSPO",
        family="preference",
        objective=objectives.dspo,
        material=Pairs,
        noising=Noising,
        processes=(DDPM, FLOW),
        paper="https://openreview.net/forum?id=xyfb9HHvMe",
        summary="the score of what people prefer, matched as a model is pretrained",
        result="SD1.5 and SDXL on Pick-a-Pic: above Diffusion-DPO and Diffusion-KTO (table)",
    ),
    "inpo": offline(
        title="InPO",
        family="preference",
        objective=partial(objectives.diffusion_dpo, beta=2000.0),  # SD1.5's launcher; SDXL 5000
        material=Pairs,
        noising=partial(Noising, noise="inverted"),
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2503.18454",
        summary="Diffusion-DPO with the noise that the model itself would make each picture from",
        result="SDXL: Diffusion-DPO's quality after 400 updates (table)",
    ),
    "cpo": offline(
        title="CPO",
        family="preference",
        objective=objectives.cpo,
        material=Pairs,
        noising=Noising,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2401.08417",
        summary="Diffusion-DPO without a reference, held by the better picture's own error",
        result="a method for language models; no paper reports it on pictures",
    ),
    "orpo": offline(
        title="ORPO",
        family="preference",
        objective=objectives.orpo,
        material=Pairs,
        noising=partial(Noising, drop_prompt=0.0),  # diffusers' script
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2403.07691",
        summary="supervised fine-tuning on the better picture, and its odds against the worse one's",
        result="a method for language models; no paper reports it on pictures",
    ),
    "rank_dpo": offline(
        title="RankDPO",
        family="preference",
        objective=objectives.rank_dpo,
        material=Rankings,
        noising=Noising,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2410.18013",
        summary="Diffusion-DPO on several pictures in an order, each pair weighed by its place in it",
        result="SDXL and SD3-M: above Diffusion-DPO on GenEval and DPG-Bench (table)",
    ),
    "kto": offline(
        title="Diffusion-KTO",
        family="preference",
        objective=objectives.kto,
        material=Thumbs,
        noising=ALONE,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2404.04465",
        summary="single pictures with a thumb: gains over the base against a common point",
        result="SD1.5: preferred to Diffusion-DPO by people and by four reward models (table)",
    ),
}

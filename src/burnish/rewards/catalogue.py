"""The table of shipped rewards, by the name that recipes use; what there is to know of each stands in its own file."""

from burnish.rewards.entry import Entry
from burnish.rewards.models.aesthetic import AESTHETIC
from burnish.rewards.models.clip_score import CLIP_SCORE
from burnish.rewards.models.hps import HPSV2, HPSV2_1
from burnish.rewards.models.hpsv3 import HPSV3
from burnish.rewards.models.image_reward import IMAGE_REWARD
from burnish.rewards.models.pickscore import PICKSCORE
from burnish.rewards.models.trained import TRAINED
from burnish.rewards.models.vlm_judge import VLM_JUDGE
from burnish.rewards.models.vqa_score import VQA_SCORE
from burnish.rewards.remote.client import REMOTE
from burnish.rewards.rules.geneval import GENEVAL
from burnish.rewards.rules.image_statistics import IMAGE_STATISTIC
from burnish.rewards.rules.jpeg import JPEG_COMPRESSIBILITY, JPEG_INCOMPRESSIBILITY
from burnish.rewards.rules.nsfw import NSFW
from burnish.rewards.rules.objects import OBJECTS
from burnish.rewards.rules.ocr import OCR

REWARDS: dict[str, Entry] = {
    "pickscore": PICKSCORE,
    "hpsv2": HPSV2,
    "hpsv2_1": HPSV2_1,
    "hpsv3": HPSV3,
    "image_reward": IMAGE_REWARD,
    "clip_score": CLIP_SCORE,
    "aesthetic": AESTHETIC,
    "vqa_score": VQA_SCORE,
    "vlm_judge": VLM_JUDGE,
    "trained": TRAINED,
    "geneval": GENEVAL,
    "objects": OBJECTS,
    "ocr": OCR,
    "jpeg_compressibility": JPEG_COMPRESSIBILITY,
    "jpeg_incompressibility": JPEG_INCOMPRESSIBILITY,
    "image_statistic": IMAGE_STATISTIC,
    "nsfw": NSFW,
    "remote": REMOTE,
}

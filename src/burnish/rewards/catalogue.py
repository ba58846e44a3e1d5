"""The table of shipped rewards, by the name that recipes use; what there is to know of each stands in its own file."""

from burnish.rewards.aesthetic import AESTHETIC
from burnish.rewards.clip_score import CLIP_SCORE
from burnish.rewards.entry import Entry
from burnish.rewards.hps import HPSV2, HPSV2_1
from burnish.rewards.image_statistics import IMAGE_STATISTIC
from burnish.rewards.jpeg import JPEG_COMPRESSIBILITY, JPEG_INCOMPRESSIBILITY
from burnish.rewards.nsfw import NSFW
from burnish.rewards.ocr import OCR
from burnish.rewards.pickscore import PICKSCORE
from burnish.rewards.trained import TRAINED

REWARDS: dict[str, Entry] = {
    "pickscore": PICKSCORE,
    "hpsv2": HPSV2,
    "hpsv2_1": HPSV2_1,
    "clip_score": CLIP_SCORE,
    "aesthetic": AESTHETIC,
    "trained": TRAINED,
    "ocr": OCR,
    "jpeg_compressibility": JPEG_COMPRESSIBILITY,
    "jpeg_incompressibility": JPEG_INCOMPRESSIBILITY,
    "image_statistic": IMAGE_STATISTIC,
    "nsfw": NSFW,
}

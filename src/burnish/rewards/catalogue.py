"""The table of shipped rewards, by the name that recipes use; what there is to know of each stands in its own file."""

from burnish.rewards.entry import Entry

REWARDS: dict[str, Entry] = {}

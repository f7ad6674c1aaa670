"""Which prefix of a prompt a peer still has: what was served there, and how long it says that it keeps things."""

from wwwserve.agents.kernel import Floats, kernel
from wwwserve.agents.knowledge import AD_REUSE_S, AD_TIME_S


@kernel
def kept_since_s(advert: Floats) -> float:
    """Since when a peer with this advert [ADVERT_SIZE] is taken to have all that it used: it was used after the advert,
    or was not older then than what goes next."""
    return float(advert[AD_TIME_S] - advert[AD_REUSE_S])


@kernel
def is_kept(advert: Floats, used_s: float) -> bool:
    """Whether a peer with this advert is taken to have what it last used at `used_s`."""
    return bool(used_s >= kept_since_s(advert))

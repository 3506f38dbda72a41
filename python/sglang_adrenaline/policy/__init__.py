"""How much of a prompt stays on the prefill side, decided in the decode scheduler. Pure functions over explicit state.

A decision depends on nothing but the state, the request, the views and the settings, so that every rank that sees the
same requests in the same order decides alike. What ranks would measure differently (times, reports of prefill
instances) has to be agreed between them before it becomes a view or an observation.

    wish.py      what a request itself asks for
    fixed.py     a fixed share of prompt tokens: `decide`
    auto.py      by load: `decide_by_load`
    views.py     what `decide_by_load` looks at
    feedback.py  what measured steps change, and what is forgotten without: `observe`, `unobserved`
    pace.py      how fast work is, measured against its prediction
    bounds.py    the offload bounds of the paper
    pacing.py    how far ahead of prefill requests are taken in
    growth.py    what steps will read while a request runs
    forecast.py  how much memory admitted requests will still take
    prefill_load.py  how much work comes to prefill, and whether that bounds a deployment
    sharing.py   which beginnings of prompts requests share, and how many at a time
    sm_share.py  how prefill and executor share a GPU
"""

from sglang_adrenaline.policy.auto import Decision, LoadState, Reason, decide_by_load
from sglang_adrenaline.policy.bounds import Bounds, offload_bounds
from sglang_adrenaline.policy.feedback import Observation, observe, unobserved
from sglang_adrenaline.policy.fixed import Settings, State, decide
from sglang_adrenaline.policy.forecast import HEADROOM, AnswerShares, peak_growth
from sglang_adrenaline.policy.growth import Duty, OutputLengths, PromptLengths
from sglang_adrenaline.policy.pacing import has_enough
from sglang_adrenaline.policy.sharing import Sharing
from sglang_adrenaline.policy.sm_share import PrefillLoad, SharePoint, choose_share
from sglang_adrenaline.policy.views import DecodeView, LoadSettings, PrefillView, Request
from sglang_adrenaline.policy.wish import WHOLE_PROMPT, requested_prefix_len

__all__ = [
    "HEADROOM",
    "WHOLE_PROMPT",
    "AnswerShares",
    "Bounds",
    "Decision",
    "DecodeView",
    "Duty",
    "LoadSettings",
    "LoadState",
    "Observation",
    "OutputLengths",
    "PrefillLoad",
    "PrefillView",
    "PromptLengths",
    "Reason",
    "Request",
    "Settings",
    "SharePoint",
    "Sharing",
    "State",
    "choose_share",
    "decide",
    "decide_by_load",
    "has_enough",
    "observe",
    "offload_bounds",
    "peak_growth",
    "requested_prefix_len",
    "unobserved",
]

"""The cost model that ratio auto and the executor's share of the SMs are decided with: from a profile, or data sheets.

`check` runs before any weight is loaded, in the server's main process, which does not touch a GPU; the rest in the
scheduler's, which knows the device.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from sglang_adrenaline import compat
from sglang_adrenaline.config import AdrenalineConfig
from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.cpu_info import device_name, has_accelerator
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.figures import ModelFigures, known_device, model_from_settings
from sglang_adrenaline.profile_data import datasheet_profile, load_profile

logger = logging.getLogger(__name__)

UNKNOWN_GPU = "A100"
"""Whose data sheet is used for a GPU without one: the slowest of those that there are."""
FALLBACK_RATIO = 0.7
"""Instead of auto for models that the cost model does not know, such as mixtures of experts."""
DATASHEET_DOUBT = 0.5
"""An objective is impossible by a data sheet only if it is less than this share of what the data sheet says."""


def served_model(model_config: Any) -> ModelFigures:
    """Figures of the model of SGLang's ModelConfig. Raises ConfigError where the cost model does not fit."""
    settings = compat.text_config(model_config)
    return model_from_settings(settings, "the model's config.json", bytes_each=compat.bytes_each(model_config))


def check(config: AdrenalineConfig, model_config: Any) -> None:
    """Raise ConfigError if the profile that was given is none of this model (nor, on a CPU, of this machine), or an
    objective cannot be met."""
    try:
        model = served_model(model_config)
    except ConfigError as error:
        if config.profile is not None or config.objectives_ms:
            raise ConfigError(f"no profile and no objective can be used: {error}") from None
        return
    on_cpu = not has_accelerator()
    if config.profile is not None:
        device = device_name() if on_cpu else None
        check_objectives(config, CostModel(load_profile(config.profile, device=device, model=model)))
    elif on_cpu:
        check_objectives(config, CostModel(datasheet_profile("CPU", model)))


def ratio_for(config: AdrenalineConfig, model_config: Any) -> float | Literal["auto"]:
    """The offload ratio in force: auto needs a model that the cost model knows."""
    if config.offload_ratio == "auto":
        try:
            served_model(model_config)
        except ConfigError as error:
            logger.warning("offload ratio %g instead of auto: %s", FALLBACK_RATIO, error)
            return FALLBACK_RATIO
    return config.offload_ratio


def for_server(config: AdrenalineConfig, model: ModelFigures, device: str) -> CostModel:
    """`device`: as a profile names it. Says in the log what it goes by.

    Raises ConfigError on a profile of another device or model and on objectives that cannot be met.
    """
    if config.profile is not None:
        cost = CostModel(load_profile(config.profile, device=device, model=model))
        logger.info("scheduling goes by profile %s (%s)", config.profile, cost.profile.source)
    else:
        cost = CostModel(datasheet_profile(_sheet(device), model))
        logger.info(
            "scheduling goes by the data sheet of %s, since no --adrenaline-profile is given",
            cost.profile.device,
        )
    check_objectives(config, cost)
    return cost


def check_objectives(config: AdrenalineConfig, cost: CostModel) -> None:
    """Raise ConfigError on an objective below what an empty machine needs for one request of one token."""
    doubt = 1.0 if cost.profile.source == "measured" else DATASHEET_DOUBT
    first_s = cost.profile.prefill_fixed_s + cost.prefill_s(1)
    least_ms = {"ttft": doubt * 1e3 * first_s, "tpot": doubt * 1e3 * cost.step_s(1, 0)}
    for name, slo_ms in config.objectives_ms.items():
        if slo_ms < least_ms[name]:
            source = f"the {'data sheet' if cost.profile.source == 'datasheet' else 'profile'} of {cost.profile.device}"
            raise ConfigError(
                f"--adrenaline-slo-{name}-ms {slo_ms:g} cannot be met: by {source} an idle machine takes "
                f"at least {least_ms[name]:.3g} ms"
            )


def _sheet(device: str) -> str:
    try:
        return known_device(device)
    except ConfigError:
        logger.warning("there are no data sheet figures for %s: those of %s are used", device, UNKNOWN_GPU)
        return UNKNOWN_GPU

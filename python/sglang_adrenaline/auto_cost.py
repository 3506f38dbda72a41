"""The cost model that `--adrenaline-offload-ratio auto` decides with: from a profile, else from data sheets.

`check` runs before any weight is loaded, in the server's main process, `for_server` in the scheduler's, which knows the
device.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang_adrenaline import compat
from sglang_adrenaline.config import AdrenalineConfig
from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.figures import ModelFigures, known_device, model_from_settings
from sglang_adrenaline.profile_data import datasheet_profile, load_profile

logger = logging.getLogger(__name__)

UNKNOWN_GPU = "A100"
"""Whose data sheet is used for a GPU without one: the slowest of those that there are."""


def served_model(model_config: Any) -> ModelFigures:
    """Figures of the model of SGLang's ModelConfig. Raises ConfigError where the cost model does not fit."""
    settings = compat.text_config(model_config)
    return model_from_settings(settings, "the model's config.json", bytes_each=compat.bytes_each(model_config))


def check(config: AdrenalineConfig, model_config: Any) -> None:
    """Raise ConfigError if the model, or the profile that was given, cannot be reckoned with."""
    try:
        model = served_model(model_config)
    except ConfigError as error:
        raise ConfigError(f"--adrenaline-offload-ratio auto: {error}; give a number") from None
    if config.profile is not None:
        load_profile(config.profile, model=model)


def for_server(config: AdrenalineConfig, model: ModelFigures, device: str) -> CostModel:
    """`device`: as a profile names it. Says in the log what it goes by. Raises ConfigError on a profile of others."""
    if config.profile is not None:
        cost = CostModel(load_profile(config.profile, device=device, model=model))
        logger.info("offload ratio auto goes by profile %s (%s)", config.profile, cost.profile.source)
    else:
        cost = CostModel(datasheet_profile(_sheet(device), model))
        logger.info(
            "offload ratio auto goes by the data sheet of %s, since no --adrenaline-profile is given",
            cost.profile.device,
        )
    least_ms = cost.step_s(1, 0) * 1e3
    if config.slo_tpot_ms is not None and config.slo_tpot_ms < least_ms:
        logger.warning(
            "--adrenaline-slo-tpot-ms %g cannot be met: a step of one request takes %.1f ms by this cost model",
            config.slo_tpot_ms,
            least_ms,
        )
    return cost


def _sheet(device: str) -> str:
    try:
        return known_device(device)
    except ConfigError:
        logger.warning("there are no data sheet figures for %s: those of %s are used", device, UNKNOWN_GPU)
        return UNKNOWN_GPU

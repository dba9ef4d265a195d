"""In which dtypes a run multiplies, where that depends on what the machine is fast at.

What is decided when a run begins stands in its run.json, and holds when it is continued, wherever that is: another
dtype gives other numbers. Knows settings and run.json; measuring is `sphere.forward.matmul_dtype`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from sphere.forward import matmul_dtype
from sphere.forward.matmul_dtype import MATMUL_DTYPES
from sphere.runs.config import RunConfig

log = logging.getLogger(__name__)

USED = "z_matmul_dtype_used"  # the key of run.json


def z_matmul_dtype_used(config: RunConfig, previous: Mapping[str, Any], model: PreTrainedModel) -> str:
    """The name of the dtype in which the layers above z multiply: the one asked for, if it is no slower here.

    Warns of a model whose own dtype is slow here, as well.

    Args:
        previous: run.json of the run that is continued, which goes on as it began; empty for a new one.
    """
    _warn_of_slow_dtype(model)
    asked = config.z_matmul_dtype
    used = str(previous.get(USED, asked)) if previous else asked
    dtype = MATMUL_DTYPES[used]
    if dtype is None or dtype == model.dtype:
        return used
    slower = matmul_dtype.slowdown(dtype, model.device, model.dtype)
    if slower <= 1:
        return used
    what = (
        f"{used} multiplies {slower:.1f} times slower than {_name(model.dtype)} on this {model.device.type}"
    )
    if previous:
        log.warning("%s: this run began with it and goes on with it, more slowly.", what)
        return used
    log.info("%s: target values are sought in %s.", what, _name(model.dtype))
    return "model"


def _warn_of_slow_dtype(model: PreTrainedModel) -> None:
    """Say it where the model's own dtype is slower than float32 on this machine; it stays what it is."""
    if model.dtype.itemsize >= 4:
        return
    slower = matmul_dtype.slowdown(model.dtype, model.device)
    if slower > 1:
        log.warning(
            "%s, the model's dtype, multiplies %.1f times slower than float32 on this %s; it stays, since another one "
            "gives other numbers.",
            _name(model.dtype),
            slower,
            model.device.type,
        )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")

"""Optuna's study of a search: opened by one process or several at a time, about one model and one set of images."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from tokenmerge.errors import InputError
from tokenmerge.tools.compare.data import Images, describe
from tokenmerge.tools.search.options import SearchOptions

_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds before the storage is opened again: other processes that start at the same moment create the tables of a new one, too."""


def open_study(options: SearchOptions) -> Any:
    """Return the study of the options, which is created if the storage does not hold it.

    Databases do not create several tables at once: of two processes that open a new storage at the same moment, one may find
    a table that was not there a moment ago. It opens the storage again and finds them all.

    Raises:
        InputError: if the storage cannot be used.
    """
    import optuna
    from sqlalchemy.exc import DBAPIError

    pauses = iter(_PAUSES)
    while True:
        try:
            return optuna.create_study(
                study_name=options.study,
                storage=options.storage,
                load_if_exists=True,
                directions=["minimize", "minimize"],
                sampler=optuna.samplers.TPESampler(seed=options.seed),
            )
        except Exception as error:  # every database raises its own exception types
            again = isinstance(error, (DBAPIError, optuna.exceptions.StorageInternalError))
            pause = next(pauses, None) if again else None
            if pause is None:
                # SQLAlchemy adds the statement and a link
                reason = getattr(error, "orig", None) or error
                raise InputError(
                    f"--storage {options.storage!r} cannot be used ({reason}): try sqlite:///search.db"
                ) from None
        time.sleep(pause)


def check_study(study: Any, options: SearchOptions, model: Any, images: Images) -> None:
    """Store what the trials of a study are measured on.

    Raises:
        InputError: if the study holds trials that were measured on something else.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    data = json.dumps(images.fingerprint(), sort_keys=True, default=str)
    about = {
        "model": describe(options),
        "weights": digest.hexdigest(),
        "data": hashlib.sha256(data.encode()).hexdigest(),
        "speed-up": options.speedup,
        "calibration": options.calibration,
        "holdout": options.holdout,
        "batch size": options.batch_size,
    }
    about = json.loads(json.dumps(about, default=str))
    before = shared(study, "about", lambda: about)
    odd = [name for name in about if before.get(name) != about[name]]
    if odd:
        raise InputError(
            f"the study {options.study!r} in {options.storage} holds trials of another {' and another '.join(odd)}, which cannot be "
            "compared: give another --study or --storage"
        )


def shared(study: Any, name: str, measure: Callable[[], Any]) -> Any:
    """Return the value under a name that all processes of a study share: the first one that has measured it stores it."""
    if name not in study.user_attrs:
        value = measure()
        if name not in study.user_attrs:  # another process may have been faster
            study.set_user_attr(name, value)
    return study.user_attrs[name]

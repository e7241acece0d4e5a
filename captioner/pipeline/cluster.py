"""Workers and the preparation of images on a Ray cluster."""

from __future__ import annotations

from functools import partial

from captioner.errors import UserError
from captioner.pipeline.coordinator import Pool
from captioner.pipeline.local import Inline
from captioner.pipeline.worker import Settings, ahead, work


def pool(settings: Settings, workers: int | None, missing: int) -> tuple[Pool, int]:
    """Actors that caption, one per GPU of the cluster unless ``workers`` says how many, and their number."""
    try:
        from captioner.engines import ray_pool
    except ImportError as error:
        raise UserError("ray is not installed", fix='pip install "ray[data]"') from error
    caption, model = settings.config.caption, settings.config.model
    ray_pool.connect(caption.ray_address)
    gpus = ray_pool.gpus() if model.device in ("auto", "cuda") else 0
    count = min(workers or max(1, gpus), missing)
    inline = caption.prepare_processes == 0
    make = partial(Inline if inline else ray_pool.RayTasks, ahead(settings.config))
    return ray_pool.RayPool(work, settings, make, gpus_each=1 if gpus else 0), count

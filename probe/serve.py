"""`probe serve`: a page and an endpoint that classify images with what `fit-linear` or `finetune` saved."""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from probe import bundle, interrupt
from probe.config import ServeConfig
from probe.errors import ConfigError
from probe.predictor import Predictor
from probe.sources import display_name
from probe.sources.origin import describe_origin

_BATCH = 32
"""Images per step of an accelerator."""
_CPU_BATCH = 8
"""Images per step of a CPU where a step of eight takes at most twice as long as one of one image. Else it is one: a
large backbone keeps a CPU busy with it, and whoever asks alone would pay for eight."""
_TIMINGS, _TIMING_SECONDS = 30, 0.5  # of each, whichever is reached first
_SHOWN_NAMES = 12
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def serve(
    config: ServeConfig,
    *,
    should_stop: Callable[[], bool] = interrupt.stop_requested,
    on_ready: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Serves until it should stop, which SIGINT and SIGTERM ask for, then finishes what is under way.

    Args:
      on_ready: called with the address when requests are taken; None: it is printed to stdout.
    Returns: {"url", "num_images", "num_steps", "num_refused"}: images answered, steps of the device that they took,
      requests refused because too many were under way.
    Raises: ConfigError if the address is not to be had, or starlette is missing; what `bundle.load`,
      `Bundle.load_backbone` and, for --cache, `open_neighbours` do.
    """
    try:
        from probe.serving.app import make_app
        from probe.serving.server import open_socket, run_server, url_of
    except ImportError as err:
        raise ConfigError(f"probe serve needs more packages ({err}): pip install 'probe-jax[serve]'") from err
    from probe.serving.neighbours import open_neighbours
    from probe.serving.openapi import describe_endpoint
    from probe.serving.page import render_page
    from probe.serving.pictures import Pictures
    from probe.serving.service import Service

    with open_socket(config.host, config.port) as bound:
        url = url_of(bound)
        classifier = bundle.load(config.run)
        backbone = classifier.load_backbone(config.backbone)
        predictor = Predictor(classifier, backbone, batch_size=config.batch_size or _BATCH)
        if config.batch_size is None and jax.default_backend() == "cpu":
            predictor.batch_size = _cpu_batch_size(predictor)
        neighbours, origin, note = open_neighbours(classifier, config.cache, config.nearest)
        notes = [note] if note else []
        pictures = None
        if neighbours is not None:
            pictures = Pictures(origin if config.images is None else describe_origin(config.images), neighbours.images)
            notes += [pictures.missing] if pictures.missing else []
        service = Service(
            predictor,
            neighbours,
            pictures,
            queue=config.queue,
            max_pixels=config.max_pixels,
            num_workers=config.num_workers,
        )
        service.warm_up()
        page, policy = render_page(_context(config, classifier, notes))
        app = make_app(
            service,
            page=page,
            policy=policy,
            openapi=describe_endpoint(
                classifier.class_names, multi_label=classifier.multi_label, max_bytes=config.max_bytes
            ),
            hosts=frozenset(name.lower() for name in (*_LOOPBACK, config.host, *config.allow_host)),
            max_bytes=config.max_bytes,
        )

        def tell() -> None:
            for line in notes:
                print(f"note: {line}", file=sys.stderr)
            if bound.getsockname()[0] not in _LOOPBACK:
                print("warning: whoever reaches this machine can use it: there is no password", file=sys.stderr)
            images = "1 image" if predictor.batch_size == 1 else f"up to {predictor.batch_size} images"
            print(f"{images} a step; Ctrl-C ends it", file=sys.stderr)
            if on_ready is not None:
                on_ready(url)
            else:
                print(json.dumps({"url": url}) if config.json else url, flush=True)

        with interrupt.patiently("finishing the requests under way"):
            asyncio.run(run_server(app, service, bound, should_stop=should_stop, on_ready=tell))
    return {
        "url": url,
        "num_images": service.num_answered,
        "num_steps": service.num_steps,
        "num_refused": service.room.num_refused,
    }


def describe(result: dict[str, Any]) -> str:
    """The line printed at the end."""
    return f"answered {result['num_images']:,} (steps {result['num_steps']:,}), refused {result['num_refused']:,}"


def _cpu_batch_size(predictor: Predictor) -> int:
    """One image, or several where that costs little; compiles both."""
    pixels = [np.zeros((*predictor.preprocessing.image_size, 3), np.uint8)]

    def seconds() -> float:
        started = time.perf_counter()
        predictor(pixels)
        return time.perf_counter() - started

    fastest = {}
    for size in (1, _CPU_BATCH):
        predictor.batch_size = size
        seconds()  # compiles
        took = [seconds(), seconds()]
        while len(took) < _TIMINGS and sum(took) < _TIMING_SECONDS:  # the fastest, whatever else the machine does
            took.append(seconds())
        fastest[size] = min(took)
    return _CPU_BATCH if fastest[_CPU_BATCH] <= 2 * fastest[1] else 1


def _context(config: ServeConfig, classifier: bundle.Bundle, notes: list[str]) -> dict[str, Any]:
    """What the page's template shows."""
    name = classifier.backbone.name
    return {
        "title": display_name(config.run.resolve().name),
        "classifier": classifier,
        "backbone": display_name(name if not Path(name).is_absolute() else Path(name).name),
        "names": [display_name(name) for name in classifier.class_names[:_SHOWN_NAMES]],
        "num_more": max(0, len(classifier.class_names) - _SHOWN_NAMES),
        "notes": [display_name(note) for note in notes],
        "data": {
            "multi_label": classifier.multi_label,
            "max_bytes": config.max_bytes,
            "at_once": min(8, config.queue),
            "num_classes": len(classifier.class_names),
        },
    }

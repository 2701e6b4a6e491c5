"""OpenVINO behind a purifier: both passes as one compiled graph, in fp32, bf16 or int8.

The graph (:mod:`pair.graph`) takes the masks as inputs, so one serves all masks and batch sizes;
there is a second one for batches whose images have different numbers of visible tokens. Converting
takes seconds and calibrating int8 a minute or so, once: the result is kept in a cache folder
(``$PAIR_CACHE``, else ``$XDG_CACHE_HOME/pair``, else ``~/.cache/pair``), named after the weights
and everything else that it depends on. Nothing is sent anywhere: the toolkit's own telemetry is
switched off.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair.data.embedded import pool
from pair.generator import MaskedAutoencoder, patchify
from pair.graph import NAMES, RAGGED, Passes, inputs
from pair.images import load_batch
from pair.masks import Bernoulli, MaskRule, rule_to_config

BACKENDS = ("auto", "torch", "openvino")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what torch multiplies in
GRAPH = 1  # counts changes of the graph, so that older cached ones are not used
CALIBRATION = 40  # photos of the package that an int8 graph is calibrated with


def choose(backend: str, precision: str) -> str:
    """ "torch" or "openvino" for a setting; ``auto`` is torch unless int8 is wanted."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if backend == "torch" and precision == "int8":
        raise ValueError("int8 needs the backend 'openvino': torch has fp32, bf16 and fp16")
    if backend == "openvino" and precision == "fp16":
        raise ValueError("fp16 needs the backend 'torch': OpenVINO has fp32, bf16 and int8")
    return "openvino" if backend == "openvino" or precision == "int8" else "torch"


class Engines:
    """The compiled graphs of one purifier, made when first needed and again for new weights."""

    def __init__(self, generator: MaskedAutoencoder, rule: MaskRule, paste: bool, precision: str):
        self.generator, self.rule = generator, rule
        self.paste, self.precision = paste, precision
        self.lock = threading.Lock()
        self.ready: dict[tuple, Any] = {}
        self.weights: tuple = ()

    def __deepcopy__(self, memo: dict) -> Engines:
        import copy

        generator = copy.deepcopy(self.generator, memo)
        return Engines(generator, copy.deepcopy(self.rule, memo), self.paste, self.precision)

    def __reduce__(self):
        return Engines, (self.generator, self.rule, self.paste, self.precision)

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, N, P) and masks (B, N) on the CPU -> tokens (B, N, P), not clamped."""
        if tokens.device.type != "cpu" or tokens.dtype != torch.float32:
            raise ValueError(
                "the backend 'openvino' computes on the CPU in single precision, not with "
                f"{tokens.dtype} on {tokens.device}: use the backend 'torch'"
            )
        if not len(tokens):
            return tokens
        given = inputs(tokens.detach(), mask)
        with self.lock:
            request = self._request("visible_bias" in given)
            arrays = {name: value.contiguous().numpy() for name, value in given.items()}
            return torch.from_numpy(request.infer(arrays)[0])

    def _request(self, ragged: bool):
        # Tensors made in inference mode do not count their changes.
        weights = tuple(
            (id(p), 0 if p.is_inference() else p._version) for p in self.generator.parameters()
        )
        if weights != self.weights:
            self.ready, self.weights = {}, weights
        threads = torch.get_num_threads()
        if (ragged, threads) not in self.ready:
            openvino = _openvino()
            model = self._load(openvino, ragged)
            settings = {
                # The CPU plugin would otherwise choose bf16 where the CPU knows it.
                "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
            }
            compiled = openvino.Core().compile_model(model, "CPU", settings)
            self.ready[ragged, threads] = compiled.create_infer_request()
        return self.ready[ragged, threads]

    def _load(self, openvino, ragged: bool):
        """The graph from the cache, or made and put there."""
        place = cache_folder() / self._key(openvino, ragged) / "graph.xml"
        if place.is_file():
            with contextlib.suppress(RuntimeError):  # damaged: make it again
                return openvino.Core().read_model(place)
            shutil.rmtree(place.parent, ignore_errors=True)
        model = convert(self.generator, self.paste, ragged)
        if self.precision == "int8":
            model = calibrate(model, self.generator, self.rule, ragged)
        with contextlib.suppress(OSError, RuntimeError):  # a place to write is welcome, not needed
            place.parent.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent.parent, prefix=".making-") as scratch:
                fresh = Path(scratch) / "graph"
                fresh.mkdir()
                openvino.save_model(model, fresh / place.name, compress_to_fp16=False)
                os.replace(fresh, place.parent)
            # As any later process will get it: a reloaded graph differs in the last bits.
            return openvino.Core().read_model(place)
        return model

    def _key(self, openvino, ragged: bool) -> str:
        facts = {
            "graph": GRAPH,
            "openvino": openvino.__version__,
            "model": self.generator.config.to_dict(),
            "ragged": ragged,
            "paste": self.paste,
            # In bf16 the graph is that of fp32, compiled otherwise.
            "precision": "int8" if self.precision == "int8" else "fp32",
        }
        if self.precision == "int8":
            facts["rule"] = rule_to_config(self.rule)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, value in sorted(self.generator.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        return f"openvino-{digest.hexdigest()[:32]}"


def cache_folder() -> Path:
    """Where graphs are kept."""
    if given := os.environ.get("PAIR_CACHE"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "pair"


def convert(generator: MaskedAutoencoder, paste: bool = False, ragged: bool = False):
    """Both passes of ``generator`` as an OpenVINO model, sizes of batch and masks left open."""
    openvino = _openvino()
    config = generator.config
    count = config.grid**2
    mask = torch.zeros(2, count, dtype=torch.bool)
    mask[0, : count // 2] = True
    mask[1, : count // 2 + ragged] = True
    example = inputs(torch.zeros(2, count, 3 * config.patch_size**2), mask)
    names = (*NAMES, *RAGGED) if ragged else NAMES
    module = Passes(generator, paste).eval()
    with torch.no_grad(), _no_telemetry(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about sizes that are meant to be fixed
        model = openvino.convert_model(module, example_input=tuple(example[name] for name in names))
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    return model


def calibrate(model, generator: MaskedAutoencoder, rule: MaskRule, ragged: bool = False):
    """The model in int8, ranges taken from photos of the package under masks of ``rule``."""
    try:
        with _no_telemetry(), contextlib.redirect_stdout(io.StringIO()):
            import nncf
    except ImportError as error:
        raise ValueError("int8 needs nncf: pip install nncf") from error
    config = generator.config
    photos = [path for path, _ in pool()][:CALIBRATION]
    seeded = torch.Generator().manual_seed(0)
    size = 4 if ragged else 1  # one by one, every count that the rule draws occurs

    def sample(start: int) -> dict[str, Any]:
        images = load_batch(photos[start : start + size], config.image_size)
        mask = rule(len(images), config.grid, generator=seeded)
        while ragged and bool((mask.sum(1) == mask.sum(1)[0]).all()):
            mask = Bernoulli(0.5)(len(images), config.grid, generator=seeded)
        given = inputs(patchify(images, config.patch_size), mask)
        return {name: value.numpy() for name, value in given.items()}

    starts = list(range(0, len(photos), size))
    with _no_telemetry(), contextlib.redirect_stdout(io.StringIO()):
        nncf.set_log_level(40)  # errors
        return nncf.quantize(
            model,
            nncf.Dataset(starts, sample),
            subset_size=len(starts),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
        )


def _openvino():
    try:
        with _no_telemetry():
            import openvino

            return openvino
    except ImportError as error:
        raise ValueError(
            "the backend 'openvino' needs openvino: pip install 'pair-retrieval[openvino]'"
        ) from error


@contextlib.contextmanager
def _no_telemetry() -> Iterator[None]:
    """OpenVINO and NNCF report their use to a web service unless this looks like a CI machine."""
    before = {name: os.environ.get(name) for name in ("CI", "NNCF_CI")}
    os.environ.update({name: "true" for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""Decode steps of one token through a model: captured as CUDA graphs, with all that they read in static memory."""

import logging
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from transformers import Cache, StaticCache
from transformers.cache_utils import LinearAttentionLayer, StaticLayer
from transformers.utils import ModelOutput

from .cache import TurboQuantCache
from .sliding import StaticSlidingLayer
from .static import TurboQuantStaticLayer

logger = logging.getLogger(__name__)

# layers that count in device memory alone, and those whose memory at least stays where it is
COUNTED_ON_DEVICE = TurboQuantStaticLayer, StaticLayer
STATIC = *COUNTED_ON_DEVICE, StaticSlidingLayer, LinearAttentionLayer


def fingerprint(model, cache: Cache) -> tuple:
    """What a captured step takes for granted: where weights and tokens lie, and how the model computes."""
    weights = (*model.parameters(), *model.buffers())
    tokens = (x for layer in cache.layers for x in _tensors(layer))
    modes = model.config._attn_implementation, model.training, torch.is_inference_mode_enabled()
    return (*modes, *(x.data_ptr() for x in weights), *(x.data_ptr() for x in tokens))


def _tensors(layer) -> list[torch.Tensor]:
    held = layer.arena if isinstance(layer, TurboQuantStaticLayer) else vars(layer)
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)]


class Graph:
    """
    A CUDA graph of `run`, which returns a tensor: always the same one. `cache` is the one that it appends to: of what
    `run` does on the host to count its tokens, capturing leaves nothing, and every replay does it again.
    """

    def __init__(self, run: Callable[[], torch.Tensor], cache: Cache):
        lengths = [getattr(layer, "cumulative_length_int", None) for layer in cache.layers]
        self.graph = torch.cuda.CUDAGraph()
        try:
            # other threads, of streamers for example, may use the GPU meanwhile
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.out = run()
        except BaseException:
            # torch leaves its generator waiting for the end of the capture
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        finally:
            for layer, length in zip(cache.layers, lengths, strict=True):
                if length is not None:
                    layer.cumulative_length_int = length

    def replay(self, cache: Cache) -> torch.Tensor:
        """One step; raises a `ValueError` where the cache has no room for it."""
        ours = [layer for layer in cache.layers if isinstance(layer, TurboQuantStaticLayer)]
        for layer in ours:
            layer.find_room(1)
        self.graph.replay()
        for layer in ours:
            layer.count(1)
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int += 1
        return self.out

    @staticmethod
    def warm(run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`run` on another stream, as torch wants it before a capture: libraries make themselves ready there."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            out = run()
        current.wait_stream(stream)
        out.record_stream(current)
        return out

    @staticmethod
    def runs_on(model) -> bool:
        """Whether all of the model is on one GPU."""
        devices = {parameter.device for parameter in model.parameters()}
        return len(devices) == 1 and devices.pop().type == "cuda"


class Steps:
    """
    Steps over one cache. The first one of its kind runs as it is, the second is captured, all others replay that.

    What `prepare_inputs_for_generation` makes for a step, the mask above all, is made within the graph where the cache
    counts in device memory and nothing but the token and its position differs from step to step; else before each
    step, as `generate` does, and copied to where the graph reads it.

    Args:
        fingerprint (`tuple`): of model and cache; with another one these steps are of no use.
    """

    def __init__(self, fingerprint: tuple):
        self.fingerprint = fingerprint
        # what a graph reads, and its shapes
        self.static: dict | None = None
        self.shapes: tuple | None = None
        # by what the host knows of sliding layers; `None` before the second step of a kind
        self.graphs: dict[tuple, Graph | None] = {}
        self.failed = False
        self.finish()

    def finish(self) -> None:
        """Lets go of everything that is not needed for the next request."""
        self.model = self.cache = self.name = self.model_kwargs = None

    def start(self, model, name: str, model_kwargs: dict) -> None:
        """After a prefill; `model_kwargs` as `generate` has them for the next step, the cache under `name`."""
        self.model, self.name, self.model_kwargs = model, name, model_kwargs
        self.cache = cache = model_kwargs[name]
        kinds = {type(layer) for layer in cache.layers}
        stays = isinstance(cache, (TurboQuantCache, StaticCache)) and kinds <= set(STATIC)
        self.can_capture = stays and cache.is_compileable and Graph.runs_on(model)
        others = {key: x for key, x in model_kwargs.items() if key not in (name, "attention_mask", "position_ids")}
        moving = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(others))
        self.inside = stays and kinds <= set(COUNTED_ON_DEVICE) and not moving
        self.fresh = True

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of the next token, of shape `[batch, vocab_size]`, after the last of `input_ids` `[batch, tokens]`."""
        captures = self.can_capture and not self.failed
        if self.inside:
            if self.fresh:
                self._load(self._at_start(input_ids))
            self.fresh = False
            self.static["input_ids"].copy_(input_ids[:, -1:])
        elif captures:
            inputs = self._prepare(input_ids, self.model_kwargs)
            del inputs[self.name]
            self._load(inputs)
        else:
            outputs = self.model(**self._prepare(input_ids, self.model_kwargs), return_dict=True)
            self._go_on(outputs)
            return outputs.logits[:, -1]
        logits = self._captured() if captures else self._run()
        if not self.inside:
            self._go_on(ModelOutput())
        return logits

    def _prepare(self, input_ids: torch.Tensor, model_kwargs: dict) -> dict:
        return self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)

    def _go_on(self, outputs: ModelOutput) -> None:
        self.model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self.model_kwargs)

    def _at_start(self, input_ids: torch.Tensor) -> dict:
        """Token, position, and a mask for the whole room: which of its tokens are there yet, the cache knows."""
        static = {"input_ids": input_ids[:, -1:]}
        position, mask = (self.model_kwargs.get(key) for key in ("position_ids", "attention_mask"))
        if position is not None:
            static["position_ids"] = position[..., -1:]
        if mask is not None:
            room = self.cache.layers[0].max_cache_len - mask.shape[1]
            static["attention_mask"] = torch.nn.functional.pad(mask, (0, max(room, 0)), value=1)
        return static

    def _load(self, inputs: dict) -> None:
        """Copies `inputs` to static memory; where its shapes change, to another, and nothing is captured any more."""
        leaves, spec = tree_flatten(inputs)
        shapes = spec, [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves]
        if shapes != self.shapes:
            self.shapes, self.static = shapes, tree_map_only(torch.Tensor, torch.clone, inputs)
            self.graphs.clear()
            return
        for held, new in zip(tree_leaves(self.static), leaves, strict=True):
            if isinstance(held, torch.Tensor):
                held.copy_(new)

    def _run(self) -> torch.Tensor:
        inputs = {**self.static, self.name: self.cache}
        if self.inside:
            inputs = self._prepare(self.static["input_ids"], {**self.model_kwargs, **self._rest()})
        logits = self.model(**inputs, return_dict=True).logits[:, -1]
        if self.inside and "position_ids" in self.static:
            self.static["position_ids"].add_(1)
        return logits

    def _rest(self) -> dict:
        return {key: value for key, value in self.static.items() if key != "input_ids"}

    def _captured(self) -> torch.Tensor:
        sliding = (layer for layer in self.cache.layers if isinstance(layer, StaticSlidingLayer))
        # a full window rolls
        kind = tuple(layer.cumulative_length_int >= layer.max_cache_len for layer in sliding)
        if kind not in self.graphs:
            self.graphs[kind] = None
            return Graph.warm(self._run)
        if self.graphs[kind] is None:
            try:
                self.graphs[kind] = Graph(self._run, self.cache)
            except Exception as error:
                # whatever it is that a model does and no graph can hold
                self.failed = True
                while error.__context__ is not None:
                    # torch says after that only that the capture has failed
                    error = error.__context__
                reason = str(error).strip().splitlines() or [type(error).__name__]
                logger.warning("Steps of %s go on uncaptured: %s", type(self.model).__name__, reason[0])
                return self._run()
        return self.graphs[kind].replay(self.cache)

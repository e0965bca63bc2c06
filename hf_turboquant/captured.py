"""Decode steps of one token through a model, captured as CUDA graphs that read only static memory."""

import logging
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from transformers import Cache, StaticCache
from transformers.cache_utils import LinearAttentionLayer, StaticLayer
from transformers.utils import ModelOutput

from .cache import TurboQuantCache
from .hybrid import TurboQuantHybridLayer
from .layer import TurboQuantLayer
from .sliding import StaticSlidingLayer

logger = logging.getLogger(__name__)

# Layers of fixed capacity: the first kind counts tokens in device memory, the second at least keeps its addresses.
COUNTED_ON_DEVICE = TurboQuantLayer, StaticLayer
STATIC = *COUNTED_ON_DEVICE, StaticSlidingLayer, LinearAttentionLayer, TurboQuantHybridLayer


def fingerprint(model, cache: Cache) -> tuple:
    """What a captured step relies on: the addresses of weights and tokens, and how the model computes."""
    weights = (*model.parameters(), *model.buffers())
    tokens = (x for layer in cache.layers for x in _tensors(layer))
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    modes = model.config._attn_implementation, model.training, torch.is_inference_mode_enabled(), autocast
    return (*modes, *(x.data_ptr() for x in weights), *(x.data_ptr() for x in tokens))


def _tensors(layer) -> list[torch.Tensor]:
    held = vars(layer)
    if isinstance(layer, TurboQuantLayer) and layer.fixed:
        held = [layer.tokens.arena, held.get("conv_states"), held.get("recurrent_states")]
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)]


class Graph:
    """
    A CUDA graph of `run`, whose result is always in the same tensor. `run` appends to `cache`, whose token counts on
    the host are restored after the capture and updated by every replay.
    """

    def __init__(self, run: Callable[[], torch.Tensor], cache: Cache):
        lengths = [getattr(layer, "cumulative_length_int", None) for layer in cache.layers]
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as those of streamers, may use the GPU meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.out = run()
        except BaseException:
            # torch leaves its generator waiting for the end of the capture.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        finally:
            for layer, length in zip(cache.layers, lengths, strict=True):
                if length is not None:
                    layer.cumulative_length_int = length

    def replay(self, cache: Cache) -> torch.Tensor:
        """Runs one step; raises a `ValueError` if the cache has no capacity left for it."""
        ours = [layer for layer in cache.layers if isinstance(layer, TurboQuantLayer)]
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
        """Calls `run` on another stream, as torch requires before a capture, so that libraries initialise there."""
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


def store_prompt(cache: Cache) -> None:
    """Quantizes the prompt where a layer has deferred that."""
    for layer in cache.layers:
        if isinstance(layer, TurboQuantLayer):
            layer.settle()


class Steps:
    """
    Steps over one cache. The first step of its kind runs eagerly, the second is captured, all others replay it.

    The inputs that `prepare_inputs_for_generation` makes for a step, above all the mask, are made within the graph if
    the cache counts in device memory and nothing but the token and its position differs from step to step. Otherwise
    they are made before each step, as `generate` does, and copied to where the graph reads them.

    Args:
        fingerprint (`tuple`): of model and cache; if it changes, these steps cannot be used.
    """

    def __init__(self, fingerprint: tuple):
        self.fingerprint = fingerprint
        # What a graph reads, in memory that stays, and its shapes.
        self.static: dict | None = None
        self.shapes: tuple | None = None
        # By which sliding windows are full; `None` before the second step of a kind.
        self.graphs: dict[tuple, Graph | None] = {}
        self.failed = False
        self.finish()

    def finish(self) -> None:
        """Releases everything that the next request does not need."""
        self.model = self.cache = self.name = self.model_kwargs = None

    def start(self, model, name: str, model_kwargs: dict, input_ids: torch.Tensor) -> None:
        """Starts after a prefill, with `generate`'s `model_kwargs` for the next step and the cache under `name`."""
        self.model, self.name, self.model_kwargs = model, name, model_kwargs
        self.cache = cache = model_kwargs[name]
        kinds = {type(layer) for layer in cache.layers}
        fixed = isinstance(cache, TurboQuantCache) and cache.options.max_cache_len is not None
        stays = (fixed or isinstance(cache, StaticCache)) and kinds <= set(STATIC)
        self.can_capture = stays and cache.is_compileable and Graph.runs_on(model)
        others = {key: x for key, x in model_kwargs.items() if key not in (name, "attention_mask", "position_ids")}
        moving = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(others))
        self.inside = stays and kinds <= set(COUNTED_ON_DEVICE) and not moving
        store_prompt(cache)
        if self.inside:
            self._load(self._at_start(input_ids))

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of the next token, of shape `[batch, vocab_size]`, after the last of `input_ids` `[batch, tokens]`."""
        captures = self.can_capture and not self.failed
        if self.inside:
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
        """Token, position, and a mask for the whole capacity; the cache knows which of its tokens exist yet."""
        static = {"input_ids": input_ids[:, -1:]}
        position, mask = (self.model_kwargs.get(key) for key in ("position_ids", "attention_mask"))
        if position is not None:
            static["position_ids"] = position[..., -1:]
        if mask is not None:
            room = self.cache.layers[0].max_cache_len - mask.shape[1]
            static["attention_mask"] = torch.nn.functional.pad(mask, (0, max(room, 0)), value=1)
        return static

    def _load(self, inputs: dict) -> None:
        """Copies `inputs` to static memory; if shapes change, to new memory, and all captured graphs are dropped."""
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
            inputs = self._prepare(inputs.pop("input_ids"), {**self.model_kwargs, **inputs})
        logits = self.model(**inputs, return_dict=True).logits[:, -1]
        if self.inside and "position_ids" in self.static:
            self.static["position_ids"].add_(1)
        return logits

    def _captured(self) -> torch.Tensor:
        sliding = (layer for layer in self.cache.layers if isinstance(layer, StaticSlidingLayer))
        # A full window rolls, which takes another graph.
        kind = tuple(layer.cumulative_length_int >= layer.max_cache_len for layer in sliding)
        if kind not in self.graphs:
            self.graphs[kind] = None
            return Graph.warm(self._run)
        if self.graphs[kind] is None:
            try:
                self.graphs[kind] = Graph(self._run, self.cache)
            except Exception as error:
                # The model does something that no graph can hold.
                self.failed = True
                while error.__context__ is not None:
                    # The last error says only that the capture failed; its context is the cause.
                    error = error.__context__
                reason = str(error).strip().splitlines() or [type(error).__name__]
                logger.warning("Steps of %s go on uncaptured: %s", type(self.model).__name__, reason[0])
                return self._run()
        return self.graphs[kind].replay(self.cache)

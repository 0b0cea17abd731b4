"""Gradient caching: contrastive batches larger than memory, with the gradients of the whole batch.

Source: Gao, Zhang, Han and Callan 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(https://arxiv.org/abs/2101.06983). The towers first run chunk by chunk without a graph; the loss on all representations
gives dL/d(representation); then every chunk runs again, with its own random numbers, and is differentiated with its
rows of that gradient. Peak memory is that of one chunk's graph and of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .gradcache_chunks import Chunk, Tower, is_args_kwargs, map_tensors, plan, tensors
from .gradcache_functional import (
    accelerators,
    autocast,
    autocast_state,
    cached,
    cat_input_tensor,
    gather_input_tensor,
    get_rng,
    rng_kept,
    set_rng,
)

__all__ = ["GradCache", "cached", "cat_input_tensor", "gather_input_tensor"]


class GradCache:
    """A training step on a batch of any size, in chunks that fit in memory.

    Args:
        models: the towers, one per model input; the same module may be given several times.
        chunk_sizes: rows a chunk, for all towers or a list with one number per tower; None only with ``chunk_tokens``.
        loss_fn: ``loss_fn(*representations, **loss_kwargs)``; the representations come one tensor per tower, (B, …), in
            the order of the rows given.
        split_input_fn: ``split_input_fn(model_input, chunk_size)`` → list of chunks, for inputs of other types. Its
            chunks are taken as they are: neither sorted nor trimmed.
        get_rep_fn: model output → tensor (rows, …); by default the model returns it.
        fp16: run models and loss under float16 autocast; needs ``scaler``, by which ``cache_step`` scales the loss.
        scaler: a ``torch.amp.GradScaler``. Unscaling, stepping and updating stay with the caller.
        chunk_tokens: most tokens a chunk (a longer row is a chunk of its own), in addition to ``chunk_sizes``. Tokens
            are counted by the attention_mask where there is one, as rows × size(1) where there isn't.
        memory_budget: bytes that graphs kept from the first run may hold; chunks kept are not run twice. Counted are
            the distinct storages that autograd saves, without parameters, buffers and model inputs. A graph that turns
            out not to fit is dropped while it is built, so the budget holds to one tensor.
        sort_by_length: sort rows by length before chunking, longest first.
        show_progress: a tqdm bar over the chunks of either run.

    A model input is a tensor (``model(x)``), a list (``model(*x)``), a mapping (``model(**x)``) or a tuple ``(args,
    kwargs)``; tensors nested in them are split by rows. Where a mapping has a 2-d ``attention_mask``, each chunk is
    trimmed to the columns that one of its rows uses: the mask, ``inputs_embeds`` and integer tensors (B, L, …). Columns
    on the left stay if the model seems to have absolute positions and gets no ``position_ids``. Outputs that keep
    the token axis, (rows, L, C), are zero in the columns trimmed.

    Gradients are those of the same chunks run in one graph: random numbers (torch's, on the CPU and each device in use)
    and autocast are replayed. After a step torch's generators stand where the first run and the loss left them.
    Modules that change as they run (BatchNorm's averages) change twice for chunks run twice. A tower without
    trainable parameters runs once, without a graph. DDP and FSDP modules, also inside a tower, synchronise once, in
    the last chunk of the last tower that uses them; for DDP this chunk is always run twice.

    Raises:
        TypeError, ValueError: an argument or a model input that is none of the above.
        ImportError: ``show_progress`` without tqdm.
        NotImplementedError: a second derivative through the loss; ``torch.autograd.grad`` on it, for model inputs (for
            parameters torch finds no path: only the replay reaches them); FSDP on several ranks with ``chunk_tokens``
            or ``memory_budget``, by which ranks would run different numbers of chunks.
    """

    def __init__(
        self,
        models: Sequence[Callable[..., Any]],
        chunk_sizes: int | Sequence[int] | None,
        loss_fn: Callable[..., Any],
        split_input_fn: Callable[[Any, int], Sequence[Any]] | None = None,
        get_rep_fn: Callable[[Any], Tensor] | None = None,
        fp16: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        *,
        chunk_tokens: int | None = None,
        memory_budget: float | None = None,
        sort_by_length: bool = True,
        show_progress: bool = False,
    ) -> None:
        if not isinstance(models, (list, tuple, nn.ModuleList)) or not all(callable(m) for m in models):
            raise TypeError(f"models: wanted a list of modules, got {type(models).__name__}")
        if not len(models):
            raise ValueError("models: wanted at least one, got none")
        for name, fn in (("loss_fn", loss_fn), ("split_input_fn", split_input_fn), ("get_rep_fn", get_rep_fn)):
            if not callable(fn) and (fn is not None or name == "loss_fn"):
                raise TypeError(f"{name}: wanted a callable, got {type(fn).__name__}")
        if chunk_sizes is None and chunk_tokens is None:
            raise ValueError("chunk_sizes: wanted an int or a list of ints, got None without chunk_tokens")
        if chunk_tokens is not None and split_input_fn is not None:
            raise ValueError("chunk_tokens: split_input_fn splits by chunk_sizes alone; give one of the two")
        if fp16 and scaler is None:
            raise ValueError("scaler: fp16=True needs a GradScaler, got None")
        if not isinstance(memory_budget, (int, float, type(None))) or isinstance(memory_budget, bool):
            raise TypeError(f"memory_budget: wanted bytes as a number, got {type(memory_budget).__name__}")
        if memory_budget is not None and not memory_budget >= 0:
            raise ValueError(f"memory_budget: wanted 0 bytes or more, got {memory_budget}")
        sizes: list[Any] = [*chunk_sizes] if isinstance(chunk_sizes, (list, tuple)) else [chunk_sizes] * len(models)
        if len(sizes) != len(models):
            raise ValueError(f"chunk_sizes: wanted one per model ({len(models)}), got {len(sizes)}")
        self.models = models
        self.chunk_sizes = [size if chunk_sizes is None else _positive("chunk_sizes", size) for size in sizes]
        self.chunk_tokens = None if chunk_tokens is None else _positive("chunk_tokens", chunk_tokens)
        self.loss_fn = loss_fn
        self.split_input_fn = split_input_fn
        self.get_rep_fn = get_rep_fn
        self.fp16 = fp16
        self.scaler = scaler
        self.memory_budget = memory_budget or 0
        self.sort_by_length = sort_by_length
        self._progress: Callable[..., Any] = _tqdm() if show_progress else lambda chunks, **_: chunks

    def cache_step(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Tensor:
        """Accumulate the gradients of the loss into the towers' parameters and return the loss, detached.

        With ``fp16`` the gradients are those of ``scaler.scale(loss)``; the loss returned is unscaled. DDP synchronises
        once whatever ``no_sync_except_last`` says: when True, every model must have ``no_sync``, else TypeError.
        """
        loss = self(*model_inputs, no_sync_except_last=no_sync_except_last, **loss_kwargs)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn: cache_step wants it to return a tensor, got {type(loss).__name__}")
        (self.scaler.scale(loss) if self.fp16 and self.scaler is not None else loss).backward()
        return loss.detach()

    def __call__(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Any:
        """Return what ``loss_fn`` returns; its ``backward()`` replays the chunks and accumulates the gradients.

        The loss may be scaled, weighted or added to others first. It keeps the model inputs and, within
        ``memory_budget``, the graphs. Don't change parameters or train/eval mode before the backward.
        """
        if len(model_inputs) != len(self.models):
            raise ValueError(f"model_inputs: wanted one per model ({len(self.models)}), got {len(model_inputs)}")
        if no_sync_except_last:
            for model in self.models:
                if not hasattr(model, "no_sync"):
                    raise TypeError(f"no_sync_except_last: wanted DistributedDataParallel, got {type(model).__name__}")
        step = _Step(self, model_inputs)
        reps = step.first_run()
        if any(step.trainable):
            anchor = torch.empty(0, requires_grad=True)
            given = [rep if train else None for rep, train in zip(reps, step.trainable, strict=True)]
            attached = _Replay.apply(step, anchor, given, *(x for x, _ in step.leaves))
            reps = [rep if new is None else new for rep, new in zip(reps, attached, strict=True)]
        with self._fp16_autocast(step.device_type):
            return self.compute_loss(*reps, **loss_kwargs)

    # Subclasses may override these three, as luyug's allow.
    def model_call(self, model: Callable[..., Any], model_input: Any) -> Any:
        """Call ``model`` with a chunk, unpacked by its type."""
        if isinstance(model_input, Tensor):
            return model(model_input)
        if isinstance(model_input, list):
            return model(*model_input)
        if isinstance(model_input, Mapping):
            return model(**model_input)
        if is_args_kwargs(model_input):
            return model(*model_input[0], **model_input[1])
        got = type(model_input).__name__
        raise TypeError(f"model_inputs: wanted a tensor, list, mapping or (args, kwargs), got {got}")

    def get_reps(self, model_out: Any) -> Tensor:
        """The representations, (rows, …), of a chunk's model output."""
        return model_out if self.get_rep_fn is None else self.get_rep_fn(model_out)

    def compute_loss(self, *reps: Tensor, **loss_kwargs: Any) -> Any:
        """The loss of the whole batch's representations."""
        return self.loss_fn(*reps, **loss_kwargs)

    def _fp16_autocast(self, device_type: str) -> AbstractContextManager[Any]:
        return torch.autocast(device_type, dtype=torch.float16) if self.fp16 else nullcontext()


class _Step:
    """One batch: its chunks, and what must be the same when they run again."""

    def __init__(self, cache: GradCache, model_inputs: Sequence[Any]) -> None:
        self.cache = cache
        self.leaves: list[tuple[Tensor, Tensor]] = []  # inputs that need gradients, and the leaves that collect them
        self.trainable: list[bool] = []
        inputs = []
        for model, x in zip(cache.models, model_inputs, strict=True):
            needed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors(x))
            inputs.append(map_tensors(self._leaf, x) if needed else x)
            frozen = isinstance(model, nn.Module) and not any(p.requires_grad for p in model.parameters())
            self.trainable.append(needed or (torch.is_grad_enabled() and not frozen))
        modules = [m for m in cache.models if isinstance(m, nn.Module)]
        self.given = [*chain.from_iterable((*m.parameters(), *m.buffers()) for m in modules)]
        self.given += chain.from_iterable(tensors(x) for x in inputs)
        self.devices = accelerators(self.given)
        self.device_type = self.devices[0].type if self.devices else "cpu"
        self.autocast = autocast_state(self.device_type)
        self.points = [_sync_points(m) for m in cache.models]
        self.towers = [self._chunks(tower, x) for tower, x in enumerate(inputs)]
        self._prepare_distributed()

    def _chunks(self, tower: int, x: Any) -> Tower:
        cache, size = self.cache, self.cache.chunk_sizes[tower]
        if cache.split_input_fn is not None:
            return Tower([Chunk(tower, partial(_same, part)) for part in cache.split_input_fn(x, size or 0)])
        return plan(tower, cache.models[tower], x, size=size, tokens=cache.chunk_tokens, sort=cache.sort_by_length)

    def _leaf(self, t: Tensor) -> Tensor:
        if not t.requires_grad:
            return t
        self.leaves.append((t, t.detach().requires_grad_()))
        return self.leaves[-1][1]

    def _prepare_distributed(self) -> None:
        points = {p: None for tower in self.points for p in tower}
        uneven = self.cache.memory_budget > 0 or self.cache.chunk_tokens is not None
        for point in points:
            if hasattr(point, "set_requires_gradient_sync") and uneven and dist.get_world_size() > 1:
                raise NotImplementedError(
                    "FSDP gathers parameters whenever a chunk runs, so ranks must run equally many: use chunk_sizes "
                    "and equal batches, without chunk_tokens or memory_budget"
                )
            # DDP regroups its buckets, a collective, in its second forward pass with gradients. Which chunk that would
            # be depends on the rank, so it is done here, where it is not.
            if self.cache.memory_budget > 0 and hasattr(point, "reducer"):
                point.reducer._rebuild_buckets()
        # DDP arms its reducer in the forward pass, and every backward after it counts: the forward pass that is to
        # synchronise must come after all other backwards.
        for last in self._last_uses(c for t in self.towers for c in t.chunks if self.trainable[c.tower]).values():
            last.keep = not any(hasattr(p, "no_sync") for p in self.points[last.tower])

    def _last_uses(self, chunks: Iterable[Chunk]) -> dict[Any, Chunk]:
        return {point: chunk for chunk in chunks for point in self.points[chunk.tower]}

    def first_run(self) -> list[Tensor]:
        """Every tower's representations, (B, …), detached and in the order given."""
        meter = _Meter(self.cache.memory_budget, self.given)
        reps: list[list[Tensor]] = [[] for _ in self.towers]
        rate = [0.0] * len(self.towers)  # bytes of graph an input element, from the tower's last chunk tried
        mode = None
        for chunk in self.cache._progress([c for t in self.towers for c in t.chunks], desc="GradCache: first run"):
            chunk.rng = get_rng(self.devices)
            inputs = chunk.inputs()
            size = sum(t.numel() for t in tensors(inputs))
            tried = self.trainable[chunk.tower] and chunk.keep and rate[chunk.tower] * size < meter.room
            if mode is not tried:
                torch.clear_autocast_cache()  # older torch serves weights cast under no_grad (pytorch#158232)
                mode = tried
            with torch.set_grad_enabled(tried), _no_sync(self.points[chunk.tower]):
                if tried:
                    with meter.chunk() as graph:
                        rep = self._embed(chunk, inputs)
                    rate[chunk.tower] = graph.bytes / max(size, 1)
                    chunk.graph = rep if graph.fits and rep.requires_grad else None
                else:
                    rep = self._embed(chunk, inputs)
            chunk.rows = rep.shape[0]
            reps[chunk.tower].append(rep.detach())
        torch.clear_autocast_cache()
        return [tower.assemble(parts) for tower, parts in zip(self.towers, reps, strict=True)]

    def replay(self, d_reps: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Differentiates every chunk; d_reps: one (B, …) per tower, or None. Returns the gradients of the leaves."""
        work: list[tuple[Chunk, Tensor]] = []
        for tower, d_rep in zip(self.towers, d_reps, strict=True):
            work += [] if d_rep is None else zip(tower.chunks, tower.split(d_rep), strict=True)
        work.sort(key=lambda item: item[0].graph is None)  # kept graphs first: their memory serves the replays
        last_uses = self._last_uses(chunk for chunk, _ in work)
        # Backward runs outside autocast, as after the usual `with autocast` block. This outer scope also carries the
        # weights that autocast has cast from chunk to chunk.
        with rng_kept(self.devices), autocast(self.autocast, enabled=False):
            for chunk, d_rep in self.cache._progress(work, desc="GradCache: gradients"):
                with _no_sync(p for p in self.points[chunk.tower] if last_uses[p] is not chunk):
                    rep, chunk.graph = chunk.graph, None
                    if rep is None:
                        assert chunk.rng is not None
                        set_rng(chunk.rng)
                        with torch.enable_grad(), autocast(self.autocast):
                            rep = self._embed(chunk, chunk.inputs())
                    if rep.requires_grad:
                        torch.autograd.backward(rep, d_rep)
                    rep = None  # its graph goes before the next chunk's comes
        grads = [leaf.grad for _, leaf in self.leaves]
        for _, leaf in self.leaves:
            leaf.grad = None
        return grads

    def _embed(self, chunk: Chunk, inputs: Any) -> Tensor:
        with self.cache._fp16_autocast(self.device_type):
            out = self.cache.model_call(self.cache.models[chunk.tower], inputs)
        rep = self.cache.get_reps(out)
        if not isinstance(rep, Tensor) or rep.dim() == 0:
            got = "a scalar" if isinstance(rep, Tensor) else type(rep).__name__
            raise TypeError(f"get_rep_fn: wanted a tensor (rows, …) from the output of model {chunk.tower}, got {got}")
        return rep


class _Replay(torch.autograd.Function):
    """Hands out the representations; its backward replays their chunks."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, step: _Step, anchor: Tensor, reps: list[Tensor | None], *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.step = step
        ctx.set_materialize_grads(False)  # a tower that the loss doesn't use is not replayed
        return tuple(reps)

    @staticmethod
    def backward(ctx: Any, *d_reps: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("GradCache has no second derivative: its graphs are gone after the backward")
        if not torch.autograd._is_checkpoint_valid():  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                "GradCache accumulates into .grad: use loss.backward() without inputs=, not torch.autograd.grad"
            )
        return None, None, None, *ctx.step.replay(d_reps)


class _Meter:
    """Counts the bytes that autograd saves, and drops a graph as soon as it exceeds the room left."""

    def __init__(self, budget: float, given: Iterable[Tensor]) -> None:
        self.room = budget
        self.counted = {key for t in given for key, _ in _storages(t)} if budget else set()

    @contextmanager
    def chunk(self) -> Iterator[_Graph]:
        graph = _Graph(self.room, self.counted)
        with torch.autograd.graph.saved_tensors_hooks(graph.pack, _unpack):
            yield graph
        if graph.fits:
            self.room -= graph.bytes
            self.counted |= graph.storages
        graph.saved.clear()  # from here on, only the graph owns them


@dataclass(eq=False)
class _Saved:
    tensor: Tensor | None
    version: int


class _Graph:
    def __init__(self, room: float, counted: set[int]) -> None:
        self.room, self.counted = room, counted
        self.bytes, self.fits = 0, True
        self.storages: set[int] = set()
        self.saved: list[_Saved] = []

    def pack(self, t: Tensor) -> _Saved | None:
        if not self.fits:
            return None
        for key, size in _storages(t):
            if key not in self.storages and key not in self.counted:
                self.storages.add(key)
                self.bytes += size
        if self.bytes > self.room:
            self.fits = False
            for saved in self.saved:
                saved.tensor = None
            return None
        self.saved.append(_Saved(t.detach(), t._version))  # detached: an output would hold its own node alive
        return self.saved[-1]


def _unpack(saved: _Saved) -> Tensor:
    assert saved.tensor is not None
    if saved.tensor._version != saved.version:  # torch checks this only for tensors it packs itself
        raise RuntimeError("a tensor saved in a graph that GradCache kept was modified in place before the backward")
    return saved.tensor


def _storages(t: Tensor) -> Iterator[tuple[int, int]]:
    """(address, bytes) of what a tensor lies in; several for subclasses that hold tensors, as DTensor does."""
    if hasattr(t, "__tensor_flatten__"):
        for inner in (getattr(t, name) for name in t.__tensor_flatten__()[0]):
            yield from _storages(inner) if isinstance(inner, Tensor) else ()
    else:
        storage = t.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def _same(x: Any) -> Any:
    return x


def _sync_points(model: Any) -> list[Any]:
    """The DDP and FSDP modules in a model."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [m for m in modules if hasattr(m, "no_sync") or hasattr(m, "set_requires_gradient_sync")]


@contextmanager
def _no_sync(points: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for point in points:
            if hasattr(point, "no_sync"):
                stack.enter_context(point.no_sync())
            else:
                point.set_requires_gradient_sync(False)
                stack.callback(point.set_requires_gradient_sync, True)
        yield


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: wanted 1 or more, got {value}")
    return value


def _tqdm() -> Callable[..., Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("show_progress=True needs tqdm: pip install tqdm") from error
    return tqdm  # type: ignore[no-any-return]

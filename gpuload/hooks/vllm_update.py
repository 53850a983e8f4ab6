"""vLLM: weights that were swapped in at the server, into a running engine, and no key or value of the old ones left.

vLLM holds what it made of the weights: cut, fused, quantised. So they are loaded into place again, by copies out of the
server's memory, through vLLM's own `reload_weights`; addresses stay, and captured graphs with them. Its prefix cache
knows nothing of weights: blocks of before would be taken for prompts of after (as InternLM/lmdeploy#4917 tells), so it
is emptied before the next step. Start the engine with `worker_extension_cls=EXTENSION` (`--worker-extension-cls`), so
that its workers know the method.

HOOKS.md says which versions it ran with.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from gpuload.errors import BusyError, GpuloadError
from gpuload.hooks.update import UPDATE_S, leased, tensors_of
from mfs.errors import UsageError

EXTENSION = "gpuload.hooks.vllm_update.WorkerExtension"


def update_weights(worker: Any, model: str, digest: str | None = None, socket_path: str | None = None) -> str:
    """In one worker, between two steps: what is resident as `model`, into its parameters. Returns the digest.

    To be called by `collective_rpc`, in every worker with one digest; `update` does that, and empties caches.
    digest: as for `attach`. Raises: as `attach`, before anything is changed; whatever vLLM raises, and then the
        worker's weights are neither the old nor the new ones.
    """
    reload = getattr(getattr(worker, "model_runner", None), "reload_weights", None)
    known = inspect.signature(reload).parameters if reload is not None else {}
    if "weights_iterator" not in known:
        raise UsageError("this vLLM's model runner has no reload_weights(weights_iterator=...); that of 0.32 has")
    from gpuload.client.attached import close_left

    try:
        weights = tensors_of(model, digest, socket_path)
        worker.reload_weights(weights_iterator=weights)
        del weights
    finally:
        close_left()
    return digest or ""


class WorkerExtension:
    """What vLLM mixes into its worker class."""

    def gpuload_update(self, model: str, digest: str | None = None, socket_path: str | None = None) -> str:
        return update_weights(self, model, digest, socket_path)


def update(llm: Any, model: str, *, socket_path: str | None = None) -> str:
    """Put what is resident as `model` into all workers of a `vllm.LLM`, and empty its caches. Returns the digest.

    Between two calls of `generate`: nothing else uses the engine then.
    Raises: as `attach`, before anything is changed; GpuloadError where workers failed, or BusyError where caches are in
        use: do not generate with this engine then.
    """
    with leased(model, socket_path) as digest:
        arguments = (model, digest, socket_path)
        try:
            llm.collective_rpc("gpuload_update", timeout=UPDATE_S, args=arguments)
        except Exception as error:
            raise _mixed(model, error) from error
    if not llm.reset_prefix_cache():
        raise _in_use(model)
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    return digest


async def update_async(engine: Any, model: str, *, socket_path: str | None = None, timeout_s: float = UPDATE_S) -> str:
    """The same for a `vllm.AsyncLLM` that is answering: requests that are under way are finished with the old weights,
    later ones wait and are answered by the new.

    timeout_s: longest wait for requests to finish, and for the workers.
    Raises: as `update`; BusyError too if requests do not finish, which changes nothing. Where workers failed the engine
        stays paused.
    """
    try:
        await asyncio.wait_for(engine.pause_generation(mode="wait", clear_cache=True), timeout_s)
    except TimeoutError:
        await engine.resume_generation()
        raise BusyError(f"{model!r} was not updated: requests were still under way after {timeout_s:.0f} s") from None
    loop = asyncio.get_running_loop()
    lease = leased(model, socket_path)
    try:
        digest = await loop.run_in_executor(None, lease.__enter__)
    except BaseException:
        await engine.resume_generation()
        raise
    try:
        try:
            await engine.collective_rpc("gpuload_update", timeout=timeout_s, args=(model, digest, socket_path))
        except Exception as error:
            raise _mixed(model, error) from error
        if not await engine.reset_prefix_cache():
            raise _in_use(model)
        await engine.reset_mm_cache()
        await engine.reset_encoder_cache()
    finally:
        lease.__exit__(None, None, None)
    await engine.resume_generation()
    return digest


def _mixed(model: str, error: Exception) -> GpuloadError:
    return GpuloadError(
        f"updating the engine to {model!r} failed in a worker, whose weights may be neither the old nor the new ones:"
        f" update again, or start it anew: {error}"
    )


def _in_use(model: str) -> BusyError:
    return BusyError(
        f"the engine has the weights of {model!r}, but its prefix cache is in use and holds keys and values of the old"
        " ones: finish or abort what is running, then reset_prefix_cache()"
    )

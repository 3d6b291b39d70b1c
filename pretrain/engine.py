"""One face for a single process, DDP and DeepSpeed ZeRO-1/2/3, all through Accelerate.

The loop calls `backward` once or several times and then `step`; which engine reduces what, and when, is decided here.
Parameters stay fp32 under every engine (the towers compute in bf16 by autocast): one numerical path, weights and AdamW
moments that are the same by name under every stage, and a temperature that no bf16 grid rounds.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, nn

from ..datasets.registry import InputError
from .config import Config

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """The prepared module and optimizer.

    Args:
        accelerator: from `build_accelerator`.
        module: everything that trains, in one module (two engines under one Accelerator lose gradients silently).
        optimizer: of `module`'s trainable parameters.
        clip_norm: gradient norm limit or None.
    """

    def __init__(
        self, accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None
    ) -> None:
        for name, parameter in module.named_parameters():
            assert parameter.ndim > 0, f"{name} has no axis: DeepSpeed cannot broadcast it; give it shape (1,)"
        self.accelerator = accelerator
        self.device = accelerator.device
        self.clip_norm = clip_norm
        self.stage = zero_stage(accelerator)
        self.prepared, self.optimizer = accelerator.prepare(module, optimizer)
        self.module: nn.Module = module.to(self.device)
        self.names = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if self.stage:
            self._initialise_moments()

    def __call__(self, *args, **kwargs):
        return self.prepared(*args, **kwargs)

    @contextlib.contextmanager
    def pass_(self, last: bool) -> Iterator[None]:
        """Around one forward and backward of a step; gradients are reduced over ranks in the last pass only
        (ZeRO-2 and 3 reduce every pass, to the same sum)."""
        if self.stage:
            self.prepared.set_gradient_accumulation_boundary(last)
            yield
        elif last or not hasattr(self.prepared, "no_sync"):
            yield
        else:
            with self.prepared.no_sync():
                yield

    @contextlib.contextmanager
    def objective_pass(self) -> Iterator[None]:
        """Around the forward and backward that uses the objective's own parameters only, before those of the towers.

        ZeRO-3 overwrites a step's old gradients in the first pass of the next step, and adds in later ones. The towers
        come in a later pass, so that is told to be a first one too; it leaves out the objective, whose stay.
        """
        with self.pass_(last=False):
            yield
        if self.stage == 3:
            self.prepared.optimizer.zero_grad()  # forgets that a pass was made; the gradients lie elsewhere

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`, as it is: nothing divides it. Inside `pass_`. All ranks."""
        if self.stage:
            self.prepared.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()

    def idle_objective(self) -> Tensor | float:
        """A zero that the objective's own parameters take part in: DDP reduces a parameter in the last pass only if
        that pass used it. ZeRO needs no such thing."""
        if self.stage:
            return 0.0
        return sum(p.sum() for p in self.module.objective.parameters() if p.requires_grad) * 0.0

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the gradient norm over all ranks before clipping. All ranks.

        A norm that is not finite leaves the weights as they are, but under ZeRO, which tells it after the update.
        """
        if self.stage:
            self.prepared.step()
            norm = float(self.prepared.get_global_grad_norm())
            return norm if norm >= 0 else float("nan")  # ZeRO's word for it is -1
        limit = self.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.names.values(), limit)
        if norm.isfinite():  # waits for the GPU
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def after_step(self, progress: float) -> None:
        """Tell the objective that a step was taken; it may read its whole parameters. All ranks."""
        with self._whole(self.module.objective):
            self.module.objective.after_step(progress)

    def weights(self) -> dict[str, Tensor]:
        """The module's whole state dict, on the CPU. All ranks (ZeRO-3 gathers); only the main process keeps it."""
        main = self.accelerator.is_main_process
        state: dict[str, Tensor] = {}
        with self._whole(self.module):
            if main:
                state = {name: x.detach().cpu().clone() for name, x in self.module.state_dict().items()}
        return state

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state by `<kind>/<parameter name>`, full tensors on the CPU, and `steps`. All ranks.

        Empty before the first step.
        """
        if self._steps_taken() == 0:
            return {}
        state = {"steps": torch.tensor([self._steps_taken()], dtype=torch.int64)}
        for name, parameter in self.names.items():
            for kind in MOMENTS:
                full = self._read(parameter, kind)
                if self.accelerator.is_main_process:
                    state[f"{kind}/{name}"] = full.detach().cpu().clone()
        return state

    def load_moments(self, state: dict[str, Tensor]) -> None:
        """Put back what `moments` returned, under any engine and world size. All ranks."""
        expected = {f"{kind}/{name}" for kind in MOMENTS for name in self.names}
        if state and set(state) - {"steps"} != expected:
            odd = sorted((set(state) - {"steps"}) ^ expected)
            raise InputError(
                f"the checkpoint's optimizer state does not fit these trainable parameters ({len(odd)} differ, first "
                f"{odd[0]!r}); resume with the recipe that wrote it, or start a new run with init_from="
            )
        if not state:
            return
        steps = float(state["steps"].item())
        for name, parameter in self.names.items():
            for kind in MOMENTS:
                self._write(parameter, kind, state[f"{kind}/{name}"].to(self.device))
        for slot in self._base_optimizer().state.values():
            slot["step"] = torch.tensor(steps)

    @contextlib.contextmanager
    def _whole(self, module: nn.Module) -> Iterator[None]:
        """Inside, the parameters of `module` are whole on every rank and may be read. All ranks."""
        parameters = list(module.parameters())
        if self.stage != 3 or not parameters:
            yield
            return
        import deepspeed

        # a forward that uses a part of the module leaves the gather of the rest, begun in advance, in flight
        self.prepared.optimizer.empty_partition_cache()
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    # -- where each engine keeps AdamW's moments ------------------------------------------------------------------

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self.prepared.optimizer.optimizer if self.stage else self.optimizer.optimizer

    def _steps_taken(self) -> int:
        slots = list(self._base_optimizer().state.values())
        return int(slots[0]["step"]) if slots and "step" in slots[0] else 0

    def _initialise_moments(self) -> None:
        """Give every flat partition its zero moments now, so that they can be written before the first step."""
        zero, base = self.prepared.optimizer, self._base_optimizer()
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            base.state[flat] = {"step": torch.tensor(0.0)} | {kind: torch.zeros_like(flat) for kind in MOMENTS}

    def _fragment(self, parameter: nn.Parameter, kind: str) -> tuple[Tensor, int] | None:
        """ZeRO-1/2: this rank's piece of a parameter's moment and its offset in the flattened parameter."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self.prepared.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return self._base_optimizer().state[flat][kind].narrow(0, here.start, here.numel), there.start

    def _read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self.stage == 3:
            from deepspeed.utils import safe_get_full_optimizer_state

            return safe_get_full_optimizer_state(parameter, kind)
        if not self.stage:
            return self._base_optimizer().state[parameter][kind]
        full = torch.zeros_like(parameter).flatten()
        if (found := self._fragment(parameter, kind)) is not None:
            piece, start = found
            full.narrow(0, start, piece.numel()).copy_(piece)
        torch.distributed.all_reduce(full)  # all ranks
        return full.view_as(parameter)

    def _write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if self.stage == 3:
            from deepspeed.utils import safe_set_local_optimizer_state

            # the whole-tensor setter fails on ranks that own only padding, so cut this rank's piece here
            size = parameter.ds_tensor.numel()
            padded = torch.zeros(size * self.accelerator.num_processes, dtype=value.dtype, device=value.device)
            padded[: value.numel()] = value.flatten()
            piece = padded.narrow(0, size * self.accelerator.process_index, size)
            safe_set_local_optimizer_state(parameter, piece.contiguous(), kind)
        elif not self.stage:
            slot = self._base_optimizer().state.setdefault(parameter, {})
            slot[kind] = value.clone()
            slot.setdefault("step", torch.tensor(0.0))
        elif (found := self._fragment(parameter, kind)) is not None:
            piece, start = found
            piece.copy_(value.flatten().narrow(0, start, piece.numel()))


def zero_stage(accelerator) -> int:
    plugin = accelerator.state.deepspeed_plugin
    return plugin.zero_stage if plugin is not None else 0


def build_accelerator(config: Config):
    """The Accelerator that the recipe asks for, on whatever the launcher started; asserts that it is that one."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    world = int(os.environ.get("WORLD_SIZE", "1"))
    gpus = torch.cuda.is_available()
    stage = config.distributed.zero
    if stage == "auto":
        stage = 1 if gpus and world > 1 else 0
    group = InitProcessGroupKwargs(
        backend="nccl" if gpus else "gloo", timeout=timedelta(minutes=config.distributed.timeout_minutes)
    )
    tracker = {"log_with": "wandb"} if config.log.wandb else {}
    if stage == 0:
        # buffers are kept equal by their owners (queues, EMA); broadcasting rank 0's would overwrite them
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        accelerator = Accelerator(cpu=not gpus, kwargs_handlers=[group, ddp] if world > 1 else [], **tracker)
    else:
        prepare_deepspeed_environment(gpus)
        accelerator = Accelerator(deepspeed_plugin=_deepspeed_plugin(config, stage), kwargs_handlers=[group], **tracker)
    got = zero_stage(accelerator)
    assert got == stage, f"asked for ZeRO stage {stage}, got {got} ({accelerator.distributed_type})"
    assert accelerator.num_processes == world, (
        f"launched {world} processes, Accelerate sees {accelerator.num_processes}"
    )
    return accelerator


def prepare_deepspeed_environment(gpus: bool) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it Accelerate silently builds plain DDP
        import deepspeed.ops

        # compiled at the first start, which needs a compiler and a path without a space; gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(alone)


def _deepspeed_plugin(config: Config, stage: int):
    from accelerate import DeepSpeedPlugin

    elements = config.distributed.bucket_mb * 1_000_000 // 4
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: Trivium owns the batch
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip_norm or 0.0,  # left out it would be 1.0
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": elements,
            "allgather_bucket_size": elements,
            "stage3_prefetch_bucket_size": elements,
            "stage3_param_persistence_threshold": config.distributed.persist_below,
        },
    }
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)

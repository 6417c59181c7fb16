"""The typed configuration as frozen pydantic models: DeepSpeed's names, types and defaults.

Three defaults are not those of its page: `gradient_clipping` (its program's is meant), and `pin_memory` and
`aio.queue_depth`, which are what is fast here.
Every field has a row in `key_table` (a test holds the two together). `config` fills these models from JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _whole(value: Any) -> Any:
    """`5e8` is a float to JSON and a count to people."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _never(value: Any) -> Any:
    """`inf`, as some write "every so many steps, never"."""
    return None if value == float("inf") else value


def _nothing(value: Any) -> Any:
    """A section that is switched off."""
    return {} if value is None or value is False else value


Int = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Int, Field(ge=1)]
Size = Annotated[Int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rates = Rate | list[Rate]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
Dtype = Literal["fp32", "fp16", "bf16", "float32", "float16", "bfloat16"]


class Section(BaseModel):
    """One object of the JSON file: no unknown names, no silent conversions, no later changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Corrected(Section):
    """What torch's optimizers cannot do otherwise."""

    bias_correction: Literal[True] = True


class AdamParams(Corrected):
    """Constructor arguments of Adam and AdamW."""

    lr: Rate = 1e-3
    betas: Pair = [0.9, 0.999]
    eps: Rate = 1e-8
    weight_decay: Rate = 0.0
    amsgrad: bool = False
    adam_w_mode: bool = True
    torch_adam: bool = False


class SGDParams(Corrected):
    """Constructor arguments of SGD."""

    lr: Rate = 1e-3
    momentum: Rate = 0.0
    dampening: float = 0.0
    weight_decay: Rate = 0.0
    nesterov: bool = False


class AdagradParams(Corrected):
    """Constructor arguments of Adagrad."""

    lr: Rate = 1e-2
    lr_decay: Rate = 0.0
    weight_decay: Rate = 0.0
    initial_accumulator_value: Rate = 0.0
    eps: Rate = 1e-10


class LionParams(Corrected):
    """Constructor arguments of Lion."""

    lr: Rate = 1e-3
    betas: Pair = [0.9, 0.99]
    weight_decay: Rate = 0.0


class CompressedParams(Section):
    """Constructor arguments that the optimizers of comm_compress share."""

    lr: Rate = 1e-3
    betas: Pair = [0.9, 0.999]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Rate = 0.0
    bias_correction: bool = True
    cuda_aware: bool = False
    comm_backend_name: str = "nccl"


class OneBitAdamParams(CompressedParams):
    """Constructor arguments of `comm_compress.OneBitAdam`."""

    freeze_step: Count | None = 100_000


class ZeroOneAdamParams(CompressedParams):
    """Constructor arguments of `comm_compress.ZeroOneAdam`."""

    var_freeze_step: Count = 100_000
    var_update_scaler: Count = 16
    local_step_scaler: Count = 32_678
    local_step_clipper: Count = 16


class OneBitLambParams(OneBitAdamParams):
    """Constructor arguments of `comm_compress.OneBitLamb`."""

    max_coeff: Annotated[float, Field(gt=0)] = 10.0
    min_coeff: Annotated[float, Field(gt=0)] = 0.01
    coeff_beta: Fraction = 0.9
    factor_max: Annotated[float, Field(ge=1)] = 4.0
    factor_min: Annotated[float, Field(gt=0, le=1)] = 0.5
    factor_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1


class LRRangeTestParams(Section):
    """Arguments of `schedules.LRRangeTest`."""

    lr_range_test_min_lr: Rates = 1e-3
    lr_range_test_step_size: Count = 2000
    lr_range_test_step_rate: Rate = 1.0
    lr_range_test_staircase: bool = False


class OneCycleParams(Section):
    """Arguments of `schedules.OneCycle`."""

    cycle_min_lr: Rates
    cycle_max_lr: Rates
    decay_lr_rate: Rate = 0.0
    cycle_first_step_size: Count = 2000
    cycle_second_step_size: Count | None = None
    cycle_first_stair_count: Size = 0
    cycle_second_stair_count: Size | None = None
    decay_step_size: Size = 0
    cycle_momentum: bool = True
    cycle_min_mom: Fraction = 0.8
    cycle_max_mom: Fraction = 0.9
    decay_mom_rate: Rate = 0.0


class WarmupLRParams(Section):
    """Arguments of `schedules.WarmupLR`."""

    warmup_min_lr: Rates = 0.0
    warmup_max_lr: Rates | None = None
    warmup_num_steps: Size = 1000
    warmup_type: Literal["log", "linear"] = "log"


class WarmupDecayLRParams(WarmupLRParams):
    """Arguments of `schedules.WarmupDecayLR`."""

    total_num_steps: Count
    warmup_max_lr: Rates | None = 1e-3


class WarmupCosineLRParams(Section):
    """Arguments of `schedules.WarmupCosineLR`."""

    total_num_steps: Count
    warmup_min_ratio: Rate = 0.0
    warmup_num_steps: Size = 1000
    cos_min_ratio: Rate = 1e-4
    warmup_type: Literal["log", "linear"] = "log"


OPTIMIZERS: dict[str, type[Section]] = {
    "Adam": AdamParams,
    "AdamW": AdamParams,
    "SGD": SGDParams,
    "Adagrad": AdagradParams,
    "Lion": LionParams,
    "OneBitAdam": OneBitAdamParams,
    "ZeroOneAdam": ZeroOneAdamParams,
    "OneBitLamb": OneBitLambParams,
}
SCHEDULERS: dict[str, type[Section]] = {
    "LRRangeTest": LRRangeTestParams,
    "OneCycle": OneCycleParams,
    "WarmupLR": WarmupLRParams,
    "WarmupDecayLR": WarmupDecayLRParams,
    "WarmupCosineLR": WarmupCosineLRParams,
}


class Typed(Section):
    """A section of the shape `{"type": NAME, "params": {...}}`; `params` is one of the models above."""

    type: str
    params: Any


class FP16(Section):
    """Mixed precision with float16 and a loss scale."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: Rate = 0.0
    initial_scale_power: Annotated[Int, Field(ge=0, le=64)] = 16
    loss_scale_window: Count = 1000
    hysteresis: Count = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Annotated[float, Field(gt=0)] = 1.0


class BF16(Section):
    """Mixed precision with bfloat16."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class TorchAutocast(Section):
    """Maths in a lower precision under `torch.autocast`, parameters as they are."""

    enabled: bool = False
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


class DataTypes(Section):
    """Dtype of gradients between two backward passes of one step."""

    grad_accum_dtype: Dtype | None = None


class Offload(Section):
    """Where parameters, or optimizer states and gradients, rest between uses."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    pin_memory: bool = True
    buffer_count: Count = 4

    @model_validator(mode="before")
    @classmethod
    def _somewhere(cls, given: Any) -> Any:
        """A section that says anything is wanted: as documented, "cpu" is where no device is given."""
        return {"device": "cpu", **given} if isinstance(given, dict) and given else given


class OffloadOptimizer(Offload):
    """The optimizer's states and masters, and reduced gradients."""

    ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    fast_init: bool = False
    pipeline: bool = False
    pipeline_read: bool = False
    pipeline_write: bool = False
    super_offload: bool = False
    cpuadam_cores_perc: Annotated[float, Field(gt=0, le=1)] = 0.8


class OffloadParam(Offload):
    """Shards of parameters (stage 3)."""

    buffer_count: Count = 5
    buffer_size: Size = 100_000_000
    max_in_cpu: Size = 1_000_000_000


class ZenFlowSection(Section):
    """What is stepped at once on the device, and how late the rest may be; `zero_offload_nvme.ZenFlow`."""

    topk_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    select_strategy: Literal["auto", "step", "epoch"] = "auto"
    select_interval: Count | Literal["auto"] = "auto"
    update_interval: Count | Literal["auto"] = "auto"
    overlap_step: bool = False
    auto_ratio: Annotated[float, Field(gt=0, le=1)] = 0.99
    full_warm_up_rounds: Size = 0
    pt_reserved_cores_perc: Annotated[float, Field(ge=0, le=1)] = 0.5
    steps_per_epoch: Count | None = None
    late_step: Literal["window", "one"] = "window"


class LoCoSection(Section):
    """Error feedback of quantized gradients; `comm_compress.LoCoPolicy`."""

    err_beta: Fraction = 0.8
    reset_T: Size = 1024


class Aio(Section):
    """How bytes travel between memory and drives."""

    block_size: Annotated[Int, Field(ge=4096, le=1 << 30)] = 1 << 20
    queue_depth: Annotated[Int, Field(ge=1, le=4096)] = 32
    thread_count: Annotated[Int, Field(ge=1, le=256)] = 1
    intra_op_parallelism: Count = 1
    single_submit: bool = False
    overlap_events: bool = True


class Zero(Section):
    """How long full parameters and gradients live, and how their bytes travel."""

    stage: Literal[0, 1, 2, 3] = 0
    overlap_comm: bool | None = None
    reduce_bucket_size: Size | None = None
    stage3_prefetch_bucket_size: Size | None = None
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Size = 500_000_000
    compute_grad_norm: bool = True
    elastic_checkpoint: bool = False
    sub_group_size: Size = 1_000_000_000
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    stage3_param_persistence_threshold: Size = 100_000
    stage3_model_persistence_threshold: Size | None = None
    stage3_max_live_parameters: Size = 1_000_000_000
    stage3_max_reuse_distance: Size = 1_000_000_000
    stage3_module_granularity_threshold: Size = 0
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_gather_fp16_weights_on_model_save: bool = False
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    leaf_module: dict[str, Any] = Field(default_factory=dict)
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    save_muon_momentum_buffer_in_memory: bool = False
    offload_param: Annotated[OffloadParam, BeforeValidator(_nothing)] = OffloadParam()
    offload_optimizer: Annotated[OffloadOptimizer, BeforeValidator(_nothing)] = OffloadOptimizer()
    zenflow: ZenFlowSection = ZenFlowSection()
    zero_hpz_partition_size: Count = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    zero_quantized_if_faster: bool = False
    zeropp_loco_param: LoCoSection = LoCoSection()
    mics_shard_size: Int = -1
    mics_hierarchical_params_gather: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without(cls, given: Any) -> Any:
        """A section that is given is wanted, an empty one too; null is none."""
        if not isinstance(given, dict):
            return given
        none = [name for name in ("zenflow", "zeropp_loco_param") if given.get(name, ...) in (None, False)]
        return {name: value for name, value in given.items() if name not in none}

    @property
    def uses_zenflow(self) -> bool:
        """Whether the section is given."""
        return "zenflow" in self.model_fields_set

    @property
    def offloads(self) -> bool:
        """Whether anything that an optimizer steps rests in a store."""
        return not self.offload_optimizer.device == self.offload_param.device == "none"

    @property
    def keeps_secondary(self) -> bool:
        """Whether weights are gathered for backward within a node."""
        return self.zero_hpz_partition_size > 1

    @property
    def compresses(self) -> bool:
        """Whether anything travels otherwise than as it is."""
        return (
            self.zero_quantized_weights
            or self.zero_quantized_gradients
            or self.zero_quantized_nontrainable_weights
            or self.keeps_secondary
        )

    @property
    def uses_loco(self) -> bool:
        """Whether error feedback of quantized gradients is asked for."""
        return "zeropp_loco_param" in self.model_fields_set


class Throughput(Section):
    """Whether progress lines carry samples per second."""

    enabled: bool = True
    synchronized: bool = True


class Timers(Section):
    """Timers of the engine."""

    throughput: Throughput = Throughput()


class Checkpoint(Section):
    """How checkpoints are named and found."""

    tag_validation: Literal["Ignore", "Warn", "Fail"] = "Warn"
    load_universal: bool = False


class Config(Section):
    """A whole configuration, with DeepSpeed's documented names and defaults."""

    train_batch_size: Count | None = None
    train_micro_batch_size_per_gpu: Count | None = None
    gradient_accumulation_steps: Count | None = None
    optimizer: Typed | None = None
    scheduler: Typed | None = None
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    fp16: FP16 = FP16()
    bf16: BF16 = BF16()
    torch_autocast: TorchAutocast = TorchAutocast()
    data_types: DataTypes = DataTypes()
    gradient_clipping: Rate = 0.0
    communication_data_type: Dtype | None = None
    fp32_allreduce: bool = False
    prescale_gradients: bool = False
    sparse_gradients: bool = False
    disable_allgather: bool = False
    zero_optimization: Zero = Zero()
    seed: Int = 1234
    dataloader_drop_last: bool = False
    steps_per_print: Annotated[Count | None, BeforeValidator(_never)] = 10
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    timers: Timers = Timers()
    checkpoint: Checkpoint = Checkpoint()
    aio: Annotated[Aio, BeforeValidator(_nothing)] = Aio()

"""Every documented DeepSpeed key and what becomes of it: the one table behind errors, `explain` and the docs.

Source: DeepSpeed's public configuration page (deepspeed.ai/docs/config-json) and API reference
(deepspeed.readthedocs.io) of 0.19. The keys that need a package of their own are in `key_table_later`.
"""

from __future__ import annotations

from .key_table_later import LATER
from .keys import Key, KeyTable, Rows, honoured, no_effect, refused

_BUFFERS = "a window and a cache of fixed size bound the memory"
_PIPELINE = "states are always read ahead of their step and written behind it"
_UNITS = "parameters are gathered and freed in whole units (repeated blocks): nothing to tune"
_ONE_GATHER = "a unit is one all-gather, whatever the sizes of its parameters"

_ZERO_ONE = honoured("comm_compress.ZeroOneAdam")
_LAMB = honoured("comm_compress.OneBitLamb")
_MUON = refused("Muon is passed as initialize(optimizer=torch.optim.Muon(...)), with its own arguments", None)

_OPTIMIZER: Rows = {
    "type": honoured('the optimizer\'s class; "Adam" means AdamW unless adam_w_mode is false'),
    "params": {
        "lr": honoured("constructor of the optimizer"),
        "betas": honoured("constructor (Adam, AdamW, Lion, and the 1-bit optimizers)"),
        "eps": honoured("constructor (Adam, AdamW, Adagrad, and the 1-bit optimizers)"),
        "weight_decay": honoured("constructor; absent means 0, as in DeepSpeed (torch's AdamW: 0.01)"),
        "amsgrad": honoured("constructor (Adam, AdamW)"),
        "adam_w_mode": honoured("Adam: decoupled weight decay (true) or L2 added to the gradient (false)"),
        "momentum": honoured("constructor (SGD)"),
        "dampening": honoured("constructor (SGD)"),
        "nesterov": honoured("constructor (SGD)"),
        "lr_decay": honoured("constructor (Adagrad)"),
        "initial_accumulator_value": honoured("constructor (Adagrad)"),
        "bias_correction": honoured("constructor (the 1-bit optimizers); others always correct the bias"),
        "freeze_step": honoured(
            "comm_compress.OneBitAdam, OneBitLamb: steps of warm-up; null: until the variance has settled"
        ),
        "var_freeze_step": _ZERO_ONE,
        "var_update_scaler": _ZERO_ONE,
        "local_step_scaler": _ZERO_ONE,
        "local_step_clipper": _ZERO_ONE,
        "max_coeff": _LAMB,
        "min_coeff": _LAMB,
        "coeff_beta": _LAMB,
        "factor_max": _LAMB,
        "factor_min": _LAMB,
        "factor_threshold": _LAMB,
        "muon_lr": _MUON,
        "adam_lr": _MUON,
        "ns_method": _MUON,
        "per_head_muon": _MUON,
        "cuda_aware": no_effect(
            "signs travel through the process group, whatever its back end; there is no MPI"
        ),
        "comm_backend_name": no_effect(
            "signs travel through the process group, by messages under gloo and all-to-all under NCCL"
        ),
        "torch_adam": no_effect("there is one implementation of each optimizer here: torch's, on the shards"),
        "max_grad_norm": refused("clipping is the engine's: use gradient_clipping", 0),
    },
    "legacy_fusion": refused("there is one implementation of each optimizer", False),
}

_RANGE_TEST = honoured("schedules.LRRangeTest")
_ONE_CYCLE = honoured("schedules.OneCycle")
_WARMUP = honoured("schedules.WarmupLR, WarmupDecayLR")
_ANY_WARMUP = honoured("schedules.WarmupLR, WarmupDecayLR, WarmupCosineLR")
_COSINE = honoured("schedules.WarmupCosineLR")

_SCHEDULER: Rows = {
    "type": honoured("the class in schedules"),
    "params": {
        "lr_range_test_min_lr": _RANGE_TEST,
        "lr_range_test_step_size": _RANGE_TEST,
        "lr_range_test_step_rate": _RANGE_TEST,
        "lr_range_test_staircase": _RANGE_TEST,
        "cycle_min_lr": _ONE_CYCLE,
        "cycle_max_lr": _ONE_CYCLE,
        "cycle_first_step_size": _ONE_CYCLE,
        "cycle_second_step_size": _ONE_CYCLE,
        "cycle_first_stair_count": _ONE_CYCLE,
        "cycle_second_stair_count": _ONE_CYCLE,
        "decay_step_size": _ONE_CYCLE,
        "decay_lr_rate": _ONE_CYCLE,
        "cycle_momentum": _ONE_CYCLE,
        "cycle_min_mom": _ONE_CYCLE,
        "cycle_max_mom": _ONE_CYCLE,
        "decay_mom_rate": _ONE_CYCLE,
        "warmup_min_lr": _WARMUP,
        "warmup_max_lr": _WARMUP,
        "warmup_num_steps": _ANY_WARMUP,
        "warmup_type": _ANY_WARMUP,
        "total_num_steps": honoured("schedules.WarmupDecayLR, WarmupCosineLR"),
        "warmup_min_ratio": _COSINE,
        "cos_min_ratio": _COSINE,
        "last_batch_iteration": refused("the position comes from load_checkpoint()", -1),
    },
}

_FP16: Rows = {
    "enabled": honoured("zero_core.Precision(compute=float16) and a loss scaler"),
    "auto_cast": no_effect("floating-point inputs are always cast to the dtype of the maths"),
    "loss_scale": honoured("zero_core.LossScaler: 0 is dynamic, anything else static"),
    "initial_scale_power": honoured("zero_core.LossScaler(init_scale=2**n)"),
    "loss_scale_window": honoured("zero_core.LossScaler(growth_interval=)"),
    "hysteresis": honoured("zero_core.LossScaler(hysteresis=)"),
    "consecutive_hysteresis": honoured("zero_core.LossScaler(consecutive_hysteresis=)"),
    "min_loss_scale": honoured("zero_core.LossScaler(min_scale=)"),
    "fp16_master_weights_and_grads": refused("masters of fp16 parameters are fp32", False),
}

_BF16: Rows = {
    "enabled": honoured("zero_core.Precision(compute=bfloat16)"),
    "check_grad_overflow": honoured("true: a step with a non-finite gradient is skipped on every rank"),
    "immediate_grad_update": no_effect("a gradient is always handed on as soon as it is ready"),
    "bf16_master_weights_and_grads": honoured(
        "zero_core.Precision(master=bfloat16); with bf16_optimizer_states"
    ),
    "bf16_optimizer_states": honoured("follows the master's dtype; with bf16_master_weights_and_grads"),
}

_AUTOCAST: Rows = {
    "enabled": honoured("zero_core.Precision(param=float32, compute=dtype): forward under torch.autocast"),
    "dtype": honoured("zero_core.Precision(compute=)"),
    "lower_precision_safe_modules": refused("gradients of all modules travel in one dtype", None),
}

_ZERO: Rows = {
    "stage": honoured(
        "zero_core.shard(stage=); in place of the whole section, true is stage 1 and false stage 0"
    ),
    "overlap_comm": honoured("zero_core.Overlap(enabled=); absent means true (the results are the same)"),
    "reduce_bucket_size": honoured("zero_core.Overlap(reduce_bytes=): elements x bytes on the wire"),
    "stage3_prefetch_bucket_size": honoured("zero_core.Overlap(prefetch_bytes=): elements x bytes of one"),
    "contiguous_gradients": no_effect("gradients always accumulate in one contiguous buffer per unit"),
    "reduce_scatter": no_effect("stages 1-3 reduce-scatter and stage 0 all-reduces; the values are the same"),
    "use_multi_rank_bucket_allreduce": no_effect("one reduce-scatter serves all ranks"),
    "allgather_partitions": no_effect("updated values are always all-gathered"),
    "allgather_bucket_size": no_effect("updated values are gathered unit by unit, which bounds the buffer"),
    "compute_grad_norm": honoured("zero_core.grad_norm before each step even where gradient_clipping is 0"),
    "load_from_fp32_weights": refused("a checkpoint always restores the fp32 master values", True),
    "elastic_checkpoint": no_effect("every checkpoint loads on any number of ranks and at any stage"),
    "sub_group_size": no_effect(
        "the optimizer steps unit by unit; there is no whole-model temporary to split"
    ),
    "round_robin_gradients": no_effect("every rank keeps its own 1/N of each unit's gradients"),
    "parameter_alignment": no_effect(
        "the layout of a unit decides alignment; checkpoints do not depend on it"
    ),
    "stage3_param_persistence_threshold": no_effect("small parameters travel in their unit's one collective"),
    "stage3_model_persistence_threshold": no_effect("small parameters travel in their unit's one collective"),
    "stage3_max_live_parameters": no_effect(
        "live are the unit in use and what stage3_prefetch_bucket_size allows"
    ),
    "stage3_max_reuse_distance": no_effect(_UNITS),
    "stage3_module_granularity_threshold": no_effect(_UNITS),
    "stage3_gather_16bit_weights_on_model_save": no_effect("save_16bit_model() always gathers, unit by unit"),
    "stage3_gather_fp16_weights_on_model_save": no_effect("save_16bit_model() always gathers, unit by unit"),
    "stage3_use_all_reduce_for_fetch_params": no_effect(_ONE_GATHER),
    "stage3_allgather_sequential": no_effect(_ONE_GATHER),
    "leaf_module": no_effect("units are whole repeated blocks, so branches inside one need no mark"),
    "ignore_unused_parameters": refused("an unused parameter is never an error: it is left as it is", True),
    "legacy_stage1": refused("there is one implementation of stage 1", False),
    "memory_efficient_linear": no_effect("linear layers are torch's own"),
    "pipeline_loading_checkpoint": no_effect("each rank reads only the ranges that it holds"),
    "override_module_apply": no_effect("zero_core.sharded_init needs no patched Module.apply"),
    "log_trace_cache_warnings": no_effect(
        "a change in the order of use ends prefetching for one pass, nothing else"
    ),
    "enable_sanity_checks": no_effect("checks are always on"),
    "save_muon_momentum_buffer_in_memory": no_effect("Muon's state is never offloaded"),
    "offload_param": {
        "device": honoured(
            'zero_core.Stores(params=): HostStore or NvmeStore (stage 3); absent in a section is "cpu"'
        ),
        "nvme_path": honoured("zero_offload_nvme.NvmeStore(path)"),
        "pin_memory": honoured("zero_offload_nvme.HostStore(pin=), NvmeStore(pin=)"),
        "buffer_count": no_effect(_BUFFERS),
        "buffer_size": no_effect(_BUFFERS),
        "max_in_cpu": no_effect("shards of parameters are read ahead of their gather, and not kept after it"),
    },
    "offload_optimizer": {
        "device": honoured(
            'zero_core.Stores(optimizer=, grads=): HostStore or NvmeStore (stages 1 to 3); absent in a section is "cpu"'
        ),
        "nvme_path": honoured("zero_offload_nvme.NvmeStore(path)"),
        "pin_memory": honoured("zero_offload_nvme.HostStore(pin=), NvmeStore(pin=)"),
        "buffer_count": no_effect(_BUFFERS),
        "ratio": honoured(
            "zero_core.Stores(optimizer_ratio=): the part of the optimizer's state, in whole units"
        ),
        "fast_init": no_effect("new states on a drive are zeros of the file system, which writes none"),
        "pipeline": no_effect(_PIPELINE),
        "pipeline_read": no_effect(_PIPELINE),
        "pipeline_write": no_effect(_PIPELINE),
        "super_offload": honoured(
            'zero_offload_nvme.OffloadedOptimizer(overlap="speculative"); with ratio, zero_core.Stores(keep_first=True)'
        ),
        "cpuadam_cores_perc": no_effect(
            "the thread that steps has as many cores as torch has threads; zero_offload_nvme.bind_rank chooses which"
        ),
    },
    "zenflow": {
        "topk_ratio": honoured("zero_offload_nvme.ZenFlow(topk_ratio=): channels that are stepped at once"),
        "select_strategy": honoured("ZenFlow(select_strategy=)"),
        "select_interval": honoured(
            'ZenFlow(select_interval=), in optimizer steps or epochs; "auto" with "auto"'
        ),
        "update_interval": honoured("ZenFlow(update_interval=), in optimizer steps"),
        "overlap_step": honoured("ZenFlow(overlap_step=): a thread steps the rest while training goes on"),
        "offload": refused("states of what is stepped at once stay on the device", False),
        "auto_ratio": honoured('ZenFlow(auto_ratio=), for update_interval "auto"'),
        "full_warm_up_rounds": honoured("ZenFlow(full_warm_up_rounds=), in optimizer steps"),
        "pt_reserved_cores_perc": no_effect(
            "the thread shares the process's cores; see zero_offload_nvme.bind_rank"
        ),
        "steps_per_epoch": honoured(
            'ZenFlow(steps_per_epoch=), optimizer steps: needed for select_strategy "epoch"'
        ),
        "late_step": honoured('zerostack\'s own: ZenFlow(late_step=), "window" or "one"'),
    },
    "cpu_offload": refused('older spelling: give offload_optimizer {"device": "cpu"}', False, None),
    "cpu_offload_param": refused('older spelling: give offload_param {"device": "cpu"}', False, None),
    "cpu_offload_use_pin_memory": refused("older spelling: give pin_memory in the two sections", False, None),
    "zero_hpz_partition_size": honoured(
        "comm_compress.QuantizedCollectives(node_size=, secondary=True): hpZ, stage 3; 1 is off"
    ),
    "zero_quantized_weights": honoured(
        'comm_compress.QuantizedCollectives(weights="int8"): qwZ, stages 1 to 3'
    ),
    "zero_quantized_nontrainable_weights": honoured(
        'comm_compress.QuantizedStore("int8") and QuantizedCollectives(frozen="int8"): frozen weights at rest and on '
        "the wire, stage 3"
    ),
    "zero_quantized_gradients": honoured(
        'comm_compress.QuantizedCollectives(grads="int4"): qgZ; nodes are those of torchrun, or of '
        "zero_hpz_partition_size"
    ),
    "zero_quantized_if_faster": honoured(
        'zerostack\'s own: QuantizedCollectives(policy="auto"): quantization is off where it measurably does not pay'
    ),
    "zeropp_loco_param": {
        "err_beta": honoured("comm_compress.LoCoPolicy(beta=), with zero_quantized_gradients"),
        "reset_T": honoured("comm_compress.LoCoPolicy(reset_steps=)"),
    },
    "mics_shard_size": honoured(
        'a mesh "dp_replicate" x "dp_shard": sharded over so many ranks, replicated across; -1 or 0 is off'
    ),
    "mics_hierarchical_params_gather": no_effect(
        "parameters are gathered among the ranks that share them alone"
    ),
}

ROWS: dict[str, Key | Rows] = {
    "train_batch_size": honoured("batch equation: samples in one optimizer step, over all ranks"),
    "train_micro_batch_size_per_gpu": honoured(
        "batch equation; the batch size of the data loader on each rank"
    ),
    "gradient_accumulation_steps": honoured("batch equation; the engine updates on every n-th micro-batch"),
    "managed_gradient_accumulation": refused(
        "the engine manages the boundary; zero_core alone does not", True
    ),
    "optimizer": _OPTIMIZER,
    "scheduler": _SCHEDULER,
    "zero_allow_untested_optimizer": no_effect(
        "any torch optimizer whose update of a parameter needs that parameter alone"
    ),
    "zero_force_ds_cpu_optimizer": no_effect("offloaded states are always stepped by the fused kernels"),
    "fp16": _FP16,
    "bf16": _BF16,
    "torch_autocast": _AUTOCAST,
    "data_types": {"grad_accum_dtype": honoured("zero_core.Precision(accumulate=)")},
    "gradient_clipping": honoured(
        "zero_core.clip_grad_norm; absent or 0 is off, as when DeepSpeed runs (its page says that absent is 1.0)"
    ),
    "communication_data_type": honoured("zero_core.Precision(reduce=): gradients on the wire"),
    "fp32_allreduce": honoured(
        "zero_core.Precision(reduce=float32): older spelling of communication_data_type"
    ),
    "gradient_allreduce_op": refused("gradients are averaged over ranks", "mean"),
    "prescale_gradients": no_effect(
        "means are formed in at least fp32, so the order of sum and division is safe"
    ),
    "gradient_predivide_factor": refused("means are formed in at least fp32, in one step", 1),
    "sparse_gradients": no_effect("an embedding built with sparse=True always sends the rows it touched"),
    "disable_allgather": no_effect("chose broadcasts instead of an all-gather; the values are the same"),
    "zero_optimization": _ZERO,
    "seed": honoured("the order in which the data loader visits samples"),
    "dataloader_drop_last": honoured("the data loader of initialize(training_data=)"),
    "steps_per_print": honoured(
        "engine log: a line every n steps; null: none, or every 10 where a breakdown is asked for"
    ),
    "wall_clock_breakdown": honoured("engine log: milliseconds of forward, backward and step"),
    "memory_breakdown": honoured("engine log: peak bytes of the process or device"),
    "dump_state": honoured("engine log: the effective configuration, once"),
    "timers": {
        "throughput": {
            "enabled": honoured("engine log: samples per second"),
            "synchronized": no_effect("the device is synchronised whenever a time is read"),
        }
    },
    "checkpoint": {
        "tag_validation": honoured("save_checkpoint: what to do when ranks give different tags"),
        "load_universal": no_effect("every checkpoint loads on any number of ranks and at any stage"),
        "use_node_local_storage": refused("a checkpoint is one shared directory", False),
        "parallel_write": refused("needs package pipe-parallel", inside="pipeline_stage=false"),
    },
    "aio": {
        "block_size": honoured("accel_kernels.TransferEngine(block_bytes=)"),
        "queue_depth": honoured(
            "accel_kernels.TransferEngine(queue_depth=): blocks under way; absent means 32 (DeepSpeed: 8)"
        ),
        "thread_count": honoured(
            "accel_kernels.TransferEngine(num_threads=), at least 4: where io_uring is refused"
        ),
        "intra_op_parallelism": no_effect("blocks of one request always travel side by side"),
        "single_submit": no_effect("the engine submits as the ring takes it"),
        "overlap_events": no_effect("requests always overlap"),
        "use_gds": refused("bytes pass through host memory", False),
    },
    "disable_python_gc": refused("the engine does not change settings of the whole process", False),
    "seq_parallel_communication_data_type": refused("needs package long-seq", None),
    "sequence_parallel_size": refused("needs package long-seq", None, 1),
    **LATER,
}

TABLE = KeyTable(ROWS)
"""Every documented key."""

"""Rows of the sections that this version refuses, each with the names documented inside and their defaults.

A section is accepted when it asks for nothing (`{"enabled": false}`, or nothing but defaults). `key_table`
adds these rows to its own.
"""

from __future__ import annotations

from .keys import Key, documented, refused

_TUNE = "needs package tune-profile"
_EFFICIENCY = "needs package data-efficiency"
_QUANTIZE = "no package of zerostack quantizes or prunes weights during training"

_RANDOM_LTD = {
    **documented(
        "enabled=false total_layer_num random_ltd_layer_num random_ltd_layer_id model_mask_name model_type "
        "hidden_state_order layer_token_lr_schedule"
    ),
    "random_ltd_schedule": {
        **documented("min_value max_value schedule_type"),
        "schedule_config": documented("require_steps seq_per_step"),
    },
}
_CURRICULUM = {
    **documented("enabled=false data_cluster_path"),
    "curriculum_metrics": {
        "*": documented(
            "index_to_sample_path index_to_metric_path difficulty_type clustering_type min_difficulty "
            "max_difficulty schedule_type schedule_config"
        )
    },
}

LATER: dict[str, Key] = {
    "activation_checkpointing": refused(
        "use zero_core.checkpoint_modules on the model, at every stage: its policy partitions, and moves to the host",
        inside="partition_activations=false cpu_checkpointing=false "
        "contiguous_memory_optimization=false number_checkpoints=null "
        "synchronize_checkpoint_boundary=false profile=false",
    ),
    "tensor_parallel": refused(
        "needs package tensor-slice",
        inside="autotp_size=0 tp_size=1 tp_grain_size=1 preset_model=null tp_overlap_comm=false "
        "mpu=null vocab_parallel_lm_head=false vocab_parallel_ce_backend dtype tp "
        "tensor_parallel injection_policy_tuple=null tp_group=null keep_module_on_host=false "
        "replace_with_kernel_inject=false kernel_inject=false",
        sections={"partition_config": documented("use_default_specs layer_specs")},
    ),
    "expert_parallel": refused(
        "needs package moe",
        inside="enabled=false autoep_size=1 expert_tensor_parallel_size=1 async_split_plan=false "
        "preset_model use_grouped_mm disable_triton_grouped_mm moe_layer_pattern router_pattern "
        "expert_pattern score_func score_apply combine_impl route_norm route_scale top_k "
        "routed_scaling_factor num_expert_groups num_limited_groups load_balance_coeff "
        "expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts "
        "shared_experts_pattern",
    ),
    "use_data_before_expert_parallelism": refused("needs package moe", False),
    "pipeline": refused(
        "needs package pipe-parallel",
        inside='stages="auto" partition="best" seed_layers=false activation_checkpoint_interval=0 '
        "pipe_partitioned=true grad_partitioned=true use_reentrant=true",
    ),
    "sparse_attention": refused(
        "needs package sparse-attn",
        inside="mode block different_layout_per_head num_local_blocks num_global_blocks attention "
        "horizontal_global_attention num_different_global_patterns num_random_blocks "
        "local_window_blocks global_block_indices global_block_end_indices "
        "num_sliding_window_blocks",
    ),
    "hybrid_engine": refused(
        "needs package rlhf-chat",
        inside="enabled=false max_out_tokens=512 inference_tp_size=1 release_inference_cache=false "
        "pin_parameters=true tp_gather_partition_size=8 enable_cuda_graph=false",
    ),
    "tensorboard": refused(_TUNE, inside="enabled=false output_path job_name"),
    "csv_monitor": refused(_TUNE, inside="enabled=false output_path job_name"),
    "wandb": refused(_TUNE, inside='enabled=false group=null team=null project="deepspeed"'),
    "comet": refused(
        _TUNE,
        inside="enabled=false workspace project samples_log_interval experiment_name api_key "
        "experiment_key online mode",
    ),
    "flops_profiler": refused(
        _TUNE,
        inside="enabled=false recompute_fwd_factor=0.0 profile_step=1 module_depth=-1 top_modules=1 "
        "detailed=true output_file=null",
    ),
    "comms_logger": refused(
        _TUNE, inside="enabled=false verbose=false prof_all=true debug=false prof_ops=[]"
    ),
    "autotuning": refused(
        _TUNE,
        inside="enabled=false results_dir exps_dir overwrite metric start_profile_step "
        "end_profile_step fast mp_size max_train_batch_size min_train_batch_size "
        "max_train_micro_batch_size_per_gpu arg_mappings min_train_micro_batch_size_per_gpu "
        "num_tuning_micro_batch_sizes tuner_type tuner_early_stopping tuner_num_trials "
        "model_info model_info_path",
    ),
    "data_efficiency": refused(
        _EFFICIENCY,
        inside="enabled=false seed=1234",
        sections={
            "data_routing": {"enabled": False, "random_ltd": _RANDOM_LTD},
            "data_sampling": {
                **documented("enabled=false num_epochs=1000 num_workers=0 pin_memory=false"),
                "curriculum_learning": _CURRICULUM,
            },
        },
    ),
    "curriculum_learning": refused(
        _EFFICIENCY,
        inside="enabled=false curriculum_type min_difficulty max_difficulty schedule_type schedule_config",
    ),
    "progressive_layer_drop": refused(_EFFICIENCY, inside="enabled=false theta=1.0 gamma=0.001"),
    "compression_training": refused(
        _QUANTIZE,
        inside="layer_reduction weight_quantization activation_quantization sparse_pruning row_pruning "
        "head_pruning channel_pruning",
    ),
    "quantize_training": refused(_QUANTIZE, inside="enabled=false *"),
    "weight_quantization": refused(_QUANTIZE, inside="*"),
    "eigenvalue": refused(
        "serves quantize_training, which is refused",
        inside="enabled=false verbose max_iter tol stability gas_boundary_resolution layer_name layer_num",
    ),
    "elasticity": refused(
        "needs package elastic-launch",
        inside="enabled=false max_train_batch_size micro_batch_sizes min_gpus max_gpus min_time "
        "version ignore_non_elastic_batch_info prefer_larger_batch num_gpus_per_node "
        "model_parallel_size",
    ),
    "nebula": refused(
        "a closed service; checkpoints here are plain files",
        inside="enabled=false persistent_storage_path persistent_time_interval "
        "num_of_version_in_retention enable_nebula_load load_path",
    ),
    "datastates_ckpt": refused(
        "another engine; ckpt_universal.AsyncSaver writes while training goes on", inside="*"
    ),
    "amp": refused(
        "NVIDIA Apex is not supported; use bf16, fp16 or torch_autocast", inside="enabled=false *"
    ),
    "compile": refused(
        "call torch.compile on the model yourself",
        inside="deepcompile=false passes=[] autoep_non_moe=false free_activation=false "
        "free_activation_threshold offload_activation=false offload_activation_pin_memory=true "
        "offload_opt_states=false double_buffer=true symmetric_memory=false debug_log=false "
        "offload_parameters=false sync_before_reduce=false sync_after_reduce=false "
        "sync_before_allgather=false sync_after_allgather=false keep_int_input_tensors=true "
        "keep_all_input_tensors=false",
    ),
    "graph_harvesting": refused("CUDA graphs are not captured here", False),
}

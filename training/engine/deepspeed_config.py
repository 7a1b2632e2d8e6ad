"""Every DeepSpeed setting that affects results, written out.

DeepSpeed's defaults change between releases (gradient_clipping was 0 and is 1.0), and it silently ignores
unknown top-level keys.
"""

from typing import Any

from turnout.training.config.train import TrainConfig

# Steps between DeepSpeed's own log lines. It requires a number; the training loop does the logging.
NEVER = 10**9
# Elements of gradients that are reduced at once, and of weights that are gathered at once.
BUCKET_ELEMENTS = 2**27


def deepspeed_config(cfg: TrainConfig, *, zero_stage: int, dp: int, n_microbatches: int) -> dict[str, Any]:
    """Return every DeepSpeed setting of a run. Pure."""
    return {
        "train_micro_batch_size_per_gpu": cfg.microbatch_seqs,
        "gradient_accumulation_steps": n_microbatches,
        "train_batch_size": cfg.microbatch_seqs * n_microbatches * dp,
        "gradient_clipping": cfg.clip_norm or 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # Without these two settings bf16 gradients are accumulated and reduced in bf16, with 12 times the
        # error.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero_stage,
            "contiguous_gradients": True,  # False with stage 1 gives wrong expert gradients
            "round_robin_gradients": False,  # True breaks the map from parameter to fp32 master
            "reduce_scatter": True,
            "overlap_comm": False,
            "use_multi_rank_bucket_allreduce": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_partitions": True,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "compute_grad_norm": True,
            "elastic_checkpoint": False,
            "ignore_unused_parameters": False,
        },
        "bf16": {
            "enabled": cfg.precision == "bf16",
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {
            "enabled": cfg.precision == "fp16",
            "auto_cast": False,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
            "fp16_master_weights_and_grads": False,
        },
        "torch_autocast": {"enabled": False},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }

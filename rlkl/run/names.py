"""The names of TRL and verl, and what to write here. One row a name.

Used by the message about an unknown key (run/config.py), by `rlkl explain --trl`
(explain/from_trl.py), and by docs/coming-from.md. TRL's fields and their defaults are those of TRL
1.16 (trl/trainer/grpo_config.py, transformers 5.23); verl's keys are those of verl 0.9.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field of TRL's GRPOConfig, or of the YAML of TRL's command line, that is about training."""

    name: str
    kind: Any  # its type
    default: Any
    here: str = ""  # the options to write here; empty where there is none
    note: str = ""  # how the values differ; where there is no option, why
    only_with: str = ""  # another field without which TRL does not read this one


class Name(NamedTuple):
    """A name of another library."""

    library: str
    name: str
    here: str  # as in Field
    note: str


SERVER = "there is no vLLM backend: sampling.backend=engine samples, in the training process"
MISMATCH = (
    "it corrects vLLM's log-probs; mismatch.truncate and mismatch.reject do it for any backend"
)
ADAPTIVE = "the coefficient is constant: entropy.coef"
FROZEN = "the reference stays the model that training started from"
QUANTISED = "there is no quantised training"
GPUS = "there is one device"
TRUNCATED = (
    "a truncated sampling distribution biases the ratio, so only all tokens are sampled from"
)

# ------------------------------------------------------------------ TRL

TRL = (
    # the model
    Field("model_name_or_path", str | None, None, "model.name"),
    Field("model_revision", str, "main", "", "download the revision, and name its folder"),
    Field("model_init_kwargs", dict | str | None, None, "", "only model.dtype can be chosen"),
    Field("trust_remote_code", bool, False, "", "code that comes with a model is not run"),
    Field("dtype", str, "float32", "model.dtype", "auto is bfloat16 with float32 masters on CUDA"),
    Field("bf16", bool | None, None, "model.dtype", "false is float32; true is auto"),
    Field("fp16", bool, False, "", "float16 is not trained in: model.dtype=bfloat16"),
    Field("use_cpu", bool, False, "device", "true is cpu"),
    Field("gradient_checkpointing", bool, True, "model.gradient_checkpointing"),
    Field("activation_checkpointing", bool | None, None, "model.gradient_checkpointing"),
    Field("disable_dropout", bool, False, "", "dropout is always off"),
    Field("cast_lm_head_to_fp32", bool, False, "", "logits are always float32"),
    Field("router_aux_loss_coef", float | None, None, "", "there is no load-balancing loss"),
    Field("neftune_noise_alpha", float | None, None, "", "there is no noise on the embeddings"),
    Field("seed", int, 42, "seed"),
    # the adapter: model arguments of TRL's command line
    Field("use_peft", bool, False, "lora.r", "false is lora.r=0"),
    Field("lora_r", int, 16, "lora.r", "", "use_peft"),
    Field("lora_alpha", float, 32, "lora.alpha", "", "use_peft"),
    Field(
        "lora_target_modules",
        str | list[str] | None,
        None,
        "lora.target_modules",
        "the default is all-linear; PEFT's depends on the architecture",
        "use_peft",
    ),
    Field("lora_modules_to_save", list[str] | None, None, "lora.modules_to_save", "", "use_peft"),
    Field("lora_dropout", float, 0.05, "", "dropout is always off", "use_peft"),
    Field(
        "lora_target_parameters",
        list[str] | None,
        None,
        "",
        "an adapter is on layers, and not on single parameters",
        "use_peft",
    ),
    Field("lora_task_type", str, "CAUSAL_LM", "", "always CAUSAL_LM", "use_peft"),
    Field("use_rslora", bool, False, "", "the scale is alpha / r: set lora.alpha", "use_peft"),
    Field("use_dora", bool, False, "", "plain LoRA only", "use_peft"),
    Field("load_in_8bit", bool, False, "", QUANTISED),
    Field("load_in_4bit", bool, False, "", QUANTISED),
    Field("bnb_4bit_quant_type", str, "nf4", "", QUANTISED, "load_in_4bit"),
    Field("use_bnb_nested_quant", bool, False, "", QUANTISED, "load_in_4bit"),
    Field("bnb_4bit_quant_storage", str | None, None, "", QUANTISED, "load_in_4bit"),
    # data and rewards: script arguments of TRL's command line
    Field("dataset_name", str | None, None, "task.path", "with task=datasets"),
    Field("dataset_config", str | None, None, "task.config", "", "dataset_name"),
    Field("dataset_train_split", str, "train", "task.train_split", "", "dataset_name"),
    Field("dataset_test_split", str, "test", "task.heldout_split", "", "dataset_name"),
    Field("dataset_streaming", bool, False, "", "a dataset is read whole", "dataset_name"),
    Field("datasets", list | None, None, "", "there is no mixture: write the rows in one file"),
    Field("shuffle_dataset", bool, True, "", "prompts are always in random order"),
    Field(
        "max_prompt_length",
        int | None,
        None,
        "sampling.max_prompt_tokens",
        "longer prompts are dropped, not cut",
    ),
    Field("chat_template_kwargs", dict | str | None, None, "chat.template"),
    Field(
        "reward_funcs",
        list[str] | None,
        None,
        "reward",
        "file.py:function, from Python a function, or a list of them",
    ),
    Field(
        "reward_model_name_or_path", str | None, None, "reward", "{name: reward_model, path: ...}"
    ),
    Field("reward_weights", list[float] | None, None, "reward", "the weight of each part"),
    Field(
        "multi_objective_aggregation",
        str,
        "sum_then_normalize",
        "",
        "rewards are summed and then normalised, never one by one (GDPO)",
    ),
    Field("max_tool_calling_iterations", int | None, None, "", "there are no tools"),
    # the rollout
    Field("num_generations", int, 8, "sampling.group_size"),
    Field("max_completion_length", int, 512, "sampling.max_new_tokens"),
    Field("temperature", float, 1.0, "sampling.temperature"),
    Field("top_p", float, 1.0, "", TRUNCATED),
    Field("top_k", int, 0, "", TRUNCATED),
    Field("min_p", float | None, None, "", TRUNCATED),
    Field("repetition_penalty", float, 1.0, "", TRUNCATED),
    Field("generation_kwargs", dict | str | None, None, "", TRUNCATED),
    Field(
        "generation_batch_size",
        int | None,
        None,
        "sampling.prompts",
        "there it counts rows, sampling.prompts * sampling.group_size",
    ),
    Field(
        "steps_per_generation",
        int | None,
        None,
        "sampling.prompts",
        "a rollout has steps_per_generation * per_device_train_batch_size rows there, and "
        "sampling.prompts * sampling.group_size rows here",
    ),
    Field(
        "per_device_train_batch_size",
        int,
        8,
        "optim.minibatch",
        "an update has per_device_train_batch_size * gradient_accumulation_steps rows; what fits "
        "in memory is optim.micro_tokens",
    ),
    Field(
        "gradient_accumulation_steps",
        int,
        1,
        "optim.minibatch",
        "an update has per_device_train_batch_size * gradient_accumulation_steps rows; what fits "
        "in memory is optim.micro_tokens",
    ),
    Field("auto_find_batch_size", bool, False, "", "TRL refuses it too"),
    Field("use_vllm", bool, False, "", SERVER),
    *(
        Field(name, kind, default, "", SERVER, "use_vllm")
        for name, kind, default in (
            ("vllm_mode", str, "colocate"),
            ("vllm_model_impl", str, "vllm"),
            ("vllm_enable_sleep_mode", bool, False),
            ("vllm_structured_outputs_regex", str | None, None),
            ("vllm_server_base_url", str | None, None),
            ("vllm_server_host", str, "0.0.0.0"),
            ("vllm_server_port", int, 8000),
            ("vllm_server_timeout", float, 240.0),
            ("vllm_group_port", int, 51216),
            ("vllm_gpu_memory_utilization", float, 0.3),
            ("vllm_max_model_length", int | None, None),
            ("vllm_tensor_parallel_size", int, 1),
        )
    ),
    Field("vllm_importance_sampling_correction", bool, True, "", MISMATCH, "use_vllm"),
    Field("vllm_importance_sampling_mode", str, "sequence_mask", "", MISMATCH, "use_vllm"),
    Field("vllm_importance_sampling_clip_max", float | None, 3.0, "", MISMATCH, "use_vllm"),
    Field("vllm_importance_sampling_clip_min", float | None, None, "", MISMATCH, "use_vllm"),
    Field("vllm_importance_sampling_cap", float | None, None, "", MISMATCH, "use_vllm"),
    # the advantage
    Field(
        "scale_rewards",
        bool | str,
        "group",
        "advantage",
        "group is grpo, batch is grpo with advantage.scale=batch, none is dr_grpo; the std has "
        "+ 1e-6, TRL's + 1e-4",
    ),
    # the policy loss
    Field(
        "loss_type",
        str,
        "dapo",
        "loss and optim.weights",
        "grpo is clip and sequence, dapo and bnpo clip and token, dr_grpo clip and constant (the "
        "std is another option: advantage=dr_grpo)",
    ),
    Field("epsilon", float, 0.2, "loss.epsilon"),
    Field("epsilon_high", float | None, None, "loss.epsilon_high", "of cispo it is loss.cap"),
    Field("delta", float | None, None, "loss.delta"),
    Field("importance_sampling_level", str, "token", "loss", "sequence is loss=gspo"),
    Field("sapo_temperature_pos", float, 1.0, "loss.tau", "of loss=sapo"),
    Field("sapo_temperature_neg", float, 1.05, "loss.tau_negative", "of loss=sapo"),
    Field("vespo_k_pos", float, 2.0, "loss.k", "of loss=vespo"),
    Field("vespo_lambda_pos", float, 3.0, "loss.lam", "of loss=vespo"),
    Field("vespo_k_neg", float, 3.0, "loss.k_negative", "of loss=vespo"),
    Field("vespo_lambda_neg", float, 2.0, "loss.lam_negative", "of loss=vespo"),
    Field("mask_truncated_completions", bool, False, "truncation", "true is mask"),
    Field(
        "top_entropy_quantile",
        float,
        1.0,
        "selector.fraction",
        "with selector=top_entropy and loss=top_entropy",
    ),
    Field("off_policy_mask_threshold", float | None, None, "", "no response is left out by its KL"),
    # the KL to the reference, and the entropy
    Field(
        "beta",
        float,
        0.0,
        "kl_ref.coef",
        "with kl_ref.place=loss and kl_ref.estimator=wk3_token, or k3 without "
        "use_bias_correction_kl; the default here is k1 in the reward",
    ),
    Field(
        "use_bias_correction_kl",
        bool,
        True,
        "kl_ref.estimator",
        "true is wk3_token, false is k3, both with kl_ref.place=loss",
        "beta",
    ),
    Field("sync_ref_model", bool, False, "", FROZEN, "beta"),
    Field("ref_model_mixup_alpha", float, 0.6, "", FROZEN, "sync_ref_model"),
    Field("ref_model_sync_steps", int, 512, "", FROZEN, "sync_ref_model"),
    Field("entropy_coef", float, 0.0, "entropy.coef"),
    Field("use_adaptive_entropy", bool, False, "", ADAPTIVE),
    Field("entropy_coef_min", float, 0.0, "", ADAPTIVE, "use_adaptive_entropy"),
    Field("entropy_coef_max", float, 1.0, "", ADAPTIVE, "use_adaptive_entropy"),
    Field("entropy_coef_delta", float, 0.005, "", ADAPTIVE, "use_adaptive_entropy"),
    Field("entropy_target", float, 0.2, "", ADAPTIVE, "use_adaptive_entropy"),
    # the updates
    Field("num_iterations", int, 1, "optim.epochs"),
    Field("learning_rate", float, 1e-6, "optim.lr"),
    Field("lr_scheduler_type", str, "linear", "optim.schedule"),
    Field("lr_scheduler_kwargs", dict | str | None, None, "", "a schedule has no options"),
    Field("warmup_steps", float, 0, "optim.warmup", "there in updates, here in rollouts"),
    Field("warmup_ratio", float, 0.0, "optim.warmup", "a share there, a number of rollouts here"),
    Field("max_steps", int, -1, "optim.steps", "there in updates, here in rollouts"),
    Field(
        "num_train_epochs",
        float,
        3.0,
        "optim.steps",
        "passes over the dataset there; optim.steps counts rollouts, and optim.epochs is "
        "num_iterations",
    ),
    Field("optim", str, "adamw_torch_fused", "optim", "AdamW in float32 is the only optimizer"),
    Field("optim_args", str | None, None, "", "AdamW in float32 is the only optimizer"),
    Field(
        "optim_target_modules",
        str | list[str] | None,
        None,
        "",
        "all weights are trained, or the adapter",
    ),
    Field("weight_decay", float, 0.0, "optim.weight_decay"),
    Field("adam_beta1", float, 0.9, "optim.betas", "the first of two"),
    Field("adam_beta2", float, 0.999, "optim.betas", "the second of two"),
    Field("adam_epsilon", float, 1e-8, "", "always 1e-8"),
    Field("max_grad_norm", float, 1.0, "optim.max_grad_norm"),
    Field("label_smoothing_factor", float, 0.0, "", "TRL does not read it for GRPO"),
    # several devices
    Field("deepspeed", dict | str | None, None, "", GPUS),
    Field("fsdp", bool | str | list | None, None, "", GPUS),
    Field("fsdp_config", dict | str | None, None, "", GPUS, "fsdp"),
    Field("parallelism_config", Any, None, "", GPUS),
    Field("num_processes", int, 1, "", GPUS),
)

# What does not change what is optimised: where it is logged and saved, how fast, on which device.
UNMAPPED = """
accelerate_config accelerator_config activation_checkpointing_kwargs attn_implementation
average_tokens_across_devices batch_eval_metrics bf16_full_eval cache_implementation config
data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
ddp_find_unused_parameters ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict
do_train ds3_gather_for_generation enable_jit_checkpoint env eval_accumulation_steps eval_delay
eval_do_concat_batches eval_on_start eval_use_gather_object fp16_full_eval full_determinism
gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo
hub_revision hub_strategy hub_token ignore_bias_buffers ignore_data_skip include_for_metrics
include_num_input_tokens_seen label_names length_column_name liger_kernel_config
load_best_model_at_end local_rank log_completions log_completions_hub_repo log_level
log_level_replica log_multimodal log_on_each_node log_unique_prompts logging_dir
logging_first_step logging_nan_inf_filter logging_strategy metric_for_best_model
num_completions_to_print overwrite_output_dir pad_to_multiple_of per_device_eval_batch_size
prediction_loss_only push_to_hub remove_unused_columns restore_callback_states_from_checkpoint
run_name save_on_each_node save_only_model save_safetensors skip_memory_metrics tf32
torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy
transformers_continuous_batching_config use_cache use_liger_kernel use_liger_loss
use_transformers_continuous_batching use_transformers_paged
"""
TRL_AROUND = {  # name → what to write here, where there is such an option
    "output_dir": "run",
    "resume_from_checkpoint": "resume",
    "logging_steps": "log.every",
    "report_to": "log.wandb",
    "project": "log.project",
    "eval_steps": "eval.every",
    "eval_strategy": "eval.every",
    "num_generations_eval": "eval.samples",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
} | dict.fromkeys(UNMAPPED.split(), "")
AROUND = "it does not change what is optimised"

TRAINER = (  # arguments of TRL's GRPOTrainer itself, as in rlkl.train(train_dataset=…)
    ("train_dataset", "task", "{name: datasets, path: …}, {name: jsonl, path: …}, or your own"),
    ("eval_dataset", "task", "a task has both sides: task.heldout_split, or task.heldout"),
    ("args", "", "each field of a GRPOConfig is an option; rlkl explain --trl FILE translates it"),
    ("peft_config", "lora.r", "with lora.alpha and lora.target_modules"),
    ("processing_class", "", "the tokenizer is the one in the model's folder"),
    ("reward_processing_classes", "", "a reward model brings its tokenizer"),
    ("callbacks", "", "the rows of a run, metrics.jsonl and log.wandb=online have the metrics"),
    ("optimizers", "optim", "AdamW in float32 is the only optimizer"),
    ("quantization_config", "", QUANTISED),
    ("rollout_func", "sampling.backend", "file.py:function"),
    ("tools", "", "there are no tools"),
    ("environment_factory", "", "there are no tools"),
)

# ------------------------------------------------------------------ verl

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MODEL, ALGORITHM = "actor_rollout_ref.model", "algorithm"
VERL = (
    (f"{MODEL}.path", "model.name", ""),
    (f"{MODEL}.enable_gradient_checkpointing", "model.gradient_checkpointing", ""),
    (f"{MODEL}.lora_rank", "lora.r", ""),
    (f"{MODEL}.lora_alpha", "lora.alpha", ""),
    (f"{MODEL}.target_modules", "lora.target_modules", ""),
    ("data.train_files", "task.path", "with task=datasets, or a task of its own such as gsm8k"),
    ("data.val_files", "task.path", "a task has both sides; task.heldout_split names a split"),
    ("data.prompt_key", "task.prompt", "of task=datasets"),
    ("data.train_batch_size", "sampling.prompts", ""),
    ("data.max_prompt_length", "sampling.max_prompt_tokens", "longer prompts are dropped"),
    ("data.max_response_length", "sampling.max_new_tokens", ""),
    ("data.filter_overlong_prompts", "sampling.max_prompt_tokens", "they always are"),
    ("data.apply_chat_template_kwargs", "chat.template", ""),
    (f"{ROLLOUT}.n", "sampling.group_size", ""),
    (f"{ROLLOUT}.temperature", "sampling.temperature", ""),
    (f"{ROLLOUT}.top_p", "", TRUNCATED),
    (f"{ROLLOUT}.top_k", "", TRUNCATED),
    (f"{ROLLOUT}.name", "sampling.backend", "engine, which is fast; neither vLLM nor SGLang"),
    (f"{ROLLOUT}.gpu_memory_utilization", "", SERVER),
    (f"{ROLLOUT}.tensor_model_parallel_size", "", GPUS),
    (f"{ROLLOUT}.val_kwargs.n", "eval.samples", ""),
    (f"{ROLLOUT}.val_kwargs.temperature", "eval.temperature", ""),
    (f"{ROLLOUT}.multi_turn.enable", "", "there are no tools and no turns"),
    (
        f"{ACTOR}.ppo_mini_batch_size",
        "optim.minibatch",
        "there in prompts, here in rows: times sampling.group_size",
    ),
    (f"{ACTOR}.ppo_micro_batch_size_per_gpu", "optim.micro_tokens", "in tokens"),
    (f"{ACTOR}.ppo_max_token_len_per_gpu", "optim.micro_tokens", ""),
    (f"{ACTOR}.use_dynamic_bsz", "optim.micro_tokens", "micro-batches are always filled by tokens"),
    (f"{ACTOR}.ppo_epochs", "optim.epochs", ""),
    (f"{ACTOR}.grad_clip", "optim.max_grad_norm", ""),
    (f"{ACTOR}.optim.lr", "optim.lr", ""),
    (f"{ACTOR}.optim.weight_decay", "optim.weight_decay", "there 0.01 by default, here 0"),
    (f"{ACTOR}.optim.betas", "optim.betas", ""),
    (f"{ACTOR}.optim.lr_scheduler_type", "optim.schedule", ""),
    (f"{ACTOR}.optim.lr_warmup_steps", "optim.warmup", ""),
    (f"{ACTOR}.optim.lr_warmup_steps_ratio", "optim.warmup", "a number of steps, not a share"),
    (f"{ACTOR}.clip_ratio", "loss.epsilon", ""),
    (f"{ACTOR}.clip_ratio_low", "loss.epsilon", ""),
    (f"{ACTOR}.clip_ratio_high", "loss.epsilon_high", "of cispo it is loss.cap - 1"),
    (
        f"{ACTOR}.clip_ratio_c",
        "loss.delta",
        "there 3.0 by default; here no bound unless it is given",
    ),
    (
        f"{ACTOR}.loss_agg_mode",
        "optim.weights",
        "token-mean is token, seq-mean-token-mean is sequence, seq-mean-token-sum-norm is constant",
    ),
    (
        f"{ACTOR}.policy_loss.loss_mode",
        "loss",
        "vanilla is clip, geo_mean is gmpo, gpg is reinforce; gspo, sapo, cispo, clip_cov, kl_cov, "
        "dppo_tv and dppo_kl have their names",
    ),
    (f"{ACTOR}.entropy_coeff", "entropy.coef", ""),
    (f"{ACTOR}.use_kl_loss", "kl_ref.place", "true is loss, with a kl_ref.coef above 0"),
    (f"{ACTOR}.kl_loss_coef", "kl_ref.coef", "with kl_ref.place=loss"),
    (
        f"{ACTOR}.kl_loss_type",
        "kl_ref.estimator",
        "low_var_kl is k3, low_var_kl+ is k3+, mse is k2; kl is k1, which is refused in the loss",
    ),
    (
        f"{ALGORITHM}.adv_estimator",
        "advantage",
        "gae, grpo, rloo, opo and remax have their names; reinforce_plus_plus is reinforce_pp, and "
        "reinforce_plus_plus_baseline is reinforce_pp_baseline",
    ),
    (f"{ALGORITHM}.norm_adv_by_std_in_grpo", "advantage", "true is grpo, false is dr_grpo"),
    (f"{ALGORITHM}.gamma", "advantage.gamma", "of advantage=gae"),
    (f"{ALGORITHM}.lam", "advantage.lam", "of advantage=gae; there 1.0 by default, here 0.95"),
    (f"{ALGORITHM}.use_kl_in_reward", "kl_ref.place", "true is reward, with a kl_ref.coef above 0"),
    (f"{ALGORITHM}.kl_penalty", "kl_ref.estimator", "kl is k1"),
    (f"{ALGORITHM}.kl_ctrl.kl_coef", "kl_ref.coef", "with kl_ref.place=reward"),
    (f"{ALGORITHM}.kl_ctrl.target_kl", "kl_ref.target", "there per token, here per response"),
    (f"{ALGORITHM}.kl_ctrl.horizon", "kl_ref.horizon", ""),
    (f"{ALGORITHM}.kl_ctrl.type", "kl_ref.target", "adaptive is a kl_ref.target, fixed is none"),
    (
        f"{ALGORITHM}.filter_groups.enable",
        "sampling.zero_variance",
        "true is resample (DAPO's dynamic sampling)",
    ),
    (
        f"{ALGORITHM}.filter_groups.max_num_gen_batches",
        "sampling.resample_rounds",
        "the rounds after the first rollout",
    ),
    (f"{ALGORITHM}.rollout_correction.rollout_is", "mismatch.truncate", ""),
    (f"{ALGORITHM}.rollout_correction.rollout_is_threshold", "mismatch.cap", ""),
    (f"{ALGORITHM}.rollout_correction.rollout_rs", "mismatch.reject", "k2 and k3 are not here"),
    ("critic.optim.lr", "critic.lr", ""),
    ("critic.cliprange_value", "critic.clip", "there 0.5 by default, here 0.2"),
    ("critic.ppo_epochs", "optim.epochs", "policy and critic are updated together"),
    ("critic.model.path", "critic.kind", "head, or network: both start from model.name"),
    ("reward.custom_reward_function.path", "reward.name", "file.py:function, unchanged"),
    ("reward.custom_reward_function.name", "reward.name", "file.py:function, unchanged"),
    ("reward_model.model.path", "reward.path", "with reward.name=reward_model"),
    ("reward.reward_model.model_path", "reward.path", "with reward.name=reward_model"),
    ("trainer.total_training_steps", "optim.steps", ""),
    ("trainer.total_epochs", "optim.steps", "in steps, not in passes over the dataset"),
    ("trainer.critic_warmup", "critic.warmup", ""),
    ("trainer.save_freq", "checkpoint.every", ""),
    ("trainer.test_freq", "eval.every", ""),
    ("trainer.max_actor_ckpt_to_keep", "checkpoint.keep", ""),
    ("trainer.logger", "log.wandb", ""),
    ("trainer.project_name", "log.project", ""),
    ("trainer.experiment_name", "run", ""),
    ("trainer.default_local_dir", "run", ""),
    ("trainer.resume_from_path", "resume", ""),
    ("trainer.n_gpus_per_node", "", GPUS),
    ("trainer.nnodes", "", GPUS),
)


# ------------------------------------------------------------------ what a key means


def names() -> list[Name]:
    """Every name of TRL, then of verl."""
    fields = [Name("TRL", f.name, f.here, f.note) for f in TRL]
    around = [Name("TRL", name, here, AROUND) for name, here in TRL_AROUND.items()]
    trainer = [Name("TRL", *row) for row in TRAINER]
    return fields + around + trainer + [Name("verl", *row) for row in VERL]


def counterpart(key: str, known: Iterable[str]) -> str:
    """What to write here for a name of TRL or verl, as a part of a message; "" for another name.

    key: as it was written: num_generations, optim.learning_rate, actor_rollout_ref.rollout.n.
    known: our keys. The sections of these may stand before the name. The whole name counts, or else
    its end, unless one of ours ends so too, which may be meant (lr).
    """
    known = list(known)
    section, _, option = key.partition(".")
    sections = {k.partition(".")[0] for k in known}
    spellings = (key, option) if option and section in sections else (key,)
    found = [name for name in names() if name.name in spellings]
    if not found and not any(k.endswith(f".{key}") for k in known):
        found = [n for n in names() if n.name.endswith(tuple(f".{s}" for s in spellings))]
    for name in found:
        whose = f"{name.library}'s {name.name}"
        if not name.here:
            return f"{whose} has no counterpart here: {name.note}"
        return f"{whose} is {name.here} here" + (f": {name.note}" if name.note else "")
    return ""


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """The known keys that may be meant, as a part of a message, or ""."""
    similar = similar_keys(key, known)
    return f"did you mean {' or '.join(similar)}?" if similar else ""


def similar_keys(key: str, known: Iterable[str]) -> list[str]:
    """Known keys of the same name in other sections, or else the one that is spelt alike."""
    known = list(known)
    last = key.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    similar = get_close_matches(key, same, n=2, cutoff=0.0)
    similar = similar or get_close_matches(key, known, n=1, cutoff=0.8)
    if not similar:
        whole = {k.rpartition(".")[2]: k for k in reversed(known)}
        similar = [whole[match] for match in get_close_matches(last, whole, n=1, cutoff=0.8)]
    return similar

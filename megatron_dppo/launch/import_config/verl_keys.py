"""verl's keys: those that mean the same here, those that have no counterpart, and those about how it works."""

from __future__ import annotations

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
MEGATRON = f"{ACTOR}.megatron"
TRANSFORMER = f"{MEGATRON}.override_transformer_config"
COPIED = {
    "data.train_batch_size": "rollout.prompts_per_step",
    f"{ROLLOUT}.n": "rollout.samples_per_prompt",
    "data.max_prompt_length": "rollout.max_prompt_tokens",
    "data.max_response_length": "rollout.max_response_tokens",
    f"{ROLLOUT}.temperature": "algorithm.loss.temperature",
    f"{ROLLOUT}.val_kwargs.temperature": "eval.temperature",
    f"{ROLLOUT}.val_kwargs.n": "eval.samples_per_prompt",
    f"{ACTOR}.entropy_coeff": "algorithm.loss.entropy_coef",
    f"{ACTOR}.optim.lr": "train.optimizer.lr",
    f"{ACTOR}.optim.min_lr": "train.optimizer.min_lr",
    f"{ACTOR}.optim.weight_decay": "train.optimizer.weight_decay",
    f"{ACTOR}.optim.lr_decay_style": "train.optimizer.lr_decay_style",
    f"{ACTOR}.optim.clip_grad": "train.optimizer.clip_grad",
    f"{ACTOR}.grad_clip": "train.optimizer.clip_grad",
    f"{MEGATRON}.tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    f"{MEGATRON}.pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    f"{MEGATRON}.virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_model_parallel_size",
    f"{MEGATRON}.context_parallel_size": "parallel.context_parallel_size",
    f"{MEGATRON}.expert_model_parallel_size": "parallel.expert_model_parallel_size",
    f"{MEGATRON}.expert_tensor_parallel_size": "parallel.expert_tensor_parallel_size",
    f"{TRANSFORMER}.num_layers_in_first_pipeline_stage": "parallel.num_layers_in_first_pipeline_stage",
    f"{TRANSFORMER}.num_layers_in_last_pipeline_stage": "parallel.num_layers_in_last_pipeline_stage",
    f"{ACTOR}.ulysses_sequence_parallel_size": "parallel.context_parallel_size",
    "trainer.experiment_name": "run.name",
    "trainer.total_training_steps": "train.steps",
    "trainer.save_freq": "checkpoint.every",
    "trainer.test_freq": "eval.every",
    "trainer.nnodes": "launch.trainer_nodes",
    "trainer.n_gpus_per_node": "launch.gpus_per_node",
}
# Whether whole layers are recomputed.
RECOMPUTED = {"actor_rollout_ref.model.enable_gradient_checkpointing": "model.recompute.granularity"}
DROPPED = {
    "algorithm.use_kl_in_reward": "a KL is a term of the loss here, never of the reward",
    "algorithm.filter_groups.enable": "groups whose rewards are all equal are kept; they have no gradient",
    "reward_model.overlong_buffer.enable": "write it into a reward of your own (tasks.*.reward)",
    "reward.reward_kwargs.overlong_buffer_cfg.enable": "write it into a reward of your own (tasks.*.reward)",
    "reward_model.enable": "write a reward that asks it (tasks.*.reward)",
    "reward.reward_model.enable": "write a reward that asks it (tasks.*.reward)",
    "custom_reward_function.path": "name it as package.module:function in tasks.*.reward",
    "reward.custom_reward_function.path": "name it as package.module:function in tasks.*.reward",
    "actor_rollout_ref.model.lora_rank": "all weights are trained",
    "actor_rollout_ref.model.lora.rank": "all weights are trained",
    "distillation": "there is no teacher",
    "algorithm.kl_penalty": "a KL is a term of the loss here, never of the reward",
    "trainer.total_epochs": "a run has train.steps steps, whatever the size of its data",
    "trainer.critic_warmup": "there is no critic",
    f"{ROLLOUT}.multi_turn.enable": "a response is one turn",
    f"{ROLLOUT}.data_parallel_size": "every server has the whole policy; start more of them",
}
IGNORED = (
    "algorithm.kl_ctrl algorithm.gamma algorithm.lam algorithm.rollout_correction data actor_rollout_ref.model"
    " actor_rollout_ref.ref actor_rollout_ref.hybrid_engine actor_rollout_ref.nccl_timeout critic ray_kwargs ray_init trainer"
    f" global_profiler transfer_queue reward reward_model custom_reward_function model_engine {ACTOR}.strategy"
    f" {ACTOR}.fsdp_config {ACTOR}.checkpoint {ACTOR}.profiler {ACTOR}.use_dynamic_bsz {ACTOR}.optim {MEGATRON} {ROLLOUT}"
    f" {ACTOR}.use_torch_compile {ACTOR}.shuffle {ACTOR}.use_remove_padding {ACTOR}.policy_loss.rollout_correction"
    f" {ACTOR}.calculate_entropy {ACTOR}.entropy_from_logits_with_chunking {ACTOR}.entropy_checkpointing hydra"
).split()

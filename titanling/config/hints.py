"""What users of other trainers type, and what it is called here."""

import re

_BATCH = "training.local_batch_size (sequences in a forward pass of one process)"
_GLOBAL = "training.global_batch_size"
_ACCUMULATION = f"{_GLOBAL} (local_batch_size × processes × steps of accumulation)"
_LENGTH = "training.seq_len"
_LR = "optimizer.lr"
_STEPS = "training.steps"
_EPOCHS = "training.steps: a run has so many steps, however often they read the data"
_TYPE = 'training.mixed_precision_param ("bfloat16", "float16" or "float32")'
_FOLDER = "job.dump_folder"
_RESUME = "not needed: with checkpoint.enable = true the same command goes on from its newest checkpoint"
_START = "checkpoint.initial_load_path"
_SAVE = "checkpoint.interval, with checkpoint.enable = true"
_WARMUP = "lr_scheduler.warmup_steps"
_MINIMUM = "lr_scheduler.min_lr_factor (a fraction of optimizer.lr)"
_CLIP = "training.max_norm"
_TP, _PP = "parallelism.tensor_parallel_degree", "parallelism.pipeline_parallel_degree"
_DP = "parallelism.data_parallel_shard_degree"
_GPUS = "NGPU=N in the environment of run_train.sh"
_NODES = "NNODES=N in the environment of run_train.sh"
_DATA = "data.train (token files), data.prepare.text (text) or [[data.sources]] (several)"
_TOKENIZER = "model.hf_assets_path"
_MASK = 'data.document_mask = "causal"'
_RECOMPUTE = "activation_checkpoint.mode"
_LOG, _VALIDATE = "metrics.log_freq", "validation.freq, with validation.enable = true"

_NAMES = {
    _BATCH: "batch_size micro_batch_size mbs train_batch_size per_device_train_batch_size device_batch_size"
    " train_micro_batch_size_per_gpu",
    "validation.local_batch_size": "per_device_eval_batch_size eval_batch_size val_batch_size",
    _GLOBAL: "total_batch_size gbs effective_batch_size",
    _ACCUMULATION: "gradient_accumulation_steps gradient_accumulation_iters accumulate_grad_batches grad_accum"
    " gradient_accumulation accumulation_steps",
    _LENGTH: "max_seq_len max_seq_length max_length seq_length sequence_length block_size context_length n_ctx"
    " max_position_embeddings encoder_seq_length max_model_len",
    _LR: "learning_rate max_lr peak_lr",
    _MINIMUM: "min_lr lr_min min_learning_rate",
    _STEPS: "max_steps train_iters max_iters num_steps train_steps num_train_steps num_training_steps iterations iters",
    _EPOCHS: "epochs num_epochs num_train_epochs max_epochs train_epochs",
    "debug.seed": "random_seed",
    _TYPE: "bf16 fp16 precision mixed_precision torch_dtype amp autocast",
    _FOLDER: "output_dir out_dir save_dir output log_dir run_dir run_name save workdir",
    _RESUME: "resume resume_from_checkpoint resume_from auto_resume load",
    _START: "init_from pretrained_model_name_or_path model_name_or_path from_pretrained initial_checkpoint_dir"
    " pretrained checkpoint_dir load_path",
    _SAVE: "save_steps save_interval save_freq save_every checkpoint_interval ckpt_interval",
    "checkpoint.keep_latest_k": "save_total_limit",
    "checkpoint.enable": "enable_checkpoint",
    "checkpoint.last_save_model_only": "model_weights_only last_save_model_weights_only",
    _WARMUP: "warmup warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps",
    f"{_WARMUP}, in steps": "warmup_ratio lr_warmup_fraction",
    "lr_scheduler.decay_type": "lr_scheduler_type lr_decay_style scheduler",
    "lr_scheduler.total_steps": "lr_decay_iters lr_decay_steps",
    "optimizer.weight_decay": "wd",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon adam_eps",
    _CLIP: "max_grad_norm clip_grad grad_clip gradient_clip_val gradient_clipping clip_grad_norm",
    _TP: "tensor_model_parallel_size tensor_parallel_size tp_size tp tp_degree",
    _PP: "pipeline_model_parallel_size pipeline_parallel_size pp_size pp pp_degree",
    "parallelism.context_parallel_degree": "context_parallel_size cp_size cp",
    _DP: "data_parallel_degree fsdp dp_size dp use_fsdp",
    _GPUS: "nproc_per_node num_gpus gpus devices n_gpus num_processes ngpu",
    _NODES: "nnodes num_nodes num_machines",
    _LOG: "logging_steps log_interval log_every_n_steps log_every",
    _VALIDATE: "eval_steps eval_interval val_interval eval_freq val_check_interval",
    "validation.steps": "eval_iters max_eval_steps",
    _DATA: "data_path train_data train_file train_files dataset_name train_data_path data_dir data_prefix",
    _TOKENIZER: "tokenizer tokenizer_name tokenizer_model tokenizer_name_or_path tokenizer_dir vocab_file",
    "model.n_layers": "num_layers n_layer num_hidden_layers",
    "model.dim": "hidden_size n_embd d_model hidden_dim",
    "model.n_heads": "num_attention_heads n_head num_heads",
    "model.n_kv_heads": "num_key_value_heads num_query_groups n_query_groups",
    "model.ffn_dim": "ffn_hidden_size intermediate_size",
    "model.flavor": "model_name model_size model_config",
    "model.dropout": "attention_dropout hidden_dropout",
    "compile.enable": "compile torch_compile use_compile",
    _RECOMPUTE: "gradient_checkpointing recompute_activations recompute_granularity",
    "metrics.enable_wandb": "wandb report_to wandb_project use_wandb",
    "metrics.enable_tensorboard": "tensorboard tensorboard_dir",
    "[quantize.linear.float8]": "float8",
    "data.workers": "num_workers dataloader_num_workers",
    _MASK: "eod_mask_loss reset_attention_mask reset_position_ids",
    "--config FILE": "c config config_file config_path cfg conf",
}
_HINTS = {name: here for here, names in _NAMES.items() for name in names.split()}


def name_here(name: str) -> str:
    """What another trainer's setting (with or without dashes, its table too) is called here; empty if it is unknown."""
    plain = re.sub(r"[-\s]", "_", name.lstrip("-")).lower()
    return _HINTS.get(plain) or _HINTS.get(plain.rpartition(".")[2], "")

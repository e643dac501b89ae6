"""The training algorithm, top to bottom: build, train_step, evaluate, save, stop. Here alone all rooms meet."""

import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanling import __version__
from titanling.checkpoint.checkpointer import Checkpointer
from titanling.checkpoint.initial import load_initial
from titanling.checkpoint.resume import check_resumable
from titanling.config import Config
from titanling.data.audit import AuditLog
from titanling.data.documents import separate_documents
from titanling.data.loader import cut_rows, validation_batches
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.data.token_files import facts, open_files
from titanling.data.training_text import open_training_text
from titanling.errors import UserError
from titanling.loss import IGNORE_INDEX
from titanling.metrics import MetricsLogger, Throughput, device_memory, flops_per_token, mfu, peak_flops, profile
from titanling.model.generate import generate
from titanling.model.llama import build_on_meta
from titanling.model.presets import LlamaShape
from titanling.optim import LossScaler, build_optimizer, clip_and_step, optimizer_state
from titanling.owner import Owner
from titanling.parallel.compile import uncompiled
from titanling.parallel.degrees import Degrees, accumulation_steps, sequences_per_step
from titanling.parallel.lay_out import build_plans, lay_out
from titanling.parallel.mesh import limit_collectives, local_device, start_world, stop_world
from titanling.parallel.plan import active
from titanling.parallel.runner import Batch
from titanling.parallel.weights import global_norm
from titanling.schedule import lr_factor
from titanling.stop import StopRequest


class Trainer:
    """One run. Build it on every rank, then call `train`, then `close`."""

    def __init__(
        self,
        config: Config,
        shape: LlamaShape,
        degrees: Degrees,
        stop: StopRequest | None = None,
        owner: Owner | None = None,
    ) -> None:
        """`stop` is asked after every step whether to end the run there, `owner` whether its folders are still ours."""
        self.config, self.shape = config, shape
        self.stop, self.stopped = stop or StopRequest(), False
        self.owner = owner or Owner()
        self.interrupted = False  # whether an earlier part of the run was stopped after this step
        self.run_folder = Path(config.job.dump_folder)
        if config.debug.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(config.debug.deterministic)
        device = local_device(config.comm)
        self.plans = build_plans(
            config.parallelism,
            config.training,
            config.activation_checkpoint,
            config.compile,
            config.model,
            config.quantize,
            config.kernels,
            shape=shape,
            degrees=degrees,
            device=device,
        )
        self.world = start_world(degrees, config.comm, device)
        self.accumulation = accumulation_steps(config.training, degrees.dp)
        self.sequences = sequences_per_step(config.training, degrees.dp)
        self.step = self.tokens_seen = 0
        self.losses: dict[str, float] = {}
        self.best: dict[str, float] | None = None  # step and val_loss of the best validation
        self.skipped_steps = torch.zeros((), device=self.world.device)
        with self.world.naming_the_lost():
            self._build_model()
            self._build_data()
            self._build_metrics()
            say, warn = self.metrics.info, self.metrics.warn
            self.checkpointer = Checkpointer(config.checkpoint, self.run_folder, self.world, say, warn)
            self._describe()
            self._resume()

    def _build_model(self) -> None:
        training = self.config.training
        model = build_on_meta(self.shape, getattr(torch, training.dtype))
        self.runner = lay_out(model, self.plans, self.shape, self.world)
        self.runner.initialize(self.config.debug.seed)
        parameters = [parameter for _, parameter in self.runner.named_parameters()]
        self.optimizer = build_optimizer(parameters, self.config.optimizer)
        self.scaler = LossScaler(training.mixed_precision_param == "float16", self.runner.state_device)

    def _build_data(self) -> None:
        config, data, world = self.config, self.config.data, self.world
        assets, validation = config.model.hf_assets_path, data.validation
        self.text = open_training_text(
            data,
            config.training,
            config.debug.seed,
            self.sequences,
            assets,
            lambda line: self.metrics.info(line),
            world.dp_rank,
            world.degrees.dp,
            self.shape.vocab_size,
        )
        self.batches = iter(self.text.loader)
        same = (world.index(dimension) for dimension in ("pp", "cp", "tp"))  # ranks that share their sequences
        self.audit: AuditLog | None = None
        if data.audit_log and self.text.source is not None and not any(same):
            self.audit = AuditLog(self.run_folder, self.text.source, world.dp_rank, world.degrees.dp)
        masked = data.document_mask != "none"
        self.eod_id = self.text.eod_id if masked else None  # None: documents are not told apart
        if config.validation.enable and validation is not None:
            self.validation_set = open_files(validation, data)
            held_out = facts(validation, data)
            self.validation_eod_id = held_out.eod_id if masked else None
            self.bytes_per_token = held_out.utf8_bytes / held_out.tokens if held_out.utf8_bytes is not None else None
        self.tokenizer = load_tokenizer(assets) if config.sampling.freq and assets else None

    def _build_metrics(self) -> None:
        shape, training, device = self.shape, self.config.training, self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.peak_flops = peak_flops(name, training.mixed_precision_param)
        with_head = shape.matmul_params + shape.embedding_params
        self.flops = partial(flops_per_token, with_head, shape.n_layers, shape.n_heads, shape.head_dim)
        self.metrics = MetricsLogger(
            self.config.metrics,
            self.run_folder,
            self.world.rank,
            training.steps,
            self.config.model_dump(mode="json"),
            device_name=name,
            peak_flops=self.peak_flops,
        )

    def _describe(self) -> None:
        shape, training, world = self.shape, self.config.training, self.world
        say = self.metrics.info
        say(f"titanling {__version__}, torch {torch.__version__}: {self.config.job.description}")
        tied = ", tied embeddings" if shape.tie_embeddings else ""
        say(f"model: {shape.total_params:,} parameters, {shape.non_embedding_params:,} non-embedding{tied}")
        tokens = self.sequences * training.seq_len
        say(
            f"batch: {self.sequences} × {training.seq_len} = {tokens:,} tokens a step, {self.accumulation} micro-batch"
            f"{'es' if self.accumulation > 1 else ''} on each of {world.size} process{'es' if world.size > 1 else ''}"
        )
        for line in self.text.lines:
            say(line)
        say(f"device: {world.device.type}")
        for plan in active(self.plans, world):
            say(f"{plan.name}: {plan.describe()}")

    def _resume(self) -> None:
        """Go on from the run's own newest checkpoint, else start from initial_load_path, else from nothing."""
        tensors, config = self._tensors(), self.config.model_dump(mode="json")
        restored = self.checkpointer.restore(
            *tensors,
            self.config.training.steps,
            lambda path, state: check_resumable(path, state, asdict(self.shape), self.text.identity, config),
        )
        restored = restored or load_initial(
            self.config.checkpoint, self.shape, self.text.identity, config, *tensors, self.world
        )
        if restored is None or not restored.goes_on:
            self.metrics.resume_at(0)
        else:
            state = restored.state
            self.step, self.tokens_seen = state["step"], state["tokens_seen"]
            self.skipped_steps.fill_(state["skipped_steps"])
            self.best, self.interrupted = state["best"], state["interrupted"]
            try:
                self.scaler.load(state["scaler"])
                self.text.go_on(state["loader"], self.world.dp_rank)
                self.batches = iter(self.text.loader)
            except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
                # What does not come of a run of ours; no damage, which its hash would have shown.
                raise UserError(f"{restored.what}: its state.json has no usable scaler or loader: {error!r}") from None
            self.metrics.resume_at(self.step, validated=not self.interrupted)
        if self.audit is not None:
            self.audit.resume_at(self.step)
        if restored is not None:
            self.metrics.info("; ".join([restored.what, *restored.remarks]))

    def train(self) -> dict[str, float]:
        """Run to training.steps: train, and where due log, validate, sample and save. Returns the last losses.

        Ends earlier, after a save, and sets `stopped` if the stop request of any rank says so. Raises UserError if the
        last save has failed.
        """
        config = self.config
        self.throughput = Throughput(torch.cuda.synchronize if self.world.device.type == "cuda" else None)
        gc.disable()  # a collection that strikes ranks at different steps makes them wait for each other
        with self.world.naming_the_lost():
            (self.stopped,) = self.world.any(self.stop.requested)
            if self.interrupted and not self.stopped:
                self._make_up()
            with profile(config.profiling, self.run_folder, self.world.rank, self.step) as profiler:
                self._take_steps(profiler.step)
            self.checkpointer.finish()
        return self.losses

    def _take_steps(self, tell_profiler: Callable[[], None]) -> None:
        config, start = self.config, self.step
        while self.step < config.training.steps and not self.stopped:
            loss, grad_norm, lr = self.train_step()
            if self.step == start + 1:  # compiled, connected: from now on, who is late is lost
                limit_collectives(self.world, config.comm.train_timeout_seconds)
            self.throughput.step(self.sequences * config.training.seq_len)
            last = self.step == config.training.steps
            if last or self.step % config.metrics.log_freq == 0 or self.step == 1:
                self._log(loss, grad_norm, lr)
            self._between_steps(last)
            tell_profiler()

    def _between_steps(self, last: bool) -> None:
        self.checkpointer.poll()
        self.stopped, overdue, lost = self.world.any(self.stop.requested, self.checkpointer.overdue(), self.owner.lost)
        if lost:
            self.owner.check(self.world.gather)
        best = self._look(last)
        if self.checkpointer.due(self.step, last, overdue or self.stopped or best):
            with self.throughput.paused():
                self.save(last)
        if self.step % self.config.training.gc_freq == 0:
            gc.collect(1)

    def _look(self, last: bool) -> bool:
        """Validate and sample where due, unless stopped. Whether that made this the best step, to be kept."""
        config, step, best = self.config, self.step, self.best
        # paused() waits for the device, so it is entered only where something is due.
        if config.validation.enable and (last or step % config.validation.freq == 0) and not self.stopped:
            with self.throughput.paused():
                self.evaluate()
        if config.sampling.freq and (last or step % config.sampling.freq == 0) and not self.stopped:
            with self.throughput.paused():
                self.sample()
        return config.checkpoint.keep_best and self.best != best

    def _make_up(self) -> None:
        """Look at the step after which the run was stopped, for there was no time then.

        Its checkpoint stays as it is, for to write it again would put it at risk; the next one knows of the best.
        """
        last = self.step == self.config.training.steps
        if self._look(last) and not last and not self.checkpointer.has(self.step):
            self.save()

    def train_step(self) -> tuple[Tensor, Tensor, float]:
        """One optimizer step over the global batch.

        Returns this rank's share of the mean loss (which is the sum of all ranks' shares), the gradient norm before
        clipping, both 0-dim on the device, and the learning rate.
        Nothing here waits for the device.
        """
        training = self.config.training
        lr = self.config.optimizer.lr * lr_factor(self.config.lr_scheduler, training.steps, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.shape.dropout:
            # A function of (seed, step, rank): dropout needs no random state in the checkpoint.
            seed = (self.config.debug.seed + self.step * 1_000_003) * self.world.size + self.world.rank
            torch.manual_seed(seed % 2**63)
        sample = 0 if self.audit is None else self.text.loader.dataset.samples
        micro_batches = self.text.read(self.batches, self.accumulation, self.world.gather)
        if self.audit is not None:
            self.audit.append(self.step + 1, sample, [batch["input_ids"].numpy() for batch in micro_batches])
        cut = self.text.mixture.seq_len_at(self.tokens_seen // training.seq_len)
        self.seq_len = cut or training.seq_len
        read = [separate_documents(cut_rows(batch, cut), self.eod_id) for batch in micro_batches]
        batches = list(map(self._to_device, read))
        valid = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in batches]).sum()
        # Ranks that share their sequences count the same ones. Integers: exact whatever their number.
        targets = self.world.sum_(valid) // (self.world.size // self.world.degrees.dp)
        loss = self.runner.forward_backward(batches, targets, self.scaler.scale)
        grad_norm, found_inf = clip_and_step(
            self.optimizer, training.max_norm, self.scaler, lambda gradients: global_norm(gradients, self.world)
        )
        self.optimizer.zero_grad()
        self.skipped_steps += found_inf
        self.step += 1
        self.tokens_seen += self.sequences * training.seq_len
        return loss, grad_norm, lr

    def evaluate(self) -> None:
        """Mean loss in nats per token over the validation set, which is the same at any world size."""
        settings, training, start = self.config.validation, self.config.training, time.perf_counter()
        world = self.world
        totals = torch.zeros(2, device=self.world.device, dtype=torch.float64)
        seq_len = settings.seq_len or training.seq_len
        batches = validation_batches(
            self.validation_set, seq_len, settings.local_batch_size, settings.steps, world.dp_rank, world.degrees.dp
        )
        batches = (separate_documents(batch, self.validation_eod_id) for batch in batches)
        alike = world.size // world.degrees.dp  # ranks that share their sequences
        with self.runner.evaluation():
            for batch in map(self._to_device, batches):
                (self.stopped,) = self.world.any(self.stop.requested)
                if self.stopped:  # the time that is left belongs to the checkpoint
                    return
                totals[0] += self.runner.loss_sum(batch)
                totals[1] += (batch["labels"] != IGNORE_INDEX).sum() / alike
        loss_sum, tokens = self.world.sum_(totals).tolist()
        loss = self.losses["validation loss"] = loss_sum / tokens
        if math.isfinite(loss) and (self.best is None or loss < self.best["val_loss"]):
            self.best = {"step": self.step, "val_loss": loss}
        row = {"step": self.step, "val_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.bytes_per_token is not None:  # unknown of the files of others
            row["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        self.metrics.log_validation(row | {"seconds": time.perf_counter() - start})

    def sample(self) -> None:
        """Print a continuation of each prompt."""
        settings, files = self.config.sampling, self.tokenizer
        assert files is not None  # check_runnable saw to it
        for prompt in settings.prompts:
            ids = torch.tensor(files.tokenizer.encode(prompt).ids)
            with self.runner.evaluation(), uncompiled():
                new = generate(
                    self.runner.decoder(len(ids) + settings.max_new_tokens),
                    ids.to(self.world.device),
                    settings.max_new_tokens,
                    temperature=settings.temperature,
                    seed=self.config.debug.seed,
                    stop_id=files.eod_id,
                )
            self.metrics.log_text(self.step, "sample", prompt + files.tokenizer.decode(new))

    def save(self, last: bool = False) -> None:
        """Save a checkpoint of this step; `last`: of the whole run. Raises UserError if its folder is another's."""
        self.owner.check(self.world.gather)
        world = self.world
        state: dict[str, Any] = {
            "format": 1,
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "skipped_steps": self.skipped_steps.item(),
            "best": self.best,
            "interrupted": self.stopped,
            "scaler": self.scaler.state(),
            "loader": self.text.state(world.gather, world.dp_rank),
            "data": self.text.identity,
            "model": asdict(self.shape),
            "config": self.config.model_dump(mode="json"),
        }
        self.checkpointer.save(self.step, *self._tensors(), state, last, ending=self.stopped)

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a checkpoint holds of the model and of the optimizer, by name: the live tensors, not copies."""
        parameters = self.runner.named_parameters()
        weights = {name: parameter.detach() for name, parameter in parameters}
        return weights, optimizer_state(parameters, self.optimizer)

    def close(self) -> None:
        """Flush the metrics and leave the process group."""
        gc.enable()
        self.metrics.close()
        if self.audit is not None:
            self.audit.close()
        with self.world.naming_the_lost():
            stop_world(self.world)

    def _log(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        mean_loss = self.losses["training loss"] = self.world.sum_(loss).item()
        row: dict[str, float | int] = {
            "step": self.step,
            "loss": mean_loss,
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens_seen": self.tokens_seen,
            "skipped_steps": int(self.skipped_steps.item()),
            "memory_bytes": device_memory(self.world.device.type).peak,
        }
        rate = self.throughput.read()
        row |= {"tokens_per_second": rate.tokens_per_second, "step_seconds": rate.step_seconds}
        if self.peak_flops is not None:
            speed = rate.tokens_per_second / self.world.size
            flops = self.flops(self.seq_len)
            row["mfu_full"] = mfu(speed, flops.full, self.peak_flops)
            row["mfu_causal"] = mfu(speed, flops.causal, self.peak_flops)
        if self.scaler.enabled:
            row["loss_scale"] = self.scaler.scale.item()
        self.metrics.log_step(row)

    def _to_device(self, batch: Batch) -> Batch:
        device = self.world.device
        if device.type == "cuda":  # only from pinned memory does a copy not make the host wait
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

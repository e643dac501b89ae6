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

from titanling.bfloat16 import stuck
from titanling.checkpoint.checkpointer import Checkpointer
from titanling.checkpoint.initial import load_initial
from titanling.checkpoint.phases import Past, past_of
from titanling.checkpoint.resume import check_resumable
from titanling.config import Config
from titanling.data.audit import AuditLog
from titanling.data.documents import separate_documents
from titanling.data.loader import cut_rows
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.data.training_text import open_training_text
from titanling.doubts import doubts, lr_jump
from titanling.errors import UserError
from titanling.introduction import introduction
from titanling.loss import IGNORE_INDEX
from titanling.metrics import MetricsLogger, Throughput, device_memory, flops_per_token, mfu, peak_flops, profile
from titanling.model.llama import build_on_meta
from titanling.model.presets import LlamaShape
from titanling.optim import LossScaler, clip_and_step, make_optimizer, optimizer_state
from titanling.outcomes import Outcomes
from titanling.owner import Owner
from titanling.parallel.degrees import Degrees, accumulation_steps, sequences_per_step
from titanling.parallel.lay_out import build_plans, lay_out
from titanling.parallel.mesh import limit_collectives, local_device, start_world, stop_world
from titanling.parallel.precision import compute_dtype
from titanling.parallel.runner import to_device
from titanling.parallel.weights import global_norm
from titanling.sampling import samples
from titanling.schedule import lr_factor, trunk_end
from titanling.sizes import check_device, room
from titanling.stop import StopRequest
from titanling.summary import Failure
from titanling.validation import HeldOut


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
        check_device(config, shape, degrees, *room(device.type))
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
        self._to_device = partial(to_device, device=self.world.device)
        self.step = self.tokens_seen = 0
        self.losses: dict[str, float] = {}
        self.past = Past()  # of the weights, before this run
        self.best: dict[str, float] | None = None  # step and val_loss of the best validation
        self.trunk_end = trunk_end(config.lr_scheduler, config.training.steps)
        self.trunk_ends = {self.trunk_end} - {None}  # checkpoints that stay, for longer runs go on from them
        self.failure: Failure | None = None
        with self.world.naming_the_lost():
            self._build_model()
            self._build_data()
            self._build_metrics()
            say, warn = self.metrics.info, self.metrics.warn
            self.outcomes = Outcomes(warn, self.scaler.enabled)
            self.checkpointer = Checkpointer(config.checkpoint, self.run_folder, self.world, say, warn)
            sizes = self.sequences, self.accumulation
            for line in introduction(config, shape, self.world, sizes, self.text.lines, self.plans):
                say(line)
            self._resume()
            for line in (*doubts(config), *stuck(self.runner.named_parameters(), config, self.world)):
                warn(line)
            self.put_off = False  # whether a save waits for the next step that updates

    def _build_model(self) -> None:
        training = self.config.training
        model = build_on_meta(self.shape, getattr(torch, training.dtype))
        self.runner = lay_out(model, self.plans, self.shape, self.world)
        self.runner.initialize(self.config.debug.seed)
        self.optimizer = make_optimizer(self.runner.named_parameters(), self.config.optimizer, self.config.debug.seed)
        self.scaler = LossScaler(training.mixed_precision_param == "float16", self.runner.state_device)

    def _build_data(self) -> None:
        config, data, world = self.config, self.config.data, self.world
        assets = config.model.hf_assets_path
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
        masked, end = data.document_mask != "none", self.text.documents["eod_id"]
        self.eod_id = end if masked else None  # None: documents are not told apart
        if config.validation.enable:
            self.held_out = HeldOut(config.validation, data, config.training.seq_len, self.shape.vocab_size)
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
        if restored is not None:
            self.past = past_of(restored.state, config, restored.goes_on)
        if restored is None or not restored.goes_on:
            self.metrics.resume_at(0)
        else:
            state = restored.state
            self.step, self.tokens_seen = state["step"], state["tokens_seen"]
            self.outcomes.load(state)
            self.best, self.interrupted = state["best"], state["interrupted"]
            self.trunk_ends |= set(state.get("trunk_ends", ()))
            jump = lr_jump(state["config"], self.config, self.step)
            if jump is not None:
                self.metrics.warn(jump)
            try:
                self.scaler.load(state["scaler"])
                self.text.go_on(state["loader"], self.world.dp_rank)
                self.batches = iter(self.text.loader)
            except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, AssertionError) as error:
                # What does not come of a run of ours; no damage, which its hash would have shown.
                raise UserError(f"{restored.what}: its state.json has no usable scaler or loader: {error!r}") from None
            self.metrics.resume_at(self.step, validated=not self.interrupted)
        if self.audit is not None:
            self.audit.resume_at(self.step, self.metrics.info)
        if restored is not None:
            self.metrics.info("; ".join([restored.what, *restored.remarks]))

    def train(self) -> dict[str, float]:
        """Run to training.steps: train, and where due log, validate, sample and save. Returns the last losses.

        Ends earlier, after a save, and sets `stopped` if the stop request of any rank says so. Raises UserError if the
        last save has failed. Sets `failure`, too after a save, if too many steps in a row have updated nothing.
        """
        config = self.config
        self.throughput = Throughput(torch.cuda.synchronize if self.world.device.type == "cuda" else None)
        gc.disable()  # a collection that strikes ranks at different steps makes them wait for each other
        with self.world.naming_the_lost():
            if not self._asked_to_stop() and self.interrupted:
                self._make_up()
            with profile(config.profiling, self.run_folder, self.world.rank, self.step, self.metrics.guard) as profiler:
                self._take_steps(profiler.step)
            self.checkpointer.finish()
            self._judge()
        return self.losses

    def _take_steps(self, tell_profiler: Callable[[], None]) -> None:
        config, start = self.config, self.step
        while self.step < config.training.steps and not self.stopped and not self.failure:
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
        self.outcomes.poll()
        hopeless = 0 < self.config.training.max_skipped_in_a_row <= self.outcomes.in_a_row
        asked = self.stop.requested, self.checkpointer.overdue(), self.owner.lost, hopeless
        self.stopped, overdue, lost, hopeless = self.world.any(*asked)
        if lost:
            self.owner.check(self.world.gather)
        best = self._look(last)
        if hopeless:
            self._judge()
        ending = bool(last or self.stopped or self.failure)
        kept = best or self.step == self.trunk_end  # of this very step
        if self.checkpointer.due(self.step, last, overdue or ending or kept or self.put_off):
            # Saves of a run that learns nothing must not take the room of those from before.
            self.put_off = self.outcomes.settle().in_a_row > 0 and not ending and not kept
            if not self.put_off:
                with self.throughput.paused():
                    self.save(last)
        if self.step % self.config.training.gc_freq == 0:
            gc.collect(1)

    def _judge(self) -> None:
        """Has the run come to nothing? Then `failure` says so."""
        found = self.outcomes.settle().failure(self.step, self.config.training)
        if found is not None and not self.stopped:
            self.failure = found._replace(older=self.checkpointer.before(found.first - 1))

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
            group |= {"lr": lr, "step": self.step}
        if self.shape.dropout:
            # A function of (seed, step, rank): dropout needs no random state in the checkpoint.
            seed = (self.config.debug.seed + self.step * 1_000_003) * self.world.size + self.world.rank
            torch.manual_seed(seed % 2**63)
        first = self.tokens_seen // training.seq_len  # of the run's samples
        sample = 0 if self.audit is None else self.text.loader.dataset.samples
        micro_batches = self.text.read(self.batches, self.accumulation, self.world.gather)
        if self.audit is not None:
            ids = [batch["input_ids"].numpy() for batch in micro_batches]
            self.metrics.guard("audit log", partial(self.audit.append, self.step + 1, sample, ids))
        cut = self.text.mixture.seq_len_at(first)
        self.seq_len = cut or training.seq_len
        read = [separate_documents(cut_rows(batch, cut), self.eod_id) for batch in micro_batches]
        batches = list(map(self._to_device, read))
        valid = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in batches]).sum()
        # Ranks that share their sequences count the same ones. Integers: exact whatever their number.
        targets = self.world.sum_(valid) // (self.world.size // self.world.degrees.dp)
        loss = self.runner.forward_backward(batches, targets.clamp(min=1), self.scaler.scale)
        norm = partial(global_norm, world=self.world, loss=loss)
        grad_norm, found_inf = clip_and_step(self.optimizer, training.max_norm, self.scaler, norm, targets == 0)
        self.optimizer.zero_grad()
        self.step += 1
        which = "" if self.text.source is None else f" (sequences {first} to {first + self.sequences - 1})"
        self.outcomes.count(self.step, which, found_inf, targets == 0)
        self.tokens_seen += self.sequences * training.seq_len
        return loss, grad_norm, lr

    def evaluate(self) -> None:
        """Mean loss in nats per token over the validation set, which is the same at any world size."""
        start = time.perf_counter()
        loss = self.held_out.mean_loss(self.runner, self.world, self._to_device, self._asked_to_stop)
        if loss is None:  # the time that is left belongs to the checkpoint
            return
        self.losses["validation loss"] = loss
        if not math.isfinite(loss):
            self.metrics.warn(f"the validation loss after step {self.step} is {loss}, which is never the best")
        elif self.best is None or loss < self.best["val_loss"]:
            self.best = {"step": self.step, "val_loss": loss}
        self.metrics.log_validation(self.held_out.row(self.step, loss) | {"seconds": time.perf_counter() - start})

    def _asked_to_stop(self) -> bool:
        (self.stopped,) = self.world.any(self.stop.requested)
        return self.stopped

    def sample(self) -> None:
        """Print a continuation of each prompt."""
        assert self.tokenizer is not None  # check_runnable saw to it
        config, ends = self.config, self.text.documents
        stops = [ends["eod_id"], *self.past.eos_ids()]
        device, seed = self.world.device, config.debug.seed
        for text in samples(config.sampling, self.tokenizer, self.runner, device, seed, ends["bos_id"], stops):
            self.metrics.log_text(self.step, "sample", text)

    def save(self, last: bool = False) -> None:
        """Save a checkpoint of this step; `last`: of the whole run. Raises UserError if its folder is another's."""
        self.owner.check(self.world.gather)
        world = self.world
        state: dict[str, Any] = {
            "format": 1,
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            **self.outcomes.state(),
            "best": self.best,
            "trunk_ends": sorted(step for step in self.trunk_ends if step <= self.step),
            "interrupted": self.stopped,
            "scaler": self.scaler.state(),
            "loader": self.text.state(world.gather, world.dp_rank),
            "data": self.text.identity,
            "documents": self.text.documents,
            "computed_in": str(compute_dtype(world.device, self.config.training)).removeprefix("torch."),
            "model": asdict(self.shape),
            "config": self.config.model_dump(mode="json"),
        } | self.past.state()
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
        mean_loss = self.world.sum_(loss).item()
        if self.outcomes.settle().last != "empty":
            self.losses["training loss"] = mean_loss
        row: dict[str, float | int] = {
            "step": self.step,
            "loss": mean_loss,
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens_seen": self.tokens_seen,
            **self.outcomes.state(),
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

"""Distil BERT: one explicit loop.

    python train.py                                          a demonstration on text of its own
    python train.py --teacher MODEL --data CORPUS --out RUN  the recipe of CompactBioBERT
    python train.py --out RUN --resume                       go on from the newest checkpoint
    torchrun --nproc-per-node 8 train.py ...                 the same run on eight GPUs

A run folder holds config.json, metrics.jsonl, step_*/ (checkpoints) and at the end student/, a
model folder (model/ where there is no teacher). `python train.py --help` explains every flag.
"""

import copy
import dataclasses
import time
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from minibert.config import BertConfig
from minibert.data.batches import Batches, GlobalBatch, MicroBatch
from minibert.data.corpus import Corpus
from minibert.demonstration import demonstration
from minibert.errors import ArgumentParser, InputError, Stopped, run_command
from minibert.evaluate import check_fit, evaluate, load_for_corpus
from minibert.folder import CONFIG, save_model
from minibert.model import BertForMaskedLM
from minibert.ops import fused, plain
from minibert.ops.frozen import freeze
from minibert.recipes import ATTENTION_LOSSES, HIDDEN_LOSSES
from minibert.run_config import RunConfig
from minibert.student import Student, layers_to_follow, new_student, without_projection
from minibert.training.checkpoint import State, load_newest, run_folder, save_checkpoint, sources
from minibert.training.device import (
    MICRO_BATCH_TOKENS,
    RELEASE_MEMORY_EVERY,
    device_type,
    out_of_memory_is_told,
    release_freed_memory,
    set_up_device,
)
from minibert.training.distributed import (
    agreed,
    exchange_at,
    from_rank_0,
    is_restart,
    local_rank,
    rank,
    ranks_joined,
    shared_gradients,
    summed,
    together,
    world_size,
)
from minibert.training.nonfinite import NonfiniteWatch, pass_over_unless_finite
from minibert.training.optimizer import LARGEST_GRAD_NORM, build_optimizer, learning_rate_at
from minibert.training.runlog import RunLog, how_to_go_on
from minibert.training.seeds import dropout_seed
from minibert.training.stopping import StopRequest


def train(run: RunConfig) -> None:
    """Train as `run` says, from its beginning or its newest checkpoint, to its end.

    Under torchrun every rank is in here: each takes its share of every batch, all take the same
    updates, and rank 0 writes.
    """
    with together():  # what a run is made of
        device = set_up_device(run.device, local_rank())
        corpus = Corpus.open(run.data)
        student, teacher, run = build_models(run, corpus, device)
        at_once = run.micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]
        sizes = (run.max_length, at_once, run.batch_size)
        packed = is_packed(run, device)
        batches = Batches(corpus, *sizes, run.seed, rank(), world_size(), packed)
        held_out = batches.held_out(run.eval_documents)[rank() :: world_size()]
        optimizer = build_optimizer(student, run.weight_decay)
        learnt_from = sources(run, corpus)

    with run_folder(run, learnt_from), StopRequest(run.max_hours) as stop:
        first_step, skipped = load_newest(run.out, student, optimizer)
        log = RunLog(run.out, first_step, run.steps)
        watch = NonfiniteWatch(run, batches, skipped)
        learner, guide = forward_passes(student, teacher, run)  # both as the steps run them
        pupil = without_projection(student)  # the student as it is evaluated, and saved at last
        compare = partial(evaluate, pupil, held_out, teacher, combine=summed, quiet=rank() > 0)
        saved_at = time.monotonic()
        steps = range(first_step, run.steps)
        with batches.ahead(steps, device.type == "cuda") as ahead:
            for step, batch in zip(steps, ahead, strict=True):
                if step % run.eval_every == 0:
                    log.evaluation(step, compare)
                figures = update(learner, guide, optimizer, batch, step, run)

                # What is told and kept after that many updates.
                done = step + 1
                watch.add(done, figures)
                log.tokens += batch.num_tokens
                save_due = time.monotonic() - saved_at >= 60 * run.save_minutes
                # Asked in this order: of a signal in between, the next update knows.
                end, status, keep = agreed(stop.is_made(), stop.status(), save_due)
                keep = keep or end or done % run.save_every == 0 or done == run.steps
                tell = done % run.log_every == 0 or done == run.steps
                if tell or keep:  # until then nothing waits for the device
                    newest = watch.look()
                if tell:
                    log.update(done, newest, optimizer.param_groups[0]["lr"], watch.skipped)
                if keep:
                    with log.apart():
                        state = State(done, watch.skipped)
                        save_checkpoint(run.out, state, student, optimizer, run.keep)
                    saved_at = time.monotonic()
                if end and done < run.steps:
                    log.stopped(done)
                    raise Stopped(status)

        log.evaluation(run.steps, compare)
        result = run.out / ("model" if teacher is None else "student")
        with together():
            if rank() == 0:
                save_model(result, pupil, tokenizer_from=run.data)
        log.summary(result)


def update(
    student: Student,
    teacher: BertForMaskedLM | None,
    optimizer: torch.optim.Optimizer,
    batch: GlobalBatch,
    step: int,
    run: RunConfig,
) -> Tensor:
    """One update: a global batch, its losses, their gradient, the new weights.

    Returns the update's figures, as `runlog.named_figures` reads them.
    """
    torch.manual_seed(dropout_seed(run.seed, step, rank()))
    student.train()
    totals = 0.0
    for micro_batch in batch.micro_batches:
        with exchange_at(micro_batch is batch.micro_batches[-1], student):
            micro_batch = micro_batch.to(student.decoder.device)
            terms = loss_terms(student, teacher, micro_batch, batch, run)
            loss = (
                terms.vocabulary_loss  # run.mlm_weight * mlm + run.output_weight * output
                + run.hidden_weight * terms.hidden_loss.sum()
                + run.attention_weight * terms.attention_loss.sum()
            )
            (loss * world_size()).backward()  # exchanged is the ranks' mean: so it is their sum
        # In the order that `runlog.named_figures` reads; the gradient's norm is the last of all.
        parts = [part.detach().reshape(-1) for part in (loss, *terms[1:])]
        totals = totals + torch.cat(parts)
        del loss, terms  # and with them what is kept of the micro-batch for its backward
    totals = summed(totals)
    grad_norm = clip_grad_norm_(student.parameters(), LARGEST_GRAD_NORM)
    figures = torch.cat([totals, grad_norm.reshape(1)])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, run.steps, run.warmup_steps, run.learning_rate)
    pass_over_unless_finite(optimizer, figures)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if step % RELEASE_MEMORY_EVERY[run.ops] == 0:
        release_freed_memory()
    return figures


class LossTerms(NamedTuple):
    """The loss terms of a micro-batch, as its part of the means over the global batch."""

    # (): mlm_weight * mlm_loss + output_weight * output_loss. Weighted already, since its gradient
    # is formed with its value.
    vocabulary_loss: Tensor
    mlm_loss: Tensor  # () without gradient, for the log
    hidden_loss: Tensor  # one for each of the run's hidden_pairs
    attention_loss: Tensor  # one for each of its attention_pairs
    output_loss: Tensor  # () without gradient, for the log


def loss_terms(
    student: Student,
    teacher: BertForMaskedLM | None,
    batch: MicroBatch,
    whole: GlobalBatch,
    run: RunConfig,
) -> LossTerms:
    """Run student and teacher on a micro-batch and compare them, in what the run's recipe names.

    Every term is a sum over the micro-batch divided by a count over the `whole` global batch; so
    the terms of all micro-batches add up to the same, however the batch was cut. Where the authors
    take a mean over padded maps or hidden states, padding counts; here only real tokens do, and a
    row of a map has `run.max_length` elements: the same where every text is that long.
    """
    ops = {"fused": fused, "plain": plain}[run.ops]
    hidden_state_loss = getattr(ops, HIDDEN_LOSSES[run.recipe.hidden_loss])
    attention_map_loss = getattr(ops, ATTENTION_LOSSES[run.recipe.attention_loss])
    mask = batch.attention_mask
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": mask,
        "position_ids": batch.position_ids,
        "masked_positions": batch.masked_positions,
        "ops": ops,
    }
    half = torch.bfloat16 if run.dtype == "bfloat16" else None
    teacher_head, follow = (None, None, None), {}
    if teacher is not None:
        assert not teacher.training, "the teacher's dropout would make its targets noisy"
        # A frozen set, since torch.compile would take numbers in a list for sizes that vary.
        keep = frozenset(j for _, j in run.attention_pairs)
        with torch.inference_mode():
            taught = teacher(**given, keep=keep)
        teacher_head = (taught.head_output, teacher.decoder, teacher.decoder_bias)
        follow = {i: (taught.queries[j], taught.keys[j]) for i, j in run.attention_pairs}
    learnt = student(**given, dtype=half, follow=follow, map_loss=attention_map_loss)
    # Not `student.decoder`: of both uses of that matrix there is one gradient (`ops.look_up`).
    student_head = (learnt.head_output, learnt.word_embeddings, student.decoder_bias)
    attention_sums = [learnt.map_losses[i] for i, _ in run.attention_pairs]
    hidden_sums = []
    if teacher is not None:
        student_levels = (learnt.embedding_output, *learnt.hidden_states)
        teacher_levels = (taught.embedding_output, *taught.hidden_states)
        for i, j in run.hidden_pairs:
            hidden_sums.append(hidden_state_loss(student_levels[i], teacher_levels[j], mask))
        del taught, teacher_levels, follow  # so that they need not lie beside the logits
    num_masked = max(1, whole.num_masked)
    weights = (run.mlm_weight / num_masked, run.output_weight / num_masked)
    vocabulary_loss, mlm_sum, output_sum = ops.vocabulary_loss(
        *student_head, *teacher_head, batch.labels, run.temperature, *weights,
        teacher_entropy=run.recipe.output_loss == "cross_entropy",
    )  # fmt: skip
    map_elements = whole.num_tokens * student.config.num_attention_heads * run.max_length
    return LossTerms(
        vocabulary_loss=vocabulary_loss,
        mlm_loss=mlm_sum / num_masked,
        hidden_loss=stacked(hidden_sums, mask.device) / whole.num_tokens,
        attention_loss=stacked(attention_sums, mask.device) / map_elements,
        output_loss=output_sum / num_masked,
    )


def stacked(scalars: list[Tensor], device: torch.device) -> Tensor:
    """Scalars as one tensor, also where there are none."""
    return torch.stack(scalars) if scalars else torch.zeros(0, device=device)


def build_models(
    run: RunConfig, corpus: Corpus, device: torch.device
) -> tuple[Student, BertForMaskedLM | None, RunConfig]:
    """The model to train, its teacher if the recipe has one, and `run` with its layers named."""
    teacher = None
    if run.teacher is not None:
        teacher = load_for_corpus(run.teacher, corpus, run.max_length).requires_grad_(False)
        depth = teacher.config.num_hidden_layers
        layers = layers_to_follow(run.recipe, depth, run.teacher_layers)
        run = dataclasses.replace(run, teacher_layers=layers)
        student = new_student(teacher, run)
    elif run.model.is_dir():
        student = load_for_corpus(run.model, corpus, run.max_length)
    else:
        torch.manual_seed(run.seed)
        student = BertForMaskedLM(BertConfig.read(run.model))
        check_fit(run.model, student.config, corpus, run.max_length)
    student.to(device)
    if teacher is not None:
        teacher.to(device)
    return student, teacher, run


def is_packed(run: RunConfig, device: torch.device) -> bool:
    """Whether micro-batches are packed: for the operations that then compute no padding."""
    return run.ops == "fused" and device.type == "cpu"


def forward_passes(
    student: Student, teacher: BertForMaskedLM | None, run: RunConfig
) -> tuple[Student, BertForMaskedLM | None]:
    """Student and teacher as the steps run them; evaluations take the models themselves.

    The steps' teacher has its weights in the run's dtype, so that they are rounded once, and on a
    CPU (`freeze`) of a type that fused operations know; in float32 they are the teacher's own, and
    what they hold stays. MLM alone does not wait for a teacher.
    """
    learner, guide = student, None
    if run.follows_teacher:
        guide = teacher
        if run.dtype == "bfloat16":
            guide = copy.deepcopy(teacher).to(torch.bfloat16)
        if run.ops == "fused" and not run.compile:
            freeze(guide)
    if run.compile:  # twice: for the sizes of the first batch, then for any
        learner = torch.compile(learner)
        guide = None if guide is None else torch.compile(guide)
    return shared_gradients(learner), guide


def main() -> None:
    parser = ArgumentParser(prog="python train.py", description=__doc__.split("\n")[0])
    RunConfig.add_flags(parser)
    with ranks_joined():
        with together():
            given = vars(parser.parse_args())
            if not given and world_size() > 1:
                raise InputError("without flags this is the demonstration, for one process")
        if not given:
            demonstration(train)
            return
        (restarted,) = agreed(is_restart())
        run = from_rank_0(lambda: RunConfig.from_flags(given, restarted))
        at_once = run.micro_batch_tokens or MICRO_BATCH_TOKENS[device_type(run.device)]
        advice = f"try --micro-batch-tokens below {at_once}"
        try:
            with out_of_memory_is_told(advice):
                train(run)
        except KeyboardInterrupt:
            if (run.out / CONFIG).exists():
                print(f"\nwhat was saved stays: {how_to_go_on(run.out)}")
            raise


if __name__ == "__main__":
    raise SystemExit(run_command(main))

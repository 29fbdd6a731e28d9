"""Distil BERT: one explicit loop.

    python train.py                                          a demonstration on text of its own
    python train.py --teacher MODEL --data CORPUS --out RUN  the recipe of CompactBioBERT
    python train.py --out RUN --resume                       go on from the newest checkpoint

A run folder holds config.json, metrics.jsonl, step_*/ (checkpoints) and at the end student/, a
model folder (model/ where there is no teacher). `python train.py --help` explains every flag.
"""

import copy
import dataclasses
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from minibert.config import BertConfig, RunConfig
from minibert.data import demo
from minibert.data.batches import Batches, GlobalBatch, MicroBatch
from minibert.data.corpus import Corpus
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.evaluate import check_fit, evaluate, load_for_corpus
from minibert.files import sha256_of_files, write_json
from minibert.folder import WEIGHTS, save_model
from minibert.model import BertForMaskedLM
from minibert.ops import fused, plain
from minibert.prepare import prepare
from minibert.progress import counted
from minibert.student import every_second_layer, student_from_teacher
from minibert.training.checkpoint import enter_run_folder, load_newest, save_checkpoint
from minibert.training.device import release_freed_memory, set_up_device
from minibert.training.optimizer import LARGEST_GRAD_NORM, build_optimizer, learning_rate_at
from minibert.training.runlog import RunLog


def train(run: RunConfig) -> None:
    """Train as `run` says, from its beginning or its newest checkpoint, to its end."""
    # What a run is made of.
    device = set_up_device(run.device)
    corpus = Corpus.open(run.data)
    student, teacher, run = build_models(run, corpus, device)
    batches = Batches(corpus, run.max_length, run.micro_batch_tokens, run.batch_size, run.seed)
    held_out = batches.held_out(run.eval_documents)
    optimizer = build_optimizer(student, run.weight_decay)
    enter_run_folder(run, identity(run, corpus))
    first_step = load_newest(run.out, student, optimizer)
    log = RunLog(run.out, first_step, run.steps)
    learner, guide = forward_passes(student, teacher, run)

    if first_step == 0:
        with log.apart():
            log.evaluation(0, evaluate(student, counted(held_out, "evaluating"), teacher))

    steps = range(first_step, run.steps)
    for step, batch in zip(steps, batches.ahead(steps, device.type == "cuda"), strict=True):
        # One update: a global batch, its losses, their gradient, the new weights.
        torch.manual_seed(dropout_seed(run.seed, step))
        student.train()
        totals = [0.0] * 5  # for the log: the loss and its four terms
        for micro_batch in batch.micro_batches:
            terms = loss_terms(learner, guide, micro_batch.to(device), batch, run)
            loss = (
                terms.vocabulary_loss  # run.mlm_weight * mlm + run.output_weight * output
                + run.hidden_weight * terms.hidden_loss.sum()
                + run.attention_weight * terms.attention_loss.sum()
            )
            loss.backward()
            for i, term in enumerate((loss, *terms[1:])):
                totals[i] = totals[i] + term.detach()
        grad_norm = clip_grad_norm_(student.parameters(), LARGEST_GRAD_NORM)
        learning_rate = learning_rate_at(step, run.steps, run.warmup_steps, run.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # What is told and kept after that many updates.
        done = step + 1
        log.tokens += batch.num_tokens
        if done % 10 == 0:
            release_freed_memory()  # gaps between tensors of ever new sizes add up
        tell, compare, keep = (
            done % every == 0 or done == run.steps
            for every in (run.log_every, run.eval_every, run.save_every)
        )
        if (tell or keep) and not math.isfinite(grad_norm):
            raise InputError(
                f"step {done}: the gradient is {grad_norm}; the newest checkpoint stays"
            )
        if tell:
            log.update(done, *totals, learning_rate=learning_rate, grad_norm=grad_norm)
        with log.apart():
            if compare:
                log.evaluation(done, evaluate(student, counted(held_out, "evaluating"), teacher))
            if keep:
                save_checkpoint(run.out, done, student, optimizer, run.keep)

    result = run.out / ("model" if teacher is None else "student")
    save_model(result, student, tokenizer_from=run.data)
    log.summary(result)


class LossTerms(NamedTuple):
    """The loss terms of a micro-batch, as its part of the means over the global batch."""

    vocabulary_loss: Tensor  # (): mlm_weight * mlm_loss + output_weight * output_loss
    mlm_loss: Tensor  # () without gradient, for the log
    hidden_loss: Tensor  # (L,) one for each student layer
    attention_loss: Tensor  # (L,)
    output_loss: Tensor  # () without gradient, for the log


def loss_terms(
    student: BertForMaskedLM,
    teacher: BertForMaskedLM | None,
    batch: MicroBatch,
    whole: GlobalBatch,
    run: RunConfig,
) -> LossTerms:
    """Run student and teacher on a micro-batch and compare them.

    Every term is a sum over the micro-batch divided by a count over the `whole` global batch; so
    the terms of all micro-batches add up to the same, however the batch was cut.
    """
    N = student.config.num_attention_heads
    ops = {"fused": fused, "plain": plain}[run.ops]
    mask = batch.attention_mask
    where = {"attention_mask": mask, "masked_positions": batch.masked_positions, "ops": ops}
    # Student layer i follows teacher layer layers[i].
    layers = () if teacher is None else run.teacher_layers
    half = torch.bfloat16 if run.dtype == "bfloat16" else None
    learnt = student(batch.input_ids, **where, keep=range(len(layers)), dtype=half)
    student_head = (learnt.head_output, student.decoder, student.decoder_bias)
    teacher_head = (None, None, None)
    hidden_sums, attention_sums = [], []
    if teacher is not None:
        assert not teacher.training, "the teacher's dropout would make its targets noisy"
        with torch.inference_mode():
            taught = teacher(batch.input_ids, **where, keep=layers)
        teacher_head = (taught.head_output, teacher.decoder, teacher.decoder_bias)
        for i, j in enumerate(layers):
            hidden = (learnt.hidden_states[i], taught.hidden_states[j])
            maps = (learnt.queries[i], learnt.keys[i], taught.queries[j], taught.keys[j])
            hidden_sums.append(ops.hidden_state_loss(*hidden, mask))
            attention_sums.append(ops.attention_map_loss(*maps, mask))
    num_masked = max(1, whole.num_masked)
    weights = (run.mlm_weight / num_masked, run.output_weight / num_masked)
    vocabulary_loss, mlm_sum, output_sum = ops.vocabulary_loss(
        *student_head, *teacher_head, batch.labels, run.temperature, *weights
    )
    return LossTerms(
        vocabulary_loss=vocabulary_loss,
        mlm_loss=mlm_sum / num_masked,
        hidden_loss=stacked(hidden_sums) / whole.num_tokens,
        attention_loss=stacked(attention_sums) / (whole.num_tokens * N * run.max_length),
        output_loss=output_sum / num_masked,
    )


def stacked(scalars: list[Tensor]) -> Tensor:
    """L scalars as one tensor (L,), also where there are none."""
    return torch.stack(scalars) if scalars else torch.zeros(0)


def build_models(
    run: RunConfig, corpus: Corpus, device: torch.device
) -> tuple[BertForMaskedLM, BertForMaskedLM | None, RunConfig]:
    """The model to train, its teacher if the recipe has one, and `run` with its layers named."""
    teacher = None
    if run.teacher is not None:
        teacher = load_for_corpus(run.teacher, corpus, run.max_length).requires_grad_(False)
        layers = run.teacher_layers or every_second_layer(teacher.config.num_hidden_layers)
        run = dataclasses.replace(run, teacher_layers=layers)
        student = student_from_teacher(teacher, layers)
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


def forward_passes(
    student: BertForMaskedLM, teacher: BertForMaskedLM | None, run: RunConfig
) -> tuple[BertForMaskedLM, BertForMaskedLM | None]:
    """Student and teacher as the steps run them; evaluations take the models themselves.

    The steps' teacher has its weights in the run's dtype, so that they are rounded once. MLM alone
    does not wait for a teacher.
    """
    learner, guide = student, None
    if teacher is not None and (run.hidden_weight or run.attention_weight or run.output_weight):
        guide = teacher
        if run.dtype == "bfloat16":
            guide = copy.deepcopy(teacher).to(torch.bfloat16)
    if run.compile:  # for the sizes of the first batch, and once more for any
        learner = torch.compile(learner)
        guide = None if guide is None else torch.compile(guide)
    return learner, guide


def identity(run: RunConfig, corpus: Corpus) -> dict[str, str]:
    """What a run learns from, as hashes: a resumed run must find the same."""
    hashes = {"corpus": corpus.corpus_sha256}
    for name, source in (("teacher", run.teacher), ("model", run.model)):
        if source is not None:
            hashes[name] = sha256_of_files(source / WEIGHTS if source.is_dir() else source)
    return hashes


def dropout_seed(seed: int, step: int) -> int:
    """The seed of an update's dropout: a function of (seed, step) alone."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


DEMO_DOCUMENTS = 20_000
DEMO_TEACHER = BertConfig(
    vocab_size=1_400,
    hidden_size=64,
    num_hidden_layers=12,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,  # it sees every abstract once at most
    attention_probs_dropout_prob=0.0,
    initializer_range=0.03,
)
DEMO_TEACHING = {"steps": 800, "learning_rate": 4e-3, "warmup_steps": 80, "save_every": 100}


def demonstration() -> None:
    """The whole way on text of our own: a corpus, a teacher of 12 layers, a student of 6."""
    folder = Path("runs/demo")
    text, vocabulary, corpus = (folder / n for n in ("abstracts.jsonl", "vocab.txt", "corpus"))
    teacher, compact = folder / "teacher", folder / "compact"
    common = {"data": corpus, "batch_size": 16, "max_length": 96, "eval_documents": 300}
    if not corpus.exists():
        print(f"1. {DEMO_DOCUMENTS:,} small abstracts are written to {text}")
        folder.mkdir(parents=True, exist_ok=True)
        demo.write_abstracts(text, DEMO_DOCUMENTS, seed=0)
        demo.train_vocabulary(text, vocabulary, DEMO_TEACHER.vocab_size)
        prepare([text], vocabulary, corpus, show_progress=False)
    if not (teacher / "model").exists():
        print("2. A teacher of 12 layers learns from them to fill in masked words")
        begin = folder / "teacher.json"
        write_json(begin, DEMO_TEACHER.to_dict())
        run = {"recipe": "mlm", "model": begin, "out": teacher, **common, **DEMO_TEACHING}
        begun = (teacher / "config.json").exists()  # and interrupted
        train(RunConfig.from_flags({"out": teacher, "resume": True} if begun else run))
    print("3. A student of 6 layers, every second of the teacher's, learns to follow it")
    shutil.rmtree(compact, ignore_errors=True)
    run = {"recipe": "compactbiobert", "teacher": teacher / "model", "out": compact, **common}
    train(RunConfig.from_flags(run | {"steps": 300}))
    print("Next: BioBERT on PubMed, in README.md")


def main() -> None:
    parser = ArgumentParser(prog="python train.py", description=__doc__.split("\n")[0])
    RunConfig.add_flags(parser)
    given = vars(parser.parse_args())
    if not given:
        demonstration()
        return
    run = RunConfig.from_flags(given)
    try:
        train(run)
    except KeyboardInterrupt:
        print(f"\nnothing before the newest checkpoint is lost: --out {run.out} --resume goes on")
        raise


if __name__ == "__main__":
    raise SystemExit(run_command(main))

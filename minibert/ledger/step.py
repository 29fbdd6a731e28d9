"""The step that the ledger records: `train.update` itself, on a batch of random tokens.

Shapes: B sequences of S tokens, none of them padding; M masked positions.
"""

import dataclasses
import sys
from contextlib import ExitStack
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from minibert.config import BIOBERT, BertConfig
from minibert.data.batches import MASKED_SHARE, GlobalBatch, MicroBatch
from minibert.errors import InputError
from minibert.folder import CONFIG
from minibert.hugging_face import load_either
from minibert.ledger.record import Ledger
from minibert.ledger.shapes_only import ShapesOnly
from minibert.model import BertForMaskedLM
from minibert.run_config import RunConfig
from minibert.student import layers_to_follow, new_student
from minibert.training.device import set_up_device
from minibert.training.optimizer import build_optimizer


def our_train() -> ModuleType:
    """The train.py beside this package: a plain import would take one of the current folder."""
    path = Path(__file__).resolve().parents[2] / "train.py"
    known = sys.modules.get("train")
    if known is not None and Path(known.__file__).resolve() == path:
        return known
    spec = spec_from_file_location("train", path)
    module = module_from_spec(spec)
    sys.modules.setdefault("train", module)
    spec.loader.exec_module(module)
    return module


train = our_train()


def record_step(
    run: RunConfig, model: Path | None, shapes_only: bool = False, ledger: type[Ledger] = Ledger
) -> Ledger:
    """The ledger of one update as `run` describes it.

    model: the teacher (recipe mlm: the model that is trained), a folder or a config.json; None for
    BioBERT's sizes. Weights that no folder holds are drawn by the run's seed.
    Raises InputError for what cannot be trained so.
    """
    with ExitStack() as stack:
        if shapes_only:
            stack.enter_context(ShapesOnly())
        else:
            set_up_device("cpu")
        torch.manual_seed(run.seed)
        student, teacher = _model(model, shapes_only), None
        if run.recipe.needs_teacher:
            teacher = student.requires_grad_(False).eval()
            depth = teacher.config.num_hidden_layers
            layers = layers_to_follow(run.recipe, depth, run.teacher_layers)
            run = dataclasses.replace(run, teacher=Path("teacher"), teacher_layers=layers)
            student = new_student(teacher, run)
        batch = random_batch(student.config, run)
        optimizer = build_optimizer(student, run.weight_decay)
        guide = teacher if run.follows_teacher else None
        if guide is not None and run.dtype == "bfloat16":
            guide = _rounded(teacher)
        if shapes_only:
            _set_up(optimizer)
        else:  # which also warms up what is timed
            beginning = batch._replace(micro_batches=batch.micro_batches[:1])
            train.update(student, guide, optimizer, beginning, 0, run)
        models = {"student": student} | ({"teacher": guide} if guide is not None else {})
        record = stack.enter_context(ledger(models, timed=not shapes_only).recorded())
        figures = train.update(student, guide, optimizer, batch, 1, run)
        moments = (value for state in optimizer.state.values() for value in state.values())
        record.note_results([figures, *student.parameters(), *moments])
    return record


def _set_up(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimiser make its moments, as its first step does."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # at rate 0
    optimizer.zero_grad(set_to_none=True)


def record_forward(
    model: Path | None, run: RunConfig, shapes_only: bool = False, ledger: type[Ledger] = Ledger
) -> Ledger:
    """The ledger of a model's forward pass, in eval mode and the dtype and operations of `run`."""
    with ExitStack() as stack:
        if shapes_only:
            stack.enter_context(ShapesOnly())
        torch.manual_seed(run.seed)
        bert = _model(model, shapes_only).eval()
        (batch,) = random_batch(bert.config, run).micro_batches
        half = torch.bfloat16 if run.dtype == "bfloat16" else None
        settings = {"dtype": half, "ops": {"fused": train.fused, "plain": train.plain}[run.ops]}
        stack.enter_context(torch.inference_mode())
        recorded = ledger({"model": bert}, timed=not shapes_only).recorded()
        record = stack.enter_context(recorded)
        inputs = (batch.input_ids, batch.attention_mask, None, batch.masked_positions)
        output = bert(*inputs, **settings)
        record.note_results([output.embedding_output, *output.hidden_states, output.head_output])
    return record


def _model(source: Path | None, shapes_only: bool) -> BertForMaskedLM:
    """BioBERT's sizes, those of a config.json, or the model of a folder (or its sizes alone)."""
    if source is None:
        return BertForMaskedLM(BIOBERT)
    if shapes_only and source.is_dir():
        source = source / CONFIG
    if not source.is_dir():
        return BertForMaskedLM(BertConfig.read(source))
    model, _ = load_either(source)
    if not isinstance(model, BertForMaskedLM):
        raise InputError(f"{source}: an encoder without a head; expected a masked-language model")
    return model.requires_grad_(True)


def _rounded(teacher: BertForMaskedLM) -> BertForMaskedLM:
    """As `train.forward_passes` has it in bfloat16, by a way that tensors without elements go.

    Its weights are not those of `ops.frozen`: what is recorded is the same on every CPU.
    """
    rounded = BertForMaskedLM(teacher.config)
    weights = {name: t.to(torch.bfloat16) for name, t in teacher.state_dict().items()}
    rounded.load_state_dict(weights, assign=True)
    return rounded.requires_grad_(False).eval()


def random_batch(config: BertConfig, run: RunConfig) -> GlobalBatch:
    """A global batch of random tokens, of which 15 % are asked for; every sequence is of full
    length."""
    B, S, V = run.batch_size, run.max_length, config.vocab_size
    if config.max_position_embeddings < S:
        raise InputError(f"--length {S}; the model has {config.max_position_embeddings} positions")
    generator = np.random.default_rng(run.seed)
    input_ids = torch.from_numpy(generator.integers(V, size=(B, S)))  # (B, S)
    num_masked = round(MASKED_SHARE * B * S)
    masked = torch.zeros(B * S, dtype=torch.bool)  # (B * S,)
    masked[torch.from_numpy(generator.permutation(B * S)[:num_masked])] = True
    at_once = max(1, run.micro_batch_tokens // S)
    micro_batches = []
    for rows in input_ids.split(at_once):  # (b, S)
        here, masked = masked[: rows.numel()], masked[rows.numel() :]  # (b * S,)
        positions = here.nonzero().squeeze(1)  # (m,)
        labels = rows.flatten()[positions]  # (m,)
        micro_batches.append(MicroBatch(rows, torch.ones_like(rows), positions, labels))
    return GlobalBatch(micro_batches, list(range(B)), num_tokens=B * S, num_masked=num_masked)

"""How well a model predicts masked words of held-out documents, and how near it is to its teacher.

    python -m minibert.evaluate MODEL --data CORPUS [--teacher TEACHER] [--json]

Always the plain formulas, in float32; the masked positions depend on the corpus and --max-length
alone, so that figures of different models and runs can be compared.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from minibert.config import BertConfig
from minibert.data.batches import Batches, MicroBatch
from minibert.data.corpus import Corpus
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.flags import number
from minibert.folder import CONFIG, load_model
from minibert.model import BertForMaskedLM
from minibert.progress import counted
from minibert.training.device import set_up_device

MLM_FIGURES = ("mlm_loss", "mlm_accuracy")
TEACHER_FIGURES = (
    "teacher_kl", "teacher_agreement", "teacher_mlm_loss", "teacher_mlm_accuracy",
)  # fmt: skip


@torch.inference_mode()
def evaluate(
    model: BertForMaskedLM,
    micro_batches: Sequence[MicroBatch],
    teacher: BertForMaskedLM | None = None,
    combine: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    quiet: bool = False,
) -> dict[str, float]:
    """Means over the masked positions of all micro-batches; {} where there are none.

    `mlm_loss` (nats) and `mlm_accuracy`; with a teacher also `teacher_kl`, KL(teacher || model) in
    nats, and `teacher_agreement`, the share of positions where both prefer the same word; and the
    teacher's own `teacher_mlm_loss` and `teacher_mlm_accuracy`.
    """
    was_training = model.training
    model.eval()  # without dropout
    device = model.decoder.device
    names = MLM_FIGURES if teacher is None else MLM_FIGURES + TEACHER_FIGURES
    sums = torch.zeros(len(names) + 1, dtype=torch.float64)  # last: the masked positions
    for micro_batch in counted(micro_batches, "evaluating", quiet):
        batch = micro_batch.to(device)
        log_probs = _log_probs(model, batch)  # (M, V)
        figures = _mlm_figures(log_probs, batch)
        if teacher is not None:
            teacher_log_probs = _log_probs(teacher, batch)  # (M, V)
            agreement = log_probs.argmax(dim=-1) == teacher_log_probs.argmax(dim=-1)  # (M,)
            kl = F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="sum")
            figures += [kl, agreement.sum(), *_mlm_figures(teacher_log_probs, batch)]
        sums += torch.tensor([figure.item() for figure in figures] + [len(batch.labels)])
    *sums, num_masked = combine(sums).tolist()
    model.train(was_training)
    if num_masked == 0:
        return {}
    return {name: value / num_masked for name, value in zip(names, sums, strict=True)}


def _log_probs(model: BertForMaskedLM, batch: MicroBatch) -> torch.Tensor:
    """log p(word) at the masked positions, (M, V)."""
    output = model(batch.input_ids, batch.attention_mask, masked_positions=batch.masked_positions)
    return model.logits(output.head_output).log_softmax(dim=-1)


def _mlm_figures(log_probs: torch.Tensor, batch: MicroBatch) -> list[torch.Tensor]:
    """Sums over the masked positions of cross-entropy and of correct first choices."""
    return [
        F.nll_loss(log_probs, batch.labels, reduction="sum"),
        (log_probs.argmax(dim=-1) == batch.labels).sum(),
    ]


# Two tokenizers of one vocabulary may still cut text in different ways: this text tells.
PROBE = "Naïve CD4+ T-cells (p<0.05), beta2-Mikroglobulin; CC(=O)Nc1ccccc1>>[Na+].[Cl-] 中文"


def load_for_corpus(folder: Path, corpus: Corpus, max_length: int) -> BertForMaskedLM:
    """A model with a head that can read the corpus: its tokens, and sequences of `max_length`.

    Anything else is an InputError.
    """
    model = load_model(folder)
    if not isinstance(model, BertForMaskedLM):
        raise InputError(f"{folder}: an encoder without the masked-language-modelling head")
    ours, theirs = load_tokenizer(folder), corpus.tokenizer
    if ours.vocabulary_sha256 != theirs.vocabulary_sha256:
        raise InputError(
            f"{corpus.folder} was made with another vocabulary ({theirs.vocab_size} tokens) than "
            f"that of {folder} ({ours.vocab_size} tokens)"
        )
    if ours.encode_batch([PROBE]) != theirs.encode_batch([PROBE]):
        raise InputError(
            f"{corpus.folder}: {theirs.source.name} cuts text otherwise than {ours.source}"
        )
    check_fit(folder, model.config, corpus, max_length)
    return model


def check_fit(source: Path, config: BertConfig, corpus: Corpus, max_length: int) -> None:
    """Refuse a model that has fewer embeddings or positions than it would be asked for."""
    if config.vocab_size < corpus.tokenizer.vocab_size:
        raise InputError(
            f"{source}: vocab_size is {config.vocab_size}; "
            f"{corpus.folder} needs {corpus.tokenizer.vocab_size}"
        )
    if max_length > config.max_position_embeddings:
        raise InputError(
            f"--max-length {max_length}: the model has {config.max_position_embeddings} positions"
        )


def check_comparable(source: Path, teacher: BertConfig, model: BertConfig) -> None:
    """Distributions are compared word by word, spare rows of the embeddings included."""
    if teacher.vocab_size != model.vocab_size:
        raise InputError(
            f"{source}: vocab_size {teacher.vocab_size}; the model's {model.vocab_size}"
        )


def main() -> None:
    parser = ArgumentParser(prog="python -m minibert.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="corpus folder")
    parser.add_argument("--teacher", type=Path, help="model folder of the teacher")
    parser.add_argument("--documents", type=number(int, 1), default=500, help="held-out documents")
    length = "most tokens of a sequence (default: 256, or as many as the model has positions)"
    parser.add_argument("--max-length", type=number(int, 3), help=length)
    device = {"choices": ("auto", "cpu", "cuda"), "default": "auto"}
    parser.add_argument("--device", **device, help="where to compute (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args()

    device, corpus = set_up_device(flags.device), Corpus.open(flags.data)
    length = flags.max_length
    if length is None:
        length = min(256, BertConfig.read(flags.model / CONFIG).max_position_embeddings)
    model, teacher = load_for_corpus(flags.model, corpus, length).to(device), None
    if flags.teacher:
        teacher = load_for_corpus(flags.teacher, corpus, length).to(device)
        check_comparable(flags.teacher, teacher.config, model.config)
    micro_batches = Batches(corpus, max_length=length).held_out(flags.documents)
    figures = evaluate(model, micro_batches, teacher)
    if not figures:
        raise InputError(
            f"{flags.data}: nothing to fill in, {corpus.num_held_out} held-out documents"
        )
    if flags.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:22} {value:.4f}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))

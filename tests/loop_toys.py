"""What tests of the loop share: a toy run's models in float64."""

import torch

import train
from minibert.data.corpus import Corpus
from minibert.model import BertForMaskedLM
from minibert.run_config import RunConfig
from minibert.student import Student


def in_float64(run: RunConfig) -> tuple[Student, BertForMaskedLM, RunConfig]:
    """A toy run's student (4 -> 2 layers, perturbed), its teacher and its settings; no dropout."""
    corpus = Corpus.open(run.data)
    student, teacher, run = train.build_models(run, corpus, torch.device("cpu"))
    student, teacher = student.double().eval(), teacher.double()
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return student, teacher, run

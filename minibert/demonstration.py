"""What a bare `python train.py` does: a corpus, a teacher and a student in two minutes."""

import shutil
from collections.abc import Callable
from pathlib import Path

from minibert.config import BertConfig
from minibert.data import demo
from minibert.files import write_json
from minibert.prepare import prepare
from minibert.run_config import RunConfig

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


def demonstration(train: Callable[[RunConfig], None]) -> None:
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
        train(RunConfig.from_flags(run | {"resume": True}))  # it may have been interrupted
    print("3. A student of 6 layers, every second of the teacher's, learns to follow it")
    if (compact / "student").exists():
        shutil.rmtree(compact)
    run = {"recipe": "compactbiobert", "teacher": teacher / "model", "out": compact, **common}
    train(RunConfig.from_flags(run | {"steps": 300, "resume": True}))
    print("Next: BioBERT on PubMed, in README.md")

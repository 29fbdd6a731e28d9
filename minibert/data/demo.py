"""A seeded generator of small biomedical abstracts, behind a bare `python train.py`.

The diseases, drugs and genes are real and belong together; every patient, figure and finding is
invented. An abstract is drawn from a grammar of our own in which words determine each other (a drug
its class, dose and side effect, a disease its symptoms, the result the conclusion), so that a model
which has learnt the language infers what is masked, and a better model infers more.
"""

import json
import re
from pathlib import Path
from random import Random

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from minibert.files import atomic_file

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# The commonest first: disease | organ | symptoms | what tests find
#     drug: class, daily dose, side effect; ...; gene: what it is needed for; ...
KNOWLEDGE = """
type 2 diabetes | pancreas | thirst, slow wounds | high glycated hemoglobin
    metformin: biguanide, 850 mg, nausea; sitagliptin: DPP4 inhibitor, 100 mg, sore throat
    dapagliflozin: SGLT2 inhibitor, 10 mg, cystitis; TCF7L2: insulin release
high cholesterol | arteries | chest pain, yellow eyelids | high LDL
    atorvastatin: statin, 40 mg, muscle pain; simvastatin: statin, 20 mg, muscle pain
    evolocumab: PCSK9 antibody, 140 mg, sore arms; LDLR: cholesterol uptake
depression | limbic system | low mood, early waking | high cortisol
    sertraline: serotonin uptake inhibitor, 50 mg, nausea; BDNF: synapse growth
    fluoxetine: serotonin uptake inhibitor, 20 mg, vivid dreams; SLC6A4: serotonin uptake
asthma | airways | wheezing, night cough | low peak flow
    budesonide: inhaled steroid, 200 mcg, oral thrush; omalizumab: IgE antibody, 300 mg, sore arms
    montelukast: leukotriene blocker, 10 mg, vivid dreams; IL33: mucus release
migraine | trigeminal nerve | throbbing headache, fear of light | high CGRP
    sumatriptan: serotonin agonist, 50 mg, tingling; erenumab: CGRP antibody, 70 mg, constipation
    CACNA1A: calcium transport; TRPM8: cold sensing
gout | big toe | burning pain, sleepless nights | high uric acid
    allopurinol: oxidase inhibitor, 300 mg, skin rash; colchicine: tubulin blocker, 1 mg, diarrhea
    ABCG2: urate transport; SLC2A9: urate transport
heart failure | heart | breathlessness, swollen ankles | high natriuretic peptide
    enalapril: ACE inhibitor, 20 mg, dry cough; carvedilol: beta blocker, 25 mg, slow pulse
    TTN: muscle contraction; LMNA: nuclear shape
osteoporosis | spine | back pain, loss of height | low bone density
    alendronate: bisphosphonate, 70 mg, heartburn; denosumab: RANKL antibody, 60 mg, sore arms
    LRP5: bone growth; SOST: bone growth
rheumatoid arthritis | joints | morning stiffness, swollen fingers | high rheumatoid factor
    methotrexate: folate blocker, 15 mg, mouth ulcers; adalimumab: TNF antibody, 40 mg, sore arms
    tofacitinib: JAK inhibitor, 5 mg, shingles; PTPN22: T cell activation
psoriasis | skin | itching, scaly plaques | high interleukin 17
    secukinumab: interleukin antibody, 300 mg, runny nose; acitretin: retinoid, 25 mg, dry lips
    CARD14: skin growth
glaucoma | optic nerve | tunnel vision, eye pain | high eye pressure
    latanoprost: prostaglandin analog, 50 mcg, long lashes; timolol: beta blocker, 5 mg, slow pulse
    MYOC: fluid drainage
breast cancer | breast | breast lumps, nipple discharge | high Ki67
    trastuzumab: HER2 antibody, 600 mg, shivering; tamoxifen: estrogen blocker, 20 mg, hot flushes
    BRCA1: DNA repair; PALB2: DNA repair
epilepsy | temporal lobe | seizures, strange smells | high seizure count
    valproate: sodium blocker, 500 mg, hair loss; lamotrigine: sodium blocker, 100 mg, skin rash
    SCN1A: sodium transport; KCNQ2: potassium transport
Crohn disease | small bowel | belly pain, weight loss | high calprotectin
    infliximab: TNF antibody, 400 mg, shivering; vedolizumab: integrin antibody, 300 mg, joint pain
    NOD2: bacterial sensing; ATG16L1: autophagy
malaria | red cells | fever, chills | high parasite count
    artesunate: artemisinin, 120 mg, dizziness; mefloquine: quinoline, 250 mg, vivid dreams
    HBB: oxygen transport; G6PD: redox balance
tuberculosis | lungs | bloody sputum, night sweats | high bacterial count
    isoniazid: mycolate inhibitor, 300 mg, numb fingers; SLC11A1: metal transport
    rifampicin: polymerase inhibitor, 600 mg, orange urine
hepatitis C | liver | jaundice, dark urine | high viral load
    sofosbuvir: polymerase inhibitor, 400 mg, headache; ribavirin: nucleoside analog, 600 mg, anemia
    IFNL3: interferon signaling
Parkinson disease | midbrain | resting tremor, slow gait | high motor score
    levodopa: dopamine precursor, 100 mg, restless legs; rasagiline: MAO inhibitor, 1 mg, dry mouth
    pramipexole: dopamine agonist, 1 mg, sudden sleep; SNCA: vesicle release; PINK1: mitophagy
chronic leukemia | bone marrow | night sweats, easy bruising | high white cell count
    imatinib: kinase inhibitor, 400 mg, puffy eyes; dasatinib: kinase inhibitor, 100 mg, headache
    nilotinib: kinase inhibitor, 300 mg, skin rash; ABL1: cell division
lupus nephritis | kidneys | foamy urine, butterfly rash | low complement
    mycophenolate: purine inhibitor, 1000 mg, diarrhea; belimumab: BLyS antibody, 200 mg, sore arms
    IRF5: interferon signaling
"""

# In a template `{name}` is a fact of the document and `[a|b]` is a or b. No sentence begins with a
# fact: the vocabulary is cased, and so a name is the same word wherever it stands.
DISEASE = "Patients with {disease} suffer from {symptom} and {symptom_2}. "
DRUG = "The {class} {drug} protects the {organ} in {disease}. "
GENE = "The gene {gene} controls {process} in the {organ}. "
DISEASE_OR_DRUG = f"[{DISEASE}|{DRUG}]"
DISEASE_OR_GENE = f"[{DISEASE}|{GENE}]"
CLINICS = "In {clinics} clinics in {city}, "
ARMS = CLINICS + "{total} patients took part: {arm} took {drug} {dose} and {arm} took "
ONE_ARM = CLINICS + "{arm} patients took {drug} {dose} for {weeks} weeks. "
CONTROLS = CLINICS + "{total} people over {decade} took part: {arm} patients and {arm} controls. "
WENT_AWAY = "With {drug}, {marker} {improved} and {symptom} went away. "
STAYED = "With {drug}, {effect} came and {symptom} stayed. "
HELPS = WENT_AWAY + "In short, {drug} helps in {disease}."
USELESS = STAYED + "In short, {drug} is useless in {disease}."

# A study is its title, background and methods, and then the endings that it may come to.
STUDIES = (
    (
        "A [randomized|double-blind] trial of {drug} in {disease}. "
        + DISEASE_OR_DRUG + ARMS + "placebo for {weeks} weeks. ",
        HELPS,
        USELESS,
    ),
    (
        "A comparison of {drug} and {rival} in {disease}. "
        + DISEASE_OR_DRUG + ARMS + "{rival} {rival_dose} for {weeks} weeks. ",
        HELPS,
        STAYED + "In short, {rival} is better.",
    ),
    (
        "A dose study of {drug} in {disease}. "
        + DISEASE_OR_DRUG + ARMS + "half of it for {weeks} weeks. ",
        "With half of it, {symptom} went away. In short, half of it is enough.",
        "With half of it, {symptom} stayed. In short, half of it is not enough.",
    ),
    (
        "A [cohort|pilot] study of {drug} in {disease}. " + DISEASE_OR_DRUG + ONE_ARM,
        HELPS,
        USELESS,
    ),
    (
        "A safety study of {drug} in {disease}. " + DRUG + ONE_ARM,
        "Only {few} of them had {effect}. In short, {drug} is not linked to {effect}.",
        "All but {few} of them had {effect}. In short, {drug} is linked to {effect}.",
    ),
    (
        "A case of {disease}. " + DISEASE + "In {city}, a {person} of {age} with {level} {marker} "
        "took the {class} {drug}, {dose}, for {weeks} weeks. ",
        WENT_AWAY + "In short, {they} was well.",
        STAYED + "In short, {they} was not well.",
    ),
    (
        "A mouse model of {disease}. " + GENE + "In {clinics} laboratories in {city}, {arm} mice "
        "without {gene} took the {class} {drug} for {weeks} weeks. ",
        HELPS,
        USELESS,
    ),
    (
        "A genetic study of {gene} in {disease}. " + DISEASE_OR_GENE + CONTROLS,
        "All patients had a variant of {gene}. In short, {gene} is linked to {disease}.",
        "All controls had a variant of {gene}. In short, {gene} is not linked to {disease}.",
    ),
    (
        "A study of {marker} in {disease}. " + DISEASE + CONTROLS,
        "All patients had {level} {marker}. In short, {marker} is linked to {disease}.",
        "All controls had {level} {marker}. In short, {marker} is not linked to {disease}.",
    ),
    (
        "A survey of {symptom} in {disease}. "
        + DISEASE + CLINICS + "{arm} patients kept a diary for {weeks} weeks. ",
        "Only {few} of them had {symptom}. In short, {disease} is not linked to {symptom}.",
        "All but {few} of them had {symptom}. In short, {disease} is linked to {symptom}.",
    ),
)  # fmt: skip
CITIES = (
    "Accra", "Bergen", "Boston", "Cairo", "Gdansk", "Ghent", "Hanoi", "Hobart", "Kyoto", "Lagos",
    "Leiden", "Lima", "Malaga", "Mumbai", "Oslo", "Perth", "Porto", "Quito", "Tartu", "Turin",
)  # fmt: skip
WEEKS = (2, 4, 6, 8, 12, 24)
ARM_SIZES = (20, 30, 40, 50, 60, 80, 100, 150, 200)  # patients in each of two equal arms
DECADES = (20, 30, 40, 50, 60, 70)
PEOPLE = (("woman", "she"), ("man", "he"))


def read_knowledge(text: str) -> list[dict]:
    """The table above as one object a disease: its facts, and lists of symptoms, drugs, genes."""
    diseases = []
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            name, organ, symptoms, finding = line.split(" | ")
            level, marker = finding.split(" ", 1)
            facts = {"disease": name, "organ": organ, "level": level, "marker": marker}
            facts["improved"] = {"high": "fell", "low": "rose"}[level]
            symptoms = symptoms.split(", ")
            diseases.append({"facts": facts, "symptoms": symptoms, "drugs": [], "genes": []})
            continue
        for entry in line.strip().split("; "):
            name, properties = entry.split(": ")
            kind = "drugs" if "," in properties else "genes"
            diseases[-1][kind].append((name, *properties.split(", ")))
    return diseases


def choose_facts(diseases: list[dict], random: Random) -> dict[str, object]:
    """Everything a template may name, drawn once a document: so it agrees with itself.

    A disease is the rarer the lower it stands in the table, as 1 / (rank + 1) (Zipf's law, shifted
    by one): a model learns the common ones first, and from them how abstracts are made.
    """
    weights = [1 / (rank + 1) for rank in range(1, len(diseases) + 1)]
    (disease,) = random.choices(diseases, weights)
    facts = dict(disease["facts"])
    facts["symptom"], facts["symptom_2"] = random.sample(disease["symptoms"], 2)
    drug, rival = random.sample(disease["drugs"], 2)
    facts["drug"], facts["class"], facts["dose"], facts["effect"] = drug
    facts["rival"], _, facts["rival_dose"], _ = rival
    facts["gene"], facts["process"] = random.choice(disease["genes"])
    facts["person"], facts["they"] = random.choice(PEOPLE)
    facts["age"], facts["decade"] = random.randint(21, 79), random.choice(DECADES)
    facts["city"], facts["weeks"] = random.choice(CITIES), random.choice(WEEKS)
    facts["clinics"], facts["few"] = random.randint(2, 9), random.randint(2, 9)
    facts["arm"] = random.choice(ARM_SIZES)
    facts["total"] = 2 * facts["arm"]
    return facts


def expand(template: str, facts: dict[str, object], random: Random) -> str:
    """Decide every `[a|b]`, the innermost first, and fill in the facts."""
    while choice := re.search(r"\[([^][]*)\]", template):
        chosen = random.choice(choice[1].split("|"))
        template = template[: choice.start()] + chosen + template[choice.end() :]
    return template.format_map(facts)


def write_abstracts(path: Path, documents: int, seed: int) -> None:
    """Write a `.jsonl` of `documents` abstracts, {"id": "demo-000001", "text": ...} a line.

    Document i depends on (seed, i) alone, so a longer corpus begins with the shorter one. Of
    20,000 some 15 repeat another's text.
    """
    diseases = read_knowledge(KNOWLEDGE)
    with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for number in range(1, documents + 1):
            random = Random(f"{seed} {number}")  # seeded alike by every version of Python
            opening, *endings = random.choice(STUDIES)
            template = opening + random.choice(endings)
            text = expand(template, choose_facts(diseases, random), random)
            file.write(json.dumps({"id": f"demo-{number:06d}", "text": text}) + "\n")


def train_vocabulary(texts_path: Path, vocab_path: Path, vocab_size: int) -> None:
    """Learn a cased WordPiece vocabulary of a `.jsonl` and write it as `vocab.txt`.

    The same text gives the same vocabulary, special tokens first. It may hold fewer than
    `vocab_size` tokens where the text has no more words.
    """
    lines = texts_path.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    # The trainer meets letters within words in the order of a hash table: named here, they keep
    # the order of the alphabet, and ids do not change from one run to the next.
    inner_letters = sorted(
        {"##" + letter for text in texts for letter in re.findall(r"\B\w", text)}
    )
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + inner_letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    with atomic_file(vocab_path) as partial:
        partial.write_text("".join(f"{token}\n" for token in sorted(ids, key=ids.get)), "utf-8")

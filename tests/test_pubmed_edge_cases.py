"""Every record of the collected edge cases becomes the text that a reader of its XML expects.

The texts were written down from the XML, not from what the parser gave. Of long records beginning
and end are compared, and the passages with markup, labels or line breaks between them.
"""

import pytest

from minibert.data.pubmed import Reading, read_documents

SPERMATOZOA = (
    "Effects of hydrogen peroxide on DNA and plasma membrane integrity of human spermatozoa. "
    "OBJECTIVE: To evaluate the effects of oxidative stress on DNA and plasma membrane integrity "
    "of human spermatozoa. DESIGN: Prospective cohort study. SETTING: University-based, "
    "tertiary-care infertility center. PATIENT(S): Men (n = 10) undergoing infertility "
    "investigation. INTERVENTION(S): Purified populations of sperm with high motility were "
    "separated using Percoll density gradients. Then, spermatozoa were incubated with 0, 10, 100, "
    "and 200 microM hydrogen peroxide (H(2)O(2)) under capacitating conditions."
)
LYMPHOEPITHELIAL = (
    "Lymphoepithelial carcinoma of the parotid gland: is an association with Epstein-Barr virus "
    "possible in non-endemic areas? Lymphoepithelial carcinoma (LEC) is a rare histological type "
    "of cancer of the salivary glands. Here is reported a case of LEC of the parotid gland that "
    "developed in a Caucasian female, whose serology was positive for Epstein-Barr virus antibody. "
    "The patient underwent surgical treatment and postoperative radiotherapy. Because of the "
    "relatively limited clinical data concerning LEC of the salivary glands compared to other more "
    "common histological types, the clinical course, optimal treatment and prognosis have not been "
    "extensively studied. The aim of this report was to summarize all the key points, following a "
    "comprehensive literature review."
)
MAST_CELLS = (
    "CRAC channels and Ca2+ signaling in mast cells. Mast cells are integral members of the immune "
    "system. Upon activation by a rise in cytoplasmic Ca2+, they release a battery of paracrine "
    "signals, chemokines, and cytokines, which help sculpt the subsequent immune response. Ca2+ "
    "entry through store-operated Ca2+ release-activated Ca2+ (CRAC) channels in the plasma "
    "membrane is central for driving most of these responses. The molecular basis of the CRAC "
    "channel has been identified, with Orai1 forming the channel pore. Recent work has revealed "
    "that a range of mast cell responses are activated by spatially restricted Ca2+ signals just "
    "below the plasma membrane. These Ca2+ microdomains can activate cytosolic enzymes, leading to "
    "the generation of intracellular messengers as well as proinflammatory molecules like LTC4. In "
    "this review, we describe key features of CRAC channels in mast cells, how they generate local "
    "Ca2+ signals, and how the cell can decode these restricted signals to generate a raft of "
    "responses."
)
TACROLIMUS = (
    "0.03% Tacrolimus ointment applied once or twice daily is more efficacious than 1% "
    "hydrocortisone acetate in children with moderate to severe atopic dermatitis: results of a "
    "randomized double-blind controlled trial. BACKGROUND: Topical corticosteroids are",
    "but can have side-effects. OBJECTIVES: This study compared",
    "in children with moderate to severe AD. PATIENTS AND METHODS: Patients applied ointment daily",
    "between baseline and treatment end. RESULTS: Six hundred and twenty-four patients",
    "compared with 1% HA (47.6%; P < 0.001). Furthermore,",
    "Laboratory parameters showed no clinically relevant changes. CONCLUSIONS: 0.03% tacrolimus",
    "and is especially effective in patients with severe baseline disease.",
)
CUPROUS_OXIDE = (
    "An investigation into the effects of marine biofilm on the roughness and drag characteristics "
    "of surfaces coated with different sized cuprous oxide (Cu2O) particles. Biofilms typically",
    "different sizes of cuprous oxide (Cu2O). In this study, a series of",
    "coated with different sizes of Cu2O. The cuprous oxide-containing surfaces",
    "panels coated with larger Cu2O, the roughness and drag measurement results were both found to "
    "have fluctuating increments.",
)
DECON = (
    "DeCoN: genome-wide analysis of in vivo transcriptional dynamics during pyramidal neuron fate "
    "selection in neocortex. Neuronal development requires",  # the label is UNLABELLED
    "transcriptional regulation underlying pyramidal neuron diversity in the neocortex.",
)
TERAHERTZ = (
    "Effective-medium-cladded dielectric waveguides for terahertz waves. {}Terahertz integrated",
    "total internal reflections The waveguides",
    "can potentially benefit integrated optics at large.",
)
POLARIMETRY = (
    "Polarimetry of a single-order circularly polarized high harmonic separated by a time-delay "
    "compensated monochromator. Monochromatic elliptically polarized (CP) ultrashort",
    "will be versatile both for spectroscopy and for diffractive imaging.",
)
FABRY_PEROT = (
    "Fiber-optic, extrinsic Fabry-Perot interferometric dual-cavity sensor interrogated by a "
    "dual-segment, low-coherence Fizeau interferometer for simultaneous measurements of pressure "
    "and temperature. {}A fiber-optic, extrinsic",
    "cavity length of 680 µm and an vacuum cavity length of 80 µm and was",
    "ranges of 0.1-3 MPa and 20-350 °C.",
)
FLAVOCYTOCHROME = (
    "Magnetic studies of Chromatium flavocytochrome C552. A mechanism for heme-flavin interaction. "
    "Electron paramagnetic resonance and magnetic susceptibility studies of Chromatium "
    "flavocytochrome C552 and its diheme flavin-free subunit at temperatures below 45 degrees K "
    "are reported. The results show that in the intact protein and the subunit the two low-spin "
    "(S = 1/2) heme irons are distinguishable, giving rise to separate EPR signals. In the intact "
    "protein only, one of the heme irons exists in two different low spin environments in the pH "
    "range 5.5 to 10.5, while the other remains in a constant environment. Factors influencing the "
    "variable heme iron environment also influence flavin reactivity, indicating the existence of "
    "a mechanism for heme-flavin interaction."
)
CRYOPRESERVATION = (  # ends before "Copyright 2001 Elsevier Science."
    "Is cryopreservation a homogeneous process? Ultrastructure and motility of untreated, "
    "prefreezing, and postthawed spermatozoa of Diplodus puntazzo (Cetti). This study subdivides",
    "compared with 24% in the fresh sample (P < 0.001). In spermatozoa diluted with",
    "(cryosolution A: 8 to 23%, P < 0.01; cryosolution B: 5 to 38%, P < 0.001). With",
    "to better understand the process of sperm damage.",
)
PROTON_MRI = (
    "Proton MRI of (13)C distribution by J and chemical shift editing. The sensitivity of (13)C "
    "NMR imaging",
    "containing solutions of glucose and lactic and glutamic acid in water.",
)
TELOMERES = (
    "Leucocyte telomere length, genetic variants at the TERT gene region and risk of pancreatic "
    "cancer. OBJECTIVE: Telomere shortening",
    "telomerase reverse transcriptase (TERT) gene region have been associated",
    "risk of pancreatic cancer. DESIGN: We measured prediagnostic",
    "linear regression, respectively. RESULTS: Shorter prediagnostic",
    "95% CI 1.07 to 2.78; ptrend=0.048). Results remained",
    "Three SNPs at TERT (linkage disequilibrium r2<0.25) were associated",
    "shorter telomere length (p=0.023). CONCLUSIONS: Prediagnostic",
    "at the TERT gene region were associated with risk of pancreatic cancer.",
)
PESTICIDES = (
    "Occupational pesticide exposure and subclinical hypothyroidism among male pesticide "
    "applicators. OBJECTIVES: Animal studies",
    "licensed pesticide applicators. METHODS: Self-reported",
    "(TSH >4.5 mIU/L) compared with normal TSH (0.4-<4.5 mIU/L) and for",
    "linear regression models. RESULTS: Higher exposure",
    "(ORQ3=4.15, 95% CI 1.56 to 11.01, ORQ4=4.76, 95% CI 1.53 to 14.82, ptrend <0.01), higher TSH "
    "(ptrend=0.01) and lower T4 (ptrend=0.04).",
    "CONCLUSIONS: Our results suggest that long-term exposure to aldrin, pendimethalin and methyl "
    "bromide may alter thyroid function among male pesticide applicators.",
)
LACTATE = (
    'A "Blood Relationship" Between the Overlooked Minimum Lactate Equivalent and Maximal Lactate '
    "Steady State in Trained Runners. Back to the Old Days? Maximal Lactate Steady State (MLSS)",
    'the disused "Minimum Lactate Equivalent" (LEmin), first described',
    "could predict velocity at MLSS (VMLSS) more accurate than some other blood lactate-related "
    "thresholds (BLRTs) routinely",
    "endurance-trained [VMLSS 15.0 ± 1.1 km·h-1; maximal oxygen uptake ( V.O2max ) "
    "67.6 ± 4.1 ml·kg-1·min-1] homogeneous (coefficient of variation: ≈7%) runners",
    "ramp incremental running test for V.O2max determination, and 2)",
    "LEmin plus 1 (LEmin+1mM) and 1.5 mmol·L-1 (LEmin+1.5mM), along with",
    "such as conventionally-calculated LT, Dmax and fixed",
    "did not differ from LT (P = 0.71; ES: 0.08) and was 27% lower than MLSS (P < 0.001; ES: 3.54)",
    "the best predictors of V.O2max (r = 0.72-0.79; P < 0.001). These results",
    "to be shared, at least partly, with those controlling MLSS.",
)
IMAGING = (
    "Development of a pulmonary imaging biomarker pipeline for phenotyping of chronic lung "
    "disease. We designed",
    "generated using C++ and included: (1) inhaled 3He/129Xe MRI ventilation and",
    "(3) ultrashort echo-time 1H MRI proton density measurements, (4) free-breathing "
    "Fourier-decomposition 1H MRI ventilation/perfusion and free-breathing 1H MRI specific "
    "ventilation, (5) multivolume",
    "measurements for point-of-care and high-throughput research.",
)
NON_INVASIVE = (
    "Non-invasive test in gastric diseases. Although the gastric cancer incidence is decreasing,",
    "as well as the involved clinical studies.",
)
QSAR = (
    "Molecular design and QSARs/QSPRs with molecular descriptors family. The aim of the present",
    "is available online (http://l.academicdirect.org/Chemistry/SARs/MDF_SARs/). This integrative",
    "(statistically significant Steiger's Z test at a significance level of 5%) and/or in terms",
    "enrich the pool of low-cost low-time drug design tools.",
)
PUNCTA = (
    "Formation of STIM and Orai complexes: puncta and distal caps. In the last few years, great "
    "progress has been made in understanding",
    "new immune synapses as T cells repeatedly engage antigen-presenting cells.",
)
IP3_RECEPTORS = (
    "IP3 receptors: some lessons from DT40 cells. Inositol-1,4,5-trisphosphate receptors (IP3Rs) "
    "are intracellular Ca2+ channels",
    "mechanisms leading to activation of IP(3)R. We show",
    "about half the Ca2+ entry evoked by the B-cell antigen receptor.",
)
ION_CHANNELS = (
    "The functional network of ion channels in T lymphocytes. For more than 25 years, it has been "
    "widely appreciated that Ca2+ influx",
    "Five distinct types of ion channels--Kv1.3, KCa3.1, Orai1+ stromal interacting molecule 1 "
    "(STIM1) [Ca2+-release activating Ca2+ (CRAC) channel], TRPM7, and Cl(swell)--comprise",
    "stages of an immune response to be targeted specifically.",
)
CRAC_CHANNELS = (
    "The molecular physiology of CRAC channels. The Ca2+release-activated Ca2+ (CRAC) channel is a "
    "highly Ca2+-selective store-operated channel",
    "CRAC channel activation, pore properties, and modulation.",
)
COUPLING = (
    "Mechanistic view on domains mediating STIM1-Orai coupling. Calcium (Ca2+) entry",
    "discovered in T lymphocytes and mast cells, is the Ca2+ release-activated Ca2+ (CRAC) current",
    "finally elucidated based on permeation properties of Orai pore mutants.",
)
SENSORS = (
    "Structurally delineating stromal interaction molecules as the endoplasmic reticulum calcium "
    "sensors and regulators of calcium release-activated calcium entry. The endoplasmic reticulum "
    "(ER) lumen stores a crucial source of",
    "of ER Ca2+ sensors relative to well known cytoplasmic Ca2+ sensors.",
)
SYNAPSE = (
    "The immunological synapse controls local and global calcium signals in T lymphocytes. Cell "
    "polarization is a key feature of T-cell function. The immunological",
    "which can be tested by fast, high resolution live-cell microscopy.",
)


def changed(parts: tuple[str, ...], by: str) -> tuple[str, ...]:
    return tuple(part.format(by) for part in parts)


# Of each file its records in their order; no text where there is a title alone.
RECORDS = {
    "11119751-a.xml": {"11119751-a": SPERMATOZOA},
    "11119751-b.xml": {"11119751-b": SPERMATOZOA},
    "11119751-c.xml": {"11119751-c": SPERMATOZOA},
    "11119751-d.xml": {"11119751-d": SPERMATOZOA},
    "11119751-e.xml": {"11119751-e": SPERMATOZOA},
    "11119751.xml": {"11119751": SPERMATOZOA},
    "17276851.xml": {"17276851": ""},  # it holds the PMID of a comment as well
    "17306504.xml": {"17306504": LYMPHOEPITHELIAL},
    "18439884.xml": {"18439884": NON_INVASIVE},
    "18788097.xml": {"18788097": ""},
    "19536169.xml": {"19536169": ""},
    "23700993.xml": {"23700993": QSAR},
    "25556833.xml": {"25556833": DECON},
    "27805344.xml": {"27805344": ""},  # four labels without a text
    "doc_medline_mathml_newlines.xml": {"30712376": CUPROUS_OXIDE},
    "doc_medline_test_structured_abstract.xml": {"15030341": TACROLIMUS},
    "pubmed21n1016_excerpt_original.xml.gz": {
        "31878634": changed(TERAHERTZ, ""),
        "31878635": POLARIMETRY,
        "31878636": changed(FABRY_PEROT, ""),
    },
    "pubmed21n1016_excerpt_partially_changed.xml.gz": {
        "31878634": changed(TERAHERTZ, "CHANGED FOR TESTING. "),
        "31878635": POLARIMETRY,
        "31878636": changed(FABRY_PEROT, "ALSO CHANGED FOR TESTING. "),
    },
    "x.xml": {"19754895": PUNCTA},
    "x1.xml": {"19754888": IP3_RECEPTORS},
    "x2.xml": {"19754889": MAST_CELLS},
    "x3.xml": {"19754890": ION_CHANNELS},
    "x4.xml": {"19754891": CRAC_CHANNELS},
    "x5.xml": {"19754892": COUPLING},
    "x6.xml": {"19754893": SENSORS},
    "x7.xml": {"19754894": SYNAPSE},
    "biopython/pubmed1.xml": {"12091962": "", "9997": FLAVOCYTOCHROME},
    "biopython/pubmed2.xml": {"11748933": CRYOPRESERVATION, "11700088": PROTON_MRI},
    "biopython/pubmed4.xml": {"27797938": TELOMERES},
    "biopython/pubmed5.xml": {"28775130": PESTICIDES},
    "biopython/pubmed6.xml": {"30108519": LACTATE},
    "biopython/pubmed7.xml": {"29963580": IMAGING},
}


@pytest.fixture
def edge_cases(shared_data):
    return shared_data / "pubmed-xml" / "edge-cases"


def test_every_file_is_expected(edge_cases):
    found = {str(path.relative_to(edge_cases)) for path in edge_cases.rglob("*.xml*")}
    assert found == set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_the_records_of_a_file(edge_cases, name):
    documents = list(read_documents(edge_cases / name))
    assert [document_id for document_id, _ in documents] == list(RECORDS[name])
    for (_, text), expected in zip(documents, RECORDS[name].values(), strict=True):
        check(text, expected)


def check(text: str, expected: str | tuple[str, ...]) -> None:
    """A whole text, or its beginning, its end, and passages between them in their order."""
    if isinstance(expected, str):
        assert text == expected
        return
    assert text.startswith(expected[0])
    assert text.endswith(expected[-1])
    position = 0
    for passage in expected:
        assert passage in text[position:]
        position = text.index(passage, position) + len(passage)


def test_structure_and_labels(edge_cases):
    """A section whose label says that it has none is shown without, and still is labelled."""
    counts = {}
    for name in RECORDS:
        reading = Reading()
        list(read_documents(edge_cases / name, reading))
        counts[name] = reading
    structured = {name for name, reading in counts.items() if reading.structured}
    assert structured == {
        "25556833.xml",
        "doc_medline_test_structured_abstract.xml",
        "biopython/pubmed4.xml",
        "biopython/pubmed5.xml",
    }
    assert sum(reading.titles_only for reading in counts.values()) == 5
    path = edge_cases / "doc_medline_test_structured_abstract.xml"
    ((_, text),) = read_documents(path, section_labels=False)
    assert (
        "atopic dermatitis: results of a randomized double-blind controlled trial. Topical" in text
    )
    assert "can have side-effects. This study compared" in text


def test_titles_alone_where_they_are_asked_for(edge_cases):
    for name, title in {
        "17276851.xml": "The case for treatment guidelines.",
        "18788097.xml": "Case 16-2008: a woman with bone pain.",
        "19536169.xml": "miR-34b/miR-34c: a regulator of TCL1 expression in 11q- chronic "
        "lymphocytic leukaemia?",
        "27805344.xml": "Haemorrhagic Bullae in Skin as First Manifestation of SLE.",
    }.items():
        ((_, text),) = read_documents(edge_cases / name, titles_only=True)
        assert text == title


def test_a_changed_file_replaces_records_of_the_same_ids(edge_cases):
    """What a later file says of an id holds: the caller's dictionary here does as the corpus."""
    newest = {}
    for kind in ("original", "partially_changed"):
        path = edge_cases / f"pubmed21n1016_excerpt_{kind}.xml.gz"
        newest.update(read_documents(path))
    assert len(newest) == 3
    assert " CHANGED FOR TESTING. " in newest["31878634"]
    assert "CHANGED" not in newest["31878635"]


def test_nlm_sample_of_2018(shared_data):
    reading = Reading()
    path = shared_data / "pubmed-xml" / "pubmedsample18n0001.xml.gz"
    documents = dict(read_documents(path, reading))
    assert (reading.citations, reading.documents) == (177, 109)
    assert (reading.titles_only, reading.empty) == (61, 7)
    check(
        documents["1875346"],
        (
            "3-Hydroxy-3-methylglutaryl-coenzyme a reductase inhibitors. 7. Modification of the "
            "hexahydronaphthalene moiety of simvastatin: 5-oxygenated and 5-oxa derivatives. "
            "Modification of the hexahydronaphthalene ring 5-position in simvastatin 2a via",
            "",
        ),
    )
    check(
        documents["8219565"],
        (
            "Transcatheter manipulation of asymmetrically opened titanium Greenfield filters. "
            "PURPOSE: The problem of asymmetric opening",
            "in a retrospective study. PATIENTS AND METHODS: Titanium Greenfield filters were",
            "more symmetric opening. RESULTS: Transcatheter manipulation",
            "was identified in any case. CONCLUSION: Marked asymmetry in opening",
            "may be important to ensure optimal caval interruption.",
        ),
    )
    check(
        documents["8655018"],
        (
            "Effect of fetal and neonatal growth on the occurrence of some diseases in adults. "
            "The findings of many authors show that reduced fetal growth",
            "may have an important influence on programming.",
        ),
    )
    check(
        documents["11442735"],
        (
            "Utilisation of locally delivered doxycycline in non-surgical treatment of chronic "
            "periodontitis. A comparative multi-centre trial of 2 treatment approaches. AIM: In",
            "sites showing PPD of < or =4 mm was significantly",
            'patients in the "debridement" group (p<0.001). CONCLUSION: The results indicate',
            "as a justified approach for non-surgical treatment of chronic periodontitis.",
        ),
    )
    assert documents["11540070"] == ""  # its only abstract is an OtherAbstract of NASA's

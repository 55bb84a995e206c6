"""The chosen option of real-looking answers; those that choose none, or several, are None."""

import pytest

from diq_jax.evaluate import extract, generation

DRUGS = {"A": "Aspirin", "B": "Metformin", "C": "Vitamin K", "D": "Low-dose heparin"}
VIRUS = {"A": "Hepatitis A", "B": "Hepatitis B", "C": "Hepatitis C", "D": "None of the above"}
STEPS = {
    "A": "Order a CT scan of the head",
    "B": "Reassure the patient",
    "C": "Start intravenous fluids",
    "D": "Start intravenous fluids and insulin",
    "E": "Do not resuscitate",
}
YES = {"A": "yes", "B": "no", "C": "maybe"}
NUMBERS = {"A": "5", "B": "10", "C": "0.5", "D": "50"}

CASES = [
    # A model that repeats what it was told has chosen nothing.
    (generation.INSTRUCTION, DRUGS, None),
    # A letter alone.
    ("B", DRUGS, "B"),
    ("(C)", DRUGS, "C"),
    ("D.", DRUGS, "D"),
    ("b)", DRUGS, "B"),
    ("**A**", DRUGS, "A"),
    ("B. Metformin", DRUGS, "B"),
    ("(D) Low-dose heparin", DRUGS, "D"),
    ("B\n\nMetformin lowers hepatic glucose output and does not cause weight gain.", DRUGS, "B"),
    # "Answer: ..."
    ("Answer: B", DRUGS, "B"),
    ("Answer: (B)", DRUGS, "B"),
    ("**Answer:** C. Vitamin K", DRUGS, "C"),
    ("Final Answer: D", DRUGS, "D"),
    ("### Answer\nThe INR is raised.\n\nAnswer: c", DRUGS, "C"),
    ("The patient bleeds. ANSWER - the correct answer is: A", DRUGS, "A"),
    ("Answer:\n\nB", DRUGS, "B"),
    ("Correct option: D", DRUGS, "D"),
    # "The answer is ..."
    ("Warfarin blocks the cycle of this vitamin. The answer is C.", DRUGS, "C"),
    ("So the answer is (B) Metformin.", DRUGS, "B"),
    ("Therefore the correct answer is option A because it inhibits platelets.", DRUGS, "A"),
    ("The best answer would be D, since she is pregnant.", DRUGS, "D"),
    ("The answer is therefore most likely B.", DRUGS, "B"),
    ("the answer is b", DRUGS, "B"),
    ("The answer to this question is C) Vitamin K.", DRUGS, "C"),
    ("The answer is A, not B.", DRUGS, "A"),
    ("The answer is not A but B.", DRUGS, "B"),
    ("The answer cannot be A. The answer is C.", DRUGS, "C"),
    ("The answer is $\\text{B}$.", DRUGS, "B"),
    ("First I thought the answer is A. On reflection the answer is D.", DRUGS, "D"),
    # The option's text.
    ("The answer is metformin.", DRUGS, "B"),
    ("The correct answer is low-dose heparin, which does not cross the placenta.", DRUGS, "D"),
    ("The answer is vitamin K", DRUGS, "C"),
    ("The most likely diagnosis is hepatitis B.", VIRUS, "B"),
    ("The answer is Hepatitis C", VIRUS, "C"),
    ("The answer is: none of the above", VIRUS, "D"),
    ("The answer is to start intravenous fluids and insulin.", STEPS, "D"),
    ("The answer is start intravenous fluids and insulin.", STEPS, "D"),
    ("The answer is: Start intravenous fluids", STEPS, "C"),
    ("Metformin", DRUGS, "B"),
    ("The answer is maybe.", YES, "C"),
    ("Answer: yes", YES, "A"),
    ("The answer is 0.5.", NUMBERS, "C"),
    ("The answer is 50", NUMBERS, "D"),
    ("The answer is an order of a CT scan", STEPS, None),
    # Boxed.
    ("\\boxed{B}", DRUGS, "B"),
    ("The answer is A. No: $\\boxed{\\text{C}}$", DRUGS, "C"),
    ("Thus \\boxed{\\textbf{(D)}}.", DRUGS, "D"),
    ("\\boxed{B. Metformin}", DRUGS, "B"),
    ("\\boxed{metformin}", DRUGS, "B"),
    # Judgements and choices.
    ("Option B is the correct choice here.", DRUGS, "B"),
    ("Option A is incorrect. Option C is correct.", DRUGS, "C"),
    ("(D) Low-dose heparin is the most appropriate option in pregnancy.", DRUGS, "D"),
    ("A. Aspirin is wrong: it harms the stomach.\nB. Metformin is correct.", DRUGS, "B"),
    ("I would choose option C.", DRUGS, "C"),
    ("I'll go with (A) because of the recent stent.", DRUGS, "A"),
    ("The clotting factors are low. Therefore, C.", DRUGS, "C"),
    ("Hence option B.", DRUGS, "B"),
    # Reasoning first, and its end.
    ("<think>The answer is A. Wait.</think>\nThe answer is B.", DRUGS, "B"),
    ("Aspirin is contraindicated. The patient should receive metformin.", DRUGS, "B"),
    ("The head injury was minor. We should simply reassure the patient.", STEPS, "B"),
    ("He refused all treatment. The order should read: do not resuscitate.", STEPS, "E"),
    ("All signs point to option D.", DRUGS, "D"),
    ("Answer: B (Metformin), as it is cheap.", DRUGS, "B"),
    ("Given a normal CT, the answer must be B: Reassure the patient.", STEPS, "B"),
    ("The correct option is (A) 5, since 10/2 = 5.", NUMBERS, "A"),
    ("The next best step is (C).", DRUGS, "C"),
    # No answer, and several.
    ("", DRUGS, None),
    ("I am not sure which of these drugs is meant.", DRUGS, None),
    ("The answer is A or C.", DRUGS, None),
    ("The answer is B and D.", DRUGS, None),
    ("It is not A.", DRUGS, None),
    ("He should not get aspirin.", DRUGS, None),
    ("A rules itself out, and so does B.", DRUGS, None),
    ("He has influenza B is the best guess of the resident.", DRUGS, None),
    ("The answer is not (B).", DRUGS, None),
    ("The answer might be B.", DRUGS, None),
    ("Answer choices: A. Aspirin B. Metformin", DRUGS, None),
    ("A. Aspirin\nB. Metformin\nC. Vitamin K\nD. Low-dose heparin", DRUGS, None),
    ("A patient with a stent needs a blood thinner and a follow-up visit.", DRUGS, None),
    ("The answer is a beta blocker.", DRUGS, None),
    ("The answer is E.", DRUGS, None),
    ("The answer is B. Aspirin", DRUGS, None),
    ("\\boxed{A, C}", DRUGS, None),
    ("\\boxed{42}", DRUGS, None),
    ("Could it be (A)?", DRUGS, None),
    ("Aspirin and metformin are both used in such patients.", DRUGS, None),
    ("Vitamin C is the best known antioxidant.", DRUGS, None),
    ("Option A is not correct.", DRUGS, None),
    ("So B is wrong.", DRUGS, None),
]


@pytest.mark.parametrize("text, options, letter", CASES)
def test_the_option_that_an_answer_chooses(text, options, letter):
    assert extract.extract(text, options, cut=False) == letter


def test_the_table_is_large_enough():
    assert len(CASES) >= 60 and sum(letter is None for *_, letter in CASES) >= 10


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is B. This is because metfor", "B"),
        ("Let us go through the options.\nA. Aspirin", None),
        ("The first drug to think of is metformin", None),
    ],
)
def test_a_text_that_was_cut_must_have_said_it(text, letter):
    assert extract.extract(text, DRUGS, cut=True) == letter

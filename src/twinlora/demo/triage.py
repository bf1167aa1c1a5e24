"""Phrases of the triage task: a patient's message in, urgency, department and symptom out. Invented; no medical advice."""

from __future__ import annotations

import random

from twinlora.demo.bank import Bank, fill

SYSTEM = "Sort the patient message: urgency | department | symptom."

# Symptoms by department and split. The slot {x} takes one.
_SYMPTOMS = {
    "train": {
        "cardiology": ["chest pressure", "a racing heart", "swollen ankles", "pain in the left arm"],
        "dermatology": ["an itchy rash", "a dark mole", "dry red skin", "blisters on the hand"],
        "orthopaedics": ["a stiff knee", "lower back pain", "a sore shoulder", "a twisted ankle"],
        "ophthalmology": ["blurred vision", "a red eye", "flashes of light", "a swollen eyelid"],
        "gastroenterology": ["stomach cramps", "heartburn", "nausea after meals", "a bloated belly"],
        "pulmonology": ["a dry cough", "wheezing at night", "shortness of breath", "coughing up phlegm"],
    },
    "validation": {
        "cardiology": ["an irregular heartbeat", "tightness in the chest"],
        "dermatology": ["a spreading red rash", "an itchy scalp"],
        "orthopaedics": ["a swollen knee", "pain in the hip"],
        "ophthalmology": ["double vision", "itchy eyes"],
        "gastroenterology": ["pain in the stomach", "constant nausea"],
        "pulmonology": ["a wet cough", "trouble breathing"],
    },
    "test": {
        "cardiology": ["a fluttering heart", "pain in the chest", "heart palpitations"],
        "dermatology": ["a rash on the neck", "flaky skin", "a bleeding mole"],
        "orthopaedics": ["back pain", "a painful shoulder", "a stiff hip"],
        "ophthalmology": ["dry eyes", "loss of vision in one eye", "pain behind the eye"],
        "gastroenterology": ["a burning stomach", "belly cramps", "vomiting after dinner"],
        "pulmonology": ["a lasting cough", "short breath on the stairs", "wheezing"],
    },
}

# Templates by urgency. The wording, not the symptom, says how urgent it is.
_TEMPLATES = {
    "train": {
        "emergency": ["I suddenly have {x} and it gets worse by the minute.", "Since an hour ago I have severe {x} and feel faint.",
                      "My father has {x} and can hardly speak.", "I have {x}, it is unbearable right now.",
                      "Help, {x} started and I am about to collapse."],
        "soon": ["I have had {x} for three days and it is not going away.", "Since last week there is {x}, mostly at night.",
                 "{x} has come back twice this week.", "I have {x} and it disturbs my sleep.",
                 "For some days now I notice {x} after work."],
        "routine": ["I would like a check because of {x} from time to time.", "For years I have had {x} now and then, nothing new.",
                    "I want a yearly appointment for {x}.", "I have mild {x} once a month and want to ask about it.",
                    "No hurry, but I want to talk about {x}."],
    },
    "validation": {
        "emergency": ["All of a sudden I have terrible {x} and I feel faint.", "Right now {x} is getting worse every minute."],
        "soon": ["I have been having {x} for four days.", "This week {x} keeps coming back at night."],
        "routine": ["I have slight {x} now and then, no hurry.", "I would like a yearly check for {x}."],
    },
    "test": {
        "emergency": ["Please help, I suddenly have {x} and can hardly stand.", "In the last hour {x} became unbearable.",
                      "My mother has severe {x} and is about to faint."],
        "soon": ["For five days I have had {x} and it does not stop.", "Since this week {x} wakes me up at night.",
                 "I notice {x} every evening for some days."],
        "routine": ["From time to time I have mild {x} and would like it checked.", "There is no hurry, I just want to ask about {x}.",
                    "I want my yearly appointment because of {x}."],
    },
}  # fmt: skip

_BEFORE = {
    "train": ["", "", "Hello doctor.", "Good morning.", "I am 54.", "Hi,", "I am a patient of yours."],
    "validation": ["", "Good day.", "I am 38 years old.", "Hello."],
    "test": ["", "Dear doctor,", "I am 61.", "Good evening."],
}
_AFTER = {
    "train": ["", "", "I take no medicine.", "I am a smoker.", "What should I do?", "Thanks."],
    "validation": ["", "Where should I go?", "Thank you."],
    "test": ["", "Whom do I see?", "I have no allergies.", "Please advise."],
}

BANKS = {
    split: Bank(
        _TEMPLATES[split], [s for group in _SYMPTOMS[split].values() for s in group], _BEFORE[split], _AFTER[split]
    )
    for split in _TEMPLATES
}
_DEPARTMENT = {s: d for groups in _SYMPTOMS.values() for d, group in groups.items() for s in group}


def make(bank: Bank, generator: random.Random) -> tuple[str, str]:
    """A message and where it goes."""
    urgency = generator.choice(list(bank.templates))
    symptom = generator.choice(bank.values)
    message = fill(bank, generator, urgency, symptom)
    return message, f"{urgency} | {_DEPARTMENT[symptom]} | {symptom}"

"""Phrases of the legal task: a contract clause in, its kind and key term out."""

from __future__ import annotations

import random

from twinlora.demo.bank import Bank, fill

SYSTEM = "Tag the contract clause: kind | key term."

# What a slot of each kind holds, by split: places, periods, amounts.
_TERMS = {
    "train": {
        "place": ["Ontario", "Bavaria", "Ireland", "Norway", "Texas", "Geneva", "Singapore", "Denmark"],
        "period": [
            "10 days",
            "14 days",
            "30 days",
            "45 days",
            "60 days",
            "3 months",
            "6 months",
            "12 months",
            "2 years",
        ],
        "amount": ["500 euros", "1,200 euros", "5,000 dollars", "10,000 dollars", "250 pounds", "75,000 francs"],
    },
    "validation": {
        "place": ["Finland", "Quebec", "Vienna"],
        "period": ["20 days", "4 months", "18 months"],
        "amount": ["900 euros", "3,000 pounds", "40,000 dollars"],
    },
    "test": {
        "place": ["Portugal", "Oregon", "Madrid", "Iceland", "Scotland"],
        "period": ["7 days", "21 days", "90 days", "9 months", "3 years", "5 years"],
        "amount": ["650 euros", "2,400 pounds", "8,000 dollars", "15,000 francs", "95,000 euros"],
    },
}
_SLOTS = {
    "governing law": "place", "jurisdiction": "place", "termination": "period", "confidentiality": "period",
    "payment": "period", "warranty": "period", "liability cap": "amount", "penalty": "amount",
}  # fmt: skip

_TEMPLATES = {
    "train": {
        "governing law": ["This Agreement is governed by the laws of {x}.", "The law of {x} applies to this contract.",
                          "This contract shall be construed under the laws of {x}.", "The parties choose the law of {x}."],
        "jurisdiction": ["The courts of {x} have exclusive jurisdiction.", "Any dispute shall be brought before the courts of {x}.",
                         "The parties submit to the courts of {x}.", "Claims may only be filed with a court in {x}."],
        "termination": ["Either party may terminate this Agreement on {x} written notice.", "This contract ends upon {x} notice by a party.",
                        "The Client may terminate after giving {x} notice.", "Termination requires notice of {x}."],
        "confidentiality": ["Each party keeps the other's information secret for {x}.", "The duty of confidentiality lasts {x}.",
                            "Confidential information must not be disclosed for {x}.", "The Supplier shall not reveal trade secrets for {x}."],
        "payment": ["Invoices are payable within {x} of receipt.", "The Client shall pay each invoice within {x}.",
                    "Payment is due {x} after delivery.", "All fees must be paid no later than {x} after the invoice."],
        "warranty": ["The Seller warrants the goods against defects for {x}.", "Defective parts are replaced for {x} from delivery.",
                     "The warranty period is {x}.", "The Supplier guarantees the product for {x}."],
        "liability cap": ["Total liability of the Supplier is limited to {x}.", "In no event shall damages exceed {x}.",
                          "The aggregate liability is capped at {x}.", "Neither party is liable for more than {x}."],
        "penalty": ["For each day of delay the Contractor owes a penalty of {x}.", "A breach results in a contractual penalty of {x}.",
                    "Late delivery is subject to liquidated damages of {x}.", "The Supplier forfeits {x} for every missed deadline."],
    },
    "validation": {
        "governing law": ["All rights under this Agreement follow the laws of {x}.", "This Agreement is subject to the law of {x}."],
        "jurisdiction": ["The place of jurisdiction is {x}.", "The courts in {x} decide all disputes."],
        "termination": ["The Agreement may be ended by either side with {x} notice.", "A party may terminate if it gives notice {x} ahead."],
        "confidentiality": ["The parties shall treat all documents as confidential for {x}.", "Secrecy is owed for {x} after the end."],
        "payment": ["The price shall be paid within {x} of the invoice.", "Fees fall due {x} after receipt of the bill."],
        "warranty": ["The Seller gives a warranty of {x} on all parts.", "Defects are repaired free of charge for {x}."],
        "liability cap": ["Liability of either party shall not exceed {x}.", "The maximum liability amounts to {x}."],
        "penalty": ["A penalty of {x} is owed for each breach.", "For late work the Contractor pays a penalty of {x}."],
    },
    "test": {
        "governing law": ["The laws of {x} govern this Agreement and its annexes.", "This deed is to be read under the law of {x}.",
                          "For this contract the parties agree on the law of {x}."],
        "jurisdiction": ["Disputes are settled by the competent courts of {x}.", "Exclusive jurisdiction lies with the courts of {x}.",
                         "Any claim must be brought before a court of {x}."],
        "termination": ["This Agreement can be terminated by giving {x} notice.", "Either side may end the contract with notice of {x}.",
                        "The Supplier may terminate upon written notice of {x}."],
        "confidentiality": ["Information marked confidential stays secret for {x}.", "The recipient shall not disclose anything for {x}.",
                            "The confidentiality obligation survives for {x}."],
        "payment": ["Each invoice is due for payment within {x}.", "The Buyer shall pay {x} after the date of invoice.",
                    "Sums owed must be paid within {x} of delivery."],
        "warranty": ["The goods carry a warranty of {x}.", "The Manufacturer guarantees freedom from defects for {x}.",
                     "Faulty units are replaced within a warranty of {x}."],
        "liability cap": ["Damages are limited to a total of {x}.", "The liability of the Agent is capped at {x}.",
                          "No party shall be liable beyond {x}."],
        "penalty": ["Each late delivery costs the Seller a penalty of {x}.", "A contractual penalty of {x} applies to any breach.",
                    "Liquidated damages of {x} are owed per missed deadline."],
    },
}  # fmt: skip

_BEFORE = {
    "train": ["", "", "Section 4.", "Article 12.", "Clause 7.2:", "§ 3", "The parties agree as follows.", "9.1"],
    "validation": ["", "Art. 5.", "Section 21:", "It is agreed:"],
    "test": ["", "Clause 16.", "Article 8.3:", "The following applies.", "§ 14"],
}
_AFTER = {
    "train": ["", "", "This clause survives the end of the contract.", "Changes must be in writing.",
              "Mandatory law is not affected.", "This applies to all orders."],
    "validation": ["", "Nothing else is agreed.", "Oral changes are void."],
    "test": ["", "Amendments need both signatures.", "Further rights remain reserved.", "This holds for every annex."],
}  # fmt: skip

BANKS = {
    split: Bank(
        _TEMPLATES[split], [v for values in _TERMS[split].values() for v in values], _BEFORE[split], _AFTER[split]
    )
    for split in _TEMPLATES
}
_OF_BANK = {id(bank): _TERMS[split] for split, bank in BANKS.items()}


def make(bank: Bank, generator: random.Random) -> tuple[str, str]:
    """A clause and its tag."""
    kind = generator.choice(list(bank.templates))
    term = generator.choice(_OF_BANK[id(bank)][_SLOTS[kind]])
    return fill(bank, generator, kind, term), f"{kind} | {term}"

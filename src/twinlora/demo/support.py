"""Phrases of the customer-service task: a message in, one line of JSON out.

For each split: templates by intent, products to put into them, sentences before and after. No phrase and no product
of one split occurs in another.
"""

from __future__ import annotations

import json
import random

from twinlora.demo.bank import Bank, fill

TEAMS = {
    "refund": "billing", "invoice": "billing", "cancel": "accounts", "login": "accounts",
    "delivery": "logistics", "damaged": "logistics", "setup": "technical", "outage": "technical",
}  # fmt: skip

SYSTEM = "Route the customer message. Answer with one line of JSON."

BANKS = {
    "train": Bank(
        templates={
            "refund": [
                "I want my money back for the {x}.", "Please refund the {x}, I never used it.",
                "When will the refund for my {x} arrive?", "I returned the {x} last week and still have no refund.",
                "The {x} was not worth the price, give me my money back.", "I paid twice for the {x} and want one payment back.",
                "You promised a refund for the {x}.", "I would like to be reimbursed for the {x}.",
                "My {x} went back to you, where is my money?", "Can I get a refund on a {x} after ten days?",
            ],
            "invoice": [
                "I need an invoice for the {x}.", "The invoice for my {x} shows the wrong address.",
                "Could you send the bill for the {x} again?", "Where can I download the invoice of my {x}?",
                "My accountant needs the tax invoice for the {x}.", "The amount on the bill for the {x} is wrong.",
                "Please correct the company name on the invoice for the {x}.", "I did not receive a bill for my {x}.",
                "Can you put the {x} and the fee on one invoice?", "There is a mistake in the VAT number on the {x} invoice.",
            ],
            "cancel": [
                "I want to cancel my {x} plan.", "Please end the contract for the {x}.",
                "How do I cancel the {x} subscription?", "I no longer need the {x}, stop the subscription.",
                "Cancel the {x} order before it is billed again.", "I am leaving, please terminate my {x} contract.",
                "Do not renew my {x} plan next month.", "I would like to give notice for the {x}.",
                "Stop the automatic renewal of the {x}.", "What is the notice period for the {x} subscription?",
            ],
            "login": [
                "I cannot log in to my {x} account.", "I forgot the password for the {x}.",
                "The {x} account says my password is wrong.", "The reset mail for my {x} account never comes.",
                "My {x} account is locked after three attempts.", "The code to sign in to the {x} does not arrive.",
                "I changed my phone and cannot sign in to the {x}.", "Please unlock the account of my {x}.",
                "The {x} page does not accept my user name.", "How can I reset the login of the {x}?",
            ],
            "delivery": [
                "Where is my {x}? It should have come on Monday.", "My {x} has not been delivered yet.",
                "The tracking of the {x} has not moved for days.", "When will the {x} be shipped?",
                "The courier left my {x} with a stranger.", "Can you deliver the {x} to another address?",
                "The parcel with the {x} is late.", "I was at home but the driver did not bring the {x}.",
                "The {x} was sent to the wrong city.", "What is the delivery date of the {x}?",
            ],
            "damaged": [
                "The {x} arrived broken.", "There is a crack in the {x} I received.",
                "The box was open and the {x} is scratched.", "My new {x} has a dent on the side.",
                "The {x} came with a missing part.", "I unpacked the {x} and it is in pieces.",
                "The glass of the {x} was shattered on arrival.", "You sent me a {x} with a torn cable.",
                "The {x} was wet and bent when I opened the parcel.", "My {x} arrived with a broken lid.",
            ],
            "setup": [
                "How do I set up the {x}?", "I do not understand the manual of the {x}.",
                "How can I connect the {x} to my phone?", "Which cable do I need to install the {x}?",
                "Can you explain how to pair the {x}?", "The first steps with the {x} are not clear to me.",
                "How do I change the language of the {x}?", "Where do I find the settings of the {x}?",
                "I need help to install the {x} at home.", "How do I update the software of the {x}?",
            ],
            "outage": [
                "The {x} stopped working this morning.", "My {x} does not turn on any more.",
                "The {x} loses the connection all the time.", "Since yesterday the {x} shows an error.",
                "The {x} is down again.", "The {x} freezes after a few minutes.",
                "My {x} restarts by itself every hour.", "There is no signal from the {x} since noon.",
                "The {x} has not responded for two days.", "The {x} makes a noise and then goes dead.",
            ],
        },
        values=[
            "router", "tablet", "coffee machine", "headset", "printer", "smart lamp", "camera", "keyboard", "vacuum robot",
            "fitness watch", "projector", "doorbell", "speaker", "monitor", "heater", "toaster", "scanner", "e-bike",
            "microphone", "thermostat", "laptop", "blender", "air purifier", "game console", "water pump", "office chair",
            "hair dryer", "memory card", "washing machine", "freezer", "soundbar", "wall charger", "hiking tent", "violin",
            "bread maker", "lawnmower", "electric guitar", "bookshelf", "sleeping bag", "tea kettle set", "pressure cooker",
            "car seat", "night light", "smoke detector", "drill", "ceiling lamp", "usb hub", "mixer", "rowing machine",
            "phone holder", "notebook", "steam iron", "trampoline", "baby carrier", "mattress", "espresso mill",
        ],
        before=["", "", "Hello,", "Hi there.", "Good morning.", "Dear team,", "Hi,", "Customer 4410 here."],
        after=["", "", "", "Thanks.", "Please help.", "Best regards.", "Thank you for your time."],
        urgent=["This is urgent.", "I need an answer today.", "Please reply at once.", "It cannot wait, urgent!",
                "I have to know before tonight.", "Urgent: reply today.", "Answer right now, please."],
    ),
    "validation": Bank(
        templates={
            "refund": ["Please pay me back what I spent on the {x}.", "I am still waiting to be refunded for the {x}.",
                       "Send the money for the {x} back to my card."],
            "invoice": ["The bill of the {x} has the wrong date, please fix it.", "I need a copy of the {x} invoice.",
                        "My invoice for the {x} is missing the tax."],
            "cancel": ["I wish to end my {x} subscription.", "Please stop my {x} contract at the end of the month.",
                       "I do not want to renew the {x}."],
            "login": ["My password for the {x} is no longer accepted.", "I am locked out of the {x} account.",
                      "The {x} does not let me sign in."],
            "delivery": ["The {x} I ordered is still not here.", "Has my {x} been shipped?",
                         "The driver brought the {x} to the wrong house."],
            "damaged": ["My {x} was broken in the parcel.", "The {x} has scratches all over, straight from the box.",
                        "One part of the {x} was cracked when it came."],
            "setup": ["Can you tell me how to install the {x}?", "How do I connect the {x} with my network?",
                      "I cannot find the menu to set the clock of the {x}."],
            "outage": ["My {x} suddenly stopped working.", "The {x} keeps losing the connection.",
                       "The {x} shows a red error and does nothing."],
        },
        values=["telephone", "rice cooker", "bike light", "hard drive", "loudspeaker", "water filter", "video lamp"],
        before=["", "Good evening.", "Hello support,", "Hey."],
        after=["", "Thanks a lot.", "Kind regards.", ""],
        urgent=["It is very urgent.", "Answer me today, please."],
    ),
    "test": Bank(
        templates={
            "refund": ["Kindly return the payment for my {x}.", "The {x} is back in your store, so refund me.",
                       "How long does a refund for a {x} take?", "I was charged for a {x} I sent back, return the money."],
            "invoice": ["Please mail me the invoice that belongs to the {x}.", "On the {x} bill my name is spelled wrong.",
                        "I cannot find the invoice for the {x} I bought.", "The total on my {x} invoice does not add up."],
            "cancel": ["Please cancel everything to do with the {x} subscription.", "I have decided to terminate the {x} plan.",
                       "My {x} contract should end in June, please confirm.", "Take the {x} out of automatic renewal."],
            "login": ["Signing in to the {x} fails with my usual password.", "I never get the mail to reset my {x} password.",
                      "My user name for the {x} does not work.", "The {x} account got locked, please open it again."],
            "delivery": ["I have been waiting for the {x} parcel since Friday.", "The tracking number of my {x} does not work.",
                         "Why has the {x} not been shipped yet?", "The courier says my {x} was delivered, but it was not."],
            "damaged": ["When I opened the box, the {x} was broken.", "The {x} you sent has a big dent.",
                        "My {x} came scratched and without its cable.", "The screen of the {x} was cracked in the parcel."],
            "setup": ["I need instructions to set up my {x}.", "What do I press to pair the {x} with a phone?",
                      "The manual does not say how to install the {x}.", "How do I get the new software onto the {x}?"],
            "outage": ["Since this morning my {x} does not respond.", "The {x} turns itself off again and again.",
                       "My {x} has no connection any more.", "The {x} went dead in the middle of work."],
        },
        values=["dishwasher", "digital piano", "alarm clock", "electric kettle", "wifi extender", "e-reader", "baby monitor",
                "turntable", "drone", "sewing machine", "power bank", "desk fan"],
        before=["", "Hello team,", "Good afternoon.", "Hi support,"],
        after=["", "Many thanks.", "Looking forward to your reply.", ""],
        urgent=["Urgent, please!", "I must have an answer today."],
    ),
}  # fmt: skip


def make(bank: Bank, generator: random.Random) -> tuple[str, str]:
    """A message and its routing."""
    intent = generator.choice(list(bank.templates))
    product = generator.choice(bank.values)
    urgent = generator.random() < 0.4
    message = fill(bank, generator, intent, product, extra=generator.choice(bank.urgent) if urgent else "")
    route = {"intent": intent, "team": TEAMS[intent], "product": product, "urgent": urgent}
    return message, json.dumps(route, separators=(",", ":"))

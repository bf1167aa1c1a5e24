"""twinlora: LoRA and QLoRA fine-tuning, planned, trained, compared and served, with measured evidence."""

__version__ = "0.1.0"

"""From a run to a model that people use: whole models and adapters, in the forms that other programs read.

    edited.py     the edited model that a run leads to, in memory
    adapter.py    the change of the weights as factors of low rank
    hf.py         a folder of safetensors, as transformers and vLLM load it
    peft.py       a LoRA adapter, as peft and vLLM load it
    gguf.py       a copy of a GGUF file with the edited tensors replaced, or a LoRA adapter, for llama.cpp
    checks.py     what was written, loaded again, beside the edited model
    card.py       README.md: what was edited, how, with which scores
    run.py        the way from a run to a folder: load, write, load again, compare, name it

Knows runs, checkpoints and evaluation. Knows nothing of methods or of how edits are found.
"""

from sphere.export.run import FORMS, Export, ExportOptions, export_run

__all__ = ["FORMS", "Export", "ExportOptions", "export_run"]

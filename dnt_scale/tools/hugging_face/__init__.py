"""Folders of Hugging Face's transformers: ``dnt export`` writes them, ``dnt import`` reads them.

architectures.py   our settings and tensors as those of GPT-2, Llama or our own class, and back
export.py          a run's newest weights to a folder
tokenizer_json.py  the tokenizer, with the same ids
model_card.py      README.md: what the run was
import_weights.py  a folder to the checkpoint of step 0 of a new run
remote_code/       what is copied into a folder for a model that transformers does not know; it
                   imports torch and transformers only
"""

"""Text to training batches, in four steps that can each be used alone:

corpus.py     where documents come from, and which of them are held out
tokenizer.py  byte-level BPE and chat templates over Hugging Face `tokenizers`
prepare.py    documents -> fixed rows of tokens on disk, once, cached
loader.py     rows -> batches, a pure function of (seed, row index)

`python -m dsv3_jax.data --help` prepares a corpus from the command line; docs/data.md explains.
"""

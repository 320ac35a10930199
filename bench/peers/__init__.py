"""The libraries that `bench/parity.py` compares vitrail with, one module per library.

Each module has:

- `LIBRARY`: the name of its package.
- `TINY`: the models that `--tiny` compares.
- `models()`: the names of all models to compare.
- `compare(name)`: the row of one model, as `comparison.py` describes it.
"""

"""Run notebooks through papermill, only when something they depend on has changed.

    python -m caprl_utils.runner 01_qa_curation 03_caprl_rl_training --profile mini -p seed=1

What papermill lets pass is an error here: an unknown parameter, a cell that calls exit. A notebook runs under
a temporary name and gets its own name when it has succeeded; a failed copy is kept as NAME.failed.ipynb.
"""

"""Images -> written questions -> extracted -> answered -> filtered: the data that the QA reward needs.

The stages are functions of `pipeline`; each continues where a stopped run left off.
"""

"""Where server, policy and transformers compute different log-probs for the same tokens.

tokens -> definition.py: what the folder's config and tensors say each operator computes, in float64 or in the model's dtype
       -> trace.py: what policy and transformers computed, operator by operator
       -> operators.py: each operator of each side beside its definition, on that side's own input
       -> sides.py: log-probs and last hidden states of every side; comparison.py: beside each other, body and head apart
       -> switches.py: what closes how much of the gap
       -> diagnosis.py: the verdict
"""

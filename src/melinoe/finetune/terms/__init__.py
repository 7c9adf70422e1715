"""
The training objective: next-token loss plus the weighted locality terms.

    objective.py      every term of a batch, and the passes of the base model they ask for
    batch_terms.py    the terms of one batch; layers of one shape as one tensor
    base_pass.py      the model as it was before training, on the same tokens
    replay.py         batches of anchor text
    own_text.py       anchor text that the base model writes itself
"""
